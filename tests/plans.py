"""Plans of headers: what tests of merging and of candidates begin with."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_soup.checkpoint import TensorInfo
from hf_soup.evaluation import ModelTemplate
from hf_soup.merging import Layout, Plan, layout
from hf_soup.merging.weight_files import WeightFile, WeightFiles
from hf_soup.recipe import MethodCall, Mixture


@dataclass(frozen=True)
class StoredModel:
    """What a layout asks of a model: its name, which errors say too, its tensors, and what identifies its bytes."""

    name: str
    tensors: Mapping[str, TensorInfo]
    state: str = ""
    base_state: str | None = None

    @property
    def label(self) -> str:
        """Its name."""
        return self.name


def make_plan(
    names: Sequence[str],
    headers: Sequence[Mapping[str, TensorInfo]],
    weights: Sequence[float],
    *,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    layers: Mapping[str, Sequence[float]] | None = None,
    overrides: Mapping[str, MethodCall] | None = None,
    seed: int = 0,
    with_base: bool = False,
    patched: Collection[str] = (),
    dtype: str | None = None,
    max_file_bytes: int = layout.MAX_FILE_BYTES,
    states: Sequence[str] = (),
) -> Plan:
    """Of some headers: all ingredients with their weights, and the base behind them, which has none."""
    sources = [
        StoredModel(name, header, state) for name, header, state in zip(names, headers, states or names, strict=True)
    ]
    base = sources.pop() if with_base else None
    with patch.object(layout, "MAX_FILE_BYTES", max_file_bytes):
        laid = Layout.of(sources, base, patched=patched, dtype=dtype)
    mixture = Mixture(
        dict(zip(laid.names, weights, strict=False)),  # the base has none
        MethodCall(method, dict(parameters or {})),
        {name: tuple(shares) for name, shares in (layers or {}).items()},
        dict(overrides or {}),
        seed,
    )
    return Plan(laid, mixture)


def files_here(paths: Sequence[Mapping[str, Path]], follow: Collection[Path] = ()) -> WeightFiles:
    """Weight files that are all on this machine; those to ``follow`` are hashed while they are read."""
    files = {path: WeightFile(0, path, follow=path in follow) for source in paths for path in source.values()}
    return WeightFiles([{name: files[path] for name, path in source.items()} for source in paths])


def candidate(plan: Plan, weights: Mapping[int, float], **changes: Any) -> Plan:
    """Of the same layout, other ingredients by their numbers, and other fields of the mixture."""
    names = {plan.layout.names[number]: weight for number, weight in weights.items()}
    return replace(plan, mixture=replace(plan.mixture, weights=names, **changes))


def mean(plan: Plan, weights: Mapping[int, float]) -> Plan:
    """Of the same layout, the mean of some ingredients by their numbers; of one, that one."""
    return Plan(plan.layout, Mixture({plan.layout.names[number]: weight for number, weight in weights.items()}))


def config_of(folder: Path) -> dict[str, Any]:
    """The config in a folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config


def template_of(folder: Path) -> ModelTemplate:
    """The template of a model whose config, and tokenizer or processor, are in a folder."""
    return ModelTemplate(config_of(folder), "float32", folder)
