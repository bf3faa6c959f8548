"""Files in and out: preupload, LFS, commits, downloads."""

import base64
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from hf_soup.local_hub.store import MAX_REGULAR_BYTES, Change, HubError, valid_path, wants_lfs
from hf_soup.local_hub.wire import Call, Endpoint, number_in

_MAX_LINE_BYTES = MAX_REGULAR_BYTES * 4 // 3 + 4096


def _check_writer(call: Call) -> str:
    # A pull request may come from everybody whose token writes, who may also add to it later.
    offers = (f"refs/pr/{each['num']}" for each in call.repo.discussions if each["author"]["name"] == call.user)
    return call.writer(None if call.flag("create_pr") or call.params["rev"] in offers else call.repo.namespace)


async def preupload(call: Call) -> Response:
    """Tell for every file whether it goes to git or to LFS, and what is there already."""
    _check_writer(call)
    present, answers = call.commit().files, []
    for file in (await call.json())["files"]:
        path = valid_path(file["path"])
        lfs, old = wants_lfs(path, file["size"], base64.b64decode(file["sample"])), present.get(path)
        oid = (old.sha256 if old.lfs else old.oid) if old else None
        answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return JSONResponse({"files": answers})


async def lfs_batch(call: Call) -> Response:
    """Hand out an upload address for every object that the repo does not have."""
    call.writer()
    answers = [_lfs_object(call, entry) for entry in (await call.json())["objects"]]
    return JSONResponse({"transfer": "basic", "objects": answers}, media_type="application/vnd.git-lfs+json")


def _lfs_object(call: Call, entry: dict[str, Any]) -> dict[str, Any]:
    sha256, size, chunk = entry["oid"], entry["size"], call.hub.part_bytes
    if size > 10_000 * chunk:
        raise HubError(422, f"{size} bytes are too many for one file.")
    answer = {"oid": sha256, "size": size, "authenticated": True}
    if call.store.blob(sha256).exists():
        return answer
    secret = secrets.token_hex(16)
    call.hub.uploads[secret] = sha256, size
    href = f"{call.hub.endpoint}/lfs/{secret}"
    parts = {str(number): f"{href}/{number}" for number in range(1, -(-size // chunk) + 1)}
    header = {"header": {"chunk_size": str(chunk), **parts}} if size > chunk else {}
    return {**answer, "actions": {"upload": {"href": href, **header}}}


def _upload(call: Call) -> tuple[Path, str, int]:
    # An upload address is the only permission needed, as for a signed one.
    secret = call.params["secret"]
    if secret not in call.hub.uploads:
        raise HubError(403, "This upload address is unknown or has been used.")
    return call.store.root / "incoming" / secret, *call.hub.uploads[secret]


async def lfs_put(call: Call) -> Response:
    """Take an LFS object, or that part of it whose number is in the address."""
    draft, _, size = _upload(call)
    start = (max(1, number_in(call.params.get("part", "1"))) - 1) * call.hub.part_bytes
    draft.touch()
    with draft.open("r+b") as file:
        file.seek(start)
        async for data in call.request.stream():
            start += len(data)
            if start > size:
                raise HubError(400, f"More than the announced {size} bytes.")
            file.write(data)
    return Response(headers={"etag": f'"{start}"'}) if "part" in call.params else await lfs_complete(call)


async def lfs_complete(call: Call) -> Response:
    """Make an LFS object of what has arrived, if it is what was announced."""
    draft, sha256, _ = _upload(call)
    await run_in_threadpool(call.store.keep, draft, sha256)
    call.hub.uploads.pop(call.params["secret"], None)
    return JSONResponse({"success": True})


async def _lines(call: Call) -> AsyncIterator[dict[str, Any]]:
    # Line by line: a commit of many small files can be far larger than any one of them.
    rest = b""
    async for chunk in call.request.stream():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield json.loads(line)
        if len(rest) > _MAX_LINE_BYTES:
            raise HubError(413, f"A file in a commit is larger than {MAX_REGULAR_BYTES} bytes: use LFS.")
    if rest.strip():
        yield json.loads(rest)


def _change(call: Call, key: str, value: dict[str, Any]) -> Change:
    path = value["path"]
    match key:
        case "file":
            return call.store.put(path, base64.b64decode(value["content"]))
        case "lfsFile":
            return path, call.store.lfs_file(value["oid"])
        case "deletedFile":
            return path, None
        case "deletedFolder":
            return f"{path.removesuffix('/')}/", None
    raise HubError(400, f"This Hub knows no operation {key!r:.40}")


async def commit(call: Call) -> Response:
    """One atomic commit, on a branch or as a pull request, from a header line and one line a change."""
    user, header, changes = _check_writer(call), dict[str, Any](), list[Change]()
    async for line in _lines(call):
        if line["key"] == "header":
            header = line["value"]
        else:
            changes.append(_change(call, line["key"], line["value"]))
    note, parent = (header["summary"], header.get("description", ""), user), header.get("parentCommit")
    repo, answer = call.repo, {"success": True, "hookOutput": ""}
    if call.flag("create_pr"):
        base = call.store.revision(repo, parent) if parent else call.commit()
        num = call.store.open_pull_request(repo, note, base, changes)
        sha = repo.refs[f"refs/pr/{num}"]
        answer["pullRequestUrl"] = call.address(repo.kind, repo.id, "discussions", str(num))
    else:
        sha = call.store.commit(repo, call.params["rev"], changes, note, parent).sha
    return JSONResponse({**answer, "commitOid": sha, "commitUrl": call.address(repo.kind, repo.id, "commit", sha)})


async def resolve(call: Call) -> Response:
    """A file, or where it is: LFS files at another origin, where no token may follow, small ones beside this."""
    made, path = call.commit(), call.params["path"]
    call.check_content()
    file, headers = made.files.get(path), {"X-Repo-Commit": made.sha}
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    if file.lfs:
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{call.hub.cdn}/cdn/{call.hub.sign(file.sha256)}/{file.sha256}"
        return Response(status_code=302, headers=headers)
    headers["ETag"] = f'"{file.oid}"'
    if path == "config.json" and "data" in call.params:
        call.store.count_downloads(call.repo, 1)  # as on the Hub: requests for a model's config are its downloads
    if "data" not in call.params:
        return _sent(call.store.blob(file.sha256), headers, "text/plain; charset=utf-8")
    headers["Location"] = f"/api/resolve-cache/{call.repo.kind}s/{call.repo.id}/{made.sha}/{quote(path)}"
    return Response(status_code=307, headers=headers)


async def cdn(call: Call) -> Response:
    """The content of an LFS file, for whoever has its address."""
    sha256 = call.params["sha256"]
    if "authorization" in call.request.headers:
        raise HubError(400, "This address is signed, and a token was sent with it.")
    if not secrets.compare_digest(call.params["signature"].encode(), call.hub.sign(sha256).encode()):
        raise HubError(403, "This address is not signed.")
    return _sent(call.store.blob(sha256), {"ETag": f'"{sha256}"'}, "application/octet-stream")


def _sent(path: Path, headers: dict[str, str], media_type: str) -> Response:
    # With the length there already, so that `transform` sees the headers as they will be sent.
    return FileResponse(path, headers=headers, media_type=media_type, stat_result=path.stat())


ROUTES: dict[str, Endpoint] = {
    "POST /api/{kind}/{id}/preupload/{rev}": preupload,
    "POST /api/{kind}/{id}/commit/{rev}": commit,
    r"POST /{data}{id}\.git/info/lfs/objects/batch": lfs_batch,
    "PUT /lfs/{secret}": lfs_put,
    "PUT /lfs/{secret}/{part}": lfs_put,
    "POST /lfs/{secret}": lfs_complete,
    "GET /{data}{id}/resolve/{rev}/{path}": resolve,
    "GET /api/resolve-cache/{kind}/{id}/{rev}/{path}": resolve,
    "GET /cdn/{signature}/{sha256}": cdn,
}
