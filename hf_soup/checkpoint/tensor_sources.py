"""Where a model's tensors are: in safetensors files, each in one piece; those that an adapter changes in its base's,
with the adapter's factors beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup.checkpoint.file_sources import FileSource
from hf_soup.checkpoint.headers import TensorInfo


@dataclass(frozen=True)
class TensorSource:
    """Tensors in safetensors files.

    Args:
        tensors: Every tensor by its name on disk: its type and shape, and where it lies in which file.
        source: Where those files are: among the model's, or in the cache where they were converted from a pickle.
        headers: All tensors of those files as they are stored, where it is not these.
    """

    tensors: Mapping[str, TensorInfo] = field(repr=False)
    source: FileSource
    headers: tuple[TensorInfo, ...] = field(default=(), repr=False)

    def stored_in(self, file: str) -> dict[str, TensorInfo]:
        """What the header of a file says."""
        return {info.name: info for info in self.headers or self.tensors.values() if info.file == file}

    @cached_property
    def factor_files(self) -> frozenset[str]:
        """Those of an adapter, which are read again and again."""
        return frozenset(tensor.update.file for tensor in self.tensors.values() if tensor.update)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The files that hold tensors, in the order of their first tensor."""
        return tuple(dict.fromkeys([*(tensor.file for tensor in self.tensors.values()), *sorted(self.factor_files)]))

    @cached_property
    def content(self) -> str:
        """``sha256:…`` over the files of a folder, which are read where it is not known yet."""
        hashes = in_parallel(self.source.content_id, sorted(self.files), threads=4)
        lines = (f"{file} {digest}\n" for file, digest in zip(sorted(self.files), hashes, strict=True))
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def known_content(self) -> str | None:
        """The same, where it costs no reading."""
        paths = (self.source.here(file) for file in self.files)
        return self.content if "content" in self.__dict__ or all(p and hub.known_sha256(p) for p in paths) else None
