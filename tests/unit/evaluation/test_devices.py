"""Where models run: `auto`, and what does not fit is refused before it is fetched. No GPU is seen here."""

from __future__ import annotations

import pytest
import torch
from plans import make_plan

from hf_soup import ScoringError
from hf_soup.checkpoint import TensorInfo
from hf_soup.evaluation import memory, require_memory
from hf_soup.merging import RunContext

GPU = (3 << 30, 80 << 30)


def test_auto_is_the_accelerator_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert RunContext(device="auto").device == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert RunContext(device="auto").device == "mps"
    assert RunContext(device="cuda:1").device == "cuda:1"


def test_a_model_that_the_gpu_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion numbers in 16 bits: 2.1 GB to score, 8.6 GB with gradients in 32."""
    tensor = TensorInfo("w", "BF16", (1 << 30,), "m", 0, 2 << 30)
    layout = make_plan(["a", "b"], [{"w": tensor}] * 2, [1.0, 1.0]).layout
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: GPU)
    monkeypatch.setattr("hf_soup.evaluation.model.require_device", lambda device: None)
    monkeypatch.setattr(memory.Path, "read_text", lambda path: "MemAvailable: 999999999999 kB")
    require_memory(layout, device="cuda")
    require_memory(layout, learns=True)
    with pytest.raises(ScoringError, match=r"A model takes 8\.6 GB on 'cuda:0', where 3\.2 GB are free") as raised:
        require_memory(layout, learns=True, device="cuda:0")
    assert raised.value.code == "memory"
