"""What was asked for: `Recipe`, its `Ingredient`s and the `Scoring` of validation and test data.

A recipe is a frozen value, read from YAML with unknown keys refused, and written back the same. The resolved
recipe of a soup (``soup.yaml``) is a recipe too: every revision is a full commit and every weight is final.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from hf_soup._util.registry import offered_by_packages
from hf_soup._util.text import near
from hf_soup._util.yaml import line_of, parse_yaml, write_yaml
from hf_soup.errors import RecipeError, shortened, without_credentials

#: A recipe in a published repo is a stranger's text, so its size is bounded before it is parsed.
MAX_BYTES = 1 << 22
MAX_INGREDIENTS = 1000

#: Codes of findings that are judgements, which `allow` may accept; what else refuses could not be averaged at all.
JUDGEMENTS = frozenset({
    *("base-contradicted", "base-copied", "base-doubtful", "base-inferred", "base-revisions"),
    *("base-tensors-unrelated",),
    *("base-undeclared", "base-unknown", "base-unreadable", "base-wrong", "bases-differ", "batch-norm", "card-wrong"),
    *("drifted", "dtypes-mixed", "evaluated-on-train", "heads-unrelated", "identical", "labels"),
    *("labels-unknown", "not-from-base", "positions", "processing", "processing-absent", "processing-not-compared"),
    *("selected-on-test", "settings", "tensors-drifted", "tensors-unrelated", "unrelated"),
})  # fmt: skip
#: Values of `method`, `select` and `by` that have other names elsewhere.
RENAMED_VALUES = {
    "adamerging": "select: entropy",
    "ema": "select: {name: run_average, schedule: ema}",
    "lawa": "select: {name: run_average, last: 6}",
    "layer": "by: tensor",
    "swa": "select: run_average",
}


def renamed(value: str) -> str:
    """What a value is called here, as the end of a sentence; nothing where it has no other name.

    >>> renamed("swa")
    ', which is `select: run_average` here'
    """
    return f", which is `{RENAMED_VALUES[value]}` here" if value in RENAMED_VALUES else ""


#: Tasks that are built in.
TASKS = ("image-classification", "text-classification", "causal-lm", "multiple-choice-lm")


def task_names() -> list[str]:
    """Those that are built in, and those of other packages."""
    return [*TASKS, *sorted(offered_by_packages("task").keys() - {*TASKS})]


def _known_task(task: str) -> str:
    if task not in TASKS and task not in task_names():
        known = (*task_names(), "lm-eval")
        raise ValueError(f"'{shortened(task, 80)}' is no task{near(task, known)}; there are {', '.join(known)}")
    return task


_Part = TypeVar("_Part", bound=BaseModel)


def _as_text(value: object) -> object:
    """A path as the text that a recipe holds."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_Text = Annotated[str, Field(min_length=1, max_length=1024), BeforeValidator(_as_text)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    @field_validator("*")
    @classmethod
    def _holds_no_credentials(cls, value: Any) -> Any:
        # A recipe is written down and published.
        return without_credentials(value) if isinstance(value, str) else value


def _or_text(schema: dict[str, Any]) -> None:
    """In the JSON schema, what may also be written as its name alone."""
    whole = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, whole]


class Ingredient(_Value):
    """A model that goes into the soup.

    Args:
        model: A Hub id, ``id@revision``, a folder in a repo as ``owner/name/folder``, a huggingface.co address or a
            folder here.
        revision: A branch, tag, pull request reference or commit; what stands after ``@`` says the same.
        weight: Its share; shares are divided by their sum. Below zero only where a method adds up without dividing.
        base: Of an adapter, the model that it changes, where it is not the one that it names itself.

    >>> Ingredient.model_validate("acme/a@v2")
    Ingredient(model='acme/a', revision='v2', weight=1.0, base=None)
    """

    model_config = ConfigDict(json_schema_extra=_or_text)
    model: _Text
    revision: str | None = None
    weight: float = 1.0
    base: _Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _split_revision(cls, value: object) -> object:
        if isinstance(value, str | os.PathLike):
            value = {"model": value}
        if isinstance(value, Mapping) and isinstance(named := _as_text(value.get("model")), str):
            model, found, revision = split_revision(named)
            value = {**value, "model": model}
            if found:
                if value.get("revision") not in (None, revision):
                    raise ValueError(f"two revisions: '{revision}' and '{value['revision']}'")
                value["revision"] = revision
        return value

    @field_validator("weight")
    @classmethod
    def _weight_is_a_number(cls, weight: float) -> float:
        if not math.isfinite(weight):
            raise ValueError(f"a weight is a finite number, not {weight}")
        return weight

    @model_serializer(mode="wrap")
    def _to_text(self, handler: Any) -> object:
        given: dict[str, object] = handler(self)
        return self.model if list(given) == ["model"] else given

    def __str__(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model


def is_local_path(path: str) -> bool:
    """Whether a file or folder of this name exists; no where the name is too long, or the way to it closed."""
    return os.path.exists(path)  # noqa: PTH110 -- Path.exists raises there


def split_revision(model: str) -> tuple[str, bool, str]:
    """Split ``owner/name@revision`` or a huggingface.co address; a folder that exists is left whole.

    >>> split_revision("https://huggingface.co/acme/a/tree/v2")
    ('acme/a', True, 'v2')
    >>> split_revision("https://huggingface.co/acme/a/tree/main/loras/b")
    ('acme/a/loras/b', True, 'main')
    """
    if is_local_path(model):
        return model, False, ""
    model = without_credentials(model)
    if model.startswith(("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/")):
        parts = urlsplit(model).path.strip("/").split("/")
        if parts[:1] == ["models"]:
            parts = parts[1:]
        revision, folder = "", list[str]()
        if parts[2:3] in (["tree"], ["commit"], ["blob"]):
            length = 3 if parts[3:4] == ["refs"] else 1
            revision, folder = "/".join(parts[3 : 3 + length]), parts[3 + length :]
        return "/".join([*parts[:2], *folder]), bool(revision), unquote(revision)
    name, at, revision = model.partition("@")
    return name, bool(at), revision


class Named(_Value):
    """A method or a selection: its name, and its parameters beside it.

    >>> Named.model_validate({"name": "greedy", "accept": ">"}).parameters
    {'accept': '>'}
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_or_text)
    name: _Text

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _to_text(self, handler: Any) -> object:
        given: dict[str, object] = handler(self)
        return self.name if list(given) == ["name"] else given

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything beside the name."""
        return dict(self.model_extra or {})


class Override(_Value):
    """Tensors that are combined in a way of their own.

    Args:
        tensors: A pattern of names; ``*`` stands for anything.
        method: How they are combined.
    """

    tensors: _Text
    method: Named


class Guard(_Value):
    """How much worse a soup may be on some validation data than the ingredient that is best there.

    Args:
        below_best: So many points, of metrics that are shares of one; of others so much of their unit.
    """

    below_best: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LabelledData(_Value):
    """Labelled data and the number that is read off it.

    Args:
        task: What a model does with it.
        dataset: A Hub id, or a local csv, jsonl or parquet file or image folder.
        split: The split, also as a slice (``validation[:500]``); for a local file it may be left out.
        metric: ``accuracy`` or another built-in metric, of those that the model's kind of head has;
            ``module:function``; a folder or file of an `evaluate` script, or its id on the Hub. Of what is not built in
            more is better.
        config: The dataset's configuration, where it has several.
        revision: The dataset's commit; filled in when the recipe is resolved.
        labels: The class names in the order of the dataset's numbers, where nobody else says it.
        label_column, input_columns: Columns, where the usual names do not fit.
        cluster_column: A column whose equal values say that rows belong together, as questions about one article.
            Intervals and tests draw them together.
        name: What the data is called in tables; ``dataset split`` by default.
        batch_size: Examples in one forward pass.
        weight: How much it counts where selection looks at several.
        trust_remote_code: Let a metric of the Hub, which is code, run here.
        assistant_only: Of conversations, which `causal-lm` reads, count the answers alone.
        at_least: Of validation data, how much worse than the best ingredient a soup may be on them.
    """

    task: str
    dataset: _Text
    split: str | None = None
    metric: _Text = "accuracy"
    config: str | None = None
    revision: str | None = None
    labels: tuple[str, ...] | None = None
    label_column: str | None = None
    input_columns: tuple[str, ...] | None = None
    cluster_column: _Text | None = None
    name: str | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    trust_remote_code: bool = False
    assistant_only: bool = False
    at_least: Guard | None = None


class Scoring(LabelledData):
    """Labelled data as a recipe names it: `LabelledData` of a task that there is.

    Args:
        task: ``image-classification``, ``text-classification``, ``multiple-choice-lm``, or ``causal-lm``, whose metric
            is ``bits_per_byte`` where nothing else is said; or one of another package (docs/extending.md).
    """

    task: Annotated[str, AfterValidator(_known_task), Field(json_schema_extra={"examples": list(TASKS)})]

    @model_validator(mode="before")
    @classmethod
    def _tasks_have_their_metrics(cls, value: object) -> object:
        usual = {"causal-lm": "bits_per_byte"}.get(str(value.get("task"))) if isinstance(value, Mapping) else None
        return {"metric": usual, **value} if usual and isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _answers_are_of_conversations(self) -> Self:
        if self.assistant_only and self.task != "causal-lm":
            raise ValueError(
                f"`assistant_only` is for conversations, which `causal-lm` reads, and the task is '{self.task}'"
            )
        return self

    @property
    def measure(self) -> str:
        """The metric's name, without the path of a script."""
        return Path(self.metric).stem if is_local_path(os.path.expanduser(self.metric)) else self.metric  # noqa: PTH111

    @property
    def title(self) -> str:
        """What the score is called in tables, such as ``AI-Lab-Makerere/beans test accuracy``."""
        last = Path(self.dataset).name if is_local_path(self.dataset) else self.dataset
        data = self.name or " ".join(part for part in (last, self.config, self.split) if part)
        return f"{data} {self.measure}"


class FunctionScoring(_Value):
    """A function of one's own that measures a model: ``{function: my_eval:score}``.

    It is called as ``score(model, processor)`` with the model in memory, in eval mode, and what
    ``transformers.AutoProcessor`` loads beside it (a tokenizer, an image processor), or None. It may take the model
    alone. Where an argument is called ``folder``, it is called as ``score(folder)``: the folder holds the model and its
    processor. It returns one number, or one for each row of its data, in the same order for every model; more is
    better.

    Args:
        function: ``module:function``, of a module that is installed, on PYTHONPATH or in the current folder.
        name: What the score is called in tables; the function by default.
        weight: How much it counts where selection looks at several.
        at_least: How much worse than the best ingredient a soup may be by it.

    >>> FunctionScoring(function="my_eval:score").title
    'my_eval:score'
    """

    function: Annotated[str, Field(max_length=200)]
    name: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    at_least: Guard | None = None

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        if not re.fullmatch(r"(local:)?[A-Za-z_][\w.]*:[A-Za-z_]\w*", function):
            raise ValueError(f"'{shortened(function, 80)}' is no `module:function`, such as `my_eval:score`")
        return function

    @property
    def measure(self) -> str:
        """What it measures: the function's name."""
        return self.function.rpartition(":")[2]

    @property
    def title(self) -> str:
        """What the score is called in tables."""
        return self.name or self.function


class HarnessScoring(_Value):
    """A task of lm-evaluation-harness: ``{task: lm-eval, name: arc_easy}``. It takes the extra ``hf-soup[lm]``.

    Args:
        task: ``lm-eval``.
        name: What the harness calls the task, or a group of tasks.
        include_path: A folder of task files, where the task is one's own.
        config: The whole task as data, in the place of ``name`` and a file.
        split: Of the task's data set; by default what the harness takes.
        metric: ``acc_norm``, or with the name of a filter ``exact_match,strict-match``; by default the task's first.
        num_fewshot: Examples before each question; by default what the task says.
        apply_chat_template: Ask through the chat template of the models' tokenizer.
        limit: The first rows of each task alone.
        cluster_column: As in `LabelledData`, a key of the task's rows.
        batch_size: Requests in one forward pass.
        weight: How much it counts where selection looks at several.
        at_least: How much worse than the best ingredient a soup may be on it.
        revision: The versions of harness and task, and the hash of its rows; filled in when the recipe is resolved.
        trust_remote_code: Let task files of one's own run Python, and tasks run what a model writes.

    >>> HarnessScoring(task="lm-eval", config={"task": "mine", "dataset_path": "json"}).title
    'mine'
    """

    task: Literal["lm-eval"]
    name: Annotated[str, Field(max_length=1024)] = ""
    include_path: _Text | None = None
    config: dict[str, Any] | None = None
    split: str | None = None
    metric: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    cluster_column: _Text | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    at_least: Guard | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _data_have_a_name(cls, value: object) -> object:
        if isinstance(value, Mapping) and isinstance(config := value.get("config"), Mapping):
            if not isinstance(config.get("task"), str):
                raise ValueError("`config` has no `task`, which is the task's name")
            return {"name": config["task"], **value}
        return value

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if not self.name:
            raise ValueError("it has no `name`: what the harness calls the task, such as `arc_easy`")
        if self.config is not None and self.config["task"] != self.name:
            raise ValueError(f"`name` is '{self.name}' and `config` has the task '{self.config['task']}'")
        if self.config is not None and self.include_path is not None:
            raise ValueError("`config` is the whole task, so there is nothing to look for in `include_path`")
        return self

    @property
    def measure(self) -> str:
        """The metric's name and its filter, where they are named."""
        return (self.metric or "metric").removesuffix(",none")

    @property
    def title(self) -> str:
        """What the score is called in tables."""
        return " ".join(part for part in (self.name, self.split, self.metric and self.measure) if part)


#: What `validation` and `test` may hold.
AnyScoring = Scoring | FunctionScoring | HarnessScoring


def with_dataset(scorings: Iterable[AnyScoring]) -> tuple[Scoring, ...]:
    """Those that name a data set."""
    return tuple(each for each in scorings if isinstance(each, Scoring))


#: What is said of a score, and not of examples.
_OF_SCORES = {
    "assistant_only",
    "at_least",
    "cluster_column",
    "metric",
    "labels",
    "label_column",
    "weight",
    "trust_remote_code",
}


class CalibrationData(Scoring):
    """Inputs on which a method looks at what the ingredients do; labels are not read. Its keys are those of `Scoring`.

    A method draws so many rows as it asks for from the split. Statistics of batch normalisation are of all rows.
    """

    task: Literal["image-classification", "text-classification", "causal-lm"]

    @model_validator(mode="before")
    @classmethod
    def _tasks_have_their_metrics(cls, value: object) -> object:  # in the place of the one of scores
        if isinstance(value, Mapping) and (found := value.keys() & _OF_SCORES):
            raise ValueError(f"'{min(found)}' is for `validation` and `test`; examples have no labels and no metric")
        return value

    @property
    def title(self) -> str:
        """What the data is called."""
        return super().title.removesuffix(f" {self.measure}")


def _as_list(value: object) -> object:
    """Data as a recipe names it: none, one, or several."""
    return [] if value is None else value if isinstance(value, list | tuple) else [value]


#: What pydantic calls them in the places of faults.
_KINDS = ("data", "function", "harness")


def _kind(value: object) -> str:
    """Which of them an entry of `validation` or `test` is."""
    named = value if isinstance(value, Mapping) else vars(value) if isinstance(value, _Value) else {}
    return "function" if "function" in named else "harness" if named.get("task") == "lm-eval" else "data"


_Tagged = Annotated[
    Annotated[Scoring, Tag("data")]
    | Annotated[FunctionScoring, Tag("function")]
    | Annotated[HarnessScoring, Tag("harness")],
    Discriminator(_kind),
]
_Scorings = Annotated[
    tuple[_Tagged, ...], BeforeValidator(_as_list, json_schema_input_type=tuple[AnyScoring, ...] | AnyScoring | None)
]


class Recipe(_Value):
    """What was asked for.

    Args:
        ingredients: The models, in the order that decides every other order.
        base_model: The pretrained ancestor; found through the Hub when absent.
        method: How tensors are combined. In the place of a number stand several in a list, of which the best on
            validation data is taken, or ``{depth: [first, …, last]}``, which goes from one to the next over the layers.
        overrides: How some tensors are combined; the first whose pattern matches a tensor's name counts.
        select: Which ingredients go in, with which weights: ``uniform`` (all), ``greedy``, …
        tensor_weights: Weights of single tensors, in the order of the ingredients: the first pattern that matches a
            tensor's name wins, and the ingredients' own weights count where none does. What a selection learned is
            written here.
        validation: The data that selection may look at, a function of one's own (`FunctionScoring`) or a task of
            lm-evaluation-harness (`HarnessScoring`); of several the weighted mean of their scores.
        test: Data that is looked at once, at the end.
        calibration: Inputs for methods that look at what the ingredients do with them, as fisher and regmean, and with
            which running statistics of batch normalisation are collected again.
        heads: Average bodies alone: ``body`` makes a model without a head, a new base; the name of an ingredient
            keeps its head.
        vocabulary: Where some ingredients added tokens: ``base`` keeps those that all have, ``union`` all.
        labels: Names of the outputs in the order that the soup shall have; by default as the first ingredient that
            names them has them. An ingredient that names none is taken to have them in this order: its rows stay.
        output: ``model``, or ``adapter``: a LoRA adapter of the base, made of adapters of it or of what full fine-tunes
            learned.
        rank: Of the adapter; by default the sum of the adapters' ranks, at which nothing is lost.
        allow: Codes of findings that are accepted although they refuse or warn, such as ``drifted``: those that are
            judgements (`JUDGEMENTS`).
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``float64``; the ingredients' by default.
        stability_repeats: How often the choice is made again, on random halves of the validation rows, to say how
            stable it is.
        seed: Of what methods and selections draw at random. Intervals and tests always draw alike.
        allow_pickle: Read ``pytorch_model.bin`` where there is nothing else (weights only).

    >>> recipe = Recipe(ingredients=["acme/a", {"model": "acme/b", "weight": 2}])
    >>> print(recipe.to_yaml(), end="")
    ingredients:
    - acme/a
    - model: acme/b
      weight: 2.0
    """

    base_model: Annotated[str, Field(max_length=1024), BeforeValidator(_as_text)] | None = None
    ingredients: Annotated[tuple[Ingredient, ...], Field(min_length=1, max_length=MAX_INGREDIENTS)]
    method: Named = Named(name="linear")
    overrides: Annotated[tuple[Override, ...], Field(max_length=1000)] = ()
    select: Named = Named(name="uniform")
    tensor_weights: Annotated[dict[_Text, tuple[float, ...]], Field(max_length=100_000)] = {}
    validation: _Scorings = ()
    test: _Scorings = ()
    calibration: CalibrationData | None = None
    heads: _Text | None = None
    vocabulary: Literal["base", "union"] | None = None
    labels: tuple[str, ...] | None = None
    output: Literal["model", "adapter"] = "model"
    rank: Annotated[int, Field(ge=1, le=65536)] | None = None
    allow: Annotated[
        tuple[str, ...], BeforeValidator(_as_list, json_schema_input_type=tuple[str, ...] | str | None)
    ] = ()
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    stability_repeats: Annotated[int, Field(ge=0, le=1000)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    allow_pickle: bool = False

    def __init__(self, name: str = "the recipe", text: str = "", /, **values: Any) -> None:
        # pydantic's own signature knows only the final types; a recipe is written with the short ones. ``name`` is
        # what errors call it, and ``text`` is where they look for the line.
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(error, name, text) from None

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Self:
        weights = [ingredient.weight for ingredient in self.ingredients]
        total = sum(weights)
        if not any(weights) or not math.isfinite(total):
            shown = ", ".join(f"{weight:g}" for weight in weights)
            raise ValueError(f"the weights ({shown}) sum to {total:g}; give at least one ingredient a share")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        for pattern, weights in self.tensor_weights.items():
            if len(weights) != len(self.ingredients) or not math.isfinite(sum(weights)):
                shown = ", ".join(f"{weight:g}" for weight in weights)
                raise ValueError(
                    f"`tensor_weights` gives '{pattern}' the weights ({shown}); it takes a finite one for each of the "
                    f"{len(self.ingredients)} ingredients"
                )
        return self

    @model_validator(mode="after")
    def _guards_are_of_validation(self) -> Self:
        if any(each.at_least for each in self.test):
            raise ValueError("`at_least` is for `validation`: test data are looked at when everything is chosen")
        return self

    @model_validator(mode="after")
    def _heads_are_known(self) -> Self:
        if self.heads == "body" and (self.validation or self.test or self.calibration):
            raise ValueError(
                "with `heads: body` there are no outputs that `validation`, `test` or `calibration` look at"
            )
        if self.heads not in (None, "body") and not isinstance(self.head, int):
            known = ", ".join(str(each) for each in self.ingredients[:6])
            raise ValueError(f"`heads` is '{self.heads}'; it is `body` or one of the ingredients: {known}")
        return self

    @model_validator(mode="after")
    def _labels_are_apart(self) -> Self:
        labels = [label.strip().casefold() for label in self.labels or ()]
        if self.labels is not None and self.heads == "body":
            raise ValueError("with `heads: body` the soup has no outputs that `labels` could name")
        if twice := next((label for label, count in Counter(labels).items() if count > 1), None):
            raise ValueError(f"`labels` has '{twice}' twice; every output has a name of its own")
        return self

    @model_validator(mode="after")
    def _adapters_keep_what_their_base_has(self) -> Self:
        if self.rank is not None and self.output != "adapter":
            raise ValueError("`rank` is of an adapter: write `output: adapter` too")
        if self.output == "adapter" and self.labels:
            raise ValueError(
                "an adapter has no place for names of outputs; leave `labels` out, or give them with the data"
            )
        if self.output == "adapter" and (self.heads or self.vocabulary):
            key = "heads" if self.heads else "vocabulary"
            raise ValueError(f"`output: adapter` keeps the parts that its models have; leave `{key}` out")
        return self

    @field_validator("allow")
    @classmethod
    def _allows_judgements(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        if other := [code for code in allow if code not in JUDGEMENTS]:
            known = sorted(JUDGEMENTS)
            raise ValueError(
                f"'{other[0]}' is no finding that can be accepted{near(other[0], known)}; those are {', '.join(known)}"
            )
        return tuple(dict.fromkeys(allow))

    @property
    def head(self) -> int | Literal["body"] | None:
        """Number of the ingredient whose head is kept, or ``body``; None where heads are averaged."""
        if self.heads is None or self.heads == "body":
            return self.heads  # type: ignore[return-value]  # "body" is one
        model, _, revision = split_revision(self.heads)
        for number, each in enumerate(self.ingredients):
            if each.model == model and revision in ("", each.revision):
                return number
        return None

    @property
    def model_dtype(self) -> str | None:
        """The type of whole models, also on the way to an adapter, which may have another."""
        return self.dtype if self.output == "model" else None

    @property
    def resolved(self) -> bool:
        """Whether every ingredient is pinned, as in the ``soup.yaml`` of a soup; one alone is a soup only there."""
        return all(re.fullmatch(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}", each.revision or "") for each in self.ingredients)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: The file cannot be read or is not a recipe; every fault is listed.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
            if not path.is_file() and not path.is_dir():  # a pipe may never end, nor ever begin
                raise RecipeError(f"Cannot read the recipe '{path}': it is a pipe or a device.", hint="Name a file.")
            if size > MAX_BYTES:
                raise RecipeError(f"'{path.name}' has {size:,} bytes; a recipe has at most {MAX_BYTES:,}.")
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"Cannot read the recipe '{path}': {reason}.") from None
        return cls.parse(text, path.name)

    @classmethod
    def parse(cls, text: str, name: str = "the recipe") -> Self:
        """Read a recipe from YAML text; ``name`` is what errors call it."""
        try:
            values = parse_yaml(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"Cannot read {name}: it is not valid YAML.\n{shortened(str(error))}") from None
        if not isinstance(values, dict):
            raise RecipeError(
                f"Cannot read {name}: a recipe is a mapping with the key 'ingredients'; "
                f"this is {'empty' if values is None else type(values).__name__}.",
                hint="Start from `hf-soup check MODEL... -o recipe.yaml`, which writes one.",
            )
        if odd := [key for key in values if not isinstance(key, str)]:
            raise RecipeError(
                f"Cannot read {name}: its key {shortened(repr(odd[0]), 80)} is no text.",
                hint="Keys of a recipe are words, such as `ingredients`.",
            )
        if "merge_method" in values:
            raise RecipeError(
                f"Cannot read {name}: it is a file of mergekit.",
                hint="In a recipe its `models` are `ingredients`, `merge_method` is `method`, `parameters` stand "
                "beside the method's `name`, and the weights of models beside each: docs/recipe.md.",
            )
        return cls(name, text, **values)

    def to_dict(self) -> dict[str, Any]:
        """The values that differ from their defaults, as plain data."""
        dumped: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        if len(dumped.get("validation", [])) == 1:
            (dumped["validation"],) = dumped["validation"]
        return dumped

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is a default anyway."""
        return write_yaml(self.to_dict())


def _keys_at(location: Sequence[int | str]) -> set[str]:
    """The keys that a recipe may have where a fault lies."""
    children: dict[object, type[BaseModel]] = {
        "ingredients": Ingredient, "overrides": Override, "validation": Scoring, "test": Scoring,
        "function": FunctionScoring, "harness": HarnessScoring,
    }  # fmt: skip
    if location[0] == "calibration":
        return set(CalibrationData.model_fields) - _OF_SCORES
    owners = [children[part] for part in location[:-1] if part in children]
    return set((owners[-1] if owners else Recipe).model_fields)


def parse_part(kind: type[_Part], value: object, name: str) -> _Part:
    """What is read from plain data, such as a `Scoring`; ``name`` is what errors call it.

    Raises:
        RecipeError: It is none; every fault is listed.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error, name) from None


#: What a caller may name models with: a recipe, its YAML file, a model, several, or several with their weights.
Models = Recipe | str | Path | Sequence[str | Path] | Mapping[str, float] | Mapping[Path, float]


def as_recipe(models: Models, **changes: Any) -> Recipe:
    """A recipe from what a caller may give, with some of its keys changed; those that are None are not.

    >>> as_recipe({"acme/a": 0.9, "acme/b": 0.1}, method="slerp").to_dict()["ingredients"][0]
    {'model': 'acme/a', 'weight': 0.9}
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if isinstance(models, str | Path) and str(models).endswith((".yaml", ".yml")):
        models = Recipe.load(models)
    if isinstance(models, Recipe):
        return Recipe(**{**models.to_dict(), **changes}) if changes else models
    if isinstance(models, Mapping):
        named: list[Any] = [{"model": model, "weight": weight} for model, weight in models.items()]
    else:
        named = [models] if isinstance(models, str | Path) else list(models)
    return Recipe(**{"ingredients": named, **changes})


_MOST_FAULTS = 50
#: pydantic's words, and those of somebody who writes YAML.
_YAML_WORDS = {"Tuple": "List", "tuple": "list", "(dictionary|object)( or instance of [A-Za-z]+)?": "mapping"}


def _explained(error: ValidationError, name: str, text: str = "") -> RecipeError:
    """All faults of a recipe of this name, a line each, with the key and its line, the value and what is allowed."""
    every, lines = error.errors(include_url=False), [f"Cannot read {name}:"]
    faults = every[:_MOST_FAULTS]
    for fault in faults:
        looks = fault["loc"][:1] in (("validation",), ("test",))
        parts = [part for place, part in enumerate(fault["loc"]) if not (looks and place == 2 and part in _KINDS)]
        where = ".".join(shortened(str(part), 80) for part in parts).replace("validation.0", "validation") or "recipe"
        message = fault["msg"].removeprefix("Value error, ")
        for theirs, ours in _YAML_WORDS.items():
            message = re.sub(theirs, ours, message)
        within = [other for other in faults if other["loc"][:-1][: len(fault["loc"])] == fault["loc"]]
        if fault["type"] == "too_short" and within:
            continue  # only because what is wrong in it was left out
        if fault["type"] == "extra_forbidden":
            known = sorted(_keys_at(fault["loc"]))
            listed = f"; known here: {', '.join(known)}"
            told = any(line.endswith(listed) for line in lines)
            message = f"unknown key{near(str(fault['loc'][-1]), known)}{'' if told else listed}"
        elif fault["type"] != "value_error" and fault["type"] != "missing":
            message = f"{message} (it is {_shown(fault['input'])})"
        line = line_of(text, fault["loc"])
        lines.append(f"  {f'line {line}, ' if line else ''}{where}: {shortened(message, 2000)}")
    if len(every) > len(faults):
        lines.append(f"  … and {len(every) - len(faults):,} more faults")
    return RecipeError("\n".join(lines))


def _shown(value: object) -> str:
    try:
        # Before it is cut, as half an address is none.
        return without_credentials(json.dumps(value, default=str))[:80]
    except (ValueError, TypeError, RecursionError):  # a number of a million digits, keys that are none
        return f"a {type(value).__name__} that cannot be written down"
