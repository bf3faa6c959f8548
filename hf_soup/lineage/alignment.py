"""What has to be put where so that tensors of several checkpoints correspond: names, rows of labels and tokens, heads.

Everything here is exact: a tensor or a row goes where the library, the labels or the tokenizers say that it belongs,
or the models are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
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
    distinct_names,
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
from hf_soup.lineage.aligned_model import AlignedModel
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

    @property
    def donor_number(self) -> int:
        """Of the ingredient whose config the soup has, where its vocabulary decides nothing else."""
        return self.heads if isinstance(self.heads, int) else 0


@dataclass(frozen=True)
class AlignedModels:
    """The sources of a soup: their tensors under its names, and what else they have to agree on.

    Args:
        ingredients: Those that are averaged, in the order of the recipe.
        base: Of all of them, where a method works on what was learned since.
        donor_number: Of the ingredient whose config and names the soup has.
        patched: Tensors that some sources do not have, or have with other rows or in another order.
        labels: Names of the outputs, where anyone gives any.
        tokens: How many tokens each ingredient's tokenizer has, where they were compared.
        options: As they were asked for.
        untied: Whether the soup's embeddings are not tied, though its donor's may be.
        vocabulary: How many rows for tokens the output has, where they were aligned.
        notes: What is dropped, renamed, moved or shared so that tensors correspond, a sentence each.
        asset_sources: Who gives tokenizer and processor where no ingredient has one: the base, and those left out.
    """

    ingredients: tuple[AlignedModel, ...]
    base: AlignedModel | None = None
    donor_number: int = 0
    patched: frozenset[str] = field(default=frozenset(), repr=False)
    labels: tuple[str, ...] | None = None
    tokens: Tokens = field(default_factory=Tokens)
    options: AlignmentOptions = field(default_factory=AlignmentOptions)
    untied: bool = False
    vocabulary: int | None = None
    notes: tuple[str, ...] = ()
    asset_sources: tuple[Checkpoint, ...] = field(default=(), repr=False)

    @classmethod
    def as_stored(cls, checkpoints: Sequence[Checkpoint], options: AlignmentOptions) -> AlignedModels:
        """Ingredients before anything is aligned, by the names that they have everywhere."""
        named = zip(distinct_names(checkpoints), checkpoints, strict=True)
        models = tuple(AlignedModel(name, each, each.tensors) for name, each in named)
        return cls(models, donor_number=options.donor_number, options=options)

    @property
    def names(self) -> tuple[str, ...]:
        """What the ingredients are called."""
        return tuple(model.name for model in self.ingredients)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Of all sources: the ingredients and, behind them, the base."""
        return tuple(model.checkpoint for model in (*self.ingredients, *([self.base] if self.base else [])))

    @property
    def donor(self) -> AlignedModel:
        """The ingredient whose config and names of tensors are the soup's."""
        return self.ingredients[self.donor_number]

    @property
    def head_of(self) -> str | None:
        """Whose head the soup keeps, where only bodies are averaged."""
        heads = self.options.heads
        return self.ingredients[heads].name if isinstance(heads, int) else None

    def only(self, names: Collection[str]) -> AlignedModels:
        """Some of the ingredients: what a selection leaves, and the one whose head is kept; of fewer, without the base.

        So the soup has the names and the config that cooking it again from those alone gives; the outputs keep their
        order, as everything was scored in it.
        """
        kept = [n for n, name in enumerate(self.names) if name in names or name == self.head_of]
        if len(kept) == len(self.ingredients):
            return self
        heads = self.options.heads
        heads = kept.index(heads) if isinstance(heads, int) else heads
        options = replace(self.options, heads=heads, labels=self.labels)
        models, _ = align([self.ingredients[number] for number in kept], options, self.tokens.only(kept))
        left = tuple(model.checkpoint for number, model in enumerate(self.ingredients) if number not in kept)
        return replace(models, asset_sources=(*self.asset_sources, *left))

    def pin(self) -> None:
        """Know every revision from now on; folders are read whose sha256 is not known."""
        for checkpoint in (*self.checkpoints, *self.asset_sources):
            _ = checkpoint.revision


def align(
    models: Sequence[AlignedModel], options: AlignmentOptions, tokens: Tokens
) -> tuple[AlignedModels, list[Finding]]:
    """Each ingredient's tensors under the donor's names, and what stands against it.

    Args:
        models: The ingredients.
        options: From the recipe.
        tokens: What their tokenizers have in common.
    """
    work = _Alignment(models, options, tokens)
    work.name_tensors()
    work.move_labels()
    work.move_tokens()
    work.compare_shapes()
    work.note_types()
    return (
        AlignedModels(
            tuple(work.models),
            donor_number=work.donor_number,
            patched=frozenset(work.patched),
            labels=work.labels,
            tokens=tokens,
            options=options,
            untied=work.untied,
            vocabulary=work.vocabulary,
            notes=tuple(work.notes),
        ),
        [*work.reasons, *types(models)],
    )


class _Alignment:
    """An alignment in the making."""

    def __init__(self, models: Sequence[AlignedModel], options: AlignmentOptions, tokens: Tokens) -> None:
        self.models = [replace(model, tensors=model.checkpoint.tensors) for model in models]
        self.donor_number, self.options, self.tokens = options.donor_number, options, tokens
        self.patched: set[str] = set()
        self.notes: list[str] = []
        self.reasons: list[Finding] = []
        self.labels: tuple[str, ...] | None = None
        self.untied = False
        self.vocabulary: int | None = None
        self.missing: set[str] = set()  # what nobody has
        self.spoken_of: set[str] = set()  # whose shapes are dealt with where tokens are

    @property
    def donor(self) -> AlignedModel:
        """Whose config and names the soup has."""
        return self.models[self.donor_number]

    def put(self, number: int, tensors: Mapping[str, TensorInfo]) -> None:
        """A model's tensors under the names of the output."""
        self.models[number] = replace(self.models[number], tensors=tensors)

    # ---- names ------------------------------------------------------------------------------------------------

    def name_tensors(self) -> None:
        """Tensors correspond by name where all have the same, else by what the library loads them into."""
        if self.options.heads is not None:
            self._name_bodies()
            return
        ties = self._ties()
        if len(set(ties)) > 1:
            # A tied model is an untied one with two equal tensors.
            self.untied = True
            self.notes.append(
                f"The embeddings are not tied to what predicts tokens, as in {self.models[ties.index(False)].name}."
            )
        donor, whose = self.donor, self.donor.name
        if all(model.tensors is donor.tensors or model.tensors.keys() == donor.tensors.keys() for model in self.models):
            return
        config, own = donor.checkpoint.config, ties[self.donor_number]
        by_key, tied = self._by_key([config if tie == own else {**config, _TIE: tie} for tie in ties])
        # The donor's names; a tied tensor that only others store a second time is kept under their name.
        outputs = {key: info.name for key, info in by_key[self.donor_number].items()}
        partners = {**tied, **{target: source for source, target in tied.items()}}
        for source in by_key:
            outputs |= {
                key: info.name for key, info in source.items() if key not in outputs and partners.get(key) in outputs
            }
        for number, source in enumerate(by_key):
            name, mine = self.models[number].name, {}
            for key, output in outputs.items():
                info = source.get(key) or source.get(partners.get(key, ""))
                if info is not None:
                    mine[output] = info
                    if key not in source:
                        self.notes.append(f"{name}: '{output}' is tied, and stored once as '{info.name}'.")
            self.put(number, mine)
            extra = [info.name for key, info in source.items() if key not in outputs]
            lacking = [output for output in outputs.values() if output not in mine]
            if lacking:
                message = f"{name} lacks {len(lacking)} tensors of {whose}: {some(lacking)}."
                self.refuse("tensors-missing", message, whose, name)
            if extra:
                message = f"{name} has {len(extra)} tensors that {whose} lacks: {some(extra)}."
                self.refuse("tensors-extra", message, whose, name)

    def _ties(self) -> list[bool]:
        """Whether each ties its embeddings to what predicts tokens; all the same where their configs say the same."""
        configs = [model.checkpoint.config for model in self.models]
        if all(config.get(_TIE) == configs[0].get(_TIE) for config in configs):
            return [True] * len(configs)
        return [
            remembered("ties", config, partial(ties_embeddings, config, model.name))
            for config, model in zip(configs, self.models, strict=True)
        ]

    def _by_key(
        self, configs: Sequence[Mapping[str, object]], *, ignored_is_news: bool = True
    ) -> tuple[list[dict[str, TensorInfo]], Mapping[str, str]]:
        """Each ingredient's tensors by what they load into, and which of those are tied to which."""
        read: dict[tuple[object, frozenset[str]], Correspondence] = {}
        by_key: list[dict[str, TensorInfo]] = []
        tied: Mapping[str, str] = {}
        stored = self.donor.checkpoint.tensors
        for model, config in zip(self.models, configs, strict=True):
            name, checkpoint = model.name, model.checkpoint
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
            other = [disk for disk, key in found.parameters.items() if disk not in stored]
            if other:
                self.notes.append(f"{name}: {len(other)} tensors have other names on disk ({some(other)}).")
        return by_key, tied

    def _name_bodies(self) -> None:
        """Bodies by what they load into in the donor's body; the head of one ingredient, or of none."""
        heads = self.options.heads
        donor, whose = self.donor.checkpoint, self.donor.name
        body = body_config(donor.config, whose)
        kind = body["architectures"][0]
        by_key, tied = self._by_key([body] * len(self.models), ignored_is_news=False)
        outputs = {key: info.name for key, info in by_key[self.donor_number].items()}
        if heads == "body":
            for source in by_key:
                outputs |= {key: info.name for key, info in source.items() if key not in outputs}
        for number, source in enumerate(by_key):
            name, mine = self.models[number].name, {out: source[key] for key, out in outputs.items() if key in source}
            self.put(number, mine)
            if not mine:
                self.refuse(
                    "body",
                    f"transformers loads no tensor of {name} into {whose}'s body, a {kind}. Leave it out, or name "
                    "another model first.",
                    name,
                )
                continue
            lacking = [output for output in outputs.values() if output not in mine]
            if lacking:
                self.patched |= set(lacking)
                self.notes.append(f"{name}: {some(lacking)} {_are(lacking)} averaged over those who have it.")
            left = [info.name for key, info in source.items() if key not in outputs]
            if left:
                self.notes.append(f"{name}: {some(left)} {_are(left)} left out, as {whose} has none.")
        if heads == "body":
            self.notes.append(f"The heads are left out; the soup is a {kind}.")
            if 4 * len(self.missing) > len(outputs) + len(self.missing):
                self.refuse(
                    "body",
                    f"Nobody has {len(self.missing)} of the tensors of a {kind}: {some(sorted(self.missing))}. Keep a "
                    "head: `heads: MODEL`.",
                    *(model.name for model in self.models),
                )
            elif self.missing:
                self.notes.append(
                    f"{some(sorted(self.missing))}: nobody has it, so transformers initialises it anew at load."
                )
            return
        used = {info.name for info in self.donor.tensors.values()}
        shapes = {tensor: info.shape for tensor, info in donor.tensors.items()}
        whole = correspondence(donor.config, shapes, whose)
        head = {
            disk: donor.tensors[disk]
            for disk, key in whole.parameters.items()
            if disk not in used and key not in whole.tied
        }
        self.put(self.donor_number, {**self.donor.tensors, **head})
        self.patched |= set(head)
        if head:
            self.notes.append(f"The head ({some(list(head))}) is {whose}'s alone.")
        else:
            why = ": it predicts tokens with its embeddings, which are averaged" if len(whole.tied) > len(tied) else ""
            self.notes.append(f"{whose} has no head of its own{why}.")

    # ---- rows -------------------------------------------------------------------------------------------------

    def move_labels(self) -> None:
        """Rows of heads whose labels stand in another order."""
        heads, wanted = self.options.heads, self.options.labels
        if heads == "body":
            return
        donor, whose = self.donor.checkpoint, self.donor.name
        named = [label_names(model.checkpoint.config, model.name) for model in self.models]
        if heads is not None:
            own = named[self.donor_number]
            named = [own if model is self.donor else None for model in self.models]  # the others' are left out
            fits = wanted == own or not (wanted and own) or label_order(wanted, own)
            if wanted and (not fits or len(wanted) != (num_labels(donor.config) or 2)):
                self.refuse(
                    "labels",
                    f"The recipe's `labels` ({some(wanted)}) are not those of {whose}, whose head is kept "
                    f"({some(own) if own else 'without names'}).",
                    whose,
                )
                return
        elif len(set(named)) > 1 and not names_outputs(donor, whose):
            return  # left over from another head; the donor's stay in its config
        self.labels = wanted or next((labels for labels in named if labels is not None), None)
        if self.labels is None:
            return
        for number, labels in enumerate(named):
            name, mine = self.models[number].name, self.models[number].tensors
            order = None if labels is None else label_order(self.labels, labels)
            if order is None or order == list(range(len(order))):
                continue
            rows = _runs_of_rows(order)
            moved = [tensor for tensor in label_rows(donor, whose) if tensor in mine]
            # A row may stand for no label, such as a detector's "no object": whose it is only its code knows.
            other = next((tensor for tensor in moved if mine[tensor].shape[0] != len(order)), None)
            if not moved or other:
                said = f"'{other}' has {mine[other].shape[0]}" if other else "no tensor has as many"
                self.refuse(
                    "labels-rows",
                    f"{name}: the labels stand in another order than wanted, but there are {len(order)} of them and "
                    f"{said} rows, so rows cannot be moved. Leave it out.",
                    name,
                )
                continue
            self.move(number, dict.fromkeys(moved, rows), len(order))
            shown = ", ".join(f"{label} {order[place]}→{place}" for place, label in enumerate(self.labels[:6]))
            more = f" and {len(order) - 6} more" if len(order) > 6 else ""
            self.notes.append(f"{name}: the labels stand in another order; rows of {some(moved)} move ({shown}{more}).")

    def move_tokens(self) -> None:
        """Rows of embeddings and of what predicts tokens, where tokens were added or rows are padding."""
        name, donors = self.donor.name, self.donor.tensors
        names = [model.name for model in self.models]
        # One number may be of two tokens, whatever is allowed: then none can be kept by its number.
        clash = bool(self.options.vocabulary and self.tokens.difference and not self.tokens.compared)
        if not (self.tokens.differ or clash) and not any(
            model.tensors[tensor].shape != info.shape
            for tensor, info in donors.items()
            for model in self.models
            if model.tensors is not donors and tensor in model.tensors
        ):
            return
        table = self.donor.token_tables
        held = [
            {model.tensors[tensor].shape[0] for tensor in table if tensor in model.tensors} for model in self.models
        ]
        if not table or any(len(rows) > 1 for rows in held) or {len(rows) for rows in held} != {1}:
            return  # what is not the vocabulary's is found by its shape
        rows = [lengths.pop() for lengths in held]
        if len(set(rows)) == 1 and not (self.tokens.differ or clash):
            return
        self.spoken_of = set(table)
        listed = "\n".join(f"    {n}  {self.tokens.shown(i)}{rows[i]:,} rows" for i, n in enumerate(names))
        if not self.tokens.compared:
            self.refuse(
                "vocabulary",
                f"The models do not have the same {'' if clash else 'number of rows for '}tokens:\n{listed}\n  Their "
                f"tokenizers would say which rows are whose, {self.tokens.difference or 'but not all bring one'}.",
                *names,
            )
            return
        if lacking := self.tokens.lacking(names, rows):
            self.refuse("vocabulary", lacking, *names)
            return
        if self.options.vocabulary is None and self.tokens.differ:
            self.refuse(
                "vocabulary",
                f"The models do not have the same tokens:\n{listed}\n  {self.tokens.difference} Set `vocabulary: "
                "union` in the recipe to keep every token (rows that some lack are averaged over those who have them), "
                "or `vocabulary: base` to keep those that all have.",
                *names,
            )
            return
        # The same tokens: rows that only some have are padding, and those that all have are kept.
        speaker = self.tokens.speaker(self.options.vocabulary or "base", rows)
        if self.options.vocabulary is None and isinstance(self.options.heads, int):
            speaker = self.donor_number
        if self.options.heads is None or self.options.heads == "body":
            self.donor_number = speaker
        elif speaker != self.donor_number:
            self.refuse(
                "vocabulary",
                f"`heads` keeps the head and config of {name}, and `vocabulary` those of {names[speaker]}. Name one "
                "model for both.",
                name,
                names[speaker],
            )
            return
        length = self.vocabulary = rows[speaker]
        for number, who in enumerate(names):
            # Rows behind a shorter tokenizer are padding; where they are tokens for others they do not count.
            known = self.tokens.known(number, speaker, rows[number])
            count = min(known, length)
            if count != length or rows[number] != length:
                mine = self.models[number].tensors
                self.move(number, {tensor: [RowRange(0, 0, count)] for tensor in table if tensor in mine}, length)
                if count < length:
                    said = f"has the first {count:,} of {length:,} rows for tokens"
                else:
                    said = f"gives the first {length:,} of its {rows[number]:,} rows for tokens"
                self.notes.append(f"{who}: {said} ({some(table)}).")
        why = f"`vocabulary: {self.options.vocabulary}`" if self.options.vocabulary else "further rows are padding"
        ids = token_ids([model.checkpoint.config for model in self.models], speaker)
        self.notes.append(f"Tokenizer and config are {names[speaker]}'s ({why}){ids}.")

    def move(self, number: int, rows: Mapping[str, Sequence[RowRange]], length: int) -> None:
        """Rows of a model's tensors to other places of the output's."""
        self.patched |= set(rows)
        mine = self.models[number].tensors
        self.put(number, {**mine, **{tensor: mine[tensor].moved(those, length) for tensor, those in rows.items()}})

    # ---- shapes and types -------------------------------------------------------------------------------------

    def compare_shapes(self) -> None:
        """Refuse what has other shapes."""
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for tensor, info in (pair for model in self.models for pair in model.tensors.items()):
            shapes.setdefault(tensor, set()).add(info.shape)
        differing = [tensor for tensor, known in shapes.items() if len(known) > 1 and tensor not in self.spoken_of]
        if not differing:
            return
        tensor = differing[0]
        having = [(model.name, model.tensors[tensor].shape) for model in self.models if tensor in model.tensors]
        rows = "\n".join(f"    {name}  {shape}" for name, shape in having)
        more = f"\n  The same is true of {len(differing) - 1} more." if len(differing) > 1 else ""
        if head_tensors(self.donor.checkpoint, self.donor.name).issuperset(differing):
            more += f"\n  {HEADS_HINT}"
        lies = complete(self.models, self.donor, everyone=True)
        more += "".join(f"\n  {reason.message}" for reason in lies)
        who = [name for name, shape in having if shape != having[0][1]]
        self.refuse("shapes", f"The models disagree on the shape of '{tensor}':\n{rows}{more}", *who)

    def note_types(self) -> None:
        """Say what is not averaged; the counts of batch normalisation are its statistics' part."""
        counted = [n for n, at in self.donor.tensors.items() if at.dtype not in FLOATS and not n.endswith(COUNT)]
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
    for _, rows in groupby(enumerate(order), key=lambda row: row[1] - row[0]):
        (target, source), *others = rows
        runs.append(RowRange(source, target, 1 + len(others)))
    return runs


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
