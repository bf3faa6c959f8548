"""Runs commands as a user does, and keeps what they say and write without what belongs to the machine or the hour."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from golden.names import as_before
from hf_soup import Recipe

#: Keys of JSON whose values are times, versions, or of the machine.
DROPPED = frozenset({
    "seconds", "versions", "estimated_seconds", "cache_free_bytes", "output_free_bytes", "transformers_version",
})  # fmt: skip
#: What is said of time and of the machine, in words.
PATTERNS = [
    (re.compile(r"Made with hf-soup .* on .*"), "Made with <VERSIONS>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+00:00)?)?"), "<DATE>"),
    (re.compile(r"\b[\d.,]+ (s|ms|seconds?|minutes?|min)\b"), "<TIME>"),
    (re.compile(r"[\d.,]+ GB (are )?free"), r"<DISK> \1free"),
    (re.compile(r"^hf-soup, version \S+"), "hf-soup, version <VERSION>"),
]
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")
#: Arguments of Python that run the command line in a process of its own, and in two, by either launcher.
APART = ["-m", "hf_soup"]
TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *APART]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
              *APART]  # fmt: skip


class _Plain(yaml.SafeDumper):
    """Writes out what stands there twice, as a recipe has no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


class _Left(BaseException):
    """The command ended its process, which is this one."""

    def __init__(self, code: int) -> None:
        self.code = code


def arguments(command: Sequence[object], name: str) -> list[str]:
    """The command line of a step: the one place where the names of commands, options and files come together."""
    return [str(part).replace("{name}", name) for part in command]


def recipe_text(recipe: Mapping[str, Any] | str, name: str) -> str:
    """The file of a recipe, which may be broken text; likewise for its keys and values."""
    if isinstance(recipe, str):
        return recipe.replace("{name}", name)
    values = dict(recipe) if "validation" in Recipe.model_fields else as_before(recipe)
    text = yaml.dump(values, Dumper=_Plain, sort_keys=False)
    return text.replace("{name}", name)


@contextmanager
def _captured() -> Iterator[tuple[Any, Any]]:
    """Everything that is written to stdout and stderr, by whatever way it gets there."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = []
        sys.stdout.flush()
        sys.stderr.flush()
        for number, file in ((1, out), (2, err)):
            kept.append(os.dup(number))
            os.dup2(file.fileno(), number)
        try:
            yield out, err
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _in_process(line: Sequence[str]) -> int:
    """``python -m hf_soup LINE`` in this process, which has imported torch already."""
    ours, leave, argv = os.getpid(), os._exit, sys.argv

    def left(code: int) -> None:
        if os.getpid() != ours:
            leave(code)
        raise _Left(code)

    os._exit, sys.argv = left, ["hf-soup", *line]  # type: ignore[assignment]
    try:
        runpy.run_module("hf_soup", run_name="__main__", alter_sys=False)
    except _Left as done:
        return done.code
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what the user would see
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        os._exit, sys.argv = leave, argv
    return 0


class Kitchen:
    """The folder in which everything is cooked, and what its texts are without it.

    Args:
        root: Holds the models and data; commands run in it.
        endpoint: Of the local Hub.
    """

    def __init__(self, root: Path, endpoint: str) -> None:
        self.root, self.endpoint = root.resolve(), endpoint
        self._commits: dict[str, tuple[str, str]] = {}

    def run(
        self, line: Sequence[str], *, python: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Run a command line in the folder, and say how it ended and what it wrote.

        Args:
            line: What stands after ``hf-soup``.
            python: Arguments of Python with which it is run in other processes than this one.
            env: Changes to the environment; what is empty is taken out.
        """
        before, folder = dict(os.environ), Path.cwd()
        os.environ.update(env or {})
        for name in [name for name, value in (env or {}).items() if not value]:
            del os.environ[name]
        os.chdir(self.root)
        try:
            with _captured() as (out, err):
                if python:
                    code = subprocess.run([sys.executable, *python, *line], check=False, timeout=120).returncode
                else:
                    code = _in_process(line)
                sys.stdout.flush()
                sys.stderr.flush()
                texts = []
                for file in (out, err):
                    file.seek(0)
                    texts.append(file.read().decode())
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(before)
        if any("push" in part for part in line):
            self.learn_commits()
        try:
            said: Any = self.plain(json.loads(texts[0]))
        except ValueError:
            said = self.text(texts[0]).splitlines()
        kept = [line for line in self.text(texts[1]).splitlines() if line.strip() and not line.startswith("[W")]
        return {"exit": code, "stdout": said, "stderr": kept}

    def text(self, text: str) -> str:
        """A text without paths, ports, times and the names of commits, which have times in them."""
        port = self.endpoint.rpartition(":")[2]
        text = re.sub(rf"https?(`?://`?)(127\.0\.0\.1|localhost):{port}", r"<HUB>", text)
        text = text.replace(str(self.root), "<ROOT>").replace(str(self.root.parent), "<HOME>")
        text = _COMMIT.sub(self._commit, text)
        for found, shown in PATTERNS:
            text = found.sub(shown, text)
        return text

    def plain(self, value: Any) -> Any:
        """Data of JSON, likewise."""
        if isinstance(value, dict):
            return {self.text(key): self.plain(each) for key, each in value.items() if key not in DROPPED}
        if isinstance(value, list):
            return [self.plain(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def soup(self, name: str) -> dict[str, Any] | None:
        """What lies in a soup's folder: texts that were made here as they are, else sha256s."""
        folder, found = self.root / name, dict[str, Any]()
        if not (folder / "soup.json").is_file():
            return None
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            key, content = path.relative_to(folder).as_posix(), path.read_bytes()
            if key == "soup.json":
                found[key] = self.plain(json.loads(content))
            elif key == "soup.yaml":
                found[key] = self.plain(yaml.safe_load(content))
                found["order of soup.yaml"] = list(found[key])
            elif path.suffix == ".md":
                found[key] = self.text(content.decode()).splitlines()
            elif key == "config.json":
                found[key] = self.plain(json.loads(content))
            else:
                found[key] = hashlib.sha256(content).hexdigest()
        return found

    def _commit(self, found: re.Match[str]) -> str:
        """What stands for the name of a commit, which has the time in it, or for the beginning of one."""
        sha = self._commits.get(found[0][:7], ("", ""))
        return sha[1] if sha[0].startswith(found[0]) else found[0]

    def learn_commits(self) -> None:
        """Look which commits are on the Hub."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token="hf_acme")
        repos = [("model", each.id) for each in api.list_models()]
        repos += [("dataset", each.id) for each in api.list_datasets()]
        for kind, repo in repos:
            refs = api.list_repo_refs(repo, repo_type=kind, include_pull_requests=True)
            for ref in ["main", *(each.ref for each in refs.pull_requests or [])]:
                commits = api.list_repo_commits(repo, repo_type=kind, revision=ref)
                for number, commit in enumerate(reversed(commits)):
                    named = f"<COMMIT {number} OF {repo}>"
                    self._commits.setdefault(commit.commit_id[:7], (commit.commit_id, named))
