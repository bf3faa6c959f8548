"""What a repo is: info, lists, trees, refs, settings, discussions."""

import hashlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hf_soup.local_hub import card
from hf_soup.local_hub.names import HubError, pointer, valid_id, valid_path
from hf_soup.local_hub.store import Commit, File, Kind, Repo
from hf_soup.local_hub.wire import Call, json_object, kind_of, not_found, number_in, text

_ALWAYS = ("_id", "id", "modelId")
_LISTED = ["author", "createdAt", "downloads", "gated", "lastModified", "library_name", "likes"]
_LISTED += ["pipeline_tag", "private", "sha", "tags"]
_FULL = [*_LISTED, "cardData", "config", "disabled", "model-index", "safetensors", "siblings", "spaces"]
_FULL += ["usedStorage"]
_EXPANDED_PAGE = 50


async def whoami(call: Call) -> Response:
    """Who the token belongs to."""
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "local", "role": "write" if call.may_write else "read"}
    auth = {"type": "access_token", "accessToken": token}
    about = {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "isPro": False}
    return JSONResponse({**about, "canPay": False, "orgs": [], "auth": auth})


async def validate_yaml(call: Call) -> Response:
    """Say what is wrong with the metadata of a README, before anything is uploaded."""
    content = text(await call.json(), "content")
    if wrong := card.problems(content):
        errors = [{"message": message} for message in wrong]
        raise HubError(400, "Invalid metadata in README.md", errors=errors, warnings=[])
    empty = [] if card.read_card(content) else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": empty})


# Repos


def _private(body: dict[str, Any]) -> bool | None:
    if "visibility" in body:
        return text(body, "visibility") == "private"
    return bool(body["private"]) if "private" in body else None


async def create(call: Call) -> Response:
    """Make a repo; one that exists answers 409 with its address, which `exist_ok` reads."""
    user, body = call.writer(), await call.json()
    kind = kind_of(body.get("type") or "model")
    repo_id = valid_id(f"{body.get('organization') or user}/{text(body, 'name')}")
    call.found = call.store.repos.get((kind, repo_id))
    call.writer(repo_id.partition("/")[0])
    if call.found:
        raise HubError(409, f"You already created this {kind} repo", url=call.url())
    call.found = call.store.create(kind, repo_id, private=bool(_private(body)), author=user)
    return JSONResponse({"url": call.url(), "name": repo_id, "id": repo_id})


def _named(call: Call, kind: Kind, repo_id: str) -> Repo:
    repo = call.store.repos.get((kind, repo_id))
    if repo is None or not call.hub.may_see(call.user, repo):
        raise not_found(call.user)
    call.writer(repo.namespace)
    return repo


async def delete(call: Call) -> Response:
    """Remove a repo."""
    body = await call.json()
    repo_id = f"{body.get('organization') or call.user}/{text(body, 'name')}"
    call.store.delete(_named(call, kind_of(body.get("type") or "model"), repo_id))
    return JSONResponse({"success": True})


async def move(call: Call) -> Response:
    """Rename a repo; the old id answers 307 from then on."""
    body = await call.json()
    repo = _named(call, kind_of(body.get("type") or "model"), text(body, "fromRepo"))
    target = valid_id(body.get("toRepo"))
    call.writer(target.partition("/")[0])
    call.store.move(repo, target)
    return JSONResponse({"success": True})


async def settings(call: Call) -> Response:
    """Change who may see a repo and its files."""
    call.writer(call.repo.namespace)
    body = await call.json()
    with call.store.lock:
        if (private := _private(body)) is not None:
            call.repo.private = private
        if "gated" in body:
            if body["gated"] not in (False, "auto", "manual"):
                raise HubError(400, "'gated' must be false, auto or manual")
            call.repo.gated = body["gated"]
        call.store.save(call.repo)
    return JSONResponse({"private": call.repo.private, "gated": call.repo.gated})


async def auth_check(call: Call) -> Response:
    """Whether the user may read the files."""
    call.check_content()
    return JSONResponse({})


async def auth_check_write(call: Call) -> Response:
    """Whether the user may write."""
    call.writer(call.repo.namespace)
    return JSONResponse({})


# Info


def _json_file(call: Call, repo: Repo, commit: Commit, name: str) -> dict[str, Any]:
    file = commit.files.get(name)
    if file is None or file.size > 1_000_000:
        return {}
    try:
        return json_object(call.store.blob(file.sha256).read_bytes())
    except HubError:
        return {}


def _about(call: Call, repo: Repo, commit: Commit, wanted: Iterable[str]) -> dict[str, Any]:
    wanted, names = set(wanted), list(commit.files)
    readme, data = commit.files.get("README.md"), dict[str, Any]()
    if readme and readme.size <= 1_000_000:
        content = call.store.blob(readme.sha256).read_bytes().decode(errors="replace")
        # A README whose metadata cannot be read has none: it came from a bot, unchecked.
        data = {} if card.problems(content) else card.read_card(content)
    config = _json_file(call, repo, commit, "config.json")
    derived = card.describe(data, config, names)
    about: dict[str, Any] = {
        "author": repo.namespace,
        "cardData": data or None,
        "config": {k: config[k] for k in ("architectures", "model_type") if k in config} or None,
        "createdAt": repo.created,
        "disabled": False,
        "downloads": 0,
        "gated": repo.gated,
        "lastModified": commit.date,
        "likes": 0,
        "model-index": data.get("model-index"),
        "private": repo.private,
        "sha": commit.sha,
        "siblings": [_sibling(name, file, call.flag("blobs")) for name, file in commit.files.items()],
        "spaces": [],
        "usedStorage": sum(file.size for file in commit.files.values()),
        **derived,
    }
    if "safetensors" in wanted:
        weights = [f for name, f in commit.files.items() if name.endswith(".safetensors") and "/" not in name]
        headers = [card.safetensors_header(call.store.blob(file.sha256)) for file in weights]
        about["safetensors"] = card.parameter_counts([header for header in headers if header])
    identity = {"_id": commit.sha[:24], "id": repo.id}
    if repo.kind == "model":
        identity["modelId"] = repo.id
    return {**identity, **{key: about[key] for key in about if key in wanted and about[key] is not None}}


def _sibling(name: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": name}
    sibling: dict[str, Any] = {"rfilename": name, "blobId": file.oid, "size": file.size}
    if file.lfs:
        size = len(pointer(file.sha256, file.size))
        sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": size}
    return sibling


def expanded(call: Call) -> list[str]:
    """The properties that the query asks for."""
    query = call.request.query_params
    return [*query.getlist("expand"), *query.getlist("expand[]")]


async def info(call: Call) -> Response:
    """A repo at a revision: everything, or what `expand` names."""
    wanted = expanded(call) or _FULL
    return JSONResponse(await run_in_threadpool(_about, call, call.repo, call.commit(), wanted))


async def list_repos(call: Call) -> Response:
    """The repos that the user may see and that pass every filter."""
    query = call.request.query_params
    wanted = expanded(call) or [*_LISTED, *(["siblings", "cardData"] if call.flag("full") else [])]
    wanted += [name for name in ("config", "cardData") if call.flag(name)]
    found = []
    for (kind, repo_id), repo in sorted(call.store.repos.items()):
        if f"{kind}s" != call.params["kind"] or not call.hub.may_see(call.user, repo):
            continue
        about = _about(call, repo, call.store.revision(repo, "main"), [*_LISTED, *wanted])
        if (
            set(query.getlist("filter")) <= {*about["tags"]}
            and query.get("author") in (None, repo.namespace)
            and query.get("search", "").lower() in repo_id.lower()
            and query.get("pipeline_tag") in (None, about.get("pipeline_tag"))
            and ("gated" not in query or call.flag("gated") == bool(repo.gated))
        ):
            found.append(about)
    if (sort := query.get("sort")) in ("createdAt", "lastModified"):
        found.sort(key=lambda about: str(about[sort]), reverse=True)
    keep = {*_ALWAYS, *wanted}
    size = min(number_in(query.get("limit", "")) or call.hub.page_size, call.hub.page_size)
    return call.page([{k: v for k, v in about.items() if k in keep} for about in found], size)


# Files


def _entry(call: Call, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
    file = commit.files.get(path)
    below = {} if file else {name: f for name, f in commit.files.items() if name.startswith(f"{path}/")}
    if file:
        entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.lfs:
            size = len(pointer(file.sha256, file.size))
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": size}
    elif below:
        digest = hashlib.sha1(repr(sorted(below.items())).encode(), usedforsecurity=False).hexdigest()
        entry = {"type": "directory", "oid": digest, "size": 0, "path": path}
    else:
        return None
    if expand:
        last = _last_change(call, commit, path)
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return entry


def _last_change(call: Call, commit: Commit, path: str) -> Commit:
    def content(of: Commit) -> list[tuple[str, File]]:
        return [item for item in of.files.items() if item[0] == path or item[0].startswith(f"{path}/")]

    now, last = content(commit), commit
    for older in call.store.history(call.repo, commit):
        if content(older) != now:
            break
        last = older
    return last


async def tree(call: Call) -> Response:
    """Files and folders below a path, page by page and all of one commit."""
    made, root = call.commit(), call.params.get("path", "").strip("/")
    prefix = f"{valid_path(root)}/" if root else ""
    names = [name.removeprefix(prefix) for name in made.files if name.startswith(prefix)]
    if root and not names:
        raise HubError(404, f"{root:.120} does not exist on {call.params['rev']:.120}", "EntryNotFound")
    paths = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"} | set(names)
    if not call.flag("recursive"):
        paths = {path for path in paths if "/" not in path}
    expand = call.flag("expand")
    entries = [_entry(call, made, prefix + path, expand) for path in sorted(paths)]
    below = f"/{quote(root, safe='')}" if root else ""
    where = f"/api/{call.repo.kind}s/{call.repo.id}/tree/{made.sha}{below}"
    size = min(call.hub.page_size, _EXPANDED_PAGE) if expand else call.hub.page_size
    return call.page(entries, size, where)


async def paths_info(call: Call) -> Response:
    """Some files and folders by path; what is absent is left out."""
    made = call.commit()
    form = parse_qs((await call.body()).decode(errors="replace"))
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = [_entry(call, made, path.strip("/"), expand) for path in form.get("paths", [])]
    for entry in entries:
        if entry and "lfs" in entry:
            # The client copies a file between repos only if it has one. Downloads do not look here, so
            # nothing is fetched over a protocol that this server does not speak.
            entry["xetHash"] = entry["lfs"]["oid"]
    return JSONResponse([entry for entry in entries if entry])


async def safetensors_metadata(call: Call) -> Response:
    """The headers of all shards that an index on main names."""
    call.check_content()
    made = call.store.revision(call.repo, "main")
    index = _json_file(call, call.repo, made, call.params["path"])
    weight_map = index.get("weight_map")
    shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not shards or not all(shard in made.files for shard in shards):
        raise HubError(404, "Entry not found", "EntryNotFound")
    headers = {shard: card.safetensors_header(call.store.blob(made.files[shard].sha256)) for shard in shards}
    return JSONResponse({"index": {"metadata": index.get("metadata")}, "headers": headers})
