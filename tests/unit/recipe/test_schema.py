"""Recipes: what is read, what is written back, and what is said about one that makes no sense."""

from __future__ import annotations

import os
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from hf_soup._util import yaml as plain_yaml
from hf_soup._util.yaml import parse_yaml
from hf_soup.errors import RecipeError, SoupError
from hf_soup.recipe import MAX_BYTES, Ingredient, Recipe, Scoring, as_recipe, parse_part, split_revision

FULL = """\
base_model: acme/base@v1
ingredients:
- acme/a
- model: acme/b
  revision: refs/pr/3
  weight: 0.5
method:
  name: linear
select:
  name: greedy
  accept: '>'
validation:
  task: text-classification
  dataset: acme/rows
  split: validation
  labels:
  - bad
  - good
test:
- task: text-classification
  dataset: acme/rows
  split: test
dtype: bfloat16
seed: 7
allow_pickle: true
"""


def test_a_recipe_comes_back_as_it_was_written() -> None:
    recipe = Recipe.parse(FULL)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.to_yaml() == FULL.replace("method:\n  name: linear\n", "")
    assert recipe.select.parameters == {"accept": ">"}
    (score,) = recipe.validation
    assert score.title == "acme/rows validation accuracy"


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe(ingredients=["acme/a", "acme/b"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1
    assert hash(recipe.ingredients) == hash(Recipe.parse("ingredients: [acme/a, acme/b]").ingredients)
    assert as_recipe(recipe) is recipe
    assert as_recipe(["acme/a", "acme/b"]) == recipe


@pytest.mark.parametrize(
    ("given", "model", "revision"),
    [
        ("acme/a", "acme/a", None),
        ("acme/a@v2", "acme/a", "v2"),
        ("acme/a@refs/pr/3", "acme/a", "refs/pr/3"),
        ("https://huggingface.co/acme/a", "acme/a", None),
        ("https://huggingface.co/acme/a/", "acme/a", None),
        ("https://huggingface.co/acme/a/tree/feature%2Fx", "acme/a", "feature/x"),
        ("https://huggingface.co/acme/a/tree/refs%2Fpr%2F3", "acme/a", "refs/pr/3"),
        ("https://huggingface.co/acme/a/blob/main", "acme/a", "main"),
        ("https://hf.co/acme/a?library=transformers", "acme/a", None),
        ("./folder", "./folder", None),
    ],
)
def test_a_model_is_named_in_many_ways(given: str, model: str, revision: str | None) -> None:
    ingredient = Ingredient.model_validate(given)
    assert (ingredient.model, ingredient.revision) == (model, revision)


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert split_revision(str(folder)) == (str(folder), False, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this is empty"),
        ("- acme/a", "this is list"),
        ("just words", "this is str"),
        ("1: 2", "its key 1 is no text"),
        ("{", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("base_model: &x acme/a\ningredients: [*x]", "a recipe has no aliases"),
        ("ingredients: [acme/a]\ningredients: [acme/b]", "the key 'ingredients' stands there twice"),
        ("{" * 3000, "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("? [a, b]\n: c", "not valid YAML"),
        ("seed: 1", "ingredients: Field required"),
        ("ingredients: []", "ingredients: "),
        ("ingredients: acme/a", "ingredients: "),
        ("ingredients: [acme/a]\nmetod: linear", "metod: unknown key (did you mean `method`?); known here: allow, "),
        ("ingredients: [{model: acme/a, wieght: 1}]", "wieght: unknown key (did you mean `weight`?); known here: "),
        ("ingredients: [{weight: 1}]", "ingredients.0.model: Field required"),
        ("ingredients: [3]", "ingredients.0"),
        ("ingredients: ['']", "ingredients.0.model"),
        ("ingredients: [{model: acme/a@x, revision: y}]", "two revisions: 'x' and 'y'"),
        ("ingredients: [{model: acme/a, weight: .nan}]", "finite number, not nan"),
        ("ingredients: [{model: acme/a, weight: .inf}]", "finite number, not inf"),
        ("ingredients: [{model: acme/a, weight: much}]", '(it is "much")'),
        ("ingredients: [{model: acme/a, weight: 0}, {model: acme/b, weight: 0}]", "the weights (0, 0) sum to 0"),
        ("ingredients: [{model: acme/a, weight: 1e308}, {model: acme/b, weight: 1e308}]", "sum to inf"),
        ("ingredients: [acme/a]\ndtype: int8", "'bfloat16', 'float16', 'float32' or 'float64' (it is \"int8\")"),
        ("ingredients: [acme/a]\nseed: -1", "seed: "),
        ("ingredients: [acme/a]\nseed: 99999999999999999999", "seed: "),
        ("ingredients: [acme/a]\nmethod: 3", "method: "),
        ("ingredients: [acme/a]\nmethod: {density: 1}", "method.name: Field required"),
        ("ingredients: [acme/a]\nvalidation: {task: chat, dataset: x}", "validation.task: "),
        ("ingredients: [acme/a]\nvalidation: {task: text-classification}", "validation.dataset: Field required"),
        ("ingredients: [acme/a]\nvalidation: {task: text-classification, dataset: x, batch: 3}", "batch: unknown key"),
        ("ingredients: [acme/a]\ntensor_weights: {a: [1, 2]}", "gives 'a' the weights (1, 2); it takes a finite one"),
        ("ingredients: [acme/a]\ntensor_weights: {a: [.inf]}", "gives 'a' the weights (inf)"),
        ("ingredients: [acme/a]\nvalidation: {task: text-classification, dataset: x, weight: 0}", "weight: "),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said(text: str, said: str) -> None:
    """With the place, the value and what is allowed, and under the name of the file."""
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text, "my.yaml")
    assert said in str(raised.value)
    assert "my.yaml" in str(raised.value)
    assert len(str(raised.value)) < 1500


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        Recipe.parse("ingredients: [acme/a]\nseed: x\ndtype: y\nfoo: 1")
    found = [line.split(":")[0] for line in str(raised.value).splitlines()[1:]]
    assert found == ["  line 3, dtype", "  line 2, seed", "  line 4, foo"]


def test_an_alias_bomb_costs_nothing() -> None:
    """Nine levels of nine references each would be 387 million strings."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(RecipeError, match="no aliases"):
        Recipe.parse("\n".join(lines))


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    for name, content, said in [
        ("binary.yaml", b"\xff\xfe\x00\x01", "binary.yaml': "),
        ("large.yaml", b"#" * (MAX_BYTES + 1), f"has {MAX_BYTES + 1:,} bytes; a recipe has at most {MAX_BYTES:,}"),
        ("empty.yaml", b"", "this is empty"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError) as raised:
            Recipe.load(tmp_path / name)
        assert said in str(raised.value)
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.load(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize("key", ["1", "null", "true", "1.5", "2001-01-01", "1" * 300])
def test_a_key_that_is_no_text(key: str) -> None:
    with pytest.raises(RecipeError, match=r"its key .{1,110} is no text\.\nKeys of a recipe are words") as raised:
        Recipe.parse(f"{key}: x\ningredients: [acme/a, acme/b]")
    assert "dict" not in str(raised.value)


@pytest.mark.parametrize("name", ["pipe.yaml", "device.yaml", "zero\0.yaml"])
def test_a_path_of_no_file(tmp_path: Path, name: str) -> None:
    """Nobody waits for what is never written, nor reads what never ends."""
    path = tmp_path / name
    if name == "pipe.yaml":
        os.mkfifo(path)
    elif name == "device.yaml":
        path.symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match=r"Cannot read the recipe '.*': (it is a pipe or a device|embedded null)"):
        Recipe.load(path)


def test_the_short_forms_are_written_from_python() -> None:
    recipe = Recipe(ingredients=["acme/a", {"model": "acme/b", "weight": 2}], select="greedy")
    assert recipe.ingredients[1] == Ingredient(model="acme/b", weight=2.0)
    assert recipe.select.name == "greedy"
    with pytest.raises(RecipeError, match="unknown key"):
        Recipe(ingredients=["acme/a"], wieght=1)


def test_data_is_called_by_its_last_name(tmp_path: Path) -> None:
    """The folder it lies in is nobody's business."""
    path = tmp_path / "rows.csv"
    path.touch()
    assert Scoring(task="text-classification", dataset=str(path)).title == "rows.csv accuracy"
    assert Scoring(task="text-classification", dataset=str(path), name="mine", metric="f1").title == "mine f1"


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=5), inner),
    max_leaves=8,
)
_keys = st.sampled_from([*Recipe.model_fields, *Scoring.model_fields, *Ingredient.model_fields])


_few = st.dictionaries(_keys, _plain, max_size=4)


@given(st.dictionaries(_keys, _plain | _few | st.lists(_few, max_size=2), max_size=6))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_whatever_a_mapping_holds_it_is_a_recipe_or_an_error(values: dict[str, Any]) -> None:
    with suppress(SoupError):
        recipe = Recipe.parse(yaml.safe_dump(values))
        assert Recipe.parse(recipe.to_yaml()) == recipe


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_whatever_text_it_is_it_is_a_recipe_or_an_error(text: str) -> None:
    with suppress(SoupError):
        Recipe.parse(text)


def test_yaml_is_data_only() -> None:
    assert parse_yaml("a: [1, 2.5, x, null, 2020-01-01]")["a"][:4] == [1, 2.5, "x", None]


def test_labels_that_no_output_could_have() -> None:
    with pytest.raises(RecipeError, match="`labels` has 'a' twice"):
        Recipe(ingredients=["acme/a", "acme/b"], labels=["a", "A ", "b"])
    with pytest.raises(RecipeError, match="no outputs that `labels` could name"):
        Recipe(ingredients=["acme/a", "acme/b"], labels=["a", "b"], heads="body")


def test_data_may_be_one_or_several() -> None:
    """And is written as it is read: one as a mapping, several as a list."""
    data = {"task": "text-classification", "dataset": "acme/rows"}
    one = Recipe(ingredients=["acme/a"], validation=data, test=data)
    assert one.validation == one.test
    assert one.to_dict()["validation"] == data
    two = Recipe(ingredients=["acme/a"], validation=[data, {**data, "metric": "f1", "weight": 2}])
    assert [scoring.weight for scoring in two.validation] == [1.0, 2.0]
    assert Recipe.parse(two.to_yaml()) == two
    assert Recipe(ingredients=["acme/a"], validation=None).validation == ()


def test_shares_of_tensors_are_one_line_each() -> None:
    recipe = Recipe(ingredients=["acme/a", "acme/b"], tensor_weights={"head.*": (0.25, 0.75)})
    assert "  head.*: [0.25, 0.75]\n" in recipe.to_yaml()
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_a_fault_is_told_with_its_line_and_the_nearest_name() -> None:
    """And the keys that there are once, however many are unknown."""
    text = """\
ingredients:
- acme/a
- model: acme/b
  wieght: 2

slect: greedy
validation: {task: text-classification, dataset: acme/d, splt: test}
test:
- task: text-clasification
  dataset: acme/d
base: acme/c
seed: -1
allow: [drift]
"""
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text, "recipe.yaml")
    title, *lines = str(raised.value).splitlines()
    assert title == "Cannot read recipe.yaml:"
    expected = [
        ("line 4, ingredients.1.wieght: unknown key (did you mean `weight`?); known here: base, model,", "weight"),
        ("line 7, validation.splt: unknown key (did you mean `split`?); known here: assistant_only,", "weight"),
        ("line 9, test.0.task: 'text-clasification' is no task (did you mean `text-classification`?)", "lm-eval"),
        ("line 13, allow: 'drift' is no finding that can be accepted (did you mean `drifted`?); those", "unrelated"),
        ("line 12, seed: Input should be greater than or equal to 0", "(it is -1)"),
        ("line 6, slect: unknown key (did you mean `select`?); known here: allow, allow_pickle,", "vocabulary"),
        ("line 11, base: unknown key (did you mean `base_model`?)", "`base_model`?)"),
    ]
    assert len(lines) == len(expected), lines
    for start, end in expected:
        assert any(line.startswith(f"  {start}") and line.endswith(end) for line in lines), (start, lines)


def test_a_file_of_mergekit_is_told_as_that() -> None:
    text = "models:\n- model: acme/a\n  parameters: {weight: 1.0}\nmerge_method: ties\nbase_model: acme/base\n"
    with pytest.raises(RecipeError, match="it is a file of mergekit") as raised:
        Recipe.parse(text, "merge.yaml")
    assert "`models` are `ingredients`" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("2E3", 2000.0),
        ("-.5e1", -5.0),
        ("1.5e3", 1500.0),
        ("1e", "1e"),
        ("a1e5", "a1e5"),
        ("'1e5'", "1e5"),
    ],
)
def test_a_number_is_a_number_without_point_and_sign(text: str, value: object) -> None:
    """As people write it; by YAML 1.1 it would be a text."""
    assert parse_yaml(text) == value


def test_a_recipe_keeps_no_password_and_no_token() -> None:
    """It is written down and published."""
    address = "https://me:hf_secret@huggingface.co/acme"
    data = {"task": "text-classification", "dataset": "https://me:secret@example.org/rows.csv"}
    recipe = Recipe(
        ingredients=[f"{address}/a/tree/v2", "acme/b@hf_secret"], base_model=f"{address}/c", validation=data
    )
    assert [str(each) for each in recipe.ingredients] == ["acme/a@v2", "acme/b@hf_…"]
    assert recipe.base_model == "https://huggingface.co/acme/c"
    assert recipe.validation[0].dataset == "https://example.org/rows.csv"
    assert "secret" not in recipe.to_yaml()


def test_a_fault_shows_no_part_of_a_token() -> None:
    """Not that which is left where a long value is cut."""
    with pytest.raises(RecipeError) as raised:
        Recipe(ingredients=["acme/a"], seed=50 * "x" + "https://me:hf_" + 34 * "a" + "@huggingface.co")
    assert "seed" in str(raised.value)
    assert "hf_a" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("self: 1", "self: unknown key (did you mean `select`?); known here: allow, allow_pickle, base"),
        ("seed: 1" + 200_000 * ":1", "seed: Input should be a valid integer"),
        ("seed: !!float 1" + 200_000 * ":1", "seed: Input should be a valid integer"),
        (f"seed: 0x{5000 * 'f'}", "a number has 5,002 digits"),
        (f"method: {{name: linear, x: {5000 * '9'}}}", "a number has 5,000 digits"),
        (f"base_model: {1025 * 'a'}", "base_model: String should have at most 1024 characters"),
    ],
    ids=lambda text: text[:10],
)
def test_a_value_that_is_none_is_a_fault(text: str, said: str) -> None:
    """And costs no more time than its length: numbers in base 60 would take minutes."""
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(f"ingredients: [acme/a]\n{text}")
    assert said in str(raised.value)


def test_a_number_that_cannot_be_written_down_is_a_fault() -> None:
    with pytest.raises(RecipeError, match="seed: Input should be less than"):
        Recipe(ingredients=["acme/a"], seed=10**5000)
    with pytest.raises(RecipeError, match="self: unknown key"):
        Recipe(ingredients=["acme/a"], **{"self": 1})


def test_base_60_is_a_text() -> None:
    assert Recipe.parse("ingredients: [acme/a]\nlabels: [1:30, 2:0.5, '3']").labels == ("1:30", "2:0.5", "3")


@pytest.mark.parametrize("kind", [Ingredient, Scoring])
def test_a_part_by_itself_is_a_part_or_an_error(kind: type[Ingredient | Scoring]) -> None:
    with pytest.raises(RecipeError, match="Cannot read it:\n  "):
        parse_part(kind, {"model": 1100 * "a", "dataset": "x", "task": "guess"}, "it")


def test_labels_without_number_are_compared_once_each() -> None:
    """Each with each would take hours."""
    labels = [str(number) for number in range(200_000)]
    assert len(Recipe(ingredients=["acme/a"], labels=labels).labels or ()) == len(labels)
    with pytest.raises(RecipeError, match="`labels` has '7' twice"):
        Recipe(ingredients=["acme/a"], labels=[*labels, "7"])


def test_many_values_are_read_at_once() -> None:
    """By libyaml: a tenth of the time, and the same values."""
    text = "layers:\n" + "".join(f"  layer.{number}.*: [1.0, 0.5]\n" for number in range(20_000))
    assert len(parse_yaml(text)["layers"]) == 20_000
    assert isinstance(plain_yaml._Loader(""), yaml.CSafeLoader)


@pytest.mark.parametrize("text", [f"a: !{200_000 * 'x'} 1", f"{200_000 * 'x'} 1", f"{{? {100_000 * 'x'}: 1}}"])
def test_a_fault_shows_a_strangers_text_in_part(text: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text)
    assert len(str(raised.value)) < 3000


def test_the_json_schema_knows_the_short_forms() -> None:
    """A model or a method by its name alone, and one data set or code where several may stand."""
    schema = Recipe.model_json_schema()
    for part in ("Ingredient", "Named"):
        assert {"type": "string"} in schema["$defs"][part]["anyOf"]
    for key in ("validation", "test"):
        assert {"$ref": "#/$defs/Scoring"} in schema["properties"][key]["anyOf"]
    assert {"type": "string"} in schema["properties"]["allow"]["anyOf"]
