"""A push through a bad network: at every step, whatever happens, one commit or pull request, or an error and none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_soup import hub
from hf_soup.errors import PublishError
from hf_soup.local_hub import Hangup, LocalHub
from hf_soup.publish import Pushed, commit_folder
from hf_soup.target import look

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

WEIGHTS = bytes(range(256)) * 4000
REPO = "acme/soup"
#: Every request of a push: method, what its path holds, and which of several of its kind.
STEPS = {
    "who": ("GET", "/whoami-v2", 1),
    "head": ("GET", "/api/models/acme/soup", 1),
    "tags": ("GET", "/refs", 1),
    "offers": ("GET", "/discussions", 1),
    "card": ("POST", "/validate-yaml", 1),
    "modes": ("POST", "/preupload/", 1),
    "batch": ("POST", "/objects/batch", 1),
    "part": ("PUT", "/lfs/", 1),
    "last part": ("PUT", "/lfs/", 4),
    "complete": ("POST", "/lfs/", 1),
    "commit": ("POST", "/commit/", 1),
    "result": ("GET", "/api/models/acme/soup/revision/", 1),
    "tag": ("POST", "/tag/", 1),
    "tagged": ("GET", "/refs", 2),
}
#: What may happen to a request: before the server does anything, or to its answer.
BEFORE: dict[str, Callable[[], Response]] = {
    "429": lambda: Response(status_code=429, headers={"Retry-After": "1"}),
    "500": lambda: JSONResponse({"error": "no disk"}, 500),
    "503": lambda: Response("<html>busy</html>", 503, media_type="text/html"),
    "reset": partial(Hangup, reset=True),
    "closed": Hangup,
}
AFTER: dict[str, Callable[[Response], Response]] = {
    "lost": lambda _: Hangup(),
    "lost by a reset": lambda _: Hangup(reset=True),
    "lost behind a proxy": lambda _: Response("<html>timeout</html>", 504, media_type="text/html"),
    "cut off": lambda answer: Hangup(answer, 5),
    "cut off by a proxy": lambda answer: Response(answer.body[:5] if hasattr(answer, "body") else b"", 200),
}


@pytest.fixture(autouse=True)
def _pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """None takes longer than a moment, ours or the client's."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))


@pytest.fixture
def soup(tmp_path: Path) -> dict[str, Path]:
    """The files of a soup, as the publisher sees them."""
    folder = tmp_path / "soup"
    folder.mkdir()
    card = b"---\nlicense: mit\n---\n# Soup\n"
    for name, content in (("model.safetensors", WEIGHTS), ("soup.json", b"{}"), ("README.md", card)):
        (folder / name).write_bytes(content)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def api(online: LocalHub) -> HfApi:
    return HfApi(endpoint=online.endpoint, token=online.token)


@pytest.fixture
def parts(online: LocalHub) -> Iterator[None]:
    """Large files go in several parts."""
    online.part_bytes = 300_000
    yield
    online.part_bytes = 64 << 20


def push(files: dict[str, Path], *, message: str = "Soup", repo: str = REPO, **options: object) -> Pushed:
    return commit_folder(look(repo, **options), files, message=message)  # type: ignore[arg-type]


def commits(api: HfApi) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(REPO)]


def at(step: str) -> Callable[[Request], bool]:
    """Whether a request is this step of a push; only once."""
    method, part, number = STEPS[step]
    seen = [0]

    def fits(request: Request) -> bool:
        seen[0] += (fitting := request.method == method and part in request.url.path)
        return fitting and seen[0] == number

    return fits


def is_pushed(api: HfApi, done: Pushed, soup: dict[str, Path], *, create_pr: bool) -> None:
    """Exactly once, with every byte."""
    offers = list(api.get_repo_discussions(REPO))
    assert commits(api) == [*(["Soup"] if not create_pr else []), "Before", "initial commit"]
    assert [offer.title for offer in offers] == (["Soup"] if create_pr else [])
    assert done.changed
    assert done.pull_request == (f"{api.endpoint}/{REPO}/discussions/1" if create_pr else None)
    head = hub.resolve(REPO, "refs/pr/1" if create_pr else None)
    assert head.revision == done.commit
    for name, path in soup.items():
        fetched = api.hf_hub_download(REPO, name, revision=done.commit, local_dir=path.parent.parent / "fetched")
        assert Path(fetched).read_bytes() == path.read_bytes()


def prepare(api: HfApi) -> None:
    api.create_repo(REPO, exist_ok=True)
    api.upload_file(repo_id=REPO, path_in_repo="soup.json", path_or_fileobj=b'{"old": 1}', commit_message="Before")


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pr"])
@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_a_push_may_fail(
    online: LocalHub, api: HfApi, soup: dict[str, Path], parts: None, step: str, fault: str, create_pr: bool
) -> None:
    """And it ends well, as all of this passes; but for an answer that pretends to be whole and is no JSON."""
    if step in (("tags", "tag", "tagged") if create_pr else ("offers",)):
        pytest.skip("not a step of this kind of push")
    prepare(api)
    fits, happened = at(step), []

    def intercept(request: Request) -> Response | None:
        return happened.append(step) or BEFORE[fault]() if fits(request) else None

    def transform(request: Request, response: Response) -> Response:
        return happened.append(step) or AFTER[fault](response) if fits(request) else response

    if fault in BEFORE:
        online.intercept = intercept
    else:
        online.transform = transform
    options = {"create_pr": create_pr, "tag": None if create_pr else "v1"}
    try:
        done = push(soup, **options)
    except PublishError as error:
        assert fault == "cut off by a proxy", error
        assert "is not JSON" in str(error)
        assert len(commits(api)) + len(list(api.get_repo_discussions(REPO))) <= 3
        done = replace(push(soup, **options), changed=True)
    assert happened == [step]
    online.intercept = online.transform = None
    is_pushed(api, done, soup, create_pr=create_pr)
    if not create_pr:
        assert {tag.name: tag.target_commit for tag in api.list_repo_refs(REPO).tags} == {"v1": done.commit}
