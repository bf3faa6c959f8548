"""Whether two models' tokenizers and image processors do the same: by what they do to probes, not by their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hf_soup._util.isolated import IsolationError, run_isolated
from hf_soup._util.text import some
from hf_soup.checkpoint.config import error_in_one_line, quiet, shortened_value
from hf_soup.checkpoint.processor_bounds import Kind, excess, panics_as_errors

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: Seconds and bytes that one comparison may take; of pictures of 4,096 pixels a side it takes about 20 seconds.
_SECONDS, _BYTES = 120, 6 << 30
_ROLES = ("unk", "bos", "eos", "cls", "sep", "pad", "mask")
_TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "I didn't expect THAT, did you?",
    "  leading, trailing   and\tinner  white\nspace ",
    "lower UPPER Title CamelCase sNaKe_case",
    "0 7 42 1234567890 3.14159 1,000,000 1e-5 2024-02-29",
    "naïve café Ångström Straße Œuvre",
    "e\u0301 against \u00e9, ﬁ against fi, ① against 1",
    "Привет, мир! Γειά σου κόσμε.",
    "你好，世界。こんにちは世界。안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "🙂 👩‍🔬 🇺🇳 ¿¡§±",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \ufeff",
    "Donaudampfschifffahrtsgesellschaftskapitänskajütenschlüssel",
    "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "a" * 150,
    "https://huggingface.co/acme/model?x=1&y=2 <b>mail@example.org</b>",
    "def f(x):\n    return {'a': [x, -1]} # ok",
    "<s> </s> [CLS] [SEP] [MASK] <pad> <unk> <|endoftext|>",
    "!!! ... --- ??? \"quoted\" 'single' (round) [square]",
)


class ProcessorDifference(NamedTuple):
    """Something about processing: a difference, a note about what could not be compared, or that one tokenizer is the
    other with tokens added; then how many both have. It is about the tokenizers, the processors, or how long texts
    may be."""

    kind: Literal["difference", "note", "tokens"]
    message: str
    tokens: tuple[int, int] | None = None
    about: str = "tokenizer"


def same_processing(
    folder_a: Path, folder_b: Path, config: Mapping[str, Any], *, names: tuple[str, str] | None = None
) -> list[ProcessorDifference]:
    """What two models' tokenizers and image processors do differently to probe texts and images.

    Where one of the two could make too much of a text or a picture, only their files are compared.

    Args:
        folder_a, folder_b: Folders with the files of tokenizer and processor, and config.json. Equal files are
            not loaded.
        config: The models' config; it says how many channels an image has.
        names: What the findings call the two; their folders' names by default.

    Returns:
        Differences, and notes where one has nothing to compare or cannot be loaded; empty when both do the same.
    """
    one, other = names or (folder_a.name, folder_b.name)
    channels = 1 if config.get("num_channels") == 1 else 3
    files: dict[Kind, tuple[str, ...]] = {"tokenizer": _TOKENIZER_FILES, "image processor": _PROCESSOR_FILES}
    findings = []
    for kind, names_of_files in files.items():
        a, b = (
            {file: (folder / file).read_bytes() for file in names_of_files if (folder / file).is_file()}
            for folder in (folder_a, folder_b)
        )
        if a == b:
            continue
        if not a or not b:
            without, having = (other, one) if a else (one, other)
            findings.append(ProcessorDifference("note", f"{without} has no {kind}, {having} has one", about=kind))
            continue
        beyond = [(name, excess(folder, kind)) for name, folder in ((one, folder_a), (other, folder_b))]
        if said := next((f"that of {name} {what}" for name, what in beyond if what), ""):
            if not _same_files(a, b):
                message = f"the {kind}s of {one} and {other} were compared by their files alone, which differ: {said}"
                findings.append(ProcessorDifference("note", message, about=kind))
            continue
        found = _compared(kind, folder_a, folder_b, channels, (one, other))
        if isinstance(found, str):
            message = f"the {kind}s of {one} and {other} could not be compared: {found}"
            findings.append(ProcessorDifference("note", message, about=kind))
            continue
        findings += [
            ProcessorDifference("difference", f"{kind}: {what}", about=kind) if isinstance(what, str) else what
            for what in found
        ]
        if kind == "tokenizer":
            findings += _lengths(folder_a, folder_b, one, other)
    return findings


def _compared(
    kind: Kind, folder_a: Path, folder_b: Path, channels: int, names: tuple[str, str]
) -> list[str | ProcessorDifference] | str:
    """What two do differently, or why they could not be compared."""
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    def compare() -> list[str | ProcessorDifference] | str:
        try:
            with quiet(), panics_as_errors():
                a, b = (load(folder, trust_remote_code=False, local_files_only=True) for folder in (folder_a, folder_b))
                if kind == "tokenizer":
                    return _tokenizer_differences(a, b, *names)
                return _image_differences(a, b, channels)
        # A tokenizer library that is not installed, a class of the repo's own, a damaged file, a processor
        # that takes no pictures: whatever it is, nothing was compared, and that is what the note says.
        except Exception as error:  # noqa: BLE001
            return error_in_one_line(error)

    load: Any = AutoTokenizer.from_pretrained
    if kind == "image processor":
        load = partial(AutoImageProcessor.from_pretrained, backend="pil")
    try:
        # Also what is within bounds may count for minutes at one text, or be damaged so that a library crashes.
        return run_isolated(compare, _SECONDS, _BYTES)
    except IsolationError as error:
        return str(error)


def _same_files(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> bool:
    """Whether files hold the same, however JSON is written."""
    try:
        left, right = (
            {file: json.loads(data) if file.endswith(".json") else data for file, data in files.items()}
            for files in (a, b)
        )
        return left == right
    except (ValueError, RecursionError):
        return False


def _lengths(folder_a: Path, folder_b: Path, one: str, other: str) -> list[ProcessorDifference]:
    """Where two say how long a text may be, and differ: said, but no reason against an average."""
    found = []
    for folder in (folder_a, folder_b):
        path = folder / "tokenizer_config.json"
        stated = json.loads(path.read_text()).get("model_max_length") if path.is_file() else None
        # What is beyond any model is how transformers writes that nobody said.
        found.append(stated if isinstance(stated, int | float) and stated < 1e9 else None)
    if None in found or found[0] == found[1]:
        return []
    message = f"texts are cut at {found[0]} tokens in {one} and at {found[1]} in {other}"
    return [ProcessorDifference("note", message, about="length")]


def _added(a: Any, b: Any) -> list[str]:
    """The tokens that the larger of two tokenizers has behind all of the smaller one's; none where it is not so."""
    small, large = sorted((a.get_vocab(), b.get_vocab()), key=len)
    more = {token: number for token, number in large.items() if token not in small}
    if not more or any(large.get(token) != number for token, number in small.items()):
        return []
    return sorted(more, key=lambda token: more[token]) if min(more.values()) > max(small.values()) else []


def _tokenizer_differences(a: Any, b: Any, one: str, other: str) -> list[str | ProcessorDifference]:
    if added := _added(a, b):
        smaller, larger = sorted((a, b), key=lambda each: len(each.get_vocab()))
        # What was added says nothing yet; everything else must be as before.
        roles = {f"{role}_token_id" for role in _ROLES if getattr(larger, f"{role}_token", None) in added}
        roles |= {key for key in (f"{role}_token_id" for role in _ROLES) if getattr(smaller, key, None) is None}
        differences = _other_differences(smaller, larger, roles)
        if differences:
            return differences
        counts = [max(each.get_vocab().values()) + 1 for each in (a, b)]
        who = f"{other} is {one}" if counts[0] < counts[1] else f"{one} is {other}"
        said = some([shortened_value(token) for token in added])
        return [
            ProcessorDifference(
                "tokens", f"The tokenizer of {who}'s with tokens added: {said}.", (counts[0], counts[1])
            )
        ]
    return _other_differences(a, b, set())


def _other_differences(a: Any, b: Any, skipped: set[str]) -> list[str | ProcessorDifference]:
    extended = len(a) != len(b) and bool(_added(a, b))
    found: list[str | ProcessorDifference] = (
        [] if extended or len(a) == len(b) else [f"{len(a)} tokens against {len(b)}"]
    )
    ours, theirs = a.get_vocab(), b.get_vocab()
    moved = [] if extended else sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if moved and not found:
        number, token = moved[0]
        found.append(
            f"{len(moved)} tokens have other numbers; {shortened_value(token)!r}: {number} against {theirs.get(token)}"
        )
    for key in (f"{role}_token_id" for role in _ROLES):
        one, other = getattr(a, key, None), getattr(b, key, None)
        if one != other and key not in skipped:
            found.append(f"{key}: {one} against {other}")
    special = [str(token) for role in _ROLES if (token := getattr(a, f"{role}_token", None))]
    # Words of the vocabulary itself: to one of molecules or genes, every text above is unknown.
    words = " ".join(sorted(ours, key=lambda token: ours[token])[:: max(1, len(ours) // 64)])
    texts = (*_TEXTS, words, words.upper())
    probes: list[tuple[str, ...]] = [*((text,) for text in texts), (_TEXTS[1], _TEXTS[2]), (" x ".join(special),)]
    changed: list[tuple[object, ...]] = []
    compared: list[str] = []
    added = set(theirs.values()) - set(ours.values()) if extended else set()
    for probe in probes:
        one, other = a(*probe), b(*probe)
        if not added.isdisjoint(other["input_ids"]):
            continue  # only what has none of the added tokens in it must be as before
        compared.append(probe[0])
        # One version returns token types where another does not; only what both return can contradict.
        if any(one[key] != other[key] for key in one.keys() & other.keys()):
            changed.append((" | ".join(probe), one["input_ids"], other["input_ids"]))
    if changed:
        text, left, right = (shortened_value(value) for value in changed[0])
        what = f"{len(changed)} of {len(probes)} probe texts become other tokens"
        found.append(f"{what}; {text!r}: {left} against {right}")
    elif not compared:
        found.append(f"every probe text has tokens in it that were added; {len(a)} tokens against {len(b)}")
    elif a.pad_token_id != b.pad_token_id:
        if None not in (a.pad_token_id, b.pad_token_id) and a.padding_side != b.padding_side:
            found.append(f"padding: {a.padding_side} against {b.padding_side}")
    elif a.pad_token_id is not None:
        batch = compared[:4]  # of several lengths
        if a(batch, padding=True)["input_ids"] != b(batch, padding=True)["input_ids"]:
            found.append(f"padding: {a.padding_side} against {b.padding_side}")
    return found


def _image_differences(a: Any, b: Any, channels: int) -> list[str | ProcessorDifference]:
    import numpy as np

    noise = np.random.default_rng(0)
    largest = 0.0
    for height, width in ((8, 8), (48, 64), (224, 224), (301, 200)):
        ramp = np.linspace(0, 200, height * width * channels).reshape(height, width, channels)
        image = (ramp + noise.integers(0, 56, ramp.shape)).astype(np.uint8)
        one, other = (
            np.asarray(processor(images=image, input_data_format="channels_last", return_tensors="np")["pixel_values"])
            for processor in (a, b)
        )
        if one.shape != other.shape:
            return [f"a picture of {height}×{width} becomes {one.shape[1:]} against {other.shape[1:]}"]
        largest = max(largest, float(np.abs(one.astype(np.float64) - other).max()))
    # Both run in one process with one library: more than a mean written with fewer digits is another processor.
    return [f"pixel values of probe pictures differ by up to {largest:.3g}"] if largest > 1e-6 else []


@dataclass(frozen=True)
class Tokens:
    """What the tokenizers of ingredients have in common.

    Args:
        counts: How many tokens each has: the largest number, and one; all zero where they are the same files. Empty
            where not all bring a tokenizer that could be compared.
        difference: A sentence about what was added, where anything was; where they were not compared, why not.
    """

    counts: tuple[int, ...] = ()
    difference: str = ""

    @property
    def compared(self) -> bool:
        """Whether every ingredient's tokenizer is known to be the same, or the same with tokens added."""
        return bool(self.counts)

    @property
    def differ(self) -> bool:
        """Whether some have more tokens than others."""
        return len(set(self.counts)) > 1

    def speaker(self, vocabulary: str, rows: Sequence[int] | None = None) -> int:
        """Whose tokenizer a soup has: the largest for ``union``, the smallest for ``base``.

        >>> Tokens((5, 7, 7)).speaker("union", [8, 8, 9]), Tokens((5, 7, 7)).speaker("base")
        (2, 0)
        """
        sizes = list(zip(self.counts, rows or self.counts, strict=True))
        wanted = max(sizes) if vocabulary == "union" else min(sizes)
        return sizes.index(wanted)

    def known(self, number: int, speaker: int, rows: int) -> int:
        """How many rows of an ingredient stand for what the speaker's rows stand for; padding is what both call so.

        >>> Tokens((18, 19)).known(1, 0, 24), Tokens((18, 18)).known(1, 0, 24)
        (18, 24)
        """
        ours, theirs = self.counts[number], self.counts[speaker]
        return rows if ours == theirs else min(rows, ours, theirs)

    def lacking(self, names: Sequence[str], rows: Sequence[int]) -> str:
        """A sentence about the first whose table is shorter than its tokenizer, if one's is.

        >>> Tokens((20, 18)).lacking(["a", "b"], [18, 18])
        'a has rows for 18 tokens, but its tokenizer has 20. Resize its embeddings, or leave it out.'
        """
        found = (each for each in zip(names, rows, self.counts, strict=True) if each[1] < each[2])
        name, has, count = next(found, ("", 0, 0))
        said = f"{name} has rows for {has:,} tokens, but its tokenizer has {count:,}."
        return f"{said} Resize its embeddings, or leave it out." if name else ""

    def only(self, kept: Sequence[int]) -> Tokens:
        """Those of some ingredients."""
        return Tokens(tuple(self.counts[number] for number in kept) if self.counts else (), self.difference)

    def shown(self, number: int) -> str:
        """How many an ingredient has, for a list."""
        return f"{self.counts[number]:,} tokens, " if any(self.counts) else ""


def token_ids(configs: Sequence[Mapping[str, Any]], speaker: int) -> str:
    """Which numbers of special tokens come with one config, where others have another.

    >>> token_ids([{"pad_token_id": 0, "eos_token_id": 3}, {"pad_token_id": 18, "eos_token_id": 3}], 1)
    ', with pad_token_id 18'
    """
    keys = sorted({key for config in configs for key in config if key.endswith("_token_id")})
    return "".join(
        f", with {key} {configs[speaker].get(key)}"
        for key in keys
        if any(config.get(key) != configs[speaker].get(key) for config in configs)
    )
