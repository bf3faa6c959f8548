"""What does it cost to score language models on texts, beside their forward passes and beside lm-evaluation-harness?

    python tests/benchmarks/language.py [--runs 3] [--models 4] [--texts 10]

Byte-level Llamas of 2 million parameters, and the modules of Python's library, 4,000 bytes of each. Printed, as
minimum, median and maximum over the runs:

scored   all models scored as a cook does it (read, changed in place, run, judged), over bare forward passes of the
         same windows by models that are in memory already
command  `hf-soup score` of all models, whole process, in seconds; first and with the tokens of the texts remembered
lm_eval  `lm_eval run` once for each model, whole processes, over the second one; and the largest difference of a score

The same for a task of the harness with four choices a question, through `task: lm-eval`: there the bare forward passes
are those that the harness makes, in its batches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from huggingface_hub import constants
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_soup import Recipe
from hf_soup.checkpoint import open_all
from hf_soup.evaluation import Candidates, ModelTemplate
from hf_soup.evaluation.evaluation_data import EvaluationData
from hf_soup.evaluation.harness import harness_datasets
from hf_soup.evaluation.model import each_alone
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.lineage.alignment import AlignmentOptions
from hf_soup.lineage.report import check_lineage
from hf_soup.merging import RunContext, fetch_weights
from hf_soup.workflows.prepare import layout_of

TASK = """task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


CHOICES = """task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def make(folder: Path, models: int, texts: int) -> list[Path]:
    """Models that are kin, ``texts.jsonl`` and the harness's task."""
    files = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    lines = [json.dumps({"text": text[:4000]}) for text in files if len(text) > 4000]
    (folder / "texts.jsonl").write_text("\n".join(lines[:texts]))
    (folder / "task").mkdir()
    (folder / "task" / "texts.yaml").write_text(TASK % (folder / "texts.jsonl"))
    passages = [text[:4000] for text in files if len(text) > 4000][: 2 * texts]
    questions = [
        {"text": text[begin : begin + 200], "right": begin // 400 % 4,
         "choices": [passages[(place + way) % len(passages)][begin + 200 : begin + 250] for way in range(4)]}
        for place, text in enumerate(passages) for begin in range(0, 4000, 400)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "task" / "choices.yaml").write_text(CHOICES % (folder / "questions.jsonl"))
    config = LlamaConfig(
        vocab_size=384, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for number in range(models):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape))
        model.save_pretrained(folder / str(number))
        ByT5Tokenizer().save_pretrained(folder / str(number))
    return [folder / str(number) for number in range(models)]


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    started = time.perf_counter()
    result = act()
    return time.perf_counter() - started, result


def show(title: str, values: list[float], unit: str = "") -> None:
    """Minimum, median and maximum."""
    low, middle, high = np.min(values), np.median(values), np.max(values)
    print(f"{title:34} {low:7.3f} … {middle:7.3f} … {high:7.3f}  {unit}", flush=True)


def run(command: list[Any], home: Path) -> str:
    """What a command prints, with a home of its own."""
    environment = {**os.environ, "HF_HOME": str(home)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    """Make models and texts, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--texts", type=int, default=10)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make(folder, options.models, options.texts)
        looks = {"task": "causal-lm", "dataset": str(folder / "texts.jsonl")}
        recipe = Recipe(ingredients=[str(model) for model in models], validation=looks)
        config = json.loads((models[0] / "config.json").read_text())
        constants.HF_HOME = str(folder / "home")
        (bench,) = prepare_datasets([("validation", recipe.validation[0])], folder=models[0], config=config, quiet=True)
        checkpoints = open_all(recipe.ingredients)
        layout = layout_of(check_lineage(checkpoints, options=AlignmentOptions.of(recipe)).models, None)
        held = [LlamaForCausalLM.from_pretrained(path).eval() for path in models]
        numbers = sum(value.numel() for value in held[0].parameters())
        size = f"{len(models)} models of {numbers / 1e6:.1f} million parameters"
        print(f"{size}, {bench.steps} windows of {bench.rows} texts")

        # The same windows, in the same batches, by threads that have one core each, as they are scored.
        calls: list[Any] = []
        forward = LlamaForCausalLM.forward
        LlamaForCausalLM.forward = lambda self, input_ids: (calls.append(input_ids), forward(self, input_ids))[1]
        bench.outputs(held[0])
        LlamaForCausalLM.forward = forward

        def bare() -> None:
            for model in held:

                def forward_pass(ids: Any, model: Any = model) -> float:
                    with torch.inference_mode():  # which holds for a thread
                        return float(model(input_ids=ids).logits.sum())

                list(each_alone(forward_pass, calls, torch.get_num_threads(), "cpu"))

        def scored() -> dict[str, Any]:
            constants.HF_HOME = tempfile.mkdtemp(dir=folder)
            data = EvaluationData(ModelTemplate(config, layout.dtype, models[0]), (bench,))
            with Candidates(layout, fetch_weights(checkpoints, quiet=True), data, RunContext()) as candidates:
                return candidates.scores_alone()

        bare(), scored()
        ratios, commands, theirs, apart = [], [], [], 0.0
        for _ in range(options.runs):
            seconds, _ = timed(bare)
            ratios.append(timed(scored)[0] / seconds)
        show("scored / bare forward passes", ratios)
        mine = [sys.executable, "-m", "hf_soup", "score", *models, "--data", looks["dataset"], "--task", "causal-lm"]
        for number in range(options.runs + 1):
            home = folder / "own"
            shutil.rmtree(home / "hf-soup" / "logits", ignore_errors=True)
            seconds, said = timed(lambda home=home: run([*mine, "--json", "--quiet"], home))
            if number == 0:
                show("hf-soup score, first", [seconds], "s")
                continue
            commands.append(seconds)
            own = [scores["texts.jsonl bits_per_byte"]["value"] for scores in json.loads(said)["scores"].values()]
            total = 0.0
            for place, model in enumerate(models):
                out = folder / f"out-{number}-{place}"
                command = [
                    sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}",
                    "--tasks", "texts", "--include_path", folder / "task", "--device", "cpu", "--batch_size", "32",
                    "--output_path", out,
                ]  # fmt: skip
                seconds, _ = timed(lambda command=command: run(command, folder / "theirs"))
                total += seconds
                results = json.loads(next(out.rglob("results*.json")).read_text())["results"]["texts"]
                apart = max(apart, abs(results["bits_per_byte,none"] / own[place] - 1))
            theirs.append(total / commands[-1])
        show("hf-soup score, again", commands, "s")
        show(f"lm_eval {len(models)} times / again", theirs)
        print(f"largest difference of a score      {apart:.1e}")
        through_the_harness(folder, models, held, recipe, options.runs)


def through_the_harness(folder: Path, models: list[Path], held: list[Any], recipe: Recipe, runs: int) -> None:
    """The same, of a task of the harness."""
    looks = {"task": "lm-eval", "name": "choices", "include_path": str(folder / "task")}
    recipe = Recipe(**{**recipe.to_dict(), "validation": looks})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    config = json.loads((models[0] / "config.json").read_text())
    template = ModelTemplate(config, "float32", models[0])
    bench = harness_datasets([("validation", recipe.validation[0])], template, quiet=True)[0]
    print(f"\n{bench.rows} questions of the harness, {bench.steps} requests")
    calls: list[Any] = []
    forward = LlamaForCausalLM.forward

    def noted(self: Any, input_ids: Any, **more: Any) -> Any:
        calls.append(input_ids)
        return forward(self, input_ids, **more)

    LlamaForCausalLM.forward = noted
    bench.outputs(held[0])
    LlamaForCausalLM.forward = forward

    def bare() -> None:
        for model in held:
            for ids in calls:
                with torch.inference_mode():
                    float(model(input_ids=ids).logits.sum())

    def scored() -> list[float]:
        return [bench.score(bench.outputs(model)).value for model in held]

    bare(), scored()
    show("scored / bare forward passes", [timed(scored)[0] / timed(bare)[0] for _ in range(runs)])
    mine = [sys.executable, "-m", "hf_soup", "score", *models, "--recipe", folder / "recipe.yaml", "--json", "--quiet"]
    ratios, apart = [], 0.0
    for number in range(runs):
        home = folder / "own"
        shutil.rmtree(home / "hf-soup" / "logits", ignore_errors=True)
        seconds, said = timed(lambda home=home: run(mine, home))
        own = [scores["choices"]["value"] for scores in json.loads(said)["scores"].values()]
        total = 0.0
        for place, model in enumerate(models):
            out = folder / f"choices-{number}-{place}"
            command = [
                sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}",
                "--tasks", "choices", "--include_path", folder / "task", "--device", "cpu", "--batch_size", "32",
                "--output_path", out,
            ]  # fmt: skip
            total += timed(lambda command=command: run(command, folder / "theirs"))[0]
            results = json.loads(next(out.rglob("results*.json")).read_text())["results"]["choices"]
            apart = max(apart, abs(results["acc,none"] - own[place]))
        ratios.append(total / seconds)
    show(f"lm_eval {len(models)} times / hf-soup score", ratios)
    print(f"largest difference of a score      {apart:.1e}")


if __name__ == "__main__":
    main()
