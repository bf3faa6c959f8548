"""One local Hub with stand-ins of real models, made once for all tests that only read it or add to it."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_soup.local_hub import LocalHub

# pytest's importlib mode leaves the tests' own modules off the path.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long before the next attempt."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))


@pytest.fixture(scope="session")
def said_of_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("said")


@pytest.fixture
def home(said_of_configs: Path, tmp_path: Path) -> Path:
    """Where the test's processes keep things. What transformers says of a config depends on that alone: it is asked
    once for all tests, and most processes need not import it.
    """
    folder = tmp_path / "home" / "hf-soup"
    folder.mkdir(parents=True)
    (folder / "transformers").symlink_to(said_of_configs)
    return tmp_path / "home"


@pytest.fixture
def online(home: Path, online: LocalHub) -> LocalHub:
    return online


@pytest.fixture
def environment(home: Path, environment: dict[str, str]) -> dict[str, str]:
    return environment


@pytest.fixture(scope="session", autouse=True)
def _certificates() -> Iterator[None]:
    """They are read once, not for the client of every test: no Hub here speaks TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """Stand-ins of the models that the recipes name, and of others with their quirks."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    # Made by the first process of tests that needs it; each goes on with a copy of its own.
    with (shared / "zoo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "made-zoo").exists():
            _make(shared / "making-zoo")
            (shared / "making-zoo").rename(shared / "made-zoo")
    with LocalHub(shutil.copytree(shared / "made-zoo", tmp_path_factory.mktemp("zoo") / "hub")) as hub:
        yield hub


def _make(folder: Path) -> None:
    import stand_ins
    from huggingface_hub import constants
    from transformers.utils import logging

    logging.disable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    with LocalHub(folder) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the local Hub takes plain uploads
        stand_ins.make_all(hub)


@pytest.fixture(scope="session")
def resnets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/*.parquet``, handwritten digits, and ``run``: checkpoints of a tiny ResNet that learns them fast.

    Its weights move far between checkpoints, so the mean of their running statistics is not that of the mean weights.
    """
    import json

    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    from hf_soup.demo.digits_data import DIGITS, make_dataset, splits_of

    folder = tmp_path_factory.mktemp("resnets")
    make_dataset(folder / "digits")
    names = {name: number for number, name in enumerate(DIGITS)}
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", label2id=names,
        id2label=dict(enumerate(DIGITS)),
    )  # fmt: skip
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "size": {"height": 8, "width": 8},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5], "image_std": [0.5],
    }  # fmt: skip
    images, labels = splits_of(0)["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(1, 61):
            rows = torch.randperm(len(labels))[:50]
            optimizer.zero_grad()
            model(images[rows].sub(0.5).div(0.5), labels=labels[rows]).loss.backward()
            optimizer.step()
            if step in (40, 45, 50, 60):
                model.save_pretrained(folder / "run" / f"checkpoint-{step}")
                (folder / "run" / f"checkpoint-{step}" / "preprocessor_config.json").write_text(json.dumps(processor))
    for path in (folder / "digits" / "data").glob("*.parquet"):
        path.rename(folder / f"{path.name.partition('-')[0]}.parquet")
    return folder
