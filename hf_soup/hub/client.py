"""How to speak to the Hub: patience, retries, and one wording for whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from logging import CRITICAL
from typing import ParamSpec, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers, set_client_factory
from huggingface_hub.utils.logging import set_verbosity
from huggingface_hub.utils.tqdm import disable_progress_bars

from hf_soup._util.version import __version__
from hf_soup.errors import PublishError, ResolveError, SoupError, shortened
from hf_soup.hub.http import httpx

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: Seconds before the Hub counts as silent.
TIMEOUT = 30.0
ATTEMPTS = 5
#: Seconds before the second attempt, twice as many before the next, and so on.
PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_UNREACHABLE = (httpx.TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError)

Token = str | bool | None


def api(token: Token = None) -> HfApi:
    """The client, with this package's name in its user agent."""
    return HfApi(token=token, library_name="hf-soup", library_version=__version__)


def patient() -> None:
    """Give every request of this process a timeout, and bound every pause; the client's default is to wait for ever."""

    def factory() -> httpx.Client:
        client = default_client_factory()
        client.timeout = httpx.Timeout(TIMEOUT, read=120.0)
        client.event_hooks = {**client.event_hooks, "response": [_shorten_pause]}
        return client

    set_client_factory(factory)
    if "HF_HUB_VERBOSITY" not in os.environ and not constants.HF_DEBUG:
        # What goes wrong is raised, and worded here; its log lines hold addresses that are signed for this user.
        set_verbosity(CRITICAL)


def without_bars() -> None:
    """Have the client show no progress, unless the user's environment says that it shall."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


def endpoint() -> str:
    """The address of the Hub in use, as it is shown: without user and password, also where it has no scheme."""
    return re.sub(r"[^\s/]*@", "", str(constants.ENDPOINT))


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer, where there was one."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    if isinstance(error, httpx.TransportError):
        return not isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError)
    status = status_of(error)
    return status in (408, 425, 429) or (status is not None and status >= 500)


def may_pass(error: SoupError) -> bool:
    """Whether an error is a failure of the Hub or the network that may pass, and so says nothing of a model."""
    return error.code in ("offline", "unreachable", "rate-limit", "wrong-bytes")


def cut_off(error: BaseException) -> str:
    """``offline`` or ``unreachable``, where that led to an error, of whatever library; else empty."""
    causes = _causes(error)
    if any(isinstance(each, OfflineModeIsEnabled) for each in causes):
        return "offline"
    return "unreachable" if any(map(is_passing, causes)) else ""


def _causes(error: BaseException) -> list[BaseException]:
    """An error and all that led to it."""
    each: BaseException | None = error
    found: list[BaseException] = []
    # A cause that is raised again has what it caused as its context, which goes round in a circle.
    while each is not None and each not in found:
        found.append(each)
        each = each.__cause__ or each.__context__
    return found


class OddAnswerError(ValueError):
    """The server answers what the Hub would not: the client fails where it reads that."""


class ShortAnswerError(httpx.RemoteProtocolError):
    """An answer ends before it should, which may pass; says how many bytes came of how many."""


def retrying(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call the client, again after a pause where the failure may pass (rate limit, 5xx, a broken connection).

    Raises:
        OddAnswerError: The client cannot read the answer: a list, say, where it wants a mapping.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call(*args, **kwargs)
        except (HfHubHTTPError, httpx.TransportError) as error:
            refused = isinstance(error, httpx.ConnectError) and attempt >= 2
            if attempt == ATTEMPTS - 1 or not is_passing(error) or refused:
                raise
            time.sleep(pause_after(error, attempt))
        except (TypeError, AttributeError, LookupError) as error:
            raise OddAnswerError(f"{type(error).__name__}: {error}") from error
    raise AssertionError("the loop returns or raises")


def pause_after(error: BaseException, attempt: int) -> float:
    """Seconds to wait before the next attempt: what the Hub asks for, else longer every time."""
    pause = min(8.0, PAUSE * 2**attempt)
    if isinstance(error, HfHubHTTPError):
        asked = _asked_for(error.response)
        pause = pause if asked is None else asked
    # Jitter, so that parallel requests that failed together do not come back together.
    return float(pause * random.uniform(1.0, 1.2))


def _asked_for(response: httpx.Response) -> float | None:
    """Seconds that the Hub asks for, in its own header or in the one that is everybody's, up to a bound."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    after = str(response.headers.get("Retry-After", ""))
    if limit is not None and limit.remaining == 0:
        return min(_LONGEST_PAUSE, float(limit.reset_in_seconds))
    return min(_LONGEST_PAUSE, float(after)) if after.isdecimal() else None


def _shorten_pause(response: httpx.Response) -> None:
    """Let the client, which pauses by itself in an upload, pause no longer than this package."""
    pause = _asked_for(response)
    if pause is not None:
        response.headers.pop("RateLimit", None)
        response.headers["Retry-After"] = str(int(pause))


#: What the client raises, by class or by the status of the Hub's answer, and the words for it: message, hint, code. The
#: first that fits counts; those without a code have that of `cut_off`.
_WORDS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...] | int, str, str, str], ...] = (
    (
        GatedRepoError,
        "{what} is gated: its owner asks for agreement to terms before anyone reads it.",
        "Accept the terms at {page} and log in with `hf auth login`, or set HF_TOKEN.",
        "gated",
    ),
    (
        RevisionNotFoundError,
        "{what}: there is no such branch, tag or commit.",
        "Check the part after '@'.",
        "revision-gone",
    ),
    (
        RepositoryNotFoundError,
        "{what} does not exist on {hub}, or it is private.",
        "Check the spelling; {private}",
        "gone",
    ),
    (
        HFValidationError,
        "{what} is neither a folder nor a Hub id.",
        "A Hub id is `owner/name` (letters, digits, '-', '_' and '.'); a folder must exist.",
        "name",
    ),
    (
        OfflineModeIsEnabled,
        "{what} is not in the cache, and offline mode is on.",
        "Unset HF_HUB_OFFLINE, or fetch it once while online.",
        "offline",
    ),
    (
        ShortAnswerError,
        "{what}: the answer of {hub} ends after {odd}, each time that it is asked.",
        "Something between here and the Hub cuts answers short, or the file is shorter than the Hub says. "
        "Run the same command again.",
        "",
    ),
    (
        _UNREACHABLE,
        "{what}: {hub} cannot be reached ({error}){uncached}.",
        "Check the network and HF_ENDPOINT, and try again.",
        "",
    ),
    (
        # Whose words may have a part of a password in them.
        (httpx.InvalidURL, ImportError),
        "{what}: the address of the Hub or of a proxy cannot be used ({error}).",
        "Check HF_ENDPOINT, and the proxies that HTTP_PROXY, HTTPS_PROXY and ALL_PROXY name.",
        "address",
    ),
    (EntryNotFoundError, "{what}: the file is not in the repo.", "", "no-file"),
    (401, "{what}: the Hub does not accept the token.", "Log in again with `hf auth login`.", "token"),
    (403, "{what}: the token has no right to do this. {said}", "See `hf auth whoami`.", "forbidden"),
    (429, "{what}: the Hub's rate limit is reached.", "Wait some minutes and run this again.", "rate-limit"),
    (HfHubHTTPError, "{what}: the Hub answered {status}. {said}", "{later}", ""),
    (
        json.JSONDecodeError,
        "{what}: what {hub} answers is not JSON.",
        "Check HF_ENDPOINT: is that a Hub? If it is, try again later.",
        "",
    ),
    (OddAnswerError, "{what}: what {hub} says of it cannot be read ({odd}).", "Check HF_ENDPOINT: is that a Hub?", ""),
)


def explain(
    error: BaseException, what: str, *, kind: type[SoupError] = ResolveError, subjects: Sequence[str] = ()
) -> SoupError:
    """One clear error for whatever the client raised while it looked at ``what``."""
    if isinstance(error, SoupError):
        return error
    status, failed = status_of(error), cut_off(error) or "hub"
    known = {
        "what": what,
        "hub": endpoint(),
        "page": f"{endpoint()}/{what.split('@', maxsplit=1)[0].strip(chr(39))}",
        "private": "a private repo needs a token that may read it (see `hf auth whoami`)."
        if get_token()
        else "if it is private, log in with `hf auth login` or set HF_TOKEN.",
        "error": type(error).__name__,
        "uncached": "" if kind is PublishError else ", and the cache does not hold it",
        "said": _without_tokens(error.server_message or "", error) if isinstance(error, HfHubHTTPError) else "",
        "status": status,
        "later": "Try again later." if is_passing(error) else "",
        "odd": shortened(str(error)),
    }
    for case, message, hint, code in _WORDS:
        if status == case if isinstance(case, int) else isinstance(error, case):
            words = message.format(**known).strip(), hint.format(**known)
            return kind(*words, code=code or failed, subjects=subjects)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        full = f"{what}: no space is left on the disk of '{constants.HF_HUB_CACHE}'."
        return kind(full, "Make room, or set HF_HOME elsewhere.", code="disk-full", subjects=subjects)
    reason = getattr(error, "strerror", None) or str(error)
    return kind(f"{what}: {_without_tokens(reason, error)}", code=failed, subjects=subjects)


def explain_push(error: Exception, what: str) -> PublishError:
    """As `explain`, in the words of a push, which no cache helps; also for what a look at the Hub raised."""
    looked = isinstance(error, ResolveError) and isinstance(error.__context__, EXPLAINED)
    said = explain(error.__context__ if looked and error.__context__ else error, what, kind=PublishError)
    return PublishError.of(said, said.message)


def _without_tokens(said: str, error: BaseException) -> str:
    """What a server said, cut, without the token that it got, whatever its form, and without any of the Hub's."""
    sent = [
        each.response.request.headers.get("authorization", "").removeprefix("Bearer ")
        for each in _causes(error)
        if isinstance(each, HfHubHTTPError)
    ]
    for token in filter(None, (*sent, get_token())):
        said = said.replace(token, "hf_…")
    return shortened(re.sub(r"\bhf_[\w.-]+", "hf_…", said))


EXPLAINED = (
    HfHubHTTPError,
    httpx.HTTPError,
    httpx.InvalidURL,
    ImportError,  # of what a proxy by SOCKS needs
    OfflineModeIsEnabled,
    EntryNotFoundError,
    OSError,
    ValueError,
)
