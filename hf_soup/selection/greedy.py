"""Best first, and whoever does not hurt."""

from __future__ import annotations

from typing import Literal

from hf_soup.selection import ScoreFunction, Selected, Step, Weights, best_first, selection


@selection(needs_score=True)
def greedy(weights: Weights, score: ScoreFunction, *, accept: Literal[">=", ">"] = ">=") -> Selected:
    """Start from the best one and keep each next with which the soup scores no worse.

    The ingredients are taken in the order of their own validation scores, best first, equal ones in the order of the
    recipe. With ``accept=">="`` an ingredient is kept when the soup with it scores at least as well as before, as in
    Recipe 1 of the paper; with ``">"`` only when it scores better, as in the paper's code.

    When:
        Where some runs may be poor, and there are validation data.

    When not:
        With few validation rows: the choice is luck then, which `stability_repeats` shows.

    Args:
        weights: The ingredients and their shares; the shares of those that are kept stay as they are.
        score: The validation score of a soup.
        accept: ``>=`` or ``>``.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, Recipe 1.

    >>> gains = {"a": 0.9, "b": 0.8, "c": 0.5}
    >>> found = greedy(gains, lambda soup: 0.5 if "c" in soup else 0.9 if "a" in soup else 0.8)
    >>> found.weights
    {'a': 0.9, 'b': 0.8}
    """
    alone = best_first(weights, score)
    first, *others = alone
    kept, best = {first: weights[first]}, alone[first]
    trace = [Step((first,), best, kept=True)]
    for name in others:
        candidate = {**kept, name: weights[name]}
        found = score(candidate)
        better = found >= best if accept == ">=" else found > best
        trace.append(Step(tuple(candidate), found, better))
        if better:
            kept, best = candidate, found
    return Selected(kept, tuple(trace))
