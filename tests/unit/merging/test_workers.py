"""Processes that compute units of a merge: the same bytes as by threads, and nobody left behind whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plans import files_here, make_plan
from safetensors.torch import load_file, save_file

from hf_soup.checkpoint import TensorInfo, read_header
from hf_soup.errors import MergeError
from hf_soup.hub import file_digests as digests
from hf_soup.merging import (
    BLOCK_BYTES,
    MergeResult,
    Plan,
    StatisticsStore,
    Workspace,
    merge,
    plan as plan_module,
    workers,
)
from hf_soup.merging.arithmetic import Aids
from hf_soup.merging.engine import Engine
from hf_soup.merging.weight_files import WeightFile, WeightFiles
from hf_soup.methods import METHODS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads do the work")
#: Of one kind each: sums, cutoffs, what is measured, random numbers.
METHODS_OF_SLICES = ["linear", "ties", "model_stock", "dare_linear"]
ALONE = workers.is_only_thread


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are many units, and worth processes; threads of the tests do no harm."""
    monkeypatch.setattr(workers, "is_only_thread", lambda: True)
    monkeypatch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(workers, "_WORTH", 1 << 20)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes were begun, each time some were."""
    found, begin = list[int](), workers.forked

    def counted(engine: Engine, count: int) -> Any:
        found.append(count)
        return begin(engine, count)

    monkeypatch.setattr("hf_soup.merging.to_files.forked", counted)
    return found


class Pot:
    """Three ingredients and their ancestor, of six blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[dict[str, Path]] = []
        self.headers: list[dict[str, TensorInfo]] = []
        for number in range(4):
            drawn = torch.Generator().manual_seed(number)
            tensors = {
                f"{layer}.weight": (0.05 * torch.randn((1024, 2048), generator=drawn)).bfloat16() for layer in range(6)
            }
            path = folder / f"{number}.safetensors"
            save_file(tensors, path)
            self.keep(path)

    def keep(self, path: Path) -> None:
        data = path.read_bytes()
        header = read_header(lambda _, start, stop: data[start:stop], "m", len(data), "m")
        self.headers.append({info.name: info for info in header})
        self.paths.append({"m": path})

    def plan(self, method: str, **options: Any) -> Plan:
        count = 3 + METHODS[method].needs_base
        weights = [0.5, 1.25, 3.0, 0.0][:count]
        return make_plan(
            list("0123")[:count], self.headers[:count], weights, method=method,
            with_base=METHODS[method].needs_base, **options,
        )  # fmt: skip

    def cook(
        self, plan: Plan, name: str, threads: int, follow: Sequence[Path] = (), supply: WeightFiles | None = None
    ) -> MergeResult:
        paths = self.paths[: len(plan.layout.labels)]
        supply = supply or files_here(paths, follow)
        with Workspace(self.folder / name) as staging:
            staging.open(plan.fingerprint, plan.outline())
            merged = merge(plan, supply, staging, threads=threads, quiet=True)
            staging.publish()
        return merged


@pytest.fixture(scope="module")
def shelf(module_path: Path) -> Pot:
    return Pot(module_path)


@pytest.fixture(scope="module")
def expected(shelf: Pot) -> MergeResult:
    """The mean, by one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)
        return shelf.cook(shelf.plan("linear"), "expected", threads=1)


@pytest.fixture
def pot(shelf: Pot, tmp_path: Path) -> Pot:
    """With a folder of its own for what is made."""
    mine = object.__new__(Pot)
    mine.folder, mine.paths, mine.headers = tmp_path, shelf.paths, shelf.headers
    return mine


@pytest.mark.parametrize("method", METHODS_OF_SLICES)
def test_processes_write_what_threads_do(pot: Pot, method: str, forks: list[int]) -> None:
    plan = pot.plan(method, seed=3)
    one = pot.cook(plan, "one", threads=1)
    assert not forks
    assert pot.cook(plan, "by 3", threads=3) == one
    assert forks == [3]
    assert load_file(pot.folder / "by 3" / "model.safetensors").keys() == pot.headers[0].keys()
    assert not multiprocessing.active_children()


def test_files_are_hashed_in_their_wake(pot: Pot, forks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that remembers it, as the others see each a part of the units."""
    remembered = dict[Path, str]()
    monkeypatch.setattr(
        digests, "remember_sha256", lambda path, stamp, digest, since: remembered.update({path: digest})
    )
    paths = [path for source in pot.paths[:3] for path in source.values()]
    pot.cook(pot.plan("linear"), "soup", threads=2, follow=paths)
    assert forks
    assert remembered == {path: digests.hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("missing", [0, 1])
def test_what_lies_in_the_cache_is_here(pot: Pot, missing: int, forks: list[int]) -> None:
    """What the Hub's cache holds is found there when it is asked for."""

    def found(path: Path) -> WeightFile:
        return WeightFile(missing * path.stat().st_size, None, fetch=lambda file: setattr(file, "path", path))

    supply = WeightFiles([{"m": found(source["m"])} for source in pot.paths[:3]])
    pot.cook(pot.plan("linear"), "soup", threads=2, supply=supply)
    assert len(forks) == 1 - missing


def test_who_does_the_work(pot: Pot, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process where there is little to do, where files are yet to come, and where tensors are held whole."""

    def may(plan: Plan, supply: WeightFiles | None = None, size: int = 1 << 30, count: int = 2) -> bool:
        supply = supply or files_here(pot.paths[: len(plan.layout.labels)])
        return workers.may_fork(Engine(plan, supply, [], count, Aids({}, StatisticsStore(plan))), size, count)

    plan = pot.plan("linear")
    assert may(plan)
    assert not may(plan, count=1)
    assert not may(plan, size=(2 << 20) - 1)
    coming = [{"m": WeightFile(1, None, fetch=lambda file: None)} for _ in range(3)]
    assert not may(plan, WeightFiles(coming))
    assert may(pot.plan("slerp" if METHODS["slerp"].least > 3 else "karcher"))
    assert not may(pot.plan("della"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not may(plan)


def test_no_process_is_begun_beside_other_threads() -> None:
    """Fork waits for ever for a thread that is in OpenBLAS, and a new process for locks that others held."""
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(ALONE).result()
        assert not ALONE()


def test_a_process_that_may_begin_no_others_works_by_threads(
    pot: Pot, forks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of pools and of data loaders."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    pot.cook(pot.plan("linear"), "soup", threads=2)
    assert not forks


@pytest.mark.parametrize("refuses", ["multiprocessing.synchronize.SemLock.__init__", "os.fork"])
def test_threads_do_it_where_there_may_be_no_other_processes(
    pot: Pot, refuses: str, expected: MergeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sandboxes have no shared memory for semaphores, and users a limit of processes."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(refuses, refused)
    assert pot.cook(pot.plan("linear"), "soup", threads=2) == expected


def test_where_only_some_may_be_begun_none_is_left(pot: Pot, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold the output's lock, and this process would wait for it at its end."""
    fork, left = os.fork, [1]

    def once() -> int:
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", once)
    pot.cook(pot.plan("linear"), "soup", threads=2)
    assert not left
    assert not multiprocessing.active_children()


def test_one_that_does_not_begin_is_not_waited_for_for_ever(pot: Pot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_begin", lambda *_: time.sleep(60))
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    pot.cook(pot.plan("linear"), "soup", threads=2)
    assert not multiprocessing.active_children()


def test_they_leave_signals_to_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program does about them is done once, and they can be ended by whoever began them."""
    found = {signal.SIGUSR1: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in found}
    engine: Any = SimpleNamespace(
        write=lambda number, _: (signal.getsignal(number), signal.pthread_sigmask(signal.SIG_BLOCK, []))
    )
    try:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
        with workers.forked(engine, 2) as write:
            assert write is not None
            assert {number: write(number) for number in found} == {  # type: ignore[comparison-overlap]
                number: (what, set()) for number, what in found.items()
            }
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_error_in_a_process_is_that_of_the_merge(pot: Pot, tmp_path: Path) -> None:
    broken = load_file(pot.paths[1]["m"])
    broken["5.weight"][7, 9] = torch.nan
    path = tmp_path / "broken.safetensors"
    save_file(broken, path)
    pot.paths = [pot.paths[0], {"m": path}, *pot.paths[2:]]
    with pytest.raises(MergeError, match=r"'5.weight' of 1 holds nan at \[7, 9\].\n.*diverged"):
        pot.cook(pot.plan("linear"), "soup", threads=2)
    assert not multiprocessing.active_children()
    assert not (pot.folder / "soup").exists()


@contextmanager
def slow_disk() -> Iterator[None]:
    """That takes 20 ms for a slice, in all processes."""
    write = os.pwrite

    def slowly(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.02)
        return write(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", slowly)
        yield


def after(condition: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """A thread that acts as soon as a condition holds."""

    def watch() -> None:
        limit = time.monotonic() + 60
        while not condition() and time.monotonic() < limit:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def journal(output: Path) -> bool:
    """Whether a unit is noted."""
    return any(path.stat().st_size for path in output.parent.glob(f".{output.name}.cooking/journal.?"))


def test_a_process_that_is_killed_is_said_and_the_work_goes_on_from_there(pot: Pot, expected: MergeResult) -> None:
    """As by SIGTERM, which does to them what it does by default."""
    plan, output = pot.plan("linear"), pot.folder / "soup"

    def kill() -> None:
        os.kill(min(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)

    killer = after(lambda: journal(output), kill)
    said = r"outside: by somebody, or .* memory\.\n.*run the same command again"
    with slow_disk(), pytest.raises(MergeError, match=said):
        pot.cook(plan, "soup", threads=2)
    killer.join()
    merged = pot.cook(plan, "soup", threads=2)
    assert merged.resumed > 0
    assert merged.digest == expected.digest


def test_ctrl_c_ends_all_of_them(pot: Pot) -> None:
    plan, output, main = pot.plan("linear"), pot.folder / "soup", threading.get_ident()
    killer = after(lambda: journal(output), lambda: signal.pthread_kill(main, signal.SIGINT))
    with slow_disk(), pytest.raises(KeyboardInterrupt):
        pot.cook(plan, "soup", threads=2)
    killer.join()
    assert not multiprocessing.active_children()
    assert 0 < pot.cook(plan, "soup", threads=2).resumed < plan.layout.size


def test_ctrl_c_waits_for_hashes_of_files_that_it_closes(pot: Pot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a thread reads from a descriptor that is by then another file's, and notes what it got."""
    main, paths = threading.get_ident(), [path for source in pot.paths[:3] for path in source.values()]
    begun, finish = threading.Event(), digests.FileHasher.finish

    def slowly(hasher: digests.FileHasher) -> str:
        begun.set()
        time.sleep(0.5)
        return finish(hasher)

    monkeypatch.setattr(digests.FileHasher, "finish", slowly)

    def interrupt() -> None:
        time.sleep(0.1)  # by when all threads are begun and waited for
        signal.pthread_kill(main, signal.SIGINT)

    killer = after(begun.is_set, interrupt)
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        pot.cook(pot.plan("linear"), "soup", threads=2, follow=paths)
    left = set(threading.enumerate()) - threads
    assert not [thread for thread in left if thread.name.startswith("ThreadPoolExecutor")]
    killer.join()


def test_they_end_with_the_first_process(pot: Pot) -> None:
    """And with it the lock is gone, so that the same command can go on at once."""
    plan, output = pot.plan("linear"), pot.folder / "soup"
    code = (
        "import pickle, os, sys, time\nfrom pathlib import Path\n"
        "from hf_soup.merging import plan as plan_module, workers\n"
        "from hf_soup.merging.to_files import merge\nfrom hf_soup.merging.layout import BLOCK_BYTES\n"
        "from hf_soup.merging.workspace import Workspace\n"
        "plan_module.UNIT_BYTES, workers._WORTH = BLOCK_BYTES, 1\nwrite = os.pwrite\n"
        "os.pwrite = lambda *given: time.sleep(0.05) or write(*given)\n"
        "with Workspace(Path(sys.argv[1])) as staging:\n"
        "    plan, supply = pickle.loads(Path(sys.argv[2]).read_bytes())\n"
        "    merge(plan, supply, staging, threads=2, quiet=True)\n"
    )
    with Workspace(output) as staging:
        staging.open(plan.fingerprint, plan.outline())
    job = pot.folder / "job"
    job.write_bytes(pickle.dumps((plan, files_here(pot.paths[:3]))))
    process = subprocess.Popen([sys.executable, "-c", code, output, job])
    try:
        limit = time.monotonic() + 60
        while not journal(output) and time.monotonic() < limit:
            time.sleep(0.01)
        children = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    finally:
        process.kill()
        process.wait()
    assert len(children) == 2
    limit = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(map(alive, children))
    assert pot.cook(plan, "soup", threads=2).resumed > 0


def alive(process: int) -> bool:
    """Whether it is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False
