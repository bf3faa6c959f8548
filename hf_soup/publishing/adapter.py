"""What an adapter has beside its weights: its settings, as peft reads them, and a tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from hf_soup._util.io import write_json
from hf_soup.checkpoint import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, PEFT_PREFIX, read_header, reader_of
from hf_soup.lineage import write_tokenizer
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
    whole: dict[str, str] = {}
    for info in header:
        name = info.name.removeprefix(PEFT_PREFIX)
        module, factor, part = name.partition(".lora_")
        if not factor:
            whole[name] = name.rpartition(".")[0]
        elif "A" in part:
            ranks[module] = info.shape[0]
    base, layers = adapter.models.base, adapter.described.layers
    assert base is not None, "an adapter has a base"
    matrices = {each.rpartition(".")[0] for each, layer in layers.items() if layer}
    largest = max(ranks.values(), default=1)
    patterns = {
        name: rank
        for rank in sorted({*ranks.values()} - {largest})
        for name in _shortened([module for module, own in ranks.items() if own == rank], ranks)
    }
    source = base.checkpoint.source
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": base.checkpoint.model.removeprefix("local:"),
        "revision": source.commit,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _shortened(ranks, matrices),
        "modules_to_save": sorted({m for name, m in whole.items() if name == f"{m}.weight"}) or None,
        "bias": "all" if any(name.endswith(".base_layer.bias") for name in whole) else "none",
        "fan_in_fan_out": any(layers.get(f"{module}.weight") == "Conv1D" for module in ranks),
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_SETTINGS, settings)
    write_tokenizer(folder, adapter.models.donor.checkpoint)


def _shortened(modules: Iterable[str], among: Collection[str]) -> list[str]:
    """Modules by the last part of their names, where that names no other.

    >>> _shortened(["h.0.q", "h.1.q", "h.0.v"], ["h.0.q", "h.1.q", "h.0.v", "h.1.v"])
    ['h.0.v', 'q']
    """
    wanted = {*modules}
    others = {module.rpartition(".")[2] for module in {*among} - wanted}
    last = {module: module.rpartition(".")[2] for module in wanted}
    return sorted({module if own in others or module not in among else own for module, own in last.items()})
