"""The Hub, read: what a reference stands for.

What the client leaves open is closed here: requests that it does not retry are retried, and every failure becomes one
`SoupError` that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, constants, get_session
from huggingface_hub.community import Discussion
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._headers import build_hf_headers

from hf_soup._util.version import __version__
from hf_soup.errors import ResolveError
from hf_soup.hub.cache import keep_note, own_cache_folder, read_note
from hf_soup.hub.client import EXPLAINED, TIMEOUT, OddAnswerError, Token, api, endpoint, explain, retrying, status_of
from hf_soup.hub.http import httpx

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BRIEF = 3.0  # seconds
_BOT = "SFconvertbot"
_BOT_TITLE = "Adding `safetensors` variant of this model"


@dataclass(frozen=True)
class RepoFile:
    """A file of a repo: its size in bytes, its git id, and the sha256 of its content where it is a large file."""

    size: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True)
class Repo:
    """A repo pinned to one commit.

    Args:
        id: As the Hub answers, which is the new name where a repo was renamed.
        revision: The full commit.
        requested: The reference that was asked for; None is the default branch.
        files: Every file by its path.
        card: The front matter of the model card.
        tags: As the Hub derives them.
        private: Whether others cannot see it.
        from_cache: The Hub was not reached, so this is what it looked like when it last was.
    """

    id: str
    revision: str
    requested: str | None
    files: Mapping[str, RepoFile] = field(repr=False)
    card: Mapping[str, Any] = field(repr=False)
    tags: tuple[str, ...] = field(repr=False)
    private: bool = False
    from_cache: bool = False
    token: Token = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Listed:
    """A model repo as a search finds it.

    Args:
        id: ``owner/name``.
        task: Its ``pipeline_tag``, from the card or guessed by the Hub from the config.
        downloads: In the last 30 days.
        tags: As the Hub derives them.
        private: Whether others cannot see it.
        gated: Whether its owner asks for agreement to terms.

    >>> Listed("acme/a", tags=("vit", "license:apache-2.0")).license
    'apache-2.0'
    """

    id: str
    task: str | None = None
    downloads: int = 0
    tags: tuple[str, ...] = field(default=(), repr=False)
    private: bool = False
    gated: bool = False

    @property
    def license(self) -> str | None:
        """What the card states; None where it states nothing."""
        stated = [tag.removeprefix("license:") for tag in self.tags if tag.startswith("license:")]
        return ", ".join(stated) or None


# ---- pin ----------------------------------------------------------------------------------------------------


def resolve(
    repo_id: str, revision: str | None = None, *, token: Token = None, from_cache: bool = True, whole: bool = False
) -> Repo:
    """Pin a model repo to a full commit and list its files, with one request.

    Args:
        repo_id: ``owner/name``, or the name of one of the oldest repos.
        revision: A branch, tag, pull request reference or commit; the default branch when None.
        token: As everywhere in huggingface_hub.
        from_cache: Where the Hub cannot be reached, answer from the cache if it can.
        whole: Only where every file is known that the Hub listed, so that none looks as if it did not exist; those
            that the cache lacks cannot be read then.

    Raises:
        ResolveError: It does not exist, is private or gated, or the Hub cannot be reached and the cache has no
            copy.
    """
    named = f"{repo_id}@{revision}" if revision else repo_id
    what = f"'{named}'"
    try:
        info = _info(what, api(token).model_info, repo_id, revision=revision, files_metadata=True)
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        cached = _resolve_in_cache(repo_id, revision, token) if from_cache else None
        known = _listed(cached) if cached and whole else cached
        if known is None and (whole or not from_cache):
            why = f"cannot be reached ({type(error).__name__}), and what the cache has may be old, or a part of it"
            hint = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again."
            code = explain(error, what).code
            raise ResolveError(f"{what}: {endpoint()} {why}.", hint=hint, code=code, subjects=[named]) from None
        if known is None:
            raise explain(error, what, subjects=[named]) from None
        return known
    except EXPLAINED as error:
        raise explain(error, what, subjects=[named]) from None
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ResolveError(f"{what}: the Hub's answer names no commit, but '{info.sha}'.")
    if any(file.size is None for file in info.siblings or ()):
        raise ResolveError(f"{what}: the Hub's answer has no file sizes.", hint="Check what HF_ENDPOINT points to.")
    files = {
        file.rfilename: RepoFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
        if _is_plain(file.rfilename)
    }
    card: dict[str, Any] = dict(vars(info.card_data)) if isinstance(info.card_data, ModelCardData) else {}
    remember_commit("model", repo_id, revision, found=info.id, commit=str(info.sha))
    # Without the card, whose front matter came with the answer, so that it is seldom in the cache.
    listed = {path: (file.size, file.blob, file.sha256) for path, file in files.items() if path != "README.md"}
    keep_note(_note("files", info.id, str(info.sha)), json.dumps(listed))
    return Repo(
        id=info.id,
        revision=str(info.sha),
        requested=revision,
        files=files,
        card=card,
        tags=tuple(info.tags or ()),
        private=bool(info.private),
        token=token,
    )


def _is_plain(path: str) -> bool:
    """Whether a path leads into the folder that a repo is fetched to, on any machine; others are as good as absent."""
    return "\\" not in path and path.isprintable() and not {"", ".", ".."} & set(path.split("/"))


def _info(what: str, ask: Callable[..., Any], repo_id: str, **options: Any) -> Any:
    try:
        return retrying(ask, repo_id, timeout=TIMEOUT, **options)
    except OddAnswerError:
        # The client takes the keys of a card for arguments of its own: `self`, or `tags` that are a number.
        raise ResolveError(
            f"{what}: what {endpoint()} says of it cannot be read.",
            hint="Where that is the Hub, its README.md's front matter is at fault: ask its owner to correct "
            "it, or download it and name the folder. Else set HF_ENDPOINT right.",
        ) from None


def _resolve_in_cache(repo_id: str, revision: str | None, token: Token) -> Repo | None:
    """What the cache knows of a repo, from its references and from one snapshot's links."""
    requested = revision
    repo_id, revision = _remembered("model", repo_id, revision) or (repo_id, revision)
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    commit = revision or constants.DEFAULT_REVISION
    reference = root / "refs" / commit
    if not _COMMIT.fullmatch(commit):
        if not reference.is_file() or root not in reference.resolve().parents:
            return None
        commit = reference.read_text().strip()
    snapshot = root / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = {}
    for path in sorted(snapshot.rglob("*")):
        if path.is_file():
            # The cache names a blob after the Hub's ETag: sha256 of a large file, git id of a small one.
            blob = path.resolve().name
            sha256 = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None
            files[path.relative_to(snapshot).as_posix()] = RepoFile(path.stat().st_size, blob, sha256)
    return Repo(repo_id, commit, requested, files, card={}, tags=(), from_cache=True, token=token)


def _listed(cached: Repo) -> Repo | None:
    """A repo in the cache with every file that the Hub listed, whether the cache has it or not."""
    try:
        listed = json.loads(read_note(_note("files", cached.id, cached.revision)))
        return replace(cached, files={path: RepoFile(*each) for path, each in listed.items()})
    except (OSError, ValueError):
        return None


def conversion_of(repo: Repo) -> Repo | None:
    """The open pull request in which the Hub's conversion bot offers safetensors for the head of main, pinned.

    As transformers does, it is believed only when the bot wrote it and its parent is the head.
    """
    if repo.from_cache:
        return None
    try:
        for discussion in retrying(_pull_requests_of_the_bot, repo):
            if discussion.author != _BOT or discussion.title != _BOT_TITLE or discussion.status != "open":
                continue
            offered = resolve(repo.id, f"refs/pr/{discussion.num}", token=repo.token)
            commits = retrying(api(repo.token).list_repo_commits, repo.id, revision=offered.revision)
            if repo.revision in [commit.commit_id for commit in commits[1:2]]:
                return offered
    except EXPLAINED as error:
        if status_of(error) not in (403, 404):  # the owner has switched discussions off
            raise explain(error, f"'{repo.id}': its pull requests") from None
    return None


def _pull_requests_of_the_bot(repo: Repo) -> list[Discussion]:
    return list(api(repo.token).get_repo_discussions(repo.id, author=_BOT, discussion_type="pull_request"))


def base_models(repo: Repo) -> tuple[str, ...]:
    """The ancestors that the Hub itself derived, from tags and from ``baseModels``."""
    found = [tag.split(":")[-1] for tag in repo.tags if tag.startswith("base_model:")]
    if not found and not repo.from_cache:
        try:
            stated = retrying(api(repo.token).model_info, repo.id, expand=["baseModels"], timeout=TIMEOUT).base_models
        except EXPLAINED:
            return ()  # Only a hint: the card, the config and the weights speak as well.
        entries: object = stated.get("models") if isinstance(stated, dict) else stated
        for entry in entries if isinstance(entries, list) else []:
            name = entry.get("id") if isinstance(entry, dict) else entry
            found += [name] if isinstance(name, str) else []
    return tuple(dict.fromkeys(found))


def resolve_dataset(dataset: str, revision: str | None, *, token: Token = None) -> tuple[str, str]:
    """The id that the Hub answers with, and the full commit, of a dataset repo.

    Raises:
        ResolveError: As `resolve`.
    """
    what = f"the data set '{dataset}@{revision}'" if revision else f"the data set '{dataset}'"
    try:
        info = _info(what, api(token).dataset_info, dataset, revision=revision)
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        if (known := _remembered("dataset", dataset, revision)) is not None:
            return known
        root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset")
        reference = root / "refs" / (revision or constants.DEFAULT_REVISION)
        if _COMMIT.fullmatch(revision or "") and (root / "snapshots" / str(revision)).is_dir():
            return dataset, str(revision)
        if not reference.is_file():
            raise explain(error, what) from None
        return dataset, reference.read_text().strip()
    except EXPLAINED as error:
        raise explain(error, what) from None
    remember_commit("dataset", dataset, revision, found=info.id, commit=str(info.sha))
    return info.id, str(info.sha)


def is_reachable() -> bool:
    """Whether the Hub lists models: asked once and briefly, for what can be done without it."""
    try:
        headers = build_hf_headers(token=False, library_name="hf-soup", library_version=__version__)
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/models", params={"limit": 1}, headers=headers, timeout=_BRIEF
        )
    except EXPLAINED:
        return False
    return answer.status_code < 400


def search_models(tags: Sequence[str], limit: int, *, task: str | None = None, token: Token = None) -> list[Listed]:
    """The models on the Hub that have every tag, the most downloaded first.

    Args:
        tags: As the Hub derives them: ``bert`` (a model type), ``license:mit``, ``base_model:finetune:owner/name``.
        limit: How many at most.
        task: Their ``pipeline_tag``.
        token: As everywhere in huggingface_hub.

    Raises:
        ResolveError: The Hub cannot be reached, or does not answer.
    """
    what = f"the models tagged {', '.join(repr(tag) for tag in tags)}"
    fields: list[Any] = ["downloads", "gated", "pipeline_tag", "private", "tags"]
    try:
        # The client tries again by itself here, as it does nowhere else.
        found = list(
            api(token).list_models(filter=tags, pipeline_tag=task, sort="downloads", limit=limit, expand=fields)
        )
    except EXPLAINED as error:
        raise explain(error, what) from None
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ResolveError(f"{what}: the Hub's answer is none.", hint="Check what HF_ENDPOINT points to.") from None
    return [
        Listed(
            id=info.id,
            task=info.pipeline_tag,
            downloads=info.downloads or 0,
            tags=tuple(info.tags or ()),
            private=bool(info.private),
            gated=bool(info.gated),
        )
        for info in found
    ]


def is_repo_id(name: str) -> bool:
    """Whether a name can be a repo's, rather than a folder on somebody's machine.

    >>> is_repo_id("google/vit-base-patch16-224"), is_repo_id("./results/checkpoint-500")
    (True, False)
    """
    # The client's own check takes letters of every script, and the Hub does not.
    parts = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*(?<![.-])", name, re.ASCII)
    return parts is not None and len(name) <= 96 and not re.search(r"--|\.\.|\.git$", name)


def within_repo(name: str) -> tuple[str, str] | None:
    """A repo's id and the folder in it that a name stands for, which is empty for the whole repo; None for other names.

    >>> within_repo("acme/loras/v2/last"), within_repo("acme/loras"), within_repo("acme/loras/../x")
    (('acme/loras', 'v2/last'), ('acme/loras', ''), None)
    """
    owner, _, rest = name.partition("/")
    repo, _, folder = rest.partition("/")
    plain = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", folder, re.ASCII) and len(folder) <= 500
    if is_repo_id(name):
        return name, ""
    return (f"{owner}/{repo}", folder) if plain and is_repo_id(f"{owner}/{repo}") else None


def remember_commit(kind: str, asked: str, revision: str | None, *, found: str, commit: str) -> None:
    """Note what a name and a reference stood for, so that offline runs know it: repos are renamed, branches move.

    Args:
        kind: ``model`` or ``dataset``.
        asked, revision: As somebody spelled them.
        found, commit: The id that the Hub answered with, and the full commit.
    """
    keep_note(_note(kind, asked, revision), f"{found}\n{commit}\n")


def _remembered(kind: str, asked: str, revision: str | None) -> tuple[str, str] | None:
    """The id and commit that `remember` noted."""
    try:
        found, commit = read_note(_note(kind, asked, revision)).decode().split()
    except (OSError, ValueError):
        return None
    return found, commit


def _note(kind: str, asked: str, revision: str | None) -> Path:
    name = hashlib.sha256(f"{asked}\n{revision or ''}".encode()).hexdigest()
    return own_cache_folder() / "resolved" / kind / name
