"""From what a recipe names to checkpoints: Hub ids, folders, runs of a Trainer, published soups."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.ingredients.published import (
        Paths as Paths,
        Published as Published,
        as_mapping as as_mapping,
        local_path as local_path,
        model_index as model_index,
        open_published as open_published,
        read_small as read_small,
        value_on_card as value_on_card,
    )
    from hf_soup.ingredients.resolve import (
        ResolvedIngredients as ResolvedIngredients,
        resolve_ingredients as resolve_ingredients,
        with_base_apart as with_base_apart,
    )
    from hf_soup.ingredients.trainer_run import (
        expand_runs as expand_runs,
        within_a_run as within_a_run,
    )
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
