"""Cooks every recipe and tries every bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from golden.faults import FAULTS
from golden.recipes import RECIPES
from golden.running import Kitchen, arguments, recipe_text


def _write(kitchen: Kitchen, files: Mapping[str, Any]) -> None:
    for file, content in files.items():
        path = kitchen.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe_text(content, ""))


def cook(kitchen: Kitchen, name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """One recipe: checked, cooked, verified, and what else it says."""
    folder = _plain(name)
    steps: dict[str, Any] = {}

    def step(*command: object, **options: Any) -> dict[str, Any]:
        title = " ".join(str(part) for part in command).replace("{name}", folder)
        steps[title] = kitchen.run(arguments(command, folder), **options)
        return dict(steps[title])

    _write(kitchen, case.get("files", {}))
    named = _models(kitchen, folder, case)
    if case.get("check", True):
        step("check", *named, "--json")
    cooked = step(
        "cook", *named, "-o", folder, "--json", "--quiet", *case.get("cook", ()), python=case.get("python", ())
    )
    result: dict[str, Any] = {"digest": cooked["stdout"].get("digest") if cooked["exit"] == 0 else None}
    if case.get("verify", True) and cooked["exit"] == 0:
        maps = [f"--map={each}" for each in case.get("map", _maps(case))]
        step("verify", folder, "--json", "--quiet", *maps, *case.get("verify_with", ()))
    for more in case.get("then", ()):
        step(*more)
    for title, code in case.get("code", {}).items():
        steps[title] = kitchen.run([], python=["-c", code])
    result["soups"] = {each: kitchen.soup(each) for each in (folder, *case.get("soups", ()))}
    return {**result, "steps": steps}


def fail(kitchen: Kitchen, name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """One bad input."""
    folder = _plain(name)
    if case.get("needs") == "soup" and not (kitchen.root / "fault-soup").exists():
        kitchen.run(arguments(["cook", "bert-a", "bert-b", "-o", "fault-soup", "--quiet"], folder))
    if "make" in case:
        case["make"](kitchen.root, f"odd-{folder}")
    line = case.get("line")
    if "make" in case and "acme/" in str(line):
        kitchen.learn_commits()
    if line is None:
        line = ["cook", *_models(kitchen, folder, case), "-o", "bad-{name}", "--json", "--quiet", *case.get("cook", ())]
    # What libraries read when they are imported needs a process of its own.
    result = kitchen.run(arguments(line, folder), env=case.get("env"), python=case.get("python", ()))
    # Nothing half-made is left.
    return {**result, "left": sorted(path.name for path in kitchen.root.glob(f"*bad-{folder}*"))}


def _models(kitchen: Kitchen, folder: str, case: Mapping[str, Any]) -> list[str]:
    """What the commands name: the file of a recipe, or models."""
    if "recipe" not in case:
        return list(case["models"])
    (kitchen.root / f"{folder}.yaml").write_text(recipe_text(case["recipe"], folder))
    return [f"{folder}.yaml"]


def _maps(case: Mapping[str, Any]) -> list[str]:
    """Where the ingredients that are folders are, for those who verify."""
    recipe = case.get("recipe", {"ingredients": case.get("models", ())})
    named = [each if isinstance(each, str) else each["model"] for each in recipe["ingredients"]]
    named += [recipe["base_model"]] if recipe.get("base_model") else []
    if "calibration" in recipe:
        named += [each["dataset"] for each in (recipe["calibration"], *recipe.get("test", ()))]
    return [f"{Path(each).name}={each}" for each in dict.fromkeys(named) if not each.startswith("acme/")]


def _plain(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _forget(kitchen: Kitchen) -> None:
    """Leave nothing that was remembered of an earlier case, as it would show: bytes that were read, hashes known."""
    for path in Path(os.environ["HF_HOME"]).iterdir():
        shutil.rmtree(path)
    for path in kitchen.root.rglob("*.*"):
        if path.suffix in (".safetensors", ".bin", ".csv"):
            path.touch()
    time.sleep(0.06)  # hashes of files that were touched in the last 50 ms are not remembered within a case


def record(root: Path, endpoint: str, file: Path, only: str) -> None:
    """Run everything whose name has ``only`` in it, and write what came out to a file."""
    kitchen = Kitchen(root, endpoint)
    kitchen.learn_commits()
    found: dict[str, Any] = {"recipes": {}, "faults": {}}
    took = {}
    for title, cases, run in (("recipes", RECIPES, cook), ("faults", FAULTS, fail)):
        for name, case in cases.items():
            if not re.search(only, name):
                continue
            start = time.monotonic()
            _forget(kitchen)
            found[title][name] = run(kitchen, name, case)
            took[name] = time.monotonic() - start
            print(f"{took[name]:6.1f} s  {name}", file=sys.stderr, flush=True)
    file.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    many = f"{len(found['recipes'])} recipes, {len(found['faults'])} bad inputs"
    print(f"{many}, {sum(took.values()):.0f} s", file=sys.stderr)
