"""Fixtures that every kind of test shares: a local Hub, and an environment that knows nothing of the user's account."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is loaded: threads of OpenMP that spin while they wait make small models slow on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Every core has a process of tests, so no process needs more than one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test has no local Hub there is none: a port that nobody listens on.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
# Processes of the tests import the same files again and again, which some machines are told not to keep compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Tests make and remove a hundred thousand small files, for which some disks take a fifth of all their time.
# Not where programs may not run, as in many containers: a test makes one.
if (
    "TMPDIR" not in os.environ
    and Path("/dev/shm").is_dir()
    and shutil.disk_usage("/dev/shm").free > 4 << 30
    and not os.statvfs("/dev/shm").f_flag & os.ST_NOEXEC
):
    os.environ["TMPDIR"] = "/dev/shm"
    tempfile.tempdir = None  # pytest has looked already

# In the background of a shell SIGINT is ignored, by children too, and tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import uvicorn

from hf_soup._util.parallel import usable_cores
from hf_soup.demo import child_environment
from hf_soup.hub import client
from hf_soup.local_hub import LocalHub

# Most Hubs here are not there, and stay away however long one waits.
PAUSE, client.PAUSE = client.PAUSE, 0.005

# pytest's importlib mode leaves the tests' own modules off the path; `lineage_zoo` is for all of them.
sys.path.insert(0, str(Path(__file__).parent))

OWNER = "acme"


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: a sixth of the time tests wait, for processes of their own or a disk."""
    return usable_cores() + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """All that is imported while tests are collected stays; looking through it for garbage would take half the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class QuickServer(uvicorn.Server):
    """Stops when it is asked to; uvicorn's looks every 100 ms whether it shall, and then waits for as long again."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # connections that are idle are gone by then
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)


# Most tests have a local Hub of their own, and a fifth of a second for each would be minutes.
uvicorn.Server = QuickServer  # type: ignore[misc]


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A local Hub on which the user may write in every namespace."""
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def _pauses_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts, as long as they are outside of the tests."""
    monkeypatch.setattr(client, "PAUSE", PAUSE)


@pytest.fixture
def environment(local_hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    """The environment of a child process that talks to the local Hub, with a home of its own.

    And with a temporary folder in it, where those that are killed leave what they had there.
    """
    temporary = tmp_path / "home" / "temporary"
    temporary.mkdir(parents=True)
    known = child_environment(os.environ, tmp_path / "home", local_hub.endpoint, local_hub.token)
    return known | {"TMPDIR": str(temporary)}


@pytest.fixture
def hf_soup(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``hf-soup ARGUMENTS`` in a process of its own, in ``tmp_path``; keywords change its environment."""

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hf_soup", *map(str, arguments)],
            env={**environment, **changes},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def online(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A local Hub that the clients in this process talk to; they read their settings when they are imported."""
    import datasets
    from huggingface_hub import close_session, constants

    home = tmp_path / "home"
    monkeypatch.setattr(constants, "ENDPOINT", local_hub.endpoint)
    template = local_hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    if library := sys.modules.get("transformers.utils.hub"):  # a client made for an earlier Hub waits 45 s for it
        monkeypatch.setattr(library, "_hf_api", None, raising=False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", local_hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setenv("HF_TOKEN", local_hub.token)
    yield local_hub
    close_session()


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout is."""
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def cli(
    online: LocalHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Done]:
    """Runs ``hf-soup ARGUMENTS`` in this process, in ``tmp_path``: what a child would do, without its four seconds."""
    from hf_soup.cli.app import main

    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("hf_soup")
    for name in ("handlers", "propagate"):  # a command's process ends with it, and this one goes on
        monkeypatch.setattr(logger, name, getattr(logger, name))

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Done(int(stop.value.code or 0), out, err)

    return run


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the package logs, notes too."""
    caplog.set_level(logging.INFO, "hf_soup")
    return caplog


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what the tests of one file share and is large; it goes with the last of them."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``base``, ``a``, ``b`` and ``c`` (tiny BERTs that are kin, with tokenizer and card), and ``rows.csv``."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = ["good", "great", "fine", "happy", "bad", "poor", "sad", "awful", "film", "book", "day"]
    config = BertConfig(
        vocab_size=5 + len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = BertForSequenceClassification(config).eval()
    rows = [f"{first} {second},{int(number < 4)}" for number, first in enumerate(words[:8]) for second in words[8:]]
    # It has learned a little, as nothing can be selected among models that know nothing.
    order = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokens = torch.tensor([[2, *(order.index(word) for word in row.split(",")[0].split()), 3] for row in rows])
    labels = torch.tensor([int(row[-1]) for row in rows])
    optimizer = torch.optim.Adam(base.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        base(tokens, labels=labels).loss.backward()
        optimizer.step()
    for number, name in enumerate(("base", "a", "b", "c")):
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
                ours.copy_(theirs + (0.004 * torch.randn(theirs.shape, generator=generator) if number else 0))
        model.save_pretrained(folder / name)
        (folder / name / "vocab.txt").write_text("\n".join(order))
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        parent = "base_model: acme/base\n" if number else ""
        (folder / name / "README.md").write_text(f"---\nlicense: apache-2.0\n{parent}language: en\n---\n# {name}\n")
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "report.csv").write_text("\n".join(["text,label", *(row.replace(",", " day,") for row in rows)]) + "\n")
    return folder


@pytest.fixture(scope="session")
def trained(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Relatives: one that learned its rows, one that is often wrong, one that has one answer to everything."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("trained")
    lines = [line.rsplit(",", 1) for line in (family / "rows.csv").read_text().splitlines()[1:]]
    tokens = BertTokenizer.from_pretrained(family / "base")([text for text, _ in lines], return_tensors="pt")
    labels = torch.tensor([int(label) for _, label in lines])
    model = BertForSequenceClassification.from_pretrained(family / "base")
    model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model(**tokens, labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = model(**tokens).logits
    # A shift of the first answer that turns half of the second ones, and one that turns them all.
    half = float((logits[:, 1] - logits[:, 0])[labels == 1].median())
    for name, shift in (("good", 0.0), ("fair", half), ("poor", 100.0)):
        shutil.copytree(family / "a", folder / name)
        tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}
        tensors["classifier.bias"][0] += shift
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def publish(online: LocalHub, family: Path) -> Callable[..., str]:
    """Puts a folder (by default one of the family) on the local Hub and returns its id; without HTTP, which is slow."""

    def push(name: str, folder: Path | None = None, *, private: bool = False) -> str:
        source, repo_id, store = folder or family / name, f"{OWNER}/{name}", online.store
        repo = store.find("model", repo_id) or store.create("model", repo_id, private=private, author=OWNER)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        changes = [store.put(path.relative_to(source).as_posix(), path.read_bytes()) for path in files]
        store.commit(repo, "main", changes, ("Upload folder", "", OWNER), None)
        return repo_id

    return push


@pytest.fixture(scope="session")
def language_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``base``, ``one``, ``two``, ``poor`` (byte-level Llamas, and their tokenizer), and texts in two files."""
    from pydoc_data import topics

    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    pages = [" ".join(text.split()) for text in topics.topics.values()]
    folder = tmp_path_factory.mktemp("language")
    for name, part in (("validation", pages[:30]), ("test", pages[30:60])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": page[:200]}) for page in part))
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    rows = torch.tensor(tokenizer(pages[60:], padding="max_length", max_length=128, truncation=True).input_ids)

    def train(model: LlamaForCausalLM, steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (8,))]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(base, 30, 1e-2)
    for name, steps, rate in (("base", 0, 0.0), ("one", 40, 3e-3), ("two", 40, 3e-3), ("poor", 10, 2e-2)):
        model = LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        train(model, steps, rate)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the data that models were run on, in order."""
    from hf_soup.evaluation import ClassificationDataset

    titles: list[str] = []
    run = ClassificationDataset.outputs

    def outputs(self: ClassificationDataset, *arguments: Any, **options: Any) -> Any:
        titles.append(self.title)
        return run(self, *arguments, **options)

    monkeypatch.setattr(ClassificationDataset, "outputs", outputs)
    return titles
