"""Licences, and text of strangers that stays text."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_soup.card import escape, license_of, strings, with_fields
from hf_soup.checkpoint import Checkpoint
from hf_soup.errors import PublishError


def model(name: str, **card: Any) -> Checkpoint:
    return Checkpoint(name, config={}, card=card, tensors={}, files={})


@pytest.mark.parametrize(
    ("cards", "base", "agreed"),
    [
        ([{"license": "mit"}, {"license": "mit"}], {"license": "mit"}, "mit"),
        ([{"license": "MIT "}, {"license": ["mit"]}], None, "mit"),
        ([{"license": "mit"}, {"license": "apache-2.0"}], None, None),
        ([{"license": "mit"}, {"license": "mit"}], {"license": "openrail"}, None),
        ([{"license": "mit"}, {"license": "mit"}], {}, None),
        ([{"license": "mit"}, {}], None, None),
        ([{}, {}], None, None),
        ([{"license": None}, {"license": 3}], None, None),
        ([{"license": "other"}, {"license": "other"}], None, None),
        ([{"license": "unknown"}], None, None),
        ([{"license": "other", "license_name": "llama"}] * 2, None, None),
        ([{"license": ["mit", "apache-2.0"]}] * 2, None, None),
        ([{"license": "mit\n---\nevil: 1"}] * 2, None, None),
    ],
)
def test_a_licence_is_claimed_only_when_all_have_it(
    cards: list[dict[str, Any]], base: dict[str, Any] | None, agreed: str | None
) -> None:
    """The base's included; nothing is said about which go together."""
    leaves = [model(f"acme/{number}", **card) for number, card in enumerate(cards)]
    found = license_of(leaves, model("acme/base", **base) if base is not None else None)
    assert found.agreed is (agreed is not None)
    assert found.fields == ({"license": agreed} if agreed else {"license": "other", "license_name": "see-ingredients"})
    assert len(found.rows) == len(cards) + (base is not None)
    assert all("\n" not in text for _, text in found.rows)


@given(st.text(max_size=40))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_escaped_text_has_one_line_and_no_markup(text: str) -> None:
    """And comes back, spaces aside, when a Markdown reader takes the backslashes out."""
    shown = escape(text)
    assert "\n" not in shown
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown) == " ".join(text.split())
    assert not re.search(r"(?<!\\)(\\\\)*[|<>`*_\[\]$&]", shown)


def test_fields_are_lists_of_short_lines() -> None:
    assert strings("x" * 1000) == ["x" * 200]
    assert strings(["a"] * 1000) == ["a"] * 100
    assert strings({"a": 1}) == strings(None) == strings([None, 3, " \n"]) == []


def test_front_matter_is_changed_and_the_page_is_not() -> None:
    """Dashes inside it, and in the page, are not its end."""
    body = "# Soup\n\n---\n\n| a |\n---\nmore\n"
    card = f"---\nlicense: other\nlicense_name: 'x\n\n  ---\n\n  y'\ntags:\n- a---\n---\n\n{body}"
    changed = with_fields(card, {"license": "mit", "license_name": None, "language": ["de"]})
    assert changed == f"---\nlicense: mit\ntags:\n- a---\nlanguage:\n- de\n---\n\n{body}"
    assert with_fields("# Mine\n", {"license": "mit"}) == "---\nlicense: mit\n---\n\n# Mine\n"
    assert yaml.safe_load(with_fields(card, {}).split("\n---\n")[0][4:])["license_name"] == "x\n---\ny"


@pytest.mark.parametrize("matter", ["[", "- a", "just text", "a: b: c"])
def test_front_matter_that_is_none_is_said(matter: str) -> None:
    with pytest.raises(PublishError, match="not a YAML mapping"):
        with_fields(f"---\n{matter}\n---\n# Soup\n", {"license": "mit"})
