"""A published soup that takes in more ingredients: cooked from its leaves, and compared with what it was before."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup._util.text import some
from hf_soup.errors import RecipeError, ResolveError
from hf_soup.evaluation import LAST, SOUP, EvaluationReport
from hf_soup.hub import Token, may_pass
from hf_soup.ingredients import Published, ResolvedIngredients, expand_runs, open_published, resolve_ingredients
from hf_soup.merging import Plan
from hf_soup.recipe import AnyScoring, Comparison, Mixture, Recipe, Scoring, UpdateReport


@dataclass(frozen=True)
class Update:
    r"""The next version of a soup: its leaves, and newcomers behind them; `cook` takes it in the place of a recipe.

    A newcomer has the mean of the leaves' weights, :math:`w_{n+1} = \frac1n\sum_i w_i`, and so in every pattern of
    `tensor_weights`. Whatever else the recipe says stays, so the result has the bytes of a cook of that longer recipe.

    Args:
        soup: ``owner/name`` as the Hub answers, or ``local:name`` of a folder.
        revision: Its commit; None of a folder.
        recipe: Of the next version.
        leaves: How many of its ingredients the last version had; the newcomers stand behind them.
        left_out: Half-written checkpoints, and why data of the recipe is not measured, a sentence each.
        from_cache: The Hub was not reached, so the last version is the one in the cache.
    """

    soup: str
    revision: str | None
    recipe: Recipe
    leaves: int
    left_out: tuple[str, ...] = ()
    from_cache: bool = False

    @classmethod
    def of(
        cls,
        soup: str,
        add: Sequence[str],
        *,
        validation: Sequence[AnyScoring] | None = None,
        allow_pickle: bool = False,
        token: Token = None,
    ) -> Update:
        """Read a soup's recipe, and put newcomers into it.

        Args:
            soup: A Hub id, ``id@revision``, a huggingface.co address or a folder.
            add: The newcomers, each a Hub id or a folder; one that is a soup itself counts as one.
            validation: Validation data in the place of the recipe's.
            allow_pickle: As in a recipe; what the soup's own says does not count.
            token: As everywhere in huggingface_hub.

        Raises:
            ResolveError: The soup or a newcomer cannot be had, or the soup's leaves are not all on the Hub.
            RecipeError: It is no soup's recipe, a newcomer is in it already, or a share in it would mean nothing.
        """
        published = open_published(soup, allow_pickle=allow_pickle, token=token)
        recipe, called = published.recipe, published.model
        everything = [*(each.model for each in recipe.ingredients), recipe.base_model or ""]
        if local := [name for name in everything if name.startswith("local:")]:
            raise ResolveError(
                f"{called} cannot be cooked from its leaves: of {some(local)} its recipe has a name and a sha256, "
                "and no address; it was a folder on the machine of whoever made it.",
                hint="Who has the folder can put its path into soup.yaml, with the newcomer behind it, and cook that.",
            )
        _require_shares(recipe, called)
        try:
            leaves = in_parallel(lambda leaf: hub.resolve(leaf.model, leaf.revision, token=token), recipe.ingredients)
        except ResolveError as error:
            raise ResolveError.of(
                error,
                f"{called} cannot be cooked from its leaves. {error.message}",
                hint="Where one is gone, cook the others that its soup.yaml names, with the newcomer, as a new soup.",
            ) from error
        newcomers, runs = expand_runs(Recipe(ingredients=list(add), allow_pickle=allow_pickle), beside=True)
        source = published.source
        known = {f"{repo.id}@{repo.revision}" for repo in leaves} | {f"{called}@{source.commit}"}
        found = resolve_ingredients(newcomers, token=token)
        for name, shares in found.groups.items():
            mine = {found.checkpoints[number].identity: str(found.checkpoints[number]) for number in shares}
            if mine.keys() <= known:
                raise RecipeError(
                    f"{name} adds nothing: {called} has {some(list(mine.values()))} already, or it is named twice.",
                    hint="Leave it out; `name@revision` names another commit of a model.",
                )
            known |= mine.keys()
        weight = statistics.mean(each.weight for each in recipe.ingredients)  # exact, so equal weights stay equal
        left_out = [note.message for note in runs if note.code == "half-written"]
        changes: dict[str, Any] = {
            "ingredients": (
                *recipe.ingredients,
                *(each.model_copy(update={"weight": weight}) for each in newcomers.ingredients),
            ),
            "tensor_weights": {
                pattern: (*shares, *[statistics.mean(shares)] * len(newcomers.ingredients))
                for pattern, shares in recipe.tensor_weights.items()
            },
            "validation": tuple(validation)
            if validation
            else _usable(published, published.validation, left_out, token),
            "test": _usable(published, published.test, left_out, token),
            "calibration": published.with_calibration().calibration,
        }
        return cls(
            called, source.commit, recipe.model_copy(update=changes), len(recipe.ingredients), tuple(left_out),
            source.from_cache,
        )  # fmt: skip

    def last(self, weights: Mapping[str, float], expanded: ResolvedIngredients, plan: Plan) -> Mixture:
        """The last version: the old leaves with their old shares.

        Args:
            weights: Of all ingredients that count.
            expanded: This recipe's, of which the leaves stand first.
            plan: Of all ingredients.
        """
        old = {name: weights[name] for name in list(expanded.groups)[: self.leaves] if name in weights}
        leaves = sorted(expanded.flatten(old).items())
        own = {tensor: shares[: self.leaves] for tensor, shares in plan.mixture.tensor_weights.items()}
        names = {plan.layout.names[number]: share for number, share in leaves}
        return replace(plan.mixture, weights=names, tensor_weights=own)

    def report(self, names: Sequence[str], results: EvaluationReport | None) -> UpdateReport:
        """What is told of it: what was added to what, both versions' scores, and whether it helps.

        Args:
            names: Of all ingredients, in the order of the recipe.
            results: The scores, where anything was measured.
        """
        added = tuple(names[self.leaves :])
        since = results.since if results else {}
        helps, sentence = _judged(added, since, [scoring.title for scoring in self.recipe.validation])
        return UpdateReport(
            soup=self.soup,
            revision=self.revision,
            added=added,
            before=results.scores[LAST] if results else {},
            after=results.scores[SOUP] if results else {},
            comparisons=since,
            left_out=self.left_out,
            helps=helps,
            sentence=sentence,
        )


def _require_shares(recipe: Recipe, called: str) -> None:
    """Refuse a soup in which a newcomer's share would mean nothing."""
    every = [each.weight for each in recipe.ingredients] + [
        s for shares in recipe.tensor_weights.values() for s in shares
    ]
    if recipe.method.parameters.get("normalize", True) is not True:
        reason = "is a plain sum (`normalize: false`): one more model in it would make all its weights larger"
    elif min(every) < 0:
        reason = (
            f"has the weight {min(every):g}, which takes away what a model learned; no mean of such weights is a share"
        )
    else:
        return
    raise RecipeError(
        f"{called} {reason}.",
        hint="Write a recipe with the shares that you mean: its soup.yaml, with the newcomer in it.",
    )


def _usable(
    published: Published, scorings: Sequence[AnyScoring], left_out: list[str], token: Token
) -> tuple[AnyScoring, ...]:
    """Those of a recipe's data that can be had here; why the others cannot is added to a list."""
    found: list[AnyScoring] = []
    for each in scorings:
        try:
            (usable,) = replace(published, validation=(each,), test=()).with_data().validation
            if isinstance(usable, Scoring):
                hub.resolve_dataset(usable.dataset, usable.revision, token=token)
        except (RecipeError, ResolveError) as error:
            if may_pass(error):
                raise
            left_out.append(f"'{each.title}' is not measured. {error.message}")
        else:
            found.append(usable)
    return tuple(found)


def _judged(
    added: Sequence[str], since: Mapping[str, Comparison], validation: Sequence[str]
) -> tuple[bool | None, str]:
    """Whether newcomers help (None: nobody can tell), and the same in plain words.

    Validation data decides, where there is any: test data by which versions were chosen would test nothing any more.

    >>> _judged(["acme/c"], {}, [])
    (None, 'Whether adding acme/c helps was not measured, as there is no data.')
    """
    who = some(added)
    if not since:
        return None, f"Whether adding {who} helps was not measured, as there is no data."
    decides = [title for title in since if title in validation] or list(since)

    def seen(gain: bool, decided: bool) -> str:
        found = {title: each for title, each in since.items() if (title in decides) is decided and each.significant}
        where = some([title for title, each in found.items() if (each.difference > 0) is gain])
        return f"{'better' if gain else 'worse'} on {where}" if where else ""

    better, worse = seen(True, True), seen(False, True)
    if better or worse:
        but = f"{worse or better} than the last version{f', and {better}' if worse and better else ''}"
        said = f"Adding {who} {'does not help' if worse else 'helps'}: the soup is {but}."
    else:
        none = f"no difference from the last version can be seen on {some(decides)}"
        said = f"That adding {who} helps cannot be shown: {none}."
    tests = " and ".join(filter(None, (seen(True, False), seen(False, False))))
    return (False if worse else True if better else None), f"{said} It is {tests}." if tests else said
