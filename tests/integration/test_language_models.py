"""Soups of language models, chosen and measured on texts: from the command line to the card, and verified."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hf_soup import Recipe, RecipeError, Soup, connectivity, cook

Cli = Callable[..., Any]

PAGES = [" ".join(text.split()) for text in topics.topics.values()]


pytestmark = pytest.mark.usefixtures("cli")  # in a folder of its own


@pytest.fixture(scope="session")
def language_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``base``, ``one``, ``two``, ``poor`` (byte-level Llamas, and their tokenizer), and texts in two files."""
    folder = tmp_path_factory.mktemp("language")
    for name, pages in (("validation", PAGES[:30]), ("test", PAGES[30:60])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": page[:200]}) for page in pages))
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    rows = torch.tensor(tokenizer(PAGES[60:], padding="max_length", max_length=128, truncation=True).input_ids)

    def train(model: LlamaForCausalLM, steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (8,))]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(base, 30, 1e-2)
    for name, steps, rate in (("base", 0, 0.0), ("one", 40, 3e-3), ("two", 40, 3e-3), ("poor", 10, 2e-2)):
        model = LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        train(model, steps, rate)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_greedy_on_texts(cli: Cli, language_family: Path, tmp_path: Path) -> None:
    """Less is better: in the choice, the comparison, the table and the card. Numbers are those of the harness."""
    models = [language_family / name for name in ("poor", "one", "two")]
    data = ["--task", "causal-lm"]
    for key in ("data", "test"):
        name = "validation" if key == "data" else "test"
        data += [f"--{key}", language_family / f"{name}.jsonl"]
    done = cli(
        "cook", *models, "--base", language_family / "base", "-o", "soup", "--select", "greedy", *data, "--quiet"
    )
    assert done.code == 0, done.err
    soup = Soup.open(tmp_path / "soup")
    report, title = soup.report, "test.jsonl bits_per_byte"
    values = {name: by_title[title].value for name, by_title in report.scores.items()}
    assert set(values) == {"soup", "local:poor", "local:one", "local:two"}
    lm = HFLM(pretrained=soup.load().eval(), tokenizer=ByT5Tokenizer(), backend="causal", device="cpu")
    texts = [json.loads(line)["text"] for line in (language_family / "test.jsonl").read_text().splitlines()]
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    nats = -sum(lm.loglikelihood_rolling(asked, disable_tqdm=True))
    bits = nats / sum(len(text.encode()) for text in texts) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    assert values["soup"] == pytest.approx(bits, rel=1e-6)
    validation = {name: by_title["validation.jsonl bits_per_byte"].value for name, by_title in report.scores.items()}
    best = min(("local:poor", "local:one", "local:two"), key=lambda name: validation[name])
    assert report.best == {"validation.jsonl bits_per_byte": best, title: best}
    assert report.trace[0].ingredients == (best,)
    assert report.trace[0].score == -validation[best]
    assert validation["soup"] <= validation[best]
    assert report.comparisons[title].difference == pytest.approx(values[best] - values["soup"])
    assert f"{title}, less is better" in done.out
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "test.jsonl bits\\_per\\_byte (n = 30, less is better)" in card
    assert f"| **this soup** | {report.scores['soup']['validation.jsonl bits_per_byte'].text} |" in card
    assert Recipe.load(tmp_path / "soup" / "soup.yaml").validation[0].metric == "bits_per_byte"


def test_a_number_is_tried_on_texts_and_scores_are_the_same_again(
    cli: Cli, language_family: Path, tmp_path: Path
) -> None:
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl"), "metric": "perplexity"}
    recipe = Recipe(
        ingredients=[str(language_family / name) for name in ("one", "two")],
        base_model=str(language_family / "base"), method={"name": "wise_ft", "alpha": [0.0, 0.5, 1.0]},
        validation=looks, stability_repeats=2,
    )  # fmt: skip
    report = cook(recipe, "soup").report
    values = {point.parameters["alpha"]: point.scores["validation.jsonl perplexity"].value for point in report.curve}
    assert report.parameters["alpha"] == min(values, key=lambda alpha: values[alpha])
    assert "points" not in report.stability.sentence
    again = cli(
        "score",
        tmp_path / "soup",
        "--data",
        looks["dataset"],
        "--task",
        "causal-lm",
        "--metric",
        "perplexity",
        "--json",
    )
    (scores,) = again.json["scores"].values()
    assert scores["validation.jsonl perplexity"]["value"] == report.scores["soup"]["validation.jsonl perplexity"].value


def test_texts_questions_and_a_function_together(language_family: Path, tmp_path: Path) -> None:
    """One model in memory answers all; what counts is the weighted mean, of bits the negative."""
    pages = [(page.split(". ")[0][:60], other[:20]) for page, other in zip(PAGES[:20], PAGES[20:40], strict=True)]
    lines = [
        json.dumps({"question": page[:30], "choices": [page[30:50] or "it", other], "answer": "A"})
        for page, other in pages
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "own_of_languages.py").write_text("def score(model, tokenizer):\n    return [0.25, 0.75]\n")
    recipe = Recipe(
        ingredients=[str(language_family / name) for name in ("one", "two")],
        base_model=str(language_family / "base"),
        select="greedy",
        validation=[
            {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")},
            {"task": "multiple-choice-lm", "dataset": "questions.jsonl", "weight": 2},
            {"function": "own_of_languages:score"},
        ],
    )
    report = cook(recipe, "soup").report
    first = report.trace[0]
    scores = report.scores[first.ingredients[0]]
    values = [scores[title].value for title in report.validation]
    assert first.score == pytest.approx((-values[0] + 2 * values[1] + values[2]) / 4)
    assert values[2] == 0.5
    assert report.scores["soup"]["questions.jsonl accuracy"].share
    assert "### Calibration" not in Path("soup/README.md").read_text()
    sys.modules.pop("own_of_languages")


def test_what_needs_classes_says_so(language_family: Path) -> None:
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")}
    recipe = Recipe(ingredients=[str(language_family / name) for name in ("one", "two")], validation=looks)
    with pytest.raises(RecipeError, match="Barriers are measured in points of a metric of classes"):
        connectivity(recipe)
    with pytest.raises(RecipeError, match="learns from the loss of labelled rows"):
        cook(Recipe(**{**recipe.to_dict(), "select": "learned"}), "soup")
    with pytest.raises(RecipeError, match=r"calibration\.task: Input should be"):
        Recipe(ingredients=["acme/a"], calibration=looks)
    wrong = Recipe(**{**recipe.to_dict(), "validation": {**looks, "task": "text-classification"}})
    with pytest.raises(Exception, match="label"):
        cook(wrong, "soup")
