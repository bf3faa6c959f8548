"""The data of the demo with digits: real handwritten digits as a data set repo, and drawn letters for the ancestor."""

from __future__ import annotations

import io
import json
import math
import string
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from hf_soup.demo.training import write_card

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Capitals, and the small letters that are no capitals of another size: 41 classes and no digit.
LETTERS = tuple(string.ascii_uppercase + "abdefghijmnqrty")

Split = tuple[Tensor, Tensor]  # pictures (n, 1, 8, 8) in [0, 1], labels (n,)


def make_dataset(folder: Path, seed: int = 0) -> None:
    """Write the digits as a data set repo: parquet files with 8×8 grey PNGs and class labels, and a card."""
    splits = splits_of(seed)
    (folder / "data").mkdir(parents=True)
    for name, split in splits.items():
        write_split(folder / "data" / f"{name}-00000-of-00001.parquet", split)
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    front = {
        "license": "cc-by-4.0",
        "pretty_name": "Handwritten digits, 8×8, with a shifted test",
        "task_categories": ["image-classification"],
        "size_categories": ["1K<n<10K"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    sizes = {name: len(labels) for name, (_, labels) in splits.items()}
    write_card(folder, front, _DATASET_CARD.format(seed=seed, **sizes))


def write_split(path: Path, split: Split) -> None:
    """Write digits as a parquet file, without `datasets`, whose features are only a line of metadata in it."""
    images, labels = split
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(DIGITS)}}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", picture), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": _png(image), "path": None} for image in images]
    pq.write_table(pa.table({"image": rows, "label": labels.tolist()}, schema=schema), path)


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def splits_of(seed: int) -> dict[str, Split]:
    """The digits in disjoint splits, in an order that the seed decides, and the test split once more, shifted."""
    digits = load_digits()
    # 8 bits as the PNGs have them, so that training sees the pictures that scoring will see.
    images = (torch.from_numpy(digits.images).float() / 16 * 255).round()[:, None] / 255  # (1797, 1, 8, 8)
    labels = torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    parts = dict(zip(("train", "validation", "test"), torch.split(order, [200, 450, len(order) - 650]), strict=True))
    splits = {name: (images[rows], labels[rows]) for name, rows in parts.items()}
    test, answers = splits["test"]
    splits["shifted"] = (_shifted(test, torch.Generator().manual_seed(seed)), answers)
    return splits


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a careless scanner gives them: turned, moved, scaled, half of them blurred, all noisy."""
    images = warp(images, generator, degrees=15, pixels=0.7, scale=(0.9, 1.1))
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1)), 3, stride=1)
    half = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(half, blurred, images)
    noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round() / 255


def draw_letters(count: int, generator: torch.Generator) -> Split:
    """Letters in Pillow's own font, made as the digits were: black and white 32×32, then counted in 4×4 blocks."""
    glyphs, answers = [], []
    for label, letter in enumerate(LETTERS):
        for size in (36, 40, 44):
            for stroke in (0, 1):
                picture = Image.new("L", (48, 48))
                font = ImageFont.load_default(size)
                ImageDraw.Draw(picture).text((24, 24), letter, 255, font, anchor="mm", stroke_width=stroke)
                glyphs.append(np.asarray(picture, dtype=np.float32) / 255)
                answers.append(label)
    drawn = torch.from_numpy(np.stack(glyphs))[:, None]  # (246, 1, 48, 48)
    rows = torch.randint(len(drawn), (count,), generator=generator)
    images = warp(drawn[rows], generator, degrees=15, pixels=2, scale=(0.75, 1.15), shear=0.25, middle=32 / 48)
    return functional.avg_pool2d((images > 0.5).float(), 4), torch.tensor(answers)[rows]


def warp(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float,
    pixels: float,
    scale: tuple[float, float],
    shear: float = 0.0,
    middle: float = 1.0,
) -> Tensor:
    """Turn, shear, scale and move each picture by an amount of its own, and keep the middle part of it.

    Args:
        images: ``(n, 1, side, side)``.
        generator: Where the amounts come from, all uniform.
        degrees, pixels, shear: Largest amounts in both directions.
        scale: Smallest and largest factor.
        middle: The share of the side that is kept.
    """
    n, _, side, _ = images.shape

    def amounts(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle = amounts(-math.radians(degrees), math.radians(degrees))
    factor = middle / amounts(*scale)
    slant = amounts(-shear, shear)
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    # The matrix goes from the output to the input, hence the reciprocal of the scale.
    x = torch.stack([cos, cos * slant - sin, amounts(-pixels, pixels) * 2 / side], dim=1)
    y = torch.stack([sin, sin * slant + cos, amounts(-pixels, pixels) * 2 / side], dim=1)
    out = round(side * middle)
    grid = functional.affine_grid(torch.stack([x, y], dim=1), [n, 1, out, out], align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


_DATASET_CARD = """
# Handwritten digits, 8×8, with a shifted test

The 1,797 digits of `sklearn.datasets.load_digits`: the test set of *Optical Recognition of Handwritten Digits*
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), written by 13
people, counted down from 32×32 black and white pixels to 8×8 and stored here as grey PNGs (0…16 becomes 0…255).

| split | pictures | |
|---|---|---|
| train | {train} | for fine-tuning |
| validation | {validation} | held out: for choosing among models and soups |
| test | {test} | looked at once, at the end |
| shifted | {shifted} | the pictures of `test`, disturbed |

Disturbed means turned by up to 15°, moved by up to 0.7 pixels, scaled by up to 10 %, half of them blurred 3×3, all
with Gaussian noise of 0.1. The first three splits are disjoint, in a random order (seed {seed}), and no two
pictures are equal. **The same 13 people wrote all of them**, so `test` says nothing about other people's hands;
and `shifted` is made from `test`, so the two are not independent.

Written by `hf-soup demo`; meant for that, not as a benchmark.
"""
