"""The error tree, as its docstring draws it."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_soup import errors
from hf_soup._util.logs import PrintableLogger
from hf_soup.errors import PublishError, RecipeError, ResolveError, SoupError
from hf_soup.hub.client import _WORDS

KINDS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SoupError)]


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn = re.findall(r"^ *([│ ]*)[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE)
    assert [name for _, name in drawn] == [kind.__name__ for kind in KINDS if kind is not SoupError]
    above = SoupError
    for bars, name in drawn:
        kind = getattr(errors, name)
        assert kind.__mro__[1] is (above if "│" in bars else SoupError)
        above = above if "│" in bars else kind
    assert SoupError.__mro__[1] is Exception


def raised() -> Iterator[str]:
    """The codes that the package gives to its errors."""
    yield from (kind("").code for kind in KINDS)
    yield from ("hub", "unreachable")  # which `explain` and `cut_off` choose for several at once
    yield from (code for *_, code in _WORDS if code)
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            for given in (
                [each.value for each in call.keywords if each.arg == "code"] if isinstance(call, ast.Call) else []
            ):
                either = (given.body, given.orelse) if isinstance(given, ast.IfExp) else (given,)
                yield from (each.value for each in either if isinstance(each, ast.Constant) and each.value)


def test_codes_are_few_and_documented() -> None:
    """For scripts: short, in kebab-case, and each with a line of its own in the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    documented = re.findall(r"^\| `(\S+)` \| ", page, re.MULTILINE)
    assert sorted(documented) == sorted(set(raised()))
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", code) for code in documented)
    drawn = re.findall(r"(\w+Error) +(\w+)  ", errors.__doc__ or "")
    assert drawn == [(kind.__name__, kind("").code) for kind in KINDS]


def test_an_error_in_other_words_keeps_what_decisions_read() -> None:
    first = ResolveError("It is gone.", hint="Look.", code="gone", subjects=["acme/a"])
    again = PublishError.of(first, "The push failed. It is gone.")
    assert (again.code, again.subjects, again.hint) == ("gone", ("acme/a",), "Look.")
    assert PublishError.of(first, "It failed.", hint="").hint == ""
    # What has no finer code has that of its type, in other words too.
    assert PublishError.of(ResolveError("It broke."), "It failed.").code == "publish"
    assert (PublishError("It failed.").code, PublishError("It failed.").subjects) == ("publish", ())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_an_error_says_what_to_do_on_a_line_of_its_own(kind: type[SoupError]) -> None:
    assert str(kind("It broke.")) == "It broke."
    assert str(kind("It broke.", hint="Mend it.")) == "It broke.\nMend it."


def test_an_error_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PublishError("a", hint="b", code="raced", subjects=["acme/a"])))
    assert isinstance(error, PublishError)
    assert (error.message, error.hint, error.code, error.subjects) == ("a", "b", "raced", ("acme/a",))
    assert not isinstance(error, RecipeError)


TOKEN = "hf_" + 34 * "a"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{TOKEN}@huggingface.co/acme/a", "https://huggingface.co/acme/a"),
        ("see 'HTTP://me@b.org:p@ss@host:80/x?y=a@b'.", "see 'HTTP://host:80/x?y=a@b'."),
        ("https:/me:secret@huggingface.co/acme/a", "https:/huggingface.co/acme/a"),  # as a path
        (
            "'me:secret@huggingface.co/acme/a' and https:me:secret@localhost:80",
            "'huggingface.co/acme/a' and localhost:80",
        ),
        ("'//me:secret@huggingface.co/acme/a'", "'//huggingface.co/acme/a'"),
        ("local:run.v1/checkpoint-5@1234567, local:a.b@1234567, my_eval:score, a/b@refs/pr/1", ""),
        (f"a token {TOKEN}, and x{TOKEN}y", "a token hf_…, and xhf_…"),
        ("acme/a@hf_short: no such branch", "acme/a@hf_…: no such branch"),
        ("hf_oauth_abcdefgh.ijk-l", "hf_…"),
        ("acme/hf_soup@v1, local:run-1@1234567, /home/me/hf_soup, mail@example.org", ""),
        ("https://huggingface.co/acme/a@v2 https://example.org/@me", ""),
    ],
)
def test_no_error_shows_a_password_or_a_token(text: str, shown: str) -> None:
    error = SoupError(text, hint=text)
    assert (error.message, error.hint) == (shown or text, shown or text)
    assert TOKEN not in repr(error)


@pytest.mark.parametrize(
    ("text", "begin", "end", "most"),
    [
        (f"'acme/a@{'v' * 10**6}': there is no such branch.", "'acme/a@vvv", "vvv': there is no such branch.", 400),
        ("x " * 10**5, "x x x", "… (200,000 characters)", 20_100),
        ("a\n" * 10**5, "a\na\na", "… (200,000 characters)", 20_100),
        (f"a {'b' * 170}/{TOKEN}/{'b' * 1000}", "a bbb", "bbb", 400),
    ],
    ids=["a word", "words", "lines", "a token"],
)
def test_a_strangers_text_is_cut(text: str, begin: str, end: str, most: int, log: pytest.LogCaptureFixture) -> None:
    """In errors and in what is logged; what stands around it is there."""
    error = SoupError(text, hint=text)
    PrintableLogger("hf_soup.x").warning(text)
    for shown in (error.message, error.hint, log.messages[-1]):
        assert shown.startswith(begin)
        assert shown.endswith(end)
        assert len(shown) < most
        assert "aaaaaaaa" not in shown
