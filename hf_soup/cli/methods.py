"""``hf-soup methods``: what there is for `method` and `select`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from hf_soup._util.logs import PrintableLogger
from hf_soup._util.text import near
from hf_soup.cli import method_help
from hf_soup.cli.options import JSON, patient, show
from hf_soup.errors import RecipeError

logger = PrintableLogger(__name__)


@click.command()
@click.argument("name", required=False)
@JSON
def methods(name: str | None, as_json: bool) -> None:
    """List the ways of combining tensors and of selecting ingredients, or explain one.

    Example: hf-soup methods ties
    """
    from hf_soup.methods import METHODS
    from hf_soup.recipe import renamed
    from hf_soup.selection import SELECTIONS

    patient()
    every: dict[str, Mapping[str, Any]] = {"methods": METHODS, "selections": SELECTIONS}
    known = [each for registry in every.values() for each in sorted(registry)]
    if name is not None and name not in known:
        hint = f"Known are: {', '.join(known)}."
        raise RecipeError(f"There is no method or selection '{name}'{renamed(name) or near(name, known)}.", hint=hint)
    chosen: dict[str, list[Any]] = {title: [] for title in every}
    for title, registry in every.items():
        for each in sorted(registry):
            try:
                chosen[title] += [registry[each]] if name in (None, each) else []
            except RecipeError as error:
                if name is not None:
                    raise
                logger.warning(error.message)  # the others are listed all the same
    if as_json:
        show(json.dumps(method_help.as_data(chosen), indent=2))
    elif name is None:
        show(method_help.listed(chosen))
    else:
        show("\n\n\n".join(method_help.whole(each) for registry in chosen.values() for each in registry))
