"""Held-out and report data → `Score`. The only importer of ``evaluate`` and ``datasets``, and a lazy one.

`prepare` reads the data of a recipe and gives one `Bench` for each `Scoring`; `Resident` is a model of
merged tensors; `Bench.logits` runs it, `Bench.score` judges it, `compare` says whether two differ.
"""

from hf_soup.scoring.bench import Bench, Logits, compare, notes_of, prepare
from hf_soup.scoring.ensembles import (
    calibration,
    diversity,
    ensemble,
    greedy_ensemble,
    logit_ensemble,
    predicted_gap,
)
from hf_soup.scoring.examples import Inputs, prepare_examples
from hf_soup.scoring.metrics import METRICS
from hf_soup.scoring.model import Resident, build_model, require_device
from hf_soup.scoring.statistics import Comparison, Score

__all__ = [
    "METRICS",
    "Bench",
    "Comparison",
    "Inputs",
    "Logits",
    "Resident",
    "Score",
    "build_model",
    "calibration",
    "compare",
    "diversity",
    "ensemble",
    "greedy_ensemble",
    "logit_ensemble",
    "notes_of",
    "predicted_gap",
    "prepare",
    "prepare_examples",
    "require_device",
]
