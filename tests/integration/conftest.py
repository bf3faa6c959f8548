"""One local Hub with stand-ins of real models, made once for all tests that only read it or add to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_soup.local_hub import LocalHub

# pytest's importlib mode leaves the tests' own modules off the path.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """Stand-ins of the models that the recipes name, and of others with their quirks."""
    import stand_ins
    from huggingface_hub import constants
    from transformers.utils import logging

    logging.disable_progress_bar()
    with LocalHub(tmp_path_factory.mktemp("zoo")) as hub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the local Hub takes plain uploads
            stand_ins.make_all(hub)
        yield hub
