"""What a model that is scored has beside its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_soup._util.text import first_line
from hf_soup.errors import ScoringError
from hf_soup.lineage import AlignedModels, soup_config, write_assets


@dataclass(frozen=True)
class ModelTemplate:
    """What a model that is scored has beside its weights.

    Args:
        config: Its ``config.json``.
        dtype: torch's name of the type of its parameters.
        folder: Has that config, and the tokenizer or processor; other machines do not have the folder.
        head_of: The ingredient whose head all have, where only bodies are averaged.
    """

    config: Mapping[str, Any] = field(repr=False)
    dtype: str
    folder: Path
    head_of: str | None = None

    @cached_property
    def generation(self) -> dict[str, Any]:
        """The settings of the donor's ``generation_config.json``; of the folder, so in the first process alone.

        Raises:
            ScoringError: They are none that transformers can read.
        """
        from transformers import GenerationConfig

        file = self.folder / "generation_config.json"
        try:
            settings: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
            GenerationConfig.from_dict(settings)
        except Exception as error:  # a stranger's file, of which transformers may make anything
            raise ScoringError(
                f"Cannot read the donor's generation_config.json: {first_line(error)}",
                hint="Mend or remove it: it says how the models write.",
            ) from error
        return settings


@contextmanager
def model_template(models: AlignedModels, dtype: str) -> Iterator[ModelTemplate]:
    """The template of what models are merged into, in a temporary folder.

    Args:
        models: That are merged.
        dtype: torch's name of the type that is written.
    """
    with tempfile.TemporaryDirectory(prefix="hf-soup-") as folder:
        config = soup_config(models, dtype)
        write_assets(Path(folder), config, models)
        yield ModelTemplate(config, dtype, Path(folder), models.head_of)


def scored_with(head_of: str | None) -> list[str]:
    """A sentence about scores of models that all have one's head, where it is so."""
    said = "so their scores are those of their bodies under it, not of the models as they were published"
    return [] if head_of is None else [f"Ingredients are scored with {head_of}'s head, {said}."]
