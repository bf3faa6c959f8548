"""What an adapter has beside its weights: its settings, as peft reads them, and a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hf_soup._util.io import write_json
from hf_soup.checkpoint import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    read_header,
    reader_of,
)
from hf_soup.lineage import write_files_beside
from hf_soup.merging import AdapterPlan


def write_adapter_files(folder: Path, adapter: AdapterPlan) -> None:
    """Write ``adapter_config.json`` beside the weights: with :math:`s = 1`, and the base by name and commit; and the
    tokenizer of the first adapter, if it has one.

    Args:
        folder: Has the adapter's weights.
        adapter: What they were made by.
    """
    path = folder / ADAPTER_WEIGHTS
    header = read_header(reader_of(path), ADAPTER_WEIGHTS, path.stat().st_size, f"'{folder}'")
    ranks: dict[str, int] = {}
    whole: list[str] = []
    for info in header:
        name = info.name.removeprefix(PEFT_PREFIX)
        module, factor, part = name.partition(".lora_")
        if not factor:
            whole.append(name)
        elif "A" in part:
            ranks[module] = info.shape[0]
    base, described = adapter.models.base, adapter.described
    assert base is not None, "an adapter has a base"
    largest, modules = max(ranks.values(), default=1), described.modules
    patterns = {
        name: rank
        for rank in sorted({*ranks.values()} - {largest})
        for name in _shortened([module for module, own in ranks.items() if own == rank], ranks)
    }
    source, config = base.checkpoint.source, adapter.models.donor.checkpoint.config
    kind = str((config.get("architectures") or ["AutoModel"])[0])
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "auto_mapping": None if adapter.task_type else {"base_model_class": kind, "parent_library": "transformers"},
        "base_model_name_or_path": base.checkpoint.model,
        "revision": source.commit,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _named(ranks, modules),
        "modules_to_save": sorted(_saved_whole(whole, adapter)) or None,
        "bias": "all" if any(".base_layer." in name for name in whole) else "none",
        "fan_in_fan_out": any(described.layers.get(f"{module}.weight") == "Conv1D" for module in ranks),
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_SETTINGS, settings)
    write_files_beside(folder, adapter.models.donor.checkpoint)


def _saved_whole(whole: Collection[str], adapter: AdapterPlan) -> Iterator[str]:
    """The modules of which peft is to have a copy; other tensors that are saved whole it puts into the base.

    Of adapters those of theirs. Of full fine-tunes those with a weight of a plain layer, of which all tensors are
    there and whose name ends no other's.
    """
    described = adapter.described
    if adapter.is_of_adapters:
        every = [name[:end] for name in whole for end in range(len(name)) if name[end] == "."]
        yield from (name for name in adapter.modules_to_save if any(each.endswith(name) for each in every))
        return
    for name in whole:
        module = name.removesuffix(".weight")
        own = [each for each in described.layers if each.rpartition(".")[0] == module]
        others = [each for each in described.modules if each.endswith(module) and each != module]
        plain = all(not described.layers[each].endswith("*") for each in own)
        if name == f"{module}.weight" and own and plain and {*own} <= {*whole} and not others:
            yield module


def _named(modules: Collection[str], among: Collection[str]) -> list[str] | str:
    r"""Modules as peft finds them and no others: by ends of their names, or where such a name ends another's by a
    pattern of whole names.

    >>> _named(["h.0.q", "q"], ["h.0.q", "h.1.q", "q"])
    'h\\.0\\.q|q'
    """
    names = _shortened(modules, among)
    hit = {each for each in among if any(each == name or each.endswith(f".{name}") for name in names)}
    return names if hit == {*modules} else "|".join(re.escape(each) for each in sorted(modules))


def _shortened(modules: Collection[str], among: Collection[str]) -> list[str]:
    """Modules by the last part of their names, where that names no other.

    >>> _shortened(["h.0.q", "h.1.q", "h.0.v"], ["h.0.q", "h.1.q", "h.0.v", "h.1.v"])
    ['h.0.v', 'q']
    """
    last = {module: module.rpartition(".")[2] for module in modules}
    others = {module.rpartition(".")[2] for module in among if module not in last}
    return sorted({module if own in others else own for module, own in last.items()})
