"""Bad inputs, as data: what a user can get wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from golden import models
from golden.recipes import ABC, BASE, EXAMPLES, HUB, REPORT, ROWS, A, B, C
from golden.running import APART

WEIGHTS = "model.safetensors"
TWO = [A, B]


def _cook(**recipe: Any) -> dict[str, Any]:
    return {"recipe": {"ingredients": TWO, **recipe}}


def _text(text: str) -> dict[str, Any]:
    return {"recipe": text}


def _line(*line: str, **more: Any) -> dict[str, Any]:
    return {"line": [*line], **more}


def _changed(
    change: Callable[[Path], object], source: str = B, beside: str = A, *, cook: bool = False, **recipe: Any
) -> dict[str, Any]:
    """A copy of a good model, with something changed, beside a good one: checked, or cooked where that is to fail."""

    def make(root: Path, name: str) -> None:
        models.copied(root, source, name, change)

    if cook or recipe:
        return {"recipe": {"ingredients": [beside, "odd-{name}"], **recipe}, "make": make}
    return {"line": ["check", beside, "odd-{name}", "--json"], "make": make}


def _config(**changes: Any) -> Callable[[Path], object]:
    """Changes keys of a config; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: each for key, each in values.items() if each is not None}))

    return change


def _write(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content)


def _without(*files: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def _tensors(change: Callable[[models.Tensors], object], dtype: str = "F32") -> Callable[[Path], object]:
    """Writes the weights of the second fine-tune anew, changed."""

    def rewrite(folder: Path) -> None:
        tensors = {name: each.copy() for name, each in models.berts()["b"].items()}
        change(tensors)
        models.write_tensors(folder / WEIGHTS, tensors, dtype)

    return rewrite


def _set(value: float) -> Callable[[models.Tensors], object]:
    def change(tensors: models.Tensors) -> None:
        tensors["bert.encoder.layer.1.output.dense.weight"][3, 5] = value

    return change


def _stranger(tensors: models.Tensors) -> None:
    for name, each in tensors.items():
        tensors[name] = models.numbers(f"stranger {name}", each.shape, 0.1)


def _stranger_folder(root: Path, name: str) -> None:
    models.copied(root, B, name, _tensors(_stranger))


def _permuted(tensors: models.Tensors) -> None:
    order = np.argsort(models.numbers("order", (models.INTERMEDIATE,)))
    for layer in range(models.LAYERS):
        names = f"bert.encoder.layer.{layer}."
        for name in (f"{names}intermediate.dense.weight", f"{names}intermediate.dense.bias"):
            tensors[name] = tensors[name][order]
        tensors[f"{names}output.dense.weight"] = tensors[f"{names}output.dense.weight"][:, order]


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes a header of safetensors and leaves the data."""

    def rewrite(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        models.write_raw(folder / WEIGHTS, header, content[end:])

    return rewrite


def _shift(by: int) -> Callable[[dict[str, Any]], object]:
    """Moves one tensor's place in the file."""

    def change(header: dict[str, Any]) -> None:
        place = header["classifier.weight"]["data_offsets"]
        place[:] = [place[0] + by, place[1] + by]

    return change


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _soup(change: Callable[[Path], object], *line: str) -> dict[str, Any]:
    """Something changed in a soup of two folders; it is verified unless a line says otherwise."""

    def make(root: Path, name: str) -> None:
        models.copied(root, "fault-soup", name, change)

    maps = [f"--map={name}={name}" for name in TWO]
    return {"line": [*(line or ("verify", "odd-{name}", "--json", "--quiet", *maps))], "make": make, "needs": "soup"}


def _byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def _repo(name: str, files: dict[str, bytes], **options: Any) -> Callable[[Path, str], None]:
    """A repo on the Hub with these files."""

    def make(_: Path, __: str) -> None:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=os.environ["HF_ENDPOINT"], token="hf_acme")
        api.create_repo(name, **options)
        for file, content in files.items():
            api.upload_file(repo_id=name, path_in_repo=file, path_or_fileobj=content)

    return make


def _file(name: str, text: str) -> Callable[[Path, str], object]:
    return lambda root, _: (root / name).write_text(text)


def _rows(file: str, text: str, **recipe: Any) -> dict[str, Any]:
    """A soup that is scored on these rows."""
    return _cook(validation={**ROWS, "dataset": file}, **recipe) | {"make": _file(file, text)}


def _run_with_a_hole(root: Path, name: str) -> None:
    models.copied(root, "sweep/run-1", name, lambda folder: _cut(folder / "checkpoint-4"))


def _run_half_written(root: Path, name: str) -> None:
    models.copied(root, "sweep/run-1", name, lambda folder: _cut(folder / "checkpoint-10"))


def _no_card(root: Path, name: str) -> None:
    for which in "ab":
        models.copied(root, f"bert-{which}", f"{name}-{which}", _without("README.md"))


PARITY = "text,label\n" + "".join(
    f"{word} {thing},{(number + place) % 2}\n"
    for number, word in enumerate([*models.GOOD, *models.BAD])
    for place, thing in enumerate(models.THINGS)
)

#: Name → `recipe` that is cooked (a mapping, or text), or `line` (arguments); `make` first changes something, with the
#: root and the name ``odd-NAME`` that is this case's own; `env` changes the environment; `needs` a soup.
FAULTS: dict[str, dict[str, Any]] = {
    # Recipes.
    "unknown key": _cook(metod="linear"),
    "unknown key of an ingredient": {"recipe": {"ingredients": [A, {"model": B, "wieght": 2}]}},
    "an old key": _cook(score=ROWS),
    "unknown key of a score": _cook(validation={**ROWS, "slpit": "train"}),
    "ingredients are a text": {"recipe": {"ingredients": "bert-a"}},
    "no ingredients": {"recipe": {"method": "linear"}},
    "an empty list of ingredients": {"recipe": {"ingredients": []}},
    "one ingredient": {"recipe": {"ingredients": [A]}},
    "an ingredient without a model": {"recipe": {"ingredients": [A, {"weight": 2}]}},
    "a weight in words": {"recipe": {"ingredients": [A, {"model": B, "weight": "two"}]}},
    "weights of zero": {"recipe": {"ingredients": [{"model": A, "weight": 0}, {"model": B, "weight": 0}]}},
    "a negative weight": {"recipe": {"ingredients": [A, {"model": B, "weight": -0.5}]}},
    "an infinite weight": {"recipe": {"ingredients": [A, {"model": B, "weight": float("inf")}]}},
    "an empty file": _text(""),
    "a list": _text("- bert-a\n- bert-b\n"),
    "no yaml": _text("ingredients: [bert-a, bert-b\nmethod: linear\n"),
    "a key twice": _text("ingredients: [bert-a, bert-b]\ningredients: [bert-c]\n"),
    "an alias": _text("ingredients: &a [bert-a, bert-b]\nlabels: *a\n"),
    "a tag": _text("ingredients: !!python/name:os.system [bert-a]\n"),
    "a tabulator": _text("ingredients:\n\t- bert-a\n"),
    "too large a file": _text("# " + "x" * 5_000_000),
    "many faults at once": {"recipe": {"ingredients": [{"model": 1, "weight": "x"}], "seed": -1, "dtype": "int8"}},
    "no such recipe": _line("cook", "missing.yaml", "-o", "bad-{name}", "--json"),
    "unknown method": _cook(method="tise"),
    "two methods": _cook(method=["linear", "ties"]),
    "a method without a name": _cook(method={"density": 0.3}),
    "unknown parameter": _cook(method={"name": "linear", "density": 0.3}),
    "a parameter out of range": _cook(base_model=BASE, method={"name": "ties", "density": 1.5}),
    "a parameter of another type": _cook(base_model=BASE, method={"name": "ties", "density": "much"}),
    "a parameter that is none of the words": _cook(base_model=BASE, method={"name": "ties", "scope": "layer"}),
    "parameters that do not fit together": _cook(
        base_model=BASE, method={"name": "breadcrumbs", "density": 0.95, "gamma": 0.1}
    ),
    "no probabilities": _cook(base_model=BASE, method={"name": "della", "density": 0.95, "epsilon": 0.5}),
    "a method without base": {
        "recipe": {"ingredients": ["odd-{name}-a", "odd-{name}-b"], "method": "ties"}, "make": _no_card
    },
    "three for slerp": {"recipe": {"ingredients": ABC, "method": "slerp"}},
    "numbers to choose without data": _cook(base_model=BASE, method={"name": "wise_ft", "alpha": [0, 1]}),
    "an empty list of numbers": _cook(base_model=BASE, method={"name": "wise_ft", "alpha": []}, validation=ROWS),
    "depth of a whole number": _cook(base_model=BASE, method={"name": "karcher", "max_iter": {"depth": [1, 5]}}),
    "depth with nothing": _cook(base_model=BASE, method={"name": "wise_ft", "alpha": {"depth": []}}),
    "an override that matches nothing": _cook(overrides=[{"tensors": "*.attn.*", "method": "linear"}]),
    "an override without a method": _cook(overrides=[{"tensors": "*"}]),
    "layers of another length": _cook(tensor_weights={"*": [1, 2, 3]}),
    "layers that match nothing": _cook(tensor_weights={"lm_head.*": [1, 2]}),
    "layers with another method": _cook(base_model=BASE, method="ties", tensor_weights={"*": [1, 2]}),
    "layers with a selection": _cook(select="greedy", validation=ROWS, tensor_weights={"*": [1, 2]}),
    "unknown selection": _cook(select="gredy", validation=ROWS),
    "a selection without data": _cook(select="greedy"),
    "a selection with another word": _cook(select={"name": "greedy", "accept": "~"}, validation=ROWS),
    "top_k of none": _cook(select={"name": "top_k", "k": 0}, validation=ROWS),
    "learned with another method": _cook(base_model=BASE, method="ties", select="learned", validation=ROWS),
    "repeats without a choice": _cook(stability_repeats=5),
    "repeats without end": _cook(select="greedy", validation=ROWS, stability_repeats=5000),
    "another dtype": _cook(dtype="int8"),
    "a negative seed": _cook(seed=-1),
    "a label twice": _cook(labels=["negative", "Negative"]),
    "labels of others": _cook(labels=["ham", "spam"]),
    "too few labels": _cook(labels=["negative"]),
    "a head of nobody": _cook(heads="bert-z"),
    "heads of the body and a report": _cook(heads="body", test=REPORT),
    "another vocabulary": _cook(vocabulary="all"),
    "allow an unknown code": _cook(allow=["much"]),
    "allow what is no judgement": _cook(allow=["vocabulary"]),
    "allow_pickle in words": _cook(allow_pickle="maybe"),
    "examples with a metric": _cook(method="fisher", calibration={**EXAMPLES, "metric": "accuracy"}),
    "a method without examples": _cook(method="fisher"),
    "examples for nothing": _cook(calibration=EXAMPLES),
    "examples that are a report": _cook(method="fisher", calibration={**ROWS, "dataset": "report.csv"}, test=REPORT),
    "a run of plain models": {"recipe": {"ingredients": [A], "select": "run_average"}},
    "one checkpoint": {"recipe": {"ingredients": ["sweep/run-1"], "select": {"name": "run_average", "last": 1}}},
    "a run with a broken checkpoint": {
        "recipe": {"ingredients": ["odd-{name}"], "select": "run_average"}, "make": _run_with_a_hole
    },
    "a run that is half-written": {
        "recipe": {"ingredients": ["odd-{name}"], "select": "run_average"}, "make": _run_half_written
    },
    "more checkpoints than there are": {
        "recipe": {"ingredients": ["sweep/run-1"], "select": {"name": "run_average", "last": 50}}
    },
    "batch norm in a run": {"recipe": {"ingredients": ["resnet-run"], "select": "run_average"}},
    # Models.
    "no such folder": _line("check", A, "nowhere", "--json"),
    "no such path": _line("check", A, "./no/where/at/all", "--json"),
    "a path with a tilde": _line("check", A, "~/bert-b", "--json", env={"HOME": "/nowhere"}),
    "no such repo": _line("check", "acme/bert-a", "acme/nothing", "acme/none", "--json"),
    "no such revision": _line("check", "acme/bert-a@v9", "acme/bert-b", "--json"),
    "no name of a repo": _line("check", A, "acme/a--b", "--json"),
    "no such base": _line("check", A, B, "--base", "acme/gone", "--json"),
    "a private repo": _line(
        "check", "acme/bert-a", "acme/hidden", "--json", make=_repo("acme/hidden", {}, private=True),
        env={"HF_TOKEN": "hf_other"},
    ),
    "a gated repo": _line("check", "acme/bert-a", "acme/gated", "--json", env={"HF_TOKEN": "hf_other"}),
    "a token of nobody": _line("check", "acme/bert-a", "acme/bert-c-sharded", "--json", env={"HF_TOKEN": "hf_nobody"}),
    "a repo without weights": _line(
        "check", "acme/bert-a", "acme/bare", "--json", make=_repo("acme/bare", {"config.json": b"{}"})
    ),
    "a folder without weights": _changed(_without(WEIGHTS)),
    "a folder without config": _changed(_without("config.json")),
    "a broken config": _changed(_write("config.json", '{"model_type": "bert",')),
    "a config that is a list": _changed(_write("config.json", "[]")),
    "a config that is too large": _changed(
        _write("config.json", json.dumps({"model_type": "bert", "x": "y" * 9_000_000}))
    ),
    "an unknown model type": _changed(_config(model_type="brtt")),
    "a quantised model": _changed(_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})),
    "code of its own": _changed(_config(auto_map={"AutoModel": "modeling.Model"}, model_type="mine")),
    "no header": _changed(lambda folder: (folder / WEIGHTS).write_bytes(b"no weights")),
    "a header that is no json": _changed(
        lambda folder: (folder / WEIGHTS).write_bytes((16).to_bytes(8, "little") + b"{broken: header}")
    ),
    "a truncated file": _changed(_cut),
    "a hole": _changed(_header(_shift(4))),
    "an overlap": _changed(_header(_shift(-4))),
    "a type that nobody knows": _changed(_header(lambda header: header["classifier.bias"].update(dtype="F12"))),
    "a shard that is missing": _changed(_without("model-00002-of-00003.safetensors"), "bert-b-sharded"),
    "an index that is no json": _changed(_write("model.safetensors.index.json", "{"), "bert-b-sharded"),
    "a pickle": _line("check", A, "bert-b-pickled", "--json"),
    "a pickle that is none": _changed(_write("pytorch_model.bin", "x"), "bert-b-pickled", allow_pickle=True),
    "an adapter": _changed(
        lambda folder: [
            _write("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "acme/bert-base"}')(folder),
            (folder / WEIGHTS).rename(folder / "adapter_model.safetensors"),
        ]
    ),
    "not a number": _changed(_tensors(_set(float("nan"))), cook=True),
    "infinity": _changed(_tensors(_set(float("inf"))), cook=True),
    "too large for its type": _changed(
        _tensors(_set(3e5)), dtype="float16", allow=["tensors-unrelated", "tensors-drifted"]
    ),
    "another architecture": _line("check", A, "vit-a", "--json"),
    "another head": _changed(_config(architectures=["BertForMaskedLM"])),
    "another shape": _changed(
        _tensors(lambda each: each.update({"classifier.weight": each["classifier.weight"][:, :8]}))
    ),
    "another size": _changed(_config(hidden_size=32)),
    "another activation": _changed(_config(hidden_act="relu")),
    "a tensor that is missing": _changed(_tensors(lambda each: each.pop("bert.pooler.dense.bias"))),
    "a tensor too many": _changed(_tensors(lambda each: each.update(extra=np.ones(3, np.float32)))),
    "other labels": _line("check", A, "bert-b-spam", "--json"),
    "more labels": _changed(
        _config(id2label={0: "bad", 1: "good", 2: "neither"}, label2id={"bad": 0, "good": 1, "neither": 2})
    ),
    "another tokenizer": _changed(
        lambda folder: [
            (folder / name).write_text(text)
            for name, text in models.tokenizer([*models.SPECIAL, *models.VOCABULARY[:4:-1]]).items()
        ]
    ),
    "a tokenizer that is broken": _changed(_write("tokenizer.json", "{")),
    "added tokens": _line("check", A, "bert-b-tokens", "--json"),
    "another processor": _changed(
        _write("preprocessor_config.json", models.PROCESSOR["preprocessor_config.json"].replace("0.5", "0.25")),
        "vit-b", "vit-a",
    ),
    # Not kin.
    "a stranger": _changed(_tensors(_stranger)),
    "a stranger that is cooked": _changed(_tensors(_stranger), cook=True),
    "permuted neurons": _changed(_tensors(_permuted)),
    "not from the base": _line("check", A, B, "--base", "odd-{name}", "--json", make=_stranger_folder),
    "a base of another size": _line("check", A, B, "--base", "vit-base", "--json"),
    "drifted": _line("check", A, "bert-drifted", "--json"),
    "a card that is wrong": _changed(_write("README.md", "---\nbase_model: acme/vit-base\n---\n")),
    "a card that cannot be read": _changed(_write("README.md", "---\n[\n---\n")),
    "a refused check writes what it proposes": _line(
        "check", *ABC, "odd-{name}", "-o", "bad-{name}.yaml", make=_stranger_folder
    ),
    # Data.
    "no such data": _cook(validation={**ROWS, "dataset": "none.csv"}),
    "no such data on the Hub": _cook(validation={**ROWS, "dataset": "acme/none"}),
    "no such split": _cook(validation={**ROWS, "dataset": "acme/moods", "split": "vaildation"}),
    "a split that is no split": _cook(validation={**ROWS, "split": "train[:3"}),
    "no such label column": _cook(validation={**ROWS, "label_column": "truth"}),
    "no such text column": _rows("odd.csv", "words,label\ngood,1\n"),
    "unknown metric": _cook(validation={**ROWS, "metric": "beauty"}),
    "a metric that is no function": _cook(validation={**ROWS, "metric": "nothing.here:metric"}),
    "unknown task": _cook(validation={**ROWS, "task": "guessing"}),
    "labels that do not fit": _rows("labels.csv", "text,label\ngood film,joy\nbad film,anger\n"),
    "labels out of range": _rows("range.csv", "text,label\ngood film,7\nbad film,0\n"),
    "no rows": _rows("empty.csv", "text,label\n"),
    "an empty text": _rows("blank.csv", "text,label\n,1\ngood,1\n"),
    "the same rows twice": _cook(select="greedy", validation=ROWS, test=[{**ROWS, "name": "test"}]),
    "two reports of one name": _cook(test=[REPORT[0], REPORT[0]]),
    "models that know nothing": _rows("parity.csv", PARITY, select="greedy"),
    "pictures for words": _cook(validation={"task": "image-classification", "dataset": "colours-test"}),
    "data that was local": _cook(validation={**ROWS, "dataset": "local:rows.csv"}),
    "a batch of none": _cook(validation={**ROWS, "batch_size": 0}),
    "an unknown device": _cook(validation=ROWS) | {"cook": ["--device", "tpu9"]},
    # The output.
    "an output that exists": _line("cook", *TWO, "-o", "colours-test", "--json"),
    "an output that is a file": _line("cook", *TWO, "-o", "rows.csv", "--json"),
    "an output in a file": _line("cook", *TWO, "-o", "rows.csv/soup", "--json"),
    "a planned output that exists": _line("cook", *TWO, "-o", "colours-test", "--dry-run", "--json"),
    "a recipe that exists": _line("check", *TWO, "-o", "rows.csv", "--json"),
    "a recipe in no folder": _line("check", *TWO, "-o", "no/such/recipe.yaml", "--json"),
    "stream what must be here": _cook(base_model=BASE, method="ties") | {"cook": ["--stream"]},
    "stream what is scored": {"recipe": {"ingredients": HUB, "validation": ROWS, "select": "greedy"},
        "cook": ["--stream"]},
    # Pushes.
    "push to no name": _line("push", "fault-soup", "soup", "--json", needs="soup"),
    "push to a wrong name": _line("push", "fault-soup", "acme/so up", "--json", needs="soup"),
    "push without a token": _line("push", "fault-soup", "acme/new", "--json", needs="soup", env={"HF_TOKEN": ""}),
    "push with a token of nobody": _line(
        "push", "fault-soup", "acme/new", "--json", needs="soup", env={"HF_TOKEN": "hf_nobody"}
    ),
    "push to others": _line("push", "fault-soup", "other/new", "--json", needs="soup"),
    "push what is no soup": _line("push", A, "acme/new", "--json"),
    "push nothing": _line("push", "nowhere", "acme/new", "--json"),
    "push to another model": _line("push", "fault-soup", "acme/vit-a", "--json", needs="soup"),
    "push beside other files": _line(
        "push", "fault-soup", "acme/occupied", "--json", needs="soup", make=_repo("acme/occupied", {"merges.txt": b"x"})
    ),
    "push a wrong tag": _line("push", "fault-soup", "acme/new", "--tag", "v 1", "--json", needs="soup"),
    "push an empty licence": _line("push", "fault-soup", "acme/new", "--license", " ", "--json", needs="soup"),
    "offer to nobody": _line("push", "fault-soup", "acme/new", "--pr", "--json", needs="soup"),
    "push edited weights": _soup(_byte, "push", "odd-{name}", "acme/new", "--json"),
    "push without a card": _soup(_without("README.md"), "push", "odd-{name}", "acme/new", "--json"),
    "push a broken card": _soup(_write("README.md", "---\n[\n---\n"), "push", "odd-{name}", "acme/new", "--json"),
    "cook and push to others": _line("cook", *TWO, "-o", "bad-{name}", "--push", "other/new", "--json"),
    # Verifying.
    "a changed byte": _soup(_byte),
    "a changed config": _soup(_config(hidden_act="relu")),
    "a changed recipe": _soup(lambda folder: (folder / "soup.yaml").write_text(
        (folder / "soup.yaml").read_text().replace("ingredients:", "seed: 1\ndtype: bfloat16\ningredients:"))),
    "no recipe": _soup(_without("soup.yaml")),
    "a recipe that is none": _soup(_write("soup.yaml", "ingredients: 3\n")),
    "code beside the soup": _soup(_write("modeling.py", "print()\n")),
    "verify what is no soup": _line("verify", A, "--json"),
    "verify nothing": _line("verify", "acme/nothing", "--json"),
    "verify without the folders": _line("verify", "fault-soup", "--json", "--quiet", needs="soup"),
    "verify with other folders": _line("verify", "fault-soup", "--json", "--quiet", "--map=bert-a=bert-a",
                                       "--map=bert-b=bert-c", needs="soup"),
    "verify with no map": _line("verify", "fault-soup", "--map", "bert-a", needs="soup"),
    # The command line.
    "unknown command": _line("stir"),
    "no such option": _line("check", A, B, "--colour"),
    "no output": _line("cook", A, B),
    "an old command": _line("forage", "acme/bert-base"),
    "weights that are no numbers": _line("cook", A, B, "-o", "bad-{name}", "--weights", "1,much"),
    "too few weights": _line("cook", A, B, "-o", "bad-{name}", "--weights", "1"),
    "a task without data": _line("cook", A, B, "-o", "bad-{name}", "--task", "text-classification"),
    "an unknown dtype on the command line": _line("cook", A, B, "-o", "bad-{name}", "--dtype", "int8"),
    "no model": _line("check"),
    "no repo": _line("push", "fault-soup"),
    "set nothing": _line("cook", A, B, "-o", "bad-{name}", "--set", "scale"),
    "set no yaml": _line("cook", A, B, "-o", "bad-{name}", "--set", "scale=[1"),
    "set an unknown parameter": _line("cook", A, B, "-o", "bad-{name}", "--set", "scale=2", "--json"),
    "set out of range": _line("cook", A, B, "-o", "bad-{name}", "--base", BASE, "--method", "ties", "--set",
                              "density=7", "--json"),
    "an unknown method on the command line": _line("cook", A, B, "-o", "bad-{name}", "--method", "mean", "--json"),
    "allow unknown codes": _line("check", A, B, "--allow", "drifted", "--allow", "much", "--json"),
    "data without a task": _line("cook", A, B, "-o", "bad-{name}", "--data", "rows.csv"),
    "add to a recipe": _line("cook", "odd.yaml", "--add", C, "-o", "bad-{name}"),
    "add by another method": _line(
        "cook", "fault-soup", "--add", C, "-o", "bad-{name}", "--method", "ties", needs="soup"
    ),
    "add to what is no soup": _line("cook", A, "--add", C, "-o", "bad-{name}", "--json"),
    "a barrier without data": _line("check", A, B, "--barrier"),
    "search from nothing": _line("search", "acme/nothing", "--json"),
    "search from a folder": _line("search", A, "--json"),
    "search none": _line("search", "acme/bert-base", "--limit", "0"),
    "search what has no group": _line("search", "acme/bert-d", "-o", "bad-{name}.yaml"),
    "explain nothing": _line("methods", "tise", "--json"),
    "score without data": _line("score", A, "--recipe", "plain.yaml", "--json",
                                make=_file("plain.yaml", "ingredients: [bert-a, bert-b]\n")),
    "score without a recipe": _line("score", A),
    "score with a recipe and data": _line("score", A, "--recipe", "rows.yaml", "--data", "rows.csv"),
    "score data without a task": _line("score", A, "--data", "rows.csv"),
    "score by a missing recipe": _line("score", A, "--recipe", "missing.yaml", "--json"),
    "a port too large": _line("hub", "--port", "99999"),
    "no network": _line(
        "check", *HUB[:2], "--json", env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "no-home"}, python=APART
    ),
    "an endpoint that is none": _line("check", *HUB[:2], "--json", env={"HF_ENDPOINT": "http://[::1"}, python=APART),
}  # fmt: skip
