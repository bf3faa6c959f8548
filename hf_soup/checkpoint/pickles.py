"""``pytorch_model.bin`` → safetensors, where a recipe allows it: tensors only, once for each content."""

from __future__ import annotations

import errno
import hashlib
import logging
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hf_soup import hub
from hf_soup._util.isolated import IsolationError, run_isolated
from hf_soup._util.text import is_writable
from hf_soup.checkpoint.file_sources import FileSource, LocalFolder, fetch_files
from hf_soup.checkpoint.headers import read_index
from hf_soup.errors import ResolveError
from hf_soup.hub import SINGLE

if TYPE_CHECKING:
    from torch import Tensor


PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

#: What it may take to look through a pickle, without the numbers in it.
_SECONDS, _BYTES = 60, 4 << 30
#: How many times as much as their file tensors may take that share memory: T5 has one table under four names.
_SHARED = 4
_HINT = "It holds more than such tensors as can be averaged, or is damaged; have its owner upload safetensors."


def convert_pickle(name: str, source: FileSource) -> LocalFolder:
    """A folder in the cache with the tensors of ``pytorch_model.bin`` as safetensors, made once for each content."""
    import torch
    from safetensors.torch import save_file

    if PICKLE in source.files:
        parts: Sequence[str] = [PICKLE]
    else:
        parts = sorted(set(read_index(source.read, PICKLE_INDEX, source.files, name).values()))
    paths = fetch_files([(source, part) for part in parts])
    key = hashlib.sha256("".join(hub.sha256_of(path) for path in paths).encode()).hexdigest()
    target = hub.own_cache_folder() / "converted" / key / SINGLE
    if hub.is_intact(target):
        return LocalFolder.of(target.parent, [target])
    tensors: dict[str, Tensor] = {}
    for path in paths:
        require_plain(path, name)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # noqa: BLE001 -- where numbers are missing, it can raise anything at all
            problem = f"cannot be read as tensors alone ({type(error).__name__})"
            raise ResolveError(f"{name}: {path.name} {problem}.", hint=_HINT) from None
        if twice := next((key for key in loaded if key in tensors), None):
            raise ResolveError(f"{name}: '{twice}' is in {path.name} and in another file.")
        if other := next((key for key, value in loaded.items() if value.device.type != "cpu"), None):
            raise ResolveError(f"{name}: '{other}' in {path.name} has a shape and no numbers.")
        # Tied tensors share memory in a pickle, which safetensors does not store: each gets bytes of its own.
        tensors |= {key: value.detach().contiguous().clone() for key, value in loaded.items()}
    try:
        target.unlink(missing_ok=True)  # a damaged one
        # Somebody else's, of the same content, whose state may have been noted by now, stays.
        with hub.keeping(target, replaces=False) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    except OSError as error:
        raise ResolveError(
            f"{name}: its converted weights cannot be written to '{target.parent.parent}': {error.strerror or error}.",
            hint="Make room there, or choose another cache with HF_HOME.",
            code="disk-full" if error.errno == errno.ENOSPC else "",
        ) from None
    return LocalFolder.of(target.parent, [target])


def require_plain(path: Path, name: str) -> None:
    """Refuse a pickle that holds anything but tensors, or those that safetensors does not store or that would take
    more memory than their file, before any memory is taken for them.

    Raises:
        ResolveError: With the tensor, where it is one's fault; ``name`` says whose file it is.
    """
    try:
        problem = run_isolated(lambda: _problem(path), _SECONDS, _BYTES)
    except IsolationError as error:
        problem = f"cannot be read as tensors alone ({error})"
    if problem:
        raise ResolveError(f"{name}: {path.name} {problem}.", hint=_HINT)


def _problem(path: Path) -> str:
    """What is wrong with a pickle, for a sentence; empty if it is made of plain tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hf_soup.checkpoint.tensors import TORCH

    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it tells at length what it cannot do
    try:
        size = path.stat().st_size
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    return "is compressed, which torch does not do"
        # Within either, tensors have shapes and no memory; that of files of before torch 1.6 takes long to begin.
        with warnings.catch_warnings(), nullcontext() if zipped else FakeTensorMode():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="meta" if zipped else "cpu", weights_only=True)
            if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
                return "is not a mapping from names to tensors"
            taken = 0
            for key, value in loaded.items():
                if not isinstance(key, str) or not key or not is_writable(key):
                    return f"names a tensor {key!r:.80}, which is no text"
                if value.layout != torch.strided or value.is_quantized or value.is_nested:
                    return f"holds {key!r:.80} as a tensor that is sparse, nested or quantised"
                if value.dtype not in TORCH.values():
                    return f"holds {key!r:.80} in the type {value.dtype}, which is not averaged"
                needed, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
                if needed > stored or stored > size:
                    return f"holds {key!r:.80} of {needed:,} bytes, but no more than {min(stored, size):,} for it"
                taken += needed
            if taken > _SHARED * size:
                return f"holds tensors of {taken:,} bytes that share {size:,}"
    # A pickle from a stranger can raise anything at all.
    except Exception as error:  # noqa: BLE001
        if "quantized" in str(error).lower():  # torch has no code for it
            return "holds quantised tensors, and averages need the weights before quantisation"
        return f"cannot be read as tensors alone ({type(error).__name__})"
    finally:
        log.disabled = before
    return ""
