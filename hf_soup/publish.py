"""The Hub, written: one commit or one pull request, safe against lost answers and against other people's commits."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, get_session
from huggingface_hub.community import Discussion
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils._runtime import is_xet_available

from hf_soup import __version__, hub, transfer
from hf_soup.checkpoint import ASSETS
from hf_soup.client import (
    EXPLAINED,
    TIMEOUT,
    OddAnswerError,
    Token,
    api,
    endpoint,
    explain,
    explain_push,
    is_passing,
    pause_after,
    retrying,
    status_of,
)
from hf_soup.digests import sha256_of
from hf_soup.errors import PublishError, ResolveError, SoupError, without_credentials
from hf_soup.headers import MAX_TEXT, some
from hf_soup.target import Target, require_fit, taken

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
class Pushed:
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


def commit_folder(target: Target, files: Mapping[str, Path], *, message: str, description: str | None = None) -> Pushed:
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

    def __init__(self, target: Target, files: Mapping[str, Path], message: str, description: str | None) -> None:
        self._target, self._client, self._head = target, api(target.token), target.head
        self._files, self._message, self._description = files, " ".join(message.split()), description
        self._stale: list[str] = []

    def run(self) -> Pushed:
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
            raise taken(str(target.tag), head.revision)
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
            return PublishError(f"{said.message} Whether the soup is there is not known.", hint=_AGAIN)
        return PublishError(said.message, hint=hint)

    def _create(self) -> hub.Repo:
        target = self._target
        # The client wants an address from a server that only says that the repo is there already.
        with suppress(OddAnswerError):
            retrying(self._client.create_repo, target.repo, private=target.private, exist_ok=True)
        head = hub.resolve(target.repo, token=target.token, from_cache=False)
        require_fit(head, private=target.private, replace=target.replace)  # somebody else may have made it since
        return head

    def _refuse_another_kind(self, head: hub.Repo) -> None:
        """Stop before a soup takes the place of one of another architecture."""
        file = head.files.get("config.json")
        if file is None or "config.json" not in self._files or {file.blob, file.sha256} & self._ids["config.json"]:
            return
        # What is too long for a config is none of a kind that is known.
        there = transfer.read_range(head, "config.json", 0, file.size) if file.size <= MAX_TEXT else b""
        ours, theirs = map(_architectures, (self._files["config.json"].read_bytes(), there))
        if ours != theirs:
            raise PublishError(
                f"'{head.id}' holds another kind of model: {theirs}, and this is {ours}.",
                hint="Push to another name, or replace what is there with `--replace`.",
            )

    def _is_in(self, repo: hub.Repo) -> bool:
        there = {path: {file.sha256, file.blob} for path, file in repo.files.items()}
        same = all(there.get(path, set()) & ids for path, ids in self._ids.items())
        return same and not set(self._stale) & set(there)

    def _pushed(self, commit: str, pull_request: str | None = None, *, changed: bool = True) -> Pushed:
        repo = self._head.id if self._head else self._target.repo
        offered = pull_request and without_credentials(pull_request)
        return Pushed(repo, commit, f"{endpoint()}/{repo}", changed, offered)

    def _send(self, head: hub.Repo) -> Pushed:
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

    def _landed(self, head: hub.Repo) -> Pushed | None:
        """The commit, if it is there: on top of the head that it names, whatever others put on top of it since."""
        token = self._target.token
        now = hub.resolve(head.id, self._target.revision, token=token, from_cache=False)
        if now.revision == head.revision:
            return None
        commits = [c.commit_id for c in retrying(self._client.list_repo_commits, head.id, revision=now.revision)]
        first = commits[commits.index(head.revision) - 1] if head.revision in commits else now.revision
        if self._is_in(hub.resolve(head.id, first, token=token)):
            return self._pushed(first)
        raise PublishError(
            f"'{head.id}': somebody else committed {first[:7]} while this was being pushed.",
            hint="Look at what they changed, and push again.",
        )

    def _offer(self) -> Pushed | None:
        """The open pull request of this user that offers these files, whatever its title."""
        repo, user, token = self._pushed("").repo, self._target.user, self._target.token

        def mine() -> list[Discussion]:
            return [*self._client.get_repo_discussions(repo, author=user, discussion_status="open")]

        for each in retrying(mine):
            if each.git_reference and each.author == user:
                offered = hub.resolve(repo, each.git_reference, token=token, from_cache=False)
                if self._is_in(offered):
                    return self._pushed(offered.revision, each.url)
        return None

    def _require(self, pushed: Pushed, pr_revision: str | None) -> None:
        try:
            repo = hub.resolve(pushed.repo, pr_revision or pushed.commit, token=self._target.token)
        except (SoupError, *EXPLAINED) as error:
            said = explain_push(error, "What failed is to look at it")
            where = pushed.pull_request or f"commit {pushed.commit[:7]}"
            raise PublishError(f"'{pushed.repo}' has the soup in {where}. {said.message}", hint=_AGAIN) from None
        if not self._is_in(repo):
            lacking = [path for path in self._files if path not in repo.files] or list(self._files)
            raise PublishError(
                f"'{repo.id}' has the commit {repo.revision[:7]} now, but not as it was sent: {some(lacking)}.",
                hint="Does a .gitignore in the repo keep them away? Delete it and push again.",
            )


@contextmanager
def _xet_where_it_is_spoken(repo: str, target: Target) -> Iterator[None]:
    """Have the client use xet where the server does: it tries it wherever it can, and has no way back."""
    disabled = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = disabled or not (is_xet_available() and _speaks_xet(repo, target))
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = disabled


def _speaks_xet(repo: str, target: Target) -> bool:
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


def _make_tag(tag: str, done: Pushed, token: Token) -> None:
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
        said = taken(tag, named[tag])
        hint = said.hint
    raise PublishError(f"'{done.repo}' has the soup in commit {done.commit[:7]}. {said.message}", hint=hint)


def _refuse_stale(head: hub.Repo, others: Sequence[str]) -> None:
    """Stop where what an earlier soup left would stand beside the new one: its tokenizer would be loaded."""
    stale = [path for path in others if _of_a_soup(path)]
    if stale:
        raise PublishError(
            f"'{head.id}' holds files that are not of this soup: {', '.join(stale)}.",
            hint="Push to another name, or delete them, and whatever else is there, with `--replace`.",
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
        content = path.read_bytes()
        ids.add(hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())
    return ids


def upload_folder(repo_id: str, folder: Path, *, repo_type: str, token: Token = None, private: bool = False) -> str:
    """Publish a folder as it is, as the demo does with its data and models; returns the commit."""
    client = api(token)
    try:
        retrying(client.create_repo, repo_id, repo_type=repo_type, private=private, exist_ok=True)
        done = client.upload_folder(repo_id=repo_id, folder_path=folder, repo_type=repo_type)
    except EXPLAINED as error:
        raise explain(error, f"'{repo_id}'", kind=PublishError) from None
    return str(done.oid)
