"""A push through a bad network: at every step, whatever happens, one commit or pull request, or an error and none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_faults import Hangup
from huggingface_hub import HfApi
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_soup.errors import PublishError
from hf_soup.hub import PushResult, commit_folder, inspect_target, repo as hub
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
    pytest.mark.usefixtures("short_pauses"),
]

WEIGHTS = bytes(range(256)) * 600
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
    "result": ("GET", "/revision/", 1),
    "tag": ("POST", "/tag/", 1),
    "tagged": ("GET", "/refs", 2),
}
#: For a pull request those that are others than a commit's, and one of each kind after which it is looked for.
KINDS = [(step, False) for step in STEPS if step != "offers"]
KINDS += [(step, True) for step in ("offers", "modes", "part", "commit", "result")]
#: What may happen to a request: before the server does anything, or to its answer.
BEFORE: dict[str, Callable[[], Response]] = {
    "429": lambda: Response(status_code=429, headers={"Retry-After": "1"}),
    "503": lambda: Response("<html>busy</html>", 503, media_type="text/html"),
    "reset": partial(Hangup, reset=True),
    "closed": Hangup,
}
AFTER: dict[str, Callable[[Response], Response]] = {
    "lost": lambda _: Hangup(),
    "lost behind a proxy": lambda _: Response("<html>timeout</html>", 504, media_type="text/html"),
    "cut off": lambda answer: Hangup(answer, 5),
    "cut off by a proxy": lambda answer: Response(answer.body[:5] if hasattr(answer, "body") else b"", 200),
}


Fits = Callable[[Request], bool]


@pytest.fixture
def soup(tmp_path: Path) -> dict[str, Path]:
    return make_soup(tmp_path / "soup")


def make_soup(folder: Path, seed: int = 0) -> dict[str, Path]:
    """The files of a soup, as the publisher sees them, with weights of its own."""
    folder.mkdir()
    card = b"---\nlicense: mit\n---\n# Soup\n"
    for name, content in (("model.safetensors", WEIGHTS + bytes([seed])), ("soup.json", b"{}"), ("README.md", card)):
        (folder / name).write_bytes(content)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def api(online: LocalHub) -> HfApi:
    return HfApi(endpoint=online.endpoint, token=online.token)


def push(files: dict[str, Path], repo: str = REPO, *, message: str = "Soup", **options: Any) -> PushResult:
    return commit_folder(inspect_target(repo, **options), files, message=message)


def commits(api: HfApi, repo: str = REPO) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo)]


def offers(api: HfApi, repo: str = REPO) -> list[str]:
    return [offer.title for offer in api.get_repo_discussions(repo)]


def prepare(online: LocalHub, repo: str = REPO) -> None:
    """A repo with an earlier soup."""
    store = online.store
    made = store.create("model", repo, private=False, author="acme")
    store.commit(made, "main", [store.put("soup.json", b'{"old": 1}')], ("Before", "", "acme"), None)


def at(step: str) -> Callable[[Request], bool]:
    """Whether a request is this step of a push; only once."""
    method, part, number = STEPS[step]
    seen = [0]

    def fits(request: Request) -> bool:
        seen[0] += (fitting := request.method == method and part in request.url.path)
        return fitting and seen[0] == number

    return fits


def is_pushed(online: LocalHub, repo: str, done: PushResult, soup: dict[str, Path], *, create_pr: bool) -> None:
    """Exactly once, with every byte."""
    api, store = HfApi(endpoint=online.endpoint, token=online.token), online.store
    assert commits(api, repo) == [*([] if create_pr else ["Soup"]), "Before", "initial commit"]
    assert offers(api, repo) == (["Soup"] if create_pr else [])
    assert done.pull_request == (f"{api.endpoint}/{repo}/discussions/1" if create_pr else None)
    head = hub.resolve(repo, "refs/pr/1" if create_pr else None)
    assert head.revision == done.commit
    there = store.revision(store.repos["model", repo], done.commit).files
    for name, path in soup.items():
        assert store.blob(there[name].sha256).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("step", "create_pr"), KINDS)
def test_every_step_of_a_push_may_fail(
    online: LocalHub, api: HfApi, tmp_path: Path, step: str, create_pr: bool
) -> None:
    """In every way, once, and it ends well; but for an answer that pretends to be whole and is no JSON."""
    online.part_bytes = 45_000
    for number, fault in enumerate([*BEFORE, *AFTER]):
        repo, soup = f"{REPO}-{number}", make_soup(tmp_path / f"soup-{number}", number)
        prepare(online, repo)
        fits, happened = at(step), [0]

        def intercept(request: Request, fits: Fits = fits, fault: str = fault, happened: list[int] = happened) -> Any:
            happened[0] += (now := fault in BEFORE and fits(request))
            return BEFORE[fault]() if now else None

        def transform(
            request: Request, answer: Response, fits: Fits = fits, fault: str = fault, happened: list[int] = happened
        ) -> Response:
            happened[0] += (now := fault in AFTER and fits(request))
            return AFTER[fault](answer) if now else answer

        online.intercept, online.transform = intercept, transform
        options = {"create_pr": create_pr, "tag": None if create_pr else "v1"}
        done = None
        with suppress(PublishError) if fault == "cut off by a proxy" else nullcontext():
            done = push(soup, repo, **options)
            assert done.changed
        assert happened == [1], fault
        done = done or push(soup, repo, **options)
        is_pushed(online, repo, done, soup, create_pr=create_pr)
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
        assert tags == ({} if create_pr else {"v1": done.commit})


@pytest.mark.parametrize(("step", "create_pr"), [kind for kind in KINDS if kind[0] != "last part"])
def test_a_step_that_never_works_is_given_up(
    online: LocalHub, api: HfApi, soup: dict[str, Path], step: str, create_pr: bool
) -> None:
    """With an error that says why, in bounded time; nothing is half made, and a push later goes on from there."""
    online.part_bytes = 45_000
    prepare(online)
    method, part, _ = STEPS[step]
    asked = [0]

    def refuse(request: Request) -> Response | None:
        if request.method != method or part not in request.url.path:
            return None
        asked[0] += 1
        return JSONResponse({"error": "no disk"}, 500)

    online.intercept = refuse
    options = {"create_pr": create_pr, "tag": None if create_pr else "v1"}
    with pytest.raises(PublishError, match=r"500\. no disk") as raised:
        push(soup, **options)
    assert 1 < asked[0] < 60
    online.intercept = None
    landed = step in ("tag", "result")
    assert commits(api) == [*(["Soup"] if landed and not create_pr else []), "Before", "initial commit"]
    assert offers(api) == (["Soup"] if landed and create_pr else [])
    where = f"{online.endpoint}/{REPO}/discussions/1" if create_pr else "commit"
    assert not landed or f"'{REPO}' has the soup in {where}" in str(raised.value)
    done = push(soup, **options)
    assert done.changed is not landed
    is_pushed(online, REPO, done, soup, create_pr=create_pr)


@pytest.mark.parametrize("step", ["modes", "commit"])
def test_an_answer_that_no_hub_gives_is_said(online: LocalHub, api: HfApi, soup: dict[str, Path], step: str) -> None:
    """The client fails where it reads that."""
    prepare(online)
    _, part, _ = STEPS[step]
    online.intercept = lambda request: JSONResponse([]) if part in request.url.path else None
    with pytest.raises(PublishError, match="cannot be read"):
        push(soup)
    online.intercept = None
    is_pushed(online, REPO, push(soup), soup, create_pr=False)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("received", [0, 100_000])
def test_an_upload_that_breaks_off_goes_on(
    online: LocalHub, api: HfApi, soup: dict[str, Path], reset: bool, received: int
) -> None:
    """In the middle of a file, too."""
    left = [2]

    async def cut(request: Request) -> Response | None:
        if request.method != "PUT" or not left[0]:
            return None
        left[0] -= 1
        got = 0
        async for data in request.stream():
            got += len(data)
            if got >= received:
                break
        return Hangup(reset=reset)

    prepare(online)
    online.intercept = cut
    is_pushed(online, REPO, push(soup), soup, create_pr=False)
    assert left == [0]


def test_an_upload_that_arrives_damaged_is_sent_again(online: LocalHub, api: HfApi, soup: dict[str, Path]) -> None:
    """The server compares it with the sha256 that was announced."""
    damaged = [True]

    async def damage(request: Request) -> None:
        if request.method == "PUT" and damaged and damaged.pop():
            body = bytearray(await request.body())
            body[5] ^= 1
            request._body = bytes(body)

    prepare(online)
    online.intercept = damage
    is_pushed(online, REPO, push(soup), soup, create_pr=False)


def test_what_arrived_is_not_sent_again(online: LocalHub, api: HfApi, soup: dict[str, Path]) -> None:
    """Neither in this push nor in the next one."""

    def sent() -> int:
        return sum(request.method == "PUT" for request in online.requests)

    prepare(online)
    left = [2]

    def busy(request: Request) -> Response | None:
        left[0] -= (now := "/commit/" in request.url.path and left[0] > 0)
        return Response(status_code=503) if now else None

    online.intercept = busy
    assert push(soup).changed
    assert sent() == 1
    more = soup["README.md"].with_name("model-2.safetensors")
    more.write_bytes(WEIGHTS[::-1])
    lost = more.with_name("model-3.safetensors")
    lost.write_bytes(WEIGHTS[1:])
    files = soup | {more.name: more, lost.name: lost}

    async def full(request: Request) -> Response | None:
        if request.method == "PUT" and await request.body() == WEIGHTS[1:]:
            return JSONResponse({"error": "no disk"}, 507)
        return None

    online.intercept = full
    with pytest.raises(PublishError, match=r"507\. no disk"):
        push(files)
    online.intercept = None
    before = sent()
    assert push(files).changed
    assert sent() - before == 1


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pr"])
@pytest.mark.parametrize("step", ["card", "modes", "batch", "part", "commit", "result"])
def test_somebody_elses_commit_comes_in_between(
    online: LocalHub, api: HfApi, soup: dict[str, Path], step: str, create_pr: bool
) -> None:
    """It is not overwritten, by 412; a pull request does not mind, and one that comes after ours is theirs."""
    prepare(online)
    fits = at(step)

    def commit(request: Request) -> None:
        if fits(request):
            # In the server's own loop no request can be made.
            repo, store = online.store.repos["model", REPO], online.store
            store.commit(repo, "main", [store.put("theirs.txt", b"theirs")], ("Theirs", "", "them"), None)

    online.intercept = commit
    if create_pr or step == "result":
        done = push(soup, create_pr=create_pr)
    else:
        with pytest.raises(PublishError, match=r"somebody else committed .*\n.*push again"):
            push(soup)
        done = push(soup)
    titles = {False: ["Soup", "Theirs"], True: ["Theirs"]}[create_pr]
    assert commits(api) == [*(titles[::-1] if step == "result" else titles), "Before", "initial commit"]
    assert offers(api) == (["Soup"] if create_pr else [])
    assert hub.resolve(REPO, done.commit).files["model.safetensors"].size == len(WEIGHTS) + 1


def test_the_answer_is_lost_and_somebody_commits(online: LocalHub, api: HfApi, soup: dict[str, Path]) -> None:
    """The commit that is told is the one that was pushed."""
    prepare(online)

    def lose(request: Request, answer: Response) -> Response:
        if "/commit/" not in request.url.path:
            return answer
        repo, store = online.store.repos["model", REPO], online.store
        store.commit(repo, "main", [store.put("README.md", b"theirs")], ("Theirs", "", "them"), None)
        return Hangup()

    online.transform = lose
    done = push(soup)
    online.transform = None
    assert commits(api) == ["Theirs", "Soup", "Before", "initial commit"]
    assert done.commit == api.list_repo_commits(REPO)[1].commit_id


def test_a_commit_that_shows_late_is_not_made_twice(online: LocalHub, api: HfApi, soup: dict[str, Path]) -> None:
    """The answer is lost, and so is the look: what is sent again names the old head as its parent."""
    prepare(online)
    old = online.store.repos["model", REPO].refs["refs/heads/main"]
    late = [True]

    def transform(request: Request, answer: Response) -> Response:
        repo = online.store.repos["model", REPO]
        if "/commit/" in request.url.path and late:
            new = repo.refs["refs/heads/main"]
            repo.refs["refs/heads/main"] = old
            late[:] = [new]
            return Hangup()
        return answer

    def intercept(request: Request) -> None:
        if "/commit/" in request.url.path and late and late[0] is not True:
            online.store.repos["model", REPO].refs["refs/heads/main"] = late.pop()

    online.transform, online.intercept = transform, intercept
    done = push(soup)
    assert not late
    is_pushed(online, REPO, done, soup, create_pr=False)


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pr"])
def test_where_nobody_knows_whether_it_landed_the_error_says_so(
    online: LocalHub, api: HfApi, soup: dict[str, Path], create_pr: bool
) -> None:
    """The answer is lost, and then the Hub is away."""
    prepare(online)
    away = [False]

    def lose(request: Request, answer: Response) -> Response:
        away[0] = away[0] or "/commit/" in request.url.path
        return Hangup() if away[0] else answer

    online.transform = lose
    with pytest.raises(
        PublishError, match=r"cannot be reached \(\w+\)\. Whether .* not known\.\n.*nothing is made twice"
    ):
        push(soup, create_pr=create_pr)
    online.transform = None
    done = push(soup, create_pr=create_pr)
    assert not done.changed
    is_pushed(online, REPO, done, soup, create_pr=create_pr)


def test_a_tag_counts_whose_answers_are_all_lost(online: LocalHub, api: HfApi, soup: dict[str, Path]) -> None:
    prepare(online)
    online.transform = lambda request, answer: Hangup() if "/tag/" in request.url.path else answer
    done = push(soup, tag="v1")
    assert [tag.target_commit for tag in api.list_repo_refs(REPO).tags] == [done.commit]


def test_somebody_takes_the_tag_in_between(online: LocalHub, api: HfApi, soup: dict[str, Path]) -> None:
    prepare(online)

    def tag(request: Request) -> None:
        if "/tag/" in request.url.path:
            refs = online.store.repos["model", REPO].refs
            refs["refs/tags/v1"] = online.store.revision(online.store.repos["model", REPO], "main").parent or ""

    online.intercept = tag
    with pytest.raises(PublishError, match=r"has the soup in commit \w+\. 'v1' names another commit"):
        push(soup, tag="v1")
    online.intercept = None
    is_pushed(online, REPO, push(soup), soup, create_pr=False)


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pr"])
@pytest.mark.parametrize("step", ["card", "modes", "batch", "part", "commit"])
def test_the_repo_is_deleted_in_between(
    online: LocalHub, api: HfApi, soup: dict[str, Path], step: str, create_pr: bool
) -> None:
    prepare(online)
    fits = at(step)

    def delete(request: Request) -> None:
        if fits(request):
            online.store.delete(online.store.repos["model", REPO])

    online.intercept = delete
    with pytest.raises(PublishError, match="does not exist"):
        push(soup, create_pr=create_pr)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pr"])
@pytest.mark.parametrize("step", ["head", "card", "modes", "batch", "part", "commit"])
def test_the_repo_is_renamed_in_between(
    online: LocalHub, api: HfApi, soup: dict[str, Path], step: str, create_pr: bool
) -> None:
    """The old name leads to the new one."""
    prepare(online)
    fits = at(step)

    def rename(request: Request) -> None:
        if fits(request):
            online.store.rename("model", REPO, "acme/renamed")

    online.intercept = rename
    push(soup, create_pr=create_pr)
    assert commits(api, "acme/renamed")[:1] == (["Before"] if create_pr else ["Soup"])
    assert offers(api, "acme/renamed") == (["Soup"] if create_pr else [])
