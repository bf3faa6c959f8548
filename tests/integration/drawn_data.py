"""Pictures of leaves and sentences about feelings, drawn at random, as data sets of the Hub hold them."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw

Files = dict[str, bytes]

LEAVES = ("angular_leaf_spot", "bean_rust", "healthy")
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")


def card(**front: object) -> bytes:
    """A model card with this front matter."""
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# A model\n".encode()


def draw_leaf(drawn: random.Random, label: int, *, green: bool = True) -> Image.Image:
    """A leaf on soil: 0 with a few large dark angular spots, 1 with many small red ones, 2 with hardly any."""
    picture = Image.new("RGB", (48, 48), (drawn.randint(80, 140), drawn.randint(70, 110), drawn.randint(50, 90)))
    paint = ImageDraw.Draw(picture)
    body = [drawn.randint(40, 110), drawn.randint(130, 200), drawn.randint(30, 90)]
    if not green:
        drawn.shuffle(body)
    leaf = [drawn.randint(0, 6), drawn.randint(0, 8), drawn.randint(41, 47), drawn.randint(39, 47)]
    paint.ellipse(leaf, fill=(body[0], body[1], body[2]))
    dark = (drawn.randint(50, 90), drawn.randint(40, 70), drawn.randint(10, 40))
    red = (drawn.randint(160, 220), drawn.randint(60, 100), drawn.randint(10, 50))
    for _ in range((drawn.randint(2, 4), drawn.randint(9, 16), drawn.randint(0, 1))[label]):
        x, y = drawn.randint(10, 36), drawn.randint(10, 36)
        if label == 0:
            paint.polygon([(x + drawn.randint(-9, 9), y + drawn.randint(-9, 9)) for _ in range(4)], fill=dark)
        else:
            paint.ellipse([x - 2, y - 2, x + 1, y + 1], fill=red)
    return picture


def leaves(split: str, count: int, *, green: bool = True) -> tuple[list[Image.Image], list[int]]:
    """The pictures of a split, and their classes."""
    labels = [number % 3 for number in range(count)]
    return [draw_leaf(random.Random(f"{split} {n}"), label, green=green) for n, label in enumerate(labels)], labels


def leaf_files() -> Files:
    """A data set as AI-Lab-Makerere/beans."""
    features = [{"name": "image_file_path", "dtype": "string"}, {"name": "image", "dtype": "image"}]
    features.append(_class_label("labels", LEAVES))
    files = {"README.md": card(license="mit", dataset_info={"features": features})}
    for split, count in (("train", 120), ("validation", 48), ("test", 48)):
        pictures, labels = leaves(split, count)
        paths = [f"/data/{split}/{LEAVES[label]}/{n}.png" for n, label in enumerate(labels)]
        structs = []
        for each in pictures:
            stream = io.BytesIO()
            each.save(stream, "PNG")
            structs.append({"bytes": stream.getvalue(), "path": None})
        rows: dict[str, list[Any]] = {"image_file_path": paths, "image": structs, "labels": labels}
        files[f"data/{split}-00000-of-00001.parquet"] = _parquet(features, rows)
    return files


_FEELINGS = (
    "sad lonely gloomy hopeless tearful numb empty",
    "happy cheerful glad delighted sunny proud merry",
    "loving tender caring fond adored gentle warm",
    "angry furious irritated bitter hateful mad rude",
    "afraid nervous scared anxious shaky timid alarmed",
    "amazed stunned surprised shocked curious dazed funny",
)
_THINGS = [
    "my friend",
    "this day",
    "the weather",
    "her letter",
    "our house",
    "that film",
    "the news",
    "his song",
    "the journey",
    "my work",
]
_OTHERS = [
    "i",
    "feel",
    "am",
    "was",
    "so",
    "very",
    "a",
    "bit",
    "really",
    "about",
    "because",
    "of",
    "and",
    "when",
    "hear",
    "think",
    "today",
    "now",
    "still",
    "again",
    ".",
    ",",
]


def vocabulary() -> list[str]:
    """The tokens of the small tokenizer."""
    words = [*" ".join(_FEELINGS).split(), *" ".join(_THINGS).split(), *_OTHERS]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *pieces]))


def sentences(split: str, count: int) -> tuple[list[str], list[int]]:
    """The sentences of a split, all different, and their classes."""
    drawn, found = random.Random(split), dict[str, int]()
    while len(found) < count:
        label = len(found) % 6
        word = drawn.choice(_FEELINGS[label].split())
        text = f"i {drawn.choice(['feel', 'am', 'was'])} {drawn.choice(['so', 'very', 'really', 'a bit'])} {word}"
        text += f" about {drawn.choice(_THINGS)} {drawn.choice(['today', 'now', 'still', 'again'])}"
        if drawn.random() < 0.6:
            text += f" and {drawn.choice(drawn.choice(_FEELINGS).split())}"
        found.setdefault(text, label)
    return list(found), list(found.values())


def sentence_files() -> Files:
    """A data set as dair-ai/emotion, with its two configurations."""
    features = [{"name": "text", "dtype": "string"}, _class_label("label", EMOTIONS)]
    sizes = {"split": {"train": 180, "validation": 96, "test": 96}, "unsplit": {"train": 60}}
    files, configs = Files(), []
    for config, splits in sizes.items():
        for split, count in splits.items():
            texts, labels = sentences(split if config == "split" else config, count)
            files[f"{config}/{split}-00000-of-00001.parquet"] = _parquet(features, {"text": texts, "label": labels})
        data = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        configs.append({"config_name": config, "data_files": data, "default": config == "split"})
    infos = [{"config_name": config, "features": features} for config in sizes]
    front = card(license="other", dataset_info=infos, configs=configs)
    return files | {"README.md": front}


def _parquet(features: Sequence[dict[str, Any]], rows: Mapping[str, list[Any]]) -> bytes:
    """A file of a data set; pictures are structs of bytes and path, as ``datasets`` writes them."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"string": pa.string(), "image": picture}
    columns = {
        each["name"]: pa.array(
            rows[each["name"]], types[each["dtype"]] if isinstance(each["dtype"], str) else pa.int64()
        )
        for each in features
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def _class_label(name: str, names: Sequence[str]) -> dict[str, Any]:
    """A column of classes in a data set's card."""
    return {"name": name, "dtype": {"class_label": {"names": {str(number): each for number, each in enumerate(names)}}}}
