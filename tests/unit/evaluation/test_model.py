"""One model whose weights change in place gives, bit for bit, what a fresh one gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from plans import config_of
from safetensors.torch import load_file
from torch import Tensor

from hf_soup.errors import ScoringError
from hf_soup.evaluation.model import ReusableModel, answers, build_model


def logits_of(given: Any, _: Any) -> Any:
    return given.logits.numpy()


BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
TEXT = {**BODY, "vocab_size": 30, "pad_token_id": 0}
PARTS = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
}  # fmt: skip
#: Model class → the settings of its config, and whether its weights can be changed in place.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "ViTForImageClassification": ({**BODY, "image_size": 8, "patch_size": 2, "num_channels": 1}, True),
    "ResNetForImageClassification": (
        {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
        True,  # its running means are buffers that are saved
    ),
    "BertForSequenceClassification": (TEXT, True),
    "LlamaForSequenceClassification": (TEXT, True),  # its angles are buffers that are not saved
    "MixtralForSequenceClassification": ({**TEXT, "num_key_value_heads": 1, "num_local_experts": 4}, False),
    "BartForSequenceClassification": (
        {**PARTS, "vocab_size": 30, "d_model": 8, "max_position_embeddings": 16, "num_labels": 3, "eos_token_id": 2},
        True,  # three tables of tokens that are one
    ),
}


def candidates(name: str, folder: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Four models of one config, as their tensors lie on the disk."""
    model_class = getattr(transformers, name)
    config = model_class.config_class(**KINDS[name][0], architectures=[name])
    found = []
    for number in range(4):
        torch.manual_seed(number)
        model = model_class(config)
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                if value.is_floating_point():
                    value.add_(0.1 * torch.rand_like(value))  # norms and biases tell models apart too
        model.to(dtype).save_pretrained(folder)
        found.append({key: value.clone() for key, value in load_file(folder / "model.safetensors").items()})
    return found


def answer(model: Any) -> Tensor:
    model.eval()
    with torch.inference_mode():
        if model.main_input_name == "pixel_values":
            pixels = torch.linspace(-1, 1, 5 * 64).reshape(5, 1, 8, 8)
            return model(pixel_values=pixels.to(model.dtype)).logits.clone()
        tokens = torch.arange(5 * 7).reshape(5, 7) % 27 + 3
        tokens[:, -1] = 2
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_weights_changed_in_place_answer_as_a_fresh_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    task = "image-classification" if "Image" in name else "text-classification"
    models = candidates(name, tmp_path, dtype)
    resident = ReusableModel(config_of(tmp_path), task, dtype)
    ids, answers = [], []
    for number in (0, 1, 2, 1, 3, 0):
        copied = {key: value.clone() for key, value in models[number].items()}
        fresh = build_model(config_of(tmp_path), copied, task, dtype)
        model = resident.load({key: value.clone() for key, value in models[number].items()})
        ids.append(id(model))
        answers.append(answer(model))
        assert torch.equal(answers[-1], answer(fresh))
        expected = fresh.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[3])
    assert (len(set(ids)) == 1) is KINDS[name][1]


def test_a_tied_tensor_that_is_stored_twice_is_looked_at_again(tmp_path: Path) -> None:
    """Equal copies are tied by the library and different ones are not, so such a model is built each time."""
    name = "BartForSequenceClassification"
    first, second = candidates(name, tmp_path, torch.float32)[:2]
    for tensors in (first, second):
        tensors["model.decoder.embed_tokens.weight"] = tensors["model.shared.weight"].clone()
    second["model.decoder.embed_tokens.weight"] += 1
    resident = ReusableModel(config_of(tmp_path), "text-classification", torch.float32)
    for tensors in (first, second, first):
        fresh = build_model(config_of(tmp_path), dict(tensors), "text-classification", torch.float32)
        assert torch.equal(answer(resident.load(tensors)), answer(fresh))


def test_what_a_run_changed_is_not_handed_on(tmp_path: Path) -> None:
    """Angles that grow with the longest text so far would give the next model other numbers than a fresh one."""
    name = "LlamaForSequenceClassification"
    settings = {**TEXT, "max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}
    settings["rope_parameters"]["factor"] = 2.0
    config = transformers.LlamaConfig(**settings, architectures=[name])
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    resident = ReusableModel(config_of(tmp_path), "text-classification", torch.float32)
    before = answer(resident.load({key: value.clone() for key, value in tensors.items()}))
    model = resident.load({key: value.clone() for key, value in tensors.items()})
    long = torch.arange(3, 17)[None]
    model(input_ids=long, attention_mask=torch.ones_like(long))
    again = resident.load({key: value.clone() for key, value in tensors.items()})
    assert again is not model
    assert torch.equal(answer(again), before)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "MixtralForSequenceClassification"])
def test_the_number_of_threads_does_not_show(name: str, tmp_path: Path) -> None:
    """Each batch is worked on by one thread; of 37 rows in batches of 7, all are answered once."""
    image = "Image" in name
    tensors = candidates(name, tmp_path, torch.float32)[0]
    task = "image-classification" if image else "text-classification"
    model = build_model(config_of(tmp_path), tensors, task, torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = (
        {"pixel_values": torch.randn(37, 1, 8, 8, generator=generator)}
        if image
        else {"input_ids": torch.randint(3, 30, (37, 11), generator=generator)}
    )
    found: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            done: list[int] = []
            cut = np.split(np.arange(37), range(7, 37, 7))
            batch_of = lambda rows: {key: value[rows] for key, value in inputs.items()}  # noqa: E731
            parts = answers(model, batch_of, cut, "cpu", done.append, logits_of)
            assert torch.get_num_threads() == threads
            assert sum(done) == 37
            found.append(np.concatenate(parts))
    finally:
        torch.set_num_threads(before)
    assert np.isfinite(found[0]).all()
    assert all(np.array_equal(each, found[0]) for each in found)


def test_a_model_that_fails_ends_all_threads(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    tensors = candidates(name, tmp_path, torch.float32)[0]
    model = build_model(config_of(tmp_path), tensors, "text-classification", torch.float32)
    taken = []

    def batch_of(rows: Any) -> dict[str, Tensor]:
        taken.append(int(rows[0]))
        return {"input_ids": torch.tensor([[30 if rows[0] > 3 else 1]])}  # there are 30 tokens

    with pytest.raises(ScoringError, match=r"^\(\{'input_ids': \(1, 1\)\}\): .*index out of range"):
        answers(model, batch_of, list(np.arange(1000)[:, None]), "cpu", lambda _: None, logits_of)
    assert len(taken) < 20


def test_a_model_that_a_short_text_changed_is_built_anew(tmp_path: Path) -> None:
    """BigBird has full attention for good after a text that is shorter than some of its blocks."""
    name = "BigBirdForSequenceClassification"
    small = {"block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 64, "initializer_range": 0.5}
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(**TEXT, **small, attention_type="block_sparse", architectures=[name])
    transformers.BigBirdForSequenceClassification(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    resident = ReusableModel(config_of(tmp_path), "text-classification", torch.float32)
    found = []
    for length in (48, 48, 6, 48):
        model = resident.load({key: value.clone() for key, value in tensors.items()})
        tokens = torch.arange(length)[None] % 27 + 3
        with torch.inference_mode():
            found.append((id(model), model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits))
    (first, long), (second, same), _, (_, again) = found
    assert first == second  # as long as nothing changed
    assert torch.equal(long, same)
    assert torch.equal(long, again)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"architectures": True}, "Cannot read the model's config: The config of the model does not say which class"),
        ({"num_hidden_layers": 10**9}, "The config of the model asks for num_hidden_layers"),
        ({"num_hidden_layers": 4096}, "it asks for more than 2,020 parts, and its files hold 1 tensors"),
    ],
)  # fmt: skip
def test_a_config_of_a_model_that_could_not_be_made_in_hours(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    small = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({**small, "vocab_size": 50, **more}))
    with pytest.raises(ScoringError, match=said):
        build_model(config_of(tmp_path), {"classifier.bias": torch.zeros(2)}, "text-classification", torch.float32)
