"""What methods and selections say of themselves reads well at a terminal."""

from __future__ import annotations

import re

import pytest

from hf_soup.cli.method_help import WIDTH, explanation, formula, listed, parameters, values, whole
from hf_soup.methods import METHODS, Method, Within
from hf_soup.selection import SELECTIONS, Selection

every = pytest.mark.parametrize("each", [*METHODS.values(), *SELECTIONS.values()], ids=lambda each: each.name)


def test_methods_are_in_alphabetical_order_a_line_each() -> None:
    assert list(METHODS) == sorted(METHODS)
    lines = listed({"methods": list(METHODS.values()), "selections": list(SELECTIONS.values())}).splitlines()
    assert len(lines) == len(METHODS) + len(SELECTIONS) + 5
    assert [line for line in lines if len(line) > WIDTH] == [], "lines that are too wide"


@every
def test_no_markup_is_left(each: Method | Selection) -> None:
    text = whole(each)
    for mark in ("\\", "`", "**", ":math:", ".. ", "\0", ">>>", "  ,", "{{", "sign{"):
        assert mark not in text
    wide = [line for line in text.splitlines() if len(line) > WIDTH]
    assert wide == [], f"the docstring gives lines of more than {WIDTH} letters"
    for opening, closing in ("()", "[]", "{}"):
        intervals = re.findall(r"[\[(][\w.-]+, [\w.-]+[\])]", text)
        said = text.count(opening) - sum(found.count(opening) for found in intervals)
        assert said == text.count(closing) - sum(found.count(closing) for found in intervals)


@every
def test_it_says_when_to_use_it_and_what_each_parameter_does(each: Method | Selection) -> None:
    said = explanation(each)
    assert {"When", "When not", "Reference"} <= said.sections.keys()
    assert [name for name, *_ in parameters(each)] == list(each.parameters)
    assert all(about for *_, about in parameters(each))
    assert not {"weights", "random", "cutoffs"} & {name for name, *_ in parameters(each)}


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\frac12", "1/2"),
        (r"\frac{a+b}{2c}\,x", "(a+b)/2c x"),
        (r"\hat\tau_{i,k}^2", "τ̂_{i,k}²"),
        (r"n\cos\phi", "n cos ϕ"),
        (r"\operatorname*{argmin}_{\lVert m\rVert = 1} w_iu_i", "argmin_{‖m‖ = 1} wᵢ uᵢ"),
        (r"\theta=\bar\theta, \qquad c^+\ne 2^{-24}", "θ = θ̅,\nc⁺ ≠ 2⁻²⁴"),
        (r"(U^\top U)^{-1/2}", "(UᵀU)^(-1/2)"),
    ],
)
def test_formulas_are_lines_of_text(latex: str, text: str) -> None:
    assert formula(latex) == text


def test_values_are_intervals_or_words() -> None:
    assert values(Within("(0, 1]"), 0.5) == "(0, 1]"
    assert values(Within("[1, inf)"), 10) == "[1, inf), whole"
    assert values(Within("(-inf, inf)"), 1.0) == values(None, 1.0) == "numbers"
    assert values(("model", "tensor"), "model") == "model, tensor"
    assert values(None, True) == "true, false"
