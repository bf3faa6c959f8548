"""The zoo of known lineage: who descends from whom, and guises that leave a model what it is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import lineage_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModel, ViTModel

from hf_soup.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Hardly trained, which is enough for all that is tested here."""
    names = ("A-light-1", "A-frozen", "A-again", "A2", "B", "CLIP-1", "CLIP-2")
    return zoo.make_zoo(tmp_path_factory.mktemp("zoo"), *names, effort=0.01)


@pytest.fixture(scope="module")
def model(members):
    return members["A-light-1"].folder


#: What members say, which are not changed.
said = cache(zoo.outputs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_members_come_with_what_they_descend_from(members):
    assert list(members)[:7] == ["A-light-1", "A-frozen", "A-again", "A2", "B", "CLIP-1", "CLIP-2"]
    assert set(members) == {*list(members)[:7], "A", "CLIP"}
    assert members["A"] == zoo.Member("A", members["A"].folder, None, "ancestor")
    assert members["A-again"].ancestor == "A-light-1"
    assert zoo.first_base(members, "A-again") == "A"
    assert zoo.first_base(members, "CLIP-1") == "CLIP"
    for member in members.values():
        files = {path.name for path in member.folder.iterdir()}
        assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_a_member_is_made_once_and_the_same_everywhere(members, model, tmp_path):
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert zoo.make_zoo(model.parent, "A-light-1", effort=0.01)["A-light-1"].folder == model
    assert (model / "model.safetensors").stat().st_mtime_ns == written
    again = zoo.make_zoo(tmp_path, "A-light-1", effort=0.01)["A-light-1"].folder
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_lines_are_what_they_are_called(members, tmp_path):
    a, a2, b = (weights(members[name].folder) for name in ("A", "A2", "B"))
    name = "vit.encoder.layer.1.intermediate.dense.weight"

    def cosine(x, y):
        return torch.nn.functional.cosine_similarity(x[name].flatten(), y[name].flatten(), dim=0)

    assert 0.5 < cosine(a, a2) < 1
    assert abs(cosine(a, b)) < 0.1
    frozen = weights(members["A-frozen"].folder)
    assert all(torch.equal(a[name], frozen[name]) for name in a if name.startswith("vit."))
    assert not torch.equal(frozen["classifier.weight"], weights(members["A-light-1"].folder)["classifier.weight"])


def test_the_plan_names_ancestors_first():
    seen = set()
    for name, step in zoo.PLAN.items():
        assert step.ancestor is None or step.ancestor in seen, name
        seen.add(name)


def test_a_card_names_the_ancestor(model, tmp_path):
    out = zoo.permuted_neurons(model, tmp_path / "carded")
    zoo.write_card(out, base_model="acme/ancestor", tags=["merge"])
    assert open_checkpoint(str(out)).card == {
        "license": "apache-2.0",
        "base_model": "acme/ancestor",
        "tags": ["merge"],
    }
    zoo.write_card(out)
    assert open_checkpoint(str(out)).card == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("guise", "moved"),
    [(zoo.permuted_neurons, True), (zoo.permuted_hidden, True), (zoo.sharded, False), (zoo.shuffled_layout, False),
     (zoo.memory_names, False), (zoo.without_prefix, False), (zoo.with_prefix, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
@pytest.mark.parametrize("name", ["A-light-1", "CLIP-1"])
def test_a_guise_leaves_the_function_as_it_is(members, tmp_path, guise, moved, name):
    out = guise(members[name].folder, tmp_path / "out")
    before, after = said(members[name].folder), zoo.outputs(out)
    if moved:  # sums in another order
        assert torch.allclose(before, after, atol=1e-5)
    else:
        assert torch.equal(before, after)
    assert open_checkpoint(str(out)).parameters == open_checkpoint(str(members[name].folder)).parameters


@pytest.mark.parametrize(
    "moved",
    [lambda folder, out: zoo.permuted_heads(folder, out, [0, 2, 3, 1]), lambda f, out: zoo.some_neurons(f, out, 0.5)],
)
def test_heads_and_some_neurons_leave_the_function_as_it_is(model, tmp_path, moved):
    out = moved(model, tmp_path / "out")
    assert torch.allclose(zoo.outputs(model), zoo.outputs(out), atol=1e-5)
    assert not all(torch.equal(each, weights(model)[name]) for name, each in weights(out).items())


def test_the_guises_are_what_they_say(model, tmp_path):
    here = weights(model)
    neurons = weights(zoo.permuted_neurons(model, tmp_path / "one", layers=2))
    changed = {name for name in here if not torch.equal(here[name], neurons[name])}
    layer = "vit.encoder.layer.2."
    assert changed == {
        f"{layer}intermediate.dense.weight",
        f"{layer}intermediate.dense.bias",
        f"{layer}output.dense.weight",
    }
    everywhere = weights(zoo.permuted_hidden(model, tmp_path / "hidden"))
    matrices = [name for name in here if here[name].dim() > 1]
    assert not [name for name in matrices if torch.equal(here[name], everywhere[name])]

    index = json.loads((zoo.sharded(model, tmp_path / "sharded") / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert not (tmp_path / "sharded" / "model.safetensors").exists()

    def offsets(folder):
        tensors = open_checkpoint(str(folder)).tensors
        return sorted(tensors, key=lambda name: tensors[name].offset)

    assert offsets(zoo.shuffled_layout(model, tmp_path / "shuffled")) != offsets(model)
    memory = weights(zoo.memory_names(model, tmp_path / "memory"))
    assert "vit.layers.0.attention.q_proj.weight" in memory
    assert "embeddings.cls_token" in weights(zoo.without_prefix(model, tmp_path / "without"))
    assert "vit.vit.embeddings.cls_token" in weights(zoo.with_prefix(model, tmp_path / "with"))
    assert {len(each) for each in (here, everywhere, memory)} == {len(here)}
    with pytest.raises(AssertionError, match="no layer 9"):
        zoo.permuted_neurons(model, tmp_path / "none", layers=9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_nearly_the_same_function(model, tmp_path, dtype):
    out = zoo.other_dtype(model, tmp_path / "out", dtype)
    assert open_checkpoint(str(out)).dtypes == ({"bfloat16": "BF16", "float16": "F16"}[dtype],)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert torch.allclose(zoo.outputs(model), zoo.outputs(out), atol=0.1)


def test_labels_move_with_their_rows(model, tmp_path):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    out = zoo.permuted_labels(model, tmp_path / "out", order)
    assert torch.allclose(zoo.outputs(model)[:, order], zoo.outputs(out), atol=1e-6)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    assert new["id2label"]["0"] == old["id2label"]["3"] == "three"
    assert new["label2id"]["three"] == 0


def test_a_body_alone_is_the_same_body(members, model, tmp_path):
    out = zoo.body_only(model, tmp_path / "vit")
    assert set(weights(out)) == {name.removeprefix("vit.") for name in weights(model) if name.startswith("vit.")}
    pixels = torch.rand(2, 1, 8, 8)
    with zoo.quiet_and_alone(), torch.no_grad():
        whole, alone = (ViTModel.from_pretrained(folder, add_pooling_layer=False) for folder in (model, out))
        assert torch.equal(whole(pixels).last_hidden_state, alone(pixels).last_hidden_state)


def test_the_whole_clip_has_more_than_its_vision_tower(members, tmp_path):
    """Every tensor of the tower is in the ancestor, which has a text model beside it."""
    ancestor, tuned = members["CLIP"].folder, members["CLIP-1"].folder
    tower = zoo.body_only(tuned, tmp_path / "tower")
    assert set(weights(tower)) < set(weights(ancestor))
    assert set(weights(tuned)) - set(weights(ancestor)) == {"classifier.weight", "classifier.bias"}
    pixels = torch.rand(2, 1, 8, 8)
    with zoo.quiet_and_alone(), torch.no_grad():
        whole, alone = (CLIPVisionModel.from_pretrained(folder) for folder in (tuned, tower))
        assert torch.equal(whole(pixels).last_hidden_state, alone(pixels).last_hidden_state)
        assert CLIPModel.from_pretrained(ancestor).config.text_config.vocab_size == 64
