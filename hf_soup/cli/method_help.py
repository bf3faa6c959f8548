"""What a method or a selection says of itself: its docstring in parts, for people and for scripts."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_soup.methods import Method
    from hf_soup.selection import Selection


WIDTH = 100
FORMULA = re.compile(r"^\.\. math:: (.+?)(?=\n\n|\n\S|\Z)", re.MULTILINE | re.DOTALL)
MARKUP = re.compile(r":math:`(?P<math>[^`]+)`|(?P<ticks>`{1,2})(?P<code>[^`]+)(?P=ticks)")


@dataclass(frozen=True)
class Explanation:
    """The parts of a docstring, as it was written.

    Args:
        summary: Its first sentence.
        text: What stands between that and the sections.
        arguments: What is said of each.
        sections: The text of every other section, by its title.
    """

    summary: str
    text: str
    arguments: Mapping[str, str]
    sections: Mapping[str, str]

    @property
    def formulas(self) -> list[str]:
        """LaTeX, without what is not displayed."""
        return [" ".join(found.split()) for found in FORMULA.findall(self.text)]

    @property
    def reference(self) -> str:
        """Where it comes from."""
        return self.sections.get("Reference", "")


def explanation(each: Method | Selection) -> Explanation:
    """The docstring of its function, in parts."""
    said = (inspect.getdoc(each.function) or "").partition("\n>>>")[0]
    first, *titled = re.split(r"^([A-Z][a-z ]+):\n(?= {4})", said, flags=re.MULTILINE)
    sections = {title: textwrap.dedent(text).strip() for title, text in zip(titled[::2], titled[1::2], strict=True)}
    summary, _, text = first.strip().partition("\n\n")
    given = re.split(r"^(\w+): ", sections.pop("Args", ""), flags=re.MULTILINE)[1:]
    arguments = {name: " ".join(text.split()) for name, text in zip(given[::2], given[1::2], strict=True)}
    sections = {title: " ".join(text.split()) for title, text in sections.items()}
    return Explanation(" ".join(summary.split()), text, arguments, sections)


def parameters(each: Method | Selection) -> list[tuple[str, str, str, str]]:
    """What a recipe may say: name, default, what values there are, and what it does."""
    said = explanation(each).arguments
    return [
        (name, written(default), values(getattr(each, "allowed", {}).get(name), default), said.get(name, ""))
        for name, default in each.parameters.items()
    ]


def written(value: Any) -> str:
    """A value, as recipes write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def values(allowed: Any, default: Any) -> str:
    """The values that a parameter may have, in words where they are no interval."""
    kind = {bool: "true, false", int: "whole numbers", float: "numbers"}.get(type(default), "words")
    if isinstance(allowed, tuple):
        return ", ".join(allowed)
    if allowed is None or str(allowed) == "(-inf, inf)":
        return kind
    return f"{allowed}, whole" if kind == "whole numbers" else str(allowed)


def exactness(method: Method) -> str:
    """Where the same recipe gives the same bytes."""
    if method.bound == 0:
        return "everywhere"
    far = "nobody says" if method.bound is None else f"up to {method.bound:g} of a tensor's largest magnitude off"
    return f"on one machine; on another {far}{', before rounding' if method.bound else ''}"


def as_data(chosen: Mapping[str, Sequence[Method | Selection]]) -> dict[str, list[dict[str, Any]]]:
    """Methods and selections as plain data."""
    return {title: [_data(each) for each in registry] for title, registry in chosen.items()}


#: What scripts may want to know of a method or a selection.
_TRAITS = ("elementwise", "needs_base", "bound", "least", "most", "ordered", "needs_score", "learns")


def _data(each: Method | Selection) -> dict[str, Any]:
    said = explanation(each)
    allowed = {
        name: list(values) if isinstance(values, tuple) else str(values)
        for name, values in getattr(each, "allowed", {}).items()
        if name in each.parameters
    }
    return {
        "name": each.name,
        "summary": plain(said.summary),
        "formula": said.formulas,
        "parameters": each.parameters,
        "allowed": allowed,
        "reference": said.reference,
        **{trait: getattr(each, trait) for trait in _TRAITS if hasattr(each, trait)},
    }


def listed(chosen: Mapping[str, Sequence[Method | Selection]]) -> str:
    """A line about each."""
    width = max(len(each.name) for registry in chosen.values() for each in registry) + 2
    lines = []
    for title, registry in chosen.items():
        key, mark = ("method", "needs the ancestor") if title == "methods" else ("select", "needs validation data")
        lines += ["", f"{title.capitalize()}, for `{key}` in a recipe; * {mark}"]
        for each in registry:
            star = " *" if getattr(each, "needs_base", False) or getattr(each, "needs_score", False) else ""
            lines.append(f"  {each.name + star:{width}}  {plain(explanation(each).summary)}")
    return "\n".join([*lines[1:], "", "`hf-soup methods NAME` has formula, parameters and source of one."])


def whole(each: Method | Selection) -> str:
    """All that is said of one that people who write recipes may want to know."""
    from hf_soup.selection import Selection

    said = explanation(each)
    parts = [each.name, *_paragraphs(f"{said.summary}\n\n{said.text}".strip())]
    rows = [("", "default", "values", ""), *parameters(each)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    indent = 2 + sum(widths) + 6
    table = []
    for row in rows[1:] and rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        table += _wrapped(plain(row[3]), f"  {cells}  ", " " * indent) or [f"  {cells}".rstrip()]
    parts.append("\n".join(["Parameters:", *table]) if table else "It has no parameters.")
    facts = {"Use it": said.sections.get("When", ""), "Not": said.sections.get("When not", "")}
    if isinstance(each, Selection):
        facts["Validation"] = "needed" if each.needs_score else "not needed"
    else:
        facts["Ingredients"] = f"{each.takes}, in their order" if each.ordered else each.takes
        facts["Ancestor"] = "needed" if each.needs_base else "not needed"
        facts["Same bytes"] = exactness(each)
    facts |= {"Refused": re.sub(r"\b[A-Z]\w+Error: ", "", said.sections.get("Raises", "")), "Source": said.reference}
    lines = [line for title, text in facts.items() for line in _wrapped(plain(text), f"{title:13}", " " * 13)]
    return "\n\n".join([*parts, "\n".join(lines)])


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of prose and displayed formulas, wrapped."""
    found = []
    for number, part in enumerate(FORMULA.split(text)):
        if number % 2:
            found.append(textwrap.indent(formula(part), "    "))
        else:
            found += ["\n".join(_wrapped(plain(each))) for each in part.strip().split("\n\n") if each.strip()]
    return found


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def plain(text: str) -> str:
    """Prose without markup.

    >>> plain("With ``density`` :math:`d`, **as** in `ties`: ``scope: model``, :math:`\\\\hat\\\\tau_i^2`.")
    "With density d, as in ties: 'scope: model', τ̂ᵢ²."
    """

    def shown(found: re.Match[str]) -> str:
        if found["math"]:
            return formula(found["math"])
        return found["code"] if re.fullmatch(r"[\w.]+|\".*\"", found["code"]) else f"'{found['code']}'"

    return MARKUP.sub(shown, re.sub(r"\*\*([^*]+)\*\*", r"\1", " ".join(text.split())))


_RAISED = str.maketrans("0123456789+-⊤", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀ")
_LOWERED = str.maketrans("0123456789ijkmnr", "₀₁₂₃₄₅₆₇₈₉ᵢⱼₖₘₙᵣ")
#: Stands for a space where a letter or a number follows or goes before.
_GAP = "\0"
_BEGINS = "A-Za-z0-9Α-Ωα-ωϕϵ∑⌊["


def formula(latex: str) -> str:
    """A formula in a line of text, or in one for each of its parts that \\\\qquad keeps apart.

    >>> print(formula(r"A = \\frac{\\sum_i w_i\\tau_i}{n-1}, \\qquad p = 2^{-24}"))
    A = (∑ᵢ wᵢ τᵢ) / (n-1),
    p = 2⁻²⁴
    """
    return "\n".join(_line(part) for part in latex.split(r"\qquad"))


def _line(latex: str) -> str:
    text = _to_text(latex)
    text = re.sub(r"\^\{([0-9+-]+)\}|\^([0-9+⊤-])", lambda found: (found[1] or found[2]).translate(_RAISED), text)
    text = re.sub(r"\^\{([^{}]+)\}", r"^(\1)", text)
    text = re.sub(r"_([0-9ijkmnr])", lambda found: found[1].translate(_LOWERED) + _GAP, text)
    text = re.sub(r"(_\{[^{}]*\})", rf"\1{_GAP}", text)
    text = re.sub(rf"(?<=[^\s(\[{{|‖⟨+/]){_GAP}+(?=[{_BEGINS}])", " ", text).replace(_GAP, "")
    text = re.sub(r" *([=≤≥≠≈←<>]) *", r" \1 ", text)
    text = re.sub(r"(?<=\S)\+ ", " + ", text)
    return re.sub(r"(?<=[(\[⌊]) | (?=[\]⌋])", "", " ".join(text.split()))


def _grouped(text: str) -> str:
    """In parentheses, where something beside it would look like a part of it."""
    return f"({text})" if re.search(r"[ ∑+-]", text) else text


def _to_text(latex: str) -> str:
    context, converter = _converter()
    from pylatexenc.latexwalker import LatexWalker

    return str(converter.nodelist_to_text(LatexWalker(latex, latex_context=context).get_latex_nodes()[0]))


@cache
def _converter() -> tuple[Any, Any]:
    """pylatexenc's, with fractions that keep together what they divide, and names of functions apart from the rest."""
    from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
    from pylatexenc.latexwalker import get_default_latex_context_db as get_parsed
    from pylatexenc.macrospec import std_macro

    def fraction(node: Any, l2tobj: Any) -> str:
        parts = (getattr(each, "nodelist", [each]) for each in node.nodeargd.argnlist)
        over, under = (_grouped(_line(l2tobj.nodelist_to_text(part))) for part in parts)
        return f" {over} / {under}" if " " in over + under else f"{_GAP}{over}/{under}"

    def named(node: Any, l2tobj: Any) -> str:
        return f"{_GAP}{l2tobj.nodelist_to_text([node.nodeargd.argnlist[-1]]).strip('{}')}{_GAP}"

    replaced: dict[str, Any] = {name: f"{_GAP}{name}{_GAP}" for name in ("arccos", "cos", "exp", "log", "sin")}
    replaced |= {"sum": f"{_GAP}∑", "dots": f"…{_GAP}", "ne": "≠", "frac": fraction, "operatorname": named}
    shown, parsed = get_default_latex_context_db(), get_parsed()
    shown.add_context_category("own", [MacroTextSpec(*each) for each in replaced.items()], prepend=True)
    parsed.add_context_category("own", [std_macro("operatorname", "*{")], prepend=True)
    return parsed, LatexNodes2Text(shown, math_mode="text", keep_braced_groups=True, keep_braced_groups_minlen=2)
