"""Methods against cases worked by hand, with the derivation beside them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_soup.methods import METHODS
from hf_soup.testing import mix, rounded, same_bits

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", METHODS.built_in)
def test_it_has_golden_cases(name: str) -> None:
    assert len(json.loads((GOLDEN / f"{name}.json").read_text())) >= 3


def golden() -> list[Any]:
    return [
        pytest.param(path.stem, case, id=f"{path.stem}: {case['title']}")
        for path in sorted(GOLDEN.glob("*.json"))
        for case in json.loads(path.read_text())
    ]


def exactly(texts: list[str], dtype: str) -> Tensor:
    """Numbers written as fractions; each must be one that the type can hold."""
    values = torch.tensor(
        [-0.0 if text == "-0" else float(Fraction(text)) for text in texts], dtype=getattr(torch, dtype)
    )
    assert [Fraction(value) for value in values.tolist()] == [Fraction(text) for text in texts]
    return values


@pytest.mark.parametrize(("name", "case"), golden())
def test_golden_case(name: str, case: dict[str, Any]) -> None:
    """Cases worked by hand, with the derivation beside them.

    Numbers are fractions, written out flat; ``shape`` gives their shape if there is more than one dimension. ``random``
    and ``statistics`` are handed in as written, ``cutoffs`` too, or where they are absent as the density has them. With
    ``atol``, which is for results that are no fractions, ``expected`` are decimals.
    """
    assert case["derivation"]
    method = METHODS[name]
    shape = case.get("shape", [-1])
    tensors = [exactly(values, case["dtype"]).reshape(shape) for values in case["tensors"]]
    written_out: dict[str, Any] = {}
    if "random" in method.given:
        written_out["random"] = [exactly(values, "float32").reshape(shape) for values in case["random"]]
    if "statistics" in method.given:
        width = tensors[0].shape[-1]
        sizes = (width, width) if method.statistics == "gram" and tensors[0].ndim == 2 else tensors[0].shape
        written_out["statistics"] = [exactly(values, "float32").reshape(sizes) for values in case["statistics"]]
    if "cutoffs" in case:
        written_out["cutoffs"] = [float(Fraction(text)) for text in case["cutoffs"]]
    mixed = mix(method, tensors, case["weights"], **case["parameters"], **written_out)
    assert mixed.shape == tensors[0].shape
    written = case.get("written", case["dtype"])
    result = rounded(mixed, getattr(torch, written)).reshape(-1)
    if "atol" in case:
        expected = torch.tensor([float(Fraction(text)) for text in case["expected"]], dtype=result.dtype)
        torch.testing.assert_close(result, expected, rtol=0, atol=case["atol"])
        return
    expected = exactly(case["expected"], written)
    assert same_bits(result, expected), result
    assert [math.copysign(1, value) for value in result] == [math.copysign(1, value) for value in expected]
