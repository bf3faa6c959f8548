"""LoRA adapters that peft makes, and what they come to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

#: Of tests that use peft, in a folder of their own.
MARKS = [
    pytest.mark.usefixtures("cli"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
    # What peft asks transformers for, and says of itself.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft"),
]
PAGES = [" ".join(text.split())[:200] for text in topics.topics.values()]

#: What peft's own merging gets wrong, and all else that changes numbers.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rsLoRA": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "r": 8},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32},
    },
    "some layers": {"target_modules": ["gate_proj"], "layers_to_transform": [0]},
    "trained whole": {"target_modules": ["k_proj"], "modules_to_save": ["norm"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rank 1": {"target_modules": "all-linear", "r": 1},
    "the head and the table of tokens": {"target_modules": ["lm_head", "embed_tokens"]},
}  # fmt: skip


def adapted(base: Path, out: Path, seed: int, *, kind: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    """An adapter that peft made, trained for some steps where it is of a language model, else with random factors."""
    torch.manual_seed(seed)
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    if kind is AutoModelForCausalLM and model.config.model_type == "llama":
        tokens = torch.tensor(ByT5Tokenizer()(PAGES[10 * seed : 10 * seed + 8], padding=True).input_ids)[:, :64]
        optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=3e-2)
        for _ in range(8):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    else:
        for name, each in model.named_parameters():
            if each.requires_grad:
                each.data = each.data + 0.1 * torch.randn(each.shape) * (1 if "lora_" in name else 0.5)
    model.save_pretrained(out)
    return out


def summed(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The base and what the adapter adds, in float64, by names in memory."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix("base_model.model."): each.double()
        for name, each in load_file(adapter / "adapter_model.safetensors").items()
    }
    model = AutoModelForCausalLM.from_pretrained(base)
    whole = {name: each.detach().double() for name, each in model.named_parameters()}
    for name, each in tensors.items():
        path, _, part = name.replace(".base_layer", "").partition(".lora_")
        if part in ("A.weight", "embedding_A"):
            rank = each.shape[0]
            alphas = [value for key, value in settings["alpha_pattern"].items() if path.endswith(key)]
            alpha = (alphas or [settings["lora_alpha"]])[0]
            scale = alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
            product = scale * (tensors[name.replace("lora_A", "lora_B").replace("_A", "_B")] @ each)
            turned = settings["fan_in_fan_out"] or part == "embedding_A"
            both = whole[f"{path}.weight"] + (product.T if turned else product)
            if (lengths := tensors.get(f"{path}.lora_magnitude_vector")) is not None:
                both *= (lengths / both.norm(dim=1))[:, None]
            whole[f"{path}.weight"] = both
        elif not part:
            whole[path] = each
    return whole


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder
