"""Where a push goes: what can be known of it before there is anything to send, and is asked before a soup is cooked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from hf_soup import hub
from hf_soup.client import EXPLAINED, TIMEOUT, OddAnswerError, Token, api, endpoint, explain_push, retrying
from hf_soup.errors import PublishError, ResolveError
from hf_soup.headers import some

_TAG = re.compile(r"(?!refs/|.*(\.\.|//|\.lock$|[./]$))[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class Target:
    """Where a push goes, as it was when it was looked at.

    Args:
        repo: ``owner/name``, the new one where the repo was renamed.
        head: What it holds; None where it does not exist yet.
        user: Who pushes.
        private: Whether others cannot see it; None is the owner's default.
        create_pr: Whether it is to be offered in a pull request.
        revision: The branch; None is the default one.
        tag: The tag that the commit gets.
        tagged: Whether ``head`` has that tag already.
        replace: Whether what the repo holds beside the soup is to be deleted.
        token: As everywhere in huggingface_hub.
    """

    repo: str
    head: hub.Repo | None
    user: str
    private: bool | None
    create_pr: bool
    revision: str | None
    tag: str | None
    tagged: bool
    replace: bool
    token: Token = field(repr=False)


def require_token(token: Token = None) -> None:
    """Refuse to start a push that cannot end.

    Raises:
        PublishError: Nobody is logged in, or with something that is no token.
    """
    used = None if token is False else token if isinstance(token, str) else get_token()
    if not used:
        raise PublishError(
            "No token: pushing needs to know who you are.",
            hint="Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        )
    if not re.fullmatch(r"[!-~]+", used):
        raise PublishError("The token has spaces or letters that no token has.", hint="Copy it once more.")


def look(
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    replace: bool = False,
    token: Token = None,
) -> Target:
    """All that can be known of a push before there is anything to send; nothing is changed.

    Args:
        repo_id: ``owner/name``.
        private: The repo is to be private, so one that is public is refused.
        create_pr, revision, tag, token: As in `Target`.
        replace: Delete what the repo holds beside the soup, and accept a repo that holds something else.

    Raises:
        PublishError: No token or one that only reads, a name that cannot be, a repo that holds something else, a tag
            that is taken, or the Hub fails.
    """
    require_token(token)
    what, client = f"'{repo_id}'", api(token)
    if not re.fullmatch(r"[^/]+/[^/]+", repo_id):
        raise PublishError(f"{what} is not a name for a repo.", hint="Use `owner/name`.")
    if create_pr and tag is not None:
        raise PublishError(f"The tag '{tag}' would name a commit that nobody has merged.", hint="Tag it then.")
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise PublishError(f"A pull request is for main, not for '{revision}'.", hint="Leave one of them out.")
    if tag is not None and not _TAG.fullmatch(tag):
        raise PublishError(f"'{tag}' is not a name for a tag.", hint="Use letters, digits, '.', '-' and '_': v1.0.")
    try:
        validate_repo_id(repo_id)
        me = retrying(client.whoami)
        user = str(me["name"])
        access = (me.get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise PublishError(f"{what}: the token of {user} may only read.", hint="Use one that may write.")
        head = _head(repo_id, revision, token)
        tags: dict[str, str | None] = {}
        if (tag is not None or revision is not None) and head is not None:
            refs = retrying(client.list_repo_refs, head.id)
            # A branch of that name would be taken for the tag, or the tag for the branch.
            tags = {each.name: None for each in refs.branches} | {each.name: each.target_commit for each in refs.tags}
            _require_branch(head, revision, [each.name for each in refs.branches])
    except HFValidationError as error:
        raise PublishError(f"{what} is not a name for a repo: {error}", hint="Use `owner/name`.") from None
    except (OddAnswerError, LookupError, TypeError, AttributeError):
        raise PublishError(
            f"{endpoint()} does not say who you are.", hint="Check HF_ENDPOINT: is that a Hub?"
        ) from None
    except EXPLAINED as error:
        raise explain_push(error, what) from None
    if head is None and create_pr:
        raise PublishError(f"{what} does not exist, so nothing can be offered to it.", hint="Push without `--pr`.")
    if head is not None:
        require_fit(head, private=private, replace=replace)
    if tag in tags and (head is None or tags[tag] != head.revision):
        raise taken(str(tag), tags[tag])
    return Target(
        repo=head.id if head else repo_id,
        head=head,
        user=user,
        private=head.private if head else private,
        create_pr=create_pr,
        revision=revision,
        tag=tag,
        tagged=tag in tags,
        replace=replace,
        token=token,
    )


def _require_branch(head: hub.Repo, revision: str | None, branches: Sequence[str]) -> None:
    """Stop where a revision names something that no commit can go on top of."""
    there = head.requested is not None
    is_offer = revision is not None and re.fullmatch(r"refs/pr/\d+", revision) is not None
    if revision and revision not in branches and (not is_offer if there else revision.startswith("refs/")):
        names = "a tag or a commit" if there else "nothing"
        raise PublishError(f"'{revision}' names {names} in '{head.id}', and no branch.", hint="Use a branch's name.")


def _head(repo_id: str, revision: str | None, token: Token) -> hub.Repo | None:
    """What a push goes on top of: the branch, or where that is to be made the default one; None without a repo."""
    try:
        return hub.resolve(repo_id, revision, token=token, from_cache=False)
    except ResolveError as error:
        if isinstance(error.__context__, RevisionNotFoundError) and revision is not None:
            return _head(repo_id, None, token)
        if isinstance(error.__context__, RepositoryNotFoundError):
            return None
        raise explain_push(error, f"'{repo_id}'") from None


def require_public(models: Sequence[str], target: Target) -> None:
    """Stop where a repo that all can see would name models that they cannot.

    Args:
        models: Ids on the Hub.
        target: From `look`.

    Raises:
        PublishError: Some are private, or gone, which looks the same.
    """

    def hidden(model: str) -> bool:
        try:
            info = retrying(api(target.token).model_info, model, expand=["private"], timeout=TIMEOUT)
            return bool(info.private)
        except RepositoryNotFoundError:
            return True
        except EXPLAINED as error:
            raise explain_push(error, f"'{model}'") from None

    names = [] if target.private else list(dict.fromkeys(models))
    found = [name for name, is_hidden in zip(names, hub.in_parallel(hidden, names), strict=True) if is_hidden]
    if found:
        raise PublishError(
            f"'{target.repo}' is public, and would name models that are private or gone: {some(found)}.",
            hint="Use `hf-soup push --private`, or `--allow-private-ingredients` if everybody may know of them.",
        )


def taken(tag: str, commit: str | None) -> PublishError:
    """The error for a tag that names something else: a commit, or a branch that is called so."""
    names = f"another commit, {commit[:7]}" if commit else "a branch"
    return PublishError(f"'{tag}' names {names}.", hint="Use another tag, or delete that one.")


def require_fit(head: hub.Repo, *, private: bool | None, replace: bool) -> None:
    """Stop before a repo that holds something else than a soup, or that all can see where it is to be private.

    Raises:
        PublishError: It is such a repo.
    """
    if private and not head.private:
        raise PublishError(
            f"'{head.id}' is public.", hint="Make it private in its settings first, or use another name."
        )
    found = sorted(set(head.files) - {".gitattributes", "README.md"})
    if found and "soup.json" not in head.files and not replace:
        raise PublishError(
            f"'{head.id}' is taken: it holds something else ({some(found)}).",
            hint="Push to another name, or delete what is there with `--replace`.",
        )
