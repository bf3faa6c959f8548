"""`--stream`: straight from the Hub, no more on the disk than what is being read, and the bytes of any other way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
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
from hub_faults import Hangup
from plans import make_plan
from safetensors.torch import load_file, save_file
from starlette.requests import Request
from starlette.responses import Response
from transformers import BertConfig, BertForSequenceClassification

from hf_soup import MergeError, Recipe, RecipeError, ResolveError, Soup, cook
from hf_soup.checkpoint import TensorInfo, sampling
from hf_soup.hub import client, download as transfer
from hf_soup.local_hub import LocalHub
from hf_soup.merging import layout, plan as plan_module
from hf_soup.merging.weight_files import WeightFile, WeightFiles

# The client's own, where it uploads files of more than a megabyte.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def _small_units() -> Iterator[None]:
    """So that a small model has several; and a check, which is not looked at here, asks for samples that lie apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "UNIT_BYTES", 1 << 20)
        patch.setattr(layout, "BLOCK_BYTES", 1 << 18)
        patch.setattr(transfer, "_PIECE", 1 << 17)
        patch.setattr(sampling, "_GAP", 1 << 19)
        yield


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


@pytest.fixture(scope="module")
def module_hub(family: Path, module_path: Path) -> Iterator[LocalHub]:
    """A Hub that has them; the ancestor too."""
    with LocalHub(module_path / "hub") as hub:
        for name in ("base", "a", "b", "c"):
            put(hub, f"acme/{name}", family / name)
        yield hub


def put(hub: LocalHub, repo_id: str, folder: Path) -> str:
    """On the Hub without HTTP, which is slow."""
    store = hub.store
    changes = [store.put(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    repo = store.create("model", repo_id, private=False, author="acme")
    store.commit(repo, "main", changes, ("Upload folder", "", "acme"), None)
    return repo_id


@pytest.fixture
def local_hub(module_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """No test changes what is there, and each begins without faults and addresses."""
    monkeypatch.setattr(transfer, "_signed", {})
    module_hub.intercept = module_hub.transform = None
    module_hub.requests.clear()
    return module_hub


@pytest.fixture
def repos(online: LocalHub) -> list[str]:
    return [f"acme/{name}" for name in "abc"]


@pytest.fixture(scope="module")
def plain(family: Path, module_path: Path) -> Soup:
    """The soup of the folders."""
    recipe = Recipe(ingredients=[str(family / name) for name in "abc"], base_model=str(family / "base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "ATTEMPTS", 1)  # there is no Hub that knows what the cards name
        return cook(recipe, module_path / "plain")


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


def test_the_bytes_are_those_of_any_other_way(
    repos: list[str], plain: Soup, tmp_path: Path, cli: Callable[..., object]
) -> None:
    """And the ingredients' weights are neither in the cache nor anywhere else afterwards.

    Those that are cut differently need more on the disk, and it is said.
    """
    told = cli("cook", *repos, "-o", "soup", "--stream", "--dry-run", "--json").json  # type: ignore[attr-defined]
    peak = told["output_disk_bytes"] - told["output_bytes"]
    watching = watch(tmp_path / ".soup.cooking" / "fetched")
    found = next(watching)
    soup = cook(repos, tmp_path / "soup", stream=True)
    next(watching, None)
    assert 0 < max(found) <= peak
    assert soup.digest == plain.digest
    assert weights(soup.folder) == weights(plain.folder)
    assert cached_weights() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "soup"]
    again = cook(repos, tmp_path / "again")
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
    cook(repos[:2], tmp_path / "soup", stream=True)
    next(watching, None)
    assert 0.5 * peak < max(found) <= peak


def test_a_file_in_the_cache_is_used(online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path) -> None:
    cook(repos[:2], tmp_path / "first")
    before = len(online.requests)
    soup = cook(repos, tmp_path / "soup", stream=True)
    whole = [request.path for request in online.requests[before:] if re.match(r"bytes=0-\d{6}", request.range)]
    assert any(path.startswith("/acme/c/") for path in whole)
    assert not [path for path in whole if path.startswith(("/acme/a/", "/acme/b/"))]
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
    original = WeightFiles.arrived

    def slowly(self: WeightFiles, file: WeightFile, count: int) -> None:
        original(self, file, count)
        time.sleep(0.002)

    monkeypatch.setattr(WeightFiles, "arrived", slowly)
    soup = cook(repos[:2], tmp_path / "soup", stream=True, threads=1)
    assert soup.resumed == 0
    shards = {path.stat().st_size for path in (online.store.root).rglob("*") if path.is_file()}
    assert all(size not in shards for size in first_write[0].values()), first_write


@pytest.mark.parametrize("key", ["validation", "test"])
def test_scores_need_the_ingredients_again_and_again(key: str, tmp_path: Path) -> None:
    scoring = {"task": "text-classification", "dataset": "rows.csv", "metric": "accuracy"}
    recipe = Recipe(ingredients=["acme/a", "acme/b"], **{key: scoring if key == "validation" else [scoring]})
    with pytest.raises(RecipeError, match=r"`--stream` drops every file after its last use, and scoring reads"):
        cook(recipe, tmp_path / "soup", stream=True)


def test_tensors_in_another_order_in_every_source(
    online: LocalHub, family: Path, repos: list[str], plain: Soup, tmp_path: Path
) -> None:
    """Every second tensor in another file, so that the first unit but one needs a file while the other is in use."""
    mixed = tmp_path / "mixed"
    shutil.copytree(family / "b", mixed, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((family / "b").glob("*.safetensors")):
        tensors |= load_file(path)
    names = list(tensors)
    weight_map = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, mixed / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    (mixed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    models = [repos[0], put(online, "acme/mixed", mixed), repos[2]]
    done: list[Soup] = []
    thread = threading.Thread(target=lambda: done.append(cook(models, tmp_path / "soup", stream=True)), daemon=True)
    thread.start()
    thread.join(60)
    assert done, "it waits for ever"
    assert done[0].digest == plain.digest


def test_an_ingredient_of_weight_0_is_not_fetched(
    online: LocalHub, repos: list[str], tmp_path: Path, cli: Callable[..., object]
) -> None:
    """And does not count in the plan."""
    recipe = Recipe(ingredients=[repos[0], {"model": repos[2], "weight": 0}, repos[1]])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    two = cli("cook", *repos[:2], "-o", "two", "--stream", "--dry-run", "--json").json  # type: ignore[attr-defined]
    three = cli("cook", "recipe.yaml", "-o", "three", "--stream", "--dry-run", "--json").json  # type: ignore[attr-defined]
    for key in ("fetch_bytes", "output_disk_bytes", "cache_disk_bytes"):
        assert three[key] == two[key], key
    before = len(online.requests)
    cook(recipe, tmp_path / "soup", stream=True)
    whole = [request.path for request in online.requests[before:] if re.match(r"bytes=0-\d{6}", request.range)]
    assert whole
    assert not [path for path in whole if path.startswith("/acme/c/")]


# ---- what goes wrong ----------------------------------------------------------------------------------------


def test_a_connection_that_breaks_goes_on_where_it_was(
    online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is closed or reset."""
    monkeypatch.setattr(client, "pause_after", lambda *_: 0.0)
    monkeypatch.setattr(transfer, "pause_after", lambda *_: 0.0)
    breaks = [8]

    def transform(request: Request, response: Response) -> Response:
        if asked_of(request) < 600_000 or not breaks[0] or not (tmp_path / ".soup.cooking").exists():
            return response
        breaks[0] -= 1
        return Hangup(response, 400_000, reset=breaks[0] % 2 == 0)

    online.transform = transform
    soup = cook(repos, tmp_path / "soup", stream=True)
    assert soup.digest == plain.digest
    assert breaks == [0]
    ranges = [request.range for request in online.requests if request.path.startswith("/cdn/")]
    assert any(each.startswith(f"bytes={400_000 // (1 << 17) << 17}-") for each in ranges)


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_wrong_bytes_become_no_soup_and_the_next_run_is_right(
    online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """Units that were made of a file whose sha256 was wrong are made again, though they were written.

    Also where the file is gone for a while before its fetch says so.
    """
    unlink = Path.unlink

    def slowly(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        time.sleep(pause if path.parent.name == "fetched" else 0)

    monkeypatch.setattr(Path, "unlink", slowly)
    flips = [True]

    def flip(request: Request, response: Response) -> Response:
        if asked_of(request) > 900_000 and flips and (tmp_path / ".soup.cooking").exists():
            flips.clear()
            wrong = bytearray(Path(response.path).read_bytes())  # type: ignore[attr-defined]
            wrong[-1000] ^= 4
            return Response(bytes(wrong))
        return response

    online.transform = flip
    with pytest.raises(ResolveError, match="not the ones that the Hub states") as raised:
        cook(repos, tmp_path / "soup", stream=True)
    assert "run the same command again" in raised.value.hint
    assert not (tmp_path / "soup").exists()
    soup = cook(repos, tmp_path / "soup", stream=True)
    assert soup.digest == plain.digest
    assert not flips


@pytest.mark.parametrize("stream", [True, False])
def test_a_header_that_is_not_the_files_becomes_no_soup(
    online: LocalHub, repos: list[str], plain: Soup, tmp_path: Path, stream: bool
) -> None:
    """The check reads it alone; that two tensors changed their names in it shows when the file is here."""

    def lie(request: Request, response: Response) -> Response:
        if request.headers.get("range") != "bytes=0-99999" or not request.url.path.startswith("/cdn/"):
            return response
        data = Path(response.path).read_bytes()  # type: ignore[attr-defined]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        places: dict[str, str] = {}
        for name, entry in header.items():
            if name != "__metadata__" and (twin := places.setdefault(str(entry["shape"]), name)) != name:
                header[name]["data_offsets"], header[twin]["data_offsets"] = (
                    header[twin]["data_offsets"], entry["data_offsets"],
                )  # fmt: skip
                break
        text = json.dumps(header, separators=(",", ":")).encode()
        return Response((data[:8] + text.ljust(length) + data[8 + length :])[:100_000], 206)

    online.transform = lie
    with pytest.raises(ResolveError, match="is not that of the file, whose bytes are right"):
        cook(repos, tmp_path / "soup", stream=stream)
    assert not (tmp_path / "soup").exists()
    online.transform = None
    assert cook(repos, tmp_path / "soup", stream=stream).digest == plain.digest


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(repos: list[str], plain: Soup, tmp_path: Path) -> None:
    """In its header too, which is not believed until the file is known to be right."""
    cook(repos, tmp_path / "first")
    blob = max(transfer.cache_folder().rglob("*.safetensors"), key=lambda path: path.stat().st_size).resolve()
    right = blob.read_bytes()
    for place in (2000, -1000):
        data = bytearray(right)
        data[place] ^= 1
        time.sleep(0.06)
        blob.write_bytes(data)
        soup = cook(repos, tmp_path / f"soup {place}")
        assert soup.digest == plain.digest
        assert blob.read_bytes() == right


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
        cook(repos[:2], tmp_path / "soup", stream=True)


def test_a_disk_that_fills_is_one_clear_error(
    repos: list[str], plain: Soup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a download; then the same command goes on."""
    original = WeightFiles.arrived
    calls = []

    def full(self: WeightFiles, file: WeightFile, count: int) -> None:
        calls.append(count)
        if len(calls) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, file, count)

    with monkeypatch.context() as patched:
        patched.setattr(WeightFiles, "arrived", full)
        with pytest.raises(MergeError, match="No space left on device"):
            cook(repos, tmp_path / "soup", stream=True)
    soup = cook(repos, tmp_path / "soup", stream=True)
    assert soup.digest == plain.digest


def test_killed_while_it_streams(
    online: LocalHub, environment: dict[str, str], repos: list[str], plain: Soup, tmp_path: Path
) -> None:
    """What was fetched and right stays; what was fetched in part goes on from there; the bytes are the same."""
    journal = tmp_path / ".soup.cooking" / "journal.0"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from hf_soup import cook\nfrom hf_soup.merging import layout, plan\n"
        "from hf_soup.hub import download as transfer\nfrom hf_soup.merging.weight_files import WeightFiles\n"
        "plan.UNIT_BYTES, layout.BLOCK_BYTES, transfer._PIECE = 1 << 20, 1 << 18, 1 << 16\n"
        "arrived, journal = WeightFiles.arrived, Path(sys.argv[1])\n"
        "def slowly(self, file, count):\n"
        "    arrived(self, file, count)\n    time.sleep(0.004)\n"
        "    if count < file.size and journal.exists() and journal.read_bytes().count(b'\\n') >= 3:\n"
        "        print(flush=True)\n        time.sleep(60)\n"
        "WeightFiles.arrived = slowly\n"
        "cook(sys.argv[2:], 'soup', stream=True, threads=1)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, journal, *repos], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout
    child.stdout.readline()  # three units are written, and a file is there in part
    child.send_signal(signal.SIGKILL)
    _, said = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, said
    noted = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("]")]
    parts = {path.name: path.stat().st_size for path in (tmp_path / ".soup.cooking" / "fetched").iterdir()}
    assert len(noted) >= 3
    assert any(parts.values())
    before = len(online.requests)
    soup = cook(repos, tmp_path / "soup", stream=True)
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

    def fetched(bytes_: int) -> WeightFile:
        return WeightFile(bytes_, tmp_path / "x", fetch=lambda file: None, dropped=True)

    sources = [{f"{name}.st": fetched(10 + i) for i, name in enumerate(names)}, {"all.st": fetched(1000)}]
    assert WeightFiles(sources).peak_bytes(plan) == 1012
    assert WeightFiles([sources[0], {"all.st": WeightFile(1000, tmp_path / "x")}]).peak_bytes(plan) == 12
