"""The best one alone, and the best few."""

from __future__ import annotations

from typing import Annotated

from hf_soup.errors import RecipeError
from hf_soup.selection import ScoreFunction, Selected, Step, Weights, Within, best_first, selection


@selection(needs_score=True)
def best(weights: Weights, score: ScoreFunction) -> Selected:
    """The ingredient that is best on the validation data, alone.

    When:
        As what a soup is compared with.

    When not:
        Where several runs are good: their soup costs no more.

    Args:
        weights: The ingredients and their shares.
        score: The validation score of a soup.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, the baseline.

    >>> best({"a": 1.0, "b": 1.0}, lambda soup: 0.9 if "b" in soup else 0.8).weights
    {'b': 1.0}
    """
    return top_k(weights, score, k=1)


def _check(weights: Weights, *, k: int = 3) -> None:
    if k > len(weights):
        raise RecipeError(f"top_k: `k` is {k}, and there are {len(weights)} ingredients.")


@selection(needs_score=True, check=_check)
def top_k(weights: Weights, score: ScoreFunction, *, k: Annotated[int, Within("[1, inf)")] = 3) -> Selected:
    """The soup of the ``k`` ingredients that are best on the validation data.

    When:
        To make a soup with few scorings, one of each ingredient.

    When not:
        Where good models may not average: nothing looks at whether they do.

    Args:
        weights: The ingredients and their shares.
        score: The validation score of a soup.
        k: How many, from 1 to the number of ingredients; equal ones in the order of the recipe.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, where the uniform soup of the best few is the
        greedy soup without its test.

    >>> gains = {"a": 0.7, "b": 0.9, "c": 0.8}
    >>> list(top_k(gains, lambda soup: max(soup.values()), k=2).weights)
    ['b', 'c']
    """
    alone = best_first(weights, score)
    chosen = list(alone)[:k]
    trace = [Step((name,), found, kept=name in chosen) for name, found in alone.items()]
    kept = {name: weights[name] for name in chosen}
    if k > 1:
        trace.append(Step(tuple(chosen), score(kept), kept=True))
    return Selected(kept, tuple(trace))
