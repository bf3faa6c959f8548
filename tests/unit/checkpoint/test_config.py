"""Architecture: what the library is said to do with names is what it does when it loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_soup.checkpoint import (
    Correspondence,
    correspondence,
    is_quantised,
    label_names,
    label_order,
    labels_differ,
    model_class,
    num_labels,
    output_dtype_config,
    parameters,
    read_config,
    same_architecture,
)
from hf_soup.checkpoint.parameters import head_names
from hf_soup.errors import IncompatibleError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SEEING = {**SMALL, "image_size": 8, "patch_size": 2}
READING = {**SMALL, "vocab_size": 50, "max_position_embeddings": 32}
GROUPED = {**READING, "num_key_value_heads": 2}

Files = tuple[dict[str, Any], dict[str, torch.Tensor]]


def _vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SEEING, num_labels=3))


def _bert(cls: str = "BertForSequenceClassification") -> Any:
    return getattr(transformers, cls)(transformers.BertConfig(**READING))


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=50)
    return transformers.DistilBertForSequenceClassification(config)


def _mixtral(experts: int = 12) -> Any:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=experts)
    return transformers.MixtralForCausalLM(config)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))


def _llama(tied: bool = True) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=tied))


def _t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=False))


def _clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=READING, vision_config=SEEING))


def _clip_vision() -> Any:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SEEING))


MODELS = {
    "vit": _vit,
    "bert": _bert,
    "bert-masked": lambda: _bert("BertForMaskedLM"),
    "distilbert": _distilbert,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "llama-tied": _llama,
    "llama": lambda: _llama(tied=False),
    "t5": _t5,
    "clip": _clip,
    "clip-vision": _clip_vision,
}


def _saved(model: Any, folder: Path) -> Files:
    """Config and tensors as the library writes them."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _read(files: Files, name: str = "acme/a") -> Correspondence:
    config, tensors = files
    return correspondence(config, {disk: tuple(tensor.shape) for disk, tensor in tensors.items()}, name)


def _assert_true(files: Files, folder: Path) -> Correspondence:
    """Load really, every tensor filled with a number of its own, and look where each number arrived."""
    config, tensors = files
    read = _read(files)
    numbers = {disk: number + 1.0 for number, disk in enumerate(tensors)}
    filled = {disk: torch.full(tensor.shape, numbers[disk]) for disk, tensor in tensors.items()}
    folder.mkdir(exist_ok=True)
    save_file(filled, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    cls = model_class(read_config(config, "acme/a"))
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    state = model.state_dict()
    arrived: dict[str, set[str]] = {}
    for disk, key in read.parameters.items():
        target, _, piece = key.partition("[")
        inside = state[target]
        if piece:
            # Stacked: the piece's number says which of the first dimension it is in, nobody else's is there.
            assert numbers[disk] in inside[int(piece.rstrip("]").rpartition("#")[2])].unique().tolist()
        else:
            assert inside.unique().tolist() == [numbers[disk]], (disk, key)
        arrived.setdefault(target, set()).add(disk)
    by_number = {number: disk for disk, number in numbers.items()}
    for name, tensor in state.items():
        values = set(tensor.unique().tolist()) if tensor.is_floating_point() else set()
        if arrived.get(name):
            assert {by_number[value] for value in values} == arrived[name]
    ignored_here = {numbers[disk] for disk in read.ignored}
    assert not any(ignored_here & set(tensor.unique().tolist()) for tensor in state.values())
    assert set(read.missing) == set(info["missing_keys"])
    return read


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_said_to_go_where_the_library_puts_it(name: str, tmp_path: Path) -> None:
    files = _saved(MODELS[name](), tmp_path / "saved")
    read = _assert_true(files, tmp_path / "filled")
    assert set(read.parameters) == set(files[1])
    assert len(set(read.parameters.values())) == len(files[1])
    assert (read.ignored, read.missing, read.mismatched) == ((), (), ())


def test_names_in_memory_and_names_on_disk_correspond(tmp_path: Path) -> None:
    config, tensors = _saved(_vit(), tmp_path)
    memory = {name: tensor.contiguous() for name, tensor in _vit().state_dict().items()}
    assert memory.keys() != tensors.keys()
    ours, theirs = _read((config, tensors)), _assert_true((config, memory), tmp_path / "memory")
    assert set(ours.parameters.values()) == set(theirs.parameters.values()) == set(memory)
    assert ours.parameters["vit.encoder.layer.0.attention.attention.query.weight"] == (
        "vit.layers.0.attention.q_proj.weight"
    )


def test_an_old_bert_has_gamma_beta_and_position_ids(tmp_path: Path) -> None:
    config, tensors = _saved(_bert(), tmp_path / "new")
    old = {
        re.sub(r"LayerNorm\.(weight|bias)", lambda m: f"LayerNorm.{'gamma' if m[1] == 'weight' else 'beta'}", name): (
            tensor
        )
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(32.0)[None]
    read = _assert_true((config, old), tmp_path / "old")
    assert read.ignored == ("bert.embeddings.position_ids",)
    assert set(read.parameters.values()) == set(_read((config, tensors)).parameters.values())


def test_the_second_name_of_one_parameter_is_ignored(tmp_path: Path) -> None:
    config, tensors = _saved(_bert(), tmp_path / "one")
    both = {**tensors, "bert.embeddings.LayerNorm.gamma": torch.ones(32)}
    read = _assert_true((config, both), tmp_path / "two")
    assert read.ignored == ("bert.embeddings.LayerNorm.weight",)
    assert read.parameters["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"


def test_a_base_checkpoint_goes_into_a_classifier_and_back(tmp_path: Path) -> None:
    whole_config, whole = _saved(_bert(), tmp_path / "whole")
    base_config, base = _saved(_bert("BertModel"), tmp_path / "base")
    assert not set(whole) & set(base)

    there = _assert_true((whole_config, base), tmp_path / "there")
    assert there.missing == ("classifier.weight", "classifier.bias")
    assert set(there.parameters) == set(base)
    back = _assert_true((base_config, whole), tmp_path / "back")
    assert set(back.ignored) == {"classifier.weight", "classifier.bias"}
    assert set(back.parameters.values()) == set(base)


def test_the_ancestor_of_a_vision_tower_is_a_whole_clip(tmp_path: Path) -> None:
    config, tower = _saved(_clip_vision(), tmp_path / "tower")
    _, whole = _saved(_clip(), tmp_path / "clip")
    published = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
    read = _assert_true((config, whole), tmp_path / "read")
    assert set(read.parameters.values()) == set(_read((config, published)).parameters.values())
    assert set(read.parameters.values()) == set(_read((config, tower)).parameters.values())
    assert all(not name.startswith("vision_model.") for name in read.ignored)
    assert "logit_scale" in read.ignored
    assert read.missing == ()


def test_stacked_experts_are_told_apart_in_the_order_of_numbers(tmp_path: Path) -> None:
    files = _saved(_mixtral(), tmp_path)
    read = _read(files)
    w1, w3 = (read.parameters[f"model.layers.0.block_sparse_moe.experts.10.{w}.weight"] for w in ("w1", "w3"))
    assert w1.startswith("model.layers.0.mlp.experts.gate_up_proj[")
    assert w1.endswith("#10]")
    assert w1 != w3
    # A checkpoint that has them stacked already has the same model, but none of its tensors corresponds.
    stacked = {name: tensor.contiguous() for name, tensor in _mixtral().state_dict().items()}
    assert not set(_read((files[0], stacked)).parameters.values()) & {w1, w3}


def test_other_prefixes_are_unexpected(tmp_path: Path) -> None:
    config, tensors = _saved(_vit(), tmp_path)
    read = _read((config, {f"module.{name}": tensor for name, tensor in tensors.items()}))
    assert read.parameters == {}
    assert len(read.ignored) == len(tensors)
    assert len(read.missing) == len(tensors)


def test_a_tied_head_is_not_missing_and_an_untied_one_is(tmp_path: Path) -> None:
    tied_config, tensors = _saved(_llama(), tmp_path / "tied")
    assert "lm_head.weight" not in tensors
    assert _read((tied_config, tensors)).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    untied = _read(({**tied_config, "tie_word_embeddings": False}, tensors))
    assert (untied.missing, untied.tied) == (("lm_head.weight",), {})
    swapped = {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}
    assert _assert_true((tied_config, swapped), tmp_path / "swapped").missing == ()


def test_a_config_that_lies_about_shapes_is_found_out(tmp_path: Path) -> None:
    config, tensors = _saved(_vit(), tmp_path)
    labels = {str(number): f"class {number}" for number in range(5)}
    lying = {**config, "id2label": labels, "label2id": {name: int(key) for key, name in labels.items()}}
    assert _read((lying, tensors)).mismatched == (
        ("classifier.bias", (3,), (5,)),
        ("classifier.weight", (3, 32), (5, 32)),
    )
    deeper = _read(({**config, "num_hidden_layers": 3}, tensors))
    assert deeper.missing
    assert all(name.startswith("vit.layers.2.") for name in deeper.missing)
    query = "vit.encoder.layer.0.attention.attention.query.weight"
    assert (query, (32, 32), (64, 64)) in _read(({**config, "hidden_size": 64}, tensors)).mismatched


def test_a_missing_expert_is_a_mismatch_and_unequal_experts_are_refused(tmp_path: Path) -> None:
    config, tensors = _saved(_mixtral(4), tmp_path)
    fewer = {name: tensor for name, tensor in tensors.items() if ".experts.3.w2." not in name}
    assert ("model.layers.0.mlp.experts.down_proj", (3, 32, 48), (4, 32, 48)) in _read((config, fewer)).mismatched
    odd = {**tensors, "model.layers.0.block_sparse_moe.experts.1.w2.weight": torch.zeros(32, 7)}
    with pytest.raises(IncompatibleError, match=r"acme/a that make up .*down_proj(.|\n)*\(32, 7\)"):
        _read((config, odd))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", {"classifier.weight", "classifier.bias"}),
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("distilbert", {"classifier.weight", "classifier.bias", "pre_classifier.weight", "pre_classifier.bias"}),
        ("llama", {"lm_head.weight"}),
        ("llama-tied", set()),
        ("clip", set()),
        ("clip-vision", set()),
    ],
)
def test_the_head_is_what_lies_outside_the_base_model(name: str, expected: set[str], tmp_path: Path) -> None:
    config, tensors = _saved(MODELS[name](), tmp_path)
    assert head_names(config, tensors) == expected


def test_the_body_of_a_t5_is_what_its_base_class_has(tmp_path: Path) -> None:
    config, tensors = _saved(_t5(), tmp_path)
    assert head_names(config, tensors) == set()
    assert head_names(config, [*tensors, "lm_head.weight", "nowhere.weight"]) == {"lm_head.weight"}


def test_a_base_checkpoint_has_no_head(tmp_path: Path) -> None:
    config, base = _saved(_bert("BertModel"), tmp_path)
    assert head_names(config, base) == set()
    assert head_names({**config, "architectures": ["BertForSequenceClassification"]}, base) == set()


VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **SEEING}


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ([], "The config of acme/a is no JSON object but list"),
        ({}, "does not say what model it is"),
        ({"model_type": 3}, "does not say what model it is: its 'model_type' is 3"),
        ({"model_type": "soupnet"}, "acme/a is a 'soupnet', which this transformers does not know."),
        ({"model_type": "soupnet", "auto_map": {"AutoModel": "m.M"}}, r"brings its own code(.|\n)*never run"),
        ({**VIT, "num_hidden_layers": 10**9}, "acme/a asks for num_hidden_layers = 1,000,000,000"),
        ({"model_type": "clip", "text_config": {"num_hidden_layers": 10**9}}, "asks for num_hidden_layers"),
        ({**VIT, "num_labels": 10**9}, "acme/a asks for num_labels"),
        ({**VIT, "hidden_size": "wide"}, r"cannot read the config of acme/a \(vit\)"),
        ({**VIT, "id2label": {"x": "y"}}, "cannot read the config of acme/a"),
        ({**VIT, "patch_size": 0}, "cannot make a ViTForImageClassification of the config of acme/a"),
        ({**VIT, "architectures": ["pipeline"]}, "acme/a is a 'pipeline', which is no model class"),
        ({**VIT, "architectures": ["ViTForSoup"]}, "acme/a is a 'ViTForSoup', which is no model class"),
        ({**VIT, "architectures": ["BertModel"]}, "'BertModel' is no class for a 'vit'"),
        ({**VIT, "architectures": ["PreTrainedModel"]}, "acme/a is a 'PreTrainedModel', which is no model class"),
        ({**VIT, "architectures": ["ViTPreTrainedModel"]}, "acme/a is a 'ViTPreTrainedModel', which is no model class"),
        ({**VIT, "architectures": True}, "does not say which class it is for: its 'architectures' is True"),
        ({**VIT, "architectures": 7}, "its 'architectures' is 7"),
        ({**VIT, "architectures": {"a": "ViTModel"}}, "does not say which class it is for"),
        ({**VIT, "architectures": [["ViTModel"]]}, "does not say which class it is for"),
        ({**VIT, "id2label": dict.fromkeys(map(str, range(1_000_001)), "a")}, "acme/a asks for id2label = 1,000,001"),
        # Thousands of layers beside one tensor, also of parts within parts.
        ({**VIT, "num_hidden_layers": 4096}, "it asks for more than 2,020 parts, and its files hold 1 tensors"),
        ({"model_type": "swin", "depths": [1024] * 4}, "it asks for more than 2,020 parts"),
        ({**VIT, "quantization_config": {"quant_method": "gptq"}}, r"acme/a is quantised \(gptq\)"),
    ],
)
def test_what_is_no_config_is_an_error_that_says_whose(config: Any, error: str) -> None:
    with pytest.raises(IncompatibleError, match=error):
        correspondence(config, {"x": (1,)}, "acme/a") if isinstance(config, dict) else read_config(config, "acme/a")


def test_a_model_may_have_the_parts_that_its_files_have_tensors_for() -> None:
    config = {**VIT, "num_hidden_layers": 100}
    tensors = {f"vit.encoder.layer.{n}.output.dense.{part}": (1,) for n in range(100) for part in ("weight", "bias")}
    with pytest.raises(IncompatibleError, match="it asks for more than"):
        head_names(config, list(tensors)[:20], "acme/a")
    assert head_names(config, tensors, "acme/a") == set()
    transformers.ViTModel(transformers.ViTConfig(**SEEING | {"num_hidden_layers": 100}))  # nothing counts any more


def test_many_labels_in_another_order() -> None:
    """Minutes, where each label is looked for in a list."""
    labels = [str(number) for number in range(100_000)]
    assert label_order(labels, labels[::-1]) == list(range(100_000))[::-1]
    assert label_order(["a", "b"], ["b", "c"]) is None
    assert label_order(["a", "a"], ["a", "a"]) is None


def test_impossible_shapes_are_an_error() -> None:
    with pytest.raises(IncompatibleError, match="cannot convert the tensors of acme/a"):
        correspondence(VIT, {"classifier.weight": (2**62, 2**62)}, "acme/a")


def test_nothing_that_a_config_names_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    loading = transformers.PreTrainedModel._check_and_adjust_attn_implementation

    def watch(self: Any, implementation: Any, **rest: Any) -> Any:
        asked.append(implementation)
        return loading(self, implementation, **rest)

    monkeypatch.setattr(transformers.PreTrainedModel, "_check_and_adjust_attn_implementation", watch)
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        correspondence({**VIT, key: "evil/kernel"}, {}, "acme/a")
        clip = {"model_type": "clip", "vision_config": {**SEEING, key: "evil/kernel"}, "text_config": READING}
        correspondence(clip, {}, "acme/a")
    assert set(asked) == {"eager"}


def test_a_known_type_with_code_of_its_own_is_read_by_the_library() -> None:
    config = {**VIT, "auto_map": {"AutoModel": "evil--evil.Model"}}
    assert model_class(read_config(config, "acme/a")) is transformers.ViTForImageClassification


def test_a_type_may_borrow_the_classes_of_another() -> None:
    config = {"model_type": "gpt-sw3", "architectures": ["GPT2LMHeadModel"]}
    assert model_class(read_config(config, "acme/a")) is transformers.GPT2LMHeadModel


def test_large_numbers_that_real_configs_have_are_taken() -> None:
    read_config({"model_type": "doge", "num_experts": 16384}, "acme/a")
    read_config({"model_type": "lxmert", "num_qa_labels": 9500}, "acme/a")


def test_without_a_named_class_it_is_the_body() -> None:
    assert model_class(read_config({"model_type": "vit"}, "acme/a")) is transformers.ViTModel


def test_a_library_that_has_moved_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    with pytest.raises(IncompatibleError, match="Cannot tell which tensors correspond"):
        correspondence(VIT, {"classifier.bias": (2,)}, "acme/a")


def test_a_renaming_that_disagrees_with_the_loading_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rename = parameters._pair

    def other(*given: Any) -> Any:
        return {disk: pair for disk, pair in rename(*given).items() if disk != "classifier.bias"}

    monkeypatch.setattr(parameters, "_pair", other)
    with pytest.raises(IncompatibleError, match="its renaming and its loading disagree"):
        correspondence(VIT, {"classifier.bias": (2,)}, "acme/a")


def test_what_comes_and_goes_between_versions_is_no_difference() -> None:
    old = {
        **{**VIT, "torch_dtype": "float32", "transformers_version": "4.11.0", "_name_or_path": "google/vit"},
        **{
            "gradient_checkpointing": False,
            "problem_type": "single_label_classification",
            "hidden_dropout_prob": 0.1,
        },
        **{
            "id2label": {"0": "a", "1": "b"},
            "initializer_range": 0.05,
            "output_attentions": False,
            "use_cache": True,
        },
    }
    new = {**VIT, "dtype": "bfloat16", "encoder_stride": 2, "layer_norm_eps": 1e-12, "image_size": [8, 8]}
    assert same_architecture(old, new) == []


def differences(*configs: dict[str, Any], body_only: bool = False) -> list[str]:
    return [str(each) for each in same_architecture(*configs, body_only=body_only)]


def test_what_changes_the_model_is_a_difference() -> None:
    changed = {
        "hidden_size": 64,
        "layer_norm_eps": 1e-5,
        "hidden_act": "relu",
        "image_size": 16,
        "num_channels": 1,
    }
    assert differences(VIT, {**VIT, **changed}) == [
        "hidden_act: gelu against relu",
        "hidden_size: 32 against 64",
        "image_size: 8 against 16",
        "layer_norm_eps: 1e-12 against 1e-05",
        "num_channels: 3 against 1",
        "pooler_output_size: 32 against 64",
    ]
    assert differences(VIT, {**VIT, "architectures": ["ViTModel"]}) == [
        "class: ViTForImageClassification against ViTModel"
    ]
    bert = {"model_type": "bert", "architectures": ["BertModel"]}
    assert differences(VIT, bert)[-1] == "model_type: vit against bert"
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **GROUPED, "rope_theta": 10000.0}
    assert differences(llama, {**llama, "eos_token_id": [1, 2], "pad_token_id": 0}) == []
    assert "rope_parameters" in differences(llama, {**llama, "rope_theta": 5e5})[0]
    reader = {**bert, "architectures": ["BertForSequenceClassification"]}
    assert differences(reader, {**reader, "pad_token_id": 1}) == ["pad_token_id: 0 against 1"]


def test_an_ancestor_is_compared_by_the_part_that_it_shares() -> None:
    tower = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], **SEEING}
    clip = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": SEEING, "text_config": READING}
    assert differences(tower, clip, body_only=True) == []
    other = {**clip, "vision_config": {**SEEING, "hidden_act": "gelu"}}
    assert differences(tower, other, body_only=True) == ["hidden_act: quick_gelu against gelu"]
    assert differences(clip, other) == ["vision_config.hidden_act: quick_gelu against gelu"]


def _labels(*names: object) -> dict[str, Any]:
    return {"id2label": {str(number): name for number, name in enumerate(names)}}


def test_labels_are_read_in_the_order_of_their_numbers() -> None:
    names = [f"n{number}" for number in range(11)]
    shuffled = {"id2label": dict(sorted(_labels(*names)["id2label"].items(), reverse=True))}
    assert label_names(shuffled) == tuple(names)
    assert label_names({"id2label": {0: "a", 1: "b"}}) == ("a", "b")
    assert label_names(_labels("LABEL_0", "label_1")) is None
    assert label_names({"id2labl": {"0": "a"}}) is None
    assert [num_labels(c) for c in (_labels("a", "b", "c"), {"num_labels": 4}, {"label2id": {"a": "0"}}, {})] == [
        *(3, 4, 1),
        None,
    ]


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        ({"0": "a", "2": "c"}, "2 names up to 2, but none for 1"),
        ({"1": "a"}, "none for 0"),
        ({"0": "a", "00": "b"}, "has 0 twice"),
        ({"a": "0"}, "has the key a, no number"),
        ({"9" * 5000: "a"}, "no number"),
        ({"0": None}, "names 0 None, no text"),
        (["a"], "is no map"),
    ],
)
def test_damaged_labels_are_an_error(labels: Any, error: str) -> None:
    with pytest.raises(IncompatibleError, match=f"'id2label' of acme/a.*{error}"):
        label_names({"id2label": labels}, "acme/a")


def test_labels_contradict_by_name_and_order_only() -> None:
    assert labels_differ(_labels("sadness", "joy"), _labels("Sadness ", "JOY")) == ""
    assert labels_differ(_labels("sadness", "joy"), {}) == ""
    assert labels_differ(_labels("a", "b"), _labels("LABEL_0", "LABEL_1")) == ""
    assert labels_differ(_labels("a", "b"), _labels("a", "c")) == "other labels: 1 is b against c"
    assert labels_differ(_labels("a", "b"), _labels("a", "b", "c")) == "2 labels against 3"
    rotated = labels_differ(_labels("a", "b", "c"), _labels("b", "C", "a"))
    assert rotated == "the same 3 labels stand in another order: 0 a is 2, 1 b is 0, 2 c is 1"


def test_a_quantised_part_is_found() -> None:
    assert is_quantised(VIT) is None
    assert is_quantised({**VIT, "quantization_config": {"bits": 4}}) == "unknown method"
    assert is_quantised({"text_config": {"quantization_config": {"quant_method": "awq"}}}) == "awq"


def test_the_written_dtype_replaces_every_other() -> None:
    config = {
        **{"model_type": "clip", "torch_dtype": "float32", "dtype": "float32"},
        **{"text_config": {"torch_dtype": "float16", "x": 1}, "vision_config": {"y": {"dtype": "kept"}}},
    }
    written = output_dtype_config(config, "bfloat16")
    assert written == {
        "model_type": "clip",
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "x": 1},
        "vision_config": {"y": {"dtype": "kept"}},
    }
    assert config["torch_dtype"] == "float32"
    assert read_config(written, "acme/a").dtype is torch.bfloat16


def test_the_library_is_quiet_and_stays_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = _saved(_vit(), tmp_path)
    before = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    capfd.readouterr()
    files[1]["unexpected"] = torch.zeros(1)
    _read(files)
    assert capfd.readouterr() == ("", "")
    after = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    assert after == before
    assert np.isfinite(after[0])
