"""Adapters from adapters, or from what full fine-tunes learned: the best factors of a rank, and what they lose."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_soup._util.io import ShortReadError, open_file, shrunk
from hf_soup._util.parallel import usable_cores
from hf_soup._util.progress import bar
from hf_soup.checkpoint import ADAPTER_WEIGHTS, DTYPES, TORCH, Factor
from hf_soup.errors import IncompatibleError, ValuesError
from hf_soup.lineage import AlignedModel
from hf_soup.merging.adapter_plan import AdaptedTensor, AdapterPlan, in_order, low_rank
from hf_soup.merging.cutoffs import needs_cutoffs
from hf_soup.merging.digest import digest_of_folder
from hf_soup.merging.layout import Layout
from hf_soup.merging.low_rank import read_factor
from hf_soup.merging.plan import Plan
from hf_soup.merging.to_files import MergeResult
from hf_soup.merging.to_memory import Materializer
from hf_soup.methods import round_into, singular
from hf_soup.recipe import AdapterReport, Mixture

#: Bytes that all tensors hold which are worked on at a time, where one does not hold more by itself.
_HELD_BYTES = 1 << 30
#: A file of nothing but zeros, in the place of the base where only differences from it count.
_ZEROS = "/zeros"


def merge_adapter(
    adapter: AdapterPlan, folder: Path, *, threads: int | None = None, quiet: bool = False
) -> MergeResult:
    r"""Write the file of an adapter.

    .. math:: M = \sum_i c_i s_i B_i A_i = [c_1 s_1 B_1 \dots]\,[A_1; \dots]

    At a rank that holds all factors they are put side by side. At a smaller one, matrices of the size of all ranks give
    the largest singular values of :math:`M` without :math:`M`, and so the best approximation that there is (Eckart and
    Young, 1936). What a method makes that is no such sum, and what a full fine-tune learned, is made as a
    matrix, one at a time, and then factored. All is worked out in float64, by one thread a tensor, and rounded once.

    Args:
        adapter: What to write.
        folder: Where.
        threads: How many tensors are worked on at a time; by default one a core.
        quiet: No progress bar.

    Raises:
        ValuesError: Factors hold NaN or Inf, or the result cannot be written in its type.
        MergeError: A file is shorter than its header says.
    """
    made: dict[str, _Made] = {}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        work = _Work(adapter, stack)
        shown = stack.enter_context(bar("Factoring", len(adapter.tensors), quiet=quiet, unit="tensor"))
        fitting = _HELD_BYTES // max(1, *map(work.held_bytes, adapter.tensors))
        threads = max(1, min(threads or usable_cores(), fitting))
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        with pool:
            for tensor, each in zip(adapter.tensors, pool.map(work.make, adapter.tensors), strict=True):
                made[tensor.name] = each
                shown.update()
    changed = {tensor.module for tensor in adapter.tensors if made[tensor.name].size}
    written: dict[str, Tensor] = {}
    errors, left_out = dict[str, float](), list[str]()
    for tensor in adapter.tensors:
        one = made[tensor.name]
        if tensor.form == "none" and (one.size or not one.known):
            left_out.append(tensor.name)
        elif (
            adapter.is_of_adapters or one.size or not one.known or (tensor.form == "whole" and tensor.module in changed)
        ):
            written |= one.tensors  # of a module that is saved whole peft wants every tensor
        if one.size:
            errors[tensor.name] = math.sqrt(one.lost / one.size)
    if not any(".lora_" in name for name in written):
        names = ", ".join(model.name for model in adapter.models.ingredients)
        raise ValuesError(
            f"{names}: no matrix that has factors in an adapter was changed, and peft loads none without.",
            hint="Is the base the first model, and named right?",
            code="adapter-output",
        )
    save_file(_as_loaded(written), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    size = math.fsum(one.size for one in made.values())
    report = AdapterReport(
        rank=max((made[name].rank for name in errors), default=0),
        error=math.sqrt(math.fsum(one.lost for one in made.values()) / size) if size else 0.0,
        errors=errors,
        left_out=tuple(left_out),
    )
    return MergeResult(digest_of_folder(folder), {}, 0, (), adapter=report)


def _as_loaded(written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that peft loads: a bias beside factors belongs to the layer that these wrap."""
    wrapped = {name.rpartition(".lora_")[0] for name in written if ".lora_" in name}
    return {
        f"{module}.base_layer.{last}" if ".lora_" not in name and module in wrapped else name: tensor
        for name, tensor in written.items()
        for module, _, last in [name.rpartition(".")]
    }


class _Made(NamedTuple):
    """Tensors of the adapter's file that stand for one of the base; the squared length of what was learned, as far as
    that is known, and of the part of it that they lose; and their rank.
    """

    tensors: Mapping[str, Tensor] = {}
    size: float = 0.0
    lost: float = 0.0
    rank: int = 0
    known: bool = True


class _Work:
    """Makes the tensors of an adapter, with all files open as long as a stack lasts."""

    def __init__(self, adapter: AdapterPlan, stack: ExitStack) -> None:
        self._adapter, self._stack = adapter, stack
        base, files = adapter.models.base, adapter.files
        assert base is not None, "an adapter has a base"
        self._models = (*adapter.models.ingredients, base)
        self._paths = [
            {file: model.checkpoint.weights.source.fetch(file) for file in own}
            for model, own in zip(self._models, files, strict=True)
        ]
        self._opened = [{file: open_file(stack, path) for file, path in own.items()} for own in self._paths]
        forms: dict[str, list[str]] = {"factors": [], "difference": [], "whole": [], "none": []}
        for tensor in adapter.tensors:
            forms[tensor.form].append(tensor.name)
        self._whole_names = {*forms["whole"]}
        self._whole = self._provider(forms["whole"])
        compared, self._base = [*forms["difference"]], None
        if not adapter.is_of_adapters:
            compared += [name for name in (*forms["whole"], *forms["none"]) if self._is_known(name)]
            self._base = self._provider(compared, of_base=True)
        elif compared and needs_cutoffs(adapter.plan):  # which go by all entries of a model, changed or not
            compared = [tensor.name for tensor in adapter.plan.layout.tensors if tensor.averaged and tensor.size]
        self._mixed = self._provider(compared, zeros=adapter.is_of_adapters)

    def _is_known(self, name: str) -> bool:
        """Whether it can be told what was learned: the base has the same rows."""
        return name in self._models[-1].tensors and name not in self._adapter.models.patched

    def _provider(self, names: Sequence[str], *, zeros: bool = False, of_base: bool = False) -> Callable[[str], Tensor]:
        """Gives tensors of the whole models as they are merged, in float64: of the base alone, or with zeros in its
        place.
        """
        if not names:
            return dict[str, Tensor]().__getitem__
        plan, sources = self._adapter.plan, list(zip(self._models, self._paths, strict=True))
        mixture = plan.mixture
        if of_base:
            sources, mixture = sources[-1:], Mixture({self._models[-1].name: 1.0})
        models = [
            replace(model, tensors={name: model.tensors[name] for name in names if name in model.tensors})
            for model, _ in sources
        ]
        paths = [own for _, own in sources]
        if zeros:
            models = [_over_zeros(model, self._whole_names) for model in models]
            size = max(info.size for info in models[-1].tensors.values())
            nothing = self._stack.enter_context(_sparse(size))
            paths = [{**own, _ZEROS: nothing} for own in paths]
        base = None if of_base else models.pop()
        layout = Layout.of(models, base, patched=self._adapter.models.patched & {*names}, dtype="float64")
        materializer = Materializer(layout, paths)
        self._stack.callback(materializer.close)
        return materializer.one_by_one(Plan(layout, mixture, plan.statistics))

    def held_bytes(self, tensor: AdaptedTensor) -> int:
        """About how much memory it takes to make a tensor."""
        places = [model.tensors[tensor.name] for model in self._models if tensor.name in model.tensors]
        ranks, elements = sum(low_rank(at.update) for at in places if at.update), math.prod(places[0].shape)
        if tensor.form != "factors":
            return 8 * elements * (len(places) + 4)
        rows, columns = (math.prod(shape) for shape in _sides(tensor))
        matrix = elements if ranks >= min(rows, columns) else ranks * ranks
        return 8 * (2 * ranks * (rows + columns) + 4 * matrix)

    def make(self, tensor: AdaptedTensor) -> _Made:
        """What stands for a tensor of the base."""
        if tensor.form == "factors":
            return self._factored(tensor)
        known = self._is_known(tensor.name)
        if tensor.form == "none" and not known:
            return _Made(known=False)
        learned: Tensor | None = None
        if known and not (self._adapter.is_of_adapters and tensor.form == "whole"):
            learned = self._mixed(tensor.name)
            learned = learned if self._base is None else learned - self._base(tensor.name)
        size = 0.0 if learned is None else _squared(learned)
        if tensor.form == "none":
            return _Made(size=size, lost=size)
        if tensor.form == "whole":
            (name,) = tensor.stored
            exact = self._whole(tensor.name)
            rounded = self._rounded(tensor.name, exact)
            return _Made({name: rounded}, size, _squared(exact - rounded.double()), known=known)
        assert learned is not None, "it is what is factored"
        matrix = learned.reshape(learned.shape[0], -1)
        return self._from_matrix(tensor, matrix.mT if tensor.turned else matrix)

    def _factored(self, tensor: AdaptedTensor) -> _Made:
        """From the factors of adapters."""
        lefts, rights = [], []
        for source, share in self._adapter.coefficients(tensor).items():
            model, place = self._models[source], self._models[source].tensors.get(tensor.name)
            if not share or place is None or (update := place.update) is None:
                continue
            self._require_same_table(source, tensor.name)
            try:
                first, second = (
                    read_factor(factor, self._opened[source][update.file], torch.float64) for factor in in_order(update)
                )
            except ShortReadError:
                raise shrunk(model.label, ADAPTER_WEIGHTS, tensor.name) from None
            if not (first.isfinite().all() and second.isfinite().all()):
                raise ValuesError(
                    f"The factors of '{tensor.name}' in the adapter {model.label} hold NaN or Inf.",
                    hint="Leave it out.",
                    code="not-finite",
                    subjects=[model.label],
                )
            lefts.append(second * (share * update.scale))
            rights.append(first)
        rows, columns = (math.prod(shape) for shape in _sides(tensor))
        left = torch.cat(lefts, dim=1) if lefts else torch.zeros(rows, 0, dtype=torch.float64)
        right = torch.cat(rights) if rights else torch.zeros(0, columns, dtype=torch.float64)
        if left.shape[1] >= min(rows, columns):
            return self._from_matrix(tensor, left @ right)
        if tensor.rank >= left.shape[1]:
            size, lost = _squared_product(left, right), 0.0
        else:
            left, right, size, lost = _best(left, right, tensor.rank)
        left, right = _padded(left, right, tensor.rank)
        tensors, (rounded, other) = self._made_of(tensor, left, right)
        # Written so that nothing cancels.
        lost += _squared_product(torch.cat([left - rounded, rounded], dim=1), torch.cat([right, right - other]))
        return _Made(tensors, size, lost, tensor.rank)

    def _from_matrix(self, tensor: AdaptedTensor, matrix: Tensor) -> _Made:
        """From what the factors are to come to, as (out, in)."""
        left, values, right = singular(matrix, tensor.rank, 0.0)
        roots = values.sqrt()
        tensors, (left, right) = self._made_of(tensor, *_padded(left * roots, (right * roots).mT, tensor.rank))
        return _Made(tensors, _squared(matrix), _squared(matrix - left @ right), tensor.rank)

    def _require_same_table(self, source: int, name: str) -> None:
        """Refuse factors of another table than the base's, of which an adapter may have a copy.

        Raises:
            IncompatibleError: It is another one.
        """
        places = [(n, self._models[n].tensors[name]) for n in (source, len(self._models) - 1)]
        if len({info.file for _, info in places}) == 1:
            return
        own, base = (
            read_factor(Factor(info.offset, info.dtype, info.shape), self._opened[n][info.file], torch.float64)
            for n, info in places
        )
        if not torch.equal(own, base):
            label = self._models[source].label
            raise IncompatibleError(
                f"The adapter {label} has a '{name}' of its own, to which its factors are added; it is not the base's.",
                hint="Cook a whole model, without `output: adapter`.",
                code="adapter-output",
                subjects=[label],
            )

    def _made_of(self, tensor: AdaptedTensor, left: Tensor, right: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The factors as they are written, by their names; and the same numbers in float64."""
        tensors = {
            name: self._rounded(tensor.name, factor).reshape(shape)
            for (name, shape), factor in zip(tensor.stored.items(), (right, left), strict=True)
        }
        first, second = (each.double() for each in tensors.values())
        return tensors, [second.reshape(left.shape), first.reshape(right.shape)]

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        """As it is written.

        Raises:
            ValuesError: The type cannot hold it.
        """
        rounded = torch.empty(values.shape, dtype=TORCH[DTYPES[self._adapter.dtype]])
        round_into(values, rounded)
        if not rounded.isfinite().all():
            raise ValuesError(
                f"What stands for '{name}' in the adapter would be larger than {self._adapter.dtype} can hold.",
                hint="Set `dtype: bfloat16` or `dtype: float32` in the recipe.",
                code="overflow",
            )
        return rounded


def _best(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    r"""The best factors of a smaller rank, the squared length of the product, and of what they lose of it.

    With :math:`L^\top L = SS^\top` the eigenvectors of :math:`S^\top RR^\top S` give those rows of :math:`M = LR` that
    are longest. Onto their span, made orthonormal as :math:`Q`, it is projected: :math:`MQQ^\top` loses
    :math:`\lVert M \rVert^2 - \lVert MQ \rVert^2`, and an error of :math:`Q` only shows in its square.

    >>> best = _best(torch.eye(2).double(), torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]).double(), 1)
    >>> (best[0] @ best[1]).abs(), best[2:]
    (tensor([[0., 0., 0.],
            [0., 4., 0.]], dtype=torch.float64), (25.0, 9.0))
    """
    outer, inner = left.mT @ left, right @ right.mT
    values, vectors = torch.linalg.eigh(outer)
    root = vectors * values.clamp(min=0.0).sqrt()
    directions = torch.linalg.eigh(root.mT @ inner @ root)[1][:, -rank:].flip(1)
    span = torch.linalg.qr(((root @ directions).mT @ right).mT).Q
    images = left @ (right @ span)
    size = max(0.0, float((outer * inner).sum()))
    roots = torch.linalg.vector_norm(images, dim=0).sqrt()
    return images / roots.where(roots > 0, 1.0), (span * roots).mT, size, max(0.0, size - _squared(images))


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors with zeros up to a rank."""
    more = rank - left.shape[1]
    return torch.nn.functional.pad(left, (0, more)), torch.nn.functional.pad(right, (0, 0, 0, more))


def _sides(tensor: AdaptedTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows and the columns of the product of a tensor's factors."""
    first, second = tensor.stored.values()
    return second[:1], first[1:]


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _squared_product(left: Tensor, right: Tensor) -> float:
    r"""The squared length of a product, without it: :math:`\lVert LR \rVert^2 = \langle L^\top L, RR^\top \rangle`."""
    return max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum()))


def _over_zeros(model: AlignedModel, whole: Collection[str]) -> AlignedModel:
    """A model of what adapters add, and of tensors that some have whole."""
    tensors = {
        name: info
        if name in whole
        else replace(info, dtype="F32", file=_ZEROS, offset=0, size=4 * math.prod(info.shape))
        for name, info in model.tensors.items()
    }
    return replace(model, tensors=tensors)


@contextmanager
def _sparse(size: int) -> Iterator[Path]:
    """A file of zeros, which takes no room."""
    with tempfile.NamedTemporaryFile(prefix="hf-soup-zeros-") as file:
        file.truncate(size)
        yield Path(file.name)
