"""The sources' weight files as they come: what is missing here, what may be read by now, what is fetched next."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

from hf_soup import hub
from hf_soup._util.io import open_file
from hf_soup._util.parallel import in_parallel
from hf_soup.checkpoint import (
    ADAPTER_FOLDER,
    ADAPTER_SETTINGS,
    Checkpoint,
    FileSource,
    HubRepo,
    fetch_files,
    read_header,
    reader_of,
)
from hf_soup.errors import ResolveError
from hf_soup.hub import ASSETS, INDEX, MAX_TEXT, FileHasher, Stamp, changed_while_read, stamp_of
from hf_soup.merging.plan import Plan, WorkUnit

#: Files that are fetched at a time: into the cache, where the client has connections of its own, and beside the output.
_INTO_CACHE, _BESIDE = 8, 32
#: Units that are looked at for one whose files have arrived.
_LOOK_AHEAD = 64


class WeightFile:
    """A weight file of a source.

    Args:
        size: Bytes that are to be fetched.
        path: Where it is, or will be if it is dropped after use.
        fetch: Brings it: sets ``path``, and tells `WeightFiles.arrived` of the bytes that may be read; returns when its
            sha256 was right. None where it is here.
        stamp: The state that it must be in when it is opened.
        dropped: Remove it after its last use; until its sha256 was right nothing that was made of it counts.
        follow: Compute its sha256 while it is read.
    """

    def __init__(
        self,
        size: int,
        path: Path | None,
        *,
        fetch: Callable[[WeightFile], None] | None = None,
        stamp: Stamp | None = None,
        dropped: bool = False,
        follow: bool = False,
    ) -> None:
        self.size = size
        self.path = path
        self.fetch = fetch
        self.stamp = stamp
        self.dropped = dropped
        self.follow = follow
        self.arrived = 0 if fetch else sys.maxsize  # whether it is long enough is seen when it is read
        self.verified = fetch is None
        self.uses = 0
        self._descriptor: int | None = None
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._follower: FileHasher | None = None

    def __reduce__(self) -> tuple[Callable[..., WeightFile], tuple[int, Path | None]]:
        """A file that is here, for another process."""
        return partial(WeightFile, stamp=self.stamp, follow=self.follow), (0, self.path)

    def open(self) -> int:
        """A descriptor, opened at the first use."""
        if self._descriptor is None:
            with self._lock:
                if self._descriptor is None:
                    assert self.path is not None, "a file is opened when it has arrived"
                    descriptor = open_file(self._stack, self.path)
                    # Another file may stand at its path for as long as this lasts, and the right one again afterwards.
                    # The device is left out: machines number a shared file system differently.
                    if self.stamp is not None and stamp_of(descriptor)[1:] != self.stamp[1:]:
                        raise changed_while_read(self.path.parent.name, self.path.name)
                    if self.follow:
                        self._follower = FileHasher(self.path, descriptor)
                    self._descriptor = descriptor
        return self._descriptor

    def hasher(self) -> FileHasher:
        """What computes the sha256 of a file that is followed."""
        self.open()
        assert self._follower is not None, "it is followed"
        return self._follower

    def close(self) -> None:
        """Close it, and remove it where nobody needs it any more; what a failed run still needs stays for the next."""
        self._stack.close()
        self._descriptor = None
        if self.dropped and self.verified and not self.uses and self.path is not None:
            self.path.unlink(missing_ok=True)


class WeightFiles:
    """Hands out units whose files have arrived, and fetches what the next ones need.

    Args:
        sources: For every source, its weight files.
    """

    def __init__(self, sources: Sequence[Mapping[str, WeightFile]]) -> None:
        self.sources = sources
        self.fetched: Callable[[int], object] = lambda count: None
        self._changed = threading.Condition()
        self._todo: deque[WorkUnit] = deque()
        self._held: list[WorkUnit] = []
        self._recheck = False
        self._waiting: list[WeightFile] = []
        self._flying: set[WeightFile] = set()
        self._busy: set[WorkUnit] = set()
        self._owners: dict[WeightFile, set[int]] = {}
        self._error: BaseException | None = None
        self.stopped = False  # a fetch that sees it ends
        self._plan: Plan | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._fetching: list[Future[None]] = []

    def __reduce__(self) -> tuple[type[WeightFiles], tuple[Sequence[Mapping[str, WeightFile]]]]:
        """Of files that are all here, for another process."""
        return WeightFiles, (self.sources,)

    def paths(self) -> list[dict[str, Path]]:
        """Where the files of every source are, once they are."""
        return [{name: file.path for name, file in source.items() if file.path} for source in self.sources]

    def peak_bytes(self, plan: Plan) -> int:
        """How many bytes lie beside the output at most, of files that are dropped after their last use."""
        self._plan = plan
        first: dict[WeightFile, int] = {}
        last: dict[WeightFile, int] = {}
        for number, unit in enumerate(plan.units):
            for file, _ in self._needs(unit):
                if file.dropped:
                    first.setdefault(file, number)
                    last[file] = number
        free = [0] * len(self.sources)  # from which unit on a source has none
        steps: dict[int, int] = {}
        for file, earliest in first.items():
            owners = [number for number, source in enumerate(self.sources) if file in source.values()]
            start = min(earliest, max(free[owner] for owner in owners))
            steps[start] = steps.get(start, 0) + file.size
            steps[last[file] + 1] = steps.get(last[file] + 1, 0) - file.size
            for owner in owners:
                free[owner] = max(free[owner], last[file] + 1)
        return max(accumulate((steps[number] for number in sorted(steps)), initial=0))

    def keep(self) -> int:
        """Drop no file after its last use, as all are read several times; returns how many bytes then lie here."""
        held = [file for file in self.files() if file.dropped]
        for file in held:
            file.dropped = False
        return sum(file.size for file in held)

    def files(self) -> list[WeightFile]:
        """Every file once."""
        return list(dict.fromkeys(file for source in self.sources for file in source.values()))

    def fetch_all(self) -> None:
        """Wait until every file is here, as other processes need them."""
        in_parallel(self._fetch, [file for file in self.files() if not file.verified], _INTO_CACHE)
        if self._error:
            raise self._error

    def begin(self, plan: Plan, units: Iterable[WorkUnit]) -> None:
        """Take the units that are to be done, in order, and begin to fetch what they need."""
        self._plan = plan
        self._todo = deque(units)
        needed: dict[WeightFile, None] = {}
        for unit in self._todo:
            for file, _ in self._needs(unit):
                needed[file] = None
                file.uses += 1
        self._waiting = [file for file in needed if not file.verified]
        for number, source in enumerate(self.sources):
            for file in source.values():
                self._owners.setdefault(file, set()).add(number)
        if self._waiting:
            self._pool = ThreadPoolExecutor(_BESIDE if any(file.dropped for file in self._waiting) else _INTO_CACHE)
            with self._changed:
                self._launch()

    def take(self) -> WorkUnit | None:
        """The next unit whose bytes are all here; waits for one; None when all were handed out.

        Raises:
            SoupError: A file could not be had.
        """
        with self._changed:
            while not self.stopped:
                if self._error is not None:
                    raise self._error
                for index in range(min(_LOOK_AHEAD, len(self._todo))):
                    unit = self._todo[index]
                    if all(file.arrived >= stop for file, stop in self._needs(unit)):
                        del self._todo[index]
                        self._busy.add(unit)
                        return unit
                if not self._todo:
                    return None
                self._changed.wait()
        return None

    def done(self, unit: WorkUnit) -> list[WorkUnit]:
        """A unit was written: lets go of files that no other needs. Returns the units that may be noted now."""
        with self._changed:
            self._busy.discard(unit)
            needs = self._needs(unit)
            self._held.append(unit)
            self._recheck |= all(file.verified for file, _ in needs)
            for file, _ in needs:
                file.uses -= 1
                if not file.uses and file.verified:
                    self._let_go(file)
            if self._waiting:
                self._launch()  # the next unit may need a file of a source that still has another one here
            return self._sure()

    def wait(self) -> list[WorkUnit]:
        """Wait until all that is fetched was right. Returns the units that may be noted now."""
        with self._changed:
            while not self.stopped and self._error is None and (self._waiting or self._flying):
                self._changed.wait()
            if self._error is not None:
                raise self._error
            return self._sure()

    def stop(self) -> None:
        """Let everyone who waits go, and fetch nothing more."""
        with self._changed:
            self.stopped = True
            self._waiting = []
            self._changed.notify_all()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            # Those that look whether they are stopped end at once; one that waits for the network is not waited for.
            wait(self._fetching, timeout=1.0)

    def raise_error(self) -> None:
        """Raise what went wrong with a fetch, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close all files."""
        for file in self.files():
            file.close()

    def _needs(self, unit: WorkUnit) -> list[tuple[WeightFile, int]]:
        """The files of a unit, and up to where each must have arrived."""
        assert self._plan is not None
        needs = self._plan.runs[unit.run].needs(unit.end)
        return [(self.sources[source][name], stop) for source, (name, stop) in needs.items()]

    def _sure(self) -> list[WorkUnit]:
        """Units that were made of right bytes alone."""
        if not self._recheck:
            return []
        self._recheck = False
        sure: list[WorkUnit] = []
        held: list[WorkUnit] = []
        for unit in self._held:
            (sure if all(file.verified for file, _ in self._needs(unit)) else held).append(unit)
        self._held = held
        return sure

    def _launch(self) -> None:
        """Begin to fetch: all into the cache; beside the output one of each source, and what the next unit needs."""
        if self._pool is None:
            return
        front = min([*self._busy, *islice(self._todo, 1)], key=lambda unit: (unit.run, unit.begin), default=None)
        urgent = {file for file, _ in self._needs(front)} if front else set()
        taken = {number for file in self._flying if file.dropped for number in self._owners[file]}
        # Those that are read to the end and only have to be found right are gone in a moment.
        leaving = {number for file in self._flying if not file.uses for number in self._owners[file]}
        for file in list(self._waiting):
            owners = self._owners[file]
            if not file.dropped or not taken & owners or (file in urgent and not leaving & owners):
                self._waiting.remove(file)
                self._flying.add(file)
                taken |= owners
                self._fetching.append(self._pool.submit(self._fetch, file))

    def _fetch(self, file: WeightFile) -> None:
        assert file.fetch is not None
        try:
            file.fetch(file)
        except BaseException as error:  # noqa: BLE001 -- raised again by whoever waits for the file
            self._error = self._error or error
        with self._changed:
            if self._error is None and not self.stopped:
                file.verified = self._recheck = True
                file.arrived = sys.maxsize
                if not file.dropped:
                    self._flying.discard(file)
                elif not file.uses:
                    self._let_go(file)
            self._changed.notify_all()

    def _let_go(self, file: WeightFile) -> None:
        """Its last use is over."""
        if file.dropped:
            file.close()
            self._flying.discard(file)
            self._launch()

    def arrived(self, file: WeightFile, count: int) -> None:
        """Say up to where a file that is being fetched may be read."""
        self.fetched(count - file.arrived)
        file.arrived = count
        with self._changed:
            self._changed.notify_all()


def missing_weights(
    checkpoints: Sequence[Checkpoint], files: Sequence[Collection[str]] | None = None
) -> list[tuple[FileSource, str]]:
    """Weight files that are not on this machine yet, each once; of each checkpoint all, or these ``files``."""
    wanted = files or [each.weights.files for each in checkpoints]
    places = (own.weights.source.origin(file) for own, names in zip(checkpoints, wanted, strict=True) for file in names)
    return [(source, file) for source, file in dict.fromkeys(places) if source.here(file) is None]


def fetch_small(checkpoints: Sequence[Checkpoint]) -> None:
    """The files that a check reads, so that the next one works without a network."""
    small = [
        (source, file)
        for source in dict.fromkeys(checkpoint.source for checkpoint in checkpoints)
        for file, size in source.files.items()
        if file in (INDEX, ADAPTER_FOLDER + ADAPTER_SETTINGS)
        or ASSETS.fullmatch(file)
        or (file.removeprefix(ADAPTER_FOLDER) == "README.md" and size <= MAX_TEXT)
    ]
    fetch_files(small, quiet=True)


def fetch_weights(checkpoints: Sequence[Checkpoint], *, quiet: bool = False) -> list[dict[str, Path]]:
    """Where the weight files of each checkpoint lie on this machine, downloaded and checked where they must be.

    Raises:
        ResolveError: A file cannot be had or its sha256 is wrong.
    """
    wanted = list(_placed(checkpoints))
    paths = dict(zip(wanted, fetch_files(wanted, quiet=quiet), strict=True))
    places = [{file: paths[each.weights.source.origin(file)] for file in each.weights.files} for each in checkpoints]
    for checkpoint, files in zip(checkpoints, places, strict=True):
        for file, path in files.items():
            _require_header(checkpoint, file, path)
    return places


def weight_files_of(checkpoints: Sequence[Checkpoint], beside: Path | None = None) -> WeightFiles:
    """The weight files of checkpoints, as a merge needs them: from here, from the cache, or fetched into it.

    Args:
        checkpoints: In the order of the plan's sources.
        beside: A folder for files that are dropped after their last use, instead of the cache.
    """

    def weight_file(checkpoint: Checkpoint, file: str) -> WeightFile:
        source, name = checkpoint.weights.source.origin(file)
        if not isinstance(source, HubRepo) or file in checkpoint.weights.factor_files:
            path = source.fetch(name)
            # What was converted from a pickle of the Hub is pinned by the commit.
            follow = name in source.stamps and checkpoint.source.commit is None and hub.known_sha256(path) is None
            return WeightFile(0, path, follow=follow, stamp=source.stamps.get(name))

        def fetch(coming: WeightFile) -> None:
            if coming.path is None:
                coming.path = source.fetch(name, supply.fetched)
            else:
                arrived = partial(supply.arrived, coming)
                hub.download_beside(source.repo, name, coming.path, arrived=arrived, stopped=lambda: supply.stopped)
            if not supply.stopped:
                _require_header(checkpoint, file, coming.path)

        size, cached = source.files[name], source.here(name) is not None
        if beside and not cached:
            title = hashlib.sha256(f"{source.reference}\n{source.commit}\n{name}".encode()).hexdigest()[:32]
            return WeightFile(size, beside / title, fetch=fetch, dropped=True)
        return WeightFile(0 if cached else size, None, fetch=fetch)

    made = {place: weight_file(*each) for place, each in _placed(checkpoints).items()}
    sources = [{name: made[each.weights.source.origin(name)] for name in each.weights.files} for each in checkpoints]
    supply = WeightFiles(sources)
    return supply


def _placed(checkpoints: Sequence[Checkpoint]) -> dict[tuple[FileSource, str], tuple[Checkpoint, str]]:
    """Every weight file once, by its place, and one that it is of, with what it is called there."""
    return {each.weights.source.origin(file): (each, file) for each in checkpoints for file in each.weights.files}


def _require_header(checkpoint: Checkpoint, name: str, path: Path) -> None:
    """Refuse a file of the Hub, whose bytes are right by now, if the header that the check read before was another one.

    Raises:
        ResolveError: Tensors would be looked for in the wrong places.
    """
    if name in checkpoint.weights.source.stamps:
        return  # its state is compared
    header = read_header(reader_of(path), name, path.stat().st_size, str(checkpoint))
    found = {tensor.name: tensor for tensor in header}
    if found != checkpoint.weights.stored_in(name):
        raise ResolveError(
            f"{checkpoint}: the header of {name} that was read first is not that of the file, whose bytes are right.",
            hint="Something between here and the Hub, or in the cache, changed data; run the same command again.",
        )
