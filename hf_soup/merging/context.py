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
        device: Where models run.
        threads: For averaging; by default one a core, and a few more where files must come from the disk.
        quiet: No progress bars.
        processes: Those that work together.
    """

    token: Token = field(default=None, repr=False)
    device: str = "cpu"
    threads: int | None = None
    quiet: bool = True
    processes: ProcessGroup = field(default_factory=ProcessGroup)
