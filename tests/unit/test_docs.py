"""The documentation says what the code does: commands and methods are generated, and links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from hf_soup.cli.app import cli
from hf_soup.cli.method_help import FORMULA, MARKUP, exactness, explanation, parameters
from hf_soup.methods import METHODS, Method
from hf_soup.recipe import JUDGEMENTS, Recipe, SoupReport
from hf_soup.selection import SELECTIONS

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "cli.md"
METHODS_PAGE = ROOT / "docs" / "methods.md"
#: JSON schemas of what people and programs read and write.
SCHEMAS = {ROOT / "docs" / "recipe.schema.json": Recipe, ROOT / "docs" / "soup.schema.json": SoupReport}
_HEAD = """# Command line
Made from `--help` by `python tests/unit/test_docs.py`; a test compares the two.

Exit codes: 0 done; 1 an error, explained on stderr (with `--json`: `{"error": {"type", "code", "message", "hint"}}` on
stdout); 2 wrong usage; 3 `check` refused, `verify` does
not confirm the soup, or `search -o` found no group; 130 interrupted, as by
Ctrl-C; 143 ended by SIGTERM, and 129 by SIGHUP. Results go to stdout, progress and warnings to stderr.

The `code` of an error says what a script may want to tell apart. Messages may be reworded, codes stay. An error that
has no finer code has that of its type.

| code | what it says |
|---|---|
| `soup` | a `SoupError` |
| `recipe` | a `RecipeError`: the recipe or the command line makes no sense |
| `resolve` | a `ResolveError`: a model or data cannot be found, read or trusted |
| `incompatible` | an `IncompatibleError`: the models cannot be averaged |
| `merge` | a `MergeError`: the average itself failed |
| `values` | a `ValuesError`: numbers that no average can be made of |
| `scoring` | a `ScoringError`: data cannot be used, or a score not be believed |
| `publish` | a `PublishError`: the soup could not be pushed |
| `address` | HF_ENDPOINT or a proxy is no address that can be used |
| `unreachable` | the Hub does not answer, or fails; later it may not |
| `rate-limit` | the Hub's limit of requests is reached |
| `offline` | offline mode is on, and the cache does not hold it |
| `hub` | the Hub, or what stands in its place, answers something that cannot be used |
| `token` | there is no token, or one that the Hub does not accept |
| `forbidden` | the token has no right to do this |
| `gated` | the owner asks for agreement to terms first |
| `gone` | there is no such repo, or it is private |
| `revision-gone` | the repo has no such branch, tag or commit |
| `no-file` | the repo has no such file |
| `name` | neither a folder nor a Hub id |
| `wrong-bytes` | what arrived is not what the Hub states; the same command may succeed |
| `adapter` | an adapter that is no plain LoRA, or not whole |
| `adapter-base` | the base of an adapter cannot be used, or does not fit it |
| `adapter-output` | of these models no adapter can be made |
| `no-config` | a model without a config.json |
| `no-weights` | a model without weights under the usual names |
| `pickle` | a model with pickles only: `allow_pickle` reads them |
| `quantised` | a quantised model |
| `no-base` | a method that needs the ancestor, which is not known or cannot be read |
| `refused` | the check refuses: `hf-soup check` gives the findings, which have codes of their own |
| `not-finite` | a model holds, or shows, a number that is not finite |
| `overflow` | the average is too large for the type that is written |
| `disk-full` | a disk is full, or has less room than is needed |
| `memory` | there is less memory than is needed |
| `exists` | the output exists, and nothing is overwritten |
| `busy` | another process works on the same output |
| `changed` | a file changed while it was read |
| `left` | another of the processes that work together has ended |
| `edited` | the weights are not those that were cooked: cook the soup again |
| `private-ingredients` | a public repo would name private models |
| `raced` | somebody else committed in between |
| `taken` | the repo or the tag is something else already: `--replace`, or another name |
"""


def reference() -> str:
    """The help of every command, one after the other."""
    parts = [_HEAD]
    whole = click.Context(cli, info_name="hf-soup", terminal_width=100, **cli.context_settings)
    contexts = [whole, *(click.Context(command, whole, name) for name, command in cli.commands.items())]
    for context in contexts:
        text = context.command.get_help(context).rstrip()
        parts.append(f"## {context.command_path}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


_METHODS_HEAD = r"""# Methods
Made from the docstrings by `python tests/unit/test_docs.py`; a test compares the two. `hf-soup methods NAME` has the
same at the terminal.

A recipe says `method: NAME`, or `method: {name: NAME, parameter: value}`. A list of numbers in the place of one is
tried on validation data, `{depth: [first, …, last]}` changes it over the layers, and `overrides` gives tensors a method
of their own ([selection](selection.md#tensors-combined-in-another-way)).

Here $`\theta_i`$ is a tensor of an ingredient, $`\theta_0`$ of the ancestor, $`\tau_i = \theta_i - \theta_0`$ the task
vector, $`w_i`$ the weight, $`n`$ the number of ingredients, $`\lambda`$ the parameter `scale`. What is elementwise is
computed in slices, after a pass over the tensor where it takes an angle, an energy or ranks of it; `della`, `regmean`
and the methods of singular values hold a whole tensor of every ingredient. Rows that one of them, or the ancestor,
does not have are the mean over those who do, by any method.
"""
#: What GitHub's math refuses, or its Markdown would take for its own.
_GITHUB = {
    r"\,": r"\thinspace ",
    r"\{": r"\lbrace ",
    r"\}": r"\rbrace ",
    r"\;": r"\enspace ",
    "<": r"\lt ",
    "|": r"\vert ",
}


def methods_page() -> str:
    """All built-in methods: a table to choose from, then what each says of itself."""
    built_in = [METHODS[name] for name in METHODS.built_in]
    table = ["| method | ancestor | elementwise | source | when to use it |", "|---|---|---|---|---|"]
    for method in built_in:
        name, said = method.name, explanation(method)
        when = re.split(r"[.:;](?: |$)", said.sections["When"])[0]
        author = re.split(r",", said.reference)[0]
        link = re.search(r"\((http\S+)\)|(https://[^\s,]+)", _markdown(said.reference))
        source = f"[{author}]({link[1] or link[2]})" if link else author
        traits = ("needed" if method.needs_base else "", "yes" if method.elementwise else "")
        table.append(f"| {' | '.join([f'[`{name}`](#{name})', *traits, source, _markdown(when)])} |")
    return "\n".join([_METHODS_HEAD, *table, "", *map(_section, built_in)])


def _section(method: Method) -> str:
    said = explanation(method)
    parts = [f"## {method.name}", said.summary]
    for number, part in enumerate(FORMULA.split(said.text)):
        if number % 2:
            parts.append(f"$$\n{_math(part)}\n$$")
        else:
            parts += [_markdown(each) for each in part.strip().split("\n\n") if each.strip()]
    if rows := parameters(method):
        lines = ["| parameter | default | values | |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {default} | {values} | {_markdown(about)} |" for name, default, values, about in rows]
        parts.append("\n".join(lines))
    takes = f"{method.takes} ingredients{', in their order' if method.ordered else ''}"
    facts = {
        "Use it": said.sections["When"],
        "Not": said.sections["When not"],
        "Takes": f"{takes}{', and their ancestor' if method.needs_base else ''}.",
        "Same bytes": f"{exactness(method)}.",
        "Refused": said.sections.get("Raises", "").removeprefix("ValueError: "),
        "Source": said.reference,
    }
    parts.append("\n".join(f"- **{title}:** {_markdown(text)}" for title, text in facts.items() if text))
    return "\n\n".join(map(str.strip, parts)) + "\n"


def _markdown(text: str) -> str:
    """Prose of a docstring, with GitHub's math, and links."""

    def shown(found: re.Match[str]) -> str:
        if found["math"]:
            return f"$`{_math(found['math'])}`$"
        return f"[`{found['code']}`](#{found['code']})" if found["code"] in METHODS else f"`{found['code']}`"

    text = MARKUP.sub(shown, " ".join(text.split()))
    text = re.sub(r"arXiv:([0-9.]+[0-9])", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"doi:(\S+\w)", r"[doi:\1](https://doi.org/\1)", text)


def _math(latex: str) -> str:
    latex = re.sub(r"\\operatorname\*?\{(\w+)\}", r"\\mathop{\\text{\1}}", " ".join(latex.split()))
    for given, taken in _GITHUB.items():
        latex = latex.replace(given, taken)
    return " ".join(latex.split())


def schema(kind: type[Recipe | SoupReport]) -> str:
    """The JSON schema of a value that is written to a file."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(draft | kind.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_schema_is_what_the_value_says(path: Path) -> None:
    """`python tests/unit/test_docs.py` writes it anew."""
    assert path.read_text() == schema(SCHEMAS[path])


def test_the_methods_page_is_what_docstrings_say() -> None:
    """`python tests/unit/test_docs.py` writes it anew."""
    assert METHODS_PAGE.read_text() == methods_page()


def test_every_selection_can_be_looked_up() -> None:
    table, comment = ((ROOT / "docs" / page).read_text() for page in ("selection.md", "recipe.md"))
    for name in SELECTIONS.built_in:
        assert f"\n| `{name}`" in table
        assert re.search(rf"select: .*\b{name}\b", comment)


def test_the_command_reference_is_what_help_says() -> None:
    """`python tests/unit/test_docs.py` writes it anew."""
    assert REFERENCE.read_text() == reference()


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link in the README, CONTRIBUTING and docs/ names a file that exists."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_of_a_documented_command_exists() -> None:
    """Command lines in the README and in docs/ use commands and options that there are."""
    options = {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in cli.commands.items()
    }
    found = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name, rest in re.findall(r"^(?:\$ )?hf-soup ([a-z]+)(.*)$", page.read_text(), re.MULTILINE):
            found += 1
            assert name in options, f"{page.name}: hf-soup {name}"
            used = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest.partition("#")[0]))
            assert used <= options[name] | {"--help"}, f"{page.name}: hf-soup {name}{rest}"
    assert found > 4


def test_every_code_of_a_finding_is_explained() -> None:
    """With a mark where `allow` takes it; `verify` has codes of its own, which its page explains."""
    page = (ROOT / "docs" / "lineage.md").read_text()
    rows = dict(re.findall(r"^\| <a id=\"([a-z-]+)\"></a>`\1` \| (✓?) ?\|", page, re.MULTILINE))
    assert {code for code, mark in rows.items() if mark} == JUDGEMENTS
    code = re.compile(r"(?:Finding|\.warn|\.refuse)\(\s*\"([a-z]+(?:-[a-z]+)*)\"")
    sources = [path for path in (ROOT / "hf_soup").rglob("*.py") if path.name != "verify.py"]
    assert {each for path in sources for each in code.findall(path.read_text())} == rows.keys()


if __name__ == "__main__":
    REFERENCE.write_text(reference())
    METHODS_PAGE.write_text(methods_page())
    for _path, _kind in SCHEMAS.items():
        _path.write_text(schema(_kind))
