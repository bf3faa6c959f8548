"""Where the tensors of the disk lie in a model that transformers made of them, found by content.

So it rests on no name: what a family renames, stacks or splits is taken apart by transformers itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_soup.checkpoint import bytes_of
from hf_soup.evaluation.model import build_model
from hf_soup.merging import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedParameters:
    """Where tensors lie.

    Args:
        names: What transformers calls a tensor when it saves the model → its number in the layout.
        direct: Number of a tensor that is a parameter or buffer as it is → the name of that.
        lost: What transformers saves that holds numbers of the disk and is none of its tensors.
    """

    names: Mapping[str, int]
    direct: Mapping[int, str]
    lost: tuple[str, ...]


def find_loaded_parameters(
    layout: Layout, numbers: Collection[int], others: Mapping[str, Tensor], config: Mapping[str, Any], task: str
) -> tuple[PreTrainedModel, LoadedParameters]:
    """A model in float32 that has numbers which occur once in the place of some tensors, and where these lie in it.

    Args:
        layout: Names and shapes.
        numbers: Of the tensors.
        others: All other tensors.
        config, task: Of the model, as in `build_model`.

    Raises:
        ScoringError: The tensors make no model.
    """
    generator = torch.Generator().manual_seed(0)
    made, whose = dict(others), {}
    for row, number in enumerate(numbers):
        tensor = layout.tensors[number]
        # From 2 on, which nothing is that a model fills in by itself.
        made[tensor.name] = row + 2 + torch.rand(tensor.shape, generator=generator)
        whose[_digest(made[tensor.name])] = number
    model = build_model(config, made, task, torch.float32)
    inside = held(model)
    places = {tensor.data_ptr(): name for name, tensor in inside.items()}
    names, direct, lost = {}, {}, []
    for name, piece in on_disk(model, inside).items():
        number = whose.get(_digest(piece), -1)
        if number >= 0:
            names[name] = number
            home = places.get(piece.data_ptr())
            if home is not None and inside[home].shape == piece.shape and inside[home].is_contiguous():
                direct[number] = home
        elif piece.numel() and piece.min() >= 2:
            lost.append(name)
    return model, LoadedParameters(names, direct, tuple(lost))


def held(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, tied ones once."""
    every = model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(every.items()) if tensor.is_floating_point()}
    return {name: every[name] for name in once.values()}


def on_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What lies in memory, or a gradient of it, in the pieces in which it lies on the disk.

    Renaming, stacking, splitting and transposing are orthogonal: to undo them is their adjoint. They move numbers and
    change none, so this holds for the squares of a gradient too.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        given = {name: each.detach() for name, each in tensors.items()}
        found: dict[str, Tensor] = revert_weight_conversion(model, given)
    return found


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(bytes_of(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu())).digest()
