"""Running statistics of batch normalisation, which belong to the weights that they were collected with."""

from __future__ import annotations

from collections.abc import Iterable

from hf_soup.checkpoint import COUNT
from hf_soup.lineage import AlignedModels
from hf_soup.recipe import Finding, Recipe, is_average, methods_of
from hf_soup.selection import SELECTIONS

#: What is collected, under the names that torch gives it.
MEAN, VARIANCE = "running_mean", "running_var"
#: Within what statistics that are collected again are the same on every machine, in parts of the largest in a layer.
BOUND = 1e-4
_ADD = "`calibration: {task: …, dataset: …, split: train}`"


def batch_norms(names: Iterable[str]) -> list[str]:
    """The layers of batch normalisation among tensors, as what stands before the names of their statistics; sorted.

    A layer whose statistics are frozen, as in detectors, has them without a count of batches, and they are constants.

    >>> batch_norms(["bn.running_mean", "bn.num_batches_tracked", "frozen.running_mean", "frozen.running_var"])
    ['bn.']
    """
    known = set(names)
    layers = (name.removesuffix(COUNT) for name in known if name.endswith(COUNT))
    return sorted(layer for layer in layers if layer + MEAN in known)


def _layers(models: AlignedModels) -> list[str]:
    return sorted({layer for model in models.ingredients for layer in batch_norms(model.checkpoint.tensors)})


def running_statistics(recipe: Recipe, models: AlignedModels) -> list[Finding]:
    """What is to be said of a soup of models with batch normalisation: its mean statistics are not those of its mean.

    A selection that picks from a run is defined with a pass over data that collects them again, so it refuses where the
    recipe has no `calibration` for it.

    Args:
        recipe: With the method.
        models: The ingredients.
    """
    if recipe.calibration or (len(models.ingredients) == 1 and is_average(recipe)) or not (layers := _layers(models)):
        return []
    many = f"{len(layers)} layers" if len(layers) > 1 else "a layer"
    message = (
        f"The model has {many} of batch normalisation, such as '{layers[0].rstrip('.')}', and the mean of running "
        "statistics is not the statistics of the mean weights."
    )
    refuses = SELECTIONS[recipe.select.name].picks is not None
    if refuses:
        message += (
            f" {recipe.select.name} is defined with a pass over training data that collects them again: add {_ADD} to "
            "the recipe. With another `select` they may be averaged as well."
        )
    else:
        message += f" Add {_ADD} to the recipe, and they are collected again; else score the soup."
    return [Finding("batch-norm", message, models.names, refuses=refuses)]


def looks_at_calibration(recipe: Recipe, models: AlignedModels) -> bool:
    """Whether calibration data is of use: for a selection, a method, or running statistics of batch normalisation.

    Args:
        recipe: With or without `calibration`.
        models: The ingredients.
    """
    learns = SELECTIONS[recipe.select.name].learns == "entropy"
    return learns or any(method.statistics for method in methods_of(recipe)) or bool(_layers(models))
