"""Files in and out: preupload, LFS, commits, downloads."""

import base64
import binascii
import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from hf_soup.local_hub.card import problems
from hf_soup.local_hub.names import MAX_REGULAR_BYTES, HubError, valid_path, wants_lfs
from hf_soup.local_hub.store import Change, Incoming, Note
from hf_soup.local_hub.wire import Call, Upload, json_object, kind_of, number_in, objects, text

_MAX_LINE_BYTES = MAX_REGULAR_BYTES * 4 // 3 + 4096
_MAX_OPERATIONS = 25_000
_MAX_LFS_BYTES = 500_000_000_000


def _writer_at(call: Call) -> str:
    # The author of a pull request may push to it, everything else belongs to the namespace.
    ref = call.params["rev"]
    for discussion in call.repo.discussions:
        if ref == f"refs/pr/{discussion['num']}" and discussion["author"]["name"] == call.user:
            return call.writer()
    return call.writer(None if call.flag("create_pr") else call.repo.namespace)


async def preupload(call: Call) -> Response:
    """Tell for every file whether it goes to git or to LFS, and what is there already."""
    _writer_at(call)
    present = call.commit().files
    answers = []
    for file in objects(await call.json(), "files"):
        path, size = valid_path(file.get("path")), file.get("size")
        try:
            sample = base64.b64decode(text(file, "sample", ""))
        except binascii.Error as error:
            raise HubError(400, f"Invalid sample for {path}") from error
        lfs = wants_lfs(path, size if isinstance(size, int) else 0, sample)
        old = present.get(path)
        oid = (old.sha256 if old.lfs else old.oid) if old else None
        mode = "lfs" if lfs else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return JSONResponse({"files": answers})


async def lfs_batch(call: Call) -> Response:
    """Hand out an upload address for every object that the repo does not have."""
    call.writer()
    answers = [_lfs_object(call, entry) for entry in objects(await call.json(), "objects")]
    return JSONResponse({"transfer": "basic", "objects": answers}, media_type="application/vnd.git-lfs+json")


def _lfs_object(call: Call, entry: dict[str, Any]) -> dict[str, Any]:
    sha256, size = text(entry, "oid"), entry.get("size")
    path = call.store.blob(sha256)
    if not isinstance(size, int) or not 0 <= size <= _MAX_LFS_BYTES:
        return {"oid": sha256, "size": 0, "error": {"code": 422, "message": "Invalid size"}}
    answer: dict[str, Any] = {"oid": sha256, "size": size}
    if sha256 in call.repo.objects and path.exists():
        return answer
    secret = secrets.token_hex(16)
    call.hub.uploads[secret] = Upload(call.repo, sha256, size)
    action: dict[str, Any] = {"href": f"{call.hub.endpoint}/lfs/{secret}"}
    chunk = call.hub.part_bytes
    if size > chunk:
        parts = {str(number): f"{action['href']}/{number}" for number in range(1, -(-size // chunk) + 1)}
        action["header"] = {"chunk_size": str(chunk), **parts}
    return {**answer, "authenticated": True, "actions": {"upload": action}}


def _upload(call: Call) -> Upload:
    upload = call.hub.uploads.get(call.params["secret"])
    if upload is None:
        raise HubError(403, "This upload address is unknown or has been used.")
    return upload


async def _receive(call: Call, incoming: Incoming, limit: int) -> None:
    async for chunk in call.request.stream():
        if incoming.size + len(chunk) > limit:
            raise HubError(400, f"More than the announced {limit} bytes.")
        incoming.write(chunk)


async def lfs_put(call: Call) -> Response:
    """Take an LFS object, if it is what was announced."""
    upload = _upload(call)
    with Incoming(call.store) as incoming:
        await _receive(call, incoming, upload.size)
        incoming.keep(upload.sha256, upload.size)
    call.store.own(upload.repo, [upload.sha256])
    call.hub.uploads.pop(call.params["secret"], None)
    return Response()


async def lfs_put_part(call: Call) -> Response:
    """Take one part of an LFS object; its place in the object is the number in the address."""
    upload, chunk = _upload(call), call.hub.part_bytes
    number = number_in(call.params["part"])
    if not 1 <= number <= -(-upload.size // chunk):
        raise HubError(400, "There is no such part.")
    path = call.store.root / "incoming" / f"{call.params['secret']}.{number}"
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        async for data in call.request.stream():
            size += len(data)
            if size > chunk:
                raise HubError(400, f"More than {chunk} bytes in one part.")
            file.write(data)
            digest.update(data)
    upload.parts[number] = path
    return Response(headers={"etag": f'"{digest.hexdigest()}"'})


async def lfs_complete(call: Call) -> Response:
    """Put the parts of an LFS object together, if they are what was announced."""
    upload = _upload(call)
    await call.json()
    paths = [upload.parts[number] for number in sorted(upload.parts)]

    def join() -> None:
        with Incoming(call.store) as incoming:
            for path in paths:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        incoming.write(block)
            incoming.keep(upload.sha256, upload.size)
        for path in paths:
            path.unlink()

    await run_in_threadpool(join)
    call.store.own(upload.repo, [upload.sha256])
    call.hub.uploads.pop(call.params["secret"], None)
    return JSONResponse({"success": True})


async def duplicate(call: Call) -> Response:
    """Let another repo have LFS objects of this one, for a copy between repos that moves no bytes."""
    call.check_content()
    body = await call.json()
    target, files = body.get("target"), objects(body, "files")
    if not isinstance(target, dict):
        raise HubError(400, "'target' must be an object")
    repo = call.store.repos.get((kind_of(target.get("type")), text(target, "name")))
    if repo is None or not call.hub.may_see(call.user, repo):
        raise HubError(404, "Repository not found", "RepoNotFound")
    call.writer(repo.namespace)
    wanted, present = {text(file, "sha256") for file in files}, set(call.repo.objects)
    call.store.own(repo, wanted & present)
    failed = [{"sha256": sha256, "error": "not found"} for sha256 in sorted(wanted - present)]
    return JSONResponse({"success": not failed, "failed": failed})


async def _lines(call: Call) -> AsyncIterator[dict[str, Any]]:
    # Line by line: a commit of many small files can be far larger than any one of them.
    rest = b""
    async for chunk in call.request.stream():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield json_object(line)
        if len(rest) > _MAX_LINE_BYTES:
            raise HubError(413, f"A file in a commit is larger than {MAX_REGULAR_BYTES} bytes: use LFS.")
    if rest.strip():
        yield json_object(rest)


def _change(call: Call, key: str, value: dict[str, Any]) -> Change:
    path = valid_path(text(value, "path").removesuffix("/") if key == "deletedFolder" else value.get("path"))
    if key == "deletedFile":
        return path, None
    if key == "deletedFolder":
        return f"{path}/", None
    if key == "lfsFile":
        return path, call.store.lfs_file(call.repo, text(value, "oid"))
    if key == "copyFile":
        made = call.store.revision(call.repo, text(value, "srcRevision", "main"))
        source = made.files.get(text(value, "srcPath"))
        if source is None:
            raise HubError(404, f"There is no {value['srcPath']:.120} to copy.", "EntryNotFound")
        return path, source
    if key != "file":
        raise HubError(400, f"Unknown operation {key!r:.40}")
    try:
        content = base64.b64decode(text(value, "content"), validate=True)
    except binascii.Error as error:
        raise HubError(400, f"Invalid base64 for {path}") from error
    if len(content) > MAX_REGULAR_BYTES:
        raise HubError(413, f"{path} is larger than {MAX_REGULAR_BYTES} bytes: use LFS.")
    if path == "README.md" and (wrong := problems(content.decode(errors="replace"))):
        errors = [{"message": message} for message in wrong]
        raise HubError(400, "Invalid metadata in README.md", errors=errors)
    return path, call.store.put(content)


async def commit(call: Call) -> Response:
    """One atomic commit, on a branch or as a pull request, from a header line and one line a change."""
    user, header, changes = _writer_at(call), dict[str, Any](), list[Change]()
    async for line in _lines(call):
        value = line.get("value")
        if not isinstance(value, dict):
            raise HubError(400, "Expected a key and a value in every line")
        if line.get("key") == "header":
            header = value
        else:
            changes.append(_change(call, text(line, "key"), value))
        if len(changes) > _MAX_OPERATIONS:
            raise HubError(413, f"More than {_MAX_OPERATIONS} operations in one commit.")
    note = Note(text(header, "summary"), text(header, "description", ""), user)
    parent = text(header, "parentCommit") if "parentCommit" in header else None
    store, answer = call.store, {"success": True, "hookOutput": ""}
    if call.flag("create_pr"):
        base = store.revision(call.repo, parent) if parent else call.commit()
        num = store.discuss(call.repo, note, base, changes)
        sha = call.repo.refs[f"refs/pr/{num}"]
        answer["pullRequestUrl"] = call.url("discussions", str(num))
    else:
        sha = store.commit(call.repo, call.params["rev"], changes, note, parent).sha
    return JSONResponse({**answer, "commitOid": sha, "commitUrl": call.url("commit", sha)})


async def resolve(call: Call) -> Response:
    """Where a file is: LFS files at another origin, where no token may follow, small ones beside this."""
    made, path = call.commit(), call.params["path"]
    call.check_content()
    headers = {"X-Repo-Commit": made.sha}
    file = made.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    if file.lfs:
        linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        location = f"{call.hub.cdn}/cdn/{call.hub.sign(file.sha256)}/{file.sha256}"
        return Response(status_code=302, headers={**headers, **linked, "Location": location})
    location = f"/api/resolve-cache/{call.repo.kind}s/{call.repo.id}/{made.sha}/{quote(path)}"
    return Response(status_code=307, headers={**headers, "ETag": f'"{file.oid}"', "Location": location})


async def resolve_cache(call: Call) -> Response:
    """The content of a small file, at an address that never means anything else."""
    call.check_content()
    made = call.commit()
    file = made.files.get(call.params["path"])
    if file is None or file.lfs:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": made.sha})
    headers = {"X-Repo-Commit": made.sha, "ETag": f'"{file.oid}"'}
    return _content(call.store.blob(file.sha256), headers, "text/plain; charset=utf-8")


async def cdn(call: Call) -> Response:
    """The content of an LFS file, for whoever has its address."""
    sha256 = call.params["sha256"]
    path = call.store.blob(sha256)
    if "authorization" in call.request.headers:
        raise HubError(400, "This address is signed, and a token was sent with it.")
    if not secrets.compare_digest(call.params["signature"].encode(), call.hub.sign(sha256).encode()):
        raise HubError(403, "This address is not signed.")
    if not path.exists():
        raise HubError(404, "Not found")
    return _content(path, {"ETag": f'"{sha256}"'}, "application/octet-stream")


def _content(path: Path, headers: dict[str, str], media_type: str) -> Response:
    # With the length there already, so that `transform` sees the headers as they will be sent.
    return FileResponse(path, headers=headers, media_type=media_type, stat_result=path.stat())
