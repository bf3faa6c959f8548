"""Recipes of the golden records whose bytes are the same on every machine, and what compares two records."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden import models
from golden.recipes import RECIPES
from golden.running import recipe_text

#: Of soups by elementwise methods, without data and without statistics. Where one of these changes, a soup that is
#: published is no longer what `hf-soup verify` makes of its recipe: that is a break, and no number to be replaced.
DIGESTS: dict[str, str] = {
    "linear": "b99b03bf4c8f102c43a5815549493282e0604700fc8454dd5750d0ece294438e",
    "linear by weights": "e57cd971d3db934e68bd2167b950fc3b01087dae5825248fb20039ad59607dbf",
    "wise_ft": "d41f83ef1036349aeb08567d93c60d2bb6a4b175d824d8872b2bfe1662cd13a7",
    "task_arithmetic": "dccc69b4c6f8c34933978676b973ea1d15c663cb4e7a083af4bfa8bec767c2ca",
    "ties": "af8c2e3089cdc76e86327f0e19b6ac85235a92675b06f92354b859f82630f117",
    "dare_linear": "76d39f7cee19ca6450f8a412451a582a9f82f1e028f46bbcb655ce5ee7466fe9",
    "dare_ties": "cd63590c329ac8bfd47b0e896fbc772110dc490783cd9e0d774bf145477bc252",
    "breadcrumbs": "8510c92ebc2ffd3393a870973b00ce2b444c0e1bed59d35743191d0b89f1111b",
    "mixed dtypes": "b907ecc1f986b4cb54534b0fdda68acd7f7c60dc76d16a3c7d8f99e45d83bd38",
    "vocabulary union": "5ea47798e7f4c8ce286b0afd4d5c2b1c7ffef32d764f69881944f3c3b3a27ca7",
    "sharded": "b99b03bf4c8f102c43a5815549493282e0604700fc8454dd5750d0ece294438e",
    "tied and untied": "a20de827aaa34c105aef137be200cc57768bee3f63d46636eca5f2ffe985e4cd",
    "depth": "4cc55bac406d3ac1e29dd9049e33ec738d21ee0578a680af096094eefdc92323",
}
SCRIPT = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden(module_path: Path) -> Path:
    """The folder with the models that the recipes name."""
    models.make_all(module_path)
    return module_path


@pytest.mark.parametrize("name", DIGESTS)
def test_a_recipe_gives_the_bytes_that_it_has_always_given(
    cli: Callable[..., Any], golden: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden)
    (tmp_path / "recipe.yaml").write_text(recipe_text(RECIPES[name]["recipe"], name))
    done = cli("cook", tmp_path / "recipe.yaml", "-o", tmp_path / "soup", "--json", "--quiet")
    assert done.code == 0, done
    assert done.json["digest"] == DIGESTS[name]


def test_a_changed_value_is_found(tmp_path: Path) -> None:
    """And where it is; a record is equal to itself."""
    record: dict[str, Any] = {"recipes": {"linear": {"digest": "a", "steps": {"check": {"exit": 0}}}}, "faults": {}}
    for name, digest in (("before", "a"), ("after", "b")):
        record["recipes"]["linear"]["digest"] = digest
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    def compare(*names: str) -> tuple[int, str]:
        command = [sys.executable, str(SCRIPT), "compare", *(str(tmp_path / f"{name}.json") for name in names)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert compare("before", "before") == (0, "0 differences in 0 of 1 cases.\n")
    code, said = compare("before", "after")
    assert code == 1
    assert said.splitlines() == [
        "/recipes/linear/digest", '  before: "a"', '  after:  "b"', "1 differences in 1 of 1 cases."
    ]  # fmt: skip
