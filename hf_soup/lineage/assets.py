"""What a merged model needs beside its weights: the donor's config, tokenizer and processor, without their origin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_soup._util.io import write_json
from hf_soup._util.text import some
from hf_soup.checkpoint import (
    Checkpoint,
    body_config,
    files_beside,
    num_labels,
    output_dtype_config,
    read_json,
    with_labels,
)
from hf_soup.errors import RecipeError, shortened
from hf_soup.hub import ASSETS, CHAT, MODULES, PROCESSOR, TOKENIZER
from hf_soup.lineage.alignment import AlignedModels
from hf_soup.recipe import Finding

#: Keys of JSON files that no loading depends on.
_INCIDENTAL = {
    *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "__version__", "tokenizer_file"),
    *("special_tokens_map_file", "is_local", "local_files_only"),
}
_PLACED = re.compile(r"\w+_(path|file)")
_PLACE = re.compile(r"[/~]|[A-Za-z]:[\\/]")
#: Files that hold such keys; in a vocabulary they are words.
_CONFIG = re.compile(r"config\.json$")
#: Files of settings that are compared, and the places of a chat template, what is taken first at the front.
_SETTINGS = re.compile(r"generation_config\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
#: Settings as they are where no file says them.
_USUAL = {"similarity_fn_name": "cosine", "model_type": "SentenceTransformer", "_from_model_config": True}
#: Keys that name code, which is not taken over and would be looked for, and where a config came from.
_LEFT_OUT = {"auto_map", "custom_pipelines", "_name_or_path"}


def soup_config(models: AlignedModels, dtype: str) -> dict[str, Any]:
    """The donor's config with the dtype that is written and the names of the outputs; without a head, the body's."""
    donor = models.donor.checkpoint
    config: dict[str, Any] = _tidied(output_dtype_config(donor.config, dtype), local=not donor.source.commit)
    if models.options.heads == "body":
        return body_config(config, donor.model)
    if models.untied:
        config["tie_word_embeddings"] = False
    names = models.labels
    if names is not None:
        known = num_labels(config)
        if known not in (None, len(names)):
            raise RecipeError(f"The recipe gives {len(names)} `labels`; the models have {known} outputs.")
        return with_labels(config, names)
    return config


def write_assets(folder: Path, config: Mapping[str, Any], models: AlignedModels) -> None:
    """Write the config, and copy what loading needs beside it."""
    _copy(folder, _taken(models))
    write_json(folder / "config.json", config)


def _taken(models: AlignedModels) -> dict[str, Checkpoint]:
    """Who gives which file.

    The donor gives its own. Where it has no tokenizer or no processor, the first ingredient that has one gives that,
    else the first of those that are not in the soup.
    """
    donor = models.donor.checkpoint
    sources = [donor, *(model.checkpoint for model in models.ingredients), *models.asset_sources]
    taken = dict.fromkeys((file for file in donor.source.files if ASSETS.fullmatch(file)), donor)
    for needed, along in ((TOKENIZER, CHAT), (PROCESSOR, PROCESSOR)):
        having = next((each for each in sources if any(map(needed.fullmatch, each.source.files))), donor)
        if having is not donor:
            taken |= {file: having for file in having.source.files if needed.fullmatch(file) or along.fullmatch(file)}
    return taken


def write_files_beside(folder: Path, donor: Checkpoint) -> None:
    """Copy a tokenizer of the adapter's own, and sentence-transformers' modules, which do not load without one."""
    wanted, files = set(files_beside(donor)), donor.source.files
    if any(map(MODULES.fullmatch, files)):
        wanted |= {file for file in files for kind in (MODULES, TOKENIZER, CHAT) if kind.fullmatch(file)}
    _copy(folder, dict.fromkeys(sorted(wanted), donor))


def _copy(folder: Path, taken: Mapping[str, Checkpoint]) -> None:
    """Files of models, without what they must not name."""
    places = {id(checkpoint): checkpoint.source.fetch_assets() for checkpoint in taken.values()}
    for file, checkpoint in taken.items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        data = (places[id(checkpoint)] / file).read_bytes()
        target.write_bytes(_tidied_json(data, local=not checkpoint.source.commit) if _CONFIG.search(file) else data)


def _tidied(values: Any, *, local: bool) -> Any:
    """A config without what it must not name, at any depth: code, and a folder's without places on its owner's disk."""
    if isinstance(values, list):
        return [_tidied(each, local=local) for each in values]
    if not isinstance(values, dict):
        return values
    return {
        key: _tidied(each, local=local)
        for key, each in values.items()
        if key not in _LEFT_OUT and not (local and _PLACED.fullmatch(key) and _PLACE.match(str(each)))
    }


def _tidied_json(data: bytes, *, local: bool) -> bytes:
    try:
        values = json.loads(data)
        kept = _tidied(values, local=local)
    except (ValueError, RecursionError):
        return data
    return data if kept == values else (json.dumps(kept, indent=2) + "\n").encode()


def settings(models: AlignedModels) -> Iterator[Finding]:
    """Generation configs, prompts, similarity functions and chat templates that differ, and whose the soup will have.

    Models with other ones can be averaged. The soup has one model's.
    """
    taken = _taken(models)
    files = {file for model in models.ingredients for file in model.checkpoint.source.files}
    for kind in (*([file] for file in sorted(filter(_SETTINGS.fullmatch, files))), _TEMPLATES):
        donor = next((taken[file] for file in kind if file in taken), models.donor.checkpoint)
        whose = next((model.name for model in models.ingredients if model.checkpoint is donor), donor.model)
        for model in models.ingredients:
            if donor.source.content_ids(kind.__contains__) == model.checkpoint.source.content_ids(kind.__contains__):
                continue
            ours, theirs = _stated(donor, kind), _stated(model.checkpoint, kind)
            compared = ours.keys() & theirs if kind[0].startswith("sentence_") else ours.keys() | theirs
            if differing := [key for key in sorted(compared) if ours.get(key) != theirs.get(key)]:
                shown = [f"{shortened(key, 80)} {_shown(ours, key)} against {_shown(theirs, key)}" for key in differing]
                file = "chat templates" if kind is _TEMPLATES else kind[0]
                message = f"{whose} and {model.name} differ in {file}: {some(shown)}. The soup will have {whose}'s."
                yield Finding("settings", message, (whose, model.name))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return shortened(json.dumps(values[key]), 80) if key in values else "nothing"


def _stated(checkpoint: Checkpoint, kind: Sequence[str]) -> dict[str, Any]:
    """The settings in a file that are other than the library's own; of chat templates the one that it takes."""
    source = checkpoint.source
    here = [file for file in kind if file in source.files]
    if kind is _TEMPLATES:
        for file in here:
            if file.endswith(".jinja"):
                return {"chat_template": source.fetch(file).read_text("utf-8", "replace")}
            if text := read_json(source.read, file, source.files, checkpoint.model).get("chat_template"):
                return {"chat_template": text}
        return {}
    values = read_json(source.read, here[0], source.files, checkpoint.model) if here else {}
    if kind[0].startswith("sentence_"):
        return {key: values[key] for key in ("max_seq_length", "do_lower_case") if key in values}
    used = {
        key: {name: each for name, each in value.items() if each} if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _INCIDENTAL
    }
    return {
        key: value for key, value in used.items() if value is not False and value not in ("", {}, None, _USUAL.get(key))
    }


def about_files(models: AlignedModels) -> list[str]:
    """What a reader should know about the files beside the weights, where `settings` and the comparison of tokenizers
    and processors have not said it: files that the donor lacks, and code, which is not taken over.
    """
    donor, whose = models.donor.checkpoint, models.donor.name
    lacking: dict[str, list[str]] = {}
    for model in models.ingredients:
        for file in set(model.checkpoint.source.files) - set(donor.source.files):
            if ASSETS.fullmatch(file) and not (TOKENIZER.fullmatch(file) or PROCESSOR.fullmatch(file)):
                lacking.setdefault(file, []).append(model.name)
    notes = [f"{whose} has no {file}, so the soup has none; {some(lacking[file])} had one." for file in sorted(lacking)]
    if code := [file for file in donor.source.files if re.fullmatch(r"[\w./-]+\.py", file)]:
        notes.append(f"Code is not taken over: {whose} brings {some(code)}.")
    return notes
