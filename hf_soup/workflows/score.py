"""Scores of models that exist, on the data of a recipe."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_soup.checkpoint import label_names, open_all, read_config
from hf_soup.errors import RecipeError
from hf_soup.hub import Token
from hf_soup.lineage import AlignedModel, AlignedModels, soup_config, write_assets
from hf_soup.merging import fetch_weights
from hf_soup.recipe import Recipe
from hf_soup.workflows.prepare import plan_of, prepare_evaluation

logger = logging.getLogger(__name__)


def score(
    models: str | Path | Sequence[str | Path],
    recipe: Recipe,
    *,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The recipe's held-out and report data on any models: model → data → score as plain data.

    Raises:
        SoupError: A model or the data cannot be used.
    """
    from hf_soup.evaluation import Evaluation, notes_of
    from hf_soup.merging import require_alone

    require_alone("`score`")
    if not recipe.score and not recipe.report:
        raise RecipeError("The recipe names no data: it has neither `score` nor `report`.")
    named = [models] if isinstance(models, str | Path) else models
    checkpoints = open_all([str(each) for each in named], allow_pickle=recipe.allow_pickle, token=token)
    told: set[str] = set()
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for checkpoint in checkpoints:
        read_config(checkpoint.config, checkpoint.model)  # refuses what nobody could make a model of
        model = AlignedModel(checkpoint.model, checkpoint, checkpoint.tensors)
        alone = AlignedModels((model,), labels=label_names(checkpoint.config))
        plan = plan_of(Recipe(ingredients=[checkpoint.model]), alone, {checkpoint.model: 1.0})
        with tempfile.TemporaryDirectory(prefix="hf-soup-") as folder:
            config = soup_config(alone, plan.layout.dtype)
            write_assets(Path(folder), config, alone)
            benches = prepare_evaluation(recipe, plan, Path(folder), config, device, token, quiet=quiet)
            for note in notes_of(benches):
                if note not in told:
                    logger.warning(note)
                told.add(note)
            with Evaluation(
                benches, held_out=0, names=[checkpoint.model], plan=plan,
                paths=fetch_weights([checkpoint], quiet=quiet), config_folder=Path(folder), device=device, quiet=quiet,
            ) as evaluation:  # fmt: skip
                scores[str(checkpoint)] = {at: each.to_dict() for at, each in evaluation.alone().items()}
    return scores
