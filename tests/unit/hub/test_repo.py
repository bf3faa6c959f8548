"""What the resolver decides without a network: names, pauses, wording, order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_soup._util.parallel import in_parallel
from hf_soup.errors import PublishError, ResolveError
from hf_soup.hub import client, repo as hub
from hf_soup.hub.http import httpx
from hf_soup.hub.push import require_token


def answer(status: int, **headers: str) -> httpx.Response:
    request = httpx.Request("GET", "https://huggingface.co/api?signature=secret")
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()},
                           request=request)  # fmt: skip


def failure(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, said: str = "", **headers: str) -> HfHubHTTPError:
    return kind(f"{status} for url https://huggingface.co/api?signature=secret", response=answer(status, **headers),
                server_message=said or None)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (failure(404, RepositoryNotFoundError), "'acme/a' does not exist on", "Check the spelling"),
        (failure(403, GatedRepoError), "'acme/a' is gated", "/acme/a and log in"),
        (failure(404, RevisionNotFoundError), "no such branch, tag or commit", "after '@'"),
        (failure(401), "does not accept the token", "hf auth login"),
        (failure(403, said="Only for members."), "no right to do this. Only for members.", "hf auth whoami"),
        (failure(429), "rate limit", "Wait some minutes"),
        (failure(502), "the Hub answered 502.", "Try again later"),
        (httpx.ConnectError("refused"), "cannot be reached (ConnectError)", "HF_ENDPOINT"),
        (httpx.ReadTimeout("slow"), "cannot be reached (ReadTimeout)", "Check the network"),
        (OfflineModeIsEnabled("offline"), "offline mode is on", "Unset HF_HUB_OFFLINE"),
        (EntryNotFoundError("gone"), "the file is not in the repo", ""),
        (HFValidationError("no name"), "neither a folder nor a Hub id", "`owner/name`"),
        (OSError(28, "No space left on device"), "'acme/a': no space is left on the disk of '", "Make room"),
        (OSError(5, "Input/output error"), "'acme/a': Input/output error", ""),
    ],
    ids=str,
)
def test_every_failure_has_one_wording(error: Exception, said: str, hint: str) -> None:
    """With what the user typed, and never with an address that may hold a signature."""
    for kind in (ResolveError, PublishError):
        found = client.explain(error, "'acme/a'", kind=kind)
        assert type(found) is kind
        assert said in found.message
        assert hint in found.hint
        assert "'acme/a'" in found.message
        assert "signature" not in str(found)


@pytest.mark.parametrize("address", ["http://me:secret@127.0.0.1:9", "me:secret@127.0.0.1:9"])
def test_the_hubs_address_is_shown_without_a_password(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    said = client.explain(httpx.ConnectError("refused"), "'acme/a'")
    assert "127.0.0.1:9 cannot be reached" in said.message
    assert "me" not in client.endpoint()
    assert "secret" not in str(said)


def test_a_servers_words_are_shown_in_part() -> None:
    said = str(client.explain(failure(500, said=f"It burns. {200_000 * 'x'}"), "'acme/a'"))
    assert "the Hub answered 500. It burns. xxx" in said
    assert "… (200,010 characters)" in said
    assert len(said) < 1000


def test_an_error_of_ours_stays_what_it_is() -> None:
    ours = ResolveError("a", hint="b")
    assert client.explain(ours, "'acme/a'", kind=PublishError) is ours


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        *((failure(status), True) for status in (408, 425, 429, 500, 502, 503, 504)),
        *((failure(status), False) for status in (400, 401, 403, 404, 412, 416)),
        (httpx.ReadError("reset"), True),
        (httpx.RemoteProtocolError("closed"), True),
        (httpx.ConnectTimeout("slow"), True),
        (httpx.UnsupportedProtocol("ftp"), False),
        (ValueError("no"), False),
    ],
    ids=str,
)
def test_only_what_may_pass_is_tried_again(error: Exception, passing: bool) -> None:
    assert client.is_passing(error) is passing


@pytest.mark.parametrize(
    ("error", "attempt", "low", "high"),
    [
        (httpx.ReadError("reset"), 0, 0.5, 0.6),
        (httpx.ReadError("reset"), 3, 4.0, 4.8),
        (httpx.ReadError("reset"), 9, 8.0, 9.6),
        (failure(429, Retry_After="20"), 0, 20.0, 24.0),
        (failure(429, Retry_After="86400"), 0, 60.0, 72.0),
        (failure(429, RateLimit='"api";r=0;t=30'), 0, 30.0, 36.0),
        (failure(429, RateLimit='"api";r=0;t=3000', Retry_After="3000"), 0, 60.0, 72.0),
        (failure(429, RateLimit='"api";r=7;t=3000'), 0, 0.5, 0.6),
        (failure(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), 0, 0.5, 0.6),
        (failure(503, Retry_After="-5"), 0, 0.5, 0.6),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_pauses_of_users")
def test_pauses_are_bounded(error: Exception, attempt: int, low: float, high: float) -> None:
    """And not all the same, so that requests that failed together do not come back together."""
    pauses = {client.pause_after(error, attempt) for _ in range(50)}
    assert all(low <= pause <= high for pause in pauses)
    assert len(pauses) > 1


def test_what_does_not_pass_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    calls = []

    def call(error: Exception) -> None:
        calls.append(error)
        raise error

    for error, times in (
        (failure(404), 1),
        (failure(503), client.ATTEMPTS),
        (httpx.ConnectError("refused"), 3),
        (httpx.ReadError("reset"), client.ATTEMPTS),
    ):
        calls.clear()
        with pytest.raises(type(error)):
            client.retrying(call, error)
        assert len(calls) == times


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("acme/a", True), ("gpt2", True), ("a_b/c.d-e", True), ("x" * 97, False), ("a/b/c", False), ("/a", False),
        ("./a", False), ("../a", False), ("a/", False), ("", False), ("a b", False), ("C:\\models", False),
        ("acme/données", False), ("a--b", False), ("a..b", False), ("acme/a.git", False), ("acme/a.", False),
    ],
)  # fmt: skip
def test_what_can_be_a_repo(name: str, is_one: bool) -> None:
    assert hub.is_repo_id(name) is is_one


def test_parallel_calls_keep_their_order_and_stop_at_an_error() -> None:
    assert in_parallel(lambda n: n * n, range(20), threads=4) == [n * n for n in range(20)]
    assert in_parallel(lambda n: n, []) == []
    started: list[int] = []
    gate = threading.Event()

    def work(n: int) -> int:
        started.append(n)
        if n == 0:
            raise ResolveError("the first")
        gate.wait(0.2)
        return n

    with pytest.raises(ResolveError, match="the first"):
        in_parallel(work, range(100), threads=2)
    gate.set()
    assert len(started) < 100


@pytest.mark.parametrize("token", [None, False, True])
def test_a_push_needs_a_token(
    token: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    with pytest.raises(PublishError, match="No token"):
        require_token(token)
    require_token("hf_given")
    monkeypatch.setenv("HF_TOKEN", "hf_set")
    check: Callable[[], None] = lambda: require_token(token)  # noqa: E731
    if token is False:
        with pytest.raises(PublishError):
            check()
    else:
        check()
