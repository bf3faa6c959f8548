"""Soups that are adapters: the best of their rank, without the base; and the adapter of a full fine-tune."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from lora import KINDS, MARKS, PAGES, adapted, gpt2, summed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ByT5Tokenizer,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MobileNetV2ForImageClassification,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    ResNetForImageClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_soup import Recipe, Soup, SoupError, check, cook, hub, search
from hf_soup.local_hub import LocalHub
from hf_soup.merging import digest_of_folder

Cli = Callable[..., Any]

pytestmark = MARKS


def adapter(*models: Path | str, base: Path | None = None, **keys: Any) -> Recipe:
    return Recipe(ingredients=[str(each) for each in models], output="adapter", base_model=base and str(base), **keys)


def logits(model: Any) -> Tensor:
    tokens = torch.tensor(ByT5Tokenizer()(PAGES[:4], padding=True).input_ids)[:, :64]
    with torch.no_grad():
        answer: Tensor = model.eval()(tokens).logits
    return answer


def answers(base: Path, folder: Path) -> Tensor:
    """What peft makes of a base and an adapter."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def learned(base: Path, folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each parameter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return {name: each - model.get_parameter(name).detach().double() for name, each in summed(base, folder).items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DoRA"])
def test_one_adapter_gives_itself_back(language_family: Path, tmp_path: Path, kind: str) -> None:
    base = language_family / "base"
    one = adapted(base, tmp_path / "adapter", 1, **KINDS[kind])
    soup = cook(adapter(one), "soup")
    assert soup.report.adapter is not None
    assert soup.report.adapter.error < 1e-7
    torch.testing.assert_close(answers(base, soup.folder), answers(base, one), rtol=1e-5, atol=1e-5)
    made = learned(base, soup.folder)
    for name, each in learned(base, one).items():
        torch.testing.assert_close(made[name], each, rtol=1e-6, atol=1e-8)


def test_layers_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    one = adapted(base, tmp_path / "one", 1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="lora_only")
    soup = cook(adapter(one), "soup")
    tokens = torch.arange(24).reshape(2, 12)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one).eval()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), soup.folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def adapters(language_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the base that the language family has, of other ranks and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    base = language_family / "base"
    adapted(base, folder / "first", 1, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted(base, folder / "second", 2, r=8, target_modules=["q_proj", "up_proj"], use_rslora=True)
    adapted(base, folder / "third", 3, target_modules=["q_proj", "down_proj"])
    return folder


def test_the_mean_is_exact_at_the_sum_of_the_ranks(language_family: Path, adapters: Path) -> None:
    base, shares = language_family / "base", {"first": 0.5, "second": 0.25, "third": 0.25}
    soup = cook(
        Recipe(ingredients=[{"model": str(adapters / n), "weight": w} for n, w in shares.items()], output="adapter"),
        "soup",
    )
    assert soup.report.adapter is not None
    assert soup.report.adapter.rank == 16
    parts, made = {name: learned(base, adapters / name) for name in shares}, learned(base, soup.folder)
    for name, each in made.items():
        torch.testing.assert_close(each, sum(w * parts[n][name] for n, w in shares.items()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_a_smaller_rank_has_the_error_of_the_best_possible(language_family: Path, adapters: Path, rank: int) -> None:
    """That of the singular value decomposition of the whole matrix, tensor by tensor, and as it is said."""
    base, names = language_family / "base", ("first", "second", "third")
    soup = cook(adapter(*(adapters / name for name in names), rank=rank), "soup")
    parts, made = [learned(base, adapters / name) for name in names], learned(base, soup.folder)
    total = lost = 0.0
    report = soup.report.adapter
    assert report is not None
    for name, each in made.items():
        wanted = sum(part[name] for part in parts) / 3
        if not wanted.any():
            assert not each.any()
            continue
        tail = torch.linalg.svdvals(wanted)[rank:].norm()
        error = (wanted - each).norm()
        assert error <= tail * (1 + 1e-5) + 1e-6 * wanted.norm()
        assert report.errors[name] == pytest.approx(float(error / wanted.norm()), rel=1e-3, abs=1e-6)
        total, lost = total + float(wanted.norm() ** 2), lost + float(error**2)
    assert report.error == pytest.approx(math.sqrt(lost / total), rel=1e-4, abs=1e-6)
    answers(base, soup.folder)  # peft loads it


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("task_arithmetic", None),
        ({"name": "wise_ft", "alpha": 0.25}, None),
        ("ties", 32),
        ({"name": "dare_ties", "density": 0.5}, 32),
        ("tsv_m", 32),
    ],
)
def test_methods_are_those_of_whole_models(
    language_family: Path, adapters: Path, method: Any, rank: int | None
) -> None:
    """At a rank that holds all: what a whole model of the same recipe has more than the base."""
    base, models = language_family / "base", [adapters / name for name in ("first", "second", "third")]
    whole = cook(Recipe(ingredients=[str(m) for m in models], method=method, dtype="float64"), "whole").load()
    soup = cook(adapter(*models, method=method, rank=rank), "soup")
    made = learned(base, soup.folder)
    start = AutoModelForCausalLM.from_pretrained(base)
    for name, each in whole.named_parameters():
        wanted = each.detach().double() - start.get_parameter(name).detach().double()
        torch.testing.assert_close(made[name], wanted, rtol=1e-3, atol=1e-5)


def test_weights_of_single_tensors(language_family: Path, adapters: Path) -> None:
    base, models = language_family / "base", [adapters / name for name in ("first", "third")]
    keys = {"tensor_weights": {"*q_proj*": [1, 3], "*": [1, 0]}}
    made = learned(base, cook(adapter(*models, **keys), "soup").folder)
    parts = [learned(base, each) for each in models]
    for name, each in made.items():
        shares = (0.25, 0.75) if "q_proj" in name else (1.0, 0.0)
        wanted = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "slerp"}, "slerp works on whole weights"),
        ({"method": {"name": "linear", "normalize": False}}, "adds up the base too"),
        ({"method": "ties"}, "The adapter needs a rank: ties has a result of any rank"),
        ({"heads": "body"}, "keeps the parts that its models have; leave `heads` out"),
        ({"labels": ["a", "b"]}, "an adapter has no place for names of outputs; leave `labels` out"),
        ({"rank": 0}, "rank: Input should be greater than or equal to 1"),
    ],
)
def test_what_no_adapter_can_be(adapters: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SoupError, match=message):
        cook(adapter(adapters / "first", adapters / "second", **keys), "soup")
    with pytest.raises(SoupError, match="`--stream` drops files while a whole model is merged"):
        cook(adapter(adapters / "first", adapters / "second"), "soup", stream=True)
    assert not Path("soup").exists()


def test_what_does_not_go_together(language_family: Path, adapters: Path, tmp_path: Path) -> None:
    base, first, second = language_family / "base", adapters / "first", adapters / "second"
    with pytest.raises(SoupError, match="puts the factors of adapters side by side, and local:one has none"):
        cook(adapter(first, language_family / "one", rank=4), "soup")
    with pytest.raises(SoupError, match="The adapter needs a rank: full fine-tunes have none"):
        cook(adapter(base, language_family / "one"), "soup")
    dora = adapted(base, tmp_path / "dora", 3, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(
        SoupError, match=r"local:dora is an adapter with `use_dora: True`: what it does to 'model.layers"
    ):
        cook(adapter(first, dora), "soup")
    shutil.copytree(language_family / "one", tmp_path / "other")
    recipe = Recipe(
        ingredients=[str(first), {"model": str(second), "base": str(tmp_path / "other")}], output="adapter",
        base_model=str(base), allow=["bases-differ", "base-contradicted"],
    )  # fmt: skip
    with pytest.raises(SoupError, match=r"local:second changes local:other.*, and the adapter would be of local:base"):
        cook(recipe, "soup")
    for models, keys in ((base, base), {}), ((base, language_family / "one"), {"base": base}):
        with pytest.raises(SoupError, match="local:base is the base itself, which has learned nothing"):
            cook(adapter(*models, rank=4, **keys), "soup")
    with pytest.raises(SoupError, match="`rank` is of an adapter: write `output: adapter` too"):
        Recipe(ingredients=[str(first), str(second)], rank=4)
    assert not Path("soup").exists()


def test_what_is_not_finite_is_said(adapters: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = shutil.copytree(adapters / "first", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name][0, 0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        SoupError, match=r"The factors of 'model.layers.0.self_attn.q_proj.weight' in the adapter local"
    ):
        cook(adapter(folder, adapters / "second"), "soup")
    tensors[name][0, 0] = 1e30
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(SoupError, match=r"would be larger than float16 can hold"):
        cook(adapter(folder, adapters / "second", dtype="float16"), "soup")
    assert not Path("soup").exists()


def test_the_adapter_of_a_full_fine_tune(language_family: Path, cli: Cli) -> None:
    """Its error by tensor, and the way back: the base and the adapter are nearly the fine-tune."""
    base, one = language_family / "base", language_family / "one"
    done = cli("cook", base, one, "-o", "lora", "--output", "adapter", "--rank", 8, "--quiet", "--json")
    assert done.code == 0, done.err
    report, lost, size = done.json["adapter"], 0.0, 0.0
    whole = AutoModelForCausalLM.from_pretrained(one)
    start = AutoModelForCausalLM.from_pretrained(base)
    back = (
        cook([str(base)], "back") if False else cook(Recipe(ingredients=["lora"], base_model=str(base)), "back").load()
    )
    for name, each in whole.named_parameters():
        origin = start.get_parameter(name).detach().double()
        wanted, made = each.detach().double() - origin, back.get_parameter(name).detach().double() - origin
        if each.dim() < 2:
            assert torch.equal(back.get_parameter(name), each), name
        else:
            tail = torch.linalg.svdvals(wanted)[8:].norm()
            assert (wanted - made).norm() <= tail * (1 + 1e-4) + 1e-6
            assert report["errors"][name] == pytest.approx(float(tail / wanted.norm()), rel=1e-3, abs=1e-5)
        lost, size = lost + float((wanted - made).norm() ** 2), size + float(wanted.norm() ** 2)
    assert report["error"] == pytest.approx(math.sqrt(lost / size), rel=1e-3)
    exact = cook(adapter(base, one, rank=999), "exact")
    torch.testing.assert_close(answers(base, exact.folder), logits(whole), rtol=1e-4, atol=1e-4)


def test_the_whole_way(
    online: LocalHub, cli: Cli, language_family: Path, adapters: Path, publish: Callable[..., str], tmp_path: Path
) -> None:
    """Check, make, push, load by peft, verify; the base's weights are not fetched until something is scored."""
    base, names = publish("base", language_family / "base"), []
    owner = base.partition("/")[0]
    for name in ("first", "second"):
        folder = shutil.copytree(adapters / name, tmp_path / name)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        (folder / "README.md").write_text(f"---\nbase_model: {base}\nlicense: mit\n---\n")
        ByT5Tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(folder)
        names.append(publish(name, folder))
    planned = cli("cook", *names, "-o", "soup", "--output", "adapter", "--rank", 6, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert list(planned.json["files"]) == ["adapter_model.safetensors"]
    sizes = [(adapters / name / "adapter_model.safetensors").stat().st_size for name in ("first", "second")]
    assert planned.json["fetch_bytes"] == sum(sizes)
    done = cli("cook", *names, "-o", "soup", "--output", "adapter", "--rank", 6, "--quiet", "--json")
    assert done.code == 0, done.err
    assert {path.name for path in hub.cache_folder().rglob("*.safetensors")} == {"adapter_model.safetensors"}
    assert AutoTokenizer.from_pretrained("soup").chat_template == "{{ messages[0].content }}"
    pushed = cli("push", "soup", f"{owner}/soup", "--json")
    assert pushed.code == 0, pushed.err
    card = ModelCard.load(f"{owner}/soup")
    settings = json.loads(Path("soup/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (base, hub.resolve(base, None).revision)
    assert (card.data.base_model, card.data["base_model_relation"], card.data.library_name) == (
        [base],
        "adapter",
        "peft",
    )
    # As the card says; transformers' client has read its settings before there was this Hub.
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for name, here in ((base, language_family / "base"), (f"{owner}/soup", Path("soup").resolve())):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', f'"{here}"')
    named: dict[str, Any] = {}
    exec(code, named)
    torch.testing.assert_close(logits(named["model"]), answers(language_family / "base", Path("soup")))
    copy = shutil.copytree(Path("soup"), Path("copy"))
    settings = json.loads((copy / "adapter_config.json").read_text())
    local = {"base_model_name_or_path": str(language_family / "base"), "revision": None}
    (copy / "adapter_config.json").write_text(json.dumps({**settings, **local}))
    torch.testing.assert_close(logits(Soup.open(copy).load()), logits(named["model"]))
    verified = cli("verify", f"{owner}/soup", "--json", "--quiet")
    assert verified.json["verdict"] == "identical", verified.out
    assert check([f"{owner}/soup", names[1]]).verdict == "proven"
    # An adapter like any other, whose leaves are not what it is.
    again = cook([f"{owner}/soup", names[1]], "again")
    assert [each.model for each in again.recipe.ingredients] == [f"{owner}/soup", names[1]]


def test_what_was_changed_is_found(cli: Cli, language_family: Path, adapters: Path, tmp_path: Path) -> None:
    """In numbers, not in how a product is factored."""
    cook(adapter(adapters / "first", adapters / "second", rank=6), "soup")
    places = {name: adapters / name for name in ("first", "second")} | {"base": language_family / "base"}
    here = [word for name, path in places.items() for word in ("--map", f"{name}={path}")]
    folder = tmp_path / "soup"
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    turned = torch.linalg.qr(torch.randn(6, 6)).Q

    def verdict(changed: Mapping[str, Tensor], **values: Any) -> Any:
        save_file({**tensors, **changed}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **values}))
        report = json.loads((folder / "soup.json").read_text())
        (folder / "soup.json").write_text(json.dumps({**report, "digest": digest_of_folder(folder)}))
        return cli("verify", folder, *here, "--json", "--quiet").json

    both = {
        name.format("A"): turned.T @ tensors[name.format("A")],
        name.format("B"): tensors[name.format("B")] @ turned,
    }
    assert verdict({})["verdict"] == "identical"
    assert verdict(both)["verdict"] == "equivalent"
    found = verdict({name.format("A"): 1.001 * tensors[name.format("A")]})
    assert (found["verdict"], found["different"]) == ("different", [name.format("A")])
    assert verdict({name.format("A"): torch.full_like(tensors[name.format("A")], math.nan)})["verdict"] == "different"
    found = verdict({}, lora_alpha=2 * settings["lora_alpha"])
    assert (found["verdict"], found["different"]) == ("different", ["adapter_config.json"])
    assert (
        "local:first, local:second, local:base were folders on the cook's machine" in (folder / "README.md").read_text()
    )
    for spoil in (lambda file: file.truncate(500), lambda file: file.truncate(1 << 30)):
        assert verdict({})["verdict"] == "identical"
        with (folder / "adapter_model.safetensors").open("r+b") as file:
            spoil(file)
        found = cli("verify", folder, *here, "--json", "--quiet").json
        assert found["verdict"] == "different"
        assert found["different"][0] == "adapter_model.safetensors"


@pytest.mark.parametrize("select", ["greedy", "learned"])
def test_what_is_chosen_is_scored_as_it_is_written(
    language_family: Path, adapters: Path, cli: Cli, select: str
) -> None:
    """Candidates are exact sums; the soup is what its rank leaves of the best."""
    few = {"greedy": {}, "learned": {"epochs": 2, "batch_size": 10}}[select]
    looks = {"task": "causal-lm", "dataset": str(language_family / "validation.jsonl")}
    base, models = language_family / "base", [adapters / name for name in ("first", "second", "third")]
    soup = cook(adapter(*models, base=base, validation=looks, select={"name": select, **few}, rank=2), "soup")
    (title,) = soup.scores["soup"]
    Path("data.yaml").write_text(adapter(*models, base=base, validation=looks).to_yaml())
    alone = cli("score", "soup", "--recipe", "data.yaml", "--quiet", "--json")
    assert alone.code == 0, alone.err
    ((_, measured),) = alone.json["scores"].items()
    assert measured[title]["value"] == pytest.approx(soup.scores["soup"][title]["value"], abs=1e-6)
    kept = {"base_model": str(base), "validation": (), "ingredients": []}
    for each in soup.recipe.ingredients:
        path = adapters / each.model.removeprefix("local:")
        kept["ingredients"].append(each.model_copy(update={"model": str(path), "base": str(base)}))
    assert cook(soup.recipe.model_copy(update=kept), "again").digest == soup.digest


@pytest.mark.parametrize("keys", [{}, {"rank": 5}, {"rank": 5, "method": "ties"}])
def test_threads_do_not_show(adapters: Path, keys: dict[str, Any]) -> None:
    recipe = adapter(*(adapters / name for name in ("first", "second", "third")), **keys)
    assert cook(recipe, "one", threads=1).digest == cook(recipe, "three", threads=3).digest


def test_in_16_bits(language_family: Path, adapters: Path) -> None:
    """Rounded once, and the error that is said is that of what is written."""
    base, first, second = language_family / "base", adapters / "first", adapters / "second"
    soup = cook(adapter(first, second, rank=12, dtype="bfloat16"), "soup")
    assert {each.dtype for each in load_file("soup/adapter_model.safetensors").values()} == {torch.bfloat16}
    parts = learned(base, second)
    wanted = {name: (each + parts[name]) / 2 for name, each in learned(base, first).items()}
    made = learned(base, soup.folder)
    lost = math.sqrt(sum(float((each - made[name]).norm() ** 2) for name, each in wanted.items()))
    size = math.sqrt(sum(float(each.norm() ** 2) for each in wanted.values()))
    assert soup.report.adapter is not None
    assert 1e-4 < soup.report.adapter.error < 1e-2
    assert soup.report.adapter.error == pytest.approx(lost / size, rel=1e-3)


def changed(base: Path, out: Path, kind: Any) -> Path:
    """A fine-tune that has other numbers everywhere."""
    torch.manual_seed(1)
    model = kind.from_pretrained(base)
    for each in model.parameters():
        each.data += 0.01 * torch.randn(each.shape)
    model.save_pretrained(out)
    return out


#: Classes and settings of small models, and inputs.
FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, Tensor]]] = {
    "vit": (
        ViTForImageClassification,
        {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "id2label": {0: "a", 1: "b"}},
        {"pixel_values": torch.ones(1, 3, 8, 8).cumsum(3) / 8},
    ),
    "gpt2": (
        GPT2LMHeadModel,
        {"vocab_size": 384, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "tie_word_embeddings": False},
        {"input_ids": torch.arange(24).reshape(2, 12)},
    ),
    "statistics of batches, layers with numbers": (
        ResNetForImageClassification,
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
        {"pixel_values": torch.ones(1, 3, 32, 32).cumsum(3) / 32},
    ),
    "convolutions in groups": (
        MobileNetV2ForImageClassification,
        {"depth_multiplier": 0.1, "image_size": 32, "num_labels": 3, "tf_padding": False},
        {"pixel_values": torch.ones(1, 3, 32, 32).cumsum(3) / 32},
    ),
    "attention that takes its weights itself": (
        SiglipVisionModel,
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4},
        {"pixel_values": torch.ones(1, 3, 8, 8).cumsum(3) / 8},
    ),
    "layers that peft refuses": (
        MambaForCausalLM,
        {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "expand": 2,
         "tie_word_embeddings": False},
        {"input_ids": torch.arange(24).reshape(2, 12)},
    ),
    "tables with a class of their own": (
        OPTForCausalLM,
        {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 24, "num_attention_heads": 2,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16, "tie_word_embeddings": False},
        {"input_ids": torch.arange(24).reshape(2, 12)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_of_any_fine_tune(tmp_path: Path, family: str) -> None:
    """Convolutions, layers that are stored as (in, out), biases, norms, tables, and parameters of no layer: at a rank
    that holds all, peft's answers are the fine-tune's, and the way back gives its weights.
    """
    kind, settings, inputs = FAMILIES[family]
    torch.manual_seed(0)
    kind(kind.config_class(**settings)).save_pretrained(tmp_path / "base")
    base, one = tmp_path / "base", changed(tmp_path / "base", tmp_path / "one", kind)
    soup = cook(adapter(base, one, rank=99), "soup")
    assert soup.report.adapter is not None
    assert soup.report.adapter.error < 1e-6
    model = PeftModel.from_pretrained(kind.from_pretrained(base), soup.folder).eval()
    whole = kind.from_pretrained(one).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], whole(**inputs)[0], rtol=1e-4, atol=1e-5)
    back = cook(Recipe(ingredients=[str(soup.folder)], base_model=str(base)), "back").load().state_dict()
    for name, each in whole.state_dict().items():
        torch.testing.assert_close(back[name], each, rtol=1e-5, atol=1e-6)


def test_what_no_adapter_holds_of_a_fine_tune(language_family: Path, tmp_path: Path) -> None:
    """Tables that are tied, or have other rows: named, and counted as lost. Without one matrix there is no adapter."""
    model = LlamaForCausalLM.from_pretrained(language_family / "base")
    model.config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "tied")
    one = changed(tmp_path / "tied", tmp_path / "one", LlamaForCausalLM)
    report = cook(adapter(tmp_path / "tied", one, rank=99), "soup").report.adapter
    assert report is not None
    assert report.left_out == ("model.embed_tokens.weight",)
    assert report.errors["model.embed_tokens.weight"] == 1
    assert report.error > 0.1
    longer = LlamaForCausalLM.from_pretrained(changed(language_family / "base", tmp_path / "two", LlamaForCausalLM))
    longer.resize_token_embeddings(390)
    longer.save_pretrained(tmp_path / "longer")
    shutil.copy(language_family / "base" / "tokenizer_config.json", tmp_path / "longer")
    report = cook(adapter(language_family / "base", tmp_path / "longer", rank=99), "resized").report.adapter
    assert report is not None
    assert set(report.left_out) == {"model.embed_tokens.weight", "lm_head.weight"}
    normed = LlamaForCausalLM.from_pretrained(language_family / "base")
    normed.model.norm.weight.data += 1
    normed.save_pretrained(tmp_path / "normed")
    with pytest.raises(SoupError, match="local:normed: no matrix that has factors in an adapter was changed"):
        cook(adapter(language_family / "base", tmp_path / "normed", rank=4), "norms")


def test_what_is_saved_whole_counts_too(language_family: Path, tmp_path: Path) -> None:
    """Its rounding is in the error, and what its type cannot hold is said."""
    base = language_family / "base"
    models = []
    for number in (1, 2):
        settings = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
        models.append(adapted(base, tmp_path / f"lora-{number}", number, **settings))
    for dtype in ("float32", "float16"):
        soup = cook(adapter(*models, dtype=dtype), dtype)
        parts, made = [learned(base, each) for each in models], learned(base, soup.folder)
        size = math.sqrt(sum(float(((a + parts[1][n]) / 2).norm() ** 2) for n, a in parts[0].items() if a.dim() > 1))
        lost = math.sqrt(sum(float(((a + parts[1][n]) / 2 - made[n]).norm() ** 2) for n, a in parts[0].items()))
        assert soup.report.adapter is not None
        assert soup.report.adapter.error == pytest.approx(lost / size, rel=1e-2, abs=1e-7)
    tensors = load_file(models[0] / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] *= 1e6
    save_file(tensors, models[0] / "adapter_model.safetensors")
    with pytest.raises(
        SoupError, match=r"for 'model.norm.weight' in the adapter would be larger than float16 can hold"
    ):
        cook(adapter(*models, dtype="float16"), "large")


def test_biases_and_names_of_several_adapters(tmp_path: Path) -> None:
    """A bias beside factors of another adapter is that of a layer which is wrapped now; and an adapter of a model
    without its head has shorter names.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    base, kinds = tmp_path / "base", (Qwen2ForCausalLM, Qwen2Model, Qwen2ForCausalLM)
    settings: tuple[dict[str, Any], ...] = (
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["v_proj", "k_proj"], "bias": "lora_only"},
        {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]},
    )
    models = [adapted(base, tmp_path / f"{n}", n, kind=kinds[n], **each) for n, each in enumerate(settings)]
    for order in (models, models[::-1]):
        whole = cook([str(each) for each in order], f"whole-{order[0].name}").load()
        soup = cook(adapter(*order), f"soup-{order[0].name}")
        torch.testing.assert_close(answers(base, soup.folder), logits(whole), rtol=1e-4, atol=1e-5)


HEADS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "a body": (
        DistilBertModel, DistilBertForSequenceClassification,
        {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
        {"target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "a model of masked words": (
        DistilBertForMaskedLM, DistilBertForSequenceClassification,
        {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
        {"target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "a head of several layers": (
        RobertaForMaskedLM, RobertaForSequenceClassification,
        {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2},
        {"target_modules": ["query", "value"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_classifiers_of_texts(tmp_path: Path, case: str) -> None:
    """Biases beside a head, more outputs than a layer before them has rows, and the way back of a soup of them."""
    base, kind, sizes, settings = HEADS[case]
    torch.manual_seed(0)
    base(base.config_class(**sizes)).save_pretrained(tmp_path / "base")

    def headed() -> Any:
        torch.manual_seed(3)
        return kind.from_pretrained(tmp_path / "base", num_labels=40)

    for number in (1, 2):
        torch.manual_seed(number)
        model = get_peft_model(headed(), LoraConfig(r=2, bias="all", task_type="SEQ_CLS", **settings))
        for each in model.parameters():
            each.data += 0.1 * torch.randn(each.shape) * each.requires_grad
        model.save_pretrained(tmp_path / f"lora-{number}")
    tokens, both = torch.arange(3, 27).reshape(2, 12), [tmp_path / "lora-1", tmp_path / "lora-2"]
    whole, soup = cook([str(each) for each in both], "whole").load().eval(), cook(adapter(*both), "soup")
    one = cook(Recipe(ingredients=[str(both[0])]), "one").load().eval()
    with torch.no_grad():
        alone = PeftModel.from_pretrained(headed(), both[0]).eval()
        torch.testing.assert_close(one(tokens).logits, alone(tokens).logits, rtol=1e-4, atol=1e-5)
        expected = whole(tokens).logits
        made = PeftModel.from_pretrained(headed(), soup.folder).eval()
        torch.testing.assert_close(made(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        back = cook(Recipe(ingredients=["soup"], base_model=str(tmp_path / "base")), "back").load().eval()
        torch.testing.assert_close(back(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_random_when_an_adapter_was_trained(tmp_path: Path) -> None:
    """BERT's pooler stands between a body that was trained without it and the head, and peft does not save it."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    with pytest.raises(SoupError, match=r"brings a head, and local:base.* has no bert.pooler.dense"):
        cook(Recipe(ingredients=[str(tmp_path / "lora")]), "soup")


def test_a_head_that_the_base_does_not_have(tmp_path: Path) -> None:
    """Adapters of classifiers bring one: it is averaged, and goes along in whole models and in adapters; and so does
    that of a full fine-tune.
    """
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=24)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    pixels, base = torch.randn(2, 3, 8, 8), tmp_path / "base"

    def headed() -> Any:
        torch.manual_seed(2)
        return ViTForImageClassification.from_pretrained(base, num_labels=3)

    for number in (1, 2):
        torch.manual_seed(number)
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        model = get_peft_model(headed(), settings)
        for each in model.parameters():
            each.data += 0.1 * torch.randn(each.shape) * each.requires_grad
        model.save_pretrained(tmp_path / f"lora-{number}")
    both = [tmp_path / "lora-1", tmp_path / "lora-2"]
    one = cook(Recipe(ingredients=[str(both[0])]), "one")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(headed(), both[0]).eval()(pixels).logits
        torch.testing.assert_close(one.load().eval()(pixels).logits, expected, rtol=1e-4, atol=1e-5)
        whole = cook(Recipe(ingredients=[str(each) for each in both]), "whole").load().eval()(pixels).logits
        for models, out in ((both, "soup"), ([base, "whole"], "back")):
            made = cook(adapter(*models, rank=99), out)
            logits = PeftModel.from_pretrained(headed(), made.folder).eval()(pixels).logits
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
            again = cook(Recipe(ingredients=[out], base_model=str(base)), f"{out}-again").load().eval()
            torch.testing.assert_close(again(pixels).logits, whole, rtol=1e-4, atol=1e-5)
    settings = json.loads(Path("soup/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("local:base", None)
    named = {**settings, "base_model_name_or_path": str(base)}
    Path("soup/adapter_config.json").write_text(json.dumps(named))
    with torch.no_grad():
        torch.testing.assert_close(Soup.open("soup").load().eval()(pixels).logits, whole, rtol=1e-4, atol=1e-5)
    assert 'from_pretrained("BASE", num_labels=3, ignore_mismatched_sizes=True)' in Path("soup/README.md").read_text()


def test_adapters_in_folders_of_a_repo(
    online: LocalHub, cli: Cli, language_family: Path, adapters: Path, publish: Callable[..., str], tmp_path: Path
) -> None:
    """As peft saves those of other names than `default`, and as a Trainer pushes its checkpoints."""
    base = publish("base", language_family / "base")
    for name in ("first", "checkpoint-20"):
        folder = shutil.copytree(adapters / "first", tmp_path / "loras" / "v1" / name)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    shutil.copy(adapters / "third" / "adapter_model.safetensors", tmp_path / "loras" / "v1" / "first")
    loras = publish("loras", tmp_path / "loras")
    done = cli(
        "cook", f"{loras}/v1/first", f"{loras}/v1/checkpoint-20@main", "-o", "soup", "--output", "adapter", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["weights"] == {f"{loras}/v1/first": 1, f"{loras}/v1/checkpoint-20": 1}
    assert done.json["digest"] == cook(adapter(adapters / "third", adapters / "first"), "here").digest
    pushed = cli("push", "soup", f"{base.partition('/')[0]}/soup", "--json")
    assert pushed.code == 0, pushed.err
    card = (tmp_path / "soup" / "README.md").read_text()
    commit = hub.resolve(loras, None).revision
    assert f"https://huggingface.co/{loras}/tree/{commit}/v1/first" in card
    assert cli("verify", f"{base.partition('/')[0]}/soup", "--quiet").code == 0
    for model, message in (
        (loras, f"There are adapters in folders of it: name one, as {loras}/v1/"),
        (f"{loras}/v2", "has no folder 'v2'"),
    ):
        refused = cli("check", model, f"{loras}/v1/first")
        assert refused.code == 1
        assert message in refused.err


def test_a_search_has_adapters_too(
    online: LocalHub, language_family: Path, adapters: Path, publish: Callable[..., str], tmp_path: Path
) -> None:
    base = publish("base", language_family / "base")
    for name in ("first", "third"):
        folder = shutil.copytree(adapters / name, tmp_path / name)
        # A copy in 4 bits of the base, as adapters are trained on.
        settings = json.loads((folder / "adapter_config.json").read_text())
        stated = {**settings, "base_model_name_or_path": "acme/base-bnb-4bit"}
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
        publish(name, folder)
    one = shutil.copytree(language_family / "one", tmp_path / "one")
    (one / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    owner = base.partition("/")[0]
    publish("one", one)
    found = search(base)
    (group,) = found.groups
    assert sorted(group.members) == [f"{owner}/{name}" for name in ("first", "one", "third")]
    assert cook(found.recipe(), "soup").weights.keys() == {*group.members}


def test_the_recipe_of_adapters_on_the_hub(
    online: LocalHub, cli: Cli, publish: Callable[..., str], tmp_path: Path
) -> None:
    """recipes/loras.yaml as it is, from stand-ins of the same names, by the lines of the README."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "recipes", "recipes")
    page = (root / "README.md").read_text()
    lines = page[page.index("pip install hf-soup peft") :].partition("```")[0].splitlines()
    asked = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hf-soup")]
    assert len(lines) == 10
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    base = tmp_path / "base"
    MistralForCausalLM(config).save_pretrained(base)
    ByT5Tokenizer().save_pretrained(base)
    made = {
        "mistralai/Mistral-7B-v0.1": base,
        "owner/full-fine-tune": changed(base, tmp_path / "one", MistralForCausalLM),
    }
    for number, name in enumerate(("tldr_headline_gen", "tldr_content_gen", "cnn")):
        folder = adapted(base, tmp_path / name, number, r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        settings = json.loads((folder / "adapter_config.json").read_text())
        stated = {**settings, "base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        (folder / "README.md").write_text("---\nbase_model: mistralai/Mistral-7B-v0.1\n---\n")
        made[f"predibase/{name}"] = folder
    for name, folder in made.items():
        owner = name.partition("/")[0]
        repo = online.store.create("model", name, private=False, author=owner)
        files = [online.store.put(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
        online.store.commit(repo, "main", files, ("Upload", "", owner), None)
    me = publish("me", base).partition("/")[0]
    for command in asked:
        done = cli(*(part.replace("me/news", f"{me}/news") for part in command))
        assert done.code == 0, (command, done.err)
    loads = [
        json.loads(Path(name, "soup.json").read_text())["adapter"]["error"] for name in ("news-lora", "exact-lora")
    ]
    assert loads[0] > 0.1
    assert loads[1] < 1e-6
    assert json.loads(Path("news-lora/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_adapters_of_a_sentence_transformer_keep_its_modules(tmp_path: Path) -> None:
    """What makes embeddings stands beside the factors, as the library saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    BertModel(BertConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "plain"
    )
    ByT5Tokenizer().save_pretrained(tmp_path / "plain")
    parts = [modules.Transformer(str(tmp_path / "plain")), modules.Pooling(16, pooling_mode="cls"), modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "base"))
    runs = [
        adapted(tmp_path / "base", tmp_path / f"run{seed}", seed, kind=AutoModel, target_modules=["query"])
        for seed in (1, 2)
    ]
    # Settings alone list no modules: the base's count.
    for run in runs:
        shutil.copy(tmp_path / "base" / "config_sentence_transformers.json", run)
    plain = cook(Recipe(ingredients=[str(each) for each in runs], output="adapter"), tmp_path / "plain-soup")
    for run in runs:
        shutil.copy(tmp_path / "base" / "modules.json", run)
        shutil.copytree(tmp_path / "base" / "1_Pooling", run / "1_Pooling")
        listed = json.loads((run / "modules.json").read_text())[:2]
        (run / "modules.json").write_text(json.dumps(listed))
    soup = cook(Recipe(ingredients=[str(each) for each in runs], output="adapter"), tmp_path / "soup")
    # With modules of their own the runs make embeddings without Normalize, which their base does.
    for folder, kinds in ((plain.folder, [*"TPN"]), (soup.folder, [*"TP"])):
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / "base")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        model = SentenceTransformer(str(folder), device="cpu")
        assert [type(module).__name__[0] for module in model] == kinds
        assert model[1].pooling_mode == "cls"
        assert model[0].auto_model.encoder.layer[0].attention.self.query.lora_A["default"].weight.any()
