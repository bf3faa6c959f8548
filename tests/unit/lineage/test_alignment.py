"""Heads that are left out or kept, tokens that were added: what comes out is loaded by transformers and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from hf_soup import Recipe, RecipeError, Soup, check, connectivity, cook
from hf_soup.cli import tables as shown
from hf_soup.errors import IncompatibleError

WORDS = ["the", "a", "good", "bad", "film", "book", "day", "i", "am", "so", "very", "happy", "sad"]
BERT: dict[str, Any] = {
    "vocab_size": 5 + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 16,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 5 + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
BART: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 16},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3},
}
CONFIGS = {"Bert": (BertConfig, BERT), "Llama": (LlamaConfig, LLAMA), "ViT": (ViTConfig, VIT)}


def made(class_name: str, folder: Path, seed: int, *, labels: Sequence[str] = (), **fields: Any) -> str:
    """A model of a class: the body of one ancestor of its kind, moved a little; its head by itself."""
    drawn(class_name, seed, tuple(labels), **fields).save_pretrained(folder)
    return str(folder)


@cache
def drawn(class_name: str, seed: int, labels: tuple[str, ...], **fields: Any) -> transformers.PreTrainedModel:
    kind = next(kind for kind in CONFIGS if class_name.startswith(kind))
    config_class, values = CONFIGS[kind]
    # Names have to be in place before the library counts them.
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}} if labels else {}
    )
    torch.manual_seed(0)
    ancestor = getattr(transformers, f"{kind}Model")(config_class(**{**values, **fields})).state_dict()
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config_class(**{**values, **fields, **names}))
    with torch.no_grad():
        for name, each in model.base_model.state_dict().items():
            if name in ancestor:  # a classifier's ViT has no pooler
                known = ancestor[name]
                spread = known.std(correction=0) if known.numel() > 1 else torch.tensor(0.0)
                each.copy_(known + 0.1 * spread * torch.randn(known.shape))
    return model


def loaded(class_name: str, folder: Path, like: str | None = None) -> Any:
    """The model, loaded by the library without a surprise, but for those that an ingredient has itself."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [class_name]
    model, info = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    if like:
        _, known = getattr(transformers, class_name).from_pretrained(like, output_loading_info=True)
        assert info == known
    else:
        # Where no ingredient has a pooler, there is none.
        info["missing_keys"] -= {"pooler.dense.weight", "pooler.dense.bias"} if class_name == "ViTModel" else set()
        assert not any(info.values()), info
    return model


def body(folder: str | Path, class_name: str) -> dict[str, torch.Tensor]:
    model = getattr(transformers, class_name).from_pretrained(folder)
    return dict(model.base_model.state_dict())


def mean(*folders: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The average of bodies, worked out by the library's own loading."""
    bodies = [body(folder, name) for folder, name in folders]
    common = set(bodies[0]).intersection(*map(set, bodies[1:]))
    return {name: (sum(each[name].double() for each in bodies) / len(bodies)).float() for name in sorted(common)}


def cooked(tmp_path: Path, models: Sequence[str], **fields: Any) -> Soup:
    return cook(Recipe(ingredients=list(models), **fields), tmp_path / "soup")


HEADS = [
    ("BertForSequenceClassification", "BertForTokenClassification", "BertModel"),
    ("BertForMaskedLM", "BertForSequenceClassification", "BertModel"),
    ("BertForSequenceClassification", "BertForMaskedLM", "BertModel"),
    ("ViTForImageClassification", "ViTForImageClassification", "ViTModel"),
    ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"),
    ("LlamaForSequenceClassification", "LlamaForCausalLM", "LlamaModel"),
]


@pytest.mark.parametrize(("one", "other", "base"), HEADS)
def test_bodies_alone_make_a_new_base_and_one_head_is_kept(tmp_path: Path, one: str, other: str, base: str) -> None:
    models = [made(one, tmp_path / "a", 1), made(other, tmp_path / "b", 2, labels=["x", "y", "z"])]
    refused = check(models)
    assert refused.verdict == "refused"
    assert any("`heads: body`" in reason.message for reason in refused.reasons if reason.refuses)
    expected = mean((models[0], one), (models[1], other))
    soup = cooked(tmp_path, models, heads="body")
    found = loaded(base, soup.folder).state_dict()
    assert expected.keys() >= {name for name in found if "pooler" not in name}
    for name in expected.keys() & found.keys():
        assert torch.equal(found[name], expected[name]), name
    assert "id2label" not in json.loads((soup.folder / "config.json").read_text())
    if base == "ViTModel":
        assert "pooler.dense.bias, pooler.dense.weight: nobody has it" in "".join(soup.report.alignments)
    assert any("The heads are left out" in note for note in soup.report.alignments)
    pinned = soup.recipe.model_copy(update={"ingredients": Recipe(ingredients=models).ingredients})
    assert cook(pinned, tmp_path / "again").digest == soup.digest

    soup = cook(Recipe(ingredients=models, heads=models[1]), tmp_path / "with a head")
    model = loaded(other, soup.folder)
    mine = dict(model.base_model.state_dict())
    for name, each in expected.items():
        if name in mine:
            assert torch.equal(mine[name], each), name
    theirs = getattr(transformers, other).from_pretrained(models[1])
    prefix = f"{model.base_model_prefix}."
    heads = {name: each for name, each in theirs.state_dict().items() if not name.startswith(prefix)}
    assert heads or other.endswith("CausalLM")
    tied = set(theirs.all_tied_weights_keys)
    for name, each in heads.items():
        if name not in tied:
            assert torch.equal(model.state_dict()[name], each), name
    if "Classification" in other:
        assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert any("'s alone" in note for note in soup.report.alignments) or tied


def test_the_one_whose_head_is_kept_stays_when_a_selection_drops_it(tmp_path: Path) -> None:
    kind = "BertForSequenceClassification"
    models = [made(kind, tmp_path / name, n, labels=["x", "y"]) for n, name in enumerate("abc")]
    weighted = [{"model": models[0], "weight": 0}, models[1], models[2]]
    soup = cook(Recipe(ingredients=weighted, heads=models[0]), tmp_path / "soup")
    found = loaded(kind, soup.folder)
    first = load_file(Path(models[0]) / "model.safetensors")
    assert torch.equal(found.state_dict()["classifier.weight"], first["classifier.weight"])
    expected = mean(*((each, kind) for each in models[1:]))
    assert all(torch.equal(found.base_model.state_dict()[name], each) for name, each in expected.items())
    assert soup.weights == {"local:a": 0.0, "local:b": 1.0, "local:c": 1.0}
    assert soup.recipe.heads == "local:a"
    card = (soup.folder / "README.md").read_text()
    assert "local:a" in card.partition("## Ingredients")[2].partition("##")[0]


@pytest.mark.parametrize("heads", ["elsewhere", "./body", "acme/a@main"])
def test_heads_of_somebody_else(heads: str) -> None:
    with pytest.raises(RecipeError, match=r"`heads` is .*; it is `body` or one of the ingredients: acme/a, acme/b"):
        Recipe(ingredients=["acme/a", "acme/b"], heads=heads)


def test_a_body_cannot_be_scored() -> None:
    score = {"task": "text-classification", "dataset": "x/y", "split": "test"}
    with pytest.raises(RecipeError, match="no outputs"):
        Recipe(ingredients=["acme/a", "acme/b"], heads="body", validation=score)


# ---- tokens ---------------------------------------------------------------------------------------------------


def with_tokens(
    folder: str, added: Sequence[str] = (), *, pad_to: int | None = None, kind: str = "BertForMaskedLM"
) -> str:
    """Give a model a tokenizer, with tokens added as people do it, and rows that are padded."""
    tokenizer = tokenizer_with(tuple(added))
    tokenizer.save_pretrained(folder)
    # A new BertForMaskedLM is written with a bias that one that was loaded does not have.
    if (pad_to or len(tokenizer)) != BERT["vocab_size"] or kind == "BertForMaskedLM":
        model = getattr(transformers, kind).from_pretrained(folder)
        torch.manual_seed(len(added))
        model.resize_token_embeddings(pad_to or len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder)
    return folder


@cache
def tokenizer_with(added: tuple[str, ...]) -> transformers.PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "tied", "first"),
    [
        ("BertForMaskedLM", True, False),
        ("BertForMaskedLM", False, True),
        ("BertForSequenceClassification", True, False),
        ("LlamaForCausalLM", True, True),
        ("LlamaForCausalLM", False, False),
    ],
)
def test_tokens_that_some_added(tmp_path: Path, kind: str, tied: bool, first: bool) -> None:
    fields = {"tie_word_embeddings": tied}
    a = with_tokens(made(kind, tmp_path / "a", 1, **fields), kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2, **fields), ["<tool>", "<end>"], kind=kind)
    c = with_tokens(made(kind, tmp_path / "c", 3, **fields), ["<tool>", "<end>"], kind=kind)
    models = [b, c, a] if first else [a, b, c]
    refused = check(models)
    assert refused.verdict == "refused"
    [reason] = [reason for reason in refused.reasons if reason.refuses]
    assert reason.code == "vocabulary"
    assert "with tokens added: <tool>, <end>" in reason.message
    assert "`vocabulary: union`" in reason.message
    ours = [getattr(transformers, kind).from_pretrained(each).state_dict() for each in (a, b, c)]
    for vocabulary, size in (("union", 20), ("base", 18)):
        out = tmp_path / vocabulary
        soup = cook(Recipe(ingredients=models, vocabulary=vocabulary), out)
        model = loaded(kind, soup.folder, like=a)
        assert model.config.vocab_size == size
        tokenizer = AutoTokenizer.from_pretrained(soup.folder)
        assert len(tokenizer) == size
        for name, each in model.state_dict().items():
            rows = [state[name].double() for state in ours]
            if rows[0].shape == rows[1].shape:
                assert torch.equal(each, (sum(rows) / 3).float()), name
                continue
            assert torch.equal(each[:18], ((rows[0] + rows[1][:18] + rows[2][:18]) / 3).float()), name
            if vocabulary == "union":
                assert torch.equal(each[18:], ((rows[1][18:] + rows[2][18:]) / 2).float()), name
        text = tokenizer("so happy <tool>", return_tensors="pt")
        assert torch.isfinite(next(iter(model(**{"input_ids": text["input_ids"]}).values()))).all()
        assert any("tokens" in note or "rows" in note for note in soup.report.alignments)


@pytest.mark.parametrize("tied", ["ab", "ba"])
def test_tokens_added_where_one_ties_and_the_other_does_not(tmp_path: Path, tied: str) -> None:
    kind = "LlamaForCausalLM"
    one = with_tokens(made(kind, tmp_path / "a", 1, tie_word_embeddings=tied == "ab"), kind=kind)
    other = with_tokens(made(kind, tmp_path / "b", 2, tie_word_embeddings=tied == "ba"), ["<end>"], kind=kind)
    soup = cook(Recipe(ingredients=[one, other], vocabulary="union"), tmp_path / "soup")
    model = loaded(kind, soup.folder)
    assert model.config.tie_word_embeddings is False
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b = (getattr(transformers, kind).from_pretrained(each).state_dict()[name].double() for each in (one, other))
        expected = torch.cat([(a + b[:18]) / 2, b[18:]]).float()
        assert torch.equal(model.state_dict()[name], expected), name


def test_what_is_padding_for_one_and_a_token_for_another_is_not_mixed(tmp_path: Path) -> None:
    kind = "LlamaForCausalLM"
    a = with_tokens(made(kind, tmp_path / "a", 1), pad_to=24, kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2), ["<end>"], pad_to=24, kind=kind)
    rows = [load_file(Path(each) / "model.safetensors")["model.embed_tokens.weight"].double() for each in (a, b)]
    for vocabulary, behind in (("base", rows[0][18:]), ("union", rows[1][18:])):
        out = tmp_path / vocabulary
        soup = cook(Recipe(ingredients=[a, b], vocabulary=vocabulary), out)
        found = load_file(soup.folder / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(found, torch.cat([(rows[0][:18] + rows[1][:18]) / 2, behind]).float()), vocabulary


def test_a_config_with_infinity_in_it(tmp_path: Path) -> None:
    """As transformers writes it, in a way of its own."""
    small = {"num_heads": 4, "head_dim": 16, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1, "n_groups": 1}
    for seed, name in enumerate("ab"):
        torch.manual_seed(0)
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**small, vocab_size=32, chunk_size=8))
        torch.manual_seed(seed)
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.01 * torch.randn_like(each))
        model.save_pretrained(tmp_path / name)
    assert "__float__" in (tmp_path / "a" / "config.json").read_text()
    soup = cook([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "soup")
    assert loaded("Mamba2ForCausalLM", soup.folder).config.time_step_limit[1] == float("inf")


@pytest.mark.parametrize("heads", [None, "a", "b"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_rows_of_padding_are_no_tokens(tmp_path: Path, order: str, heads: str | None) -> None:
    """A table that is longer than its tokenizer: the same tokens, so what all have is averaged."""
    kind = "LlamaForCausalLM"
    with_tokens(made(kind, tmp_path / "a", 1, tie_word_embeddings=False), kind=kind)
    with_tokens(made(kind, tmp_path / "b", 2, tie_word_embeddings=False), pad_to=24, kind=kind)
    models = [str(tmp_path / name) for name in order]
    recipe = Recipe(ingredients=models, heads=heads and str(tmp_path / heads))
    assert check(recipe).verdict == "likely"
    soup = cook(recipe, tmp_path / "soup")
    model = loaded(kind, soup.folder)
    assert model.config.vocab_size == (24 if heads == "b" else 18)
    assert any("(further rows are padding)" in note for note in soup.report.alignments)
    a, b = (load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"].double() for name in "ab")
    table = torch.cat([(a + b[:18]) / 2, b[18:]]).float()
    assert torch.equal(model.model.embed_tokens.weight, table[: model.config.vocab_size])


def test_rows_that_no_tokenizer_explains(tmp_path: Path) -> None:
    kind = "LlamaForCausalLM"
    a = with_tokens(made(kind, tmp_path / "a", 1), kind=kind)
    none = made(kind, tmp_path / "none", 2, vocab_size=24)
    assert "which rows are whose, but not all bring one" in refusals(Recipe(ingredients=[a, none]))["vocabulary"]


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    kind = "LlamaForCausalLM"
    a = with_tokens(made(kind, tmp_path / "a", 1), kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2), ["<one>", "<two>"], pad_to=18, kind=kind)
    found = refusals(Recipe(ingredients=[a, b], vocabulary="union"))
    assert "local:b has rows for 18 tokens, but its tokenizer has 20." in found["vocabulary"]


def test_a_model_may_be_called_tokenizer(tmp_path: Path) -> None:
    """That texts are cut elsewhere says nothing of the tokens, whatever the models are called."""
    kind = "LlamaForCausalLM"
    a = with_tokens(made(kind, tmp_path / "a", 1), kind=kind)
    b = with_tokens(made(kind, tmp_path / "my-tokenizer", 2), ["<tool>"], kind=kind)
    for folder, length in ((a, 16), (b, 512)):
        path = Path(folder) / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))
    assert refusals(Recipe(ingredients=[a, b], vocabulary="union")) == {}


@pytest.mark.parametrize(("number", "refused"), [(5, True), (18, False), (None, False), (-1, False)])
def test_numbers_of_special_tokens_beside_added_tokens(tmp_path: Path, number: int | None, refused: bool) -> None:
    """A classifier reads where a text ends: another number is another function, unless the token was added."""
    kind = "LlamaForSequenceClassification"
    a = with_tokens(made(kind, tmp_path / "a", 1, labels=["x", "y"]), kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2, labels=["x", "y"]), ["<tool>"], kind=kind)
    lineage = check(Recipe(ingredients=[a, changed(b, pad_token_id=number)], vocabulary="union"))
    assert (lineage.verdict == "refused") == refused
    if refused:
        assert "pad_token_id: 0 against 5" in str(lineage)
    else:
        assert any(f"with pad_token_id {number}" in note for note in lineage.models.notes)


def test_tokens_in_columns_are_named(tmp_path: Path) -> None:
    models = []
    for name, more in (("a", []), ("b", ["<tool>"])):
        torch.manual_seed(0)
        BartForConditionalGeneration(BartConfig(vocab_size=18, **BART)).save_pretrained(tmp_path / name)
        models.append(with_tokens(str(tmp_path / name), more, kind="BartForConditionalGeneration"))
    found = refusals(Recipe(ingredients=models, vocabulary="union"))
    assert "'final_logits_bias' of local:a, (1, 18), has the tokens in its columns, not in its rows" in str(found)


@pytest.mark.parametrize("vocabulary", ["union", "base"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_tied_tensor_that_one_stores_twice(tmp_path: Path, vocabulary: str, order: str) -> None:
    kind = "LlamaForCausalLM"
    with_tokens(made(kind, tmp_path / "a", 1, tie_word_embeddings=True), kind=kind)
    with_tokens(made(kind, tmp_path / "b", 2, tie_word_embeddings=True), ["<tool>"], kind=kind)
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    models = [str(tmp_path / name) for name in order]
    soup = cook(Recipe(ingredients=models, vocabulary=vocabulary), tmp_path / "soup")
    model = loaded(kind, soup.folder)
    a, b = (load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"].double() for name in "ab")
    table = torch.cat([(a + b[:18]) / 2, b[18:]]).float()
    for each in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert torch.equal(each, table[: 19 if vocabulary == "union" else 18])


@pytest.mark.parametrize(
    ("kind", "message"), [("T5", "scale_decoder_outputs (by tie"), ("Bart", "tie_word_embeddings:")]
)
def test_an_encoder_decoder_that_ties_is_not_one_that_does_not(tmp_path: Path, kind: str, message: str) -> None:
    """Some scale what they read off embeddings that are tied, as T5 does."""
    models = []
    for name, tied in (("a", True), ("b", False)):
        torch.manual_seed(0)
        model: Any = BartForConditionalGeneration(BartConfig(vocab_size=18, **BART))
        if kind == "T5":
            config: Any = T5Config(vocab_size=18, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
            model = T5ForConditionalGeneration(config)
        model.save_pretrained(tmp_path / name)
        models.append(changed(str(tmp_path / name), tie_word_embeddings=tied))
    # As configs were before the library wrote down what it makes of it.
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "scale_decoder_outputs"})
    )
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    table = tensors["shared.weight" if kind == "T5" else "model.shared.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, path, {"format": "pt"})
    assert message in refusals(Recipe(ingredients=models)).get("architecture", "")
    # Of bodies there is nothing to be scaled.
    assert "architecture" not in refusals(Recipe(ingredients=models, heads="body"))


def test_shapes_that_differ_as_a_file_contradicts_itself(tmp_path: Path) -> None:
    kind = "BertForMaskedLM"
    models = [made(kind, tmp_path / name, n) for n, name in enumerate("ab")]
    path = Path(models[1]) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "cls.predictions.bias": torch.zeros(17)}, path, {"format": "pt"})
    found = refusals(Recipe(ingredients=models))
    assert found.keys() == {"shapes"}
    assert "local:b contradicts itself: 'cls.predictions.bias' is (17,), and its config asks for (18,)" in str(found)


def test_a_tied_head_is_nobodys_alone(tmp_path: Path) -> None:
    a = made("LlamaForCausalLM", tmp_path / "a", 1, tie_word_embeddings=True)
    b = made("LlamaForSequenceClassification", tmp_path / "b", 2, tie_word_embeddings=True)
    notes = check(Recipe(ingredients=[a, b], heads=a)).models.notes
    assert any(
        note.startswith("local:a has no head of its own: it predicts tokens with its embeddings, which")
        for note in notes
    )
    bare = made("LlamaModel", tmp_path / "bare", 3)
    assert "local:bare has no head of its own." in check(Recipe(ingredients=[a, bare], heads=bare)).models.notes


def test_tokens_that_two_added_differently_are_refused(tmp_path: Path) -> None:
    kind = "LlamaForCausalLM"
    a = with_tokens(made(kind, tmp_path / "a", 1), ["<one>"], kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2), ["<two>", "<three>"], kind=kind)
    c = with_tokens(made(kind, tmp_path / "c", 3), kind=kind)
    lineage = check(Recipe(ingredients=[c, a, b], vocabulary="union"))
    assert lineage.verdict == "refused"
    assert "processing" in {reason.code for reason in lineage.reasons if reason.refuses}


@pytest.mark.parametrize("vocabulary", ["union", "base"])
@pytest.mark.parametrize("padded", [None, 24])
def test_rows_of_other_tokens_are_not_mixed_whatever_is_allowed(
    tmp_path: Path, padded: int | None, vocabulary: str
) -> None:
    """Two added one token each, of the same number; also beside one that added none, and where padding has room."""
    kind = "LlamaForCausalLM"
    a = with_tokens(made(kind, tmp_path / "a", 1), ["<one>"], pad_to=padded, kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2), ["<two>"], pad_to=padded, kind=kind)
    c = with_tokens(made(kind, tmp_path / "c", 3), pad_to=padded, kind=kind)
    for models in ([a, b], [c, a, b], [a, c, b]):
        recipe = Recipe(ingredients=models, vocabulary=vocabulary, allow=["processing"])
        assert "would say which rows are whose, but they differ." in refusals(recipe)["vocabulary"]
        with pytest.raises(IncompatibleError):
            cook(recipe, tmp_path / "soup")


def test_more_tokens_than_rows_that_grew_is_compared_with_the_base(tmp_path: Path) -> None:
    """All added the same; the ancestor has fewer rows, and is compared all the same."""
    kind = "LlamaForCausalLM"
    models = [with_tokens(made(kind, tmp_path / name, n), ["<one>"], kind=kind) for n, name in enumerate("ab", start=1)]
    base = with_tokens(made(kind, tmp_path / "base", 9), kind=kind)
    assert check(models, base=base).verdict == "proven"
    mixed = [*models, with_tokens(made(kind, tmp_path / "c", 3), kind=kind)]
    assert check(Recipe(ingredients=mixed, base_model=base, vocabulary="union")).verdict == "proven"


# ---- scores ---------------------------------------------------------------------------------------------------


def answering(folder: str, answer: int, labels: Sequence[str] | None = None) -> str:
    """Make a classifier give one answer to everything."""
    path = Path(folder)
    tensors = load_file(path / "model.safetensors")
    tensors["classifier.bias"] = 100 * torch.eye(len(tensors["classifier.bias"]))[answer]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return folder


def rows(path: Path, labels: Sequence[str]) -> dict[str, Any]:
    """Validation data; three quarters have the first label."""
    lines = [f"so very {word} {other},{labels[n % 4 == 0]}" for n, word in enumerate(WORDS) for other in WORDS[:2]]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return {"task": "text-classification", "dataset": str(path)}


def knowing(folder: str, path: Path, labels: Sequence[str]) -> None:
    """Give the rows of a file the labels that a classifier says, once its bias lets it say both."""
    texts = [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        model.classifier.weight *= 100  # far more than rounding
        model.classifier.bias.zero_()
        logits = model(**AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)).logits
        more = logits[:, 1] - logits[:, 0]
        model.classifier.bias[0] = more.sort().values[len(more) // 2 - 1 :][:2].mean()
    model.save_pretrained(folder)
    said = [labels[int(each > model.classifier.bias[0])] for each in more]
    path.write_text("\n".join(["text,label", *map(",".join, zip(texts, said, strict=True))]) + "\n")


@pytest.mark.parametrize(("vocabulary", "chosen"), [("union", "few"), ("base", "many"), ("union", "by share")])
def test_a_soup_without_the_one_that_spoke_for_all_is_scored_as_it_is(
    tmp_path: Path, vocabulary: str, chosen: str
) -> None:
    """The selection leaves one whose table of tokens is another than that of all."""
    kind = "BertForSequenceClassification"
    few = with_tokens(made(kind, tmp_path / "few", 1, labels=["x", "y"]), kind=kind)
    many = with_tokens(made(kind, tmp_path / "many", 2, labels=["x", "y"]), ["<tool>"], kind=kind)
    answering(few, 0)
    answering(many, 1)
    data = rows(tmp_path / "rows.csv", ["x", "y"])
    if chosen != "by share":
        knowing(few if chosen == "few" else many, tmp_path / "rows.csv", ["x", "y"])
    more: dict[str, Any] = {"test": [data], "ingredients": [few, {"model": many, "weight": 0}]}
    if chosen != "by share":
        more = {"validation": data, "select": {"name": "greedy", "accept": ">"}, "ingredients": [many, few]}
    soup = cook(Recipe(vocabulary=vocabulary, **more), tmp_path / "soup")
    one = "many" if chosen == "many" else "few"
    assert list(soup.weights) == [f"local:{one}"]
    assert loaded(kind, soup.folder).config.vocab_size == len(AutoTokenizer.from_pretrained(soup.folder))
    assert soup.scores["soup"] == soup.scores[f"local:{one}"]
    assert soup.scores["soup"]["rows.csv accuracy"]["n"] == 26
    # Local paths are not in soup.yaml.
    pinned = [{"model": str(tmp_path / one), "revision": soup.recipe.ingredients[0].revision}]
    scored = {key: more[key] for key in ("validation", "test") if key in more}
    again = cook(Recipe(ingredients=pinned, vocabulary=vocabulary, **scored), tmp_path / "again")
    assert (again.digest, again.scores["soup"]) == (soup.digest, soup.scores["soup"])
    assert (again.folder / "config.json").read_bytes() == (soup.folder / "config.json").read_bytes()


# ---- labels ---------------------------------------------------------------------------------------------------


def named(folder: str, labels: Sequence[str]) -> str:
    """Give the outputs of a model other names in its config."""
    path = Path(folder) / "config.json"
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    return folder


def refusals(recipe: Recipe) -> dict[str, str]:
    lineage = check(recipe)
    found = {reason.code: reason.message for reason in lineage.reasons if reason.refuses}
    assert (lineage.verdict == "refused") == bool(found)
    return found


ANIMALS = ["cat", "dog", "bird"]


def test_a_row_that_stands_for_no_label_is_not_lost(tmp_path: Path) -> None:
    """A detector has one row more than labels; nothing says which it is."""
    models = []
    for number, labels in enumerate((["dog", "cat"], ["cat", "dog"])):
        torch.manual_seed(0)
        config = YolosConfig(
            **{**VIT, "image_size": [16, 16]}, num_detection_tokens=5, id2label=dict(enumerate(labels))
        )
        YolosForObjectDetection(config).save_pretrained(tmp_path / f"{number}")
        models.append(str(tmp_path / f"{number}"))
    assert refusals(Recipe(ingredients=[models[0]] * 2)) == {}
    for recipe in (Recipe(ingredients=models), Recipe(ingredients=[models[0]] * 2, labels=["cat", "dog"])):
        message = refusals(recipe)["labels-rows"]
        assert "there are 2 of them and 'class_labels_classifier.layers.2.bias' has 3 rows" in message


def test_the_labels_of_the_recipe_speak_for_those_who_name_none(tmp_path: Path) -> None:
    kind = "BertForSequenceClassification"
    a = made(kind, tmp_path / "a", 1, labels=ANIMALS)
    b = made(kind, tmp_path / "b", 2, labels=["LABEL_0", "LABEL_1", "LABEL_2"])
    recipe = Recipe(ingredients=[a, b], labels=["bird", "cat", "dog"])
    [reason] = [reason for reason in check(recipe).reasons if reason.code == "labels-unknown"]
    assert "matched by number with the recipe's `labels`" in reason.message
    soup = cook(recipe, tmp_path / "soup")
    one, other, both = (
        load_file(Path(each) / "model.safetensors")["classifier.weight"] for each in (a, b, soup.folder)
    )
    assert torch.equal(both, ((one[[2, 0, 1]].double() + other.double()) / 2).float())


@pytest.mark.parametrize("labels", [["x", "y"], ["x", "y", "z", "w"]])
@pytest.mark.parametrize("own", [ANIMALS, ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_a_recipe_with_another_number_of_labels(tmp_path: Path, labels: list[str], own: list[str]) -> None:
    models = [made("BertForSequenceClassification", tmp_path / name, n, labels=own) for n, name in enumerate("ab")]
    assert f"{len(labels)} labels against 3" in refusals(Recipe(ingredients=models, labels=labels))["labels"]


def test_labels_that_are_not_written_down_are_two(tmp_path: Path) -> None:
    models = [made("BertForSequenceClassification", tmp_path / name, n) for n, name in enumerate("ab")]
    assert "3 labels against 2" in refusals(Recipe(ingredients=models, labels=ANIMALS))["labels"]
    assert refusals(Recipe(ingredients=models, labels=["x", "y"])) == {}


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "LlamaForCausalLM"])
def test_labels_that_are_left_over_from_another_head_say_nothing(tmp_path: Path, kind: str) -> None:
    models = [made(kind, tmp_path / name, n) for n, name in enumerate("abc")]
    for model, labels in zip(models, (ANIMALS, [*ANIMALS[::-1]], ["x", "y"]), strict=True):
        named(model, labels)
    lineage = check(models)
    assert not {reason.code for reason in lineage.reasons} & {"labels", "labels-unknown"}
    assert lineage.verdict == "likely"
    soup = cook(models, tmp_path / "soup")
    assert json.loads((soup.folder / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog", "2": "bird"}
    assert "has no outputs that they could name" in refusals(Recipe(ingredients=models, labels=ANIMALS))["labels"]


@pytest.mark.parametrize("unnamed", [False, True])
def test_the_kept_head_is_put_into_the_order_of_the_recipe(tmp_path: Path, unnamed: bool) -> None:
    kind = "BertForSequenceClassification"
    own = ["LABEL_0", "LABEL_1", "LABEL_2"] if unnamed else ANIMALS
    models = [made(kind, tmp_path / "a", 1, labels=own), made(kind, tmp_path / "b", 2, labels=["x", "y"])]
    wanted = ["bird", "cat", "dog"]
    soup = cooked(tmp_path, models, heads=models[0], labels=wanted)
    model = loaded(kind, soup.folder)
    assert list(model.config.id2label.values()) == wanted
    first = load_file(Path(models[0]) / "model.safetensors")["classifier.weight"]
    assert torch.equal(model.classifier.weight, first if unnamed else first[[2, 0, 1]])
    pinned = soup.recipe.model_copy(update={"heads": models[0], "ingredients": Recipe(ingredients=models).ingredients})
    assert pinned.labels == tuple(wanted)
    assert cook(pinned, tmp_path / "again").digest == soup.digest
    for labels in (["x", "y"], ["one", "two", "three"])[: 1 if unnamed else 2]:
        found = refusals(Recipe(ingredients=models, heads=models[0], labels=labels))
        assert "whose head is kept" in found["labels"]


# ---- files that are not what their config says ----------------------------------------------------------------


def changed(folder: str, **fields: Any) -> str:
    """Write other values into a config."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


LIES = [
    ("BertForSequenceClassification", {"hidden_size": 64}, "is (32,), and its config asks for (64,)"),
    ("BertForSequenceClassification", {"num_hidden_layers": 3}, "lacks 16 tensors that its own config asks for"),
    (
        "LlamaForCausalLM",
        {"vocab_size": 30},
        "'lm_head.weight' is (18, 32), and its config asks for (30, 32)",
    ),
    ("LlamaForCausalLM", {"vocab_size": 10**9}, "its config asks for (1000000000, 32)"),
    (
        "ViTForImageClassification",
        {"id2label": {str(n): f"l{n}" for n in range(7)}},
        "is (2,), and its config asks for",
    ),
]


@pytest.mark.parametrize(("kind", "lie", "message"), LIES, ids=[next(iter(lie)) for _, lie, _ in LIES])
def test_a_config_that_lies_about_the_weights(tmp_path: Path, kind: str, lie: dict[str, Any], message: str) -> None:
    models = [changed(made(kind, tmp_path / name, n), **lie) for n, name in enumerate("ab")]
    said = refusals(Recipe(ingredients=models))["config-wrong"]
    assert message in said
    assert said.startswith("local:a ")
    assert refusals(Recipe(ingredients=models)) == refusals(Recipe(ingredients=models)), "as remembered"


def test_what_loads_without_harm_is_no_lie(tmp_path: Path) -> None:
    """A pooler that no file has, a second copy of a tied tensor, old tensors that nobody reads."""
    models = [made("BertModel", tmp_path / name, n) for n, name in enumerate("ab")]
    for model in models:
        path = Path(model) / "model.safetensors"
        tensors = {name: each for name, each in load_file(path).items() if "pooler" not in name}
        save_file({**tensors, "embeddings.position_ids": torch.arange(16)[None]}, path, {"format": "pt"})
    assert refusals(Recipe(ingredients=models)) == {}


@pytest.mark.parametrize("heads", ["body", "a", "b"])
def test_a_file_without_a_layer_gives_nothing_to_a_body(tmp_path: Path, heads: str) -> None:
    models = [
        made("BertForSequenceClassification", tmp_path / name, n, labels=ANIMALS[n:]) for n, name in enumerate("ab")
    ]
    path = Path(models[0]) / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "layer.1." not in name}, path, {"format": "pt"})
    found = refusals(Recipe(ingredients=models, heads="body" if heads == "body" else str(tmp_path / heads)))
    assert "local:a lacks 16 tensors that its own config asks for: bert.encoder.layer.1." in found["tensors-missing"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A classifier of a CLIP's pictures, and the tower of its pictures alone."""
    folder = tmp_path_factory.mktemp("towers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    text = {**sizes, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "projection_dim": 16}
    whole = CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    whole.save_pretrained(folder / "whole")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "tower")
    return str(folder / "whole"), str(folder / "tower")


def test_one_that_has_nothing_of_the_body_is_refused(towers: tuple[str, str]) -> None:
    found = refusals(Recipe(ingredients=towers, heads=towers[0]))
    assert "no tensor of local:tower into local:whole's body, a CLIPModel" in found["body"]


def test_a_body_that_nobody_has_is_refused(towers: tuple[str, str]) -> None:
    found = refusals(Recipe(ingredients=[towers[0], towers[0]], heads="body"))
    assert re.match(r"Nobody has 39 of the tensors of a CLIPModel: .* Keep a head: `heads: MODEL`", found["body"])


def test_scores_with_another_models_head_say_so(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """A body that answers wrongly under a head that is not its own is no model with labels in another order."""
    kind = "BertForSequenceClassification"
    a = with_tokens(made(kind, tmp_path / "a", 1, labels=["x", "y"]), kind=kind)
    b = with_tokens(made(kind, tmp_path / "b", 2, labels=["x", "y"]), kind=kind)
    data = rows(tmp_path / "rows.csv", ["x", "y"])
    # One number of `b`'s body tells the labels apart, and its head reads that alone; in `a` it has the other sign.
    lines = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()[1:]]
    texts = AutoTokenizer.from_pretrained(b)([text for text, _ in lines], return_tensors="pt")
    with torch.no_grad():
        seen = BertForSequenceClassification.from_pretrained(b).eval().bert(**texts).last_hidden_state[:, 0]
    sides = torch.tensor([[9.0 if label == "x" else -9.0] for _, label in lines])
    # Without the smallest directions, which are noise of float32: a solution by them is another every time.
    inverse = torch.linalg.pinv(torch.cat([seen, torch.ones(len(seen), 1)], 1).double(), rtol=2e-5)
    read = (inverse @ sides.double())[:, 0].float()
    read *= 0.1 / read.norm()  # as large as any other row, or its sign would make them strangers
    for folder, sign in ((a, -1), (b, 1)):
        tensors = load_file(Path(b) / "model.safetensors")
        tensors["bert.pooler.dense.weight"][0], tensors["bert.pooler.dense.bias"][0] = sign * read[:-1], sign * read[-1]
        tensors["classifier.weight"].zero_()[:, 0] = torch.tensor([1e4, -1e4])
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
    named(a, ["x1", "y1"])
    recipe = Recipe(ingredients=[a, b], heads=b, test=[data])
    soup = cook(recipe, tmp_path / "soup")
    value = {name: each["rows.csv accuracy"]["value"] for name, each in soup.scores.items()}
    assert (value["local:a"], value["local:b"]) == (0.0, 1.0)
    sentence = "Ingredients are scored with local:b's head"
    assert sum(sentence in each for each in log.messages) == 1
    assert sentence in "".join(soup.report.notes)
    assert sentence in (soup.folder / "README.md").read_text()
    assert sentence in shown.soup(soup)
    log.clear()
    connectivity(Recipe(ingredients=[a, b], heads=b, validation=data))
    assert sum(sentence in each for each in log.messages) == 1
    assert sentence not in shown.soup(cook(Recipe(ingredients=[a, b], heads=b), tmp_path / "none"))
