"""May these models be averaged? The verdict, every reason for it, and the evidence."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hf_soup._util.text import middle_out, strings
from hf_soup.checkpoint import Checkpoint
from hf_soup.errors import IncompatibleError, ResolveError, shortened
from hf_soup.hub import Token
from hf_soup.lineage import similarity
from hf_soup.lineage.alignment import AlignedModels, AlignmentOptions, align
from hf_soup.lineage.assets import settings
from hf_soup.lineage.compatibility import adapter_bases, architectures, complete, labels, modules, processing, quantised
from hf_soup.lineage.declared_bases import (
    BaseReference,
    base_candidates,
    open_base,
    read_declared_bases,
    shared_base,
)
from hf_soup.lineage.similarity import Similarity
from hf_soup.lineage.verdict import Verdict, decide_verdict
from hf_soup.recipe import JUDGEMENTS, Finding

PROVEN, LIKELY, REFUSED = "proven", "likely", "refused"


@dataclass(frozen=True)
class LineageReport:
    """The verdict on a set of models, with all reasons and the evidence.

    Args:
        verdict: ``proven``: declared, compared, and the weights agree; ``likely``: something of that is missing;
            ``refused``: a contradiction, or the weights are unrelated.
        ancestor: Their base, where one is known.
        models: The ingredients.
        reasons: Everything that was found, what refuses first.
        evidence: The comparisons of weights, ``body`` and ``head``; the base stands behind the ingredients.
        transferred_bytes: What the check read from the Hub.
    """

    verdict: str
    ancestor: BaseReference | None
    models: AlignedModels
    reasons: tuple[Finding, ...]
    evidence: tuple[Similarity, ...] = ()
    transferred_bytes: int = 0

    def similarity_to_ancestor(self, number: int) -> float | None:
        """Cosine of an ingredient's body with the base's, where that was compared."""
        count, bodies = len(self.models.ingredients), self._bodies
        if bodies is None or self.ancestor is None or self.ancestor.model not in bodies.names[count:]:
            return None
        cosine = float(bodies.cosines[number, bodies.names.index(self.ancestor.model, count)])
        return None if np.isnan(cosine) else cosine

    def similarity_to_others(self, number: int) -> tuple[float, float] | None:
        """The lowest and highest cosine of an ingredient's body with those of other ingredients."""
        if self._bodies is None:
            return None
        others = np.delete(self._bodies.cosines[number, : len(self.models.ingredients)], number)
        others = others[np.isfinite(others)]
        return (float(others.min()), float(others.max())) if len(others) else None

    @property
    def _bodies(self) -> Similarity | None:
        return next((each for each in self.evidence if each.part == "body"), None)

    def with_reasons(self, reasons: Sequence[Finding]) -> LineageReport:
        """The same with these reasons, what refuses first, and the verdict that they leave."""
        verdict = LIKELY if self.verdict == REFUSED else self.verdict
        if any(reason.refuses for reason in reasons):
            verdict = REFUSED
        return replace(self, reasons=tuple(sorted(reasons, key=lambda reason: not reason.refuses)), verdict=verdict)

    def raise_if_refused(self) -> None:
        """Stop before anything is averaged.

        Raises:
            IncompatibleError: The verdict is ``refused``; every reason is listed.
        """
        if self.verdict == REFUSED:
            refusals = [reason.message for reason in self.reasons if reason.refuses]
            shown = "\n".join(f"- {message}" for message in refusals) if len(refusals) > 1 else refusals[0]
            raise IncompatibleError(
                f"These models cannot be averaged:\n{shown}",
                hint=f"`hf-soup check` shows the whole report.{self._permission()}",
                code="refused",
            )

    def _permission(self) -> str:
        """How to average them all the same, where everything that refuses is a judgement."""
        codes = dict.fromkeys(reason.code for reason in self.reasons if reason.refuses)
        if not JUDGEMENTS.issuperset(codes):
            return ""
        return f" If you know better, accept it: `--allow {','.join(codes)}`, or `allow:` in a recipe."

    @property
    def cosines(self) -> tuple[float, float] | None:
        """Lowest and highest of all comparisons of bodies; None where nothing was compared."""
        pairs = bodies.cosines[np.triu_indices(len(bodies.names), 1)] if (bodies := self._bodies) else ()
        known = [float(cosine) for cosine in pairs if np.isfinite(cosine)]
        return (min(known), max(known)) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, as ``hf-soup check --json`` prints it."""
        ancestor = self.ancestor and {
            "model": self.ancestor.model,
            "revision": self.ancestor.revision,
            "source": self.ancestor.source,
        }
        return {
            "verdict": self.verdict,
            "ancestor": ancestor,
            "ingredients": [
                {
                    "name": model.name,
                    "model": model.checkpoint.model,
                    "revision": model.checkpoint.known_revision,
                    "parameters": model.checkpoint.parameters,
                    "dtype": model.checkpoint.dtypes[0] if model.checkpoint.dtypes else None,
                    "license": _license(model.checkpoint),
                    "ancestor_cosine": None
                    if (near := self.similarity_to_ancestor(number)) is None
                    else round(near, 4),
                    "notes": list(model.checkpoint.notes),
                }
                for number, model in enumerate(self.models.ingredients)
            ],
            "reasons": [reason.to_dict() for reason in self.reasons],
            "alignments": list(self.models.notes),
            "evidence": [each.to_dict() for each in self.evidence],
            "transferred_bytes": self.transferred_bytes,
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, *, advice: bool = True) -> str:
        """The report for people; without ``advice`` where what it advises is done already."""
        lines = [f"{self.verdict}: {_VERDICTS[self.verdict]}", ""]
        if self.ancestor:
            revision = f"@{self.ancestor.revision.removeprefix('sha256:')[:7]}" if self.ancestor.revision else ""
            source = {"recipe": "named by you", "card": "as the cards say"}.get(self.ancestor.source, "by its weights")
            lines.append(f"  base  {self.ancestor.model}{revision} ({source})")
        else:
            lines.append("  base  unknown")
        lines += ["", *self._table()]
        heads = next((each for each in self.evidence if each.part == "head"), None)
        if heads is not None and np.isfinite(pairs := heads.cosines[np.triu_indices(len(heads.names), 1)]).any():
            low, high = np.nanmin(pairs), np.nanmax(pairs)
            lines.append(
                f"  heads: cosine {low:.3f} to {high:.3f}; below {similarity.HEADS_UNRELATED} they are unrelated"
            )
        for heading, reasons in (
            ("Why not:", [reason for reason in self.reasons if reason.refuses]),
            ("Allowed:", [reason for reason in self.reasons if reason.allowed]),
            ("To know:", [reason for reason in self.reasons if not reason.refuses and not reason.allowed]),
        ):
            if reasons:
                lines += ["", heading, *(_wrapped(f"- [{reason.code}] {reason.message}") for reason in reasons)]
        notes = [f"{model.name}: {note}" for model in self.models.ingredients for note in model.checkpoint.notes]
        notes += self.models.notes
        if notes:
            lines += ["", "Aligned:", *(_wrapped(f"- {each}") for each in notes[:_MOST_NOTES])]
            lines += [f"- and {len(notes) - _MOST_NOTES} more; --json has all"] if len(notes) > _MOST_NOTES else []
        if advice:
            lines += ["", _wrapped(f"What to do: {self._advice()}")]
        if self.transferred_bytes:
            lines += ["", f"Read from the Hub: {self.transferred_bytes / 1e6:.1f} MB."]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        rows = [("model", "parameters", "type", "licence", "to base", "to the others")]
        for number, model in enumerate(self.models.ingredients[:_MOST_ROWS]):
            name, checkpoint = model.name, model.checkpoint
            near, others = self.similarity_to_ancestor(number), self.similarity_to_others(number)
            rows.append(
                (
                    f"{middle_out(name, 48)}{f'@{checkpoint.short}' if checkpoint.short and '@' not in name else ''}",
                    f"{checkpoint.parameters:,}",
                    checkpoint.dtypes[0] if checkpoint.dtypes else "?",
                    _license(checkpoint) or "not stated",
                    "" if near is None else f"{near:.3f}",
                    "" if others is None else " to ".join(dict.fromkeys(f"{each:.3f}" for each in others)),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True) if width).rstrip()
            for row in rows
        ]
        if (count := len(self.models.ingredients)) > _MOST_ROWS:
            lines.append(f"  and {count - _MOST_ROWS} more; --json has all")
        if self.evidence:
            below, above = similarity.UNRELATED, similarity.DRIFTED
            lines.append(f"  cosines of rows of the body: unrelated below {below}, closely related above {above}")
        return lines

    def _advice(self) -> str:
        if self.verdict == REFUSED:
            return f"each point under `Why not` says it; then check again.{self._permission()}"
        if self.verdict == PROVEN:
            return "`hf-soup cook` averages them; with validation data it measures the soup against its ingredients."
        architecture = " ".join(strings(self.models.donor.checkpoint.config.get("architectures")))
        barrier = "`hf-soup check --recipe RECIPE --barrier`" if _MEASURED.search(architecture) else ""
        if self.ancestor is None or self.ancestor.source == "weights":
            return f"name the base with --base if you know it{barrier and f', or measure with {barrier}'}."
        return f"measure: `hf-soup cook` with validation data{barrier and f', or {barrier}'}."


_MOST_ROWS, _MOST_NOTES = 20, 12  # of a report for people
#: Classes that have a task, on whose data barriers are measured.
_MEASURED = re.compile(r"For(ImageClassification|SequenceClassification|CausalLM)|LMHeadModel")


def _wrapped(text: str) -> str:
    """Lines of a message within a width, their own indentation kept; names are never broken."""
    return "\n".join(
        textwrap.fill(
            line,
            100,
            subsequent_indent=" " * (len(line) - len(line.lstrip("- "))),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.splitlines()
    )


def _license(checkpoint: Checkpoint) -> str | None:
    """A card's field that may hold one value, several or none; YAML makes dates and numbers of some texts."""
    stated = checkpoint.card.get("license")
    licenses = [str(license) for license in (stated if isinstance(stated, list) else [stated]) if license is not None]
    return shortened(", ".join(strings(licenses)), 80) or None


_VERDICTS = {
    PROVEN: "they share an architecture and a pretrained base, and the weights agree. They can be averaged.",
    LIKELY: "they look related, but not everything confirms it. They can be averaged.",
    REFUSED: "these models cannot be averaged.",
}


def check_lineage(
    checkpoints: Sequence[Checkpoint],
    *,
    base: str | None = None,
    options: AlignmentOptions | None = None,
    alone: bool = False,
    allow_pickle: bool = False,
    token: Token = None,
) -> LineageReport:
    """Decide whether models may be averaged, from configs, cards, headers and samples of rows.

    Args:
        checkpoints: Opened ingredients.
        base: Where the user names one.
        options: What the recipe says about heads, tokens and labels.
        alone: A single model may be a soup, as where a selection kept only one.
        allow_pickle: Read the base's ``pytorch_model.bin`` too.
        token: As everywhere in huggingface_hub.
    """
    models = AlignedModels.as_stored(checkpoints, options or AlignmentOptions())
    stored, reasons = models.ingredients, list[Finding]()
    if len(stored) < 2:
        message = "A soup needs two models or more; only one was named."
        reasons.append(Finding("single", message, models.names, refuses=not alone))
    named = None if base is None else _named_base(base, checkpoints, allow_pickle=allow_pickle, token=token)
    of_several = list(adapter_bases(stored, named.checkpoint if named else None))
    reasons += [*quantised(stored), *modules(stored), *of_several]
    declared = read_declared_bases(stored, token)
    verdict = Verdict(named or shared_base(declared, [checkpoint.model for checkpoint in checkpoints]))
    try:
        models, found = correspond(models, reasons)
        reasons += found
        codes = {reason.code for reason in reasons if reason.refuses}
        if not codes & {"architecture", "quantised"}:
            verdict = decide_verdict(
                models,
                declared,
                named,
                partial(base_candidates, checkpoints, token=token),
                with_heads=not codes & {"labels", "shapes", "tensors-missing", "vocabulary"},
            )
            reasons += verdict.reasons
    except IncompatibleError as error:
        reasons.append(Finding("architecture", str(error), refuses=True))
    found_base = verdict.base
    models = replace(models, asset_sources=(found_base.checkpoint,) if found_base and found_base.checkpoint else ())
    report = LineageReport(
        PROVEN if verdict.proven and not of_several else LIKELY, found_base, models, (), verdict.evidence
    )
    return report.with_reasons(reasons)


def _named_base(base: str, checkpoints: Sequence[Checkpoint], *, allow_pickle: bool, token: Token) -> BaseReference:
    """The base that the user names: without a revision it is at the one that adapters of it say.

    Without a network it may lack its weights, as only samples of them were read.
    """
    own = {each.base.identity: each.base for each in checkpoints if each.base and each.base.source.reference == base}
    at = next(iter(own.values())).source.commit if len(own) == 1 else None
    named = open_base(f"{base}@{at}" if at else base, source="recipe", allow_pickle=allow_pickle, token=token)
    if named.error is not None and not any(checkpoint.source.from_cache for checkpoint in checkpoints):
        raise ResolveError.of(named.error, f"The base cannot be used: {named.error.message}")
    return named


def correspond(models: AlignedModels, known: Sequence[Finding] = ()) -> tuple[AlignedModels, list[Finding]]:
    """How the tensors of models correspond, whatever their weights are, and what stands against it.

    Args:
        models: As they are stored.
        known: What was found before; where it refuses, only architectures are compared.

    Raises:
        IncompatibleError: A config cannot be read.
    """
    stored, options, bodies = models.ingredients, models.options, models.options.heads is not None
    reasons = list(architectures(stored, models.donor, body_only=bodies))
    if any(reason.refuses for reason in (*known, *reasons) if reason.code not in {"single", *JUDGEMENTS}):
        return models, reasons
    reasons += [] if bodies else labels(stored, options.labels)
    found, tokens = processing(stored)
    reasons += found
    models, found = align(stored, options, tokens)
    return models, [*reasons, *found, *settings(models), *complete(stored, models.donor, everyone=bodies)]
