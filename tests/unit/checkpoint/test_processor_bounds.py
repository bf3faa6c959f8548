"""Bounds: files that would make too much of a text or a picture are told from those that are published."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from hf_soup.checkpoint import excess, panics_as_errors

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _charsmap(text: str) -> str:
    """Of sentencepiece: the length of a trie (here of nothing), the trie, and the texts that it points to."""
    return base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + f"ss\0{text}\0".encode()).decode()


def _tokenizer(**parts: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    stated: dict[str, Any] = json.loads(tokenizer.to_str())
    return stated


def _template(single: str, ids: int) -> Any:
    special = {"id": "[CLS]", "ids": [1] * ids, "tokens": ["a"] * ids}
    return processors.TemplateProcessing(single=single.strip(), pair="$A $B:1", special_tokens=[special])


def _with_charsmap(text: str, *, steps: int = 1) -> dict[str, Any]:
    step = {"type": "Precompiled", "precompiled_charsmap": _charsmap(text)}
    return {**_tokenizer(), "normalizer": {"type": "Sequence", "normalizers": [step] * steps}}


ten = normalizers.Replace("a", "a" * 10)
UNBOUNDED = {
    "a template of many ids": _tokenizer(post_processor=_template("[CLS] $A", 1001)),
    "a template of many tokens": _tokenizer(post_processor=_template("[CLS] " * 20 + "$A", 100)),
    "templates after each other": _tokenizer(post_processor=processors.Sequence([_template("$A " * 8, 1)] * 4)),
    "a long replacement": _tokenizer(normalizer=normalizers.Replace("a", "a" * 101)),
    "a long beginning": _tokenizer(normalizer=normalizers.Prepend("a" * 101)),
    "a long replacement in a table": _with_charsmap("a" * 101),
    "tables after each other": _with_charsmap("a" * 90, steps=3),
    "nine times tenfold": _tokenizer(normalizer=normalizers.Sequence([ten] * 9)),
    "nine times tenfold, nested": _tokenizer(
        normalizer=normalizers.Sequence([ten, normalizers.Sequence([ten, normalizers.Sequence([ten] * 7)])])
    ),
    "ligatures of ligatures": _tokenizer(
        normalizer=normalizers.Sequence([normalizers.Replace("ل", "\ufdfa"), normalizers.NFKC()] * 4)
    ),
    "between any two": _tokenizer(normalizer=normalizers.Sequence([normalizers.Replace(Regex("(?=.)"), "a")] * 30)),
    "bytes of bytes": _tokenizer(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 30)),
    "many steps": _tokenizer(normalizer=normalizers.Sequence([normalizers.NFC()] * 33)),
    "padding": {**_tokenizer(), "padding": {"strategy": {"Fixed": 10**9}}},
    "padding to a multiple": {**_tokenizer(), "padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}},
    "a long prefix": {**_tokenizer(), "model": {"type": "WordPiece", "continuing_subword_prefix": "#" * 10**4}},
    "parts of another type": {**_tokenizer(), "normalizer": {"type": "Sequence", "normalizers": 5}},
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_tokenizer_that_makes_much_of_little(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(UNBOUNDED[name]))
    assert excess(tmp_path, "tokenizer")
    assert not excess(tmp_path, "image processor")


BOUNDED = {
    "T5": _tokenizer(
        normalizer=normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), "▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        post_processor=processors.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]),
    ),
    "sentencepiece's own table": _with_charsmap("صلى الله عليه وسلم"),
    "LLaMA": _tokenizer(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "CLIP": _tokenizer(
        normalizer=normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        ),
        post_processor=processors.RobertaProcessing(("a", 1), ("a", 1)),
    ),
    "Qwen": _tokenizer(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_QWEN), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        ),
        post_processor=processors.Sequence([processors.ByteLevel(), _template("[CLS] $A", 1)]),
    ),
    "compatible forms, folded": _tokenizer(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    ),
    "many signs": _tokenizer(
        normalizer=normalizers.Sequence([normalizers.Replace(sign, "'") for sign in "`´‘’‚‛′" * 4])
    ),
    "padded to 512": {**_tokenizer(), "padding": {"strategy": {"Fixed": 512}, "pad_to_multiple_of": 8}},
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_tokenizer_as_they_are_published(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BOUNDED[name]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 1000000000000000019884624838656, "bos_token_id": 128000, "extra_ids": 100})
    )
    assert excess(tmp_path, "tokenizer") == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra_ids": 10**9}, "asks for extra_ids = 1,000,000,000; at most 100,000 are taken"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "names other files to be read in place of tokenizer.json"),
    ],
)
def test_options_of_a_tokenizer(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    assert excess(tmp_path, "tokenizer") == said


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"size": 4000, "max_tiles": 9}, "may make 144,000,000 pixels of a picture; at most 67,108,864 are taken"),
        ({"size": 20_000}, "asks for size = 20,000; at most 4,096 are taken"),
        ({"size": {"height": 20_000, "width": 20_000}}, "asks for height = 20,000; at most 4,096 are taken"),
        ({"size": [64, 20_000.0]}, "asks for size = 20,000.0; at most 4,096 are taken"),
        ({"image_processor": {"crop_size": 20_000}}, "asks for crop_size = 20,000; at most 4,096 are taken"),
        ({"size": 64, "size_divisor": 20_000}, "asks for size_divisor = 20,000; at most 4,096 are taken"),
        ({"min_pixels": 10**9}, "may make 1,000,000,000 pixels of a picture; at most 67,108,864 are taken"),
        ({"size": float("nan")}, "asks for size = nan; at most 4,096 are taken"),
        ({"size": 4096, "crop_size": {"height": 4096, "width": 4096}, "do_resize": True}, ""),
        ({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2}, ""),
        ({"image_mean": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3, "size": {"shortest_edge": 224}}, ""),
        ({"max_patches": 2048, "patch_size": {"height": 16, "width": 16}}, ""),
    ],
)  # fmt: skip
def test_an_image_processor(stated: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    assert excess(tmp_path, "image processor") == said


def test_sizes_that_stand_in_the_config(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 20_000, 20_000]}}))
    assert excess(tmp_path, "image processor") == "asks for input_size = 20,000; at most 4,096 are taken"


def test_what_is_nested_too_deeply_and_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("[" * 100_000)
    assert excess(tmp_path, "image processor") == "is nested too deeply"
    (tmp_path / "tokenizer.json").write_text("{")
    assert excess(tmp_path, "tokenizer") == ""  # the library says it


def test_a_panic_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_str(
        json.dumps(_tokenizer(pre_tokenizer=pre_tokenizers.Split(Regex(r"(a+)+\d"), "isolated")))
    )
    with pytest.raises(RuntimeError, match="retry-limit-in-match over"), panics_as_errors():
        tokenizer.encode("a" * 150)
    capfd.readouterr()  # it says it at length
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
