"""Ancestors that are no plain ingredient: without the head, with other names or labels, in another type, shorter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_soup import IncompatibleError, Recipe, Soup, check, cook
from hf_soup.lineage import with_base, write_assets
from hf_soup.merging import Layout

pytestmark = pytest.mark.usefixtures("online")

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def kin(tmp_path: Path) -> Callable[..., list[Path]]:
    """Two fine-tunes of a tiny BERT with two labels, beside the ancestor as it is wanted."""

    def make(ancestor: Callable[[Tensors], Tensors], config: dict[str, Any], dtype: torch.dtype) -> list[Path]:
        shape = transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
        )  # fmt: skip
        torch.manual_seed(0)
        first = transformers.BertForSequenceClassification(shape)
        for name, scale in (("base", 0.0), ("a", 0.02), ("b", 0.02)):
            with torch.no_grad():
                moved = {key: each + scale * torch.randn(each.shape) for key, each in first.state_dict().items()}
            model = transformers.BertForSequenceClassification(shape)
            model.load_state_dict(moved)
            (model if name == "base" else model.to(dtype)).save_pretrained(tmp_path / name)
        base = tmp_path / "base"
        save_file(ancestor(load_file(base / "model.safetensors")), base / "model.safetensors", {"format": "pt"})
        said = {**json.loads((base / "config.json").read_text()), **config}
        (base / "config.json").write_text(json.dumps(said))
        return [tmp_path / name for name in ("base", "a", "b")]

    return make


def wise(folders: list[Path], out: Path, **changes: Any) -> tuple[Soup, Tensors]:
    base, *ingredients = map(str, folders)
    asked = {"method": {"name": "wise_ft", "alpha": 0.25}, **changes}
    soup = cook(Recipe(ingredients=ingredients, base_model=base, **asked), out)
    return soup, load_file(soup.folder / "model.safetensors")


def plain(tensors: Tensors) -> Tensors:
    return tensors


def headless(tensors: Tensors) -> Tensors:
    return {name.removeprefix("bert."): each for name, each in tensors.items() if name.startswith("bert.")}


def old_names(tensors: Tensors) -> Tensors:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in tensors.items()
    }


@pytest.mark.parametrize(
    ("ancestor", "config", "head", "dtype"),
    [
        (plain, {}, True, torch.float32),
        (headless, {"architectures": ["BertModel"]}, False, torch.bfloat16),
        (old_names, {}, True, torch.bfloat16),
        (plain, {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}, False, torch.float32),
    ],
    ids=["same", "no head", "old names", "other labels"],
)
def test_what_the_ancestor_lacks_is_averaged(
    ancestor: Callable[[Tensors], Tensors], config: dict[str, Any], head: bool, dtype: torch.dtype, tmp_path: Path,
    kin: Callable[..., list[Path]],
) -> None:  # fmt: skip
    """And all else lies between it and the mean, in the ingredients' type and not in the ancestor's."""
    folders = kin(ancestor, config, dtype)
    start = transformers.BertForSequenceClassification.from_pretrained(folders[0]).state_dict()
    soup, mixed = wise(folders, tmp_path / "soup")
    a, b = (load_file(folder / "model.safetensors") for folder in folders[1:])
    assert {each.dtype for each in mixed.values()} == {dtype}
    for name, each in mixed.items():
        mean = (a[name].double() + b[name].double()) / 2
        between = name.startswith("bert.") or head
        want = (1 - 0.25) * start[name].double() + 0.25 * mean if between else mean
        torch.testing.assert_close(
            each.double(), want.to(dtype).double(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-7
        )
    said = " ".join(soup.report.alignments)
    assert ("has none that corresponds, so it is averaged and not part of wise_ft" in said) == (not head)


def test_the_base_is_a_source_that_is_no_ingredient(kin: Callable[..., list[Path]]) -> None:
    base, *ingredients = map(str, kin(headless, {"architectures": ["BertModel"]}, torch.float32))
    lineage = check(ingredients, base=base)
    alone, based = lineage.models, with_base(lineage.models, lineage.ancestor, "ties")
    assert alone.base is None
    assert based.base is not None
    assert (based.names, based.base.name) == (("local:a", "local:b"), "local:base (base)")
    assert based.ingredients is alone.ingredients
    assert [each.model for each in based.checkpoints] == ["local:a", "local:b", "local:base"]
    assert not any(name.startswith("classifier.") for name in based.base.tensors)
    assert based.patched - alone.patched == {"classifier.weight", "classifier.bias"}
    assert len(based.notes) == len(alone.notes) + 1
    layout = Layout.of(based.ingredients, based.base, patched=based.patched)
    assert (layout.names, layout.base) == (based.names, 2)
    assert layout.states == tuple(each.identity for each in based.checkpoints)


@pytest.mark.parametrize("giver", ["b", "base"])
def test_who_is_left_out_still_gives_the_tokenizer(giver: str, tmp_path: Path, kin: Callable[..., list[Path]]) -> None:
    """The ancestor goes before ingredients that are left out."""
    base, *ingredients = kin(plain, {}, torch.float32)
    for name in {"b", giver}:
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"model_input_names": [name]}))
    leaves = check([str(each) for each in ingredients], base=str(base)).models.only(["local:a"])
    assert leaves.names == ("local:a",)
    (tmp_path / "out").mkdir()
    write_assets(tmp_path / "out", {}, leaves)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_input_names"] == [giver]


@pytest.mark.parametrize("weights", [(1.0, -0.99), (0.5, -2.0), (1.0, -1.0)])
def test_what_the_ancestor_lacks_is_of_those_whose_share_is_above_zero(
    weights: tuple[float, float], tmp_path: Path, kin: Callable[..., list[Path]]
) -> None:
    base, a, b = map(str, kin(headless, {"architectures": ["BertModel"]}, torch.float32))
    given = [{"model": a, "weight": weights[0]}, {"model": b, "weight": weights[1]}]
    soup = cook(Recipe(ingredients=given, base_model=base, method="task_arithmetic"), tmp_path / "soup")
    mixed, first = load_file(soup.folder / "model.safetensors"), load_file(Path(a) / "model.safetensors")
    assert torch.equal(mixed["classifier.weight"], first["classifier.weight"])


def test_only_tokens_that_were_added_after_the_ancestor_have_no_task_vector(
    tmp_path: Path, kin: Callable[..., list[Path]]
) -> None:
    def shorter(tensors: Tensors) -> Tensors:
        name = "bert.embeddings.word_embeddings.weight"
        return {**tensors, name: tensors[name][:17].clone()}

    folders = kin(shorter, {"vocab_size": 17}, torch.float32)
    _, mixed = wise(folders, tmp_path / "soup")
    name = "bert.embeddings.word_embeddings.weight"
    base, a, b = (load_file(folder / "model.safetensors")[name].double() for folder in folders)
    want = (a + b) / 2
    want[:17] = 0.75 * base + 0.25 * want[:17]
    torch.testing.assert_close(mixed[name].double(), want, rtol=1e-6, atol=1e-8)


def test_a_stranger_is_no_ancestor(tmp_path: Path, kin: Callable[..., list[Path]]) -> None:
    folders = kin(lambda tensors: {name: torch.randn(each.shape) for name, each in tensors.items()}, {}, torch.float32)
    with pytest.raises(IncompatibleError):
        wise(folders, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
