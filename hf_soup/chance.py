"""Random numbers for methods, each a function of seed, tensor, ingredient and place alone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

#: Numbers that one step of the generator's counter gives: four of 64 bits, halved.
_BLOCK = 8


def uniform(seed: int, tensor: str, position: int, begin: int, count: int) -> Tensor:
    """Numbers in [0, 1), uniform among the multiples of 2⁻²⁴, for some elements of a tensor of an ingredient.

    The generator is Philox4x64 (Salmon et al., 2011), which counts: whoever asks for any elements, in any order, gets
    the same ones.

    Args:
        seed: The recipe's.
        tensor: Its name.
        position: Of the ingredient among those that are mixed.
        begin: The first element.
        count: How many.

    >>> whole = uniform(0, "w", 1, 0, 100)
    >>> torch.equal(uniform(0, "w", 1, 37, 20), whole[37:57])
    True
    """
    named = hashlib.sha256(f"{seed}\0{position}\0{tensor}".encode()).digest()
    first = begin // _BLOCK
    last = -(-(begin + count) // _BLOCK)
    generator = np.random.Philox(key=int.from_bytes(named[:16], "little"), counter=first)
    raw = generator.random_raw(_BLOCK // 2 * (last - first)).astype("<u8", copy=False).view("<u4")
    bits = raw[begin - first * _BLOCK :][:count] >> 8
    return torch.from_numpy(bits.astype(np.float32)).mul_(2.0**-24)
