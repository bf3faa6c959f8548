"""All of them, but for those that hurt."""

from __future__ import annotations

from hf_soup.selection import ScoreFunction, Selected, Step, Weights, best_first, selection


@selection(needs_score=True)
def pruned(weights: Weights, score: ScoreFunction) -> Selected:
    """Start from all ingredients and drop each without which the soup scores better.

    They are tried in the order of their own validation scores, worst first, again and again until a whole round drops
    none. On a tie an ingredient stays. It costs a forward pass for each ingredient and each trial.

    When:
        For ingredients that help each other only together, which greedy passes over.

    When not:
        Where several may be poor: two of them may hide each other.

    Args:
        weights: The ingredients and their shares; the shares of those that stay do not change.
        score: The validation score of a soup.

    Reference:
        Dansereau et al., Model soups to increase inference without increasing compute time, arXiv:2301.10092 (the
        idea; order and end as said here).

    >>> found = pruned({"a": 1.0, "b": 1.0, "c": 1.0}, lambda soup: 0.5 if "c" in soup else 0.9)
    >>> found.weights
    {'a': 1.0, 'b': 1.0}
    """
    kept, found = dict(weights), score(weights)
    trace = [Step(tuple(kept), found, kept=True)]
    order = list(best_first(weights, score))[::-1]
    dropped = True
    while dropped:
        dropped = False
        for name in order:
            if name not in kept or len(kept) == 1:
                continue
            without = {other: share for other, share in kept.items() if other != name}
            tried = score(without)
            trace.append(Step(tuple(without), tried, kept=tried > found))
            if tried > found:
                kept, found, dropped = without, tried, True
    return Selected(kept, tuple(trace))
