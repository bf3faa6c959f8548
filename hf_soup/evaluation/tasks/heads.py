"""What tasks of models with a head for whole inputs do alike, whatever kind of head it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_soup.errors import ScoringError
from hf_soup.evaluation import label_map, metrics
from hf_soup.evaluation.classification import ClassificationDataset
from hf_soup.evaluation.formulas import BINARY
from hf_soup.evaluation.heads import HeadDataset
from hf_soup.evaluation.multi_label import MultiLabelDataset
from hf_soup.evaluation.regression import RegressionDataset
from hf_soup.evaluation.tasks.classes import read_classes
from hf_soup.evaluation.tasks.label_sets import read_label_sets
from hf_soup.evaluation.tasks.numbers import read_numbers
from hf_soup.evaluation.tasks.task import PreparedRows, Task
from hf_soup.recipe import Scoring

#: Kind of head → what reads the labels of its rows.
_READ = {ClassificationDataset: read_classes, MultiLabelDataset: read_label_sets, RegressionDataset: read_numbers}


def kind_of(config: Mapping[str, Any]) -> type[HeadDataset]:
    """What the head of a model is for, as transformers reads it from the config: one class a row, several, a number.

    >>> kind_of({"id2label": {"0": "similar"}}).kind, kind_of({"problem_type": "multi_label_classification"}).kind
    ('regression', 'multi-label')
    """
    said = config.get("problem_type")
    if said == "multi_label_classification":
        return MultiLabelDataset
    one = said == "regression" or len(label_map.model_classes(config)) == 1
    return RegressionDataset if one else ClassificationDataset


class HeadTask(Task):
    """A task of models with a head, the kind of which their config says."""

    config: Mapping[str, Any]

    @classmethod
    def require(cls, scoring: Scoring, config: Mapping[str, Any]) -> None:
        """Refuse a metric that there is not for this kind of head, and several numbers a row."""
        kind, outputs, metric = kind_of(config), len(label_map.model_classes(config)), scoring.metric
        if kind is RegressionDataset and outputs > 1:
            raise ScoringError(
                f"The model's problem type is regression, with {outputs} outputs; one number a row can be scored.",
                hint="Measure it by a function of your own: `validation: {function: my_eval:score}`.",
            )
        if kind is RegressionDataset and scoring.labels:
            raise ScoringError(
                "The model has a regression head, whose output `labels` cannot name.", hint="Leave it out."
            )
        if metric in metrics.BUILT_IN and metric not in kind.metrics:
            raise ScoringError(
                f"The model's head is {kind.kind}, for which there is no metric '{metric}'.",
                hint=f"There are {', '.join(kind.metrics)}; say one as `metric`.",
            )
        if kind is ClassificationDataset and metric in BINARY and outputs != 2:
            raise ScoringError(
                f"'{metric}' is of two classes, and the model has {outputs}.",
                hint=f"'{metric}_macro' is its mean over all classes.",
            )
        metrics.find(metric, scoring.trust_remote_code, kind.metrics)

    def labels(self, scoring: Scoring, name: str, table: Any, columns: Sequence[str]) -> Any:
        """What is right for each row."""
        return _READ[kind_of(self.config)](scoring, name, table, self.config)

    def dataset(self, rows: PreparedRows) -> HeadDataset:
        """As `Task.dataset`."""
        found: HeadDataset = rows.labels.dataset(rows, self.inputs(rows.encoded, rows.kept))
        return found
