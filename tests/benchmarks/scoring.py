"""What does scoring cost beyond the forward passes that it makes?

    python tests/benchmarks/scoring.py [--runs 5] [--models 8] [--rows 600] [--only image|text]

A vision transformer of 1.2 million parameters on handwritten digits, and a text encoder of 30 million on pieces of
Python's library. Printed, as minimum, median and maximum over the runs, of the time that passed and then of the time
of all cores:

scored        all models scored as a cook does it (read, built or changed in place, run, judged), over bare forward
              passes of the same batches by models that are in memory already
greedy        a greedy selection over all of them, over as many bare forward passes
pipeline      one model by transformers' pipeline, at batch 64 and 1, over one bare forward pass
preprocessing seconds, the first time and again
cook          seconds of a whole greedy cook, the first time and again with everything remembered
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is loaded: threads of OpenMP that spin while they wait make small models slow on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from huggingface_hub import constants
from transformers.utils import logging

import hf_soup
from hf_soup import Recipe, Scoring
from hf_soup.checkpoint import open_all
from hf_soup.evaluation.candidates import Candidates
from hf_soup.evaluation.evaluation_data import EvaluationData
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.evaluation.template import ModelTemplate
from hf_soup.lineage.alignment import AlignmentOptions
from hf_soup.lineage.report import check_lineage
from hf_soup.merging import RunContext
from hf_soup.merging.weight_files import fetch_weights
from hf_soup.recipe import Mixture
from hf_soup.selection import SELECTIONS
from hf_soup.workflows.prepare import layout_of

PACKAGES = ("asyncio", "encodings", "html", "pydoc_data")


def images(folder: Path, rows: int) -> dict[str, Any]:
    """Digits as a folder of images, and the scoring of them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in range(rows):
        place = folder / "digits" / str(digits.target[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] / 16 * 255).astype(np.uint8)).save(place / f"{number}.png")
    return {"task": "image-classification", "dataset": str(folder / "digits")}


def image_model(folder: Path) -> Any:
    """A vision transformer of 1.2 million parameters, with its image processor."""
    transformers.ViTImageProcessorPil(
        do_resize=False, image_mean=[0.3] * 3, image_std=[0.35] * 3, size={"height": 8, "width": 8}
    ).save_pretrained(folder)
    labels = [str(number) for number in range(10)]
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, hidden_size=160, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=640, id2label=dict(enumerate(labels)), label2id={name: int(name) for name in labels},
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _snippets() -> list[tuple[str, str]]:
    """Three lines of a package, and which one it is from."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for package in PACKAGES:
        lines = [line for file in sorted((library / package).rglob("*.py")) for line in file.read_text().splitlines()]
        lines = [" ".join(line.split()) for line in lines if len(line.split()) > 2]
        found += [(" ".join(lines[at : at + 3]), package) for at in range(0, min(len(lines), 3000), 3)]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def texts(folder: Path, rows: int) -> dict[str, Any]:
    """Pieces of Python's library as JSON lines, and the scoring of them."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in _snippets()[:rows]]
    (folder / "snippets.jsonl").write_text("\n".join(lines) + "\n")
    return {"task": "text-classification", "dataset": str(folder / "snippets.jsonl")}


def text_model(folder: Path) -> Any:
    """An encoder of 30 million parameters, of the shape of MiniLM's, with a vocabulary of 30,000."""
    words = Counter(word for text, _ in _snippets() for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += [word for word, _ in words.most_common() if len(word) > 1]
    vocabulary += [f"[unused{number}]" for number in range(30000 - len(vocabulary))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary[:30000]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 128}')
    config = transformers.BertConfig(
        vocab_size=30000, hidden_size=384, num_hidden_layers=10, num_attention_heads=12, intermediate_size=1536,
        id2label=dict(enumerate(PACKAGES)), label2id={name: number for number, name in enumerate(PACKAGES)},
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def siblings(make: Callable[[Path], Any], folder: Path, count: int, scoring: dict[str, Any]) -> list[Path]:
    """Folders of models that are kin: one whose head was fitted to the data, with noise."""
    torch.manual_seed(0)
    base = make(folder / "0")
    base.save_pretrained(folder / "0")
    bench = prepare_datasets(
        [("validation", Scoring(**scoring))],
        folder=folder / "0",
        config=json.loads((folder / "0/config.json").read_text()),
    )[0]
    seen: list[Any] = []
    hook = base.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    order = []
    with torch.inference_mode():
        for rows in bench.inputs.batches(np.arange(bench.n), 32):
            base.eval()(**bench.inputs.batch(rows))
            order += rows.tolist()
    hook.remove()
    features = torch.cat(seen).clone()
    wanted = torch.nn.functional.one_hot(torch.from_numpy(bench.references[order])).float()
    middle = features.mean(0)
    found = torch.linalg.lstsq(features - middle, wanted - wanted.mean(0), driver="gelsd").solution
    with torch.no_grad():
        base.classifier.weight.copy_(found.T)
        base.classifier.bias.copy_(wanted.mean(0) - middle @ found)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    for number in range(count):
        if number:
            shutil.copytree(folder / "0", folder / str(number))
        with torch.no_grad():
            for name, value in base.named_parameters():
                value.copy_(start[name] + 1e-5 * torch.randn(value.shape))
        base.save_pretrained(folder / str(number))
        (folder / str(number) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return [folder / str(number) for number in range(count)]


def timed(act: Callable[[], Any]) -> tuple[np.ndarray[Any, Any], Any]:
    """Seconds that passed and seconds of all cores, which other work on the machine changes less, and the result."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = act()
    return np.array([time.perf_counter(), time.process_time()]) - started, result


def show(title: str, values: list[Any], unit: str) -> None:
    """Minimum, median and maximum, of the time that passed and of the cores' time."""
    low, middle, high = (act(np.array(values), axis=0) for act in (np.min, np.median, np.max))
    figures = "   ".join(f"{low[i]:7.3f} … {middle[i]:7.3f} … {high[i]:7.3f}" for i in range(2))
    print(f"{title:30} {figures}  {unit}", flush=True)


def inputs_of(pipe_task: str, scoring: dict[str, Any]) -> list[Any]:
    from PIL import Image

    if pipe_task == "image-classification":
        return [Image.open(path).copy() for path in sorted(Path(scoring["dataset"]).rglob("*.png"))]
    return [json.loads(line)["text"] for line in Path(scoring["dataset"]).read_text().splitlines()]


def measure(folder: Path, make: Callable[[Path], Any], scoring: dict[str, Any], options: argparse.Namespace) -> None:
    """All figures of one kind of model."""
    models = siblings(make, folder / "models", options.models, scoring)
    recipe = Recipe(ingredients=[str(model) for model in models], validation=scoring, select="greedy")
    (wanted,) = recipe.validation
    checkpoints = open_all(recipe.ingredients)
    aligned = check_lineage(checkpoints, options=AlignmentOptions.of(recipe)).models
    layout, paths = layout_of(aligned, None), fetch_weights(checkpoints, quiet=True)
    config = json.loads((models[0] / "config.json").read_text())

    def fresh_home() -> None:
        constants.HF_HOME = tempfile.mkdtemp(dir=folder)

    def preprocess() -> Any:
        return prepare_datasets([("validation", wanted)], folder=models[0], config=config)[0]

    fresh_home()
    preprocess()  # what the libraries import is no preprocessing
    first, again = [], []
    for _ in range(options.runs):
        fresh_home()
        first.append(timed(preprocess)[0])
        again.append(timed(preprocess)[0])
    bench = preprocess()
    held = [getattr(transformers, config["architectures"][0]).from_pretrained(path).eval() for path in models]
    numbers = sum(value.numel() for value in held[0].parameters())
    print(f"\n{type(held[0]).__name__}, {numbers / 1e6:.1f} million parameters, {bench.n} rows, {len(models)} models")

    by_size = np.argsort(-bench.inputs.sizes, kind="stable")

    def bare(count: int = len(models)) -> None:
        with torch.inference_mode():
            for model in held[:count]:
                for rows in bench.inputs.batches(by_size, bench.scoring.batch_size):
                    model(**bench.inputs.batch(rows)).logits.float().numpy()

    data = EvaluationData(ModelTemplate(config, layout.dtype, models[0]), (bench,))

    def candidates() -> Candidates:
        fresh_home()
        return Candidates(layout, paths, data, RunContext())

    def scored() -> None:
        with candidates() as asked:
            asked.scores_alone()

    def greedy() -> int:
        with candidates() as asked:

            def score(soup: Mapping[str, float]) -> float:
                return asked.score(Mixture(soup)) if len(soup) > 1 else asked.score_alone(next(iter(soup)))

            found = SELECTIONS["greedy"].function(dict.fromkeys(aligned.names, 1.0), score)
            return len(models) + len(found.trace) - 1

    pipe_inputs = inputs_of(scoring["task"], scoring)

    def pipeline(batch_size: int) -> None:
        pipe = transformers.pipeline(scoring["task"], model=str(models[0]), batch_size=batch_size)
        assert len(pipe(pipe_inputs)) == bench.n

    bare(), scored(), greedy()
    figures: dict[str, list[Any]] = {"bare": [], "scored": [], "greedy": [], "pipe 64": [], "pipe 1": []}
    for number in range(options.runs):
        forward, _ = timed(bare)
        figures["bare"].append(forward)
        figures["scored"].append(timed(scored)[0] / forward)
        before, _ = timed(bare)
        seconds, passes = timed(greedy)
        after, _ = timed(bare)
        figures["greedy"].append(seconds / ((before + after) / 2 * passes / len(models)))
        if number == 0:
            for size in (64, 1):
                figures[f"pipe {size}"].append(timed(lambda size=size: pipeline(size))[0] / (forward / len(models)))
    show("bare forward passes", figures["bare"], f"s for {len(models)} models")
    show("scored / bare", figures["scored"], "")
    show(f"greedy / bare ({passes} models)", figures["greedy"], "")
    show("pipeline at 64 / bare", figures["pipe 64"], "")
    show("pipeline at 1 / bare", figures["pipe 1"], "")
    show("preprocessing, first", first, "s")
    show("preprocessing, again", again, "s")
    fresh_home()
    for title in ("first", "again"):
        seconds, _ = timed(lambda title=title: hf_soup.cook(recipe, folder / f"soup-{title}"))
        show(f"greedy cook, {title}", [seconds], "s")


def main() -> None:
    """Make models and data, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--only", choices=("image", "text"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(f"{torch.get_num_threads()} threads of torch")
    for kind, make, data in (("image", image_model, images), ("text", text_model, texts)):
        if options.only in (None, kind):
            with tempfile.TemporaryDirectory() as name:
                measure(Path(name), make, data(Path(name), options.rows), options)


if __name__ == "__main__":
    main()
