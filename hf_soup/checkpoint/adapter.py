"""LoRA adapters over their base: which tensors of it they change, and by what.

What they say is a stranger's; the truth is in the tensors. What changes numbers and is not known here is refused by
its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_soup._util.io import appearing
from hf_soup._util.text import some, strings
from hf_soup.checkpoint.checkpoint import Checkpoint
from hf_soup.checkpoint.file_sources import FileSource
from hf_soup.checkpoint.headers import FLOATS, ITEM_BYTES, Factor, LowRankUpdate, TensorInfo
from hf_soup.checkpoint.peft_rules import PeftRules, refused, require_ranks
from hf_soup.errors import ResolveError
from hf_soup.hub import ASSETS, CHAT, MODULES, TOKENIZER, Stamp, own_cache_folder

#: The files of an adapter, and the folder in which they stand among those of its base, where no repo has a file.
ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FOLDER = "/adapter/"

#: Fields of peft's config that are read here, or change no number of an adapter that was trained.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_parameters", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
#: What `init_lora_weights` may be; all else is an initialisation that changed the base.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")
#: Tensors of a head and tables, more than which no adapter brings: each is looked for among all of the base's.
_MOST_OWN = 256
#: Names for which an adapter has an alpha of their own, and characters of each, or of a revision.
_MOST_PATTERNS, _LONGEST = 1000, 500
_MERGE = "Merge it into its base first (peft's `merge_and_unload`)."
_ITS_BASE = "Is that the base that it was trained on? Name it: `base_model: MODEL` in the recipe, or --base MODEL."
#: What is in front of every name in an adapter's file.
PEFT_PREFIX = "base_model.model."
#: A factor of a layer's weight; or of a table that is looked up, which is stored as (in, out).
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
#: The lengths of a DoRA's rows.
_LENGTHS = ".lora_magnitude_vector"
#: What peft puts into the names of tensors that it saves whole: of a module, of which it has a copy, and of the layer
#: below factors.
_COPY = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_WRAPPED = re.compile(r"\.base_layer(?=\.(weight|bias)$)")


@dataclass(frozen=True, kw_only=True)
class AdaptedFiles(FileSource):
    """The files of an adapter's base, and the adapter's own in a folder among them.

    Args:
        base, adapter: Where they are.
        beside: A tokenizer and sentence-transformers' modules beside the adapter, in the place of the base's.
    """

    base: FileSource = field(repr=False)
    adapter: FileSource = field(repr=False)
    beside: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of(cls, base: FileSource, adapter: FileSource) -> AdaptedFiles:
        """Both, pinned by what pins the adapter and by what pins the base."""
        stamps: dict[str, Stamp] = {**base.stamps, **{ADAPTER_FOLDER + file: at for file, at in adapter.stamps.items()}}
        kinds = [kind for kind in (TOKENIZER, CHAT) if any(map(kind.fullmatch, adapter.files))]
        kinds += [MODULES] if "modules.json" in adapter.files else []  # settings alone say nothing of modules
        beside = {file for file in adapter.files if any(kind.fullmatch(file) for kind in kinds)}
        kinds += [CHAT] if TOKENIZER in kinds else []  # its template goes with it
        files = {file: size for file, size in base.files.items() if not any(kind.fullmatch(file) for kind in kinds)}
        files |= {file: adapter.files[file] for file in sorted(beside)}
        return cls(
            reference=adapter.reference,
            files={**files, **{ADAPTER_FOLDER + file: size for file, size in adapter.files.items()}},
            beside=frozenset(beside),
            commit=adapter.commit,
            from_cache=base.from_cache or adapter.from_cache,
            stamps=stamps,
            base=base,
            adapter=adapter,
        )

    def origin(self, file: str) -> tuple[FileSource, str]:
        """The base's, or the adapter's."""
        own = file.startswith(ADAPTER_FOLDER) or file in self.beside
        return self.adapter.origin(file.removeprefix(ADAPTER_FOLDER)) if own else self.base.origin(file)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """As where it is."""
        source, name = self.origin(file)
        return source.read(name, start, stop)

    def here(self, file: str) -> Path | None:
        """As where it is."""
        source, name = self.origin(file)
        return source.here(name)

    def fetch(self, file: str, advance: Callable[[int], object] = lambda _: None) -> Path:
        """As where it is."""
        source, name = self.origin(file)
        return source.fetch(name, advance)

    def content_id(self, file: str) -> str:
        """As where it is."""
        source, name = self.origin(file)
        return source.content_id(name)

    def fetch_assets(self) -> Path:
        """Those of the base, with which the adapter was trained; with a tokenizer of its own, copies of both, which are
        compared with them.
        """
        if not self.beside:
            return self.base.fetch_assets()
        assets = sorted(file for file in self.files if ASSETS.fullmatch(file))
        known = json.dumps([[file, self.content_id(file)] for file in assets])
        folder = own_cache_folder() / "adapters" / hashlib.sha256(known.encode()).hexdigest()
        for file in assets:
            target, content = folder / file, self.fetch(file).read_bytes()
            if not target.is_file() or target.read_bytes() != content:
                with appearing(target) as partial:
                    partial.write_bytes(content)
        return folder


def files_beside(checkpoint: Checkpoint) -> frozenset[str]:
    """The files of a tokenizer and of modules that stand beside an adapter; none of other models."""
    return checkpoint.source.beside if isinstance(checkpoint.source, AdaptedFiles) else frozenset()


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter is added to, and what the library says of its parameters.

    Args:
        checkpoint: The base; no adapter itself.
        parameters: Name in memory of what is loaded in one piece, as it is → its name on disk.
        tied: Parameter → the parameter that it shares its tensor with.
        layers: Parameter of a module that has no others in it → what that is; see `layers_of_parameters`.
        modules: All modules.
        stacks: Parameter that is stacked in memory, expert by expert → the tensors on disk whose rows stand below each
            other, each time of every expert.
    """

    checkpoint: Checkpoint
    parameters: Mapping[str, str]
    tied: Mapping[str, str]
    layers: Mapping[str, str]
    modules: frozenset[str]
    stacks: Mapping[str, tuple[tuple[str, ...], ...]]


def require_lora(settings: Mapping[str, Any], name: str) -> None:
    """Refuse adapters that are no plain LoRA, by the field that says so.

    Args:
        settings: ``adapter_config.json``.
        name: What errors call the adapter.

    Raises:
        ResolveError: It is none.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise refused(name, "peft_type", kind, "Only LoRA adapters are sums of the base and a product.")
    how = settings.get("init_lora_weights")
    if not isinstance(how, bool | str | None) or how not in _INITIALISATIONS:
        hint = "Convert it to a plain LoRA first: peft's `path_initial_model_for_weight_conversion`."
        raise refused(name, "init_lora_weights", how, hint)
    for key, value in settings.items():
        if key not in _KNOWN and value not in (None, False, {}, [], ""):
            raise refused(name, key, value, _MERGE)
    for key in ("use_rslora", "use_dora"):
        if not isinstance(settings.get(key), bool | None):
            raise refused(name, key, settings[key], "It should be true or false.")
    if not isinstance(revision := settings.get("revision"), str | None) or len(revision or "") > _LONGEST:
        raise refused(name, "revision", revision, f"It should be a text of at most {_LONGEST} characters.")
    names = list(patterns) if isinstance(patterns := settings.get("alpha_pattern"), Mapping) else []
    if len(names) > _MOST_PATTERNS or max(map(len, names), default=0) > _LONGEST:
        much = f"{len(names):,} names of at most {max(map(len, names)):,} characters"
        raise refused(name, "alpha_pattern", much, f"At most {_MOST_PATTERNS:,} of {_LONGEST} are read.")
    require_ranks(settings, name)


def adapted_tensors(
    settings: Mapping[str, Any], factors: Sequence[TensorInfo], base: AdapterBase, name: str
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of the base as an adapter changes them, and a note about each that peft would not load.

    Args:
        settings: ``adapter_config.json``.
        factors: All tensors of the adapter's file.
        base: What it changes.
        name: What errors call the adapter.

    Raises:
        ResolveError: The base does not have such tensors, or the adapter's do not fit them.
    """
    changed, rules, unloaded = dict(base.checkpoint.tensors), PeftRules(settings, name), dict[str, list[str]]()
    pairs: dict[str, dict[str, TensorInfo]] = {}
    lengths: dict[str, TensorInfo] = {}
    whole: dict[str, str] = {}
    for path, info in _loaded(factors):
        if path.endswith(_LENGTHS):
            if not settings.get("use_dora"):
                unloaded.setdefault("lengths of rows, and `use_dora` is not set", []).append(info.name)
            elif lengths.setdefault(path.removesuffix(_LENGTHS), info) is not info:
                raise _twice(name, path)
            continue
        if part := _FACTOR.fullmatch(path):
            if pairs.setdefault(part[1], {}).setdefault(part[2] or f"embedding {part[3]}", info) is not info:
                raise _twice(name, path)
            continue
        if "lora_" in path or "token_adapter" in path:
            raise ResolveError(
                f"{name} is an adapter with '{info.name}', which is not known how to add up.",
                hint=_MERGE,
                code="adapter",
            )
        target = _target(path, base, name)[1]
        if changed[target].shape != info.shape or not {info.dtype, changed[target].dtype} <= {*FLOATS}:
            raise _unlike(name, info, changed[target])
        if target in whole:
            raise _twice(name, target)
        changed[target], whole[target] = replace(info, name=target), info.name  # a copy that was trained whole
    if not pairs:
        raise ResolveError(f"{name} is an adapter without a single pair of factors.", code="adapter")
    for path, pair, parts in _stacked(pairs, settings, base):
        for target, update in _experts(settings, rules, path, pair, parts, base.checkpoint.tensors, name):
            changed[target] = replace(changed[target], update=update)
        del pairs[path]
    for path, pair in pairs.items():
        try:
            parameter, target = _target(f"{path}.weight", base, name)
        except ResolveError:
            if asked := settings.get("target_parameters"):
                raise refused(name, "target_parameters", asked, _MERGE) from None
            if rules.is_target(path):
                raise
            parameter = target = path
        # The adapter may have been saved by a version of the libraries that had other names.
        if not any(rules.is_target(each.removesuffix(".weight")) for each in (path, parameter, target)):
            unloaded.setdefault("factors of modules that `target_modules` leaves out", []).append(path)
            lengths.pop(path, None)
            continue
        if changed[target].update or (target in whole and "base_layer" not in whole[target]):
            raise _twice(name, target)
        layer = base.layers.get(parameter, "")
        if layer == "Conv*":
            raise ResolveError(f"{name} changes '{path}', a convolution in groups.", hint=_MERGE, code="adapter")
        update = _update(settings, rules, path, pair, changed[target], layer.startswith("Conv1D"), name)
        if settings.get("use_dora"):
            update = _scaled(update, lengths.pop(path, None), path, name)
        changed[target] = replace(changed[target], update=update)
    if lengths:
        raise ResolveError(f"{name} has lengths of '{min(lengths)}' and no factors of it.", code="adapter")
    if not any(info.update for info in changed.values()):
        raise refused(
            name, "target_modules", settings.get("target_modules"), "None of its factors is of such a module."
        )
    return changed, [f"it has {what}: {some(names)}; they are ignored, as in peft" for what, names in unloaded.items()]


def _loaded(factors: Sequence[TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of a file that peft loads, with the names in memory that they stand for.

    Of tables that were trained whole it also saves the original, and the copy a second time.
    """
    names = {info.name for info in factors}
    for info in factors:
        plain = _COPY.sub("", info.name)
        if ".original_module." not in info.name and (plain == info.name or plain not in names):
            yield _WRAPPED.sub("", plain.removeprefix(PEFT_PREFIX)), info


def own_tensors(factors: Sequence[TensorInfo], base: AdapterBase) -> dict[str, TensorInfo]:
    """Tensors that an adapter was trained with as a whole and that its base does not have like that, as the head of a
    classifier or a longer table of tokens: by their names in memory. None where there are more than any head has.
    """
    found: dict[str, TensorInfo] = {}
    tied = {*base.tied, *base.tied.values()}
    for path, info in _loaded(factors):
        if "lora_" in path or "token_adapter" in path or path in tied:
            continue
        known = [base.parameters[each] for each in _called(path, base.parameters)]
        if not known or base.checkpoint.tensors[known[0]].shape != info.shape:
            found[path] = replace(info, name=path)
        if len(found) > _MOST_OWN:
            return {}
    return found


def _called(path: str, known: Mapping[str, object]) -> list[str]:
    """The parameters that an adapter may mean by a name: of a model without its head it leaves out what stands in front
    of the body, and of one with a head it has it where the base is a body.
    """
    if path in known:
        return [path]
    body = path.partition(".")[2]
    return [body] if body in known else [each for each in known if each.endswith(f".{path}")]


def _target(path: str, base: AdapterBase, name: str) -> tuple[str, str]:
    """The base's parameter that an adapter calls so, and its name on disk."""
    stored, tied = base.checkpoint.tensors, {**base.tied, **{other: own for own, other in base.tied.items()}}
    for known in (base.parameters, dict(zip(stored, stored, strict=True)), tied):
        if len(ending := _called(path, known)) == 1:
            if ending[0] in tied:
                raise ResolveError(
                    f"{name} changes '{ending[0]}', which is one tensor with '{tied[ending[0]]}' in its base, and "
                    "would be two.",
                    hint=_MERGE,
                    code="adapter",
                )
            return ending[0], known[ending[0]]
    raise ResolveError(
        f"{name} changes '{path}', which its base does not have, or not in one piece.",
        hint=f"{_ITS_BASE} What brings a head or tokens of its own is no sum: merge it first with peft.",
        code="adapter-base",
    )


_Pair = Mapping[str, TensorInfo]
_Parts = Sequence[Sequence[str]]


def _stacked(
    pairs: Mapping[str, _Pair], settings: Mapping[str, Any], base: AdapterBase
) -> list[tuple[str, _Pair, _Parts]]:
    """The pairs of factors of parameters that are stacked in memory, and the tensors on disk that these are made of.

    peft names them by their module alone, and where it changes several in one, it wraps what it wrapped before: the
    first parameter stands innermost.
    """
    asked = strings(settings.get("target_parameters"))
    found: list[tuple[str, _Pair, _Parts]] = []
    modules: dict[str, list[str]] = {}
    for parameter in base.stacks:
        if any(parameter == each or parameter.endswith(f".{each}") for each in asked):
            modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    for module, parameters in modules.items():
        for depth, parameter in enumerate(reversed(parameters)):
            path = module + ".base_layer" * depth
            if path in pairs:
                found.append((path, pairs[path], base.stacks[parameter]))
    return found


def _experts(
    settings: Mapping[str, Any],
    rules: PeftRules,
    path: str,
    pair: _Pair,
    parts: _Parts,
    tensors: Mapping[str, TensorInfo],
    name: str,
) -> Iterator[tuple[str, LowRankUpdate]]:
    """What a pair of factors adds to the matrices of experts.

    Those of one expert are some rows of A, and every so many columns of B. Until its version 0.20 peft took the first
    side of a matrix for its inputs, so that their product is the matrix turned.
    """
    if pair.keys() != {"A", "B"}:
        raise ResolveError(f"{name} has one factor of '{path}' and not the other.", code="adapter")
    first, second, experts = pair["A"], pair["B"], len(parts[0])
    rows, columns = sum(tensors[part[0]].shape[0] for part in parts), tensors[parts[0][0]].shape[1]
    for info in (first, second):
        _require_numbers(name, info)
        if len(info.shape) != 2 or {len(part) for part in parts} != {experts}:
            raise _unlike(name, info, tensors[parts[0][0]])
    rank, rest = divmod(first.shape[0], experts)
    sides = (second.shape[0], first.shape[1])
    if rest or not rank or second.shape[1] != first.shape[0] or sides not in ((rows, columns), (columns, rows)):
        raise _unlike(name, second, replace(second, name=f"{experts} experts", shape=(rows, columns)))
    turned = sides != (rows, columns)
    if rows == columns:
        version = re.match(r"(\d+)\.(\d+)", str(settings.get("peft_version")))
        release = (int(version[1]), int(version[2])) if version else (0, 20)
        if release == (0, 20):
            said = f"{settings.get('peft_version')}, which does not say how its square experts are turned"
            raise refused(name, "peft_version", said, "Load it with a newer peft and save it again.")
        turned = release < (0, 20)
    scale, begin, item = _scale(settings, rules.alpha(path), rank, name), 0, ITEM_BYTES[first.dtype]
    across = ITEM_BYTES[second.dtype]
    for part in parts:
        height = tensors[part[0]].shape[0]
        for expert, disk in enumerate(part):
            if tensors[disk].shape != (height, columns):
                raise _unlike(name, first, tensors[disk])
            down = first.offset + expert * rank * first.shape[1] * item
            up = second.offset + expert * across
            if turned:
                left = Factor(down + begin * item, first.dtype, (rank, height), width=rows)
                right = Factor(up, second.dtype, (columns, rank), step=experts)
            else:
                left = Factor(up + begin * rank * experts * across, second.dtype, (height, rank), step=experts)
                right = Factor(down, first.dtype, (rank, columns))
            yield disk, LowRankUpdate(first.file, left, right, scale, turned)
        begin += height


def _twice(name: str, target: str) -> ResolveError:
    return ResolveError(f"{name} changes '{target}' in two ways.", hint="Its file is damaged.", code="adapter")


def _scaled(update: LowRankUpdate, lengths: TensorInfo | None, path: str, name: str) -> LowRankUpdate:
    """An update of a DoRA, whose outputs have lengths of their own."""
    if lengths is None:
        raise ResolveError(f"{name} is a DoRA and has no lengths of '{path}'.", code="adapter")
    _require_numbers(name, lengths)
    outputs = (update.right if update.turned else update.left).shape[0]
    if math.prod(lengths.shape) != outputs:
        shape = tuple(lengths.shape)
        message = f"{name}: '{lengths.name}' has the shape {shape}, of {outputs} outputs."
        raise ResolveError(message, code="adapter-base")
    return update._replace(lengths=Factor(lengths.offset, lengths.dtype, (outputs, 1)))


def _update(
    settings: Mapping[str, Any],
    rules: PeftRules,
    path: str,
    pair: Mapping[str, TensorInfo],
    matrix: TensorInfo,
    turned: bool,
    name: str,
) -> LowRankUpdate:
    """What a pair of factors adds to a matrix."""
    table = any(key.startswith("embedding") for key in pair)
    if pair.keys() != ({"embedding A", "embedding B"} if table else {"A", "B"}):
        raise ResolveError(f"{name} has one factor of '{path}' and not the other.", code="adapter")
    first, second = (pair[key] for key in sorted(pair))  # (rank, in) and (out, rank)
    for info in (first, second, matrix):
        _require_numbers(name, info)
    rank, columns = first.shape[0] if first.shape else 0, math.prod(first.shape[1:])
    rows = second.shape[0] if second.shape else 0
    if not rank or math.prod(second.shape) != rows * rank:
        raise _unlike(name, first, second)
    turned = table or turned
    product = (columns, rows) if turned else (rows, columns)
    if len(matrix.shape) < 2 or product != (matrix.shape[0], math.prod(matrix.shape[1:])):
        raise _unlike(name, replace(first, name=f"{path}: B A", shape=product), matrix)
    down = Factor(first.offset, first.dtype, (rank, columns))
    up = Factor(second.offset, second.dtype, (rows, rank))
    left, right = (down, up) if turned else (up, down)
    return LowRankUpdate(first.file, left, right, _scale(settings, rules.alpha(path), rank, name), turned)


def _scale(settings: Mapping[str, Any], alpha: Any, rank: int, name: str) -> float:
    r"""By what a product is multiplied: :math:`\alpha/r`, or :math:`\alpha/\sqrt r`."""
    try:
        known = not isinstance(alpha, bool) and isinstance(alpha, int | float) and math.isfinite(alpha)
    except OverflowError:
        known = False
    if not known:
        raise refused(name, "lora_alpha", alpha, "It should be a number.")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _require_numbers(name: str, info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        raise ResolveError(f"{name}: '{info.name}' has the type {info.dtype}, which no weight has.", code="adapter")


def _unlike(name: str, info: TensorInfo, other: TensorInfo) -> ResolveError:
    return ResolveError(
        f"{name}: '{info.name}' of shape {tuple(info.shape)} ({info.dtype}) does not fit '{other.name}' of shape "
        f"{tuple(other.shape)} ({other.dtype}).",
        hint=_ITS_BASE,
        code="adapter-base",
    )
