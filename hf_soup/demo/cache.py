"""The demo's zoo before it is trained: its names and settings, and the cache that keeps it from run to run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

OWNER = "hf-soup-demo"
DATASET = "digits"
ANCESTOR = "vit-letters"
POOR = "vit-digits-hot"

#: What the bytes of the zoo depend on beside its settings and the demo's source; they key the cache.
_LIBRARIES = ("torch", "transformers", "safetensors", "scikit-learn", "pillow", "pyarrow", "numpy")
_MARKER = "complete.json"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Zoo:
    """How the zoo is made; the defaults are the demo.

    Args:
        seed: Of everything: splits, letters, initial weights, hyperparameters, batches.
        letters: Drawn letters that the ancestor learns from.
        letter_epochs: Passes over them.
        good: Fine-tunes with an ordinary learning rate, beside the one that is poor.
        epochs: Fewest and most passes over the training digits.
    """

    seed: int = 0
    letters: int = 8000
    letter_epochs: int = 6
    good: int = 8
    epochs: tuple[int, int] = (25, 40)

    @property
    def fine_tunes(self) -> tuple[str, ...]:
        """The names of the fine-tunes, the poor one last."""
        return (*(f"vit-digits-{number + 1}" for number in range(self.good)), POOR)

    @property
    def key(self) -> str:
        """A hash of all that the bytes depend on: these settings, the demo's source, the libraries' versions."""
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        sources = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("data.py", "zoo.py")]
        text = json.dumps([asdict(self), versions, sources], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where zoos are kept: ``$XDG_CACHE_HOME/hf-soup/demo``."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "hf-soup" / "demo"


def prepare(cache: Path, progress: Progress, zoo: Zoo, make: Callable[[Path, Progress, Zoo], None]) -> Path:
    """The folder with the data set and all models, one repo a folder; made once by ``make``, then found.

    It is made beside its place and moved there by one rename, and what lies there is believed only if every file
    is the one that the marker names: neither an interrupted nor a damaged zoo passes for a finished one.
    """
    folder = cache / zoo.key
    if _is_complete(folder):
        progress(f"The models of an earlier run are used: {folder}")
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{zoo.key}-", dir=cache) as name:
        staged = Path(name) / zoo.key
        staged.mkdir()
        make(staged, progress, zoo)
        (staged / _MARKER).write_text(_hashes(staged), encoding="utf-8")
        if not _is_complete(folder):  # else a demo that ran at the same time was faster
            if folder.exists():
                shutil.rmtree(folder)
            staged.rename(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    marker = folder / _MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8") == _hashes(folder)


def _hashes(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MARKER)
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return json.dumps(hashes, indent=1)
