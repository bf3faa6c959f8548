"""A published soup takes in more ingredients: from its leaves, compared with what it was, proposed to its owner."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import BertForSequenceClassification, BertTokenizer

from hf_soup import Recipe, Soup, Update, cook
from hf_soup.errors import IncompatibleError, RecipeError, ResolveError, SoupError
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
    pytest.mark.usefixtures("cli"),
]

Cli = Callable[..., Any]

FEELINGS = ["good", "great", "fine", "happy", "bad", "poor", "sad", "awful"]
THINGS = ["film", "book", "day"]
#: The feeling in front, as the family knows it, and in the middle, which only one contributor has trained on.
FRONT = [(f"{word} {thing}", number < 4) for number, word in enumerate(FEELINGS) for thing in THINGS]
MIDDLE = [
    (f"{thing} {word} {other}", number < 4)
    for number, word in enumerate(FEELINGS)
    for thing in THINGS
    for other in THINGS
]
UNSCORED: dict[str, Any] = {"validation": [], "test": []}
VALIDATION, REPORT = "acme/mood validation accuracy", "acme/mood test accuracy"


@pytest.fixture(scope="session")
def contributors(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tunes of the base: ``helps`` has learned what the family does not know, ``harms`` has its labels wrong."""
    folder = tmp_path_factory.mktemp("contributors")
    tokenizer = BertTokenizer.from_pretrained(family / "base")
    for name, rows, flipped in (("helps", MIDDLE, False), ("harms", FRONT, True)):
        tokens = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
        labels = torch.tensor([int(label is not flipped) for _, label in rows])
        model = BertForSequenceClassification.from_pretrained(family / "base").eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(30):
            optimizer.zero_grad()
            model(**tokens, labels=labels).loss.backward()
            optimizer.step()
        shutil.copytree(family / "a", folder / name)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def shelf(family: Path, contributors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Hub that has the family, its contributors' models, and data."""
    data, root = tmp_path_factory.mktemp("mood"), tmp_path_factory.mktemp("shelf") / "hub"
    for split, rows in (("validation", FRONT + MIDDLE[::2]), ("test", MIDDLE[1::2])):
        lines = [f"{text},{int(label)}" for text, label in rows]
        (data / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    folders = {name: family / name for name in ("base", "a", "b", "c")}
    folders |= {name: contributors / name for name in ("helps", "harms")}
    with LocalHub(root) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        for name, folder in {**folders, "mood": data}.items():
            kind = "dataset" if name == "mood" else "model"
            api.create_repo(f"acme/{name}", repo_type=kind)
            api.upload_folder(repo_id=f"acme/{name}", folder_path=folder, repo_type=kind)
    return root


@pytest.fixture
def local_hub(shelf: Path, tmp_path: Path) -> Iterator[LocalHub]:
    """A copy of it: a Hub changes no file, it puts another one in its place."""
    shutil.copytree(shelf, tmp_path / "hub", copy_function=os.link)
    with LocalHub(tmp_path / "hub", users={"t-acme": "acme", "t-mia": "mia"}) as hub:
        yield hub


def mood(split: str, **more: Any) -> dict[str, Any]:
    return {"task": "text-classification", "dataset": "acme/mood", "split": split, **more}


def recipe(**changes: Any) -> Recipe:
    """Of the first version."""
    return Recipe(
        **{"ingredients": ["acme/a", "acme/b"], "validation": mood("validation"), "test": mood("test"), **changes}
    )


def made(asked: Recipe | Update, folder: Path) -> Soup:
    return cook(asked, folder)


def first(tmp_path: Path, **changes: Any) -> Soup:
    """A first version of one's own, on the Hub."""
    soup = made(recipe(**changes), tmp_path / "v1")
    soup.push("acme/soup")
    return soup


@pytest.fixture
def v1(online: LocalHub, module_path: Path) -> Soup:
    """The first version, on the Hub and in a folder; every test's Hub has the same commits, so it is cooked once."""
    folder = module_path / "v1"
    soup = Soup.open(folder) if folder.exists() else made(recipe(), folder)
    soup.push("acme/soup")
    return soup


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_newcomer_that_helps(cli: Cli, v1: Soup, tmp_path: Path) -> None:
    """It goes in beside the leaves, byte for byte, and both versions are measured on the recipe's data."""
    done = cli("cook", "acme/soup", "--add", "acme/helps", "-o", "v2", "--quiet")
    assert done.code == 0
    said = (
        f"Adding acme/helps helps: the soup is better on {VALIDATION} than the last version. It is better on {REPORT}."
    )
    assert said in done.out
    assert f"{VALIDATION}: new version against the last: better by 30.0 points" in done.out
    by_hand = made(Recipe(ingredients=["acme/a", "acme/b", "acme/helps"]), tmp_path / "by hand")
    v2 = Soup.open(tmp_path / "v2")
    assert same_weights(v2.folder, by_hand.folder)
    assert v2.digest == by_hand.digest
    assert v2.recipe.to_dict() == by_hand.recipe.to_dict() | {
        key: value for key, value in v1.recipe.to_dict().items() if key in ("validation", "test")
    }
    update = v2.report.update
    assert (update.soup, update.added, update.helps) == ("acme/soup", ("acme/helps",), True)
    assert update.before == v1.report.scores["soup"] == v2.report.scores["last version"]
    assert update.after == v2.report.scores["soup"]
    assert [each.difference for each in update.comparisons.values()] == [0.3, 0.5]
    card = (v2.folder / "README.md").read_text()
    assert f"acme/soup/tree/{update.revision}" in card
    lines = card[card.index("## Against the last version") : card.index("## Ingredients")].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[0] for row in table] == ["model", "---", "last version", "acme/helps, alone", "**new version**"]
    assert [[cell.split()[0] for cell in row[1:]] for row in table[2:]] == [["70.00", "50.00"], *2 * [["100.00"] * 2]]


@pytest.mark.usefixtures("v1")
def test_a_newcomer_that_does_not_help(cli: Cli, tmp_path: Path) -> None:
    """It is said, in the card too, and is no error: the soup is there, and what becomes of it is for people to say."""
    worse = f"Adding acme/harms does not help: the soup is worse on {VALIDATION} than the last version."
    unseen = (
        f"That adding acme/c helps cannot be shown: no difference from the last version can be seen on {VALIDATION}."
    )
    for newcomer, helps, said in (("harms", False, worse), ("c", None, unseen)):
        done = cli("cook", "acme/soup", "--add", f"acme/{newcomer}", "-o", newcomer, "--quiet", "--json")
        assert done.code == 0
        assert (done.json["update"]["helps"], done.json["update"]["sentence"]) == (helps, said)
        assert done.json["pushed"] is None
        assert said in (tmp_path / newcomer / "README.md").read_text()


def test_a_soup_whose_weights_were_learned_from_inputs_alone(cli: Cli, tmp_path: Path) -> None:
    """A newcomer has the mean of what was learned for each tensor; nothing is learned again or warned of."""
    few = {"name": "entropy", "steps": 2, "examples": 8}
    v1 = first(tmp_path, select=few, base_model="acme/base", calibration=mood("validation"), validation=[], test=[])
    done = cli("cook", "acme/soup", "--add", "acme/c", "-o", "v2", "--quiet")
    assert (done.code, "calibration" in done.err) == (0, False), done
    old, new = v1.recipe, Soup.open(tmp_path / "v2").recipe
    assert new.method == old.method
    assert new.tensor_weights
    assert new.tensor_weights == {pattern: (*shares, sum(shares) / 2) for pattern, shares in old.tensor_weights.items()}
    assert cli("verify", "v2").code == 0


def test_several_newcomers_and_a_second_update(cli: Cli, tmp_path: Path) -> None:
    """Whatever the way: at once, one after the other, from a repo at a tag or from a folder; or with a soup of them."""
    first(tmp_path, **UNSCORED)
    assert cli("cook", "acme/soup@main", "--add", "acme/c", "--add", "acme/helps", "-o", "both").code == 0
    assert cli("cook", "acme/soup", "--add", "acme/c", "-o", "v2").code == 0
    assert cli("cook", "v2", "--add", "acme/helps", "-o", "v3").code == 0
    by_hand = made(Recipe(ingredients=["acme/a", "acme/b", "acme/c", "acme/helps"]), tmp_path / "by hand")
    assert same_weights(tmp_path / "both", by_hand.folder)
    assert same_weights(tmp_path / "v3", by_hand.folder)
    v3 = Soup.open(tmp_path / "v3")
    assert (v3.report.update.soup, v3.report.update.revision) == ("local:v2", None)

    other = made(Recipe(ingredients=["acme/c", "acme/helps"]), tmp_path / "other")
    other.push("acme/other")
    assert cli("cook", "acme/soup", "--add", "acme/other", "-o", "soups").code == 0
    weights = {"acme/a": 2.0, "acme/b": 2.0, "acme/c": 1.0, "acme/helps": 1.0}
    soups = Soup.open(tmp_path / "soups")
    assert soups.weights == weights
    by_hand = made(
        Recipe(ingredients=[{"model": name, "weight": weight} for name, weight in weights.items()]),
        tmp_path / "weighted",
    )
    assert same_weights(soups.folder, by_hand.folder)


@pytest.mark.parametrize(
    ("changes", "longer"),
    [
        (
            {
                "ingredients": [{"model": "acme/a", "weight": 3}, {"model": "acme/b", "weight": 0.1}],
                "method": {"name": "wise_ft", "alpha": 0.7}, "vocabulary": "union", "dtype": "bfloat16", **UNSCORED,
            },
            {"ingredients": [3, 0.1, 1.55]},
        ),
        ({"method": {"name": "task_arithmetic", "scale": 0.4}, "heads": "acme/b", **UNSCORED}, {}),
        (
            {"tensor_weights": {"*.layer.1.*": [1, 0], "*": [0.5, 1]}, "heads": "body", **UNSCORED},
            {"tensor_weights": {"*.layer.1.*": [1, 0, 0.5], "*": [0.5, 1, 0.75]}},
        ),
        (
            {
                "labels": ["positive", "negative"],
                "test": [],
                "validation": mood("validation", labels=["negative", "positive"]),
            },
            {},
        ),
    ],
    ids=["wise_ft", "task_arithmetic", "layers", "labels"],
)  # fmt: skip
def test_everything_in_the_recipe_stays(tmp_path: Path, changes: dict[str, Any], longer: dict[str, Any]) -> None:
    """The update is the cook of the longer recipe, and the last version is measured as it was."""
    v1 = first(tmp_path, **changes)
    v2 = made(Update.of("acme/soup", ["acme/c"]), tmp_path / "v2")
    models, weights = ["acme/a", "acme/b", "acme/c"], longer.get("ingredients", [1, 1, 1])
    by_hand = made(
        recipe(
            **changes
            | longer
            | {"ingredients": [{"model": m, "weight": w} for m, w in zip(models, weights, strict=True)]}
        ),
        tmp_path / "by hand",
    )
    assert same_weights(v2.folder, by_hand.folder)
    assert v2.recipe == by_hand.recipe
    if v1.scores:
        assert v2.report.update.before == v1.report.scores["soup"]
        assert v2.report.update.after == by_hand.report.scores["soup"]
    else:
        assert v2.report.update.sentence == "Whether adding acme/c helps was not measured, as there is no data."


@pytest.mark.usefixtures("v1")
def test_data_that_is_gone_is_left_out(cli: Cli, local_hub: LocalHub) -> None:
    HfApi(endpoint=local_hub.endpoint, token="t-acme").delete_repo("acme/mood", repo_type="dataset")
    done = cli("cook", "acme/soup", "--add", "acme/helps", "-o", "v2", "--quiet")
    assert done.code == 0
    assert f"note: '{REPORT}' is not measured. " in done.err
    assert "Whether adding acme/helps helps was not measured, as there is no data." in done.out


@pytest.mark.filterwarnings("ignore:Glyph")
def test_data_that_was_local_is_left_out_or_given_anew(cli: Cli, family: Path, tmp_path: Path) -> None:
    """And names of data do not steer the terminal."""
    local = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    red = mood("test", name="\x1b[31mred\x07")
    first(tmp_path, validation=local, test=[red, {**local, "dataset": str(family / "report.csv")}])
    done = cli("cook", "acme/soup", "--add", "acme/helps", "-o", "v2", "--quiet")
    assert done.code == 0
    soup = Soup.open(tmp_path / "v2")
    (title,) = soup.report.update.after
    assert "�[31mred� accuracy" in done.out
    assert not {"\x1b", "\x07"} & {*done.out, *done.err}
    assert "\x1b" not in (tmp_path / "v2" / "README.md").read_text()
    for name in ("rows.csv", "report.csv"):
        assert f"note: 'local:{name} accuracy' is not measured." in done.err
        assert f"local:{name} accuracy" in "".join(soup.report.update.left_out)
    assert "'local:rows.csv accuracy' is not measured." in (tmp_path / "v2" / "README.md").read_text()
    given = cli("cook", "acme/soup", "--add", "acme/helps", "-o", "given", "--quiet", "--data", family / "rows.csv",
                "--task", "text-classification")  # fmt: skip
    assert "rows.csv accuracy' is not" not in given.err
    assert set(Soup.open(tmp_path / "given").report.update.after) == {"rows.csv accuracy", title}
    assert same_weights(tmp_path / "v2", tmp_path / "given")


def test_pictures_of_the_last_version_do_not_stop_the_offer(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Whoever has not its data draws none; what was learned or tried is not learned or tried again."""
    first(tmp_path, validation={"task": "text-classification", "dataset": str(family / "rows.csv")}, test=[],
          method={"name": "wise_ft", "alpha": [0.5, 1.0]})  # fmt: skip
    assert {path.name for path in (tmp_path / "v1" / "plots").iterdir()} == {
        "scores.png", "scores-dark.png", "curve.png"
    }  # fmt: skip
    done = cli("cook", "acme/soup", "--add", "acme/helps", "-o", "v2", "--quiet")
    assert done.code == 0, done.err
    assert cli("push", "v2", "acme/soup", "--pr").code == 0
    assert cli("verify", "acme/soup@refs/pr/1").code == 0


@pytest.mark.usefixtures("short_pauses")
def test_without_the_hub_the_last_version_may_be_an_old_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(tmp_path, **UNSCORED)
    assert cli("cook", "acme/soup", "--add", "acme/c", "-o", "v2", "--quiet").code == 0
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = cli("cook", "acme/soup", "--add", "acme/c", "-o", "again", "--quiet")
    assert done.code == 0
    assert "note: acme/soup: the Hub was not reached; the last version is the one in the cache" in done.err
    assert same_weights(tmp_path / "v2", tmp_path / "again")


def refused(kind: type[SoupError], soup: str, *add: str) -> str:
    with pytest.raises(kind) as found:
        made(Update.of(soup, list(add)), Path("never"))
    assert not Path("never").exists()
    return str(found.value)


def test_what_cannot_be_taken_in(family: Path, tmp_path: Path) -> None:
    """Each in one error that names it, before anything is fetched."""
    first(tmp_path, **UNSCORED)
    assert "acme/a adds nothing: acme/soup has acme/a@" in refused(RecipeError, "acme/soup", "acme/a")
    assert "acme/soup adds nothing: acme/soup has acme/a@" in refused(RecipeError, "acme/soup", "acme/soup")
    assert "or it is named twice" in refused(RecipeError, "acme/soup", "acme/c", "acme/c@main")
    assert "'acme/a' is no soup" in refused(RecipeError, "acme/a", "acme/c")
    assert "'acme/none' does not exist" in refused(ResolveError, "acme/soup", "acme/none")
    assert "acme/none" in refused(ResolveError, "acme/none", "acme/c")

    config = tmp_path / "wide"
    shutil.copytree(family / "c", config)
    values = json.loads((config / "config.json").read_text()) | {"hidden_act": "relu"}
    (config / "config.json").write_text(json.dumps(values))
    assert "hidden_act" in refused(IncompatibleError, "acme/soup", str(config))


def test_soups_that_cannot_take_in_anything(family: Path, tmp_path: Path, online: Any) -> None:
    """Leaves that were folders, or are gone; shares that mean nothing."""
    made(Recipe(ingredients=[str(family / "a"), "acme/b"]), tmp_path / "mixed").push("acme/mixed")
    assert "acme/mixed cannot be cooked from its leaves: of local:a" in refused(ResolveError, "acme/mixed", "acme/c")
    plain = {"name": "linear", "normalize": False}
    halves = [{"model": f"acme/{name}", "weight": 0.5} for name in "ab"]
    for name, changes, said in (
        ("sum", {"ingredients": halves, "method": plain}, "acme/sum is a plain sum"),
        ("less", {"ingredients": ["acme/a", {"model": "acme/b", "weight": -0.5}], "method": "task_arithmetic"}, "-0.5"),
    ):
        made(Recipe(**changes), tmp_path / name).push(f"acme/{name}")
        assert said in refused(RecipeError, f"acme/{name}", "acme/c")

    first(tmp_path, **UNSCORED)
    HfApi(endpoint=online.endpoint, token=online.token).delete_repo("acme/b")
    said = refused(ResolveError, "acme/soup", "acme/c")
    assert "acme/soup" in said
    assert "acme/b" in said


@pytest.mark.usefixtures("v1")
def test_a_soup_that_many_contribute_to(
    cli: Cli, local_hub: LocalHub, contributors: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One publishes a soup, another proposes a newcomer, the first takes it in, and somebody goes on from there."""
    acme, mia = (HfApi(endpoint=local_hub.endpoint, token=f"t-{name}") for name in ("acme", "mia"))
    acme.create_tag("acme/soup", tag="v1")
    mia.create_repo("mia/helps")
    mia.upload_folder(repo_id="mia/helps", folder_path=contributors / "helps")

    monkeypatch.setenv("HF_TOKEN", "t-mia")
    assert cli("cook", "acme/soup@v1", "--add", "mia/helps", "-o", "v2", "--quiet").code == 0
    done = cli("push", "v2", "acme/soup", "--pr", "--json")
    assert done.json["pull_request"].endswith("/acme/soup/discussions/1")
    assert "offered already" in cli("push", "v2", "acme/soup", "--pr").out
    (offered,) = acme.get_repo_discussions("acme/soup")
    assert (offered.author, offered.title, offered.status) == ("mia", "Add mia/helps", "open")
    opened = acme.get_discussion_details("acme/soup", 1).events[0]
    text = opened.content  # type: ignore[attr-defined]  # the first event is a comment
    v1 = acme.model_info("acme/soup")
    assert f"Added to [acme/soup](https://huggingface.co/acme/soup/tree/{v1.sha}): mia/helps." in text
    assert "**Adding mia/helps helps: the soup is better on" in text
    assert "| last version | 70.00 (" in text
    assert "| **new version** | 100.00 (" in text
    assert text in (tmp_path / "v2" / "README.md").read_text()
    assert acme.model_info("acme/soup", revision="v1").sha == v1.sha
    assert [each.model for each in Update.of("acme/soup@refs/pr/1", ["acme/c"]).recipe.ingredients][2] == "mia/helps"

    monkeypatch.setenv("HF_TOKEN", "t-acme")
    assert cli("verify", "acme/soup@refs/pr/1", "--score").code == 0
    acme.merge_pull_request("acme/soup", 1)
    acme.create_tag("acme/soup", tag="v2")
    assert cli("cook", "acme/soup@v2", "--add", "acme/c", "-o", "v3", "--quiet").code == 0
    assert cli("push", "v3", "acme/soup", "--tag", "v3").code == 0
    leaves = ["acme/a", "acme/b", "mia/helps", "acme/c"]
    assert cli("verify", "acme/soup@v3", "--json").json["verdict"] == "identical"
    by_hand = made(Recipe(ingredients=leaves), tmp_path / "by hand")
    for tag, folder in (("v2", tmp_path / "v2"), ("v3", by_hand.folder)):
        file = acme.hf_hub_download("acme/soup", "model.safetensors", revision=tag)
        assert Path(file).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert Soup.open(tmp_path / "v3").report.update.before == Soup.open(tmp_path / "v2").report.scores["soup"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("acme/soup", "acme/a"),
        ("recipe.yaml",),
        ("acme/soup", "--select", "greedy"),
        ("acme/soup", "--base", "acme/base"),
    ],
)
def test_add_takes_one_soup_and_its_recipe(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli("cook", *arguments, "--add", "acme/c", "-o", "v2")
    assert done.code == 2
    assert "--add" in done.err
