"""Which models a soup is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_soup.lineage import AlignedModels, LineageReport, soup_config
from hf_soup.merging import AdapterPlan, Plan


@dataclass(frozen=True)
class MergedModels:
    """Which models a soup is of, with what shares.

    Args:
        lineage: Of all leaves.
        groups: For each ingredient, numbers of the leaves that it is made of.
        leaves: Those that went in, and the base where the method needed one.
        plan: What was averaged.
        notes: What a reader should know of the files.
        adapter: How it is made, where the soup is an adapter.
    """

    lineage: LineageReport
    groups: Mapping[str, Mapping[int, object]]
    leaves: AlignedModels
    plan: Plan
    notes: tuple[str, ...] = ()
    adapter: AdapterPlan | None = None

    @property
    def weights(self) -> Mapping[str, float]:
        """Shares of the leaves that went in."""
        return self.plan.mixture.weights

    @cached_property
    def config(self) -> dict[str, Any]:
        """The soup's."""
        return soup_config(self.leaves, self.plan.layout.dtype)

    @cached_property
    def made_of(self) -> dict[str, tuple[str, ...]]:
        """Names of the leaves of every ingredient."""
        names = self.lineage.models.names
        return {name: tuple(names[number] for number in numbers) for name, numbers in self.groups.items()}
