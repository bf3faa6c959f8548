"""The weight files of checkpoints: which are missing here, and how they come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hf_soup import digests, hub, transfer
from hf_soup.checkpoint import ASSETS, INDEX, Checkpoint
from hf_soup.errors import ResolveError
from hf_soup.headers import MAX_TEXT, read_header
from hf_soup.supply import SourceFile, Supply


def missing_weights(checkpoints: Sequence[Checkpoint]) -> list[tuple[hub.Repo, str]]:
    """Weight files that are not on this machine yet, each once."""
    return list(
        {
            (checkpoint.repo.id, checkpoint.repo.revision, file): (checkpoint.repo, file)
            for checkpoint in checkpoints
            if checkpoint.repo is not None and not checkpoint.converted
            for file in checkpoint.weight_files
            if not transfer.is_cached(checkpoint.repo, file)
        }.values()
    )


def fetch_small(checkpoints: Sequence[Checkpoint]) -> None:
    """The files that a check reads, so that the next one works without a network."""
    repos = list({(each.repo.id, each.repo.revision): each.repo for each in checkpoints if each.repo}.values())
    small = [
        (repo, path)
        for repo in repos
        for path, file in repo.files.items()
        if path == INDEX or ASSETS.fullmatch(path) or (path == "README.md" and file.size <= MAX_TEXT)
    ]
    transfer.fetch(small, quiet=True)


def fetch_weights(checkpoints: Sequence[Checkpoint], *, quiet: bool = False) -> list[dict[str, Path]]:
    """Where the weight files of each checkpoint lie on this machine, downloaded and checked where they must be.

    Raises:
        ResolveError: A file cannot be had or its sha256 is wrong.
    """
    wanted = {
        (checkpoint.repo.id, checkpoint.repo.revision, file): (checkpoint.repo, file)
        for checkpoint in checkpoints
        if checkpoint.repo is not None and not checkpoint.converted
        for file in checkpoint.weight_files
    }
    paths = dict(zip(wanted, transfer.fetch(list(wanted.values()), quiet=quiet), strict=True))

    for checkpoint in checkpoints:
        if checkpoint.repo is not None and not checkpoint.converted:
            for file in checkpoint.weight_files:
                _require_header(checkpoint, file, paths[checkpoint.repo.id, checkpoint.repo.revision, file])

    def place(checkpoint: Checkpoint, file: str) -> Path:
        if file in checkpoint.converted:
            return checkpoint.converted[file]
        if checkpoint.repo is not None:
            return paths[checkpoint.repo.id, checkpoint.repo.revision, file]
        assert checkpoint.folder is not None
        return checkpoint.folder / file

    return [{file: place(checkpoint, file) for file in checkpoint.weight_files} for checkpoint in checkpoints]


def supply_of(checkpoints: Sequence[Checkpoint], beside: Path | None = None) -> Supply:
    """The weight files of checkpoints, as a merge needs them: from here, from the cache, or fetched into it.

    Args:
        checkpoints: In the order of the plan's sources.
        beside: A folder for files that are dropped after their last use, instead of the cache.
    """
    made: dict[tuple[str, ...], SourceFile] = {}

    def source_file(checkpoint: Checkpoint, name: str) -> SourceFile:
        repo = checkpoint.repo
        if repo is None or name in checkpoint.converted:
            path = checkpoint.converted.get(name) or (checkpoint.folder or Path()) / name
            follow = repo is None and digests.known_sha256(path) is None
            return made.setdefault((str(path),), SourceFile(0, path, follow=follow, stamp=checkpoint.stamps.get(path)))
        key = (repo.id, repo.revision, name)
        if key not in made:
            if beside and not transfer.is_cached(repo, name):
                made[key] = _streamed(checkpoint, repo, name, beside)
            else:
                made[key] = _cached(checkpoint, repo, name)
        return made[key]

    def _cached(checkpoint: Checkpoint, repo: hub.Repo, name: str) -> SourceFile:
        def fetch(file: SourceFile) -> None:
            path = transfer.obtain(repo, name, supply.fetched)
            _require_header(checkpoint, name, path)
            file.path = path

        file = SourceFile(repo.files[name].size, None, fetch=fetch)
        file.missing = 0 if transfer.is_cached(repo, name) else file.size
        return file

    def _streamed(checkpoint: Checkpoint, repo: hub.Repo, name: str, beside: Path) -> SourceFile:
        def fetch(file: SourceFile) -> None:
            def arrived(count: int) -> None:
                supply.fetched(count - file.arrived)
                file.arrive(count)

            assert file.path is not None
            transfer.download(repo, name, file.path, arrived=arrived, stopped=lambda: supply.stopped)
            if not supply.stopped:
                _require_header(checkpoint, name, file.path)

        title = hashlib.sha256("\n".join((repo.id, repo.revision, name)).encode()).hexdigest()[:32]
        return SourceFile(repo.files[name].size, beside / title, fetch=fetch, dropped=True)

    supply = Supply([{name: source_file(each, name) for name in each.weight_files} for each in checkpoints])
    return supply


def _require_header(checkpoint: Checkpoint, name: str, path: Path) -> None:
    """Refuse a file, whose bytes are right by now, if the header that the check read before was another one.

    Raises:
        ResolveError: Tensors would be looked for in the wrong places.
    """

    def read(_: str, start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    found = {tensor.name: tensor for tensor in read_header(read, name, path.stat().st_size, str(checkpoint))}
    if found != {tensor.name: tensor for tensor in checkpoint.tensors.values() if tensor.file == name}:
        raise ResolveError(
            f"{checkpoint}: the header of {name} that was read first is not that of the file, whose bytes are right.",
            hint="Something between here and the Hub, or in the cache, changed data; run the same command again.",
        )
