"""``pytorch_model.bin`` → safetensors, where a recipe allows it: tensors only, once for each content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_soup import client, digests, hub, transfer
from hf_soup.errors import ResolveError
from hf_soup.headers import Read, read_index

if TYPE_CHECKING:
    from torch import Tensor

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert_pickle(name: str, files: Mapping[str, int], read: Read, repo: hub.Repo | None, folder: Path | None) -> Path:
    """Tensors of ``pytorch_model.bin`` as one safetensors file in the cache, made once for each content."""
    import torch
    from safetensors.torch import save_file

    if PICKLE in files:
        parts: Sequence[str] = [PICKLE]
    else:
        parts = sorted(read_index(read, PICKLE_INDEX, files, name)[1])
    paths = transfer.fetch([(repo, part) for part in parts]) if repo else [(folder or Path()) / part for part in parts]
    key = hashlib.sha256("".join(digests.sha256_of(path) for path in paths).encode()).hexdigest()
    target = client.own_cache_folder() / "converted" / f"{key}.safetensors"
    if target.exists():
        return target
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 -- a pickle from a stranger can raise anything at all
            raise ResolveError(
                f"{name}: {path.name} cannot be read as tensors alone ({type(error).__name__}).",
                hint="It holds more than tensors, or is damaged; have its owner upload safetensors.",
            ) from None
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ResolveError(f"{name}: {path.name} is not a mapping from names to tensors.")
        # Tied tensors share memory in a pickle, which safetensors does not store: each gets bytes of its own.
        tensors |= {str(key): value.detach().contiguous().clone() for key, value in loaded.items()}
    partial = target.with_suffix(f".{id(tensors):x}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(target)
    except OSError as error:
        raise ResolveError(
            f"{name}: its converted weights cannot be written to '{target.parent}': {error.strerror or error}.",
            hint="Make room there, or choose another cache with HF_HOME.",
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target
