"""Do weights show a common ancestor? Samples of rows, by range requests, and two statistics over them.

Fine-tuning moves weights little and keeps every neuron in its place. So for siblings, and for a model and its
ancestor, the same rows of the same tensors point the same way, while for models that were initialised apart they
are as good as orthogonal. In the zoos that were measured the median cosine is below 0.011 in size for strangers
and above 0.28 for siblings, however hard they were trained. Norm weights and biases say nothing: they look alike
in every model, so only tensors of two dimensions or more are sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_soup import hub
from hf_soup.checkpoint import Checkpoint
from hf_soup.headers import FLOATS, ITEM_BYTES, TensorInfo

#: Median cosine of the body below which two models are strangers.
STRANGERS = 0.1
#: Median cosine of the body below which siblings have drifted apart.
DRIFTED = 0.9
#: Cosine of the heads below which they were initialised apart.
HEADS_APART = 0.5
#: Median cosine of siblings' task vectors above which the ancestor they are measured from is not theirs.
WRONG_BASE = 0.9

_TENSORS = 12
_ELEMENTS = 1 << 15  # a tensor: 128 KiB at most in float32, so that a model costs less than 2 MB
_MOST_ROWS = 64

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Kinship:
    """How alike two models are in a part of their weights.

    Args:
        a, b: Which two.
        part: ``body`` or ``head``.
        cosine: The median over the sampled tensors of the cosine between the same rows of both.
        rows: The median share of rows whose nearest row in the other model is the one of the same number; None
            where the samples have too few rows to tell.
        tensors: How many tensors were sampled.
    """

    a: str
    b: str
    part: str
    cosine: float
    rows: float | None
    tensors: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rounded to what the sample can say."""
        rows = None if self.rows is None else round(self.rows, 3)
        return {**asdict(self), "cosine": round(self.cosine, 4), "rows": rows}


@dataclass(frozen=True)
class Pick:
    """Rows of a tensor to look at: from ``start`` to ``stop``, each of ``columns`` numbers."""

    name: str
    start: int
    stop: int
    columns: int


def choose(shapes: Mapping[str, tuple[int, ...]], tensors: int = _TENSORS) -> list[Pick]:
    """Which rows to sample, spread evenly over the tensors of two dimensions or more.

    >>> choose({"a.weight": (100, 1024), "a.bias": (100,)})
    [Pick(name='a.weight', start=34, stop=66, columns=1024)]
    """
    wide = [name for name, shape in shapes.items() if len(shape) > 1 and shape[0] > 1 and all(shape)]
    step = max(1.0, len(wide) / tensors)
    picks = []
    for name in dict.fromkeys(wide[int(position * step)] for position in range(min(tensors, len(wide)))):
        rows, columns = shapes[name][0], int(np.prod(shapes[name][1:]))
        count = max(1, min(rows, _MOST_ROWS, _ELEMENTS // columns))
        # From the middle: an embedding's first rows are its special and unused tokens.
        start = (rows - count) // 2
        picks.append(Pick(name, start, start + count, min(columns, _ELEMENTS)))
    return picks


def sample(
    wanted: Sequence[tuple[Checkpoint, Mapping[str, TensorInfo]]], picks: Sequence[Pick]
) -> list[dict[str, Array]]:
    """The picked rows of every model that has them, ``(rows, columns)`` float32, fetched in parallel.

    Args:
        wanted: Checkpoints, and their tensors under the names that the picks use.
        picks: From `choose`.
    """
    jobs = [
        (index, pick, checkpoint, tensors[pick.name])
        for index, (checkpoint, tensors) in enumerate(wanted)
        for pick in picks
        if pick.name in tensors and tensors[pick.name].dtype in FLOATS
    ]

    def read(job: tuple[int, Pick, Checkpoint, TensorInfo]) -> Array:
        _, pick, checkpoint, tensor = job
        item = ITEM_BYTES[tensor.dtype]
        columns = int(np.prod(tensor.shape[1:]))
        start = pick.start * columns * item
        stop = min(pick.stop * columns, pick.start * columns + _ELEMENTS) * item
        flat = _numbers(checkpoint.read(tensor, start, stop), tensor.dtype)
        return flat.reshape(-1, min(columns, flat.size))

    found: list[dict[str, Array]] = [{} for _ in wanted]
    for (index, pick, _, _), rows in zip(jobs, hub.in_parallel(read, jobs, threads=16), strict=True):
        found[index][pick.name] = rows
    return found


def _numbers(data: bytes, dtype: str) -> Array:
    """Stored numbers as float32, without torch, which takes a second to import."""
    if dtype == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.frombuffer(data, dtype={"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)


def compare(a: Mapping[str, Array], b: Mapping[str, Array], *, names: tuple[str, str], part: str) -> Kinship | None:
    """The two statistics over the tensors that both samples have; None where they share none."""
    cosines, shares = [], []
    for name in a.keys() & b.keys():
        if a[name].shape != b[name].shape:
            continue
        cosine = _cosine(a[name], b[name])
        if cosine is None:
            continue
        cosines.append(cosine)
        if len(a[name]) >= 8:
            near = (_unit(a[name]) @ _unit(b[name]).T).argmax(axis=1)
            shares.append(float((near == np.arange(len(near))).mean()))
    if not cosines:
        return None
    rows = float(np.median(shares)) if shares else None
    return Kinship(*names, part, float(np.median(cosines)), rows, len(cosines))


def task_vector_cosine(samples: Sequence[Mapping[str, Array]], ancestor: Mapping[str, Array]) -> float | None:
    """The median over pairs and tensors of the cosine between task vectors measured from an ancestor.

    Measured from the right ancestor it is 0.75 at most; from a wrong one all task vectors are mostly the way
    between the two ancestors, and it is 0.95 or more.
    """
    found = []
    for number, one in enumerate(samples):
        for other in samples[number + 1 :]:
            cosines = [
                cosine
                for name in ancestor.keys() & one.keys() & other.keys()
                if one[name].shape == ancestor[name].shape == other[name].shape
                and (cosine := _cosine(one[name] - ancestor[name], other[name] - ancestor[name])) is not None
            ]
            found += [float(np.median(cosines))] if cosines else []
    return float(np.median(found)) if found else None


def families(cosines: Mapping[tuple[int, int], float], count: int, threshold: float = STRANGERS) -> list[list[int]]:
    """Groups of models that are kin, the largest first; kinship passes from one to the next.

    >>> families({(0, 1): 0.01, (0, 2): 0.95, (1, 2): 0.0}, 3)
    [[0, 2], [1]]
    """
    group = list(range(count))
    for (a, b), cosine in sorted(cosines.items()):
        if cosine >= threshold:
            old, new = group[b], group[a]
            group = [new if each == old else each for each in group]
    members: dict[int, list[int]] = {}
    for index, each in enumerate(group):
        members.setdefault(each, []).append(index)
    return sorted(members.values(), key=lambda family: (-len(family), family[0]))


def _cosine(a: Array, b: Array) -> float | None:
    left, right = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    scale = float(np.linalg.norm(left) * np.linalg.norm(right))
    value = float(left @ right) / scale if scale > 0 else float("nan")
    return value if np.isfinite(value) else None


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0), dtype=np.float32)
