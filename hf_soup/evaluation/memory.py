"""Memory that candidates take, asked for before anything is fetched for them."""

from __future__ import annotations

from pathlib import Path

from hf_soup.checkpoint import ITEM_BYTES
from hf_soup.errors import ScoringError
from hf_soup.merging import Layout


def require_memory(layout: Layout, *, learns: bool = False, device: str = "cpu") -> None:
    """Refuse a selection that would not fit into memory, before anything is fetched for it.

    The running sum takes the accumulator's 4 bytes a number for 16-bit weights and 8 for others; the candidate and
    the model that is built of it take what is stored, twice. Learning takes 12: `gradients.needed_bytes`. A GPU holds
    the model, or for learning the model and its gradients in float32.

    Raises:
        ScoringError: It does not fit.
    """
    need = sum(
        run.elements * ((4 if all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes) else 8) + 2 * ITEM_BYTES[run.dtype])
        for run in layout.runs
    )
    if learns:
        from hf_soup.evaluation.gradients import needed_bytes

        need = max(need, needed_bytes(layout))
    if device.startswith("cuda"):
        import torch

        from hf_soup.evaluation.model import require_device

        require_device(device)
        held = sum(run.elements * (8 if learns else ITEM_BYTES[run.dtype]) for run in layout.runs)
        room, _ = torch.cuda.mem_get_info(device)
        if held > room:
            raise ScoringError(
                f"A model takes {held / 1e9:.1f} GB on '{device}', where {room / 1e9:.1f} GB are free.",
                hint="Use `--device cpu`, or a larger GPU.",
                code="memory",
            )
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return  # not Linux: nothing says how much is free
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), need)
    if need > free:
        raise ScoringError(
            f"Scoring candidates takes {need / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free.",
            hint="Use `select: uniform` without `validation` and `test`, or a larger machine.",
            code="memory",
        )
