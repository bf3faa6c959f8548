"""All of them."""

from __future__ import annotations

from hf_soup.selection import ScoreFunction, Selected, Weights, selection


@selection(needs_score=False)
def uniform(weights: Weights, score: ScoreFunction) -> Selected:
    """Every ingredient goes in, with the share that the recipe gives it.

    When:
        Where all runs are good, or there are no validation data.

    When not:
        Where one may be poor: it spoils the soup.

    Args:
        weights: The ingredients and their shares.
        score: Not called.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482.

    >>> uniform({"a": 1.0, "b": 1.0}, score=len).weights
    {'a': 1.0, 'b': 1.0}
    """
    return Selected(weights)
