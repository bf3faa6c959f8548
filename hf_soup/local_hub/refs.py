"""Branches, tags, histories, discussions and pull requests."""

from typing import Any

from starlette.responses import JSONResponse, Response

from hf_soup.local_hub.metadata import expanded
from hf_soup.local_hub.names import HubError, valid_ref
from hf_soup.local_hub.store import Note
from hf_soup.local_hub.wire import Call, number_in, text

# Refs


async def list_refs(call: Call) -> Response:
    """Branches, tags and, if asked for, pull requests."""

    def below(prefix: str) -> list[dict[str, str]]:
        found = sorted((ref, sha) for ref, sha in call.repo.refs.items() if ref.startswith(prefix))
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

    answer: dict[str, list[dict[str, str]]] = {
        "branches": below("refs/heads/"),
        "tags": below("refs/tags/"),
        "converts": [],
    }
    if call.flag("include_prs"):
        answer["pullRequests"] = [{**ref, "name": ref["ref"]} for ref in below("refs/pr/")]
    return JSONResponse(answer)


async def commits(call: Call) -> Response:
    """The history of a revision, youngest first."""
    made = call.commit()
    entries: list[dict[str, Any]] = [
        {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in call.store.history(call.repo, made)
    ]
    if "formatted" in expanded(call):
        entries = [{**e, "formatted": {"title": e["title"], "message": e["message"]}} for e in entries]
    return call.page(entries, call.hub.page_size, f"/api/{call.repo.kind}s/{call.repo.id}/commits/{made.sha}")


def _set_ref(call: Call, ref: str, sha: str | None) -> Response:
    with call.store.lock:
        if sha is None and ref not in call.repo.refs:
            raise HubError(404, f"There is no {ref}", "RevisionNotFound")
        if sha and ref in call.repo.refs:
            raise HubError(409, "Reference already exists")
        if sha:
            call.repo.refs[ref] = sha
        else:
            del call.repo.refs[ref]
        call.store.save(call.repo)
    return JSONResponse({"success": True})


async def create_branch(call: Call) -> Response:
    """A branch at a revision, main unless the body says otherwise."""
    call.writer(call.repo.namespace)
    start = call.store.revision(call.repo, text(await call.json(), "startingPoint", "main"))
    return _set_ref(call, f"refs/heads/{valid_ref(call.params['rev'])}", start.sha)


async def delete_branch(call: Call) -> Response:
    """Remove a branch other than main."""
    call.writer(call.repo.namespace)
    if call.params["rev"] == "main":
        raise HubError(403, "The default branch cannot be deleted")
    return _set_ref(call, f"refs/heads/{valid_ref(call.params['rev'])}", None)


async def create_tag(call: Call) -> Response:
    """A tag at a revision."""
    call.writer(call.repo.namespace)
    tag = valid_ref((await call.json()).get("tag"))
    return _set_ref(call, f"refs/tags/{tag}", call.commit().sha)


async def delete_tag(call: Call) -> Response:
    """Remove a tag."""
    call.writer(call.repo.namespace)
    return _set_ref(call, f"refs/tags/{valid_ref(call.params['rev'])}", None)


# Discussions


def _discussion(call: Call) -> dict[str, Any]:
    num = number_in(call.params["num"])
    if not 1 <= num <= len(call.repo.discussions):
        raise HubError(404, "Discussion not found")
    return call.repo.discussions[num - 1]


def _shown(call: Call, discussion: dict[str, Any]) -> dict[str, Any]:
    return {**discussion, "repo": {"name": call.repo.id, "type": call.repo.kind}}


async def list_discussions(call: Call) -> Response:
    """Discussions and pull requests, youngest first."""
    kind, status, author = (call.query.get(key) for key in ("type", "status", "author"))
    chosen = [
        _shown(call, d)
        for d in reversed(call.repo.discussions)
        if kind in (None, "all", "pull_request" if d["isPullRequest"] else "discussion")
        and (status in (None, "all") or (status == "open") == (d["status"] in ("open", "draft")))
        and author in (None, d["author"]["name"])
    ]
    start = number_in(call.query.get("p", "")) * call.hub.page_size
    shown = chosen[start : start + call.hub.page_size]
    return JSONResponse({"discussions": shown, "count": len(chosen), "start": start})


async def discussion(call: Call) -> Response:
    """One discussion with its events."""
    found = _shown(call, _discussion(call))
    if found["isPullRequest"]:
        found |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
    return JSONResponse(found)


async def create_discussion(call: Call) -> Response:
    """Open a discussion, or a draft of a pull request that is still equal to main."""
    user, body = call.writer(), await call.json()
    base = call.store.revision(call.repo, "main") if body.get("pullRequest") else None
    title, opening = text(body, "title"), text(body, "description", "")
    num = call.store.discuss(call.repo, Note(title, opening, user), base)
    url = call.url("discussions", str(num))
    return JSONResponse({"num": num, "url": url, "pullRequest": base is not None})


async def comment(call: Call) -> Response:
    """Add a comment."""
    user, num = call.writer(), _discussion(call)["num"]
    event = call.store.comment(call.repo, num, text(await call.json(), "comment"), user)
    return JSONResponse({"newMessage": event})


async def change_status(call: Call) -> Response:
    """Open or close a discussion."""
    found, body = _discussion(call), await call.json()
    user = call.writer(None if found["author"]["name"] == call.user else call.repo.namespace)
    status = text(body, "status")
    if status not in ("open", "closed"):
        raise HubError(400, "'status' must be open or closed")
    with call.store.lock:
        found["status"] = status
        event = call.store.add_event(call.repo, found["num"], "status-change", {"status": status}, user)
    return JSONResponse({"newStatus": event})
