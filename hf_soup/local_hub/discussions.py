"""Pull requests: discussions with the commits that they offer, which are the only ones here.

Each has a ``base``, the commit of main that it starts from, and a list of events, the first of which is the
description.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from starlette.responses import JSONResponse, Response

from hf_soup.local_hub.store import HubError, event
from hf_soup.local_hub.wire import Call, Endpoint, number_in

_STATUS = {"open": ("open",), "closed": ("closed", "merged")}


async def list_discussions(call: Call) -> Response:
    """Pull requests, youngest first."""
    kind, status, author = (call.query.get(key) for key in ("type", "status", "author"))
    chosen = [
        _shown(call, each)
        for each in reversed(call.repo.discussions)
        if kind in (None, "all", "pull_request")
        and (status in (None, "all") or each["status"] in _STATUS.get(status, ()))
        and author in (None, each["author"]["name"])
    ]
    start = number_in(call.query.get("p", "")) * call.hub.page_size
    shown = chosen[start : start + call.hub.page_size]
    return JSONResponse({"discussions": shown, "count": len(chosen), "start": start})


async def discussion(call: Call) -> Response:
    """One of them with its events: the description, then the others and the commits in their order."""
    about = _found(call)
    answer = {**_shown(call, about), "events": list(about.get("events", []))}
    offered = call.store.history(call.repo, call.store.revision(call.repo, f"refs/pr/{about['num']}"))
    commits = [
        {"id": c.sha, "type": "commit", "createdAt": c.date, "author": {"name": c.author}}
        | {"data": {"subject": c.title, "oid": c.sha}}
        for c in takewhile(lambda commit: commit.sha != about["base"], offered)
    ]
    answer["events"][1:] = sorted([*answer["events"][1:], *commits], key=lambda each: str(each["createdAt"]))
    changes = {"base": "refs/heads/main", **({"mergeCommitId": about["merged"]} if "merged" in about else {})}
    conflicts = [] if about["status"] == "merged" else _merged(call, about)[1]
    return JSONResponse({**answer, "changes": changes, "filesWithConflicts": conflicts, "diff": ""})


async def change_status(call: Call) -> Response:
    """Open or close, by the author or the owner of the repo."""
    user, body = call.writer(), await call.json()
    about, status = _found(call), body.get("status")
    if user != about["author"]["name"]:
        call.writer(call.repo.namespace)
    if status not in _STATUS or about["status"] in (status, "merged"):
        raise HubError(400, f"What is {about['status']} cannot become {status!r:.40}.")
    return JSONResponse({"newStatus": _add(call, event("status-change", user, status=status), status=status)})


async def merge(call: Call) -> Response:
    """Put what a pull request offers on main, as one commit."""
    user = call.writer(call.repo.namespace)
    with call.store.lock:
        about = _found(call)
        if about["status"] != "open":
            raise HubError(400, f"Discussion {about['num']} is no open pull request.")
        files, conflicts = _merged(call, about)
        if conflicts:
            raise HubError(409, f"These files were changed on main as well: {', '.join(conflicts)}")
        note = f"{about['title']} (#{about['num']})", f"- {about['title']}", user
        sha = call.store.commit(call.repo, "main", list(files.items()), note, None).sha
        _add(call, event("status-change", user, status="merged"), status="merged", merged=sha)
    return JSONResponse({"success": True})


def _merged(call: Call, about: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a pull request changes on main, by path, and the paths that main has changed otherwise since."""
    commits = [call.store.revision(call.repo, name) for name in (about["base"], f"refs/pr/{about['num']}", "main")]
    before, offered, now = (commit.files for commit in commits)
    changed = [path for path in {**before, **offered} if before.get(path) != offered.get(path)]
    conflicts = [p for p in changed if now.get(p) not in (before.get(p), offered.get(p))]
    return {path: offered.get(path) for path in changed if now.get(path) != offered.get(path)}, conflicts


def _found(call: Call) -> dict[str, Any]:
    num = number_in(call.params["num"])
    if not 1 <= num <= len(call.repo.discussions):
        raise HubError(404, "Discussion not found")
    return call.repo.discussions[num - 1]


def _add(call: Call, made: dict[str, Any], **changes: str) -> dict[str, Any]:
    with call.store.lock:
        about = _found(call)
        about.setdefault("events", []).append(made)
        about.update(changes)
        call.store.save(call.repo)
    return made


def _shown(call: Call, about: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: about[key] for key in ("num", "title", "author", "createdAt", "status")}
    return {**shown, "isPullRequest": True, "repo": {"name": call.repo.id, "type": call.repo.kind}}


ROUTES: dict[str, Endpoint] = {
    "GET /api/{kind}/{id}/discussions": list_discussions,
    "GET /api/{kind}/{id}/discussions/{num}": discussion,
    "POST /api/{kind}/{id}/discussions/{num}/status": change_status,
    "POST /api/{kind}/{id}/discussions/{num}/merge": merge,
}
