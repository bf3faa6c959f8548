"""The error tree, as its docstring draws it."""

from __future__ import annotations

import pickle
import re

import pytest

from hf_soup import errors
from hf_soup.errors import PublishError, RecipeError, SoupError

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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_an_error_says_what_to_do_on_a_line_of_its_own(kind: type[SoupError]) -> None:
    assert str(kind("It broke.")) == "It broke."
    assert str(kind("It broke.", hint="Mend it.")) == "It broke.\nMend it."


def test_an_error_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PublishError("a", hint="b")))
    assert isinstance(error, PublishError)
    assert (error.message, error.hint) == ("a", "b")
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
