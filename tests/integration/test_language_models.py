"""Soups of language models, chosen and measured on texts: from the command line to the card, and verified."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, constants
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import ByT5Tokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from hf_soup import Recipe, RecipeError, ScoringError, Soup, connectivity, cook
from hf_soup.local_hub import LocalHub

Cli = Callable[..., Any]

PAGES = [" ".join(text.split()) for text in topics.topics.values()]


pytestmark = pytest.mark.usefixtures("cli")  # in a folder of its own


def test_greedy_on_texts(cli: Cli, language_family: Path, tmp_path: Path) -> None:
    """Less is better: in the choice, the table and the card. Numbers are those of the harness."""
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
    (title, comparison), scores = *report.comparisons.items(), report.scores
    less = scores[comparison.against][title].value - scores["soup"][title].value
    assert comparison.difference == pytest.approx(less), "what is better is positive, though less is better"
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


@pytest.mark.parametrize("by", ["ingredient", "tensor"])
def test_weights_are_learned_on_texts(cli: Cli, language_family: Path, tmp_path: Path, by: str) -> None:
    """The loss on the texts that are kept apart falls; the soup is better than the mean."""
    models = [language_family / name for name in ("poor", "one", "two")]
    data = ("--task", "causal-lm", "--data", language_family / "validation.jsonl")
    options = (
        "--base",
        language_family / "base",
        "--select",
        "learned",
        "--set",
        f"by={by}",
        "--set",
        "epochs=10",
        "--set",
        "lr=0.5",
    )
    done = cli("cook", *models, "-o", "soup", *options, *data, "--quiet", "--json")
    assert done.code == 0, done.err
    report, title = Soup.open(tmp_path / "soup").report, "validation.jsonl bits_per_byte"
    losses = [entry.inner_loss for entry in report.history]
    assert min(losses) == losses[-1] < losses[0] - 0.02
    assert {entry.scale for entry in report.history} == {1.0}
    mean = cook(
        Recipe(
            ingredients=[str(model) for model in models], base_model=str(language_family / "base"),
            validation={"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")},
        ),
        "mean",
    ).report  # fmt: skip
    assert report.scores["soup"][title].value < mean.scores["soup"][title].value
    values = {name: by_title[title].value for name, by_title in report.scores.items()}
    best = min(value for name, value in values.items() if name != "soup")
    assert values["soup"] < best if by == "tensor" else values["soup"] <= best


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


def test_the_function_of_the_docs_on_language_models(cli: Cli, language_family: Path, tmp_path: Path) -> None:
    """Whatever transformers loads, by one's own loop: the log-likelihood of each text, by token."""
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text()
    code = page[page.index("## A function of your own") :].partition("```python\n")[2].partition("```")[0]
    Path("eval_of_docs.py").write_text(code)
    texts = [page[:150] for page in PAGES[:24]]
    Path("texts.txt").write_text("\n\n".join(texts))
    folders = {name: language_family / name for name in ("one", "two", "poor")}
    arguments = ("--base", language_family / "base", "--select", "greedy", "--validation", "eval_of_docs:score")
    done = cli("cook", *folders.values(), "-o", "soup", *arguments, "--quiet", "--json")
    sys.modules.pop("eval_of_docs", None)
    assert done.code == 0, done.err
    scores = {name: by_title["eval_of_docs:score"] for name, by_title in done.json["scores"].items()}
    assert [scores[name]["n"] for name in scores] == [24] * 4
    tokens = [ByT5Tokenizer()(text, return_tensors="pt").input_ids for text in texts]
    for name, folder in (("soup", tmp_path / "soup"), ("local:one", folders["one"]), ("local:poor", folders["poor"])):
        model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            values = [-float(model(each, labels=each).loss) for each in tokens]
        assert scores[name]["value"] == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert scores["soup"]["value"] >= max(score["value"] for score in scores.values())
    (first,) = [line for line in (tmp_path / "soup" / "README.md").read_text().splitlines() if "this soup" in line]
    assert f"{scores['soup']['value']:.4g}" in first


@pytest.mark.parametrize("task", ["causal-lm", "lm-eval"])
def test_models_with_another_head_are_refused_before_they_are_fetched(
    publish: Callable[..., str], task: str, language_family: Path
) -> None:
    named = {"name": "nothing"} if task == "lm-eval" else {"dataset": str(language_family / "test.jsonl")}
    recipe = Recipe(
        ingredients=[publish(name) for name in "ab"], base_model=publish("base"), validation={"task": task, **named}
    )
    with pytest.raises(
        ScoringError, match="The models are BertForSequenceClassification, and `task: causal-lm` is for"
    ):
        cook(recipe, "soup")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))


def test_what_needs_classes_says_so(language_family: Path) -> None:
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")}
    recipe = Recipe(ingredients=[str(language_family / name) for name in ("one", "two")], validation=looks)
    with pytest.raises(RecipeError, match=r"Barriers are measured in points, which 'validation.jsonl bits_per_byte'"):
        connectivity(recipe)
    with pytest.raises(RecipeError, match=r"calibration\.task: Input should be"):
        Recipe(ingredients=["acme/a"], calibration={**looks, "task": "multiple-choice-lm"})
    with pytest.raises(RecipeError, match="'metric' is for `validation` and `test`"):
        Recipe(ingredients=["acme/a"], calibration={**looks, "metric": "nll"})
    classes = {"task": "text-classification", "dataset": looks["dataset"]}
    with pytest.raises(ScoringError, match="The models are LlamaForCausalLM"):
        cook(Recipe(**{**recipe.to_dict(), "method": "fisher", "calibration": classes}), "soup")
    wrong = Recipe(**{**recipe.to_dict(), "validation": {**looks, "task": "text-classification"}})
    with pytest.raises(ScoringError, match="The models are LlamaForCausalLM"):
        cook(wrong, "soup")
    other = {"task": "text-classification", "dataset": str(language_family / "test.jsonl")}
    both = Recipe(**{**recipe.to_dict(), "test": other})
    with pytest.raises(ScoringError, match="causal-lm and text-classification are tasks of different ones"):
        cook(both, "soup")


def test_the_recipe_of_checkpoints_on_the_hub(
    online: LocalHub, cli: Cli, language_family: Path, tmp_path: Path
) -> None:
    """recipes/pythia.yaml as it is, from revisions of a stand-in's repo, by the lines of the README."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "recipes", "recipes")
    page = (root / "README.md").read_text()
    lines = page[page.index("pip install 'hf-soup[lm]'") :].partition("```")[0].splitlines()
    asked = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hf-soup")]
    assert [each[0] for each in asked] == ["check", "cook", "cook", "cook", "score"]
    api, store = HfApi(), online.store
    repo = store.create("dataset", "Salesforce/wikitext", private=False, author="Salesforce")
    splits = [{"split": split, "path": f"wikitext-2-raw-v1/{split}-*"} for split in ("validation", "test")]
    card = yaml.safe_dump({"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": splits}]})
    changes = [store.put("README.md", f"---\n{card}---\n".encode())]
    for split, pages in (("validation", PAGES[:20]), ("test", PAGES[20:40])):
        Dataset.from_dict({"text": ["", *(page[:200] for page in pages)]}).to_parquet(tmp_path / "rows.parquet")
        name = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        changes.append(store.put(name, (tmp_path / "rows.parquet").read_bytes()))
    store.commit(repo, "main", changes, ("Upload", "", "Salesforce"), None)
    models = store.create("model", "EleutherAI/pythia-70m", private=False, author="EleutherAI")
    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=1, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = torch.tensor(ByT5Tokenizer()(PAGES[60:], padding="max_length", max_length=96, truncation=True).input_ids)
    for step in range(143):
        batch = rows[torch.randint(len(rows), (4,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (135, 137, 139, 141, 143):
            model.save_pretrained(tmp_path / "model")
            ByT5Tokenizer().save_pretrained(tmp_path / "model")
            files = [store.put(path.name, path.read_bytes()) for path in sorted((tmp_path / "model").iterdir())]
            store.commit(models, "main", files, (f"Step {step + 1}000", "", "EleutherAI"), None)
            api.create_branch("EleutherAI/pythia-70m", branch=f"step{step + 1}000")
    checked = cli(*asked[0], "--json")
    assert checked.json["verdict"] in ("proven", "likely"), checked.out
    done = cli(*asked[1], "--quiet", "--json")
    assert done.code == 0, done.err
    title = "Salesforce/wikitext wikitext-2-raw-v1 test bits_per_byte"
    assert done.json["scores"]["soup"][title]["n"] == 21
    assert len(done.json["scores"]) == 6
    assert cli("verify", "lm-soup", "--score", "--quiet").code == 0
    for name, folder in (("a", "one"), ("b", "two"), ("c", "poor")):
        shutil.copytree(language_family / folder, Path("runs") / name)
    shutil.copy(language_family / "test.jsonl", "texts.jsonl")
    shutil.copy(language_family / "test.jsonl", "chats.jsonl")
    for each in asked[2:4]:
        done = cli(*("other" if part == "lm-soup" else part for part in each), "--dry-run")
        assert done.code == 0, done.err


@pytest.mark.parametrize("asked", [{"select": "entropy"}, {"method": "fisher"}, {"method": "regmean"}], ids=str)
def test_what_looks_at_examples_looks_at_texts(
    cli: Cli, language_family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: dict[str, Any]
) -> None:
    """At texts without a score, of which those that test the soup are dropped; it can be made again."""
    name, texts = next(iter(asked.values())), language_family / "validation.jsonl"
    few = {"steps": 20, "lr": 0.03, "examples": 12} if "select" in asked else {"examples": 12}
    tested = tmp_path / "test.jsonl"
    tested.write_text("".join(texts.read_text().splitlines(keepends=True)[:3]))
    recipe = Recipe(
        ingredients=[str(language_family / each) for each in ("one", "two")],
        base_model=str(language_family / "base"),
        **{key: {"name": name, **few} for key in asked},
        calibration={"task": "causal-lm", "dataset": str(texts)},
        test={"task": "causal-lm", "dataset": str(tested)},
    )
    soup = cook(recipe, "soup")
    mean = cook(Recipe(ingredients=recipe.ingredients), "mean")
    assert soup.report.digest != mean.report.digest
    if "select" in asked:
        (note,) = soup.report.notes
        first, last = map(float, re.findall(r"was ([\d.]+) where they began, and is ([\d.]+)\.", note)[0])
        assert last < first
    assert "validation.jsonl: 3 of 30 rows equal a test row in content and were dropped" in caplog.text
    files = [
        option
        for path in (texts, tested, *(language_family / each for each in ("one", "two", "base")))
        for option in ("--map", f"{path.name}={path}")
    ]
    assert cli("verify", "soup", "--quiet", *files).code == 0


def test_conversations_as_examples(language_family: Path, tmp_path: Path) -> None:
    """Through the donor's chat template; where that cannot, it is said."""
    roles = ("user", "assistant")
    chats = [[page[:20], page[20:40]] for page in PAGES[:12]]
    lines = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, chat, strict=True)]} for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    models = [shutil.copytree(language_family / name, tmp_path / name) for name in ("one", "two")]
    recipe = Recipe(
        ingredients=[str(model) for model in models], method="regmean",
        calibration={"task": "causal-lm", "dataset": str(tmp_path / "chats.jsonl")},
    )  # fmt: skip
    with pytest.raises(ScoringError, match=r"Cannot read rows 0 to 11 of chats.jsonl: .* has no chat template"):
        cook(recipe, "soup")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    for model in models:
        (model / "chat_template.jinja").write_text(template)
    assert cook(recipe, "soup").digest != cook(Recipe(ingredients=recipe.ingredients), "mean").digest


def test_barriers_of_language_models_are_those_of_questions(language_family: Path, tmp_path: Path) -> None:
    """In points of accuracy, between models that answer by likelihoods."""
    pages = [page for page in PAGES if len(page) > 100][:30]
    lines = [
        json.dumps({"question": page[:40], "choices": [page[40:60], other[40:60]], "answer": 0})
        for page, other in zip(pages, [*pages[1:], pages[0]], strict=True)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    looks = {"task": "multiple-choice-lm", "dataset": str(tmp_path / "questions.jsonl")}
    recipe = Recipe(ingredients=[str(language_family / name) for name in ("one", "two")], validation=looks)
    report = connectivity(recipe)
    alone = cook(Recipe(**{**recipe.to_dict(), "select": "best"}), "soup").report.scores
    assert report.scores == {name: alone[name][report.title].value for name in ("local:one", "local:two")}
    middle = cook(recipe, "mean").report.scores["soup"][report.title].value
    (pair,) = report.pairs
    assert pair.line[0.5] == middle
    assert pair.low <= pair.height <= pair.high
