"""Options that several commands share, and how results are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import click

from hf_soup._util.text import near, printable
from hf_soup.errors import SoupError

MODELS = (
    "A MODEL is a Hub id (owner/name, owner/name@revision, owner/name/folder, a huggingface.co address) or a folder."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
QUIET = click.option("--quiet", is_flag=True, help="No progress bars.")
ALLOW = click.option(
    "--allow", multiple=True, metavar="CODE,…", help="Accept findings that refuse or warn, such as tensors-unrelated."
)


def _task(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    from hf_soup.recipe import task_names

    if value is not None and value not in (known := [*task_names(), "lm-eval"]):
        raise click.BadParameter(f"'{value}' is not one of {', '.join(known)}{near(value, known)}.")
    return value


TASK = click.option(
    "--task",
    metavar="TASK",
    callback=_task,
    help="What models do with the data: image-classification, text-classification, causal-lm or multiple-choice-lm; "
    "with lm-eval the data are a task of lm-evaluation-harness.",
)
METRIC = click.option(
    "--metric",
    metavar="METRIC",
    help="accuracy, f1_macro, spearmanr, …; accuracy by default, of causal-lm bits_per_byte.",
)
VALIDATION = click.option(
    "--validation", multiple=True, metavar="MODULE:FUNCTION", help="A function of your own that measures a model."
)
DEVICE = click.option(
    "--device", default="cpu", show_default=True, help="Where models run when they are scored: cpu, cuda, or auto."
)


def tell(report: dict[str, Any], text: str, as_json: bool, *files: Callable[[], None]) -> None:
    """Print what was found and write the files; where one cannot be written, what was found is printed all the same."""
    failed = []
    for write in files:
        try:
            write()
        except SoupError as error:
            failed.append(error)
    if not as_json:
        show(printable(text))
    elif failed:
        show(json.dumps(report | as_data(failed[0]), indent=2))
        click.get_current_context().exit(1)
    else:
        show(json.dumps(report, indent=2))
    if failed:
        raise failed[0]


def as_data(error: SoupError) -> dict[str, Any]:
    """What `--json` prints of an error."""
    return {"error": {"type": type(error).__name__, "code": error.code, "message": error.message, "hint": error.hint}}


def patient() -> None:
    """Give every request to the Hub a timeout, the client's log silence, and the results of a command stdout alone:
    what functions of the user's and other packages print goes to stderr.
    """
    from hf_soup.hub import patient as be_patient

    context = click.get_current_context()
    context.obj = sys.stdout
    context.with_resource(redirect_stdout(sys.stderr))
    be_patient()


def show(text: str) -> None:
    """Print a result."""
    click.echo(text, file=click.get_current_context().obj)
