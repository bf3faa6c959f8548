"""What the commands print for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_soup._util.text import first_sentences, printable, short

if TYPE_CHECKING:
    from hf_soup.hub import PushResult
    from hf_soup.publishing import Soup
    from hf_soup.recipe import SoupReport
    from hf_soup.workflows.connectivity import ConnectivityReport
    from hf_soup.workflows.search import FineTune, SearchResult
    from hf_soup.workflows.verify import VerificationReport


def plan(planned: Mapping[str, Any]) -> str:
    """What `preview` found."""
    lines = [
        f"verdict   {planned['verdict']}",
        *(f"model     {pinned}" for pinned in planned["ingredients"].values()),
        *(f"align     {note}" for note in planned["alignments"]),
        *(f"write     {name}  {size / 1e6:,.1f} MB" for name, size in planned["files"].items()),
        f"tensors   {planned['tensors']:,} in {planned['dtype']}",
        f"fetch     {planned['fetch_bytes'] / 1e6:,.1f} MB",
        f"output    {planned['output_bytes'] / 1e6:,.1f} MB",
    ]
    if again := planned["batch_norm"]:
        count = again["layers"]
        said = f"statistics of {count:,} layer{'s'[: count - 1]} of batch normalisation again, with {again['data']}"
        lines.append(f"collect   {said}")
    for title in ("output", "cache"):
        need, free = planned[f"{title}_disk_bytes"], planned[f"{title}_free_bytes"]
        lines.append(f"disk      {need / 1e9:,.2f} GB needed of {free / 1e9:,.1f} GB free ({title})")
    return "\n".join(lines)


def soup(soup: Soup) -> str:
    """What came out of a cook."""
    from hf_soup.evaluation import scored_with

    lines = []
    if soup.scores:
        lines += [
            f"{unit(soup.scores)}; * went into the soup.",
            "",
            table(soup.scores, soup.report.selected),
            "",
        ]
        lines += scored_with(soup.report.head_of)
        for title, each in soup.report.comparisons.items():
            lines.append(f"{title}: soup against {each.against}: {each.sentence}.")
        lines += ["", *_calibration(soup.report)]
    if update := soup.report.update:
        since = [f"{title}: new version against the last: {c.sentence}." for title, c in update.comparisons.items()]
        lines += [*since, update.sentence, ""]
    if soup.report.curve:
        tried = []
        for point in soup.report.curve:
            values = ", ".join(f"{name} {_shown(value)}" for name, value in point.parameters.items())
            tried.append(
                f"{values}: " + (f"{100 * point.score:.1f}" if soup.report.in_percent else f"{point.score:.4g}")
            )
        lines += [f"Tried on validation data: {'; '.join(tried)}.", ""]
    if stability := soup.report.stability:
        often = ", ".join(f"{name} {count}" for name, count in stability.chosen.items())
        lines += [*_wrapped(f"Stability: {stability.sentence}. Went in: {often}.", ""), ""]
    if adapter := soup.report.adapter:
        lines += [*_wrapped(adapter.sentence, ""), ""]
    if soup.report.copy_of:
        lines += [f"The selection kept one model, {soup.report.copy_of}: the soup is a copy of it.", ""]
    shares = ", ".join(f"{name} {weight:g}" for name, weight in soup.weights.items())
    lines += [f"Weights: {shares}", f"Digest:  {soup.digest}", f"Soup:    {soup.folder} ({soup.seconds:.1f} s)"]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def pushed(done: PushResult) -> str:
    """Where a soup went."""
    if done.pull_request is not None:
        return f"{'Offered' if done.changed else 'This soup is offered already'} in {done.pull_request}"
    if done.changed:
        return f"Pushed {done.repo} as commit {done.commit[:7]}: {done.url}"
    return f"{done.repo} holds this soup already, in commit {done.commit[:7]}: {done.url}"


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], marked: Sequence[str] = ()) -> str:
    """Scores as lines of text: a row for each model, a column for each data set, in percent with intervals.

    Args:
        results: Model → title → a score as plain data.
        marked: Models that get an asterisk.

    >>> print(table({"soup": {"test accuracy": {"value": 0.9, "low": 0.85, "high": 0.95, "n": 99}}}))
            test accuracy
      soup  90.0 (85.0 to 95.0)
    """
    titles = {title: score for scores in results.values() for title, score in scores.items()}
    rows = [["", *(f"{title}, less is better" if _less(score) else title for title, score in titles.items())]]
    called = dict(zip(results, short(list(results)) if max(map(len, results)) > _LONGEST else results, strict=True))
    for name, scores in results.items():
        cells = []
        for title in titles:
            cells.append(_score(scores[title]) if title in scores else "")
        rows.append([f"{called[name]} *" if name in marked else called[name], *cells])
    return "\n".join(_aligned(rows))


def _less(score: Mapping[str, Any]) -> bool:
    return bool(score.get("less_is_better"))


def _score(score: Mapping[str, Any]) -> str:
    value, *bounds = (
        f"{100 * each:.1f}" if score.get("share", True) else f"{each:.4g}"
        for each in (score["value"], score["low"], score["high"])
        if each is not None
    )
    return f"{value} ({' to '.join(bounds)})" if bounds else value


def unit(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What the numbers of a `table` are, as a sentence begins."""
    shares = {score.get("share", True) for scores in results.values() for score in scores.values()}
    return (
        "Percent, with 95 % intervals"
        if shares == {True}
        else "Scores (accuracies and the like in percent), with 95 % intervals"
    )


#: Letters of a name above which names in a table are shortened.
_LONGEST = 48


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells in columns, indented."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _calibration(report: SoupReport) -> list[str]:
    """How far probabilities can be believed, of soup, best ingredient and ensembles; and how errors differ."""
    lines = []
    for title, errors in report.diversity.items():
        rows = [["", "ECE", "NLL", "Brier"]]
        for name, found in report.calibration_errors.items():
            if name not in errors.models or name == report.best[title]:
                rows.append([name, *(f"{x:.3f}" for x in (found[title].ece, found[title].nll, found[title].brier))])
        lines += [f"Calibration on {title}; less is better.", *_aligned(rows)]
        mean = errors.mean
        if mean.disagreement is not None:
            shared = "" if mean.shared_errors is None else f", and share {mean.shared_errors:.0%} of their errors"
            lines.append(
                f"  Two ingredients answer {mean.disagreement:.1%} of the rows differently{shared} (mean of pairs)."
            )
        lines.append("")
    return lines


def fine_tunes(found: SearchResult) -> str:
    """The fine-tunes of a base, by group."""
    base = f"{found.base.partition('@')[0]}@{found.revision[:7]}"
    if not found.siblings:
        lines = [f"No model on the Hub names {base} in its card (`base_model`) as what it was fine-tuned from."]
        if found.parents:
            lines.append(f"It was itself made from another. Next: hf-soup search {found.parents[0]}")
        return "\n".join([*lines, f"Older cards do not say it. Next: hf-soup check MODEL... --base {found.base}"])
    grouped = sum(len(group.members) for group in found.groups)
    many = "1 group" if len(found.groups) == 1 else f"{len(found.groups)} groups"
    lines = [f"Fine-tunes of {base}: {len(found.siblings)} looked at, {grouped} in {many}."]
    if found.not_compared:
        lines += _wrapped(f"They were compared with one another and not with it: {printable(found.not_compared)}", "")
    rows = {each.id: _columns(each) for each in found.siblings}
    widths = [max(len(row[column]) for row in rows.values()) for column in range(3)]

    def line(each: FineTune) -> str:
        name, task, license, downloads = rows[each.id]
        cells = f"  {name:{widths[0]}}  {task:{widths[1]}}  {license:{widths[2]}}  {downloads:>9}"
        return f"{cells}  {_brief(each)}".rstrip()

    lines += ["", f"  {'':{widths[0]}}  {'task':{widths[1]}}  {'licence':{widths[2]}}  downloads"]
    for number, group in enumerate(found.groups, 1):
        members = [each for each in found.siblings if each.group == number]
        labels = _labelled(members[0].labels)
        alike = ", ".join(part for part in (_cut(members[0].architecture or "", 80), labels) if part)
        lines += ["", f"Group {number}, {group.verdict}: {alike}", *(line(each) for each in members)]
        # What keeps the base from being compared is said once, above.
        said = [each for each in group.reasons if not (found.not_compared and each.code == "base-unreadable")]
        codes = [reason.code for reason in said]
        for at, reason in enumerate(said):
            if reason.code not in codes[:at]:
                more = f" (and {codes.count(reason.code) - 1} more like this)" if codes.count(reason.code) > 1 else ""
                lines += _wrapped(f"[{reason.code}] {_cut(first_sentences(reason.message), 480)}{more}", "  ")
    for verdict, title in (("alone", "Like no other"), ("refused", "Refused"), ("unusable", "Not usable")):
        members = [each for each in found.siblings if each.verdict == verdict]
        if members:
            lines += ["", title, *(line(each) for each in members)]
    return "\n".join(lines)


def _columns(each: FineTune) -> tuple[str, str, str, str]:
    name = f"{each.id}@{each.revision[:7]}" if each.revision else each.id
    return name, _cut(each.task or "-", 30), _cut(each.license or "not stated", 30), f"{each.downloads:,}"


def _brief(each: FineTune) -> str:
    """Why a sibling is in no group, in a few words; a model like no other says what it is."""
    if each.verdict == "alone":
        return ", ".join(part for part in (_cut(each.architecture or "", 80), _labelled(each.labels)) if part)
    # Not where others are named with it: "acme/a and acme/b …" would become "and acme/b …".
    said = re.sub(rf"^'?{re.escape(each.id)}(@[0-9a-f]{{7}})?'?(: | (?=has |is )|, (?=file ))", "", each.why)
    return _cut(said.partition("\n")[0], 100)


def _labelled(labels: Sequence[str]) -> str:
    if not labels:
        return ""
    if all(re.fullmatch(r"label_\d+", label.strip().casefold()) for label in labels):
        return f"{len(labels)} labels without names"
    return f"{len(labels)} labels: {_cut(', '.join(labels), 60)}"


def _wrapped(text: str, indent: str, width: int = 110) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _cut(text: str, most: int) -> str:
    text = printable(text).replace("\n", "�")
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


#: Models whose matrix fits a screen, and pairs that do where it does not.
_MATRIX, _LISTED = 11, 12


def barriers(found: ConnectivityReport) -> str:
    """The matrix of barriers, or the highest of them where that does not fit a screen, and what follows."""
    names = list(found.scores)
    called = short(names)
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


#: Differences, and reasons, that a screen shows; `--json` has all.
_DIFFERENCES = 20


def verified(found: VerificationReport) -> str:
    """What came out of cooking a published soup again."""
    lines = [f"{found.verdict}: {found.model}"]
    if found.verdict == "identical":
        lines.append(
            f"All {found.tensors:,} tensors are the same bit by bit, and so are config and tokenizer or processor."
        )
        lines.append(f"Digest:  {found.digests['cooked']}")
    elif found.verdict == "equivalent":
        lines.append(
            f"{len(found.differences):,} of {found.tensors:,} tensors differ, within what its method promises."
        )
    elif found.digests and not found.differences:
        lines.append(f"All {found.tensors:,} tensors are the same bit by bit.")
    for each in found.differences[:_DIFFERENCES]:
        lines += _wrapped(f"- {_cut(each.name, 200)}: {printable(each.text)}", "  ")
    for reason in found.reasons[:_DIFFERENCES]:
        first, *rest = printable(reason.message).splitlines()
        lines += [*_wrapped(f"- [{reason.code}] {first}", "  "), *(f"    {line}" for line in rest)]
    hidden = max(0, len(found.differences) - _DIFFERENCES) + max(0, len(found.reasons) - _DIFFERENCES)
    lines += [f"  and {hidden:,} more in --json"] if hidden else []
    if found.scores:
        rows = [["", "published", "on the card", "measured", ""]]
        for one in found.scores:
            stated = (one.published, one.card, one.measured)
            shown = (None if x is None else f"{100 * x:.2f}" if one.share else f"{x:.5g}" for x in stated)
            cells = [each or "-" for each in shown]
            rows.append([_cut(one.title, 60), *cells, "" if one.agrees else "differs"])
        lines += ["", "Scores, shares of one in percent:", *_aligned(rows)]
    return "\n".join(lines)
