"""Soups through xet, the client's way with large files: the real ``hf_xet`` at one end, `XetHub` at the other."""

from __future__ import annotations

import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hub_faults import Hangup
from huggingface_hub import HfApi, RepoFile, constants
from huggingface_hub.utils import _xet
from safetensors.torch import load_file
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from xet_server import XetHub

from hf_soup import Recipe, Soup, cook
from hf_soup.errors import PublishError, ResolveError
from hf_soup.hub.push import PushTarget, _speaks_xet
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

NAME = "model.safetensors"
LAYERS = 8


@pytest.fixture
def local_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalHub]:
    """A local Hub with xet; with ``plain`` as its parameter, one without."""
    kind = LocalHub if getattr(request, "param", None) == "plain" else XetHub
    with kind(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def online(online: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """As for the other tests, with xet on; what ``hf_xet`` keeps from one session to the next is the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
    new_session(monkeypatch, tmp_path / "home")
    return online


@pytest.fixture
def publish(online: LocalHub) -> Callable[..., str]:
    """Puts a folder on the Hub by the client, which is what uses xet."""

    def push(name: str, folder: Path) -> str:
        HfApi().create_repo(f"acme/{name}", exist_ok=True)
        HfApi().upload_folder(repo_id=f"acme/{name}", folder_path=folder)
        return f"acme/{name}"

    return push


def new_session(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """What a new process would have: ``hf_xet`` reads its settings when a session begins.

    What has arrived it notes after each xorb here, as otherwise after 20 seconds.
    """
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_MAX_COUNT", "1")
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())


@pytest.fixture
def api(online: LocalHub) -> HfApi:
    return HfApi(endpoint=online.endpoint, token=online.token)


@pytest.fixture(scope="module")
def large(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``a`` and ``b``: kin as in the family, with 6 MB of weights each, most of them in eight equal layers."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("large")
    config = BertConfig.from_pretrained(
        family / "base", hidden_size=128, num_hidden_layers=LAYERS, intermediate_size=512
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    for name in "ab":
        shutil.copytree(family / name, folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.004 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def soup(large: Path, tmp_path: Path) -> Soup:
    return cook(Recipe(ingredients=[str(large / "a"), str(large / "b")]), tmp_path / "soup")


def commits(api: HfApi, repo: str) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo)]


def paths(hub: LocalHub, start: str) -> list[str]:
    return [f"{record.method} {record.path}" for record in hub.requests if record.path.startswith(start)]


def test_soups_go_up_and_come_down_by_xet(
    online: XetHub, api: HfApi, publish: Callable[..., str], large: Path, soup: Soup, tmp_path: Path
) -> None:
    """Ingredients that were uploaded by xet make the soup that they make from folders, and it comes back the same."""
    for name in "ab":
        publish(name, large / name)
    by_xet = cook(["acme/a", "acme/b"], tmp_path / "by_xet")
    done = by_xet.push("acme/soup")

    assert (by_xet.folder / NAME).read_bytes() == (soup.folder / NAME).read_bytes()
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]
    assert len(paths(online, "/v1/xorbs/")) == 3
    assert not paths(online, "/lfs/")
    # One way for each of both ingredients, and no plain download of either.
    assert len(paths(online, "/v2/reconstructions/")) == 2
    # The pushed soup is there under its sha256, and for those without xet as for those with it.
    file = api.get_paths_info("acme/soup", NAME, revision=done.commit)[0]
    assert isinstance(file, RepoFile)
    assert file.lfs is not None
    assert file.xet_hash in online.files
    assert online.store.blob(file.lfs.sha256).read_bytes() == (soup.folder / NAME).read_bytes()
    assert Path(api.hf_hub_download("acme/soup", NAME)).read_bytes() == (soup.folder / NAME).read_bytes()
    # The Hub's token stays with the Hub.
    storage = [record for record in online.requests if record.path.startswith(("/v1/", "/v2/", "/cdn/"))]
    assert storage
    assert not any(online.token in record.authorization for record in storage)


def test_a_soup_with_another_layer_sends_that_layer(
    online: XetHub, api: HfApi, large: Path, soup: Soup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eighth of the tensors differs, and about an eighth of the bytes goes up; the rest is known to be there."""
    soup.push("acme/soup")
    models = [str(large / "a"), str(large / "b")]
    other = cook(Recipe(ingredients=models, tensor_weights={"*.layer.3.*": [3, 1]}), tmp_path / "other")
    new_session(monkeypatch, tmp_path / "home")
    other.push("acme/soup")

    old, new = load_file(soup.folder / NAME), load_file(other.folder / NAME)
    different = {name for name, tensor in new.items() if not tensor.equal(old[name])}
    assert different == {name for name in new if ".layer.3." in name}
    first, second = online.received
    assert 0.9 / LAYERS < second / first < 1.5 / LAYERS
    assert len(commits(api, "acme/soup")) == 3
    assert Path(api.hf_hub_download("acme/soup", NAME)).read_bytes() == (other.folder / NAME).read_bytes()


def failing(times: int, answer: Callable[[], Response], path: str = "/v1/xorbs/") -> Callable[[Request], Any]:
    """An intercept: the first so many requests there get that answer."""
    left = [times]

    def intercept(request: Request) -> Response | None:
        if not request.url.path.startswith(path) or not left[0]:
            return None
        left[0] -= 1
        return answer()

    return intercept


def resetting(times: int) -> Callable[[Request], Any]:
    """An intercept: the first so many xorbs are cut off by a TCP reset when a part of them has arrived."""
    left = [times]

    async def intercept(request: Request) -> Response | None:
        if not request.url.path.startswith("/v1/xorbs/") or not left[0]:
            return None
        left[0] -= 1
        await anext(request.stream())
        transport = request.scope["transport"]
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
        return Response(status_code=499)

    return intercept


@pytest.mark.parametrize(
    "intercept",
    [
        failing(2, lambda: JSONResponse({"error": "busy"}, 500)),
        failing(2, lambda: Hangup(reset=True)),
        resetting(2),
        failing(1, lambda: Hangup(reset=True), "/v2/shards"),
        failing(1, lambda: JSONResponse({"error": "busy"}, 503), "/v2/shards"),
    ],
    ids=["500", "lost", "cut off", "shard lost", "shard 503"],
)
def test_an_upload_that_is_disturbed_ends_in_one_commit(
    intercept: Callable[[Request], Any], online: XetHub, api: HfApi, soup: Soup
) -> None:
    online.intercept = intercept
    soup.push("acme/soup")
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]
    assert Path(api.hf_hub_download("acme/soup", NAME)).read_bytes() == (soup.folder / NAME).read_bytes()


@pytest.mark.usefixtures("short_pauses")
def test_a_push_that_failed_goes_on_where_it_stopped(
    online: XetHub, api: HfApi, soup: Soup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is in the repo until everything is; then, in another process, only what had not arrived is sent."""
    online.intercept = failing(100, lambda: JSONResponse({"error": "broken"}, 500), "/v2/shards")
    with pytest.raises(PublishError, match=r"^'acme/soup': .*500 Internal Server Error"):
        soup.push("acme/soup")
    assert commits(api, "acme/soup") == ["initial commit"]
    assert len(online.received) == 1

    online.intercept = None
    new_session(monkeypatch, tmp_path / "home")
    soup.push("acme/soup")
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]
    assert len(online.received) == 1
    assert Path(api.hf_hub_download("acme/soup", NAME)).read_bytes() == (soup.folder / NAME).read_bytes()


@pytest.mark.parametrize("stalled", ["/v1/xorbs/", "/cdn/"])
def test_ctrl_c_stops_a_transfer_and_the_same_command_ends_it(
    stalled: str,
    online: XetHub,
    api: HfApi,
    cli: Callable[..., Any],
    environment: dict[str, str],
    soup: Soup,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As users run it: a process with nothing set but the Hub's address, in which xet is on because it is there."""
    del environment["HF_HUB_DISABLE_XET"]
    asked, command = threading.Event(), ["push", str(soup.folder), "acme/soup"]
    if stalled == "/cdn/":
        soup.push("acme/soup")
        command = ["cook", "acme/soup", "acme/soup@main", "-o", "again"]

    async def stall(request: Request) -> None:
        if request.url.path.startswith(stalled) and (stalled != "/cdn/" or of_xorb(online, request)):
            asked.set()
            while online.intercept is stall:
                await anyio.sleep(0.01)

    online.intercept = stall
    started = [sys.executable, "-m", "hf_soup", *command]
    child = subprocess.Popen(started, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert asked.wait(60)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "Interrupted." in said

    online.intercept = None
    new_session(monkeypatch, tmp_path / "home")
    done = cli(*command)
    assert done.code == 0, done.err
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]


@pytest.mark.usefixtures("short_pauses")
def test_xorbs_that_were_changed_on_the_way_up_make_no_file(online: XetHub, api: HfApi, soup: Soup) -> None:
    """The storage compares what it was sent with the sha256, so this is an error and never a soup of other weights."""

    async def spoil(request: Request) -> None:
        if request.url.path.startswith("/v1/xorbs/"):
            content = bytearray(await request.body())
            content[len(content) // 2] ^= 1
            request._body = bytes(content)

    online.intercept = spoil
    with pytest.raises(PublishError, match=r"^'acme/soup': .*400 Bad Request"):
        soup.push("acme/soup")
    assert commits(api, "acme/soup") == ["initial commit"]


def test_bytes_that_were_changed_on_the_way_are_noticed(
    online: XetHub,
    publish: Callable[..., str],
    large: Path,
    soup: Soup,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By xet too the client does not compare what arrives with the sha256: once is mended, always is an error."""
    monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")
    names = [publish(name, large / name) for name in "ab"]
    online.transform = spoiling(online, 1)
    mended = cook(names, tmp_path / "mended")
    assert (mended.folder / NAME).read_bytes() == (soup.folder / NAME).read_bytes()
    assert len(paths(online, "/v2/reconstructions/")) == 3

    shutil.rmtree(tmp_path / "home")
    new_session(monkeypatch, tmp_path / "home")
    online.transform = spoiling(online, 100)
    with pytest.raises(ResolveError, match="not the ones that the Hub states"):
        cook(names, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def of_xorb(hub: XetHub, request: Request) -> bool:
    """Whether a part of a xorb is asked for, and not of a file."""
    return request.url.path.rpartition("/")[2] in {xorb.sha256 for xorb in hub.xorbs.values()}


def spoiling(hub: XetHub, times: int) -> Callable[[Request, Response], Response]:
    """A transform: in the first so many ranges of xorbs one bit of a weight is another."""
    left = [times]

    def transform(request: Request, response: Response) -> Response:
        if not of_xorb(hub, request) or not left[0]:
            return response
        left[0] -= 1
        assert isinstance(response, FileResponse)
        start, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        content = bytearray(Path(response.path).read_bytes()[start : last + 1])
        content[-1] ^= 1
        return Response(bytes(content), 206, {"Content-Range": f"bytes {start}-{last}/*"})

    return transform


@pytest.mark.parametrize("local_hub", ["plain"], indirect=True)
def test_a_hub_without_xet_is_read_without(
    online: LocalHub,
    publish: Callable[..., str],
    large: Path,
    soup: Soup,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        names = [publish(name, large / name) for name in "ab"]
    other = cook(names, tmp_path / "other")
    assert (other.folder / NAME).read_bytes() == (soup.folder / NAME).read_bytes()


@pytest.mark.parametrize("local_hub", ["plain"], indirect=True)
def test_a_hub_without_xet_is_pushed_to_without(online: LocalHub, api: HfApi, soup: Soup) -> None:
    """The client by itself ends with an error: it takes every Hub for one that has xet."""
    soup.push("acme/soup")
    assert paths(online, "/lfs/")
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]
    assert Path(api.hf_hub_download("acme/soup", NAME)).read_bytes() == (soup.folder / NAME).read_bytes()


@pytest.mark.parametrize("local_hub", ["plain"], indirect=True)
def test_a_hub_that_answers_without_a_token_has_no_xet(online: LocalHub, api: HfApi, soup: Soup) -> None:
    """The client would go on asking for one, or fail, and has no way back."""
    odd = [{"casUrl": "", "accessToken": "x"}, {"casUrl": "x", "accessToken": "y", "exp": 1}]
    odd.append({"casUrl": [1], "accessToken": [2], "exp": [3]})
    for answer in (Response(), Response("<html>"), JSONResponse([]), *map(JSONResponse, odd)):
        online.intercept = lambda request, answer=answer: answer if "xet-write-token" in request.url.path else None
        assert not _speaks_xet(
            "acme/soup", PushTarget("acme/soup", None, "acme", None, False, None, None, False, False, None)
        )
    online.intercept = lambda request: JSONResponse({}) if "xet-write-token" in request.url.path else None
    soup.push("acme/soup")
    assert paths(online, "/lfs/")
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]
