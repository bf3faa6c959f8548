"""What the commands print for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_soup.soup import Soup


def plan(planned: Mapping[str, Any]) -> str:
    """What `preview` found."""
    lines = [f"verdict   {planned['verdict']}"]
    lines += [f"model     {pinned}" for pinned in planned["ingredients"].values()]
    lines += [f"align     {note}" for note in planned["alignments"]]
    lines += [f"write     {name}  {size / 1e6:,.1f} MB" for name, size in planned["files"].items()]
    lines += [
        f"tensors   {planned['tensors']:,} in {planned['dtype']}",
        f"fetch     {planned['fetch_bytes'] / 1e6:,.1f} MB",
        f"output    {planned['output_bytes'] / 1e6:,.1f} MB",
    ]
    for title in ("output", "cache"):
        need, free = planned[f"{title}_disk_bytes"], planned[f"{title}_free_bytes"]
        lines.append(f"disk      {need / 1e9:,.2f} GB needed of {free / 1e9:,.1f} GB free ({title})")
    seconds = planned["estimated_seconds"]
    lines.append(
        f"time      about {_spoken(seconds['total'])} (fetching {_spoken(seconds['fetch'])}, merging "
        f"{_spoken(seconds['merge'])}, at the same time), beside start and scoring"
    )
    return "\n".join(lines)


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def soup(soup: Soup) -> str:
    """What came out of a cook."""
    from hf_soup.evaluation import table

    lines = []
    if soup.scores:
        lines += ["Percent, with 95 % intervals; * went into the soup.", "", table(soup.scores, list(soup.weights)), ""]
        for title, each in soup.summary["comparisons"].items():
            lines.append(f"{title}: soup against {each['against']}: {each['sentence']}.")
        lines.append("")
    shares = ", ".join(f"{name} {weight:g}" for name, weight in soup.weights.items())
    lines += [f"Weights: {shares}", f"Digest:  {soup.digest}", f"Soup:    {soup.folder} ({soup.seconds:.1f} s)"]
    return "\n".join(lines)
