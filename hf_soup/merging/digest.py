"""The digest of a soup, from the sha256s of the blocks of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_soup._util.parallel import in_parallel
from hf_soup.checkpoint import LocalFolder, Read, TensorInfo, read_header
from hf_soup.errors import ResolveError
from hf_soup.merging import layout


def digest_of(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The digest of a soup from ``(name, dtype, shape, root)`` of its tensors.

    >>> digest_of([])
    'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    total = hashlib.sha256()
    for name, dtype, shape, root in sorted(tensors, key=lambda tensor: tensor[0]):
        total.update(f"{name} {dtype} {list(shape)} {root}\n".encode())
    return total.hexdigest()


def root_of(read: Read, tensor: TensorInfo) -> str:
    """The sha256 over the sha256s of a tensor's blocks, as it is in a digest."""
    hashes, stop = hashlib.sha256(), tensor.offset + tensor.size
    for start in range(tensor.offset, stop, layout.BLOCK_BYTES):
        hashes.update(hashlib.sha256(read(tensor.file, start, min(stop, start + layout.BLOCK_BYTES))).digest())
    return hashes.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """The digest of the weights that a soup's folder has now, all of which are read.

    Raises:
        ResolveError: There are none, or a file is not what safetensors would write.
    """
    source = LocalFolder.of(folder, folder.glob("*.safetensors"))
    if not source.files:
        raise ResolveError(f"'{folder}' has no weights.", hint="Cook the soup again.")
    tensors = [
        tensor for file, size in source.files.items() for tensor in read_header(source.read, file, size, f"'{folder}'")
    ]
    roots = in_parallel(lambda tensor: root_of(source.read, tensor), tensors)
    return digest_of((t.name, t.dtype, t.shape, r) for t, r in zip(tensors, roots, strict=True))


class Blocks:
    """The sha256s of blocks of known sizes, of bytes that come in pieces of any size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = iter(sizes)
        self._left = next(self._sizes)
        self._hash = hashlib.sha256()
        self._digests: list[bytes] = []

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while data:
            piece, data = data[: self._left], data[self._left :]
            self._hash.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._digests.append(self._hash.digest())
                self._hash = hashlib.sha256()
                self._left = next(self._sizes, 0)

    def hex(self) -> str:
        """All of them, one after the other."""
        return b"".join(self._digests).hex()
