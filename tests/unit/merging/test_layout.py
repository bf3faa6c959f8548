"""Output files and byte ranges, from headers alone."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from plans import candidate, make_plan

from hf_soup.checkpoint import ITEM_BYTES, TensorInfo
from hf_soup.errors import IncompatibleError
from hf_soup.merging import BLOCK_BYTES, Plan
from hf_soup.recipe import MethodCall

Header = Mapping[str, TensorInfo]


def header(*entries: tuple[str, str, tuple[int, ...]], file: str = "m") -> Header:
    """A source whose tensors lie one after the other."""
    offset, found = 8, {}
    for name, dtype, shape in entries:
        size = ITEM_BYTES[dtype]
        for length in shape:
            size *= length
        found[name] = TensorInfo(name, dtype, shape, file, offset, size)
        offset += size
    return found


A = header(("w", "BF16", (3, 2)), ("flag", "BOOL", (5,)), ("b", "F32", (7,)))


def planned(*sources: Header, **options: Any) -> Plan:
    return make_plan([f"m{i}" for i in range(len(sources))], sources, [1.0] * len(sources), **options)


def test_a_tensor_that_one_source_lacks_is_named_with_the_source() -> None:
    lacking = {name: info for name, info in A.items() if name != "w"}
    for sources, who in (((A, lacking), "m1"), ((lacking, A), "m0")):
        with pytest.raises(IncompatibleError, match=f"Cannot average 'w': {who} does not have it."):
            planned(*sources)


def test_shapes_that_differ_are_shown() -> None:
    with pytest.raises(IncompatibleError) as error:
        planned(A, {**A, **header(("w", "BF16", (2, 3)))})
    assert str(error.value).splitlines()[1:] == ["  m0  (3, 2)", "  m1  (2, 3)"]


def test_types_that_cannot_be_combined_are_named() -> None:
    with pytest.raises(IncompatibleError, match="'flag': its element types are BOOL, U8"):
        planned(A, {**A, **header(("flag", "U8", (5,)))})
    with pytest.raises(IncompatibleError, match="'w': its element types are BF16, I32"):
        planned(A, {**A, **header(("w", "I32", (3, 2)))}, dtype="float32")


@pytest.mark.parametrize(
    ("found", "dtype", "written"),
    [
        (("BF16", "BF16"), None, "BF16"),
        (("BF16", "F16"), None, "BF16"),
        (("F16", "BF16"), None, "BF16"),
        (("F16", "F32"), None, "F32"),
        (("F32", "F64", "BF16"), None, "F64"),
        (("F32", "F32"), "bfloat16", "BF16"),
        (("I64", "I64"), "bfloat16", "I64"),
    ],
)
def test_the_type_that_is_written(found: tuple[str, ...], dtype: str | None, written: str) -> None:
    plan = planned(*(header(("w", each, (2,))) for each in found), dtype=dtype)
    assert plan.layout.tensors[0].dtype == written


def test_the_commonest_type_goes_into_the_config() -> None:
    assert planned(header(("a", "F32", (2,)), ("b", "F32", (2,)), ("c", "BF16", (9,)))).layout.dtype == "bfloat16"
    assert planned(header(("a", "I64", (2,)))).layout.dtype == "float32"


def test_a_single_file_has_no_index() -> None:
    plan = planned(A, A)
    assert [file.name for file in plan.layout.files] == ["model.safetensors"]
    assert plan.layout.index is None


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
entries = st.lists(
    st.tuples(names, st.sampled_from(list(ITEM_BYTES)), shapes), min_size=1, max_size=12, unique_by=lambda each: each[0]
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(entries=entries, limit=st.integers(1, 400), dtype=st.sampled_from([None, "float16", "float64"]))
def test_every_byte_of_every_file_has_one_tensor(
    entries: list[tuple[str, str, tuple[int, ...]]], limit: int, dtype: str | None
) -> None:
    """Aligned, without holes, cut at the limit; and the same plan after a journey as JSON."""
    source = header(*entries)
    plan = planned(source, source, max_file_bytes=limit, dtype=dtype)
    assert {tensor.name for tensor in plan.layout.tensors} == set(source)
    for number, file in enumerate(plan.layout.files):
        position = len(file.header)
        assert int.from_bytes(file.header[:8], "little") == position - 8
        assert position % 8 == 0
        listed = json.loads(file.header[8:])
        assert listed.pop("__metadata__") == {"format": "pt"}
        inside = [tensor for tensor in plan.layout.tensors if tensor.file == number]
        assert list(listed) == [tensor.name for tensor in inside]
        for tensor in inside:
            assert tensor.offset == position
            assert tensor.offset % ITEM_BYTES[tensor.dtype] == 0
            assert tensor.blocks == -(-tensor.size // BLOCK_BYTES)
            start = position - len(file.header)
            assert listed[tensor.name] == {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, start + tensor.size],
            }
            position += tensor.size
        assert position == file.size
        held = file.size - len(file.header)
        assert held <= limit or sum(tensor.size > 0 for tensor in inside) == 1
    assert plan.layout.size == sum(file.size for file in plan.layout.files)
    # Every block is in one unit, and every unit within its run, also where empty tensors stand between two runs.
    assert [entry for unit in plan.units for entry in plan.blocks_of(unit)] == list(plan.layout.blocks(0, 0))
    for unit in plan.units:
        run = plan.runs[unit.run]
        assert 0 <= unit.begin < unit.end <= run.elements
        assert all(run.first <= tensor < run.stop for tensor, _, _ in plan.blocks_of(unit))
        assert (unit.end - unit.begin) * ITEM_BYTES[run.dtype] == unit.size
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.fingerprint == plan.fingerprint


def test_whatever_decides_the_bytes_changes_the_fingerprint() -> None:
    plan = planned(A, A)
    other = header(("w", "BF16", (3, 2)), ("flag", "BOOL", (5,)), ("b", "F32", (7,)), file="n")
    different = [
        planned(A, other),
        planned(A, A, A),
        planned(A, A, dtype="float32"),
        planned(A, A, parameters={"normalize": False}),
        planned(A, A, max_file_bytes=10),
        candidate(plan, {0: 1.0, 1: 2.0}),
        candidate(plan, {1: 1.0, 0: 1.0}),
        candidate(plan, {0: 1.0}),
        Plan(dataclasses.replace(plan.layout, labels=("m0", "m2")), plan.mixture),
        Plan(dataclasses.replace(plan.layout, states=("m0", "m2")), plan.mixture),
        dataclasses.replace(plan, mixture=dataclasses.replace(plan.mixture, method=MethodCall("ties", {}))),
        dataclasses.replace(plan, mixture=dataclasses.replace(plan.mixture, tensor_weights={"w": (1.0, 2.0)})),
        dataclasses.replace(plan, mixture=dataclasses.replace(plan.mixture, seed=1)),
        dataclasses.replace(plan, statistics={"fisher-8": {"m0": "1", "m1": "2"}}),
    ]
    assert len({each.fingerprint for each in [plan, *different]}) == 1 + len(different)
    assert planned(A, A).fingerprint == plan.fingerprint


def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from hf_soup.checkpoint.headers import TensorInfo\nfrom hf_soup.merging import Layout, Plan, layout\n"
        "from hf_soup.recipe import Mixture\nfrom types import SimpleNamespace\nlayout.MAX_FILE_BYTES = 8\n"
        "t = {n: TensorInfo(n, 'BF16', (3,), 'm', 8 + 6 * i, 6) for i, n in enumerate('zebra')}\n"
        "models = [SimpleNamespace(name=n, label=n, state=n, tensors=t, base_state=None) for n in 'ab']\n"
        "print(Plan(Layout.of(models), Mixture({'a': 1.0, 'b': 2.0})).fingerprint)"
    )
    found = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        for seed in ("0", "1", "42")
    }
    assert len(found) == 1
