"""LoRA adapters as ingredients, as peft trains and saves them: exact sums with their base, the whole way."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from lora import KINDS, MARKS, PAGES, adapted, gpt2, summed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    ByT5Tokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_soup import Recipe, ResolveError, Soup, SoupError, check, cook
from hf_soup.checkpoint import open_checkpoint, peft_rules
from hf_soup.local_hub import LocalHub
from hf_soup.merging import low_rank

Cli = Callable[..., Any]

pytestmark = MARKS


def alone(adapter: Path | dict[str, str], base: Path) -> Recipe:
    """An adapter and nothing of its base: what one gives by itself."""
    return Recipe(
        ingredients=[adapter if isinstance(adapter, dict) else str(adapter), {"model": str(base), "weight": 0}]
    )


def written(soup: Soup) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in soup.load().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_gives_itself_back(language_family: Path, tmp_path: Path, kind: str) -> None:
    """The base and the product in float64, rounded once; and what peft's model answers."""
    base = language_family / "base"
    adapter = adapted(base, tmp_path / "adapter", 1, **KINDS[kind])
    soup = cook(alone(adapter, base), "soup")
    expected = summed(base, adapter)
    changed = 0
    for name, each in written(soup).items():
        assert torch.equal(each, expected[name].float()), name
        changed += not torch.equal(each, AutoModelForCausalLM.from_pretrained(base).get_parameter(name))
    assert changed
    tokens = torch.tensor(ByT5Tokenizer()(PAGES[:4], padding=True).input_ids)[:, :64]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(soup.load().eval()(tokens).logits, peft(tokens).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_are_stored_the_other_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the product takes some columns of a factor."""
    monkeypatch.setattr(low_rank, "_BLOCK_ELEMENTS", 300)
    base = gpt2(tmp_path / "base")
    adapter = adapted(
        base, tmp_path / "adapter", 1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="lora_only"
    )
    soup = written(cook(alone(adapter, base), "soup"))
    for name, each in summed(base, adapter).items():
        assert torch.equal(soup[name], each.float()), name


@pytest.mark.parametrize("blocks", [300, 1 << 18])
def test_a_dora_of_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Of layers that are stored as (in, out), and of tables, it scales columns, which no single block knows."""
    monkeypatch.setattr(low_rank, "_BLOCK_ELEMENTS", blocks)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=64, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["c_attn", "c_proj", "wpe", "wte"], "use_dora": True, "fan_in_fan_out": True}
    adapter = adapted(tmp_path / "base", tmp_path / "adapter", 1, **settings)
    one = cook(Recipe(ingredients=[str(adapter)]), "one").load().eval()
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(one(tokens).logits, peft(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", [True, False])
def test_the_layers_class_says_how_it_is_stored(language_family: Path, tmp_path: Path, flag: bool) -> None:
    """Not the flag in the config, of which peft keeps the last module's; of a square matrix no shape tells."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=64, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for base, modules in ((tmp_path / "gpt2", ["c_proj", "lm_head"]), (language_family / "base", ["q_proj"])):
        adapter = adapted(base, tmp_path / f"{base.name}-adapter", 1, target_modules=modules)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "fan_in_fan_out": flag}))
        soup = cook(alone(adapter, base), f"soup-{base.name}").load().eval()
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        tokens = torch.arange(24).reshape(2, 12)
        with torch.no_grad():
            torch.testing.assert_close(soup(tokens).logits, peft(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]])
def test_one_of_two_tied_tensors_is_not_changed(language_family: Path, tmp_path: Path, modules: list[str]) -> None:
    """In peft's model the other one stays, and a file of one tensor cannot say so."""
    config = LlamaForCausalLM.from_pretrained(language_family / "base").config
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    adapter = adapted(tmp_path / "tied", tmp_path / "adapter", 1, target_modules=[*modules, "q_proj"])
    with pytest.raises(ResolveError, match=f"'.*{modules[0]}.weight', which is one tensor with "):
        check([str(adapter), str(tmp_path / "tied")])


def test_a_dora_over_two_bases(language_family: Path, adapters: Path, tmp_path: Path) -> None:
    """Its rows are scaled with those of each base: in the written soup, and in memory."""
    bases = [language_family / "base", language_family / "one"]
    recipe = Recipe(
        ingredients=[{"model": str(adapters / "third"), "base": str(base)} for base in bases], allow=["bases-differ"],
    )  # fmt: skip
    soup = cook(recipe, "soup")
    ends = [summed(base, adapters / "third") for base in bases]
    for name, each in written(soup).items():
        torch.testing.assert_close(each.double(), (ends[0][name] + ends[1][name]) / 2, rtol=2**-22, atol=1e-9)
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")}
    greedy = cook(Recipe(**{**recipe.to_dict(), "validation": looks, "select": "greedy"}), "greedy").report
    kept = [step.score for step in greedy.trace if step.kept]
    assert -next(iter(greedy.scores["soup"].values())).value == pytest.approx(kept[-1], abs=1e-6)


def test_what_is_not_finite_is_said(adapters: Path, tmp_path: Path) -> None:
    """Also of an adapter alone, as the base was finite."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name][0, 0] = math.inf
    save_file(tensors, folder / "adapter_model.safetensors")
    for models in ([folder, adapters / "second"], [folder, adapters / "third"]):
        with pytest.raises(SoupError, match=r"What the adapter local:adapter adds to 'model.layers.0.self_attn.q_proj"):
            cook([str(each) for each in models], "soup")


def test_names_in_memory_are_not_those_on_the_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=24, id2label={0: "a", 1: "b"})  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]}
    adapter = adapted(tmp_path / "base", tmp_path / "adapter", 1, kind=ViTForImageClassification, **settings)
    soup = cook(alone(adapter, tmp_path / "base"), "soup")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(soup.folder / "model.safetensors")
    pixels = torch.randn(2, 3, 8, 8)
    peft = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(tmp_path / "base"), adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(soup.load().eval()(pixels).logits, peft(pixels).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def adapters(language_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the base that the language family has, of other ranks and layers; the last one is a DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    adapted(language_family / "base", folder / "first", 1, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted(language_family / "base", folder / "second", 2, r=8, target_modules=["q_proj", "up_proj"], use_rslora=True)
    adapted(language_family / "base", folder / "third", 3, target_modules=["q_proj", "down_proj"], use_dora=True)
    return folder


def test_beside_a_full_fine_tune(language_family: Path, adapters: Path) -> None:
    """The mean of all three, rounded once; and task vectors of the adapters are their products."""
    base, models = language_family / "base", [adapters / "first", adapters / "second", language_family / "one"]
    shares = [1.0, 2.0, 0.5]
    soup = written(cook(dict(zip(map(str, models), shares, strict=True)), "soup"))
    one = LlamaForCausalLM.from_pretrained(language_family / "one")
    every = [summed(base, models[0]), summed(base, models[1]), {k: v.double() for k, v in one.named_parameters()}]
    for name, each in soup.items():
        mean = sum(share * whole[name] for share, whole in zip(shares, every, strict=True)) / 3.5
        torch.testing.assert_close(each.double(), mean, rtol=2**-23, atol=0)
    recipe = Recipe(
        ingredients=[str(each) for each in models[:2]], base_model=str(base),
        method={"name": "task_arithmetic", "scale": 0.5},
    )  # fmt: skip
    soup, start = written(cook(recipe, "arithmetic")), LlamaForCausalLM.from_pretrained(base)
    for name, each in soup.items():
        origin = start.get_parameter(name).double()
        moved = origin + 0.5 * sum(whole[name] - origin for whole in every[:2])
        torch.testing.assert_close(each.double(), moved, rtol=2**-22, atol=1e-9)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "tsv_m"])
def test_slices_and_threads_do_not_show(
    language_family: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Nor whether a candidate is made in memory; blocks that end within a slice are made once."""
    names = ("first", "third") if method == "slerp" else ("first", "second", "third")
    recipe = Recipe(
        ingredients=[str(adapters / name) for name in names], base_model=str(language_family / "base"),
        method={"name": method},
    )  # fmt: skip
    monkeypatch.setattr(low_rank, "_BLOCK_ELEMENTS", 300)
    whole = cook(recipe, "soup", threads=1).digest
    monkeypatch.setattr("hf_soup.merging.engine.SLICE_ELEMENTS", 1000)
    assert cook(recipe, "slices", threads=3).digest == whole
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")}
    scored = cook(Recipe(**{**recipe.to_dict(), "validation": looks}), "scored")
    assert scored.digest == whole


def test_in_16_bits(language_family: Path, tmp_path: Path) -> None:
    """The product is not rounded before it is added: where the sum is not at the edge between two numbers it is the
    one of float64."""
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(language_family / "base", dtype=torch.bfloat16).save_pretrained(base)
    ByT5Tokenizer().save_pretrained(base)
    adapter = adapted(base, tmp_path / "adapter", 1, **KINDS["plain"])
    soup, off = cook(alone(adapter, base), "soup"), 0
    for name, each in written(soup).items():
        assert each.dtype == torch.bfloat16
        expected = summed(base, adapter)[name]
        torch.testing.assert_close(each, expected.bfloat16(), rtol=2**-7, atol=0)
        off += int((each != expected.bfloat16()).sum())
    assert off <= 3


def test_a_run_of_adapters(language_family: Path, adapters: Path, cli: Cli) -> None:
    """Checkpoints of one run, as a Trainer leaves them; learned weights, and scores of an adapter alone."""
    for number, name in enumerate(("first", "second", "third"), 1):
        shutil.copytree(adapters / name, Path("run", f"checkpoint-{number}0"))
    done = cli("cook", "run", "-o", "last", "--select", "run_average", "--set", "last=2", "--quiet", "--json")
    assert done.code == 0, done.err
    assert done.json["digest"] == cook([str(adapters / "second"), str(adapters / "third")], "two").digest
    data = ("--data", language_family / "validation.jsonl", "--task", "causal-lm", "--quiet", "--json")
    alone = cli("score", *(adapters / name for name in ("first", "second")), *data)
    assert alone.code == 0, alone.err
    best = min(next(iter(each.values()))["value"] for each in alone.json["scores"].values())
    few = ("--set", "epochs=2", "--set", "by=ingredient", "--set", "batch_size=10")
    done = cli("cook", adapters / "first", adapters / "second", "-o", "soup", "--select", "learned", *few, *data)
    assert done.code == 0, done.err
    assert next(iter(done.json["scores"]["soup"].values()))["value"] <= best


def test_the_whole_way(
    online: LocalHub, cli: Cli, language_family: Path, adapters: Path, publish: Callable[..., str], tmp_path: Path
) -> None:
    """Check, choose, score, push, load, verify; the base is pinned with the adapters, and fetched once."""
    base, names = publish("base", language_family / "base"), []
    soup = f"{base.partition('/')[0]}/soup"
    for name in ("first", "second"):
        folder = shutil.copytree(adapters / name, tmp_path / name)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        (folder / "README.md").write_text(f"---\nbase_model: {base}\nlicense: mit\n---\n")
        names.append(publish(name, folder))
    lineage = check(names)
    assert lineage.verdict == "proven", str(lineage)
    assert lineage.ancestor is not None
    assert lineage.ancestor.model == base
    assert not [reason for reason in lineage.reasons if reason.code == "identical"]
    tests = language_family / "test.jsonl"
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")}
    recipe = Recipe(ingredients=names, select="greedy", validation=looks, test={**looks, "dataset": str(tests)})
    Path("recipe.yaml").write_text(recipe.to_yaml())
    assert cli("cook", "recipe.yaml", "-o", "soup", "--dry-run").code == 0
    done = cli("cook", "recipe.yaml", "-o", "soup", "--quiet", "--json")
    assert done.code == 0, done.err
    known = {"soup", *names}
    assert known == set(done.json["scores"])
    kept = Recipe.load(tmp_path / "soup" / "soup.yaml")
    commit = open_checkpoint(base).revision
    assert {each.base for each in kept.ingredients} == {f"{base}@{commit}"}
    pushed = cli("push", "soup", soup, "--json", "--license", "mit")
    assert pushed.code == 0, pushed.err
    assert cli("verify", soup, "--quiet").code == 0
    with pytest.MonkeyPatch.context() as patch:  # what was cooked once is cooked again without a network
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert cli("cook", *names, "-o", "offline", "--json").code == 0
    # The base goes on; what was cooked does not.
    newer = shutil.copytree(language_family / "one", tmp_path / "newer")
    publish("base", newer)
    assert cli("verify", soup, "--quiet").code == 0
    streamed = cook(Recipe(ingredients=kept.ingredients), "streamed", stream=True)
    assert streamed.digest == cook(Recipe(ingredients=kept.ingredients), "again").digest


def test_a_base_with_a_folder_of_that_name(language_family: Path, adapters: Path, tmp_path: Path) -> None:
    """Its shards may lie anywhere in it, and are not taken for the adapter's."""
    base = shutil.copytree(language_family / "base", tmp_path / "base")
    (base / "adapter").mkdir()
    (base / "model.safetensors").rename(base / "adapter" / "adapter_model.safetensors")
    stored = load_file(base / "adapter" / "adapter_model.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "adapter/adapter_model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    second = str(adapters / "second")
    moved = cook([{"model": str(adapters / "first"), "base": str(base)}, second], "moved")
    assert moved.digest == cook([str(adapters / "first"), second], "soup").digest


def test_two_revisions_of_one_base(
    online: LocalHub, language_family: Path, adapters: Path, publish: Callable[..., str], tmp_path: Path
) -> None:
    """Each adapter is added to its own, and the check says that they are two; ``base`` beside them makes it one."""
    base, names, commits = publish("base", language_family / "base"), [], []
    for name, content in (("first", "base"), ("second", "one")):
        publish("base", language_family / content)
        commits.append(open_checkpoint(base).revision)
        folder = shutil.copytree(adapters / name, tmp_path / name)
        settings = json.loads((folder / "adapter_config.json").read_text())
        pinned = {**settings, "base_model_name_or_path": base, "revision": commits[-1]}
        (folder / "adapter_config.json").write_text(json.dumps(pinned))
        names.append(publish(name, folder))
    lineage = check(names)
    (reason,) = [reason for reason in lineage.reasons if reason.code == "base-revisions"]
    assert f"acme/first of {commits[0][:7]}; acme/second of {commits[1][:7]}. Each" in reason.message
    assert lineage.verdict == "likely"
    shares = cook(names, "soup")
    ends = [
        summed(language_family / content, adapters / name) for content, name in (("base", "first"), ("one", "second"))
    ]
    for name, each in written(shares).items():
        torch.testing.assert_close(each.double(), (ends[0][name] + ends[1][name]) / 2, rtol=2**-23, atol=0)
    one = [{"model": name, "base": f"{base}@{commits[0]}"} for name in names]
    assert check(Recipe(ingredients=one)).verdict == "proven"


def test_an_adapter_keeps_the_revision_of_its_base(
    online: LocalHub, language_family: Path, adapters: Path, publish: Callable[..., str], tmp_path: Path
) -> None:
    """The recipe's `base_model` moves it to no other revision, also where its own is not there."""
    base = publish("base", language_family / "base")
    trained_on = open_checkpoint(base).revision
    names = []
    for name in ("first", "second"):
        folder = shutil.copytree(adapters / name, tmp_path / name)
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings |= {"base_model_name_or_path": base, "revision": trained_on}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        names.append(publish(name, folder))
    publish("base", language_family / "one")  # the base goes on
    newer = open_checkpoint(base).revision
    lineage = check(names, base=base)
    assert lineage.verdict == "proven", str(lineage)
    assert lineage.ancestor is not None
    assert lineage.ancestor.revision == trained_on
    for method in ("linear", "ties"):
        alone = cook(Recipe(ingredients=names, method=method), f"{method}-alone").digest
        assert cook(Recipe(ingredients=names, method=method, base_model=base), f"{method}-named").digest == alone
    cook(Recipe(ingredients=names, base_model=base, output="adapter"), "adapter")
    lineage = check(names, base=f"{base}@{newer}")
    (reason,) = [reason for reason in lineage.reasons if reason.code == "base-revisions"]
    assert f"acme/second of {trained_on[:7]}; the recipe's `base_model` of {newer[:7]}" in reason.message
    settings["revision"] = "gone"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ResolveError, match=r"second@\w+ is an adapter, and its base cannot be used: 'acme/base@gone'"):
        check([names[0], publish("second", folder)], base=base)


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "`peft_type: 'IA3'`"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights: 'pissa_niter_4'`"),
    "DoRA without lengths": ({"use_dora": True}, "is a DoRA and has no lengths of 'model.layers.0"),
    "unknown": ({"lora_of_tomorrow": {"a": 1}}, "`lora_of_tomorrow: "),
    "no expression": (
        {"alpha_pattern": {"(q_proj": 3}},
        r"`alpha_pattern: \{'\(q_proj': 3\}`.*\nIt is no regular expr",
    ),
    "peft's own expressions": ({"target_modules": "(?:q_prom){e}"}, "It is no regular expression"),
    "no list": ({"target_modules": {"q_proj": 1}}, "`target_modules: .*\nIt should be a list of names"),
    "modules without factors": ({"target_modules": ["up_proj"]}, "None of its factors is of such a module"),
    "no rank": ({"r": 0}, "`r: 0`"),
    "a rank below it": ({"r": -1}, "`r: -1`"),
    "a text as rank": ({"r": "8"}, "`r: '8'`"),
    "a pattern without rank": ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern: 0`"),
    "no number": ({"lora_alpha": "16"}, "`lora_alpha: '16'`"),
    "a huge number": ({"lora_alpha": 10**400}, "`lora_alpha: 1000000"),
    "a text": ({"use_rslora": "False"}, "`use_rslora: 'False'`"),
    "a revision": ({"revision": [1]}, r"`revision: \[1\]`"),
    "no base": ({"base_model_name_or_path": None}, "its base cannot be used: it names none"),
    "a base that is not there": ({"base_model_name_or_path": "acme/none"}, "its base cannot be used"),
}


@pytest.mark.parametrize("what", BAD)
def test_settings_that_are_not_known(adapters: Path, tmp_path: Path, what: str) -> None:
    changes, message = BAD[what]
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ResolveError, match=message):
        check([str(folder), str(adapters / "second")])


def test_tensors_that_do_not_fit(language_family: Path, adapters: Path, tmp_path: Path) -> None:
    """A base of another size, a module that it does not have, one factor alone, no rank, other things to train."""
    tensors = load_file(adapters / "first" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def fails(changed: dict[str, Tensor], message: str, of: str = "first") -> None:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapters / of, folder)
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ResolveError, match=message):
            check([str(folder), str(adapters / "second")])

    fails({**tensors, name: tensors[name][:, :-1].contiguous()}, "q_proj: B A' of shape .* does not fit")
    fails({**tensors, name: tensors[name][:0].contiguous()}, "does not fit")
    fails(
        {key: each for key, each in tensors.items() if key != name}, "one factor of 'model.layers.0.self_attn.q_proj'"
    )
    moved = {key.replace("layers.0", "layers.7"): each for key, each in tensors.items()}
    fails(moved, "changes 'model.layers.7.* which its base does not have")
    length = name.replace("lora_A.weight", "lora_magnitude_vector")
    dora = load_file(adapters / "third" / "adapter_model.safetensors")
    fails({**dora, length: torch.ones(31)}, "lora_magnitude_vector' has the shape .*, of 32 outputs", of="third")
    other = length.replace("q_proj", "k_proj")
    fails({**dora, other: torch.ones(32)}, "has lengths of .* and no factors of it", of="third")
    again = length.removeprefix("base_model.model.")
    fails({**dora, again: torch.ones(32)}, "lora_magnitude_vector' in two ways", of="third")
    fails({**tensors, length.replace("magnitude_vector", "B.bias"): torch.ones(32)}, "B.bias', which is not known")
    fails({"base_model.model.model.norm.weight": torch.ones(64)}, "without a single pair|does not fit")
    fails({**dora, length: torch.ones(32, dtype=torch.int32)}, "has the type I32, which no weight has", of="third")
    fails({**tensors, "base_model.model.model.norm.weight": torch.ones(32, dtype=torch.int64)}, "I64.* does not fit")
    again = {key.replace("model.model.model.", "model.model."): each.clone() for key, each in tensors.items()}
    fails({**tensors, **again}, "in two ways")
    whole = name.replace("lora_A.weight", "weight")
    fails({**tensors, whole: torch.ones(32, 32)}, "q_proj.weight' in two ways")
    fails({**tensors, name.removeprefix("base_model.model."): tensors[name] + 1}, "q_proj.lora_A.weight' in two ways")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ResolveError, match=r"an adapter without adapter_model\.safetensors"):
        check([str(tmp_path / "adapter"), str(adapters / "second")])


PATTERNS: dict[str, Mapping[str, Any]] = {
    "any letter": {"alpha_pattern": {"q.proj": 32}},
    "one of two": {"alpha_pattern": {r"layers\.(0|7)\..*(q|k)_proj": 32, "q_proj": 1}},
    "from the beginning": {"alpha_pattern": {r"^model\.layers\.\d+\.self_attn.q_proj": 32}},
    "a count": {"alpha_pattern": {r"[qv]_proj{1,2}": 32}},
    "modules by an expression": {"target_modules": r".*\.(q|down)_proj"},
    "factors of others": {"target_modules": ["down_proj"]},
    "excluded modules": {"exclude_modules": ["q_proj"]},
    "layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "all that is linear": {"target_modules": "all-linear"},
    "lengths": {},
}


@pytest.mark.parametrize("what", PATTERNS)
def test_what_peft_takes_of_an_adapter(language_family: Path, tmp_path: Path, what: str) -> None:
    """Patterns are regular expressions. Factors and lengths that it does not load are left out, and a note says so."""
    base = language_family / "base"
    folder = adapted(base, tmp_path / "adapter", 1, target_modules=["q_proj", "v_proj", "down_proj"])
    settings = {**json.loads((folder / "adapter_config.json").read_text()), **PATTERNS[what]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    if what == "lengths":
        path = "base_model.model.model.layers.0.self_attn.q_proj"
        save_file({**tensors, f"{path}.lora_magnitude_vector": torch.ones(32)}, folder / "adapter_model.safetensors")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    soup = cook([str(folder)], "soup")
    for name, each in written(soup).items():
        torch.testing.assert_close(each, peft.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
    notes = " ".join(str(check([str(folder)])).split())
    left_out = what in ("factors of others", "excluded modules", "lengths", "modules by an expression")
    assert ("they are ignored, as in peft" in notes) == left_out


def test_patterns_that_take_for_ever(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_rules, "_SECONDS", 0.05)
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["alpha_pattern"] = {r"(.|\w|[a-z]|[_.])+[XY]": 3}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ResolveError, match="To match its patterns took more than"):
        check([str(folder), str(adapters / "second")])


def test_settings_that_peft_cannot_read(adapters: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    text = (folder / "adapter_config.json").read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        (folder / "adapter_config.json").write_text(text, encoding)
        with pytest.raises(ResolveError, match=r"adapter_config\.json is not valid JSON"):
            check([str(folder), str(adapters / "second")])


def test_a_base_that_is_named_in_its_place(language_family: Path, adapters: Path, tmp_path: Path) -> None:
    """Where the one that the adapter names is not to be had, as a path of another machine."""
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    elsewhere = {**settings, "base_model_name_or_path": "/nowhere/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(elsewhere))
    second, base = str(adapters / "second"), str(language_family / "base")
    expected = cook([str(adapters / "first"), second], "soup").digest
    assert cook(Recipe(ingredients=[str(folder), second], base_model=base), "named").digest == expected
    lineage = check(Recipe(ingredients=[str(folder), second], base_model=base))
    assert "it names '/nowhere/llama' as its base; local:base is taken" in str(lineage)
    assert cook(Recipe(ingredients=[{"model": str(folder), "base": base}, second]), "beside").digest == expected
    with pytest.raises(ResolveError, match=r"its base cannot be used: .*\nName the model that it was trained on"):
        cook([str(folder), second], "nothing")


def test_tokens_and_a_template_of_its_own(language_family: Path, tmp_path: Path) -> None:
    """A tokenizer beside the adapter counts in the place of the base's, and so do longer tables."""
    base = language_family / "base"
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|model|>"])
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"

    def resized() -> Any:
        torch.manual_seed(5)
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return model

    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        torch.manual_seed(number)
        settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        model = get_peft_model(resized(), settings)
        for each in model.parameters():
            each.data += 0.1 * torch.randn(each.shape) * each.requires_grad
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    soup = cook([str(each) for each in folders], "soup")
    written = AutoTokenizer.from_pretrained(soup.folder)
    assert (len(written), written.chat_template) == (len(tokenizer), tokenizer.chat_template)
    assert soup.load().config.vocab_size == len(tokenizer)
    one = cook(Recipe(ingredients=[str(folders[0])]), "alone").load().eval()
    tokens = torch.tensor([[5, len(tokenizer) - 1, 7]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(resized(), folders[0]).eval()(tokens).logits
        torch.testing.assert_close(one(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(SoupError, match=r"'lm_head.weight' of 386 rows, and their base has another one"):
        cook(Recipe(ingredients=[str(each) for each in folders], output="adapter"), "adapter")


@pytest.mark.parametrize("inner", [8, 16, 24])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
@pytest.mark.parametrize("kind", [MixtralForCausalLM, Qwen3MoeForCausalLM])
def test_experts_that_are_stacked_in_memory(tmp_path: Path, kind: Any, parameters: list[str], inner: int) -> None:
    """On disk they lie apart; peft has one pair of factors for all, in which each has some columns. Matrices that are
    square do not show how they are turned, which depends on its version.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
    }
    kind(kind.config_class(**sizes, num_local_experts=3, num_experts=3)).save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{each}" for each in parameters]}
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(r=2, lora_alpha=8, **targets))
    for each in model.parameters():
        each.data += 0.2 * torch.randn(each.shape) * each.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    one = cook(Recipe(ingredients=[str(tmp_path / "adapter")]), "one").load().eval()
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        torch.testing.assert_close(one(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        base = kind.from_pretrained(tmp_path / "base").eval()
        assert not torch.allclose(base(tokens).logits, expected, atol=1e-2)
    with pytest.raises(SoupError, match="changes experts that are stacked in memory"):
        cook(Recipe(ingredients=[str(tmp_path / "adapter")], output="adapter"), "soup")


def test_what_is_said_of_other_classes(tmp_path: Path) -> None:
    """A classifier without its head is told; convolutions in groups, and parameters that peft stacks otherwise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
    sizes |= {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(tmp_path / "bart")
    model = BartForSequenceClassification.from_pretrained(tmp_path / "bart", num_labels=2)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    (note,) = open_checkpoint(str(tmp_path / "lora")).notes
    assert note.startswith("it was trained as BartForSequenceClassification and brings no head; it counts as BartFor")
    shape = {"depths": [1, 1], "hidden_sizes": [16, 16], "num_stages": 2, "patch_size": 2}
    ConvNextForImageClassification(ConvNextConfig(**shape)).save_pretrained(tmp_path / "conv")
    model = ConvNextForImageClassification.from_pretrained(tmp_path / "conv")
    get_peft_model(model, LoraConfig(r=16, target_modules=["dwconv"])).save_pretrained(tmp_path / "groups")
    with pytest.raises(ResolveError, match=r"changes 'convnext.*dwconv', a convolution in groups"):
        open_checkpoint(str(tmp_path / "groups"))
    folder = adapted(gpt2(tmp_path / "gpt2"), tmp_path / "other", 1, target_modules=["c_attn"])
    settings = json.loads((folder / "adapter_config.json").read_text())
    stated = {**settings, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name.replace("attn.c_attn", "mlp.experts"): each for name, each in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors")
    with pytest.raises(ResolveError, match=r"an adapter with `target_parameters: \['mlp.experts.gate_up_proj'\]`"):
        open_checkpoint(str(folder))


def test_what_strangers_put_beside_factors(adapters: Path, tmp_path: Path) -> None:
    """More tensors than any head has are not looked for one by one; a file of a tokenizer cannot fill the disk."""
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    many = {f"base_model.model.stranger.{number}.weight": torch.zeros(0) for number in range(20_000)}
    save_file({**tensors, **many}, folder / "adapter_model.safetensors")
    with pytest.raises(ResolveError, match=r"changes 'stranger\.\d+\.weight', which its base does not have"):
        open_checkpoint(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(600_000_000)  # of which the disk holds nothing
    with pytest.raises(ResolveError, match=r"tokenizer.json has 600,000,000 bytes, more than any such file needs"):
        open_checkpoint(str(folder))


def test_adapters_of_themselves_or_of_each_other(
    adapters: Path, cli: Cli, publish: Callable[..., str], online: LocalHub, tmp_path: Path
) -> None:
    """One error that says so, at once."""
    for name, base in (("itself", "itself"), ("one", "two"), ("two", "one")):
        folder = shutil.copytree(adapters / "first", tmp_path / name)
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings |= {"base_model_name_or_path": f"acme/{base}", "revision": None}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        publish(name, folder)
    asked = len(online.requests)
    done = cli("check", "acme/itself", "acme/one", "acme/two")
    assert done.code == 1
    assert "acme/itself@" in done.err
    for name, base in (("itself", "itself"), ("one", "two"), ("two", "one")):
        said = rf"acme/{name}@\w+ is an adapter, and its base cannot be used: acme/{base}@\w+ is an adapter itself\."
        assert re.search(said, done.err), done.err
    assert len(done.err.splitlines()) == 1 + 3 + 1
    assert len(online.requests) - asked < 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"revision": "v" * 10**6}, r"`revision: 'v{90,100}.*It should be a text of at most 500 characters"),
        ({"base_model_name_or_path": "acme/" + "v" * 10**6}, r"String should have at most 1024 characters"),
        ({"alpha_pattern": {f"m{each}": 1 for each in range(200_000)}}, "200,000 names of at most 7 characters"),
        ({"alpha_pattern": {"m" * 10**6: 1}}, "1 names of at most 1,000,000 characters"),
        ({"peft_type": "X" * 10**6}, r"`peft_type: 'X{90,100}"),
    ],
    ids=["revision", "base", "many alphas", "a long alpha", "kind"],
)
def test_long_values_of_strangers(adapters: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ResolveError, match=f"(?s){said}") as raised:
        open_checkpoint(str(folder))
    assert len(str(raised.value)) < 1000
