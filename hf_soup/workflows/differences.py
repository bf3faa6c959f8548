"""In what two copies of a soup differ: tensors bit by bit, and the files beside the weights by what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from hf_soup._util.io import ShortReadError, open_file, read_all
from hf_soup._util.text import some
from hf_soup.checkpoint import FLOATS, ITEM_BYTES, TORCH, TensorInfo, read_header, reader_of
from hf_soup.errors import RecipeError, ResolveError
from hf_soup.evaluation import BOUND, MEAN, VARIANCE, batch_norms
from hf_soup.hub import ASSETS, INDEX, SINGLE
from hf_soup.ingredients import Published, as_mapping, read_small
from hf_soup.merging import BLOCK_BYTES, PRODUCT_BOUND, MergeResult, OutputTensor, Plan, digest_of, root_of
from hf_soup.methods import METHODS
from hf_soup.recipe import Mixture

_MOST_JSON = 100_000_000
#: Tensors and files that are listed of those that no soup has.
_FEW = 20
#: Elements that are compared at a time, in float64 where they differ.
_SLICE = 1 << 18
#: Files that a soup's repo may have beside a soup: nothing loads or runs them.
_HARMLESS = re.compile(
    r"soup\.(yaml|json)|plots/[\w.-]+\.png|(.*/)?\.[^/]*|\..*|(.*/)?[^/]*\.(md|png|jpe?g|gif|svg|webp|pdf|txt|bib|cff)"
    r"|(.*/)?(LICENSE|LICENCE|NOTICE|COPYING)"
)
#: What the library writes beside what the model is.
_UNHEARD = {"transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Difference:
    """A tensor or file that is not as it is when the soup is cooked again.

    Args:
        name: The tensor's, or the file's path.
        kind: ``missing`` or ``extra`` in what was published; ``dtype``, ``shape`` or ``values`` of a tensor;
            ``content`` of a file.
        text: What is there and what should be, for people.
        elements: How many numbers of a tensor are others.
        largest: The largest difference, of those that are finite.
        ulps: The same in units in the last place of the tensor's type.
        within: Whether it is within the bound that the method states.
    """

    name: str
    kind: str
    text: str
    elements: int = 0
    largest: float | None = None
    ulps: int | None = None
    within: bool = field(default=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; sizes where there are any."""
        sizes = {"elements": self.elements, "largest": self.largest, "ulps": self.ulps} if self.elements else {}
        return {"name": self.name, "kind": self.kind, "text": self.text, **sizes}


def compare_weights(
    published: Published,
    plan: Plan,
    folder: Path,
    merged: MergeResult,
    here: Callable[[str], AbstractContextManager[Path]],
    *,
    again: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[list[Difference], str]:
    """Every tensor of a published soup against the one that was cooked.

    Args:
        published: The soup.
        plan, folder, merged: What was cooked.
        here: A weight file of the soup on this machine, for as long as it is looked at.
        again: Whether statistics of batch normalisation were collected again.
        advance: Told how many bytes were compared.

    Returns:
        The differences in the order of the cooked tensors, the first of what is extra behind them; and the published
        digest.
    """
    found: dict[str, Difference] = {}
    usual = METHODS[plan.mixture.method.method].bound or 0.0
    bounds = {name: METHODS[call.method].bound or 0.0 for name, call in plan.mixture.tensor_methods.items()}
    for name in plan.layout.multiplied:
        bounds[name] = max(bounds.get(name, usual), PRODUCT_BOUND)
    if again:
        layers = batch_norms(tensor.name for tensor in plan.layout.tensors)
        bounds |= {layer + name: BOUND for layer in layers for name in (MEAN, VARIANCE)}
    known = {tensor.name: tensor for tensor in plan.layout.tensors}
    roots: dict[str, tuple[str, str, tuple[int, ...], str]] = {}
    files, misplaced = weight_files(published)
    elsewhere: list[str] = []
    apart = [Difference(name, "missing", "a weight file that the index names is not there")
             for name in files if name not in published.source.files]  # fmt: skip
    with ExitStack() as stack:
        ours = [open_file(stack, folder / file.name) for file in plan.layout.files]
        for name in (name for name in files if name in published.source.files):
            with here(name) as path, ExitStack() as opened:
                read = reader_of(path)
                try:
                    header = read_header(read, name, path.stat().st_size, str(published))
                except ResolveError as error:
                    apart.append(Difference(name, "content", error.message))
                    continue
                theirs = open_file(opened, path)
                for info in header:
                    tensor = known.get(info.name)
                    if info.name in roots:
                        apart.append(Difference(name, "content", f"'{info.name}' is in two files"))
                        continue
                    bound = bounds.get(info.name, usual)
                    said = _compared(info, theirs, tensor, ours[tensor.file] if tensor else -1, bound)
                    if said is not None:
                        found[info.name] = said
                    root = merged.roots[info.name] if said is None else root_of(read, info)
                    roots[info.name] = (info.name, info.dtype, info.shape, root)
                    if misplaced and misplaced.get(info.name) != name:
                        elsewhere.append(info.name)
                    advance(info.size)
    if elsewhere:
        apart.append(Difference(INDEX, "content", f"it says that {some(elsewhere)} are in other files"))
    for name in known.keys() - roots.keys():
        found[name] = Difference(name, "missing", f"{known[name].dtype} {_shape(known[name].shape)} is not there")
    order = {name: number for number, name in enumerate(known)}
    tensors = sorted(found.values(), key=lambda each: (order.get(each.name, len(order)), each.name))
    ours_first = [each for each in tensors if each.name in known]
    return [*ours_first, *_few([*tensors[len(ours_first) :], *dict.fromkeys(apart)])], digest_of(roots.values())


def compare_adapters(theirs: Path, ours: Path, name: str) -> tuple[list[Difference], str]:
    """What a published adapter adds to each tensor against what one adds that was made again.

    Factors of a product are not unique, so those that differ are compared by what they come to.

    Args:
        theirs, ours: Their files.
        name: What errors call the published one.

    Returns:
        The differences, and the published digest.
    """
    headers = [read_header(reader_of(path), path.name, path.stat().st_size, name) for path in (theirs, ours)]
    roots = [{info.name: root_of(reader_of(path), info) for info in header}
             for path, header in zip((theirs, ours), headers, strict=True)]  # fmt: skip
    digest = digest_of((info.name, info.dtype, info.shape, roots[0][info.name]) for info in headers[0])
    known = [{info.name: (info.dtype, info.shape) for info in header} for header in headers]
    found = [Difference(each, "missing", "it is not there") for each in known[1] if each not in known[0]]
    extra = [Difference(each, "extra", "it is not in the soup") for each in known[0] if each not in known[1]]
    for each, (dtype, shape) in known[1].items():
        if each in known[0] and known[0][each] != (dtype, shape):
            has = known[0][each]
            text = f"it is {has[0]} of the shape {_shape(has[1])} and should be {dtype} of {_shape(shape)}"
            found.append(Difference(each, "shape", text))
    if found or extra or roots[0] == roots[1]:
        return [*found, *_few(extra)], digest
    pair = [load_file(path) for path in (theirs, ours)]
    for each in known[1]:
        other = each.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if "lora_B" in each or "lora_embedding_B" in each or all(roots[0][n] == roots[1][n] for n in (each, other)):
            continue
        wrong, right = (_product(tensors, each, other) for tensors in pair)
        gap = float(torch.linalg.vector_norm(wrong - right) / torch.linalg.vector_norm(right))
        # Singular vectors of another machine are rounded to other neighbours.
        within = gap <= PRODUCT_BOUND + 4 * torch.finfo(pair[1][each].dtype).eps
        text = f"what it adds differs by {gap:.3g} of its length"
        found.append(Difference(each, "values", text, right.numel(), within=within and other != each))
    return found, digest


def _product(tensors: Mapping[str, torch.Tensor], first: str, second: str) -> torch.Tensor:
    """What two factors come to, or what is saved whole."""
    one, other = tensors[first].double(), tensors[second].double()
    return one if first == second else other.flatten(1) @ one.flatten(1)


def _few(extra: list[Difference]) -> list[Difference]:
    """The first of what a stranger may have put there without number, and how much more there is."""
    if len(extra) <= _FEW:
        return extra
    more = extra[_FEW]
    return [*extra[:_FEW], replace(more, text=f"{more.text}; and {len(extra) - _FEW - 1:,} more like this")]


def weight_files(published: Published) -> tuple[list[str], dict[str, str]]:
    """The files that the library would load, and what the index says is where."""
    if SINGLE in published.source.files or INDEX not in published.source.files:
        return [SINGLE], {}
    try:
        places = json.loads(read_small(published.source, INDEX, _MOST_JSON))["weight_map"]
        if all(isinstance(file, str) for file in places.values()):
            return sorted(set(places.values())), places
        raise ValueError("a file's name is no text")
    except (RecipeError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [INDEX], {}  # which is no weight file, as its header will say


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _compared(info: TensorInfo, theirs: int, tensor: OutputTensor | None, ours: int, bound: float) -> Difference | None:
    if tensor is None:
        return Difference(info.name, "extra", f"{info.dtype} {_shape(info.shape)} is not in the soup")
    if info.shape != tensor.shape:
        text = f"its shape is {_shape(info.shape)} and should be {_shape(tensor.shape)}"
        return Difference(info.name, "shape", text)
    if info.dtype != tensor.dtype:
        return Difference(info.name, "dtype", f"it is {info.dtype} and should be {tensor.dtype}")
    for start in range(0, info.size, BLOCK_BYTES):
        size = min(BLOCK_BYTES, info.size - start)
        if _bytes(theirs, info.offset + start, size) != _bytes(ours, tensor.offset + start, size):
            return _measured(info, theirs, tensor, ours, bound)
    return None


def _bytes(descriptor: int, offset: int, size: int) -> bytearray:
    data = bytearray(size)
    try:
        read_all(descriptor, memoryview(data), offset)
    except ShortReadError:
        raise ResolveError("A weight file became shorter while it was compared.", hint="Run this again.") from None
    return data


def _measured(info: TensorInfo, theirs: int, tensor: OutputTensor, ours: int, bound: float) -> Difference:
    """How many elements differ, and by how much; in slices, so that no tensor is in memory."""
    item = ITEM_BYTES[info.dtype]
    elements = strange = ulps = 0
    largest = peak = beyond = 0.0
    for start in range(0, info.size, _SLICE * item):
        size = min(_SLICE * item, info.size - start)
        pair = [_bytes(ours, tensor.offset + start, size), _bytes(theirs, info.offset + start, size)]
        ints = [np.frombuffer(data, f"i{item}") for data in pair]
        at = np.flatnonzero(ints[0] != ints[1])
        right, wrong = (torch.frombuffer(data, dtype=TORCH[info.dtype]).double().numpy() for data in pair)
        peak = max(peak, float(np.abs(right).max()))
        gap = np.abs(right[at] - wrong[at])
        finite = np.isfinite(gap)
        elements, strange = elements + len(at), strange + int(np.sum(~finite))
        if finite.any():
            largest = max(largest, float(gap[finite].max()))
            if info.dtype in FLOATS:
                steps = _ulps(*(each[at][finite] for each in ints))
                ulps = max(ulps, int(steps.max()))
                # Values that are as near as can be may be rounded to neighbours.
                beyond = max(beyond, float((gap[finite] * (1 - 1 / np.maximum(steps, 1))).max()))
    text = f"{elements:,} of {tensor.elements:,} elements differ, by {largest:.3g} at most"
    text += f" ({ulps:,} in units in the last place)" if info.dtype in FLOATS else ""
    text += f"; {strange:,} are not finite" if strange else ""
    within = not strange and info.dtype in FLOATS and beyond <= bound * peak
    return Difference(
        info.name, "values", text, elements, largest, ulps if info.dtype in FLOATS else None, within and bound > 0
    )


def _ulps(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many numbers of their type lie between floats, given by their bits as signed integers.

    >>> bits = [np.array([x], np.float32).view(np.int32) for x in (1.0, 1 + 2**-22, -0.0, 2**-149)]
    >>> int(_ulps(bits[0], bits[1])[0]), int(_ulps(bits[2], bits[3])[0])
    (2, 1)
    """
    sizes = [each.astype(np.int64) & np.iinfo(each.dtype).max for each in (first, second)]
    line = [np.where(each < 0, -size, size) for each, size in zip((first, second), sizes, strict=True)]
    # Of float64 with other signs it does not fit into a signed integer; without a sign it wraps to what is right.
    return np.maximum(*line).view(np.uint64) - np.minimum(*line).view(np.uint64)


def compare_files(
    published: Published, folder: Path, ours: Collection[str], theirs: Collection[str]
) -> list[Difference]:
    """The config, and what comes from the donor; and files that could be run or loaded in place of what is compared.

    Args:
        published: The soup.
        folder: Where it was cooked again.
        ours, theirs: Files of each that were compared as weights.
    """
    every = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    cooked = {name: path for name, path in every.items() if name not in ours}
    found = []
    for name, path in cooked.items():
        if name not in published.source.files:
            found.append(Difference(name, "missing", "it is not there"))
        elif said := _told_apart(published, name, path):
            found.append(Difference(name, "content", said))
    extra = [
        Difference(name, "extra", "no ingredient gives it, and it could be loaded or run")
        for name in sorted(published.source.files.keys() - cooked.keys() - set(theirs))
        if ASSETS.fullmatch(name) or not _HARMLESS.fullmatch(name)
    ]
    return [*found, *_few(extra)]


def _told_apart(published: Published, name: str, path: Path) -> str:
    """What a file says that the cooked one does not; empty where they say the same."""
    right = path.read_bytes()
    try:
        # A much larger one is another one, and is not fetched.
        given = read_small(published.source, name, 2 * len(right) + (1 << 20))
    except RecipeError as error:
        return error.message
    if given == right:
        return ""
    try:
        values = [json.loads(text.decode()) for text in (right, given)]  # from bytes it would take what no library does
    except (ValueError, RecursionError):
        return "its bytes are others"
    if not all(isinstance(each, dict) for each in values):
        return "" if values[0] == values[1] else "its values are others"
    # NaN is no number in JSON, and unlike itself; as text it is alike.
    said, should = ({k: json.dumps(v, sort_keys=True) for k, v in v.items() if k not in _UNHEARD} for v in values[::-1])
    keys = [key for key in {**should, **said} if said.get(key) != should.get(key)]
    told = [f"{key[:60]}: {_cut(said.get(key))} and should be {_cut(should.get(key))}" for key in keys[:3]]
    return "; ".join(told) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def contradictions(published: Published, mixture: Mixture, digest: str) -> list[Difference]:
    """What ``soup.json`` says that the weights or the recipe beside it do not.

    Args:
        published: The soup.
        mixture: What its recipe comes to.
        digest: Of its weights.
    """
    report, shares = published.report, dict(mixture.weights)
    found = []
    if published.digest != digest:
        found.append(f"its digest is {published.digest[:16]}… and that of the weights beside it {digest[:16]}…")
    for key, right in (("weights", shares), ("method", mixture.method.method)):
        if key in report and report[key] != right:
            found.append(f"its `{key}` {_cut(json.dumps(report[key]))} should be {_cut(json.dumps(right))}")
    stated, scores = as_mapping(as_mapping(report.get("scores")).get("soup")), published.scores
    signs = {title: -1 if as_mapping(score).get("less_is_better") else 1 for title, score in stated.items()}
    chosen_on = dict(zip(scores(), (each.weight for each in published.validation), strict=False))
    guarded = any(each.at_least for each in published.validation)
    for title, best in as_mapping(report.get("best")).items():
        looked = chosen_on or {title: 1.0}
        worth = {
            name: sum(weight * signs.get(each, 1) * scores(name)[each] for each, weight in looked.items())
            for name in (*shares, str(best))
            if looked.keys() <= scores(name).keys()
        }
        if str(best) not in worth or (worth[str(best)] < max(worth.values()) - 1e-9 and not guarded):
            found.append(f"`best` on {title[:60]} is {_cut(json.dumps(best))}, which its scores contradict")
    return [Difference("soup.json", "content", text) for text in found]


def _cut(text: str | None) -> str:
    return "absent" if text is None else text if len(text) <= 40 else f"{text[:39]}…"
