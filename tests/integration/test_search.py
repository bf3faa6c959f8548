"""Search against the local Hub, with the real client: what is listed, what is grouped, what is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save, save_file
from starlette.requests import Request
from starlette.responses import Response

import hf_soup
from hf_soup import IncompatibleError, Recipe, RecipeError, ResolveError, SearchResult
from hf_soup.cli import tables as shown
from hf_soup.hub import repo as hub
from hf_soup.local_hub import LocalHub
from hf_soup.recipe import Finding
from hf_soup.workflows.search import FineTune, MergeableGroup, _labels

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
BASE = "acme/base"
MOODS = {"id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}
MAIL = {"id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}}


@pytest.fixture
def grow(publish: Callable[..., str], family: Path, tmp_path: Path, online: LocalHub) -> Callable[..., str]:
    """Publishes a fine-tune of the base: its weights moved a little, and with what the test says of it."""
    publish("base")
    kept, count = tmp_path / "grown", 0

    def make(
        name: str,
        *,
        downloads: int = 0,
        config: dict[str, Any] | None = None,
        card: str = "license: apache-2.0\nbase_model: acme/base",
        strange: bool = False,
        files: dict[str, bytes] | None = None,
        drop: tuple[str, ...] = (),
        source: str = "base",
    ) -> str:
        nonlocal count
        count += 1
        folder = kept / name
        shutil.copytree(family / source, folder)
        if source == "base":
            tensors = load_file(folder / "model.safetensors")
            generator = torch.Generator().manual_seed(count)
            for key, each in tensors.items():
                noise = torch.randn(each.shape, generator=generator)
                tensors[key] = noise.mul_(0.02) if strange else each + 0.002 * noise
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        written = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(
            json.dumps({key: each for key, each in written.items() if each is not None})
        )
        (folder / "README.md").write_text(f"---\n{card}\n---\n# {name}\n")
        for path, content in (files or {}).items():
            (folder / path).write_bytes(content)
        for path in drop:
            (folder / path).unlink()
        publish(name, folder)
        online.store.count_downloads(online.store.repos["model", f"acme/{name}"], downloads)
        return f"acme/{name}"

    return make


@pytest.fixture
def meadow(grow: Callable[..., str], online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Two groups, and one of everything that is in no group."""
    weights = "model.safetensors"
    finetune = "base_model: acme/base\nbase_model_relation: finetune"
    for number, name in enumerate(("mood-1", "mood-2", "mood-3")):
        grow(name, downloads=300 - number, config=MOODS)
    for number, name in enumerate(("mail-1", "mail-2")):
        grow(name, downloads=9000 - number, config=MAIL, card="license: other\nbase_model: acme/base")
    grow("no-names", downloads=250, config={"id2label": None, "label2id": None})
    grow("stranger", downloads=200, config=MOODS, strange=True)
    grow("masked", downloads=150, config={"architectures": ["BertForMaskedLM"], "id2label": None, "label2id": None})
    grow("pickle", downloads=90, files={"pytorch_model.bin": b"PK"}, drop=(weights,))
    grow("lora", downloads=80, files={"adapter_config.json": b"{}"}, drop=(weights, "config.json"))
    grow("gguf", downloads=70, files={"model.gguf": b"GGUF"}, drop=(weights, "config.json"), card=finetune)
    grow("gptq", downloads=60, config={**MOODS, "quantization_config": {"quant_method": "gptq"}}, card=finetune)
    grow("original", downloads=51, config=MOODS, source="a")
    grow("copy", downloads=50, config=MOODS, source="a")
    grow("gated", downloads=40, config=MOODS)
    HfApi().update_repo_settings("acme/gated", gated="auto")
    # These name the base as well, and are no fine-tunes of it.
    grow("true-gguf", downloads=9999, files={"model.gguf": b"GGUF"}, drop=(weights, "config.json"))
    grow("merged", downloads=9999, card="base_model: [acme/base, acme/mood-1]")
    grow("cardless", downloads=9999, card="license: mit")
    # Somebody without an account: what is gated is listed for them, and cannot be read.
    monkeypatch.delenv("HF_TOKEN")
    return online


def test_what_there_is(meadow: LocalHub) -> None:
    """Every fine-tune in the order of downloads, with what it is, its group, or why it is in none."""
    found = hf_soup.search(BASE)
    by_id = {each.id: each for each in found.siblings}
    names = "mail-1 mail-2 mood-1 mood-2 mood-3 no-names stranger masked pickle lora gguf gptq original copy gated"
    assert list(by_id) == [f"acme/{name}" for name in names.split()]
    assert [(group.members, group.verdict) for group in found.groups] == [
        (("acme/mood-1", "acme/mood-2", "acme/mood-3", "acme/original"), "proven"),
        (("acme/mail-1", "acme/mail-2"), "proven"),
    ]
    first = by_id["acme/mail-1"]
    assert (first.architecture, first.task, first.labels) == (
        "BertForSequenceClassification", "text-classification", ("ham", "spam"),
    )  # fmt: skip
    assert (first.license, first.downloads, first.verdict, first.why, first.group) == ("other", 9000, "proven", "", 2)
    assert first.revision == hub.resolve("acme/mail-1").revision
    for name, verdict, why in (
        ("no-names", "alone", "No other"),
        ("masked", "alone", "No other"),
        ("stranger", "refused", "nothing in common"),
        ("pickle", "unusable", "has no safetensors, only pytorch_model.bin"),
        ("lora", "unusable", "is an adapter with `peft_type: None`"),
        ("gguf", "unusable", "in the format of llama.cpp"),
        ("gptq", "unusable", "is quantised (gptq)"),
        ("copy", "unusable", "has the same weight files as acme/original"),
        ("gated", "unusable", "is gated"),
    ):
        each = by_id[f"acme/{name}"]
        assert (each.verdict, each.group) == (verdict, None), each
        assert why in each.why
    assert by_id["acme/no-names"].labels == ("LABEL_0", "LABEL_1")
    assert by_id["acme/masked"].labels == ()
    assert by_id["acme/gated"].revision is None


def test_what_the_command_prints_and_writes(meadow: LocalHub, cli: Cli, tmp_path: Path) -> None:
    """A screen of aligned lines; the largest group as a recipe of pinned models, which cooks."""
    done = cli("search", BASE, "-o", "found.yaml", "--quiet")
    assert done.code == 0
    lines = done.out.splitlines()
    assert re.fullmatch(r"Fine-tunes of acme/base@[0-9a-f]{7}: 15 looked at, 6 in 2 groups\.", lines[0])
    assert len(lines) < 50
    assert max(map(len, lines)) < 180
    shown = [line for line in lines if line.startswith("  acme/")]
    assert len(shown) == 15
    assert len({line.index("apache-2.0") for line in shown if "apache-2.0" in line}) == 1
    assert "Group 1, proven: BertForSequenceClassification, 2 labels: negative, positive" in lines
    assert re.search(r"acme/mail-1@[0-9a-f]{7} +text-classification +other +9,000\n", done.out)
    assert re.search(r"acme/pickle +\S+ +\S+ +90  has no safetensors, only pytorch_model.bin", done.out)
    assert re.search(r"acme/no-names@.* 250  BertForSequenceClassification, 2 labels without names\n", done.out)
    assert "Wrote group 1 to found.yaml. Next: hf-soup cook found.yaml -o soup" in done.err
    assert "Group 2 instead: hf-soup check acme/mail-1 acme/mail-2 --base acme/base -o RECIPE" in done.err

    recipe = Recipe.load(tmp_path / "found.yaml")
    assert recipe.base_model == BASE
    assert [each.model for each in recipe.ingredients] == [
        "acme/mood-1", "acme/mood-2", "acme/mood-3", "acme/original",
    ]  # fmt: skip
    assert [each.revision for each in recipe.ingredients] == [hub.resolve(e.model).revision for e in recipe.ingredients]
    assert cli("cook", "found.yaml", "-o", "soup", "--quiet").code == 0
    mean = torch.stack([_weight(meadow, each.model) for each in recipe.ingredients]).mean(0)
    assert torch.allclose(load_file(tmp_path / "soup" / "model.safetensors")["classifier.weight"], mean, atol=1e-6)


def _weight(online: LocalHub, name: str) -> torch.Tensor:
    from huggingface_hub import hf_hub_download

    return load_file(hf_hub_download(name, "model.safetensors"))["classifier.weight"]


def test_nothing_is_overwritten(online: LocalHub, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "found.yaml").write_text("mine")
    done = cli("search", BASE, "-o", "found.yaml")
    assert (done.code, done.out) == (1, "")
    assert "'found.yaml' exists already" in done.err
    assert (tmp_path / "found.yaml").read_text() == "mine"
    assert not online.requests


def test_json(meadow: LocalHub, cli: Cli) -> None:
    """The keys that scripts may rely on, and the same as from Python."""
    done = cli("search", BASE, "--limit", 6, "--json", "-o", "found.yaml")
    again = hf_soup.search(BASE, limit=6).to_dict()
    for each in again["siblings"]:
        each["downloads"] -= 1  # the first look at its config was one
    assert done.json == again
    assert set(done.json) == {"base", "siblings", "groups", "unread"}
    assert set(done.json["base"]) == {"model", "revision", "parents", "not_compared"}
    assert set(done.json["siblings"][0]) == {
        "id", "revision", "architecture", "task", "labels", "license", "downloads", "verdict", "why", "group",
    }  # fmt: skip
    assert set(done.json["groups"][0]) == {"members", "verdict", "reasons", "from_base"}
    assert Recipe.load("found.yaml").base_model == BASE


def test_the_limit_takes_the_most_downloaded(meadow: LocalHub, cli: Cli) -> None:
    """Over pages too; and nobody else is read."""
    meadow.page_size = 2
    assert [each.id for each in hf_soup.search(BASE, limit=3).siblings] == ["acme/mail-1", "acme/mail-2", "acme/mood-1"]
    assert not any("mood-2" in record.path for record in meadow.requests if "/resolve/" in record.path)
    assert cli("search", BASE, "--limit", 0).code == 2
    for limit in (0, -1, 1001):
        with pytest.raises(RecipeError, match=f"`limit` is {limit}; it is 1 to 1000"):
            hf_soup.search(BASE, limit=limit)


def test_groups_of_one_size_stand_by_downloads(grow: Callable[..., str]) -> None:
    for name, downloads, labels in (("a", 9, MOODS), ("b", 8, MAIL), ("c", 7, MAIL), ("d", 1, MOODS)):
        grow(name, downloads=downloads, config=labels)
    found = hf_soup.search(BASE)
    assert [group.members for group in found.groups] == [("acme/b", "acme/c"), ("acme/a", "acme/d")]
    assert [each.group for each in found.siblings] == [2, 1, 1, 2]
    assert [each.model for each in found.recipe(2).ingredients] == ["acme/a", "acme/d"]
    with pytest.raises(IncompatibleError, match="no group 3"):
        found.recipe(3)


@pytest.mark.parametrize("rest", [(), ("acme/m0", "acme/m4")])
def test_a_refused_set_is_parted(grow: Callable[..., str], rest: tuple[str, ...]) -> None:
    """Also where the first is the odd one out, and where those that are left over are kin of each other."""
    words = [f"[unused{number}]" for number in range(11)]
    shuffled = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]).encode()
    for number, other in enumerate((True, False, False, False, *([True] if rest else []))):
        files = {"vocab.txt": shuffled} if other else {}
        grow(f"m{number}", downloads=9 - number, config=MOODS, files=files)
    found = hf_soup.search(BASE)
    assert [group.members for group in found.groups] == [("acme/m1", "acme/m2", "acme/m3"), *([rest] if rest else [])]
    first = found.siblings[0]
    assert (first.verdict, bool(first.why)) == (("proven", False) if rest else ("refused", True))


def test_a_task(grow: Callable[..., str], cli: Cli) -> None:
    """Of the Hub's tags; one that none has is answered with those that there are."""
    grow("one", config=MOODS)
    grow("two", config=MOODS)
    grow("three", config={"architectures": ["BertForMaskedLM"]})
    found = hf_soup.search(BASE, task="fill-mask")
    assert [each.id for each in found.siblings] == ["acme/three"]
    done = cli("search", BASE, "--task", "fill-masks")
    assert (done.code, done.out) == (1, "")
    assert "None of 3 fine-tunes of acme/base has the task 'fill-masks'." in done.err
    assert "They have: text-classification (2), fill-mask (1)." in done.err
    grow("steering", card='base_model: acme/base\npipeline_tag: "t\\e[31mask"')
    done = cli("search", BASE, "--task", "fill-masks")
    assert "None of 4 fine-tunes" in done.err
    assert "t�[31mask (1)" in done.err
    assert "\x1b" not in done.err


def test_a_base_without_fine_tunes(publish: Callable[..., str], grow: Callable[..., str], cli: Cli) -> None:
    """An empty result that says what to do, also about a fine-tune that was taken for a base."""
    done = cli("search", BASE, "-o", "found.yaml")
    assert done.code == 3
    assert re.match(r"No model on the Hub names acme/base@[0-9a-f]{7} in its card", done.out)
    assert "hf-soup check MODEL... --base acme/base" in done.out
    assert "'found.yaml' was not written" in done.err
    assert not Path("found.yaml").exists()
    grow("leaf")
    assert "Next: hf-soup search acme/base\n" in cli("search", "acme/leaf").out
    assert cli("search", "acme/leaf", "--json").json["siblings"] == []
    assert hf_soup.search("acme/leaf", task="fill-mask") == SearchResult(
        "acme/leaf", hub.resolve("acme/leaf").revision, ("acme/base",)
    )


def test_a_base_that_was_renamed(grow: Callable[..., str], online: LocalHub) -> None:
    """Cards go on with the old name; the Hub's tags have the new one, whichever the user types."""
    grow("one", config=MOODS)
    grow("two", config=MOODS, card="base_model: base")
    online.store.rename("model", BASE, "acme/ground")
    online.store.rename("model", "base", "acme/ground")
    for name in (
        BASE,
        "base",
        "acme/ground",
        f"{online.endpoint}/acme/ground".replace(online.endpoint, "https://hf.co"),
    ):
        found = hf_soup.search(name)
        assert (found.base, [each.id for each in found.siblings]) == ("acme/ground", ["acme/one", "acme/two"])
        assert [group.verdict for group in found.groups] == ["proven"]
    assert hf_soup.search("acme/ground@main").recipe().base_model == "acme/ground@main"


@pytest.mark.parametrize(
    ("base", "kind", "said"),
    [
        ("acme/absent", ResolveError, "'acme/absent' does not exist"),
        ("acme/base@absent", ResolveError, "no such branch, tag or commit"),
        ("not an id", ResolveError, "neither a folder nor a Hub id"),
        ("/", RecipeError, "'/' is a folder or file here"),
        ("", ResolveError, "'' is neither a folder nor a Hub id"),
        (" ", ResolveError, "' ' is neither a folder nor a Hub id"),
        ("@main", ResolveError, "'@main' is neither a folder nor a Hub id"),
        (1100 * "x", ResolveError, "x…' is neither a folder nor a Hub id"),
        ("acme/base@", ResolveError, "'acme/base@' names no revision after '@'"),
    ],
)
def test_a_base_that_cannot_be(publish: Callable[..., str], base: str, kind: type[Exception], said: str) -> None:
    publish("base")
    with pytest.raises(kind, match=re.escape(said)):
        hf_soup.search(base)


@pytest.mark.usefixtures("short_pauses")
def test_without_a_network(
    grow: Callable[..., str], online: LocalHub, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """One error, also where the cache knows the base: it does not know who came from it."""
    from huggingface_hub import constants, snapshot_download

    grow("one")
    snapshot_download(BASE)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for base, said in ((BASE, "The Hub was not reached, and it alone knows"), ("acme/one", "cannot be reached")):
        done = cli("search", base)
        assert (done.code, done.out) == (1, "")
        assert said in done.err
        assert "HF_ENDPOINT" in done.err


def test_a_list_that_the_hub_refuses(grow: Callable[..., str], online: LocalHub, cli: Cli) -> None:
    """Is one error that says of what."""
    grow("one")
    online.intercept = lambda request: Response("no", 403) if request.url.path == "/api/models" else None
    done = cli("search", BASE)
    assert (done.code, done.out) == (1, "")
    assert "the models tagged 'base_model:finetune:acme/base'" in done.err


@pytest.mark.parametrize("path", ["config.json", "vocab.txt"])
def test_one_that_breaks_does_not_end_the_run(grow: Callable[..., str], online: LocalHub, path: str) -> None:
    """Neither where it is opened nor where it is compared: it is listed with what the Hub said."""
    for number in (0, 1, 2, 10):
        # One that is like the others' is not fetched.
        files = {"vocab.txt": b"another"} if number == 1 else {}
        grow(f"m{number}", downloads=99 - number, config=MOODS, files=files)

    def broken(request: Request) -> Response | None:
        return Response("gone", 410) if re.search(rf"/acme/m1/.*{path}", request.url.path) else None

    online.intercept = broken
    found = hf_soup.search(BASE)
    assert [group.members for group in found.groups] == [("acme/m0", "acme/m2", "acme/m10")]
    assert (found.siblings[1].id, found.siblings[1].group) == ("acme/m1", None)
    assert "answered 410" in found.siblings[1].why


@pytest.mark.parametrize(
    ("damage", "said"),
    [("gated", "is gated"), ("pickle", "only pytorch_model.bin"), ("config", "config.json is not valid JSON")],
)
def test_a_base_whose_weights_cannot_be_read(
    grow: Callable[..., str], online: LocalHub, monkeypatch: pytest.MonkeyPatch, cli: Cli, damage: str, said: str
) -> None:
    """The siblings are compared with one another, the reason is said once, and the recipe leaves the base out."""
    grow("one", config=MOODS)
    grow("two", config=MOODS)
    grow("stranger", config=MOODS, strange=True)
    api = HfApi(endpoint=online.endpoint, token=online.token)
    if damage == "gated":
        api.update_repo_settings(BASE, gated="auto")
        monkeypatch.delenv("HF_TOKEN")
    elif damage == "pickle":
        api.delete_file("model.safetensors", BASE)
        api.upload_file(path_or_fileobj=b"PK", path_in_repo="pytorch_model.bin", repo_id=BASE)
    else:
        api.upload_file(path_or_fileobj=b"{nope", path_in_repo="config.json", repo_id=BASE)
    found = hf_soup.search(BASE)
    assert [(group.members, group.verdict) for group in found.groups] == [(("acme/one", "acme/two"), "likely")]
    assert {each.id: each.verdict for each in found.siblings}["acme/stranger"] == "refused"
    assert said in found.not_compared
    assert found.recipe().base_model is None
    done = cli("search", BASE, "-o", "found.yaml")
    assert "They were compared with one another and not with it: " in done.out
    assert " ".join(done.out.split()).count(said) == 1
    assert "base" not in yaml.safe_load(Path("found.yaml").read_text())
    assert done.code == 0


@pytest.mark.parametrize("path", ["/acme/base/resolve/.*config.json", "/acme/base/resolve/.*safetensors"])
def test_a_hub_that_fails_is_no_verdict(grow: Callable[..., str], online: LocalHub, cli: Cli, path: str) -> None:
    """About the base it is an error; nobody is refused for it."""
    grow("one", config=MOODS)
    grow("two", config=MOODS)
    online.intercept = lambda request: (
        Response("later", 429, {"Retry-After": "0"}) if re.search(path, request.url.path) else None
    )
    done = cli("search", BASE)
    assert (done.code, done.out) == (1, "")
    assert "the Hub's rate limit is reached" in done.err


def test_one_that_cannot_be_read_just_now(grow: Callable[..., str], online: LocalHub, cli: Cli) -> None:
    """Is listed, and the answer said to be incomplete."""
    for number in range(3):
        grow(f"m{number}", downloads=9 - number, config=MOODS)
    online.intercept = lambda request: (
        Response("later", 429, {"Retry-After": "0"}) if "/acme/m1/resolve" in request.url.path else None
    )
    done = cli("search", BASE, "--json")
    assert done.code == 0
    assert done.json["unread"] == ["acme/m1"]
    assert [each["verdict"] for each in done.json["siblings"]] == ["proven", "unusable", "proven"]
    assert "note: incomplete: 1 of 3 could not be read just now: acme/m1" in done.err


def test_of_copies_the_one_with_names_is_kept(grow: Callable[..., str]) -> None:
    """However often the other is downloaded; among equals the most downloaded."""
    unnamed = {"id2label": None, "label2id": None}
    grow("second", downloads=9, config=MOODS)
    grow("again", downloads=8, config=unnamed, source="a")
    grow("original", downloads=5, config=MOODS, source="a")
    grow("copy", downloads=4, config=MOODS, source="a")
    found = hf_soup.search(BASE)
    assert [group.members for group in found.groups] == [("acme/second", "acme/original")]
    assert {each.id: each.why for each in found.siblings if each.verdict == "unusable"} == {
        f"acme/{name}": f"acme/{name} has the same weight files as acme/original." for name in ("again", "copy")
    }


def test_labels_of_models_without_a_head_do_not_count() -> None:
    """What a body or a language model has of them was left there by the class before."""
    for architecture, counts in {
        "ViTModel": False, "BertForMaskedLM": False, "LlamaForCausalLM": False, "ViTForImageClassification": True,
        "DetrForObjectDetection": True, "SegformerForSemanticSegmentation": True, "BertForTokenClassification": True,
        "DeiTForImageClassificationWithTeacher": True, None: True,
    }.items():  # fmt: skip
        config = MOODS | ({"architectures": [architecture]} if architecture else {})
        assert _labels(config) == (("negative", "positive") if counts else ())


def test_one_liar_does_not_refuse_an_honest_sibling(grow: Callable[..., str]) -> None:
    grow("liar", downloads=9, config=MOODS, strange=True)
    grow("honest", downloads=8, config=MOODS)
    liar, honest = hf_soup.search(BASE).siblings
    assert (liar.verdict, honest.verdict) == ("refused", "alone")
    assert "nothing in common with those of the base, acme/base" in liar.why
    grow("friend", downloads=7, config=MOODS)
    found = hf_soup.search(BASE)
    assert [group.members for group in found.groups] == [("acme/honest", "acme/friend")]
    assert found.recipe().base_model == BASE


def test_siblings_of_another_base_are_a_group(
    grow: Callable[..., str], publish: Callable[..., str], family: Path, tmp_path: Path, cli: Cli
) -> None:
    """Where the Hub has the model that they do come from; the note says that it is not this base."""
    other = tmp_path / "other"
    shutil.copytree(family / "base", other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    tensors = {key: 0.02 * torch.randn(each.shape, generator=generator) for key, each in tensors.items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text()) | {"id2label": {"0": "x", "1": "y"}, "label2id": None}
    (other / "config.json").write_text(json.dumps(config))
    publish("other", other)
    for name in ("liar-1", "liar-2"):
        moved = {key: each + 0.001 * torch.randn(each.shape, generator=generator) for key, each in tensors.items()}
        grow(name, config=MOODS, files={"model.safetensors": save(moved, {"format": "pt"})})
    found = hf_soup.search(BASE)
    (group,) = found.groups
    assert (group.verdict, group.from_base) == ("likely", False)
    assert "acme/base is not their base" in group.reasons[0].message
    assert not group.reasons[0].refuses
    assert found.recipe().base_model is None
    assert "acme/base is not their base" in " ".join(cli("search", BASE).out.split())


def test_what_is_said_of_one_in_a_line() -> None:
    """The name is left out only where it alone is spoken of."""

    def brief(why: str) -> str:
        return shown._brief(FineTune("acme/a", None, None, None, (), None, 0, "refused", why))

    assert brief("acme/a@1234567: config.json is a list.") == "config.json is a list."
    assert brief("acme/a has no weights.") == "has no weights."
    assert brief("'acme/a@1234567', file 'config.json' is gated.") == "file 'config.json' is gated."
    assert brief("acme/a and acme/b differ.") == "acme/a and acme/b differ."
    assert brief("acme/a, acme/b: they differ.") == "acme/a, acme/b: they differ."
    assert brief("acme/a (cosine 0.1): a stranger.") == "acme/a (cosine 0.1): a stranger."


def test_notes_of_a_group_end_with_a_sentence() -> None:
    """They are wrapped, and no sentence is cut short."""
    long = 60 * "word " + "end. " + "More " + 60 * "more " + "end."
    group = MergeableGroup(("acme/a", "acme/b"), "likely", (Finding("drifted", long),))
    two = tuple(FineTune(f"acme/{x}", "c" * 40, None, None, (), None, 0, "likely", group=1) for x in "ab")
    text = shown.fine_tunes(SearchResult("acme/base", "c" * 40, (), two, (group,)))
    assert text.endswith("word end.")
    assert max(map(len, text.splitlines())) <= 110


def test_what_strangers_write_is_bounded(grow: Callable[..., str], cli: Cli) -> None:
    """Configs that are none of a model's, and letters that would steer a terminal."""
    evil = {"id2label": {"0": "\x1b[2Jgone\n" + 5000 * "x", "1": "b"}}
    grow("escape-1", downloads=9, config=evil)
    grow("escape-2", downloads=8, config=evil)
    for number, config in enumerate((
        {"model_type": ["bert"], "architectures": "Bert"}, {"architectures": [{"a": 1}], "id2label": [3]},
        {"id2label": {"x": None}}, {"id2label": None, "num_labels": 10**9}, {"id2label": None, "num_labels": "two"},
    )):  # fmt: skip
        grow(f"odd-{number}", config=config)
        grow(f"odd-{number}-again", config=config)
    done = cli("search", BASE)
    assert done.code == 0
    assert "Group 1, proven: BertForSequenceClassification, 2 labels: �[2Jgone�xxx" in done.out
    assert max(map(len, done.out.splitlines())) < 200
    assert len(re.findall("^  acme/", done.out, re.MULTILINE)) == 12


def test_fine_tunes_as_they_are_on_the_hub(zoo: LocalHub, online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, an old name of the base in a card, labels in another case, licences of every spelling."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", zoo.endpoint)
    template = zoo.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", zoo.token)
    beans = hf_soup.search("google/vit-base-patch16-224-in21k", task="image-classification")
    named = [
        "hanyp/vit-base-beans", "salunev/vit-base-beans", "samink/vit-base-beans-tutorial-samink",
        "zqTensor/vit-base-beans",
    ]  # fmt: skip
    assert [(sorted(group.members), group.verdict) for group in beans.groups] == [(named, "proven")]
    assert {each.license for each in beans.siblings} == {"apache-2.0", "Apache-2.0", "other"}
    (unnamed,) = [each for each in beans.siblings if each.group is None]
    assert (unnamed.id, unnamed.labels) == ("cyanjing/vit-base-beans", ("LABEL_0", "LABEL_1", "LABEL_2"))
    emotion = hf_soup.search("distilbert-base-uncased")
    assert emotion.base == "distilbert/distilbert-base-uncased"
    assert [len(group.members) for group in emotion.groups] == [2]


def test_a_search_by_tags(meadow: LocalHub) -> None:
    """By several tags at once, the most downloaded first."""
    found = hub.search_models(["bert", "license:other"], 5)
    assert [(each.id, each.license, each.downloads) for each in found] == [
        ("acme/mail-1", "other", 9000), ("acme/mail-2", "other", 8999),
    ]  # fmt: skip
    assert [each.id for each in hub.search_models(["bert"], 1)] == ["acme/cardless"]
    assert [each.gated for each in hub.search_models(["bert"], 50) if each.id == "acme/gated"] == [True]
    assert hub.search_models(["bert", "no-such-tag"], 5) == []
