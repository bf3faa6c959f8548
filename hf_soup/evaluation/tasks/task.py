"""What a task is: what it reads from rows, what models of it are, and what they are scored by."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.text import first_line
from hf_soup.checkpoint import Kind, excess, panics_as_errors
from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import EvalDataset
from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.statistics import Ints
from hf_soup.recipe import Scoring

#: Files of a tokenizer, one of which is there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a `Scoring` that count, preprocessed.

    Args:
        title, scoring, notes, fingerprint, name: As in `EvalDataset`.
        encoded: All rows that the scoring names.
        kept: The numbers of those that count.
        labels: What `Task.labels` gave.
    """

    title: str
    scoring: Scoring
    notes: tuple[str, ...]
    fingerprint: str
    name: str
    encoded: EncodedRows
    kept: Ints
    labels: Any


class Task(ABC):
    """What a task does with its rows and its models: a class, in a file of its own.

    A task reads a row into plain content (pixels or text, which `digest` hashes to find equal rows) and turns contents
    into numbers once, so that every model sees the same ones.

    Args:
        scoring: The data, as the recipe names them.
        folder: The donor's: its tokenizer or image processor.
        config: The donor's ``config.json``.
    """

    #: Columns that usually hold the inputs, the first that are all there.
    columns: ClassVar[Sequence[tuple[str, ...]]]
    #: How many there may be, where it is more than of the usual ones.
    most_columns: ClassVar[int] = 0
    #: What classes of its models end in, and the mapping of transformers that has them.
    head: ClassVar[str]
    models: ClassVar[str]
    #: Rows that are made together, and by how many threads.
    chunk: ClassVar[int]
    threads: int = 1
    #: That pads the rows of a batch, where that is needed.
    tokenizer: Any = None
    #: What preprocessed rows depend on beside the donor's files, as plain data.
    depends_on: Sequence[object] = ()

    @abstractmethod
    def __init__(self, scoring: Scoring, folder: Path, config: Mapping[str, Any]) -> None: ...

    @classmethod
    @abstractmethod
    def require(cls, scoring: Scoring, config: Mapping[str, Any]) -> None:
        """Refuse a metric that there is not, and models that are no such models, before data is read.

        Raises:
            ScoringError: It is so.
        """

    @abstractmethod
    def labels(self, scoring: Scoring, name: str, table: Any, columns: Sequence[str]) -> Any:
        """What is right, read from all rows before they are preprocessed.

        Args:
            scoring: Pinned.
            name: What errors call the data.
            table: All its rows.
            columns: That hold the inputs.

        Raises:
            ScoringError: It cannot be read.
        """

    @abstractmethod
    def read(self, values: Sequence[Any]) -> Any:
        """The content of a row, from its columns: an array of pixels or a tuple of texts.

        Raises:
            ValueError: It is none.
        """

    @abstractmethod
    def preprocess(self, title: str, contents: Sequence[Any]) -> tuple[list[str], list[NDArray[Any]]]:
        """The names of the model's arguments, and the numbers of each row: as `Chunk` has them.

        Raises:
            ScoringError: The donor's tokenizer or image processor cannot.
        """

    def inputs(self, encoded: EncodedRows, kept: Ints) -> Inputs:
        """Some rows as a model takes them, without what is right.

        Args:
            encoded: All rows, preprocessed.
            kept: The numbers of those that count.
        """
        return Inputs(encoded, kept, self.tokenizer)

    @abstractmethod
    def dataset(self, rows: PreparedRows) -> EvalDataset:
        """What models are scored on.

        Raises:
            ScoringError: A score on these rows would mean nothing.
        """


def digest(content: NDArray[np.uint8] | tuple[str, ...]) -> bytes:
    """A hash of what a task reads from a row: equal rows have equal ones."""
    plain = repr(content).encode() if isinstance(content, tuple) else str(content.shape).encode() + content.tobytes()
    return hashlib.blake2b(plain, digest_size=16).digest()


def donors_tokenizer(folder: Path) -> Any:
    """The donor's tokenizer.

    Raises:
        ScoringError: It has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    return of_donor(folder, "tokenizer", TOKENIZER_FILES, AutoTokenizer)


def of_donor(folder: Path, what: Kind, files: Sequence[str], automatic: Any, **options: Any) -> Any:
    """The donor's tokenizer or image processor, which a class of transformers loads, where it has one of some files.

    Raises:
        ScoringError: It has none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in files):
        raise ScoringError(
            f"The donor has no {' or '.join(files)}, so it has no {what}.",
            hint="Put one beside its weights, for instance the ancestor's.",
        )
    if beyond := excess(folder, what):
        raise ScoringError(
            f"The donor's {what} {beyond}, so it is not used.",
            hint="Its files are damaged or hostile; put others beside its weights, for instance the ancestor's.",
        )
    try:
        with panics_as_errors():
            return automatic.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # a stranger's files, and no common class; tokenizers raises Exception itself
        raise ScoringError(f"Cannot read the donor's {what}: {first_line(error)}") from error
