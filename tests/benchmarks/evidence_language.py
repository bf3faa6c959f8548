"""Soups of language models on real texts: runs of one task, fusion of four domains, and random subsets of fine-tunes.

    python tests/benchmarks/evidence_language.py [--folder DIR] [--seeds N] [--again] [--write PAGE]

Makes the tables of docs/evidence.md on language models. Trains the zoos of `language_zoo.py`, cooks a soup for every
row with `hf_soup.cook`, which measures it by bits per byte and by questions with four choices. Zoos are kept in DIR,
and what was measured row by row, so it can be interrupted; --again measures anew. Nothing is chosen by test data.

Random subsets are the protocol of arXiv 2511.21437 in small: some of the fine-tunes, every method as published, against
the ancestor and the best single model of the subset, with p-values by Holm for as many comparisons as there are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

os.environ["HF_HUB_OFFLINE"] = "1"

import language_zoo
import numpy as np
import torch
import transformers
from evidence import BEST, GREEDY, LEARNED, spread, table
from language_zoo import DOMAINS, ENGLISH, POOR, RUNS, SCHEDULES
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

import hf_soup

#: Of each part of the page.
SEEDS = {"runs": 5, "domains": 4}
Row = dict[str, Any]
_Key = TypeVar("_Key")
LINEAR, START, OWN = "linear", "start", "each its own domain"
SCALES = (0.5, 1.0, 2.0)
#: Batches of 256 texts, the default, would be all there are.
LEARNING = {"name": "learned", "batch_size": 16, "epochs": 5}
GOOD = RUNS - 1
#: Title → which fine-tunes, and what the recipe says beside them, the base and the data.
RUN_ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("uniform soup", "all", {}),
    ("uniform without the poor one", "good", {}),
    (GREEDY, "all", {"select": "greedy"}),
    (LEARNED, "all", {"select": LEARNING}),
    ("`ties`", "good", {"method": {"name": "ties"}}),
    ("`ties`, searched", "good", {"method": {"name": "ties", "scale": [*SCALES]}}),
    ("`task_arithmetic`", "good", {"method": {"name": "task_arithmetic"}}),
    (
        "`task_arithmetic`, searched",
        "good",
        {"method": {"name": "task_arithmetic", "scale": [each / GOOD for each in SCALES]}},
    ),
]
#: Method → the scales that are tried with four fine-tunes, where any are.
FUSION: dict[str, list[float]] = {
    LINEAR: [],
    "task_arithmetic": [each / len(DOMAINS) for each in SCALES],
    "ties": [*SCALES],
    "dare_ties": [],
    "model_stock": [],
    "tsv_m": [],
    "iso_c": [],
}
#: The methods of random subsets, and how many fine-tunes those have: one subset of each size.
PROTOCOL, SIZES = (LINEAR, "task_arithmetic", "ties", "model_stock", "tsv_m", "iso_c"), (2, 4, 6)
#: What is measured → the title of its scores.
KINDS = {
    "validation": "validation {} bits_per_byte", "bits": "test {} bits_per_byte", "right": "test {} accuracy",
}  # fmt: skip
BEGIN, END = "<!-- language -->\n", "<!-- /language -->\n"


class Kitchen:
    """One zoo, the rows that were measured of it, and the cook."""

    def __init__(self, zoo: Path, out: Path, *, again: bool) -> None:
        self.zoo, self.out, self._kept = zoo, out, zoo / "measured.json"
        self.rows: dict[str, dict[str, Row]] = {}
        if self._kept.exists() and not again:
            self.rows = json.loads(self._kept.read_text())

    def soup(
        self,
        group: str,
        title: str,
        models: Sequence[Path],
        domains: Sequence[str],
        *,
        questions: bool = True,
        **changes: Any,
    ) -> None:
        """Measure a soup, if it is not there; a list in the place of a number of its method is tried first."""

        def measured() -> Row:
            found = dict(changes)
            if any(isinstance(value, list) for value in found.get("method", {}).values()):
                # Alone, as every value that was tried would be measured on test data too.
                self._cook(models, **found)
                found["method"] = hf_soup.Recipe.load(self.out / "soup" / "soup.yaml").method
            report = self._cook(models, **found, test=self.tests(domains, questions=questions)).report
            claims = {
                title: int(np.sign(each.difference)) if each.significant else 0
                for title, each in report.comparisons.items()
            }
            row = _row({title: each.value for title, each in report.scores["soup"].items()}, domains)
            return {**row, "claims": _row(claims, domains)}

        self._keep(group, title, measured)

    def alone(self, group: str, model: Path, domains: Sequence[str], *, questions: bool = True) -> None:
        """Measure a model of the zoo, if it is not there."""

        def measured() -> Row:
            tests = self.tests(domains, questions=questions)
            recipe = self._recipe([model], validation=self.validation(domains), test=tests)
            (scores,) = hf_soup.score(model, recipe).values()
            return _row({title: each["value"] for title, each in scores.items()}, domains)

        self._keep(group, model.name, measured)

    def _keep(self, group: str, title: str, measured: Callable[[], Row]) -> None:
        rows = self.rows.setdefault(group, {})
        if title in rows:
            return
        started = time.perf_counter()
        rows[title] = measured()
        self._kept.write_text(json.dumps(self.rows, indent=1) + "\n")
        means = ", ".join(f"{name} {np.mean(rows[title][name]):.3f}" for name in KINDS if name in rows[title])
        print(f"  {self.zoo.name}, {group}, {title}: {means}, {time.perf_counter() - started:.1f} s", flush=True)

    def _cook(self, models: Sequence[Path], **changes: Any) -> hf_soup.Soup:
        folder = self.out / "soup"
        shutil.rmtree(folder, ignore_errors=True)
        return hf_soup.cook(self._recipe(models, **changes), folder, threads=1)

    def _recipe(self, models: Sequence[Path], **changes: Any) -> hf_soup.Recipe:
        named = [{"model": str(model)} for model in models]
        return hf_soup.Recipe(base_model=str(self.zoo / START), ingredients=named, **changes)

    def validation(self, domains: Sequence[str]) -> list[dict[str, Any]]:
        """The part of a recipe that names the validation texts of some domains."""
        return [self._data("causal-lm", "validation", domain) for domain in domains]

    def tests(self, domains: Sequence[str], *, questions: bool = True) -> list[dict[str, Any]]:
        """That of their test texts, and of their questions."""
        tasks = ("causal-lm", "multiple-choice-lm") if questions else ("causal-lm",)
        return [self._data(task, "test", domain) for task in tasks for domain in domains]

    def _data(self, task: str, split: str, domain: str) -> dict[str, Any]:
        file = f"{split}-{domain}{'' if task == 'causal-lm' else '-choices'}.jsonl"
        return {"task": task, "name": f"{split} {domain}", "dataset": str(self.zoo / "data" / file)}


def _row(values: Mapping[str, float], domains: Sequence[str]) -> Row:
    """Title of data → value, as what is measured → a value of each domain."""
    found = {kind: [values.get(title.format(domain)) for domain in domains] for kind, title in KINDS.items()}
    return {kind: each for kind, each in found.items() if None not in each}


def measure_runs(kitchen: Kitchen) -> None:
    """Runs of one task; rows that are there already are not measured again."""
    for schedule in SCHEDULES:
        models = sorted((kitchen.zoo / schedule).iterdir())
        for model in models:
            kitchen.alone(schedule, model, ENGLISH)
        good = [model for model in models if model.name != POOR]
        for title, which, changes in RUN_ROWS:
            chosen = {"all": models, "good": good}[which]
            kitchen.soup(schedule, title, chosen, ENGLISH, validation=kitchen.validation(ENGLISH), **changes)


def measure_domains(kitchen: Kitchen, seed: int) -> None:
    """Fusion, and random subsets, likewise."""
    tuned = sorted((kitchen.zoo / "domains").iterdir())
    experts, validation = tuned[: len(DOMAINS)], kitchen.validation(DOMAINS)
    for model in (kitchen.zoo / START, *tuned):
        kitchen.alone("domains", model, DOMAINS, questions=model not in tuned[len(DOMAINS) :])
    kitchen.soup("domains", GREEDY, experts, DOMAINS, select="greedy", validation=validation)
    for name, scales in FUSION.items():
        kitchen.soup("domains", name, experts, DOMAINS, method={"name": name})
        if scales:
            method = {"name": name, "scale": scales}
            kitchen.soup("domains", f"{name}, searched", experts, DOMAINS, method=method, validation=validation)
    drawn = random.Random(f"{seed} subsets")
    for size in SIZES:
        subset = sorted(drawn.sample(tuned, size))
        for name in PROTOCOL:
            kitchen.soup(f"subset of {size}", name, subset, DOMAINS, questions=False, method={"name": name})
        alone = kitchen.rows["domains"]
        kitchen.rows[f"subset of {size}"] |= {
            START: alone[START],
            BEST: best(alone, [model.name for model in subset]),
        }


# ---- tables --------------------------------------------------------------------------------------------------


def mean(row: Row, kind: str) -> float:
    """Over the domains."""
    return float(np.mean(row[kind]))


def best(rows: Mapping[str, Row], titles: Sequence[str]) -> Row:
    """The row of least bits per byte on validation data."""
    return rows[min(titles, key=lambda title: mean(rows[title], "validation"))]


def differences(zoos: Sequence[Mapping[str, Row]], title: str, other: str, kind: str) -> list[float]:
    """Of each seed."""
    return [mean(rows[title], kind) - mean(rows[other], kind) for rows in zoos]


def against(zoos: Sequence[Mapping[str, Row]], title: str, other: str) -> list[str]:
    """Bits per byte and right answers, each with its difference to another row."""
    bits, right = (np.mean([mean(rows[title], kind) for rows in zoos]) for kind in ("bits", "right"))
    apart = ["", ""]
    if title != other:
        apart[0] = spread(differences(zoos, title, other, "bits"), 3)
        apart[1] = spread([100 * each for each in differences(zoos, title, other, "right")], 1)
    return [f"{bits:.3f}", apart[0], f"{100 * right:.1f}", apart[1]]


def runs(zoos: Sequence[dict[str, Row]]) -> list[str]:
    """Soups of runs of one task, against the best single one."""
    for rows in zoos:
        rows[BEST] = best(rows, [title for title in rows if title[0].isdigit()])
    body = []
    for title in (BEST, POOR, *(title for title, _, _ in RUN_ROWS)):
        counted = ""
        if "claims" in zoos[0][title]:
            claims = [claim for rows in zoos for claim in rows[title]["claims"]["bits"]]
            counted = " / ".join(str(claims.count(claim)) for claim in (1, 0, -1))
        bits, apart, right, right_apart = against(zoos, title, BEST)
        body.append([title.replace(POOR, "the poor one"), bits, apart, counted, right, right_apart])
    head = ["", "bits per byte", "against the best single", "won / tied / lost", "right, %", "against the best single"]
    return table(head, body)


def fusion(zoos: Sequence[dict[str, Row]]) -> list[str]:
    """Soups of one fine-tune for each domain, against the plain mean."""
    for rows in zoos:
        experts = sorted(title for title in rows if title[0].isdigit())[: len(DOMAINS)]
        rows[BEST] = best(rows, experts)
        rows[OWN] = {
            kind: [rows[title][kind][place] for place, title in enumerate(experts)] for kind in ("bits", "right")
        }
    body = []
    tried = [f"{name}, searched" for name, scales in FUSION.items() if scales]
    for title in (START, BEST, OWN, GREEDY, *FUSION, *tried):
        by_domain = [f"{np.mean([rows[title]['bits'][place] for rows in zoos]):.3f}" for place in range(len(DOMAINS))]
        name, *rest = title.split(", ")
        shown = ", ".join([f"`{name}`", *rest]) if name in FUSION else title
        body.append([shown, *against(zoos, title, LINEAR), *by_domain])
    head = ["", "bits per byte", "against linear", "right, %", "against linear", *DOMAINS]
    return table(head, body)


def corrected(samples: Mapping[_Key, Sequence[float]]) -> dict[_Key, float]:
    """Of each sample the p-value of a mean of zero, by Holm for as many comparisons as there are samples."""
    p = {key: float(ttest_1samp(sample, 0).pvalue) for key, sample in samples.items()}
    least, found = 0.0, {}
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        found[key] = least = max(least, min(1.0, (len(p) - rank) * p[key]))
    return found


def subsets(zoos: Sequence[Mapping[str, Mapping[str, Row]]]) -> list[str]:
    """Methods on random subsets, against the ancestor and the best single one."""
    groups = [f"subset of {size}" for size in SIZES]

    def apart(name: str, other: str) -> NDArray[np.float64]:
        """``(seeds, subsets, domains)``: how many bits per byte more than another row."""
        rows = [[(zoo[group][name]["bits"], zoo[group][other]["bits"]) for group in groups] for zoo in zoos]
        return np.array([[np.subtract(*pair) for pair in each] for each in rows])

    # What the subsets of a seed share makes them one observation.
    means = {(name, other): apart(name, other).mean((1, 2)) for name in PROTOCOL for other in (START, BEST)}
    of_domains = {
        (name, place): apart(name, BEST).mean(1)[:, place] for name in PROTOCOL for place in range(len(DOMAINS))
    }
    p, p_of_domains = corrected(means), corrected(of_domains)
    body, by_domain = [], []
    for name in PROTOCOL:
        row = [f"`{name}`"]
        for other in (START, BEST):
            row += [spread(means[name, other], 3), f"{p[name, other]:.3f}"]
        body.append([*row, f"{np.mean(apart(name, BEST) < 0):.0%}"])
        cells = ((name, place) for place in range(len(DOMAINS)))
        marked = [spread(of_domains[cell], 3) + (" *" if p_of_domains[cell] < 0.05 else "") for cell in cells]
        by_domain.append([f"`{name}`", *marked])
    head = ["bits per byte", "against the ancestor", "p", "against the best single", "p", "better than the best single"]
    first = f"p by Holm for {len(p)} comparisons; the last column counts subsets and domains."
    second = f"Against the best single, by domain; \\* where p < 0.05 by Holm for {len(p_of_domains)} comparisons."
    return [first, "", *table(head, body), second, "", *table(["bits per byte", *DOMAINS], by_domain)]


def report(zoos: Sequence[Mapping[str, dict[str, Row]]]) -> str:
    """Every table, in Markdown."""
    whole = [zoo for zoo in zoos if "domains" in zoo]
    tables = {
        **{f"runs of one task, {kind} rate": (zoos, runs([zoo[kind] for zoo in zoos])) for kind in SCHEDULES},
        "fusion of four domains": (whole, fusion([zoo["domains"] for zoo in whole])),
        "random subsets of eight fine-tunes": (whole, subsets(whole)),
    }
    lines = [
        [f"### language models: {title}", "", f"{len(seeds)} seeds.", "", *lines]
        for title, (seeds, lines) in tables.items()
    ]
    return "\n".join(chain.from_iterable(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench" / "evidence")
    parser.add_argument("--seeds", type=int, help=f"at most; by default {SEEDS}")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--write", type=Path, help="the page whose tables of language models are replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder, zoos = options.folder.resolve(), []
    seeds = {part: min(count, options.seeds or count) for part, count in SEEDS.items()}
    for seed in range(seeds["runs"]):
        started, whole = time.perf_counter(), seed < seeds["domains"]
        zoo = language_zoo.make(folder, seed, domains=whole)
        print(f"{zoo.name}: {time.perf_counter() - started:.0f} s until it is there", flush=True)
        with tempfile.TemporaryDirectory(prefix="soups-", dir=folder) as out:
            kitchen = Kitchen(zoo, Path(out), again=options.again)
            measure_runs(kitchen)
            if whole:
                measure_domains(kitchen, seed)
        print(f"{zoo.name}: {time.perf_counter() - started:.0f} s until it is measured", flush=True)
        zoos.append(kitchen.rows)
    text = report(zoos)
    if options.write:
        page = options.write.read_text()
        head, begin, rest = page.partition(BEGIN)
        _, end, tail = rest.partition(END)
        assert begin, f"{options.write} has no place for tables of language models"
        assert end, f"{options.write} does not say where tables of language models end"
        options.write.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
    else:
        print(text)


if __name__ == "__main__":
    main()
