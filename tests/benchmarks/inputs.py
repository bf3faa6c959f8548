"""Checkpoints to measure with: the layouts of real models, any size, written in seconds without building the model.

What they hold is noise that the checkpoints of one set share but for a small part, so that they are siblings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

#: Bytes of noise, which are repeated.
_NOISE = 64 << 20
Shapes = Mapping[str, tuple[int, ...]]


def llama(billions_of_bytes: float) -> tuple[dict[str, object], Shapes]:
    """Config and tensors of a Llama in bfloat16; a quarter of it is one tensor, the embedding."""
    hidden, intermediate, heads = 1024, 4096, 16
    layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, intermediate),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (hidden // 2, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (hidden // 2, hidden),
    }
    elements = int(billions_of_bytes * 1e9 / 2)
    vocab = elements // 4 // hidden
    layers = max(1, round((elements - vocab * hidden) / sum(math.prod(shape) for shape in layer.values())))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return config, shapes


def mixture(tensors: int) -> tuple[dict[str, object], Shapes]:
    """Config and tensors of a Mixtral with about so many tensors, of 10 KB each."""
    hidden, intermediate, layers = 64, 80, 32
    experts = tensors // (3 * layers)
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (1000, hidden), "model.embed_tokens.weight": (1000, hidden)}
    for number in range(layers):
        prefix = f"model.layers.{number}"
        for expert in range(experts):
            for name, shape in (
                ("w1", (intermediate, hidden)),
                ("w2", (hidden, intermediate)),
                ("w3", (intermediate, hidden)),
            ):
                shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (hidden,)
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16", "vocab_size": 1000,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": experts, "tie_word_embeddings": False,
    }  # fmt: skip
    return config, shapes


def write(
    folder: Path, made: tuple[dict[str, object], Shapes], seed: int, shards: int = 1, apart: float = 5e-5
) -> Path:
    """A checkpoint in a folder, if it is not there yet; seeds tell siblings apart, by so much an entry of 0.05."""
    config, shapes = made
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    noise = 0.05 * torch.randn(_NOISE // 2, generator=torch.Generator().manual_seed(0))
    noise += apart * torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed + 1))
    data = noise.bfloat16().view(torch.uint8).numpy().tobytes()
    total, held = sum(2 * math.prod(shape) for shape in shapes.values()), 0
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if held >= total * len(groups) / shards:
            groups.append({})
        groups[-1][name] = shape
        held += 2 * math.prod(shape)
    weight_map, position = {}, 0
    for number, group in enumerate(groups):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in group.items():
            size = 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            weight_map[name] = file
            offset += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            while offset:
                start = position % len(data)
                piece = data[start : start + min(offset, len(data) - start)]
                out.write(piece)
                offset -= len(piece)
                position += len(piece)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
