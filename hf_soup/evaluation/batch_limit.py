"""Batches that fit the memory: what is too large is halved, and said once."""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

from hf_soup._util.logs import PrintableLogger

logger = PrintableLogger(__name__)

#: Data → the largest batch of theirs that is tried, once one did not fit.
_LIMITS: WeakKeyDictionary[Hashable, BatchLimit] = WeakKeyDictionary()


class BatchLimit:
    """How many rows of some data go through a model together."""

    def __init__(self, title: str) -> None:
        self._title = title
        #: No larger batch is tried; none is known not to fit while this is None.
        self.most: int | None = None

    @classmethod
    def of(cls, data: Hashable, title: str) -> BatchLimit:
        """That of some data, the same for all models of a cook."""
        return _LIMITS.setdefault(data, cls(title))

    def exceeded(self, size: int) -> bool:
        """Whether a batch is larger than what is tried."""
        return self.most is not None and size > self.most

    def lower(self, error: BaseException, size: int) -> bool:
        """Whether an error says that a batch did not fit, and half of it can be tried; so from now on."""
        import torch

        spoken = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # of the CPU's allocator
        if size < 2 or not (spoken or isinstance(error, torch.OutOfMemoryError)):
            return False
        if self.most is None:
            logger.warning(f"{self._title}: {size} rows together do not fit the memory; fewer are taken.")
        self.most = min(size // 2, self.most or size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
