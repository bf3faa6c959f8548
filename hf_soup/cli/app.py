"""The ``hf-soup`` command. Results go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import signal
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from hf_soup._util.logs import ALLOWED
from hf_soup._util.platform import require_endpoint, require_supported
from hf_soup._util.text import printable
from hf_soup._util.version import __version__
from hf_soup.cli import check, hub, score, search, verify
from hf_soup.cli.cook import cook
from hf_soup.cli.demo import demo
from hf_soup.cli.methods import methods
from hf_soup.cli.options import as_data
from hf_soup.cli.push import push
from hf_soup.errors import SoupError, without_credentials
from hf_soup.merging import close_all


class _InOrder(click.Group):
    """Lists commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hf-soup")
def cli() -> None:
    """Make a better model out of fine-tuned models that already exist.

    \b
    hf-soup demo                                       the whole story, no network, no account
    hf-soup search owner/base                          who was fine-tuned from it?
    hf-soup check owner/run-1 owner/run-2              may these be averaged?
    hf-soup cook owner/run-1 owner/run-2 -o soup       average them
    hf-soup push soup me/my-soup                       publish the result
    hf-soup verify owner/soup                          is a published soup what it says?
    """
    require_supported()
    require_endpoint()


for _command in (
    demo, search.search, check.check, cook, score.score, push, verify.verify,
    methods, hub.hub,
):  # fmt: skip
    cli.add_command(_command)


class _Ended(KeyboardInterrupt):
    """A signal that ends programs; as at Ctrl-C, whatever is under way removes what it has made for itself."""

    def __init__(self, number: int) -> None:
        self.number = number


def _end(number: int, _: object) -> None:
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # once is enough, and a second one would stop the removing
    if number == signal.SIGHUP:
        # The terminal is gone, and what writes to it would fail.
        nobody = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            with suppress(OSError):  # it was closed
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(nobody, stream)
    raise _Ended(number)


_KINDS = {logging.INFO: "note", ALLOWED: "allowed"}


class _ToStderr(logging.Handler):
    """To a person at a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{_KINDS.get(record.levelno, 'warning')}: {record.getMessage()}", err=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    # The process is this command's: what the package logs is shown once, whatever other libraries set up.
    logger = logging.getLogger("hf_soup")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [_ToStderr()], False
    try:
        code = cli.main(list(arguments), prog_name="hf-soup", standalone_mode=False)
    except SoupError as error:
        if error.elsewhere:
            sys.exit(1)
        if as_json:
            click.echo(json.dumps(as_data(error), indent=2))
        else:
            click.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        click.echo(without_credentials(usage.getvalue()), nl=False, err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stop:
        cause = stop.__cause__ if isinstance(stop, click.Abort) else stop
        number = cause.number if isinstance(cause, _Ended) else signal.SIGINT
        click.echo("Interrupted. Nothing half-made is left; the same command continues where it can.", err=True)
        # Threads that wait for the network would keep the process alive.
        sys.stderr.flush()
        os._exit(128 + number)
    except BrokenPipeError:
        # The reader of the output went away, as `head` does; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def run() -> NoReturn:
    """The console script: `main`, without taking torch down at the end, which takes a third of a second."""
    # What a process like this one makes it needs to the end; looking for garbage among a hundred thousand tensors'
    # places takes longer than averaging them.
    gc.set_threshold(500_000, 50, 100)
    # Threads that spin while they wait for each other make learning many times slower where others use the cores too;
    # torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # numpy's threads, for which there is nothing to do here, would spin for a while after it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, _end)
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if os.environ.get("WORLD_SIZE", "1") != "1":
            close_all()  # so that the others are told
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)
