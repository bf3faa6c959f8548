"""What is told of a soup: `SoupReport`, which ``soup.json`` holds as it stands here, key by key.

Everything else that is said of a soup (the card, the pictures, the tables of the command line) is made from it. A
report of another version is read as far as it can be: keys that are not known are passed over, and those that may be
absent have defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from hf_soup._util.text import some
from hf_soup.recipe.schema import LabelledData, Named, parse_part
from hf_soup.selection import Step


class _Part(BaseModel):
    # What is neither a name nor a number that this file knows is some other version's.
    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True, defer_build=True)


class ReportedOverride(_Part):
    """Tensors that were combined in a way of their own."""

    tensors: str
    method: Named


@dataclass(frozen=True)
class Score:
    """A metric on one data set, with its 95 % interval ``low`` to ``high`` and the number of rows.

    Where a function gave one number for all, there is no interval and no number of rows. ``share``: it is a share of
    one, which people read in percent. What selections compare is the negative where less is better.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    share: bool = True
    less_is_better: bool = False

    @property
    def text(self) -> str:
        """With its interval, in percent where it is a share.

        >>> Score("accuracy", 0.925, 0.9, 0.95, 400).text, Score("score", 12.3456, None, None, None, share=False).text
        ('92.50 (90.00 – 95.00)', '12.35')
        """

        def shown(value: float) -> str:
            return f"{100 * value:.2f}" if self.share else f"{value:.4g}"

        return shown(self.value) + (
            "" if self.low is None or self.high is None else f" ({shown(self.low)} – {shown(self.high)})"
        )

    @property
    def remark(self) -> str:
        """What stands behind the title of a column of such scores: the number of rows, and where less is better.

        >>> Score("perplexity", 8.0, 7.5, 8.5, 400, share=False, less_is_better=True).remark
        ' (n = 400, less is better)'
        """
        said = [f"n = {self.n}"] if self.n else []
        said += ["less is better"] if self.less_is_better else []
        return f" ({', '.join(said)})" if said else ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


#: What has scores and is no ingredient: the soup, the version before it, and ensembles.
OTHER_MODELS = ("soup", "last version", "ensemble", "logit ensemble", "greedy ensemble")
#: Title of the data → score.
Scores = Mapping[str, Score]


class Comparison(_Part):
    """Two models on the same rows: ``difference`` is how much better the first one scores.

    ``sentence`` claims a difference only where it is ``significant``. Where a function gave one number for all rows,
    there is no interval and no p. ``against`` names an ingredient; of the last version there is nothing to name. On
    data that chose among ``candidates``, ``chance`` is the difference that such a choice gives in the mean where all
    are alike, and ``chance_p`` how often it gives as much as was seen.
    """

    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    n: int | None
    sentence: str
    against: Annotated[str | None, Field(exclude_if=lambda name: name is None)] = None
    significant: bool
    candidates: Annotated[int | None, Field(exclude_if=lambda count: count is None)] = None
    chance: Annotated[float | None, Field(exclude_if=lambda gain: gain is None)] = None
    chance_p: Annotated[float | None, Field(exclude_if=lambda p: p is None)] = None


class UpdateReport(_Part):
    """What an update changed.

    Args:
        soup, revision: The last version, and its commit where it is on the Hub.
        added: The ingredients that are new.
        before, after: What the last version and this one score.
        comparisons: Title of the data → this version against the last.
        left_out: Why something is not measured, a sentence each.
        helps: Whether the new ingredients help; None where nobody can tell.
        sentence: The same in words.
    """

    soup: str
    revision: str | None = None
    added: tuple[str, ...]
    before: Scores
    after: Scores
    comparisons: Mapping[str, Comparison]
    left_out: tuple[str, ...]
    helps: bool | None
    sentence: str


class CalibrationErrors(_Part):
    """How far a model's probabilities can be believed: expected calibration error, log-likelihood, Brier score."""

    ece: float
    nll: float
    brier: float


class MeanDiversity(_Part):
    """Means over all pairs of ingredients; None where there are none."""

    disagreement: float | None
    double_fault: float | None
    shared_errors: float | None


class Diversity(_Part):
    """How differently ``models`` err: a square matrix in their order for each measure, and the ``mean`` over pairs."""

    models: tuple[str, ...]
    disagreement: tuple[tuple[float | None, ...], ...]
    double_fault: tuple[tuple[float | None, ...], ...]
    shared_errors: tuple[tuple[float | None, ...], ...]
    mean: MeanDiversity


class CurvePoint(_Part):
    """Values of a method's parameters that were tried: the validation score, and the score on all data."""

    parameters: Mapping[str, Any]
    score: float
    scores: Scores


class LearningEpoch(_Part):
    """Of learned shares: losses on the rows learned from and on those kept apart, the logits' scale, the shares."""

    epoch: int
    train_loss: float | None
    inner_loss: float
    scale: float
    weights: Mapping[str, float]


class SelectionStability(_Part):
    """What comes out when the choice is made again on random halves of the validation rows.

    Args:
        repeats: How often.
        chosen: How often each ingredient went in.
        gains: The score of each soup on the other half of the rows, less that of the ingredient which is best on the
            half that was chosen on; so nothing is scored on rows that it was chosen by.
        mean, low, high: The mean gain, and the middle 95 % of them.
        sentence: The same in words.
    """

    repeats: int
    chosen: Mapping[str, int]
    gains: tuple[float, ...]
    mean: float
    low: float
    high: float
    sentence: str


class ReportedData(LabelledData):
    """Data that was looked at once, at the end: as in the recipe, with its ``title`` and the ``loader`` of files."""

    model_config = ConfigDict(extra="ignore", str_strip_whitespace=False)
    name: str
    title: str
    loader: str | None


class BatchNormUpdate(_Part):
    """With what running statistics of batch normalisation were collected again.

    Args:
        data: Its title.
        layers: How many have new statistics.
        rows, batches, batch_size: What went through the model.
        unreached: Layers through which nothing went, which keep the mean of the ingredients' statistics.
    """

    data: str
    layers: int
    rows: int
    batches: int
    batch_size: int
    unreached: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """The same in words."""
        size = f"{self.batches:,} batch{'es'[: 2 * self.batches - 2]} of {self.batch_size:,}"
        said = [
            f"The running statistics of {self.layers:,} layer{'s'[: self.layers - 1]} of batch normalisation were "
            f"collected again with the soup's weights, in one pass over {self.rows:,} rows of {self.data} ({size})."
        ]
        if self.unreached:
            said.append(
                f"No example went through {some(self.unreached)}: the running statistics there are the ingredients' "
                "mean."
            )
        return said


class ReportedBase(_Part):
    """The pretrained ancestor, its commit where it could be read, and who names it."""

    model: str
    revision: str | None = None
    source: str


class ReportedIngredient(_Part):
    """A leaf: what it is, and the cosine of its body with the ancestor's."""

    name: str
    model: str
    revision: str | None = None
    parameters: int
    dtype: str | None
    license: str | None
    ancestor_cosine: float | None
    notes: tuple[str, ...]


class ReportedFinding(_Part):
    """Something that was found: ``severity`` is ``refusal``, ``allowed`` or ``warning``."""

    code: str
    severity: str
    message: str
    ingredients: tuple[str, ...]


class ReportedSimilarity(_Part):
    """Rows of a part of the models, each model with each: cosines, and shares of rows that find themselves."""

    part: str
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    cosine: tuple[tuple[float | None, ...], ...]
    rows: tuple[tuple[float | None, ...], ...]


class ReportedLineage(_Part):
    """Whether the ingredients may be averaged, and how that is known: what ``hf-soup check --json`` prints."""

    verdict: str
    ancestor: ReportedBase | None = None
    ingredients: tuple[ReportedIngredient, ...]
    reasons: tuple[ReportedFinding, ...] = ()
    alignments: tuple[str, ...] = ()
    evidence: tuple[ReportedSimilarity, ...] = ()
    transferred_bytes: int = 0


class AdapterReport(_Part):
    """What an adapter holds of what it is made of.

    Args:
        rank: Of its factors; the largest, where tensors have fewer rows or columns.
        error: The length of what is lost, in parts of the length of all that was learned (Frobenius norms).
        errors: The same for every tensor.
        left_out: Tensors that were changed, or may have been, and that no adapter can hold.
    """

    rank: int
    error: float
    errors: Mapping[str, float] = {}
    left_out: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The error in words."""
        if self.error < 1e-5:
            said = f"An adapter of rank {self.rank}. It loses nothing but rounding"
        else:
            worst = max(self.errors, key=lambda name: self.errors[name])
            said = (
                f"An adapter of rank {self.rank}. It loses {self.error:.2%} of the length of what was learned, and "
                f"{self.errors[worst]:.2%} in {worst}"
            )
        return f"{said}. Left out: {some(self.left_out)}." if self.left_out else f"{said}."


class SoupReport(_Part):
    """What is told of a soup; ``soup.json``.

    Args:
        digest: Over all tensors: sha256 of the lines ``name dtype shape root`` in name order, ``root`` the sha256 of
            the concatenated sha256s of a tensor's 4 MiB blocks.
        weights: Share of every leaf that went in.
        selected: The ingredients of the recipe that went in.
        made_of: The leaves of each ingredient that is a run or a soup.
        method, parameters, overrides, select: As in the recipe, with the parameters that were chosen.
        architecture, tasks: Class of the model, and the pipelines that take it.
        library, encoder: What loads it: transformers, or sentence-transformers with this class.
        head_of: Whose head it keeps, where only bodies are averaged.
        validation: Titles of the data that selection may look at.
        scores: Model (``soup``, every ingredient, their ensembles) → title of the data → score.
        best: Title of the data → the ingredient that is best on the validation data, or there.
        comparisons: Title of the data → the soup against that ingredient.
        calibration_errors: As ``scores`` → how far probabilities can be believed.
        diversity: Title of the data → how differently the ingredients err.
        greedy_ensemble: Those in the ensemble of that name, best first.
        curve: Values of parameters that were tried.
        trace: What the selection tried.
        history: How shares were learned, an entry for each epoch.
        stability: What comes out when the choice is made again.
        test: The data that was looked at once, at the end.
        batch_norm: With what running statistics were collected again.
        adapter: Where the soup is an adapter, what it holds.
        update: What changed since the last version.
        license_agreed: Whether the ingredients' licences are the same, or all permissive.
        notes, alignments: What a reader should know, and what was done so that tensors correspond, a sentence each.
        lineage: Where the ingredients come from.
        harness: Of each score by a task of lm-evaluation-harness the versions of harness and task, and the hash of its
            rows.
        versions, system: Of what cooked it.
    """

    digest: str
    weights: Mapping[str, float]
    selected: tuple[str, ...] = ()
    made_of: Mapping[str, tuple[str, ...]] = {}
    method: str
    parameters: Mapping[str, Any] = {}
    overrides: tuple[ReportedOverride, ...] = ()
    select: str
    architecture: str = "AutoModel"
    tasks: tuple[str, ...] = ()
    library: str = "transformers"
    encoder: str = "SentenceTransformer"
    head_of: str | None = None
    validation: tuple[str, ...] = ()
    scores: Mapping[str, Scores]
    best: Mapping[str, str] = {}
    comparisons: Mapping[str, Comparison] = {}
    calibration_errors: Mapping[str, Mapping[str, CalibrationErrors]] = {}
    diversity: Mapping[str, Diversity] = {}
    greedy_ensemble: tuple[str, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    trace: tuple[Step, ...] = ()
    history: tuple[LearningEpoch, ...] = ()
    stability: SelectionStability | None = None
    test: tuple[ReportedData, ...] = ()
    batch_norm: BatchNormUpdate | None = None
    adapter: AdapterReport | None = None
    update: UpdateReport | None = None
    license_agreed: bool
    notes: tuple[str, ...] = ()
    alignments: tuple[str, ...] = ()
    lineage: ReportedLineage | None = None
    harness: Mapping[str, str] = {}
    versions: Mapping[str, str] = {}
    system: str = ""

    @property
    def copy_of(self) -> str | None:
        """The one model that a selection kept, so that the soup is a copy of it; None where there are more."""
        alone = len(self.weights) == 1 < len(self.ingredients) and self.method == "linear" and not self.overrides
        return next(iter(self.weights)) if alone else None

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Those that were scored."""
        return tuple(name for name in self.scores if name not in OTHER_MODELS)

    @property
    def in_percent(self) -> bool:
        """Whether all scores are shares of one."""
        return all(score.share for scores in self.scores.values() for score in scores.values())

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read ``soup.json``.

        Raises:
            ValueError: It is no JSON object.
            RecipeError: It is not that of a soup; every fault is listed.
            RecursionError: It is nested without end.
        """
        # Not pydantic's own parser: it refuses half a letter, which strangers' names may have.
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("no object")
        return parse_part(cls, values, "soup.json")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, in the order of ``soup.json``."""
        return self.model_dump()
