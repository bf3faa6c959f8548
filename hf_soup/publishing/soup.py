"""A soup in a folder: what it holds, and how it is published."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_soup._util.io import within
from hf_soup._util.logs import PrintableLogger
from hf_soup._util.text import some
from hf_soup.checkpoint import ADAPTER_SETTINGS, model_class, open_checkpoint, read_config
from hf_soup.errors import PublishError, RecipeError, ResolveError
from hf_soup.hub import PushResult, Token, commit_folder, inspect_target, require_public, within_repo
from hf_soup.merging import digest_of_folder
from hf_soup.publishing.card import difference, with_fields
from hf_soup.recipe import Recipe, SoupReport, split_revision

logger = PrintableLogger(__name__)

_COOK = "Name a folder that `hf-soup cook` made."


@dataclass(frozen=True)
class Soup:
    """A soup in a folder.

    Args:
        folder: Where it is.
        report: What ``soup.json`` holds: weights, scores, evidence, digest, versions.
        resumed: Bytes that an interrupted run had written already.
        seconds: How long it took to cook.
    """

    folder: Path
    report: SoupReport = field(repr=False)
    resumed: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, folder: str | Path) -> Soup:
        """A soup that was cooked earlier.

        Raises:
            ResolveError: There is none in the folder.
        """
        folder = Path(folder)
        try:
            return cls(folder, SoupReport.parse((folder / "soup.json").read_bytes()))
        except (OSError, ValueError, RecursionError):
            raise ResolveError(f"'{folder}' is not a soup: it has no readable soup.json.", hint=_COOK) from None
        except RecipeError as error:  # somebody edited it
            raise ResolveError(f"'{folder}' is not a soup. {error.message}", hint=_COOK) from None

    @property
    def weights(self) -> dict[str, float]:
        """The share of every ingredient that went in."""
        return dict(self.report.weights)

    @property
    def scores(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Model → data → ``{metric, value, low, high, n}``, for the soup, its ingredients and their ensemble."""
        scores = self.report.scores.items()
        return {name: {title: each.to_dict() for title, each in found.items()} for name, found in scores}

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe; cooking it again gives the same bytes."""
        return Recipe.load(self.folder / "soup.yaml")

    @property
    def digest(self) -> str:
        """The digest over all tensors."""
        return self.report.digest

    def load(self) -> Any:
        """The soup as a model of the library that its card names: transformers, sentence-transformers, or peft, with
        the base in its place.

        Raises:
            ResolveError: That library is not installed.
        """
        if self.report.adapter:
            return self._over_base()
        if self.report.library == "sentence-transformers":
            try:
                import sentence_transformers
            except ImportError:
                raise ResolveError(
                    f"'{self.folder}' is a model of sentence-transformers, which is not installed.",
                    hint="pip install sentence-transformers",
                ) from None
            return getattr(sentence_transformers, self.report.encoder)(str(self.folder))
        model = model_class(read_config(json.loads((self.folder / "config.json").read_text()), str(self.folder)))
        return model.from_pretrained(self.folder)

    def _over_base(self) -> Any:
        """An adapter over its base."""
        try:
            from peft import PeftModel
        except ImportError:
            raise ResolveError(
                f"'{self.folder}' is an adapter, and peft is not installed.", hint="pip install peft"
            ) from None
        settings = json.loads((self.folder / ADAPTER_SETTINGS).read_text())
        name, revision = settings["base_model_name_or_path"], settings["revision"]
        config = read_config(open_checkpoint(str(self.folder)).config, str(self.folder))
        # A head that the adapter brings is not the base's, nor has it as many outputs.
        loaded = model_class(config).from_pretrained(
            name, revision=revision, config=config, ignore_mismatched_sizes=True
        )
        return PeftModel.from_pretrained(loaded, self.folder)

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        tag: str | None = None,
        license: str | None = None,
        replace: bool = False,
        allow_private_ingredients: bool = False,
        token: Token = None,
    ) -> PushResult:
        """Publish the soup as one commit to a model repo, or offer it there in a pull request.

        What is there already is not sent again, and nothing that is there is deleted without ``replace``.

        Args:
            repo_id: ``owner/name``.
            private: Create the repo as private; None is the owner's default.
            commit_message: The commit's title.
            commit_description: The rest of its message, which is the text of a pull request; of an update, what it
                changed.
            create_pr: Open a pull request instead of committing to the repo.
            revision: The branch, made where it is not there; None is the default one.
            tag: A tag for the commit, so that soups have versions.
            license: The card's licence, in place of what the ingredients' licences give.
            replace: Delete what the repo holds beside the soup, whatever that is.
            allow_private_ingredients: Name models in a public repo that are private.
            token: As everywhere in huggingface_hub.

        Raises:
            PublishError: No token or right, weights that are not those of the recipe, private ingredients, a repo
                that holds something else, a commit of somebody else's in between, or the Hub fails.
        """
        if license is not None and not license.strip():
            raise PublishError("The licence is empty.", hint="Name one of the Hub's, such as `apache-2.0`.")
        target = inspect_target(
            repo_id, private=private, create_pr=create_pr, revision=revision, tag=tag, replace=replace, token=token
        )
        paths = {path.relative_to(self.folder): path for path in sorted(self.folder.rglob("*"))}
        # What is hidden was put there by others: caches, a desktop's notes.
        files = {
            name.as_posix(): path
            for name, path in paths.items()
            if path.is_file() and not any(part.startswith(".") for part in name.parts)
        }
        linked = [name for name in files if not name.endswith(".safetensors") and not within(self.folder, name)]
        if linked:
            raise PublishError(
                f"'{self.folder}': {some(linked)} would be read from outside of the folder.",
                hint="Put copies in the place of links, if they may be published.",
            )
        if "README.md" not in files:
            raise PublishError(f"'{self.folder}' has no README.md.", hint="Cook the soup again, or write a card.")
        models, title, changes = self._models(), *self._told()
        if not allow_private_ingredients:
            require_public(models, target)
        fields: dict[str, Any] = {}
        if license is not None:
            fields = {"license": license, "license_name": None, "license_link": None}
        elif not self.report.license_agreed:
            logger.warning(
                "the ingredients' licences are not all the same or not all stated, so the card says "
                "`license: other` and lists them. Set the right one with --license."
            )
        try:
            card = (self.folder / "README.md").read_text("utf-8-sig")
        except UnicodeDecodeError:
            raise PublishError(f"'{self.folder}': README.md is not text.", hint="Mend it, or cook again.") from None
        name = target.repo.rpartition("/")[2]
        card = with_fields(card, fields, self.folder.resolve().name, name).replace("THIS_REPO", target.repo)
        digest = digest_of_folder(self.folder)
        if digest != self.digest:
            raise PublishError(
                f"The weights in '{self.folder}' are not those that were cooked: their digest is {digest}, and "
                f"soup.json says {self.digest}.",
                hint="Cook the soup again. Other weights are no soup of this recipe: publish them as your own model.",
                code="edited",
            )
        with tempfile.TemporaryDirectory(prefix="hf-soup-card-") as folder:
            files["README.md"] = Path(folder) / "README.md"
            files["README.md"].write_text(card)
            return commit_folder(
                target, files, message=commit_message or title, description=commit_description or changes
            )

    def _told(self) -> tuple[str, str | None]:
        """The title of its commit and, of an update, what it changed."""
        if update := self.report.update:
            return f"Add {some(list(update.added))}", difference(self.report)
        return f"Model soup of {len(self.weights)} models", None

    def _models(self) -> list[str]:
        """Every model on the Hub that the soup's files name and that could be read when it was cooked."""
        ingredients = self.recipe.ingredients
        models = [each.model for each in ingredients]
        models += [split_revision(each.base)[0] for each in ingredients if each.base]
        if lineage := self.report.lineage:
            models += [each.model for each in (*lineage.ingredients, lineage.ancestor) if each and each.revision]
        models += [name.split("@")[0] for name in self.report.made_of]
        if update := self.report.update:
            models.append(update.soup)
        repos = (place[0] for name in models if (place := within_repo(name)))
        return list(dict.fromkeys(repos))
