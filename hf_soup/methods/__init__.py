"""The ways of mixing: one pure function a file, registered by its decorator. Imports torch and nothing else.

A method gets the same tensor of every ingredient, as stored, and their weights; it returns the mix in the accumulator's
dtype, and the engine rounds once. One that needs the ancestor gets task vectors, which are in that dtype already, and
returns one, to which the engine adds the ancestor. Where a method is elementwise it gets slices, flat; else whole
tensors in their shape. It changes none of them.

What else a method needs it asks for by the name of a parameter without a default, and the engine hands it in:

- ``measured``: what the method's own `Method.measure` finds in whole tensors, which it sees slice by slice. A method
  that is elementwise but for a few numbers, as an angle, is read twice and never held.

- ``random``: for every ingredient a float32 tensor of its shape, uniform in [0, 1), the same in any slicing.
- ``cutoffs``: for every ingredient the magnitude that ``density`` of all entries of its task vector reach or exceed,
  compared as float32.
- ``statistics``: for every ingredient what it showed on the recipe's examples; of which kind, `Method` says. Where one
  has none for a tensor, the method is not asked, and the tensor is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_soup._util.registry import Registered, Registry, Within as Within

Function = Callable[..., Tensor]

#: Elements that are worked on at a time, so that the few tensors in between stay in the processor's cache.
BLOCK = 1 << 17
#: Elements of each tensor in a slice that is measured, of up to four tensors; of more they are fewer, for all together
#: not to take more memory. It goes by nothing else: what is added up slice by slice is the same everywhere.
SLICE = 1 << 18


@dataclass(frozen=True)
class Method(Registered):
    r"""A registered method.

    Args:
        name, function: ``function(tensors, weights, **parameters) -> Tensor``.
        elementwise: Whether slices give what whole tensors give, once it is ``measured``.
        neutral: Parameters with which equal ingredients return themselves; a function where one depends on the sum of
            their shares. None where there are no such, which its docstring explains.
        needs_base: Whether it works on task vectors.
        sums: Whether shares are not divided by their sum, so that they may be negative; where it has a parameter
            ``normalize``, that decides.
        combination: Whether it adds up the tensors, each times a number that shares and parameters give, whatever the
            tensors hold; of adapters it then takes the factors and no product of them.
        bound: How far the result may be from that of another machine before it is rounded, in parts of the largest
            magnitude in the tensor, as where it takes a decomposition, a power or a logarithm, which machines round in
            different ways; 0 where it is the same everywhere, and None where nobody says.
        least, most: How many ingredients it is defined for.
        ordered: Whether the order of the ingredients counts.
        statistics: What is collected of the ingredients, for the parameter ``statistics``: ``fisher``, a float32 tensor
            of the tensor's shape with the mean squared gradient of the log-probability of a label that the model draws,
            example by example, over the root mean square of these in the whole model; or ``gram``, for the weight of a
            linear layer, given as (out, in), the float32 (in, in) mean of :math:`xx^\top` over the layer's inputs.
            The parameter ``examples`` says how many are looked at.
        measure: ``measure(slices, weights, **parameters)`` gives what the parameter ``measured`` gets: for `Slices` of
            whole tensors, or of their task vectors.
    """

    function: Function
    elementwise: bool
    neutral: Mapping[str, Any] | None
    needs_base: bool = False
    sums: bool = False
    combination: bool = False
    bound: float | None = None
    least: int = 1
    most: int | None = None
    ordered: bool = False
    statistics: Literal["", "fisher", "gram"] = ""
    measure: Callable[..., Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether a tensor is worked on at once, by one thread: it is held, or measured first."""
        return not self.elementwise or self.measure is not None

    @property
    def takes(self) -> str:
        """How many ingredients, in words."""
        if self.most is None:
            return f"{self.least} or more"
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float], **arguments: Any) -> Tensor:
        """What the function gives, which is looked at.

        Raises:
            ValueError: The function says so, or its answer is no tensor of that shape, as wide as the accumulator.
        """
        mixed = self.function(tensors, weights, **arguments)
        shape, wide = tensors[0].shape, tensors[0].dtype if self.needs_base else accumulator(tensors)
        if not isinstance(mixed, Tensor):
            raise ValueError(f"it gives {type(mixed).__name__}, and not a tensor")
        if mixed.shape != shape or mixed.dtype not in (wide, torch.float64):
            raise ValueError(f"it gives {mixed.dtype} of shape {tuple(mixed.shape)}, not {wide} of {tuple(shape)}")
        return mixed

    def coefficients(self, weights: Sequence[float], parameters: Mapping[str, Any]) -> list[float]:
        """Of a combination, what each tensor is multiplied with.

        >>> METHODS["task_arithmetic"].coefficients([1.0, -2.0], {"scale": 0.5})
        [0.5, -1.0]
        """
        unit = list(torch.eye(len(weights), dtype=torch.float64))
        coefficients: list[float] = self.function(unit, weights, **parameters).tolist()
        return coefficients

    def neutral_for(self, total: float) -> dict[str, Any]:
        """The neutral parameters for ingredients whose shares have this sum."""
        return {name: value(total) if callable(value) else value for name, value in (self.neutral or {}).items()}


METHODS: Registry[Method] = Registry("method")


def merge_method(
    *, elementwise: bool, neutral: Mapping[str, Any] | None, **properties: Any
) -> Callable[[Function], Function]:
    """Register a function as a method under its own name, with the properties of `Method`."""

    def register(function: Function) -> Function:
        METHODS.add(Method(function.__name__, function, elementwise, neutral, **properties))
        return function

    return register


class Slices:
    """The same tensor of every ingredient, or its task vectors, in slices that are read when they are asked for, again
    each time.

    Args:
        read: ``read(begin, end)`` gives these elements of each, ``(n, elements)``.
        count: How many tensors.
        size: How many elements each has.

    >>> list(Slices.of([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]))
    [tensor([[1., 2.],
            [3., 4.]])]
    """

    def __init__(self, read: Callable[[int, int], Tensor], count: int, size: int) -> None:
        self.read = read
        self.count = count
        self.size = size
        self._step = SLICE >> min(5, max(0, (count - 1).bit_length() - 2))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Slices:
        """Of tensors in memory."""
        flat = [tensor.reshape(-1) for tensor in tensors]
        return cls(lambda begin, end: torch.stack([each[begin:end] for each in flat]), len(flat), flat[0].numel())

    def __len__(self) -> int:
        return (self.size + self._step - 1) // self._step

    def __getitem__(self, place: int) -> Tensor:
        return self.read(place * self._step, min(self.size, (place + 1) * self._step))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to add up in: float32 where everything is stored in 16 bits, else float64.

    Task vectors are in it already.

    >>> accumulator([torch.zeros(1, dtype=torch.bfloat16)])
    torch.float32
    """
    return torch.float32 if all(tensor.element_size() == 2 for tensor in tensors) else torch.float64


def shares(weights: Sequence[float]) -> list[float]:
    """Weights as `linear` multiplies with them: ones where all are equal, else scaled by a power of two.

    That scaling rounds nothing, and no product or sum of shares under- or overflows that would not have to.

    >>> shares([0.1, 0.1]), shares([3.0, 1.0])
    ([1.0, 1.0], [0.75, 0.25])
    """
    if len(set(weights)) == 1:
        return [1.0] * len(weights)
    exponent = math.frexp(max(weights))[1]
    return [math.ldexp(weight, -exponent) for weight in weights]


def round_into(mixed: Tensor, out: Tensor) -> None:
    """Round the accumulator's values to the output's dtype, to nearest, ties to even.

    >>> out = torch.empty(1, dtype=torch.bfloat16)
    >>> round_into(torch.tensor([1 + 2**-8 + 2**-30], dtype=torch.float64), out)
    >>> out.item()  # torch's own cast gives 1.0, because it goes through float32, which falls on the tie
    1.0078125
    """
    if mixed.dtype == torch.float64 and out.element_size() == 2:
        for wide, narrow in zip(torch.split(mixed.reshape(-1), BLOCK), torch.split(out.view(-1), BLOCK), strict=True):
            near = wide.float()
            if out.dtype == torch.bfloat16:
                # The second rounding errs only where the first one made a tie of what was none.
                lower = near.view(torch.int32).numpy() << 16  # numpy, which finds them faster
                ties = torch.from_numpy((lower == -(1 << 31)).nonzero()[0])
                near[ties] = _to_odd(near[ties], wide[ties])
            else:
                near = _to_odd(near, wide)
            narrow.copy_(near)
        return
    out.copy_(mixed)


def _to_odd(near: Tensor, wide: Tensor) -> Tensor:
    """Float32s rounded from float64, with the last bit set where anything was lost, so that no tie was not one."""
    back, bits = near.double(), near.view(torch.int32)
    bits.sub_((back.abs() > wide.abs()).int()).bitwise_or_((back != wide).int())
    return near


METHODS.load_package(__name__)

# Behind what it imports from here.
from hf_soup.methods._ranks import Mapper as Mapper, count_kept as count_kept, ranked as ranked  # noqa: E402
from hf_soup.methods._spectral import singular as singular  # noqa: E402
from hf_soup.methods._sums import mean as mean, weighted_sum as weighted_sum  # noqa: E402
