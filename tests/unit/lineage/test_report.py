"""May these be averaged? Folders with tiny models in them, each with one thing that is right or wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_soup import IncompatibleError, LineageReport, Recipe, RecipeError, check, cook
from hf_soup.lineage import similarity

Tensors = dict[str, Tensor]
Write = Callable[..., str]
WORDS = ["the", "a", "good", "bad", "film", "book", "day", "i", "am", "so", "very", "happy", "sad"]
SMALL: dict[str, Any] = {
    "vocab_size": 5 + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 16,
}  # fmt: skip
NAMED = {"id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True,
             "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip


def built(model_class: Any, config: Any, folder: Path, seed: int = 0) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors as the library writes them, of a model with initial weights."""
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    # Copies, as a file that is written over in place changes what was loaded from it.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), tensors


def nearby(tensors: Tensors, seed: int, scale: float = 0.1) -> Tensors:
    """Every tensor moved by a share of its own spread, as fine-tuning does."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
    return {name: each + scale * each.std(correction=0) * noise[name] for name, each in tensors.items()}


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Tensors]]:
    """A config, and the tensors of three models that were initialised apart."""
    folder = tmp_path_factory.mktemp("berts")
    made = [built(BertForSequenceClassification, BertConfig(**SMALL), folder, seed) for seed in range(3)]
    return {**made[0][0], **NAMED}, [tensors for _, tensors in made]


@pytest.fixture
def write(tmp_path: Path, berts: tuple[dict[str, Any], list[Tensors]]) -> Write:
    """Writes a model into a folder: by default a fine-tune of the first BERT; fields that are None are left out."""

    def written(
        name: str, seed: int = 1, *, of: int = 0, tensors: Tensors | None = None, config: dict[str, Any] | None = None,
        files: dict[str, str] | None = None, scale: float = 0.1, whole: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors or nearby(berts[1][of], seed, scale), folder / "model.safetensors", {"format": "pt"})
        values = {**(whole or berts[0]), **(config or {})}
        (folder / "config.json").write_text(json.dumps({key: v for key, v in values.items() if v is not None}))
        for path, text in (files or {}).items():
            (folder / path).write_text(text)
        return str(folder)

    return written


def tokenizer(words: list[str], **fields: object) -> dict[str, str]:
    vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    return {
        "vocab.txt": vocabulary,
        "tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer", **fields}),
    }


def codes(lineage: LineageReport) -> set[str]:
    """The codes of what was found, without what every folder here has: no tokenizer, no ancestor."""
    return {reason.code for reason in lineage.reasons} - {"processing-absent", "base-unknown"}


def said(lineage: LineageReport, code: str) -> str:
    return next(reason.message for reason in lineage.reasons if reason.code == code)


def who(lineage: LineageReport, code: str) -> list[str]:
    return [
        name.removeprefix("local:") for reason in lineage.reasons if reason.code == code for name in reason.ingredients
    ]


# ---- weights --------------------------------------------------------------------------------------------------


def test_siblings_of_whom_nobody_says_whose_they_are_are_likely(write: Write) -> None:
    lineage = check([write("a", 1), write("b", 2)])
    assert (lineage.verdict, codes(lineage)) == ("likely", set())
    assert "--base" in said(lineage, "base-unknown")
    assert lineage.cosines is not None
    assert lineage.cosines[0] > 0.9


def test_a_base_that_is_given_is_compared(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    models = [write("a", 1), write("b", 2)]
    lineage = check(models, base=write("base", tensors=berts[1][0]))
    assert (lineage.verdict, codes(lineage)) == ("proven", set())
    assert lineage.ancestor is not None
    assert (lineage.ancestor.model, lineage.ancestor.source) == ("local:base", "recipe")
    assert lineage.evidence[0].names == ("local:a", "local:b", "local:base")
    assert all((lineage.similarity_to_ancestor(number) or 0) > 0.9 for number in range(2))


def test_one_stranger_among_four_is_named(write: Write) -> None:
    lineage = check([write("a", 1), write("b", 2), write("odd", of=1), write("c", 3)])
    assert lineage.verdict == "refused"
    assert who(lineage, "unrelated") == ["odd"]
    assert "local:odd: the weights have nothing in common with those of local:a, local:b, local:c" in said(
        lineage, "unrelated"
    )
    with pytest.raises(IncompatibleError, match="local:odd: the weights have nothing"):
        lineage.raise_if_refused()


def test_the_first_may_be_the_stranger(write: Write) -> None:
    assert who(check([write("odd", of=1), write("a", 1), write("b", 2)]), "unrelated") == ["odd"]


def test_of_two_families_the_smaller_is_left_out(write: Write) -> None:
    models = [write("a", 1), write("x", 1, of=1), write("b", 2), write("y", 2, of=1), write("c", 3)]
    lineage = check(models)
    assert lineage.verdict == "refused"
    assert who(lineage, "unrelated") == ["x", "y"]


def test_siblings_with_a_base_that_is_not_theirs(write: Write) -> None:
    lineage = check([write("a", 1), write("b", 2)], base=write("base", of=1))
    assert (lineage.verdict, codes(lineage)) == ("refused", {"base-wrong"})
    assert "local:base is not their base" in said(lineage, "base-wrong")


def test_one_that_is_not_from_the_base(write: Write) -> None:
    lineage = check([write("a", 1), write("b", 2), write("odd", of=1)], base=write("base", 9))
    assert lineage.verdict == "refused"
    assert who(lineage, "not-from-base") == ["odd"]


def test_a_later_ancestor_makes_the_base_doubtful(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    middle = nearby(berts[1][0], 5, scale=0.6)
    models = [write(name, tensors=nearby(middle, seed, scale=0.05)) for seed, name in enumerate("ab")]
    lineage = check(models, base=write("base", tensors=berts[1][0]))
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-doubtful"})


def test_a_model_that_was_trained_hard_is_named_alone_and_once(
    write: Write, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    models = [write("a", 1), write("b", 2), write("hot", 3, scale=1.0)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"drifted"})
    told = said(lineage, "drifted")
    assert re.match(r"local:hot is far from the other 2 \(0\.\d\d; they are 0\.9\d to each other\); often", told)
    assert told.endswith("Leave it out, or let `--select greedy` decide.")
    assert who(lineage, "drifted") == ["hot"]
    pair = check([models[0], models[2]])
    assert re.match(r"local:a and local:hot are far from each other \(0\.\d\d\); often", said(pair, "drifted"))
    cook(models, tmp_path / "soup")
    assert f"[drifted] {told} docs/lineage.md#drifted" in log.messages, "a line of a cook, with where it is explained"
    assert all(line.count("\n") == 0 for line in log.messages)


def test_a_barrier_is_proposed_where_it_can_be_measured(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    assert "--barrier" in str(check([write("a", 1), write("b", 2)]))
    body = {key: value for key, value in nearby(berts[1][0], 1).items() if key.startswith("bert.")}
    whole = {**berts[0], "architectures": ["BertModel"]}
    models = [write(name, tensors=body, whole=whole) for name in ("c", "d")]
    assert "--barrier" not in str(check(models))


def test_heads_that_were_initialised_apart(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    own = nearby(berts[1][0], 2) | {"classifier.weight": berts[1][1]["classifier.weight"]}
    lineage = check([write("a", 1), write("apart", tensors=own), write("c", 3)])
    assert (lineage.verdict, codes(lineage)) == ("likely", {"heads-unrelated"})
    assert who(lineage, "heads-unrelated") == ["apart"]
    assert "--select greedy" in said(lineage, "heads-unrelated")


@pytest.mark.parametrize("zeros", ["classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"])
def test_a_tensor_of_zeros_says_nothing(write: Write, berts: tuple[dict[str, Any], list[Tensors]], zeros: str) -> None:
    empty = {zeros: torch.zeros_like(berts[1][0][zeros])}
    lineage = check([write("a", tensors=nearby(berts[1][0], 1) | empty), write("b", 2)])
    assert (lineage.verdict, codes(lineage)) == ("likely", set())


def test_the_same_model_twice_counts_twice(write: Write) -> None:
    a = write("a", 1)
    lineage = check([a, write("b", 2), a])
    assert (lineage.verdict, codes(lineage)) == ("likely", {"identical"})
    assert len(set(lineage.models.names)) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(write: Write, berts: tuple[dict[str, Any], list[Tensors]], bad: float) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    broken = nearby(berts[1][0], 1)
    broken[name][:] = bad
    lineage = check([write("a", 2), write("broken", tensors=broken), write("c", 3)])
    assert lineage.verdict == "refused"
    [reason] = [reason for reason in lineage.reasons if reason.refuses]
    assert (reason.code, reason.ingredients) == ("not-finite", ("local:broken",))
    assert name in reason.message


def test_a_new_layer_in_everyone_is_not_another_order(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    """As where classifiers are made of a model that predicts words, and each begins its own pooler."""
    name = "bert.pooler.dense.weight"

    def fresh(seed: int) -> Tensors:
        torch.manual_seed(seed)
        return nearby(berts[1][0], seed) | {name: 0.02 * torch.randn_like(berts[1][0][name])}

    models = [write(f"m{seed}", tensors=fresh(seed)) for seed in range(3)]
    bare = {key: each for key, each in berts[1][0].items() if "pooler" not in key and "classifier" not in key}
    for some, base, verdict in (
        (models, None, "likely"),
        (models[:2], None, "likely"),
        (models, write("base", tensors=bare, config={"architectures": ["BertModel"]}), "proven"),
    ):
        lineage = check(some, base=base)
        assert lineage.verdict == verdict
        assert f"{name}, and" in said(lineage, "tensors-drifted")
    # An ancestor that has one makes nothing harder.
    whole = check(models[:2], base=write("whole", tensors=berts[1][0]))
    assert (whole.verdict, who(whole, "tensors-drifted")) == ("proven", ["m0", "m1"])


def reordered(tensors: Tensors, layer: int, share: float = 1.0) -> Tensors:
    """Some hidden units of an MLP of a BERT in another order; the function stays the same."""
    place = f"bert.encoder.layer.{layer}."
    order = torch.arange(64)
    moved = torch.arange(int(64 * share))
    order[moved] = moved.roll(1)
    return tensors | {
        f"{place}intermediate.dense.weight": tensors[f"{place}intermediate.dense.weight"][order],
        f"{place}intermediate.dense.bias": tensors[f"{place}intermediate.dense.bias"][order],
        f"{place}output.dense.weight": tensors[f"{place}output.dense.weight"][:, order].contiguous(),
    }


@pytest.mark.parametrize("count", [3, 13])
@pytest.mark.parametrize("at", [0, 1, -1])
@pytest.mark.parametrize("named", [False, True])
def test_a_part_in_another_order_among_many(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]], count: int, at: int, named: bool
) -> None:
    models = [nearby(berts[1][0], seed) for seed in range(count)]
    models[at] = reordered(models[at], 0)
    written = [write(f"m{number}", tensors=each) for number, each in enumerate(models)]
    lineage = check(written, base=write("base", tensors=berts[1][0]) if named else None)
    assert lineage.verdict == "refused"
    assert who(lineage, "tensors-unrelated") == [f"m{at % count}"]


def test_half_of_the_neurons_in_another_order_is_said(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    """A tensor that has far less in common than the others may have moved by training, so it does not refuse."""
    models = [write("a", 1), write("b", 2), write("half", tensors=reordered(nearby(berts[1][0], 3), 0, 0.5))]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"tensors-drifted"})
    assert "in bert.encoder.layer.0." in said(lineage, "tensors-drifted")


def test_siblings_that_moved_far_in_some_rows_are_siblings(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    """As with a high learning rate on a narrow model that was hardly trained: a few rows are lost to each other."""

    def far(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        tensors = nearby(berts[1][0], seed, 0.2)
        for name, each in tensors.items():
            if each.dim() == 2 and "embeddings" not in name:
                rows = torch.randperm(len(each), generator=generator)[: len(each) // 6]
                each[rows] = each.std() * torch.randn(len(rows), each.shape[1], generator=generator)
        return tensors

    models = [write(f"m{seed}", tensors=far(seed)) for seed in range(4)]
    base = write("base", tensors=berts[1][0])
    for some, named in ((models[:2], None), (models[:2], base), (models, None), (models, base)):
        assert check(some, base=named).verdict == ("proven" if named else "likely")


PARTS = ("attention.weight", "mlp.weight", "pooler.weight", "embed.weight")


@given(
    changes=st.lists(st.dictionaries(st.sampled_from(PARTS), st.integers(0, 2), max_size=2), min_size=3, max_size=5),
    far=st.lists(st.sampled_from([0.1, 0.8, 3.0]), min_size=5, max_size=5),
)
@settings(max_examples=30, deadline=None)
def test_more_models_or_an_ancestor_make_no_verdict_harder(changes: list[dict[str, int]], far: list[float]) -> None:
    """Whoever may be averaged may be so beside another model, and with an ancestor."""
    generator = np.random.default_rng(0)
    origin = {f"{n}.{part}": generator.standard_normal((24, 24)) for n in range(3) for part in PARTS}
    fresh = [{name: generator.standard_normal((24, 24)) for name in origin} for _ in range(3)]

    def model(changed: dict[str, int], scale: float) -> dict[str, np.ndarray]:
        moved = {name: each + scale * generator.standard_normal(each.shape) for name, each in origin.items()}
        return moved | {f"1.{part}": fresh[which][f"1.{part}"] for part, which in changed.items()}

    models = [model(changed, scale) for changed, scale in zip(changes, far, strict=False)]

    def refused(number: int, *, ancestor: bool) -> set[str]:
        names = [f"m{each}" for each in range(number)]
        read = [{n: e.astype(np.float32) for n, e in each.items()} for each in [*models[:number], origin]]
        bodies = similarity.measure_similarity(read[: number + ancestor], [*names, *["base"] * ancestor], "body")
        found = similarity.unrelated(bodies, names)
        if ancestor:
            found = [] if bodies.related[:number, number].any() else found
        found = found or similarity.unrelated_tensors(bodies, names, number if ancestor else None)
        return {name for reason in found if reason.refuses for name in reason.ingredients}

    last = len(models) - 1
    if not refused(last, ancestor=False):
        assert refused(last + 1, ancestor=False) <= {f"m{last}"}
        assert not refused(last, ancestor=True)


def test_what_the_ancestor_lacks_is_no_excuse_for_another_order(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    """An ancestor of one layer, and a second one that the models share, in another order in one of them."""
    short = {name: each for name, each in berts[1][0].items() if "layer.1." not in name}
    base = write("base", tensors=short, config={"num_hidden_layers": 1})
    models = [nearby(berts[1][0], seed) for seed in range(3)]
    assert check([write(f"h{n}", tensors=each) for n, each in enumerate(models)], base=base).verdict == "proven"
    models[1] = reordered(models[1], 1)
    lineage = check([write(f"m{n}", tensors=each) for n, each in enumerate(models)], base=base)
    assert (lineage.verdict, who(lineage, "tensors-unrelated")) == ("refused", ["m1"])


def test_a_new_layer_in_everyone_and_another_order_in_one(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(nearby(berts[1][0], seed) | {"bert.pooler.dense.weight": 0.02 * torch.randn(32, 32)})
    models[2] = reordered(models[2], 0)
    lineage = check([write(f"m{n}", tensors=each) for n, each in enumerate(models)])
    [refusal] = [reason for reason in lineage.reasons if reason.refuses]
    assert refusal.ingredients == ("local:m2",)
    assert "pooler" not in refusal.message


def test_rows_of_zeros_are_in_no_order(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(each.shape[0], generator=generator) > 0.5 for n, each in berts[1][0].items()}

    def pruned(seed: int) -> Tensors:
        return {
            name: each * masks[name][:, None] if each.dim() == 2 and "embeddings" not in name else each
            for name, each in nearby(berts[1][0], seed).items()
        }

    base = write("base", tensors=berts[1][0])
    for number, models in enumerate(([pruned(1), pruned(2)], [pruned(1), nearby(berts[1][0], 2)])):
        lineage = check([write(f"m{number}{n}", tensors=each) for n, each in enumerate(models)], base=base)
        # Where both lack the same rows, both moved far and the same way.
        assert (lineage.verdict, codes(lineage) - {"drifted"}) == (
            ("proven", set()) if number else ("likely", {"base-doubtful"})
        )


def test_embeddings_that_moved_far_are_in_no_other_order(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]]
) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    models = [nearby(berts[1][0], seed) for seed in range(2)]
    for seed, each in enumerate(models):
        torch.manual_seed(seed)
        each[name][5:12] += 6 * each[name].std() * torch.randn(7, 32)
    lineage = check([write(f"m{n}", tensors=each) for n, each in enumerate(models)])
    assert lineage.verdict == "likely", codes(lineage)


def test_an_ancestor_of_which_little_is_there(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    thin = {name: each for name, each in berts[1][0].items() if "pooler" in name or each.dim() == 1}
    lineage = check([write("a", 1), write("b", 2)], base=write("thin", tensors=thin))
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-unreadable"})
    broken = {name: each.clone() for name, each in berts[1][0].items()}
    broken["bert.pooler.dense.weight"][3, 3] = float("nan")
    lineage = check([write("c", 1), write("d", 2)], base=write("broken", tensors=broken))
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-unreadable"})
    assert "has NaN or Inf in bert.pooler.dense.weight" in said(lineage, "base-unreadable")


def test_a_step_between_that_all_share(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    changed = berts[1][0] | {name: berts[1][0][name].flip(0)}
    models = [write(each, tensors=nearby(changed, seed)) for seed, each in enumerate("ab")]
    lineage = check(models, base=write("base", tensors=berts[1][0]))
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-tensors-unrelated"})


def test_a_base_of_other_shapes(write: Write, tmp_path: Path) -> None:
    config, tensors = built(
        BertForSequenceClassification, BertConfig(**{**SMALL, "hidden_size": 64}), tmp_path / "made"
    )
    lineage = check([write("a", 1), write("b", 2)], base=write("wide", tensors=tensors, whole=config))
    assert (lineage.verdict, codes(lineage)) == ("refused", {"base-wrong"})
    assert "no tensor of the same shape" in said(lineage, "base-wrong")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_tensors_that_are_stored_transposed_are_of_another_shape(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]], order: tuple[int, int]
) -> None:
    turned = {name: each.T.contiguous() if each.ndim == 2 else each for name, each in nearby(berts[1][0], 5).items()}
    folders = [write("a", 4), write("turned", tensors=turned)]
    lineage = check([folders[number] for number in order])
    assert lineage.verdict == "refused"
    assert "shape" in str(lineage)


def test_models_are_compared_each_with_each_no_more_than_needed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies once, and heads; a thousand models take ten seconds each time."""
    parts: list[str] = []
    compare = similarity.measure_similarity
    monkeypatch.setattr(similarity, "measure_similarity", lambda *given: (parts.append(given[2]), compare(*given))[1])
    assert check([write("a", 1), write("b", 2)]).verdict == "likely"
    assert parts == ["body", "head"]


def test_a_common_mean_is_no_kinship(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    moved = [{name: each + 3 * each.std(correction=0) for name, each in berts[1][n].items()} for n in range(2)]
    lineage = check([write(name, tensors=each) for name, each in zip("ab", moved, strict=True)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"unrelated"})


def test_sixty_models(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    """The report stays short, the numbers few, and one stranger is found."""
    models = [write(f"m{number}", number) for number in range(58)]
    lineage = check([*models, write("odd", of=1), write("hot", 3, scale=1.0)], base=write("base", tensors=berts[1][0]))
    assert lineage.verdict == "refused"
    assert who(lineage, "not-from-base") == ["odd"]
    assert len(str(lineage).splitlines()) < 50
    assert "and 40 more; --json has all" in str(lineage)
    assert len(json.dumps(lineage.to_dict())) < 200_000


def test_one_model_is_no_soup(write: Write) -> None:
    lineage = check([write("a")])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"single"})


def test_one_model_by_its_revision_is_what_a_selection_kept(write: Write, tmp_path: Path) -> None:
    """A soup's own recipe may name one ingredient, and cooking it gives the same bytes."""
    folder = write("a")
    pin = check([folder]).models.checkpoints[0].revision
    recipe = Recipe(ingredients=[{"model": folder, "revision": pin}])
    assert (check(recipe).verdict, codes(check(recipe))) == ("likely", {"single"})
    soup = cook(recipe, tmp_path / "soup")
    ours, theirs = (load_file(Path(place) / "model.safetensors") for place in (soup.folder, folder))
    assert all(torch.equal(ours[name], each) for name, each in theirs.items())


def test_kinship_is_read_off_rows() -> None:
    a = np.eye(16, dtype=np.float32) + 0.01
    turned = a[::-1].copy()
    found = similarity.measure_similarity(
        [{"w": a}, {"w": 2 * a}, {"w": turned}, {"v": a}, {"w": a[:8]}], [*"abcde"], "body"
    )
    assert found.tensors == ("w", "v")
    assert (round(float(found.cosines[0, 1]), 6), found.rows[0, 1]) == (1.0, 1.0)
    assert found.rows[0, 2] == 0.0
    assert found.related[0].tolist() == [True, True, False, False, False]
    assert np.isnan(found.cosines[0, 3:]).all()  # of another name, of another shape


def test_a_report_for_people_and_for_scripts(write: Write) -> None:
    card = f"---\nlicense: {'x' * 10**6}\n---\n"
    lineage = check([write("a", 1), write("odd", of=1, files={"README.md": card})])
    text, report = str(lineage), lineage.to_dict()
    assert text.startswith("refused: ")
    assert len(text) < 2000
    # Of two, nobody knows who is the stranger.
    assert "Why not:\n- [unrelated] The weights have nothing in common: local:a; local:odd (cosine" in text
    assert json.loads(json.dumps(report)) == report
    assert report["ancestor"] is None
    assert [each["dtype"] for each in report["ingredients"]] == ["F32", "F32"]
    assert report["reasons"][0]["severity"] == "refusal"
    assert report["transferred_bytes"] == 0


# ---- labels ---------------------------------------------------------------------------------------------------


def labelled(*names: str, text: bool = False) -> dict[str, Any]:
    """The fields of a config; ``text`` writes numbers as text, as some versions did."""
    numbers = {name: str(number) if text else number for number, name in enumerate(names)}
    return {"id2label": {str(number): name for number, name in enumerate(names)}, "label2id": numbers}


@pytest.mark.parametrize(
    "config",
    [
        labelled("negative", "positive", text=True),
        labelled("Negative", " POSITIVE "),
        {**labelled("negative", "positive"), "label2id": None},
        {**labelled("negative", "positive"), "label2id": {"x": "y"}},
    ],
)
def test_labels_that_are_spelt_differently(write: Write, config: dict[str, Any]) -> None:
    assert codes(check([write("a", 1), write("b", 2, config=config)])) == set()


@pytest.mark.parametrize(
    "config",
    [
        labelled("LABEL_0", "LABEL_1"),
        {"id2label": None, "label2id": None},
        {"id2label": None, "label2id": None, "id2labl": {"0": "negative", "1": "positive"}},
        {"id2label": {}, "label2id": {}},
    ],
)
def test_labels_without_names_match_by_number(write: Write, config: dict[str, Any], tmp_path: Path) -> None:
    models = [write("a", 1, config=config), write("b", 2), write("c", 3)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"labels-unknown"})
    assert "local:a gives no names to the labels, so they are matched by number with local:b's" in said(
        lineage, "labels-unknown"
    )
    soup = cook(models, tmp_path / "soup")
    assert soup.load().config.id2label == {0: "negative", 1: "positive"}


def test_labels_that_nobody_names(write: Write) -> None:
    nameless = labelled("LABEL_0", "LABEL_1")
    assert codes(check([write(name, n, config=nameless) for n, name in enumerate("ab")])) == set()


def test_the_same_labels_in_another_order(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]], tmp_path: Path
) -> None:
    other = nearby(berts[1][0], 2)
    other |= {name: each.flip(0) for name, each in other.items() if name.startswith("classifier.")}
    models = [write("a", 1), write("b", tensors=other, config=labelled("POSITIVE", "negative"))]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", set())
    assert (
        "local:b: the labels stand in another order; rows of classifier.bias, classifier.weight move (negative 1→0"
        in ("".join(lineage.models.notes))
    )
    soup = cook(models, tmp_path / "soup")
    assert soup.load().config.id2label == {0: "negative", 1: "positive"}
    a, averaged = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "soup"))
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(averaged[name], ((a[name].double() + other[name].flip(0).double()) / 2).float())


def test_other_labels(write: Write) -> None:
    lineage = check([write("a", 1), write("b", 2, config=labelled("ham", "spam"))])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"labels"})
    assert "other labels: 0 is negative against ham, 1 is positive against spam" in said(lineage, "labels")


def test_labels_that_two_name_differently_and_the_first_does_not(write: Write) -> None:
    models = [
        write("a", 1, config=labelled("LABEL_0", "LABEL_1")),
        write("b", 2),
        write("c", 3, config=labelled("x", "y")),
    ]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("refused", {"labels", "labels-unknown"})
    assert "local:b and local:c do not have the same labels" in said(lineage, "labels")


def test_more_labels(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.zeros(3)}
    tensors = nearby(berts[1][0], 2) | head
    lineage = check([write("a", 1), write("b", tensors=tensors, config=labelled("x", "y", "z"))])
    assert lineage.verdict == "refused"
    assert codes(lineage) == {"labels", "shapes"}
    assert "2 labels against 3" in said(lineage, "labels")


# ---- architecture and tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": None, "torch_dtype": "float32", "transformers_version": "4.11.3"},
        {"problem_type": "single_label_classification", "gradient_checkpointing": False},
        {"hidden_dropout_prob": 0.3, "initializer_range": 0.5, "use_cache": False},
        {"_name_or_path": "./results/checkpoint-500", "finetuning_task": "sst2"},
        {"_name_or_path": 300 * "x"},
        {"_name_or_path": "~nobody/a\0b"},
        {"attn_implementation": "flash_attention_2", "architectures": ["BertForSequenceClassification"]},
        {"pad_token_id": None, "layer_norm_eps": None, "type_vocab_size": None},  # the defaults, not written
    ],
)
def test_configs_of_other_versions_are_the_same_model(write: Write, config: dict[str, Any]) -> None:
    assert codes(check([write("a", 1), write("b", 2, config=config)])) == set()


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"hidden_act": "relu"}, "hidden_act: gelu against relu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: 1e-12 against 1e-05"),
        ({"num_attention_heads": 4}, "num_attention_heads: 2 against 4"),
        (
            {"architectures": ["BertForTokenClassification"]},
            "class: BertForSequenceClassification against BertForToken",
        ),
        ({"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}, "model_type: bert against"),
        ({"architectures": ["MyOwnBert"]}, "'MyOwnBert'"),
        ({"model_type": "mine"}, "'mine'"),
    ],
)
def test_another_architecture(write: Write, config: dict[str, Any], shown: str) -> None:
    lineage = check([write("a", 1), write("b", 2, config=config)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"architecture"})
    assert shown in said(lineage, "architecture")


def test_other_shapes_are_shown(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    tensors = nearby(berts[1][0], 2)
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:3]])
    lineage = check([write("a", 1), write("b", tensors=tensors)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"vocabulary"})
    assert "local:a  18 rows\n    local:b  21 rows" in said(lineage, "vocabulary")
    assert "not all bring one" in said(lineage, "vocabulary")


def test_a_config_that_lies_about_shapes(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    tensors = nearby(berts[1][0], 2)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:3]])
    lineage = check([write("a", 1), write("b", tensors=tensors)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"shapes"})
    assert f"'{name}'" in said(lineage, "shapes")
    assert "local:a  (64, 32)\n    local:b  (67, 32)" in said(lineage, "shapes")


def test_a_tensor_too_few_and_one_too_many(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    tensors = nearby(berts[1][0], 2)
    del tensors["bert.pooler.dense.bias"]
    lineage = check([write("a", 1), write("b", tensors=tensors)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"tensors-missing"})
    assert "local:b lacks 1 tensors of local:a: bert.pooler.dense.bias" in said(lineage, "tensors-missing")
    more = check([each.source.reference for each in lineage.models.checkpoints[::-1]])
    assert (more.verdict, codes(more)) == ("refused", {"tensors-extra"})


def test_old_names_and_buffers_are_aligned(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]], tmp_path: Path
) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in nearby(berts[1][0], 2).items()
    }
    old |= {"bert.embeddings.position_ids": torch.arange(16)[None]}
    models = [write("a", 1), write("b", tensors=old)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", set())
    assert any("local:b: transformers ignores bert.embeddings.position_ids" in each for each in lineage.models.notes)
    assert any("local:b: 10 tensors have other names on disk" in each for each in lineage.models.notes)
    cook(models, tmp_path / "soup")
    soup = load_file(tmp_path / "soup" / "model.safetensors")
    a = load_file(tmp_path / "a" / "model.safetensors")
    assert soup.keys() == a.keys()
    name = "bert.encoder.layer.1.output.LayerNorm.{}"
    mean = (a[name.format("weight")].double() + old[name.format("gamma")].double()) / 2
    assert torch.equal(soup[name.format("weight")], mean.float())


@pytest.mark.parametrize("first", [False, True])
def test_a_donor_with_old_names_gives_them_to_the_soup(
    write: Write, berts: tuple[dict[str, Any], list[Tensors]], tmp_path: Path, first: bool
) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in nearby(berts[1][0], 2).items()
    }
    models = [write("old", tensors=old), write("new", 1)]
    soup = cook(models if first else models[::-1], tmp_path / "soup")
    names = load_file(tmp_path / "soup" / "model.safetensors").keys()
    assert ("bert.embeddings.LayerNorm.gamma" in names) is first
    loaded = soup.load().state_dict()["bert.embeddings.LayerNorm.weight"]
    ours = load_file(tmp_path / "new" / "model.safetensors")["bert.embeddings.LayerNorm.weight"]
    assert torch.allclose(loaded, (old["bert.embeddings.LayerNorm.gamma"] + ours) / 2)


def test_mixed_dtypes_are_stated(write: Write, berts: tuple[dict[str, Any], list[Tensors]], tmp_path: Path) -> None:
    half = {name: each.bfloat16() for name, each in nearby(berts[1][0], 2).items()}
    models = [write("a", tensors=half, config={"dtype": "bfloat16"}), write("b", 1)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"dtypes-mixed"})
    assert "local:a BF16, local:b F32" in said(lineage, "dtypes-mixed")
    assert "the widest is written where no `dtype` is named" in said(lineage, "dtypes-mixed")
    soup = cook(models, tmp_path / "soup")
    assert {each.dtype for each in soup.load().state_dict().values()} == {torch.float32}
    assert json.loads((soup.folder / "config.json").read_text())["dtype"] == "float32"


def test_a_quantised_model(write: Write) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    lineage = check([write("a", 1), write("b", 2, config=config)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"quantised"})
    assert "local:b is quantised (gptq)" in said(lineage, "quantised")


def test_everything_that_is_wrong_is_said_at_once(write: Write) -> None:
    models = [
        write("a", 1), write("labels", 2, config=labelled("ham", "spam")), write("stranger", of=1),
        write("tokens", 3, files=tokenizer(WORDS)),
    ]  # fmt: skip
    lineage = check([*models, write("more", 4, files=tokenizer([*WORDS[::-1]]))])
    assert lineage.verdict == "refused"
    assert codes(lineage) >= {"labels", "unrelated", "processing"}
    with pytest.raises(IncompatibleError) as caught:
        lineage.raise_if_refused()
    assert caught.value.message.count("\n- ") == len([reason for reason in lineage.reasons if reason.refuses]) >= 3


# ---- language models ------------------------------------------------------------------------------------------


def language_model(kind: str, folder: Path, *, tied: bool) -> tuple[dict[str, Any], Tensors, str, str]:
    """Config, tensors, and the names of the two tensors that may be one."""
    if kind == "llama":
        llama = LlamaConfig(**{**SMALL, "vocab_size": 64}, tie_word_embeddings=tied)
        config, tensors = built(LlamaForCausalLM, llama, folder)
        return config, tensors, "model.embed_tokens.weight", "lm_head.weight"
    gpt = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    config, tensors = built(GPT2LMHeadModel, gpt, folder)
    return config, tensors, "transformer.wte.weight", "lm_head.weight"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [False, True])
def test_a_tied_tensor_that_one_stores_twice(write: Write, kind: str, first: bool, tmp_path: Path) -> None:
    config, tensors, embedding, head = language_model(kind, tmp_path / "made", tied=True)
    once = nearby(tensors, 1)
    twice = nearby(tensors, 2)
    twice[head] = twice[embedding].clone()
    models = [write("once", tensors=once, whole=config), write("twice", tensors=twice, whole=config)]
    models = models[::-1] if first else models
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", set())
    soup: Any = cook(models, tmp_path / "soup").load()
    one = lineage.models.checkpoints[1 if first else 0]
    assert sum(each.numel() for each in soup.parameters()) == one.parameters
    mean = ((once[embedding].double() + twice[embedding].double()) / 2).float()
    assert torch.equal(soup.get_input_embeddings().weight, mean)
    assert torch.equal(soup.get_output_embeddings().weight, mean)


def test_heads_that_are_not_tied(write: Write, tmp_path: Path) -> None:
    config, tensors, *_ = language_model("llama", tmp_path / "made", tied=False)
    models = [write(name, tensors=nearby(tensors, n), whole=config) for n, name in enumerate("ab")]
    soup: Any = cook(models, tmp_path / "soup").load()
    assert not torch.equal(soup.get_input_embeddings().weight, soup.get_output_embeddings().weight)


@pytest.mark.parametrize("first", [False, True])
def test_one_ties_and_the_other_does_not(write: Write, first: bool, tmp_path: Path) -> None:
    """A tied model is an untied one with two equal tensors."""
    tied, tensors, embedding, head = language_model("llama", tmp_path / "made", tied=True)
    apart = {**tied, "tie_word_embeddings": False}
    once, other = nearby(tensors, 1), nearby(tensors, 2)
    other |= {head: torch.randn_like(tensors[embedding])}
    models = [write("a", tensors=once, whole=tied), write("b", tensors=other, whole=apart)]
    models = models[::-1] if first else models
    lineage = check(models)
    assert lineage.verdict == "likely"
    assert any(note.endswith("not tied to what predicts tokens, as in local:b.") for note in lineage.models.notes)
    assert f"local:a: '{head}' is tied, and stored once as '{embedding}'." in lineage.models.notes
    soup: Any = cook(models, tmp_path / "soup").load()
    assert torch.equal(soup.get_output_embeddings().weight, ((once[embedding].double() + other[head]) / 2).float())
    assert torch.equal(soup.get_input_embeddings().weight, ((once[embedding].double() + other[embedding]) / 2).float())


def test_a_mixture_of_experts(write: Write, tmp_path: Path) -> None:
    """41 names on disk, fewer in memory: the average is made on the disk side."""
    small = {**SMALL, "vocab_size": 64, "num_local_experts": 4, "num_key_value_heads": 1}
    config, tensors = built(MixtralForCausalLM, MixtralConfig(**small), tmp_path / "made")
    models = [write(name, tensors=nearby(tensors, n), whole=config) for n, name in enumerate("ab")]
    lineage = check(models, base=write("base", tensors=tensors, whole=config))
    assert (lineage.verdict, codes(lineage)) == ("proven", set())
    soup = cook(models, tmp_path / "soup")
    assert load_file(soup.folder / "model.safetensors").keys() == tensors.keys()
    assert sum(each.numel() for each in soup.load().parameters()) == lineage.models.checkpoints[0].parameters


# ---- tokenizers and processors --------------------------------------------------------------------------------


def test_tokenizers_that_differ_in_their_files_only(write: Write) -> None:
    one, other = tokenizer(WORDS), tokenizer(WORDS, do_lower_case=True, name_or_path="elsewhere", strip_accents=None)
    assert check([write("a", 1, files=one), write("b", 2, files=other)]).verdict == "likely"
    assert codes(check([write("c", 1, files=one), write("d", 2, files=other)])) == set()


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (tokenizer([*WORDS[::-1]]), "12 tokens have other numbers; 'the': 5 against 17"),
        (tokenizer([*WORDS[:-1], "more", "and more"]), "18 tokens against 19"),
        (tokenizer(WORDS, do_lower_case=False), "probe texts become other tokens"),
    ],
)
def test_another_tokenizer(write: Write, files: dict[str, str], shown: str) -> None:
    lineage = check([write("a", 1, files=tokenizer(WORDS)), write("b", 2, files=files)])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"processing"})
    assert shown in said(lineage, "processing")
    assert "local:a and local:b do not prepare their inputs alike: tokenizer" in said(lineage, "processing")


def test_a_tokenizer_that_only_one_brings(write: Write, tmp_path: Path) -> None:
    models = [write("a", 1), write("b", 2, files=tokenizer(WORDS))]
    lineage = check(models)
    assert lineage.verdict == "likely"
    assert said(lineage, "processing-absent") == "local:a brings no tokenizer or image processor; local:b's is used."
    soup = cook(models, tmp_path / "soup")
    assert (soup.folder / "vocab.txt").is_file()


OLD = {"feature_extractor_type": "ViTFeatureExtractor", "size": 16}


@pytest.mark.parametrize("fields", [OLD, {"rescale_factor": 1 / 255, "do_rescale": True}, {"do_convert_rgb": None}])
def test_processors_that_differ_in_their_files_only(write: Write, fields: dict[str, Any]) -> None:
    other = {key: value for key, value in {**PROCESSOR, **fields}.items() if not (fields is OLD and "processor" in key)}
    models = [
        write("a", 1, files={"preprocessor_config.json": json.dumps(PROCESSOR)}),
        write("b", 2, files={"preprocessor_config.json": json.dumps(other)}),
    ]
    assert codes(check(models)) == set()


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"size": {"height": 24, "width": 24}}, "becomes (3, 16, 16) against (3, 24, 24)"),
        ({"image_mean": [0.48, 0.46, 0.41]}, "pixel values of probe pictures differ by up to"),
        ({"do_normalize": False}, "pixel values of probe pictures differ by up to"),
    ],
)
def test_another_processor(write: Write, fields: dict[str, Any], shown: str) -> None:
    models = [
        write("a", 1, files={"preprocessor_config.json": json.dumps(PROCESSOR)}),
        write("b", 2, files={"preprocessor_config.json": json.dumps({**PROCESSOR, **fields})}),
    ]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("refused", {"processing"})
    assert shown in said(lineage, "processing")


# ---- findings that a user accepts -----------------------------------------------------------------------------


def test_a_judgement_can_be_accepted(write: Write, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """By code, and that is written into the recipe, the summary and the card."""
    models = [write("a", 1), write("b", 2, of=1)]
    refused = check(models)
    assert refused.verdict == "refused"
    with pytest.raises(IncompatibleError, match="accept it: `--allow unrelated`"):
        cook(models, tmp_path / "refused")
    accepted = check(models, allow=["unrelated"])
    assert accepted.verdict == "likely"
    assert "Allowed:\n- [unrelated]" in str(accepted)
    soup = cook(models, tmp_path / "soup", allow=["unrelated"])
    assert any(each.levelname == "ALLOWED" and each.message.startswith("[unrelated]") for each in log.records)
    assert Recipe.load(soup.folder / "soup.yaml").allow == ("unrelated",)
    found = {each.code: each.severity for each in soup.report.lineage.reasons}
    assert found["unrelated"] == "allowed"
    card = (soup.folder / "README.md").read_text()
    assert "The recipe accepts these findings" in card
    assert "- `unrelated`: " in card


def test_what_is_impossible_cannot_be_accepted(write: Write, berts: tuple[dict[str, Any], list[Tensors]]) -> None:
    with pytest.raises(
        RecipeError, match="'architecture' is no finding that can be accepted; those are base-contradicted"
    ):
        check([write("a", 1), write("b", 2)], allow=["architecture"])
    broken = nearby(berts[1][0], 3)
    broken["bert.pooler.dense.weight"][0, 0] = float("nan")
    lineage = check([write("c", 1), write("d", of=1, tensors=broken)], allow=["unrelated", "tensors-unrelated"])
    assert lineage.verdict == "refused"
    assert "--allow" not in str(lineage)


def test_another_count_of_places_is_a_judgement(write: Write, tmp_path: Path) -> None:
    """Where shapes are equal, as with rotary embeddings: the donor's setting goes into the soup."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    whole, tensors = built(LlamaForCausalLM, config, tmp_path / "made")
    a = write("a", tensors=nearby(tensors, 1), whole=whole)
    longer = {"max_position_embeddings": 256, "rope_theta": 500_000.0, "rope_parameters": None}
    b = write("b", tensors=nearby(tensors, 2), whole=whole, config=longer)
    lineage = check([a, b])
    assert (lineage.verdict, [each.code for each in lineage.reasons if each.refuses]) == ("refused", ["positions"])
    assert "max_position_embeddings: 64 against 256" in said(lineage, "positions")
    soup = cook([a, b], tmp_path / "soup", allow=["positions"])
    assert json.loads((soup.folder / "config.json").read_text())["max_position_embeddings"] == 64
    # Positions that are learned have a row each.
    wide, more = built(BertForSequenceClassification, BertConfig(**{**SMALL, "max_position_embeddings": 32}), tmp_path)
    learned = check([write("c"), write("d", tensors=more, whole={**wide, **NAMED})], allow=["positions"])
    assert "shapes" in [each.code for each in learned.reasons if each.refuses]


def test_labels_of_other_names_can_be_accepted(write: Write, tmp_path: Path) -> None:
    """Then they are matched by number."""
    other = {"id2label": {"0": "NEG", "1": "POS"}, "label2id": {"NEG": 0, "POS": 1}}
    models = [write("a", 1), write("b", 2, config=other)]
    assert check(models).verdict == "refused"
    soup = cook(models, tmp_path / "soup", allow=["labels"])
    assert json.loads((soup.folder / "config.json").read_text())["id2label"] == NAMED["id2label"]
