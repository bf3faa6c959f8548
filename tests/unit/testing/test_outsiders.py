"""The shipped test classes, as another package uses them: the one of docs/extending.md, and broken ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

import hf_soup
from hf_soup.methods import METHODS, Method
from hf_soup.testing import MethodTests

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"
#: Broken method → what the page's method does, and what it does in its place.
BROKEN = {
    "careless": ("    if len(tensors)", "    tensors[0].mul_(2)\n    if len(tensors)"),
    "first": ("values.median(0).values", "values[0]"),
    "narrow": ("values.median(0).values", "values.median(0).values.to(tensors[0].dtype)"),
    "signs": ("torch.where((middle == 0) & ~values.signbit().all(0), 0.0, middle)", "middle"),
}  # fmt: skip
#: One that takes logarithms and powers number by number, which no two machines round alike, and says so.
SMOOTH = (
    ("neutral={}, bound=0.0)", "neutral={}, bound=1e-4)"),
    (
        "return torch.where((middle == 0) & ~values.signbit().all(0), 0.0, middle)",
        "return values.asinh().mean(0).sinh()",
    ),
    ("tensor([2.], dtype", "tensor([2.7594], dtype"),
)
TESTS = """
class TestSmooth(MethodTests):
    method = "smooth"

class TestCareless(MethodTests):
    method = "careless"

class TestFirst(MethodTests):
    method = "first"

class TestNarrow(MethodTests):
    method = "narrow"

class TestSigns(MethodTests):
    method = "signs"

class TestAsking(SelectionTests):
    selection = "asking"

class TestEvening(SelectionTests):
    selection = "evening"
"""
#: A test by which each is noticed; all of them would take long.
NOTICED = (
    "TestSmooth or TestMedian or TestAboveMedian or TestRewardPairs or (TestCareless and is_not_changed) "
    "or (TestFirst and order) or (TestNarrow and the_shape_stays) or (TestSigns and order) "
    "or (TestAsking and can_be_made) or (TestEvening and can_be_made)"
)


def blocks() -> dict[str, str]:
    """The files that the page shows, by the names in their first lines."""
    found = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def outcome(module_path: Path) -> str:
    """What pytest prints in the package's folder."""
    files = blocks()
    method, selection = files["acme_soups/median.py"], files["acme_soups/above_median.py"]
    entries = {
        "methods": {"median": "median"}, "selections": {"above_median": "above_median"},
        "tasks": {"reward-pairs": "reward_pairs:RewardPairs"},
    }  # fmt: skip
    for name, (right, wrong) in BROKEN.items():
        assert right in method
        files[f"acme_soups/{name}.py"] = method.replace(right, wrong).replace("median(", f"{name}(", 1)
        entries["methods"][name] = name
    smooth = re.sub(r"(?<!\.)median\(", "smooth(", method)
    for there, here in SMOOTH:
        assert there in smooth
        smooth = smooth.replace(there, here)
    files["acme_soups/smooth.py"], entries["methods"]["smooth"] = smooth, "smooth"
    for name, (right, wrong) in {
        "asking": ("needs_score=True", "needs_score=False"),
        "evening": ("weights[name] for name", "1.0 for name"),
    }.items():
        assert right in selection
        files[f"acme_soups/{name}.py"] = selection.replace(right, wrong).replace("above_median(", f"{name}(")
        entries["selections"][name] = name
    files["acme_soups/__init__.py"] = ""
    files["tests/test_contract.py"] += TESTS
    for file, text in (("one", "method = 'medain'"), ("two", "pass")):
        test = f"from hf_soup.testing import MethodTests\nclass TestIt(MethodTests):\n    {text}\n"
        files[f"tests/test_{file}.py"] = test
    # As an installer leaves it.
    files["acme_soups-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: acme-soups\nVersion: 1.0\n"
    files["acme_soups-1.0.dist-info/entry_points.txt"] = "\n".join(
        line
        for group, modules in entries.items()
        for line in (f"[hf_soup.{group}]", *(f"{name} = acme_soups.{module}" for name, module in modules.items()))
    )
    for name, text in files.items():
        (module_path / name).parent.mkdir(parents=True, exist_ok=True)
        (module_path / name).write_text(text)
    paths = [module_path, Path(hf_soup.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    options = ["-p", "no:cacheprovider", "-q", "-rA", "--tb=short", "--continue-on-collection-errors"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", NOTICED],
        cwd=module_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def results(outcome: str, result: str, test_class: str) -> list[str]:
    return re.findall(rf"^{result} \S+::{test_class}::(\S+)", outcome, re.MULTILINE)


def test_the_page_is_a_package_that_keeps_the_contract(outcome: str) -> None:
    for test_class, least in (("TestMedian", 25), ("TestSmooth", 25), ("TestAboveMedian", 8), ("TestRewardPairs", 14)):
        assert len(results(outcome, "PASSED", test_class)) >= least, outcome
        assert not results(outcome, "(?:FAILED|ERROR)", test_class), outcome


@pytest.mark.parametrize(
    ("test_class", "message"),
    [
        ("TestCareless", "the tensor of ingredient 0 was changed: 38 of 40 elements differ. Element "),
        ("TestFirst", "in the other order the ingredients give something else"),
        ("TestNarrow", "assert torch.bfloat16 == torch.float32"),
        ("TestSigns", "zeros of both signs, depend on the order"),
        ("TestAsking", "it asked for a score, and `needs_score=False` says that it does not"),
        ("TestEvening", "a selection that changes their ratios is registered with `reweighs=True`"),
    ],
)
def test_what_breaks_it_is_said(outcome: str, test_class: str, message: str) -> None:
    assert results(outcome, "FAILED", test_class), outcome
    start = outcome.index(f"{test_class}.test_")
    assert message in re.sub(r"\nE +", "\n", outcome[start:]), outcome[start:]


def test_a_name_that_there_is_not(outcome: str) -> None:
    assert "There is no method 'medain'. It is found when its package is installed with an entry point" in outcome
    assert 'The class names no method: write `method = "name"` into it.' in outcome
    assert "Traceback" not in outcome


def test_one_that_no_package_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    def lonely(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return tensors[0]

    monkeypatch.setitem(METHODS.loaded, "lonely", Method("lonely", lonely, elementwise=True, neutral=None))
    with pytest.raises(pytest.fail.Exception, match=r'"hf_soup\.methods"]\nlonely = ".*test_outsiders"'):
        MethodTests().test_recipes_find_it(METHODS["lonely"])


def test_without_pytest_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "try: import hf_soup.testing\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "there is no hypothesis: pip install 'hf-soup[testing]'" in done.stdout


def test_nothing_else_of_the_package_loads_it() -> None:
    code = (
        "import sys\n"
        "from hf_soup import Recipe, check, cook, score, search, verify\n"
        "print(sorted({'pytest', 'hypothesis', 'hf_soup.testing'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]
