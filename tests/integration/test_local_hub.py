"""The local Hub, through the real client over HTTP."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
import uvicorn
from hub_faults import Hangup
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DiscussionComment, HfApi, constants
from huggingface_hub.constants import DISCUSSION_TYPES
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from hf_soup.demo import child_environment
from hf_soup.errors import SoupError
from hf_soup.hub.http import httpx
from hf_soup.local_hub import LocalHub
from hf_soup.local_hub.store import HubError

pytestmark = [
    # The client hands files to its HTTP library in a way that the library deprecates.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
    pytest.mark.usefixtures("_without_xet"),
]

WEIGHTS = bytes(range(256)) * 400
CARD = "---\nlicense: mit\nbase_model: acme/base\ntags: [soup]\ndatasets: acme/rows\n---\n# Tiny\n"


@pytest.fixture
def _without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Read from the environment when the client is imported, which another test may have done already.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    users = {"t-acme": "acme", "t-acme-read": "acme", "t-other": "other"}
    with LocalHub(tmp_path / "hub", users=users, read_only={"t-acme-read"}) as running:
        yield running


@pytest.fixture
def local_hub(hub: LocalHub) -> LocalHub:
    return hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return client(hub, "t-acme")


@pytest.fixture
def tiny(api: HfApi, tmp_path: Path) -> str:
    """The id of a repo with a card, a config, weights and a name that has to be quoted."""
    folder = tmp_path / "tiny"
    (folder / "notes").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.bin").write_bytes(WEIGHTS)
    (folder / "notes" / "a b#c.txt").write_text("text")
    api.create_repo("acme/tiny")
    api.upload_folder(repo_id="acme/tiny", folder_path=folder)
    return "acme/tiny"


def client(hub: LocalHub, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def fetch(
    url: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request that follows no redirect and raises on no status."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    request = urllib.request.Request(url, body, headers, method=method)
    try:
        answer = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay).open(request)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.read()


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_a_folder_comes_back_as_it_was_pushed(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    folder = Path(api.snapshot_download(tiny, cache_dir=tmp_path / "cache"))
    assert (folder / "model.bin").read_bytes() == WEIGHTS
    assert (folder / "notes" / "a b#c.txt").read_text() == "text"
    assert api.verify_repo_checksums(tiny, local_dir=folder).mismatches == []
    assert [commit.title for commit in api.list_repo_commits(tiny)][-1] == "initial commit"


def test_no_token_reaches_the_cdn(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    api.hf_hub_download(tiny, "model.bin", cache_dir=tmp_path / "cache")
    downloads = [record for record in hub.requests if record.path.startswith("/cdn/")]
    assert [(record.status, record.authorization) for record in downloads] == [(200, "")]
    assert any(record.authorization == "Bearer t-acme" for record in hub.requests)
    _, headers, _ = fetch(f"{hub.endpoint}/{tiny}/resolve/main/model.bin")
    assert fetch(headers["location"], Authorization="Bearer t-acme")[0] == 400
    _, signature, sha256 = headers["location"].rsplit("/", 2)
    assert fetch(f"{hub.endpoint}/cdn/{'0' * len(signature)}/{sha256}")[0] == 403


def test_headers_and_ranges_of_an_lfs_file(hub: LocalHub, api: HfApi, tiny: str) -> None:
    code, headers, _ = fetch(f"{hub.endpoint}/{tiny}/resolve/main/model.bin", "HEAD")
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert (code, headers["x-linked-etag"], headers["x-linked-size"]) == (302, f'"{sha256}"', str(len(WEIGHTS)))
    assert headers["x-repo-commit"] == api.model_info(tiny).sha
    url = headers["location"]
    assert fetch(url, Range="bytes=10-19")[::2] == (206, WEIGHTS[10:20])
    assert fetch(url, Range="bytes=-7")[::2] == (206, WEIGHTS[-7:])
    assert fetch(url, Range=f"bytes={len(WEIGHTS)}-")[0] == 416


def test_headers_of_a_small_file(hub: LocalHub, api: HfApi, tiny: str) -> None:
    url = f"{hub.endpoint}/{tiny}/resolve/main/notes/a%20b%23c.txt"
    code, headers, _ = fetch(url, "HEAD")
    oid = hashlib.sha1(b"blob 4\0text").hexdigest()
    assert (code, headers["etag"]) == (307, f'"{oid}"')
    assert headers["location"].startswith("/")
    assert fetch(hub.endpoint + headers["location"], Range="bytes=1-2")[::2] == (206, b"ex")
    assert fetch(hub.endpoint + headers["location"])[1]["etag"] == f'"{oid}"'


def test_info_has_what_the_card_and_the_config_say(api: HfApi, tiny: str) -> None:
    info = api.model_info(tiny, files_metadata=True)
    assert {"soup", "license:mit", "dataset:acme/rows", "bert", "transformers"} <= {*(info.tags or [])}
    assert {"base_model:acme/base", "base_model:finetune:acme/base"} <= {*(info.tags or [])}
    assert (info.author, info.pipeline_tag, info.private) == ("acme", "text-classification", False)
    weights = {s.rfilename: s for s in info.siblings or []}["model.bin"]
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    expanded = api.model_info(tiny, expand=["baseModels", "sha"])
    assert expanded.base_models == {"relation": "finetune", "models": [{"id": "acme/base"}]}
    assert (expanded.sha, expanded.tags) == (info.sha, None)


def test_lists_are_filtered(hub: LocalHub, api: HfApi, tiny: str) -> None:
    api.create_repo("acme/hidden", private=True)
    api.create_repo("acme/rows", repo_type="dataset")
    listed = client(hub, False).list_models
    assert [m.id for m in listed()] == [tiny]
    assert [m.id for m in listed(filter="base_model:finetune:acme/base")] == [tiny]
    assert [m.id for m in listed(filter=["soup", "absent"])] == []
    assert [m.id for m in listed(author="nobody")] == []
    assert [m.id for m in api.list_models(search="HID")] == ["acme/hidden"]
    assert [d.id for d in api.list_datasets()] == ["acme/rows"]


def test_lists_are_sorted_and_cut(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    """By downloads, which are requests for the config; over as many pages as the limit needs."""
    for number, name in enumerate(("one", "two", "three")):
        api.create_repo(f"acme/{name}")
        api.upload_file(repo_id=f"acme/{name}", path_in_repo="README.md", path_or_fileobj=b"---\ntags: [x]\n---\n")
        hub.store.count_downloads(hub.store.repos["model", f"acme/{name}"], number)
    for _ in range(3):
        api.hf_hub_download(tiny, "config.json", cache_dir=tmp_path / "cache", force_download=True)
    popular = [(m.id, m.downloads) for m in api.list_models(sort="downloads")]
    assert popular[0][0] == tiny
    assert popular[0][1] is not None
    assert popular[0][1] >= 3
    assert popular[1:] == [("acme/three", 2), ("acme/two", 1), ("acme/one", 0)]
    assert [m.id for m in api.list_models(sort="created_at")] == ["acme/three", "acme/two", "acme/one", tiny]
    assert [m.id for m in api.list_models()] == sorted(["acme/three", "acme/two", "acme/one", tiny])
    assert [m.id for m in api.list_models(pipeline_tag="text-classification")] == [tiny]
    hub.page_size = 1
    asked = len(hub.requests)
    assert [m.id for m in api.list_models(filter="x", sort="downloads", limit=2)] == ["acme/three", "acme/two"]
    assert len(hub.requests) == asked + 2
    listed = next(iter(api.list_models(filter="x", sort="downloads", expand=["downloads"])))
    assert (listed.id, listed.downloads, listed.tags) == ("acme/three", 2, None)
    with pytest.raises(HfHubHTTPError, match="Invalid sort"):
        list(api.list_models(sort="beauty"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "front", "relation"),
    [
        ({"config.json": b"{}"}, "base_model: acme/base", "finetune"),
        ({"adapter_config.json": b"{}"}, "base_model: acme/base", "adapter"),
        ({"a.gguf": b"GGUF"}, "base_model: acme/base", "quantized"),
        ({"config.json": b'{"quantization_config": {}}'}, "base_model: acme/base", "quantized"),
        ({"config.json": b"{}"}, "base_model: [acme/base, acme/other]", "merge"),
        ({"a.gguf": b"GGUF"}, "base_model: acme/base\nbase_model_relation: finetune", "finetune"),
        ({"config.json": b"{}"}, "base_model: base", "finetune"),
    ],
)
def test_how_a_model_came_from_its_ancestor(
    hub: LocalHub, api: HfApi, files: dict[str, bytes], front: str, relation: str
) -> None:
    """By the card, else by the files; under the ancestor's name of today."""
    api.create_repo("acme/base")
    hub.store.rename("model", "base", "acme/base")
    api.create_repo("acme/made")
    for path, content in {**files, "README.md": f"---\n{front}\n---\n".encode()}.items():
        api.upload_file(repo_id="acme/made", path_in_repo=path, path_or_fileobj=content)
    tags = {tag for tag in api.model_info("acme/made").tags or [] if tag.startswith("base_model:")}
    assert tags >= {"base_model:acme/base", f"base_model:{relation}:acme/base"}
    assert {tag.split(":")[1] for tag in tags if tag.count(":") == 2} == {relation}


def test_pages_of_a_tree_belong_to_one_commit(hub: LocalHub, api: HfApi, tiny: str) -> None:
    hub.page_size = 2
    entries = api.list_repo_tree(tiny, recursive=True, expand=True)
    first = next(iter(entries))
    api.upload_file(repo_id=tiny, path_in_repo="aaa.txt", path_or_fileobj=b"new")
    names = [first.path, *(entry.path for entry in entries)]
    assert names == [".gitattributes", "README.md", "config.json", "model.bin", "notes", "notes/a b#c.txt"]
    assert len(list(api.list_models(limit=5))) == 1
    assert len(api.list_repo_commits(tiny)) == 3
    assert [e.path for e in api.get_paths_info(tiny, ["notes", "absent", "model.bin"])] == ["notes", "model.bin"]


def test_large_files_go_in_parts(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    hub.part_bytes = 30_000
    content = os.urandom(100_001)
    api.upload_file(repo_id=tiny, path_in_repo="big.bin", path_or_fileobj=content)
    assert Path(api.hf_hub_download(tiny, "big.bin", cache_dir=tmp_path / "cache")).read_bytes() == content
    assert sum(r.method == "PUT" for r in hub.requests if r.path.startswith("/lfs/")) >= 4


def test_an_upload_must_be_what_was_announced(hub: LocalHub, api: HfApi, tiny: str) -> None:
    sha256, auth = hashlib.sha256(b"right").hexdigest(), {"Authorization": "Bearer t-acme"}
    batch = json.dumps({"objects": [{"oid": sha256, "size": 5}]}).encode()
    url = f"{hub.endpoint}/{tiny}.git/info/lfs/objects/batch"
    href = json.loads(fetch(url, "POST", batch, **auth)[2])["objects"][0]["actions"]["upload"]["href"]
    assert fetch(href, "PUT", b"wrong")[0] == 400
    assert fetch(href, "PUT", b"right and more")[0] == 400
    commit = f"{hub.endpoint}/api/models/{tiny}/commit/main"
    header = {"key": "header", "value": {"summary": "s"}}
    lines = [header, {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": sha256, "size": 5}}]
    body = "\n".join(map(json.dumps, lines)).encode()
    assert fetch(commit, "POST", body, **auth)[0] == 400
    assert fetch(href, "PUT", b"right")[0] == 200
    assert fetch(commit, "POST", body, **auth)[0] == 200
    assert [p.name for p in (hub.root / "incoming").iterdir()] == []


@pytest.mark.parametrize("path", ["../up", "/abs", "a/../b", ".git/config", "a//b", "a\\b", "a/.GIT/x", "nul\0"])
def test_paths_that_leave_the_repo_are_refused(hub: LocalHub, tiny: str, path: str) -> None:
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": {"path": path, "content": ""}}]
    body = "\n".join(map(json.dumps, lines)).encode()
    url = f"{hub.endpoint}/api/models/{tiny}/commit/main"
    assert fetch(url, "POST", body, Authorization="Bearer t-acme")[0] == 400


def test_hostile_requests_are_answered_with_an_error(hub: LocalHub, tiny: str) -> None:
    auth = {"Authorization": "Bearer t-acme"}
    for repo_id in ("acme/..", "../x", "acme/a--b", "acme/x.git", "acme/" + "x" * 96):
        owner, _, name = repo_id.partition("/")
        body = json.dumps({"organization": owner, "name": name}).encode()
        assert fetch(f"{hub.endpoint}/api/repos/create", "POST", body, **auth)[0] in (400, 403)
    assert fetch(f"{hub.endpoint}/{tiny}/resolve/main/..%2F..%2F..%2Ftoken", **auth)[0] == 404
    assert fetch(f"{hub.endpoint}/{tiny}/resolve/..%2F..%2Frepo/x", **auth)[0] == 404
    many = json.dumps({"objects": [{"oid": "0" * 64, "size": 10**18}]}).encode()
    assert fetch(f"{hub.endpoint}/{tiny}.git/info/lfs/objects/batch", "POST", many, **auth)[0] == 422
    large = json.dumps({"name": "x" * 33_000_000}).encode()
    assert fetch(f"{hub.endpoint}/api/repos/create", "POST", large, **auth)[0] == 413
    assert fetch(f"{hub.endpoint}/api/models/{tiny}/discussions/{'9' * 5000}", **auth)[0] == 404
    assert fetch(f"{hub.endpoint}/api/models?limit={'9' * 5000}", **auth)[0] == 200
    assert fetch(f"{hub.endpoint}/api/whoami-v2", Authorization="Bearer wrong")[0] == 401
    assert fetch(f"{hub.endpoint}/api/models", Host="evil.example")[0] == 400
    assert fetch(f"{hub.endpoint}/api/models/{tiny}/xet-read-token/main", **auth)[0] == 404


def test_a_stale_parent_is_refused_and_nothing_has_changed(api: HfApi, tiny: str) -> None:
    before = api.model_info(tiny).sha
    add = CommitOperationAdd("new.txt", b"1")
    made = api.create_commit(tiny, [add], commit_message="one", parent_commit=before)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(tiny, [CommitOperationAdd("x.txt", b"2")], commit_message="two", parent_commit=before)
    assert status(error) == 412
    assert api.model_info(tiny).sha == made.oid
    assert api.model_info(tiny, revision=before).sha == before
    assert "new.txt" not in api.list_repo_files(tiny, revision=before)


def test_deletes(api: HfApi, tiny: str) -> None:
    operations = [CommitOperationDelete("notes/"), CommitOperationDelete("model.bin")]
    api.create_commit(tiny, operations, commit_message="tidy")
    assert api.list_repo_files(tiny) == [".gitattributes", "README.md", "config.json"]


def test_branches_and_tags(api: HfApi, tiny: str) -> None:
    api.create_branch(tiny, branch="feature/x")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(tiny, branch="feature/x")
    assert status(error) == 409
    api.create_branch(tiny, branch="feature/x", exist_ok=True)
    api.upload_file(repo_id=tiny, path_in_repo="x.txt", path_or_fileobj=b"x", revision="feature/x")
    api.create_tag(tiny, tag="v1", revision="feature/x")
    assert "x.txt" in api.list_repo_files(tiny, revision="v1")
    assert "x.txt" not in api.list_repo_files(tiny)
    refs = api.list_repo_refs(tiny)
    assert ([b.name for b in refs.branches], [t.name for t in refs.tags]) == (["feature/x", "main"], ["v1"])
    with pytest.raises(BadRequestError):
        api.create_branch(tiny, branch="refs/pr/9")


def test_what_is_absent_has_the_code_of_the_hub(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(tiny, "absent.txt", cache_dir=tmp_path / "cache")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(tiny, "config.json", revision="absent", cache_dir=tmp_path / "cache")
    for repo_id in ("acme/absent", "gpt2"):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info(repo_id)
        assert status(error) == 404
        with pytest.raises(RepositoryNotFoundError) as error:
            client(hub, False).model_info(repo_id)
        assert status(error) == 401


def test_private_repos_do_not_exist_for_others(hub: LocalHub, api: HfApi, tiny: str) -> None:
    api.update_repo_settings(tiny, private=True)
    assert api.model_info(tiny).private
    for token, code in ((False, 401), ("t-other", 404)):
        for call in (
            client(hub, token).model_info,
            client(hub, token).list_repo_files,
            client(hub, token).list_repo_refs,
        ):
            with pytest.raises(RepositoryNotFoundError) as error:
                call(tiny)
            assert status(error) == code


def test_who_may_push(hub: LocalHub, api: HfApi, tiny: str) -> None:
    for token, code in ((False, 401), ("t-other", 403), ("t-acme-read", 403)):
        with pytest.raises(HfHubHTTPError) as error:
            client(hub, token).upload_file(repo_id=tiny, path_in_repo="x.txt", path_or_fileobj=b"x")
        assert status(error) == code
        with pytest.raises(HfHubHTTPError) as error:
            client(hub, token).create_repo("acme/mine")
        assert status(error) == code
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("nobody/mine")
    assert status(error) == 404
    assert api.whoami()["name"] == "acme"
    assert api.create_repo("acme/tiny", exist_ok=True).repo_id == tiny
    with pytest.raises(BadRequestError):
        api.create_repo("acme/space", repo_type="space", space_sdk="static")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("acme/tiny")
    assert status(error) == 409


def test_gated_content_is_closed_and_the_rest_is_open(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    api.update_repo_settings(tiny, gated="auto")
    for token, code in ((False, 401), ("t-other", 403)):
        outside = client(hub, token)
        assert outside.model_info(tiny).gated == "auto"
        assert "model.bin" in outside.list_repo_files(tiny)
        for name in ("model.bin", "config.json"):
            with pytest.raises(GatedRepoError) as error:
                outside.hf_hub_download(tiny, name, cache_dir=tmp_path / "cache")
            assert status(error) == code
    api.hf_hub_download(tiny, "model.bin", cache_dir=tmp_path / "cache")


def test_an_old_name_leads_to_the_new_one(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    hub.store.rename("model", tiny, "other/moved")
    assert api.model_info(tiny).id == "other/moved"
    path = api.hf_hub_download(tiny, "model.bin", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == WEIGHTS
    client(hub, "t-other").move_repo("other/moved", "other/again")
    assert api.model_info(tiny).id == "other/again"
    api.create_repo(tiny)
    assert api.model_info(tiny).id == tiny
    assert api.model_info("other/moved").id == "other/again"


@pytest.fixture
def old_names(hub: LocalHub, api: HfApi) -> LocalHub:
    """A model and a dataset that were there before namespaces, and are reached under their old names too."""
    config = {"model_type": "distilbert", "dim": 8, "n_heads": 2, "hidden_dim": 8}
    contents = {"model": {"config.json": json.dumps(config).encode(), "model.bin": WEIGHTS}}
    contents["dataset"] = {"train.csv": b"text,label\na,0\nb,1\n", "images.bin": WEIGHTS}
    for kind, repo_id in (("model", "acme/distilbert-base-uncased"), ("dataset", "acme/beans")):
        api.create_repo(repo_id, repo_type=kind)
        add = [CommitOperationAdd(path, content) for path, content in contents[kind].items()]
        api.create_commit(repo_id, add, commit_message="all", repo_type=kind)
    hub.store.rename("model", "distilbert-base-uncased", "acme/distilbert-base-uncased")
    hub.store.rename("dataset", "beans", "acme/beans")
    return hub


def test_a_name_without_a_namespace_leads_to_the_repo(old_names: LocalHub, api: HfApi, tmp_path: Path) -> None:
    bare, full, cache = "distilbert-base-uncased", "acme/distilbert-base-uncased", tmp_path / "cache"
    sha = api.model_info(full).sha
    assert fetch(f"{old_names.endpoint}/api/models/{bare}")[0] == 307
    assert fetch(f"{old_names.endpoint}/{bare}/resolve/main/model.bin", "HEAD")[0] == 307
    for info in (api.model_info(bare), api.model_info(bare, revision=sha), api.model_info(bare, expand=["sha"])):
        assert (info.id, info.sha) == (full, sha)
    assert api.list_repo_files(bare) == [".gitattributes", "config.json", "model.bin"]
    assert [entry.path for entry in api.get_paths_info(bare, ["model.bin"])] == ["model.bin"]
    assert [branch.name for branch in api.list_repo_refs(bare).branches] == ["main"]
    assert [commit.title for commit in api.list_repo_commits(bare)] == ["all", "initial commit"]
    assert list(api.get_repo_discussions(bare)) == []
    assert Path(api.hf_hub_download(bare, "model.bin", cache_dir=cache)).read_bytes() == WEIGHTS
    assert "dim" in Path(api.hf_hub_download(bare, "config.json", revision=sha, cache_dir=cache)).read_text()
    assert api.dataset_info("beans").id == "acme/beans"
    assert api.list_repo_files("beans", repo_type="dataset") == [".gitattributes", "images.bin", "train.csv"]
    path = api.hf_hub_download("beans", "train.csv", repo_type="dataset", cache_dir=cache)
    assert Path(path).read_text().startswith("text,label")


def test_a_name_without_a_namespace_is_a_second_name_only(old_names: LocalHub, api: HfApi) -> None:
    for ask in (api.model_info, api.list_repo_files, api.list_repo_refs):
        with pytest.raises(RepositoryNotFoundError):
            ask("beans")
    with pytest.raises(HubError, match="There is no model gpt2 and no model openai/gpt2"):
        old_names.store.rename("model", "gpt2", "openai/gpt2")
    with pytest.raises(HubError, match="Invalid repository id"):
        old_names.store.rename("model", "../gpt2", "acme/distilbert-base-uncased")
    old_names.store.rename("dataset", "acme/beans", "other/beans")
    assert api.dataset_info("beans").id == api.dataset_info("acme/beans").id == "other/beans"
    client(old_names, "t-other").update_repo_settings("beans", private=True, repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("beans")


def test_pull_requests(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    before = api.model_info(tiny).sha
    outside = client(hub, "t-other")
    add = CommitOperationAdd("x.bin", b"binary\0")
    made = outside.create_commit(tiny, [add], commit_message="Add x", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert "x.bin" in api.list_repo_files(tiny, revision="refs/pr/1")
    assert api.model_info(tiny).sha == before
    outside.upload_file(repo_id=tiny, path_in_repo="y.txt", path_or_fileobj=b"y", create_pr=True)
    found = list(api.get_repo_discussions(tiny))
    assert [(d.num, d.author, d.is_pull_request) for d in found] == [(2, "other", True), (1, "other", True)]
    details = api.get_discussion_details(tiny, 1)
    assert details.target_branch == "refs/heads/main"
    assert [event.type for event in details.events] == ["comment", "commit"]
    refs = api.list_repo_refs(tiny, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1", "refs/pr/2"]


def test_what_is_said_about_a_pull_request(hub: LocalHub, api: HfApi, tiny: str) -> None:
    outside = client(hub, "t-other")
    add = CommitOperationAdd("x.txt", b"x")
    outside.create_commit(tiny, [add], commit_message="Add x", commit_description="**Why**", create_pr=True)
    outside.upload_file(repo_id=tiny, path_in_repo="y.txt", path_or_fileobj=b"y", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError):
        outside.merge_pull_request(tiny, 1)
    outside.change_discussion_status(tiny, 1, "closed")
    assert list(api.get_repo_discussions(tiny, discussion_status="open")) == []
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request(tiny, 1)
    assert api.change_discussion_status(tiny, 1, "open").author == "acme"
    api.upload_file(repo_id=tiny, path_in_repo="z.txt", path_or_fileobj=b"z")
    api.merge_pull_request(tiny, 1)
    details = api.get_discussion_details(tiny, 1)
    kinds = ["comment", "commit", "commit", "status-change", "status-change", "status-change"]
    assert [event.type for event in details.events] == kinds
    description = details.events[0]
    assert isinstance(description, DiscussionComment)
    assert (description.content, description.author, description.last_edited_by) == ("**Why**", "other", "other")
    assert details.status == "merged"
    assert details.merge_commit_oid == api.model_info(tiny).sha
    assert [commit.title for commit in api.list_repo_commits(tiny)][:1] == ["Add x (#1)"]
    assert {"x.txt", "y.txt", "z.txt"} <= {*api.list_repo_files(tiny)}


def test_a_merge_overwrites_nothing(hub: LocalHub, api: HfApi, tiny: str) -> None:
    add = CommitOperationAdd("x.txt", b"x")
    client(hub, "t-other").create_commit(tiny, [add], commit_message="Add x", create_pr=True)
    api.upload_file(repo_id=tiny, path_in_repo="x.txt", path_or_fileobj=b"another")
    assert api.get_discussion_details(tiny, 1).conflicting_files == ["x.txt"]
    with pytest.raises(HfHubHTTPError) as error:
        api.merge_pull_request(tiny, 1)
    assert status(error) == 409


def test_a_pull_request_from_outside(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "n.txt").write_text("n")
    made = client(hub, "t-other").upload_folder(repo_id=tiny, folder_path=tmp_path / "more", create_pr=True)
    assert made.pr_num == 1
    assert "n.txt" in api.list_repo_files(tiny, revision="refs/pr/1")
    kinds = {kind: [d.num for d in api.get_repo_discussions(tiny, discussion_type=kind)] for kind in DISCUSSION_TYPES}
    assert kinds == {"all": [1], "discussion": [], "pull_request": [1]}
    with pytest.raises(HfHubHTTPError):
        api.get_discussion_details(tiny, 9)


def test_what_is_deleted_is_gone(hub: LocalHub, api: HfApi, tiny: str) -> None:
    with pytest.raises(HfHubHTTPError):
        client(hub, "t-other").delete_repo(tiny)
    api.delete_repo(tiny)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(tiny)
    api.create_repo(tiny)
    assert api.list_repo_files(tiny) == [".gitattributes"]


RESULT = "task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: m, value: 1}]"


@pytest.mark.parametrize(
    "metadata",
    [
        "a: [", "base_model: {a: b}", "base_model_relation: cousin", "a: &x [*x]", "license: mine",
        "license: [mit, x y]",
        "license_name: 3", "language: zh-CN", "language: [en, noinfo]", "datasets: [librispeech 960h]",
        "datasets: [null]", "datasets: /var/hf/images/", "base_model: /workspace/model", "base_model: ./model",
        "model-index: {name: x}",
    ],
)  # fmt: skip
def test_a_bad_card_is_refused(api: HfApi, tiny: str, metadata: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(repo_id=tiny, path_in_repo="README.md", path_or_fileobj=f"---\n{metadata}\n---\n".encode())


@pytest.mark.parametrize("metadata", ["license: [MIT, gemma]", f"model-index: [{{name: x, results: [{{{RESULT}}}]}}]"])
def test_a_good_card_is_taken(api: HfApi, tiny: str, metadata: str) -> None:
    api.upload_file(repo_id=tiny, path_in_repo="README.md", path_or_fileobj=f"---\n{metadata}\n---\n".encode())


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        api, token = client(hub, hub.token), hub.token
        api.create_repo("any/one", private=True)
        api.upload_file(repo_id="any/one", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
        api.create_tag("any/one", tag="v1")
        hub.store.rename("model", "any/one", "any/two")
        hub.store.rename("model", "one", "any/two")
        with pytest.raises(SoupError, match="in use"):
            LocalHub(tmp_path / "hub")
    with LocalHub(tmp_path / "hub") as hub:
        assert hub.token == token
        path = client(hub, token).hf_hub_download("any/one", "w.bin", revision="v1", cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == WEIGHTS
        assert client(hub, token).model_info("one").id == "any/two"


def test_serve_until_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_soup", "hub", "--root", str(tmp_path / "hub"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert re.match(r"export HF_ENDPOINT=http://127\.0\.0\.1:\d+ HF_TOKEN=hf_local_\w+ ", server.stdout.readline())
        server.send_signal(signal.SIGINT)
    assert server.returncode == 0
    assert (tmp_path / "hub" / "token").stat().st_mode & 0o77 == 0


def test_a_commit_larger_than_any_one_file(api: HfApi, tiny: str) -> None:
    add = [CommitOperationAdd(f"part/{n}.txt", b"x" * 900_000 + bytes([48 + n])) for n in range(5)]
    api.create_commit(tiny, add, commit_message="many")
    assert sum(path.startswith("part/") for path in api.list_repo_files(tiny)) == 5


def test_a_port_that_is_taken(hub: LocalHub, tmp_path: Path) -> None:
    second = LocalHub(tmp_path / "second", port=int(hub.endpoint.rsplit(":", 1)[1]))
    with pytest.raises(SoupError, match="Cannot listen"), second:
        pass


def test_faults_can_be_injected(hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path) -> None:
    async def refuse(request: Request) -> Response | None:
        return JSONResponse({"error": "later"}, 503) if request.url.path.endswith("/refs") else None

    hub.intercept = refuse
    with pytest.raises(HfHubHTTPError) as error:
        api.list_repo_refs(tiny)
    assert status(error) == 503
    hub.intercept = None

    def flip(request: Request, response: Response) -> Response:
        if not isinstance(response, FileResponse) or not request.url.path.startswith("/cdn/"):
            return response
        content = Path(response.path).read_bytes()
        return Response(content[:-1] + bytes([content[-1] ^ 1]), headers={"etag": response.headers["etag"]})

    hub.transform = flip
    path = api.hf_hub_download(tiny, "model.bin", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() != WEIGHTS

    def lose(request: Request, response: Response) -> Response:
        return Hangup() if "/commit/" in request.url.path else response

    hub.transform, before = lose, api.model_info(tiny).sha
    with pytest.raises(httpx.RemoteProtocolError):
        api.create_commit(tiny, [CommitOperationAdd("x.txt", b"x")], commit_message="landed all the same")
    assert api.list_repo_commits(tiny)[0].title == "landed all the same"
    assert api.list_repo_commits(tiny)[1].commit_id == before


def test_a_download_goes_on_after_a_broken_connection(
    hub: LocalHub, api: HfApi, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps whole chunks only, of 10 MB unless told otherwise.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    broken = list[str]()

    def cut(request: Request, response: Response) -> Response:
        if request.url.path.startswith("/cdn/") and not broken:
            broken.append(request.url.path)
            return Hangup(response, keep=2500)
        return response

    hub.transform = cut
    path = api.hf_hub_download(tiny, "model.bin", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == WEIGHTS
    assert [r.range for r in hub.requests if r.path.startswith("/cdn/")] == ["", "bytes=2000-"]


def test_a_reset_connection(hub: LocalHub, tiny: str) -> None:
    hub.intercept = lambda request: Hangup(reset=True)
    with pytest.raises(OSError, match="reset"):
        fetch(f"{hub.endpoint}/api/models/{tiny}")


@pytest.mark.usefixtures("online", "old_names")
def test_libraries_push_and_load(api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """And follow a name without a namespace."""
    import datasets
    import torch
    import transformers
    from PIL import Image

    monkeypatch.setenv("HF_TOKEN", "t-acme")

    api.create_repo("acme/rows", repo_type="dataset")
    api.create_repo("acme/pictures", repo_type="dataset")
    card = "---\nconfigs:\n- config_name: table\n  data_files:\n  - {split: held, path: csv/held.csv}\n---\n"
    files = {"README.md": card.encode(), "csv/held.csv": b"text,label\na,0\nb,1\n"}
    add = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit("acme/rows", add, commit_message="rows", repo_type="dataset")
    for label in ("cat", "dog"):
        picture = io.BytesIO()
        Image.new("RGB", (2, 2)).save(picture, "PNG")
        path = f"train/{label}/0.png"
        api.upload_file(
            repo_id="acme/pictures", path_in_repo=path, path_or_fileobj=picture.getvalue(), repo_type="dataset"
        )
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    model.push_to_hub("acme/bert")
    again = transformers.AutoModelForSequenceClassification.from_pretrained("acme/bert")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert transformers.AutoConfig.from_pretrained("distilbert-base-uncased").dim == 8
    datasets.Dataset.from_dict({"x": [1, 2, 3]}).push_to_hub("acme/pushed")
    assert datasets.load_dataset("acme/pushed", split="train")["x"][:] == [1, 2, 3]
    assert datasets.load_dataset("acme/rows", "table", split="held")["text"][:] == ["a", "b"]
    assert datasets.load_dataset("acme/pictures", split="train").features["label"].names == ["cat", "dog"]
    # datasets 5.2 writes the name that it is given into an hf:// address, where the client wants a namespace
    # (huggingface/datasets#8612), so it is asked for by the id that the Hub answers with.
    beans = api.dataset_info("beans")
    assert datasets.load_dataset(beans.id, split="train")["text"][:] == ["a", "b"]
    info = api.model_info("acme/bert")
    assert "safetensors" in (info.tags or [])
    assert info.pipeline_tag == "text-classification"
    assert "data/train-00000-of-00001.parquet" in api.list_repo_files("acme/pushed", repo_type="dataset")


def test_the_command_line_of_the_hub(hub: LocalHub, tiny: str, tmp_path: Path) -> None:
    hf = str(Path(sys.executable).with_name("hf"))
    command = [hf, "download", tiny, "--local-dir", str(tmp_path / "out"), "--quiet"]
    env = child_environment(os.environ, tmp_path / "home", hub.endpoint, "t-acme")
    subprocess.run(command, env=env, capture_output=True, check=True)
    assert (tmp_path / "out" / "model.bin").read_bytes() == WEIGHTS


def test_stopping_waits_for_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the server as it is; other tests have one that stops sooner."""
    monkeypatch.setattr(uvicorn, "Server", uvicorn.server.Server)
    asked = threading.Event()

    async def late(_: Request) -> Response:
        asked.set()
        await anyio.sleep(0.05)
        return JSONResponse({"name": "late"})

    with ThreadPoolExecutor() as pool:
        with LocalHub(tmp_path / "hub") as hub:
            hub.intercept = late
            answer = pool.submit(fetch, f"{hub.endpoint}/api/whoami-v2")
            asked.wait()
        assert answer.result()[2] == b'{"name":"late"}'
