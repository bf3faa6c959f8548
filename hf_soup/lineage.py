"""May these models be averaged? The verdict, every reason for it, and the evidence."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_soup.ancestry import Ancestor, find_ancestor, weigh
from hf_soup.checkpoint import Checkpoint
from hf_soup.client import Token
from hf_soup.compatibility import Reason, align, architectures, duplicates, labels, modules, processing, quantised
from hf_soup.errors import IncompatibleError
from hf_soup.headers import TensorInfo
from hf_soup.kinship import Kinship

PROVEN, LIKELY, REFUSED = "proven", "likely", "refused"


@dataclass(frozen=True)
class Lineage:
    """The verdict on a set of models, with all reasons and the evidence.

    Args:
        verdict: ``proven``: declared and the weights agree, the ancestor compared; ``likely``: only one of the
            two; ``refused``: a contradiction or strangers.
        ancestor: Where one is known.
        checkpoints: The ingredients, pinned.
        names: What each is called everywhere else: its model, told apart where two share it.
        reasons: Everything that was found, what refuses first.
        alignments: What is dropped, renamed or shared so that tensors correspond, a sentence each.
        evidence: The comparisons of weights.
        tensors: For each ingredient its tensors under the names of the output.
        transferred_bytes: What the check read from the Hub.
    """

    verdict: str
    ancestor: Ancestor | None
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    names: tuple[str, ...]
    reasons: tuple[Reason, ...]
    alignments: tuple[str, ...]
    evidence: tuple[Kinship, ...]
    tensors: tuple[Mapping[str, TensorInfo], ...] = field(repr=False)
    transferred_bytes: int = 0

    @property
    def donor(self) -> Checkpoint:
        """The first ingredient: its config and the names of its tensors are the soup's."""
        return self.checkpoints[0]

    def only(self, names: Collection[str]) -> Lineage:
        """Some of the ingredients, the first of them as the donor: what a selection leaves.

        So the soup has the names and the config that cooking it again from those alone gives.
        """
        kept = [index for index, name in enumerate(self.names) if name in names]
        if len(kept) == len(self.names):
            return self
        checkpoints = tuple(self.checkpoints[index] for index in kept)
        called = tuple(self.names[index] for index in kept)
        tensors, _, _ = align(checkpoints, called)
        return replace(self, checkpoints=checkpoints, names=called, tensors=tensors)

    def pin(self) -> None:
        """Know every revision from now on; folders are read whose sha256 is not known."""
        founder = self.ancestor.checkpoint if self.ancestor else None
        for checkpoint in (*self.checkpoints, *([founder] if founder else [])):
            _ = checkpoint.revision

    def raise_if_refused(self) -> None:
        """Stop before anything is averaged.

        Raises:
            IncompatibleError: The verdict is ``refused``; every reason is listed.
        """
        if self.verdict == REFUSED:
            refusals = [reason.message for reason in self.reasons if reason.refuses]
            shown = "\n".join(f"- {message}" for message in refusals) if len(refusals) > 1 else refusals[0]
            raise IncompatibleError(
                f"These models cannot be averaged:\n{shown}", hint="`hf-soup check` shows the whole report."
            )

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
                    "name": name,
                    "model": checkpoint.model,
                    "revision": checkpoint.known_revision,
                    "parameters": checkpoint.parameters,
                    "dtype": checkpoint.dtypes[0] if checkpoint.dtypes else None,
                    "license": ", ".join(str(each) for each in _listed(checkpoint.card.get("license"))) or None,
                    "notes": list(checkpoint.notes),
                }
                for name, checkpoint in zip(self.names, self.checkpoints, strict=True)
            ],
            "reasons": [reason.to_dict() for reason in self.reasons],
            "alignments": list(self.alignments),
            "evidence": [each.to_dict() for each in self.evidence],
            "transferred_bytes": self.transferred_bytes,
        }

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {_VERDICTS[self.verdict]}", ""]
        if self.ancestor:
            revision = f"@{self.ancestor.revision.removeprefix('sha256:')[:7]}" if self.ancestor.revision else ""
            lines.append(f"  ancestor  {self.ancestor.model}{revision} (from the {self.ancestor.source})")
        else:
            lines.append("  ancestor  unknown: no card or config names one, and no base was given")
        for name, checkpoint in zip(self.names, self.checkpoints, strict=True):
            dtype = checkpoint.dtypes[0] if checkpoint.dtypes else "?"
            lines.append(
                f"  model     {name}{f'@{checkpoint.short}' if checkpoint.short else ''}"
                f"  {checkpoint.parameters:,} parameters, {dtype}"
            )
            lines += [f"            ({note})" for note in checkpoint.notes]
        for title, part in (("weights", "body"), ("heads", "head")):
            found = [each for each in self.evidence if each.part == part]
            if found:
                low, high = min(each.cosine for each in found), max(each.cosine for each in found)
                rows = [each.rows for each in found if each.rows is not None]
                match = f"; rows that find themselves {min(rows):.0%} to {max(rows):.0%}" if rows else ""
                lines.append(f"  {title:8}  cosine {low:.3f} to {high:.3f} in {len(found)} comparisons{match}")
        for heading, reasons in (
            ("Why not:", [reason for reason in self.reasons if reason.refuses]),
            ("To know:", [reason for reason in self.reasons if not reason.refuses]),
        ):
            if reasons:
                lines += ["", heading, *(f"- [{reason.code}] {reason.message}" for reason in reasons)]
        if self.alignments:
            lines += ["", "Aligned:", *(f"- {each}" for each in self.alignments)]
        lines += ["", f"Read from the Hub: {self.transferred_bytes / 1e6:.1f} MB, no whole weight file."]
        return "\n".join(lines)


def _listed(value: object) -> list[object]:
    """A card's field that may hold one value, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


_VERDICTS = {
    PROVEN: "these models share an architecture and a pretrained ancestor; they can be averaged.",
    LIKELY: "these models look like siblings, but not everything confirms it; they can be averaged.",
    REFUSED: "these models cannot be averaged.",
}


def examine(
    checkpoints: Sequence[Checkpoint],
    *,
    base: str | None = None,
    alone: bool = False,
    allow_pickle: bool = False,
    token: Token = None,
) -> Lineage:
    """Decide whether models may be averaged, from configs, cards, headers and samples of rows.

    Args:
        checkpoints: Opened ingredients.
        base: The ancestor, where the user names one.
        alone: A single model may be a soup, as where a selection kept only one.
        allow_pickle: Read the base's ``pytorch_model.bin`` too.
        token: As everywhere in huggingface_hub.
    """
    names = tuple(distinct_names(checkpoints))
    reasons: list[Reason] = []
    if len(checkpoints) < 2:
        message = "A soup needs two models or more; only one was named."
        reasons.append(Reason("single", message, names, refuses=not alone))
    reasons += duplicates(checkpoints, names)
    reasons += quantised(checkpoints, names)
    reasons += modules(checkpoints, names)
    alignments: tuple[str, ...] = ()
    tensors: tuple[Mapping[str, TensorInfo], ...] = tuple(checkpoint.tensors for checkpoint in checkpoints)
    ancestor: Ancestor | None = None
    evidence: list[Kinship] = []
    compared = False
    try:
        reasons += architectures(checkpoints, names)
        if not any(reason.refuses for reason in reasons if reason.code != "single"):
            reasons += labels(checkpoints, names)
            tensors, alignments, found = align(checkpoints, names)
            reasons += found
            reasons += processing(checkpoints, names)
        ancestor, declared, found = find_ancestor(checkpoints, names, base, allow_pickle=allow_pickle, token=token)
        reasons += found
        if not any(reason.code in ("architecture", "quantised") for reason in reasons):
            correspond = not any(reason.code in ("labels", "shapes") for reason in reasons)
            evidence, compared, found = weigh(checkpoints, names, tensors, ancestor, heads_correspond=correspond)
            reasons += found
    except IncompatibleError as error:
        reasons.append(Reason("architecture", str(error), refuses=True))
        declared = False
    reasons.sort(key=lambda reason: not reason.refuses)
    verdict = PROVEN if declared and compared else LIKELY
    if any(reason.refuses for reason in reasons):
        verdict = REFUSED
    return Lineage(
        verdict=verdict,
        ancestor=ancestor,
        checkpoints=tuple(checkpoints),
        names=names,
        reasons=tuple(reasons),
        alignments=alignments,
        evidence=tuple(evidence),
        tensors=tensors,
    )


def distinct_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What to call each checkpoint: its model; where two share it, with the revision, and then with a number."""
    names = [checkpoint.model for checkpoint in checkpoints]
    twice = {name for name in names if names.count(name) > 1}
    names = [
        f"{each.model}@{each.revision.removeprefix('sha256:')[:7]}" if each.model in twice else each.model
        for each in checkpoints
    ]
    return [
        f"{name}#{names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
