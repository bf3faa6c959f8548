"""All data that a recipe names, read and preprocessed for one kind of model: validation, test, calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from hf_soup.errors import ScoringError
from hf_soup.evaluation import metrics
from hf_soup.evaluation.batch_norm import batch_norms
from hf_soup.evaluation.dataset import CalibrationDataset, EvalDataset
from hf_soup.evaluation.harness import harness_datasets
from hf_soup.evaluation.model import require_device, require_head
from hf_soup.evaluation.own_function import function_dataset
from hf_soup.evaluation.preprocessing import prepare_calibration_dataset, prepare_datasets
from hf_soup.evaluation.template import ModelTemplate, model_template
from hf_soup.lineage import AlignedModels
from hf_soup.merging import Layout, Plan, RunContext
from hf_soup.recipe import FunctionScoring, HarnessScoring, Recipe, Scoring, with_dataset


@dataclass(frozen=True)
class Calibration:
    """A recipe's examples, and the models that look at them.

    Args:
        inputs: The examples.
        template: What those models have beside their weights.
        seed: Of the rows and labels that are drawn.
        device: Where models run.
        quiet: No progress bars.
    """

    inputs: CalibrationDataset
    template: ModelTemplate
    seed: int
    device: str = "cpu"
    quiet: bool = True


@dataclass(frozen=True)
class EvaluationData:
    """All data of a recipe.

    Args:
        template: Of the models that look at them.
        validation: What a selection may look at.
        test: What is looked at once, at the end.
        calibration: What methods look at, and new statistics of batch normalisation are collected with.
    """

    template: ModelTemplate
    validation: tuple[EvalDataset, ...] = ()
    test: tuple[EvalDataset, ...] = ()
    calibration: Calibration | None = None

    @property
    def scored(self) -> tuple[EvalDataset, ...]:
        """All that scores are measured on."""
        return (*self.validation, *self.test)

    @property
    def notes(self) -> list[str]:
        """What a reader should know of what scores are measured on; what holds for several names them together."""
        whose: dict[str, dict[str, None]] = {}
        for bench in self.scored:
            for note in bench.notes:
                whose.setdefault(note, {})[bench.name] = None
        return [f"{', '.join(names)}: {note}" for note, names in whose.items()]


def load_data(recipe: Recipe, template: ModelTemplate, context: RunContext) -> EvaluationData:
    """Read, check and preprocess all data of a recipe, before any weight is fetched.

    Args:
        recipe: With `validation`, `test` and `calibration`, or without them.
        template: Of all models that will look at them.
        context: With the token and the device.

    Raises:
        ResolveError: A data set cannot be found or reached.
        ScoringError: A data set, or the device, cannot be used.
    """
    every, count = [*recipe.validation, *recipe.test], len(recipe.validation)
    roles = ["validation"] * count + ["test"] * len(recipe.test)
    if every or recipe.calibration:
        require_device(context.device)
    metrics.forget()
    asked = [(role, each) for role, each in zip(roles, every, strict=True) if isinstance(each, Scoring)]
    tasks = [(role, each) for role, each in zip(roles, every, strict=True) if isinstance(each, HarnessScoring)]
    prepared: Iterator[EvalDataset] = iter(())
    if asked:
        require_head(template.config, asked[0][1].task)
        prepared = iter(
            prepare_datasets(
                asked, folder=template.folder, config=template.config, token=context.token, quiet=context.quiet
            )
        )
    of_harness = iter(harness_datasets(tasks, template, quiet=context.quiet) if tasks else ())
    scored = [
        function_dataset(each, template)
        if isinstance(each, FunctionScoring)
        else next(of_harness if isinstance(each, HarnessScoring) else prepared)
        for each in every
    ]
    calibration = load_calibration(recipe, template, context)
    return EvaluationData(template, tuple(scored[:count]), tuple(scored[count:]), calibration)


def load_calibration(recipe: Recipe, template: ModelTemplate, context: RunContext) -> Calibration | None:
    """The examples alone, as `load_data`; None where the recipe has none."""
    if recipe.calibration is None:
        return None
    require_head(template.config, recipe.calibration.task)
    inputs = prepare_calibration_dataset(
        recipe.calibration, with_dataset(recipe.test), folder=template.folder, config=template.config,
        token=context.token, quiet=context.quiet,
    )  # fmt: skip
    return Calibration(inputs, template, recipe.seed, context.device, context.quiet)


def looks_at_examples(plan: Plan) -> bool:
    """Whether a method of a plan does, or new statistics of batch normalisation are collected of what it makes."""
    from hf_soup.merging import needs_statistics  # late, as it takes torch

    asks = any(needs_statistics(call) for call in plan.mixture.methods)
    layout = plan.layout
    return asks or (len(layout.labels) > 1 and bool(batch_norms(tensor.name for tensor in layout.tensors)))


@contextmanager
def data_of_soup(
    recipe: Recipe,
    data: EvaluationData,
    chosen: AlignedModels,
    everyone: AlignedModels,
    plan: Plan,
    context: RunContext,
) -> Iterator[EvaluationData]:
    """All data as the soup itself reads them, which may have another config and tokenizer than all models together.

    Candidates have the rows of all ingredients' tokens. Where those that a selection left have others, the soup has
    the tokenizer and the config of one of them. The rows of data are the same, so scores are compared row by row.

    Args:
        recipe: Of the data.
        data: As all models read them.
        chosen: The models in the soup.
        everyone: All models.
        plan: Of the models in the soup.
        context: As in `load_data`.
    """
    same = not data.scored or chosen.vocabulary == everyone.vocabulary
    if chosen.names == everyone.names or (same and not (data.calibration and looks_at_examples(plan))):
        yield data
        return
    calibration = data.calibration and data.calibration.inputs.data
    pinned: dict[str, object] = {"calibration": calibration}  # the same rows, though a data set may have moved on
    pinned |= {"validation": tuple(b.scoring for b in data.validation), "test": tuple(b.scoring for b in data.test)}
    recipe = recipe.model_copy(update=pinned)
    with model_template(chosen, plan.layout.dtype) as template:
        if same:
            yield replace(data, template=template, calibration=load_calibration(recipe, template, context))
        else:
            yield load_data(recipe, template, context)


def require_rows(recipe: Recipe, data: EvaluationData, *, learns: bool) -> None:
    """Refuse `stability_repeats` where halves would say nothing, and learning from too few rows.

    Args:
        recipe: With `stability_repeats`.
        data: Its data.
        learns: Whether shares are learned.

    Raises:
        ScoringError: It is so.
    """
    for bench in data.validation if recipe.stability_repeats else ():
        if bench.rows is not None:
            require_halves(bench, bench.rows)
    if not learns:
        return
    rows = sum({bench.fingerprint: bench.rows or 0 for bench in data.validation}.values())
    if rows < 10:  # a fifth of which are kept apart
        raise ScoringError(
            f"learned: there are {rows} validation rows, and it takes ten at least.",
            hint="Use `select: uniform`, or more validation rows.",
        )


def require_halves(bench: EvalDataset, rows: int) -> None:
    """Refuse halves that would say nothing.

    Raises:
        ScoringError: There are too few rows.
    """
    if rows < 20:
        raise ScoringError(
            f"`stability_repeats` chooses on halves of the validation rows, and '{bench.title}' has {rows}.",
            hint="Use twenty rows or more, or leave `stability_repeats` out.",
        )


def require_variance(layout: Layout, calibration: Calibration | None) -> None:
    """Refuse one row, where running statistics of batch normalisation are to be collected.

    Raises:
        ScoringError: It is one.
    """
    if calibration and calibration.inputs.n < 2 and batch_norms(tensor.name for tensor in layout.tensors):
        raise ScoringError(
            f"The examples '{calibration.inputs.data.title}' are one row, which has no variance for batch "
            "normalisation.",
            hint="Use more rows: a few hundred of the training data or more.",
        )
