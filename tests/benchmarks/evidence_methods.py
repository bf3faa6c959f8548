"""Every method on the same zoos, and selections that weigh: soups of one task, fusion of four tasks, and one run.

    python tests/benchmarks/evidence_methods.py [--folder DIR] [--zoo digits|texts] [--seeds N] [--write PAGE]

Makes the tables of docs/evidence.md. Trains the zoos of `evidence_zoo.py` (constant rate) and `fusion_zoo.py`, cooks a
soup for every row with `hf_soup.cook`, and measures it on test data, which nothing is chosen by. A method's scale, or
what it has in its place, is tried on validation data (``searched``) and left as its paper has it. What was measured is
kept in DIR, row by row. Then every method is run once more on the first zoo of text tasks, as a process of its own, for
time and memory; --write replaces the tables of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_zoo
import family
import fusion_zoo
import numpy as np
import torch
import transformers
import yaml
from evidence import spread, table
from fusion_zoo import CHECKPOINTS, JOINT, TASKS
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import hf_soup
from hf_soup.evaluation import ClassificationDataset
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.methods import METHODS

#: Of each kind of zoo.
SEEDS = {"digits": 5, "texts": 3}
#: What is tried on validation data, for methods of means; those of plain sums are given these by the number of models.
SCALES = {"digits": (0.5, 1.0, 1.5, 2.0, 3.0), "texts": (0.5, 1.0, 2.0)}
#: Values in the place of a scale.
SEARCHED: dict[str, dict[str, list[float]]] = {
    "wise_ft": {"alpha": [0.25, 0.5, 0.75, 1.0]},
    "sce": {"select_topk": [0.1, 0.25, 0.5, 1.0]},
}
#: Of each file at most: every row of the tables, and every value that is searched, costs a pass over them.
ROWS = {
    ("digits", "tasks"): {"validation": 450, "test": 600},
    ("texts", "fine-tunes"): {"validation": 300, "test": 400},
    ("texts", "tasks"): {"validation": 100, "test": 150},
}
#: Title → a selection in the place of a method: averages over one run, and what is learned from answers without labels.
RUNS: dict[str, dict[str, Any]] = {
    "run_average": {"name": "run_average"},
    "run_average, last 5": {"name": "run_average", "last": 5},
    "run_average, ema": {"name": "run_average", "schedule": "ema"},
}
ENTROPY = "entropy"
SELECTIONS = {**RUNS, ENTROPY: {"name": "entropy"}}
ROW_TITLES = sorted([*METHODS, *SELECTIONS])
#: Two models at most.
PAIRS = ("slerp",)
LINEAR, SINGLE, START, OWN = "linear", "best single", "start", "each its own task"
BEGIN, END = "<!-- methods -->\n", "<!-- /methods -->\n"


class Kitchen:
    """One zoo: its models, its data, prepared once, and the cook."""

    def __init__(self, kind: str, layout: str, zoo: Path, out: Path) -> None:
        self.zoo, self.out, self.kind, self.layout = zoo, out, kind, layout
        self.models = sorted(path.name for path in zoo.iterdir() if path.name[0].isdigit())
        tasks = list(TASKS[kind]) if layout == "tasks" else [""]
        wide = kind == "digits" and layout != "tasks"
        self.columns = ("validation", "test", "shifted") if wide else ("validation", "test")
        self.scorings = {column: [self._data(column, task) for task in tasks] for column in self.columns}
        recipe = self.recipe(["start"], validation=self.scorings["validation"], test=self._reports())
        wanted = [(role, each) for role in ("validation", "test") for each in getattr(recipe, role)]
        config = json.loads((zoo / "start" / "config.json").read_text())
        every = iter(prepare_datasets(wanted, folder=zoo / "start", config=config))
        self.benches: dict[str, list[ClassificationDataset]] = {
            column: [next(every) for _ in tasks] for column in self.columns
        }
        self._loader: Any = AutoModelForImageClassification if kind == "digits" else AutoModelForSequenceClassification

    def _data(self, column: str, task: str = "") -> dict[str, Any]:
        job = "image-classification" if self.kind == "digits" else "text-classification"
        found: dict[str, Any] = {"task": job, "batch_size": 64}
        if self.kind == "digits" and self.layout == "fine-tunes":
            return {**found, "dataset": str(self.zoo / "data"), "split": column.replace("validation", "validation")}
        end = "parquet" if self.kind == "digits" else "jsonl"
        name = f"{column}-{task}" if task else column
        rows = ROWS.get((self.kind, self.layout), {}).get(column)
        # What has no task, where there are several, is the rows of all.
        split = f"train[:{rows}]" if rows and (task or self.layout != "tasks") else "train"
        return {**found, "dataset": str(self.zoo / "data" / f"{name}.{end}"), "split": split}

    def _reports(self) -> list[dict[str, Any]]:
        return [each for column in self.columns[1:] for each in self.scorings[column]]

    def recipe(self, models: Sequence[str], **changes: Any) -> hf_soup.Recipe:
        """A recipe of models of the zoo."""
        return hf_soup.Recipe(
            base_model=str(self.zoo / "start"),
            ingredients=[{"model": str(self.zoo / each)} for each in models],
            **changes,
        )

    def method(self, name: str, models: Sequence[str], *, searched: bool) -> dict[str, Any]:
        """What a recipe says of a method or selection: as its paper has it, or with the values that are tried."""
        if name in SELECTIONS:
            # What learns from unlabelled rows learns nothing from rows that all models were trained on.
            learned = {"calibration": self._data("validation")} if name == ENTROPY else {}
            return {"select": SELECTIONS[name], **learned}
        said: dict[str, Any] = {"method": {"name": name}}
        if searched:
            count = len(models) if METHODS[name].sums else 1
            scales = [round(scale / count, 6) for scale in SCALES[self.kind]]
            said["method"] |= SEARCHED.get(name, {"scale": scales})
            said["validation"] = self.scorings["validation"]
        if METHODS[name].statistics:
            said["calibration"] = self._data("train")
        return said

    def cook(self, models: Sequence[str], **changes: Any) -> tuple[Path, dict[str, Any]]:
        """The folder of a soup, and its method as it was chosen."""
        folder = self.out / "soup"
        shutil.rmtree(folder, ignore_errors=True)
        hf_soup.cook(self.recipe(models, **changes), folder, threads=1)
        return folder, yaml.safe_load((folder / "soup.yaml").read_text()).get("method", "")

    def accuracies(self, folder: Path, columns: Sequence[str]) -> dict[str, list[float]]:
        """Column → the accuracy on every task."""
        model = self._loader.from_pretrained(folder)
        return {
            column: [bench.score(bench.outputs(model)).value for bench in self.benches[column]] for column in columns
        }


def mean(row: Mapping[str, Sequence[float]], column: str) -> float:
    """Over the tasks."""
    return float(np.mean(row[column]))


def measure(kitchen: Kitchen) -> dict[str, Any]:
    """Title → accuracies, and the method with its parameters; rows that are there already are not measured again."""
    kept = kitchen.zoo / "methods.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def row(title: str, models: Sequence[str], **changes: Any) -> None:
        if title in rows:
            return
        started = time.perf_counter()
        folder, method, columns = kitchen.zoo / models[0], "", kitchen.columns
        if changes:
            folder, method = kitchen.cook(models, **changes)
            columns = columns[1:]  # nothing is chosen among soups
        rows[title] = {
            **kitchen.accuracies(folder, columns),
            "method": method,
            "seconds": time.perf_counter() - started,
        }
        kept.write_text(json.dumps(rows, indent=1) + "\n")
        means = " ".join(f"{column} {mean(rows[title], column):.3f}" for column in columns)
        print(f"  {kitchen.zoo.name}, {title}: {means}, {rows[title]['seconds']:.1f} s, {method}", flush=True)

    if kitchen.layout == "run":
        paths = sorted((kitchen.zoo / "run").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
        for place, path in enumerate(paths):
            row(f"checkpoint {place}", [f"run/{path.name}"])
        for name in RUNS:
            row(name, ["run"], **kitchen.method(name, [], searched=False))
        return rows
    for name in ("start", *kitchen.models, *([JOINT] if kitchen.layout == "tasks" else [])):
        row(name, [name])
    good = [name for name in kitchen.models if "poor" not in name]
    best = sorted(good, key=lambda name: -mean(rows[name], "validation"))[:2]
    row("greedy", kitchen.models, select="greedy", validation=kitchen.scorings["validation"])
    for name in [*METHODS, ENTROPY]:
        quick = (kitchen.kind, kitchen.layout) != ("texts", "fine-tunes")
        if name == ENTROPY and not quick:
            continue  # it takes minutes a soup, and is for several tasks
        for searched in (False, True) if quick else (False,):
            if searched and (name == ENTROPY or (name not in SEARCHED and "scale" not in METHODS[name].parameters)):
                continue
            title = f"{name}, searched" if searched else name
            if name in PAIRS:
                row(f"{LINEAR}, two", best, **kitchen.method(LINEAR, best, searched=False))
                row(f"{name}, two", best, **kitchen.method(name, best, searched=False))
                continue
            row(title, good, **kitchen.method(name, good, searched=searched))
            if len(good) < len(kitchen.models) and kitchen.kind == "digits" and not searched:
                row(f"{title}, poor", kitchen.models, **kitchen.method(name, kitchen.models, searched=False))
    return rows


# ---- tables --------------------------------------------------------------------------------------------------


def against(zoos: Sequence[Mapping[str, Any]], title: str, other: str, column: str) -> str:
    """The mean difference of accuracies over the seeds, in points, with half of its 95 % t-interval."""
    return spread([100 * (mean(zoo[title], column) - mean(zoo[other], column)) for zoo in zoos], 1)


def percent(zoos: Sequence[Mapping[str, Any]], title: str, column: str) -> str:
    """The mean accuracy over the seeds."""
    return f"{100 * np.mean([mean(zoo[title], column) for zoo in zoos]):.1f}"


def chosen(zoos: Sequence[dict[str, Any]], title: str, names: Sequence[str], function: Any = max) -> None:
    """Add a row to every zoo: the one among these that is best on validation data."""
    for zoo in zoos:
        zoo[title] = zoo[function(names, key=lambda name: mean(zoo[name], "validation"))]


def soups(zoos: Sequence[dict[str, Any]]) -> list[str]:
    """Methods on fine-tunes of one task."""
    chosen(zoos, SINGLE, [name for name in zoos[0] if name[0].isdigit() and "poor" not in name])
    wide = "shifted" in zoos[0][LINEAR]
    head = ["", "test, %", "against linear"]
    head += ["searched, against linear", "shifted, against linear", "with the poor one, %"] if wide else []
    rows = []
    for title in (SINGLE, "greedy", *methods(zoos)):
        row = [shown(title), percent(zoos, title, "test")]
        row.append("" if title == LINEAR else against(zoos, title, LINEAR, "test"))
        if wide:
            tried, poor = f"{title}, searched", f"{title}, poor"
            row.append(against(zoos, tried, LINEAR, "test") if tried in zoos[0] else "")
            row.append("" if title == LINEAR else against(zoos, title, LINEAR, "shifted"))
            row.append(percent(zoos, poor, "test") if poor in zoos[0] else "")
        rows.append(row)
    pair = against(zoos, "slerp, two", f"{LINEAR}, two", "test")
    return [*table(head, rows), f"Of the two best: `slerp` against linear {pair}.", ""]


def fusion(zoos: Sequence[dict[str, Any]]) -> list[str]:
    """Methods on fine-tunes of one task each."""
    singles = [name for name in zoos[0] if name[0].isdigit()]
    chosen(zoos, SINGLE, singles)
    for zoo in zoos:
        zoo[OWN] = {
            column: [zoo[name][column][place] for place, name in enumerate(singles)]
            for column in ("validation", "test")
        }
    rows = []
    for title in (START, SINGLE, OWN, JOINT, "greedy", *methods(zoos)):
        row = [shown(title), percent(zoos, title, "test")]
        row.append(f"{100 * np.mean([min(zoo[title]['test']) for zoo in zoos]):.1f}")
        row.append("" if title == LINEAR else against(zoos, title, LINEAR, "test"))
        tried = f"{title}, searched"
        row += (
            [percent(zoos, tried, "test"), against(zoos, tried, LINEAR, "test")]
            if all(tried in zoo for zoo in zoos)
            else ["", ""]
        )
        rows.append(row)
    head = ["", "test, %", "worst task", "against linear", "searched, %", "against linear"]
    pair = against(zoos, "slerp, two", f"{LINEAR}, two", "test")
    return [*table(head, rows), f"Of the two best: `slerp` against linear {pair}.", ""]


def run(zoos: Sequence[dict[str, Any]]) -> list[str]:
    """Methods on the checkpoints of one run."""
    every = [f"checkpoint {place}" for place in range(CHECKPOINTS)]
    chosen(zoos, "best checkpoint", every)
    rows = []
    for title in (every[-1], "best checkpoint", *RUNS):
        row = [shown(title).replace(every[-1], "last checkpoint")]
        for column in [column for column in ("test", "shifted") if column in zoos[0][title]]:
            row += [percent(zoos, title, column), "" if title == every[-1] else against(zoos, title, every[-1], column)]
        rows.append(row)
    return table(["", "test, %", "against the last", "shifted, %", "against the last"][: len(rows[0])], rows)


def methods(zoos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of which every zoo has a row."""
    return [title for title in ROW_TITLES if all(title in zoo for zoo in zoos)]


def shown(title: str) -> str:
    """A row's title, with what a recipe names as code."""
    name, *parameters = title.split(", ")
    return ", ".join([f"`{name}`", *parameters]) if title in ROW_TITLES else title


def costs(kitchen: Kitchen) -> list[str]:
    """Time and memory of every method with text models, each in a process of its own, as its paper has it."""
    kept = kitchen.zoo / "costs.json"
    rows: dict[str, list[str]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in [title for title in ROW_TITLES if title not in rows]:
        models = kitchen.models[: 2 if name in PAIRS else None]
        method = kitchen.method(name, models, searched=False)
        recipe = kitchen.out / "recipe.yaml"
        paths = [{"model": str(kitchen.zoo / each)} for each in models]
        recipe.write_text(json.dumps({"base_model": str(kitchen.zoo / "start"), "ingredients": paths, **method}))
        out, home = kitchen.out / "soup", kitchen.out / "home"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
        words = [sys.executable, "-m", "hf_soup", "cook", recipe, "-o", out, "--quiet"]
        took = family.run(words, subprocess.DEVNULL, subprocess.DEVNULL, {**os.environ, "HF_HOME": str(home)})
        rows[name] = [shown(name), f"{took.wall:.1f}", f"{took.cpu:.1f}", f"{took.peak:.0f}"]
        kept.write_text(json.dumps(rows))
        print(f"  {rows[name]}", flush=True)
    about = "Whole processes: four fine-tunes and the ancestor, 91 MB each (`slerp`: two), nothing remembered."
    return [about, "", *table(["", "wall, s", "CPU, s", "peak memory, MB"], [rows[title] for title in ROW_TITLES])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench" / "evidence")
    parser.add_argument("--seeds", type=int, help=f"by default {SEEDS}")
    parser.add_argument("--zoo", choices=["digits", "texts"], action="append")
    parser.add_argument("--layout", choices=["fine-tunes", "tasks", "run"], action="append")
    parser.add_argument("--no-costs", action="store_true", help="leave out time and memory")
    parser.add_argument("--write", type=Path, help="the page whose tables of methods are replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder, lines = options.folder.resolve(), []
    titles = {"fine-tunes": "soups of one task", "tasks": "fusion of four tasks", "run": "ten checkpoints of one run"}
    for layout in options.layout or titles:
        for kind in options.zoo or ("digits", "texts"):
            zoos = []
            for seed in range(options.seeds or SEEDS[kind]):
                if layout == "fine-tunes":
                    zoo = evidence_zoo.make(kind, folder, seed, annealed=False)
                else:
                    zoo = fusion_zoo.make(kind, layout, folder, seed)
                with tempfile.TemporaryDirectory(prefix="soups-", dir=folder) as out:
                    zoos.append(measure(Kitchen(kind, layout, zoo, Path(out))))
            tables = {"fine-tunes": soups, "tasks": fusion, "run": run}[layout](zoos)
            lines += [f"### {kind}: {titles[layout]}", "", f"{len(zoos)} seeds.", "", *tables]
    if not options.no_costs:
        with tempfile.TemporaryDirectory(prefix="soups-", dir=folder) as out:
            first = fusion_zoo.make("texts", "tasks", folder, 0)
            lines += ["### Time and memory", "", *costs(Kitchen("texts", "tasks", first, Path(out)))]
    text = "\n".join(lines)
    if options.write:
        page = options.write.read_text()
        head, begin, rest = page.partition(BEGIN)
        _, end, tail = rest.partition(END)
        assert begin, f"{options.write} has no place for tables of methods"
        assert end, f"{options.write} does not say where tables of methods end"
        options.write.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
    else:
        print(text)


if __name__ == "__main__":
    main()
