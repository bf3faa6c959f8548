"""Pictures, each of one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.parallel import usable_cores
from hf_soup._util.text import first_line
from hf_soup.checkpoint import TIMM
from hf_soup.errors import ScoringError
from hf_soup.evaluation.tasks.heads import HeadTask
from hf_soup.evaluation.tasks.task import of_donor
from hf_soup.recipe import Scoring


class ImageClassification(HeadTask):
    """Images through the donor's image processor, on Pillow, so that torchvision changes no number.

    ``num_channels`` of the donor's config (default 3) decides grey or RGB.
    """

    columns: ClassVar[Sequence[tuple[str, ...]]] = (("image",), ("img",))
    head: ClassVar[str] = "ForImageClassification"
    models: ClassVar[str] = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"
    #: Rows that are made together: few, as a photograph may have 50 MB of pixels.
    chunk: ClassVar[int] = 16

    def __init__(self, scoring: Scoring, folder: Path, config: Mapping[str, Any]) -> None:
        # Older releases hide it in the package itself where torchvision is not installed, which PIL does not need.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self.config = config
        channels = config.get("num_channels", 3)
        if channels not in (1, 3):
            raise ScoringError(f"The model reads images of {channels} channels; only 1 and 3 can be scored.")
        self.mode = "L" if channels == 1 else "RGB"
        #: Of timm the config says how pictures are prepared, and the processor takes and gives other types.
        self.timms = config.get("pretrained_cfg") if config.get("model_type") == TIMM else None
        files = ("config.json",) if self.timms else ("preprocessor_config.json", "processor_config.json")
        self.processor = of_donor(folder, "image processor", files, AutoImageProcessor, backend="pil")
        self.depends_on = [type(self.processor).__name__, self.mode, *([self.timms] if self.timms else [])]
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
            if self.timms:
                ready = self.processor([_image_from_array(content) for content in contents])
            else:
                ready = self.processor(list(contents), return_tensors="np", input_data_format="channels_last")
            return ["pixel_values"], list(np.asarray(ready["pixel_values"], dtype=np.float32))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            sizes = sorted({content.shape for content in contents})
            raise ScoringError(
                f"The donor's image processor fails on {title} (images of {sizes[:4]}): {first_line(error)}",
                hint="Check `do_resize`, `size` and the means in its preprocessor_config.json.",
            ) from error


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
