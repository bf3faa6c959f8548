"""The demo with language models: its texts, the repos of its zoo, and its table."""

import pdb

import pytest
import torch
import yaml

from hf_soup.demo import LanguageZoo, _render
from hf_soup.demo.language import encoded
from hf_soup.demo.language_data import LENGTH, _pages, code, pages_of, splits_of
from hf_soup.demo.zoo import OWNER

TINY = LanguageZoo(good=1, steps=4, fine_tune_steps=(1, 2), texts=(24, 32))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    TINY.make(folder, lambda text: None)
    return folder


def card_of(folder):
    front, text = (folder / "README.md").read_text(encoding="utf-8").removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(front), text


def test_every_model_is_a_complete_repo_with_an_honest_card(zoo):
    """Config, weights, tokenizer, card; the card names ancestor and data, and the poor model says that it is."""
    assert {path.name for path in zoo.iterdir()} == {TINY.dataset, TINY.ancestor, *TINY.fine_tunes}
    for name in (TINY.ancestor, *TINY.fine_tunes):
        files = {path.name for path in (zoo / name).iterdir()}
        assert files >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        front, text = card_of(zoo / name)
        assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "text-generation")
        assert ("learning rate is about ten times too high" in text) == (name == TINY.poor)
        assert "{" not in text
        if name != TINY.ancestor:
            assert front["base_model"] == f"{OWNER}/{TINY.ancestor}"
            assert front["base_model_relation"] == "finetune"
            assert front["datasets"] == [f"{OWNER}/{TINY.dataset}"]
            assert "learning rate: " in text


def test_training_and_scoring_read_the_same_tokens(zoo):
    """A token is a byte, the published tokenizer adds none, and before a text stands the token that begins it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo / TINY.poor)
    texts = splits_of(0, TINY.texts)["test"]
    assert [tokenizer(text).input_ids for text in texts] == encoded(texts)[:, 1:].tolist()
    assert set(encoded(texts)[:, 0].tolist()) == {tokenizer.bos_token_id}
    text = "  def é():\n\n\treturn '“'"
    assert len(tokenizer(text).input_ids) == len(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = AutoModelForCausalLM.from_pretrained(zoo / TINY.poor)
    assert model.config.bos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model(encoded(texts)).logits.shape == (32, LENGTH + 1, len(tokenizer))


def test_no_text_is_in_two_splits(zoo):
    """Nor has the ancestor read one; with the sizes of the demo, and not only with these."""
    splits = splits_of(0, LanguageZoo().texts)
    assert (len(splits["validation"]), len(splits["test"])) == LanguageZoo().texts
    pages = pages_of(0, LanguageZoo().texts)
    assert all(len(page) <= 12 for name in ("validation", "test") for page in pages[name])
    assert len(pages["test"]) > 20
    assert {len(text) for texts in splits.values() for text in texts} == {LENGTH}
    seen = set(code())
    for texts in splits.values():
        # What is drawn with lines and dots is in many tables.
        new = {text for text in texts if sum(map(str.isalpha, text)) > LENGTH / 2}
        assert not new & seen
        seen |= new
    words = "assumed to be Python statements"
    docstring, page, read = (" ".join("".join(texts).split()) for texts in (pdb.__doc__, _pages(), code()))
    assert words in docstring, "of which a page of the manual is made"
    assert words in page
    assert words not in read


def test_the_data_set_loads_by_its_card(zoo, tmp_path):
    """`datasets` finds the splits, and the texts are those that models were trained on."""
    import datasets

    loaded = datasets.load_dataset(str(zoo / TINY.dataset), cache_dir=str(tmp_path))
    assert {name: list(split["text"]) for name, split in loaded.items()} == splits_of(0, TINY.texts)
    assert len(set(loaded["test"]["page"])) == len(pages_of(0, TINY.texts)["test"]) > 1
    front, text = card_of(zoo / TINY.dataset)
    assert front["license_name"] == "psf-2.0"
    assert "no split has one of another" in text
    assert "{" not in text


def test_equal_seeds_give_equal_bytes_and_progress_names_each_model(zoo, tmp_path):
    """Data and models are a function of the settings: made again, every file is the same."""
    lines = []
    TINY.make(tmp_path, lines.append)
    assert all(name in line for name, line in zip((TINY.ancestor, *TINY.fine_tunes), lines, strict=True))
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        assert path.read_bytes() == (zoo / path.relative_to(tmp_path)).read_bytes(), path.name
    assert splits_of(1, TINY.texts)["test"] != splits_of(0, TINY.texts)["test"]


def test_training_makes_a_model_that_needs_fewer_bits():
    """Of texts that it reads many times; the loop is the demo's own."""
    from hf_soup.demo.language import Hyperparameters, _losses, _new_model, _train

    rows = encoded(splits_of(0, TINY.texts)["validation"])
    model = _new_model(0)

    def nats():
        with torch.no_grad():
            return next(_losses(model, [(rows[:, :-1], rows[:, 1:])])).item()

    before = nats()
    _train(model, rows, Hyperparameters(0, 4e-3, 15, 0.05))
    assert nats() < before - 1


def test_the_recipe_names_what_the_zoo_holds():
    """All seven, the ancestor, bits per byte, and validation data that is not test data."""
    recipe = LanguageZoo().recipe()
    assert recipe.base_model == f"{OWNER}/llama-code"
    assert [each.model for each in recipe.ingredients] == [
        *(f"{OWNER}/llama-manual-{number}" for number in range(1, 7)),
        f"{OWNER}/llama-manual-hot",
    ]
    assert recipe.select.name == "greedy"
    scored = [(each.task, each.metric, each.dataset, each.split) for each in (*recipe.validation, *recipe.test)]
    assert scored == [("causal-lm", "bits_per_byte", f"{OWNER}/manual", split) for split in ("validation", "test")]


def test_bits_are_shown_as_they_are_and_not_in_percent():
    """And it is said that less is better."""
    figure = {"metric": "bits_per_byte", "value": 2.5, "low": 2.25, "high": 2.7504, "n": 400, "share": False}
    head, row = _render({"a": {"test bits_per_byte": figure}}, ["test bits_per_byte"]).splitlines()
    assert head.split("   ") == ["less is better, with 95 % intervals", "test bits_per_byte (n = 400)"]
    assert row.split() == ["a", "2.500", "(2.250", "to", "2.750)"]
