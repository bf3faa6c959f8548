"""Xet for the local Hub: the storage that the client's ``hf_xet`` cuts large files into, over loopback.

The client cuts a file into chunks of about 64 KiB where its content says so. A *xorb* is up to 64 MiB of chunks,
each compressed by itself; a *shard* says of which chunks of which xorbs a file is made, and what its sha256 is.
Chunks that the client knows to be stored are not sent again.

The formats are those of hf_xet 1.8, read from its source. Upload grants, and the search for chunks that somebody
else stored, are answered as by a server that has neither; the client goes on without.
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from struct import iter_unpack, unpack
from typing import Any, NamedTuple

import pyarrow  # type: ignore[import-untyped]
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hf_soup.local_hub import LocalHub, files, repos
from hf_soup.local_hub.store import HubError
from hf_soup.local_hub.wire import Call, Endpoint

_SHARD_TAG = b"HFRepoMetaData\0" + bytes.fromhex("5569 6745 6a7b 8157 83a5 bdd9 5ccd d14a a9")
_VERIFIED, _WITH_SHA256, _END_OF_FILES = 1 << 31, 1 << 30, b"\xff" * 32
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)


class Chunk(NamedTuple):
    """Where in its xorb a chunk is, with its header of eight bytes; how it is packed, and its size before that."""

    start: int
    stop: int
    scheme: int
    size: int


class Term(NamedTuple):
    """A part of a file, in order: chunks ``first`` to ``stop`` of a xorb, and their size."""

    xorb: str
    first: int
    stop: int
    size: int


class Xorb(NamedTuple):
    """A stored xorb: the sha256 that it is kept under, and its chunks."""

    sha256: str
    chunks: list[Chunk]


class XetHub(LocalHub):
    """A local Hub that takes and gives large files by xet too.

    What is stored through xet is checked against its sha256 and is an LFS file then as any other, for plain
    downloads too. A file that came by a plain upload has no xet hash and goes out as before. What xet knows is not
    kept over a restart.

    Attributes:
        xorbs: What was stored, by xet hash.
        files: The parts of each file, by xet hash.
        xet_hashes: The xet hash of each file, by sha256.
        received: The size of every xorb that arrived complete, in order.
    """

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root, **options)
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, list[Term]] = {}
        self.xet_hashes: dict[str, str] = {}
        self.received: list[int] = []
        self._granted: dict[str, tuple[str | None, bool]] = {}
        plain, self._routes = self._routes, []
        self.route(ROUTES)
        self._routes += plain  # the first that fits answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ever; an `intercept` finds the connection in ``scope["transport"]``, to break it."""
        scope["transport"] = send.__self__.transport  # type: ignore[attr-defined]
        await super().__call__(scope, receive, send)

    def _identify(self, request: Request) -> tuple[str | None, bool]:
        if not request.url.path.startswith(("/v1/", "/v2/")):
            return super()._identify(request)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self._granted:
            raise HubError(401, "This is no token for the storage.")
        return self._granted[token]

    def grant(self, call: Call, *, write: bool) -> Response:
        """A token for the storage, and its address: another origin, where the Hub's own token may not go."""
        token = f"xet_{secrets.token_hex(16)}"
        self._granted[token] = call.user or "anonymous", write
        until = str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": self.cdn, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": until}
        return JSONResponse({"casUrl": self.cdn, "accessToken": token, "exp": int(until)}, headers=headers)

    def store_shard(self, shard: bytes) -> None:
        """Put together the files that a shard describes, and keep those that are what it says."""
        if shard[:32] != _SHARD_TAG:
            raise HubError(400, "This is no shard.")
        for name, stated, terms in _files_in(shard):
            draft = self.store.root / "incoming" / secrets.token_hex(16)
            with draft.open("wb") as file:
                for term in terms:
                    content = b"".join(self._contents(term))
                    if len(content) != term.size:
                        raise HubError(400, f"A part of {name} has {len(content)} bytes, not {term.size}.")
                    file.write(content)
            sha256 = self.store.keep(draft, stated)
            self.files[name], self.xet_hashes[sha256] = terms, name

    def _contents(self, term: Term) -> Iterator[bytes]:
        xorb = self.xorbs.get(term.xorb)
        if xorb is None or term.stop > len(xorb.chunks):
            raise HubError(400, f"The xorb {term.xorb} was never uploaded, or is shorter.")
        with self.store.blob(xorb.sha256).open("rb") as file:
            for chunk in xorb.chunks[term.first : term.stop]:
                file.seek(chunk.start + 8)
                yield _unpacked(file.read(chunk.stop - chunk.start - 8), chunk)


def _chunks_in(xorb: bytes) -> list[Chunk]:
    chunks, at = list[Chunk](), 0
    while at < len(xorb):
        version, scheme = xorb[at], xorb[at + 4]
        packed, size = (int.from_bytes(xorb[where : where + 3], "little") for where in (at + 1, at + 5))
        chunks.append(Chunk(at, at + 8 + packed, scheme, size))
        at += 8 + packed
        if version != 0 or scheme > _GROUPED_LZ4 or at > len(xorb):
            raise HubError(400, "This is no xorb.")
    return chunks


def _unpacked(data: bytes, chunk: Chunk) -> bytes:
    if chunk.scheme == _PLAIN:
        return data
    try:
        plain: bytes = pyarrow.decompress(data, chunk.size, codec="lz4", asbytes=True)
    except OSError as error:
        raise HubError(400, f"A chunk cannot be unpacked: {error}") from None
    if chunk.scheme == _LZ4:
        return plain
    # The first bytes of all groups of four, then all second ones, and so on: floats pack better like that.
    whole, start = bytearray(len(plain)), 0
    for place in range(4):
        count = len(whole[place::4])
        whole[place::4] = plain[start : start + count]
        start += count
    return bytes(whole)


def _files_in(shard: bytes) -> Iterator[tuple[str, str | None, list[Term]]]:
    # After a header of 48 bytes everything is a record of that size: a file's name and flags, its parts, as many
    # hashes of them if it is verified, its sha256. What follows the last file is about xorbs, and known already.
    records = iter_unpack("<32s4I", shard[48 : len(shard) // 48 * 48])
    for name, flags, count, *_ in records:
        if name == _END_OF_FILES:
            return
        terms = [Term(_hex(xorb), first, stop, size) for xorb, _, size, first, stop in islice(records, count)]
        list(islice(records, count if flags & _VERIFIED else 0))
        sha256 = _hex(next(records)[0]) if flags & _WITH_SHA256 else None
        yield _hex(name), sha256, terms


def _hex(digest: bytes) -> str:
    """A hash as xet writes it: four numbers, each of which is stored with its lowest byte first."""
    return "".join(f"{number:016x}" for number in unpack("<4Q", digest))


async def write_token(call: Call) -> Response:
    """Leave to upload for this repo, to whoever may commit."""
    files._check_writer(call)
    return _hub(call).grant(call, write=True)


async def read_token(call: Call) -> Response:
    """Leave to download what is in this repo."""
    call.check_content()
    return _hub(call).grant(call, write=False)


async def post_xorb(call: Call) -> Response:
    """Keep a xorb."""
    call.writer()
    content = b"".join([data async for data in call.request.stream()])
    hub, name, draft = _hub(call), call.params["hash"], call.store.root / "incoming" / secrets.token_hex(16)
    hub.received.append(len(content))
    draft.write_bytes(content)
    new, hub.xorbs[name] = name not in hub.xorbs, Xorb(call.store.keep(draft), _chunks_in(content))
    return JSONResponse({"was_inserted": new})


async def post_shard(call: Call) -> Response:
    """Keep the files that a shard describes."""
    call.writer()
    await run_in_threadpool(_hub(call).store_shard, await call.body())
    return Response('{"type": "result"}\n', media_type="application/x-ndjson")


async def reconstruction(call: Call) -> Response:
    """Where the parts of a file are, from the first to the last that a range of it touches."""
    hub = _hub(call)
    parts = hub.files.get(call.params["hash"])
    if parts is None:
        raise HubError(404, "There is no such file.")
    start, stop = 0, sum(part.size for part in parts)
    if "range" in call.request.headers:
        first, last = map(int, call.request.headers["range"].removeprefix("bytes=").split("-"))
        start, stop = first, min(stop, last + 1)
    if start >= stop:
        raise HubError(416, "The file ends before this range.")
    touched, offset, at = list[Term](), 0, 0
    for part in parts:
        if at < stop and at + part.size > start:
            offset = offset if touched else start - at
            touched.append(part)
        at += part.size
    terms = [
        {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.first, "end": term.stop}}
        for term in touched
    ]
    xorbs = {name: list(_fetches(hub, name, touched)) for name in {term.xorb for term in touched}}
    return JSONResponse({"offset_into_first_range": offset, "terms": terms, "xorbs": xorbs})


def _fetches(hub: XetHub, name: str, terms: Iterable[Term]) -> Iterator[dict[str, Any]]:
    xorb = hub.xorbs[name]
    ranges: list[list[int]] = []
    # The client takes ranges that begin alike for one, so those that meet are one.
    for first, stop in sorted((term.first, term.stop) for term in terms if term.xorb == name):
        if ranges and first <= ranges[-1][1]:
            ranges[-1][1] = max(stop, ranges[-1][1])
        else:
            ranges.append([first, stop])
    url = f"{hub.cdn}/cdn/{hub.sign(xorb.sha256)}/{xorb.sha256}"
    for first, stop in ranges:
        there = {"start": xorb.chunks[first].start, "end": xorb.chunks[stop - 1].stop - 1}
        yield {"url": url, "ranges": [{"chunks": {"start": first, "end": stop}, "bytes": there}]}


async def resolve(call: Call) -> Response:
    """As ever, and beside it what the client needs for the other way."""
    answer, made = await files.resolve(call), call.commit()
    name = _hub(call).xet_hashes.get(made.files[call.params["path"]].sha256)
    if answer.status_code == 302 and name:
        route = f"{call.hub.endpoint}/api/{call.repo.kind}s/{call.repo.id}/xet-read-token/{made.sha}"
        answer.headers["X-Xet-Hash"], answer.headers["Link"] = name, f'<{route}>; rel="xet-auth"'
    return answer


def _with_hashes(endpoint: Endpoint) -> Endpoint:
    """A list of files as ever, with the xet hash of each that has one."""

    async def answer(call: Call) -> Response:
        plain = await endpoint(call)
        entries = json.loads(bytes(plain.body))
        for entry in entries:
            if name := _hub(call).xet_hashes.get(entry.get("lfs", {}).get("oid")):
                entry["xetHash"] = name
        return JSONResponse(entries, headers={"link": plain.headers["link"]} if "link" in plain.headers else None)

    return answer


def _hub(call: Call) -> XetHub:
    assert isinstance(call.hub, XetHub)
    return call.hub


ROUTES: dict[str, Endpoint] = {
    "GET /api/{kind}/{id}/xet-write-token/{rev}": write_token,
    "GET /api/{kind}/{id}/xet-read-token/{rev}": read_token,
    "GET /{data}{id}/resolve/{rev}/{path}": resolve,
    "GET /api/{kind}/{id}/tree/{rev}": _with_hashes(repos.tree),
    "GET /api/{kind}/{id}/tree/{rev}/{path}": _with_hashes(repos.tree),
    "POST /api/{kind}/{id}/paths-info/{rev}": _with_hashes(repos.paths_info),
    "POST /v1/xorbs/{prefix}/{hash}": post_xorb,
    "POST /v2/shards": post_shard,
    "GET /v2/reconstructions/{hash}": reconstruction,
}
