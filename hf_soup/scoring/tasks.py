"""What a task does with its inputs: one class a task, registered in `TASKS`.

A task reads a row into plain content (pixels or text, which are hashed to find equal rows) and turns the
contents of all rows into tensors once, so that every model sees the same ones.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.scoring.statistics import Ints

if TYPE_CHECKING:
    from torch import Tensor

#: Images are preprocessed so many at a time; it bounds memory and changes no number.
_CHUNK = 256


class Inputs(Protocol):
    """All rows of one data set, preprocessed, in memory."""

    def batches(self, batch_size: int) -> Iterator[tuple[Ints, dict[str, Tensor]]]:
        """Row numbers and the model's keyword arguments, every row once, in any order."""


class Task(Protocol):
    """One kind of model: how rows become inputs."""

    columns: ClassVar[Sequence[tuple[str, ...]]]
    model_class: ClassVar[str]

    def read(self, values: Sequence[Any]) -> Any:
        """The content of a row from the values of its input columns; ValueError where it is unreadable."""

    def digest(self, content: Any) -> bytes:
        """A hash of the content: equal rows have equal ones."""

    def preprocess(self, title: str, contents: Sequence[Any]) -> Inputs:
        """All rows as tensors."""


class ImageInputs:
    """``pixels`` is ``(n, channels, height, width)`` float32, in row order."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def batches(self, batch_size: int) -> Iterator[tuple[Ints, dict[str, Tensor]]]:
        """As `Inputs.batches`, in row order."""
        for start in range(0, len(self.pixels), batch_size):
            pixels = self.pixels[start : start + batch_size]
            yield np.arange(start, start + len(pixels)), {"pixel_values": pixels}


class ImageClassification:
    """Images through the donor's image processor, on Pillow, so that torchvision changes no number.

    Args:
        folder: Has ``preprocessor_config.json``.
        config: The donor's ``config.json``; ``num_channels`` (default 3) decides grey or RGB.

    Raises:
        ScoringError: The folder has no usable image processor.
    """

    columns: ClassVar[Sequence[tuple[str, ...]]] = (("image",), ("img",))
    model_class: ClassVar[str] = "AutoModelForImageClassification"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from transformers import AutoImageProcessor

        channels = config.get("num_channels", 3)
        if channels not in (1, 3):
            raise ScoringError(f"The model reads images of {channels} channels; only 1 and 3 can be scored.")
        self.mode = "L" if channels == 1 else "RGB"
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise ScoringError(
                "The donor has no preprocessor_config.json, so nobody says how its images are prepared.",
                hint="Put one beside its weights, for instance the ancestor's.",
            )
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a stranger's files, and no common class
            raise ScoringError(f"Cannot read the donor's image processor: {first_line(error)}") from error

    def read(self, values: Sequence[Any]) -> NDArray[np.uint8]:
        """``(height, width, channels)`` uint8 from a Pillow image, an array or nested lists.

        Arrays are ``(height, width)``, ``(height, width, channels)`` or ``(channels, height, width)``; whole
        numbers from 0 to 255, or floats from 0 to 1.

        Raises:
            ValueError: It is no image of 8 bits.
        """
        (value,) = values
        image = value if hasattr(value, "convert") else _image_from_array(value)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"an image of mode {image.mode}; convert it to 8 bits a channel")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        pixels = np.asarray(image.convert(self.mode))
        return pixels.reshape(*pixels.shape[:2], -1)

    def digest(self, content: NDArray[np.uint8]) -> bytes:
        """blake2b over shape and pixels, after conversion to the model's channels."""
        shape = str(content.shape).encode()
        return hashlib.blake2b(shape + content.tobytes(), digest_size=16).digest()

    def preprocess(self, title: str, contents: Sequence[NDArray[np.uint8]]) -> ImageInputs:
        """Run the image processor once over all rows.

        Raises:
            ScoringError: It fails, or gives images of several sizes.
        """
        import torch

        pixels: Tensor | None = None
        for start in range(0, len(contents), _CHUNK):
            chunk = list(contents[start : start + _CHUNK])
            try:
                given = self.processor(chunk, return_tensors="pt", input_data_format="channels_last")
                ready = given["pixel_values"].to(torch.float32)
                if pixels is None:
                    pixels = torch.empty((len(contents), *ready.shape[1:]), dtype=torch.float32)
                pixels[start : start + len(chunk)] = ready
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                sizes = sorted({content.shape for content in chunk})
                raise ScoringError(
                    f"The donor's image processor fails on {title} (images of {sizes[:4]}): {first_line(error)}",
                    hint="Check `do_resize`, `size` and the means in its preprocessor_config.json.",
                ) from error
        assert pixels is not None, "data.load refuses empty splits"
        return ImageInputs(pixels)


class TextInputs:
    """Token ids of every row, ``(tokens,)`` lists; padded when a batch is made."""

    def __init__(self, tokenizer: Any, rows: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        lengths = np.array([len(ids) for ids in rows["input_ids"]])
        # Long rows first: a batch too big for the memory fails at once. Stable: ties stay in row order.
        self.order = np.argsort(-lengths, kind="stable")
        self.can_pad = tokenizer.pad_token_id is not None

    def batches(self, batch_size: int) -> Iterator[tuple[Ints, dict[str, Tensor]]]:
        """As `Inputs.batches`, longest rows first; one row at a time where the tokenizer cannot pad."""
        step = batch_size if self.can_pad else 1
        for start in range(0, len(self.order), step):
            rows = self.order[start : start + step]
            chosen = {name: [values[row] for row in rows] for name, values in self.rows.items()}
            yield rows, dict(self.tokenizer.pad(chosen, return_tensors="pt"))


class TextClassification:
    """Texts, or pairs of texts, through the donor's tokenizer, cut at the longest that the model reads.

    Args:
        folder: Has the tokenizer's files.
        config: The donor's ``config.json``.

    Raises:
        ScoringError: The folder has no usable tokenizer.
    """

    columns: ClassVar[Sequence[tuple[str, ...]]] = (
        ("premise", "hypothesis"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text",),
        ("sentence",),
        ("content",),
    )
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        self.config = config
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
        if not any((folder / name).is_file() for name in names):
            raise ScoringError(
                f"The donor has no tokenizer (none of {', '.join(names)}).",
                hint="Put the tokenizer's files beside its weights, for instance the ancestor's.",
            )
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a stranger's files; tokenizers raises Exception itself
            raise ScoringError(f"Cannot read the donor's tokenizer: {first_line(error)}") from error

    def read(self, values: Sequence[Any]) -> tuple[str, ...]:
        """One text or two.

        Raises:
            ValueError: A value is no text.
        """
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{value!r} where a text should be")
        return tuple(values)

    def digest(self, content: tuple[str, ...]) -> bytes:
        """blake2b over the texts and their lengths."""
        text = "".join(f"{len(part)}:{part}" for part in content)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def preprocess(self, title: str, contents: Sequence[tuple[str, ...]]) -> TextInputs:
        """Tokenize all rows once.

        Raises:
            ScoringError: The tokenizer makes token numbers that the model has no embedding for.
        """
        columns = [list(column) for column in zip(*contents, strict=True)]
        rows = self.tokenizer(*columns, truncation=True, max_length=self._longest())
        vocabulary = self.config.get("vocab_size")
        highest = max((max(ids, default=0) for ids in rows["input_ids"]), default=0)
        if isinstance(vocabulary, int) and highest >= vocabulary:
            raise ScoringError(
                f"The donor's tokenizer gives token {highest} on {title}, and the model has {vocabulary} tokens.",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            )
        return TextInputs(self.tokenizer, rows)

    def _longest(self) -> int:
        """Tokens that the model reads: the tokenizer's word, or else the model's position embeddings."""
        said = int(self.tokenizer.model_max_length)
        positions = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if isinstance(positions, int) and positions > 0:
            # The RoBERTa family counts positions from after the padding token's number.
            if "roberta" in str(self.config.get("model_type")) or self.config.get("model_type") == "camembert":
                positions -= int(self.config.get("pad_token_id", 1)) + 1
            return min(said, positions)
        return min(said, 4096)


#: Task name → class. A new task is one class here and its name in `recipe.Scoring`.
TASKS: dict[str, type[ImageClassification] | type[TextClassification]] = {
    "image-classification": ImageClassification,
    "text-classification": TextClassification,
}


def _image_from_array(value: Any) -> Any:
    from PIL import Image

    with warnings.catch_warnings():
        # numpy warns about ragged lists in some versions and raises in others; both are the ValueError below.
        warnings.simplefilter("error")
        try:
            array = np.asarray(value)
        except Warning as warning:
            raise ValueError(str(warning)) from None
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3):
        raise ValueError(f"an array of shape {array.shape} where an image should be")
    if array.dtype.kind not in "uif" or not np.isfinite(array).all():
        raise ValueError(f"an array of {array.dtype} with values that are no pixels")
    if array.dtype.kind == "f" and array.max() <= 1:
        array = np.rint(array * 255)
    if array.min() < 0 or array.max() > 255 or not np.array_equal(array, np.rint(array)):
        raise ValueError(f"pixels from {array.min():g} to {array.max():g}; whole numbers 0 to 255 are expected")
    return Image.fromarray(array.astype(np.uint8))


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
