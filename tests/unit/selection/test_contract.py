"""Every selection keeps the contract that the package ships."""

from __future__ import annotations

from hf_soup.selection import SELECTIONS
from hf_soup.testing import SelectionTests


class TestSelections(SelectionTests):
    selection = tuple(name for name in SELECTIONS.built_in if name not in ("learned", "entropy"))


class TestLearned(SelectionTests):
    selection = "learned"
    parameters = {"epochs": 3}  # noqa: RUF012


class TestEntropy(SelectionTests):
    selection = "entropy"
    parameters = {"steps": 3}  # noqa: RUF012
