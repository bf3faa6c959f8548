"""What is not pushed, and why: names, tokens, repos of others, tags, edited weights, secrets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, close_session, constants
from safetensors.torch import load_file, save_file
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_soup import Soup, cook
from hf_soup.errors import PublishError
from hf_soup.hub import inspect_target
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
Publish = Callable[..., str]


@pytest.fixture
def api(online: LocalHub) -> HfApi:
    return HfApi(endpoint=online.endpoint, token=online.token)


@pytest.fixture(scope="module")
def cooked(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A soup of two folders."""
    folder = tmp_path_factory.mktemp("cooked") / "soup"
    cook([str(family / "a"), str(family / "b")], folder)
    return folder


@pytest.fixture
def soup(cooked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cooked, tmp_path / "soup"))


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: LocalHub) -> Iterator[LocalHub]:
    """A Hub with more than one user; ``t-me`` is at work."""
    users = {"t-me": "me", "t-me-read": "me", "t-other": "other"}
    with LocalHub(tmp_path / "others", users=users, read_only={"t-me-read"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "t-me")
        yield hub


def changes(hub: LocalHub) -> list[str]:
    """What was sent that may have changed something."""
    return [request.path for request in hub.requests if request.method not in ("GET", "HEAD")]


@pytest.mark.parametrize(
    ("repo", "options", "said"),
    [
        ("soup", {}, "'soup' is not a name for a repo"),
        ("me/my/soup", {}, "'me/my/soup' is not a name for a repo"),
        ("me/my soup", {}, "'me/my soup' is not a name for a repo"),
        ("me/soup--1", {}, "is not a name for a repo: Cannot have --"),
        ("me/" + "x" * 97, {}, "is not a name for a repo: .*maximum length is 96"),
        ("me/soup", {"tag": "v 1"}, "'v 1' is not a name for a tag"),
        ("me/soup", {"tag": "refs/tags/v1"}, "is not a name for a tag"),
        ("me/soup", {"tag": "v1.lock"}, "is not a name for a tag"),
        ("me/soup", {"tag": "v1", "create_pr": True}, "nobody has merged"),
        ("me/soup", {"revision": "next", "create_pr": True}, "for main, not for 'next'"),
        ("me/soup", {"create_pr": True}, "'me/soup' does not exist, so nothing can be offered"),
        ("me/soup", {"license": " "}, "The licence is empty"),
        ("me/soup", {"token": "t-me-read"}, "the token of me may only read"),
        ("me/soup", {"token": "t-unknown"}, "the Hub does not accept the token"),
        ("me/soup", {"token": "t-me\nx"}, "The token has spaces or letters that no token has"),
        ("me/soup", {"token": "t-mé"}, "The token has spaces or letters that no token has"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(
    others: LocalHub, soup: Path, repo: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(PublishError, match=said):
        Soup.open(soup).push(repo, **options)
    assert changes(others) == []


@pytest.mark.parametrize(
    ("repo", "options", "said"),
    [
        ("nobody/soup", {}, r"there is no user or organization 'nobody'\.\nPush to a name of your own, `me/soup`\."),
        ("other/new", {}, r"the token has no right to do this.*\nPush to a name of your own, `me/new`, or offer"),
        ("other/soup", {}, r"the token has no right to do this.*\nPush to a name of your own, `me/soup`, or offer"),
        ("me/" + "x" * 95, {}, r"the Hub answered 400\. Invalid repository id .*\nUse another name\."),
    ],
)
def test_where_one_may_not_write(
    others: LocalHub, soup: Path, repo: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Soup.open(soup).push("other/soup", token="t-other")
    (soup / "notes.txt").write_text("more")
    with pytest.raises(PublishError, match=said):
        Soup.open(soup).push(repo, **options)
    assert len(HfApi(endpoint=others.endpoint, token=False).list_repo_commits("other/soup")) == 2
    assert len(others.store.repos) == 1


def test_anybody_may_offer_a_soup(others: LocalHub, soup: Path) -> None:
    """And again: the same pull request, as long as it is open; and none once main has it."""
    theirs = HfApi(endpoint=others.endpoint, token="t-other")
    Soup.open(soup).push("other/soup", token="t-other")
    (soup / "notes.txt").write_text("more")
    first = Soup.open(soup).push("other/soup", create_pr=True, commit_description="| a | b |")
    assert (first.changed, first.pull_request) == (True, f"{others.endpoint}/other/soup/discussions/1")
    again = Soup.open(soup).push("other/soup", create_pr=True, commit_message="Another title")
    assert (again.changed, again.pull_request, again.commit) == (False, first.pull_request, first.commit)
    (event, _) = theirs.get_discussion_details("other/soup", 1).events
    assert event.content == "| a | b |"  # type: ignore[attr-defined]

    theirs.change_discussion_status("other/soup", 1, "closed")
    second = Soup.open(soup).push("other/soup", create_pr=True)
    assert second.changed
    assert second.pull_request != first.pull_request
    # Somebody else's offer of the same soup is another one.
    assert Soup.open(soup).push("other/soup", create_pr=True, token="t-other").pull_request != second.pull_request
    theirs.merge_pull_request("other/soup", 2)
    merged = Soup.open(soup).push("other/soup", create_pr=True)
    assert (merged.changed, merged.pull_request) == (False, None)
    assert merged.commit == theirs.model_info("other/soup").sha


def test_soups_have_versions(cli: Cli, api: HfApi, soup: Path) -> None:
    """A tag is made once, for what is pushed; it never moves, and never makes a commit."""
    first = cli("push", soup, "acme/soup", "--tag", "v1", "--json").json
    assert first["tag"] == "v1"
    assert "holds this soup already" in cli("push", soup, "acme/soup", "--tag", "v1").out
    assert "holds this soup already" in cli("push", soup, "acme/soup", "--tag", "v1.0").out
    assert {tag.name: tag.target_commit for tag in api.list_repo_refs("acme/soup").tags} == {
        "v1": first["commit"],
        "v1.0": first["commit"],
    }
    (soup / "notes.txt").write_text("better")
    refused = cli("push", soup, "acme/soup", "--tag", "v1")
    assert f"'v1' names another commit, {first['commit'][:7]}." in refused.err
    assert cli("push", soup, "acme/soup", "--tag", "v2").code == 0
    assert f"'v1' names another commit, {first['commit'][:7]}." in cli("push", soup, "acme/soup", "--tag", "v1").err
    api.create_branch("acme/soup", branch="next")
    assert "'next' names a branch" in cli("push", soup, "acme/soup", "--tag", "next").err
    assert len(api.list_repo_commits("acme/soup")) == 3


def test_nothing_is_deleted_unasked(cli: Cli, api: HfApi, soup: Path) -> None:
    """Files of an earlier soup that this one lacks are listed; pictures, and what somebody else put there, stay."""
    (soup / "plots").mkdir()
    for name in ("merges.txt", "plots/scores.png"):
        (soup / name).write_bytes(b"earlier")
    assert cli("push", soup, "acme/soup").code == 0
    api.upload_file(repo_id="acme/soup", path_in_repo="LICENSE", path_or_fileobj=b"mit")
    for name in ("merges.txt", "plots/scores.png"):
        (soup / name).unlink()
    for options in ((), ("--pr",)):
        refused = cli("push", soup, "acme/soup", *options)
        assert "'acme/soup' holds files that are not of this soup: merges.txt." in refused.err
        assert "--replace" in refused.err
    assert {"merges.txt", "plots/scores.png", "LICENSE"} <= {*api.list_repo_files("acme/soup")}
    (soup / "merges.txt").write_text("now")
    assert cli("push", soup, "acme/soup").code == 0
    assert "plots/scores.png" in api.list_repo_files("acme/soup")
    (soup / "merges.txt").write_text("later")
    assert cli("push", soup, "acme/soup", "--pr", "--replace").code == 0
    assert "LICENSE" in api.list_repo_files("acme/soup")
    assert not {"plots/scores.png", "LICENSE"} & {*api.list_repo_files("acme/soup", revision="refs/pr/1")}


def test_another_kind_of_model_is_not_replaced(cli: Cli, api: HfApi, soup: Path) -> None:
    assert cli("push", soup, "acme/soup").code == 0
    config = json.loads((soup / "config.json").read_text())
    (soup / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    refused = cli("push", soup, "acme/soup")
    assert "holds another kind of model: BertForSequenceClassification, and this is BertModel." in refused.err
    assert cli("push", soup, "acme/soup", "--replace").code == 0


def test_edited_weights_are_refused(cli: Cli, api: HfApi, soup: Path) -> None:
    stated = Soup.open(soup).digest
    tensors = load_file(soup / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, soup / "model.safetensors", {"format": "pt"})
    refused = cli("push", soup, "acme/soup", "--json")
    assert refused.json["error"]["code"] == "edited"
    assert "are not those that were cooked: their digest is" in refused.json["error"]["message"]
    assert stated in refused.json["error"]["message"]
    (soup / "model.safetensors").write_bytes((soup / "model.safetensors").read_bytes()[:-4])
    assert "is not a valid safetensors file" in cli("push", soup, "acme/soup").err
    assert not api.repo_exists("acme/soup")


#: Whole, but the soup's scores lack the model that was added.
UPDATE = {
    "soup": "acme/a", "added": ["acme/b"], "before": {}, "comparisons": {}, "left_out": [], "helps": None,
    "after": {"rows": {"metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}, "sentence": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", [1, 2]),
        ("weights", None),
        ("lineage", "none"),
        ("lineage", {"ingredients": [{"revision": "1"}]}),
        ("made_of", 3),
        ("update", {"soup": "acme/a"}),
        ("update", {"soup": "acme/a", "added": ["acme/b"], "after": [1]}),
    ],
)
def test_a_summary_that_was_edited_is_refused(cli: Cli, api: HfApi, soup: Path, key: str, value: object) -> None:
    summary = json.loads((soup / "soup.json").read_text())
    (soup / "soup.json").write_text(json.dumps({**summary, key: value}))
    err = cli("push", soup, "acme/soup").err
    assert "soup' is not a soup. Cannot read soup.json:" in err
    assert f"\n  {key}" in err
    (soup / "soup.json").write_text(json.dumps({**summary, "update": UPDATE}))
    assert "soup.json lacks scores of a model that was added" in cli("push", soup, "acme/soup").err
    assert not api.repo_exists("acme/soup")


def test_a_card_or_summary_that_is_damaged_is_refused(cli: Cli, soup: Path) -> None:
    (soup / "README.md").write_bytes(b"\xff\xfe")
    assert "README.md is not text" in cli("push", soup, "acme/soup").err
    (soup / "soup.json").write_text("[" * 100_000)
    assert "no readable soup.json" in cli("push", soup, "acme/soup").err


def test_private_ingredients_stay_private(
    cli: Cli, publish: Publish, api: HfApi, online: LocalHub, tmp_path: Path
) -> None:
    """They are named in the error, and nowhere that others can see."""
    publish("base")
    publish("a")
    publish("b", private=True)
    stopped = cli("cook", "acme/a", "acme/b", "-o", "soup", "--push", "acme/soup")
    assert "'acme/soup' is public, and would name models that are private or gone: acme/b." in stopped.err
    assert not (tmp_path / "soup").exists()
    assert cli("cook", "acme/a", "acme/b", "-o", "soup").code == 0
    for options in ((), ("--replace",)):
        refused = cli("push", "soup", "acme/soup", *options)
        assert "would name models that are private or gone: acme/b." in refused.err
        assert "--allow-private-ingredients" in refused.err
        assert not api.repo_exists("acme/soup")
    assert cli("push", "soup", "acme/hidden", "--private").code == 0
    assert cli("push", "soup", "acme/soup", "--allow-private-ingredients").code == 0
    assert not api.model_info("acme/soup").private
    assert "'acme/soup' is public." in cli("push", "soup", "acme/soup", "--private").err
    api.delete_repo("acme/a")
    assert "private or gone: acme/a, acme/b." in cli("push", "soup", "acme/soup").err
    assert cli("push", "soup", "acme/hidden").code == 0  # which others cannot see


def test_a_private_soup_in_between_is_named_too(cli: Cli, publish: Publish) -> None:
    for name in ("base", "a", "b", "c"):
        publish(name)
    assert cli("cook", "acme/a", "acme/b", "-o", "pair").code == 0
    assert cli("push", "pair", "acme/pair", "--private").code == 0
    assert cli("cook", "acme/pair", "acme/c", "-o", "three").code == 0
    assert "private or gone: acme/pair." in cli("push", "three", "acme/three").err
    # The card of an update says what it was added to.
    adding = ("cook", "acme/pair", "--add", "acme/c", "-o", "next")
    assert "private or gone: acme/pair." in cli(*adding, "--push", "acme/three").err
    assert cli(*adding).code == 0
    assert "private or gone: acme/pair." in cli("push", "next", "acme/three").err


@pytest.mark.parametrize("step", ["/whoami-v2", "/api/models/", "/preupload/", "/commit/"])
def test_a_token_is_never_shown(cli: Cli, online: LocalHub, soup: Path, step: str) -> None:
    """Not even where the Hub itself says it."""

    def echo(request: Request) -> Response | None:
        said = {"error": f"Bad header: {request.headers.get('authorization')}"}
        return JSONResponse(said, 403) if step in request.url.path and request.url.path != "/api/repos/create" else None

    online.intercept = echo
    refused = cli("push", soup, "acme/soup")
    assert refused.code == 1
    assert "Bad header: Bearer hf_…" in refused.err
    assert online.token not in refused.err + refused.out
    assert online.token not in cli("push", soup, "acme/soup", "--json").out


@pytest.mark.parametrize("token", ["hf_jwt_eyJh.eyJz-d.s1g_n", "of-no-known-form"])
def test_a_token_of_any_form_is_never_shown(
    cli: Cli, online: LocalHub, soup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    """Those of other Hubs do not begin as the Hub's do, and some of the Hub's have more than letters."""
    with LocalHub(tmp_path / "others", users={token: "me"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", token)
        for said in ("Bearer {}", "q={}&", "x{}y"):
            answer = JSONResponse({"error": said.format(token)}, 403)
            hub.intercept = lambda request, answer=answer: answer if "/commit/" in request.url.path else None
            refused = cli("push", soup, "me/soup")
            assert said.format("hf_…") in refused.err
            assert not any(part in refused.err + refused.out for part in (token, "eyJz", "s1g_n"))


def test_a_push_that_cannot_end_is_not_begun_by_a_cook(
    cli: Cli, publish: Publish, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "a", "b"):
        publish(name)
    cooking = ("cook", "acme/a", "acme/b", "-o", "soup", "--push")
    assert "'acme/a' is taken: it holds something else" in cli(*cooking, "acme/a").err
    assert "is not a name for a repo" in cli(*cooking, "soup").err
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "No token" in cli(*cooking, "acme/soup").err
        assert not (tmp_path / "soup").exists()
        # And who does not push needs none.
        assert cli(*cooking[:-1]).code == 0
    assert "nothing can be offered to it" in cli("push", "soup", "acme/soup", "--pr").err
    assert "is not a name for a tag" in cli("push", "soup", "acme/soup", "--tag", "v 1").err
    assert not api.repo_exists("acme/soup")
    again = ("cook", "acme/b", "acme/a", "-o", "second", "--push", "acme/soup", "--json")
    assert cli(*again).json["pushed"]["pull_request"] is None


def test_a_repo_that_somebody_makes_in_between_is_looked_at(online: LocalHub, api: HfApi, soup: Path) -> None:
    """It may hold another model, or be public where it was to be private; some servers say only that it is there."""
    holds = [b"other weights"]

    def create(request: Request) -> Response | None:
        if request.url.path != "/api/repos/create":
            return None
        repo = online.store.create("model", "acme/soup", private=False, author="b")
        if holds:
            online.store.commit(
                repo, "main", [online.store.put("model.safetensors", holds.pop())], ("a", "", "b"), None
            )
        return JSONResponse({"error": "You already created this model repo"}, 409)

    online.intercept = create
    with pytest.raises(PublishError, match="'acme/soup' is taken: it holds something else"):
        Soup.open(soup).push("acme/soup")
    assert len(api.list_repo_commits("acme/soup")) == 2
    api.delete_repo("acme/soup")
    with pytest.raises(PublishError, match="'acme/soup' is public"):
        Soup.open(soup).push("acme/soup", private=True)
    api.delete_repo("acme/soup")
    assert Soup.open(soup).push("acme/soup").changed


@pytest.mark.parametrize("asked", [{"Retry-After": "86400"}, {"RateLimit": '"api";r=0;t=86400'}], ids=str)
def test_no_server_makes_a_push_wait_for_a_day(
    cli: Cli, online: LocalHub, soup: Path, asked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits by itself where it uploads, for as long as it is told to."""
    pauses, busy = list[float](), [Response(status_code=429, headers=asked)]
    monkeypatch.setattr("time.sleep", pauses.append)
    online.intercept = lambda request: busy.pop() if busy and "/preupload/" in request.url.path else None
    close_session()  # one that an earlier test opened has none of the command's settings
    assert cli("push", soup, "acme/soup").code == 0
    assert 60 <= sum(pauses) < 90


def test_a_branch_is_made_where_it_is_not_there(online: LocalHub, api: HfApi, soup: Path) -> None:
    Soup.open(soup).push("acme/soup")
    (soup / "notes.txt").write_text("more")
    done = Soup.open(soup).push("acme/soup", revision="next")
    assert api.model_info("acme/soup", revision="next").sha == done.commit
    assert "notes.txt" not in api.list_repo_files("acme/soup")
    assert not Soup.open(soup).push("acme/soup", revision="next").changed
    offered = Soup.open(soup).push("acme/soup", create_pr=True, revision="main")
    (soup / "notes.txt").write_text("even more")
    assert Soup.open(soup).push("acme/soup", revision="refs/pr/1").commit != offered.commit
    api.create_tag("acme/soup", tag="v1")
    for name, said in ((done.commit, "a tag or a commit"), ("v1", "a tag or a commit"), ("refs/pr/9", "nothing")):
        with pytest.raises(PublishError, match=f"'{name}' names {said} in 'acme/soup', and no branch"):
            Soup.open(soup).push("acme/soup", revision=name)


def test_a_gitignore_keeps_nothing_back_in_silence(online: LocalHub, api: HfApi, soup: Path) -> None:
    """The client leaves out what the server says is to be ignored."""
    api.create_repo("acme/soup")

    def ignore(request: Request, answer: Response) -> Response:
        if "/preupload/" not in request.url.path:
            return answer
        files = json.loads(bytes(answer.body))["files"]
        return JSONResponse({"files": [each | {"shouldIgnore": each["path"] == "soup.yaml"} for each in files]})

    online.transform = ignore
    with pytest.raises(PublishError, match=r"but not as it was sent: soup\.yaml\.\n.*\.gitignore"):
        Soup.open(soup).push("acme/soup")


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pr"])
def test_xet_is_off_for_a_hub_without_it(
    online: LocalHub, api: HfApi, soup: Path, create_pr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself would fail; and what others of this process have set stays."""
    api.create_repo("acme/soup")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert Soup.open(soup).push("acme/soup", create_pr=create_pr).changed
    assert constants.HF_HUB_DISABLE_XET is False
    asked = [request for request in online.requests if "xet" in request.path]
    assert [(request.status, request.path.split("/")[-1]) for request in asked] == [
        (404, "None" if create_pr else "main")
    ]


@pytest.mark.parametrize("answer", ["[]", "{}", '"yes"'])
def test_an_answer_that_is_not_from_a_hub(online: LocalHub, soup: Path, answer: str) -> None:
    online.intercept = lambda request: Response(answer, media_type="application/json")
    with pytest.raises(PublishError, match=r"does not say who you are\.\nCheck HF_ENDPOINT"):
        Soup.open(soup).push("acme/soup")


def test_a_look_changes_nothing(online: LocalHub) -> None:
    target = inspect_target("acme/soup", tag="v1", private=True)
    assert (target.repo, target.head, target.private, target.user) == ("acme/soup", None, True, "local")
    assert changes(online) == []
    assert online.token not in repr(target)
