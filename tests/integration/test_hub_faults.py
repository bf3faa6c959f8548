"""What a network does: the resolver and the publisher through the real client, over HTTP, to the local Hub."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from hub_faults import Hangup
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from safetensors import safe_open
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_soup.checkpoint import open_checkpoint
from hf_soup.errors import PublishError, ResolveError
from hf_soup.hub import client, download as transfer, inspect_target, repo as hub, require_public
from hf_soup.hub.push import PushTarget
from hf_soup.local_hub import LocalHub
from hf_soup.merging import fetch_small, fetch_weights

pytestmark = [
    # The client hands files to its HTTP library in a way that the library deprecates.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
    # An iterator of a body that broke off is closed by the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

WEIGHTS = bytes(range(256)) * 4000
NAME = "model.safetensors"


@pytest.fixture
def pauses(_pauses_of_users: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made, ours and the client's; none takes longer than a moment."""
    made: list[float] = []
    sleep = time.sleep

    def short(seconds: float) -> None:
        made.append(seconds)
        sleep(min(seconds, 0.005))

    monkeypatch.setattr(time, "sleep", short)
    return made


@pytest.fixture
def repo(publish: Callable[..., str], tmp_path: Path) -> str:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / NAME).write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    return publish("tiny", folder)


def first(times: int, path: str, answer: Callable[[], Response], method: str = "GET") -> Callable[[Request], Any]:
    """An intercept: the first so many requests whose path holds ``path`` get that answer."""
    left = [times]

    def intercept(request: Request) -> Response | None:
        if path not in request.url.path or request.method != method or not left[0]:
            return None
        left[0] -= 1
        return answer()

    return intercept


def broken(times: int, path: str, keep: int, *, reset: bool) -> Callable[[Request, Response], Response]:
    """A transform: the first so many answers to such requests break off after ``keep`` bytes."""
    left = [times]

    def transform(request: Request, response: Response) -> Response:
        if path not in request.url.path or request.method != "GET" or not left[0]:
            return response
        left[0] -= 1
        return Hangup(response, keep, reset=reset)

    return transform


# ---- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (lambda: Response(status_code=429, headers={"Retry-After": "7"}), 7.0),
        (lambda: Response(status_code=503), 0.5),
        (lambda: Response(status_code=500), 0.5),
        (Hangup, 0.5),
        (lambda: Hangup(reset=True), 0.5),
    ],
    ids=["429", "503", "500", "closed", "reset"],
)
def test_a_fault_that_passes_is_waited_for(
    online: LocalHub, repo: str, pauses: list[float], answer: Callable[[], Response], asked: float
) -> None:
    """As long as the Hub asks for, where it does; the client itself would not try the info again."""
    online.intercept = first(1, "/api/models", answer)
    assert hub.resolve(repo).id == repo
    online.intercept = first(1, "/resolve/", answer)
    assert transfer.read_range(hub.resolve(repo), NAME, 10, 20) == WEIGHTS[10:20]
    assert len(pauses) == 2
    online.intercept = first(1, "/resolve/", answer, "HEAD")
    assert transfer.fetch_one(hub.resolve(repo), NAME).read_bytes() == WEIGHTS
    assert all(asked <= pause <= 1.2 * asked for pause in pauses)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_range_that_breaks_off_is_asked_for_again(
    online: LocalHub, repo: str, pauses: list[float], reset: bool
) -> None:
    found = hub.resolve(repo)
    before = transfer.traffic()
    online.transform = broken(2, "/cdn/", 1000, reset=reset)
    assert transfer.read_range(found, NAME, 5, 500_000) == WEIGHTS[5:500_000]
    assert transfer.traffic() - before == 499_995
    assert len(pauses) == 2


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_download_that_breaks_off_goes_on(
    online: LocalHub, repo: str, pauses: list[float], reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client notes what arrived in steps of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    online.transform = broken(1, "/cdn/", 500_000, reset=reset)
    path = transfer.fetch_one(hub.resolve(repo), NAME)
    assert path.read_bytes() == WEIGHTS
    ranges = [request.range for request in online.requests if request.path.startswith("/cdn/")]
    # What arrived before a reset is discarded by the operating system, perhaps all of it.
    assert ranges[0] == ""
    assert reset or ranges[1] == "bytes=500000-"


def test_a_flipped_byte_is_fetched_again(online: LocalHub, repo: str) -> None:
    """The client does not compare what arrives with the sha256 that the Hub states."""
    wrong = bytearray(WEIGHTS)
    wrong[123_456] ^= 1
    flips = [True]

    def flip(request: Request, response: Response) -> Response:
        if request.url.path.startswith("/cdn/") and flips and flips.pop():
            return Response(bytes(wrong), headers=dict(response.headers))
        return response

    online.transform = flip
    path = transfer.fetch_one(hub.resolve(repo), NAME)
    assert path.read_bytes() == WEIGHTS


def test_a_byte_that_stays_wrong_leaves_no_poison(online: LocalHub, repo: str) -> None:
    wrong = bytearray(WEIGHTS)
    wrong[-1] ^= 1
    online.transform = lambda request, response: (
        Response(bytes(wrong), headers=dict(response.headers)) if request.url.path.startswith("/cdn/") else response
    )
    found = hub.resolve(repo)
    with pytest.raises(ResolveError, match="not the ones that the Hub states") as raised:
        transfer.fetch_one(found, NAME)
    assert hashlib.sha256(WEIGHTS).hexdigest() in str(raised.value)
    assert hashlib.sha256(wrong).hexdigest() in str(raised.value)
    assert not transfer.cached_path(found, NAME)
    held = [path.read_bytes() for path in transfer.cache_folder().rglob("*") if path.is_file()]
    assert bytes(wrong) not in held
    online.transform = None
    assert transfer.fetch_one(found, NAME).read_bytes() == WEIGHTS


def test_small_files_are_compared_too(online: LocalHub, repo: str) -> None:
    """By git's id of their content, as the Hub states no sha256 of theirs."""
    found = hub.resolve(repo)
    assert found.files["config.json"].sha256 is None
    online.transform = lambda request, response: (
        Response(b" " * found.files["config.json"].size, headers=dict(response.headers))
        if request.url.path.endswith("config.json") and request.method == "GET" and response.status_code == 200
        else response
    )
    with pytest.raises(ResolveError, match="not the ones that the Hub states"):
        transfer.fetch_one(found, "config.json")
    assert not transfer.cached_path(found, "config.json")
    online.transform = None
    path = transfer.fetch_one(found, "config.json")
    assert path.stat().st_size == found.files["config.json"].size


def flips(path: Path, times: int) -> Callable[[Request, Response], Response]:
    """A transform: in the first so many answers with that file the first digit is another one."""
    left = [times]
    wrong = re.sub(rb"\d", lambda digit: bytes([digit[0][0] ^ 1]), path.read_bytes(), count=1)

    def flip(request: Request, response: Response) -> Response:
        if not request.url.path.endswith(path.name) or request.method != "GET" or not left[0]:
            return response
        left[0] -= 1
        return Response(wrong, response.status_code, headers=dict(response.headers))

    return flip


@pytest.fixture
def sharded(publish: Callable[..., str], family: Path, tmp_path: Path) -> str:
    """A model with an index, and a card of which the Hub's answer holds nothing."""
    folder = shutil.copytree(family / "a", tmp_path / "sharded")
    (folder / NAME).rename(folder / "model-1.safetensors")
    with safe_open(folder / "model-1.safetensors", "np") as file:
        places = dict.fromkeys(file.keys(), "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "README.md").write_text("---\nlicense: mit\ntags: v1\n---\n")
    return publish("sharded", folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "README.md"])
def test_what_is_read_of_a_model_is_compared(
    online: LocalHub, sharded: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digit of a config that changes on its way would stand in the soup's."""
    resolve = hub.resolve
    monkeypatch.setattr("hf_soup.hub.resolve", lambda *args, **options: replace(resolve(*args, **options), card={}))
    right = open_checkpoint(sharded)
    assert right.card == {"license": "mit", "tags": "v1"}
    online.transform = flips(tmp_path / "sharded" / file, 1)
    before = len(online.requests)
    again = open_checkpoint(sharded)
    assert (again.config, again.card, again.tensors) == (right.config, right.card, right.tensors)
    assert sum(request.path.endswith(file) for request in online.requests[before:]) == 2
    online.transform = flips(tmp_path / "sharded" / file, 2)
    with pytest.raises(ResolveError, match=f"file '{file}': the bytes that arrived are not the ones that the Hub st"):
        open_checkpoint(sharded)


def test_a_copy_in_the_cache_that_was_changed_is_not_believed(
    online: LocalHub, sharded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a Hub its copy is read, and where there is none this is said."""
    right = open_checkpoint(sharded)
    fetch_weights([right])
    fetch_small([right])
    path = Path(str(try_to_load_from_cache(sharded, "config.json", revision=right.revision)))
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.0"))
    assert open_checkpoint(sharded).config == right.config
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResolveError, match="the copy in the cache is not what the Hub stated"):
        open_checkpoint(sharded)


def test_a_card_that_is_longer_than_any_is_not_used(
    online: LocalHub, publish: Callable[..., str], tmp_path: Path
) -> None:
    """A check says so, and the cache does not get it."""
    repo = publish("a")
    longer = tmp_path / "README.md"
    longer.write_bytes(b"---\nlicense: mit\n---\n" + (1 << 22) * b" ")
    HfApi(online.endpoint, online.token).upload_file(path_or_fileobj=longer, path_in_repo="README.md", repo_id=repo)
    opened = open_checkpoint(repo)
    assert opened.card == {}
    assert opened.notes == ("its README.md has 4,194,325 bytes and is not used; at most 4,194,304 are read",)
    fetch_small([opened])
    assert opened.source.here("config.json")
    assert not opened.source.here("README.md")


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../x", "a//x", "a\\x", "a\0x", ".", ""])
def test_a_file_whose_path_leads_elsewhere_is_not_there(online: LocalHub, sharded: str, path: str) -> None:
    """Whatever a listing and an index say."""
    listing = HfApi(online.endpoint, online.token).model_info(sharded, files_metadata=True)
    index = json.dumps({"weight_map": {"a": path}}).encode()
    files = {each.rfilename: each for each in listing.siblings or ()}
    shown = [
        {"rfilename": name, "size": len(index) if "index" in name else each.size, "blobId": each.blob_id}
        for name, each in {**files, path: files["config.json"]}.items()
        if "index" not in name
    ]
    blob = hashlib.sha1(b"blob %d\0" % len(index) + index, usedforsecurity=False).hexdigest()
    shown.append({"rfilename": "model.safetensors.index.json", "size": len(index), "blobId": blob})

    def intercept(request: Request) -> Response | None:
        if request.url.path.endswith("index.json"):
            return Response(index, 206)
        answer = {"id": sharded, "sha": listing.sha, "siblings": shown}
        return JSONResponse(answer) if request.url.path.startswith("/api/models") else None

    online.intercept = intercept
    assert path not in hub.resolve(sharded).files
    with pytest.raises(ResolveError, match="names 1 files that are not there"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("answer", [[], {"baseModels": []}, {}, "x", None])
def test_an_odd_answer_names_no_base(online: LocalHub, repo: str, answer: object) -> None:
    """It is only a hint."""
    found = replace(hub.resolve(repo), tags=())
    online.intercept = lambda request: JSONResponse(answer) if "expand" in request.url.query else None
    assert hub.base_models(found) == ()


def test_an_odd_answer_is_an_error_that_says_whose(online: LocalHub, repo: str) -> None:
    online.intercept = lambda request: JSONResponse([])
    with pytest.raises(ResolveError, match=r"what http://127.0.0.1:\d+ says of it cannot be read"):
        hub.resolve(repo)
    with pytest.raises(PublishError, match=r"what http://127.0.0.1:\d+ says of it cannot be read \(TypeError"):
        require_public([repo], PushTarget("acme/x", None, "acme", False, False, None, None, False, False, None))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_once(
    online: LocalHub, publish: Callable[..., str], environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    """While a check waits for the Hub, or a cook for weights; and nothing is left in the temporary folder."""
    for name in "ab":
        publish(name)
    publish("base")
    asked, temporary = threading.Event(), Path(environment["TMPDIR"])

    async def stall(request: Request) -> Response | None:
        if number != signal.SIGTERM or any(temporary.iterdir()):
            asked.set()
            while online.intercept is stall:
                await anyio.sleep(0.01)
        return None

    online.intercept = stall
    command = [sys.executable, "-m", "hf_soup", "cook", "acme/a", "acme/b", "-o", "soup"]
    child = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert asked.wait(60)
    time.sleep(0.2)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    online.intercept = None
    assert child.returncode == 128 + number, said
    assert not list(temporary.iterdir())
    assert "Interrupted. Nothing half-made is left" in said


def test_a_server_without_ranges_is_read_no_further_than_asked(online: LocalHub, repo: str) -> None:
    sent = []

    class Slowly(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for start in range(0, len(WEIGHTS), 4000):
                try:
                    await send({"type": "http.response.body", "body": WEIGHTS[start : start + 4000], "more_body": True})
                except OSError:
                    return
                sent.append(4000)
            await send({"type": "http.response.body", "body": b""})

    found = hub.resolve(repo)
    online.intercept = lambda request: Slowly() if "/resolve/" in request.url.path else None
    before = transfer.traffic()
    assert transfer.read_range(found, NAME, 3000, 9000) == WEIGHTS[3000:9000]
    assert transfer.read_range(found, NAME, 0, 10) == WEIGHTS[:10]
    assert transfer.traffic() - before == 6010


def test_an_answer_that_is_cut_short_is_asked_for_again(online: LocalHub, repo: str, pauses: list[float]) -> None:
    """Complete as HTTP has it, as a proxy's that gave up; what is too short each time is no answer."""
    found, left = hub.resolve(repo), [2]

    def cut(request: Request) -> Response | None:
        if request.url.path.startswith("/api/") or not left[0]:
            return None
        left[0] -= 1
        return Response(WEIGHTS[:3], 206)

    online.intercept = cut
    assert transfer.read_range(found, NAME, 0, 10) == WEIGHTS[:10]
    assert (left, len(pauses)) == ([0], 2)
    left[0] = 99
    asked = len(online.requests)
    with pytest.raises(
        ResolveError, match=r"file 'model.safetensors': the answer of .* ends after 3 of 10 by"
    ) as raised:
        transfer.read_range(found, NAME, 0, 10)
    assert len(online.requests) - asked == client.ATTEMPTS
    assert "owner" not in str(raised.value)
    assert raised.value.hint.endswith("Run the same command again.")


def test_what_stays_broken_is_given_up_and_said(online: LocalHub, repo: str, pauses: list[float]) -> None:
    """In a number of tries that is bounded."""
    found = hub.resolve(repo)
    online.intercept = lambda request: JSONResponse({"error": "the database is on fire"}, 500)
    count = len(online.requests)
    with pytest.raises(ResolveError, match=r"the Hub answered 500\. the database is on fire"):
        hub.resolve(repo)
    with pytest.raises(ResolveError, match=rf"'{repo}@{found.revision[:7]}', file '{NAME}': the Hub answered 500"):
        transfer.read_range(found, NAME, 0, 10)
    assert len(online.requests) - count == 2 * client.ATTEMPTS
    assert sum(pauses) < 30
    with pytest.raises(ResolveError, match=f"'{NAME}': the Hub answered 500"):
        transfer.fetch_one(found, NAME)
    online.intercept = lambda request: Response(status_code=429, headers={"Retry-After": "3600"})
    with pytest.raises(ResolveError, match=r"rate limit is reached\.\nWait some minutes"):
        hub.resolve(repo)
    assert max(pauses) <= 72


def test_an_answer_that_is_not_from_a_hub(online: LocalHub, repo: str) -> None:
    """A hotel's login page, say."""
    online.intercept = lambda request: Response("<html>Welcome!</html>", media_type="text/html")
    with pytest.raises(ResolveError, match=r"is not JSON\.\nCheck HF_ENDPOINT"):
        hub.resolve(repo)
    online.intercept = lambda request: JSONResponse({"id": repo, "sha": "main", "siblings": []})
    with pytest.raises(ResolveError, match="names no commit"):
        hub.resolve(repo)


def test_no_network_is_said_at_once(
    online: LocalHub, repo: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the cache holds is used, and said to be from there."""
    found = hub.resolve(repo)
    path = transfer.fetch_one(found, NAME)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ResolveError, match=rf"'acme/other': {nowhere} cannot be reached"):
        hub.resolve("acme/other")
    with pytest.raises(PublishError, match="cannot be reached"):
        inspect_target("acme/other")
    assert sum(pauses) < 10
    again = hub.resolve(repo)
    assert again.from_cache
    assert again.revision == found.revision
    assert transfer.fetch_one(again, NAME) == path
    assert again.files[NAME].sha256 == found.files[NAME].sha256
    with pytest.raises(ResolveError, match=r"file 'config.json': .* cannot be reached"):
        transfer.read_range(found, "config.json", 0, 1)


def test_a_token_that_nobody_knows(online: LocalHub, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_secret")
    for ask in (lambda: hub.resolve(repo), lambda: inspect_target("acme/x")):
        with pytest.raises((ResolveError, PublishError), match="token") as raised:
            ask()
        assert "hf_wrong_and_secret" not in str(raised.value)


def test_the_token_goes_to_the_hub_and_nowhere_else(online: LocalHub, repo: str) -> None:
    found = hub.resolve(repo)
    transfer.read_range(found, NAME, 0, 10)
    transfer.fetch_one(found, NAME)
    transfer.fetch_one(found, "config.json")
    elsewhere = [request for request in online.requests if request.path.startswith("/cdn/") and request.method == "GET"]
    assert len(elsewhere) == 2
    assert {request.authorization for request in elsewhere} == {""}
    assert online.token not in repr(found)


def test_a_renamed_repo_is_called_by_its_new_name(online: LocalHub, repo: str) -> None:
    online.store.rename("model", repo, "acme/new")
    found = hub.resolve(repo)
    assert found.id == "acme/new"
    assert transfer.read_range(found, NAME, 0, 3) == WEIGHTS[:3]
