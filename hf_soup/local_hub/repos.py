"""What a repo is: info, lists, trees, settings, branches and tags, histories."""

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.responses import JSONResponse, Response

from hf_soup.local_hub import card
from hf_soup.local_hub.store import Commit, HubError, Kind, Repo, valid_id, valid_path, valid_ref
from hf_soup.local_hub.wire import Call, Endpoint, kind_of, not_found


async def whoami(call: Call) -> Response:
    """Who the token belongs to."""
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "local", "role": "write" if call.may_write else "read"}
    about = {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "isPro": False, "orgs": []}
    return JSONResponse({**about, "auth": {"type": "access_token", "accessToken": token}})


async def validate_yaml(call: Call) -> Response:
    """Say what is wrong with the metadata of a README, before anything is uploaded."""
    content = (await call.json())["content"]
    if wrong := card.problems(content):
        errors = [{"message": message} for message in wrong]
        raise HubError(400, "Invalid metadata in README.md", errors=errors, warnings=[])
    empty = [] if card.read_card(content) else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": empty})


async def create(call: Call) -> Response:
    """Make a repo; one that exists answers 409 with its address, which `exist_ok` reads."""
    user, body = call.writer(), await call.json()
    kind, repo_id = kind_of(body.get("type")), valid_id(f"{body.get('organization') or user}/{body['name']}")
    if not call.hub.has(namespace := repo_id.partition("/")[0]):
        raise HubError(404, f"There is no user or organization {namespace!r:.100}")
    call.writer(namespace)
    url = call.address(kind, repo_id)
    if (kind, repo_id) in call.store.repos:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    call.store.create(kind, repo_id, private=body.get("visibility") == "private", author=user)
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


def _known(call: Call, kind: Kind, repo_id: str) -> Repo:
    repo = call.store.repos.get((kind, repo_id))
    if repo is None or not call.hub.may_see(call.user, repo):
        raise not_found(call.user)
    return repo


async def delete(call: Call) -> Response:
    """Delete a repo, for good."""
    user, body = call.writer(), await call.json()
    repo = _known(call, kind_of(body.get("type")), f"{body.get('organization') or user}/{body['name']}")
    call.writer(repo.namespace)
    call.store.delete(repo)
    return JSONResponse({"success": True})


async def move(call: Call) -> Response:
    """Rename a repo; the old id answers 307 from then on."""
    body = await call.json()
    kind, old_id, new_id = kind_of(body.get("type")), body["fromRepo"], body["toRepo"]
    for repo_id in (_known(call, kind, old_id).id, new_id):
        call.writer(repo_id.partition("/")[0])
    call.store.rename(kind, old_id, new_id)
    return JSONResponse({"success": True})


async def settings(call: Call) -> Response:
    """Change who may see a repo and its files."""
    call.writer(call.repo.namespace)
    body = await call.json()
    with call.store.lock:
        if "visibility" in body:
            call.repo.private = body["visibility"] == "private"
        if "gated" in body:
            call.repo.gated = body["gated"]
        call.store.save(call.repo)
    return JSONResponse({"private": call.repo.private, "gated": call.repo.gated})


_ORDERS = ("downloads", "likes", "createdAt", "lastModified", "trendingScore")


def _content(call: Call, commit: Commit, name: str) -> bytes:
    file = commit.files.get(name)
    return call.store.blob(file.sha256).read_bytes() if file and not file.lfs else b""


def _about(call: Call, repo: Repo, commit: Commit) -> dict[str, Any]:
    readme = _content(call, commit, "README.md").decode(errors="replace")
    # A README whose metadata cannot be read has none: it came from a bot, unchecked.
    data = {} if card.problems(readme) else card.read_card(readme)
    try:
        config = dict(json.loads(_content(call, commit, "config.json")))
    except (ValueError, TypeError):
        config = {}
    siblings: list[dict[str, Any]] = [{"rfilename": name} for name in commit.files]
    if call.flag("blobs"):
        for sibling, file in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"blobId": file.oid, "size": file.size, **(file.details() if file.lfs else {})}
    about = {
        "_id": commit.sha[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "likes": 0,
        "downloads": repo.downloads,
        "cardData": data or None,
        "model-index": data.get("model-index"),
        "siblings": siblings,
        "config": {key: config[key] for key in ("architectures", "model_type") if key in config} or None,
        **card.describe(data, config, list(commit.files), call.store.current_id),
    }
    return {key: value for key, value in about.items() if value is not None}


def _expanded(call: Call, about: dict[str, Any]) -> dict[str, Any]:
    wanted = {"_id", "id", "modelId", *call.query.getlist("expand")}
    return {key: value for key, value in about.items() if key in wanted} if "expand" in call.query else about


async def info(call: Call) -> Response:
    """A repo at a revision: everything, or what `expand` names."""
    return JSONResponse(_expanded(call, _about(call, call.repo, call.commit())))


async def list_repos(call: Call) -> Response:
    """The repos that the user may see and that pass every filter, those with most of what is sorted by first."""
    kind, found = kind_of(call.params["kind"]), []
    author, search, tags = call.query.get("author"), call.query.get("search", ""), {*call.query.getlist("filter")}
    task, order = call.query.get("pipeline_tag"), call.query.get("sort", "trendingScore")
    if order not in _ORDERS:
        raise HubError(400, f"Invalid sort: {order:.40}. It is one of {', '.join(_ORDERS)}.")
    for repo in sorted(call.store.repos.values(), key=lambda repo: repo.id):
        fitting = author in (None, repo.namespace) and search.lower() in repo.id.lower()
        if fitting and repo.kind == kind and call.hub.may_see(call.user, repo):
            about = _about(call, repo, call.store.revision(repo, "main"))
            if tags <= {*about["tags"]} and task in (None, about.get("pipeline_tag")):
                found.append(about)
    # Nothing is trending here, so without another order it is that of the names.
    found.sort(key=lambda about: about.get(order, 0), reverse=order != "trendingScore")
    return call.page([_expanded(call, about) for about in found])


def _entry(commit: Commit, path: str) -> dict[str, Any] | None:
    if file := commit.files.get(path):
        entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        return {**entry, **(file.details() if file.lfs else {})}
    if below := [item for item in commit.files.items() if item[0].startswith(f"{path}/")]:
        oid = hashlib.sha1(repr(below).encode(), usedforsecurity=False).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": path}
    return None


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
    entries = [_entry(made, prefix + path) for path in sorted(paths)]
    return call.page(entries, _api(call, "tree", made.sha, *([root] if root else [])))


def _api(call: Call, *parts: str) -> str:
    return "/".join((f"/api/{call.repo.kind}s/{call.repo.id}", *(quote(part, safe="") for part in parts)))


async def paths_info(call: Call) -> Response:
    """Some files and folders by path; what is absent is left out."""
    made, form = call.commit(), parse_qs((await call.body()).decode(errors="replace"))
    entries = [_entry(made, path.strip("/")) for path in form.get("paths", [])]
    return JSONResponse([entry for entry in entries if entry])


async def list_refs(call: Call) -> Response:
    """Branches, tags and, if asked for, pull requests."""

    def below(prefix: str) -> list[dict[str, str]]:
        found = sorted((ref, sha) for ref, sha in call.repo.refs.items() if ref.startswith(prefix))
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

    answer = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    if call.flag("include_prs"):
        answer["pullRequests"] = below("refs/pr/")
    return JSONResponse(answer)


async def commits(call: Call) -> Response:
    """The history of a revision, youngest first."""
    made = call.commit()
    entries = [
        {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in call.store.history(call.repo, made)
    ]
    return call.page(entries, _api(call, "commits", made.sha))


async def create_branch(call: Call) -> Response:
    """A branch at a revision, main unless the body says otherwise."""
    start = (await call.json()).get("startingPoint", "main")
    return _new_ref(call, "heads", call.params["rev"], start)


async def create_tag(call: Call) -> Response:
    """A tag at a revision."""
    return _new_ref(call, "tags", (await call.json())["tag"], call.params["rev"])


def _new_ref(call: Call, kind: str, name: str, revision: str) -> Response:
    call.writer(call.repo.namespace)
    ref, sha = f"refs/{kind}/{valid_ref(name)}", call.store.revision(call.repo, revision).sha
    with call.store.lock:
        if ref in call.repo.refs:
            raise HubError(409, "Reference already exists")
        call.repo.refs[ref] = sha
        call.store.save(call.repo)
    return JSONResponse({"success": True})


ROUTES: dict[str, Endpoint] = {
    "GET /api/whoami-v2": whoami,
    "POST /api/validate-yaml": validate_yaml,
    "POST /api/repos/create": create,
    "DELETE /api/repos/delete": delete,
    "POST /api/repos/move": move,
    "GET /api/{kind}": list_repos,
    "GET /api/{kind}/{id}": info,
    "GET /api/{kind}/{id}/revision/{rev}": info,
    "PUT /api/{kind}/{id}/settings": settings,
    "GET /api/{kind}/{id}/tree/{rev}": tree,
    "GET /api/{kind}/{id}/tree/{rev}/{path}": tree,
    "POST /api/{kind}/{id}/paths-info/{rev}": paths_info,
    "GET /api/{kind}/{id}/refs": list_refs,
    "GET /api/{kind}/{id}/commits/{rev}": commits,
    "POST /api/{kind}/{id}/branch/{rev}": create_branch,
    "POST /api/{kind}/{id}/tag/{rev}": create_tag,
}
