"""What ingredients show on examples, against the simplest arithmetic there is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from plans import config_of, make_plan, template_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call, grad
from transformers.pytorch_utils import Conv1D

from hf_soup.checkpoint import read_header
from hf_soup.errors import MergeError, ScoringError
from hf_soup.evaluation import Calibration, collect_statistics, collection as collecting, with_statistics
from hf_soup.evaluation.dataset import CalibrationDataset
from hf_soup.evaluation.model import build_model
from hf_soup.evaluation.preprocessing import prepare_calibration_dataset
from hf_soup.merging import Materializer, Plan, StatisticsStore, statistics_folder, statistics_path, uniform
from hf_soup.methods.fisher import fisher
from hf_soup.methods.regmean import regmean
from hf_soup.recipe import CalibrationData

TEXT: dict[str, Any] = {"vocab_size": 16, "id2label": {n: str(n) for n in range(3)}, "initializer_range": 0.3}
MADE: dict[str, Callable[[], Any]] = {
    "ViT": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(num_channels=1, id2label={n: str(n) for n in range(10)}, initializer_range=0.3,
                               image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                               intermediate_size=24)),
    "BERT": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=24, max_position_embeddings=16)),
    "GPT2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)),
    "Mixtral": lambda: transformers.MixtralForSequenceClassification(
        transformers.MixtralConfig(**TEXT, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=8, num_key_value_heads=1, num_local_experts=4,
                                   max_position_embeddings=16, pad_token_id=0)),
    "Llama, a language model": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=384, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=24, max_position_embeddings=16, initializer_range=0.3)),
    "GPT2, a language model": lambda: transformers.GPT2LMHeadModel(  # whose head is tied
        transformers.GPT2Config(vocab_size=384, n_embd=16, n_layer=3, n_head=2, n_positions=16, initializer_range=0.3)),
}  # fmt: skip
LANGUAGE = [name for name in MADE if name.endswith("a language model")]
ROWS = 8


@dataclass
class Kitchen:
    """Two ingredients of one family, and examples for them."""

    folder: Path
    task: str
    plan: Callable[..., Plan]
    paths: list[dict[str, Path]]
    full: list[dict[str, Tensor]]
    inputs: CalibrationDataset

    def collect(self, method: str, **parameters: Any) -> Plan:
        plan = self.plan(method=method, parameters={"examples": ROWS, **parameters})
        calibration = Calibration(self.inputs, template_of(self.folder), seed=5)
        plan = with_statistics(plan, calibration)
        collect_statistics(plan, lambda: self.paths, calibration)
        return plan

    def found(self, plan: Plan, source: int) -> dict[str, Tensor]:
        ((kind, names),) = plan.statistics.items()
        found = load_file(statistics_path(names["ab"[source]]))
        if kind.startswith("fisher"):  # which is stored flat, to be read in slices
            assert all(each.dim() == 1 for each in found.values())
            return {name: each.reshape(self.full[source][name].shape) for name, each in found.items()}
        return found

    def model(self, source: int) -> Any:
        return build_model(config_of(self.folder), self.full[source], self.task, torch.float32)

    def rows(self) -> list[tuple[int, dict[str, Tensor]]]:
        """Each drawn row by itself."""
        return [(int(row), self.inputs.inputs.batch(np.array([row]))) for row in self.inputs.drawn(ROWS, 5)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def a_kitchen(family: str, place: Path, rows: Path) -> Kitchen:
    text = family != "ViT"
    if family in LANGUAGE:
        transformers.ByT5Tokenizer().save_pretrained(place)
    else:
        transformers.BertTokenizer.from_pretrained(rows.parent / "base").save_pretrained(place)
    image = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "image_mean": [0.5], "image_std": [0.5]}
    (place / "preprocessor_config.json").write_text(json.dumps(image))
    paths, full, headers = [], [], []
    for number in range(2):
        torch.manual_seed(number)
        model = MADE[family]()
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.05 * torch.randn(each.shape))
        model.save_pretrained(place / str(number))
        path = place / str(number) / "model.safetensors"
        data = path.read_bytes()
        headers.append({t.name: t for t in read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")})
        paths.append({"m": path})
        full.append(load_file(path))
    (place / "config.json").write_bytes((place / "0" / "config.json").read_bytes())
    if not text:
        digits = load_digits()
        pictures = [Image.fromarray(np.rint(each * 15.9).astype(np.uint8)) for each in digits.images[:20]]
        rows = place / "digits.parquet"
        datasets.Dataset.from_dict(
            {"image": pictures}, features=datasets.Features({"image": datasets.Image()})
        ).to_parquet(rows)
    else:
        lines = rows.read_text().splitlines()
        rows = place / "lines.csv"  # of several lengths
        texts = [" ".join([each.split(",")[0]] * (1 + n % 3)) for n, each in enumerate(lines[1:21])]
        rows.write_text("\n".join(["text", *texts]))
    task = "causal-lm" if family in LANGUAGE else "text-classification" if text else "image-classification"
    config = json.loads((place / "config.json").read_text())
    inputs = prepare_calibration_dataset(
        CalibrationData(task=task, dataset=str(rows), batch_size=5), [], folder=place, config=config, quiet=True
    )  # fmt: skip
    plan = lambda **more: make_plan(["a", "b"], headers, [1.0, 2.0], **more)  # noqa: E731
    return Kitchen(place, task, plan, paths, full, inputs)


@pytest.fixture(scope="module")
def kitchen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, family: Path) -> Kitchen:
    """For tests that do not change it."""
    return a_kitchen(request.param, tmp_path_factory.mktemp(request.param), family / "rows.csv")


def near(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=1e-3, atol=max(1e-12, share * float(expected.abs().max()))
    )


def squares(kitchen: Kitchen, source: int) -> dict[str, Tensor]:
    """By torch.func, each example by itself, under the names that the model has in memory; their mean square is 1."""
    model = kitchen.model(source)
    if hasattr(model.config, "num_local_experts"):
        # Other implementations may ask where tensors lie, and those of torch.func lie nowhere.
        model.set_experts_implementation("eager")
    inside = {name: each.detach() for name, each in model.named_parameters()}
    places = range(kitchen.inputs.n)
    counts = (
        [kitchen.inputs.inputs.batch(np.array([row]))["input_ids"].numel() for row in places]
        if kitchen.task == "causal-lm"
        else [1] * len(places)
    )
    draws = np.split(uniform(5, "labels", 0, 0, sum(counts)).double().numpy(), np.cumsum(counts)[:-1])
    total = {name: torch.zeros(each.shape, dtype=torch.float64) for name, each in inside.items()}

    def logs(parameters: Mapping[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        answers = functional_call(model, dict(parameters), kwargs=batch).logits[0].log_softmax(-1)
        return answers.reshape(-1, answers.shape[-1])

    for row, batch in kitchen.rows():
        reached = logs(inside, batch).double().exp().cumsum(-1).numpy()
        labels = [int(np.searchsorted(line, at, side="right")) for line, at in zip(reached, draws[row], strict=True)]
        chosen = lambda each, batch=batch, labels=labels: logs(each, batch)[range(len(labels)), labels].sum()  # noqa: E731
        for name, slope in grad(chosen)(inside).items():
            total[name] += slope.double() ** 2
    length = torch.cat([each.flatten() for each in total.values()]).square().mean().sqrt()
    return {name: each / length for name, each in total.items()}


@pytest.mark.parametrize("kitchen", ["BERT", "ViT", "GPT2", *LANGUAGE], indirect=True)
def test_fisher_is_of_each_example_by_itself(kitchen: Kitchen) -> None:
    plan = kitchen.collect("fisher")
    for source in range(2):
        found, expected = kitchen.found(plan, source), squares(kitchen, source)
        inside = kitchen.model(source).state_dict()
        assert found.keys() == kitchen.full[source].keys()
        for name, each in found.items():
            # By content, as names on the disk are others.
            (where,) = [key for key in expected if torch.equal(inside[key], kitchen.full[source][name])][:1]
            near(each, expected[where])


@pytest.mark.parametrize("kitchen", ["Mixtral"], indirect=True)
def test_fisher_of_tensors_that_are_stacked_in_memory(kitchen: Kitchen) -> None:
    """Every expert has its own on the disk, and the squares have the sum that they have in memory."""
    plan = kitchen.collect("fisher")
    found, expected = kitchen.found(plan, 0), squares(kitchen, 0)
    assert found.keys() == kitchen.full[0].keys()
    assert len([name for name in found if ".experts." in name]) > 8
    near(sum(each.double().sum() for each in found.values()), sum(each.sum() for each in expected.values()))


def test_models_that_are_sure_of_their_answers_are_not_averaged(tmp_path: Path, family: Path) -> None:
    """Their squared gradients are tiny, as those of large models are, and say as much as others'."""
    kitchen = a_kitchen("BERT", tmp_path, family / "rows.csv")
    for source, path in enumerate(each["m"] for each in kitchen.paths):
        kitchen.full[source]["classifier.bias"][0] += 10
        save_file(kitchen.full[source], path, {"format": "pt"})
    plan = kitchen.collect("fisher")
    mixed = Materializer(plan.layout, kitchen.paths).materialize(plan)
    a, b = (squares(kitchen, source) for source in range(2))
    for name in ("bert.encoder.layer.0.output.dense.weight", "classifier.weight"):
        own, seen = [full[name].double() for full in kitchen.full], [each[name].clamp(min=1e-6) for each in (a, b)]
        near(mixed[name], (seen[0] * own[0] + 2 * seen[1] * own[1]) / (seen[0] + 2 * seen[1]), 1e-3)
        assert not torch.allclose(mixed[name].double(), (own[0] + 2 * own[1]) / 3, atol=1e-3)


def inputs_of(kitchen: Kitchen, source: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight, and :math:`xx^\\top` of all inputs, of every linear layer, by one row at a time in float64."""
    model = kitchen.model(source).double()
    embeddings = model.get_input_embeddings()
    found: dict[str, list[Tensor]] = {}
    layers = {
        name: each
        for name, each in model.named_modules()
        # A head that is tied is averaged.
        if isinstance(each, torch.nn.Linear | Conv1D) and each.weight is not getattr(embeddings, "weight", None)
    }
    for name, each in layers.items():
        each.register_forward_pre_hook(lambda _, given, name=name: found.setdefault(name, []).append(given[0]))
    for _, batch in kitchen.rows():
        with torch.no_grad():
            model(**{key: each.double() if each.is_floating_point() else each for key, each in batch.items()})
    result = {}
    for name, parts in found.items():
        flat = torch.cat([each.reshape(-1, each.shape[-1]) for each in parts])
        result[name] = layers[name].weight.detach(), flat.mT @ flat / len(flat)
    return result


@pytest.mark.parametrize("kitchen", ["BERT", "ViT", "GPT2", *LANGUAGE], indirect=True)
def test_gram_is_of_the_inputs_of_linear_layers(kitchen: Kitchen) -> None:
    """Of all tokens and of no padding: each row by itself gives the same."""
    plan = kitchen.collect("regmean")
    for source in range(2):
        found, expected = kitchen.found(plan, source), inputs_of(kitchen, source)
        assert len(found) == len(expected) > 8
        for name, each in found.items():
            (gram,) = [g for weight, g in expected.values() if torch.equal(weight.float(), kitchen.full[source][name])]
            near(each, gram)


@pytest.mark.parametrize("kitchen", ["BERT", "GPT2"], indirect=True)
def test_each_layer_is_solved_as_it_is_stored(kitchen: Kitchen) -> None:
    """GPT-2 stores its weights as (in, out)."""
    plan = kitchen.collect("regmean", offdiagonal=0.5)
    mixed = Materializer(plan.layout, kitchen.paths).materialize(plan)
    with safe_open(statistics_path(next(iter(plan.statistics.values()))["a"]), "pt") as file:
        turned = set(json.loads(file.metadata()["turned"]))
    assert bool(turned) == ("GPT2" in str(kitchen.model(0).__class__))
    both = [kitchen.found(plan, source) for source in range(2)]
    for name, each in mixed.items():
        own = [full[name] for full in kitchen.full]
        if name not in both[0]:
            near(each, (own[0].double() + 2 * own[1].double()) / 3, 1e-7)
            continue
        own = [weight.mT if name in turned else weight for weight in own]
        expected = regmean(own, [1.0, 2.0], statistics=[found[name] for found in both], offdiagonal=0.5)
        near(each, expected.mT if name in turned else expected, 1e-7)
        near(expected, least_squares(own, [found[name] for found in both]), 1e-6)


def least_squares(own: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    halved = [(g + torch.diag(g.diagonal())).double() / 2 for g in grams]
    return (own[0].double() @ halved[0] + 2 * own[1].double() @ halved[1]) @ torch.linalg.pinv(
        halved[0] + 2 * halved[1]
    )


@pytest.mark.parametrize("kitchen", ["BERT"], indirect=True)
def test_slices_find_their_statistics(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_soup.merging.to_memory._SLICE", 67)
    plan = kitchen.collect("fisher")
    mixed = Materializer(plan.layout, kitchen.paths).materialize(plan)
    both = [kitchen.found(plan, source) for source in range(2)]
    for name, each in mixed.items():
        own, seen = [full[name] for full in kitchen.full], [found[name] for found in both]
        assert torch.equal(each, fisher(own, [1.0, 2.0], statistics=seen).float())


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("kitchen", ["BERT"], indirect=True)
def test_threads_do_not_show(kitchen: Kitchen, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        plan = kitchen.collect(method)
        paths = [statistics_path(name) for names in plan.statistics.values() for name in names.values()]
        files.append([path.read_bytes() for path in paths])
        for path in paths:
            path.unlink()
    assert files[0] == files[1]


@pytest.mark.parametrize("kitchen", ["BERT"], indirect=True)
def test_what_is_known_is_not_asked_again(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content: of other rows, another number of them or another seed it is; what is cut off is made again."""
    plan = kitchen.collect("fisher")
    ((_, names),) = plan.statistics.items()
    others = [kitchen.collect("fisher", examples=3), kitchen.collect("regmean")]
    known = {name for each in others for names in each.statistics.values() for name in names.values()}
    assert len(known | {*names.values()}) == 6
    assert plan.fingerprint != kitchen.plan(method="fisher", parameters={"examples": ROWS}).fingerprint
    made: list[int] = []
    original = collecting._Pass.collect
    monkeypatch.setattr(
        collecting._Pass,
        "collect",
        lambda self, source, *rest: (made.append(next(iter(source.weights))), original(self, source, *rest)),
    )
    assert kitchen.collect("fisher") == plan
    assert made == []
    whole = statistics_path(names["b"]).read_bytes()
    statistics_path(names["b"]).write_bytes(whole[:-1])
    assert kitchen.collect("fisher") == plan
    assert made == [1]
    assert statistics_path(names["b"]).read_bytes() == whole


@pytest.mark.parametrize("kitchen", ["BERT"], indirect=True)
def test_a_file_that_is_gone_is_said(kitchen: Kitchen) -> None:
    plan = kitchen.collect("fisher")
    ((_, names),) = plan.statistics.items()
    statistics_path(names["a"]).unlink()
    with pytest.raises(MergeError, match="file of statistics in the cache is gone or damaged"):
        StatisticsStore(plan)
    (statistics_folder() / f"{names['a']}.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(MergeError, match="file of statistics in the cache is gone or damaged"):
        StatisticsStore(plan)


def test_what_is_not_finite_is_said(tmp_path: Path, family: Path) -> None:
    kitchen = a_kitchen("BERT", tmp_path, family / "rows.csv")
    tensors = kitchen.full[1]
    tensors["bert.pooler.dense.bias"][:] = 10.0
    tensors["classifier.weight"][:] = 3e38  # finite, but the sum of them is not
    path = kitchen.paths[1]["m"]
    data = path.read_bytes()
    save_file(tensors, path, {"format": "pt"})
    assert path.stat().st_size == len(data)
    with pytest.raises(ScoringError, match=r"What b shows of '.*' on the examples is not finite"):
        kitchen.collect("fisher")


def test_rows_are_drawn_and_batches_have_no_padding(tmp_path: Path, family: Path) -> None:
    inputs = a_kitchen("BERT", tmp_path, family / "rows.csv").inputs
    few, more = (inputs.drawn(count, 1).tolist() for count in (4, 8))
    assert set(few) < set(more)
    assert more == sorted(more) != list(range(8))
    assert inputs.drawn(1000, 1).tolist() == list(range(inputs.n))
    batches = inputs.alike(inputs.drawn(1000, 1))
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(inputs.n))
    assert all(len(batch) <= 5 and inputs.inputs.batch(batch)["attention_mask"].all() for batch in batches)
    assert max(map(len, batches)) > 1
    # Without a token for padding, as GPT-2, some models refuse more than one row, padded or not.
    inputs.inputs.tokenizer.pad_token = None
    assert {len(batch) for batch in inputs.alike(inputs.drawn(1000, 1))} == {1}
