"""Published soups are cooked again from their repos alone: honest ones, tampered ones, and those that lack a part."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import yaml
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from starlette.requests import Request
from starlette.responses import Response

import hf_soup
from hf_soup import MergeError, Recipe, Soup, VerificationReport
from hf_soup.hub import download as transfer, repo as hub
from hf_soup.local_hub import LocalHub
from hf_soup.merging import digest_of_folder, layout
from hf_soup.methods import METHODS
from hf_soup.workflows import verify as verification

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
Publish = Callable[..., str]
WEIGHT = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture
def api(online: LocalHub) -> HfApi:
    return HfApi(endpoint=online.endpoint, token=online.token)


@pytest.fixture(scope="module")
def shelf(family: Path, trained: Path, module_path: Path) -> Path:
    """The folder of a Hub that has the family, and the two of its relatives that learned something."""
    folders = [*(family / name for name in ("base", "a", "b", "c")), *(trained / name for name in ("good", "fair"))]
    with LocalHub(module_path / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for folder in folders:
            stand_ins.publish(hub, f"acme/{folder.name}", {path.name: path.read_bytes() for path in folder.iterdir()})
    return module_path / "hub"


@pytest.fixture
def local_hub(shelf: Path, tmp_path: Path) -> Iterator[LocalHub]:
    """A copy of it: a Hub changes no file, it puts another one in its place."""
    shutil.copytree(shelf, tmp_path / "hub", copy_function=os.link)
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


def verify(model: str | Path, **options: Any) -> VerificationReport:
    return hf_soup.verify(str(model), **options)


def cook(tmp_path: Path, ingredients: list[Any] | None = None, **said: Any) -> Soup:
    recipe = Recipe(ingredients=ingredients or ["acme/a", "acme/b", "acme/c"], **said)
    return hf_soup.cook(recipe, tmp_path / "soup")


def once(kept: Path, tmp_path: Path, ingredients: list[str] | None = None, **said: Any) -> Soup:
    """A copy of a soup and of the cache after it; every test's Hub has the same commits, so it is cooked once."""
    if kept.exists():
        shutil.copytree(kept, tmp_path, symlinks=True, dirs_exist_ok=True)
        return Soup.open(tmp_path / "soup")
    made = cook(tmp_path, ingredients, **said)
    for name in ("soup", "home"):
        # All but the link to what all tests share.
        shutil.copytree(tmp_path / name, kept / name, symlinks=True, ignore=shutil.ignore_patterns("transformers"))
    return made


@pytest.fixture
def soup(online: LocalHub, module_path: Path, tmp_path: Path) -> Soup:
    """Of three on the Hub."""
    return once(module_path / "soup", tmp_path)


def pushed(soup: Soup, **options: Any) -> str:
    soup.push("acme/soup", **options)
    return "acme/soup"


def data(family: Path, name: str = "rows.csv") -> dict[str, Any]:
    return {"task": "text-classification", "dataset": str(family / name), "metric": "accuracy"}


def require_identical(found: VerificationReport) -> None:
    assert (found.verdict, found.different, found.reasons) == ("identical", [], ())
    assert len(set(found.digests.values())) == 1


# ---- honest soups ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("online")
def test_an_honest_soup_is_identical(tmp_path: Path) -> None:
    for number, said in enumerate(
        [
            {"ingredients": ["acme/a", {"model": "acme/b", "weight": 0.3}]},
            {"dtype": "bfloat16"},
            {"method": {"name": "wise_ft", "alpha": 0.3}},
            {"method": {"name": "task_arithmetic", "scale": 0.4}},
            {"tensor_weights": {"*layer.0*": [1, 2, 0], "classifier.*": [0, 0.25, 1]}},
            {"heads": "acme/b"},
            {"heads": "body"},
        ]
    ):
        recipe = Recipe(**{"ingredients": ["acme/a", "acme/b", "acme/c"], **said})
        require_identical(result := verify(hf_soup.cook(recipe, tmp_path / str(number)).folder))
        assert result.tensors > 30, said


def test_ingredients_are_fetched_and_not_kept(soup: Soup, tmp_path: Path) -> None:
    found = pushed(soup)
    shutil.rmtree(tmp_path / "soup")
    shutil.rmtree(tmp_path / "home")  # as it is on a stranger's machine
    require_identical(result := verify(found))
    assert result.model == f"acme/soup@{hub.resolve('acme/soup').revision[:7]}"
    assert not list(transfer.cache_folder().rglob("*.safetensors"))


@pytest.mark.usefixtures("online")
def test_a_choice_is_made_once(family: Path, tmp_path: Path) -> None:
    """It is in the recipe, and no data are needed."""
    select = {"name": "learned", "by": "tensor", "epochs": 1}
    made = cook(tmp_path, ["acme/fair", "acme/good"], select=select, validation=data(family))
    require_identical(verify(made.folder))


@pytest.mark.usefixtures("online")
def test_soups_of_soups(tmp_path: Path, publish: Publish) -> None:
    """They are their leaves or stay one ingredient, as the recipe that is verified says, whatever their own says."""
    first = cook(tmp_path, ["acme/a", "acme/b"])
    publish("pair", first.folder)
    for name, method, weights in (
        ("leaves", "linear", {"acme/a": 1.0, "acme/b": 1.0, "acme/c": 2.0}),
        ("whole", {"name": "wise_ft", "alpha": 0.5}, {"acme/pair": 1.0, "acme/c": 1.0}),
    ):
        made = hf_soup.cook(Recipe(ingredients=["acme/pair", "acme/c"], method=method), tmp_path / name)
        assert made.weights == weights
        require_identical(verify(made.folder))


def relabelled(family: Path, name: str, target: Path) -> Path:
    """A copy whose two outputs stand in the other order."""
    shutil.copytree(family / name, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (target / "config.json").write_text(json.dumps(config))
    tensors = {
        key: each.flip(0) if "classifier" in key else each
        for key, each in load_file(target / "model.safetensors").items()
    }
    save_file({key: each.contiguous() for key, each in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.usefixtures("online")
def test_rows_of_labels_are_moved_again(family: Path, publish: Publish, tmp_path: Path) -> None:
    publish("turned", relabelled(family, "b", tmp_path / "turned"))
    made = cook(tmp_path, ["acme/a", "acme/turned"], labels=["positive", "negative"])
    require_identical(verify(pushed(made)))
    assert json.loads((made.folder / "config.json").read_text())["id2label"]["0"] == "positive"


def test_a_sharded_soup_and_one_version_of_many(
    soup: Soup, tmp_path: Path, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pushed(soup)
    api.create_tag(first, tag="v1")
    shutil.move(soup.folder, tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(layout, "MAX_FILE_BYTES", 9000)
        second = cook(tmp_path, ["acme/a", "acme/b"])
    assert len(list(second.folder.glob("model-*.safetensors"))) > 2
    pushed(second, replace=True)
    one, other = verify("acme/soup@v1"), verify("acme/soup")
    require_identical(one)
    require_identical(other)  # though it is cooked again in one file
    assert one.digests["cooked"] == soup.digest
    assert other.digests["cooked"] == second.digest
    require_identical(verify(second.folder))


def test_the_command_line(cli: Cli, soup: Soup) -> None:
    pushed(soup)
    done = cli("verify", "acme/soup")
    assert done.code == 0
    assert done.out.startswith("identical: acme/soup@")
    assert "GB are needed" in done.err
    found = cli("verify", "acme/soup", "--json", "--quiet")
    assert found.code == 0
    assert {key: found.json[key] for key in ("verdict", "different", "reasons")} == {
        "verdict": "identical", "different": [], "reasons": [],
    }  # fmt: skip
    assert found.json["digests"]["recorded"] == soup.digest
    assert cli("verify", "acme/absent").code == 1
    assert cli("verify", "acme/soup", "--map", "a").code == 2
    plain = cli("verify", "acme/a", "--json")
    assert (plain.code, plain.json["verdict"], plain.json["reasons"][0]["code"]) == (
        3,
        "unverifiable",
        "recipe-refused",
    )


# ---- soups that are not what they say -------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT].view(torch.int32)[3, 5] ^= 1


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tamper(name: str) -> Callable[[Path], object]:
    """What somebody did to a soup."""
    return {
        "bit": lambda folder: rewrite(folder, flip_a_bit),
        "sign": lambda folder: rewrite(folder, lambda t: t[WEIGHT].neg_()),
        "nan": lambda folder: rewrite(folder, lambda t: t[WEIGHT][0].fill_(float("nan"))),
        "extra": lambda folder: rewrite(folder, lambda t: t.update(backdoor=torch.ones(2))),
        "missing": lambda folder: rewrite(folder, lambda t: t.pop(WEIGHT)),
        "shape": lambda folder: rewrite(folder, lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()})),
        "dtype": lambda folder: rewrite(folder, lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()})),
        "tokenizer": lambda folder: (folder / "vocab.txt").write_text(
            (folder / "vocab.txt").read_text().replace("good", "x").replace("bad", "good").replace("x", "bad")
        ),
        "no tokenizer": lambda folder: (folder / "vocab.txt").unlink(),
        "config": lambda folder: edit_json(folder / "config.json", hidden_act="relu"),
        "labels": lambda folder: edit_json(folder / "config.json", id2label={"0": "positive", "1": "negative"}),
        "code": lambda folder: (folder / "modeling.py").write_text("import os"),
        "pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "other weights": lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
        "template": lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"),
        "digest": lambda folder: edit_json(folder / "soup.json", digest="0" * 64),
        "utf-16": lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text(), "utf-16"),
        "mark": lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text(), "utf-8-sig"),
        "shares": lambda folder: edit_json(folder / "soup.json", weights={"acme/good": 0.9, "acme/fair": 0.1}),
        "method": lambda folder: edit_json(folder / "soup.json", method="slerp"),
        "best": lambda folder: edit_json(folder / "soup.json", best={"rows accuracy": "acme/absent"}),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "cut off": lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-8]
        ),
    }[name]  # fmt: skip


CHANGED = [
    ("bit", [WEIGHT, "soup.json"], "1 of 512 elements differ"),
    ("sign", [WEIGHT, "soup.json"], "512 of 512 elements differ"),
    ("nan", [WEIGHT, "soup.json"], "32 are not finite"),
    ("extra", ["backdoor", "soup.json"], "F32 (2) is not in the soup"),
    ("missing", [WEIGHT, "soup.json"], "F32 (16, 32) is not there"),
    ("shape", [WEIGHT, "soup.json"], "its shape is (32, 16) and should be (16, 32)"),
    ("dtype", [WEIGHT, "soup.json"], "it is BF16 and should be F32"),
    ("tokenizer", ["vocab.txt"], "its bytes are others"),
    ("no tokenizer", ["vocab.txt"], "it is not there"),
    ("config", ["config.json"], 'hidden_act: "relu" and should be "gelu"'),
    ("labels", ["config.json"], "id2label: "),
    ("code", ["modeling.py"], "could be loaded or run"),
    ("pickle", ["pytorch_model.bin"], "could be loaded or run"),
    ("adapter", ["adapter_config.json"], "could be loaded or run"),
    ("other weights", ["other.safetensors"], "could be loaded or run"),
    ("template", ["chat_template.jinja"], "could be loaded or run"),
    ("digest", ["soup.json"], "its digest is 0000"),
    ("utf-16", ["config.json"], "its bytes are others"),
    ("mark", ["config.json"], "its bytes are others"),
    ("shares", ["soup.json"], 'its `weights` {"acme/good": 0.9, "acme/fair": 0.1} should be {"acme/a": 1.0, '),
    ("method", ["soup.json"], 'its `method` "slerp" should be "linear"'),
    ("best", ["soup.json"], '`best` on rows accuracy is "acme/absent", which its scores contradict'),
]


def test_what_was_changed_is_named(soup: Soup, cli: Cli, tmp_path: Path) -> None:
    for name, different, text in CHANGED:
        bad = shutil.copytree(soup.folder, tmp_path / name)
        tamper(name)(bad)
        done = cli("verify", bad, "--json", "--quiet")
        found = done.json
        assert (done.code, found["verdict"], found["different"]) == (3, "different", different), name
        assert text in found["differences"][0]["text"]
        if name == "bit":
            assert (found["differences"][0]["elements"], found["differences"][0]["ulps"]) == (1, 1)
            assert 0 < found["differences"][0]["largest"] < 1e-6
    shown = cli("verify", tmp_path / "config")
    assert shown.code == 3
    assert "- config.json: " in shown.out


def test_what_was_changed_in_a_repo_is_named(soup: Soup, publish: Publish) -> None:
    for name in ("bit", "config", "code"):
        tamper(name)(soup.folder)
    publish("bad", soup.folder)
    assert verify("acme/bad").different == [WEIGHT, "config.json", "modeling.py", "soup.json"]


def test_weights_that_are_not_there_are_missing(soup: Soup, publish: Publish, cli: Cli) -> None:
    for name in ("cut off", "no weights"):
        tamper(name)(soup.folder)
        publish(bad := name.replace(" ", "-"), soup.folder)
        done = cli("verify", f"acme/{bad}")
        assert done.code == 3
        assert done.out.startswith(f"different: acme/{bad}@")
        assert "F32 (16, 32) is not there" in cli("verify", soup.folder, "--json").out
        assert "more in --json" in done.out


def test_what_a_stranger_put_there_without_number_is_named_in_part(soup: Soup, cli: Cli) -> None:
    rewrite(soup.folder, lambda t: t.update({f"extra.{number:04}": torch.ones(2) for number in range(3000)}))
    for number in range(100):
        (soup.folder / f"run_{number:03}.py").touch()
    done = cli("verify", str(soup.folder), "--json")
    assert done.code == 3
    assert len(done.out) < 20_000
    tensors, files = ([each for each in done.json["differences"] if each["name"][0] == first] for first in "er")
    assert (len(tensors), len(files)) == (21, 21)
    assert tensors[-1]["text"] == "F32 (2) is not in the soup; and 2,979 more like this"
    assert files[-1]["text"].endswith("; and 79 more like this")


def test_the_bookkeeping_does_not_count(soup: Soup) -> None:
    """Versions, the order of keys, a card with more words, a picture, a licence."""
    config = json.loads((soup.folder / "config.json").read_text())
    (soup.folder / "config.json").write_text(
        json.dumps(dict(reversed((config | {"transformers_version": "9"}).items())))
    )
    (soup.folder / "LICENSE").write_text("mit")
    (soup.folder / "README.md").write_text("# mine")
    (soup.folder / "images").mkdir()
    (soup.folder / "images" / "x.png").write_bytes(b"x")
    require_identical(verify(soup.folder))


def test_other_weights_in_the_recipe_are_another_soup(soup: Soup) -> None:
    said = yaml.safe_load((soup.folder / "soup.yaml").read_text())
    said["ingredients"][0]["weight"] = 2.0
    (soup.folder / "soup.yaml").write_text(yaml.safe_dump(said))
    found = verify(soup.folder)
    assert found.verdict == "different"
    assert WEIGHT in found.different
    assert found.digests["recorded"] == found.digests["published"] != found.digests["cooked"]
    *tensors, report = found.differences
    assert all(each.kind == "values" and each.ulps and each.largest for each in tensors)
    assert report.name == "soup.json"


def test_a_shard_that_is_gone(soup: Soup, publish: Publish) -> None:
    tensors = load_file(soup.folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, soup.folder / file, {"format": "pt"})
    (soup.folder / "model.safetensors").unlink()
    places = {name: file for file, part in parts.items() for name in part}
    index = soup.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    require_identical(verify(soup.folder))
    index.write_text(json.dumps({"weight_map": places | {names[0]: "model-2.safetensors"}}))
    assert verify(soup.folder).different == ["model.safetensors.index.json"]
    index.write_text(json.dumps({"weight_map": places}))
    (soup.folder / "model-1.safetensors").unlink()
    publish("torn", soup.folder)
    found = verify("acme/torn")
    assert found.verdict == "different"
    assert set(found.different) == {*names[:9], "model-1.safetensors", "soup.json"}
    index.write_text("[" * 100_000)
    assert verify(soup.folder).verdict == "different"


def test_shards_beside_a_whole_file(soup: Soup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not what was compared, though they have the names of those that are cooked again; and some load them."""
    with monkeypatch.context() as patch:
        patch.setattr(layout, "MAX_FILE_BYTES", 9000)
        made = hf_soup.cook(soup.recipe, tmp_path / "many").folder
        shards = sorted(path.name for path in made.glob("model-*.safetensors"))
        for name in shards:
            shutil.copy(soup.folder / "model.safetensors", made / name)
        shutil.copy(soup.folder / "model.safetensors", made)
        found = verify(made)
    assert (found.verdict, found.different) == ("different", [*shards, "model.safetensors.index.json"])


def test_within_the_bound_of_a_method_that_states_one(soup: Soup, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it makes is rounded, to neighbours at most where it is as good as the same."""
    monkeypatch.setitem(METHODS.loaded, "linear", replace(METHODS["linear"], bound=1e-12))
    require_identical(verify(soup.folder))
    rewrite(soup.folder, flip_a_bit)
    # As it was made on the other machine.
    edit_json(soup.folder / "soup.json", digest=digest_of_folder(soup.folder))
    found = verify(soup.folder)
    assert (found.verdict, found.different) == ("equivalent", [WEIGHT])
    rewrite(soup.folder, lambda tensors: tensors[WEIGHT].view(torch.int32)[3, 5].bitwise_xor_(4))
    assert verify(soup.folder).verdict == "different"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bound_is_that_of_the_tensor_and_before_it_is_rounded(online: LocalHub, tmp_path: Path, dtype: str) -> None:
    """On another machine numbers that differ by 1e-16 may be rounded to two neighbours, which are far more apart."""
    own = [{"tensors": WEIGHT, "method": "multislerp"}]
    soup = cook(tmp_path, overrides=own, dtype=dtype)

    def neighbours(name: str, steps: int) -> Callable[[dict[str, torch.Tensor]], object]:
        kind = torch.int32 if dtype == "float32" else torch.int16
        return lambda tensors: tensors[name].view(kind).view(-1)[::7].add_(steps)

    def found() -> str:
        edit_json(soup.folder / "soup.json", digest=digest_of_folder(soup.folder))
        return verify(soup.folder).verdict

    require_identical(verify(soup.folder))
    rewrite(soup.folder, neighbours(WEIGHT, 1))
    assert found() == "equivalent"
    rewrite(soup.folder, neighbours(WEIGHT, 1))
    assert found() == "different"
    rewrite(soup.folder, neighbours(WEIGHT, -2))
    assert found() == "identical"
    rewrite(soup.folder, neighbours(WEIGHT.replace("weight", "bias"), 1))
    assert found() == "different"


# ---- what cannot be verified ----------------------------------------------------------------------------------


def answered(status: int, code: str, path: str) -> Callable[[Request], Response | None]:
    def intercept(request: Request) -> Response | None:
        return Response(status_code=status, headers={"X-Error-Code": code}) if path in request.url.path else None

    return intercept


def test_an_ingredient_that_cannot_be_had(
    soup: Soup, online: LocalHub, api: HfApi, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone, private, gated, or the commit is gone: which, and which of the ingredients."""
    pushed(soup)
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setattr(transfer, "_signed", {})
    api.update_repo_settings("acme/a", private=True)
    api.update_repo_settings("acme/c", gated="auto")
    online.intercept = answered(404, "RevisionNotFound", "/api/models/acme/b/")
    found = verify("acme/soup", token=False)
    assert found.verdict == "unverifiable"
    assert [(reason.code, reason.ingredients) for reason in found.reasons] == [
        ("gone", ("acme/a",)),
        ("revision-gone", ("acme/b",)),
        ("gated", ("acme/c",)),
    ]
    online.intercept = answered(404, "RepoNotFound", "/api/models/acme/b/")
    done = cli("verify", "acme/soup", "--json")
    assert done.code == 3
    (reason,) = done.json["reasons"]
    assert (reason["code"], reason["ingredients"]) == ("gone", ["acme/b"])
    assert "acme/b" in reason["message"]
    assert "[gone] 'acme/b@" in cli("verify", "acme/soup").out


def test_an_ingredient_that_goes_while_it_is_read(soup: Soup, online: LocalHub, tmp_path: Path) -> None:
    pushed(soup)
    shutil.rmtree(tmp_path / "home")
    online.intercept = answered(403, "GatedRepo", "/acme/b/resolve/")
    (reason,) = verify("acme/soup").reasons
    assert (reason.code, reason.ingredients) == ("gated", ("acme/b",))


def test_a_hub_that_fails_is_no_verdict(soup: Soup, online: LocalHub) -> None:
    pushed(soup)
    online.intercept = answered(503, "", "/api/models/acme/b/")
    with pytest.raises(hf_soup.ResolveError, match="503"):
        verify("acme/soup")


def test_bytes_that_are_changed_on_the_way_are_no_verdict(soup: Soup, online: LocalHub) -> None:
    pushed(soup)  # whose ingredients are in the cache

    def transform(request: Request, response: Response) -> Response:
        if not request.url.path.startswith("/cdn/"):
            return response
        wrong = bytearray(Path(response.path).read_bytes())  # type: ignore[attr-defined]
        wrong[-1] ^= 1
        return Response(bytes(wrong))  # all of it, though a range was asked for, which a server may do

    online.transform = transform
    with pytest.raises(hf_soup.ResolveError, match="not the ones that the Hub states"):
        verify("acme/soup")
    online.transform = None
    require_identical(verify("acme/soup"))


@pytest.mark.usefixtures("short_pauses")
def test_without_the_hub_there_is_no_verdict(soup: Soup, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds a part of a repo, and what is not in it would look as if it were missing."""
    pushed(soup)
    assert cli("verify", "acme/soup", "--quiet").code == 0
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = cli("verify", "acme/soup", "--quiet")
    assert (done.code, done.out) == (1, "")
    assert "the Hub was not reached" in done.err


@pytest.mark.usefixtures("short_pauses")
def test_ingredients_of_which_the_cache_has_a_part_are_no_verdict(
    soup: Soup, api: HfApi, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was never fetched would look as if the ingredient had none."""
    shutil.rmtree(tmp_path / "home")
    for files in (["config.json"], ["model.safetensors", "vocab.txt"]):
        for each in soup.recipe.ingredients:
            for file in files:
                api.hf_hub_download(each.model, file, revision=each.revision)
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            done = cli("verify", soup.folder, "--quiet")
        assert (done.code, done.out) == (1, "")
        assert "cannot be reached" in done.err


def test_a_folder_whose_ingredients_are_all_in_the_cache_needs_no_hub(
    soup: Soup, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the Hub listed when the soup was cooked is known, so nothing that is not there looks as if it never was."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = cli("verify", soup.folder, "--quiet")
    assert (done.code, done.out.split(":")[0]) == (0, "identical"), done.err
    (vocabulary,) = (tmp_path / "home").rglob("models--acme--a/snapshots/*/vocab.txt")
    vocabulary.unlink()
    done = cli("verify", soup.folder, "--quiet")
    assert (done.code, done.out) == (1, "")
    assert "file 'vocab.txt'" in done.err
    for note in (tmp_path / "home").rglob("resolved/files/*"):
        note.write_text("[")
    assert "cannot be reached" in cli("verify", soup.folder, "--quiet").err


def test_an_ingredient_that_holds_nan(soup: Soup, family: Path, publish: Publish, tmp_path: Path) -> None:
    """Nobody can have cooked anything of it, so a recipe that names it says nothing of the weights beside it."""
    shutil.copytree(family / "a", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    publish("nan", tmp_path / "nan")
    recipe = yaml.safe_load((soup.folder / "soup.yaml").read_text())
    recipe["ingredients"][0] = {"model": "acme/nan", "revision": hub.resolve("acme/nan").revision}
    (soup.folder / "soup.yaml").write_text(yaml.safe_dump(recipe))
    found = verify(soup.folder)
    assert (found.verdict, [each.code for each in found.reasons]) == ("unverifiable", ["not-cookable"])
    assert "holds nan" in found.reasons[0].message
    assert found.reasons[0].ingredients == ("acme/nan",)


def test_a_disk_error_says_nothing_of_what_is_kept(soup: Soup, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(verification, "write_assets", refuse)
    done = cli("verify", soup.folder, "--quiet")
    assert (done.code, done.out) == (1, "")
    assert "Input/output error" in done.err
    assert "is kept" not in done.err
    assert "Make room or mend the cause, and run the same command again." in done.err


@pytest.mark.usefixtures("online")
def test_a_tokenizer_that_nobody_in_the_recipe_gives(family: Path, publish: Publish, tmp_path: Path) -> None:
    """As where only an ingredient that was not selected has one."""
    for name in "ab":
        shutil.copytree(family / name, tmp_path / name)
        for file in ("vocab.txt", "tokenizer_config.json", "README.md"):
            (tmp_path / name / file).unlink()
        publish(f"bare-{name}", tmp_path / name)
    made = cook(tmp_path, ["acme/bare-a", "acme/bare-b"])
    assert not (made.folder / "vocab.txt").exists()
    require_identical(verify(made.folder))
    shutil.copy(family / "c" / "vocab.txt", made.folder)
    found = verify(made.folder)
    assert (found.verdict, [reason.code for reason in found.reasons]) == ("unverifiable", ["file-unexplained"])


def test_what_was_local_is_where_the_caller_says(
    online: LocalHub, family: Path, tmp_path: Path, cli: Cli, publish: Publish
) -> None:
    """By name; where two share a name, by the first digits of the sha256."""
    for number, name in enumerate("ab"):
        shutil.copytree(family / name, tmp_path / str(number) / "run")
    recipe = Recipe(ingredients=["acme/c", *(str(tmp_path / str(number) / "run") for number in range(2))])
    made = hf_soup.cook(recipe, tmp_path / "soup")
    pushed(made)
    shorts = [each.revision[7:14] for each in made.recipe.ingredients[1:] if each.revision]
    done = cli("verify", "acme/soup", "--json")
    assert [reason["code"] for reason in done.json["reasons"]] == ["local", "local"]
    assert "--map run=PATH" in done.json["reasons"][0]["message"]
    options = [f"--map=run@{short}={number}/run" for number, short in enumerate(shorts)]
    done = cli("verify", "acme/soup", *options, "--json")
    assert done.json["verdict"] == "identical", done.out
    done = cli("verify", "acme/soup", "--map", "run=0/run", "--json")
    (reason,) = done.json["reasons"]
    assert reason["code"] == "other-weights"
    assert made.recipe.ingredients[2].revision in reason["message"]
    assert cli("verify", "acme/soup", "--map", "run=nowhere", "--json").json["reasons"][0]["code"] == "local"


def test_a_method_of_another_version(soup: Soup, cli: Cli) -> None:
    said = yaml.safe_load((soup.folder / "soup.yaml").read_text())
    (soup.folder / "soup.yaml").write_text(yaml.safe_dump({**said, "method": {"name": "magic", "density": 0.2}}))
    done = cli("verify", soup.folder)
    assert done.code == 3
    assert done.out.splitlines()[0].startswith("unverifiable: ")
    assert "[method-unknown] Its method is 'magic'" in done.out


def test_a_recipe_that_makes_no_sense_is_no_crash(soup: Soup) -> None:
    values = yaml.safe_load((soup.folder / "soup.yaml").read_text())
    nonsense: list[tuple[dict[str, Any], str]] = [
        ({"ingredients": [f"/etc@{'0' * 40}"]}, "recipe-refused"),
        ({"ingredients": [f"acme/a@{'0' * 40}" for _ in range(1001)]}, "recipe-refused"),
        ({"method": {"name": "linear", "normalize": "os.system"}}, "recipe-refused"),
        ({"method": {"name": "wise_ft", "alpha": 1e999}}, "recipe-refused"),
        ({"tensor_weights": {"*": [1e308, 1e308, 1e308]}}, "recipe-refused"),
        ({"tensor_weights": {"nothing*": [1, 1, 1]}}, "not-cookable"),
        ({"heads": "acme/a", "labels": ["x"]}, "not-cookable"),
        ({"labels": ["x", "y", "z"]}, "not-cookable"),
    ]
    for said, code in nonsense:
        (soup.folder / "soup.yaml").write_text(yaml.safe_dump({**values, **said}))
        found = verify(soup.folder)
        assert (found.verdict, [reason.code for reason in found.reasons]) == ("unverifiable", [code])


def test_a_hundred_ingredients_that_are_not_there(soup: Soup, cli: Cli) -> None:
    values = yaml.safe_load((soup.folder / "soup.yaml").read_text())
    values["ingredients"] = [f"acme/none-{number}@{'0' * 40}" for number in range(100)]
    (soup.folder / "soup.yaml").write_text(yaml.safe_dump(values))
    done = cli("verify", soup.folder)
    assert done.code == 3
    assert done.out.count("[gone]") == 20
    assert "and 80 more in --json" in done.out


def test_a_soup_that_names_itself(soup: Soup, publish: Publish, tmp_path: Path) -> None:
    """At an earlier commit that is an ingredient as any; no repo can name its own commit."""
    pushed(soup)
    own = hub.resolve("acme/soup").revision
    said = yaml.safe_load((soup.folder / "soup.yaml").read_text())
    said["ingredients"][0] = f"acme/soup@{own}"
    (soup.folder / "soup.yaml").write_text(yaml.safe_dump(said))
    publish("soup", soup.folder)
    found = verify("acme/soup")
    assert found.verdict == "different"
    assert WEIGHT in found.different


def test_a_full_disk_is_said_before_anything_is_fetched(
    soup: Soup, online: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pushed(soup)
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setattr(verification, "free_bytes", lambda _: 1000)
    before = len(online.requests)
    with pytest.raises(MergeError, match="set TMPDIR to a folder on a larger disk"):
        verify("acme/soup")
    assert all(each.range != "" for each in online.requests[before:] if "/cdn/" in each.path)
    assert not list(transfer.cache_folder().rglob("*.safetensors"))


# ---- scores ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(online: LocalHub, family: Path, module_path: Path, tmp_path: Path) -> Soup:
    models, report = ["acme/good", "acme/fair"], [data(family, "report.csv")]
    return once(module_path / "scored", tmp_path, models, select="greedy", validation=data(family), test=report)


def test_the_best_ingredient_is_the_one_that_is_best_on_the_validation_data(family: Path, tmp_path: Path) -> None:
    """Whatever is best on the test data; of several, by their weights, and of a loss the least."""
    looks = [data(family), {**data(family), "metric": "loss", "weight": 0.01}]
    test = [{**data(family, "report.csv"), "metric": metric} for metric in ("accuracy", "loss")]
    models = [str(family / name) for name in "abc"]
    soup = cook(tmp_path, models, validation=looks, test=test)
    paths = {name: str(family / name) for name in "abc"}
    require_identical(verify(soup.folder, map=paths))
    scores = {name: {title: each.value for title, each in of.items()} for name, of in soup.report.scores.items()}
    accuracy, loss = soup.report.validation
    worst = min(soup.weights, key=lambda name: scores[name][accuracy] - 0.01 * scores[name][loss])
    assert worst not in soup.report.best.values()
    edit_json(soup.folder / "soup.json", best={**soup.report.best, accuracy: worst})
    assert verify(soup.folder, map=paths).different == ["soup.json"]


def where(family: Path) -> list[str]:
    return [f"--map={name}={family / name}" for name in ("rows.csv", "report.csv")]


def test_scores_are_measured_again(cli: Cli, api: HfApi, family: Path, tmp_path: Path) -> None:
    """Hub data by commit, local data where the caller says, beside soup.json and the card."""
    (tmp_path / "data").mkdir()
    shutil.copy(family / "report.csv", tmp_path / "data" / "data.csv")
    api.create_repo("acme/rows", repo_type="dataset")
    api.upload_folder(repo_id="acme/rows", repo_type="dataset", folder_path=tmp_path / "data")
    report = {"task": "text-classification", "dataset": "acme/rows", "split": "train", "metric": "accuracy"}
    recipe = Recipe(ingredients=["acme/good", "acme/fair"], select="greedy", validation=data(family), test=report)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    done = cli("cook", "r.yaml", "-o", "soup", "--push", "acme/soup", "--quiet")
    assert done.code == 0, done.err
    done = cli("verify", "acme/soup", "--score", "--json", f"--map=rows.csv={family / 'rows.csv'}")
    found = done.json
    assert (done.code, found["verdict"]) == (0, "identical"), done.out + done.err
    made = Soup.open(tmp_path / "soup")
    first, second = found["scores"]
    assert [first["title"], second["title"]] == list(made.scores["soup"])
    assert all(each["agrees"] and each["measured"] == each["published"] for each in (first, second))
    assert second["card"] == round(second["measured"], 6)


def test_data_of_another_machine_are_not_measured(scored: Soup, family: Path, cli: Cli) -> None:
    pushed(scored)
    done = cli("verify", "acme/soup", "--score", "--json")
    assert (done.code, done.json["verdict"]) == (3, "unverifiable")
    (reason,) = done.json["reasons"]
    assert reason["code"] == "data"
    assert "--map rows.csv=PATH" in reason["message"]
    assert done.json["digests"]["published"] == done.json["digests"]["cooked"] == scored.digest
    done = cli("verify", "acme/soup", "--score", *where(family))
    assert done.code == 0
    assert "Scores, shares of one in percent:" in done.out
    done = cli(
        "verify", "acme/soup", "--score", *where(family)[:1], f"--map=report.csv={family / 'rows.csv'}", "--json"
    )
    assert done.json["reasons"][0]["code"] == "not-measurable"
    assert "has changed" in done.json["reasons"][0]["message"]


def test_scores_that_nobody_measures_again_are_named(scored: Soup, family: Path, cli: Cli) -> None:
    summary = json.loads((scored.folder / "soup.json").read_text())
    title = list(summary["scores"]["soup"])[1]
    summary["scores"]["soup"][title]["value"] = 0.123
    (scored.folder / "soup.json").write_text(json.dumps(summary))
    done = cli("verify", scored.folder, "--score", *where(family))
    assert done.code == 3
    assert done.out.startswith("different: ")
    assert "12.30" in done.out
    found = cli("verify", scored.folder, "--score", *where(family), "--json").json
    assert found["different"] == [title]
    assert cli("verify", scored.folder).code == 0  # nobody asked


def test_scores_that_the_recipe_has_no_data_for(scored: Soup, family: Path, cli: Cli) -> None:
    """Nobody can measure them, so they are not passed over."""
    said = yaml.safe_load((scored.folder / "soup.yaml").read_text())
    for key, count in (("test", 1), ("validation", 0)):
        del said[key]
        (scored.folder / "soup.yaml").write_text(yaml.safe_dump(said))
        done = cli("verify", scored.folder, "--score", *where(family), "--json")
        assert (done.code, done.json["verdict"]) == (3, "unverifiable")
        (reason,) = done.json["reasons"]
        assert reason["message"] == f"Its soup.json states 2 scores, and its recipe names data for {count} of them."
    assert cli("verify", scored.folder).code == 0


def test_a_model_that_is_not_its_ingredients_is_not_measured(scored: Soup, family: Path, cli: Cli) -> None:
    """It would have a million layers."""
    edit_json(scored.folder / "config.json", num_hidden_layers=10**6)
    done = cli("verify", scored.folder, "--score", *where(family))
    assert done.code == 3
    assert "config.json: num_hidden_layers: 1000000 and should be 2" in done.out
    assert "note: nothing is measured, as config.json is not what its ingredients give" in done.err


def test_half_a_letter_in_a_config(family: Path, publish: Publish, cli: Cli, tmp_path: Path) -> None:
    """JSON has an escape for it, and it could not be written into the soup's config."""
    shutil.copytree(family / "a", tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", note="\ud800é")
    done = cli("cook", publish("half", tmp_path / "a"), "acme/b", "-o", "soup")
    assert done.code == 1
    assert "config.json is not valid JSON" in done.err


def test_a_tokenizer_that_reads_nothing(scored: Soup, family: Path, publish: Publish, cli: Cli, tmp_path: Path) -> None:
    """Its library raises what has no class of its own."""
    shutil.copytree(family / "a", tmp_path / "a")
    (tmp_path / "a" / "vocab.txt").write_text("x")
    publish("bad", tmp_path / "a")
    said = yaml.safe_load((scored.folder / "soup.yaml").read_text())
    said["ingredients"] = [f"acme/bad@{hub.resolve('acme/bad').revision}"]
    (scored.folder / "soup.yaml").write_text(yaml.safe_dump(said))
    shutil.copy(tmp_path / "a" / "vocab.txt", scored.folder)
    done = cli("verify", scored.folder, "--score", *where(family))
    assert done.code == 3
    text = " ".join(done.out.split())
    assert "The donor's tokenizer cannot read report.csv: WordPiece error: Missing [UNK] token" in text


def test_what_a_stranger_wrote_does_not_steer_the_terminal(scored: Soup, family: Path, cli: Cli) -> None:
    said = yaml.safe_load((scored.folder / "soup.yaml").read_text())
    said["test"][0]["name"] = "\x1b[31mred\x07"
    (scored.folder / "soup.yaml").write_text(yaml.safe_dump(said))
    done = cli("verify", scored.folder, "--score", *where(family))
    assert done.code == 0
    assert "warning: rows.csv, �[31mred�: labels matched by number" in done.err
    assert cli("cook", scored.folder, "--add", "acme/base", "-o", "next").err.count("�[31mred�") == 1


def test_a_metric_that_is_code_does_not_run(scored: Soup, family: Path, tmp_path: Path, cli: Cli) -> None:
    said = yaml.safe_load((scored.folder / "soup.yaml").read_text())
    (tmp_path / "owned.py").write_text("raise SystemExit('it ran')")
    for metric in ("owned:run", "os:system", "owned.py"):
        said["test"][0] |= {"metric": metric, "trust_remote_code": True}
        (scored.folder / "soup.yaml").write_text(yaml.safe_dump(said))
        done = cli("verify", scored.folder, "--score", *where(family), "--json")
        assert done.json["verdict"] == "unverifiable"
        assert f"The metric '{metric}' is code" in done.json["reasons"][0]["message"]
        assert "it ran" not in done.out + done.err
    assert cli("verify", scored.folder).code == 0
