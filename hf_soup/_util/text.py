"""Words for people: some of many names, counts, durations, names cut to a length."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence


def some(names: Sequence[str] | Mapping[str, object], most: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    shown = list(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def is_writable(text: str) -> bool:
    """Whether a text can be written: JSON and pickles can spell halves of characters, which cannot."""
    return re.search("[\ud800-\udfff]", text) is None


def printable(text: str) -> str:
    """A stranger's text as it may be shown at a terminal: lines, and no letters that would steer it.

    >>> printable("red\x1b[31m\\n")
    'red�[31m\\n'
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)


def strings(value: object) -> list[str]:
    """The texts of a card's field that may hold one or a list, each on one line and of bounded length.

    >>> strings(["mit", 3, "a\\n---\\nb: c"])
    ['mit', 'a --- b: c']
    """
    found = value if isinstance(value, list) else [value]
    return [text for each in found[:100] if isinstance(each, str) and (text := " ".join(each.split())[:200])]


#: Letters of a name in a table or picture.
_LETTERS = 24


def short(names: Sequence[str]) -> list[str]:
    """Names without owners, where that leaves them apart, and of bounded length; different names stay different.

    >>> short(["acme/vit-1", "local:vit-2"])
    ['vit-1', 'vit-2']
    >>> short([f"acme/a-base-model-fine-tuned-with-seed-{seed}-on-digits-and-more" for seed in (1, 2)])
    ['…1-on-digits-and-more', '…2-on-digits-and-more']
    """
    last = [name.rpartition("/")[2].removeprefix("local:") for name in names]
    found = last if len({*last}) == len(last) else list(names)
    begin = len(os.path.commonprefix(found))  # noqa: RUF071 -- letter by letter is what is meant
    ways = (
        [middle_out(name) for name in found],
        # What they have in common at the start goes first, as what tells them apart may have been in the middle.
        [middle_out(f"…{name[begin:]}") for name in found],
        [f"{name[: _LETTERS - 5]}…{number}" for number, name in enumerate(found, 1)],
    )
    return next(way for way in ways if len({*way}) == len(way) or way is ways[-1])


def middle_out(name: str, most: int = _LETTERS) -> str:
    """A name without its middle, where it has more letters than that."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[1 - half :]}"


def counted(some: int, many: int, word: str) -> str:
    """How many of a number of things.

    >>> counted(1, 1, "pair"), counted(2, 2, "pair"), counted(3, 3, "pair"), counted(1, 4, "pair")
    ('the one pair', 'both pairs', 'all 3 pairs', '1 of 4 pairs')
    """
    if some < many:
        return f"{some} of {many} {word}s"
    return f"the one {word}" if many == 1 else f"{'both' if many == 2 else f'all {many}'} {word}s"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Some names as words.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c", "d", "e"], most=4)
    ('a', 'a and b', 'a, b, c and 2 more')
    """
    shown = names if len(names) <= most else (*names[: most - 1], f"{len(names) - most + 1} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def first_sentences(message: str, most: int = 240) -> str:
    """The sentences of a message that fit; the first one whatever it is.

    >>> first_sentences("They drifted. Of acme/a v1.0 little is left.", 20)
    'They drifted.'
    """
    first, *rest = re.split(r"(?<=[.!?]) (?=[^a-z])", message)
    for sentence in rest:
        if len(f"{first} {sentence}") > most:
            break
        first += f" {sentence}"
    return first


def near(word: str, known: Iterable[str]) -> str:
    """The nearest of the names that there are, in brackets; nothing where none is near.

    >>> near("slect", ["method", "select"]), near("base", ["base_model"]), near("x", ["method"])
    (' (did you mean `select`?)', ' (did you mean `base_model`?)', '')
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, 1) or [name for name in names if len(word) > 2 and word in name]
    return f" (did you mean `{close[0]}`?)" if close else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    if type(error).__name__ == "UnidentifiedImageError":  # Pillow's names an object at an address
        return "it is no image that Pillow can read"
    if isinstance(error, SystemExit):
        return f"it ends the process, by sys.exit({'' if error.code is None else repr(error.code)})"
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 -- a stranger's class
        text = ""
    return text.strip().split("\n")[0] or type(error).__name__
