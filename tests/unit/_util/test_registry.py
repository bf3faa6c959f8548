"""Methods and selections of other packages: real distributions on the path, found by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest

from hf_soup.errors import RecipeError
from hf_soup.methods import METHODS, Method
from hf_soup.selection import SELECTIONS

METHOD = '''
from hf_soup.methods import merge_method

@merge_method(elementwise=True, neutral={})
def median(tensors, weights):
    """The median of the ingredients.

    Reference:
        None.
    """
    import torch
    return torch.stack([tensor.double() for tensor in tensors]).quantile(0.5, 0)

@merge_method(elementwise=True, neutral={})
def narrow(tensors, weights):
    return tensors[0].double()[:1]

@merge_method(elementwise=True, neutral={})
def raises(tensors, weights):
    return tensors["a"]
'''
SELECTION = '''
from hf_soup.selection import Selected, selection

@selection(needs_score=False)
def first_half(weights, score):
    """The first half of the ingredients.

    Reference:
        None.
    """
    return Selected(dict(list(weights.items())[: (len(weights) + 1) // 2]))

@selection(needs_score=False)
def fails(weights, score):
    return score(weights)
'''
ENTRIES = """[hf_soup.methods]
median = acme_soups.methods
broken = acme_soups.broken
absent = acme_soups.methods
narrow = acme_soups.methods
raises = acme_soups.methods
leaves = acme_soups.leaves
twice = acme_soups.methods
linear = acme_soups.broken

[hf_soup.selections]
first_half = acme_soups.selections
fails = acme_soups.selections
"""
#: Another package with the same name of a method.
OTHER = "[hf_soup.methods]\ntwice = others.methods\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution `acme-soups`, which offers methods and a selection."""
    folder = tmp_path / "site"
    for name, text in {
        "acme_soups/__init__.py": "", "acme_soups/methods.py": METHOD, "acme_soups/selections.py": SELECTION,
        "acme_soups/broken.py": "import nothing_of_this_name", "acme_soups/leaves.py": "import sys; sys.exit(3)",
        "others-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: others\nVersion: 2.0\n",
        "others-2.0.dist-info/entry_points.txt": OTHER,
        "acme_soups-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-soups\nVersion: 1.2\n",
        "acme_soups-1.2.dist-info/entry_points.txt": ENTRIES,
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    invalidate_caches()
    kept = [(registry, dict(registry.loaded)) for registry in (METHODS, SELECTIONS)]
    for registry, _ in kept:
        vars(registry).pop("_offered", None)
    yield folder
    for registry, loaded in kept:
        registry.loaded = loaded  # type: ignore[assignment]  # each its own kind
        vars(registry).pop("_offered", None)
    for name in [name for name in sys.modules if name.startswith("acme_soups")]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_names_are_listed_without_an_import() -> None:
    assert {"median", "broken", "ties"} <= set(METHODS)
    assert list(METHODS) == sorted(METHODS)
    assert "first_half" in SELECTIONS
    assert not any(name.startswith("acme_soups") for name in sys.modules)
    assert METHODS.distribution("median") == ("acme-soups", "1.2")
    assert METHODS.distribution("ties") is None


@pytest.mark.usefixtures("package")
def test_one_is_loaded_when_it_is_asked_for() -> None:
    assert isinstance(METHODS["median"], Method)
    assert METHODS.get("nothing") is None
    with pytest.raises(RecipeError, match=r"'acme-soups' offers the method 'broken', and cannot be imported: Module"):
        METHODS["broken"]
    with pytest.raises(RecipeError, match=r"'leaves', and cannot be imported: SystemExit: it ends the process, by"):
        METHODS["leaves"]
    with pytest.raises(RecipeError, match=r"Several packages offer the method 'twice': acme-soups, others\."):
        METHODS["twice"]
    with pytest.raises(RecipeError, match=r"offers the method 'absent', and acme_soups\.methods defines none"):
        METHODS["absent"]
    assert METHODS["linear"].function.__module__ == "hf_soup.methods.linear", "a built-in name is not given away"
    assert METHODS.distribution("linear") is None


@pytest.mark.usefixtures("package")
def test_a_soup_is_cooked_by_them_and_says_so(cli: Callable[..., Any], family: Path, tmp_path: Path) -> None:
    models = [family / name for name in "abc"]
    done = cli("cook", *models, "-o", "soup", "--method", "median", "--select", "first_half", "--quiet", "--json")
    assert done.code == 0, done
    assert list(done.json["weights"]) == ["local:a", "local:b"]
    assert '"acme-soups": "1.2"' in (tmp_path / "soup" / "soup.json").read_text()
    assert "The median of the ingredients." in cli("methods", "median").out


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        (
            "--method",
            "narrow",
            "narrow with its defaults: it gives torch.float64 of shape (1, 4), not torch.float64 of (4, 4)",
        ),
        ("--method", "raises", "The method 'raises' of the package 'acme-soups' 1.2 failed: TypeError: "),
        ("--select", "fails", "The selection 'fails' of the package 'acme-soups' 1.2 failed: "),
    ],
)
def test_what_goes_wrong_in_one_is_an_error(
    cli: Callable[..., Any], family: Path, tmp_path: Path, option: str, name: str, said: str
) -> None:
    done = cli("cook", family / "a", family / "b", "-o", "soup", option, name, "--quiet")
    assert done.code == 1
    assert said in done.err
    assert not (tmp_path / "soup").exists()


@pytest.mark.usefixtures("package")
def test_the_others_are_listed_beside_one_that_is_broken(cli: Callable[..., Any]) -> None:
    done = cli("methods")
    assert done.code == 0
    assert "ties" in done.out
    assert "median" in done.out
    assert "'acme-soups' offers the method 'broken', and cannot be imported" in done.err
