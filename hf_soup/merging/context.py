"""Who works, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_soup.hub import Token
from hf_soup.merging.processes import ProcessGroup


@dataclass(frozen=True)
class RunContext:
    """Who works, and where.

    Args:
        token: As everywhere in huggingface_hub.
        device: Where models run; of ``auto`` it is the accelerator that torch has, or the CPU.
        threads: For averaging; by default one a core, and a few more where files must come from the disk.
        quiet: No progress bars.
        processes: Those that work together.
    """

    token: Token = field(default=None, repr=False)
    device: str = "cpu"
    threads: int | None = None
    quiet: bool = True
    processes: ProcessGroup = field(default_factory=ProcessGroup)

    def __post_init__(self) -> None:
        if self.device == "auto":
            import torch  # late: a check needs none

            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            object.__setattr__(self, "device", found.type if found else "cpu")
