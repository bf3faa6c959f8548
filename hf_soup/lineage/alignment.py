"""What has to be put where so that tensors of several checkpoints correspond: names, rows of labels and tokens, heads.

Everything here is exact: a tensor or a row goes where the library, the labels or the tokenizers say that it belongs,
or the models are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from hf_soup._util.text import some
from hf_soup.checkpoint import (
    COUNT,
    FLOATS,
    Checkpoint,
    Correspondence,
    RowRange,
    TensorInfo,
    Tokens,
    body_config,
    correspondence,
    counted_names,
    head_tensors,
    label_names,
    label_order,
    label_rows,
    names_outputs,
    num_labels,
    remembered,
    ties_embeddings,
    token_ids,
)
from hf_soup.lineage.compatibility import HEADS_HINT, complete, types
from hf_soup.recipe import Finding, Recipe

_TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class AlignmentOptions:
    """What a recipe says about tensors that do not simply correspond.

    Args:
        heads: Average bodies alone: ``body`` gives a model without a head, a number the head of that ingredient.
        vocabulary: Where tokens were added: ``base`` keeps those that all have, ``union`` all.
        labels: The order of the outputs; by default that of the first ingredient that names them.
    """

    heads: int | Literal["body"] | None = None
    vocabulary: Literal["base", "union"] | None = None
    labels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> AlignmentOptions:
        """Those of a recipe."""
        return cls(recipe.head, recipe.vocabulary, recipe.labels)


@dataclass(frozen=True)
class Alignment:
    """How the tensors of ingredients correspond.

    Args:
        tensors: For each ingredient its tensors under the names of the output.
        donor: Number of the ingredient whose config and names the soup has.
        patched: Tensors that some ingredients do not have, or have with other rows or in another order.
        labels: Names of the outputs, where anyone gives any.
        tokens: How many tokens each ingredient's tokenizer has, where they were compared.
        wishes: As they were asked for.
        untied: Whether the soup's embeddings are not tied, though its donor's may be.
        vocabulary: How many rows for tokens the output has, where they were aligned.
        notes: A sentence for each thing that was done.
    """

    tensors: tuple[Mapping[str, TensorInfo], ...] = field(repr=False)
    donor: int = 0
    patched: frozenset[str] = frozenset()
    labels: tuple[str, ...] | None = None
    tokens: Tokens = field(default_factory=Tokens)
    wishes: AlignmentOptions = field(default_factory=AlignmentOptions)
    untied: bool = False
    vocabulary: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def body(self) -> bool:
        """Whether the soup is a model without a head."""
        return self.wishes.heads == "body"


def align(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], wishes: AlignmentOptions, tokens: Tokens
) -> tuple[Alignment, list[Finding]]:
    """Each ingredient's tensors under the donor's names, and what stands against it.

    Args:
        checkpoints: The ingredients.
        names: What they are called.
        wishes: From the recipe.
        tokens: What their tokenizers have in common.
    """
    work = _Alignment(checkpoints, names, wishes, tokens)
    work.name_tensors()
    work.move_labels()
    work.move_tokens()
    work.compare_shapes()
    work.note_types()
    found = Alignment(
        tuple(work.tensors),
        work.donor,
        frozenset(work.patched),
        work.labels,
        tokens,
        wishes,
        work.untied,
        work.vocabulary,
        tuple(work.notes),
    )
    return found, [*work.reasons, *types(checkpoints, names)]


class _Alignment:
    """An alignment in the making."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], names: Sequence[str], wishes: AlignmentOptions, tokens: Tokens
    ) -> None:
        self.checkpoints, self.names, self.wishes, self.tokens = checkpoints, names, wishes, tokens
        self.tensors: list[Mapping[str, TensorInfo]] = [checkpoint.tensors for checkpoint in checkpoints]
        self.patched: set[str] = set()
        self.notes: list[str] = []
        self.reasons: list[Finding] = []
        self.donor = wishes.heads if isinstance(wishes.heads, int) else 0
        self.labels: tuple[str, ...] | None = None
        self.untied = False
        self.vocabulary: int | None = None
        self.missing: set[str] = set()  # what nobody has
        self.spoken_of: set[str] = set()  # whose shapes are dealt with where tokens are

    # ---- names ------------------------------------------------------------------------------------------------

    def name_tensors(self) -> None:
        """Tensors correspond by name where all have the same, else by what the library loads them into."""
        if self.wishes.heads is not None:
            self._name_bodies()
            return
        ties = self._ties()
        if len(set(ties)) > 1:
            # A tied model is an untied one with two equal tensors.
            self.untied = True
            self.notes.append(
                f"The embeddings are not tied to what predicts tokens, as in {self.names[ties.index(False)]}."
            )
        first = self.tensors[self.donor]
        if all(each is first or each.keys() == first.keys() for each in self.tensors):
            return
        config = self.checkpoints[self.donor].config
        by_key, tied = self._by_key([config if tie == ties[self.donor] else {**config, _TIE: tie} for tie in ties])
        # The donor's names; a tied tensor that only others store a second time is kept under their name.
        outputs = {key: info.name for key, info in by_key[self.donor].items()}
        partners = {**tied, **{target: source for source, target in tied.items()}}
        for source in by_key:
            outputs |= {
                key: info.name for key, info in source.items() if key not in outputs and partners.get(key) in outputs
            }
        for number, (source, name) in enumerate(zip(by_key, self.names, strict=True)):
            mine = {}
            for key, output in outputs.items():
                info = source.get(key) or source.get(partners.get(key, ""))
                if info is not None:
                    mine[output] = info
                    if key not in source:
                        self.notes.append(f"{name}: '{output}' is tied, and stored once as '{info.name}'.")
            self.tensors[number] = mine
            extra = [info.name for key, info in source.items() if key not in outputs]
            lacking = [output for output in outputs.values() if output not in mine]
            whose = self.names[self.donor]
            if lacking:
                message = f"{name} lacks {len(lacking)} tensors of {whose}: {some(lacking)}."
                self.refuse("tensors-missing", message, whose, name)
            if extra:
                message = f"{name} has {len(extra)} tensors that {whose} lacks: {some(extra)}."
                self.refuse("tensors-extra", message, whose, name)

    def _ties(self) -> list[bool]:
        """Whether each ties its embeddings to what predicts tokens; all the same where their configs say the same."""
        configs = [checkpoint.config for checkpoint in self.checkpoints]
        if all(config.get(_TIE) == configs[0].get(_TIE) for config in configs):
            return [True] * len(configs)
        pairs = zip(configs, self.names, strict=True)
        ties = "ties"
        return [remembered(ties, config, partial(ties_embeddings, config, name)) for config, name in pairs]

    def _by_key(
        self, configs: Sequence[Mapping[str, object]], *, ignored_is_news: bool = True
    ) -> tuple[list[dict[str, TensorInfo]], Mapping[str, str]]:
        """Each ingredient's tensors by what they load into, and which of those are tied to which."""
        read: dict[tuple[object, frozenset[str]], Correspondence] = {}
        by_key: list[dict[str, TensorInfo]] = []
        tied: Mapping[str, str] = {}
        donor = self.checkpoints[self.donor]
        for checkpoint, name, config in zip(self.checkpoints, self.names, configs, strict=True):
            kind = (config.get(_TIE), frozenset(checkpoint.tensors))
            if kind not in read:
                shapes = {tensor: info.shape for tensor, info in checkpoint.tensors.items()}
                read[kind] = correspondence(config, shapes, name)
            found = read[kind]
            tied = {**tied, **found.tied}
            self.missing = self.missing.intersection(found.missing) if by_key else set(found.missing)
            by_key.append({key: checkpoint.tensors[disk] for disk, key in found.parameters.items()})
            if found.ignored and ignored_is_news:
                self.notes.append(f"{name}: transformers ignores {some(found.ignored)} at load, so they are left out.")
            other = [disk for disk, key in found.parameters.items() if disk not in donor.tensors]
            if other:
                self.notes.append(f"{name}: {len(other)} tensors have other names on disk ({some(other)}).")
        return by_key, tied

    def _name_bodies(self) -> None:
        """Bodies by what they load into in the donor's body; the head of one ingredient, or of none."""
        heads = self.wishes.heads
        donor = self.checkpoints[self.donor]
        body = body_config(donor.config, self.names[self.donor])
        kind = body["architectures"][0]
        by_key, tied = self._by_key([body] * len(self.names), ignored_is_news=False)
        outputs = {key: info.name for key, info in by_key[self.donor].items()}
        if heads == "body":
            for source in by_key:
                outputs |= {key: info.name for key, info in source.items() if key not in outputs}
        for number, (source, name) in enumerate(zip(by_key, self.names, strict=True)):
            self.tensors[number] = {output: source[key] for key, output in outputs.items() if key in source}
            if not self.tensors[number]:
                message = f"transformers loads no tensor of {name} into {self.names[self.donor]}'s body, a {kind}."
                self.refuse("body", f"{message} Leave it out, or name another model first.", name)
                continue
            lacking = [output for output in outputs.values() if output not in self.tensors[number]]
            if lacking:
                self.patched |= set(lacking)
                self.notes.append(f"{name}: {some(lacking)} {_are(lacking)} averaged over those who have it.")
            left = [info.name for key, info in source.items() if key not in outputs]
            if left:
                self.notes.append(f"{name}: {some(left)} {_are(left)} left out, as {self.names[self.donor]} has none.")
        if heads == "body":
            self.notes.append(f"The heads are left out; the soup is a {kind}.")
            if 4 * len(self.missing) > len(outputs) + len(self.missing):
                said = f"Nobody has {len(self.missing)} of the tensors of a {kind}"
                said += f": {some(sorted(self.missing))}. Keep a head: `heads: MODEL`."
                self.refuse("body", said, *self.names)
            elif self.missing:
                said = f"{some(sorted(self.missing))}: nobody has it, so transformers initialises it anew at load."
                self.notes.append(said)
            return
        used = {info.name for info in self.tensors[self.donor].values()}
        shapes = {tensor: info.shape for tensor, info in donor.tensors.items()}
        whole = correspondence(donor.config, shapes, self.names[self.donor])
        head = {
            disk: donor.tensors[disk]
            for disk, key in whole.parameters.items()
            if disk not in used and key not in whole.tied
        }
        self.tensors[self.donor] = {**self.tensors[self.donor], **head}
        self.patched |= set(head)
        whose = self.names[self.donor]
        if head:
            self.notes.append(f"The head ({some(list(head))}) is {whose}'s alone.")
        elif len(whole.tied) > len(tied):
            self.notes.append(f"{whose} predicts tokens with its embeddings, which are averaged: no head is its alone.")
        else:
            self.notes.append(f"{whose} has no head of its own.")

    # ---- rows -------------------------------------------------------------------------------------------------

    def move_labels(self) -> None:
        """Rows of heads whose labels stand in another order."""
        heads, wanted = self.wishes.heads, self.wishes.labels
        if heads == "body":
            return
        donor, whose = self.checkpoints[self.donor], self.names[self.donor]
        named = [label_names(c.config, n) for c, n in zip(self.checkpoints, self.names, strict=True)]
        if heads is not None:
            own = named[self.donor]
            named = [own if number == self.donor else None for number in range(len(named))]  # the others' are left out
            fits = wanted == own or not (wanted and own) or label_order(wanted, own)
            if wanted and (not fits or len(wanted) != (num_labels(donor.config) or 2)):
                message = f"The recipe's `labels` ({some(wanted)}) are not those of {whose}, whose head is kept"
                self.refuse("labels", f"{message} ({some(own) if own else 'without names'}).", whose)
                return
        elif len(set(named)) > 1 and not names_outputs(donor, whose):
            return  # left over from another head; the donor's stay in its config
        self.labels = wanted or next((labels for labels in named if labels is not None), None)
        if self.labels is None:
            return
        for number, (labels, name) in enumerate(zip(named, self.names, strict=True)):
            order = None if labels is None else label_order(self.labels, labels)
            if order is None or order == list(range(len(order))):
                continue
            rows, mine = _runs_of_rows(order), self.tensors[number]
            moved = [tensor for tensor in label_rows(donor, whose) if tensor in mine]
            # A row may stand for no label, such as a detector's "no object": whose it is only its code knows.
            other = next((tensor for tensor in moved if mine[tensor].shape[0] != len(order)), None)
            if not moved or other:
                said = f"'{other}' has {mine[other].shape[0]}" if other else "no tensor has as many"
                message = f"{name}: the labels stand in another order than wanted, but there are {len(order)} of them "
                self.refuse("labels-rows", f"{message}and {said} rows, so rows cannot be moved. Leave it out.", name)
                continue
            self.tensors[number] = self._moved(number, dict.fromkeys(moved, rows), len(order))
            shown = ", ".join(f"{label} {order[place]}→{place}" for place, label in enumerate(self.labels[:6]))
            more = f" and {len(order) - 6} more" if len(order) > 6 else ""
            self.notes.append(f"{name}: the labels stand in another order; rows of {some(moved)} move ({shown}{more}).")

    def move_tokens(self) -> None:
        """Rows of embeddings and of what predicts tokens, where tokens were added or rows are padding."""
        config, name = self.checkpoints[self.donor].config, self.names[self.donor]
        donors = self.tensors[self.donor]
        stored = list(dict.fromkeys(info.name for info in donors.values()))
        if not self.tokens.differ and not any(
            mine[tensor].shape != info.shape
            for tensor, info in donors.items()
            for mine in self.tensors
            if mine is not donors and tensor in mine
        ):
            return
        ask = partial(counted_names, config, stored, "vocabulary", name)
        counted = set(remembered("vocabulary", [config, stored], ask))
        table = [output for output, info in donors.items() if info.name in counted]
        held = [{mine[tensor].shape[0] for tensor in table if tensor in mine} for mine in self.tensors]
        if not table or any(len(rows) > 1 for rows in held) or {len(rows) for rows in held} != {1}:
            return  # what is not the vocabulary's is found by its shape
        rows = [lengths.pop() for lengths in held]
        if len(set(rows)) == 1 and not self.tokens.differ:
            return
        self.spoken_of = set(table)
        listed = "\n".join(f"    {n}  {self.tokens.shown(i)}{rows[i]:,} rows" for i, n in enumerate(self.names))
        if not self.tokens.compared:
            self.refuse(
                "vocabulary",
                f"The models do not have the same number of rows for tokens:\n{listed}\n  Their tokenizers would say "
                f"which rows are whose, {self.tokens.difference or 'but not all bring one'}.",
                *self.names,
            )
            return
        if lacking := self.tokens.lacking(self.names, rows):
            self.refuse("vocabulary", lacking, *self.names)
            return
        if self.wishes.vocabulary is None and self.tokens.differ:
            self.refuse(
                "vocabulary",
                f"The models do not have the same tokens:\n{listed}\n  {self.tokens.difference} Set `vocabulary: "
                "union` in the recipe to keep every token (rows that some lack are averaged over those who have them), "
                "or `vocabulary: base` to keep those that all have.",
                *self.names,
            )
            return
        # The same tokens: rows that only some have are padding, and those that all have are kept.
        speaker = self.tokens.speaker(self.wishes.vocabulary or "base", rows)
        if self.wishes.vocabulary is None and isinstance(self.wishes.heads, int):
            speaker = self.donor
        if self.wishes.heads is None or self.wishes.heads == "body":
            self.donor = speaker
        elif speaker != self.donor:
            message = f"`heads` keeps the head and config of {name}, and `vocabulary` those of {self.names[speaker]}."
            self.refuse("vocabulary", f"{message} Name one model for both.", name, self.names[speaker])
            return
        length = self.vocabulary = rows[speaker]
        for number, mine in enumerate(self.tensors):
            # Rows behind a shorter tokenizer are padding; where they are tokens for others they do not count.
            known = self.tokens.known(number, speaker, rows[number])
            count = min(known, length)
            if count != length or rows[number] != length:
                changes = {tensor: [RowRange(0, 0, count)] for tensor in table if tensor in mine}
                self.tensors[number] = self._moved(number, changes, length)
                who = self.names[number]
                if count < length:
                    said = f"has the first {count:,} of {length:,} rows for tokens"
                else:
                    said = f"gives the first {length:,} of its {rows[number]:,} rows for tokens"
                self.notes.append(f"{who}: {said} ({some(table)}).")
        why = f"`vocabulary: {self.wishes.vocabulary}`" if self.wishes.vocabulary else "further rows are padding"
        ids = token_ids([checkpoint.config for checkpoint in self.checkpoints], speaker)
        self.notes.append(f"Tokenizer and config are {self.names[speaker]}'s ({why}){ids}.")

    def _moved(self, number: int, rows: Mapping[str, Sequence[RowRange]], length: int) -> dict[str, TensorInfo]:
        self.patched |= set(rows)
        moved = {tensor: self.tensors[number][tensor].moved(those, length) for tensor, those in rows.items()}
        return {**self.tensors[number], **moved}

    # ---- shapes and types -------------------------------------------------------------------------------------

    def compare_shapes(self) -> None:
        """Refuse what has other shapes."""
        first = self.tensors[0]
        others = [source for source in self.tensors[1:] if source is not first]
        if not others:
            return
        reference = {tensor: info.shape for tensor, info in first.items() if tensor not in self.spoken_of}
        differing: dict[str, None] = {}
        for other in others:
            for tensor, info in other.items():
                if tensor not in self.spoken_of and reference.setdefault(tensor, info.shape) != info.shape:
                    differing[tensor] = None
        if not differing:
            return
        tensor = next((name for name in first if name in differing), next(iter(differing)))
        everyone = zip(self.names, self.tensors, strict=True)
        having = [(name, source[tensor].shape) for name, source in everyone if tensor in source]
        rows = "\n".join(f"    {name}  {shape}" for name, shape in having)
        more = f"\n  The same is true of {len(differing) - 1} more." if len(differing) > 1 else ""
        if head_tensors(self.checkpoints[self.donor], self.names[self.donor]).issuperset(differing):
            more += f"\n  {HEADS_HINT}"
        lies = complete(self.checkpoints, self.names, self.donor, everyone=True)
        more += "".join(f"\n  {reason.message}" for reason in lies)
        who = [name for name, shape in having if shape != having[0][1]]
        self.refuse("shapes", f"The models disagree on the shape of '{tensor}':\n{rows}{more}", *who)

    def note_types(self) -> None:
        """Say what is not averaged; the counts of batch normalisation are its statistics' part."""
        counted = [n for n, at in self.tensors[self.donor].items() if at.dtype not in FLOATS and not n.endswith(COUNT)]
        if counted:
            self.notes.append(f"{some(counted)} {_are(counted)} no weights: the first ingredient's are kept.")

    def refuse(self, code: str, message: str, *who: str) -> None:
        self.reasons.append(Finding(code, message, who, refuses=True))


def _runs_of_rows(order: Sequence[int]) -> list[RowRange]:
    """Rows that stay next to each other, in the order of the output.

    >>> _runs_of_rows([2, 0, 1])
    [RowRange(source=2, target=0, count=1), RowRange(source=0, target=1, count=2)]
    """
    runs: list[RowRange] = []
    for target, source in enumerate(order):
        last = runs[-1] if runs else None
        if last and source == last.source + last.count:
            runs[-1] = RowRange(last.source, last.target, last.count + 1)
        else:
            runs.append(RowRange(source, target, 1))
    return runs


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
