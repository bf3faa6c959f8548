"""What was measured of a soup and its ingredients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_soup.recipe import CalibrationErrors, Comparison, Diversity, Score

SOUP, LAST = "soup", "last version"
#: Of probabilities, of logits, and of the logits of those that help.
ENSEMBLE, LOGIT_ENSEMBLE, GREEDY_ENSEMBLE = "ensemble", "logit ensemble", "greedy ensemble"


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured; nothing, where the recipe names no data.

    Args:
        scores: Name of a model (every ingredient, the soup, ensembles) → title of the data → its score.
        best: The ingredient that is best on the validation data; without such data, on each report by itself.
        comparisons: Title of the data → the soup against the best ingredient there.
        since: The same against the last version of the soup, where it is an update.
        calibration: As ``scores`` → how far probabilities can be believed.
        diversity: Title of the data → how differently the ingredients err.
        in_ensemble: The ingredients in the greedy ensemble, best first.
        curve: For each point that was tried, title of the data → its score.
        notes: About the data, and whose head the models have.
        warnings: About all of it.
    """

    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    best: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    since: Mapping[str, Comparison] = field(default_factory=dict)
    calibration: Mapping[str, Mapping[str, CalibrationErrors]] = field(default_factory=dict)
    diversity: Mapping[str, Diversity] = field(default_factory=dict)
    in_ensemble: tuple[str, ...] = ()
    curve: tuple[Mapping[str, Score], ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
