"""What can go wrong, as a tree.

::

    SoupError                 soup          everything that this package raises on purpose
    ├── RecipeError           recipe        the recipe, or the command line, asks for something that makes no sense
    ├── ResolveError          resolve       a model or a data set cannot be found, reached, read or trusted
    ├── IncompatibleError     incompatible  the models cannot be averaged: architecture, ancestor, labels, vocabulary
    ├── MergeError            merge         the average itself failed: a tensor, the disk, the output folder
    │   └── ValuesError       values        numbers that no average can be made of, or none of the type that is written
    ├── ScoringError          scoring       validation or test data cannot be used, or a score cannot be believed
    └── PublishError          publish       the soup could not be pushed

An error names the thing, shows the values and says what to do: the first argument is the whole message
and ``hint`` is the part that says what to do. In the middle stands the ``code`` of an error that has no finer one;
docs/cli.md lists all of them. Decisions read codes and subjects, and never a message. Nothing else is caught by the
command line, so a traceback is always a defect of this package. No error shows a password or a token, wherever it
came from.
"""

import re
from collections.abc import Iterable
from typing import Self

#: What stands before the host in an address, up to the last ``@``; one that was taken for a path has one slash less.
_USER = re.compile(r"(://|https?:/|^//|(?<=[\s'\"])//)[^\s/?#]+@", re.IGNORECASE)
#: The same without a scheme; ``local:name@revision`` is a folder's name.
_BARE_USER = re.compile(r"(?<![\w.:/@-])(?!local:)(https?:)?[\w.%+-]+:[^\s/@'\"]+@(?=(?:[\w-]+\.)+\w+|localhost|\[)")
#: The Hub's tokens; what stands after an ``@`` is one sooner, as few branches are called so.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|hf_(?:oauth|jwt)_[\w.-]{8,}|(?<=@)hf_\w[\w.-]*")
#: A word that is none, longer than any path or tensor's name; and characters of a message.
_LONG, _LONGEST = re.compile(r"\S{600,}"), 20_000


def without_credentials(text: str) -> str:
    """A text as it may be shown or written: addresses without user and password, and no token of the Hub.

    >>> without_credentials("https://me:hf_secret@huggingface.co/acme/a, acme/b@hf_secret")
    'https://huggingface.co/acme/a, acme/b@hf_…'
    """
    return _TOKEN.sub("hf_…", _BARE_USER.sub("", _USER.sub(r"\1", text)))


def shortened(text: str, most: int = 500) -> str:
    """A text of somebody else's, of so many characters at most, and how many it has where that is not all.

    >>> shortened("abcdef", 3)
    'abc… (6 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def presentable(text: str) -> str:
    """A message as it is shown: `without_credentials`, and without the middle of words that nobody would read; so a
    stranger's name of a million letters is there with its beginning and its end, and the words around it.

    >>> len(presentable(f"'acme/{'a' * 1_000_000}' does not exist."))
    317
    """
    return shortened(_LONG.sub(lambda word: f"{word[0][:200]}…{word[0][-100:]}", without_credentials(text)), _LONGEST)


class SoupError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: What is wrong: names the thing and shows the values.
        hint: What to do about it, as a sentence of its own.
        code: For scripts and decisions, such as ``gated``; by default the name of the class, as ``recipe``.
        subjects: The models that it is about, as the message calls them, where a decision reads that.

    ``elsewhere`` is true of the error of a world of processes where another than this one says it to the user.

    >>> error = RecipeError("'weight' of acme/a is -1.", hint="Use a weight of zero or more.")
    >>> print(error)
    'weight' of acme/a is -1.
    Use a weight of zero or more.
    """

    elsewhere = False

    def __init__(self, message: str, hint: str = "", *, code: str = "", subjects: Iterable[str] = ()) -> None:
        self.message, self.hint = presentable(message), presentable(hint)
        self.code, self.subjects = code or self.default_code(), tuple(subjects)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    @classmethod
    def default_code(cls) -> str:
        """That of its errors which have no finer one."""
        return cls.__name__.removesuffix("Error").lower()

    @classmethod
    def of(cls, error: "SoupError", message: str, *, hint: str | None = None) -> Self:
        """The same error in other words: its finer code and its subjects, and its hint where there is no other."""
        code = "" if error.code == error.default_code() else error.code
        return cls(message, error.hint if hint is None else hint, code=code, subjects=error.subjects)


class RecipeError(SoupError):
    """The recipe or the command line asks for something that makes no sense."""


class ResolveError(SoupError):
    """A model or a data set cannot be found, reached, read or trusted."""


class IncompatibleError(SoupError):
    """The models cannot be averaged with each other."""


class MergeError(SoupError):
    """The average itself failed."""


class ValuesError(MergeError):
    """Numbers are not finite, or the average is too large for the type that is written."""


class ScoringError(SoupError):
    """Validation or test data cannot be used, or a score cannot be believed."""


class PublishError(SoupError):
    """The soup could not be pushed."""
