"""What every task keeps."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_soup.errors import ScoringError
from hf_soup.evaluation import EvalDataset, LearnableDataset, build_model, prepare_datasets, task_named
from hf_soup.recipe import Scoring, task_names


class TaskTests:
    """The contract of a task: subclass it, name yours, give it rows, and a small model in a folder.

    ::

        class TestRewardPairs(TaskTests):
            task = "reward-pairs"
            rows = [{"chosen": "yes", "rejected": "no"}, ...]

            @pytest.fixture(scope="class")
            @classmethod
            def folder(cls, tmp_path_factory):
                ...  # save a model and its tokenizer
    """

    #: Its name.
    task: ClassVar[str] = ""
    #: Rows of a table, four or more, of which not all are alike.
    rows: ClassVar[Sequence[Mapping[str, Any]]]
    #: Keys of a recipe beside ``task`` and ``dataset``, such as a metric.
    keys: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder with a model's ``config.json``, ``model.safetensors`` and tokenizer or processor: yours."""
        raise NotImplementedError("Make a fixture `folder` that saves a small model and its tokenizer.")

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalDataset:
        """The rows, prepared as for a cook."""
        return cls.prepared(folder, tmp_path_factory.mktemp("rows"), cls.rows)

    @classmethod
    def prepared(cls, folder: Path, place: Path, rows: Sequence[Mapping[str, Any]], **keys: Any) -> EvalDataset:
        """Rows as a cook prepares them."""
        assert cls.task, 'The class names no task: write `task = "name"` into it.'
        (place / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        asked = {"task": cls.task, "dataset": str(place / "rows.jsonl"), **cls.keys, **keys}
        config = json.loads((folder / "config.json").read_text())
        scoring = Scoring.model_validate(asked)
        (found,) = prepare_datasets([("validation", scoring)], folder=folder, config=config, quiet=True)
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, folder: Path) -> Any:
        """The model, as a candidate is built."""
        config = json.loads((folder / "config.json").read_text())
        return build_model(config, load_file(folder / "model.safetensors"), cls.task, torch.float32)

    @pytest.fixture(scope="class")
    @classmethod
    def outputs(cls, data: EvalDataset, model: Any) -> Any:
        """What the model gives."""
        return data.outputs(model)

    def other(self, outputs: Any) -> Any:
        """What another model might give: the same for other rows."""
        return np.ascontiguousarray(outputs[::-1])

    def test_recipes_find_it(self) -> None:
        """Its name is that of an entry point, or built in."""
        assert self.task in task_names(), f"no package offers '{self.task}' in the group hf_soup.tasks"
        assert task_named(self.task).head, "say what classes of its models end in: `head`"

    def test_a_metric_that_it_has_not_is_refused(self, folder: Path, tmp_path: Path) -> None:
        """With an error that names the metric."""
        with pytest.raises(ScoringError, match="no_such_metric"):
            self.prepared(folder, tmp_path, self.rows, metric="no_such_metric")

    def test_rows_without_its_columns_are_refused(self, folder: Path, tmp_path: Path) -> None:
        """With an error, and not with a score."""
        with pytest.raises(ScoringError):
            self.prepared(folder, tmp_path, [{"nothing": 1}] * len(self.rows))

    def test_it_has_all_rows(self, data: EvalDataset) -> None:
        """As many as were given."""
        assert data.rows == len(self.rows)
        assert data.steps >= 1
        assert len(data.fingerprint) == 64

    def test_outputs_are_small_numbers_by_row(self, data: EvalDataset, outputs: Any) -> None:
        """What is remembered of a model is a number, or a line of numbers, for each row."""
        assert len(outputs) == len(self.rows)
        assert outputs.dtype.kind in "fiu"
        assert data.fits(outputs), "what a model gave does not fit"
        assert not data.fits(outputs[1:]), "what is of fewer rows fits"

    def test_a_model_gives_the_same_each_time(self, data: EvalDataset, model: Any, outputs: Any) -> None:
        """At any number of threads."""
        assert np.array_equal(data.outputs(model), outputs)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert np.array_equal(data.outputs(model), outputs), "another number of threads gives something else"
        finally:
            torch.set_num_threads(threads)

    def test_batches_do_not_matter(self, data: EvalDataset, model: Any, outputs: Any) -> None:
        """What a row gets does not depend on who goes through the model with it."""
        one = replace(data, scoring=data.scoring.model_copy(update={"batch_size": 1}))
        finite = np.isfinite(outputs)
        np.testing.assert_allclose(one.outputs(model)[finite], outputs[finite], rtol=1e-4, atol=1e-4)

    def test_progress_comes_to_its_end(self, data: EvalDataset, model: Any) -> None:
        """All steps are told."""
        done: list[int] = []
        data.outputs(model, progress=done.append)
        assert sum(done) == data.steps

    def test_more_is_better_for_a_selection(self, data: EvalDataset, outputs: Any) -> None:
        """What selections compare is the score, or its negative where less is better."""
        score, value = data.score(outputs), data.judge(data.answers(outputs))
        assert value == pytest.approx(-score.value if score.less_is_better else score.value)
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.value <= score.high
        assert score.n == len(self.rows)
        assert score.share == data.share

    def test_rows_can_be_chosen(self, data: EvalDataset, outputs: Any) -> None:
        """As for halves of the validation rows; and what each row adds has the metric as its mean."""
        answers, every = data.answers(outputs), np.arange(len(self.rows))
        assert data.judge(answers, every) == pytest.approx(data.judge(answers))
        values = data.row_values(answers)
        if values is not None:
            assert float(np.mean(values)) == pytest.approx(data.judge(answers)), "their mean is something else"

    def test_models_are_compared_in_both_directions(self, data: EvalDataset, outputs: Any) -> None:
        """By how much better the first one is; and nothing is claimed of one model and itself."""
        other = self.other(outputs)
        there, back, same = data.compare(outputs, other), data.compare(other, outputs), data.compare(outputs, outputs)
        assert there.difference == pytest.approx(-back.difference)
        assert there.difference == pytest.approx(data.judge(data.answers(outputs)) - data.judge(data.answers(other)))
        assert (same.difference, same.significant) == (0, False)

    def test_rows_are_drawn_alike_for_all_models(self, data: EvalDataset, outputs: Any) -> None:
        """So that any combination of models has a paired interval."""
        drawn = data.resampled(outputs)
        assert drawn.shape == (500,)
        assert np.isfinite(drawn).all()
        assert np.array_equal(drawn, data.resampled(outputs))

    def test_other_processes_are_sent_it(self, data: EvalDataset, model: Any, outputs: Any) -> None:
        """It survives being pickled, and gives the same."""
        assert np.array_equal(pickle.loads(pickle.dumps(data)).outputs(model), outputs)

    def test_its_loss_is_that_of_its_outputs(self, data: EvalDataset, model: Any, outputs: Any) -> None:
        """Batch by batch as from all outputs, and with a gradient."""
        if not isinstance(data, LearnableDataset):
            pytest.skip("nothing is learned from it")
        weights = data.row_weights
        assert float(weights.sum()) == pytest.approx(1)
        assert data.strata.shape == weights.shape == (len(self.rows),)
        model.zero_grad()
        total = 0.0
        for numbers in data.batches(np.arange(len(self.rows))):
            answers, rows = data.by_row(data.read(model(**data.batch(numbers)), numbers), numbers)
            loss = data.row_losses(answers, rows) @ torch.from_numpy(weights[rows]).to(answers)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        assert any(each.grad is not None and each.grad.any() for each in model.parameters()), "it has no gradient"
        losses = data.row_losses(torch.from_numpy(outputs).double(), np.arange(len(self.rows))).numpy()
        assert total == pytest.approx(float(losses @ weights), rel=1e-4)
