"""The modules of a sentence-transformers model: its transformer, and what makes an embedding of what that gives.

``modules.json`` lists them. Each but the transformer has its settings in a folder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_soup._util.text import strings
from hf_soup.checkpoint.checkpoint import Checkpoint
from hf_soup.checkpoint.file_sources import FileSource
from hf_soup.checkpoint.headers import read_json, read_json_value
from hf_soup.errors import ResolveError

#: Settings where nobody says them, and those that follow from the transformer.
_DEFAULTS = {"include_prompt": True} | dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding")
_WIDTHS = {"embedding_dimension", "word_embedding_dimension"}
#: Of pooling, as older versions wrote it: a switch for each mode, in the order in which vectors are joined.
_SWITCHES = [f"pooling_mode_{mode}" for mode in ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens")] + [
    f"pooling_mode_{mode}" for mode in ("weightedmean_tokens", "lasttoken")
]


def stated_modules(source: FileSource, name: str) -> list[Mapping[str, Any]]:
    """What ``modules.json`` lists; nothing where there is none.

    Raises:
        ResolveError: It is no list of modules with ``type`` and ``path``.
    """
    if "modules.json" not in source.files:
        return []
    stated = read_json_value(source.read, "modules.json", source.files, name)
    modules = stated if isinstance(stated, list) else []
    if not modules or not all(
        isinstance(each, dict) and isinstance(each.get("type"), str) and isinstance(each.get("path"), str)
        for each in modules
    ):
        raise ResolveError(f"{name}: modules.json is not a list of modules with `type` and `path`.")
    return modules


def described_modules(checkpoint: Checkpoint, name: str) -> list[str]:
    """The class and the settings of each module in their order; what the library takes where none are listed.

    Models with the same descriptions make embeddings in the same way of what their transformers give, whichever
    version wrote their files.
    """
    if not (stated := stated_modules(checkpoint.source, name)):
        kind = next(iter(strings(checkpoint.config.get("architectures"))), "")
        if "For" in kind and not kind.endswith("ForCausalLM"):
            return ["Transformer"]
        return ["Transformer", f"Pooling (pooling_mode {'lasttoken' if 'For' in kind else 'mean'})"]
    files, described = checkpoint.source.files, []
    for module in stated:
        file = f"{module['path']}/config.json"
        settings = read_json(checkpoint.source.read, file, files, name) if file in files else {}
        settings["kwargs"] = module.get("kwargs") or None
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            modes = settings.get("pooling_mode") or [switch for switch in _SWITCHES if settings.get(switch)] or "mean"
            modes = modes if isinstance(modes, list) else [modes]
            settings = {key: settings[key] for key in settings.keys() - _WIDTHS if key not in _SWITCHES}
            settings["pooling_mode"] = " and ".join(re.sub("^pooling_mode_|_tokens?$", "", str(mode)) for mode in modes)
        own = sorted(f"{key} {value}" for key, value in settings.items() if value not in (None, _DEFAULTS.get(key)))
        described.append(kind + (f" ({', '.join(own)})" if own else ""))
    return described
