"""Tasks of lm-evaluation-harness, on models in memory: its rows, prompts and metrics, and intervals beside them.

The harness is an extra, `hf-soup[lm]`. Its own ``evaluate`` makes all prompts anew for every model, so what it does
between prompts and metrics is done here, on requests that are made once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.text import first_line, near
from hf_soup._util.users_code import users_code
from hf_soup._util.version import version
from hf_soup.errors import ScoringError
from hf_soup.evaluation.batch_limit import BatchLimit
from hf_soup.evaluation.chat_template import rendered
from hf_soup.evaluation.clusters import in_clusters
from hf_soup.evaluation.dataset import EvalDataset, Outputs
from hf_soup.evaluation.encoded_rows import key_of
from hf_soup.evaluation.model import hand_out, require_head
from hf_soup.evaluation.statistics import (
    PERMUTATIONS,
    RESAMPLES,
    Floats,
    Ints,
)
from hf_soup.evaluation.tasks.task import donors_tokenizer
from hf_soup.evaluation.template import ModelTemplate
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import HarnessScoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: That of the harness's command line, so that its examples in prompts are the same.
_SEED = 1234
#: Metrics that are shares of one.
_SHARES = re.compile(r"acc(_\w+)?|exact_match|em|f1|pass@\d+")


#: What a task's settings say of where its rows are; the rows themselves are hashed.
_PLACES = {"metadata", "dataset_path", "dataset_name", "dataset_kwargs"}


class Request(NamedTuple):
    """What a model is asked: the kind of question and its arguments, as the harness has them, and of which row."""

    kind: str
    arguments: tuple[Any, ...]
    row: int


@dataclass(frozen=True, eq=False)
class HarnessDataset(EvalDataset):
    """A task, or a group of tasks, of lm-evaluation-harness; `harness_datasets` makes it.

    Args:
        title, notes, fingerprint, name: As in `EvalDataset`.
        scoring: With its ``revision``.
        metric_filter: The metric and its filter, as the harness writes them: ``exact_match,strict-match``.
        requests: All, in the order of rows.
        task_of: ``(n,)``: the number of the task that a row is of.
        equally: Whether tasks of a group count alike; else their rows do.
        less: Whether less of the metric is better.
        tokenizer: The donor's.
        generation: The donor's settings for what models write.
        tasks: The harness's own, with its requests; in the first process alone.
    """

    scoring: HarnessScoring
    metric_filter: str
    requests: Sequence[Request] = field(repr=False)
    task_of: Ints = field(repr=False)
    equally: bool
    less: bool
    tokenizer: Any = field(repr=False)
    generation: Mapping[str, Any] = field(repr=False)
    tasks: Sequence[Any] = field(repr=False, default=())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tasks": ()}  # the others only run models

    @property
    def share(self) -> bool:
        """Whether the metric is one of those that are shares of one."""
        return bool(_SHARES.fullmatch(self._metric_name))

    @property
    def looked_at_as(self) -> tuple[object, ...]:
        """What answers and values depend on beside the prompts."""
        return self.scoring.batch_size, self.scoring.revision, self.metric_filter

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.task_of)

    @property
    def steps(self) -> int:
        """How many requests there are."""
        return len(self.requests)

    @property
    def _metric_name(self) -> str:
        return self.metric_filter.partition(",")[0]

    @property
    def measure(self) -> str:
        """The metric and its filter."""
        return self.metric_filter.removesuffix(",none")

    @property
    def less_is_better(self) -> bool:
        """As the harness says."""
        return self.less

    def columns(self, answers: Outputs) -> tuple[Ints, Outputs]:
        """The number of the task that a row is of, and the harness's values."""
        return self.task_of, answers

    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Outputs:
        """``(n,)`` or ``(n, k)`` float64: the harness's values of each row, of which it makes the metric.

        Raises:
            ScoringError: The model or the task fails, or a value is no number.
        """
        world = world or ProcessGroup()
        mine = [number for number, request in enumerate(self.requests) if request.row % world.size == world.rank]
        answered = self._answered(model, [self.requests[number] for number in mine], device, progress)
        answers: list[Any] = [None] * len(self.requests)
        for rank, part in enumerate(world.gather(answered)):
            theirs = (number for number, request in enumerate(self.requests) if request.row % world.size == rank)
            for number, answer in zip(theirs, part, strict=True):
                answers[number] = answer
        if not self.tasks:
            return np.zeros(len(self.task_of))  # the first process has the tasks
        values = [value for task, start in self._starts() for value in self._values(task, answers, start)]
        found = np.array(values, dtype=np.float64)
        for row in np.flatnonzero(~np.isfinite(found.reshape(len(found), -1)).all(axis=1)):
            raise ScoringError(
                f"'{self.name}' gives {found[row]} for row {row}.",
                hint="Look at the ingredients' weights, and at the dtype (float16 overflows at 65,504).",
            )
        return found

    def _starts(self) -> Iterator[tuple[Any, int]]:
        """Each task, and the number of its first request."""
        start = 0
        for task in self.tasks:
            yield task, start
            start += sum(instance.repeats for instance in task.instances)

    def _answered(
        self, model: PreTrainedModel, requests: Sequence[Request], device: str, progress: Callable[[int], object]
    ) -> list[Any]:
        """What the harness makes of the model's answers, in the order of requests."""
        import torch
        from lm_eval.api.instance import Instance

        hand_out(model, device, self.generation)
        answers: list[Any] = [None] * len(requests)
        limit = BatchLimit.of(self, self.title)
        size = min(self.scoring.batch_size, limit.most or self.scoring.batch_size)
        try:
            with _quiet():
                asked = _model_class()(model, self.tokenizer, size, progress)
                for kind in dict.fromkeys(request.kind for request in requests):
                    places = [place for place, request in enumerate(requests) if request.kind == kind]
                    instances = [Instance(kind, {}, requests[place].arguments, 0) for place in places]
                    with torch.random.fork_rng():  # what is drawn is drawn alike for every model
                        torch.manual_seed(_SEED)
                        given = getattr(asked, kind)(instances, disable_tqdm=True)
                    for place, answer in zip(places, given, strict=True):
                        answers[place] = answer
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, AttributeError) as error:
            if not limit.lower(error, size):
                raise ScoringError(
                    f"The model fails on '{self.name}': {first_line(error)}",
                    hint="Do the donor's tokenizer and config belong to these weights? Is a choice longer than the "
                    "model reads?",
                ) from error
        else:
            return answers
        return self._answered(model, requests, device, progress)

    def _values(self, task: Any, answers: Sequence[Any], start: int) -> list[Any]:
        """The harness's value of each row of one of its tasks."""
        metric, chosen = self.metric_filter.split(",", 1)
        given = iter(answers[start:])
        for instance in task.instances:
            instance.resps, instance.filtered_resps = list(islice(given, instance.repeats)), {}
        with users_code(f"The task '{self.name}' fails on a model's answers"), _quiet():
            task.apply_filters()
            values = []
            for instances in _by_row(task.instances):
                results = [instance.filtered_resps[chosen] for instance in instances]
                values.append(task.process_results(instances[0].doc, results)[metric])
        for number, value in enumerate(values):
            plain = value if isinstance(value, tuple | list) else (value,)
            if not plain or not all(isinstance(each, int | float | np.number) for each in plain):
                raise ScoringError(
                    f"The metric '{metric}' of '{self.name}' keeps {str(value)[:80]!r} for row {number}, and rows are "
                    "compared by numbers.",
                    hint="Name another `metric`, or measure it by a function of your own.",
                )
        return values

    def fits(self, outputs: Outputs) -> bool:
        """Whether remembered values can be those of a model."""
        return bool(outputs.dtype == np.float64 and len(outputs) == len(self.task_of) and np.isfinite(outputs).all())

    def metric(self, task_of: Ints, values: Floats, rows: Ints) -> Floats:
        """The metric over draws of the rows: of each task, and their mean where there are several."""
        name, found, shares = self._metric_name, [], []
        for number, task in enumerate(self.tasks):
            own = task_of == number
            shares.append(rows[:, own].sum(axis=1))
            made = task.aggregation()[name]
            if getattr(made, "__name__", "") == "mean" and values.ndim == 1:
                found.append(rows[:, own] @ values[own] / np.maximum(shares[-1], 1))
                continue
            items = [value if values.ndim == 1 else tuple(value) for value in values[own].tolist()]
            drawn = (
                [each for each, count in zip(items, draw, strict=True) for _ in range(count)] for draw in rows[:, own]
            )
            with users_code(f"The metric '{name}' of '{self.name}' fails", hint="Name another `metric`."):
                found.append(np.array([float(made(each)) if each else 0.0 for each in drawn]))
        weights = np.array([share > 0 for share in shares] if self.equally else shares, dtype=float)
        return np.asarray((weights * np.array(found)).sum(axis=0) / weights.sum(axis=0))

    def value(self, answers: Outputs, rows: Ints | None = None) -> float:
        """As `EvalDataset.value`."""
        value = super().value(answers, rows)
        if not math.isfinite(value):
            n = self.rows if rows is None else len(rows)
            raise ScoringError(f"'{self.title}' is {value} on {n:,} rows.", hint="Use more rows.")
        return value

    def row_values(self, answers: Outputs) -> Floats | None:
        """The harness's values, where the metric is their mean."""
        alone = len(self.tasks) == 1 or not self.equally
        gains = -answers if self.less_is_better else answers
        return gains if self._means and alone and answers.ndim == 1 else None

    @property
    def _means(self) -> bool:
        """Whether the harness takes the mean of its values; else it does with them what it does, one draw at a time."""
        return all(getattr(task.aggregation()[self._metric_name], "__name__", "") == "mean" for task in self.tasks)

    @property
    def permutations(self) -> int:
        """As `EvalDataset.permutations`."""
        return PERMUTATIONS if self._means else RESAMPLES

    def right(self, answers: Outputs) -> NDArray[np.bool_] | None:
        """Of metrics that are the share of rows that are right."""
        alone = len(self.tasks) == 1 or not self.equally
        return answers == 1 if self.share and alone and answers.ndim == 1 and np.isin(answers, (0, 1)).all() else None


def harness_datasets(
    asked: Sequence[tuple[str, HarnessScoring]], template: ModelTemplate, *, quiet: bool = False
) -> list[HarnessDataset]:
    """Load tasks and make their prompts, before any weight is fetched.

    Validation rows that are test rows too are left out, with a note.

    Args:
        asked: ``("validation" or "test", scoring)``.
        template: Of the models: their tokenizer and config.
        quiet: No progress bar.

    Raises:
        ScoringError: The extra is not installed; there is no such task, or it cannot be used; a task would run code
            that nobody allowed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ScoringError(
            f"`task: lm-eval` needs lm-evaluation-harness, which cannot be imported: {first_line(error)}.",
            hint="Install it: pip install 'hf-soup[lm]'.",
        ) from error
    require_head(template.config, "causal-lm")
    tokenizer = donors_tokenizer(template.folder)
    found: dict[int, HarnessDataset] = {}
    in_tests: set[bytes] = set()
    order = sorted(range(len(asked)), key=lambda place: asked[place][0] != "test")
    for place in order:
        role, scoring = asked[place]
        with _quiet(), contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            loaded, digests = _loaded(scoring, tokenizer, in_tests if role == "validation" else set())
        # What models answer depends on the donor's files too: tokenizer, template, settings for what they write.
        fingerprint = key_of(loaded.fingerprint, template.folder, [Path(__file__)])
        found[place] = replace(loaded, fingerprint=fingerprint, tokenizer=tokenizer, generation=template.generation)
        if role == "test":
            in_tests |= digests
    return [found[place] for place in range(len(asked))]


def _loaded(scoring: HarnessScoring, tokenizer: Any, barred: Collection[bytes]) -> tuple[HarnessDataset, set[bytes]]:
    """A data set of the rows that are not barred, and the hash of every row."""
    tasks, equally = _tasks(scoring)
    notes, digests, prompts = [], set(), hashlib.sha256()
    identity = hashlib.sha256()
    requests: list[Request] = []
    task_of: list[int] = []
    counted: list[Mapping[str, Any]] = []
    for number, task in enumerate(tasks):
        docs = [_digest(doc) for _, doc in task.doc_iterator(limit=scoring.limit)]
        kept = [row for row, doc in enumerate(docs) if doc not in barred]
        if not kept:
            raise ScoringError(
                f"Every row of the validation data '{scoring.title}' is in the test data too.",
                hint="What selection has looked at cannot test it: name another `split`.",
            )
        if len(kept) < len(docs):
            notes.append(
                f"{len(docs) - len(kept):,} of {len(docs):,} rows equal a test row in content and were dropped"
            )
        digests |= set(docs)
        with users_code(f"The task '{scoring.name}' cannot make its prompts"):
            task.build_all_requests(
                limit=None if len(kept) < len(docs) else scoring.limit,
                samples=kept if len(kept) < len(docs) else None,
                apply_chat_template=scoring.apply_chat_template,
                fewshot_as_multiturn=scoring.apply_chat_template,
                # As the harness's own model class renders conversations.
                chat_template=lambda messages, add_generation_prompt=True: rendered(
                    tokenizer,
                    messages,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                ),
            )
        for instances in _by_row(task.instances):
            row = len(task_of)
            counted.append(instances[0].doc)
            requests += [Request(each.request_type, each.args, row) for each in instances for _ in range(each.repeats)]
            task_of.append(number)
        task._instances = [each for instances in _by_row(task.instances) for each in instances]
        settings = {key: value for key, value in task.dump_config().items() if key not in _PLACES}
        identity.update(json.dumps(settings, sort_keys=True, default=_named).encode() + b"".join(docs))
    prompts.update(repr([scoring.task, *requests]).encode())
    metric, less = _metric_of(scoring, tasks)
    versions = {str(task.VERSION) for task in tasks}
    revision = (
        f"lm-eval {version('lm-eval')}; {scoring.name} version {', '.join(sorted(versions))}; "
        f"sha256:{identity.hexdigest()}"
    )
    if scoring.revision not in (None, revision):
        raise ScoringError(
            f"'{scoring.title}' is another task here ({revision}) than that of the recipe ({scoring.revision}).",
            hint="Install that version of the harness, or leave `revision` out to score on this one.",
        )
    pinned = scoring.model_copy(update={"revision": revision})
    loaded = HarnessDataset(
        scoring.title, pinned, tuple(notes), prompts.hexdigest(), scoring.title, metric, requests, np.array(task_of),
        equally, less, None, {}, tasks,
    )  # fmt: skip
    if scoring.cluster_column is not None:
        loaded = in_clusters(loaded, scoring.cluster_column, counted, task_of)
    return loaded, digests


def _tasks(scoring: HarnessScoring) -> tuple[list[Any], bool]:
    """The harness's tasks that a scoring names, and whether those of a group count alike."""
    from lm_eval.tasks import TaskManager

    folder = scoring.include_path
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ScoringError(
            f"There is no folder '{folder}' with tasks.", hint="`include_path` is a path on this machine."
        )
    own = TaskManager(include_path=folder and str(Path(folder).expanduser()), include_defaults=False)
    entry: Any = scoring.config
    if scoring.config is None:
        entry, manager = scoring.name, own
        file = None if scoring.name in own.task_index else _built_in(scoring.name)
        if file:
            entry = str(file)
        elif scoring.name not in own.task_index:
            manager = TaskManager(include_path=folder, include_defaults=True)  # which takes ten seconds
            if scoring.name not in manager.task_index:
                close = difflib.get_close_matches(scoring.name, manager.all_tasks, 5, 0.5)
                raise ScoringError(
                    f"lm-evaluation-harness {version('lm-eval')} has no task '{scoring.name}'.",
                    hint=f"Near it are: {', '.join(close)}." if close else "`lm-eval ls tasks` prints all.",
                )
    else:
        manager = own
    hint = "Is its data set there, and are its settings those of the harness?"
    with users_code(f"The task '{scoring.name}' cannot be loaded", hint=hint), _python_of_task_files(scoring):
        loaded = manager.load([entry])
    tasks = list(loaded["tasks"].values())
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False) and not scoring.trust_remote_code:
            raise ScoringError(
                f"The task '{task.task_name}' runs code that models write.",
                hint="Where that is what you want, say `trust_remote_code: true`, on a machine that may be harmed.",
            )
        if getattr(task, "MULTIMODAL", False):
            raise ScoringError(f"The task '{task.task_name}' has pictures or sounds, and models are asked with text.")
        if scoring.split is not None:
            splits = list(getattr(task, "dataset", None) or ())
            if scoring.split not in splits:
                raise ScoringError(
                    f"The data of '{task.task_name}' have no split '{scoring.split}'{near(scoring.split, splits)}.",
                    hint=f"They have {', '.join(map(str, splits)) or 'none that has a name'}.",
                )
            task.set_config("test_split", scoring.split)
        own_shots = task.get_config("num_fewshot")
        if scoring.num_fewshot and own_shots == 0:
            raise ScoringError(
                f"The task '{task.task_name}' says `num_fewshot: 0`, and the harness asks it without examples, always.",
                hint="Leave `num_fewshot` out.",
            )
        task.set_config("num_fewshot", (own_shots or 0) if scoring.num_fewshot is None else scoring.num_fewshot)
        task.set_fewshot_seed(seed=_SEED)
    groups = list(loaded.get("groups", {}).values())
    means = [each for group in groups[:1] for each in (group.aggregate_metric_list or [])]
    return tasks, bool(means) and not all(each.weight_by_size for each in means)


def _built_in(name: str) -> Path | None:
    """The file of a task of the harness that is called like it; its whole index takes ten seconds to make."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    if not re.fullmatch(r"[\w.-]+", name):
        return None
    for file in sorted(Path(str(lm_eval.tasks.__file__)).parent.rglob(f"{name}.yaml")):
        if load_yaml(file, resolve_func=False, recursive=False).get("task") == name:
            return file
    return None


@contextlib.contextmanager
def _python_of_task_files(scoring: HarnessScoring) -> Iterator[None]:
    """Refuse Python that task files outside of the harness name and nobody allowed: through groups, tags, includes.

    What the harness imports it imports here, so nothing is read out of the text of files.
    """
    from lm_eval.tasks import _yaml_loader as loader

    imports, home = loader._import_func_in_yml, Path(str(loader.__file__)).parent

    def guarded(qualified: str, folder: Path) -> Any:
        if not scoring.trust_remote_code and not folder.resolve().is_relative_to(home.resolve()):
            raise ScoringError(
                f"The task '{scoring.name}' runs Python: '{qualified}' of a task file in '{folder.name}'.",
                hint="Read it; then say `trust_remote_code: true` beside its name.",
            )
        return imports(qualified, folder)

    loader._import_func_in_yml = guarded
    try:
        yield
    finally:
        loader._import_func_in_yml = imports


def _metric_of(scoring: HarnessScoring, tasks: Sequence[Any]) -> tuple[str, bool]:
    """``metric,filter`` that is measured, and whether less of it is better."""
    first = tasks[0]
    known = [
        f"{name},{ensemble.name}" for ensemble in first._filters for name in first.aggregation() if name != "bypass"
    ]
    wanted = scoring.metric
    metric = next((each for each in known if wanted in (None, each, each.partition(",")[0])), None)
    if metric is None or any(metric.partition(",")[0] not in task.aggregation() for task in tasks):
        raise ScoringError(
            f"The task '{scoring.name}' has no metric '{wanted}'{near(str(wanted), known)}.",
            hint=f"It has {', '.join(known) or 'none'}.",
        )
    return metric, not first.higher_is_better().get(metric.partition(",")[0], True)


def _by_row(instances: Sequence[Any]) -> list[list[Any]]:
    """The requests of each row, in the harness's order."""
    rows: dict[int, list[Any]] = {}
    for instance in instances:
        rows.setdefault(instance.doc_id, []).append(instance)
    return [sorted(each, key=lambda instance: int(instance.idx)) for each in rows.values()]


def _digest(doc: object) -> bytes:
    plain = json.dumps(doc, sort_keys=True, default=str).encode()
    return hashlib.blake2b(plain, digest_size=16).digest()


def _named(value: object) -> str:
    """A function in a task's settings, by its name and not by where it lies in memory."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness says nothing of what is on purpose: that the model is an object, and that defaults count."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _model_class() -> Any:
    """The harness's class of models, which tells its progress. Late, as it takes the extra."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):  # type: ignore[misc]
        """A model in memory."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Callable[[int], object]) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            self._progress = progress

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            self._progress(len(inps))
            return super()._model_call(inps, *arguments, **options)

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            self._progress(len(context))
            return super()._model_generate(context, *arguments, **options)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    return InMemory
