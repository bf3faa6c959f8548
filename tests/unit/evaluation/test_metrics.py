"""Metrics that are not built in: functions, `evaluate` scripts, and what may not run."""

import sys
from pathlib import Path

import answered
import numpy as np
import pytest
import sklearn.metrics

from hf_soup.errors import ScoringError
from hf_soup.evaluation import ModelTemplate, load_data, metrics, statistics
from hf_soup.evaluation.formulas import CLASS_METRICS
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.evaluation.statistics import resampled
from hf_soup.merging import RunContext
from hf_soup.recipe import Recipe, Scoring

LABELS = np.random.default_rng(0).integers(0, 3, 200)
ANSWERS = np.where(np.random.default_rng(1).random(200) < 0.7, LABELS, 0)
FUNCTIONS = """
from sklearn.metrics import cohen_kappa_score

def kappa(references, predictions):
    return cohen_kappa_score(references, predictions)

def fails(references, predictions):
    raise RuntimeError("no ratings\\nmore")

def nothing(references, predictions):
    return None

def nan(references, predictions):
    return float("nan")

def rare(references, predictions):
    return (predictions == references)[references == 7].mean() if (references == 7).any() else float("nan")

def text(references, predictions):
    return "0.5"

def ends(references, predictions):
    raise SystemExit(3)

number = 3
"""
SCRIPT = """
import datasets
import evaluate
from sklearn.metrics import cohen_kappa_score

class Kappa(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        kappa = cohen_kappa_score(references, predictions)
        return RESULT
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with functions, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("own_metrics", None)
    metrics.forget()
    (tmp_path / "own_metrics.py").write_text(FUNCTIONS)
    return tmp_path


def write_script(folder: Path, name: str, result: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.py").write_text(SCRIPT.replace("RESULT", result))
    return folder / name


def test_a_function_of_the_current_folder_scores_with_an_interval() -> None:
    score = answered.score("own_metrics:kappa", LABELS, ANSWERS)
    assert score.value == sklearn.metrics.cohen_kappa_score(LABELS, ANSWERS)
    assert score.low < score.value < score.high
    draws = resampled(LABELS, ANSWERS, metrics.find("own_metrics:kappa"))
    assert np.quantile(draws, 0.025) == pytest.approx(score.low, abs=0.03)


def test_the_interval_of_a_function_is_that_of_the_built_in_metric(here: Path) -> None:
    (here / "own_metrics.py").write_text(
        "from sklearn.metrics import f1_score\ndef f1(r, p):\n    return f1_score(r, p, average='macro')\n"
    )
    own, built_in = (answered.score(name, LABELS, ANSWERS) for name in ("own_metrics:f1", "f1_macro"))
    assert (own.value, own.low, own.high) == pytest.approx((built_in.value, built_in.low, built_in.high), abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("no_such_module:f", "Cannot import the metric 'no_such_module:f': ModuleNotFoundError: No module"),
        ("own_metrics:other", "Cannot import the metric .* has no attribute 'other'"),
        ("own_metrics:number", "'own_metrics:number' is no function but 3"),
        ("own_metrics:fails", "The metric 'own_metrics:fails' fails on 200 rows: RuntimeError: no ratings$"),
        ("own_metrics:nothing", r"fails on 200 rows: TypeError: float\(\) argument must be"),
        ("own_metrics:text", "fails on 200 rows: TypeError: '0.5' is a text and no number"),
        ("own_metrics:ends", r"fails on 200 rows: SystemExit: it ends the process, by sys\.exit\(3\)"),
        ("own_metrics:nan", "The metric 'own_metrics:nan' gives nan on 200 rows"),
    ],
)
def test_functions_that_are_no_metrics(metric: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        answered.score(metric, LABELS, ANSWERS)


def test_a_metric_without_a_value_for_some_draws_of_rows(here: Path) -> None:
    """One row of the class: about a third of the resamples have none."""
    labels = np.append(LABELS, 7)
    assert answered.value("own_metrics:rare", labels, labels) == 1.0
    with pytest.raises(ScoringError, match="gives nan on 201 rows") as raised:
        answered.score("own_metrics:rare", labels, labels)
    assert "draw rows again" in raised.value.hint


@pytest.mark.parametrize(("result", "file"), [("{'own_kappa': kappa, 'n': 3}", False), ("{'score': kappa}", True)])
def test_an_evaluate_script_of_the_users(here: Path, result: str, file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    folder = write_script(here / "metrics", "own_kappa", result)
    path = folder / "own_kappa.py" if file else folder
    own, function = answered.score(str(path), LABELS, ANSWERS), answered.score("own_metrics:kappa", LABELS, ANSWERS)
    assert (own.value, own.low, own.high) == (function.value, function.low, function.high)
    scoring = Scoring(task="text-classification", dataset="acme/mood", split="test", metric=str(path))
    assert (scoring.measure, scoring.title) == ("own_kappa", "acme/mood test own_kappa")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{'a': kappa, 'b': 1.0}", "The metric 'own_kappa' gives a, b; which of them counts"),
        ("{}", "gives nothing; which of them"),
        ("{'own_kappa': [1.0, 2.0]}", "fails on 200 rows: TypeError: float"),
        ("{'own_kappa': float('nan')}", "gives nan on 200 rows"),
        ("{'own_kappa': '0.5'}", "'0.5' is a text and no number"),
        ("missing", "fails on 200 rows: NameError: name 'missing' is not defined"),
    ],
)
def test_scripts_that_give_no_number(here: Path, result: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        answered.score(str(write_script(here / "metrics", "own_kappa", result)), LABELS, ANSWERS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_package_here\n", "Cannot load the metric 'broken': .*no_such_package_here"),
        ("this is no Python", "Cannot load the metric 'broken'"),
        ("x = 1\n", "Cannot load the metric 'broken'"),
        ("import sys\nimport evaluate\nsys.exit()\n", r"Cannot load the metric 'broken': it ends .* sys\.exit\(\)"),
    ],
)
def test_scripts_that_cannot_be_loaded(here: Path, content: str, message: str) -> None:
    (here / "broken.py").write_text(content)
    with pytest.raises(ScoringError, match=message):
        metrics.find("broken.py")


def test_paths_that_hold_no_script_are_not_asked_of_the_hub(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(ScoringError, match=r"no metric in 'empty': it holds no file 'empty\.py'"):
        metrics.find("empty", trusted=True)
    for path in ("./nowhere", "~/nowhere/at_all", "/nowhere/own.py", "own.py", "local:own_kappa"):
        with pytest.raises(ScoringError, match=f"There is no file or folder '{path}'"):
            metrics.find(path, trusted=True)


@pytest.mark.parametrize("metric", ["acme/own_metric", "mean_iou"])
def test_code_of_the_hub_needs_trust(metric: str, tmp_path: Path) -> None:
    """It is refused before anything is read or asked, whatever the data."""
    scoring = Scoring(task="text-classification", dataset="/nowhere.csv", metric=metric)
    with pytest.raises(ScoringError, match=f"There is no built-in metric '{metric}'") as raised:
        prepare_datasets([("validation", scoring)], folder=tmp_path, config={})
    assert "trust_remote_code: true" in raised.value.hint
    assert all(name in raised.value.hint for name in CLASS_METRICS)


def test_trusted_code_is_asked_of_the_hub(tmp_path: Path) -> None:
    """With the real client, and a Hub that nobody answers for: one error, before the data is read."""
    import evaluate

    assert evaluate.config.HF_ENDPOINT == "http://127.0.0.1:9"
    scoring = Scoring(
        task="text-classification", dataset="/nowhere.csv", metric="acme/own_metric", trust_remote_code=True
    )
    with pytest.raises(ScoringError, match=r"^Cannot load the metric 'own_metric': ") as raised:
        prepare_datasets([("validation", scoring)], folder=tmp_path, config={})
    assert "accuracy" in raised.value.hint


def test_a_module_that_ends_the_process_is_one_error(here: Path) -> None:
    (here / "own_metrics.py").write_text("import sys\nsys.exit('bye')\n")
    with pytest.raises(ScoringError, match=r"Cannot import the metric .*: it ends the process, by sys\.exit\('bye'\)"):
        metrics.find("own_metrics:kappa")


def test_an_edited_metric_counts_from_the_next_preparation_on(here: Path) -> None:
    """Not between two scores of one cook, which would then not be of one metric."""
    folder = write_script(here / "metrics", "own_kappa", "{'own_kappa': 0.25}")
    (here / "own_metrics.py").write_text("def one(references, predictions):\n    return 0.25\n")
    named = ["own_metrics:one", str(folder), str(folder / "own_kappa.py")]
    assert [answered.value(name, LABELS, ANSWERS) for name in named] == [0.25] * 3
    (here / "own_metrics.py").write_text("def one(references, predictions):\n    return 0.125\n")
    (folder / "own_kappa.py").write_text(SCRIPT.replace("RESULT", "{'own_kappa': 0.125}"))
    assert [answered.value(name, LABELS, ANSWERS) for name in named] == [0.25] * 3
    load_data(Recipe(ingredients=["acme/a"]), ModelTemplate({}, "float32", here), RunContext())
    assert [answered.value(name, LABELS, ANSWERS) for name in named] == [0.125] * 3
