"""What users get wrong: one message each that names the thing and says what to do, an exit code, and no harm done."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from hf_soup.local_hub import LocalHub
from hf_soup.methods import METHODS
from hf_soup.selection import SELECTIONS

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
Publish = Callable[..., str]
NOBODY = "hf_nobody_knows_this"


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub with two people on it; the first one is logged in."""
    with LocalHub(tmp_path / "hub", users={"hf_acme": "acme", "hf_other": "other"}) as hub:
        yield hub


def refused(done: Any, *said: str, code: int = 1) -> None:
    """That a command failed with these words on stderr, nothing on stdout and no more than a screen of text."""
    assert done.code == code, done
    assert done.out == ""
    for each in said:
        assert each in done.err
    assert done.err.startswith(("Error: ", "Usage: ", "warning: ", "note: "))
    assert "Error" in done.err
    assert len(done.err) < 2500
    assert NOBODY not in done.err


def test_a_model_that_cannot_be_had(
    cli: Cli, publish: Publish, online: LocalHub, family: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish("a")
    publish("hidden", family / "b", private=True)
    publish("gated", family / "b")
    HfApi().update_repo_settings("acme/gated", gated="auto")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    publish("bare", bare)
    (bare / "pytorch_model.bin").write_bytes(b"x")
    publish("pickled", bare)
    refused(cli("check", "acme/a", "acme/nothing"), f"'acme/nothing' does not exist on {online.endpoint}", "spelling")
    refused(cli("check", "acme/a@v9", "acme/a"), "'acme/a@v9': there is no such branch, tag or commit", "after '@'")
    refused(cli("check", "acme/a", "acme/bare"), "acme/bare@", "has no weights", "It holds .gitattributes, config.json")
    refused(cli("check", "acme/a", "acme/pickled"), "only pytorch_model.bin", "recipe that says `allow_pickle: true`")
    refused(cli("check", "acme/a", "acme/a--b"), "'acme/a--b' is neither a folder nor a Hub id", "`owner/name`")
    refused(cli("check", "acme/a", "digits-1"), "'digits-1' is neither a folder nor a Hub id", "`owner/name`")
    refused(cli("check", "acme/a", "my folder"), "'my folder' is neither a folder nor a Hub id")
    refused(cli("check", "acme/a", tmp_path / "nowhere"), "nowhere' is neither a folder nor a Hub id")
    both = cli("check", "acme/one", "acme/two")
    refused(both, "'acme/one' does not exist", "'acme/two' does not exist")
    refused(cli("check", "acme/a", "acme/a", "--base", "acme/gone"), "The base cannot be used: 'acme/gone'")
    refused(cli("cook", "acme/nothing", "acme/a", "-o", "soup"), "'acme/nothing' does not exist")

    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(cli("check", "acme/a", "acme/hidden"), "'acme/hidden' does not exist", "a token that may read it")
    refused(cli("check", "acme/a", "acme/gated"), "acme/gated", "is gated", f"{online.endpoint}/acme/gated")
    monkeypatch.setenv("HF_TOKEN", NOBODY)
    refused(cli("check", "acme/a", "acme/hidden"), "token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused(cli("check", "acme/a", "acme/hidden"), "'acme/hidden' does not exist", "hf auth login")
    refused(cli("check", "acme/a", "acme/gated"), "is gated", "Accept the terms")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("field", ["self: 1", "ignore_metadata_errors: true"])
def test_a_card_that_the_client_cannot_read(
    field: str, cli: Cli, publish: Publish, family: Path, tmp_path: Path
) -> None:
    """Its keys become arguments there, and the Hub takes any. It costs nobody but that model."""
    odd = shutil.copytree(family / "base", tmp_path / "odd")
    (odd / "README.md").write_text(f"---\nlicense: mit\n{field}\n---\n")
    publish("base", odd)
    publish("a")
    publish("b")
    refused(cli("check", "acme/a", "acme/base"), "'acme/base': what http://", "README.md")
    refused(cli("push", family / "a", "acme/base"), "soup")
    checked = cli("check", "acme/a", "acme/b")
    assert checked.code == 0
    assert "acme/base" in checked.out


def test_with_json_an_error_is_json(cli: Cli, online: LocalHub) -> None:
    """On stdout, for scripts; and nothing on stderr."""
    done = cli("check", "acme/one", "acme/nothing", "--json")
    assert done.code == 1
    assert done.err == ""
    assert set(done.json) == {"error"}
    assert set(done.json["error"]) == {"type", "code", "message", "hint"}
    assert (done.json["error"]["type"], done.json["error"]["code"]) == ("ResolveError", "gone")
    assert cli("check", "acme/one", "nobody/here/or/there", "--json").json["error"]["code"] == "resolve"
    done = cli("methods", "magic", "--json")
    assert done.json["error"] == {
        "type": "RecipeError",
        "code": "recipe",
        "message": "There is no method or selection 'magic'.",
        "hint": f"Known are: {', '.join([*METHODS, *sorted(SELECTIONS)])}.",
    }
    assert "'gredy' (did you mean `greedy`?)." in cli("methods", "gredy").err


def test_ingredients_that_make_no_soup(cli: Cli, family: Path, tmp_path: Path) -> None:
    one = cli("check", family / "a")
    assert one.code == 3
    assert "refused" in one.out
    assert "[single] A soup needs two models or more" in one.out
    refused(cli("cook", family / "a", "-o", "soup"), "A soup needs two models or more")
    twice = cli("cook", family / "a", family / "a", "-o", "twice", "--json")
    assert twice.code == 0
    assert "are equal in every number that was read: copies of one model, which all count" in twice.err
    assert load_file(tmp_path / "twice" / "model.safetensors").keys()
    a, same = (load_file(folder / "model.safetensors") for folder in (family / "a", tmp_path / "twice"))
    assert all(torch.equal(a[name], same[name]) for name in a)


def test_a_broken_ingredient_is_named(cli: Cli, family: Path, tmp_path: Path) -> None:
    """With the tensor and the place of the first number that is none."""
    broken = tmp_path / "broken"
    shutil.copytree(family / "b", broken)
    tensors = load_file(broken / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refused(cli("cook", family / "a", broken, "-o", "soup"), f"'{name}' of local:broken", "holds nan at [3, 5]")
    assert not (tmp_path / "soup").exists()


def recipe_of(family: Path, **values: Any) -> str:
    return yaml.safe_dump({"ingredients": [str(family / "a"), str(family / "b")], **values})


def test_recipes_that_ask_for_nonsense(cli: Cli, family: Path, tmp_path: Path) -> None:
    score = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "magic"}, f"`method` is 'magic'.\nKnown are: {', '.join(METHODS)}."),
        ({"method": "tie"}, "`method` is 'tie' (did you mean `ties`?)."),
        ({"method": {"name": "ties", "densty": 1}}, "ties has no parameter 'densty' (did you mean `density`?)."),
        ({"select": "gredy", "validation": score}, "`select` is 'gredy' (did you mean `greedy`?)."),
        ({"method": {"name": "linear", "density": 1}}, "linear has no parameter 'density'.\nIt takes: "),
        ({"select": "tastiest"}, f"`select` is 'tastiest'.\nKnown are: {', '.join(sorted(SELECTIONS))}."),
        ({"select": "greedy"}, "looks at validation scores, and the recipe has no `validation`"),
        (
            {"select": {"name": "greedy", "accept": 1}, "validation": score},
            "greedy: 'accept' is 1; it is one of >=, >.",
        ),
        ({"select": {"name": "greedy", "accept": "~"}, "validation": score}, "'accept' is '~'"),
        ({"validation": {**score, "metric": "beauty"}}, "say `trust_remote_code: true` beside `metric`"),
        ({"validation": {**score, "metric": "acuracy"}}, "metric 'acuracy' (did you mean `accuracy`?).\nBuilt in are"),
        ({"validation": {**score, "split": "tran"}}, "has no split 'tran' (did you mean `train`?)"),
        ({"validation": {**score, "dataset": str(tmp_path / "none.csv")}}, "none.csv"),
        ({"validation": {**score, "split": "train[:3"}}, "train[:3"),
        ({"validation": score, "test": [dict(score)]}, "'rows.csv accuracy' is validation data and test data"),
        ({"validation": [score, dict(score)]}, "Two scores are called 'rows.csv accuracy'"),
        ({"validation": score, "test": [{**score, "name": "test"}]}, "'test accuracy' is validation data and test"),
        ({"validation": score, "test": [{**score, "split": "train[:3]"}]}, "rows"),
        ({"validation": {**score, "label_column": "truth"}}, "truth"),
        (
            {"validation": {**score, "dataset": "local:rows.csv"}},
            "was on the machine where the recipe was resolved",
        ),
        ({"dtype": "int8"}, "dtype: "),
        ({"ingredients": [{"model": "x/y", "weight": 0}]}, "the weights (0) sum to 0"),
    ]
    for values, said in cases:
        (tmp_path / "recipe.yaml").write_text(recipe_of(family, **values))
        refused(cli("cook", "recipe.yaml", "-o", "soup", "--quiet"), said)
        assert not (tmp_path / "soup").exists()
        assert not (tmp_path / ".soup.cooking").exists()
    refused(cli("cook", "missing.yaml", "-o", "soup"), "Cannot read the recipe 'missing.yaml': No such file")
    refused(cli("score", family / "a", "--recipe", "missing.yaml"), "missing.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe_of(family))
    refused(cli("score", family / "a", "--recipe", "recipe.yaml"), "neither `validation` nor `test`")


def test_a_command_line_that_makes_no_sense(cli: Cli, family: Path) -> None:
    a, b = family / "a", family / "b"
    for arguments, said in [
        (("cook", a, b), "Missing option '-o'"),
        (("check",), "Missing argument 'MODEL...'"),
        (("cook", a, b, "-o", "soup", "--data", "x"), "--data and --test need --task"),
        (("cook", a, b, "-o", "soup", "--task", "text-classification"), "name them with --data or --test"),
        (("cook", a, b, "-o", "soup", "--set", "scale"), "--set takes KEY=VALUE, not 'scale'"),
        (("hub", "--port", "99999"), "99999"),
        (("stir",), "No such command 'stir'"),
        (("cook", a, b, "-o", "soup", "--data", "x", "--task", "text-clasification"), "(did you mean `text-class"),
        (("push", "soup"), "Missing argument 'REPO'"),
        (("check", a, b, "--colour"), "No such option"),
    ]:
        refused(cli(*arguments), said, code=2)
    refused(cli("cook", a, b, "-o", "soup", "--set", "scale=2"), "linear has no parameter 'scale'")
    refused(cli("cook", a, b, "-o", "soup", "--set", "scale=[1"), "--set scale: '[1' is not valid YAML", code=2)
    refused(cli("cook", a, b, "-o", "soup", "--device", "tpu9", "--data", family / "rows.csv", "--task",
                "text-classification"), "tpu9")  # fmt: skip


def test_nothing_that_exists_is_overwritten(cli: Cli, family: Path, tmp_path: Path) -> None:
    a, b = family / "a", family / "b"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "empty", "full", "link"):
        refused(cli("cook", a, b, "-o", name), f"The output '{name}' exists already", "Choose another folder")
        refused(cli("cook", a, b, "-o", name, "--dry-run"), f"The output '{name}' exists already")
    refused(cli("check", a, b, "-o", "file"), "'file' exists already, and nothing is overwritten")
    refused(cli("cook", a, b, "-o", "file/soup"), "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("hub", "home")) == [
        "empty", "file", "full", "link"
    ]  # fmt: skip


def test_a_push_that_cannot_be(
    cli: Cli, online: LocalHub, family: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli("cook", family / "a", family / "b", "-o", "soup").code == 0
    (tmp_path / "other").mkdir()
    refused(cli("push", "other", "acme/soup"), "'other' is not a soup: it has no readable soup.json", "hf-soup cook")
    for content in ("[]", "{}", "{", '{"weights": {}}', ""):
        (tmp_path / "other" / "soup.json").write_text(content)
        refused(cli("push", "other", "acme/soup"), "'other' is not a soup")
    refused(cli("push", "nowhere", "acme/soup"), "'nowhere' is not a soup")
    for name in ("soup", "a/b/c", "acme/so up", "acme/a--b", "acme/.soup", "acme/" + "x" * 100, "https://hf.co/a/b"):
        refused(cli("push", "soup", name), f"'{name}' is not a name for a repo")
    refused(cli("push", "soup", "other/soup"), "'other/soup'", "has no right", "`acme/soup`")
    shutil.copytree(tmp_path / "soup", tmp_path / "bare")
    (tmp_path / "bare" / "README.md").write_text("---\n[\n---\n")
    refused(cli("push", "bare", "acme/soup"), "front matter of README.md is not a YAML mapping")
    (tmp_path / "bare" / "README.md").unlink()
    refused(cli("push", "bare", "acme/soup"), "has no README.md")
    monkeypatch.setenv("HF_TOKEN", NOBODY)
    refused(cli("push", "soup", "acme/soup"), "token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused(cli("push", "soup", "acme/soup"), "No token: pushing needs to know who you are", "hf auth login")
    refused(cli("cook", family / "a", family / "b", "-o", "soup-2", "--push", "acme/soup"), "No token")
    assert not (tmp_path / "soup-2").exists()
    api = HfApi(endpoint=online.endpoint, token="hf_acme")
    assert not api.repo_exists("acme/soup")


def test_a_card_without_front_matter_gets_some(cli: Cli, online: LocalHub, family: Path, tmp_path: Path) -> None:
    """A user may write a card of their own."""
    assert cli("cook", family / "a", family / "b", "-o", "soup").code == 0
    (tmp_path / "soup" / "README.md").write_text("# Mine\n")
    assert cli("push", "soup", "acme/soup", "--license", "mit").code == 0
    card = HfApi(endpoint=online.endpoint, token="hf_acme").hf_hub_download("acme/soup", "README.md")
    assert Path(card).read_text() == "---\nlicense: mit\n---\n\n# Mine\n"
    # As an editor on Windows saves it.
    (tmp_path / "soup" / "README.md").write_bytes("\ufeff---\r\nlanguage: de\r\n---\r\n# Mine\r\n".encode())
    assert cli("push", "soup", "acme/soup", "--license", "mit").code == 0
    card = HfApi(endpoint=online.endpoint, token="hf_acme").hf_hub_download("acme/soup", "README.md")
    assert Path(card).read_text() == "---\nlanguage: de\nlicense: mit\n---\n\n# Mine\n"


def test_no_network_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(cli("check", "acme/a", "acme/b"), "http://127.0.0.1:9 cannot be reached")


def big_family(family: Path, folder: Path, rows: int) -> list[Path]:
    """Two models of the family with so many rows of embeddings, 64 bytes each."""
    made = []
    for name in ("a", "b"):
        target = folder / f"big-{name}"
        shutil.copytree(family / name, target)
        config = json.loads((target / "config.json").read_text())
        config["vocab_size"] = rows
        (target / "config.json").write_text(json.dumps(config))
        tensors = load_file(target / "model.safetensors")
        key = "bert.embeddings.word_embeddings.weight"
        generator = torch.Generator().manual_seed(0)
        tensors[key] = torch.randn(rows, 16, generator=generator)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        made.append(target)
    return made


def test_control_c_leaves_nothing_half_made(
    environment: dict[str, str], cli: Cli, family: Path, tmp_path: Path
) -> None:
    """Exit code 130; no output folder; what was there is untouched; and the same command then works."""
    a, b = big_family(family, tmp_path, 1_000_000)  # whose merge takes long enough to be interrupted
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "hf_soup", "cook", str(a), str(b), "-o", "soup"]
    child = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    staging = tmp_path / ".soup.cooking"
    deadline = time.monotonic() + 60
    while not staging.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert not (tmp_path / "soup").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert cli("cook", a, b, "-o", "soup", "--json").json["digest"]
    assert not staging.exists()


def test_a_full_disk_is_said(cli: Cli, family: Path, tmp_path: Path) -> None:
    """As the operating system puts it; a limit on the size of files stands for the disk."""
    a, b = big_family(family, tmp_path, 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        done = cli("cook", a, b, "-o", "soup", "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 1
    error = done.json["error"]
    assert error["type"] == "MergeError"
    assert os.strerror(27) in error["message"]
    assert "make room" in error["hint"]
    assert not (tmp_path / "soup").exists()


def test_a_refused_check_writes_the_recipe_that_it_proposes(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Without the one that does not fit, or of bodies where only heads differ; and none where neither helps."""
    tensors = load_file(family / "b" / "model.safetensors")
    shutil.copytree(family / "b", tmp_path / "my stranger")
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(each.shape, generator=generator) * 0.02 for name, each in tensors.items()}
    save_file(noise, tmp_path / "my stranger" / "model.safetensors", {"format": "pt"})
    done = cli("check", family / "a", family / "b", "my stranger", "-o", "my recipe.yaml")
    assert done.code == 3
    assert (
        "Wrote my recipe.yaml, a recipe without local:my stranger. Next: hf-soup cook 'my recipe.yaml' -o soup"
    ) in done.err
    written = yaml.safe_load((tmp_path / "my recipe.yaml").read_text())
    assert written["ingredients"] == [str(family / "a"), str(family / "b")]
    done = cli("cook", "my recipe.yaml", "-o", "my soup", "--quiet")
    assert done.code == 0
    assert f"Next: hf-soup push '{tmp_path / 'my soup'}' OWNER/NAME" in done.out

    config = json.loads((family / "b" / "config.json").read_text())
    shutil.copytree(family / "b", tmp_path / "other")
    renamed = {"id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}}
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **renamed}))
    done = cli("check", family / "a", "other", "-o", "bodies.yaml")
    assert done.code == 3
    assert "Wrote bodies.yaml, a recipe with `heads: body`." in done.err
    assert cli("cook", "bodies.yaml", "-o", "bodies", "--quiet").code == 0

    done = cli("check", family / "a", "my stranger", "-o", "none.yaml")
    assert done.code == 3
    assert "'none.yaml' was not written" in done.err
    assert not (tmp_path / "none.yaml").exists()


@pytest.mark.parametrize("says", ["config", "adapter"])
def test_a_base_that_a_folder_names_is_its_ancestor(cli: Cli, family: Path, tmp_path: Path, says: str) -> None:
    """Also where it is a folder: the library writes down what a model was loaded from, and peft what it is for."""
    for name in ("a", "b"):
        folder = shutil.copytree(family / name, tmp_path / name)
        (folder / "README.md").unlink(missing_ok=True)
        if says == "config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(family / "base")}))
        else:
            adapter = {"peft_type": "LORA", "base_model_name_or_path": str(family / "base")}
            (folder / "adapter_config.json").write_text(json.dumps(adapter))
    done = cli("check", "a", "b", "-o", "recipe.yaml", "--json")
    assert (done.json["verdict"], done.json["ancestor"]["model"]) == ("proven", "local:base")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["base_model"] == str(family / "base")
    assert cli("cook", "recipe.yaml", "--method", "task_arithmetic", "-o", "soup", "--quiet").code == 0
    assert str(family) not in (tmp_path / "soup" / "README.md").read_text()


def test_an_endpoint_that_is_no_address(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, shown in [("http://me:s3cr3t@127.0.0.1:99999", "127.0.0.1:99999"), ("http://me:s3/cr3t@[::1", "[::1")]:
        monkeypatch.setenv("HF_ENDPOINT", address)
        done = cli("check", "acme/a", "acme/b")
        refused(done, f"HF_ENDPOINT is no address: '{shown}'", "huggingface.co")
        assert "s3" not in done.err


def test_findings_are_accepted_one_by_one_or_together(cli: Cli, family: Path) -> None:
    twice = ("--allow", "tensors-unrelated", "--allow", "drifted,unrelated")
    assert cli("check", family / "a", family / "b", *twice).code == 0
    refused(cli("check", family / "a", family / "b", "--allow", "drifted", "--allow", "much"), "'much' is no finding")
