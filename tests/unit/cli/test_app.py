"""The command line: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from huggingface_hub import close_session, constants

from hf_soup import Recipe
from hf_soup._util.logs import ALLOWED, PrintableLogger
from hf_soup.cli.app import cli as commands
from hf_soup.evaluation.tasks import task_named
from hf_soup.methods import METHODS
from hf_soup.recipe import TASKS, task_names
from hf_soup.recipe.schema import RENAMED_VALUES
from hf_soup.selection import SELECTIONS

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]


def recipe_of(family: Path, folder: Path, **values: Any) -> Path:
    path = folder / "recipe.yaml"
    score = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    report = [{"task": "text-classification", "dataset": str(family / "report.csv"), "name": "test"}]
    models = [str(family / name) for name in "abc"]
    path.write_text(yaml.safe_dump({"ingredients": models, "validation": score, "test": report, **values}))
    return path


@pytest.mark.parametrize("name", ["", *commands.commands])
def test_help(cli: Cli, name: str) -> None:
    for flag in ("--help", "-h"):
        done = cli(*filter(None, [name, flag]))
        assert done.code == 0
        assert done.err == ""
        assert done.out.startswith(f"Usage: hf-soup {name}".rstrip())
        assert max(map(len, done.out.splitlines())) <= 100


def test_messages_go_to_stderr_by_their_level(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whatever handlers other libraries set up, and with nothing in them that would steer the terminal."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])

    def measure(*_: object, **__: object) -> dict[str, object]:
        logger = PrintableLogger("hf_soup.workflows.score")
        for level in (logging.DEBUG, logging.INFO, ALLOWED, logging.WARNING):
            logger.log(level, "a 100 % \x1b[31mred %s")
        return {}

    monkeypatch.setattr("hf_soup.workflows.score.score", measure)
    monkeypatch.setattr(Recipe, "load", lambda _: None)
    done = cli("score", "acme/a", "--recipe", "recipe.yaml", "--json")
    assert done.err.splitlines() == [f"{kind}: a 100 % �[31mred %s" for kind in ("note", "allowed", "warning")]


#: A process that Windows would have begun, which has no such modules.
WINDOWS = """
import click, importlib.metadata, pydantic, sys
sys.platform = "win32"
sys.modules |= dict.fromkeys(["fcntl", "resource"])
import hf_soup
for name in ("check", "cook", "score", "verify", "search", "connectivity", "Soup", "Update"):
    try:
        getattr(hf_soup, name)
    except hf_soup.SoupError as error:
        print(name, error)
from hf_soup.cli.app import main
main(["check", "acme/a", "--json"])
"""


def test_windows_is_refused_in_plain_words() -> None:
    """By the first call from Python, and by any command, which could not do their work."""
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.count("hf-soup does not run on Windows: ") == 9
    assert done.stdout.count("Use it in WSL") == 9
    assert json.loads(done.stdout[done.stdout.index("{") :])["error"]["type"] == "SoupError"


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("hf-soup, version ")
    assert cli().code in (0, 2)


def test_json_is_one_object_on_stdout(cli: Cli, family: Path, tmp_path: Path, publish: Callable[..., str]) -> None:
    """For every command that takes ``--json``, with the keys that scripts may rely on; warnings are on stderr."""
    a, b = family / "a", family / "b"
    recipe = recipe_of(family, tmp_path, select="greedy")
    keys = {
        "search": {"base", "siblings", "groups"},
        "check": {"verdict", "ancestor", "ingredients", "reasons", "alignments", "transferred_bytes"},
        "cook": {"folder", "weights", "scores", "selected", "digest", "seconds", "resumed", "pushed"},
        "score": {"scores"},
        "push": {"repo", "commit", "url", "pull_request"},
        "verify": {"verdict", "tensors", "different"},
        "methods": {"methods", "selections"},
    }
    publish("base")
    done = {
        "search": cli("search", "acme/base", "--json"),
        "check": cli("check", a, b, "-o", "new.yaml", "--json"),
        "cook": cli("cook", recipe, "-o", "soup", "--json", "--quiet"),
        "score": cli("score", a, "soup", "--recipe", recipe, "--json"),
        "push": cli("push", "soup", "acme/soup", "--json"),
        "verify": cli("verify", "soup", *(f"--map={name}={family / name}" for name in "abc"), "--json"),
        "methods": cli("methods", "--json"),
    }
    takes = {name for name, each in commands.commands.items() if "--json" in str([p.opts for p in each.params])}
    assert takes == set(keys)
    for name, each in done.items():
        assert each.code == 0, each
        assert keys[name] <= set(each.json), name
        assert each.out.count("\n{") == 0
    assert "Wrote new.yaml" in done["check"].err
    assert "warning:" in done["cook"].err
    cooked = done["cook"].json
    assert set(cooked["scores"]) == {
        "soup", "local:a", "local:b", "local:c", "ensemble", "logit ensemble", "greedy ensemble",
    }  # fmt: skip
    score = cooked["scores"]["soup"]["test accuracy"]
    assert set(score) == {"metric", "value", "low", "high", "n", "share", "less_is_better"}
    assert cooked["selected"] == list(cooked["weights"])
    assert cooked["pushed"] is None
    assert len(done["score"].json["scores"]) == 2
    plan = cli("cook", recipe, "-o", "soup-2", "--dry-run", "--json").json
    assert {"verdict", "files", "fetch_bytes", "output_bytes"} <= set(plan)


def test_words_for_people(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Next steps that can be copied, and nothing on stderr that is no warning."""
    checked = cli("check", family / "a", family / "b", "-o", "recipe.yaml")
    assert checked.code == 0
    assert checked.out.startswith(("proven: ", "likely: "))
    assert checked.err == "Wrote recipe.yaml. Next: hf-soup cook recipe.yaml -o soup\n"
    again = cli("check", family / "a", family / "b", "-o", "recipe.yaml")
    assert (again.code, again.out) == (1, "")
    planned = cli("cook", "recipe.yaml", "-o", "soup", "--dry-run")
    assert re.search(r"^write     model.safetensors  0.0 MB$", planned.out, re.MULTILINE)
    assert re.search(r"^disk      0.00 GB needed of [\d,.]+ GB free \(output\)$", planned.out, re.MULTILINE)
    assert not (tmp_path / "soup").exists()
    cooked = cli("cook", "recipe.yaml", "-o", "soup", "--quiet")
    assert re.search(r"^Weights: local:a 1, local:b 1$", cooked.out, re.MULTILINE)
    assert re.search(r"^Next: hf-soup push .*soup OWNER/NAME$", cooked.out, re.MULTILINE)
    scored = cli("score", "soup", "--recipe", recipe_of(family, tmp_path))
    assert scored.out.startswith("Percent, with 95 % intervals.")
    assert "rows.csv accuracy" in scored.out
    pushed = cli("push", "soup", "acme/soup")
    assert re.search(r"^Pushed acme/soup as commit [0-9a-f]{7}: http", pushed.out)


def test_options_change_the_recipe(cli: Cli, family: Path, tmp_path: Path) -> None:
    """What the command line says is in the soup's recipe, and wins over the file."""
    recipe = recipe_of(family, tmp_path, select="greedy", test=[])
    done = cli(
        "cook", recipe, "-o", "soup", "--select", "uniform", "--base", family / "base", "--method", "linear",
        "--data", f"{family / 'report.csv'}", "--task", "text-classification", "--metric", "f1",
    )  # fmt: skip
    assert done.code == 0, done
    resolved = Recipe.load(tmp_path / "soup" / "soup.yaml")
    (score,) = resolved.validation
    assert score.metric == "f1"
    assert score.dataset == "local:report.csv"
    summary = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert summary["select"] == "uniform"
    assert summary["lineage"]["ancestor"]["source"] == "recipe"


def test_a_recipe_is_spelled_out_on_the_command_line(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Weights, data for both uses, and what else one types every day."""
    a, b = family / "a", family / "b"
    done = cli(
        "cook", a, b, "-o", "soup", "--weights", "0.75,0.25", "--dtype", "bfloat16", "--vocabulary", "base",
        "--seed", "7", "--heads", a, "--data", family / "rows.csv", "--test", f"{family / 'report.csv'}:train[2:]",
        "--task", "text-classification", "--quiet", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    assert done.json["weights"] == {"local:a": 0.75, "local:b": 0.25}
    recipe = Recipe.load(tmp_path / "soup" / "soup.yaml")
    assert (recipe.dtype, recipe.vocabulary, recipe.seed, recipe.heads) == ("bfloat16", "base", 7, "local:a")
    assert [each.dataset for each in (*recipe.validation, *recipe.test)] == ["local:rows.csv", "local:report.csv"]
    assert [each["n"] for each in done.json["scores"]["soup"].values()] == [24, 22]
    written = recipe_of(family, tmp_path, ingredients=[str(a), {"model": str(b), "weight": 3}])
    again = cli("cook", written, "-o", "again", "--weights", "2,1", "--quiet", "--json")
    assert again.json["weights"] == {"local:a": 2.0, "local:b": 1.0}


def test_set_goes_to_the_selection_that_has_the_parameter(cli: Cli, family: Path, tmp_path: Path) -> None:
    recipe = recipe_of(family, tmp_path, method="wise_ft", base_model=str(family / "base"))
    done = cli("cook", recipe, "-o", "soup", "--select", "top_k", "--set", "k=1", "--set", "alpha=0.5", "--quiet")
    assert done.code == 0, done
    told = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert (len(told["selected"]), told["parameters"]) == (1, {"alpha": 0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cook", "a", "b", "-o", "soup", "--weights", "1,much"), "--weights takes numbers with commas between them"),
        (("cook", "a", "b", "-o", "soup", "--weights", "1"), "--weights has 1 numbers, and there are 2 models."),
        (("cook", "a", "b", "-o", "soup", "--test", "rows.csv"), "--data and --test need --task"),
        (("cook", "a", "b", "-o", "soup", "--metric", "f1"), "name them with --data or --test"),
        (("cook", "a", "-o", "soup", "--add", "b", "--seed", "1", "--method", "ties"), "leave out --method, --seed."),
        (("score", "a"), "Name the data: --data and --task, --validation, or --recipe."),
        (("score", "a", "--recipe", "r.yaml", "--data", "rows.csv"), "--data and --task, --validation, or --recipe."),
        (("score", "a", "--data", "rows.csv"), "--data and --test need --task"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_model_is_scored_without_a_recipe(cli: Cli, family: Path) -> None:
    done = cli("score", family / "a", "--data", f"{family / 'rows.csv'}:train[:20]", "--task", "text-classification",
               "--metric", "f1", "--json", "--quiet")  # fmt: skip
    assert done.code == 0, done
    ((title, score),) = done.json["scores"][next(iter(done.json["scores"]))].items()
    assert (title, score["n"]) == ("rows.csv train[:20] f1", 20)


def test_a_word_that_yaml_does_not_know_is_set_as_it_stands(cli: Cli, family: Path) -> None:
    data = ("--data", family / "rows.csv", "--task", "text-classification", "--dry-run", "-o", "no")
    asked = ("cook", family / "a", family / "b", "--select", "greedy", *data)
    assert cli(*asked, "--set", "accept=>").code == 0
    assert "'accept' is '<'; it is one of >=, >" in cli(*asked, "--set", "accept='<'").err


def test_set_gives_values_with_types(cli: Cli, monkeypatch: pytest.MonkeyPatch, family: Path, tmp_path: Path) -> None:
    """YAML's: a number is a number. They change the file's method, unless another one is named."""
    recipe = recipe_of(family, tmp_path, method={"name": "linear", "x": 1})
    for arguments, said in [
        (("--set", "y=0.5"), "linear has no parameter 'x'"),
        (("--method", "linear", "--set", "y=0.5"), "linear has no parameter 'y'"),
        (("--method", "ties", "--set", "y=0.5"), "ties has no parameter 'y'"),
    ]:
        assert said in cli("cook", recipe, "-o", "soup", *arguments).err


def test_methods_explain_themselves(cli: Cli) -> None:
    listed = cli("methods")
    assert re.search(r"^  ties \*  +Average task vectors ", listed.out, re.MULTILINE)
    assert re.search(r"^  uniform  +Every ingredient goes in", listed.out, re.MULTILINE)
    names = re.findall(r"^  (\w+)", listed.out, re.MULTILINE)
    assert names == [*sorted(METHODS), *sorted(SELECTIONS)]
    assert cli("methods", "nothing").err.startswith("Error: There is no method or selection 'nothing'.")
    explained = cli("methods", "ties")
    for part in ("ties\n", "θ = θ₀ + λ (∑", "(0, 1]", "model, tensor", "Use it", "Not", "Ancestor     needed", "Yadav"):
        assert part in explained.out
    found = cli("methods", "ties", "--json").json["methods"][0]
    assert (found["elementwise"], found["needs_base"], found["least"], found["most"]) == (True, True, 1, None)
    assert found["parameters"] == {"density": 0.2, "scale": 1.0, "scope": "model"}
    assert found["allowed"] == {"density": "(0, 1]", "scale": "(-inf, inf)", "scope": ["model", "tensor"]}
    assert found["formula"][0].startswith(r"\theta = \theta_0")
    assert "arXiv:2306.01708" in found["reference"]
    assert cli("methods", "learned", "--json").json["selections"][0]["learns"] == "loss"


def test_a_refusal_has_its_own_exit_code(cli: Cli, family: Path, tmp_path: Path) -> None:
    """The whole report is printed all the same, and no recipe is written."""
    done = cli("check", family / "a", "-o", "recipe.yaml")
    assert done.code == 3
    assert done.out.startswith("refused: ")
    assert done.err == "'recipe.yaml' was not written: leaving models out does not make a soup of these.\n"
    assert not (tmp_path / "recipe.yaml").exists()
    done = cli("check", family / "a", "--json")
    assert (done.code, done.json["verdict"]) == (3, "refused")


def test_the_hub_serves_until_it_is_stopped(environment: dict[str, str], tmp_path: Path) -> None:
    """It prints what to export, and Ctrl-C ends it without a word."""
    command = [sys.executable, "-m", "hf_soup", "hub", "--root", str(tmp_path / "served"), "--port", "0"]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    found = re.fullmatch(r"export HF_ENDPOINT=(http://127\.0\.0\.1:\d+) HF_TOKEN=(\w+) HF_HUB_DISABLE_XET=1\n", line)
    assert found is not None, line
    from huggingface_hub import HfApi

    assert HfApi(endpoint=found[1], token=found[2]).whoami()["name"] == "local"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode in (0, 130)
    assert (out, err) == ("", "")


def test_a_closed_pipe_is_no_error(environment: dict[str, str], tmp_path: Path) -> None:
    """``hf-soup methods linear | head -1``"""
    done = subprocess.run(
        f"{sys.executable} -m hf_soup methods linear | head -1", shell=True, env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "linear\n"
    assert done.stderr == ""


def test_set_gives_values_and_no_names(cli: Cli) -> None:
    done = cli("cook", "a", "b", "-o", "c", "--set", "name=ties")
    assert (done.code, done.out) == (2, "")
    assert "--method and --select have the names" in done.err


@pytest.mark.parametrize("name", ["swa", "lawa", "ema", "adamerging"])
def test_an_old_method_is_answered_with_its_selection(cli: Cli, family: Path, name: str) -> None:
    models = [family / each for each in "ab"]
    now = f"which is `{RENAMED_VALUES[name]}` here"
    for done in (
        cli("cook", *models, "--method", name, "-o", "soup"),
        cli("cook", *models, "--select", name, "-o", "soup"),
        cli("methods", name),
    ):
        assert done.code == 1
        assert now in done.err


def test_every_option_of_a_command_is_documented() -> None:
    page = commands.get_help(click.Context(commands, info_name="hf-soup", **commands.context_settings))
    for name in commands.commands:
        assert re.search(rf"^  {name}\b", page, re.MULTILINE)


def test_no_secret_is_shown_or_written(
    cli: Cli, publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Addresses are pasted as `git clone` takes them, and tokens land in the wrong place."""
    a, b = publish("a"), publish("b")
    done = cli("check", f"https://me:secret@huggingface.co/{a}", b, "-o", "recipe.yaml", "--json")
    assert done.json["verdict"] == "likely", done.err
    wrong = [
        cli("check", f"{a}@hf_secret", b),
        cli("check", f"{a}@hf_secret", b, "--json"),
        cli("search", "https://me:secret@example.org/acme/x"),
        cli("search", 80 * "x" + "@hf_" + 34 * "secret"),
        cli("verify", "https://me:secret@huggingface.co/acme/none"),
        cli("check", "--recipe", "https://me:secret@example.org/recipe.yaml"),
        cli("cook", a, b, "-o", "soup", "--set", "https://me:secret@example.org"),
        cli("https://me:secret@example.org"),
    ]
    monkeypatch.setattr(constants, "ENDPOINT", "me:secret@127.0.0.1:9")
    wrong += [cli("check", a, b)]
    assert {each.code for each in wrong} == {1, 2}
    assert "secret" not in str([done, *wrong]) + (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize("proxy", ["http://me:secret@127.0.0.1:port", "socks5://me:secret@127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    close_session()
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    done = cli("check", "acme/a", "acme/b")
    assert (done.code, done.out) == (1, "")
    assert "Check HF_ENDPOINT, and the proxies" in done.err
    assert "secret" not in done.err


def test_what_is_longer_than_any_name_is_said(cli: Cli, family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "a", tmp_path / "a")
    (tmp_path / "rows.yaml").write_text(
        "ingredients: [a]\nvalidation: {task: text-classification, dataset: rows.csv}\n"
    )
    name = 1100 * "x"
    for arguments in (
        ["verify", name],
        ["check", name, "a"],
        ["check", "a", "a", "--base", name],
        ["score", name, "--recipe", "rows.yaml"],
        ["cook", "a", "--add", "a", "-o", "soup", "--data", name, "--task", "text-classification"],
    ):
        done = cli(*arguments)
        assert done.code == 1, arguments
        assert re.match("Error: (Cannot read|'x+' is neither)", done.err), arguments


def test_every_task_can_be_named() -> None:
    """In a recipe and on the command line, and each has a class."""
    option = next(each for each in commands.commands["score"].params if each.name == "task")
    assert all(name in option.help for name in (*TASKS, "lm-eval"))
    assert len({task_named(name) for name in TASKS}) == len(TASKS)
    assert set(TASKS) == set(task_names())
