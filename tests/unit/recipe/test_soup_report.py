"""What is told of a soup: as it was written it is read, and what another version wrote as far as it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hf_soup import ResolveError, Soup
from hf_soup._util.io import write_json
from hf_soup.recipe import CalibrationErrors, ReportedOverride, Score, SoupReport

SCORE = {"metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "share": True, "less_is_better": False}
COMPARISON = {
    "metric": "accuracy",
    "difference": 0.1,
    "low": 0.0,
    "high": 0.2,
    "p": 0.04,
    "n": 10,
    "sentence": "better",
}
SQUARE = [[0.0, 0.5], [0.5, None]]
LEAST: dict[str, Any] = {
    "digest": "d" * 64, "weights": {"acme/a": 1.0}, "method": "linear", "select": "uniform", "scores": {},
    "license_agreed": True,
}  # fmt: skip
#: Every key, each with something in it.
WHOLE: dict[str, Any] = {
    "digest": "d" * 64,
    "weights": {"acme/a": 1.0, "local:ä\ud800": 0.5},
    "selected": ["acme/a", "acme/soup"],
    "made_of": {"acme/soup": ["local:ä\ud800"]},
    "method": "wise_ft",
    "parameters": {"alpha": {"depth": [0.2, 1]}, "normalize": True},
    "overrides": [
        {"tensors": "*", "method": "linear"}, {"tensors": "a*", "method": {"name": "ties", "density": 1, "scale": 0.5}},
    ],
    "select": "learned",
    "architecture": "BertModel",
    "tasks": ["text-classification"],
    "library": "transformers",
    "encoder": "SentenceTransformer",
    "head_of": None,
    "validation": ["rows accuracy"],
    "scores": {"soup": {"rows accuracy": SCORE}},
    "best": {"rows accuracy": "acme/a"},
    "comparisons": {"rows accuracy": {**COMPARISON, "against": "acme/a", "significant": True}},
    "calibration_errors": {"soup": {"rows accuracy": {"ece": 0.1, "nll": float("inf"), "brier": 0.3}}},
    "diversity": {
        "rows accuracy": {
            "models": ["acme/a", "acme/soup"], "disagreement": SQUARE, "double_fault": SQUARE, "shared_errors": SQUARE,
            "mean": {"disagreement": 0.5, "double_fault": 0.5, "shared_errors": None},
        }
    },
    "greedy_ensemble": ["acme/a"],
    "curve": [{"parameters": {"alpha": 0.2}, "score": 0.5, "scores": {"rows accuracy": SCORE}}],
    "trace": [{"ingredients": ["acme/a"], "score": 0.5, "kept": True}],
    "history": [
        {"epoch": 0, "train_loss": None, "inner_loss": 0.7, "scale": 1.0, "weights": {"acme/a": 0.5, "acme/soup": 0.5}}
    ],
    "stability": {
        "repeats": 1, "chosen": {"acme/a": 1}, "gains": [0.0], "mean": 0.0, "low": 0.0, "high": 0.0, "sentence": "even",
    },
    "test": [
        {
            "task": "text-classification", "dataset": "local:rows.csv", "split": None, "metric": "accuracy",
            "config": None, "revision": "sha256:0", "labels": ["a", "b"], "label_column": None, "input_columns": None,
            "cluster_column": "article", "name": "rows", "batch_size": 32, "weight": 1.0, "trust_remote_code": False,
            "assistant_only": False, "at_least": None, "title": "rows accuracy",
            "loader": "csv",
        }
    ],
    "batch_norm": {
        "data": "rows", "layers": 2, "rows": 64, "batches": 2, "batch_size": 32, "unreached": ["bn.1"],
    },
    "adapter": {"rank": 4, "error": 0.25, "errors": {"q": 0.25}, "left_out": ["cls_token"]},
    "update": {
        "soup": "acme/soup", "revision": None, "added": ["acme/b"], "before": {"rows accuracy": SCORE},
        "after": {"rows accuracy": SCORE}, "comparisons": {"rows accuracy": {**COMPARISON, "significant": False}},
        "left_out": ["'x' is not measured."], "helps": None, "sentence": "nobody can tell",
    },
    "license_agreed": False,
    "notes": ["<b>"],
    "alignments": ["nobody has it"],
    "lineage": {
        "verdict": "likely",
        "ancestor": {"model": "acme/base", "revision": "0" * 40, "source": "card"},
        "ingredients": [
            {
                "name": "acme/a", "model": "acme/a", "revision": "1" * 40, "parameters": 12, "dtype": "F32",
                "license": None, "ancestor_cosine": 0.9, "notes": [],
            }
        ],
        "reasons": [{"code": "labels", "severity": "warning", "message": "…", "ingredients": ["acme/a"]}],
        "alignments": [],
        "evidence": [{"part": "body", "names": ["a", "b"], "tensors": ["x"], "cosine": SQUARE, "rows": SQUARE}],
        "transferred_bytes": 3,
    },
    "harness": {"arc_easy": "lm-eval 0.4.13; arc_easy version 1.0; sha256:0"},
    "versions": {"hf-soup": "1"},
    "system": "Linux x86_64",
}  # fmt: skip


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    """To the byte: the order of keys, whole numbers and others, numbers without end, half a letter."""
    write_json(tmp_path / "soup.json", WHOLE)
    text = (tmp_path / "soup.json").read_bytes()
    report = SoupReport.parse(text)
    write_json(tmp_path / "again.json", report.to_dict())
    assert (tmp_path / "again.json").read_bytes() == text
    assert SoupReport.parse((tmp_path / "again.json").read_bytes()) == report
    assert list(SoupReport.model_fields) == list(WHOLE)


def test_fields_have_types() -> None:
    report = SoupReport.model_validate(WHOLE)
    assert report.scores["soup"]["rows accuracy"] == Score("accuracy", 0.5, 0.4, 0.6, 10)
    assert report.calibration_errors["soup"]["rows accuracy"] == CalibrationErrors(ece=0.1, nll=float("inf"), brier=0.3)
    assert report.overrides[0] == ReportedOverride.model_validate({"tensors": "*", "method": "linear"})
    assert report.lineage
    assert report.lineage.evidence[0].cosine == ((0.0, 0.5), (0.5, None))
    with pytest.raises(ValidationError, match="frozen"):
        report.digest = "e" * 64  # type: ignore[misc]


def test_another_version_may_know_less_or_more() -> None:
    more = SoupReport.parse(json.dumps({**WHOLE, "mood": 3, "scores": {"soup": {"rows": {**SCORE, "mood": 3}}}}))
    assert more.to_dict() == SoupReport.model_validate({**WHOLE, "scores": {"soup": {"rows": SCORE}}}).to_dict()
    newer = [{"tensors": "*", "method": "linear", "mood": 3}]
    assert SoupReport.parse(json.dumps({**WHOLE, "overrides": newer})).overrides[0].tensors == "*"
    less = SoupReport.parse(json.dumps(LEAST))
    assert (less.update, less.curve, less.made_of, less.library) == (None, (), {}, "transformers")


@pytest.mark.parametrize("key", LEAST)
def test_without_what_every_soup_has_it_is_none(key: str, tmp_path: Path) -> None:
    (tmp_path / "soup.json").write_text(json.dumps(LEAST))
    assert Soup.open(tmp_path).weights == {"acme/a": 1.0}
    (tmp_path / "soup.json").write_text(json.dumps({name: value for name, value in LEAST.items() if name != key}))
    with pytest.raises(ResolveError, match=rf"is not a soup\. Cannot read soup\.json:\n  {key}: Field required\n"):
        Soup.open(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"weights": [1, 2]}, {"weights": {"a": "much"}}, {"scores": {"soup": 3}}, {"scores": {"soup": {"rows": {}}}},
        {"lineage": "none"}, {"lineage": {"ingredients": [{"revision": "1"}]}}, {"made_of": 3}, {"curve": [1]},
        {"update": {"soup": "acme/a", "added": ["acme/b"], "after": [1]}}, {"overrides": [{"tensors": "*"}]},
    ],
)  # fmt: skip
def test_what_is_not_as_it_should_be_is_no_soup(said: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "soup.json").write_text(json.dumps({**LEAST, **said}))
    with pytest.raises(ResolveError, match=rf"is not a soup\. Cannot read soup\.json:\n  {next(iter(said))}"):
        Soup.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"digest": "\xff"'])
def test_what_is_no_json_is_no_soup(text: str, tmp_path: Path) -> None:
    (tmp_path / "soup.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ResolveError, match=r"is not a soup: it has no readable soup\.json"):
        Soup.open(tmp_path)
