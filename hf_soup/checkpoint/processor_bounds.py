"""What a stranger's tokenizer or image processor could make of little, seen in its files before anything loads them.

One line of JSON is enough to make gigabytes of a word or of a small picture. What is looked at here holds for every
text and picture, so it is asked before two are compared, and before one is used.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

Kind = Literal["tokenizer", "image processor"]
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "config.json")

#: Pixels that a side of a picture may have, and all pixels that one picture may become, in how many pieces ever.
_SIDE, _PIXELS = 4096, 4 * 4096**2
#: Pieces of which a picture is made, or copies that are made of it.
_PIECES = re.compile(r"tiles?$|frames|temporal|(num|max)_(crops|splits)|slice|patches|repeat")
#: Tokens that a template may add, and those that a text is padded to, or padded to a multiple of.
_ADDED, _PADDED = 1000, 100_000
#: Characters that may be put in the place of some, how many steps may follow each other, and what they may make of one.
_REPLACEMENT, _STEPS, _GROWTH = 100, 32, 1000
#: Steps that make more characters of some: ligatures of Arabic become 18, letters with marks up to 4.
_GROWING = {"ByteLevel": 2, "NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "BertNormalizer": 12}
#: Characters of a pattern, and of the longest other text of a tokenizer's parts.
_PATTERN, _TEXT = 10_000, 1000
#: Numbers in tokenizer_config.json, such as how many tokens a class adds by itself. Those that tell how long a text
#: may be, or which token is which, make nothing.
_NUMBER = 100_000
_HARMLESS = re.compile(r"(model_)?max_len(gth)?|\w*_id|vocab_size")


def excess(folder: Path, kind: Kind) -> str:
    """What a model's tokenizer or image processor asks for that is too much, for a sentence; empty if nothing is.

    Args:
        folder: That holds its files.
        kind: Which of the two.
    """
    files = _TOKENIZER if kind == "tokenizer" else _PROCESSOR
    try:
        stated = [json.loads((folder / file).read_bytes()) if (folder / file).is_file() else {} for file in files]
    except ValueError:  # the library refuses it as well, and says why
        return ""
    except RecursionError:
        return "is nested too deeply"
    try:
        if kind == "tokenizer":
            found = chain(_of_tokenizer(stated[0]), _of_options(stated[1]))
        else:  # timm's are made of what the config says about the pretrained model
            found = chain(*map(_of_pictures, (*stated[:2], stated[2].get("pretrained_cfg"))))
        return next(found, "")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"is not as such files are ({type(error).__name__}: {error})"


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Within this, what tokenizers raises where it gives up, which is no `Exception`, is a `RuntimeError`."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(str(error)) from error


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Everything that is no list or mapping, with the key under which it, or the list that holds it, stands."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each, key)
    else:
        yield key, value


def _of_pictures(stated: object) -> Iterator[str]:
    side, pieces, pixels = 1.0, 1.0, 1.0
    for key, value in _leaves(stated):
        if not isinstance(value, int | float):
            continue
        if key.endswith("pixels"):
            pixels = max(pixels, float(min(value, 10**18)))
        elif not abs(value) <= _SIDE:
            yield f"asks for {key} = {value:,}; at most {_SIDE:,} are taken"
        elif _PIECES.search(key) and value > 1:
            pieces *= value
        else:
            side = max(side, value)
    if not max(pixels, side**2) * pieces <= _PIXELS:
        yield f"may make {max(pixels, side**2) * pieces:,.0f} pixels of a picture; at most {_PIXELS:,} are taken"


def _of_options(stated: Mapping[str, Any]) -> Iterator[str]:
    if "fast_tokenizer_files" in stated:
        yield "names other files to be read in place of tokenizer.json"
    for key, value in _leaves({key: value for key, value in stated.items() if not _HARMLESS.fullmatch(key)}):
        if isinstance(value, int | float) and not abs(value) <= _NUMBER:
            yield f"asks for {key} = {value:,}; at most {_NUMBER:,} are taken"


def _of_tokenizer(stated: Mapping[str, Any]) -> Iterator[str]:
    steps = [_steps(stated.get(part)) for part in ("normalizer", "pre_tokenizer", "post_processor")]
    if (most := max(map(len, steps))) > _STEPS:
        yield f"has {most:,} steps in a row; at most {_STEPS} are taken"
    normalizer, pre_tokenizer, post_processor = steps
    for step in normalizer:
        if (length := _put(step)) > _REPLACEMENT:
            yield f"puts {length:,} characters in the place of some; at most {_REPLACEMENT} are taken"
    if (growth := math.prod(map(_growth, (*normalizer, *pre_tokenizer)))) > _GROWTH:
        yield f"may make {growth:,.0f} characters of one; at most {_GROWTH:,} are taken"
    if (added := math.prod(map(_added, post_processor))) > _ADDED:
        yield f"may add {added:,} tokens to a text; at most {_ADDED:,} are taken"
    padding = stated.get("padding") or {}
    for key, value in _leaves({key: padding.get(key) for key in ("strategy", "pad_to_multiple_of")}):
        if isinstance(value, int) and value > _PADDED:
            yield f"pads texts to {value:,} tokens ({key}); at most {_PADDED:,} are taken"
    model = {key: value for key, value in (stated.get("model") or {}).items() if key not in ("vocab", "merges")}
    for key, value in _leaves([*normalizer, *pre_tokenizer, *post_processor, padding, model]):
        limit = {"precompiled_charsmap": math.inf, "Regex": _PATTERN}.get(key, _TEXT)
        if isinstance(value, str) and len(value) > limit:
            yield f"has a text of {len(value):,} characters ({key}); at most {limit:,.0f} are taken"


def _steps(part: object) -> list[Mapping[str, Any]]:
    """A part of a tokenizer as steps that follow each other; sequences may hold sequences."""
    if not isinstance(part, Mapping):
        return []
    within = next((part[key] for key in ("normalizers", "pretokenizers", "processors") if key in part), None)
    return [part] if within is None else [step for each in within for step in _steps(each)]


def _put(step: Mapping[str, Any]) -> int:
    """The longest text that a step of normalisation puts anywhere."""
    if charsmap := step.get("precompiled_charsmap"):
        data = base64.b64decode(charsmap)
        # The length of a trie, the trie, and texts that end with zeros.
        return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")))
    return max(len(step.get(key) or "") for key in ("content", "prepend", "replacement", "prefix", "suffix"))


def _growth(step: Mapping[str, Any]) -> float:
    """How many characters a step can make of one."""
    pattern, put = step.get("pattern") or {}, _put(step)
    if step.get("type") in _GROWING:
        return _GROWING[str(step["type"])]
    if step.get("type") == "Precompiled":
        return put
    if text := str(pattern.get("String") or ""):
        return max(1, put / len(text))
    # A regular expression may also match between any two characters, but for one of characters in brackets.
    plain = re.fullmatch(r"(\[\^?[^][]+\]|\\[snrt]| )(\+|\{[1-9]\d*,?\d*\})?", pattern.get("Regex") or "")
    return max(1, put) if plain else put + 1


def _added(step: Mapping[str, Any]) -> int:
    """How many tokens a step of post-processing can make of one, or of none."""
    special = step.get("special_tokens") or {}
    return max(1, *(sum(_ids(each, special) for each in step.get(key) or ()) for key in ("single", "pair")))


def _ids(piece: Mapping[str, Any], special: Mapping[str, Any]) -> int:
    name = str((piece.get("SpecialToken") or {}).get("id"))
    return len(special[name]["ids"]) if name in special else 1
