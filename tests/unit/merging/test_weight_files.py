"""Files as they come: units are handed out when their bytes are here, and a file lies no longer than it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from plans import files_here, make_plan

from hf_soup.checkpoint import TensorInfo
from hf_soup.errors import ResolveError
from hf_soup.merging import Plan, plan as plan_module
from hf_soup.merging.plan import WorkUnit
from hf_soup.merging.weight_files import WeightFile, WeightFiles

BLOCK = 4 << 20


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "UNIT_BYTES", BLOCK)


def planned(*sources: list[str]) -> Plan:
    """Four tensors of one block each; a source says in which file each of its tensors is."""
    headers = []
    for files in sources:
        offsets: dict[str, int] = {}
        header = {}
        for number, file in enumerate(files):
            offset = offsets.get(file, 100)
            header[f"t{number}"] = TensorInfo(f"t{number}", "BF16", (BLOCK // 2,), file, offset, BLOCK)
            offsets[file] = offset + BLOCK
        headers.append(header)
    return make_plan([f"m{i}" for i in range(len(sources))], headers, [1.0] * len(sources))


class Hub:
    """Fetches when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        self.gates: dict[str, threading.Event] = {}
        self.done: dict[str, threading.Event] = {}
        self.fail: set[str] = set()

    def file(self, name: str, size: int, *, dropped: bool = True) -> WeightFile:
        self.gates[name], self.done[name] = threading.Event(), threading.Event()

        def fetch(file: WeightFile) -> None:
            assert file.path is not None
            self.asked.append(name)
            file.path.write_bytes(bytes(10))
            self.done[name].set()
            self.gates[name].wait(60)
            if name in self.fail:
                raise ResolveError(f"no {name}")

        return WeightFile(size, self.folder / name, fetch=fetch, dropped=dropped)

    def here(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


def waits(call: Callable[[], object]) -> threading.Thread:
    """Runs it in a thread, which is still at it a moment later."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    return thread


def test_files_that_are_here_are_handed_out_in_order(tmp_path: Path) -> None:
    plan = planned(["a", "a", "b", "b"], ["c"] * 4)
    supply = files_here([{"a": tmp_path, "b": tmp_path}, {"c": tmp_path}])
    supply.begin(plan, plan.units)
    taken = [supply.take() for _ in range(5)]
    assert taken == [*plan.units, None]
    assert [supply.done(unit) for unit in plan.units] == [[unit] for unit in plan.units]
    assert supply.wait() == []


def test_a_unit_waits_for_its_bytes_and_no_longer(hub: Hub) -> None:
    plan = planned(["a", "a", "b", "b"], ["c"] * 4)
    a, b, c = hub.file("a", 10), hub.file("b", 10), WeightFile(0, hub.folder / "c")
    supply = WeightFiles([{"a": a, "b": b}, {"c": c}])
    supply.begin(plan, plan.units)
    taken: list[WorkUnit | None] = []
    thread = waits(lambda: taken.append(supply.take()))
    supply.arrived(a, 100 + BLOCK - 1)
    thread.join(0.05)
    assert thread.is_alive()
    supply.arrived(a, 100 + BLOCK)
    thread.join(5)
    assert taken == [plan.units[0]]
    # It was made of bytes that may still turn out to be wrong, so it does not count yet.
    assert supply.done(plan.units[0]) == []
    supply.arrived(a, 100 + 2 * BLOCK)
    assert supply.take() == plan.units[1]
    assert supply.done(plan.units[1]) == []
    assert hub.asked == ["a"]  # the source's next file waits until this one is gone
    hub.gates["a"].set()
    assert hub.done["b"].wait(60)
    assert hub.here() == ["b"]
    hub.gates["b"].set()
    assert supply.take() == plan.units[2]
    assert supply.done(plan.units[2]) == list(plan.units[:3])
    assert supply.take() == plan.units[3]
    assert supply.done(plan.units[3]) == [plan.units[3]]
    assert hub.here() == []
    assert supply.take() is None
    assert supply.wait() == []
    supply.stop()


def test_what_the_first_unit_needs_comes_even_when_its_source_has_a_file_already(hub: Hub) -> None:
    """Where tensors lie in another order in every source, several files of one have to be there at once."""
    plan = planned(["x"] * 4, ["a", "b", "b", "a"])
    a, b, x = hub.file("a", 7), hub.file("b", 5), WeightFile(0, hub.folder / "x")
    supply = WeightFiles([{"x": x}, {"a": a, "b": b}])
    assert supply.peak_bytes(plan) == 12
    supply.begin(plan, plan.units)
    hub.gates["a"].set()
    assert supply.take() == plan.units[0]
    assert hub.asked == ["a"]
    supply.done(plan.units[0])
    # The last unit needs only what is here, so it is done while the others wait.
    assert supply.take() == plan.units[3]
    supply.done(plan.units[3])
    hub.gates["b"].set()
    for unit in plan.units[1:3]:
        assert supply.take() == unit
        supply.done(unit)
    assert hub.asked == ["a", "b"]
    assert hub.here() == []
    supply.stop()


def test_files_for_the_cache_come_all_at_once_and_stay(hub: Hub) -> None:
    plan = planned(["a", "a", "b", "b"], ["c"] * 4)
    files = {name: hub.file(name, 10, dropped=False) for name in "abc"}
    supply = WeightFiles([{"a": files["a"], "b": files["b"]}, {"c": files["c"]}])
    assert supply.peak_bytes(plan) == 0
    supply.begin(plan, plan.units)
    for name in "abc":
        assert hub.done[name].wait(60)
        hub.gates[name].set()
    taken = set()
    for _ in plan.units:  # in the order of the plan, but for a file that is here before an earlier one
        unit = supply.take()
        assert unit is not None
        taken.add(unit)
        supply.done(unit)
    assert taken == set(plan.units)
    supply.wait()
    supply.close()
    assert hub.here() == ["a", "b", "c"]


def test_an_error_reaches_everyone_who_waits(hub: Hub) -> None:
    plan = planned(["a"] * 4, ["c"] * 4)
    a, c = hub.file("a", 10), WeightFile(0, hub.folder / "c")
    supply = WeightFiles([{"a": a}, {"c": c}])
    supply.begin(plan, plan.units)
    said: list[str] = []

    def take() -> None:
        try:
            supply.take()
        except ResolveError as error:
            said.append(error.message)

    threads = [waits(take) for _ in range(3)]
    hub.fail.add("a")
    hub.gates["a"].set()
    for thread in threads:
        thread.join(5)
    assert said == ["no a"] * 3
    with pytest.raises(ResolveError, match="no a"):
        supply.wait()
    supply.stop()
    supply.close()
    assert hub.here() == ["a"]  # what came of it stays for the next run


def test_stopping_lets_everyone_go(hub: Hub) -> None:
    plan = planned(["a"] * 4, ["c"] * 4)
    supply = WeightFiles([{"a": hub.file("a", 10)}, {"c": WeightFile(0, hub.folder / "c")}])
    supply.begin(plan, plan.units)
    taken: list[WorkUnit | None] = []
    thread = waits(lambda: taken.append(supply.take()))
    supply.stop()
    thread.join(5)
    assert taken == [None]
    assert supply.stopped
    hub.gates["a"].set()


def test_a_file_of_two_sources_is_fetched_once(hub: Hub) -> None:
    """The same model twice in a recipe."""
    plan = planned(["a"] * 4, ["a"] * 4)
    a = hub.file("a", 10)
    supply = WeightFiles([{"a": a}, {"a": a}])
    assert supply.peak_bytes(plan) == 10
    hub.gates["a"].set()
    supply.begin(plan, plan.units)
    for unit in plan.units:
        assert supply.take() == unit
        supply.done(unit)
    assert hub.asked == ["a"]
    assert hub.here() == []


def test_what_a_failed_run_still_needs_stays(hub: Hub) -> None:
    """A file that came whole and right is not fetched again by the next run."""
    plan = planned(["a"] * 4, ["c"] * 4)
    supply = WeightFiles([{"a": hub.file("a", 10)}, {"c": hub.file("c", 10)}])
    supply.begin(plan, plan.units)
    hub.gates["a"].set()
    hub.fail.add("c")
    hub.gates["c"].set()
    with pytest.raises(ResolveError, match="no c"):
        supply.take()
    supply.stop()
    supply.close()
    assert hub.here() == ["a", "c"]
