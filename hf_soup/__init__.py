"""Model soups on the Hugging Face Hub: check, average, score and publish fine-tuned models.

>>> import hf_soup
>>> recipe = hf_soup.Recipe(ingredients=["acme/vit-1", "acme/vit-2"], select="uniform")
>>> recipe.ingredients[1].model
'acme/vit-2'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_soup.barrier import barriers
    from hf_soup.basin import Barriers
    from hf_soup.cooked import Soup
    from hf_soup.errors import (
        IncompatibleError,
        MergeError,
        PublishError,
        RecipeError,
        ResolveError,
        ScoringError,
        SoupError,
    )
    from hf_soup.foraging import Foraged, forage
    from hf_soup.lineage import Lineage
    from hf_soup.recipe import Ingredient, Recipe, Scoring
    from hf_soup.soup import check, cook, score
    from hf_soup.updating import Update
    from hf_soup.verification import Verified, verify

__version__ = "0.1.0"

# Names are looked up when they are used, so that `import hf_soup` loads neither torch nor transformers.
_PLACES = {
    "barriers": "barrier",
    "Barriers": "basin",
    "check": "soup",
    "cook": "soup",
    "score": "soup",
    "Soup": "cooked",
    "forage": "foraging",
    "Foraged": "foraging",
    "Lineage": "lineage",
    "verify": "verification",
    "Verified": "verification",
    "Recipe": "recipe",
    "Ingredient": "recipe",
    "Scoring": "recipe",
    "Update": "updating",
    "SoupError": "errors",
    "RecipeError": "errors",
    "ResolveError": "errors",
    "IncompatibleError": "errors",
    "MergeError": "errors",
    "ScoringError": "errors",
    "PublishError": "errors",
}

__all__ = [
    "Barriers",
    "Foraged",
    "IncompatibleError",
    "Ingredient",
    "Lineage",
    "MergeError",
    "PublishError",
    "Recipe",
    "RecipeError",
    "ResolveError",
    "Scoring",
    "ScoringError",
    "Soup",
    "SoupError",
    "Update",
    "Verified",
    "barriers",
    "check",
    "cook",
    "forage",
    "score",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hf_soup' has no attribute '{name}'")
    if _PLACES[name] not in ("errors", "recipe"):
        from hf_soup.system import require_endpoint, require_supported

        require_supported()
        require_endpoint()
    return getattr(import_module(f"hf_soup.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
