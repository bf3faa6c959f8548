"""Scores of models that exist, on the data of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_soup._util.logs import PrintableLogger
from hf_soup.checkpoint import label_names, open_all, read_config
from hf_soup.errors import RecipeError, ScoringError
from hf_soup.evaluation import Candidates, load_data, model_template, require_memory
from hf_soup.hub import Token
from hf_soup.lineage import AlignedModel, AlignedModels
from hf_soup.merging import RunContext, fetch_weights, require_alone
from hf_soup.recipe import Recipe
from hf_soup.workflows.prepare import layout_of

logger = PrintableLogger(__name__)


def score(
    models: str | Path | Sequence[str | Path],
    recipe: Recipe,
    *,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The recipe's validation and test data on any models: model → data → score as plain data.

    Raises:
        SoupError: A model or the data cannot be used.
    """
    require_alone("`score`")
    if not recipe.validation and not recipe.test:
        raise RecipeError("The recipe names no data: it has neither `validation` nor `test`.")
    named, context = [models] if isinstance(models, str | Path) else models, RunContext(token, device, quiet=quiet)
    checkpoints = open_all(
        [str(each) for each in named], allow_pickle=recipe.allow_pickle, token=token, base=recipe.base_model
    )
    told: set[str] = set()
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    data_alone = recipe.model_copy(update={"calibration": None})
    for checkpoint in checkpoints:
        read_config(checkpoint.config, checkpoint.model)  # refuses what nobody could make a model of
        model = AlignedModel(checkpoint.model, checkpoint, checkpoint.tensors)
        alone = AlignedModels((model,), labels=label_names(checkpoint.config))
        layout = layout_of(alone, None)
        with model_template(alone, layout.dtype) as template:
            require_memory(layout, device=context.device)
            try:
                data = load_data(data_alone, template, context)
            except ScoringError as error:
                raise ScoringError.of(error, f"{checkpoint}: {error.message}") from None
            for note in data.notes:
                if note not in told:
                    logger.warning(note)
                told.add(note)
            with Candidates(layout, fetch_weights([checkpoint], quiet=quiet), data, context) as candidates:
                ((_, found),) = candidates.scores_alone().items()
                scores[str(checkpoint)] = {title: each.to_dict() for title, each in found.items()}
    return scores
