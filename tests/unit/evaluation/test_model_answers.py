"""What is remembered of a model's answers is found again by its numbers alone: not by who else is in the recipe."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from plans import candidate, make_plan, mean
from safetensors.torch import load_file

from hf_soup.checkpoint import TensorInfo, read_header
from hf_soup.evaluation import ClassificationDataset
from hf_soup.evaluation.model_answers import _keep, _noted
from hf_soup.merging import Plan
from hf_soup.recipe import MethodCall, Scoring


def plan_of(family: Path, names: str, method: str = "linear", head: str = "") -> Plan:
    """Of some models of the family, of whom one may have the head alone."""
    tensors: list[dict[str, TensorInfo]] = []
    for name in names:
        data = (family / name / "model.safetensors").read_bytes()
        found = read_header(lambda _, i, j, d=data: d[i:j], "model.safetensors", len(data), name)
        tensors.append({each.name: each for each in found if not head or name == head or "classifier" not in each.name})
    patched = {"classifier.weight", "classifier.bias"} if head else set()
    return make_plan(list(names), tensors, [1.0] * len(names), method=method, patched=patched)


def key(plan: Plan, weights: Mapping[int, float], **changes: Any) -> str:
    return candidate(plan, weights, **changes).key


def alone(plan: Plan, source: int) -> str:
    return mean(plan, {source: 1.0}).key


def test_everything_that_decides_the_numbers_is_in_the_key(family: Path) -> None:
    name = next(iter(load_file(family / "a" / "model.safetensors")))
    pair = {0: 1.0, 1: 1.0}
    plans = [plan_of(family, "abc"), plan_of(family, "abc", head="c"), plan_of(family, "abc", head="b")]
    keys = set()
    for plan in plans:
        keys |= {
            alone(plan, 0),
            alone(plan, 1),
            key(plan, pair),
            key(plan, {1: 1.0, 0: 1.0}),  # sums are rounded in their order
            key(plan, {0: 1.0, 1: 2.0}),
            key(plan, pair, tensor_weights={name: (1.0, 2.0)}),
            key(plan, pair, tensor_weights={name: (2.0, 1.0)}),
            key(plan, pair, method=MethodCall("linear", {"normalize": False})),
        }
    assert len(keys) == len(plans) * 8


def test_nothing_else_is(family: Path) -> None:
    """Other ingredients, their number and the order of those that are not in it."""
    here, there = plan_of(family, "abc"), plan_of(family, "cba")
    assert key(here, {0: 1.0, 2: 3.0}) == key(there, {2: 1.0, 0: 3.0})
    assert alone(here, 1) == alone(plan_of(family, "b"), 0)
    # Anything but a plain mean is computed in the order of the layout, whatever the order of its mixture.
    own, turned = {"classifier.bias": (0.25, 0.5)}, {"classifier.bias": (0.5, 0.25)}
    again = key(here, {0: 1.0, 2: 3.0}, tensor_weights=own)
    assert again == key(here, {2: 3.0, 0: 1.0}, tensor_weights=turned)
    assert again != key(there, {2: 1.0, 0: 3.0}, tensor_weights=own)
    ties = MethodCall("ties", {})
    assert key(here, {0: 1.0, 2: 3.0}, method=ties) == key(here, {2: 3.0, 0: 1.0}, method=ties)
    # A head that one has alone is in every soup.
    assert alone(plan_of(family, "abc", head="c"), 0) == alone(plan_of(family, "ac", head="c"), 0)


def test_what_is_remembered_is_believed_only_whole(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    note = tmp_path / "logits" / "note.npy"
    bench = ClassificationDataset(
        "rows accuracy", Scoring(task="text-classification", dataset="rows"), (), "", "rows",
        class_names=("a", "b", "c"), references=np.zeros(5, np.int64), inputs=None, _labels=None,
    )  # fmt: skip
    _keep(note, logits)
    whole = note.read_bytes()
    assert [path.name for path in note.parent.iterdir()] == ["note.npy"]
    assert np.array_equal(_noted(note, bench), logits)
    damages = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    # A header that is no Python: numpy's reader of it raises an error that is of no common class.
    damages += [b"", whole[:-1], whole + b"x", whole[:10] + b"(" * 50 + whole[60:]]
    for damaged in damages:
        note.write_bytes(damaged)
        assert _noted(note, bench) is None


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        _keep(tmp_path / "note.npy", np.zeros((100_000, 2), dtype=np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
