"""`--stream`: straight from the Hub, no more on the disk than what is being read, and the bytes of any other way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
import torch
from starlette.requests import Request
from starlette.responses import Response
from transformers import BertConfig, BertForSequenceClassification

from hf_soup import MergeError, Recipe, RecipeError, ResolveError, Soup, client, cook, transfer
from hf_soup import plan as plan_module
from hf_soup.headers import TensorInfo
from hf_soup.local_hub import Hangup, LocalHub
from hf_soup.plan import make_plan
from hf_soup.supply import SourceFile, Supply

# The client's own, where it uploads files of more than a megabyte.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small model has several."""
    monkeypatch.setattr(plan_module, "UNIT_BYTES", 1 << 20)
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(transfer, "_PIECE", 1 << 17)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ancestor and three fine-tunes of 5 MB, in four shards each; ``c`` is cut elsewhere."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4000, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512
    )
    folder = tmp_path_factory.mktemp("streamed")
    base = BertForSequenceClassification(config)
    for number, name in enumerate(("base", "a", "b", "c")):
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
                ours.copy_(theirs + 0.004 * number * torch.randn(theirs.shape))
        model.save_pretrained(folder / name, max_shard_size="700KB" if name == "c" else "1.5MB")
        card = f"---\nlicense: mit\n{'base_model: acme/base' if number else 'language: en'}\n---\n"
        (folder / name / "README.md").write_text(card)
    return folder


@pytest.fixture
def repos(publish: Callable[..., str], family: Path) -> list[str]:
    """Them on the Hub; the ancestor too."""
    publish("base", family / "base")
    return [publish(name, family / name) for name in "abc"]


@pytest.fixture
def plain(family: Path, tmp_path: Path) -> Soup:
    """The soup of the folders."""
    recipe = Recipe(ingredients=[str(family / name) for name in "abc"], base=str(family / "base"))
    return cook(recipe, tmp_path / "plain", say=lambda _: None)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def cached_weights() -> list[str]:
    return [path.name for path in transfer.cache_folder().rglob("*.safetensors")]


def watch(folder: Path) -> Iterator[list[int]]:
    """Sizes of what lies in a folder, looked at again and again."""
    found, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                found.append(sum(path.stat().st_size for path in folder.iterdir()))
            except FileNotFoundError:
                continue
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    stop.set()
    thread.join()


def asked_of(request: Request) -> int:
    """How many bytes of a large file a request asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    return int(found[2]) - int(found[1]) + 1 if found and request.url.path.startswith("/cdn/") else 0


def delayed(seconds: float, path: str = "/cdn/") -> Callable[[Request], object]:
    async def intercept(request: Request) -> None:
        if path in request.url.path and request.method == "GET":
            await anyio.sleep(seconds)

    return intercept


# ---- what it promises ---------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_any_other_way(repos: list[str], plain: Soup, tmp_path: Path) -> None:
    """And the ingredients' weights are neither in the cache nor anywhere else afterwards."""
    soup = cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    assert soup.digest == plain.digest
    assert weights(soup.folder) == weights(plain.folder)
    assert cached_weights() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "hub", "plain", "soup"]
    again = cook(repos, tmp_path / "again", say=lambda _: None)
    assert again.digest == soup.digest
    assert len(cached_weights()) > 10


def test_no_more_lies_on_the_disk_than_was_said(
    online: LocalHub, repos: list[str], tmp_path: Path, cli: Callable[..., object]
) -> None:
    """One file of each ingredient that is cut alike; the plan says how much before anything is fetched."""
    told = cli("cook", *repos[:2], "-o", "soup", "--stream", "--dry-run", "--json").json  # type: ignore[attr-defined]
    peak = told["output_disk_bytes"] - told["output_bytes"]
    assert told["cache_disk_bytes"] == 0
    assert 0 < peak < told["fetch_bytes"] / 2
    online.intercept = delayed(0.05)
    watching = watch(tmp_path / ".soup.cooking" / "fetched")
    found = next(watching)
    cook(repos[:2], tmp_path / "soup", stream=True, say=lambda _: None)
    next(watching, None)
    assert 0.5 * peak < max(found) <= peak


def test_ingredients_that_are_cut_differently_need_more_and_it_is_said(
    repos: list[str], tmp_path: Path, cli: Callable[..., object]
) -> None:
    told = cli("cook", *repos, "-o", "soup", "--stream", "--dry-run", "--json").json  # type: ignore[attr-defined]
    peak = told["output_disk_bytes"] - told["output_bytes"]
    watching = watch(tmp_path / ".soup.cooking" / "fetched")
    found = next(watching)
    cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    next(watching, None)
    assert 0 < max(found) <= peak


def test_a_file_in_the_cache_is_used(online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path) -> None:
    cook(repos[:2], tmp_path / "first", say=lambda _: None)
    before = len(online.requests)
    soup = cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    fetched = [request.path for request in online.requests[before:] if request.path.endswith(".safetensors")]
    assert any(path.startswith("/acme/c/") for path in fetched)
    assert not [path for path in fetched if path.startswith(("/acme/a/", "/acme/b/"))]
    assert soup.digest == plain.digest


def test_merging_goes_on_while_files_arrive(
    online: LocalHub, repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first unit is written before the first file of anyone is complete."""
    first_write: list[dict[Path, int]] = []
    write = os.pwrite
    fetched = tmp_path / ".soup.cooking" / "fetched"

    def noticing(descriptor: int, data: memoryview, offset: int) -> int:
        if not first_write:
            first_write.append({path: path.stat().st_size for path in fetched.iterdir()})
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noticing)
    monkeypatch.setattr(transfer, "_PIECE", 1 << 14)
    original = SourceFile.arrive

    def slowly(self: SourceFile, arrived: int) -> None:
        original(self, arrived)
        time.sleep(0.002)

    monkeypatch.setattr(SourceFile, "arrive", slowly)
    soup = cook(repos[:2], tmp_path / "soup", stream=True, threads=1, say=lambda _: None)
    assert soup.resumed == 0
    shards = {path.stat().st_size for path in (online.store.root).rglob("*") if path.is_file()}
    assert all(size not in shards for size in first_write[0].values()), first_write


@pytest.mark.parametrize("key", ["score", "report"])
def test_scores_need_the_ingredients_again_and_again(key: str, tmp_path: Path) -> None:
    scoring = {"task": "text-classification", "dataset": "rows.csv", "metric": "accuracy"}
    recipe = Recipe(ingredients=["acme/a", "acme/b"], **{key: scoring if key == "score" else [scoring]})
    with pytest.raises(RecipeError, match=r"`--stream` drops every file after its last use, and scoring reads"):
        cook(recipe, tmp_path / "soup", stream=True)


# ---- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_breaks_goes_on_where_it_was(
    online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "pause_after", lambda *_: 0.0)
    monkeypatch.setattr(transfer, "pause_after", lambda *_: 0.0)
    breaks = [6]

    def transform(request: Request, response: Response) -> Response:
        if asked_of(request) < 600_000 or not breaks[0]:
            return response
        breaks[0] -= 1
        return Hangup(response, 400_000, reset=reset)

    online.transform = transform
    soup = cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    assert soup.digest == plain.digest
    assert breaks == [0]
    ranges = [request.range for request in online.requests if request.path.startswith("/cdn/")]
    assert reset or any(each.startswith(f"bytes={400_000 // (1 << 17) << 17}-") for each in ranges)


def test_wrong_bytes_become_no_soup_and_the_next_run_is_right(
    online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path
) -> None:
    """Units that were made of a file whose sha256 was wrong are made again, though they were written."""
    flips = [True]

    def flip(request: Request, response: Response) -> Response:
        if asked_of(request) > 900_000 and flips:
            flips.clear()
            wrong = bytearray(Path(response.path).read_bytes())  # type: ignore[attr-defined]
            wrong[-1000] ^= 4
            return Response(bytes(wrong))
        return response

    online.transform = flip
    with pytest.raises(ResolveError, match="not the ones that the Hub states") as raised:
        cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    assert "run the same command again" in raised.value.hint
    assert not (tmp_path / "soup").exists()
    soup = cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    assert soup.digest == plain.digest
    assert not flips


def test_a_file_that_is_not_there_any_more_is_one_clear_error(
    online: LocalHub, repos: list[str], tmp_path: Path
) -> None:
    seen: list[str] = []

    def gone(request: Request) -> Response | None:
        if "/resolve/" in request.url.path and request.url.path.endswith("00004-of-00004.safetensors"):
            seen.append(request.headers.get("range", ""))
            if len(seen) > 4:
                return Response("{}", 404, headers={"X-Error-Code": "EntryNotFound"})
        return None

    online.intercept = gone
    with pytest.raises(ResolveError, match=r"acme/[ab]@.*model-00004-of-00004.safetensors': the file is not in"):
        cook(repos[:2], tmp_path / "soup", stream=True, say=lambda _: None)


def test_a_disk_that_fills_is_one_clear_error(
    repos: list[str], plain: Soup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a download; then the same command goes on."""
    original = SourceFile.arrive
    calls = []

    def full(self: SourceFile, arrived: int) -> None:
        calls.append(arrived)
        if len(calls) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, arrived)

    with monkeypatch.context() as patched:
        patched.setattr(SourceFile, "arrive", full)
        with pytest.raises(MergeError, match="No space left on device"):
            cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    soup = cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    assert soup.digest == plain.digest


def test_killed_while_it_streams(
    online: LocalHub, environment: dict[str, str], repos: list[str], plain: Soup, tmp_path: Path
) -> None:
    """What was fetched and right stays; what was fetched in part goes on from there; the bytes are the same."""
    code = (
        "import sys, time\nfrom hf_soup import cook, plan, transfer\nfrom hf_soup.supply import SourceFile\n"
        "plan.UNIT_BYTES, plan.BLOCK_BYTES, transfer._PIECE = 1 << 20, 1 << 18, 1 << 16\n"
        "arrive = SourceFile.arrive\n"
        "def slowly(self, arrived):\n    arrive(self, arrived)\n    time.sleep(0.01)\n"
        "SourceFile.arrive = slowly\n"
        "cook(sys.argv[1:], 'soup', stream=True, threads=1)\n"
    )
    journal = tmp_path / ".soup.cooking" / "journal.0"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *repos], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while child.poll() is None and (not journal.exists() or len(journal.read_text().splitlines()) < 3):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    _, said = child.communicate(timeout=10)
    assert child.returncode == -signal.SIGKILL, said
    noted = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("]")]
    parts = {path.name: path.stat().st_size for path in (tmp_path / ".soup.cooking" / "fetched").iterdir()}
    assert len(noted) >= 3
    assert any(parts.values())
    before = len(online.requests)
    soup = cook(repos, tmp_path / "soup", stream=True, say=lambda _: None)
    assert soup.resumed > 0
    assert soup.digest == plain.digest
    ranges = {request.range for request in online.requests[before:] if request.path.startswith("/cdn/")}
    assert any(f"bytes={size}-" in each for each in ranges for size in parts.values() if size)


# ---- the plan of what lies beside ---------------------------------------------------------------------------


def test_the_peak_is_that_of_the_files_that_overlap(tmp_path: Path) -> None:
    """Two sources: one in three files, the other in one; worked out by hand."""
    size = 1 << 20
    names = ["t0", "t1", "t2"]
    cut = {name: TensorInfo(name, "BF16", (size // 2,), f"{name}.st", 100, size) for name in names}
    whole = {n: TensorInfo(n, "BF16", (size // 2,), "all.st", 100 + i * size, size) for i, n in enumerate(names)}
    plan = make_plan(["cut", "whole"], [cut, whole], [1.0, 1.0])

    def fetched(bytes_: int) -> SourceFile:
        return SourceFile(bytes_, tmp_path / "x", fetch=lambda file: None, dropped=True)

    sources = [{f"{name}.st": fetched(10 + i) for i, name in enumerate(names)}, {"all.st": fetched(1000)}]
    assert Supply(sources).peak_bytes(plan) == 1012
    assert Supply([sources[0], {"all.st": SourceFile(1000, tmp_path / "x")}]).peak_bytes(plan) == 12
