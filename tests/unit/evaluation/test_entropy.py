"""Coefficients of task vectors, learned on real small models: their gradient, what they do, and that they stay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
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
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call

from hf_soup.checkpoint import RowRange, read_header
from hf_soup.errors import ScoringError
from hf_soup.evaluation import Calibration, Candidates, EvaluationData, gradients as descent
from hf_soup.evaluation.dataset import CalibrationDataset
from hf_soup.evaluation.entropy import EntropyLoss
from hf_soup.evaluation.model import build_model
from hf_soup.evaluation.preprocessing import prepare_calibration_dataset
from hf_soup.merging import Materializer, Plan, RunContext
from hf_soup.recipe import CalibrationData
from hf_soup.selection import Selected
from hf_soup.selection.entropy import entropy

TEXT: dict[str, Any] = {"vocab_size": 16, "id2label": {n: str(n) for n in range(3)}, "initializer_range": 0.3}
MADE: dict[str, Callable[[], Any]] = {
    "ViT": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(num_channels=1, id2label={n: str(n) for n in range(10)}, image_size=8, patch_size=2,
                               hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)),
    "BERT": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=24, max_position_embeddings=16)),
    "Mixtral": lambda: transformers.MixtralForSequenceClassification(
        transformers.MixtralConfig(**TEXT, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=8, num_key_value_heads=1, num_local_experts=4,
                                   max_position_embeddings=16, pad_token_id=0)),
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=24, max_position_embeddings=32, initializer_range=0.3)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


@dataclass
class Kitchen:
    """Two ingredients, their ancestor behind them, and examples."""

    folder: Path
    paths: list[dict[str, Path]]
    full: list[dict[str, Tensor]]
    inputs: CalibrationDataset
    weights: tuple[float, ...] = (1.0, 1.0)

    def plan(self, *, scale: float = 1.0, lost: bool = False, **more: Any) -> Plan:
        headers = []
        for each in self.paths:
            data = each["m"].read_bytes()
            headers.append({t.name: t for t in read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")})
        if lost:  # the first has no last rows of a tensor, and the ancestor no head
            words = "bert.embeddings.word_embeddings.weight"
            headers[0][words] = headers[0][words].moved([RowRange(0, 0, 9)], headers[1][words].shape[0])
            del headers[2]["classifier.weight"]
            more["patched"] = {words, "classifier.weight"}
        more |= {"method": "task_arithmetic", "parameters": {"scale": scale}, "with_base": True}
        return make_plan(["a", "b", "base"], headers, [*self.weights, 0.0], **more)

    def entropy(self, plan: Plan) -> EntropyLoss:
        return EntropyLoss(plan.layout, self.paths, plan.mixture.weights, self.calibration(), lambda steps: None)

    def calibration(self) -> Calibration:
        return Calibration(self.inputs, template_of(self.folder), 5)

    def learn(self, plan: Plan | None = None, seed: int = 5, **parameters: Any) -> tuple[Plan, Selected]:
        """The soup with what was learned, and that."""
        plan = plan or self.plan()
        context = RunContext()
        data = EvaluationData(template_of(self.folder), calibration=self.calibration())
        with (
            Candidates(plan.layout, self.paths, data, context) as candidates,
            candidates.entropy(plan.mixture.weights, 1) as objective,
        ):
            selected = entropy(plan.mixture.weights, objective, seed=seed, **parameters)
        mixture = replace(plan.mixture, tensor_weights=selected.tensor_weights)
        return replace(plan, mixture=mixture), selected

    def model(self, tensors: Mapping[str, Tensor]) -> Any:
        return build_model(config_of(self.folder), tensors, self.inputs.data.task, torch.float32)

    def merged(self, plan: Plan) -> dict[str, Tensor]:
        with closing(Materializer(plan.layout, self.paths)) as materializer:
            return materializer.materialize(plan)


def finish(folder: Path, models: list[Mapping[str, Tensor]], rows: Path, task: str) -> Kitchen:
    paths = []
    for number, tensors in enumerate(models):
        paths.append({"m": folder / f"{number}.safetensors"})
        save_file(dict(tensors), paths[-1]["m"])
    config = json.loads((folder / "config.json").read_text())
    examples = CalibrationData(task=task, dataset=str(rows), batch_size=16)
    inputs = prepare_calibration_dataset(examples, [], folder=folder, config=config, quiet=True)
    return Kitchen(folder, paths, [{k: v.float() for k, v in each.items()} for each in models], inputs)


def drawn(family: Path, place: Path, name: str, dtype: torch.dtype = torch.float32) -> Kitchen:
    """Models of random numbers, and texts."""
    torch.manual_seed(0)
    model = MADE[name]()
    model.save_pretrained(place)
    rows, task = family / "rows.csv", "text-classification"
    if name == "Llama":  # texts of several lengths, some of which it does not read to their end
        transformers.ByT5Tokenizer().save_pretrained(place)
        rows, task = place / "texts.jsonl", "causal-lm"
        lines = (family / "rows.csv").read_text().splitlines()[1:21]
        texts = ["", *(" ".join([each.split(",")[0]] * (1 + n % 3)) for n, each in enumerate(lines))]
        rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        transformers.BertTokenizer.from_pretrained(family / "base").save_pretrained(place)
    base = {key: each + 0.05 * torch.randn(each.shape) for key, each in load_file(place / "model.safetensors").items()}
    tuned = [{key: (each + 0.1 * torch.randn(each.shape)).to(dtype) for key, each in base.items()} for _ in range(2)]
    return finish(place, [*tuned, {key: each.to(dtype) for key, each in base.items()}], rows, task)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    """A model of digits and one of digits turned by a quarter, from one that knows both a little; and unseen ones."""
    place = tmp_path_factory.mktemp("tasks")
    digits = load_digits()
    # Every second one is turned.
    images = np.rint(digits.images * 15.9).astype(np.uint8)
    images[1::2] = np.rot90(images[1::2], axes=(1, 2))
    pictures, labels = torch.tensor(images / 255 * 2 - 1).float()[:, None], torch.tensor(digits.target)
    torch.manual_seed(0)
    model = MADE["ViT"]()

    def train(start: Mapping[str, Tensor], chosen: Tensor, steps: int, lr: float) -> dict[str, Tensor]:
        model.load_state_dict(start)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            batch = chosen[torch.randint(len(chosen), (64,), generator=generator)]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixel_values=pictures[batch]).logits, labels[batch]).backward()
            optimizer.step()
        return {name: each.clone() for name, each in model.state_dict().items()}

    seen = torch.arange(1200)
    base = train({k: v.clone() for k, v in model.state_dict().items()}, seen, 120, 2e-3)
    low, high = (train(base, part, 120, 1e-3) for part in (seen[::2], seen[1::2]))
    models = []
    for each in (low, high, base):
        model.load_state_dict(each)
        model.save_pretrained(place)
        models.append(load_file(place / "model.safetensors"))
    image = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "image_mean": [0.5], "image_std": [0.5]}
    (place / "preprocessor_config.json").write_text(json.dumps(image))
    rows = [Image.fromarray(each) for each in images[1200:]]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(place / "digits.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(place / "home"))
        kitchen = finish(place, models, place / "digits.parquet", "image-classification")
        kitchen.pictures, kitchen.labels = pictures[1200:], labels[1200:]  # type: ignore[attr-defined]
        yield kitchen


def judged(kitchen: Any, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
    """The accuracy and the mean entropy on the examples."""
    with torch.no_grad():
        logits = kitchen.model(tensors)(pixel_values=kitchen.pictures).logits
    logs = logits.log_softmax(-1)
    return float((logits.argmax(-1) == kitchen.labels).double().mean()), float(-(logs.exp() * logs).sum(-1).mean())


def far(found: Any, expected: Any) -> float:
    """Relative distance."""
    return float(np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected))


def some_coefficients(loss: EntropyLoss) -> Any:
    return np.random.default_rng(0).uniform(0.1, 0.9, (len(loss.tensors), 2))


def by_autograd(kitchen: Kitchen, loss: EntropyLoss, coefficients: Tensor) -> Tensor:
    """The entropy, as a function of coefficients; task vectors are added in float64, and the model is in float32."""
    there = dict(loss._model.named_parameters())
    *tuned, base = kitchen.full
    model, weights = kitchen.model(base), torch.tensor(kitchen.weights)
    inside = {name: key for key, each in model.named_parameters() for name in base if torch.equal(each, base[name])}
    made = {}
    for name, row in zip(loss.tensors, coefficients, strict=True):
        deltas = torch.stack([each[name].double() - base[name].double() for each in tuned])
        mixed = (base[name].double() + torch.tensordot(weights * row, deltas, 1)).float()
        here = there[inside[name]].detach()
        torch.testing.assert_close(here, mixed, rtol=1e-6, atol=1e-7)
        made[inside[name]] = here + (mixed - mixed.detach())  # to the last bit where the other gradient is taken
    batches = [kitchen.inputs.inputs.batch(np.array([row])) for row in range(kitchen.inputs.n)]
    answers = [functional_call(model, made, kwargs=batch).logits[0] for batch in batches]
    logs = torch.cat([each.reshape(-1, each.shape[-1]) for each in answers]).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


@pytest.mark.parametrize(
    ("name", "dtype"), [("BERT", torch.float32), ("BERT", torch.bfloat16), ("Llama", torch.float32)], ids=str
)
def test_the_gradient_is_autograds(family: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Of texts it is the mean over tokens, of those that a model reads."""
    kitchen = drawn(family, tmp_path, name, dtype)
    kitchen.weights = (1.0, 0.5)
    loss = kitchen.entropy(kitchen.plan())
    assert set(loss.tensors) == kitchen.full[0].keys()
    given = some_coefficients(loss)
    loss.gradient(np.full_like(given, 0.3), np.arange(5))  # leaves nothing behind
    value, slopes = loss.gradient(given, np.arange(kitchen.inputs.n))
    asked = torch.tensor(given).requires_grad_()
    expected = by_autograd(kitchen, loss, asked)
    expected.backward()
    assert asked.grad is not None
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert loss.mean(given, np.arange(kitchen.inputs.n)) == pytest.approx(value, rel=1e-6)
    assert far(slopes, asked.grad.numpy()) < 1e-6
    loss.close()


def test_the_gradient_of_tensors_that_are_stacked_in_memory(family: Path, tmp_path: Path) -> None:
    """By differences of the entropy along each ingredient: experts lie on the disk one by one."""
    kitchen = drawn(family, tmp_path, "Mixtral")
    loss = kitchen.entropy(kitchen.plan())
    given, rows = some_coefficients(loss), np.arange(kitchen.inputs.n)
    assert any(".experts." in name for name in loss.tensors)
    _, slopes = loss.gradient(given, rows)
    for column in range(2):
        step = np.zeros_like(given)
        step[:, column] = 1e-2
        there, back = loss.mean(given + step, rows), loss.mean(given - step, rows)
        assert slopes[:, column].sum() == pytest.approx((there - back) / 2e-2, rel=2e-2)


def test_what_not_all_have_is_averaged_and_moves_nothing(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the merge: the model that is learned with is the one that is written; slices cut across rows."""
    monkeypatch.setattr(descent, "SLICE_ELEMENTS", 137)
    kitchen = drawn(family, tmp_path, "BERT")
    kitchen.weights = (1.0, 2.0)
    plan = kitchen.plan(lost=True)
    loss = kitchen.entropy(plan)
    given, rows = some_coefficients(loss), np.arange(kitchen.inputs.n)
    _, slopes = loss.gradient(given, rows)
    at = {name: row for row, name in enumerate(loss.tensors)}
    assert not slopes[at["classifier.weight"]].any()  # the ancestor has none
    words = at["bert.embeddings.word_embeddings.weight"]
    for row, column in ((words, 0), (words, 1), (at["classifier.bias"], 1)):
        step = np.zeros_like(given)
        step[row, column] = 1e-2
        there, back = loss.mean(given + step, rows), loss.mean(given - step, rows)
        assert slopes[row, column] == pytest.approx((there - back) / 2e-2, rel=2e-2, abs=1e-6)
    plan, selected = kitchen.learn(plan, steps=2, lr=0.1)
    values = np.array([selected.tensor_weights[name] for name in loss.tensors]) / np.array(kitchen.weights)
    loss.mean(values, rows[:1])
    merged = kitchen.model(kitchen.merged(plan)).state_dict()
    for name, each in loss._model.state_dict().items():
        torch.testing.assert_close(each, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["tensor", "ingredient"])
def test_the_mix_gets_surer_of_examples_that_it_has_not_seen(tasks: Kitchen, by: str) -> None:
    """Than task arithmetic at 0.3, from where it starts; and at no step it is no other than that."""
    plan, selected = tasks.learn(by=by, steps=20, lr=0.04, examples=200)
    values = np.array(list(selected.tensor_weights.values()))
    assert ((values >= 0) & (values <= 1)).all()
    assert len(set(values[:, 0])) > 10 if by == "tensor" else len(set(values[:, 0])) == 1
    start = tasks.merged(tasks.plan(scale=0.3))
    before, after = judged(tasks, start)[1], judged(tasks, tasks.merged(plan))[1]
    assert after < 0.95 * before
    (note,) = selected.notes
    first, last = map(float, re.findall(r"was ([\d.]+) where they began, and is ([\d.]+)\.", note)[0])
    assert last < 0.95 * first
    still = tasks.merged(tasks.learn(by=by, steps=1, lr=1e-9)[0])
    assert all(torch.allclose(each, start[name], atol=1e-6) for name, each in still.items())


def test_the_same_bits_whatever_the_threads_and_others_by_other_parameters(tasks: Kitchen) -> None:
    few = {"steps": 3, "lr": 0.1}
    _, first = tasks.learn(**few)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tasks.learn(**few)[1] == first
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    others = [tasks.learn(seed=6, **few), tasks.learn(steps=2, lr=0.1), tasks.learn(init=0.2, **few)]
    others.append(replace(tasks, weights=(1.0, 2.0)).learn(**few))
    assert len({json.dumps(each.tensor_weights) for each in (first, *(other for _, other in others))}) == 5


def test_what_is_not_finite_is_said(family: Path, tmp_path: Path) -> None:
    kitchen = drawn(family, tmp_path, "BERT")
    tensors = kitchen.full[1]
    tensors["bert.pooler.dense.bias"][:] = 10.0
    tensors["classifier.weight"][:] = 3e38
    save_file(tensors, kitchen.paths[1]["m"])
    with pytest.raises(ScoringError, match=r"The entropy of .*'rows.csv' is nan in step 0, .* coefficients 0.3, 0.3"):
        kitchen.learn(steps=1)
