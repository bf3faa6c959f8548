"""One pinned model: where every tensor lies (file, offset, dtype, shape), on the Hub or in a folder.

Opening a checkpoint reads its config, index and safetensors headers, and no weights. What a stranger wrote in
them is bounded and validated before it is believed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup._util.text import some
from hf_soup.checkpoint.file_sources import FileSource, HubRepo, LocalFolder
from hf_soup.checkpoint.headers import (
    FLOATS,
    ITEM_BYTES,
    TensorInfo,
    front_matter,
    joined,
    read_header,
    read_index,
    read_json,
)
from hf_soup.checkpoint.pickles import PICKLE, PICKLE_INDEX, convert_pickle
from hf_soup.checkpoint.tensor_sources import TensorSource
from hf_soup.errors import ResolveError, SoupError
from hf_soup.hub import ASSETS, CHECKPOINT, INDEX, MAX_TEXT, SINGLE, Token
from hf_soup.recipe import Ingredient, is_local_path, parse_part

_MAX_ASSET = 500_000_000
#: What makes safetensors of a pickle, on the Hub and elsewhere.
_BOT, _LIBRARY = "https://huggingface.co/spaces/safetensors/convert", "`model.save_pretrained(folder)`"


def called(folder: Path) -> str:
    """What a folder is called where its path is nobody's business; a checkpoint of a run with the run's name.

    >>> called(Path("/home/me/run-2")), called(Path("/home/me/run-2/checkpoint-200"))
    ('run-2', 'run-2/checkpoint-200')
    """
    within = f"{folder.parent.name}/" if CHECKPOINT.fullmatch(folder.name) and folder.parent.name else ""
    return f"{within}{folder.name}".replace("@", "-")  # what stands after an @ is a revision


@dataclass(frozen=True)
class Checkpoint:
    """A model whose weights are known by name and place, pinned to a commit or to the sha256 of its weight files.

    Args:
        model: ``owner/name`` as the Hub answers, or ``local:name`` for a folder; see `called`.
        config: ``config.json``.
        card: The front matter of ``README.md``.
        source: Where its files are.
        weights: Where its tensors are.
        notes: What was unusual about opening it.
    """

    model: str
    config: Mapping[str, Any] = field(repr=False)
    card: Mapping[str, Any] = field(repr=False)
    source: FileSource = field(repr=False)
    weights: TensorSource = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model}@{self.short}" if self.short else self.model

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name on disk."""
        return self.weights.tensors

    @property
    def revision(self) -> str:
        """The full commit, or ``sha256:…`` over a folder's weight files, which are read where it is not known yet."""
        return self.source.commit or self.weights.content

    @property
    def known_revision(self) -> str | None:
        """The revision, where it costs no reading."""
        return self.source.commit or self.weights.known_content

    @property
    def short(self) -> str:
        """The first seven digits of the revision, where it is known."""
        return (self.known_revision or "").removeprefix("sha256:")[:7]

    @property
    def identity(self) -> str:
        """What tells whether an interrupted merge had the same weights: the commit, or the state of the files."""
        if self.source.commit:
            return f"{self.model}@{self.source.commit}"
        return f"{self.model} {sorted(self.weights.source.stamps[file] for file in self.weights.files)}"

    @property
    def parameters(self) -> int:
        """How many numbers its floating-point tensors hold."""
        return sum(self._numbers.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types of its floating-point tensors, the commonest (by numbers held) first."""
        return tuple(sorted(self._numbers, key=lambda dtype: -self._numbers[dtype]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """How many numbers there are of each floating-point type."""
        held: dict[str, int] = {}
        for tensor in self.tensors.values():
            held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.size
        return {dtype: size // ITEM_BYTES[dtype] for dtype, size in held.items() if dtype in FLOATS}


def open_checkpoint(
    ingredient: Ingredient | str,
    *,
    allow_pickle: bool = False,
    token: Token = None,
    on_hub: bool = False,
    whole: bool = False,
) -> Checkpoint:
    """Pin a model and read its config, card and tensor headers.

    Args:
        ingredient: A Hub id, ``id@revision``, a huggingface.co address or a folder.
        allow_pickle: Convert ``pytorch_model.bin`` (read with ``weights_only=True``) where there is nothing else.
        token: As everywhere in huggingface_hub.
        on_hub: It is an id that a card names, and no folder that happens to be called so.
        whole: As in `hub.resolve`.

    Raises:
        ResolveError: It cannot be found or reached, has no safetensors, or its headers are not to be believed.
    """
    if isinstance(ingredient, str):
        ingredient = parse_part(Ingredient, ingredient, "the name of a model")
    folder = Path(os.path.expanduser(ingredient.model))  # noqa: PTH111 -- the other raises for an unknown user
    here = is_local_path(str(folder)) and not on_hub
    if here and folder.is_dir():
        return _open_folder(folder, ingredient, allow_pickle)
    if here or ingredient.model.startswith((".", "/", "~")) or ingredient.model.count("/") > 1:
        raise ResolveError(
            f"'{ingredient.model}' is neither a folder nor a Hub id.",
            hint="Name a folder with config.json and model.safetensors, or a Hub id `owner/name`.",
        )
    if ingredient.model.startswith("local:"):
        raise ResolveError(
            f"'{ingredient.model}' was a folder on the machine where the recipe was resolved.",
            hint="Put that folder's path in its place.",
        )
    repo = hub.resolve(ingredient.model, ingredient.revision, token=token, whole=whole)
    return _open_repo(repo, allow_pickle)


def open_all(
    ingredients: Sequence[Ingredient | str], *, allow_pickle: bool = False, token: Token = None
) -> list[Checkpoint]:
    """`open_checkpoint` for several at once; when some fail, the error lists every one.

    Raises:
        ResolveError: At least one cannot be opened.
    """

    def attempt(ingredient: Ingredient | str) -> Checkpoint | SoupError:
        try:
            return open_checkpoint(ingredient, allow_pickle=allow_pickle, token=token)
        except SoupError as error:
            return error

    unique = {str(ingredient): ingredient for ingredient in ingredients}
    # Those on the Hub wait for answers; folders only for each other, with their headers in memory.
    threads = 2 if all(is_local_path(str(ingredient).partition("@")[0]) for ingredient in unique.values()) else 8
    found = dict(zip(unique, in_parallel(attempt, list(unique.values()), threads), strict=True))
    errors = [error for error in found.values() if isinstance(error, SoupError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise ResolveError(
            f"{len(errors)} of {len(unique)} models cannot be used:\n"
            + "\n".join(f"  {error.message}" for error in errors),
            hint=" ".join(hints),
            code=errors[0].code if len({error.code for error in errors}) == 1 else "",
            subjects=[subject for error in errors for subject in error.subjects],
        )
    return [checkpoint for i in ingredients if isinstance(checkpoint := found[str(i)], Checkpoint)]


# ---- opening ------------------------------------------------------------------------------------------------


def _open_repo(repo: hub.Repo, allow_pickle: bool) -> Checkpoint:
    notes = []
    if repo.from_cache:
        notes.append("the Hub was not reached; the commit is the one in the cache")
    if not {SINGLE, INDEX} & set(repo.files) and repo.requested in (None, "main"):
        offered = hub.conversion_of(repo)
        if offered is not None:
            notes.append(f"its safetensors are in the conversion bot's pull request ({offered.requested})")
            hub.remember_commit("model", repo.id, repo.requested, found=offered.id, commit=offered.revision)
            repo = offered
    return _assemble(f"{repo.id}@{repo.revision[:7]}", repo.id, HubRepo.of(repo), repo.card, notes, allow_pickle)


def _open_folder(folder: Path, ingredient: Ingredient, allow_pickle: bool) -> Checkpoint:
    folder = folder.resolve()
    if ingredient.revision is not None and not ingredient.revision.startswith("sha256:"):
        raise ResolveError(
            f"'{ingredient.model}' is a folder, which has no revision '{ingredient.revision}'.",
            hint="Leave the part after '@' out.",
        )
    source = LocalFolder.of(folder, [*folder.glob("*"), *folder.glob("*/*")])
    checkpoint = _assemble(f"'{ingredient.model}'", f"local:{called(folder)}", source, {}, [], allow_pickle)
    if ingredient.revision is not None and ingredient.revision != checkpoint.revision:
        raise ResolveError(
            f"The weights in '{ingredient.model}' are not the ones that the recipe names.\n"
            f"  recipe {ingredient.revision}\n  folder {checkpoint.revision}",
            hint="Use the folder as it was, or take the revision out of the recipe.",
        )
    return checkpoint


def require_unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse folders whose weights are not those that were pinned any more, as where training goes on.

    Raises:
        MergeError: A file was written to since.
    """
    for checkpoint in checkpoints:
        source = checkpoint.weights.source
        for file in checkpoint.weights.files if source.stamps else ():
            path = source.fetch(file)
            if not path.exists() or hub.stamp_of(path) != source.stamps[file]:
                raise hub.changed_while_read(str(checkpoint), path.name)


def _assemble(
    name: str, model: str, source: FileSource, card: Mapping[str, Any], notes: Sequence[str], allow_pickle: bool
) -> Checkpoint:
    files = source.files
    if not {SINGLE, INDEX, PICKLE, PICKLE_INDEX} & set(files) and (foreign := _other_format(source)):
        raise ResolveError(f"{name} is {foreign[0]}, not a model with safetensors.", hint=foreign[1])
    if "config.json" not in files:
        kind = "an adapter, not a whole model" if "adapter_config.json" in files else "not a transformers model"
        hint = f"It holds {some(files) or 'nothing'}."
        if "adapter_config.json" in files:
            hint = "Merge the adapter into its base first (peft's `merge_and_unload`)."
        elif steps := [found[1] for path in files if (found := re.fullmatch(r"(checkpoint-\d+)/config\.json", path))]:
            hint = f"It is a run: name a checkpoint of it, as {steps[0]}, or cook it with `--select run_average`."
        raise ResolveError(
            f"{name} has no config.json: it is {kind}.",
            hint=hint,
            code="adapter" if "adapter_config.json" in files else "no-config",
        )
    large = next((path for path, size in files.items() if ASSETS.fullmatch(path) and size > _MAX_ASSET), None)
    if large is not None:
        # These are fetched before any disk is looked at, so a stranger's file must not be able to fill one.
        raise ResolveError(f"{name}: {large} has {files[large]:,} bytes, more than any such file needs.")
    length = files.get("README.md", 0)
    if length > MAX_TEXT:
        card = {}
        notes = [*notes, f"its README.md has {length:,} bytes and is not used; at most {MAX_TEXT:,} are read"]
    elif not card and length:
        card = front_matter(source.read("README.md", 0, length))
    config = read_json(source.read, "config.json", files, name)
    shards: Sequence[str] = [SINGLE]
    places: Mapping[str, str] = {}
    stored = source
    if SINGLE not in files and INDEX in files:
        places = read_index(source.read, INDEX, files, name)
        shards = list(dict.fromkeys(places.values()))
    elif SINGLE not in files and {PICKLE, PICKLE_INDEX} & set(files) and allow_pickle:
        stored = convert_pickle(name, source)
        notes = [*notes, "its weights were converted from pytorch_model.bin"]
    elif SINGLE not in files:
        raise _no_safetensors(name, source)
    headers = in_parallel(lambda file: read_header(stored.read, file, stored.files[file], name), shards)
    tensors = joined(tuple(headers), name)
    absent = [tensor for tensor, file in places.items() if tensor not in tensors or tensors[tensor].file != file]
    if absent:
        raise ResolveError(
            f"{name}: {INDEX} names {len(absent)} tensors that are not in the file it says: {some(absent)}.",
            hint="The upload is incomplete or mixes two versions; ask its owner.",
        )
    if not tensors:
        raise ResolveError(f"{name} has a weight file without a single tensor.")
    return Checkpoint(model, config, card, source, TensorSource(tensors, stored), tuple(notes))


_BESIDE = "\nThen put config.json and the tokenizer's files beside what comes out."


def _other_format(source: FileSource) -> tuple[str, str] | None:
    """What a folder is that another tool wrote, and what makes a model of it; None where it is not one of these."""
    files, where = source.files, Path("FOLDER" if source.commit else source.reference)
    if quantised := [file for file in files if file.endswith(".gguf")]:
        load = f"AutoModelForCausalLM.from_pretrained({str(where)!r}, gguf_file={quantised[0]!r})"
        return (
            f"in the format of llama.cpp ({some(quantised)})",
            "Use the model that it was made of. Where there is none: python -c "
            + shlex.quote(f"from transformers import AutoModelForCausalLM; {load}.save_pretrained('CONVERTED')"),
        )
    if "zero_to_fp32.py" in files or any(re.match(r"global_step\d+/\w*zero_pp_rank", file) for file in files):
        convert = "deepspeed.utils.zero_to_fp32"  # and not the script in the folder, which may be a stranger's
        join = shlex.join(["python", "-m", convert, str(where), "CONVERTED", "--safe_serialization"])
        return "a checkpoint of DeepSpeed, in the parts that each process had", f"Join them: {join}{_BESIDE}"
    if parts := sorted(file for file in files if file.endswith(".distcp") and "optim" not in file):
        join = shlex.join(["accelerate", "merge-weights", str((where / parts[0]).parent), "CONVERTED"])
        return "a checkpoint of FSDP, in the parts that each process had", f"Join them: {join}{_BESIDE}"
    return None


def _no_safetensors(name: str, source: FileSource) -> ResolveError:
    pickled = [file for file in source.files if re.fullmatch(r"pytorch_model.*\.bin", file)]
    variants = [file for file in source.files if file.endswith(".safetensors")]
    if pickled:
        return ResolveError(
            f"{name} has no safetensors, only {some(pickled)}: a pickle can run code when it is read.",
            hint=f"Have it converted ({_BOT if source.commit else _LIBRARY}) and use the result, or name it in a "
            "recipe that says `allow_pickle: true`, which reads tensors only and converts them once into the cache.",
            code="pickle",
        )
    if variants:
        return ResolveError(
            f"{name} has neither {SINGLE} nor {INDEX}; its safetensors files are {some(variants)}.",
            hint="Only the names that transformers loads by default are used; save the model under them.",
            code="no-weights",
        )
    return ResolveError(
        f"{name} has no weights: neither {SINGLE} nor {INDEX}.",
        hint=f"It holds {some(source.files)}. Check that this is a transformers model in PyTorch format.",
        code="no-weights",
    )


def distinct_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What to call each checkpoint: its model; where two share it, with the revision, and then with a number."""
    names = [checkpoint.model for checkpoint in checkpoints]
    twice = {name for name in names if names.count(name) > 1}
    names = [
        f"{each.model}@{each.revision.removeprefix('sha256:')[:7]}" if each.model in twice else each.model
        for each in checkpoints
    ]
    return [
        f"{name}#{names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
