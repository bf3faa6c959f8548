"""The card: licences, front matter that the Hub and its client take, and text of strangers that stays text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData
from hypothesis import given, settings, strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from plans import make_plan

from hf_soup._util.text import strings
from hf_soup._util.yaml import parse_yaml, write_yaml
from hf_soup.checkpoint import Checkpoint, LocalFolder, TensorInfo, TensorSource
from hf_soup.errors import PublishError
from hf_soup.lineage import AlignedModels, AlignmentOptions, BaseReference, LineageReport
from hf_soup.local_hub.card import problems
from hf_soup.merging import Plan
from hf_soup.publishing import MergedModels
from hf_soup.publishing.card import escape, license_of, render, with_fields
from hf_soup.recipe import Mixture, SoupReport

FEW = settings(deadline=None, derandomize=True, max_examples=30)


def model(name: str, **card: Any) -> Checkpoint:
    source = LocalFolder.of(Path(), [])
    return Checkpoint(name, config={}, card=card, source=source, weights=TensorSource({}, source))


def lineage_of(leaves: list[Checkpoint], ancestor: BaseReference | None) -> LineageReport:
    return LineageReport("likely", ancestor, AlignedModels.as_stored(leaves, AlignmentOptions()), ())


OTHER = {"license": "other", "license_link": "https://huggingface.co/THIS_REPO#licenses"}
SEE = {**OTHER, "license_name": "see-ingredients"}


@pytest.mark.parametrize(
    ("cards", "base", "fields", "agreed"),
    [
        ([{"license": "mit"}, {"license": "mit"}], {"license": "mit"}, {"license": "mit"}, True),
        ([{"license": "MIT "}, {"license": ["mit"]}], None, {"license": "mit"}, True),
        ([{"license": "cc-by-nc-4.0"}] * 2, None, {"license": "cc-by-nc-4.0"}, True),
        # Permissive ones are listed.
        ([{"license": "mit"}, {"license": "apache-2.0"}], None, {**OTHER, "license_name": "mit-and-apache-2.0"}, True),
        (
            [{"license": "bsd-3-clause"}, {"license": "cc0-1.0"}, {"license": "bsd-3-clause"}],
            {"license": "cc-by-4.0"},
            {**OTHER, "license_name": "bsd-3-clause-and-cc0-1.0-and-cc-by-4.0"},
            True,
        ),
        # Share alike, not for money, and no changes are not permissive; nor is what nobody knows.
        ([{"license": "mit"}, {"license": "cc-by-sa-4.0"}], None, SEE, False),
        ([{"license": "mit"}, {"license": "cc-by-nc-4.0"}], None, SEE, False),
        ([{"license": "mit"}, {"license": "cc-by-nd-4.0"}], None, SEE, False),
        ([{"license": "mit"}, {"license": "mit-0"}], None, SEE, False),
        ([{"license": "mit"}, {"license": "mit"}], {"license": "openrail"}, SEE, False),
        ([{"license": "mit"}, {"license": "mit"}], {}, SEE, False),
        ([{"license": "mit"}, {}], None, SEE, False),
        ([{}, {}], None, SEE, False),
        ([{"license": None}, {"license": 3}], None, SEE, False),
        ([{"license": "other"}, {"license": "other"}], None, SEE, False),
        ([{"license": "unknown"}], None, SEE, False),
        # The Hub would refuse the card.
        ([{"license": "my-own"}] * 2, None, SEE, False),
        ([{"license": "other", "license_name": "llama"}] * 2, None, SEE, False),
        ([{"license": ["mit", "apache-2.0"]}] * 2, None, SEE, False),
        ([{"license": "mit\n---\nevil: 1"}] * 2, None, SEE, False),
    ],
)
def test_a_licence_is_claimed_only_when_all_have_it(
    cards: list[dict[str, Any]], base: dict[str, Any] | None, fields: dict[str, str], agreed: bool
) -> None:
    """The base's included; nothing is said about which go together."""
    leaves = [model(f"acme/{number}", **card) for number, card in enumerate(cards)]
    ancestor = BaseReference("acme/base", "card", model("acme/base", **base)) if base is not None else None
    found = license_of(merged_models(lineage_of(leaves, ancestor)))
    assert (found.fields, found.agreed) == (fields, agreed)
    assert len(found.rows) == len(cards) + (base is not None)
    assert all("\n" not in text for _, text in found.rows)
    assert problems(f"---\n{yaml.safe_dump(dict(found.fields))}---\n") == []


def test_a_base_that_cannot_be_read_has_no_licence_that_is_known() -> None:
    found = license_of(merged_models(lineage_of([model("acme/a", license="mit")], BaseReference("acme/gated", "card"))))
    assert found.fields["license_name"] == "see-ingredients"
    assert found.rows == (("acme/a", "mit"), ("acme/gated", ""))


# ---- text of strangers --------------------------------------------------------------------------------------

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
#: What Markdown, HTML, YAML and templates act on, and pieces that belong together.
TEXT = st.lists(
    st.one_of(
        st.text(alphabet="ab1 \n\r\t\\`*_{}[]()<>#+-=!|~&$:.'\"@%^\0\x85\u2028\u202e", max_size=6),
        st.sampled_from(
            ["\n---\n", "\n\n# x\n", "```", "~~~~", "</td>", "<script>", "<!--", "| a |\n|---|", "![a](b)", "[a](b)",
             "&lt;", "{{ title }}", "{% raw %}", "\n    code", "\n- ", "1. ", "https://e.example", "<https://e.example>",
             "[a]: b", "THIS_REPO", "%TAG", "!!python/object", "*x*", "__x__", "$$x$$", "\n===\n"]
        ),
        st.text(max_size=5),
    ),
    min_size=1, max_size=5,
).map("".join).filter(str.strip)  # fmt: skip


def soup(text: Mapping[str, Any], **changes: Any) -> tuple[MergedModels, SoupReport, str]:
    """What a card is made of, with strangers' text wherever it can stand: in cards, names, labels and data."""
    from hf_soup.recipe import Finding

    stated = {"license": text["license"], "license_name": text["license"], "tags": [text["tag"]]}
    stated |= {"datasets": [text["dataset"]], "language": [text["language"]], "pipeline_tag": text["task"]}
    names = (f"local:a {text['name']}", "acme/b")
    ancestor = BaseReference(f"local:{text['base']}", "card", model("acme/base", license=text["license"]))
    leaves = [model(name, **stated) for name in names]
    for leaf in leaves:
        leaf.__dict__["revision"] = "sha256:" + "0" * 64  # as if it was read
    lineage = replace(lineage_of(leaves, ancestor), reasons=(Finding("processing", text["label"]),))
    title = f"{text['data']} accuracy"
    score = {"metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    scores = {name: {title: score} for name in ("soup", *names, "ensemble")}
    calibrated = {name: {title: {"ece": 0.1, "nll": 0.2, "brier": 0.3}} for name in scores}
    report = {"task": "text-classification", "dataset": f"local:{text['data']}", "name": f"local:{text['data']}"}
    report |= {"split": text["data"], "revision": "sha256:0", "metric": text["tag"], "title": title, "loader": "csv"}
    compared = {"metric": "accuracy", "difference": 0.0, "low": -0.1, "high": 0.1, "p": 1.0, "n": 10}
    compared |= {"sentence": f"no difference on {text['data']}", "significant": False}
    square = [[0.0, 0.0], [0.0, 0.0]]
    measures = ("disagreement", "double_fault", "shared_errors")
    values: dict[str, Any] = {
        "digest": "0" * 64, "weights": dict.fromkeys(names, 0.5), "selected": list(names), "method": "linear",
        "select": "uniform", "license_agreed": False,
        "parameters": {}, "overrides": [], "architecture": text["task"], "tasks": [], "library": "transformers",
        "validation": [title],
        "scores": scores, "best": {title: names[0]}, "calibration_errors": calibrated, "greedy_ensemble": [],
        "curve": [],
        "comparisons": {title: {**compared, "against": names[0]}},
        "diversity": {
            title: {"models": names, **dict.fromkeys(measures, square), "mean": dict.fromkeys(measures)},
        },
        "stability": {
            "repeats": 3, "chosen": {names[0]: 3}, "gains": [0.0], "mean": 0.0, "low": 0.0, "high": 0.0,
            "sentence": text["data"],
        },
        "test": [data(**report)], "notes": [text["label"]], "alignments": [text["label"]],
        "update": {
            "soup": f"local:{text['name']}", "revision": None, "added": [names[0]], "sentence": text["data"],
            "before": {title: score}, "after": {title: score}, "left_out": [text["label"]],
            "comparisons": {title: compared}, "helps": None,
        },
        "versions": {"hf-soup": "1"}, "system": "Linux", **changes,
    }  # fmt: skip
    recipe = write_yaml({"ingredients": list(names), "labels": [text["label"], text["name"]]})
    return merged_models(lineage), SoupReport.model_validate(values), recipe


def data(**stated: Any) -> dict[str, Any]:
    """Data as a report has it, of which no key is left out."""
    absent = dict.fromkeys(("config", "labels", "label_column", "input_columns"))
    return {**absent, "batch_size": 32, "weight": 1.0, "trust_remote_code": False, **stated}


def merged_models(lineage: LineageReport) -> MergedModels:
    """All of some models without tensors."""
    weights = dict.fromkeys(lineage.models.names, 0.5)
    groups = {name: {number: 1.0} for number, name in enumerate(lineage.models.names)}
    tensor = TensorInfo("x", "F32", (1,), "model.safetensors", 0, 4)
    layout = make_plan(["a"], [{"x": tensor}], [1.0]).layout
    return MergedModels(lineage, groups, lineage.models, Plan(layout, Mixture(weights)))


KEYS = ("license", "tag", "dataset", "language", "task", "name", "base", "label", "data", "title")


def card_of(text: Mapping[str, Any], **changes: Any) -> str:
    models, report, recipe = soup(text, **changes)
    return render(text["title"], models, report, recipe=recipe)


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and page, as huggingface_hub and the Hub cut them: at the first line of dashes."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = yaml.safe_load(found[1])
    return values, card[found.end() :]


#: What `escape` sets apart as code, so that nobody makes a link of what stands around it.
APART = re.compile(r"(://|\.|@)+")


def structure(page: Sequence[Token]) -> list[object]:
    """Everything but the text of a page, as a Markdown parser sees it: headings, cells, links, code and its kind."""
    found: list[object] = []
    for token in page:
        found.append((token.type, token.tag, token.info))
        for child in token.children or ():
            if child.type != "text" and not APART.fullmatch(child.content):
                found.append((child.type, child.attrs, child.content if child.type == "code_inline" else ""))
    return found


PLAIN = dict.fromkeys(KEYS, "word")


@cache
def _plain() -> tuple[dict[str, Any], list[object]]:
    front, page = split(card_of(PLAIN))
    return front, structure(MARKDOWN.parse(page))


@given(st.fixed_dictionaries(dict.fromkeys(KEYS, TEXT)))
@FEW
def test_a_page_has_the_same_parts_whatever_strangers_wrote(text: dict[str, str]) -> None:
    """No heading, cell, link, picture, code or tag more or less than with plain words."""
    front, page = split(card_of(text))
    parsed = MARKDOWN.parse(page)
    plain, expected = _plain()
    assert structure(parsed) == expected
    (recipe,) = [token.content for token in parsed if token.info == "yaml"]
    assert recipe == soup(text)[2]
    assert parse_yaml(recipe)["labels"] == [text["label"], text["name"]]
    assert not any(token.type.startswith("html") for token in parsed)
    assert "\0" not in page
    code = next(token.content for token in parsed if token.info == "python")
    assert re.fullmatch(r"from transformers import (\w+)\n\nmodel = \1\.from_pretrained\(\"THIS_REPO\"\)\n", code)
    assert set(front) <= set(plain) | {"datasets", "language", "pipeline_tag"}


@given(st.fixed_dictionaries(dict.fromkeys(KEYS, TEXT)))
@FEW
def test_front_matter_is_what_the_hub_and_its_client_take(text: dict[str, str]) -> None:
    """And comes back the same from both."""
    card = card_of(text)
    front, _ = split(card)
    assert problems(card) == []
    data = ModelCardData(**front)
    (result,) = data.eval_results or []
    assert result.metric_value == 0.5
    assert (result.dataset_type, result.dataset_name) == ("csv", f"local:{text['data']}")
    assert data.to_dict()["model-index"] == front["model-index"]
    assert front["tags"] == ["model-soup", "merge", "hf-soup", "linear"]


def test_a_fence_is_longer_than_any_in_the_recipe() -> None:
    """YAML folds long lines, so that one may begin with what was in the middle."""
    page = split(card_of({**PLAIN, "label": f"{'word ' * 22}````"}))[1]
    assert re.search(r"^  ````$", page, re.MULTILINE)
    assert structure(MARKDOWN.parse(page)) == _plain()[1]


@pytest.mark.parametrize("text", ["1e-5", "1E5", "-1.5e3", ".5e1", "0o17"])
def test_a_title_that_the_hub_would_take_for_a_number_is_quoted(text: str) -> None:
    """The Hub reads YAML 1.2, in which these are numbers, and a name has to be a text."""
    card = card_of({**PLAIN, "title": text})
    assert f"- name: '{text}'\n" in card
    assert split(card)[0]["model-index"][0]["name"] == text


@given(st.text(max_size=20))
@FEW
def test_what_is_written_as_yaml_can_be_seen_and_comes_back(text: str) -> None:
    """Characters that turn the order of a line would make a recipe look like another one."""
    hidden = {f"k{text}": [f"\u202e{text}\u200b", text], "b": text}
    written = write_yaml(hidden)
    assert written.replace("\n", "").isprintable()
    assert parse_yaml(written) == hidden


@pytest.mark.parametrize(
    "text", ["https://e.example", "WWW.e.example", "a@e.example", "a_b@e-e.example", "`://`", "://www.://a"]
)
def test_an_address_is_no_link(text: str) -> None:
    """Neither for readers that look for one before backslashes are taken out, nor for those that look after that."""
    parts = [part for token in MARKDOWN.parse(escape(text)) for part in token.children or ()]
    between = "".join("\0" if part.type == "code_inline" else part.content for part in parts)
    assert not re.search(r"https?://|www\.|[-.\w+]@[-\w]+\.", between, re.IGNORECASE)
    assert "".join(part.content for part in parts) == text


@pytest.mark.parametrize("text", ["0.7", "2024-01 data", "acme/a-v1.0, acme/b@1234567. Next", "p = 0.02"])
def test_ordinary_text_is_as_it_is(text: str) -> None:
    assert escape(text) == text


@given(st.text(max_size=40) | TEXT)
@FEW
def test_escaped_text_has_one_line_and_no_markup(text: str) -> None:
    """And comes back, but for spaces and what cannot be seen, when a Markdown reader takes the backslashes out."""
    shown = escape(text)
    assert "\n" not in shown
    seen = "".join(each if each.isprintable() else "\ufffd" for each in " ".join(text.split()))
    shown = re.sub(r"`((?:://|\.|@)+)`", r"\1", shown)
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown) == seen
    assert not re.search(r"(?<!\\)(\\\\)*[|<>`*_\[\]$&]", shown)
    shown = escape(text)
    for line in (f"- {shown}", f"{shown}", f"# {shown}", f"x {shown}"):
        parts = [child for token in MARKDOWN.parse(line) for child in token.children or ()]
        kinds = {part.type for part in parts if part.type != "code_inline" or not APART.fullmatch(part.content)}
        assert kinds <= {"text", "text_special"}
    assert len({token.type for token in MARKDOWN.parse(f"{shown}")} - {"paragraph_open", "inline"}) <= 1


# ---- what it says -------------------------------------------------------------------------------------------


def test_every_report_is_in_the_model_index() -> None:
    """Data of the Hub under its id, local data under the name of its loader."""
    plain = soup(PLAIN)[1].to_dict()
    hub = data(
        task="text-classification", dataset="dair-ai/emotion", name="dair-ai/emotion", split="test", config="split",
        revision="0" * 40, metric="f1_macro", title="emotion", loader=None,
    )  # fmt: skip
    at = ("word accuracy", "emotion")
    emotion = {"metric": "f1_macro", "value": 0.25, "low": 0.2, "high": 0.3, "n": 100}
    changes: dict[str, Any] = {"test": [*plain["test"], hub], "best": dict.fromkeys(at, "acme/b")}
    changes["scores"] = {name: {**each, "emotion": emotion} for name, each in plain["scores"].items()}
    calibrated = plain["calibration_errors"].items()
    changes["calibration_errors"] = {name: dict.fromkeys(at, each["word accuracy"]) for name, each in calibrated}
    changes["diversity"] = dict.fromkeys(at, plain["diversity"]["word accuracy"])
    card = card_of(PLAIN, **changes)
    local, other = ModelCardData(**split(card)[0]).eval_results or []
    assert (local.dataset_type, local.dataset_name, local.metric_value) == ("csv", "local:word", 0.5)
    assert (other.dataset_type, other.dataset_config, other.dataset_split) == ("dair-ai/emotion", "split", "test")
    assert (other.dataset_revision, other.metric_type, other.metric_value) == ("0" * 40, "f1_macro", 0.25)
    assert problems(card) == []


def test_a_soup_of_sentence_transformers_is_loaded_as_one() -> None:
    card = card_of(PLAIN, library="sentence-transformers", encoder="SentenceTransformer")
    assert split(card)[0]["library_name"] == "sentence-transformers"
    assert 'SentenceTransformer("THIS_REPO")' in card
    assert "from transformers import" not in card


def test_a_weight_is_called_a_share_only_in_an_average() -> None:
    """Of `ties` and `slerp` the parameters have a say too, and a plain sum has no shares."""

    def column(**changes: Any) -> str:
        table = card_of(PLAIN, **changes).split("## Ingredients\n\n")[1].split("\n\n")[0]
        return re.sub(r"\[.*?\)|`.*?`", "", table)

    assert "| share |" in column()
    assert "| 50 % |" in column()
    for method, parameters in (("ties", {"density": 0.5}), ("slerp", {"t": 0.2}), ("linear", {"normalize": False})):
        page = column(method=method, parameters=parameters)
        assert "| weight |" in page
        assert "| 0.5 |" in page
        assert "%" not in page


def test_a_parameter_that_changes_over_the_layers_is_told_in_words() -> None:
    page = card_of(PLAIN, method="wise_ft", parameters={"alpha": {"depth": [0.2, 1.0]}})
    assert "the mix by `wise_ft` with alpha = 0.2 to 1.0 from the first layer to the last of the weights" in page


def test_overrides_are_told() -> None:
    override = {"tensors": "*", "method": {"name": "wise_ft", "alpha": 0.1}}
    page = card_of(PLAIN, overrides=[override])
    assert "mix by `linear`, some tensors as `overrides` in the recipe says, of the weights of 2" in page
    one = {"acme/b": 1.0}
    for changes in ({"overrides": [override]}, {"parameters": {"normalize": False}}):
        models, report, recipe = soup(PLAIN, weights=one, **changes)
        assert "A copy of" not in render("one", models, report, recipe=recipe)


def test_what_was_not_checked_is_said() -> None:
    page = card_of(PLAIN)
    assert "## Environment" in page
    checked, unchecked = page.split("## What was checked, and what was not")[1].split("Not checked:")
    assert "The scores above, on the soup as it was written." in checked
    assert "nothing comparable was found" in unchecked
    page = card_of(PLAIN, scores={}, test=[], update=None)
    assert "- How well it does." in page.split("Not checked:")[1]


def test_languages_and_data_are_those_of_all() -> None:
    """What the Hub would refuse is left out."""
    text = {**PLAIN, "language": "en", "dataset": "acme/rows"}
    assert split(card_of(text))[0]["language"] == ["en"]
    assert split(card_of(text))[0]["datasets"] == ["acme/rows"]
    assert not {"language", "datasets"} & set(split(card_of({**PLAIN, "language": "zh-CN", "dataset": "my rows"}))[0])


def test_fields_are_lists_of_short_lines() -> None:
    assert strings("x" * 1000) == ["x" * 200]
    assert strings(["a"] * 1000) == ["a"] * 100
    assert strings({"a": 1}) == strings(None) == strings([None, 3, " \n"]) == []


def test_front_matter_is_changed_and_the_page_is_not() -> None:
    """Dashes inside it, and in the page, are not its end."""
    body = "# Soup\n\n---\n\n| a |\n---\nmore\n"
    card = f"---\nlicense: other\nlicense_name: 'x\n\n  ---\n\n  y'\ntags:\n- a---\n---\n\n{body}"
    changed = with_fields(card, {"license": "mit", "license_name": None, "language": ["de"]}, "soup", "mine")
    assert changed == f"---\nlicense: mit\ntags:\n- a---\nlanguage:\n- de\n---\n\n{body}"
    assert with_fields("# Mine\n", {"license": "mit"}, "soup", "other") == "---\nlicense: mit\n---\n\n# Mine\n"
    assert yaml.safe_load(with_fields(card, {}, "soup", "mine").split("\n---\n")[0][4:])["license_name"] == "x\n---\ny"


def test_a_card_is_pushed_under_the_name_of_its_repo() -> None:
    """Title and `model-index`; a title that somebody wrote stays."""
    matter = "model-index:\n- name: my_soup\n  results: []\n"
    for title, pushed in (("my\\_soup", "digits-soup"), ("Soup of the day", "Soup of the day")):
        changed = with_fields(f"---\n{matter}---\n\n# {title}\n\nA soup.\n", {}, "my_soup", "digits-soup")
        assert changed == f"---\n{matter.replace('my_soup', 'digits-soup')}---\n\n# {pushed}\n\nA soup.\n"


@pytest.mark.parametrize("matter", ["[", "- a", "just text", "a: b: c"])
def test_front_matter_that_is_none_is_said(matter: str) -> None:
    with pytest.raises(PublishError, match="not a YAML mapping"):
        with_fields(f"---\n{matter}\n---\n# Soup\n", {"license": "mit"}, "soup", "mine")
