"""Model soups on the Hugging Face Hub: check, average, score and publish fine-tuned models.

>>> import hf_soup
>>> recipe = hf_soup.Recipe(ingredients=["acme/vit-1", "acme/vit-2"], select="uniform")
>>> recipe.ingredients[1].model
'acme/vit-2'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_soup._util.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_soup.errors import (
        IncompatibleError,
        MergeError,
        PublishError,
        RecipeError,
        ResolveError,
        ScoringError,
        SoupError,
    )
    from hf_soup.lineage import LineageReport
    from hf_soup.publishing import Soup
    from hf_soup.recipe import Ingredient, Recipe, Scoring, SoupReport
    from hf_soup.workflows.check import check
    from hf_soup.workflows.connectivity import ConnectivityReport, connectivity
    from hf_soup.workflows.cook import cook
    from hf_soup.workflows.score import score
    from hf_soup.workflows.search import SearchResult, search
    from hf_soup.workflows.update import Update
    from hf_soup.workflows.verify import VerificationReport, verify
else:
    from hf_soup._util.lazy import lazy_exports

    _find, __dir__ = lazy_exports(__name__)

    def __getattr__(name: str) -> Any:
        if (
            name in __all__
            and not name.endswith("Error")
            and name not in ("Ingredient", "Recipe", "Scoring", "SoupReport")
        ):
            from hf_soup._util.platform import require_endpoint, require_supported

            require_supported()
            require_endpoint()
        return _find(name)


__all__ = [
    "ConnectivityReport",
    "IncompatibleError",
    "Ingredient",
    "LineageReport",
    "MergeError",
    "PublishError",
    "Recipe",
    "RecipeError",
    "ResolveError",
    "Scoring",
    "ScoringError",
    "SearchResult",
    "Soup",
    "SoupError",
    "SoupReport",
    "Update",
    "VerificationReport",
    "check",
    "connectivity",
    "cook",
    "score",
    "search",
    "verify",
]
