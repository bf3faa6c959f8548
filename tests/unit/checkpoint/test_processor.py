"""Processing: tokenizers and image processors are alike when they do the same, whatever their files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_soup.checkpoint import same_processing

VIT = {"model_type": "vit", "hidden_size": 32, "num_attention_heads": 4, "image_size": 8, "patch_size": 2}


def _tokenizer(folder: Path, lower: bool = True, **rest: Any) -> Path:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "The", "brown", "##s", ".", ",", "x"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower, "model_max_length": 64, **rest}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizers_are_compared_by_what_they_do(tmp_path: Path) -> None:
    old, cased = _tokenizer(tmp_path / "old"), _tokenizer(tmp_path / "cased", lower=False)
    new = tmp_path / "new"
    transformers.AutoTokenizer.from_pretrained(old).save_pretrained(new)
    (new / "config.json").write_text((old / "config.json").read_text())
    assert {file.name for file in new.iterdir()} != {file.name for file in old.iterdir()}
    assert same_processing(old, new, {}) == []
    assert same_processing(old, old, {}) == []

    [found] = same_processing(old, cased, {})
    assert found.kind == "difference"
    assert "probe texts become other tokens; 'The quick brown fox" in found.message

    left = _tokenizer(tmp_path / "left", padding_side="left", model_max_length=32)
    assert [found[:2] for found in same_processing(old, left, {})] == [
        ("difference", "tokenizer: padding: right against left"),
        ("note", "texts are cut at 64 tokens in old and at 32 in left"),
    ]


def test_a_tokenizer_with_tokens_added_behind_all_others(tmp_path: Path) -> None:
    one, two = _tokenizer(tmp_path / "one"), _tokenizer(tmp_path / "two")
    with (two / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("\nfox")  # a word of a probe text, which becomes other tokens for that
    [found] = same_processing(one, two, {})
    assert (found.kind, found.tokens) == ("tokens", (13, 14))
    assert found.message == "The tokenizer of two is one's with tokens added: fox."
    [found] = same_processing(two, one, {})
    assert (found.kind, found.tokens) == ("tokens", (14, 13))
    assert found.message == "The tokenizer of two is one's with tokens added: fox."


def test_a_tokenizer_with_tokens_added_and_something_else_changed(tmp_path: Path) -> None:
    one, two = _tokenizer(tmp_path / "one"), _tokenizer(tmp_path / "two", lower=False)
    with (two / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("\nfox")
    [found, *_] = same_processing(one, two, {})
    assert found.kind == "difference"
    assert "probe texts become other tokens" in found.message


def test_a_tokenizer_with_a_token_in_the_midst_is_another(tmp_path: Path) -> None:
    one, two = _tokenizer(tmp_path / "one"), _tokenizer(tmp_path / "two")
    words = (two / "vocab.txt").read_text().splitlines()
    (two / "vocab.txt").write_text("\n".join([*words[:8], "fox", *words[8:]]))
    messages = [found.message for found in same_processing(one, two, {})]
    assert messages[0] == "tokenizer: 13 tokens against 14"


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    evil = _tokenizer(tmp_path / "evil", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    same_processing(_tokenizer(tmp_path / "good"), evil, {})
    assert not (tmp_path / "ran").exists()


def _processor(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(VIT))
    stated = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **config}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return folder


def test_image_processors_are_compared_by_what_they_do(tmp_path: Path) -> None:
    old = _processor(tmp_path / "old", feature_extractor_type="ViTFeatureExtractor", size=32, resample=2)
    new = _processor(tmp_path / "new", image_processor_type="ViTImageProcessor", size={"height": 32, "width": 32})
    assert same_processing(old, new, VIT) == []
    larger = _processor(tmp_path / "larger", image_processor_type="ViTImageProcessor", size=48)
    assert [found[:2] for found in same_processing(old, larger, VIT)] == [
        ("difference", "image processor: a picture of 8×8 becomes (3, 32, 32) against (3, 48, 48)")
    ]
    mean = _processor(tmp_path / "mean", image_processor_type="ViTImageProcessor", size=32, image_mean=[0.4] * 3)
    [found] = same_processing(old, mean, VIT)
    assert found[:2] == ("difference", "image processor: pixel values of probe pictures differ by up to 0.2")


def test_grey_pictures_go_through_a_grey_models_processor(tmp_path: Path) -> None:
    grey = {"image_processor_type": "ViTImageProcessor", "size": 8, "image_std": [0.35]}
    one, two = (
        _processor(tmp_path / "one", **grey, image_mean=[0.3]),
        _processor(tmp_path / "two", **grey, image_mean=[0.31]),
    )
    [found] = same_processing(one, two, {**VIT, "num_channels": 1})
    assert found.kind == "difference"
    assert float(found.message.rpartition(" ")[2]) == pytest.approx(0.01 / 0.35, rel=0.01)


def test_what_one_side_lacks_or_nobody_can_load_is_a_note(tmp_path: Path) -> None:
    have = _processor(tmp_path / "have", image_processor_type="ViTImageProcessor", size=32)
    lack = tmp_path / "lack"
    lack.mkdir()
    assert [found[:2] for found in same_processing(have, lack, VIT, names=("acme/a", "acme/b"))] == [
        ("note", "acme/b has no image processor, acme/a has one")
    ]
    assert same_processing(lack, lack, VIT) == []
    broken = _processor(tmp_path / "broken", image_processor_type="SoupProcessor")
    [found] = same_processing(have, broken, VIT)
    assert found.kind == "note"
    assert "could not be compared" in found.message


LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}
PANICS = {"type": "Split", "pattern": {"Regex": r"(\w+)+\d"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("part", "said"),
    [({"normalizer": LONG}, "that of evil puts 1,000,000 characters"), ({"pre_tokenizer": PANICS}, "not be compared")],
)
def test_tokenizers_that_cannot_be_run(
    part: dict[str, Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One makes gigabytes of a text, the other gives up with what is no `Exception`."""
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    base |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    base |= {"model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}
    for name, stated in (("good", base), ("evil", {**base, **part})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(stated))
        (tmp_path / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    [found] = same_processing(tmp_path / "good", tmp_path / "evil", {})
    assert found.kind == "note"
    assert said in found.message
    capfd.readouterr()


def test_image_processors_that_make_too_large_pictures(tmp_path: Path) -> None:
    kind = {"image_processor_type": "ViTImageProcessor"}
    large, small = _processor(tmp_path / "large", **kind, size=20_000), _processor(tmp_path / "small", **kind, size=32)
    [found] = same_processing(small, large, VIT)
    assert found.message == (
        "the image processors of small and large were compared by their files alone, which differ: "
        "that of large asks for size = 20,000; at most 4,096 are taken"
    )
    again = tmp_path / "again"
    again.mkdir()
    stated = json.loads((large / "preprocessor_config.json").read_text())
    (again / "preprocessor_config.json").write_text(json.dumps(stated, indent=2, sort_keys=True))
    assert same_processing(large, again, VIT) == []
