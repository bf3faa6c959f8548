"""The paper's table, and more, on real zoos: docs/evidence.md.

    python tests/benchmarks/evidence.py [--folder DIR] [--zoo digits|texts] [--seeds N] [--again] [--write PAGE]

Trains the zoos of `evidence_zoo.py` (minutes for digits, an hour for texts, on one thread; kept in DIR), cooks a soup
for every row, and measures it, its ingredients and their ensembles on validation, test and shifted data. What was
measured is kept too, and only printed in the next run; --again measures anew. Rows whose selection or method this
version does not have are left out.

Soups are cooked by `hf_soup.cook` with the validation data alone; test and shifted data are looked at afterwards, with
`hf_soup.evaluation`, because every row is compared with the same model: the ingredient that is best on validation data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import evidence_zoo
import numpy as np
import torch
from ensemble_gap import predicted_gap
from scipy.stats import pearsonr, spearmanr, t
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import hf_soup
from hf_soup.evaluation import ClassificationDataset
from hf_soup.evaluation.ensembles import Logits, calibration, diversity, ensemble, greedy_ensemble, logit_ensemble
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.methods import METHODS
from hf_soup.selection import SELECTIONS

#: Seeds of each zoo, at a constant and at an annealed rate.
SEEDS = {"digits": 9, "texts": 5}
ALPHAS = {"digits": [tenth / 10 for tenth in range(11)], "texts": [0, 0.25, 0.5, 0.75, 1]}
BEST, GREEDY, LEARNED = "best single", "greedy soup", "learned soup"
ENSEMBLES = ("logit ensemble", "probability ensemble", "greedy ensemble")
#: Title → what the recipe says beside the ingredients, the base and the validation data.
SOUPS: list[tuple[str, dict[str, Any]]] = [
    ("uniform soup", {"select": "uniform"}),
    ("uniform without the poor one", {"select": "uniform", "ingredients": "good"}),
    (GREEDY, {"select": "greedy"}),
    ("pruned soup", {"select": "pruned"}),
    (LEARNED, {"select": {"name": "learned", "by": "ingredient"}}),
    ("learned by layer", {"select": {"name": "learned", "by": "tensor"}}),
    ("soup of two greedy soups", {"select": "uniform", "ingredients": "halves"}),
    ("WiSE-FT of the greedy soup", {"select": "greedy", "method": {"name": "wise_ft"}}),
]
#: What differs from zoo to zoo in how shares are learned: with texts a step costs seconds, so the paper's passes do.
LEARNING = {
    "digits": {"ingredient": {"batch_size": 64}, "tensor": {"batch_size": 64}},
    "texts": {"ingredient": {"batch_size": 64, "epochs": 3}, "tensor": {"batch_size": 64, "epochs": 5}},
}
COLUMNS = ("validation", "test", "shifted")
#: Pairs whose gap is measured (and a quarter as many with the poor one), and the step of its second derivative.
PAIRS, STEP = {"digits": 12, "texts": 2}, 0.1


class Kitchen:
    """One zoo: its data, prepared once, its models' logits, and the cook."""

    def __init__(self, kind: str, zoo: Path, out: Path) -> None:
        self.zoo, self.out, self.kind = zoo, out, kind
        self.models = sorted(path.name for path in zoo.iterdir() if path.name[0].isdigit())
        self.scorings = evidence_zoo.scorings(kind, zoo)
        recipe = self.recipe("1", test=self.scorings["test"])
        config = json.loads((zoo / "start" / "config.json").read_text())
        wanted = [(role, each) for role in ("validation", "test") for each in getattr(recipe, role)]
        self.benches: dict[str, ClassificationDataset] = dict(
            zip(COLUMNS, prepare_datasets(wanted, folder=zoo / "start", config=config), strict=True)
        )
        self.loader: Any = AutoModelForImageClassification if kind == "digits" else AutoModelForSequenceClassification

    def recipe(self, *models: str | dict[str, Any], **changes: Any) -> hf_soup.Recipe:
        """A recipe of models of the zoo, or of folders."""
        named = [
            {**each, "model": str(self.zoo / each["model"])} if isinstance(each, dict) else str(self.zoo / each)
            for each in models
        ]
        values = {"base_model": str(self.zoo / "start"), "validation": self.scorings["validation"], **changes}
        return hf_soup.Recipe(ingredients=named, **values)

    def cook(self, title: str, *models: str | dict[str, Any], **changes: Any) -> Path:
        """The folder of a soup."""
        folder = self.out / title.replace(" ", "-")
        started = time.perf_counter()
        hf_soup.cook(self.recipe(*models, **changes), folder, threads=1)
        print(f"  {self.zoo.name}, {title}: {time.perf_counter() - started:.1f} s", flush=True)
        return folder

    def logits(self, folder: Path, columns: Sequence[str] = COLUMNS) -> dict[str, Logits]:
        """What a model answers to the data; of an ingredient, it is kept."""
        found = {}
        for column in columns:
            kept = self.zoo / "logits" / f"{folder.name}-{column}.npy"
            if folder.parent != self.zoo:
                found[column] = self.benches[column].outputs(self.loader.from_pretrained(folder))
                continue
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                np.save(kept, self.benches[column].outputs(self.loader.from_pretrained(folder)))
            found[column] = np.load(kept)
        return found


def measure(kind: str, zoo: Path) -> dict[str, Any]:
    """All that is known of one zoo, as plain data."""
    with tempfile.TemporaryDirectory(prefix="soups-", dir=zoo.parent) as out:
        kitchen = Kitchen(kind, zoo, Path(out))
        singles = {name: kitchen.logits(zoo / name) for name in kitchen.models}
        validation = {name: logits["validation"] for name, logits in singles.items()}
        judge = kitchen.benches["validation"]
        best = max(singles, key=lambda name: judge.score(validation[name]).value)
        rows = {BEST: singles[best], **soups(kitchen)}
        chosen = greedy_ensemble({n: [each] for n, each in validation.items()}, lambda each: judge.score(each[0]).value)
        for title, members, combine in zip(
            ENSEMBLES, (singles, singles, chosen), (logit_ensemble, ensemble, logit_ensemble), strict=True
        ):
            rows[title] = {column: combine([singles[name][column] for name in members]) for column in COLUMNS}
        good = [name for name in kitchen.models if "poor" not in name]
        test = kitchen.benches["test"]
        pairs = list(combinations(good, 2))
        pairs = pairs[:: len(pairs) // PAIRS[kind]][: PAIRS[kind]]
        pairs += [(name, kitchen.models[-1]) for name in good[: -(-PAIRS[kind] // 4)]]
        return {
            "singles": {name: scores(kitchen, logits, rows[BEST]) for name, logits in singles.items()},
            "rows": {title: scores(kitchen, logits, rows[BEST]) for title, logits in rows.items()},
            "diversity": diversity({name: singles[name]["test"] for name in good}, test.references).mean.model_dump(),
            "gaps": [{"poor": "poor" in b, **asdict(gap(kitchen, singles, a, b))} for a, b in pairs],
            "n": {column: bench.n for column, bench in kitchen.benches.items()},
        }


def soups(kitchen: Kitchen) -> dict[str, dict[str, Logits]]:
    """Title → the logits of the soup, row by row."""
    found: dict[str, dict[str, Logits]] = {}
    for title, changes in SOUPS:
        recipe = dict(changes)
        select, method = recipe.get("select", "uniform"), recipe.get("method", {"name": "linear"})
        missing = {select["name"] if isinstance(select, dict) else select} - set(SELECTIONS)
        missing |= {method["name"]} - set(METHODS)
        if missing:
            print(f"  {title} is left out: there is no {', '.join(missing)} yet", flush=True)
            continue
        if isinstance(select, dict):
            recipe["select"] = {**select, **LEARNING[kitchen.kind][select["by"]]}
        if method["name"] == "wise_ft":
            recipe["method"] = {**method, "alpha": ALPHAS[kitchen.kind]}
        given = recipe.pop("ingredients", "all")
        models: list[Any] = {
            "all": kitchen.models,
            "good": [name for name in kitchen.models if "poor" not in name],
            "halves": [kitchen.out / "half-0", kitchen.out / "half-1"],
        }[given]
        if given == "halves":
            for half in range(2):
                kitchen.cook(f"half {half}", *kitchen.models[half::2], select="greedy")
        folder = kitchen.cook(title, *models, **recipe)
        found[title] = kitchen.logits(folder)
        said = json.loads((folder / "soup.json").read_text())["scores"]["soup"]["validation accuracy"]["value"]
        mine = kitchen.benches["validation"].score(found[title]["validation"]).value
        assert abs(said - mine) < 1e-9, f"{title}: soup.json says {said}, the folder as it loads {mine}"
    return found


def scores(kitchen: Kitchen, logits: Mapping[str, Logits], best: Mapping[str, Logits]) -> dict[str, Any]:
    """Column → accuracy, the comparison with the best single, and calibration."""
    found = {}
    for column, bench in kitchen.benches.items():
        against = bench.compare(logits[column], best[column])
        found[column] = {
            "accuracy": bench.score(logits[column]).value,
            "claim": int(np.sign(against.difference)) if against.significant else 0,
            **calibration(logits[column], bench.references).model_dump(),
        }
    return found


def gap(kitchen: Kitchen, singles: Mapping[str, Mapping[str, Logits]], first: str, last: str) -> Any:
    """The predicted and the measured gap in the middle between two ingredients, on test data."""
    path = []
    for at in (0.5 - STEP, 0.5, 0.5 + STEP):
        models = [{"model": first, "weight": 1 - at}, {"model": last, "weight": at}]
        folder = kitchen.cook(f"{first} {last} {at}", *models, validation=[])
        path.append(kitchen.logits(folder, ["test"])["test"])
    ends = [singles[name]["test"] for name in (first, last)]
    return predicted_gap(path, ends, kitchen.benches["test"].references, step=STEP)


# ---- tables --------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """The mean of differences over seeds with half of its 95 % t-interval."""
    n = len(values)
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
    return f"{np.mean(values):+.{digits}f} ± {half:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def accuracies(zoos: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the paper over the seeds of one kind of zoo and schedule."""
    head = ["in %", "validation"]
    for column in COLUMNS[1:]:
        head += [column, "against the best single", "won / tied / lost"]
    rows = []
    for title in zoos[0]["rows"]:
        row = [title]
        for column in COLUMNS:
            mine = [zoo["rows"][title][column] for zoo in zoos]
            row.append(f"{100 * np.mean([each['accuracy'] for each in mine]):.1f}")
            if column != "validation":
                base = [zoo["rows"][BEST][column]["accuracy"] for zoo in zoos]
                apart = [100 * (each["accuracy"] - other) for each, other in zip(mine, base, strict=True)]
                claims = [each["claim"] for each in mine]
                counted = " / ".join(str(claims.count(claim)) for claim in (1, 0, -1))
                row += ["", ""] if title == BEST else [spread(apart, 1), counted]
        rows.append(row)
    return table(head, rows)


def calibrations(zoos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Expected calibration error, negative log-likelihood and Brier score, and the differences to the best single."""
    columns = [(column, name) for column in COLUMNS[1:] for name in ("ece", "nll", "brier")]
    rows = []
    for title in (BEST, GREEDY, LEARNED, *ENSEMBLES):
        row = [title]
        for column, name in columns:
            mine = [zoo["rows"][title][column][name] for zoo in zoos]
            base = [zoo["rows"][BEST][column][name] for zoo in zoos]
            apart = [each - other for each, other in zip(mine, base, strict=True)]
            row.append(f"{np.mean(mine):.3f}" + ("" if title == BEST else f" ({spread(apart, 3)})"))
        rows.append(row)
    return table(["", *(f"{column} {name.upper() if name != 'brier' else 'Brier'}" for column, name in columns)], rows)


def gains(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """How different the ingredients' errors are, and what soup and ensemble gain over the mean ingredient, on test."""

    def gain(zoo: Mapping[str, Any], title: str) -> float:
        good = [each["test"]["accuracy"] for name, each in zoo["singles"].items() if "poor" not in name]
        return 100 * float(zoo["rows"][title]["test"]["accuracy"] - np.mean(good))

    measures = ("disagreement", "double_fault", "shared_errors")
    titles = ("uniform without the poor one", "logit ensemble")
    rows = []
    for group, zoos in groups.items():
        means = [f"{np.mean([zoo['diversity'][each] for zoo in zoos]):.3f}" for each in measures]
        rows.append([group, *means, *(f"{np.mean([gain(zoo, title) for zoo in zoos]):+.1f}" for title in titles)])
    lines = table(["", *(each.replace("_", " ") for each in measures), *(f"gain of the {x}" for x in titles)], rows)
    every = [zoo for zoos in groups.values() for zoo in zoos]
    apart = [zoo["diversity"]["disagreement"] for zoo in every]
    said = [f"{title} {spearmanr(apart, [gain(zoo, title) for zoo in every])[0]:.2f}" for title in titles]
    return [*lines, f"Rank correlation of disagreement and gain over the {len(every)} zoos: {'; '.join(said)}.", ""]


def gaps(groups: Mapping[str, Sequence[Mapping[str, Any]]], picture: Path | None) -> list[str]:
    """Predicted beside measured gaps, and their picture."""
    rows, points = [], {}
    for group, zoos in groups.items():
        for poor in (False, True):
            mine = [each for zoo in zoos for each in zoo["gaps"] if each["poor"] == poor]
            predicted, measured = ([each[key] for each in mine] for key in ("predicted", "measured"))
            title = f"{group}{', with the poor one' if poor else ''}"
            points[title] = predicted, measured
            agree = np.mean(np.sign(predicted) == np.sign(measured))
            rows.append(
                [title, f"{len(mine)}", f"{np.mean(predicted):+.4f}", f"{np.mean(measured):+.4f}",
                 f"{pearsonr(predicted, measured)[0]:.2f}", f"{spearmanr(predicted, measured)[0]:.2f}", f"{agree:.0%}"]
            )  # fmt: skip
    if picture:
        plot(points, picture)
    head = ["", "pairs", "predicted, mean", "measured, mean", "correlation", "of ranks", "same sign"]
    return table(head, rows)


def plot(points: Mapping[str, tuple[list[float], list[float]]], out: Path) -> None:
    """Predicted against measured gaps; without those of the poor ones, and with them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.4))
    for number, (group, (predicted, measured)) in enumerate(points.items()):
        axis = axes[int("poor" in group)]
        axis.plot(measured, predicted, ".", color=f"C{number // 2}", alpha=0.6, label=group)
    for axis in axes:
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], color="black", linewidth=0.6)
        axis.set_xlabel("measured: loss of the soup − loss of the logit ensemble")
        axis.set_ylabel("predicted")
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    assert out.stat().st_size < 200_000


def report(groups: Mapping[str, Sequence[Mapping[str, Any]]], picture: Path | None) -> str:
    """Every table, in Markdown."""
    lines = []
    for group, zoos in groups.items():
        rows = ", ".join(f"{column} {zoos[0]['n'][column]:,}" for column in COLUMNS)
        lines += [f"### {group}: accuracy", "", f"{len(zoos)} seeds; rows: {rows}.", "", *accuracies(zoos)]
    for group, zoos in groups.items():
        lines += [f"### {group}: calibration", "", *calibrations(zoos)]
    lines += ["### Diversity of errors and gain", "", *gains(groups)]
    lines += ["### Soup and ensemble: the predicted gap beside the measured one", "", *gaps(groups, picture)]
    if picture:
        lines += [f"![Predicted against measured]({picture.name})", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench" / "evidence")
    parser.add_argument("--seeds", type=int, help=f"by default {SEEDS}")
    parser.add_argument("--zoo", choices=["digits", "texts"], action="append")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced, with the picture beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    groups: dict[str, list[dict[str, Any]]] = {}
    for kind in options.zoo or ("digits", "texts"):
        for annealed in (False, True):
            seeds = options.seeds or SEEDS[kind]
            group = groups.setdefault(f"{kind}, {'annealed' if annealed else 'constant'} rate", [])
            for seed in range(seeds):
                started = time.perf_counter()
                zoo = evidence_zoo.make(kind, folder, seed, annealed=annealed)
                kept = zoo / "measured.json"
                if options.again or not kept.exists():
                    kept.write_text(json.dumps(measure(kind, zoo), indent=1) + "\n")
                    print(f"{zoo.name}: {time.perf_counter() - started:.0f} s", flush=True)
                group.append(json.loads(kept.read_text()))
    text = report(groups, options.write and options.write.with_suffix(".png"))
    if options.write:
        page = options.write.read_text()
        head, mark, _ = page.partition("<!-- tables -->\n")
        assert mark, f"{options.write} has no place for tables"
        options.write.write_text(f"{head}{mark}\n{text}")
    else:
        print(text)


if __name__ == "__main__":
    main()
