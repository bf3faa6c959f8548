"""Recipes, as data; paths are in the folder that `models.make_all` fills, ids on the Hub of `models.publish`."""

from __future__ import annotations

from typing import Any

from golden.names import PUBLIC_NAMES
from golden.running import ACCELERATE, TOGETHER

A, B, C, D = "bert-a", "bert-b", "bert-c", "bert-d"
ABC, BASE = [A, B, C], "bert-base"
VITS, VIT_BASE = ["vit-a", "vit-b", "vit-c"], "vit-base"
HUB, HUB_BASE = ["acme/bert-a", "acme/bert-b", "acme/bert-c"], "acme/bert-base"
ROWS = {"task": "text-classification", "dataset": "rows.csv"}
REPORT = [{"task": "text-classification", "dataset": "report.csv", "name": "test"}]
EXAMPLES = {"task": "text-classification", "dataset": "examples.csv"}
COLOURS = {"task": "image-classification", "dataset": "colours-validation"}
COLOURS_REPORT = [{"task": "image-classification", "dataset": "colours-test", "name": "test"}]
COLOURS_EXAMPLES = {"task": "image-classification", "dataset": "colours-train", "batch_size": 9}
MOODS = {"task": "text-classification", "dataset": "acme/moods", "split": "validation"}
MOODS_REPORT = [{"task": "text-classification", "dataset": "acme/moods", "split": "test"}]


def _of(method: Any, ingredients: list[Any] = ABC, base: str | None = BASE, **more: Any) -> dict[str, Any]:
    """A recipe of the fine-tunes of a base by a method."""
    based = {"base_model": base} if base else {}
    return {"recipe": {**based, "ingredients": ingredients, "method": method, **more}}


def _run(parameters: dict[str, Any], *runs: str, **more: Any) -> dict[str, Any]:
    """A recipe of the checkpoints of one run, or several."""
    select = {"name": "run_average", **parameters}
    return {"recipe": {"ingredients": list(runs or ["sweep/run-1"]), "select": select, **more}}


#: What a program does, and an error that it may catch.
PROGRAM = (
    f"""
import json
import sys
import hf_soup
light = "torch" not in sys.modules
now = {PUBLIC_NAMES}
for name in hf_soup.__all__:
    setattr(hf_soup, now.get(name, name), getattr(hf_soup, name))
"""
    + """
found = {"names": sorted(now.get(name, name) for name in hf_soup.__all__), "light": light}
base, validation = ("base_model", "validation") if "validation" in hf_soup.Recipe.model_fields else ("base", "score")
recipe = hf_soup.Recipe(
    **{base: "bert-base"}, ingredients=["bert-a", {"model": "bert-b", "weight": 2}],
    method={"name": "wise_ft", "alpha": 0.9},
)
found["check"] = hf_soup.check(recipe).to_dict()
soup = hf_soup.cook(recipe, "from-python-soup")
told = json.loads((soup.folder / "soup.json").read_text())
found["cook"] = [soup.digest, soup.weights, soup.recipe.to_yaml(), sorted(told)]
same = {"bert-a": "bert-a", "bert-b": "bert-b", "bert-base": "bert-base"}
found["verify"] = hf_soup.verify("from-python-soup", map=same).to_dict()
found["search"] = hf_soup.search("acme/llama-base").to_dict()
data = hf_soup.Scoring(task="text-classification", dataset="rows.csv")
found["score"] = hf_soup.score(["bert-a"], hf_soup.Recipe(ingredients=["bert-a"], **{validation: [data]}))
for wrong in ({"ingredients": []}, {"ingredients": ["bert-a", "vit-a"]}, {"ingredients": ["bert-a", "nowhere"]}):
    try:
        hf_soup.cook(hf_soup.Recipe(**wrong), "from-python-wrong")
    except hf_soup.SoupError as error:
        found[str(wrong)] = [type(error).__name__, [each.__name__ for each in type(error).__mro__], error.message,
                             error.hint, str(error)]
print(json.dumps(found, default=str))
"""
)

#: Name → what is cooked: `recipe` (a file) or `models` (on the command line), with
#: `cook`: more arguments; `check`, `verify`: False leaves these out; `then`: further commands; `soups`: what they make;
#: `python`: how Python runs it elsewhere; `code`: programs; `files`: written before; `map`: for who verifies.
RECIPES: dict[str, dict[str, Any]] = {
    # Every method.
    "linear": {"recipe": {"ingredients": ABC}},
    "linear by weights": {"recipe": {"ingredients": [{"model": A, "weight": 2}, {"model": B, "weight": 0.5}, C]}},
    "linear without normalizing": _of(
        {"name": "linear", "normalize": False}, [{"model": A, "weight": 1.5}, {"model": B, "weight": -0.5}]
    ),
    "task_arithmetic": _of({"name": "task_arithmetic", "scale": 0.4}),
    "wise_ft": _of({"name": "wise_ft", "alpha": 0.7}),
    "ties": _of({"name": "ties", "density": 0.3}),
    "ties by tensor": _of({"name": "ties", "density": 0.5, "scope": "tensor", "scale": 0.8}),
    "dare_linear": _of({"name": "dare_linear", "density": 0.6, "scale": 0.5}, seed=3),
    "dare_ties": _of({"name": "dare_ties", "density": 0.6}, seed=3),
    "della": _of({"name": "della", "density": 0.6, "epsilon": 0.2}, seed=4),
    "breadcrumbs": _of({"name": "breadcrumbs", "density": 0.8, "gamma": 0.05}),
    "sce": _of({"name": "sce", "select_topk": 0.5}),
    "slerp": _of({"name": "slerp", "t": 0.3}, ["vit-a", "vit-b"], VIT_BASE),
    "multislerp": _of("multislerp", VITS, VIT_BASE),
    "karcher": _of("karcher", VITS, VIT_BASE),
    "model_stock": _of("model_stock"),
    "tsv_m": _of("tsv_m"),
    "iso_c": _of({"name": "iso_c", "scale": 0.9}),
    "knots": _of({"name": "knots", "density": 0.5}),
    "fisher": _of({"name": "fisher", "examples": 8}, calibration=EXAMPLES),
    "regmean": _of({"name": "regmean", "examples": 12, "offdiagonal": 0.8}, calibration=EXAMPLES),
    "adamerging": {"recipe": {"ingredients": ABC, "base_model": BASE, "calibration": EXAMPLES,
                              "select": {"name": "entropy", "examples": 16, "steps": 10}}},
    # Runs.
    "swa": _run({"last": 3}),
    "lawa": _run({"last": 2, "stride": 2}),
    "ema": _run({"schedule": "ema", "decay": 0.5}),
    "ema of two runs": _run({"schedule": "ema"}, "sweep/run-1", "sweep/run-2"),
    "weights as of annealing": _run({"schedule": "minus_sqrt"}),
    "a run of any method": {"models": ["sweep/run-1"], "map": ["run-1=sweep/run-1"]},
    "a sweep": {"models": ["sweep"], "map": ["run-1=sweep/run-1", "run-2=sweep/run-2"]},
    "a number of swa chosen": _run({"last": [2, 3, 5]}, "sweep/run-2", validation=ROWS),
    # Every selection.
    "uniform": {"recipe": {"ingredients": ABC, "select": "uniform", "validation": ROWS, "test": REPORT}},
    "greedy": {"recipe": {"ingredients": [D, A, B], "select": "greedy", "validation": ROWS, "test": REPORT}},
    "greedy that must gain": {
        "recipe": {"ingredients": [*ABC, D], "select": {"name": "greedy", "accept": ">"}, "validation": ROWS}
    },
    "pruned": {"recipe": {"ingredients": [D, A, B], "select": "pruned", "validation": ROWS}},
    "top_k": {"recipe": {"ingredients": [D, *ABC], "select": {"name": "top_k", "k": 2}, "validation": ROWS}},
    "best": {"recipe": {"ingredients": [D, *ABC], "select": "best", "validation": ROWS}},
    "learned": {"recipe": {"ingredients": [D, A, B], "select": "learned", "validation": ROWS}},
    "learned by layer": {
        "recipe": {"ingredients": [D, A, B], "select": {"name": "learned", "by": "tensor"}, "validation": ROWS,
                   "seed": 5}
    },
    "repeats": {"recipe": {"ingredients": [D, A, B], "select": "greedy", "stability_repeats": 5, "validation": ROWS}},
    "pictures": {
        "recipe": {"ingredients": VITS, "base_model": VIT_BASE, "select": "greedy", "validation": COLOURS,
                   "test": COLOURS_REPORT}
    },
    "two data sets and another metric": {
        "recipe": {"ingredients": ABC, "select": "greedy",
                   "validation": [{**ROWS, "weight": 2, "labels": ["negative", "positive"]},
                             {**ROWS, "dataset": "report.csv", "metric": "f1"}]}
    },
    # Numbers that are chosen or change, tensors in another way.
    "a number chosen": _of({"name": "wise_ft", "alpha": [0, 0.5, 1, 1.5]}, validation=ROWS, test=REPORT),
    "two numbers chosen": _of({"name": "ties", "density": [0.2, 0.6], "scale": [0.5, 1]}, validation=ROWS),
    "depth": _of({"name": "wise_ft", "alpha": {"depth": [0.2, 1]}}),
    "overrides": _of(
        "ties",
        overrides=[{"tensors": "*embeddings*", "method": "linear"},
                   {"tensors": "*LayerNorm*", "method": {"name": "wise_ft", "alpha": {"depth": [0, 0.5]}}},
                   {"tensors": "*.layer.1.*", "method": "dare_linear"}],
    ),
    "layers": {"recipe": {"ingredients": ABC, "tensor_weights": {"classifier.*": [0, 1, 1], "*.layer.0.*": [2, 1, 1]}}},
    # Heads, labels, vocabularies, names, types, files.
    "heads of the body": {"recipe": {"ingredients": [A, "bert-b-spam"], "base_model": BASE, "heads": "body"}},
    "heads of one": {"recipe": {"ingredients": [A, "bert-b-spam"], "base_model": BASE, "heads": A, "test": REPORT}},
    "labels in another order": {"recipe": {"ingredients": [A, "bert-b-turned", C], "base_model": BASE}},
    "labels as the recipe says": {
        "recipe": {"ingredients": [A, "bert-b-nameless", C], "labels": ["positive", "negative"]}
    },
    "vocabulary union": {"recipe": {"ingredients": [A, "bert-b-tokens", "bert-c-tokens"], "vocabulary": "union"}},
    "vocabulary base": {
        "recipe": {"ingredients": [A, "bert-b-tokens", "bert-c-tokens"], "base_model": BASE, "vocabulary": "base",
                   "method": "task_arithmetic"}
    },
    "tied and untied": {"recipe": {"ingredients": ["llama-a", "llama-tied", "llama-b"]}},
    "language models": _of("ties", ["llama-a", "llama-b"], "llama-base"),
    "names without prefix": _of("wise_ft", [A, "bert-b-without-prefix"]),
    "mixed dtypes": {"recipe": {"ingredients": [A, "bert-b-bfloat16", "bert-c-float16"]}},
    "dtypes within a model": {"recipe": {"ingredients": ["bert-a-in-two-types", "bert-b-float64"]}},
    "16 bits": _of("task_arithmetic", ["bert-a-bfloat16", "bert-b-bfloat16"]),
    "written as bfloat16": {"recipe": {"ingredients": ABC, "dtype": "bfloat16"}},
    "sharded": {"recipe": {"ingredients": [A, "bert-b-sharded", "bert-c-sharded"], "base_model": BASE}},
    "pickles": {
        "recipe": {"ingredients": [A, "bert-b-pickled"], "allow_pickle": True}, "verify_with": ["--allow-pickle"]
    },
    "a finding that is allowed": {
        "recipe": {"ingredients": [A, "bert-drifted"], "base_model": BASE, "allow": ["drifted", "tensors-drifted"]}
    },
    "a copy": {"models": [A, B, "bert-a-copy", A]},
    # Batch normalisation.
    "batch norm that is averaged": {"recipe": {"ingredients": ["resnet-a", "resnet-b", "resnet-c"]}},
    "batch norm": {
        "recipe": {"ingredients": ["resnet-a", "resnet-b"], "calibration": COLOURS_EXAMPLES, "test": COLOURS_REPORT}
    },
    "batch norm of a run": _run({}, "resnet-run", calibration=COLOURS_EXAMPLES, seed=2),
    # Options of the command line.
    "options": {
        "models": ABC,
        "cook": ["--base", BASE, "--method", "ties", "--set", "density=0.4", "--set", "scale=[0.5, 1]", "--select",
                 "greedy", "--data", "rows.csv", "--task", "text-classification", "--metric", "f1", "--allow",
                 "tensors-drifted"],
        "map": ["bert-a=bert-a", "bert-b=bert-b", "bert-c=bert-c", "bert-base=bert-base"],
    },
    "words for people": {
        "models": ABC,
        "then": [["check", *ABC], ["check", *ABC, "-o", "written.yaml"], ["cook", "written.yaml", "-o", "written"],
                 ["verify", "written", "--map=bert-a=bert-a", "--map=bert-b=bert-b", "--map=bert-c=bert-c"],
                 ["cook", "written.yaml", "-o", "planned", "--dry-run"], ["score", A, "written", "--recipe",
                 "greedy-for-people.yaml"], ["cook", "greedy-for-people.yaml", "-o", "chosen"],
                 ["cook", "greedy-for-people.yaml", "-o", "planned", "--dry-run", "--json"],
                 ["score", A, "written", "--recipe", "greedy-for-people.yaml", "--json"],
                 ["check", "--recipe", "greedy-for-people.yaml", "--barrier"],
                 ["check", "--recipe", "greedy-for-people.yaml", "--barrier", "--json", "--quiet"],
                 ["methods"], ["methods", "ties"], ["methods", "--json"], ["--version"]],
        "files": {"greedy-for-people.yaml": {"ingredients": ABC, "select": "greedy", "validation": ROWS,
                                             "test": REPORT}},
        "soups": ["written", "chosen"],
    },
    "two processes": {"recipe": {"ingredients": ABC}, "python": TOGETHER},
    "two processes that choose": {
        "recipe": {"ingredients": [D, A, B], "select": "greedy", "validation": ROWS, "test": REPORT},
        "python": ACCELERATE
    },
    "from Python": {"models": ABC, "code": {"program": PROGRAM}, "soups": ["from-python-soup"]},
    # The Hub.
    "from the Hub": {
        "recipe": {"ingredients": HUB, "select": "greedy", "validation": MOODS, "test": MOODS_REPORT},
        "verify_with": ["--score"],
        "then": [["cook", "{name}/soup.yaml", "-o", "{name}-again", "--json", "--quiet"]],
    },
    "streamed": {
        **_of("task_arithmetic", ["acme/bert-a", "acme/bert-b-sharded"], HUB_BASE),
        "cook": ["--stream"],
    },
    "pushed": {
        "recipe": {"ingredients": HUB[:2], "test": MOODS_REPORT},
        "cook": ["--push", "acme/{name}"],
        "then": [["push", "{name}", "acme/{name}", "--tag", "v1"], ["verify", "acme/{name}", "--json", "--quiet"],
                 ["verify", "acme/{name}@v1", "--score"],
                 ["push", "{name}", "acme/{name}", "--json"], ["push", "{name}", "acme/{name}-copy", "--private"],
                 ["cook", "acme/{name}", "--add", "acme/bert-c", "-o", "{name}-more", "--json", "--quiet"],
                 ["push", "{name}-more", "acme/{name}", "--pr", "--json"],
                 ["verify", "acme/{name}@refs/pr/1", "--json", "--quiet"],
                 ["cook", "acme/{name}", "--add", "acme/bert-d", "-o", "{name}-worse", "--quiet", "--data",
                  "acme/moods:validation", "--task", "text-classification"]],
        "soups": ["pushed-more", "pushed-worse"],
    },
    "a soup of soups": {
        "recipe": {"ingredients": HUB[:2]},
        "cook": ["--push", "acme/{name}"],
        "then": [["check", "acme/{name}", "acme/bert-c", "--json"],
                 ["cook", "acme/{name}", "acme/bert-c", "-o", "{name}-second", "--json", "--quiet"],
                 ["cook", "{name}", "acme/bert-c", "acme/bert-a", "-o", "{name}-of-a-folder", "--json", "--quiet"],
                 ["verify", "{name}-second", "--json", "--quiet"]],
        "soups": ["a-soup-of-soups-second", "a-soup-of-soups-of-a-folder"],
    },
    "a soup of a soup of folders": {
        "recipe": {"ingredients": [A, B], "method": "ties", "base_model": BASE},
        "then": [["cook", "{name}", C, "-o", "{name}-second", "--json", "--quiet"]],
        "soups": ["a-soup-of-a-soup-of-folders-second"],
    },
    # Downloads are counted, so these are models whose files no other case asks for on the Hub.
    "searched": {
        "models": HUB,
        "verify": False,
        "then": [["search", "acme/resnet-base", "--json"], ["search", "acme/vit-base", "-o", "searched.yaml"],
                 ["search", "acme/vit-base", "--task", "image-classification", "--limit", "2"],
                 ["cook", "searched.yaml", "-o", "searched-soup", "--json", "--quiet"]],
        "soups": ["searched-soup"],
    },
}  # fmt: skip
