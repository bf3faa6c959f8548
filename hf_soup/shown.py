"""What the commands print for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_soup import plots

if TYPE_CHECKING:
    from hf_soup.basin import Barriers
    from hf_soup.soup import Soup


def plan(planned: Mapping[str, Any]) -> str:
    """What `preview` found."""
    lines = [f"verdict   {planned['verdict']}"]
    lines += [f"model     {pinned}" for pinned in planned["ingredients"].values()]
    lines += [f"write     {name}  {size / 1e6:,.1f} MB" for name, size in planned["files"].items()]
    lines += [
        f"tensors   {planned['tensors']:,} in {planned['dtype']}",
        f"fetch     {planned['fetch_bytes'] / 1e6:,.1f} MB",
        f"output    {planned['output_bytes'] / 1e6:,.1f} MB",
    ]
    for title in ("output", "cache"):
        need, free = planned[f"{title}_disk_bytes"], planned[f"{title}_free_bytes"]
        lines.append(f"disk      {need / 1e9:,.2f} GB needed of {free / 1e9:,.1f} GB free ({title})")
    from hf_soup.progress import spoken

    seconds = planned["estimated_seconds"]
    lines.append(
        f"time      about {spoken(seconds['total'])} (fetching {spoken(seconds['fetch'])}, merging "
        f"{spoken(seconds['merge'])}, at the same time), beside start and scoring"
    )
    return "\n".join(lines)


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


#: Models whose matrix fits a screen, and pairs that do where it does not.
_MATRIX, _LISTED = 11, 12


def barriers(found: Barriers) -> str:
    """The matrix of barriers, or the highest of them where that does not fit a screen, and what follows."""
    names = list(found.scores)
    called = plots.short(names)
    lines = [f"Barriers on {found.title} (n = {found.n:,}), in points below the line between the ends; * counts.", ""]
    if len(names) <= _MATRIX:
        pairs = {(pair.first, pair.second): pair for pair in found.pairs}
        width = max(map(len, called))
        lines.append(f"  {'':{width + 3}}  score" + "".join(f"{number:6} " for number in range(1, len(names))).rstrip())
        for row, name in enumerate(names):
            line = f"  {row + 1:2} {called[row]:{width}}  {100 * found.scores[name]:5.1f}"
            for other in names[:row]:
                pair = pairs[other, name]
                line += f"{100 * pair.height:6.1f}{'*' if pair.barrier else ' '}"
            lines.append(line.rstrip())
    else:
        worst = found.highest[:_LISTED]
        lines.append(f"  The highest {len(worst)} of {len(found.pairs)}:")
        ends = [" – ".join(called[names.index(name)] for name in (pair.first, pair.second)) for pair in worst]
        width = max(map(len, ends))
        for pair, each in zip(worst, ends, strict=True):
            lines.append(f"  {each:{width}}  {pair.shown}{' *' if pair.barrier else ''}")
    return "\n".join([*lines, "", found.text])
