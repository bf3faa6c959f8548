"""The model card: front matter that the Hub reads, and a page that a person reads.

Text from other people's cards is data here: it is written through a YAML writer into the front matter, and with
every character that Markdown or HTML would act on escaped into the page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from hf_soup._util.licenses import LICENSES, PERMISSIVE
from hf_soup._util.text import strings
from hf_soup._util.yaml import write_yaml
from hf_soup.checkpoint import PIPELINES, Checkpoint, num_labels
from hf_soup.errors import PublishError
from hf_soup.hub import is_repo_id, within_repo
from hf_soup.lineage import BaseReference
from hf_soup.publishing.merged_models import MergedModels
from hf_soup.recipe import DEPTH, SoupReport

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$])")
#: What makes a list, a rule or a heading where it begins a line, and what GitHub's Markdown makes a link of; some
#: readers look for that when backslashes are gone, so it is set apart as code.
_STARTS = re.compile(r"^(\d+(?=\.(?!\S))|)([-=.])")
_LINKS = re.compile(r"(?:://|(?<=www)\.|@(?=[-\w\\]+\.[-\w\\]))+", re.IGNORECASE)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
#: Where the recipe comes; no other text can hold it.
_RECIPE = "\0"
_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class License:
    """The licence of a soup.

    Args:
        fields: For the front matter.
        rows: Model and licence of every leaf and of the base.
        agreed: Whether there is nothing to warn of: all are the same, or each is a permissive one and is listed.
            Nothing is claimed about which licences go together.
    """

    fields: Mapping[str, str]
    rows: tuple[tuple[str, str], ...]
    agreed: bool


def license_of(merged: MergedModels) -> License:
    """The ingredients' licence when all agree, the base included; else ``other``, with a link to the card's table."""
    models: list[Checkpoint | BaseReference] = [leaf.checkpoint for leaf in merged.leaves.ingredients]
    models += [merged.lineage.ancestor] if merged.lineage.ancestor else []
    rows = tuple(dict.fromkeys((each.model, stated_license(each.card)) for each in models))
    found = list(dict.fromkeys(license for _, license in rows))
    # What is no single identifier, such as `other (its name)` or a list, is not for us to put in a word.
    if len(found) == 1 and found[0] in LICENSES - {"other", "unknown"}:
        return License({"license": found[0]}, rows, agreed=True)
    permissive = all(PERMISSIVE.fullmatch(each) for each in found)
    fields = {
        "license": "other",
        "license_name": "-and-".join(found) if permissive else "see-ingredients",
        "license_link": "https://huggingface.co/THIS_REPO#licenses",
    }
    return License(fields, rows, agreed=permissive)


def stated_license(card: Mapping[str, Any]) -> str:
    """As a card states it, spelled as the Hub spells it; a list is joined; empty where nothing is stated or read."""
    license = ", ".join(sorted(strings(card.get("license")))).lower()
    name = strings(card.get("license_name"))
    return f"{license} ({name[0]})" if license == "other" and name else license


def front_matter(title: str, models: MergedModels, report: SoupReport, license: License) -> dict[str, Any]:
    """What the Hub reads.

    Args:
        title: The soup's name, for ``model-index``.
        models: What it is of.
        report: What is told of it.
        license: From `license_of`.
    """
    lineage, leaves = models.lineage, [leaf.checkpoint for leaf in models.leaves.ingredients]
    bases = [place[0] for leaf in leaves if leaf.source.commit and (place := within_repo(leaf.model))]
    if not all(leaf.source.commit for leaf in leaves) and lineage.ancestor and lineage.ancestor.declared:
        # A folder has no address that a reader could follow, so its ancestor stands for it.
        bases.append(lineage.ancestor.model)
    if report.adapter and lineage.ancestor:
        bases = [lineage.ancestor.model]
    bases = [base for base in dict.fromkeys(bases) if not base.startswith("local:")]
    cards = [leaf.card for leaf in leaves]
    tags = [None if lineage.models.options.heads == "body" else card.get("pipeline_tag") for card in cards]
    known = report.tasks
    # What all say, as a class does not tell a ranker from a classifier; but no pipeline that does not take the class.
    agreed = len({str(tag) for tag in tags}) == 1 and isinstance(tags[0], str) and re.fullmatch(r"[a-z0-9-]+", tags[0])
    task = known[0] if known else None
    if agreed and (tags[0] in known or tags[0] not in PIPELINES or not known):
        task = tags[0]
    datasets = [name for card in cards for name in strings(card.get("datasets")) if is_repo_id(name)]
    languages = [name for card in cards for name in strings(card.get("language")) if _LANGUAGE.fullmatch(name)]
    results = _results(report)
    fields = {
        **license.fields,
        "library_name": report.library,
        "pipeline_tag": task,
        "base_model": bases,
        "base_model_relation": ("adapter" if report.adapter else "merge") if bases else None,
        "datasets": list(dict.fromkeys(datasets)),
        "language": list(dict.fromkeys(languages)),
        "tags": list(
            dict.fromkeys(["model-soup", "merge", "hf-soup", report.method, *(["lora"] if report.adapter else [])])
        ),
        "model-index": [{"name": title, "results": results}] if results else None,
    }
    return {key: value for key, value in fields.items() if value}


def _results(report: SoupReport) -> list[dict[str, Any]]:
    """``model-index`` entries of all test data; local data has the name of its loader where others have an id."""
    results = []
    for data in report.test:
        dataset = {"type": data.loader or data.dataset, "name": data.name, "split": data.split}
        dataset |= {"config": data.config, "revision": data.revision}
        value = round(report.scores["soup"][data.title].value, 6)
        results.append(
            {
                "task": {"type": data.task},
                "dataset": {key: value for key, value in dataset.items() if value},
                "metrics": [{"type": data.metric, "value": value, "name": data.metric}],
            }
        )
    return results


def escape(text: object) -> str:
    r"""Text that Markdown and HTML show as it is: one line, no markup, no link, nothing that cannot be seen.

    >>> print(escape("a|b <script> [x](y)"))
    a\|b \<script\> \[x\]\(y\)
    """
    seen = "".join(each if each.isprintable() else "\ufffd" for each in " ".join(str(text).split()))
    return _STARTS.sub(r"\1\\\2", _LINKS.sub(r"`\g<0>`", _MARKUP.sub(r"\\\1", seen)))


def render(
    title: str,
    models: MergedModels,
    report: SoupReport,
    *,
    recipe: str,
    files: Sequence[str] = (),
    functions: Sequence[str] = (),
) -> str:
    """The whole ``README.md`` of a soup.

    Args:
        title, models, report: As in `front_matter`.
        recipe: ``soup.yaml``.
        files: What it names that scores need and that is only on the cook's machine.
        functions: The cook's own, by which something was measured.
    """
    license, lineage, used = license_of(models), models.lineage, list(models.weights)
    fields = front_matter(title, models, report, license)
    known = re.fullmatch(r"[A-Za-z]\w*", report.architecture, re.ASCII)  # a stranger's text, in code to copy
    below = models.leaves.base.checkpoint if models.leaves.base else None
    of_leaves = [leaf.checkpoint.base.model for leaf in models.leaves.ingredients if leaf.checkpoint.base]
    body = _environment().get_template("card.md.j2").render(
        title=title, lineage=lineage, of_adapters=models.adapter is not None and models.adapter.is_of_adapters,
        base=_loaded(below, models.config) if below else "",
        used=used, license=license, report=report, recipe=_RECIPE, files=files, functions=functions,
        task=fields.get("pipeline_tag"),
        hidden=list(dict.fromkeys(name for name in (*used, *of_leaves) if name.startswith("local:"))),
        checkpoints={model.name: model.checkpoint for model in lineage.models.ingredients},
        # Samples of an adapter's rows are those of its base.
        adapters=(adapters := all(model.checkpoint.base for model in lineage.models.ingredients)),
        rounded=report.adapter or models.plan.layout.multiplied,
        compared=[] if adapters else [name for each in lineage.evidence if each.part == "body" for name in each.names],
        architecture=report.architecture if known else "AutoModel",
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
    )  # fmt: skip
    return _with_front_matter(fields, re.sub(r"\n{3,}", "\n\n", body).replace(_RECIPE, recipe))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_soup.publishing", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["md"] = escape
    environment.filters["setting"] = lambda value: escape(setting(value))
    environment.filters["address"] = _address
    environment.filters["without_advice"] = _without_advice
    environment.filters["licence"] = lambda leaf: escape(stated_license(leaf.card) or "not stated")
    return environment


def _loaded(base: Checkpoint, config: Mapping[str, Any]) -> str:
    """How the base of an adapter is loaded, as arguments in Python: with the outputs of a head that it has not."""
    named = [f'"{base.model}"', f'revision="{base.source.commit}"'] if base.source.commit else ['"BASE"']
    outputs = num_labels(config)
    if outputs is not None and outputs != num_labels(base.config):
        named += [f"num_labels={outputs}", "ignore_mismatched_sizes=True"]
    return ", ".join(named)


def _without_advice(message: str) -> str:
    """A finding without the sentences that tell what to type at a terminal.

    >>> _without_advice("The base is unknown. Name it with --base.")
    'The base is unknown.'
    """
    sentences = re.split(r"(?<=[.!?]) (?=[^a-z])", message)
    return " ".join(each for each in sentences if not re.search(r"--\w|hf-soup \w", each)) or message


def _address(checkpoint: Checkpoint) -> str:
    """Where the Hub shows a model at its commit."""
    repo, folder = within_repo(checkpoint.model) or (checkpoint.model, "")
    return f"https://huggingface.co/{repo}/tree/{checkpoint.revision}{f'/{folder}' if folder else ''}"


def setting(value: object) -> str:
    """A parameter's value, as people read it.

    >>> setting(0.5), setting({"depth": [0.2, 0.6, 1]})
    ('0.5', '0.2 to 0.6 to 1 from the first layer to the last')
    """
    if isinstance(value, Mapping) and isinstance(value.get(DEPTH), list):
        return f"{' to '.join(map(str, value[DEPTH]))} from the first layer to the last"
    return str(value)


def difference(report: SoupReport) -> str:
    """What an update changed, as Markdown, for a pull request; the card has it too.

    Raises:
        PublishError: The report was edited, and lacks the score of a model that was added.
    """
    try:
        return re.sub(r"\n{3,}", "\n\n", _environment().get_template("update.md.j2").render(report=report)).strip()
    except TemplateError:
        said = "soup.json lacks scores of a model that was added: it was edited."
        raise PublishError(said, hint="Cook the update again.") from None


def with_fields(card: str, fields: Mapping[str, Any], title: str, name: str) -> str:
    """A card with some fields of its front matter replaced, or taken out where they are None, and under another name.

    Args:
        card: Of a soup's folder.
        fields: That are replaced.
        title: That the card has, where nobody wrote another: the folder's name.
        name: In its place, and the one in ``model-index``.

    Raises:
        PublishError: Somebody edited the front matter, and it is no longer YAML.
    """
    found = _FRONT.match(card)
    try:
        matter = yaml.safe_load(found[1]) if found else {}
        merged = {**(matter or {}), **fields}
        merged["model-index"] = [{**entry, "name": name} for entry in merged.get("model-index") or ()] or None
    except (yaml.YAMLError, TypeError):
        said = "The front matter of README.md is not a YAML mapping."
        raise PublishError(said, hint="Mend it, or cook again.") from None
    body = (card[found.end() :] if found else card).lstrip("\n")
    if body.startswith(f"# {escape(title)}\n"):
        body = f"# {escape(name)}\n{body.partition(chr(10))[2]}"
    return _with_front_matter({key: value for key, value in merged.items() if value is not None}, body)


def _with_front_matter(fields: Mapping[str, Any], body: str) -> str:
    return f"---\n{write_yaml(dict(fields))}---\n\n{body}"
