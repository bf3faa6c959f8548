"""One pinned model: where every tensor lies (file, offset, dtype, shape), on the Hub or in a folder.

Opening a checkpoint reads its config, index and safetensors headers, and no weights. What a stranger wrote in
them is bounded and validated before it is believed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup._util.text import some
from hf_soup.checkpoint.headers import (
    FLOATS,
    ITEM_BYTES,
    Read,
    TensorInfo,
    front_matter,
    joined,
    misplaced,
    read_header,
    read_index,
    read_json,
)
from hf_soup.checkpoint.pickles import PICKLE, PICKLE_INDEX, convert_pickle
from hf_soup.errors import ResolveError, SoupError
from hf_soup.hub import ASSETS, CHECKPOINT, INDEX, MAX_TEXT, SINGLE, Stamp, Token
from hf_soup.recipe import Ingredient, is_local_path, parse_part

_MAX_ASSET = 500_000_000


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
        tensors: Every tensor by its name on disk.
        files: Every file's size in bytes.
        repo: Where it is on the Hub, or None.
        folder: Where it is here, or None; ``files`` are relative to it.
        converted: Weight files that were converted from a pickle, by their name in ``files``.
        notes: What was unusual about opening it.
        stamps: The states of a folder's weight files when it was opened.
    """

    model: str
    config: Mapping[str, Any] = field(repr=False)
    card: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    files: Mapping[str, int] = field(repr=False)
    repo: hub.Repo | None = field(default=None, repr=False)
    folder: Path | None = field(default=None, repr=False)
    converted: Mapping[str, Path] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.model}@{self.short}" if self.short else self.model

    @cached_property
    def revision(self) -> str:
        """The full commit, or ``sha256:…`` over a folder's weight files, which are read where it is not known yet."""
        if self.repo is not None:
            return self.repo.revision
        hashes = in_parallel(hub.sha256_of, self._paths(), threads=4)
        lines = (f"{file} {digest}\n" for file, digest in zip(sorted(self.weight_files), hashes, strict=True))
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def known_revision(self) -> str | None:
        """The revision, where it costs no reading."""
        known = self.repo or "revision" in self.__dict__ or all(hub.known_sha256(path) for path in self._paths())
        return self.revision if known else None

    @property
    def short(self) -> str:
        """The first seven digits of the revision, where it is known."""
        return (self.known_revision or "").removeprefix("sha256:")[:7]

    @property
    def identity(self) -> str:
        """What tells whether an interrupted merge had the same weights: the commit, or the state of the files."""
        if self.repo is not None:
            return f"{self.model}@{self.repo.revision}"
        return f"{self.model} {sorted(self.stamps.values())}"

    def _paths(self) -> list[Path]:
        """A folder's weight files, in the order of their names."""
        return [self.converted.get(file, (self.folder or Path()) / file) for file in sorted(self.weight_files)]

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

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold tensors, in the order of their first tensor."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def read(self, tensor: TensorInfo, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a tensor, by a range request where it is not here.

        Raises:
            ResolveError: The file is shorter than its header says, or cannot be read.
        """
        return _reader(self.repo, self.folder, self.converted)(tensor.file, tensor.offset + start, tensor.offset + stop)

    def fetch_assets(self, pattern: re.Pattern[str] = ASSETS) -> Path:
        """A folder here that holds the files that match, apart from weights: config, tokenizer, processor."""
        if self.folder is not None:
            return self.folder
        assert self.repo is not None
        wanted = [(self.repo, path) for path in self.files if pattern.fullmatch(path)]
        paths = hub.fetch(wanted, quiet=True)
        return paths[0].parents[len(PurePosixPath(wanted[0][1]).parts) - 1]


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
        )
    return [checkpoint for i in ingredients if isinstance(checkpoint := found[str(i)], Checkpoint)]


# ---- opening ------------------------------------------------------------------------------------------------


def _reader(repo: hub.Repo | None, folder: Path | None, converted: Mapping[str, Path]) -> Read:
    def read(file: str, start: int, stop: int) -> bytes:
        if repo is not None and file not in converted:
            return hub.read_range(repo, file, start, stop)
        path = converted[file] if file in converted else (folder or Path()) / file
        try:
            with path.open("rb") as opened:
                opened.seek(start)
                data = opened.read(stop - start)
        except OSError as error:
            raise ResolveError(f"Cannot read '{path}': {error.strerror}.") from None
        if len(data) != stop - start:
            raise ResolveError(f"'{path}' is shorter than its header says: {start + len(data):,} bytes of {stop:,}.")
        return data

    return read


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
    name = f"{repo.id}@{repo.revision[:7]}"
    files = {path: file.size for path, file in repo.files.items()}
    read = _reader(repo, None, {})
    return _assemble(
        name=name,
        model=repo.id,
        files=files,
        read=read,
        card=repo.card,
        repo=repo,
        folder=None,
        allow_pickle=allow_pickle,
        notes=notes,
    )


def _open_folder(folder: Path, ingredient: Ingredient, allow_pickle: bool) -> Checkpoint:
    folder = folder.resolve()
    if ingredient.revision is not None and not ingredient.revision.startswith("sha256:"):
        raise ResolveError(
            f"'{ingredient.model}' is a folder, which has no revision '{ingredient.revision}'.",
            hint="Leave the part after '@' out.",
        )
    # Taken before anything is read, so that no later change goes unseen.
    found = {path: hub.stamp_of(path) for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()}
    files = {path.relative_to(folder).as_posix(): stamp[2] for path, stamp in found.items()}
    read = _reader(None, folder, {})
    checkpoint = _assemble(
        name=f"'{ingredient.model}'",
        model=f"local:{called(folder)}",
        files=files,
        read=read,
        card={},
        repo=None,
        folder=folder,
        allow_pickle=allow_pickle,
        notes=[],
    )
    checkpoint = replace(checkpoint, stamps={p: found.get(p) or hub.stamp_of(p) for p in checkpoint._paths()})
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
        for path, stamp in checkpoint.stamps.items():
            if not path.exists() or hub.stamp_of(path) != stamp:
                raise hub.changed_while_read(str(checkpoint), path.name)


def _assemble(
    *,
    name: str,
    model: str,
    files: Mapping[str, int],
    read: Read,
    card: Mapping[str, Any],
    repo: hub.Repo | None,
    folder: Path | None,
    allow_pickle: bool,
    notes: Sequence[str],
) -> Checkpoint:
    if not {SINGLE, INDEX, PICKLE, PICKLE_INDEX} & set(files) and (foreign := _other_format(files, folder)):
        raise ResolveError(f"{name} is {foreign[0]}, not a model with safetensors.", hint=foreign[1])
    if "config.json" not in files:
        kind = "an adapter, not a whole model" if "adapter_config.json" in files else "not a transformers model"
        hint = f"It holds {some(files) or 'nothing'}."
        if "adapter_config.json" in files:
            hint = "Merge the adapter into its base first (peft's `merge_and_unload`)."
        elif steps := [found[1] for path in files if (found := re.fullmatch(r"(checkpoint-\d+)/config\.json", path))]:
            hint = f"It is a training run: name a checkpoint of it, as {steps[0]}, or `cook` it with `--method swa`."
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
        card = front_matter(read("README.md", 0, length))
    config = read_json(read, "config.json", files, name)
    converted: dict[str, Path] = {}
    if SINGLE in files:
        shards: Sequence[str] = [SINGLE]
        index = b""
    elif INDEX in files:
        index, shards = read_index(read, INDEX, files, name)
    elif {PICKLE, PICKLE_INDEX} & set(files) and allow_pickle:
        index = b""
        converted = {SINGLE: convert_pickle(name, files, read, repo, folder)}
        shards = [SINGLE]
        files = {**files, SINGLE: converted[SINGLE].stat().st_size}
        read = _reader(repo, folder, converted)
        notes = [*notes, "its weights were converted from pytorch_model.bin"]
    else:
        raise _no_safetensors(name, model, files, repo)
    headers = in_parallel(lambda file: read_header(read, file, files[file], name), shards)
    tensors = joined(tuple(headers))
    if isinstance(tensors, tuple):
        one, other = tensors
        raise ResolveError(
            f"{name} has the tensor '{one.name}' twice: in {one.file} and {other.file}.",
            hint="The upload mixes two versions of the model; ask its owner.",
        )
    absent = misplaced(index, tuple(headers)) if index else []
    if absent:
        raise ResolveError(
            f"{name}: {INDEX} names {len(absent)} tensors that are not in the file it says: {some(absent)}.",
            hint="The upload is incomplete or mixes two versions; ask its owner.",
        )
    if not tensors:
        raise ResolveError(f"{name} has a weight file without a single tensor.")
    return Checkpoint(
        model=model,
        config=config,
        card=card,
        tensors=tensors,
        files=files,
        repo=repo,
        folder=folder,
        converted=converted,
        notes=tuple(notes),
    )


_BESIDE = "\nThen put config.json and the tokenizer's files beside what comes out."


def _other_format(files: Mapping[str, int], folder: Path | None) -> tuple[str, str] | None:
    """What a folder is that another tool wrote, and what makes a model of it; None where it is not one of these."""
    where = folder or Path("FOLDER")
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


def _no_safetensors(name: str, model: str, files: Mapping[str, int], repo: hub.Repo | None) -> ResolveError:
    pickled = [file for file in files if re.fullmatch(r"pytorch_model.*\.bin", file)]
    variants = [file for file in files if file.endswith(".safetensors")]
    if pickled:
        convert = "https://huggingface.co/spaces/safetensors/convert" if repo else "`model.save_pretrained(folder)`"
        return ResolveError(
            f"{name} has no safetensors, only {some(pickled)}: a pickle can run code when it is read.",
            hint=f"Have it converted ({convert}) and use the result, or name it in a recipe that says "
            "`allow_pickle: true`, which reads tensors only and converts them once into the cache.",
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
        hint=f"It holds {some(files)}. Check that this is a transformers model in PyTorch format.",
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
