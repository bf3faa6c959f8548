"""The Hub, written: one commit, safe against lost answers and against other people's commits."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError

from hf_soup import hub
from hf_soup.checkpoint import ASSETS
from hf_soup.client import EXPLAINED, Token, api, endpoint, explain, is_passing, pause_after, retrying, status_of
from hf_soup.errors import PublishError, ResolveError

_ATTEMPTS = 3  # the client makes its own for every step of an upload but the last


def _of_a_soup(path: str) -> bool:
    """Whether `cook` makes files of this name."""
    return ASSETS.fullmatch(path) is not None or path in ("soup.yaml", "plots/scores.png")


@dataclass(frozen=True)
class Pushed:
    """Where a soup went: the repo, the full commit, its address, and whether there was anything to send."""

    repo: str
    commit: str
    url: str
    changed: bool


def require_token(token: Token = None) -> None:
    """Refuse to start a push that cannot end.

    Raises:
        PublishError: Nobody is logged in.
    """
    if token is False or not (token if isinstance(token, str) else get_token()):
        raise PublishError(
            "No token: pushing needs to know who you are.",
            hint="Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        )


def commit_folder(
    repo_id: str,
    files: Mapping[str, Path],
    *,
    message: str,
    private: bool | None = None,
    replace: bool = False,
    token: Token = None,
) -> Pushed:
    """Publish files as one commit, creating the repo where it is not there.

    The commit names its parent, so nobody else's commit is overwritten. When the answer gets lost the head is
    read again and compared before anything is sent a second time, so there is never a second commit.

    Args:
        repo_id: ``owner/name``.
        files: Paths in the repo and the files here.
        message: The commit's title.
        private: Create the repo as private; None is the owner's default.
        replace: Delete what the repo holds beside these files, and accept a repo that holds something else.
        token: As everywhere in huggingface_hub.

    Raises:
        PublishError: No token, no right to write, a repo that holds something else, or the Hub fails.
    """
    require_token(token)
    client = api(token)
    what = f"'{repo_id}'"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise PublishError(f"{what} is not a name for a repo.", hint="Use `owner/name`.")
    try:
        retrying(client.create_repo, repo_id, private=private, exist_ok=True)
        head = hub.resolve(repo_id, token=token, from_cache=False)
    except HFValidationError as error:
        raise PublishError(f"{what} is not a name for a repo: {error}", hint="Use `owner/name`.") from None
    except EXPLAINED as error:
        if status_of(error) == 403:
            raise PublishError(
                f"{what}: the token may not write there; the name may be taken by someone else.",
                hint=f"Push to a name of your own, `{_user(client)}/{repo_id.rsplit('/', maxsplit=1)[-1]}`.",
            ) from None
        raise explain(error, what, kind=PublishError) from None
    except ResolveError as error:
        raise PublishError(error.message, hint=error.hint) from None
    ids = {path: _content_ids(local) for path, local in files.items()}
    others = sorted(set(head.files) - set(files) - {".gitattributes"})
    _refuse_foreign(head, others, replace)
    # Of the soup that was there before, nothing may stay beside the new one: its tokenizer would be loaded.
    stale = others if replace else [path for path in others if "soup.json" in head.files and _of_a_soup(path)]

    def is_there(repo: hub.Repo) -> bool:
        same = all(
            path in repo.files and {repo.files[path].sha256, repo.files[path].blob} & ids[path] for path in files
        )
        return same and not set(stale) & set(repo.files)

    address = f"{endpoint()}/{head.id}"
    if is_there(head):
        return Pushed(head.id, head.revision, address, changed=False)
    for attempt in range(_ATTEMPTS):
        operations = [CommitOperationAdd(path, str(local)) for path, local in files.items()]
        deletions = [CommitOperationDelete(path) for path in stale]
        try:
            done = client.create_commit(
                head.id, [*operations, *deletions], commit_message=message, parent_commit=head.revision
            )
            return Pushed(head.id, done.oid, address, changed=True)
        except ValueError as error:
            raise explain(error, f"{what}: the Hub refuses the commit", kind=PublishError) from None
        except (*EXPLAINED, RuntimeError) as error:
            # The client wraps the failed upload of a large file in a RuntimeError.
            failure: BaseException = error
            if isinstance(error, RuntimeError) and error.__cause__ is not None:
                failure = error.__cause__
            # Perhaps only the answer was lost: look before anything is sent again.
            try:
                found = hub.resolve(repo_id, token=token, from_cache=False)
            except ResolveError:
                raise explain(failure, what, kind=PublishError) from None
            if is_there(found):
                return Pushed(head.id, found.revision, address, changed=True)
            if found.revision != head.revision:
                raise PublishError(
                    f"{what}: somebody else committed {found.revision[:7]} while this was being pushed.",
                    hint="Look at what they changed, and push again.",
                ) from None
            if attempt == _ATTEMPTS - 1 or not is_passing(failure):
                raise explain(failure, what, kind=PublishError) from None
            time.sleep(pause_after(failure, attempt))
    raise AssertionError("the loop returns or raises")


def _refuse_foreign(head: hub.Repo, others: Sequence[str], replace: bool) -> None:
    """Stop before a repo that holds another kind of model, or weights that would stand beside the new ones."""
    weights = [path for path in others if path.endswith((".safetensors", ".safetensors.index.json"))]
    taken = set(head.files) - {".gitattributes", "README.md"} and "soup.json" not in head.files
    if replace or not (taken or weights):
        return
    shown = ", ".join((weights or sorted(head.files))[:4])
    reason = "holds weights that are not of this soup" if weights else "is taken: it holds something else"
    raise PublishError(
        f"'{head.id}' {reason} ({shown}).",
        hint="Push to another name, or delete what is there with `--replace`.",
    )


def _content_ids(path: Path) -> set[str | None]:
    """The names under which the Hub may know a content: its sha256 (large files) and its git id (small ones)."""
    size = path.stat().st_size
    git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            git.update(block)
            sha256.update(block)
    return {git.hexdigest(), sha256.hexdigest()}


def _user(client: HfApi) -> str:
    try:
        return str(client.whoami()["name"])
    except EXPLAINED:
        return "you"


def upload_folder(repo_id: str, folder: Path, *, repo_type: str, token: Token = None, private: bool = False) -> str:
    """Publish a folder as it is, as the demo does with its data and models; returns the commit."""
    client = api(token)
    try:
        retrying(client.create_repo, repo_id, repo_type=repo_type, private=private, exist_ok=True)
        done = client.upload_folder(repo_id=repo_id, folder_path=folder, repo_type=repo_type)
    except EXPLAINED as error:
        raise explain(error, f"'{repo_id}'", kind=PublishError) from None
    return str(done.oid)
