"""Metrics by name: built in (`formulas`), or a function or an `evaluate` script of the user's."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from hf_soup._util.text import first_line, near
from hf_soup._util.users_code import users_code
from hf_soup.errors import ScoringError
from hf_soup.evaluation.data import content_hash
from hf_soup.evaluation.formulas import CLASS_METRICS, MULTI_LABEL_METRICS, REGRESSION_METRICS
from hf_soup.evaluation.statistics import Floats, Ints, Metric
from hf_soup.hub import cut_off
from hf_soup.recipe import is_local_path

#: Of what users' functions return: sums and squares of it are finite too.
LARGEST = 1e100
#: All names that mean the same everywhere.
BUILT_IN = tuple({**CLASS_METRICS, **MULTI_LABEL_METRICS, **REGRESSION_METRICS})


def find(metric: str, trusted: bool = False, built_in: Mapping[str, Metric] = CLASS_METRICS) -> Metric:
    """The metric that a recipe names, ready to be used.

    Larger is better, but for `LOSSES`; of an error rate a function returns the negative.

    Args:
        metric: A built-in name; ``module:function``, called as ``function(references, predictions)`` with ``(n,)``
            int64 each, or what else rows have, to return one number; a folder with an `evaluate` script of its name, or
            that ``.py`` file; or the id of such a script on the Hub.
        trusted: Whether code from the Hub may run.
        built_in: Those that are built in for such rows.

    Raises:
        ScoringError: There is no such metric, it cannot be loaded, or it is code from the Hub that is not trusted.
    """
    if metric in built_in:
        return built_in[metric]
    path = Path(metric).expanduser()
    if is_local_path(str(path)):
        script = path if path.suffix == ".py" else path.resolve() / f"{path.resolve().name}.py"
        if not script.is_file():
            raise ScoringError(f"There is no metric in '{metric}': it holds no file '{script.name}'.")
        return _of_script(str(script.resolve()), script.stem)
    if metric.startswith((".", "/", "~", "local:")) or path.suffix == ".py":
        raise ScoringError(
            f"There is no file or folder '{metric}'.",
            hint="`metric` is a path on this machine; `local:` was one on another, so name your copy.",
        )
    if re.fullmatch(r"[\w.]+:\w+", metric):
        return _by_rows(metric, own_function(metric, "metric"))
    if not trusted:
        typo, code = near(metric, built_in), ""
        if not typo:
            code = (
                " An `evaluate` metric of the Hub is code that runs here: read it, and say `trust_remote_code: true` "
            )
            code += "beside `metric`."
        hint = f"Built in are {', '.join(built_in)}.{code}"
        raise ScoringError(f"There is no built-in metric '{metric}'{typo}.", hint=hint)
    return _of_script(metric, path.name)


#: Module of a function → the sha256 of its file when it last ran.
_RAN: dict[str, str] = {}


def forget() -> None:
    """Look again at functions and scripts: an edit counts from the next `prepare` on, and not between two scores."""
    own_function.cache_clear()
    _of_script.cache_clear()


@cache
def own_function(name: str, what: str) -> Callable[..., Any]:
    """The user's ``module:function``; ``what`` it is, errors say.

    Raises:
        ScoringError: It cannot be imported, or is no function.
    """
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # where `python -m` looks; the module may import its neighbours later
    hint = "`module:function` names a module that is installed, on PYTHONPATH or in the current folder."
    with users_code(f"Cannot import the {what} '{name}'", hint=hint):
        ran = importlib.import_module(module)
        digest = content_hash(Path(ran.__spec__.origin)) if ran.__spec__ and ran.__spec__.origin else ""
        if _RAN.setdefault(module, digest) != digest:
            importlib.reload(ran)
            _RAN[module] = digest
        called = getattr(ran, function)
        if not callable(called):
            raise ScoringError(f"The {what} '{name}' is no function but {called!r}.")
        return cast("Callable[..., Any]", called)


@cache
def _of_script(path: str, name: str) -> Metric:
    import evaluate

    try:
        # The folder is made but not used. A seed of its own: by default evaluate reads numpy's global state.
        with tempfile.TemporaryDirectory(prefix="hf-soup-metric-") as folder:
            module = evaluate.load(path, keep_in_memory=True, cache_dir=folder, seed=0)
    except (Exception, SystemExit) as error:  # whatever the script, the client or the disk raises
        raise ScoringError(
            f"Cannot load the metric '{name}': {first_line(error)}",
            hint=f"Built in are {', '.join(BUILT_IN)}, each for one kind of models.",
            code=cut_off(error),
        ) from error

    def value(references: Ints, predictions: Ints) -> Any:
        values = module.compute(references=references, predictions=predictions) or {}
        if name not in values and len(values) != 1:
            raise ScoringError(
                f"The metric '{name}' gives {', '.join(map(str, values)) or 'nothing'}; which of them counts?",
                hint="Call it yourself in a function that returns one number: `metric: module:function`.",
            )
        return values[name] if name in values else next(iter(values.values()))

    return _by_rows(name, value)


def _by_rows(name: str, function: Callable[[Ints, Ints], Any]) -> Metric:
    """A metric that wants every row by itself."""

    def one(references: Ints, predictions: Ints) -> float:
        with users_code(f"The metric '{name}' fails on {len(references):,} rows"):
            given = function(references, predictions)
            if isinstance(given, str | bytes):
                raise TypeError(f"{given!r} is a text and no number")
            value = float(given)
        if not abs(value) <= LARGEST:
            raise ScoringError(
                f"The metric '{name}' gives {value} on {len(references):,} rows.",
                hint="Use more rows, or another metric. Intervals draw rows again, and then a class may be missing.",
            )
        return value

    def draws(labels: Any, answers: Any, rows: Ints) -> Floats:
        answers = answers.astype(labels.dtype)  # those of which many are remembered are kept in fewer bytes
        return np.array([one(np.repeat(labels, drawn, axis=0), np.repeat(answers, drawn, axis=0)) for drawn in rows])

    return draws
