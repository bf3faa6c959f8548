"""A soup that somebody published: what its ``soup.yaml`` and ``soup.json`` say, read as the stranger's text that it is.

Nothing in them names a path of this machine, runs code or reads a pickle here: models are on the Hub, by commit, or
were folders, by name and sha256; and data and metrics are used only as far as `Published.with_data` lets them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_soup import hub
from hf_soup.checkpoint import FileSource, HubRepo, LocalFolder, front_matter
from hf_soup.errors import RecipeError, ResolveError, without_credentials
from hf_soup.hub import CHECKPOINT, MAX_TEXT, Token
from hf_soup.recipe import (
    MAX_BYTES,
    AnyScoring,
    HarnessScoring,
    Named,
    Recipe,
    Scoring,
    is_local_path,
    split_revision,
    with_dataset,
)

_COMMIT, _SHA256 = r"[0-9a-f]{40}", r"sha256:[0-9a-f]{64}"
#: A thousand ingredients, each compared with each other, fit in; more is not parsed.
_MOST_JSON = 1 << 26

#: Paths on this machine of what a recipe calls ``local:name``: by that name, with or without ``local:``, and where
#: several share it by ``name@1234567``, the first digits of the sha256.
Paths = Mapping[str, str | Path]


@dataclass(frozen=True)
class Published:
    """A soup as its repo, or its folder, says that it is.

    Args:
        model: ``owner/name`` as the Hub answers, or ``local:name`` of a folder.
        recipe: Its resolved recipe without data: every ingredient is a Hub id with a commit, or ``local:name`` with a
            sha256. ``allow_pickle`` is the caller's.
        validation, test: The recipe's data, which `with_data` gives back in a recipe that can be measured.
        report: ``soup.json``, of which the digest alone is known to be what it should be.
        source: Where its files are.
    """

    model: str
    recipe: Recipe
    validation: tuple[AnyScoring, ...] = field(repr=False)
    test: tuple[AnyScoring, ...] = field(repr=False)
    report: Mapping[str, Any] = field(repr=False)
    source: FileSource = field(repr=False)

    def __str__(self) -> str:
        return f"{self.model}@{self.source.commit[:7]}" if self.source.commit else self.model

    @property
    def digest(self) -> str:
        """Over all tensors, as ``soup.json`` says."""
        return str(self.report["digest"])

    def scores(self, model: str = "soup") -> dict[str, float]:
        """What ``soup.json`` says that a model scored, as far as that is numbers: title of the data → value."""
        stated = as_mapping(as_mapping(self.report.get("scores")).get(model))
        values: dict[str, Any] = {title: as_mapping(score).get("value") for title, score in stated.items()}
        return {
            title: float(value) for title, value in values.items() if type(value) in (int, float) and abs(value) <= 1e6
        }

    def with_data(self, paths: Paths | None = None, *, trust_remote_code: bool = False) -> Recipe:
        """The recipe with its data, where all of it may be used here.

        Args:
            paths: Where data and metrics that were files on another machine are on this one.
            trust_remote_code: Let metrics that are code (of the Hub, or ``module:function``) run.

        Raises:
            RecipeError: Data or a metric was a file and is not among the paths, is not pinned, or is code.
        """
        every = [_usable(each, paths or {}, trust_remote_code) for each in (*self.validation, *self.test)]
        count = len(self.validation)
        return self.recipe.model_copy(update={"validation": tuple(every[:count]), "test": tuple(every[count:])})

    def with_calibration(self, paths: Paths | None = None) -> Recipe:
        """The recipe with its examples, and the test data whose rows are not among them, where they may be used here.

        Args:
            paths: As in `with_data`.

        Raises:
            RecipeError: As there.
        """
        if self.recipe.calibration is None:
            return self.recipe
        calibration = _usable(self.recipe.calibration, paths or {}, False)
        plain = [each.model_copy(update={"metric": "accuracy"}) for each in with_dataset(self.test)]  # no metric is run
        tests = [_usable(each, paths or {}, False) for each in plain]
        return self.recipe.model_copy(update={"calibration": calibration, "test": tuple(tests)})


def open_published(model: str, *, allow_pickle: bool = False, token: Token = None) -> Published:
    """Pin a published soup and read what it says about itself; no weights, and nothing of its ingredients.

    Args:
        model: A Hub id, ``id@revision``, a huggingface.co address or a folder.
        allow_pickle: Of the recipe that is returned; what the published one says does not count.
        token: As everywhere in huggingface_hub.

    Raises:
        ResolveError: It cannot be found or reached.
        RecipeError: It is no soup, or its recipe is too large, no recipe, not pinned, or names a path.
    """
    folder = Path(os.path.expanduser(model))  # noqa: PTH111 -- the other raises for an unknown user
    source: FileSource
    if is_local_path(str(folder)):
        source = LocalFolder.of(folder, folder.rglob("*") if folder.is_dir() else ())
        name = f"local:{folder.resolve().name}"
    else:
        asked, _, revision = split_revision(model.strip())
        if not hub.is_repo_id(asked):
            raise ResolveError(
                f"'{without_credentials(model)[:200]}' is neither a folder nor a Hub id.",
                hint="Name a soup's folder, or its repo `owner/name`.",
            )
        repo = hub.resolve(asked, revision or None, token=token)
        source, name = HubRepo.of(repo), repo.id
    if lacking := " and ".join(sorted({"soup.yaml", "soup.json"} - source.files.keys())):
        raise RecipeError(
            f"'{model}' is no soup: it has no {lacking}.", hint="Name a model that `hf-soup cook` made and pushed."
        )
    recipe = read_recipe(source)
    _require_pinned(recipe, (name, source.commit))
    report = _read_report(source)
    plain = {"validation": (), "test": (), "allow_pickle": allow_pickle}
    return Published(name, recipe.model_copy(update=plain), recipe.validation, recipe.test, report, source)


def read_recipe(source: FileSource, *, max_bytes: int = MAX_BYTES) -> Recipe:
    """The ``soup.yaml`` of a repo or folder, bounded, parsed and validated as any recipe.

    Args:
        source: Where it is.
        max_bytes: A longer one is not parsed.

    Raises:
        RecipeError: It is too large, cannot be read, or is no recipe.
    """
    text = read_small(source, "soup.yaml", max_bytes).decode("utf-8", "replace")
    return Recipe.parse(text, "its soup.yaml")


def read_small(source: FileSource, name: str, most: int) -> bytes:
    """A whole file of at most so many bytes.

    Raises:
        RecipeError: It is larger, or cannot be read.
    """
    if source.files[name] > most:
        raise RecipeError(f"its {name} has {source.files[name]:,} bytes; at most {most:,} are read")
    path = source.fetch(name)  # into the cache, where it is found without a network too
    try:
        with path.open("rb") as file:
            return file.read(most)  # a folder's file may have grown
    except OSError as error:
        raise RecipeError(f"its {name} cannot be read: {error.strerror}") from None


def _read_report(source: FileSource) -> dict[str, Any]:
    """``soup.json``, with a digest; what else is said is nobody's to believe."""
    try:
        report = json.loads(read_small(source, "soup.json", _MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"Cannot read its soup.json: it is not JSON ({error}).") from None
    if not isinstance(report, dict) or not re.fullmatch("[0-9a-f]{64}", str(report.get("digest"))):
        raise RecipeError("Cannot read its soup.json: it states no digest.")
    return report


def as_mapping(value: object) -> dict[str, Any]:
    """What a stranger's JSON has in a place; nothing where that is no mapping."""
    return value if isinstance(value, dict) else {}


def _require_pinned(recipe: Recipe, itself: tuple[str, str | None]) -> None:
    """Refuse what no soup's own recipe has: paths, branches, choices that are still to be made, the soup in itself."""
    named: list[tuple[str, str | None]] = [(each.model, each.revision) for each in recipe.ingredients]
    if recipe.base_model is not None and not recipe.base_model.startswith("local:"):
        base, _, at = split_revision(recipe.base_model)
        named.append((base, at))
    for each in recipe.ingredients:
        if each.base is not None:  # of an adapter
            base, _, at = split_revision(each.base)
            named.append((base, at))
    for model, revision in named:
        on_hub = hub.within_repo(model) is not None
        if not on_hub and not _is_local(model):
            raise RecipeError(
                f"its soup.yaml names {model[:200]!r}, which is neither a Hub id nor `local:name`",
                hint="A published recipe names models on the Hub by commit, and folders by name and sha256.",
            )
        if not re.fullmatch(_COMMIT if on_hub else _SHA256, revision or ""):
            raise RecipeError(
                f"its soup.yaml does not say which {'commit' if on_hub else 'sha256'} {model!r} was "
                f"(it says {str(revision)[:80]!r})"
            )
        if on_hub and is_local_path(model):
            raise RecipeError(
                f"There is a file or folder '{model}' here, which would be read in place of the Hub's model.",
                hint="Run this in another folder.",
            )
        if revision and (model, revision) == itself:
            raise RecipeError(f"its soup.yaml names the soup itself, {model}@{revision[:7]}, as its ingredient")
    if recipe.base_model is not None and recipe.base_model.startswith("local:") and not _is_local(recipe.base_model):
        raise RecipeError(f"its soup.yaml names the base {recipe.base_model[:200]!r}, which is no name of a folder")
    if recipe.select != Named(name="uniform") or recipe.stability_repeats:
        raise RecipeError(
            "its soup.yaml leaves a choice open (`select` or `stability_repeats`); in a soup's it is made"
        )


def _is_local(model: str) -> bool:
    """Whether a name stands for a folder or file on somebody's machine, without its path."""
    if not model.startswith("local:"):
        return False
    name, _, step = model.removeprefix("local:").partition("/")
    name = name if CHECKPOINT.fullmatch(step) else model.removeprefix("local:")
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def local_path(model: str, revision: str | None, paths: Paths) -> Path | None:
    """Where what a recipe calls ``local:name`` is on this machine, as the caller says; None where they do not.

    >>> local_path("local:run-1/checkpoint-20", "sha256:" + 64 * "a", {"run-1": "runs/1"})
    PosixPath('runs/1/checkpoint-20')
    """
    name = model.removeprefix("local:")
    short = (revision or "").removeprefix("sha256:")[:7]
    known = {key.removeprefix("local:"): os.path.expanduser(path) for key, path in paths.items()}  # noqa: PTH111
    run, _, step = name.partition("/")
    for key, within in ((f"{name}@{short}", ""), (name, ""), (run, step)):
        if key in known:
            return Path(known[key], within)
    return None


def _usable(scoring: AnyScoring, paths: Paths, trusted: bool) -> Scoring | HarnessScoring:
    """Data as it may be used here: on the Hub by commit, or where the caller says that it is."""
    if isinstance(scoring, HarnessScoring):
        if scoring.config is None and scoring.include_path is None:
            return scoring.model_copy(update={"trust_remote_code": trusted})
        raise RecipeError(
            f"'{scoring.title[:200]}' is a task that whoever made the soup wrote, and a task's templates are code; a "
            "stranger's is never run.",
            hint="Whoever has it can score with it: a recipe with the soup in it, and `hf-soup score --recipe`.",
        )
    if not isinstance(scoring, Scoring):
        raise RecipeError(
            f"'{scoring.title[:200]}' is a function of whoever made the soup; a stranger's function is never called.",
            hint="Whoever has it can score with it: `hf-soup score MODEL --validation module:function`.",
        )
    changes: dict[str, object] = {"trust_remote_code": trusted}
    if _is_local(scoring.dataset):
        changes |= {"dataset": str(_mapped(scoring.dataset, scoring.revision, paths)), "name": _called(scoring)}
    elif not hub.is_repo_id(scoring.dataset) or not re.fullmatch(_COMMIT, scoring.revision or ""):
        raise RecipeError(
            f"The data {scoring.dataset[:200]!r} (revision {str(scoring.revision)[:80]!r}) is neither a Hub id with a "
            "commit nor `local:name`."
        )
    elif is_local_path(scoring.dataset):
        raise RecipeError(
            f"There is a file or folder '{scoring.dataset}' here, which would be read in place of the Hub's data.",
            hint="Run this in another folder.",
        )
    metric = scoring.metric
    if metric.startswith("local:"):
        changes["metric"] = str(_mapped(metric, None, paths))
    elif re.search(r"[^\w]", metric) and not trusted:
        raise RecipeError(
            f"The metric {metric[:200]!r} is code, which a stranger's recipe runs only where you say so.",
            hint="Read it first; then --trust-remote-code (in Python `trust_remote_code=True`) lets it run.",
        )
    elif metric.startswith((".", "/", "~")) or is_local_path(os.path.expanduser(metric)):  # noqa: PTH111
        raise RecipeError(f"The metric {metric[:200]!r} is a path, and nothing in a stranger's recipe names one here.")
    return scoring.model_copy(update=changes)


def _mapped(name: str, revision: str | None, paths: Paths) -> Path:
    path = local_path(name, revision, paths)
    if path is None:
        raise RecipeError(
            f"'{name}' was a file on the machine where the soup was made.",
            hint=f"Where you have it, say so: --map {name.removeprefix('local:')}=PATH.",
        )
    return path


def _called(scoring: Scoring) -> str:
    """What local data is called in the tables of the soup, whatever the file is called here."""
    return scoring.title.removesuffix(f" {scoring.measure}").removeprefix("local:")


def model_index(published: Published) -> list[tuple[set[str], str, str | None, float]]:
    """Of each result on the card: what the data is called, the metric, the split, the value."""
    try:
        fields = front_matter(read_small(published.source, "README.md", MAX_TEXT))
        return [
            ({str(result["dataset"].get(key)) for key in ("type", "name")}, str(metric["type"]),
             result["dataset"].get("split"), float(metric["value"]))
            for entry in fields.get("model-index", [])
            for result in entry["results"]
            for metric in result["metrics"]
            if abs(float(metric["value"])) <= 1e6
        ]  # fmt: skip
    except (RecipeError, KeyError, TypeError, ValueError, AttributeError):
        return []


def value_on_card(card: Sequence[tuple[set[str], str, str | None, float]], scoring: AnyScoring) -> float | None:
    """What a card's results, of `model_index`, say of some data; of a task of the harness they say nothing."""
    if not isinstance(scoring, Scoring):
        return None
    for names, metric, split, value in card:
        if metric == scoring.metric and {scoring.dataset, scoring.name} & names and split in (None, scoring.split):
            return value
    return None
