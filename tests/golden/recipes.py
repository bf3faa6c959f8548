"""Recipes and bad inputs, as data; paths are in the folder that `models.make_all` fills."""

from __future__ import annotations

from typing import Any

A, B, C, D = "bert-a", "bert-b", "bert-c", "bert-d"
ABC = [A, B, C]
ROWS = {"task": "text-classification", "dataset": "rows.csv"}
REPORT = [{"task": "text-classification", "dataset": "report.csv", "name": "test"}]

#: Name → `recipe` (the file), or `line` (arguments of the first command); `then` are further commands.
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"recipe": {"ingredients": ABC}},
    "wise_ft": {"recipe": {"ingredients": ABC, "base": "bert-base", "method": "wise_ft"}},
    "ties": {"recipe": {"ingredients": ABC, "base": "bert-base", "method": {"name": "ties", "density": 0.3}}},
    "greedy": {"recipe": {"ingredients": ABC, "select": "greedy", "score": ROWS, "report": REPORT}},
    "mixed dtypes": {"recipe": {"ingredients": [A, "bert-b-bfloat16", "bert-c-float16"]}},
}

#: Name → `line` (arguments), and `files` that are written before.
FAULTS: dict[str, dict[str, Any]] = {
    "unknown key": {"recipe": {"ingredients": ABC, "metod": "linear"}},
    "unknown method": {"recipe": {"ingredients": ABC, "method": "tise"}},
    "no such folder": {"line": ["check", A, "nowhere", "--json"]},
    "unknown command": {"line": ["stir"]},
    "no such option": {"line": ["check", A, B, "--colour"]},
}
