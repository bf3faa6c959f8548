"""What an adapter is made of: which tensors of its base it changes, in what form, and of what rank. All of it comes
from headers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from hf_soup._util.text import strings
from hf_soup.checkpoint import (
    ADAPTER_FOLDER,
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    DTYPES,
    FLOATS,
    ITEM_BYTES,
    PEFT_PREFIX,
    AdapterBase,
    Checkpoint,
    LowRankUpdate,
    TensorInfo,
    adapter_base,
    read_json,
)
from hf_soup.errors import IncompatibleError
from hf_soup.lineage import AlignedModel, AlignedModels
from hf_soup.merging.plan import Plan
from hf_soup.methods import METHODS

_FILE = ADAPTER_FOLDER + ADAPTER_WEIGHTS
#: What peft puts factors beside.
_FACTORED = ("Linear", "Conv1D", "Embedding", "Conv")
#: What to do where no adapter can be made.
_WHOLE = "Cook a whole model, without `output: adapter`."


@dataclass(frozen=True, slots=True)
class AdaptedTensor:
    """A tensor of the base that an adapter changes.

    Args:
        name: In the layout of whole models.
        module: Where it is in memory, as peft calls it.
        form: ``factors``, where those of adapters are put side by side; ``difference``, where what was learned is made
            and then factored; ``whole``, as a tensor that adapters have whole, or that has no two factors; or ``none``,
            where no adapter can hold what was learned.
        stored: Names in the adapter's file → shapes.
        turned: Whether the base stores it as (in, out).
        rank: Of the factors.
    """

    name: str
    module: str
    form: Literal["factors", "difference", "whole", "none"]
    stored: Mapping[str, tuple[int, ...]]
    turned: bool = False
    rank: int = 0


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter that is made of adapters, or of what full fine-tunes learned.

    Args:
        plan: Of the whole models that they stand for.
        models: Those, and their base.
        described: What the library says of what they are.
        rank: As it was asked for.
        dtype: torch's name of the type that is written.
        tensors: In the order of the layout.
        task_type: As peft calls what the model does.
        modules_to_save: Ends of names of modules of which adapters have copies.
    """

    plan: Plan
    models: AlignedModels
    described: AdapterBase = field(repr=False)
    rank: int | None
    dtype: str
    tensors: tuple[AdaptedTensor, ...] = field(repr=False)
    task_type: str | None = None
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, models: AlignedModels, rank: int | None, dtype: str | None) -> AdapterPlan:
        """Plan it.

        Args:
            plan: Of the whole models.
            models: Those, and their base.
            rank: At most; without it as many as lose nothing.
            dtype: torch's name of the type to write; by default that of the adapters' factors, or of the models.

        Raises:
            IncompatibleError: They have no adapter in common.
        """
        base, adapters = models.base, [model for model in models.ingredients if model.checkpoint.base]
        assert base is not None, "who asks for an adapter has a base"
        full = [model.name for model in models.ingredients if model not in adapters]
        for model in models.ingredients:
            if model.checkpoint.identity == base.checkpoint.identity:
                raise _unfit(f"{model.name} is the base itself, which has learned nothing.", "Leave it out.")
        if adapters and full:
            raise _unfit(
                f"`output: adapter` puts the factors of adapters side by side, and {', '.join(full)} has none.",
                f"{_WHOLE} The adapter of that is `hf-soup cook BASE SOUP --output adapter --rank N`.",
            )
        if rank is None and (full or not all(METHODS[call.method].combination for call in plan.mixture.methods)):
            why = "full fine-tunes have none" if full else f"{plan.mixture.method.method} has a result of any rank"
            raise _unfit(f"The adapter needs a rank: {why}.", "Set it: `rank: 16` in the recipe, or --rank 16.")
        settings = {model.name: _settings(model.checkpoint) for model in adapters}
        tasks = {name: own["task_type"] for name, own in settings.items() if isinstance(own.get("task_type"), str)}
        if len({*tasks.values()}) > 1:
            shown = "\n".join(f"  {name}  {task}" for name, task in tasks.items())
            raise _unfit(
                f"The adapters are for different classes of models, as their `task_type` says:\n{shown}",
                f"Leave those of other tasks out. Or: {_WHOLE}",
            )
        for model in adapters:
            own = model.checkpoint.base
            if own and own.identity != base.checkpoint.identity:
                raise _unfit(
                    f"{model.name} changes {own}, and the adapter would be of {base.checkpoint}.",
                    "Name one base beside each: `base: MODEL` in the recipe.",
                )
        described = adapter_base(models.donor.checkpoint)
        tensors = tuple(
            _of_adapters(plan, models, described, rank) if adapters else _of_differences(plan, models, described, rank)
        )
        if all(tensor.form == "none" for tensor in tensors):
            raise _unfit("Nothing of what was learned fits into an adapter.")
        stored = {info.dtype for model in models.ingredients for info in _parts(model)}
        widest = max(stored & {*FLOATS}, key=lambda each: (ITEM_BYTES[each], each == "BF16"))
        written = dtype or next(name for name, known in DTYPES.items() if known == widest)
        saved = dict.fromkeys(name for own in settings.values() for name in strings(own.get("modules_to_save")))
        return cls(plan, models, described, rank, written, tensors, next(iter(tasks.values()), None), tuple(saved))

    @cached_property
    def size(self) -> int:
        """Bytes of its file, without the header; at most, as what was not changed is left out."""
        shapes = (shape for tensor in self.tensors for shape in tensor.stored.values())
        return ITEM_BYTES[DTYPES[self.dtype]] * sum(map(math.prod, shapes))

    @cached_property
    def files(self) -> tuple[tuple[str, ...], ...]:
        """Of every source, the base behind the ingredients, the weight files that it reads."""
        models = (*self.models.ingredients, *([self.models.base] if self.models.base else []))
        return tuple(
            tuple(dict.fromkeys(
                file
                for tensor in self.tensors
                if (info := model.tensors.get(tensor.name))
                for file in self._files_of(tensor, info)
            ))
            for model in models
        )  # fmt: skip

    def _files_of(self, tensor: AdaptedTensor, info: TensorInfo) -> Iterator[str]:
        if info.update:
            yield info.update.file
        # Beside factors of a table an adapter may have a copy of that, which has to be the base's.
        every = (model.tensors.get(tensor.name) for model in self.models.ingredients)
        copied = any(own and own.file == _FILE for own in every)
        if tensor.form == "whole" or not self.is_of_adapters or copied:
            yield info.file

    @property
    def is_of_adapters(self) -> bool:
        """Whether it is made of such, and not of full fine-tunes."""
        return self.models.donor.checkpoint.base is not None

    def coefficients(self, tensor: AdaptedTensor) -> dict[int, float]:
        """What the products of each source are multiplied with, of factors."""
        run = self.plan.layout.run_of(self._numbers[tensor.name])
        call, weights = self.plan.method_of(run), self.plan.weights_of(run)
        each = METHODS[call.method].coefficients(list(weights.values()), call.parameters)
        return dict(zip(weights, each, strict=True))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {tensor.name: number for number, tensor in enumerate(self.plan.layout.tensors)}

    def outline(self) -> dict[str, Any]:
        """As plain data, as that of a plan."""
        files = [{"name": ADAPTER_WEIGHTS, "size": self.size}]
        return {**self.plan.outline(), "rank": self.rank, "dtype": self.dtype, "files": files}

    @property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides the bytes of the output."""
        every = [self.plan.layout.identity, self.outline()]
        return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def _unfit(message: str, hint: str = "") -> IncompatibleError:
    return IncompatibleError(message, hint=hint, code="adapter-output")


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    source = checkpoint.source
    return read_json(source.read, ADAPTER_FOLDER + ADAPTER_SETTINGS, source.files, str(checkpoint))


def _parts(model: AlignedModel) -> Iterator[TensorInfo]:
    """What decides the type: an adapter's own tensors, or a fine-tune's."""
    own = model.checkpoint.weights.stored_in(_FILE).values()
    yield from own or model.tensors.values()


def _of_adapters(
    plan: Plan, models: AlignedModels, described: AdapterBase, rank: int | None
) -> Iterator[AdaptedTensor]:
    """The tensors that adapters change, under the names of the class that the base has: an adapter of a model without
    its head has shorter ones.
    """
    parameters = {disk: parameter for parameter, disk in described.parameters.items()}
    stored = [
        {info.offset: info for info in model.checkpoint.weights.stored_in(_FILE).values()}
        for model in models.ingredients
    ]
    for place, tensor in enumerate(plan.layout.tensors):
        places = {
            n: model.tensors[tensor.name] for n, model in enumerate(models.ingredients) if tensor.name in model.tensors
        }
        whole = next((info for info in places.values() if info.file == _FILE and not info.update), None)
        own = {number: info.update for number, info in places.items() if info.update}
        below = models.base.tensors.get(tensor.name) if models.base else None
        if below and (below.rows or below.shape != tensor.shape):
            raise _unfit(
                f"The adapters have a '{tensor.name}' of {tensor.shape[0]:,} rows, and their base has another one.",
                _WHOLE,
            )
        if whole is not None:
            name = parameters.get(whole.name, whole.name)
            yield AdaptedTensor(tensor.name, name.rpartition(".")[0], "whole", {f"{PEFT_PREFIX}{name}": tensor.shape})
        elif own:
            for number, update in own.items():
                _require_product(update, models.names[number], tensor.name)
            number, update = next(iter(own.items()))
            first, second = (stored[number][factor.offset] for factor in in_order(update))
            columns, rows, ranks = math.prod(first.shape[1:]), second.shape[0], map(low_rank, own.values())
            fixed = METHODS[plan.method_of(plan.layout.run_of(place)).method].combination
            kept = min(sum(ranks) if fixed else rows, rows, columns, *([rank] if rank else []))
            module = first.name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
            module = parameters.get(places[number].name, f"{module}.weight").rpartition(".")[0]
            sides = ((kept, *first.shape[1:]), (second.shape[0], kept, *second.shape[2:]))
            shapes = {
                f"{PEFT_PREFIX}{module}.lora_{each.name.rpartition('.lora_')[2]}": side
                for each, side in zip((first, second), sides, strict=True)
            }
            form: Literal["factors", "difference"] = "factors" if fixed else "difference"
            yield AdaptedTensor(tensor.name, module, form, shapes, update.turned, kept)


def _require_product(update: LowRankUpdate, name: str, tensor: str) -> None:
    """Refuse updates whose factors are not those of the whole tensor, or not all that it is."""
    if any(factor.step > 1 for factor in in_order(update)):
        raise _unfit(f"{name} changes experts that are stacked in memory ('{tensor}').", _WHOLE)
    if update.lengths:
        said = f"{name} is an adapter with `use_dora: True`: what it does to '{tensor}' is no product of two factors."
        raise _unfit(said, _WHOLE)


def in_order(update: LowRankUpdate) -> tuple[Any, Any]:
    """The factors as peft has them: A of (rank, in) and B of (out, rank)."""
    return (update.left, update.right) if update.turned else (update.right, update.left)


def low_rank(update: LowRankUpdate) -> int:
    """The rank of an update."""
    rank: int = in_order(update)[0].shape[0]
    return rank


def _of_differences(
    plan: Plan, models: AlignedModels, described: AdapterBase, rank: int | None
) -> Iterator[AdaptedTensor]:
    """The tensors that full fine-tunes may have changed."""
    below, own = models.base.tensors if models.base else {}, models.donor.tensors
    parameters = {disk: parameter for parameter, disk in described.parameters.items()}
    tied = {*described.tied, *described.tied.values()}
    for tensor in plan.layout.tensors:
        if not tensor.averaged:
            continue
        parameter = parameters.get(own[tensor.name].name, "") if tensor.name in own else ""
        moved = tensor.name in below and tensor.name in models.patched  # it has other rows
        if not parameter or parameter in tied or moved:
            yield AdaptedTensor(tensor.name, parameter or tensor.name, "none", {})
            continue
        module, _, last = parameter.rpartition(".")
        layer = described.layers.get(parameter, "")
        if layer not in _FACTORED or last != "weight" or len(tensor.shape) < 2 or tensor.name not in below:
            yield AdaptedTensor(tensor.name, module, "whole", {f"{PEFT_PREFIX}{parameter}": tensor.shape})
            continue
        turned = layer in ("Conv1D", "Embedding")
        rows, *others = tensor.shape
        ins, outs = ([rows], others[0]) if turned else (others, rows)
        kept = min(rank or rows, outs, math.prod(ins))
        kind = ("lora_embedding_A", "lora_embedding_B") if layer == "Embedding" else ("lora_A.weight", "lora_B.weight")
        first, second = (f"{PEFT_PREFIX}{module}.{each}" for each in kind)
        shapes = {first: (kept, *ins), second: (outs, kept, *[1] * (len(ins) - 1))}
        yield AdaptedTensor(tensor.name, module, "difference", shapes, turned, kept)
