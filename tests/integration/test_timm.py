"""Models of timm as transformers saves them: their labels, and a processor that the config itself describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_soup import Recipe, check, cook

LABELS = ["cat", "dog", "eel"]
HEAD = "timm_model.fc.weight"


def prepared(**changes: Any) -> dict[str, Any]:
    return {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", **changes}


def made(folder: Path, labels: list[str], seed: int, **changes: Any) -> str:
    """A classifier that answers by its labels, as the others do, whatever order these are in."""
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    config = TimmWrapperConfig(architecture="resnet18", pretrained_cfg=prepared(**changes), **named)
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * each.std().nan_to_num(0.0) * torch.randn_like(each))
        for each in (model.timm_model.fc.weight, model.timm_model.fc.bias):
            each.copy_(each[[LABELS.index(label) for label in labels]] * 50)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """45 pictures of noise, brighter for every class, in a folder for each."""
    generator = np.random.default_rng(0)
    for number in range(45):
        place = tmp_path / "pictures" / LABELS[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 86 * (1 + number % 3), (36 + number % 3, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return tmp_path / "pictures"


def test_labels_in_another_order_move(tmp_path: Path) -> None:
    """They are `label_names`, which win over all else when the library reads the config."""
    a, b = made(tmp_path / "a", LABELS, 1), made(tmp_path / "b", LABELS[::-1], 2)
    lineage = check([a, b])
    assert lineage.verdict == "likely"
    assert "processing-absent" not in {reason.code for reason in lineage.reasons}
    assert any("labels stand in another order; rows of timm_model.fc" in note for note in lineage.models.notes)
    recipe = Recipe(ingredients=[a, b], labels=("eel", "cat", "dog"))
    soup = cook(recipe, tmp_path / "soup")
    model = AutoModelForImageClassification.from_pretrained(soup.folder)
    assert model.config.id2label == {0: "eel", 1: "cat", 2: "dog"}
    one, other = (load_file(Path(each) / "model.safetensors")[HEAD].double() for each in (a, b))
    assert torch.equal(model.timm_model.fc.weight, ((one[[2, 0, 1]] + other[[0, 2, 1]]) / 2).float())
    fewer = made(tmp_path / "c", LABELS[:2], 3)
    assert "3 labels against 2" in str(check([a, fewer]))


def test_they_are_scored_with_the_processor_of_the_config(
    cli: Callable[..., Any], tmp_path: Path, pictures: Path
) -> None:
    """As transformers itself answers."""
    models = [made(tmp_path / "a", LABELS, 1), made(tmp_path / "b", LABELS[::-1], 2)]
    done = cli("cook", *models, "-o", "soup", "--test", pictures, "--task", "image-classification", "--json")
    assert done.code == 0, done.err
    for name, place in (("soup", tmp_path / "soup"), ("local:a", models[0]), ("local:b", models[1])):
        model, right = AutoModelForImageClassification.from_pretrained(place).eval(), 0
        processor = AutoImageProcessor.from_pretrained(place)
        for file in sorted(pictures.rglob("*.png")):
            with torch.inference_mode():
                logits = model(**processor(Image.open(file), return_tensors="pt")).logits
            right += model.config.id2label[int(logits.argmax())] == file.parent.name
        assert done.json["scores"][name]["pictures accuracy"]["value"] == pytest.approx(right / 45)


def test_pictures_that_are_prepared_otherwise_are_refused(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", LABELS, 1), made(tmp_path / "b", LABELS, 2, mean=[0.4] * 3)
    lineage = check([a, b])
    assert [reason.code for reason in lineage.reasons if reason.refuses] == ["processing"]
    assert "local:a and local:b do not prepare pictures alike" in str(lineage)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "id2label" not in config
