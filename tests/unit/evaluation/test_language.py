"""Likelihoods of texts: those of lm-evaluation-harness, in windows, in any batches; and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from plans import make_plan
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_soup import ResolveError, ScoringError
from hf_soup.checkpoint import read_header
from hf_soup.evaluation.choices import CHOICE_METRICS, ChoiceDataset
from hf_soup.evaluation.gradients import ValidationLoss
from hf_soup.evaluation.language import LanguageDataset
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.recipe import Scoring

PAGES = [" ".join(text.split()) for text in topics.topics.values()]
#: Of every length around that of a window, none, letters of several bytes, and one that begins as the tokenizer does.
TEXTS = [
    *(page[:length] for page, length in zip(PAGES, [1, 10, 62, 63, 64, 65, 66, 127, 128, 129, 200, 500], strict=False)),
    "", "日本語 é", "<s>" + PAGES[20][:50],
]  # fmt: skip


def byte_llama(folder: Path) -> LlamaForCausalLM:
    """With a tokenizer of bytes, which ends texts and begins them with nothing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return model


def word_gpt(folder: Path, **tokens: str) -> GPT2LMHeadModel:
    """With a tokenizer of pieces of words, which begins texts, as that of a Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(PAGES[30:60], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=401, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(folder)
    return model


MODELS: dict[str, Callable[[Path], Any]] = {
    "bytes": byte_llama,
    "words": lambda folder: word_gpt(folder, bos_token="<s>", eos_token="</s>"),
}


@pytest.fixture(scope="module", params=MODELS)
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model in eval mode, and its folder."""
    folder = tmp_path_factory.mktemp("language")
    return MODELS[request.param](folder).eval(), folder


def bench_of(folder: Path, texts: list[Any], tmp_path: Path, **more: Any) -> LanguageDataset:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    scoring = Scoring.model_validate({"task": "causal-lm", "dataset": str(file), **more})
    config = json.loads((folder / "config.json").read_text())
    (bench,) = prepare_datasets([("validation", scoring)], folder=folder, config=config, quiet=True)
    assert isinstance(bench, LanguageDataset)
    return bench


def test_likelihoods_are_those_of_the_harness(language: tuple[Any, Path], tmp_path: Path) -> None:
    """To a millionth, text by text; and so are bits per byte."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model, folder = language
    bench = bench_of(folder, TEXTS, tmp_path)
    found = bench.outputs(model)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), backend="causal", device="cpu")
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(TEXTS)]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert theirs.max_length == bench.longest < 128, "some texts take several windows"
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    sizes = [len(text.encode()) for text in TEXTS]
    assert bench.score(found).value == pytest.approx(bits_per_byte(list(zip(expected, sizes, strict=True))), rel=1e-6)


def test_they_are_the_same_in_any_batches_and_threads(language: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = language
    bench, done = bench_of(folder, TEXTS, tmp_path), []
    found = bench.outputs(model, progress=done.append)
    assert (found.dtype, found.shape, sum(done)) == (np.float64, (len(TEXTS),), bench.steps)
    assert bench.fits(found)
    for size in (1, 3):
        other = replace(bench, scoring=bench.scoring.model_copy(update={"batch_size": size}))
        np.testing.assert_allclose(other.outputs(model), found, rtol=1e-6, atol=1e-5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert np.array_equal(bench.outputs(model), found)
    finally:
        torch.set_num_threads(threads)


def test_logits_of_a_batch_have_a_bound(
    language: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary may have a quarter of a million tokens, and a batch 32 windows of thousands."""
    model, folder = language
    bench, shapes = bench_of(folder, TEXTS, tmp_path), []
    most = 4 * 2 * bench.longest * bench.vocabulary
    monkeypatch.setattr("hf_soup.evaluation.inputs._LOGIT_BYTES", most)
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, input_ids: (shapes.append(input_ids.shape), forward(self, input_ids))[1]
    )
    bench.outputs(model)
    assert max(rows * tokens for rows, tokens in shapes) * 4 * bench.vocabulary <= most
    assert max(rows for rows, _ in shapes) > 2, "short windows are more"


def test_metrics_and_their_intervals(language: tuple[Any, Path], tmp_path: Path) -> None:
    """Sums over texts by sums of their sizes, also where texts are drawn again; empty ones count for nothing."""
    model, folder = language
    bench = bench_of(folder, TEXTS, tmp_path)
    found, (size, tokens) = bench.outputs(model), bench.sizes.T
    assert size.tolist() == [len(text.encode()) for text in TEXTS]
    for metric, expected in (
        ("bits_per_byte", -found.sum() / size.sum() / np.log(2)),
        ("nll", -found.sum() / tokens.sum()),
        ("perplexity", np.exp(-found.sum() / tokens.sum())),
    ):
        other = replace(bench, scoring=bench.scoring.model_copy(update={"metric": metric}))
        score = other.score(found)
        assert score.value == pytest.approx(expected, rel=1e-12)
        assert (score.n, score.share, score.less_is_better) == (len(TEXTS), False, True)
        assert score.low < score.value < score.high
        assert other.judge(found) == -score.value
        assert other.judge(found, np.array([1, 2])) == pytest.approx(-replace_rows(other, found, [1, 2]), rel=1e-12)
        draws = other.resampled(found)
        assert draws.shape == (500,)
        assert np.quantile(-draws, [0.025, 0.975]) == pytest.approx([score.low, score.high], rel=0.05)
        better = other.compare(found * 0.9, found)
        assert better.sentence.startswith("better by ")
        assert better.difference == pytest.approx(score.value - other.score(found * 0.9).value)
        assert other.compare(found, found * 0.9).sentence.startswith("worse by ")
        assert other.compare(found, found).sentence == f"no difference can be seen with n = {len(TEXTS)}"


def test_values_of_texts_have_the_metric_as_their_mean(tmp_path: Path) -> None:
    byte_llama(tmp_path)
    for metric in ("bits_per_byte", "nll"):
        bench = bench_of(tmp_path, TEXTS, tmp_path, metric=metric)
        outputs = -bench.sizes[:, 1] * np.linspace(1, 3, len(TEXTS))
        values = bench.row_values(outputs)
        assert values is not None
        assert float(values.mean()) == pytest.approx(bench.judge(outputs))
    assert bench_of(tmp_path, TEXTS, tmp_path, metric="perplexity").row_values(outputs) is None


def test_a_draw_of_empty_texts_alone_is_a_number(tmp_path: Path) -> None:
    """Of two texts one is empty, so every fourth draw has no byte."""
    model = word_gpt(tmp_path, eos_token="</s>").eval()
    bench = bench_of(tmp_path, ["", "one text"], tmp_path)
    score = bench.score(found := bench.outputs(model))
    assert np.isfinite([score.low, score.high, *bench.resampled(found)]).all()


def replace_rows(bench: LanguageDataset, outputs: Any, rows: list[int]) -> float:
    """The metric of some texts alone, by its definition."""
    size, tokens = bench.sizes[rows].sum(axis=0)
    nats = -float(outputs[rows].sum())
    by_token = nats / tokens
    return {"bits_per_byte": nats / size / np.log(2), "nll": by_token, "perplexity": np.exp(by_token)}[
        bench.scoring.metric
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "accuracy"}, "`task: causal-lm` has no metric 'accuracy'.\nIt has bits_per_byte, nll, perplexity."),
        ({"labels": ["a", "b"]}, "`task: causal-lm` does not look at `labels`"),
        ({"label_column": "text"}, "`task: causal-lm` does not look at `label_column`"),
        ({"input_columns": ["words"]}, "none of the columns that can be `input_columns` (words); its columns are text"),
        ({"input_columns": ["text", "text"]}, "has 2 `input_columns`; 'causal-lm' reads 1"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    byte_llama(tmp_path)
    with pytest.raises((ScoringError, ResolveError)) as raised:
        bench_of(tmp_path, ["one", "two"], tmp_path, **changes)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["one", None], "Cannot read row 1 of texts.jsonl (text): None where a text, or a list of messages"),
        (["", ""], "All 2 texts of texts.jsonl are empty."),
    ],
)
def test_rows_that_are_no_texts(tmp_path: Path, texts: list[Any], said: str) -> None:
    word_gpt(tmp_path, eos_token="</s>")
    with pytest.raises(ScoringError) as raised:
        bench_of(tmp_path, texts, tmp_path)
    assert said in str(raised.value)


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    word_gpt(tmp_path)
    with pytest.raises(ScoringError, match="no token that begins or ends texts"):
        bench_of(tmp_path, ["one"], tmp_path)
    word_gpt(tmp_path, eos_token="</s>")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    with pytest.raises(ScoringError, match=r"gives token \d+ on texts.jsonl, and the model has 20 tokens"):
        bench_of(tmp_path, ["one"], tmp_path)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"max_position_embeddings": -1}, 32),  # the tokenizer's word
        ({"max_position_embeddings": 0}, 32),
        ({"max_position_embeddings": 10**12}, 32),
        ({"max_position_embeddings": 16}, 16),
        ({"text_config": ["none"], "n_positions": 8}, 8),
        ({"text_config": {"n_positions": 8, "vocab_size": 384}, "n_positions": 16}, 8),
    ],
)
def test_what_a_strangers_config_says_ends_nothing(tmp_path: Path, changes: dict[str, Any], longest: int) -> None:
    """A model that reads less than no token would be cut into windows for ever."""
    byte_llama(tmp_path)
    ByT5Tokenizer(model_max_length=32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    bench = bench_of(tmp_path, [PAGES[0][:200]], tmp_path)
    assert bench.longest == longest
    assert bench.windows[:, 3].sum() == bench.sizes[:, 1].sum(), "each token is predicted once"


def test_a_model_that_finds_a_text_impossible(tmp_path: Path) -> None:
    model = byte_llama(tmp_path).eval()
    bench = bench_of(tmp_path, ["one", "two"], tmp_path)
    with torch.no_grad():
        model.lm_head.weight[200].fill_(float("nan"))
    with pytest.raises(ScoringError, match=r"log-likelihood of row 0 of 'texts.jsonl' is nan"):
        bench.outputs(model)


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("not enough memory: you tried to allocate memory"),
    ],
    ids=["GPU", "CPU"],
)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A Llama that has room for three rows at a time, and the sizes of the batches that it was given."""
    sizes: list[int] = []
    forward = LlamaForCausalLM.forward

    def narrow(self: Any, input_ids: Any, **more: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise request.param
        return forward(self, input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", narrow)
    return sizes


def test_batches_that_do_not_fit_are_halved_and_that_is_said_once(
    small: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = byte_llama(tmp_path)
    bench, done = bench_of(tmp_path, TEXTS, tmp_path, batch_size=16), []
    found = bench.outputs(model, progress=done.append)
    assert sum(done) == bench.steps
    assert max(small) > 3
    expected = replace(bench, scoring=bench.scoring.model_copy(update={"batch_size": 1})).outputs(model)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    small.clear()
    assert np.array_equal(bench.outputs(model), found)
    assert max(small) <= 3, "known from the model before"
    said = [record.message for record in caplog.records if "memory" in record.message]
    assert said == ["texts.jsonl bits_per_byte: 16 rows together do not fit the memory; fewer are taken."]


def test_learning_goes_on_in_smaller_batches(
    small: list[int], llamas: tuple[Path, list[dict[str, Any]], Any], tmp_path: Path
) -> None:
    folder, _, _ = llamas
    benches = [bench_of(folder, TEXTS, tmp_path, batch_size=8), choices_of(folder, plain(), tmp_path, batch_size=8)]
    shares, rows = np.array([[0.5, 0.3, 0.2]]), np.arange(len(TEXTS))
    found = objective_of(llamas, benches[:1]).gradient(shares, 1.0, rows)
    assert max(small) > 3
    one = [replace(bench, scoring=bench.scoring.model_copy(update={"batch_size": 1})) for bench in benches]
    expected = objective_of(llamas, one[:1]).gradient(shares, 1.0, rows)
    assert found[0] == pytest.approx(expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    # The choices of one question go together, and four are too many here.
    with pytest.raises(ScoringError, match=r"The model cannot learn from 'questions.jsonl accuracy'.*memory"):
        objective_of(llamas, benches[1:]).loss(shares, np.arange(len(QUESTIONS)))


# ---- conversations ----------------------------------------------------------------------------------------------

#: As that of SmolLM or Qwen: `generation` marks, for transformers itself, what the answers are.
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
#: One that leaves the thoughts of earlier answers out, and asks for an answer otherwise than it begins one.
FORGETFUL = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.thoughts and loop.last %}{{ message.thoughts }}"
    "{% endif %}{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": PAGES[3][:20]}, {"role": "assistant", "content": PAGES[4][:90]}],
    [
        {"role": "system", "content": "Answer in short."},
        {"role": "user", "content": PAGES[6][:30]},
        {"role": "assistant", "content": "Yes. é", "thoughts": "hm"},
        {"role": "user", "content": "And " + PAGES[7][:15]},
        {"role": "assistant", "content": PAGES[8][:25], "thoughts": "well"},
    ],
    [{"role": "user", "content": "Nobody answers"}],
]


@pytest.fixture
def chatty(tmp_path: Path) -> tuple[Any, Any]:
    """A model of pieces of words with 256 places, and its tokenizer, which has a template."""
    word_gpt(tmp_path, bos_token="<s>", eos_token="</s>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=401, n_embd=32, n_layer=2, n_head=2, n_positions=256)).eval()
    model.save_pretrained(tmp_path)
    return model, tokenizer


def chats_of(folder: Path, **more: Any) -> LanguageDataset:
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    scoring = Scoring.model_validate({"task": "causal-lm", "dataset": str(folder / "chats.jsonl"), **more})
    config = json.loads((folder / "config.json").read_text())
    (bench,) = prepare_datasets([("validation", scoring)], folder=folder, config=config, quiet=True)
    assert isinstance(bench, LanguageDataset)
    return bench


def by_labels(model: Any, tokens: list[int], counted: list[int]) -> float:
    """The log-likelihood of some tokens, by the model's own loss."""
    labels = [number if counts else -100 for number, counts in zip(tokens, counted, strict=True)]
    with torch.no_grad():
        loss = model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss
    return -float(loss) * sum(counted[1:]) if sum(counted[1:]) else 0.0


def test_conversations_are_rendered_by_the_template(chatty: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = chatty
    bench = chats_of(tmp_path)
    found = bench.outputs(model)
    for chat, value, (size, count) in zip(CHATS, found, bench.sizes.tolist(), strict=True):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        tokens = [0, *tokenizer.encode(text, add_special_tokens=False)]
        assert (size, count) == (len(text.encode()), len(tokens) - 1)
        assert value == pytest.approx(by_labels(model, tokens, [1] * len(tokens)), rel=1e-5)


def test_answers_alone_are_counted(chatty: tuple[Any, Any], tmp_path: Path) -> None:
    """The tokens that transformers' own mask has, in one pass over a conversation, and the line's end behind each."""
    model, tokenizer = chatty
    bench = chats_of(tmp_path, assistant_only=True)
    found = bench.outputs(model)
    assert len(bench.windows) == 2, "nothing is run where nobody answers, and two answers in one pass"
    for chat, value, (size, count) in zip(CHATS, found, bench.sizes.tolist(), strict=True):
        given = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        tokens, counted = given["input_ids"], given["assistant_masks"]
        for place in range(len(counted) - 1, 0, -1):
            if counted[place - 1] and not counted[place]:
                counted[place] = 1  # the template ends the line behind its mark
        assert count == sum(counted)
        assert size == sum(len(f"{each['content']}</s>\n".encode()) for each in chat if each["role"] == "assistant")
        assert value == pytest.approx(by_labels(model, tokens, counted), rel=1e-5)
    value = bench.score(found).value
    assert value == pytest.approx(-found.sum() / bench.sizes[:, 0].sum() / np.log(2))
    every = np.arange(2)  # learning looks at the same
    losses = [
        bench.row_losses(*bench.by_row(bench.read(model(**bench.batch(numbers)), numbers), numbers))
        @ torch.from_numpy(bench.row_weights[bench.windows[numbers, 0]])
        for numbers in bench.batches(every)
    ]
    assert float(sum(losses).detach()) == pytest.approx(-found.sum() / bench.sizes[:, 1].sum())  # type: ignore[union-attr]


def test_an_answer_that_nothing_stands_before_follows_the_token_that_ends_texts(
    chatty: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none begins them. Elsewhere nothing is added to what the template shows."""
    model, tokenizer = chatty
    tokenizer.bos_token = None
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(globals(), "CHATS", [CHATS[0], CHATS[0][1:]])
    bench = chats_of(tmp_path, assistant_only=True)
    end, answer = tokenizer.eos_token_id, f"{CHATS[0][1]['content']}</s>"
    question, said = (tokenizer.encode(text, add_special_tokens=False) for text in (f"{PAGES[3][:20]}</s>", answer))
    rows = [row[0].tolist() for row in bench.encoded.rows(bench.kept)]
    assert rows == [[*question, *said], [end, *said]]
    expected = [by_labels(model, row, [0] * (len(row) - len(said)) + [1] * len(said)) for row in rows]
    assert bench.outputs(model) == pytest.approx(expected, rel=1e-5)


def test_answers_whose_conversation_goes_on_otherwise(chatty: tuple[Any, Any], tmp_path: Path) -> None:
    """Each is read after what its template shows when it is asked for, as the model sees it."""
    model, tokenizer = chatty
    tokenizer.chat_template = FORGETFUL
    tokenizer.save_pretrained(tmp_path)
    bench = chats_of(tmp_path, assistant_only=True)
    found, chat = bench.outputs(model), CHATS[1]
    assert len(bench.windows) == 3
    expected = 0.0
    for length, answer in ((3, "hmYes. é</s>"), (5, f"well{CHATS[1][4]['content']}</s>")):
        before = tokenizer.apply_chat_template(chat[:length], tokenize=False).removesuffix(answer)
        assert before.endswith("<|assistant|>")
        tokens = tokenizer.encode(before + answer, add_special_tokens=False)
        context = len(tokenizer.encode(before, add_special_tokens=False))
        expected += by_labels(model, tokens, [int(place >= context) for place in range(len(tokens))])
    assert found[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("template", "chats", "more", "said"),
    [
        (None, CHATS, {}, "Cannot read row 0 of chats.jsonl (messages): the donor's tokenizer has no chat template"),
        ("{{ raise_exception('no system') }}", CHATS, {}, "the donor's chat template fails: no system"),
        (TEMPLATE, [[{"from": "human", "value": "Hi"}]], {}, "where a text, or a list of messages with"),
        (TEMPLATE, [CHATS[2]], {"assistant_only": True}, "chats.jsonl are conversations without an answer"),
        (TEMPLATE, ["one text"], {"assistant_only": True}, "'one text' where a list of messages"),
    ],
    ids=["no template", "one that fails", "other keys", "no answer", "a text"],
)  # fmt: skip
def test_conversations_that_cannot_be_read(
    chatty: tuple[Any, Any], tmp_path: Path, template: str | None, chats: list[Any], more: dict[str, Any], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, tokenizer = chatty
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(f"{__name__}.CHATS", chats)
    with pytest.raises(ScoringError) as raised:
        chats_of(tmp_path, **more)
    assert said in str(raised.value)


def test_answers_are_of_conversations_alone() -> None:
    with pytest.raises(ValueError, match="`assistant_only` is for conversations, which `causal-lm` reads"):
        Scoring.model_validate({"task": "multiple-choice-lm", "dataset": "acme/questions", "assistant_only": True})


# ---- questions with choices --------------------------------------------------------------------------------------

#: Numbers of choices and of words that differ, a space at the end, a question that is too long, and one that is none.
QUESTIONS: list[tuple[str, list[str], Any]] = [
    ("Where does a function begin?", ["def", "a class statement", "import"], 0),
    ("Which of them is a loop ", ["for", "with"], 1),
    (PAGES[5][:300] + " Is it so?", ["yes", "no", "maybe", "nobody knows"], 3),
    ("", ["one", "three"], 1),
    ("日本語?", ["é", "ü ö"], 0),
]


def choices_of(folder: Path, rows: list[dict[str, Any]], tmp_path: Path, **more: Any) -> ChoiceDataset:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    scoring = Scoring.model_validate({"task": "multiple-choice-lm", "dataset": str(file), **more})
    config = json.loads((folder / "config.json").read_text())
    (bench,) = prepare_datasets([("validation", scoring)], folder=folder, config=config, quiet=True)
    assert isinstance(bench, ChoiceDataset)
    return bench


def plain(label: Callable[[int], Any] = int) -> list[dict[str, Any]]:
    return [{"question": question, "choices": choices, "label": label(right)} for question, choices, right in QUESTIONS]


def test_choices_are_those_of_the_harness(language: tuple[Any, Path], tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model, folder = language
    bench = choices_of(folder, plain(), tmp_path)
    found = bench.outputs(model)
    assert found.shape == (5, 4)
    assert np.array_equal(np.isfinite(found), [[number < len(each) for number in range(4)] for _, each, _ in QUESTIONS])
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), backend="causal", device="cpu")
    pairs = [(question, f" {choice}") for question, choices, _ in QUESTIONS for choice in choices]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    expected = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    np.testing.assert_allclose(found[np.isfinite(found)], expected, rtol=1e-6, atol=1e-5)
    lists = iter(expected)
    own = [np.array([next(lists) for _ in choices]) for _, choices, _ in QUESTIONS]
    lengths = [np.array([len(choice) for choice in choices]) for _, choices, _ in QUESTIONS]
    right = np.array([label for *_, label in QUESTIONS])
    by_length = replace(bench, scoring=bench.scoring.model_copy(update={"metric": "accuracy_by_length"}))
    acc = np.array([each.argmax() for each in own]) == right
    acc_norm = np.array([(each / length).argmax() for each, length in zip(own, lengths, strict=True)]) == right
    for measured, correct in ((bench, acc), (by_length, acc_norm)):
        score = measured.score(found)
        assert (score.value, score.n, score.share) == (correct.mean(), 5, True)
        assert score.low <= score.value <= score.high
        assert measured.judge(measured.answers(found)) == correct.mean()
        assert measured.judge(measured.answers(found), np.array([0, 3])) == correct[[0, 3]].mean()
        assert measured.resampled(found).shape == (500,)
    assert bench.fits(found)
    assert not bench.fits(np.where(np.isfinite(found), found, 0.0))


def test_a_choice_that_is_longer_than_the_model_is_an_error(tmp_path: Path) -> None:
    byte_llama(tmp_path)
    rows = [*plain(), {"question": "Which?", "choices": ["yes", PAGES[3][:80]], "label": 0}]
    with pytest.raises(
        ScoringError, match=r"A choice of row 5 of .*questions.jsonl.* has 81 tokens, and the model reads 64"
    ):
        choices_of(tmp_path, rows, tmp_path)


def test_two_models_are_compared_by_who_is_right(tmp_path: Path) -> None:
    byte_llama(tmp_path)
    rows = [{"question": f"{number}?", "choices": ["a", "b"], "label": number % 2} for number in range(40)]
    bench = choices_of(tmp_path, rows, tmp_path)
    good = np.where(np.arange(2) == bench.references[:, None], -1.0, -2.0)
    found = bench.compare(good, good[:, ::-1])
    assert found.sentence.startswith("better by 100.0 points")
    assert bench.compare(good, good).sentence == "no difference can be seen with n = 40"


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (plain(str), {}),
        (plain(lambda number: "ABCD"[number]), {}),
        ([{"ctx": q, "endings": each, "gold": each[right]} for q, each, right in QUESTIONS], {}),
        (
            [
                {
                    "question": q,
                    "choices": {"text": each, "label": list("1234")[: len(each)]},
                    "answerKey": str(right + 1),
                }
                for q, each, right in QUESTIONS
            ],
            {},
        ),
        (
            [{"q": q, "one": each[0], "two": each[-1], "which": int(right > 0)} for q, each, right in QUESTIONS],
            {"input_columns": ["q", "one", "two"], "label_column": "which"},
        ),
    ],
    ids=["digits", "letters", "texts", "names", "columns"],
)
def test_data_are_laid_out_in_many_ways(tmp_path: Path, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    byte_llama(tmp_path)
    bench = choices_of(tmp_path, rows, tmp_path, **more)
    expected = [int(right > 0) if more else right for *_, right in QUESTIONS]
    assert bench.references.tolist() == expected
    lengths = [[len(choice) for choice in ([each[0], each[-1]] if more else each)] for _, each, _ in QUESTIONS]
    assert [[int(each) for each in row if each] for row in bench.lengths] == lengths


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ({"label": 2}, {}, "Row 1 of questions.jsonl has 2 as 'label', which is none of its 2 choices."),
        ({"label": "C"}, {}, "has 'C' as 'label', which is none"),
        ({"choices": ["1", "2"], "label": "1"}, {}, "has '1' as 'label', which may be two of its 2 choices."),
        ({"choices": ["B", "A"], "label": "A"}, {}, "has 'A' as 'label', which may be two of its 2 choices."),
        ({"label": True}, {}, "which is none of its 2 choices"),
        ({"choices": ["yes"], "label": 0}, {}, "the choices ['yes']; there should be two or more"),
        ({"choices": ["yes", ""]}, {}, "the choices ['yes', '']; there should be two or more, and none empty"),
        ({"choices": ["yes", None]}, {}, "None where a text should be"),
        ({}, {"metric": "f1"}, "has no metric 'f1'.\nIt has accuracy, accuracy_by_length."),
        ({}, {"labels": ["yes", "no"]}, "`task: multiple-choice-lm` does not look at `labels`"),
        ({}, {"label_column": "right"}, "no column that says which choice is right; its columns are question, choices"),
        ({}, {"input_columns": ["question"]}, "reads a question and its choices, and 'question' is one column"),
    ],
)
def test_questions_that_cannot_be_asked(tmp_path: Path, row: dict[str, Any], more: dict[str, Any], said: str) -> None:
    byte_llama(tmp_path)
    first = {"question": "Is it?", "choices": ["yes", "no"], "label": type(row.get("label", 0))(0)}
    with pytest.raises(ScoringError) as raised:
        choices_of(tmp_path, [first, {**first, **row}], tmp_path, **more)
    assert said in str(raised.value)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Any]:
    """A folder with a tokenizer, tensors of three byte-level models and the layout of their files."""
    folder = tmp_path_factory.mktemp("llamas")
    byte_llama(folder)
    tensors, headers = [], []
    for number in range(3):
        torch.manual_seed(number)
        first = load_file(folder / "model.safetensors")
        tensors.append({name: each + 0.1 * torch.rand(each.shape) for name, each in first.items()})
        save_file(tensors[-1], folder / f"{number}.safetensors")
        data = (folder / f"{number}.safetensors").read_bytes()
        found = read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")
        headers.append({each.name: each for each in found})
    return folder, tensors, make_plan(["a", "b", "c"], headers, [1.0] * 3).layout


def objective_of(llamas: tuple[Path, list[dict[str, Any]], Any], benches: list[Any], **more: Any) -> ValidationLoss:
    folder, _, layout = llamas
    paths = [{"m": folder / f"{number}.safetensors"} for number in range(3)]
    config = json.loads((folder / "config.json").read_text())
    return ValidationLoss(layout, paths, {name: {name: 1.0} for name in "abc"}, config, benches, **more)


def test_the_gradient_of_texts_and_choices_is_autograds(
    llamas: tuple[Path, list[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """Texts of many windows, an empty one, and questions with other numbers of choices; with a weight for each."""
    folder, tensors, _ = llamas
    texts = bench_of(folder, TEXTS, tmp_path, weight=3.0)
    asked = [choices_of(folder, plain(), tmp_path, metric=metric, batch_size=4) for metric in CHOICE_METRICS]
    model = LlamaForCausalLM.from_pretrained(folder)
    shares = torch.tensor([0.5, 0.7, -0.2], requires_grad=True)
    beta = torch.tensor(1.5, requires_grad=True)
    mixed = {
        name: sum((share * own[name] for share, own in zip(shares, tensors, strict=True)), torch.zeros(()))
        for name in tensors[0]
    }

    def likelihoods(bench: Any) -> list[list[torch.Tensor]]:
        """By row and window."""
        found: list[list[torch.Tensor]] = [[] for _ in bench.kept]
        for row, first, last, predicted in bench.windows.tolist():
            tokens = torch.from_numpy(bench.encoded.rows(bench.kept[[row]])[0][0, first : last + 1].astype(np.int64))
            logits = torch.func.functional_call(model, mixed, (tokens[None, :-1],)).logits[0, -predicted:]
            found[row].append(-torch.nn.functional.cross_entropy(logits, tokens[-predicted:], reduction="sum"))
        return found

    losses = [-sum(sum(row) for row in likelihoods(texts)) / int(texts.sizes[:, 1].sum())]  # type: ignore[misc]
    for bench in asked:
        by = bench.lengths if bench is asked[1] else np.ones_like(bench.lengths)
        of_rows = [
            torch.nn.functional.cross_entropy(
                beta * torch.stack([value / by[row, place] for place, value in enumerate(values)]),
                torch.tensor(bench.references[row]),
            )
            for row, values in enumerate(likelihoods(bench))
        ]
        losses.append(torch.stack(of_rows).mean())
    loss = (3 * losses[0] + losses[1] + losses[2]) / 5
    loss.backward()  # type: ignore[no-untyped-call]
    assert shares.grad is not None
    assert beta.grad is not None
    given, benches = shares.detach().double().numpy()[None], [texts, *asked]
    outputs = [[b.outputs(model_of(folder, own)) for b in benches] for own in tensors]
    objective = objective_of(llamas, benches, outputs=outputs)
    everything = np.random.default_rng(0).permutation(len(objective.strata))  # as a step has them
    assert len(everything) == len(TEXTS) + 2 * len(QUESTIONS)
    found, slopes, slope = objective.gradient(given, 1.5, everything)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(slopes[0], shares.grad, rtol=1e-3, atol=1e-5)
    assert slope == pytest.approx(beta.grad.item(), rel=1e-4)
    # What each gives alone is known; and asked again it is the same.
    some = everything[::3]
    for number, alone in enumerate(objective.alone(some)):
        assert alone == pytest.approx(objective.loss(np.eye(3)[[number]], some)[0], rel=1e-4)
    # Of texts alone there is no scale, and what is measured of them changes no loss.
    one = objective_of(llamas, [texts, replace(texts, scoring=texts.scoring.model_copy(update={"metric": "nll"}))])
    least, scale = one.loss(given, np.arange(len(TEXTS)))
    assert (least, scale) == (pytest.approx(losses[0].item(), rel=1e-5), 1.0)
    found, _, slope = one.gradient(given, 2.0, np.arange(len(TEXTS)))
    assert (found, slope) == (pytest.approx(least), 0.0)
    # A text without tokens has no loss, so no step is made of such texts alone.
    sizes = texts.sizes * (np.arange(len(TEXTS)) != 3)[:, None]
    assert len(objective_of(llamas, [replace(texts, sizes=sizes)]).strata) == len(TEXTS) - 1


def model_of(folder: Path, tensors: dict[str, Any]) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.load_state_dict(tensors)
    return model.eval()
