"""What a task does with its inputs: one class a task, registered in `TASKS`.

A task reads a row into plain content (pixels or text, which `digest` hashes to find equal rows) and turns contents
into numbers once, so that every model sees the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.parallel import usable_cores
from hf_soup.checkpoint import Kind, excess, panics_as_errors
from hf_soup.errors import ScoringError
from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.statistics import Ints

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """The rows of ``kept`` as a model takes them: pixels, ``(channels, height, width)`` float32 a row, or token
    numbers, ``(names, tokens)`` int32 a row, which the tokenizer pads when a batch is made.
    """

    stored: EncodedRows
    kept: Ints
    tokenizer: Any = None

    @property
    def can_pad(self) -> bool:
        """Whether rows of several lengths can be in one batch; pixels are all of one shape."""
        return self.tokenizer is None or self.tokenizer.pad_token_id is not None

    @property
    def sizes(self) -> Ints:
        """``(rows,)``: numbers in each row."""
        return self.stored.sizes[self.kept]

    def batch(self, places: Ints, device: str = "cpu") -> dict[str, Tensor]:
        """The model's keyword arguments for places in ``kept``, in their order; of texts padded to the longest."""
        import torch

        rows = self.stored.rows(self.kept[places])
        if self.tokenizer is None:
            return {"pixel_values": torch.from_numpy(np.stack(rows)).to(device)}
        lines = [row.tolist() for row in rows]
        chosen = {name: [row[line] for row in lines] for line, name in enumerate(self.stored.names)}
        return {name: value.to(device) for name, value in self.tokenizer.pad(chosen, return_tensors="pt").items()}

    def batches(self, places: Ints, size: int) -> list[Ints]:
        """Places in their order, in batches of a size; one at a time where the tokenizer cannot pad."""
        step = size if self.can_pad else 1
        return [places[begin : begin + step] for begin in range(0, len(places), step)]


class ImageClassification:
    """Images through the donor's image processor, on Pillow, so that torchvision changes no number.

    ``num_channels`` of the donor's config (default 3) decides grey or RGB.
    """

    columns: ClassVar[Sequence[tuple[str, ...]]] = (("image",), ("img",))
    head: ClassVar[str] = "ForImageClassification"
    models: ClassVar[str] = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"
    #: Rows that are made together: few, as a photograph may have 50 MB of pixels.
    chunk: ClassVar[int] = 16
    tokenizer: ClassVar[None] = None

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        # Older releases hide it in the package itself where torchvision is not installed, which PIL does not need.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        channels = config.get("num_channels", 3)
        if channels not in (1, 3):
            raise ScoringError(f"The model reads images of {channels} channels; only 1 and 3 can be scored.")
        self.mode = "L" if channels == 1 else "RGB"
        files = ("preprocessor_config.json", "processor_config.json")
        self.processor = _of_donor(folder, "image processor", files, AutoImageProcessor, backend="pil")
        self.depends_on = [type(self.processor).__name__, self.mode]
        self.threads = usable_cores()

    def read(self, values: Sequence[Any]) -> NDArray[np.uint8]:
        """``(height, width, channels)`` uint8 from a Pillow image, an array or nested lists.

        Arrays are ``(height, width)``, ``(height, width, channels)`` or ``(channels, height, width)``; whole
        numbers from 0 to 255, or floats from 0 to 1.
        """
        (value,) = values
        if value is None:
            raise ValueError("there is no image")
        image = value if hasattr(value, "convert") else _image_from_array(value)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"an image of mode {image.mode}; convert it to 8 bits a channel")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        pixels = np.asarray(image.convert(self.mode))
        return pixels.reshape(*pixels.shape[:2], -1)

    def preprocess(self, title: str, contents: Sequence[NDArray[np.uint8]]) -> tuple[list[str], list[NDArray[Any]]]:
        """The name of the model's argument, and each image as ``(channels, height, width)`` float32."""
        try:
            ready = self.processor(list(contents), return_tensors="np", input_data_format="channels_last")
            return ["pixel_values"], list(ready["pixel_values"].astype(np.float32, copy=False))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            sizes = sorted({content.shape for content in contents})
            raise ScoringError(
                f"The donor's image processor fails on {title} (images of {sizes[:4]}): {first_line(error)}",
                hint="Check `do_resize`, `size` and the means in its preprocessor_config.json.",
            ) from error


class TextClassification:
    """Texts, or pairs of texts, through the donor's tokenizer, cut at the longest that the model reads."""

    columns: ClassVar[Sequence[tuple[str, ...]]] = (
        ("premise", "hypothesis"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text",),
        ("sentence",),
        ("content",),
    )
    head: ClassVar[str] = "ForSequenceClassification"
    models: ClassVar[str] = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"
    chunk: ClassVar[int] = 1000
    #: Fast tokenizers have threads of their own.
    threads: ClassVar[int] = 1

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        self.config = config
        files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
        self.tokenizer = _of_donor(folder, "tokenizer", files, AutoTokenizer)
        self.depends_on = [type(self.tokenizer).__name__, self._longest(), config.get("vocab_size")]

    def read(self, values: Sequence[Any]) -> tuple[str, ...]:
        """One text or two."""
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{value!r} where a text should be")
        return tuple(values)

    def preprocess(self, title: str, contents: Sequence[tuple[str, ...]]) -> tuple[list[str], list[NDArray[Any]]]:
        """The names of the model's arguments, and each row as ``(names, tokens)`` int32, all of tokens it knows."""
        columns = [list(column) for column in zip(*contents, strict=True)]
        try:
            with panics_as_errors():
                made = self.tokenizer(*columns, truncation=True, max_length=self._longest())
        except Exception as error:  # a stranger's file, and no common class; tokenizers raises Exception itself
            raise ScoringError(
                f"The donor's tokenizer cannot read {title}: {first_line(error)}",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            ) from error
        vocabulary = self.config.get("vocab_size")
        highest = max(max(ids, default=0) for ids in made["input_ids"])
        if isinstance(vocabulary, int) and highest >= vocabulary:
            raise ScoringError(
                f"The donor's tokenizer gives token {highest} on {title}, and the model has {vocabulary} tokens.",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            )
        return list(made), [np.array(lines, dtype=np.int32) for lines in zip(*made.values(), strict=True)]

    def _longest(self) -> int:
        """Tokens that the model reads: the tokenizer's word, or else the model's position embeddings."""
        positions = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if not isinstance(positions, int) or positions < 1:
            positions = 4096
        # The RoBERTa family counts positions from after the padding token's number.
        elif any(family in str(self.config.get("model_type")) for family in ("roberta", "camembert")):
            positions -= int(self.config.get("pad_token_id", 1)) + 1
        return min(int(self.tokenizer.model_max_length), positions)


#: Task name → class. A new task is one class here and its name in `hf_soup.recipe.Scoring`.
TASKS: dict[str, type[ImageClassification] | type[TextClassification]] = {
    "image-classification": ImageClassification,
    "text-classification": TextClassification,
}


def digest(content: NDArray[np.uint8] | tuple[str, ...]) -> bytes:
    """A hash of what a task reads from a row: equal rows have equal ones."""
    plain = repr(content).encode() if isinstance(content, tuple) else str(content.shape).encode() + content.tobytes()
    return hashlib.blake2b(plain, digest_size=16).digest()


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    if type(error).__name__ == "UnidentifiedImageError":  # Pillow's names an object at an address
        return "it is no image that Pillow can read"
    if isinstance(error, SystemExit):
        return f"it ends the process, by sys.exit({'' if error.code is None else repr(error.code)})"
    return str(error).strip().split("\n")[0] or type(error).__name__


def _of_donor(folder: Path, what: Kind, files: Sequence[str], automatic: Any, **options: Any) -> Any:
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


def _image_from_array(value: Any) -> Any:
    from PIL import Image

    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.kind not in "uif" or array.size == 0 or array.ndim < 2 or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"an array of {array.dtype} and shape {array.shape} where an image should be")
    if array.dtype.kind == "f" and array.max() <= 1:
        array = np.rint(array * 255)
    if not np.array_equal(array, np.clip(np.rint(array), 0, 255)):
        raise ValueError(f"pixels from {array.min():g} to {array.max():g}; whole numbers 0 to 255 are expected")
    return Image.fromarray(array.astype(np.uint8))
