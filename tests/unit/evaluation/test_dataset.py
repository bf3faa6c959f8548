"""A bench on real models and data: digits for a tiny ViT, sentences for a tiny BERT."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from plans import config_of
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_soup.errors import ScoringError
from hf_soup.evaluation import ClassificationDataset, EvaluationData, ModelTemplate
from hf_soup.evaluation.ensembles import ensemble
from hf_soup.evaluation.formulas import CLASS_METRICS
from hf_soup.evaluation.model import build_model
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.recipe import Scoring

DIGITS = load_digits()
PIXELS = np.rint(DIGITS.images * 255 / 16).astype(np.uint8)  # (1797, 8, 8)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SENTENCES = [
    ("i feel wonderful today", 1),
    ("what a sad sad story", 0),
    ("the best day of my life", 1),
    ("nothing works and everybody left", 0),
    ("joy", 1),
    ("i cried all night long because the cat was gone and nobody cared at all", 0),
    ("happy again", 1),
    ("grey", 0),
]
WORDS = sorted({word for sentence, _ in SENTENCES for word in sentence.split()})
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def save(model: Any, folder: Path) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, initializer_range=0.5, id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": True, "do_normalize": True,
        "rescale_factor": 1 / 255, "image_mean": [0.3], "image_std": [0.35], "size": {"height": 8, "width": 8},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, save(ViTForImageClassification(config), folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder, save(BertForSequenceClassification(config), folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits as 8 x 8 grey PNGs in a parquet file, as the demo publishes them."""
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [Image.fromarray(pixels) for pixels in PIXELS[:60]], "label": DIGITS.target[:60].tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("text") / "moods.jsonl", SENTENCES)


def write_rows(path: Path, rows: Sequence[tuple[Any, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def image_scoring(path: Path, **more: Any) -> Scoring:
    return Scoring(task="image-classification", dataset=str(path), **more)


def text_scoring(path: Path, **more: Any) -> Scoring:
    return Scoring(task="text-classification", dataset=str(path), **more)


def bench_of(scoring: Scoring, donor: tuple[Path, dict[str, Any]], **more: Any) -> ClassificationDataset:
    (bench,) = prepare_datasets([("validation", scoring)], folder=donor[0], config={**donor[1], **more})
    return bench


def pixels_of(bench: ClassificationDataset) -> torch.Tensor:
    """All inputs of a bench of images, ``(n, channels, height, width)``."""
    return bench.inputs.batch(np.arange(bench.n))["pixel_values"]


def one_hot(bench: ClassificationDataset, answers: Any) -> Any:
    return np.eye(len(bench.class_names), dtype=np.float32)[np.asarray(answers)]


def vit_model(donor: tuple[Path, dict[str, Any]]) -> Any:
    tensors = load_file(donor[0] / "model.safetensors")
    return build_model(config_of(donor[0]), tensors, "image-classification", torch.float32)


def test_digits_are_scored_as_the_model_answers_them(vit: Any, digits: Path) -> None:
    """Straight through: the logits are those of the pixels (x - 0.3) / 0.35, row by row."""
    bench, model = bench_of(image_scoring(digits, batch_size=7), vit), vit_model(vit)
    seen: list[int] = []
    logits = bench.outputs(model, progress=seen.append)
    pixels = (torch.tensor(PIXELS[:60, None], dtype=torch.float32) / 255 - 0.3) / 0.35
    with torch.inference_mode():
        expected = model(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert (logits.dtype, logits.shape, sum(seen), seen[0]) == (np.float32, (60, 10), 60, 7)
    assert not model.training
    assert bench.score(logits).value == pytest.approx(np.mean(expected.argmax(1) == DIGITS.target[:60]))
    assert (bench.n, bench.notes, bench.class_names) == (60, (), tuple(NAMES))
    assert bench.scoring.revision is not None
    assert bench.scoring.revision.startswith("sha256:")


def test_training_mode_and_dtype_of_the_model_do_not_matter(vit: Any, digits: Path) -> None:
    bench = bench_of(image_scoring(digits), vit, hidden_dropout_prob=0.5)
    model = vit_model(vit)
    model.train()
    exact = bench.outputs(model)
    assert not model.training
    rounded = bench.outputs(model.to(torch.bfloat16))
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_text_logits_do_not_depend_on_the_batch(bert: Any, sentences: Path, batch_size: int) -> None:
    """Sorted by length and padded for speed; the rows come back in the order of the data."""
    bench = bench_of(text_scoring(sentences, batch_size=batch_size), bert)
    tensors = load_file(bert[0] / "model.safetensors")
    model = build_model(config_of(bert[0]), tensors, "text-classification", torch.float32)
    logits = bench.outputs(model)
    for row, (sentence, _) in enumerate(SENTENCES):
        # At most the 12 positions that the model has, the last one for [SEP].
        tokens = [2, *[VOCABULARY.index(word) for word in sentence.split()][:10], 3]
        with torch.inference_mode():
            alone = model(input_ids=torch.tensor([tokens])).logits[0]
        np.testing.assert_allclose(logits[row], alone, atol=1e-5)
    assert bench.notes == ("labels matched by number, because the model's config names no classes",)
    other = replace(bench, name="more.jsonl")
    template = ModelTemplate(bert[1], "float32", bert[0])
    # Several metrics on one data set, and several data sets of which the same is to be known.
    assert EvaluationData(template, (bench, bench), (other,)).notes == [
        "moods.jsonl, more.jsonl: labels matched by number, because the model's config names no classes"
    ]


def test_pairs_are_read_as_pairs(bert: Any, tmp_path: Path) -> None:
    path = tmp_path / "nli.jsonl"
    rows = [
        {"premise": "sad", "hypothesis": "joy", "label": 0},
        {"premise": "joy", "hypothesis": "sad", "label": 1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = bench_of(text_scoring(path), bert)
    batch = bench.inputs.batch(np.arange(2))
    sad, joy = VOCABULARY.index("sad"), VOCABULARY.index("joy")
    assert batch["input_ids"].tolist() == [[2, sad, 3, joy, 3], [2, joy, 3, sad, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 2


def test_a_tokenizer_that_cannot_pad_reads_one_row_at_a_time(bert: Any, sentences: Path) -> None:
    bench = bench_of(text_scoring(sentences), bert)
    everything = np.arange(bench.n)
    assert [len(rows) for rows in bench.inputs.batches(everything, 32)] == [len(SENTENCES)]
    bench.inputs.tokenizer.pad_token = None
    assert [len(rows) for rows in bench.inputs.batches(everything, 32)] == [1] * len(SENTENCES)


@pytest.mark.parametrize("shape", ["lists", "channel first", "channel last", "floats", "colour", "palette"])
def test_images_in_other_clothes(vit: Any, digits: Path, tmp_path: Path, shape: str) -> None:
    """Arrays, nested lists and colour images of the same digits give the same tensors."""
    whole = PIXELS[:12]
    grey = [Image.fromarray(pixels) for pixels in whole]
    image: list[Any] = {
        "lists": whole.tolist(),
        "channel first": whole[:, None].tolist(),
        "channel last": whole[..., None].tolist(),
        "floats": (whole / 255).tolist(),
        "colour": [picture.convert("RGB") for picture in grey],
        "palette": [picture.convert("P") for picture in grey],
    }[shape]
    features = datasets.Features({"img": datasets.Image(), "labels": datasets.ClassLabel(names=NAMES)})
    rows = {"img": image, "labels": DIGITS.target[:12].tolist()}
    pictures = shape in ("colour", "palette")
    table = datasets.Dataset.from_dict(rows, features=features) if pictures else datasets.Dataset.from_dict(rows)
    table.to_parquet(tmp_path / "d.parquet")
    bench = bench_of(image_scoring(tmp_path / "d.parquet"), vit)
    reference = bench_of(image_scoring(digits, split="train[:12]"), vit)
    assert torch.equal(pixels_of(bench), pixels_of(reference))


@pytest.mark.parametrize(
    "pixels",
    [
        [[0, 300], [0, 0]],
        [[-1, 0], [0, 0]],
        [[0.5, 7.5], [1, 1]],
        [[float("nan"), 0], [0, 0]],
        [1, 2],
        [[1, 2], [3]],
        [],
    ],
)
def test_arrays_that_are_no_images_name_the_row(vit: Any, tmp_path: Path, pixels: Any) -> None:
    good = PIXELS[0].tolist()
    rows = {"image": [good, good, pixels], "label": [0, 1, 1]}
    if pixels == [1, 2]:
        rows["image"] = [pixels] * 3
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ScoringError, match=rf"Cannot read row {0 if pixels == [1, 2] else 2} of .*\(image\)"):
        bench_of(image_scoring(tmp_path / "d.parquet"), vit)


def test_an_image_that_is_none_and_one_of_16_bits(vit: Any, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    good = Image.fromarray(PIXELS[0])
    deep = Image.fromarray(PIXELS[0].astype(np.uint16) * 257)
    for name, bad, message in (
        ("broken", {"bytes": b"not a PNG", "path": None}, r"Cannot read row 1 .*: it is no image that Pillow"),
        ("none", None, r"Cannot read row 1 .*: there is no image"),
        ("deep", deep, "mode I;16; convert it to 8 bits"),
    ):
        rows = {"image": [good, bad], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(ScoringError, match=message):
            bench_of(image_scoring(tmp_path / f"{name}.parquet"), vit)


def test_images_of_several_sizes_without_resizing(vit: Any, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [Image.new("L", (8, 8)), Image.new("L", (9, 8))], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ScoringError, match=r"image processor fails on d.parquet .*\(8, 8, 1\), \(8, 9, 1\)"):
        bench_of(image_scoring(tmp_path / "d.parquet"), vit)


def test_colour_images_through_a_processor_that_resizes(vit: Any, tmp_path: Path) -> None:
    """A three-channel donor: images of any size and mode become (3, 8, 8)."""
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 128))
    rows = {"image": [clear, Image.new("L", (8, 9), 255)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    bench = bench_of(image_scoring(tmp_path / "d.parquet"), (tmp_path, {**vit[1], "num_channels": 3}))
    assert pixels_of(bench).shape == (2, 3, 8, 8)
    assert torch.equal(pixels_of(bench)[1], torch.ones(3, 8, 8))


def test_text_that_is_no_text(bert: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [("fine", 0), (None, 1)])
    with pytest.raises(ScoringError, match=r"Cannot read row 1 of d.jsonl \(text\): None where a text should be"):
        bench_of(text_scoring(path), bert)


def test_a_text_without_tokens_is_named(bert: Any, tmp_path: Path) -> None:
    """Tokenizers such as GPT-2's add no token of their own, and a model cannot read none."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "joy": 1}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    path = write_rows(tmp_path / "d.jsonl", [("joy", 0), ("joy joy", 1), ("", 1)])
    with pytest.raises(ScoringError, match=r"Row 2 of d\.jsonl is '', no token to"):
        bench_of(text_scoring(path), (tmp_path, bert[1]))
    assert bench_of(text_scoring(path, split="train[:2]"), (tmp_path, bert[1])).n == 2


def test_one_class_only(bert: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [("a", 1), ("b", 1)])
    with pytest.raises(ScoringError, match=r"All 2 rows of d\.jsonl have the label '1'"):
        bench_of(text_scoring(path), bert)


def test_donors_without_tokenizer_or_image_processor(
    vit: Any, digits: Path, bert: Any, sentences: Path, tmp_path: Path
) -> None:
    with pytest.raises(ScoringError, match=r"no preprocessor_config\.json"):
        bench_of(image_scoring(digits), (tmp_path, vit[1]))
    with pytest.raises(ScoringError, match="no tokenizer"):
        bench_of(text_scoring(sentences), (tmp_path, bert[1]))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ScoringError, match="image processor"):
        bench_of(image_scoring(digits), (tmp_path, vit[1]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for broken in ("{}", "nonsense"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ScoringError, match="Cannot read the donor's tokenizer"):
            bench_of(text_scoring(sentences), (tmp_path, bert[1]))


def test_no_code_of_the_donor_is_run(vit: Any, digits: Path, tmp_path: Path) -> None:
    """A processor that names code in its folder is an error, not an import."""
    remote = {"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(remote))
    # Code that runs is copied elsewhere first, so it leaves its mark by a full path.
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(ScoringError, match="image processor"):
        bench_of(image_scoring(digits), (tmp_path, vit[1]))
    assert not (tmp_path / "ran").exists()


def test_what_could_make_too_much_of_the_data_is_not_used(
    vit: Any, digits: Path, bert: Any, sentences: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor", "size": 20000}')
    with pytest.raises(ScoringError, match=r"The donor's image processor asks for size = 20,000; at most 4,096"):
        bench_of(image_scoring(digits), (tmp_path, vit[1]))
    split = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}
    stated = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split] * 99},
    }
    stated |= {"model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(stated))
    with pytest.raises(ScoringError, match="The donor's tokenizer has 99 steps in a row"):
        bench_of(text_scoring(sentences), (tmp_path, bert[1]))
    # A pattern at which tokenizers gives up, by what is no `Exception`.
    split["pattern"] = {"Regex": r"(.+)+\d\d\d\d"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**stated, "pre_tokenizer": split}))
    with pytest.raises(ScoringError, match="The donor's tokenizer cannot read"):
        bench_of(text_scoring(sentences), (tmp_path, bert[1]))
    capfd.readouterr()


def test_a_tokenizer_of_another_model(bert: Any, sentences: Path) -> None:
    with pytest.raises(ScoringError, match="the model has 9 tokens"):
        bench_of(text_scoring(sentences), bert, vocab_size=9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "has 0 as 'label', and the model's head is multi-label"),
        ({"id2label": {"0": "score"}}, "head is regression, for which there is no metric 'accuracy'"),
        ({"num_channels": 4}, "4 channels"),
        ({"id2label": {"0": "a", "1": "b"}}, "The classes of digits.parquet are not the model's"),
    ],
)
def test_models_that_cannot_be_scored(vit: Any, digits: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        bench_of(image_scoring(digits), vit, **more)


@pytest.mark.parametrize(
    ("rows", "said", "message"),
    [
        ([("a", "sun"), ("b", "rain")], {}, "rows say rain, sun, and the model's config says LABEL_0, LABEL_1"),
        ([("a", 0), ("b", 5)], {}, r"d\.jsonl has 6 classes and the model has 2 outputs"),
        ([("a", 0), ("b", -1)], {}, "labels of this split are hidden"),
        ([("a", 0), ("b", None)], {}, "Row 1 of d.jsonl has no usable label: 'label' is None"),
        ([("a", 0), ("b", 0)], {}, "All 2 rows of d.jsonl have the label '0'"),
        ([("a", 0), ("b", 1)], {"split": "train[2:]"}, "is empty: there are no rows in the split"),
        ([("a", 0), ("b", 1)], {"input_columns": ("body",)}, "its columns are text, label"),
        ([("a", 0), ("b", 1)], {"label_column": "mood"}, "its columns are text, label"),
        ([("a", 0), (7.5, 1)], {}, "Cannot|where a text should be"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_scored(
    bert: Any, tmp_path: Path, rows: Any, said: dict[str, Any], message: str, home: Path
) -> None:
    """One error that names the data and says what to do; nothing half made is kept."""
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(ScoringError, match=message) as raised:
        bench_of(text_scoring(path, **said), bert)
    assert "d.jsonl" in raised.value.message
    assert raised.value.hint or "empty" in message
    assert all(not entry.stat().st_size or entry.suffix != ".partial" for entry in home.rglob("data/*"))


def test_an_unknown_metric_is_told_before_the_data_is_read(vit: Any) -> None:
    with pytest.raises(ScoringError, match="no built-in metric 'bleu'"):
        bench_of(image_scoring(Path("/nowhere.csv"), metric="bleu"), vit)


# ---- rule 9 ------------------------------------------------------------------------------------------------


def test_validation_rows_in_the_report_are_refused(vit: Any, digits: Path) -> None:
    roles = [
        ("test", image_scoring(digits, split="train[40:]")),
        ("validation", image_scoring(digits, split="train[:45]")),
    ]
    with pytest.raises(ScoringError, match=r"share 5 rows: train rows 40-44\."):
        prepare_datasets(roles, folder=vit[0], config=vit[1])


def test_reports_may_share_rows_and_the_order_is_kept(vit: Any, digits: Path) -> None:
    slices = [("test", "train[40:]"), ("validation", "train[:40]"), ("test", "train[40:60]")]
    benches = prepare_datasets(
        [(role, image_scoring(digits, split=split, name=split)) for role, split in slices],
        folder=vit[0],
        config=vit[1],
    )
    titles = [image_scoring(digits, name=name).title for name in ("train[40:]", "train[:40]", "train[40:60]")]
    assert [(bench.title, bench.n) for bench in benches] == list(zip(titles, (20, 40, 20), strict=True))


def test_validation_slices_that_meet_are_refused(bert: Any, sentences: Path) -> None:
    def benches(*splits: str) -> list[ClassificationDataset]:
        scorings = [
            ("validation", text_scoring(sentences, split=each, metric=m))
            for each, m in zip(splits, CLASS_METRICS, strict=False)
        ]
        return prepare_datasets(scorings, folder=bert[0], config=bert[1])

    with pytest.raises(ScoringError, match=r"share 2 rows: train rows 3-4, and are not the same"):
        benches("train[:5]", "train[3:]")
    with pytest.raises(ScoringError, match=r"share 8 rows: train rows 0-7, and are not the same"):
        benches("train", "train[4:]+train[:4]")
    assert [bench.n for bench in benches("train[:5]", "train[:5]", "train[5:]")] == [5, 5, 3]


def test_the_same_file_under_two_names_overlaps(bert: Any, sentences: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(sentences.read_bytes())
    with pytest.raises(ScoringError, match="share 8 rows: train rows 0-7"):
        prepare_datasets(
            [("validation", text_scoring(copy)), ("test", text_scoring(sentences))], folder=bert[0], config=bert[1]
        )


def test_equal_rows_elsewhere_are_dropped_from_validation(bert: Any, sentences: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [("joy", 1), ("a new one", 0), ("grey", 0), ("grey day", 1)])
    score, report = prepare_datasets(
        [("validation", text_scoring(other)), ("test", text_scoring(sentences))], folder=bert[0], config=bert[1]
    )
    assert (score.n, report.n) == (2, 8)
    assert "2 of 4 rows equal a test row in content and were dropped" in score.notes
    assert score.references.tolist() == [0, 1]
    logits = score.outputs(
        build_model(config_of(bert[0]), load_file(bert[0] / "model.safetensors"), "text-classification", torch.float32)
    )
    assert logits.shape == (2, 2)
    some = write_rows(tmp_path / "some.jsonl", SENTENCES[:3])
    with pytest.raises(ScoringError, match=r"Every row of the validation data 'some\.jsonl' is in the test data too"):
        prepare_datasets(
            [("validation", text_scoring(some)), ("test", text_scoring(sentences))], folder=bert[0], config=bert[1]
        )


def test_equal_images_are_found_by_their_pixels(vit: Any, digits: Path, tmp_path: Path) -> None:
    """The report's PNGs as nested lists: other bytes, the same picture."""
    rows = {"image": PIXELS[58:64].tolist(), "label": DIGITS.target[58:64].tolist()}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    score, _ = prepare_datasets(
        [("validation", image_scoring(tmp_path / "d.parquet")), ("test", image_scoring(digits))],
        folder=vit[0],
        config=vit[1],
    )
    assert score.n == 4


# ---- what is refused about answers ---------------------------------------------------------------------------


def test_logits_that_are_no_numbers(vit: Any, digits: Path) -> None:
    bench, model = bench_of(image_scoring(digits), vit), vit_model(vit)
    with torch.no_grad():
        model.classifier.bias[3] = float("nan")
    with pytest.raises(ScoringError, match=r"output for row 0 of 'digits.parquet' is \[.*nan"):
        bench.outputs(model)
    other = ViTForImageClassification(ViTConfig(**{**vit[1], "id2label": dict(enumerate(NAMES[:9]))}))
    with pytest.raises(ScoringError, match="has 9 outputs, and the config names 10 of them"):
        bench.outputs(other)


def test_a_model_that_reads_other_images(vit: Any, digits: Path, tmp_path: Path) -> None:
    other = ViTForImageClassification(ViTConfig(**{**vit[1], "image_size": 16}))
    with pytest.raises(ScoringError, match=r"fails on 'digits.parquet' \(.*\(\d+, 1, 8, 8\)"):
        bench_of(image_scoring(digits), vit).outputs(other)


def test_a_permuted_ingredient_is_refused_with_its_permutation(vit: Any, digits: Path) -> None:
    bench = bench_of(image_scoring(digits), vit)
    answers = (bench.references + 1) % 10
    doubt = bench.doubt_of_order("acme/a", one_hot(bench, answers))
    assert doubt is not None
    message, hint = doubt.message, doubt.hint
    assert "acme/a answers 0.0% of the 60 rows of 'digits.parquet' correctly" in message
    assert "With its outputs in another order it would get 100.0%" in message
    assert "'zero' is answered as 'one'" in message
    assert "`labels: [one, two, three, four, five, six, seven, eight, nine, zero]`" in hint
    # Doing what the hint says makes the same answers right.
    said = tuple(hint.split("[")[1].split("]")[0].split(", "))
    again = bench_of(image_scoring(digits, labels=said), vit)
    assert again.doubt_of_order("acme/a", one_hot(again, answers)) is None
    assert again.score(one_hot(again, answers)).value == 1.0


def test_ingredients_that_are_merely_poor_are_not_refused(vit: Any, digits: Path, bert: Any, tmp_path: Path) -> None:
    bench = bench_of(image_scoring(digits), vit)
    for answers in (bench.references, np.zeros(60, dtype=int), np.random.default_rng(0).integers(0, 10, 60)):
        assert bench.doubt_of_order("acme/a", one_hot(bench, answers)) is None
    # Collapsed into the rare class: far below the majority, and no order of the labels would help.
    path = write_rows(tmp_path / "d.jsonl", [(f"row {i}", int(i < 5)) for i in range(100)])
    skewed = bench_of(text_scoring(path), bert)
    assert skewed.doubt_of_order("acme/a", one_hot(skewed, np.ones(100, dtype=int))) is None
    doubt = skewed.doubt_of_order("acme/a", one_hot(skewed, 1 - skewed.references))
    assert "answers 0.0% of the 100 rows of 'd.jsonl' correctly; always answering" in str(doubt)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_chance_is_what_answers_in_random_order_give(bert: Any, tmp_path: Path, classes: int) -> None:
    """Expected accuracy and p against 4,000 permutations."""
    draw = np.random.default_rng(classes)
    path = write_rows(
        tmp_path / "d.jsonl", [(f"row {i}", int(label)) for i, label in enumerate(draw.permutation(150) % classes)]
    )
    bench = bench_of(text_scoring(path), bert, id2label={str(i): f"LABEL_{i}" for i in range(classes)})
    answers = np.where(draw.random(150) < 0.1, bench.references, draw.integers(0, classes, 150))
    accuracy, expected, p = bench.better_than_chance(one_hot(bench, answers))
    shuffled = [np.mean(draw.permutation(answers) == bench.references) for _ in range(4000)]
    assert accuracy == np.mean(answers == bench.references)
    assert expected == pytest.approx(np.mean(shuffled), abs=0.003)
    assert p == pytest.approx(np.mean(np.array(shuffled) >= accuracy - 1e-9), abs=0.03)
    assert bench.better_than_chance(one_hot(bench, bench.references))[2] < 1e-9
    share = np.mean(bench.references == 0)
    assert bench.better_than_chance(one_hot(bench, np.zeros(150, dtype=int))) == pytest.approx((share, share, 1.0))


def test_compare_is_paired(vit: Any, digits: Path) -> None:
    bench = bench_of(image_scoring(digits), vit)
    right = bench.references
    good, poor = right.copy(), right.copy()
    good[0], poor[1:11] = (right[0] + 1) % 10, (right[1:11] + 1) % 10
    found = bench.compare(one_hot(bench, good), one_hot(bench, poor))
    assert (found.difference, found.n) == (pytest.approx(9 / 60), 60)
    assert found.p == 2 * 12 / 2**11
    assert found.sentence.startswith("better by 15.0 points")
    assert bench.compare(one_hot(bench, poor), one_hot(bench, good)).sentence.startswith("worse by 15.0 points")
    same = bench.compare(one_hot(bench, good), one_hot(bench, good))
    assert (same.p, same.sentence) == (1.0, "no difference can be seen with n = 60")


def test_compare_on_other_metrics_uses_the_metric(vit: Any, digits: Path) -> None:
    bench = bench_of(image_scoring(digits, metric="f1_macro"), vit)
    poor = np.where(np.arange(60) < 15, 0, bench.references)
    found = bench.compare(one_hot(bench, bench.references), one_hot(bench, poor))
    assert found.difference == pytest.approx(1 - bench.score(one_hot(bench, poor)).value)
    assert found.low < found.difference < found.high
    assert found.significant


def test_ensemble_averages_probabilities() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    expected = torch.stack([torch.tensor(x).softmax(1) for x in (first, second)]).mean(0).log()
    np.testing.assert_allclose(ensemble([first, second]), expected, atol=1e-6)
    np.testing.assert_allclose(ensemble([np.array([[0.0, 2000.0]])] * 2), [[-2000.0, 0.0]])


# ---- build_model ---------------------------------------------------------------------------------------------


def test_disk_names_make_the_model_that_the_folder_makes(vit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(vit[0] / "model.safetensors")
    model = build_model(config_of(vit[0]), tensors, "image-classification", torch.float32)
    whole = ViTForImageClassification.from_pretrained(vit[0])
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
    narrow = build_model(config_of(vit[0]), tensors, "image-classification", torch.bfloat16)
    assert next(narrow.parameters()).dtype == torch.bfloat16
    capsys.readouterr()
    build_model(config_of(vit[0]), tensors, "image-classification", torch.float32)
    assert capsys.readouterr() == ("", "")


def test_tensors_that_do_not_fit_are_all_named(vit: Any) -> None:
    tensors = load_file(vit[0] / "model.safetensors")
    del tensors["classifier.bias"]
    tensors["classifier.weight"] = torch.zeros(3, 16)
    tensors["extra"] = torch.zeros(1)
    with pytest.raises(ScoringError) as raised:
        build_model(config_of(vit[0]), tensors, "image-classification", torch.float32)
    assert "missing     classifier.bias" in raised.value.message
    assert "left over   extra" in raised.value.message
    assert "other shape classifier.weight: (3, 16), the config says (10, 16)" in raised.value.message


def test_old_berts_load_without_a_missing_key(bert: Any) -> None:
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(bert[0] / "model.safetensors").items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(12)[None]
    model = build_model(config_of(bert[0]), tensors, "text-classification", torch.float32)
    norm = tensors["bert.embeddings.LayerNorm.gamma"]
    assert torch.equal(model.state_dict()["bert.embeddings.LayerNorm.weight"], norm)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    save(transformers.BartForSequenceClassification(config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.decoder.embed_tokens.weight" not in tensors
    model = build_model(config_of(tmp_path), tensors, "text-classification", torch.float32)
    state = model.state_dict()
    assert torch.equal(state["model.decoder.embed_tokens.weight"], state["model.shared.weight"])


def test_an_ancestor_and_a_model_of_another_task(vit: Any, tmp_path: Path) -> None:
    save(transformers.ViTModel(ViTConfig(**{**vit[1], "architectures": None}), add_pooling_layer=False), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with pytest.raises(ScoringError, match=r"do not make a ViTForImageClassification:\n  missing     classifier"):
        build_model(config_of(tmp_path), tensors, "image-classification", torch.float32)
    with pytest.raises(ScoringError, match="type 'vit' has no ForSequenceClassification"):
        build_model(config_of(tmp_path), tensors, "text-classification", torch.float32)


def test_configs_that_cannot_be_read() -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    for config in ({"model_type": "vit", "hidden_size": "x"}, {}, own):
        with pytest.raises(ScoringError, match="Cannot read the model's config"):
            build_model(config, {}, "image-classification", torch.float32)
