"""The ``hf-soup`` command. Results go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from hf_soup import __version__, shown
from hf_soup.arguments import recipe_of, refuse_existing, scoring_of, write_new
from hf_soup.errors import RecipeError, SoupError

_MODELS = "A MODEL is a Hub id (owner/name, owner/name@revision, a huggingface.co address) or a folder."
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress bars.")
_DEVICE = click.option("--device", default="cpu", show_default=True, help="Where models run when they are scored.")


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
    hf-soup forage owner/base                          who was fine-tuned from it?
    hf-soup check owner/run-1 owner/run-2              may these be averaged?
    hf-soup cook owner/run-1 owner/run-2 -o soup       average them
    hf-soup push soup me/my-soup                       publish the result
    """


@cli.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("hf-soup-demo"), show_default=True, help="Folder."
)
def demo(output: Path) -> None:
    """Show the whole story on real data, without network or account.

    Trains a small ancestor and nine fine-tunes of it, publishes them on a local Hub, and then does what you would do:
    check, cook, push, load. Takes two minutes the first time.

    Example: hf-soup demo
    """
    from hf_soup.demo import run_demo

    run_demo(output, say=click.echo, progress=lambda text: click.echo(text, err=True))


@cli.command()
@click.argument("base")
@click.option("--task", metavar="TASK", help="Only those with this task on the Hub, such as image-classification.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The most downloaded ones.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Write the largest group down.")
@_QUIET
@_JSON
@click.pass_context
def forage(
    ctx: click.Context, base: str, task: str | None, limit: int, output: Path | None, quiet: bool, as_json: bool
) -> None:
    """Find the fine-tunes of a base on the Hub, and who of them can be averaged.

    Lists architecture, labels, licence, downloads and verdict. Exit code 3 when there is no group to write down.

    Example: hf-soup forage google/vit-base-patch16-224-in21k --task image-classification -o recipe.yaml
    """
    from hf_soup.foraging import forage as find

    _patient()
    if output is not None:
        refuse_existing(output)
    found = find(base, task=task, limit=limit, quiet=quiet)
    recipe = found.recipe().to_yaml() if output is not None and found.groups else None
    text = "" if as_json else shown.foraged(found)
    _tell(found.to_dict(), text, as_json, *([partial(write_new, output, recipe)] if output and recipe else []))
    if found.unread:
        many = f"{len(found.unread)} of {len(found.siblings)}"
        click.echo(f"note: incomplete: {many} could not be read just now: {', '.join(found.unread)}", err=True)
    if output is None:
        return
    if recipe is None:
        click.echo(f"'{output}' was not written: no two of them can be averaged.", err=True)
        ctx.exit(3)
    click.echo(f"Wrote group 1 to {output}. Next: hf-soup cook {output} -o soup", err=True)
    for number, group in enumerate(found.groups[1:], 2):
        members = " ".join([*group.members, *(["--base", found.base] if group.from_base else [])])
        click.echo(f"Group {number} instead: hf-soup check {members} -o RECIPE", err=True)


@cli.command(epilog=_MODELS)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--base", metavar="MODEL", help="The pretrained ancestor, where cards do not name it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Write a recipe of them.")
@click.option("--recipe", "source", metavar="RECIPE", help="Whose data to use, and its models where none are named.")
@click.option("--barrier", is_flag=True, help="Measure on its held-out data whether they lie in one basin.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the barriers.")
@_DEVICE
@_QUIET
@_JSON
@click.pass_context
def check(
    ctx: click.Context,
    models: tuple[str, ...],
    base: str | None,
    output: Path | None,
    source: str | None,
    barrier: bool,
    plot: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether models may be averaged, before anything is downloaded.

    Reads configs, cards, tensor headers and samples of weights. Exit code 3 when they may not. With --barrier the
    models are downloaded and scored, and half-way between each two of them.

    \b
    Example: hf-soup check owner/run-1 owner/run-2 -o recipe.yaml
             hf-soup check --recipe recipe.yaml --barrier --plot barriers.png
    """
    from hf_soup.soup import check as examine

    if not models and source is None:
        raise click.UsageError("Missing argument 'MODEL...': name models, or a recipe of them with --recipe.")
    if barrier and source is None:
        raise click.UsageError("--barrier measures on held-out data: name a recipe that has `score` with --recipe.")
    if plot and not barrier:
        raise click.UsageError("--plot draws barriers, so it goes with --barrier.")
    if plot and output and plot.absolute() == output.absolute():
        raise click.UsageError(f"-o and --plot both name '{plot}', and one would take the other's place.")
    _patient()
    recipe = recipe_of(models, source, base=base)
    if output is not None:
        refuse_existing(output)
    if barrier:
        from hf_soup.barrier import barriers, require_measurable

        require_measurable(recipe, plot)
    lineage = examine(recipe)
    report, text = lineage.to_dict(), str(lineage)
    refused = lineage.verdict == "refused"
    files: list[Callable[[], None]] = []
    if barrier and refused:
        click.echo("note: models that cannot be averaged have no barrier measured between them", err=True)
        report["barrier"] = None
    elif barrier:
        found = barriers(recipe, lineage, device=device, quiet=quiet)
        report["reasons"] += [reason.to_dict() for reason in found.reasons]
        report["barrier"] = found.to_dict()
        # What the check advises is to measure, which is done.
        said = [part for part in text.split("\n\n") if not part.startswith("What to do: ")]
        text = "\n\n".join([*said, shown.barriers(found)])
        files += [partial(found.draw, plot)] if plot else []
    if output is not None and not refused:
        # One that cannot be read would stop the cook, for which it is only a hint here.
        if lineage.ancestor and lineage.ancestor.checkpoint and lineage.ancestor.declared and recipe.base is None:
            recipe = recipe.model_copy(update={"base": lineage.ancestor.model})
        files.insert(0, partial(write_new, output, recipe.to_yaml()))
    _tell(report, text, as_json, *files)
    if refused:
        ctx.exit(3)
    if output is not None:
        click.echo(f"Wrote {output}. Next: hf-soup cook {output} -o soup", err=True)


@cli.command(epilog=f"RECIPE is a YAML file. {_MODELS}")
@click.argument("models", nargs=-1, required=True, metavar="RECIPE | MODEL...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The soup.")
@click.option("--base", metavar="MODEL", help="The pretrained ancestor, where cards do not name it.")
@click.option("--method", metavar="NAME", help="How tensors are combined; see `hf-soup methods`.")
@click.option("--select", metavar="NAME", help="What goes in, with which shares; see `hf-soup methods`.")
@click.option("--data", metavar="ID_OR_PATH[:SPLIT]", help="Held-out data that selection may look at.")
@click.option("--task", metavar="TASK", help="image-classification or text-classification.")
@click.option("--metric", metavar="METRIC", help="accuracy, f1, …; accuracy by default.")
@click.option("--set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of the method.")
@click.option("--dry-run", is_flag=True, help="Check, and say what would be fetched and written.")
@click.option("--stream", is_flag=True, help="Keep no ingredient: drop each file after its last use.")
@click.option("--push", metavar="REPO", help="Publish the soup when it is done.")
@_DEVICE
@_QUIET
@_JSON
def cook(
    models: tuple[str, ...],
    output: Path,
    base: str | None,
    method: str | None,
    select: str | None,
    data: str | None,
    task: str | None,
    metric: str | None,
    parameters: tuple[str, ...],
    dry_run: bool,
    stream: bool,
    push: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Average models into a new one, score it, and write it to a folder.

    \b
    Example: hf-soup cook recipes/beans.yaml -o soup
             hf-soup cook owner/run-1 owner/run-2 -o soup --select greedy \\
                 --data owner/dataset:validation --task image-classification
    """
    from hf_soup import soup as kitchen
    from hf_soup.publish import require_token

    _patient()
    changes: dict[str, Any] = {"base": base}
    if data or task or metric:
        changes["score"] = scoring_of(data, task, metric)
    recipe = recipe_of(models, method=method, select=select, parameters=parameters, **changes)
    if dry_run:
        planned = kitchen.preview(recipe, output, stream=stream)
        click.echo(json.dumps(planned, indent=2) if as_json else shown.plan(planned))
        return
    if push:
        require_token()
    soup = kitchen.cook(recipe, output, device=device, stream=stream, quiet=quiet)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    pushed = soup.push(push) if push else None
    if as_json:
        report = {
            "folder": str(soup.folder),
            "weights": soup.weights,
            "scores": soup.scores,
            "comparisons": {title: each["sentence"] for title, each in soup.summary["comparisons"].items()},
            "best": soup.summary["best"],
            "selected": soup.summary["selected"],
            "trace": soup.summary["trace"],
            "parameters": soup.summary["parameters"],
            "curve": soup.summary["curve"],
            "stability": soup.summary["stability"],
            "digest": soup.digest,
            "seconds": soup.seconds,
            "resumed": soup.resumed,
            "pushed": pushed and {"repo": pushed.repo, "commit": pushed.commit, "url": pushed.url},
        }
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(shown.soup(soup))
    click.echo(f"Pushed to {pushed.url}" if pushed else f"Next: hf-soup push {soup.folder} OWNER/NAME")


@cli.command(epilog=_MODELS)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--recipe", type=click.Path(path_type=Path), required=True, help="Whose data to use.")
@_DEVICE
@_QUIET
@_JSON
def score(models: tuple[str, ...], recipe: Path, device: str, quiet: bool, as_json: bool) -> None:
    """Score any models on a recipe's held-out and report data.

    Example: hf-soup score owner/run-1 soup --recipe recipes/beans.yaml
    """
    from hf_soup.recipe import Recipe
    from hf_soup.soup import score as measure

    _patient()
    scores = measure(models, Recipe.load(recipe), device=device, quiet=quiet)
    if as_json:
        click.echo(json.dumps({"scores": scores}, indent=2))
    else:
        click.echo("Percent, with 95 % intervals.\n\n" + shown.table(scores))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, default=None, help="Create the repo as private.")
@click.option("--license", "license_id", metavar="ID", help="The card's licence, such as apache-2.0.")
@click.option("--replace", is_flag=True, help="Delete what the repo holds beside the soup.")
@_JSON
def push(folder: Path, repo: str, private: bool | None, license_id: str | None, replace: bool, as_json: bool) -> None:
    """Publish a soup as one commit to a model repo on the Hub.

    Example: hf-soup push soup me/my-soup --private
    """
    from hf_soup.cooked import Soup

    _patient()
    done = Soup.open(folder).push(repo, private=private, license=license_id, replace=replace)
    if as_json:
        click.echo(json.dumps({"repo": done.repo, "commit": done.commit, "url": done.url, "pull_request": None}))
    elif done.changed:
        click.echo(f"Pushed {done.repo} as commit {done.commit[:7]}: {done.url}")
    else:
        click.echo(f"{done.repo} holds this soup already, in commit {done.commit[:7]}: {done.url}")


@cli.command()
@click.argument("name", required=False)
@_JSON
def methods(name: str | None, as_json: bool) -> None:
    """List the ways of combining tensors and of selecting ingredients, or explain one.

    Example: hf-soup methods greedy
    """
    from hf_soup.methods import METHODS
    from hf_soup.selection import SELECTIONS

    every: dict[str, Mapping[str, Any]] = {"methods": METHODS, "selections": SELECTIONS}
    known = [each for registry in every.values() for each in registry]
    if name is not None and name not in known:
        raise RecipeError(f"There is no method or selection '{name}'.", hint=f"Known are: {', '.join(known)}.")
    chosen = {title: [m for m in registry.values() if name in (None, m.name)] for title, registry in every.items()}
    click.echo(json.dumps(shown.as_data(chosen), indent=2) if as_json else shown.explained(chosen, whole=bool(name)))


@cli.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("local-hub"), show_default=True, help="Folder.")
@click.option("--port", type=click.IntRange(0, 65535), default=8760, show_default=True, help="0 takes a free one.")
def hub(root: Path, port: int) -> None:
    """Serve a small local Hub, for demos, tests and work without a network.

    Point any Hugging Face tool at it with HF_ENDPOINT and HF_TOKEN. Ctrl-C stops it.

    Example: hf-soup hub --root local-hub --port 8760
    """
    from hf_soup.local_hub import LocalHub, serve

    def ready(server: LocalHub) -> None:
        click.echo(f"export HF_ENDPOINT={server.endpoint} HF_TOKEN={server.token} HF_HUB_DISABLE_XET=1")
        sys.stdout.flush()

    serve(root, port=port, on_ready=ready)


# ---- helpers ------------------------------------------------------------------------------------------------


def _tell(report: dict[str, Any], text: str, as_json: bool, *files: Callable[[], None]) -> None:
    """Print what was found and write the files; where one cannot be written, what was found is printed all the same."""
    failed = []
    for write in files:
        try:
            write()
        except SoupError as error:
            failed.append(error)
    if not as_json:
        click.echo(text)
    elif failed:
        click.echo(json.dumps(report | _as_data(failed[0]), indent=2))
        click.get_current_context().exit(1)
    else:
        click.echo(json.dumps(report, indent=2))
    if failed:
        raise failed[0]


def _as_data(error: SoupError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}}


def _patient() -> None:
    from hf_soup import client

    client.patient()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    try:
        code = cli.main(list(arguments), prog_name="hf-soup", standalone_mode=False)
    except SoupError as error:
        if as_json:
            click.echo(json.dumps(_as_data(error), indent=2))
        else:
            click.echo(f"Error: {shown.printable(str(error))}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Nothing half-made is left; the same command continues where it can.", err=True)
        # Threads that wait for the network would keep the process alive.
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)
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
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise  # the others are told when this one leaves in order
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)
