"""The Hub, written: one commit or one pull request, safe against lost answers and against other people's commits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, get_session, get_token
from huggingface_hub.community import Discussion
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from hf_soup._util.parallel import in_parallel
from hf_soup._util.text import some
from hf_soup._util.version import __version__
from hf_soup.errors import PublishError, ResolveError, SoupError, without_credentials
from hf_soup.hub import download, repo
from hf_soup.hub.client import (
    EXPLAINED,
    TIMEOUT,
    OddAnswerError,
    Token,
    api,
    endpoint,
    explain_push,
    is_passing,
    pause_after,
    retrying,
    status_of,
)
from hf_soup.hub.file_digests import sha256_of
from hf_soup.hub.repo import Repo, resolve
from hf_soup.hub.repo_files import ASSETS, MAX_TEXT

_ATTEMPTS = 3  # the client makes its own for every step of an upload but the first and the last
_AGAIN = "Push the same soup again: nothing is made twice."
_SMALL = 10_000_000  # bytes; what is larger is never kept by git itself


def _of_a_soup(path: str) -> bool:
    """Whether a model is loaded from files of this name, or cooked again; an earlier soup's picture does no harm."""
    return (
        ASSETS.fullmatch(path) is not None
        or path == "soup.yaml"
        or path.endswith((".safetensors", ".safetensors.index.json"))
    )


@dataclass(frozen=True)
class PushResult:
    """Where a soup went.

    Args:
        repo: The repo, by its name of today.
        commit: In full; that of the pull request where there is one.
        url: The repo's address.
        changed: Whether there was anything to send.
        pull_request: Its address, where the soup is offered in one.
    """

    repo: str
    commit: str
    url: str
    changed: bool
    pull_request: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """As ``--json`` prints it."""
        return {"repo": self.repo, "commit": self.commit, "url": self.url, "pull_request": self.pull_request}


def commit_folder(
    target: PushTarget, files: Mapping[str, Path], *, message: str, description: str | None = None
) -> PushResult:
    """Publish files as one commit, or as a pull request of one, creating the repo where it is not there.

    The commit names its parent, so nobody else's commit is overwritten. When an answer gets lost, the Hub is asked
    what it has before anything is sent a second time, so there is never a second commit or pull request. Files that
    arrived are not sent again.

    Args:
        target: From `look`.
        files: Paths in the repo and the files here.
        message: The commit's title.
        description: The rest of its message, which is the text of a pull request.

    Raises:
        PublishError: No right to write, files that would have to be deleted, a commit in between, or the Hub fails.
    """
    push = _Push(target, files, message, description)
    try:
        done = push.run()
    except (SoupError, *EXPLAINED) as error:
        raise push.failed(error) from None
    if target.tag is not None and (done.changed or not target.tagged):
        _make_tag(target.tag, done, target.token)
    return done


class _Push:
    """One push: what is to be there in the end, whether it is, and how it gets there."""

    def __init__(self, target: PushTarget, files: Mapping[str, Path], message: str, description: str | None) -> None:
        self._target, self._client, self._head = target, api(target.token), target.head
        self._files, self._message, self._description = files, " ".join(message.split()), description
        self._stale: list[str] = []

    def run(self) -> PushResult:
        """Send what is not there."""
        target = self._target
        self._ids = {path: _content_ids(local) for path, local in self._files.items()}
        self._head = head = self._head or self._create()
        others = sorted(set(head.files) - set(self._files) - {".gitattributes"})
        if target.replace:
            self._stale = others
        else:
            _refuse_stale(head, others)
            self._refuse_another_kind(head)
        if self._is_in(head):
            return self._pushed(head.revision, changed=False)
        if target.create_pr and (offer := self._offer()):
            return replace(offer, changed=False)
        if target.tagged:
            raise tag_is_taken(str(target.tag), head.revision)
        if target.revision and head.requested is None:
            retrying(self._client.create_branch, head.id, branch=target.revision, revision=head.revision, exist_ok=True)
        with _xet_where_it_is_spoken(head.id, target):
            return self._send(head)

    def failed(self, error: Exception, *, unknown: bool = False) -> PublishError:
        """What went wrong, for the one who pushes; ``unknown`` where what they sent may have arrived all the same."""
        target = self._target
        owner, name = target.repo.split("/")
        own = f"Push to a name of your own, `{target.user}/{name}`"
        said = explain_push(error, f"'{target.repo}'")
        hint = said.hint
        if status_of(error) == 403 and owner != target.user:
            hint = f"{own}." if target.create_pr else f"{own}, or offer it with `--pr`."
        if self._head is None and status_of(error) == 404:
            return PublishError(f"'{target.repo}': there is no user or organization '{owner}'.", hint=f"{own}.")
        if self._head is None and status_of(error) == 400:
            hint = "Use another name."
        if unknown:
            return PublishError.of(said, f"{said.message} Whether the soup is there is not known.", hint=_AGAIN)
        return PublishError.of(said, said.message, hint=hint)

    def _create(self) -> Repo:
        target = self._target
        # The client wants an address from a server that only says that the repo is there already.
        with suppress(OddAnswerError):
            retrying(self._client.create_repo, target.repo, private=target.private, exist_ok=True)
        head = resolve(target.repo, token=target.token, from_cache=False)
        require_fit(head, private=target.private, replace=target.replace)  # somebody else may have made it since
        return head

    def _refuse_another_kind(self, head: Repo) -> None:
        """Stop before a soup takes the place of one of another architecture."""
        file = head.files.get("config.json")
        if file is None or "config.json" not in self._files or {file.blob, file.sha256} & self._ids["config.json"]:
            return
        # What is too long for a config is none of a kind that is known.
        there = download.read_range(head, "config.json", 0, file.size) if file.size <= MAX_TEXT else b""
        ours, theirs = map(_architectures, (self._files["config.json"].read_bytes(), there))
        if ours != theirs:
            raise PublishError(
                f"'{head.id}' holds another kind of model: {theirs}, and this is {ours}.",
                hint="Push to another name, or replace what is there with `--replace`.",
                code="taken",
            )

    def _is_in(self, repo: Repo) -> bool:
        there = {path: {file.sha256, file.blob} for path, file in repo.files.items()}
        same = all(there.get(path, set()) & ids for path, ids in self._ids.items())
        return same and not set(self._stale) & set(there)

    def _pushed(self, commit: str, pull_request: str | None = None, *, changed: bool = True) -> PushResult:
        repo = self._head.id if self._head else self._target.repo
        offered = pull_request and without_credentials(pull_request)
        return PushResult(repo, commit, f"{endpoint()}/{repo}", changed, offered)

    def _send(self, head: Repo) -> PushResult:
        operations = [CommitOperationAdd(path, str(local)) for path, local in self._files.items()]
        for operation in operations:
            # Known already, or the client would read the file for it; and what arrived is noted here for a next try.
            operation.upload_info.sha256 = bytes.fromhex(sha256_of(Path(str(operation.path_or_fileobj))))
        deletions = [CommitOperationDelete(path) for path in self._stale]
        for attempt in range(_ATTEMPTS):
            try:
                done = self._client.create_commit(
                    head.id,
                    [*operations, *deletions],
                    commit_message=self._message,
                    commit_description=self._description,
                    create_pr=self._target.create_pr,
                    revision=self._target.revision,
                    parent_commit=head.revision,
                )
            except (*EXPLAINED, RuntimeError, LookupError, TypeError, AttributeError) as error:
                # The client wraps the failed upload of a large file in a RuntimeError, hands on what xet raises, and
                # lets answers that are cut off, or no JSON, fail where it reads them.
                unread = isinstance(error, LookupError | TypeError | AttributeError)
                odd = unread or isinstance(error, RuntimeError | ConnectionError | json.JSONDecodeError)
                wrapped = error.__cause__ if isinstance(error, RuntimeError) else None
                failure = wrapped if isinstance(wrapped, Exception) else error
                failure = OddAnswerError(f"{type(error).__name__}: {error}") if unread else failure
            else:
                pushed = self._pushed(done.oid, done.pr_url)
                self._require(pushed, done.pr_revision)
                return pushed
            passing = odd or is_passing(failure)
            if passing:
                time.sleep(pause_after(failure, attempt))
            # Perhaps only the answer was lost, so look before anything is sent again.
            try:
                landed = self._offer() if self._target.create_pr else self._landed(head)
            except (ResolveError, *EXPLAINED):
                raise self.failed(failure, unknown=passing) from None
            if landed:
                return landed
            if attempt == _ATTEMPTS - 1 or not passing:
                raise self.failed(failure)
        raise AssertionError("the loop returns or raises")

    def _landed(self, head: Repo) -> PushResult | None:
        """The commit, if it is there: on top of the head that it names, whatever others put on top of it since."""
        token = self._target.token
        now = resolve(head.id, self._target.revision, token=token, from_cache=False)
        if now.revision == head.revision:
            return None
        commits = [c.commit_id for c in retrying(self._client.list_repo_commits, head.id, revision=now.revision)]
        first = commits[commits.index(head.revision) - 1] if head.revision in commits else now.revision
        if self._is_in(resolve(head.id, first, token=token)):
            return self._pushed(first)
        raise PublishError(
            f"'{head.id}': somebody else committed {first[:7]} while this was being pushed.",
            hint="Look at what they changed, and push again.",
            code="raced",
        )

    def _offer(self) -> PushResult | None:
        """The open pull request of this user that offers these files, whatever its title."""
        repo, user, token = self._pushed("").repo, self._target.user, self._target.token

        def mine() -> list[Discussion]:
            return [*self._client.get_repo_discussions(repo, author=user, discussion_status="open")]

        for each in retrying(mine):
            if each.git_reference and each.author == user:
                offered = resolve(repo, each.git_reference, token=token, from_cache=False)
                if self._is_in(offered):
                    return self._pushed(offered.revision, each.url)
        return None

    def _require(self, pushed: PushResult, pr_revision: str | None) -> None:
        try:
            repo = resolve(pushed.repo, pr_revision or pushed.commit, token=self._target.token)
        except (SoupError, *EXPLAINED) as error:
            said = explain_push(error, "What failed is to look at it")
            where = pushed.pull_request or f"commit {pushed.commit[:7]}"
            message = f"'{pushed.repo}' has the soup in {where}. {said.message}"
            raise PublishError.of(said, message, hint=_AGAIN) from None
        if not self._is_in(repo):
            lacking = [path for path in self._files if path not in repo.files] or list(self._files)
            raise PublishError(
                f"'{repo.id}' has the commit {repo.revision[:7]} now, but not as it was sent: {some(lacking)}.",
                hint="Does a .gitignore in the repo keep them away? Delete it and push again.",
            )


@contextmanager
def _xet_where_it_is_spoken(repo: str, target: PushTarget) -> Iterator[None]:
    """Have the client use xet where the server does: it tries it wherever it can, and has no way back."""
    disabled = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = disabled or not (is_xet_available() and _speaks_xet(repo, target))
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = disabled


def _speaks_xet(repo: str, target: PushTarget) -> bool:
    revision = "None" if target.create_pr else quote(target.revision or constants.DEFAULT_REVISION, safe="")
    headers = build_hf_headers(token=target.token, library_name="hf-soup", library_version=__version__)

    def ask() -> bool:
        address = f"{constants.ENDPOINT}/api/models/{repo}/xet-write-token/{revision}"
        parameters = {"create_pr": "1"} if target.create_pr else None
        answer = get_session().get(address, headers=headers, params=parameters, timeout=TIMEOUT)
        hf_raise_for_status(answer)
        try:
            grant = answer.json()
        except ValueError:
            return False
        # Without these hf_xet has nowhere to send anything, and no way back.
        known = grant if isinstance(grant, dict) else {}
        where, allowed, until = (known.get(key) for key in ("casUrl", "accessToken", "exp"))
        there = isinstance(where, str) and where.startswith(("http://", "https://"))
        return there and isinstance(allowed, str) and bool(allowed) and isinstance(until, int) and until > 0

    try:
        return retrying(ask)
    except HfHubHTTPError as error:
        if error.response.status_code not in (404, 405, 501):
            raise
        return False


def _make_tag(tag: str, done: PushResult, token: Token) -> None:
    """Tag what was pushed; where the answer is lost, or the tag is there, it counts what it names."""
    client, named = api(token), {}
    failed = f"What failed is its tag '{tag}'"
    said = PublishError(f"{failed}: the Hub does not list it.")
    try:
        retrying(client.create_tag, done.repo, tag=tag, revision=done.commit, exist_ok=True)
    except EXPLAINED as error:
        said = explain_push(error, failed)
    try:
        named = {each.name: each.target_commit for each in retrying(client.list_repo_refs, done.repo).tags}
    except EXPLAINED as error:
        said = explain_push(error, failed)
    if named.get(tag) == done.commit:
        return
    hint = "Push the same soup again: only the tag is made then."
    if tag in named:
        said = tag_is_taken(tag, named[tag])
        hint = said.hint
    raise PublishError.of(said, f"'{done.repo}' has the soup in commit {done.commit[:7]}. {said.message}", hint=hint)


def _refuse_stale(head: repo.Repo, others: Sequence[str]) -> None:
    """Stop where what an earlier soup left would stand beside the new one: its tokenizer would be loaded."""
    stale = [path for path in others if _of_a_soup(path)]
    if stale:
        raise PublishError(
            f"'{head.id}' holds files that are not of this soup: {', '.join(stale)}.",
            hint="Push to another name, or delete them, and whatever else is there, with `--replace`.",
            code="taken",
        )


def _architectures(config: bytes) -> str:
    try:
        return ", ".join(json.loads(config)["architectures"])
    except (ValueError, LookupError, TypeError):
        return "of no known class"


def _content_ids(path: Path) -> set[str | None]:
    """The names under which the Hub may know a content: its sha256 (large files) and its git id (small ones)."""
    ids: set[str | None] = {sha256_of(path)}
    if path.stat().st_size <= _SMALL:
        ids.add(git_hash(path.read_bytes()))
    return ids


_TAG = re.compile(r"(?!refs/|.*(\.\.|//|\.lock$|[./]$))[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class PushTarget:
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
    head: Repo | None
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
            code="token",
        )
    if not re.fullmatch(r"[!-~]+", used):
        raise PublishError(
            "The token has spaces or letters that no token has.", hint="Copy it once more.", code="token"
        )


def inspect_target(
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    replace: bool = False,
    token: Token = None,
) -> PushTarget:
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
            raise PublishError(
                f"{what}: the token of {user} may only read.", hint="Use one that may write.", code="forbidden"
            )
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
        raise tag_is_taken(str(tag), tags[tag])
    return PushTarget(
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


def _require_branch(head: repo.Repo, revision: str | None, branches: Sequence[str]) -> None:
    """Stop where a revision names something that no commit can go on top of."""
    there = head.requested is not None
    is_offer = revision is not None and re.fullmatch(r"refs/pr/\d+", revision) is not None
    if revision and revision not in branches and (not is_offer if there else revision.startswith("refs/")):
        names = "a tag or a commit" if there else "nothing"
        raise PublishError(f"'{revision}' names {names} in '{head.id}', and no branch.", hint="Use a branch's name.")


def _head(repo_id: str, revision: str | None, token: Token) -> repo.Repo | None:
    """What a push goes on top of: the branch, or where that is to be made the default one; None without a repo."""
    try:
        return repo.resolve(repo_id, revision, token=token, from_cache=False)
    except ResolveError as error:
        if isinstance(error.__context__, RevisionNotFoundError) and revision is not None:
            return _head(repo_id, None, token)
        if isinstance(error.__context__, RepositoryNotFoundError):
            return None
        raise explain_push(error, f"'{repo_id}'") from None


def require_public(models: Sequence[str], target: PushTarget) -> None:
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
    found = [name for name, is_hidden in zip(names, in_parallel(hidden, names), strict=True) if is_hidden]
    if found:
        raise PublishError(
            f"'{target.repo}' is public, and would name models that are private or gone: {some(found)}.",
            hint="Use `hf-soup push --private`, or `--allow-private-ingredients` if everybody may know of them.",
            code="private-ingredients",
        )


def tag_is_taken(tag: str, commit: str | None) -> PublishError:
    """The error for a tag that names something else: a commit, or a branch that is called so."""
    names = f"another commit, {commit[:7]}" if commit else "a branch"
    return PublishError(f"'{tag}' names {names}.", hint="Use another tag, or delete that one.", code="taken")


def require_fit(head: repo.Repo, *, private: bool | None, replace: bool) -> None:
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
            code="taken",
        )
