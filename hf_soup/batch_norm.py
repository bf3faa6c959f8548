"""Running statistics of batch normalisation, which belong to the weights that they were collected with."""

from __future__ import annotations

from hf_soup.compatibility import Reason
from hf_soup.lineage import Lineage
from hf_soup.mixing import is_average
from hf_soup.recipe import Recipe
from hf_soup.training_run import averages_run

_COUNTED, _MEAN = "num_batches_tracked", "running_mean"


def running_statistics(recipe: Recipe, lineage: Lineage) -> list[Reason]:
    """What is to be said of a soup of models with batch normalisation: its mean statistics are not those of its mean.

    A layer whose statistics are frozen, as in detectors, has them without a count of batches, and they are constants.
    Methods over a run are defined with a pass over data that collects them again, so they refuse.

    Args:
        recipe: With the method.
        lineage: The ingredients.
    """
    if len(lineage.checkpoints) == 1 and is_average(recipe):
        return []
    layers = {
        name.removesuffix(_COUNTED)
        for checkpoint in lineage.checkpoints
        for name in checkpoint.tensors
        if name.endswith(_COUNTED) and name.removesuffix(_COUNTED) + _MEAN in checkpoint.tensors
    }
    if not layers:
        return []
    many = f"{len(layers)} layers" if len(layers) > 1 else "a layer"
    message = (
        f"The model has {many} of batch normalisation, such as '{min(layers).rstrip('.')}', and the mean of running "
        "statistics is not the statistics of the mean weights."
    )
    if averages_run(recipe):
        message += (
            f" {recipe.method.name} is defined with a pass over training data that collects them again, which is not "
            "built yet. With `method: linear` the statistics are averaged as well; score the soup then, or collect "
            "them with torch.optim.swa_utils.update_bn."
        )
        return [Reason("batch-norm", message, lineage.names, refuses=True)]
    message += " Score the soup, or collect them again with torch.optim.swa_utils.update_bn."
    return [Reason("batch-norm", message, lineage.names)]
