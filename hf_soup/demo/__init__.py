"""The whole story on real data, without a network and without an account: ``hf-soup demo``.

The demo trains a small zoo, of vision transformers or (``--lm``) of language models, publishes it on a Hub on
loopback and then does, in processes of their own, what anybody would do: check, cook, push, load. Every command is
shown before it runs. What comes out is a table; whether the soup is better in it is up to the data, and the demo
says which. Both demos may have one folder: each trains its own models there, once.

::

    FOLDER/models  the data set and the models that were trained, in a folder of the data set's name
    FOLDER/hub     what was published; `hf-soup hub --root FOLDER/hub` serves it again
    FOLDER/home    the HF_HOME of the demo's processes: the user's own caches and token are not touched
    FOLDER/1       recipes and soups of the first run; a second run makes FOLDER/2 and trains nothing
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from hf_soup.demo.zoo import OWNER, DigitsZoo, LanguageZoo, Progress, Zoo
from hf_soup.errors import SoupError

__all__ = ["DigitsZoo", "LanguageZoo", "Shell", "Zoo", "child_environment", "run_demo"]

#: Results are what the demo is for; each is seen before what the next command writes to stderr.
_show = partial(print, flush=True)


def run_demo(output: Path, zoo: Zoo, *, progress: Progress) -> None:
    """Train, publish, check, cook, push, load, and compare; the results go to stdout.

    Args:
        output: The demo's folder; in that of an earlier demo nothing is overwritten, and nothing trained again.
        zoo: What it is told with.
        progress: Where it goes what is being done.

    Raises:
        SoupError: The folder holds something else, or a command failed.
    """
    from hf_soup.local_hub import LocalHub

    folder, number = _next_run(output)
    token = f"hf_{secrets.token_hex(17)}"
    with LocalHub(output / "hub", users={token: OWNER}) as hub:
        shell = Shell(child_environment(os.environ, output / "home", hub.endpoint, token))
        models = output / "models" / zoo.dataset
        if models.is_dir():
            progress(f"The models of an earlier run are used: {models}")
        else:
            _publish(models, shell, progress, zoo)
        _story(shell, folder, "" if number == 1 else f"-{number}", zoo)


def _publish(models: Path, shell: Shell, progress: Progress, zoo: Zoo) -> None:
    """Make the data set and all models, one repo a folder, and upload them; the folder is there when all of it is."""
    models.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".models-", dir=models.parent) as name:
        staged = Path(name) / "models"
        zoo.make(staged, progress)
        progress(
            f"Publishing data and {len(zoo.fine_tunes) + 1} models on a local Hub, {shell.environment['HF_ENDPOINT']}"
        )
        for repo in sorted(staged.iterdir()):
            kind = "dataset" if repo.name == zoo.dataset else "model"
            upload = ("upload", f"{OWNER}/{repo.name}", str(repo), "--repo-type", kind)
            # What it says of each file is shown where it fails.
            shell.run(f"hf {shlex.join(upload)}", "-m", "huggingface_hub.cli.hf", *upload, stderr=subprocess.STDOUT)
        staged.rename(models)


def _next_run(output: Path) -> tuple[Path, int]:
    """A new folder for this run, and its number."""
    if output.exists() and not output.is_dir():
        raise SoupError(f"'{output}' is a file.", hint="Give the demo a folder with `-o`.")
    if output.is_dir() and any(output.iterdir()) and not (output / "hub").is_dir():
        raise SoupError(f"'{output}' holds something else than a demo.", hint="Name another folder with `-o`.")
    number = next(number for number in count(1) if not (output / str(number)).exists())
    (output / "hub").mkdir(parents=True, exist_ok=True)
    (output / str(number)).mkdir()
    return output / str(number), number


def child_environment(ours: Mapping[str, str], home: Path, endpoint: str, token: str) -> dict[str, str]:
    """The environment of the demo's processes: they know the local Hub, and nothing of the user's account.

    All settings of the libraries are dropped and not only the known ones: ``HF_HUB_OFFLINE`` would block
    loopback too, and ``HF_HUB_CACHE`` would fill the user's cache with models that exist nowhere else.
    """
    foreign = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "EVALUATE_")
    kept = {
        name: value
        for name, value in ours.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home.resolve()),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # `hf` would ask PyPI
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONUTF8": "1",  # their stdout is read as UTF-8, whatever the user's locale
    }


@dataclass(frozen=True)
class Shell:
    """Runs commands as a user would, and shows them."""

    environment: Mapping[str, str]

    def hf_soup(self, *arguments: str | Path) -> str:
        """Show and run ``hf-soup ARGUMENTS``, wherever the script was installed."""
        shown = [str(argument) for argument in arguments]
        command = f"hf-soup {shlex.join(shown)}"
        _show(f"\n$ {command}")
        return self.run(command, "-m", "hf_soup", *shown)

    def run(self, name: str, *arguments: str, stderr: int | None = None) -> str:
        """Run Python with these arguments to the end and return its stdout; its stderr goes where ours goes, or there.

        Raises:
            SoupError: It failed.
        """
        done = subprocess.run(
            [sys.executable, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise SoupError(
                f"The demo stopped: `{name}` ended with exit code {done.returncode}.\n{done.stdout}".rstrip(),
                hint="The reason stands above. Run the demo again once it is mended.",
            )
        return done.stdout


def _story(shell: Shell, folder: Path, suffix: str, zoo: Zoo) -> None:
    recipe = zoo.recipe()
    models = [ingredient.model for ingredient in recipe.ingredients]
    everything, good = folder / "recipe.yaml", folder / "without-the-poor-one.yaml"
    everything.write_text(recipe.to_yaml(), encoding="utf-8")
    good.write_text(zoo.recipe(zoo.fine_tunes[:-1]).to_yaml(), encoding="utf-8")

    def cook(path: Path, name: str, *options: str) -> dict[str, Any]:
        done: dict[str, Any] = json.loads(shell.hf_soup("cook", path, *options, "-o", folder / name, "--json"))
        return done

    _show("Can they be averaged?")
    _show(shell.hf_soup("check", *models, "--base", f"{OWNER}/{zoo.ancestor}").rstrip())
    _show("\nA soup of those that help each other on validation data; and, to compare, of all, and of all but one:")
    greedy = cook(everything, "soup")
    _show(f"In the soup: {', '.join(_short(name) for name in greedy['selected'])}")
    plain = cook(everything, "uniform", "--select", "uniform")
    chosen = cook(good, "uniform-good", "--select", "uniform")

    _show("\nPublish it, and load it as any other model:")
    repo = f"{OWNER}/{zoo.family}-soup{suffix}"
    _show(shell.hf_soup("push", folder / "soup", repo).rstrip())
    script = folder / "load.py"
    script.write_text(zoo.load_script, encoding="utf-8")
    _show(f"\n$ python {script} {repo}")
    _show(shell.run("load", str(script), repo).rstrip())

    best = next(iter(greedy["best"].values()))  # one and the same for all data, as there is validation data
    table = {f"{_short(name)}{' *' * (name == best)}": greedy["scores"][name] for name in models}
    table |= {
        f"uniform soup of all {len(models)}": plain["scores"]["soup"],
        f"uniform soup without {zoo.poor}": chosen["scores"]["soup"],
        f"greedy soup of {len(greedy['selected'])}": greedy["scores"]["soup"],
    }
    if "ensemble" in greedy["scores"]:  # not of language models
        table["probability ensemble"] = greedy["scores"]["ensemble"]
    titles, comparisons = [scoring.title for scoring in recipe.test], greedy["comparisons"]
    _show("\n" + _render(table, titles))
    against = "The greedy soup against it:" if comparisons else "The greedy soup is a copy of it."
    _show(f"* best on the validation data, on which the soup was chosen too. {against}\n")
    for title in filter(comparisons.__contains__, titles):
        _show(f"{title}: {comparisons[title]}")
    _show(_FAREWELL.format(remark=zoo.remark, root=shlex.quote(str(folder.parent / "hub"))))


_FAREWELL = """
Test data were looked at once. {remark}
Another seed, or other data, gives other figures: see what your own say.

To look at what was published:   hf-soup hub --root {root}
With models of your own:         hf-soup check OWNER/MODEL OWNER/MODEL -o recipe.yaml
                                 hf-soup cook recipe.yaml -o soup"""


def _short(name: str) -> str:
    return name.removeprefix(f"{OWNER}/")


def _render(table: Mapping[str, Mapping[str, dict[str, Any]]], titles: Sequence[str]) -> str:
    """The table as text: percentages, or what is no share of one as it is, with their 95 % intervals.

    >>> figure = {"metric": "accuracy", "value": 0.5, "low": 0.25, "high": 0.75, "n": 8, "share": True}
    >>> print(_render({"a": {"test accuracy": figure}}, ["test accuracy"]))
    in %, with 95 % intervals   test accuracy (n = 8)
    a                           50.0 (25.0 to 75.0)
    """
    first = next(iter(table.values()))
    percent = first[titles[0]]["share"]
    corner = "in %, with 95 % intervals" if percent else "less is better, with 95 % intervals"
    rows = [[corner, *(f"{title} (n = {first[title]['n']:,})" for title in titles)]]
    for name, figures in table.items():
        triples = [[figures[title][key] for key in ("value", "low", "high")] for title in titles]
        shown = [[f"{100 * each:.1f}" if percent else f"{each:.3f}" for each in triple] for triple in triples]
        rows.append([name, *(f"{value} ({low} to {high})" for value, low, high in shown)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles) + 1)]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
