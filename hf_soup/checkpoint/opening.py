"""Opening a checkpoint: reads its config, index and safetensors headers, and no weights.

What a stranger wrote in them is bounded and validated before it is believed.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup._util.text import some
from hf_soup.checkpoint.adapter import (
    ADAPTER_FOLDER,
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    AdaptedFiles,
    AdapterBase,
    adapted_tensors,
    own_tensors,
    require_lora,
)
from hf_soup.checkpoint.checkpoint import Checkpoint, called
from hf_soup.checkpoint.config import adapted_config, is_quantised
from hf_soup.checkpoint.file_sources import FileSource, HubRepo, LocalFolder, SubFolder
from hf_soup.checkpoint.headers import TensorInfo, front_matter, joined, read_header, read_index, read_json
from hf_soup.checkpoint.labels import TIMM, with_labels
from hf_soup.checkpoint.memo import remembered
from hf_soup.checkpoint.parameters import correspondence, layers_of_parameters, stacked_parameters
from hf_soup.checkpoint.pickles import PICKLE, PICKLE_INDEX, convert_pickle
from hf_soup.checkpoint.sentence_modules import stated_modules
from hf_soup.checkpoint.tensor_sources import TensorSource
from hf_soup.errors import ResolveError, SoupError
from hf_soup.hub import ASSETS, INDEX, MAX_TEXT, SINGLE, Token
from hf_soup.recipe import Ingredient, is_local_path, parse_part, split_revision

_MAX_ASSET = 500_000_000
#: Outputs of a head that an adapter brings, and numbers of them that are tried.
_MOST_OUTPUTS, _MOST_GUESSES = 1_000_000, 4
#: What the library works out by itself where a checkpoint does not have it.
_COMPUTED = re.compile(r"position_ids|relative_position_index|num_batches_tracked")
#: Models are opened by several threads, and the library is asked by one at a time.
_ASKING = threading.RLock()
#: What makes safetensors of a pickle, on the Hub and elsewhere.
_BOT, _LIBRARY = "https://huggingface.co/spaces/safetensors/convert", "`model.save_pretrained(folder)`"


def open_checkpoint(
    ingredient: Ingredient | str,
    *,
    allow_pickle: bool = False,
    token: Token = None,
    on_hub: bool = False,
    whole: bool = False,
    base: str | None = None,
) -> Checkpoint:
    """Pin a model and read its config, card and tensor headers; of an adapter also those of its base.

    Args:
        ingredient: A Hub id, ``id@revision``, a huggingface.co address or a folder.
        allow_pickle: Convert ``pytorch_model.bin`` (read with ``weights_only=True``) where there is nothing else.
        token: As everywhere in huggingface_hub.
        on_hub: It is an id that a card names, and no folder that happens to be called so.
        whole: As in `hub.resolve`.
        base: What an adapter changes, where it names nothing that can be used.

    Raises:
        ResolveError: It cannot be found or reached, has no safetensors, or its headers are not to be believed.
    """
    ingredient = _as_ingredient(ingredient)
    bases = _Bases(base, allow_pickle, token, whole)
    return _opened(ingredient, bases.of, allow_pickle=allow_pickle, token=token, on_hub=on_hub, whole=whole)


def _opened(
    ingredient: Ingredient,
    base_of: Callable[..., AdapterBase],
    *,
    allow_pickle: bool,
    token: Token,
    on_hub: bool = False,
    whole: bool = False,
) -> Checkpoint:
    folder = Path(os.path.expanduser(ingredient.model))  # noqa: PTH111 -- the other raises for an unknown user
    here = is_local_path(str(folder)) and not on_hub
    if here and folder.is_dir():
        return _open_folder(folder, ingredient, allow_pickle, partial(base_of, named=ingredient.base))
    place = hub.within_repo(ingredient.model.rstrip("/"))
    if here or ingredient.model.startswith((".", "/", "~")) or (ingredient.model.count("/") > 1 and place is None):
        raise _nowhere(ingredient)
    if ingredient.model.startswith("local:"):
        raise ResolveError(
            f"'{ingredient.model}' was a folder on the machine where the recipe was resolved.",
            hint="Put that folder's path in its place.",
        )
    repo_id, inside = place or (ingredient.model, "")
    try:
        repo = hub.resolve(repo_id, ingredient.revision, token=token, whole=whole)
    except ResolveError as error:
        bare = inside or "/" not in repo_id
        raise _nowhere(ingredient) if bare and error.code == "gone" else error from None
    return _open_repo(repo, inside, allow_pickle, partial(base_of, named=ingredient.base))


def _nowhere(ingredient: Ingredient) -> ResolveError:
    return ResolveError(
        f"'{ingredient.model}' is neither a folder nor a Hub id.",
        hint="Name a folder with config.json and model.safetensors, or a Hub id `owner/name`, or a folder in such a "
        "repo, `owner/name/folder`.",
    )


def open_all(
    ingredients: Sequence[Ingredient | str],
    *,
    allow_pickle: bool = False,
    token: Token = None,
    base: str | None = None,
) -> list[Checkpoint]:
    """`open_checkpoint` for several at once; when some fail, the error lists every one.

    Raises:
        ResolveError: At least one cannot be opened.
    """
    bases = _Bases(base, allow_pickle, token)

    def attempt(ingredient: Ingredient | str) -> Checkpoint | SoupError:
        try:
            return _opened(_as_ingredient(ingredient), bases.of, allow_pickle=allow_pickle, token=token)
        except SoupError as error:
            return error

    unique = {_key(ingredient): ingredient for ingredient in ingredients}
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
    return [checkpoint for i in ingredients if isinstance(checkpoint := found[_key(i)], Checkpoint)]


def _as_ingredient(ingredient: Ingredient | str) -> Ingredient:
    return parse_part(Ingredient, ingredient, "the name of a model") if isinstance(ingredient, str) else ingredient


def _key(ingredient: Ingredient | str) -> tuple[str, str | None]:
    return str(ingredient), ingredient.base if isinstance(ingredient, Ingredient) else None


# ---- opening ------------------------------------------------------------------------------------------------


#: Opens what an adapter changes, given its settings, where they are, and what errors call it.
_OpenBase = Callable[[Mapping[str, Any], FileSource, str], AdapterBase]


def _open_repo(repo: hub.Repo, inside: str, allow_pickle: bool, open_base: _OpenBase) -> Checkpoint:
    notes = []
    if repo.from_cache:
        notes.append("the Hub was not reached; the commit is the one in the cache")
    if inside:
        source: FileSource = SubFolder.of(HubRepo.of(repo), inside)
        name = f"{repo.id}/{inside}@{repo.revision[:7]}"
        if not source.files:
            raise ResolveError(
                f"{repo.id}@{repo.revision[:7]} has no folder '{inside}'.", hint=f"It holds {some(repo.files)}."
            )
        return _assemble(name, source.reference, source, repo.card, notes, allow_pickle, open_base)
    if not {SINGLE, INDEX} & set(repo.files) and repo.requested in (None, "main"):
        offered = hub.conversion_of(repo)
        if offered is not None:
            notes.append(f"its safetensors are in the conversion bot's pull request ({offered.requested})")
            hub.remember_commit("model", repo.id, repo.requested, found=offered.id, commit=offered.revision)
            repo = offered
    name, source = f"{repo.id}@{repo.revision[:7]}", HubRepo.of(repo)
    return _assemble(name, repo.id, source, repo.card, notes, allow_pickle, open_base)


def _open_folder(folder: Path, ingredient: Ingredient, allow_pickle: bool, open_base: _OpenBase) -> Checkpoint:
    folder = folder.resolve()
    if ingredient.revision is not None and not ingredient.revision.startswith("sha256:"):
        raise ResolveError(
            f"'{ingredient.model}' is a folder, which has no revision '{ingredient.revision}'.",
            hint="Leave the part after '@' out.",
        )
    source = LocalFolder.of(folder, [*folder.glob("*"), *folder.glob("*/*")])
    checkpoint = _assemble(f"'{ingredient.model}'", f"local:{called(folder)}", source, {}, [], allow_pickle, open_base)
    if ingredient.revision is not None and ingredient.revision != checkpoint.revision:
        raise ResolveError(
            f"The weights in '{ingredient.model}' are not the ones that the recipe names.\n"
            f"  recipe {ingredient.revision}\n  folder {checkpoint.revision}",
            hint="Use the folder as it was, or take the revision out of the recipe.",
        )
    return checkpoint


def _assemble(
    name: str,
    model: str,
    source: FileSource,
    card: Mapping[str, Any],
    notes: Sequence[str],
    allow_pickle: bool,
    open_base: _OpenBase,
) -> Checkpoint:
    files = source.files
    length = files.get("README.md", 0)
    if length > MAX_TEXT:
        card = {}
        notes = [*notes, f"its README.md has {length:,} bytes and is not used; at most {MAX_TEXT:,} are read"]
    elif not card and length:
        card = front_matter(source.read("README.md", 0, length))
    large = next((path for path, size in files.items() if ASSETS.fullmatch(path) and size > _MAX_ASSET), None)
    if large is not None:
        # These are fetched before any disk is looked at, so a stranger's file must not be able to fill one.
        raise ResolveError(f"{name}: {large} has {files[large]:,} bytes, more than any such file needs.")
    _require_transformer_first(source, name)
    if ADAPTER_SETTINGS in files and not {SINGLE, INDEX, PICKLE, PICKLE_INDEX} & set(files):
        return _adapted(name, model, source, card, notes, open_base)
    if not {SINGLE, INDEX, PICKLE, PICKLE_INDEX} & set(files) and (foreign := _other_format(source)):
        raise ResolveError(f"{name} is {foreign[0]}, not a model of transformers.", hint=foreign[1])
    if "config.json" not in files:
        hint = f"It holds {some(files) or 'nothing'}."
        if steps := [found[1] for path in files if (found := re.fullmatch(r"(checkpoint-\d+)/config\.json", path))]:
            hint = f"It is a run: name a checkpoint of it, as {steps[0]}, or cook it with `--select run_average`."
        if inner := [path for path in files if path.endswith(f"/{ADAPTER_SETTINGS}")]:
            shown = f"{source.reference}/{inner[0].removesuffix(f'/{ADAPTER_SETTINGS}')}"
            hint = f"There are adapters in folders of it: name one, as {shown}."
        raise ResolveError(f"{name} has no config.json: it is not a transformers model.", hint=hint, code="no-config")
    config = read_json(source.read, "config.json", files, name)
    if config.get("model_type") == TIMM and isinstance(labels := config.get("label_names"), list):
        config = with_labels(config, [str(label) for label in labels])
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


def _adapted(
    name: str, model: str, source: FileSource, card: Mapping[str, Any], notes: Sequence[str], open_base: _OpenBase
) -> Checkpoint:
    """An adapter over its base."""
    settings = read_json(source.read, ADAPTER_SETTINGS, source.files, name)
    require_lora(settings, name)
    if ADAPTER_WEIGHTS not in source.files:
        raise ResolveError(
            f"{name} is an adapter without {ADAPTER_WEIGHTS}; it holds {some(source.files)}.",
            hint="Load it with peft and save it again, which writes safetensors.",
            code="no-weights",
        )
    below = open_base(settings, source, name)
    base, own = below.checkpoint, settings.get("base_model_name_or_path")
    if isinstance(own, str) and base.source.reference not in (own, str(Path(own).absolute())):
        notes = [*notes, f"it names '{own[:200]}' as its base; {base.model} is taken"]
    files = AdaptedFiles.of(base.weights.source, source)
    stored = ADAPTER_FOLDER + ADAPTER_WEIGHTS
    try:
        factors = read_header(files.read, stored, files.files[stored], name)
    except ResolveError as error:
        raise ResolveError.of(error, error.message.replace(stored, ADAPTER_WEIGHTS)) from None
    if own := own_tensors(factors, below):
        with _ASKING:
            below = _with_head(below, own, settings, name)
    elif settings.get("task_type") not in (None, "CAUSAL_LM"):
        wanted, has = (each.get("architectures") for each in (adapted_config(base.config, settings), base.config))
        if wanted != has:
            notes = [
                *notes,
                f"it was trained as {some(wanted or ())} and brings no head; it counts as {some(has or ())}",
            ]
    tensors, unloaded = adapted_tensors(settings, factors, below, name)
    notes = [*notes, *unloaded]
    weights = TensorSource(tensors, files, (*base.tensors.values(), *factors))
    config = below.checkpoint.config
    return Checkpoint(model, config, card, AdaptedFiles.of(base.source, source), weights, tuple(notes), base)


def _with_head(
    below: AdapterBase, own: Mapping[str, TensorInfo], settings: Mapping[str, Any], name: str
) -> AdapterBase:
    """A base with the head or the tokens that an adapter brings, as a model of the adapter's class; the base as it was,
    where the two do not make one, which is then said of the adapter's tensors.

    Raises:
        ResolveError: More is missing than the head, so that it was random numbers that the adapter was trained beside.
    """
    base = below.checkpoint
    rows = {path: info.shape[0] for path, info in own.items() if info.shape}
    tokens = next((count for path, count in rows.items() if below.layers.get(path, "").startswith("Embedding")), None)
    counts: list[int | None] = [*sorted({n for n in rows.values() if n != tokens and 0 < n <= _MOST_OUTPUTS})]
    tensors = {**base.tensors, **own}
    shapes = {tensor: info.shape for tensor, info in tensors.items()}
    # Which of its tensors has a row for each output its class alone knows.
    for outputs in counts[:_MOST_GUESSES] or [None]:
        config = adapted_config(base.config, settings, outputs, tokens)
        answered = remembered("headed", [config, shapes, sorted(own)], partial(_fitted, config, shapes, own, name))
        if not any(kind == "wrong" for kind, _ in answered):
            break
    else:
        return below
    if lacking := [each for kind, each in answered if kind == "missing" and not _COMPUTED.search(each)]:
        raise ResolveError(
            f"{name} brings a head, and {base} has no {some(lacking)}, which is not in the adapter either: it was "
            "random when the adapter was trained.",
            hint="Train it with these among `modules_to_save`.",
            code="adapter-base",
        )
    weights = replace(base.weights, tensors={disk: tensors[disk] for kind, disk in answered if kind == "kept"})
    return adapter_base(replace(base, config=config, weights=weights))


def _fitted(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], own: Collection[str], name: str
) -> list[tuple[str, str]]:
    """Which tensors a model of a config loads, which of its parameters are missing, and whose shapes are wrong."""
    found = correspondence(config, shapes, name)
    wrong = [disk for disk, _, _ in found.mismatched] or [each for each in own if each not in found.parameters]
    return [
        *(("kept", disk) for disk in found.parameters),
        *(("missing", parameter) for parameter in found.missing),
        *(("wrong", disk) for disk in wrong),
    ]


class _Bases:
    """Opens what adapters change, each once, and one after the other.

    Args:
        usual: Where an adapter names nothing that can be used.
        allow_pickle, token, whole: As in `open_checkpoint`.
    """

    def __init__(self, usual: str | None, allow_pickle: bool, token: Token, whole: bool = False) -> None:
        self._usual, self._allow_pickle, self._token, self._whole = usual, allow_pickle, token, whole
        self._known: dict[tuple[str, bool], AdapterBase] = {}

    def of(self, settings: Mapping[str, Any], adapter: FileSource, name: str, *, named: str | None) -> AdapterBase:
        """What an adapter changes: what the recipe says beside it, else what it names itself at its revision, else the
        usual.

        Args:
            settings: ``adapter_config.json``.
            adapter: Where it is.
            name: What errors call it.
            named: In the recipe beside it.

        Raises:
            ResolveError: It cannot be had, or is no base.
        """
        if named:
            return self._open(named)
        stated, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        own = stated if isinstance(stated, str) else ""
        usual, _, pinned = split_revision(self._usual or "")
        # The usual base says which revision only of an adapter that says none itself.
        at = revision or (pinned if own == usual else "")
        try:
            if not own:
                raise ResolveError("it names none.")
            # A stranger's adapter may name a path of this machine, but none is looked at that the user does not name.
            return self._open(f"{own}@{at}" if at else own, adapter.commit is not None and own != usual)
        except SoupError as error:
            other = self._open(self._usual) if self._usual and own != usual else None
            if other and other.checkpoint.source.reference != own:
                return other
            raise ResolveError(
                f"{name} is an adapter, and its base cannot be used: {error.message}",
                hint="Name the model that it was trained on, in 16 or 32 bits: `base: MODEL` beside the adapter in the "
                "recipe, or, where it names no base that is there, --base MODEL.",
                code="adapter-base",
            ) from error

    def _open(self, model: str, on_hub: bool = False) -> AdapterBase:
        with _ASKING:
            if (model, on_hub) not in self._known:
                base = _opened(
                    _as_ingredient(model), _refuse_adapter, allow_pickle=self._allow_pickle, token=self._token,
                    on_hub=on_hub, whole=self._whole,
                )  # fmt: skip
                if method := is_quantised(base.config):
                    raise ResolveError(f"{model} is quantised ({method}).", code="quantised")
                self._known[model, on_hub] = adapter_base(base)
            return self._known[model, on_hub]


def _refuse_adapter(settings: Mapping[str, Any], source: FileSource, name: str, *, named: str | None) -> AdapterBase:
    """Of a base, which adds nothing to another one; so adapters of each other end at once."""
    raise ResolveError(f"{name} is an adapter itself.", code="adapter-base")


def adapter_base(base: Checkpoint) -> AdapterBase:
    """A base, and what the library says of its parameters, which is remembered."""
    shapes = {tensor: info.shape for tensor, info in base.tensors.items()}

    def facts() -> list[tuple[str, str, str]]:
        found = correspondence(base.config, shapes, str(base))
        # Of what it stacks or transforms it also says which piece.
        pairs = [("parameter", key, disk) for disk, key in found.parameters.items() if "[" not in key]
        tied = [("tied", own, other) for own, other in found.tied.items()]
        modules, layers = layers_of_parameters(base.config, shapes, str(base))
        stacks = stacked_parameters(base.config, shapes, str(base)).items()
        stacked = [("stack", f"{parameter}\n{pattern}", disk) for parameter, all in stacks for pattern, disk in all]
        described = [*(("layer", key, layer) for key, layer in layers.items()), *(("module", m, "") for m in modules)]
        return [*pairs, *tied, *described, *stacked]

    known: dict[str, dict[str, str]] = {"parameter": {}, "tied": {}, "layer": {}, "module": {}}
    stacks: dict[str, dict[str, list[str]]] = {}
    for kind, key, other in remembered("adapted", [base.config, shapes], facts):
        if kind == "stack":
            parameter, pattern = key.split("\n")
            stacks.setdefault(parameter, {}).setdefault(pattern, []).append(other)
        else:
            known[kind][key] = other
    parts = {parameter: tuple(map(tuple, patterns.values())) for parameter, patterns in stacks.items()}
    return AdapterBase(base, known["parameter"], known["tied"], known["layer"], frozenset(known["module"]), parts)


def _require_transformer_first(source: FileSource, name: str) -> None:
    """Refuse a sentence-transformers model that does not begin with a transformer at the top."""
    first = next(iter(stated_modules(source, name)), None)
    kind, place = first["type"].rpartition(".")[2] if first else "", first["path"] if first else ""
    if place or (kind and "config.json" not in source.files and ADAPTER_SETTINGS not in source.files):
        where = f"in the folder '{place}'" if place else "which is no transformer"
        raise ResolveError(
            f"{name} is a sentence-transformers model that begins with {kind}, {where}. Only those that begin with a "
            "Transformer at the top can be averaged.",
            hint="Save it again, which puts it there: SentenceTransformer(FOLDER).save(NEW)."
            if kind == "Transformer"
            else "",
        )


#: Files that say which other library a folder is of.
_LAYOUTS = {
    "model_index.json": "a pipeline of diffusers",
    "open_clip_config.json": "a model of open_clip",
    "pytorch_lora_weights.safetensors": "a LoRA for a pipeline of diffusers",
}
_BESIDE = "\nThen put config.json and the tokenizer's files beside what comes out."


def _other_format(source: FileSource) -> tuple[str, str] | None:
    """What a folder is that another tool wrote, and what makes a model of it; None where it is not one of these."""
    files, where = source.files, Path("ADAPTER_FOLDER" if source.commit else source.reference)
    for file, kind in _LAYOUTS.items():
        if file in files:
            return f"{kind} ({file})", ""
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
    if source.from_cache:
        return ResolveError(
            f"{name}: the Hub was not reached, and the cache does not hold its weights.",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again.",
            code="no-weights",
        )
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
