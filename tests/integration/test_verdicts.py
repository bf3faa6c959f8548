"""The verdict on models whose lineage is known, with honest cards, lying ones and none; see `lineage_zoo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import lineage_zoo
import pytest
import torch
from huggingface_hub import HfApi
from lineage_zoo import Member, first_base
from stand_ins import publish

from hf_soup import LineageReport, Recipe, check, cook
from hf_soup.local_hub import LocalHub

Zoo = dict[str, Member]
Put = Callable[..., str]
MEMBERS = [name for name in lineage_zoo.FAST if name != "A2-light-2"]
FINE_TUNES = [name for name in MEMBERS if lineage_zoo.FAST[name].ancestor and name != "A-continued"]
#: One of each kind.
FIRST = [name for name in FINE_TUNES if not name.endswith(("-2", "-3"))]
#: One of each line, and of those that are farthest from their ancestor.
KINDS = ["A-light-1", "A-hot-1", "A-continued-1", "A-again", "A2-light-1", "B-light-1"]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return lineage_zoo.make_planned(lineage_zoo.FAST, tmp_path_factory.mktemp("lineage"), *MEMBERS, effort=0.12)


@pytest.fixture(scope="module")
def module_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def local_hub(module_hub: LocalHub) -> LocalHub:
    """One Hub for the module: every member, with honest cards, as ``zoo/NAME``."""
    return module_hub


@pytest.fixture
def published(online: LocalHub, members: Zoo) -> Callable[[str], str]:
    """The id of a member that was published with an honest card."""
    api = HfApi(endpoint=online.endpoint, token=online.token)

    def there(name: str) -> str:
        parent = members[name].ancestor
        if parent is not None:
            there(parent)
        if not api.repo_exists(f"zoo/{name}"):
            put(online, members[name].folder, f"zoo/{name}", parent and f"zoo/{parent}")
        return f"zoo/{name}"

    return there


def put(hub: LocalHub, folder: Path, repo: str, base: str | None) -> str:
    """Publish a folder with a card that says something about where it comes from."""
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "README.md"}
    said = f"base_model: {base}\n" if base else ""
    publish(hub, repo, files | {"README.md": f"---\nlicense: mit\n{said}---\n".encode()})
    return repo


def codes(lineage: LineageReport) -> set[str]:
    return {reason.code for reason in lineage.reasons}


def said(lineage: LineageReport, code: str) -> str:
    return next(reason.message for reason in lineage.reasons if reason.code == code)


def line(zoo: Zoo, name: str) -> set[str]:
    """A member's ancestors."""
    parent = zoo[name].ancestor
    return set() if parent is None else {parent} | line(zoo, parent)


def initial(zoo: Zoo, name: str) -> str:
    """Which random numbers it began from: A2 has A's."""
    return first_base(zoo, name).removesuffix("2")


# ---- without cards --------------------------------------------------------------------------------------------


def test_every_pair_without_cards(members: Zoo) -> None:
    """Of two kinds, and of two of one kind."""
    wrong = []
    siblings = [pair for pair in combinations(FINE_TUNES, 2) if pair[0][:-1] == pair[1][:-1]]
    for a, b in [*combinations(FIRST, 2), *siblings]:
        lineage = check([str(members[a].folder), str(members[b].folder)])
        expected = "likely" if initial(members, a) == initial(members, b) else "refused"
        if lineage.verdict != expected:
            wrong.append((a, b, lineage.verdict, codes(lineage)))
        if expected == "likely":
            assert "only a measured barrier" in said(lineage, "base-unknown")
        elif "CLIP" not in a + b:
            assert "unrelated" in codes(lineage), (a, b)
    assert not wrong


def test_all_of_one_family_and_one_stranger(members: Zoo) -> None:
    family = [name for name in FINE_TUNES if first_base(members, name) == "A"]
    assert check([str(members[name].folder) for name in family]).verdict == "likely"
    lineage = check([str(members[name].folder) for name in [*family, "B-light-1"]])
    [reason] = [reason for reason in lineage.reasons if reason.refuses]
    assert (reason.code, reason.ingredients) == ("unrelated", ("local:B-light-1",))


@pytest.mark.parametrize("name", FIRST)
def test_every_base_by_the_user(members: Zoo, name: str) -> None:
    """One model and a base: kin where they share random numbers, with no pair to tell more."""
    if "CLIP" in name:
        assert check(alone(members, name, "CLIP")).verdict == "proven"
        return
    for base in ("A", "A2", "B"):
        lineage = check(alone(members, name, base))
        expected = "proven" if initial(members, name) == base[0] else "refused"
        assert lineage.verdict == expected, (name, base, codes(lineage))


def alone(members: Zoo, name: str, base: str) -> Recipe:
    folder = str(members[name].folder)
    pin = check([folder]).models.checkpoints[0].revision
    return Recipe(ingredients=[{"model": folder, "revision": pin}], base_model=str(members[base].folder))


@pytest.mark.parametrize(
    ("models", "base", "verdict", "code"),
    [
        (["A-light-1", "A-light-2", "A-light-3"], "A", "proven", None),
        (["A-heavy-1", "A-heavy-2"], "A", "proven", None),
        (["A-hot-1", "A-hot-2"], "A", "proven", "drifted"),
        (["A-light-1", "A-hot-2", "A-frozen"], "A", "proven", "identical"),
        (["A-continued-1", "A-continued-2"], "A-continued", "proven", None),
        (["A-continued-1", "A-continued-2"], "A", "proven", None),
        (["A-light-1", "A-light-2"], "A2", "likely", "base-doubtful"),
        (["A-light-1", "A-light-2"], "B", "refused", "base-wrong"),
        (["A-light-1", "B-light-1"], "A", "refused", "not-from-base"),
        (["A-light-1", "A-again"], "A", "proven", None),
        (["CLIP-1", "CLIP-2"], "CLIP", "proven", None),
        (["A-light-1", "A-head-1"], "A", "proven", "heads-unrelated"),
        (["A-head-1", "A-head-2"], "A", "proven", "heads-unrelated"),
    ],
)
def test_a_base_that_the_user_names(members: Zoo, models: list[str], base: str, verdict: str, code: str | None) -> None:
    lineage = check([str(members[name].folder) for name in models], base=str(members[base].folder))
    assert lineage.verdict == verdict, codes(lineage)
    assert code is None or code in codes(lineage)


# ---- in another guise -----------------------------------------------------------------------------------------

SAME = {
    "bfloat16": lambda folder, out: lineage_zoo.other_dtype(folder, out, "bfloat16"),
    "float16": lambda folder, out: lineage_zoo.other_dtype(folder, out, "float16"),
    "sharded": lineage_zoo.sharded,
    "shuffled": lineage_zoo.shuffled_layout,
    "in memory": lineage_zoo.memory_names,
    "without prefix": lineage_zoo.without_prefix,
    "with prefix": lineage_zoo.with_prefix,
}


@pytest.mark.parametrize("guise", SAME)
@pytest.mark.parametrize("of", ["A-light-2", "A"])
def test_the_same_weights_in_another_guise(members: Zoo, guise: str, of: str, tmp_path: Path) -> None:
    """Of a fine-tune, and of the base."""
    changed = str(SAME[guise](members[of].folder, tmp_path / "changed"))
    first = str(members["A-light-1"].folder)
    if of == "A":
        lineage = check([first, str(members["A-light-2"].folder)], base=changed)
    else:
        lineage = check([first, changed], base=str(members["A"].folder))
    assert lineage.verdict == "proven", codes(lineage)
    assert codes(lineage) <= {"dtypes-mixed"}


@pytest.mark.parametrize("name", ["A-light-1", "A-hot-1"])
def test_a_copy_is_said(members: Zoo, name: str, tmp_path: Path) -> None:
    copy = str(lineage_zoo.shuffled_layout(members[name].folder, tmp_path / "copy"))
    lineage = check([str(members[name].folder), copy, str(members["A-light-2"].folder)])
    assert lineage.verdict == "likely"
    assert said(lineage, "identical").startswith(f"local:{name}, local:copy are equal")


def test_the_ancestor_among_the_ingredients_is_said(members: Zoo, tmp_path: Path) -> None:
    lineage = check([str(members["A-light-1"].folder), str(members["A-frozen"].folder)], base=str(members["A"].folder))
    assert lineage.verdict == "proven"
    assert "local:A-frozen: the body is equal to local:A's" in said(lineage, "identical")


PERMUTED = {
    "all neurons": lineage_zoo.permuted_neurons,
    "neurons of one layer": lambda folder, out: lineage_zoo.permuted_neurons(folder, out, 1),
    "heads": lambda folder, out: lineage_zoo.permuted_heads(folder, out, [1, 2, 3, 0]),
    "hidden": lineage_zoo.permuted_hidden,
}
PERMUTED_IN_PART = {
    "half of the neurons": lambda folder, out: lineage_zoo.some_neurons(folder, out, 0.5),
    "two heads": lambda folder, out: lineage_zoo.permuted_heads(folder, out, [1, 0, 2, 3]),
    "heads but one": lambda folder, out: lineage_zoo.permuted_heads(folder, out, [0, 2, 3, 1]),
}


@pytest.mark.parametrize("how", PERMUTED)
@pytest.mark.parametrize("base", [None, "A"])
def test_permuted_neurons_are_refused(members: Zoo, how: str, base: str | None, tmp_path: Path) -> None:
    changed = str(PERMUTED[how](members["A-light-2"].folder, tmp_path / "changed"))
    others = [str(members[name].folder) for name in ("A-light-1", "A-light-3", "A-heavy-1")]
    lineage = check([*others, changed], base=base and str(members[base].folder))
    assert lineage.verdict == "refused"
    for reason in lineage.reasons:
        if reason.refuses:
            assert reason.code in ("unrelated", "tensors-unrelated", "not-from-base")
            assert reason.ingredients == ("local:changed",)
    # Of two, without an ancestor, nobody knows whose were moved; with one it is known.
    two = check([changed, others[0]], base=base and str(members[base].folder))
    assert two.verdict == "refused"
    if base and how != "hidden":
        assert next(reason for reason in two.reasons if reason.refuses).ingredients == ("local:changed",)


@pytest.mark.parametrize("how", PERMUTED_IN_PART)
def test_what_is_permuted_in_part_is_said(members: Zoo, how: str, tmp_path: Path) -> None:
    """Weights alone do not tell it from hard training."""
    changed = str(PERMUTED_IN_PART[how](members["A-light-2"].folder, tmp_path / "changed"))
    lineage = check([str(members["A-light-1"].folder), changed])
    assert lineage.verdict == "likely"
    assert {"drifted", "tensors-drifted"} & {reason.code for reason in lineage.reasons}


def test_labels_in_another_order_give_the_soup_of_the_first_order(members: Zoo, tmp_path: Path) -> None:
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    one, other = members["A-light-1"].folder, members["A-light-2"].folder
    changed = lineage_zoo.permuted_labels(other, tmp_path / "changed", order)
    assert check([str(one), str(changed)]).verdict == "likely"
    plain = cook([str(one), str(other)], tmp_path / "plain")
    soup = cook([str(one), str(changed)], tmp_path / "soup")
    assert soup.digest == plain.digest
    assert torch.equal(lineage_zoo.outputs(soup.folder), lineage_zoo.outputs(plain.folder))
    turned = cook([str(changed), str(one)], tmp_path / "turned")
    assert torch.allclose(lineage_zoo.outputs(turned.folder), lineage_zoo.outputs(plain.folder)[:, order], atol=1e-5)
    again = Recipe(ingredients=[str(changed), str(one)], labels=plain.load().config.id2label.values())
    found = lineage_zoo.accuracy(cook(again, tmp_path / "again").folder)
    assert found == pytest.approx(lineage_zoo.accuracy(plain.folder), abs=0.01)
    assert found > 0.2  # chance gives 0.1


# ---- with cards -----------------------------------------------------------------------------------------------


def test_every_pair_of_kinds_with_honest_cards(members: Zoo, published: Callable[[str], str]) -> None:
    wrong = []
    for a, b in [*combinations(KINDS, 2), ("A-light-1", "CLIP-1")]:
        lineage = check([published(a), published(b)])
        shared = ({a} | line(members, a)) & ({b} | line(members, b))
        expected = "proven" if shared else "refused"
        if lineage.verdict != expected:
            wrong.append((a, b, lineage.verdict, codes(lineage)))
        if not shared and "CLIP" not in a + b:
            assert "bases-differ" in codes(lineage), (a, b)
    assert not wrong


def test_ancestors_that_share_only_their_random_numbers(published: Callable[[str], str]) -> None:
    models = [published(name) for name in ("A-light-1", "A-light-2", "A2-light-1")]
    lineage = check(models)
    assert lineage.verdict == "refused"
    assert [reason.code for reason in lineage.reasons if reason.refuses] == ["bases-differ"]
    assert "began from the same random numbers" in said(lineage, "bases-differ")


def test_the_ancestor_is_found_on_the_hub(
    online: LocalHub, published: Callable[[str], str], members: Zoo, tmp_path: Path
) -> None:
    for name in ("A", "A2", "B", "CLIP"):
        published(name)
    models = [put(online, members[name].folder, f"mute/{name}", None) for name in ("A-light-1", "A-light-2")]
    lineage = check(models)
    assert lineage.verdict == "likely"
    assert lineage.ancestor is not None
    assert (lineage.ancestor.model, lineage.ancestor.source) == ("zoo/A", "weights")
    assert "only a measured barrier" in said(lineage, "base-inferred")
    # What the weights alone say is told, and not written down as a fact that another cook would take for declared.
    soup = cook(models, tmp_path / "soup")
    assert soup.recipe.base_model is None
    assert "which the weights point to" in (soup.folder / "README.md").read_text()
    folders = [str(members[name].folder) for name in ("B-light-1", "B-light-2")]
    found = check(folders).ancestor
    assert found is not None
    assert found.model == "zoo/B"
    assert check([*models, folders[0]]).ancestor is None


def test_an_honest_one_among_liars(online: LocalHub, published: Callable[[str], str], members: Zoo) -> None:
    """Whom the weights of the named ancestor agree with is the family, however small."""
    honest = published("A-light-1")
    liars = [put(online, members[name].folder, f"liars/{name}", "zoo/A") for name in ("B-light-1", "B-light-2")]
    for models in ([honest, *liars], [*liars, honest], [liars[0], honest], [honest, liars[1]]):
        lineage = check(models)
        assert lineage.verdict == "refused"
        accused = {name for reason in lineage.reasons if reason.refuses for name in reason.ingredients}
        assert accused == set(models) & set(liars)


def test_cards_that_lie(online: LocalHub, published: Callable[[str], str], members: Zoo) -> None:
    honest = [published("A-light-1"), published("A-light-2")]
    published("B")
    liar = put(online, members["A-light-3"].folder, "liar/A-says-B", "zoo/B")
    lineage = check([*honest, liar])
    assert (lineage.verdict, lineage.ancestor and lineage.ancestor.model) == ("likely", "zoo/A")
    assert "liar/A-says-B says to come from zoo/B" in said(lineage, "card-wrong")

    stranger = put(online, members["B-light-1"].folder, "liar/B-says-A", "zoo/A")
    lineage = check([*honest, stranger])
    assert lineage.verdict == "refused"
    refusals = [reason for reason in lineage.reasons if reason.refuses]
    assert {reason.code for reason in refusals} == {"not-from-base"}
    assert {reason.ingredients for reason in refusals} == {(stranger,)}

    both = [liar, put(online, members["A-heavy-1"].folder, "liar/A-says-B-too", "zoo/B")]
    lineage = check(both)
    assert (lineage.verdict, lineage.ancestor and lineage.ancestor.model) == ("likely", "zoo/A")
    assert f"{both[0]}, {both[1]} say to come from zoo/B, but" in said(lineage, "card-wrong")
