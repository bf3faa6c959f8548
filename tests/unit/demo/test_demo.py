"""The demo: the repos of its zoo, and the story that is told with them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from hf_soup.demo import DigitsZoo, LanguageZoo, Shell, child_environment, run_demo
from hf_soup.demo.digits_data import DIGITS, LETTERS, make_dataset, splits_of
from hf_soup.demo.zoo import OWNER
from hf_soup.errors import SoupError
from hf_soup.recipe import Recipe

TINY = DigitsZoo(letters=256, letter_epochs=1, good=2, epochs=(1, 2))
ANCESTOR, DATASET, POOR = DigitsZoo.ancestor, DigitsZoo.dataset, DigitsZoo.poor
RECIPE = Path(__file__).parents[3] / "recipes" / "demo-digits.yaml"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    TINY.make(folder, lambda text: None)
    return folder


def card_of(folder):
    front, text = (folder / "README.md").read_text(encoding="utf-8").removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(front), text


def test_every_model_is_a_complete_repo_with_an_honest_card(zoo):
    """Config, weights, processor, card; the card names ancestor and data, and the poor model says that it is."""
    assert TINY.fine_tunes == ("vit-digits-1", "vit-digits-2", POOR)
    for name in (ANCESTOR, *TINY.fine_tunes):
        assert {path.name for path in (zoo / name).iterdir()} == {
            "README.md",
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
        }
        front, text = card_of(zoo / name)
        assert front["license"] == "apache-2.0"
        assert front["pipeline_tag"] == "image-classification"
        assert ("learning rate is about ten times too high" in text) == (name == POOR)
        assert "{" not in text
        if name != ANCESTOR:
            assert front["base_model"] == f"{OWNER}/{ANCESTOR}"
            assert front["base_model_relation"] == "finetune"
            assert front["datasets"] == [f"{OWNER}/{DATASET}"]
            assert "learning rate: " in text


@pytest.mark.parametrize(("name", "labels"), [(ANCESTOR, LETTERS), ("vit-digits-1", DIGITS), (POOR, DIGITS)])
def test_a_model_loads_as_anybody_would_load_it(zoo, name, labels):
    """The processor makes one channel of the pictures that the data set stores, and the model knows its labels."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(zoo / name)
    processor = AutoImageProcessor.from_pretrained(zoo / name)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: index for index, label in enumerate(labels)}
    pixels = processor([Image.new("L", (8, 8), 255)] * 3, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((3, 1, 8, 8), (1 - 0.3) / 0.35))
    assert model(pixels).logits.shape == (3, len(labels))


def test_training_and_scoring_see_the_same_pictures(zoo):
    """What the model was trained on is what the stored PNGs decode to."""
    from transformers import AutoImageProcessor

    images, labels = splits_of(0)["shifted"]
    table = pq.read_table(zoo / DATASET / "data" / "shifted-00000-of-00001.parquet")
    stored = [Image.open(io.BytesIO(row["bytes"])) for row in table["image"].to_pylist()]
    assert {(picture.mode, picture.size) for picture in stored} == {("L", (8, 8))}
    pixels = AutoImageProcessor.from_pretrained(zoo / POOR)(stored, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, (images - 0.3) / 0.35)
    assert table["label"].to_pylist() == labels.tolist()


def test_the_data_set_loads_by_its_card(zoo, tmp_path):
    """`datasets` finds the splits, decodes pictures and names classes."""
    import datasets

    loaded = datasets.load_dataset(str(zoo / DATASET), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {
        "train": 200,
        "validation": 450,
        "test": 1147,
        "shifted": 1147,
    }
    assert loaded["train"].features["label"].names == list(DIGITS)
    assert loaded["train"][0]["image"].size == (8, 8)
    front, text = card_of(zoo / DATASET)
    assert front["license"] == "cc-by-4.0"
    assert "The same 13 people" in text
    assert "{" not in text


def test_no_picture_is_in_two_splits():
    """Neither the same row nor an equal picture, shifted ones included."""
    rows = [bytes(row) for images, _ in splits_of(0).values() for row in (images * 255).byte().flatten(1).tolist()]
    assert len(set(rows)) == len(rows) == 1797 + 1147


def test_equal_seeds_give_equal_bytes_and_progress_names_each_model(zoo, tmp_path):
    """Data and models are a function of the settings: made again, every file is the same."""
    lines = []
    TINY.make(tmp_path, lines.append)
    # One before each training, so that a minute of work is not a minute of silence.
    assert len(lines) == 4
    assert all(name in line for name, line in zip((ANCESTOR, *TINY.fine_tunes), lines, strict=True))
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        assert path.read_bytes() == (zoo / path.relative_to(tmp_path)).read_bytes(), path.name
    make_dataset(tmp_path / "other", seed=1)
    split = Path("data") / "train-00000-of-00001.parquet"
    assert (tmp_path / "other" / split).read_bytes() != (tmp_path / DATASET / split).read_bytes()


def test_the_recipe_names_what_the_zoo_holds():
    """All nine, the ancestor, validation data that is neither training nor test data, and the shifted test first."""
    recipe = Recipe.load(RECIPE)
    assert recipe == DigitsZoo().recipe()
    assert recipe.base_model == f"{OWNER}/{ANCESTOR}"
    assert [i.model for i in recipe.ingredients] == [f"{OWNER}/{name}" for name in DigitsZoo().fine_tunes]
    assert recipe.select.name == "greedy"
    (score,) = recipe.validation
    assert score.split == "validation"
    assert [scoring.split for scoring in recipe.test] == ["shifted", "test"]
    assert {scoring.dataset for scoring in (score, *recipe.test)} == {f"{OWNER}/{DATASET}"}


def test_the_demos_processes_know_nothing_of_the_users_account(tmp_path):
    """Token, caches, offline mode and proxies of the user are gone, under whatever name they were set."""
    ours = {
        "PATH": "/bin",
        "HF_TOKEN": "hf_real",
        "HF_TOKEN_PATH": "/token",
        "HUGGING_FACE_HUB_TOKEN": "hf_real",
        "HF_HUB_CACHE": "/cache",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "https_proxy": "http://proxy",
        "ALL_PROXY": "http://proxy",
        "NO_PROXY": "example.org",
    }
    assert child_environment(ours, tmp_path, "http://127.0.0.1:1", "hf_made") == {
        "PATH": "/bin",
        "PYTHONUTF8": "1",
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HOME": str(tmp_path.resolve()),
        "HF_TOKEN": "hf_made",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def test_a_command_that_fails_stops_the_demo(tmp_path):
    """The error names the command and its exit code; what the command itself said stands above it on stderr."""
    shell = Shell({})
    with pytest.raises(SoupError, match=r"`hf-soup cook` ended with exit code 3\.\nrefused"):
        shell.run("hf-soup cook", "-c", "print('refused'); raise SystemExit(3)")
    with pytest.raises(SoupError, match=r"`hf upload` ended with exit code 1\.\nno space"):
        shell.run("hf upload", "-c", "raise SystemExit('no space')", stderr=subprocess.STDOUT)
    assert shell.run("python", "-c", "import sys; print(sys.executable)").strip() == sys.executable


def cooked(zoo):
    """What `hf-soup cook --json` prints, as far as the demo reads it."""
    models, recipe = [f"{OWNER}/{name}" for name in zoo.fine_tunes], zoo.recipe()
    titles = [scoring.title for scoring in (*recipe.validation, *recipe.test)]

    def figures(*values):
        ranges = ({"value": value, "low": value - 0.02, "high": value + 0.02} for value in values)
        return {title: {"n": 1147, "share": True, **each} for title, each in zip(titles, ranges, strict=False)}

    scores = {model: figures(0.9 - 0.1 * place, 0.5, 0.8 + 0.01 * place) for place, model in enumerate(models)}
    return json.dumps(
        {
            "scores": {"soup": figures(0.91, 0.6, 0.85), **scores, "ensemble": figures(0.92, 0.61, 0.86)},
            "comparisons": dict.fromkeys(titles, "no difference can be seen with n = 1,147"),
            "best": dict.fromkeys(titles, models[0]),
            "selected": models[:2],
        }
    )


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Tells the story, with a zoo that is there and commands that answer at once; gives what was said and run."""
    ran, zoos = [], []

    def make(zoo, folder, progress):
        for name in (zoo.dataset, zoo.ancestor):
            (folder / name).mkdir(parents=True)

    def run(shell, name, *arguments, stderr=None):
        ran.append(name)
        return cooked(zoos[-1]) if name.startswith("hf-soup cook") else f"did {name.split()[1:2]}\n"

    monkeypatch.setattr(Shell, "run", run)
    for kind in (DigitsZoo, LanguageZoo):
        monkeypatch.setattr(kind, "make", make)
    monkeypatch.chdir(tmp_path)

    def tell(zoo=TINY):
        ran.clear()
        zoos.append(zoo)
        run_demo(Path("demo"), zoo, progress=lambda text: None)
        return capsys.readouterr().out, list(ran)

    return tell


def test_the_story_shows_every_command_and_ends_in_a_table(told):
    """What ran is what was shown; the table has every ingredient and four ways to use them; no win is claimed."""
    text, ran = told()
    assert [name.split()[1] for name in ran if name.startswith("hf-soup")] == ["check", "cook", "cook", "cook", "push"]
    assert [line[2:] for line in text.splitlines() if line.startswith("$ hf-soup")] == [
        name for name in ran if name.startswith("hf-soup")
    ]
    head = text.index("in %, with 95 % intervals")
    assert [line.split("   ")[0] for line in text[head:].splitlines()[1:8]] == [
        "vit-digits-1 *",
        "vit-digits-2",
        POOR,
        "uniform soup of all 3",
        f"uniform soup without {POOR}",
        "greedy soup of 2",
        "probability ensemble",
    ]
    row = next(line for line in text.splitlines() if line.startswith("greedy soup"))
    assert row.split("   ")[0] == "greedy soup of 2"
    assert "   60.0 (58.0 to 62.0)   " in row
    assert row.endswith("   85.0 (83.0 to 87.0)")
    assert text.index("shifted test accuracy (n = 1,147)") < text.index("  test accuracy (n = 1,147)")
    assert "test accuracy: no difference can be seen with n = 1,147" in text.splitlines()
    assert [i.model for i in Recipe.load(Path("demo/1/without-the-poor-one.yaml")).ingredients] == [
        f"{OWNER}/vit-digits-1",
        f"{OWNER}/vit-digits-2",
    ]
    assert text.rstrip().endswith("hf-soup cook recipe.yaml -o soup")


def test_a_second_demo_overwrites_nothing(told):
    """It goes on in the next folder, and pushes to the next name."""
    _, first = told()
    _, second = told()
    assert f"hf-soup push demo/1/soup {OWNER}/vit-digits-soup" in first
    assert f"hf-soup push demo/2/soup {OWNER}/vit-digits-soup-2" in second


def test_a_second_demo_in_its_folder_trains_and_uploads_nothing(told):
    """What the first one made is used."""
    _, first = told()
    uploads = [name for name in first if name.startswith("hf upload")]
    assert [name.split()[2] for name in uploads] == [f"{OWNER}/{DATASET}", f"{OWNER}/{ANCESTOR}"]
    assert [name.split()[-1] for name in uploads] == ["dataset", "model"]
    _, second = told()
    assert not [name for name in second if name.startswith("hf upload")]
    assert {path.name for path in Path("demo").iterdir()} == {"1", "2", "hub", "models"}
    assert [path.name for path in Path("demo/models").iterdir()] == [DATASET]


def test_both_demos_may_have_one_folder(told):
    """Each makes and uploads its own models once, and no run or soup takes the place of another."""
    _, first = told(), told(LanguageZoo(good=1))[1]
    uploads = [name.split()[2] for name in first if name.startswith("hf upload")]
    assert uploads == [f"{OWNER}/{LanguageZoo.ancestor}", f"{OWNER}/{LanguageZoo.dataset}"]
    for zoo, number in ((TINY, 3), (LanguageZoo(good=1), 4)):
        text, ran = told(zoo)
        assert not [name for name in ran if name.startswith("hf upload")]
        assert f"hf-soup push demo/{number}/soup {OWNER}/{zoo.family}-soup-{number}" in text
    assert {path.name for path in Path("demo").iterdir()} == {"1", "2", "3", "4", "hub", "models"}
    assert {path.name for path in Path("demo/models").iterdir()} == {DATASET, LanguageZoo.dataset}


def test_a_demo_that_was_stopped_leaves_no_models(told, monkeypatch):
    """Ctrl-C while they are uploaded: the next demo makes them again."""
    run = Shell.run

    def stopped(shell, name, *arguments, stderr=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Shell, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        told()
    assert not list(Path("demo/models").iterdir())
    monkeypatch.setattr(Shell, "run", run)
    _, ran = told()
    assert [name for name in ran if name.startswith("hf upload")]


@pytest.mark.parametrize(("make", "message"), [("file", "is a file"), ("folder", "holds something else")])
def test_a_place_that_holds_something_else_is_left_alone(told, make, message):
    """Neither a file nor somebody's folder becomes a demo."""
    if make == "file":
        Path("demo").write_text("mine")
    else:
        Path("demo").mkdir()
        Path("demo/thesis.tex").write_text("mine")
    with pytest.raises(SoupError, match=message):
        told()
    assert not Path("demo/hub").exists()
