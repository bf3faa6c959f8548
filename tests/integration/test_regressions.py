"""What people who tried to break this found: each was wrong once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

import hf_soup
from hf_soup import MergeError, Recipe, RecipeError
from hf_soup.cli.arguments import data_of
from hf_soup.hub import download as transfer, repo as hub
from hf_soup.local_hub import LocalHub

Publish = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def copied(family: Path, name: str, target: Path, **front: object) -> Path:
    """A model of the family in another folder, with other fields in its card."""
    shutil.copytree(family / name, target)
    if front:
        (target / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# {target.name}\n")
    return target


@pytest.mark.usefixtures("online")
def test_two_tokens_that_changed_places(family: Path, tmp_path: Path) -> None:
    """No probe text shows it, and every input would mean something else."""
    other = copied(family, "b", tmp_path / "other")
    words = (other / "vocab.txt").read_text().split("\n")
    words[5], words[6] = words[6], words[5]
    (other / "vocab.txt").write_text("\n".join(words))
    lineage = hf_soup.check([str(family / "a"), str(other)])
    assert lineage.verdict == "refused"
    assert any("2 tokens have other numbers" in reason.message for reason in lineage.reasons)


def test_names_that_moved_are_known_offline(
    online: LocalHub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was resolved under an old name is found under it again when the Hub is away."""
    publish("a")
    online.store.rename("model", "acme/a", "acme/new")
    found = hub.resolve("acme/a")
    transfer.fetch_one(found, "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = hub.resolve("acme/a")
    assert (again.id, again.revision, again.from_cache) == ("acme/new", found.revision, True)


def test_an_ancestor_that_is_gone_contradicts_nobody(publish: Publish, family: Path, tmp_path: Path) -> None:
    """Nor do two ancestors on a card hide the one that is shared."""
    publish("base")
    publish("a")
    lost = publish("lost", copied(family, "b", tmp_path / "lost", base_model="gone/gone"))
    both = publish("both", copied(family, "c", tmp_path / "both", base_model=["gone/gone", "acme/base"]))
    lineage = hf_soup.check(["acme/a", lost])
    (reason,) = (reason for reason in lineage.reasons if reason.code == "base-undeclared")
    assert (lineage.verdict, reason.ingredients) == ("likely", (lost,))
    assert "(gone/gone is not there)" in reason.message
    assert hf_soup.check(["acme/a", both]).verdict == "proven"


@pytest.mark.usefixtures("online")
def test_weights_outside_the_transformer_are_not_lost(family: Path, tmp_path: Path) -> None:
    """A sentence encoder with a dense module is refused, not cut."""
    dense = copied(family, "b", tmp_path / "dense")
    (dense / "2_Dense").mkdir()
    (dense / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    lineage = hf_soup.check([str(family / "a"), str(dense)])
    assert "module-weights" in {reason.code for reason in lineage.reasons if reason.refuses}


@pytest.mark.usefixtures("online")
def test_a_folder_with_an_at_in_its_name(family: Path, tmp_path: Path) -> None:
    """What stands after the @ is no revision; and the number of torch's threads stays the caller's."""
    folder = copied(family, "b", tmp_path / "ckpt@1000")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        soup = hf_soup.cook([str(family / "a"), str(folder)], tmp_path / "soup")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert soup.weights == {"local:a": 1.0, "local:ckpt-1000": 1.0}
    assert soup.recipe.ingredients[1].model == "local:ckpt-1000"


@pytest.mark.usefixtures("online")
def test_weights_that_change_after_they_were_pinned(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a training run overwrites its checkpoint: no soup that contradicts its own recipe."""
    from hf_soup.merging import merge

    folder = copied(family, "b", tmp_path / "training")

    def meanwhile(*arguments: object, **options: object) -> object:
        os.utime(folder / "model.safetensors", ns=(1, 1))
        return merge(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("hf_soup.workflows.cook.merge", meanwhile)
    with pytest.raises(MergeError, match=r"'model.safetensors' changed while it was read"):
        hf_soup.cook([str(family / "a"), str(folder)], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.usefixtures("online")
def test_a_card_whose_licence_is_a_date(family: Path, tmp_path: Path) -> None:
    """YAML makes dates of some texts, and JSON knows none."""
    dated = copied(family, "b", tmp_path / "dated")
    (dated / "README.md").write_text("---\nlicense: 2001-01-01\n---\n")
    lineage = hf_soup.check([str(family / "a"), str(dated)])
    assert json.loads(json.dumps(lineage.to_dict()))["ingredients"][1]["license"] == "2001-01-01"


@pytest.mark.parametrize("value", ["2001-99-99", "!!int x", "!!bool x", "!!timestamp x", "!!set [1, 2]"])
def test_values_that_are_not_what_they_look_like(value: str) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.parse(f"ingredients: [a/b, a/c]\nseed: {value}\n")


@pytest.mark.parametrize(
    ("data", "dataset", "split"),
    [
        ("acme/data:validation[:500]", "acme/data", "validation[:500]"),
        ("acme/data:train[5:20]+test", "acme/data", "train[5:20]+test"),
        ("acme/data:validation", "acme/data", "validation"),
        ("acme/data", "acme/data", None),
    ],
)
def test_splits_on_the_command_line(data: str, dataset: str, split: str | None) -> None:
    (found,) = data_of([data], (), "text-classification", None)["validation"]
    assert (found["dataset"], found.get("split")) == (dataset, split)


def test_data_that_are_named_several_times_all_count(cli: Callable[..., Any], family: Path) -> None:
    """`--data`, `--test` and `--validation`, of `cook` and of `score`."""
    shutil.copy(family / "rows.csv", "more.csv")
    data = ("--task", "text-classification", "--data", family / "rows.csv", "--data", "more.csv")
    done = cli(
        "cook", family / "a", family / "b", "-o", "soup", "--test", family / "report.csv", "--test", "more.csv", *data
    )
    assert "'more.csv accuracy' is validation data and test data" in done.err
    done = cli("score", family / "a", *data, "--json")
    assert [list(scores) for scores in done.json["scores"].values()] == [["rows.csv accuracy", "more.csv accuracy"]]
    shutil.copy(family / "report.csv", "other.csv")
    done = cli(
        "cook", family / "a", family / "b", "-o", "soup", "--test", family / "report.csv", "--test", "other.csv", *data
    )
    assert [each.dataset for each in Recipe.load("soup/soup.yaml").test] == ["local:report.csv", "local:other.csv"], (
        done
    )
    assert [each.dataset for each in Recipe.load("soup/soup.yaml").validation] == ["local:rows.csv", "local:more.csv"]


@pytest.mark.usefixtures("online")
def test_a_name_that_is_too_long_for_a_file(family: Path) -> None:
    with pytest.raises(hf_soup.ResolveError, match="neither a folder nor a Hub id"):
        hf_soup.check([str(family / "a"), "x" * 300])


@pytest.mark.usefixtures("online")
def test_a_tokenizer_that_would_fill_the_disk(family: Path, tmp_path: Path) -> None:
    """It is refused for the size that the listing says, before it is fetched."""
    huge = copied(family, "b", tmp_path / "huge")
    with (huge / "tokenizer.json").open("wb") as file:
        file.truncate(600_000_000)  # a hole, which takes no room here
    with pytest.raises(hf_soup.ResolveError, match=r"tokenizer.json has 600,000,000 bytes"):
        hf_soup.check([str(family / "a"), str(huge)])
