"""Soups in memory: the bytes that a merge would write, for no more reading than is documented."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import candidate, files_here, make_plan, mean
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_soup.checkpoint import RowRange, TensorInfo, read_header
from hf_soup.errors import MergeError
from hf_soup.merging import Materializer, Workspace, merge
from hf_soup.recipe import MethodCall

N = 4
SHAPES: dict[str, tuple[int, ...]] = {"a": (37, 41), "b": (5,), "scale": (), "empty": (0, 3)}


class Shelf:
    """Ingredients in files; soups of some of them, in memory and on disk."""

    def __init__(self, folder: Path, dtypes: Sequence[torch.dtype], written: str | None, **parameters: Any) -> None:
        self.folder, self.written, self.parameters = folder, written, parameters
        self.paths: list[dict[str, Path]] = []
        self.headers: list[Mapping[str, TensorInfo]] = []
        generator = torch.Generator().manual_seed(0)
        for number, dtype in enumerate(dtypes):
            tensors = {k: (0.05 * torch.randn(s, generator=generator)).to(dtype) for k, s in SHAPES.items()}
            path = folder / f"{number}.safetensors"
            save_file({**tensors, "ids": torch.arange(5)}, path)
            data = path.read_bytes()
            self.headers.append({t.name: t for t in read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")})
            self.paths.append({"m": path})
        self.size = sum(info.size for info in self.headers[0].values())
        self.averaged = self.size - self.headers[0]["ids"].size
        self.whole = self._plan(dict.fromkeys(range(len(dtypes)), 1.0))
        self.materializer = Materializer(self.whole.layout, self.paths)

    def made(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        return self.materializer.materialize(candidate(self.whole, weights))

    def _plan(self, weights: Mapping[int, float]) -> Any:
        return make_plan(
            [str(source) for source in weights],
            [self.headers[source] for source in weights],
            list(weights.values()),
            dtype=self.written,
            parameters=self.parameters,
        )

    def written_by_a_merge(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        plan, paths = self._plan(weights), [self.paths[source] for source in weights]
        output = self.folder / str(len(list(self.folder.iterdir())))
        with Workspace(output) as staging:
            staging.open(plan.fingerprint, plan.outline())
            merge(plan, files_here(paths), staging, threads=1, quiet=True)
            return load_file(staging.publish() / "model.safetensors")


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name, tensor in left.items()
    )


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path, [torch.bfloat16] * N, None)
    yield shelf
    shelf.materializer.close()


KINDS = {
    "bfloat16": ([torch.bfloat16] * N, None),
    "float16": ([torch.float16] * N, None),
    "float32": ([torch.float32] * N, None),
    "float64 → bfloat16": ([torch.float64] * N, "bfloat16"),
    "bfloat16 → float64": ([torch.bfloat16] * N, "float64"),
    "float32 → float16": ([torch.float32] * N, "float16"),
    "mixed": ([torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32], "float32"),
}


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        *itertools.product(("bfloat16", "float32"), ((1.0,) * N, (0.1,) * N)),
        *itertools.product(KINDS, [(0.1, 3.0, 0.7, 2.0**70)]),
    ],
    ids=str,
)
def test_every_subset_in_every_order_is_what_a_merge_writes(
    tmp_path: Path, kind: str, weights: tuple[float, ...]
) -> None:
    """One blend for all of them, one after the other, so that what it keeps from one call is tried in the next."""
    shelf = Shelf(tmp_path, *KINDS[kind])
    mixed = kind == "mixed"  # a merge of some of them may have a narrower accumulator than the plan of all
    for n in (1, 2, N):
        for order in itertools.permutations(range(N), n):
            if (n == N and order[0] > order[1]) or (mixed and N - 1 not in order):
                continue
            shares = {source: weights[source] for source in order}
            assert same_bits(shelf.made(shares), shelf.written_by_a_merge(shares)), order
    shelf.materializer.close()


def test_a_plain_sum_is_one_here_too(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [torch.bfloat16] * 3, None, normalize=False)
    for shares in ({0: 0.5}, {0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5, 2: 3.0}):
        assert same_bits(shelf.made(shares), shelf.written_by_a_merge(shares))
    shelf.materializer.close()


def test_what_is_handed_out_may_be_written_to(shelf: Shelf) -> None:
    """Models change their buffers; the next soup does not see it."""
    expected = shelf.written_by_a_merge({0: 1.0, 1: 1.0})
    for _ in range(3):
        found = shelf.made({0: 1.0, 1: 1.0})
        assert same_bits(found, expected)
        for tensor in found.values():
            tensor.zero_()


def test_a_greedy_search_reads_what_is_documented(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ingredient alone; then one for each candidate, and the one that was kept when it joins the sum."""
    read = 0
    original = os.preadv

    def counted(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        nonlocal read
        count = original(descriptor, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    for chosen, models in [
        ([0], 1), ([1], 1), ([2], 1), ([3], 1),
        ([2, 0], 2),  # 2 goes into the sum
        ([2, 1], 1),  # 0 was not kept
        ([2, 1, 3], 2),  # 1 was, and goes into the sum
        ([2, 1, 0], 1),
        ([2, 1], 2),  # nothing new: begun again
        ([3], 1),
    ]:  # fmt: skip
        before = read
        shelf.made(dict.fromkeys(chosen, 1.0))
        # Integers are read once, as they are not added up.
        assert models * shelf.averaged <= read - before <= models * shelf.size, chosen


def test_a_file_that_shrinks_is_named(shelf: Shelf) -> None:
    os.truncate(shelf.paths[1]["m"], 2000)
    with pytest.raises(MergeError, match="1: m ended in the middle of"):
        shelf.made({0: 1.0, 1: 1.0})


def test_closed_is_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    Shelf(tmp_path, [torch.bfloat16] * 2, None).materializer.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("dtypes", [[torch.bfloat16] * N, [torch.float32] * N, [torch.bfloat16] * 3 + [torch.float32]])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("wise_ft", {"alpha": 0.3}),
        ("task_arithmetic", {"scale": 0.7}),
        ("linear", {}),
        ("linear", {"normalize": False}),
    ],
)
def test_other_mixes_are_what_a_merge_writes(
    tmp_path: Path, method: str, parameters: dict[str, Any], dtypes: list[torch.dtype]
) -> None:
    """Around an ancestor, with shares by tensor, with rows that some lack or hold elsewhere."""
    shelf = Shelf(tmp_path, dtypes, None)
    base = method != "linear"
    headers: list[dict[str, TensorInfo]] = [dict(each) for each in shelf.headers]
    headers[0]["a"] = headers[0]["a"].moved([RowRange(20, 0, 17), RowRange(0, 17, 20)], 37)
    headers[1]["a"] = headers[1]["a"].moved([RowRange(0, 0, 30)], 37)
    del headers[-1]["b"]
    layers = {} if base else {"a": [0.2, 0.5, 0.1, 0.9], "scale": [1.0, 0.0, 0.5, 0.0]}
    weights = [0.5, 1.25, 3.0, 0.0 if base else 0.25]
    plan = make_plan(
        list("0123"), headers, weights, method=method, parameters=parameters, patched=["a", "b"], layers=layers,
        with_base=base,
    )  # fmt: skip
    with Workspace(tmp_path / "out") as staging:
        staging.open(plan.fingerprint, plan.outline())
        merge(plan, files_here(shelf.paths), staging, threads=1, quiet=True)
        written = load_file(staging.publish() / "model.safetensors")
    materializer = Materializer(plan.layout, shelf.paths)
    given = {source: weights[source] for source in range(N - base)}
    assert same_bits(materializer.materialize(candidate(plan, given)), written)
    call = MethodCall(method, {**parameters, **{name: 0.1 for name in parameters if base}})
    assert same_bits(materializer.materialize(candidate(plan, given, method=call)), written) == (not base)
    if base:
        assert written["scale"].dtype == torch.bfloat16 if dtypes[0] == torch.bfloat16 else torch.float32
        alone = materializer.materialize(mean(plan, {1: 1.0}))
        assert torch.equal(alone["scale"], load_file(shelf.paths[1]["m"])["scale"])
    materializer.close()


def test_rows_that_only_those_left_out_or_the_ancestor_have(tmp_path: Path) -> None:
    """Are the mean of the ingredients that have them, whatever the ancestor has there."""
    shelf = Shelf(tmp_path, [torch.float32] * N, None)
    headers: list[dict[str, TensorInfo]] = [dict(each) for each in shelf.headers]
    headers[0]["a"] = headers[0]["a"].moved([RowRange(0, 0, 30)], 37)
    plan = make_plan(
        list("0123"), headers, [1.0, 1.0, 1.0, 0.0], method="wise_ft", parameters={"alpha": 0.5}, patched=["a"],
        with_base=True,
    )  # fmt: skip
    materializer = Materializer(plan.layout, shelf.paths)
    each = [load_file(path["m"])["a"].double() for path in shelf.paths]
    mixed = materializer.materialize(candidate(plan, {0: 1.0}))["a"].double()
    torch.testing.assert_close(mixed[:30], (each[0][:30] + each[3][:30]) / 2, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mixed[30:], (each[1][30:] + each[2][30:]) / 2, rtol=1e-6, atol=1e-8)
    materializer.close()
