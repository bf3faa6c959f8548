"""A soup's folder holds everything that loading needs, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from hf_soup import IncompatibleError, ResolveError, Soup, check, cook
from hf_soup.checkpoint import PIPELINES, pipeline_tasks
from hf_soup.hub import ASSETS, PROCESSOR, TOKENIZER
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Publish = Callable[..., str]

TEXTS = ["a soup of models", "the mean of their weights is a model", "hot and cold", "models are made of numbers"] * 8
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}

#: What training leaves beside a model, and what other tools want of it.
CLUTTER = [
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json",
    "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "model.gguf", "consolidated.00.pth",
    "adapter.safetensors", "original/consolidated.00.pth", "original/tokenizer.model", "original/params.json",
    "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "runs/events.out.tfevents.1",
    "events.out.tfevents.1", "checkpoint-10/model.safetensors", "checkpoint-10/config.json",
    "checkpoint-10/optimizer.pt", "eval_results.json", "all_results.json", "emissions.csv", "LICENSE",
    "USE_POLICY.md", ".gitignore", "picture.png", "train.py",
]  # fmt: skip


def relatives(model: PreTrainedModel, folder: Path, dress: Callable[[Path], None]) -> list[Path]:
    """A model and two that are near it, each dressed with what belongs to it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, name in enumerate(("base", "a", "b")):
        path = folder / name
        model.save_pretrained(path)
        if number:
            tensors = load_file(path / "model.safetensors")
            for tensor in tensors.values():
                if tensor.is_floating_point():
                    tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator) * tensor.std(correction=0))
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        dress(path)
        found.append(path)
    return found


def soup_of(paths: list[Path], out: Path, **options: Any) -> Soup:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({"ingredients": [str(path) for path in paths[1:]], "base_model": str(paths[0])}))
    return cook(recipe, out, **options)


def vocabulary(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def bert_fast(folder: Path) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    tokenizer = BertTokenizer(str(vocabulary(folder) / "vocab.txt"))
    tokenizer.add_tokens(["<one>"])
    return BertModel(BertConfig(vocab_size=len(tokenizer), **SMALL)), tokenizer.save_pretrained


def byte_level(folder: Path, *special: str) -> tuple[str, str]:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=300, special_tokens=list(special))
    vocab, merges = trained.save_model(str(folder))
    return vocab, merges


def gpt2_slow(folder: Path) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    """Vocabulary and merges alone, as old models have them, with templates for chats."""
    byte_level(folder, "<|endoftext|>")

    def dress(path: Path) -> None:
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(folder / file, path)
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true}')
        (path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<pad>"}')
        (path / "added_tokens.json").write_text('{"<pad>": 300}')
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
        (path / "generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 0}')

    config = GPT2Config(vocab_size=301, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config), dress


def t5_pieces(folder: Path) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    """A sentencepiece model and nothing else."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "spiece"), vocab_size=30, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip

    def dress(path: Path) -> None:
        shutil.copy(folder / "spiece.model", path)
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')

    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), dress


def clip(folder: Path) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    files = byte_level(folder, "<|startoftext|>", "<|endoftext|>")
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8), CLIPTokenizer(*files))
    text = {**SMALL, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)), processor.save_pretrained


def instruct_blip(folder: Path) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    """A second tokenizer lies in a folder of its own."""
    files = byte_level(folder, "<|endoftext|>")
    tokenizer = GPT2Tokenizer(*files, pad_token="<|endoftext|>")
    image = transformers.BlipImageProcessor(size={"height": 8, "width": 8})
    questions = BertTokenizer(str(vocabulary(folder) / "vocab.txt"))
    processor = InstructBlipProcessor(image, tokenizer, questions, num_query_tokens=2)
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**SMALL, "vocab_size": len(questions), "encoder_hidden_size": 16},
        text_config={
            "model_type": "opt", "vocab_size": len(tokenizer) + 1, "hidden_size": 16, "word_embed_proj_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 32,
        },
        num_query_tokens=2,
    )  # fmt: skip
    return InstructBlipForConditionalGeneration(config), processor.save_pretrained


def vit(folder: Path) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    config = ViTConfig(**VISION, num_labels=3)
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained


def in_full(folder: Path) -> object:
    """What a tokenizer does, as plain data."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(TEXTS[:4])["input_ids"], tokenizer.get_vocab(), tokenizer.chat_template, str(tokenizer.pad_token)]


def processed(folder: Path) -> object:
    image = torch.arange(3 * 8 * 8).reshape(3, 8, 8).to(torch.uint8)
    found = AutoProcessor.from_pretrained(folder)(images=image, text="hot soup", return_tensors="pt")
    return {key: value.tolist() for key, value in found.items()}


def pictured(folder: Path) -> object:
    image = torch.arange(3 * 8 * 8).reshape(3, 8, 8).to(torch.uint8)
    return AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"].tolist()


LAYOUTS: dict[str, tuple[Any, Any, Any, set[str]]] = {
    "bert": (bert_fast, AutoModel, in_full, {"tokenizer.json", "tokenizer_config.json"}),
    "gpt2": (
        gpt2_slow, AutoModelForCausalLM, in_full,
        {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
         "chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json"},
    ),
    "t5": (
        t5_pieces, AutoModelForSeq2SeqLM, in_full,
        {"spiece.model", "tokenizer_config.json", "generation_config.json"},
    ),
    "clip": (clip, AutoModel, processed, {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}),
    "instructblip": (
        instruct_blip, InstructBlipForConditionalGeneration, processed,
        {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json"},
    ),
    "vit": (vit, ViTForImageClassification, pictured, {"preprocessor_config.json"}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_loading_needs_is_there_and_nothing_else(
    layout: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    make, auto, does, expected = LAYOUTS[layout]
    (tmp_path / "made").mkdir()
    torch.manual_seed(0)
    model, dress = make(tmp_path / "made")
    paths = relatives(model, tmp_path, dress)
    for path in paths:
        for name in CLUTTER:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(b"left over")
    soup = soup_of(paths, tmp_path / "soup")
    there = {path.relative_to(soup.folder).as_posix() for path in soup.folder.rglob("*") if path.is_file()}
    assert there == expected | {"config.json", "model.safetensors", "README.md", "soup.yaml", "soup.json"}
    for name in expected:
        assert (soup.folder / name).read_bytes() == (paths[1] / name).read_bytes()
    loaded, info = auto.from_pretrained(soup.folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    assert does(soup.folder) == does(paths[1])
    # All have the same; but code is not taken over.
    assert [line for line in log.messages if "not the same" in line or "has no" in line] == []
    assert "Code is not taken over: local:a brings train.py." in log.messages
    assert "Code is not taken over: local:a brings train.py." in (soup.folder / "README.md").read_text()
    assert layout != "gpt2" or loaded.generation_config.max_new_tokens == 7


def test_every_name_that_the_library_gives_a_tokenizers_file_is_known() -> None:
    names: set[str] = set()
    # From the sources, as some classes cannot be looked at without their libraries.
    for path in Path(transformers.__file__).parent.glob("**/tokenization_*.py"):
        for found in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL | re.MULTILINE):
            names |= set(re.findall(r":\s*\"([^\"]+)\"", found))
    assert len(names) > 10
    assert {name for name in names if not TOKENIZER.fullmatch(name)} == set()
    for name in ("PROCESSOR_NAME", "IMAGE_PROCESSOR_NAME", "VIDEO_PROCESSOR_NAME", "AUDIO_TOKENIZER_NAME"):
        assert PROCESSOR.fullmatch(getattr(transformers.utils, name))
    assert not any(map(ASSETS.fullmatch, CLUTTER))


# ---- what the card says that it is for ----------------------------------------------------------------------


@pytest.mark.parametrize("stated", [None, "text-classification"], ids=["no card", "a wrong card"])
def test_a_classifier_of_sounds_is_published_as_one(tmp_path: Path, stated: str | None) -> None:
    """Although its class is called as those for texts are; and the snippet on the card works."""
    config = Wav2Vec2Config(
        **SMALL, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, vocab_size=8,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
        id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1},
    )  # fmt: skip

    def dress(path: Path) -> None:
        Wav2Vec2FeatureExtractor().save_pretrained(path)
        if stated:
            (path / "README.md").write_text(f"---\npipeline_tag: {stated}\n---\n")

    torch.manual_seed(0)
    soup = soup_of(relatives(Wav2Vec2ForSequenceClassification(config), tmp_path / "made", dress), tmp_path / "soup")
    card = (soup.folder / "README.md").read_text()
    assert "pipeline_tag: audio-classification\n" in card
    snippet = re.search(r"```python\n(from transformers import pipeline\n.*?)```", card, re.DOTALL)
    assert snippet
    names: dict[str, Any] = {}
    exec(snippet[1].replace("THIS_REPO", str(soup.folder)), names)
    assert {each["label"] for each in names["pipe"](np.zeros(1600, dtype=np.float32))} == {"yes", "no"}


def test_the_tasks_of_classes_are_those_of_the_library() -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    theirs: dict[str, set[str]] = {}
    for task, entry in SUPPORTED_TASKS.items():
        for auto in entry["pt"]:
            for found in auto._model_mapping._model_mapping.values():
                for name in found if isinstance(found, tuple) else (found,):
                    theirs.setdefault(name, set()).add(task)
    of_bodies = {"feature-extraction", "image-feature-extraction", "zero-shot-audio-classification"}
    ours = set(PIPELINES)
    assert set(SUPPORTED_TASKS) - of_bodies - {"decision"} == ours
    for name in (
        "BertModel",
        "ViTForImageClassification",
        "LlamaForCausalLM",
        "WhisperForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "DetrForObjectDetection",
        "T5ForConditionalGeneration",
    ):
        assert set(pipeline_tasks(name)) == theirs.get(name, set()) & ours


# ---- sentence-transformers ----------------------------------------------------------------------------------


def sentences(tmp_path: Path, *, dense: bool = False) -> list[Path]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    (tmp_path / "made").mkdir()
    model, dress = bert_fast(tmp_path / "made")
    paths = relatives(model, tmp_path / "plain", dress)
    for path in paths:
        parts = [modules.Transformer(str(path)), modules.Pooling(16, pooling_mode="cls")]
        parts += [modules.Dense(16, 4)] if dense else []
        SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu").save(str(tmp_path / path.name))
    return [tmp_path / path.name for path in paths]


def test_a_sentence_transformer_is_one_again(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    paths = sentences(tmp_path)
    soup = soup_of(paths, tmp_path / "soup")
    model = SentenceTransformer(str(soup.folder), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model[1].pooling_mode == "cls"
    assert tuple(model.encode(["a soup of models"]).shape) == (1, 16)
    weights = [load_file(path / "model.safetensors")["embeddings.word_embeddings.weight"] for path in paths[1:]]
    found = model[0].auto_model.embeddings.word_embeddings.weight.detach()
    torch.testing.assert_close(found, sum(weights).div(2))
    assert isinstance(soup.load(), SentenceTransformer)
    assert tuple(Soup.open(soup.folder).load().encode(["a soup of models"]).shape) == (1, 16)
    card = (soup.folder / "README.md").read_text()
    assert "library_name: sentence-transformers\n" in card
    assert 'SentenceTransformer("THIS_REPO")' in card


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder"])
def test_the_card_loads_what_it_is_with_its_own_class(kind: str, tmp_path: Path) -> None:
    paths = sentences(tmp_path)
    for path in paths:
        file = path / "config_sentence_transformers.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind}))
        (path / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n")
    soup = soup_of(paths, tmp_path / "soup")
    card = (soup.folder / "README.md").read_text()
    assert f'import {kind}\n\nmodel = {kind}("THIS_REPO")' in card
    assert "pipeline_tag: text-ranking\n" in card


def test_modules_that_are_code_of_their_own_are_refused(tmp_path: Path) -> None:
    """The code is not taken over, so nobody could load the soup."""
    paths = sentences(tmp_path)
    for path in paths:
        modules = json.loads((path / "modules.json").read_text())
        modules[1]["type"] = "custom.MyPooling"
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "custom.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(IncompatibleError, match=r"code of its own \(custom\.MyPooling\)"):
        soup_of(paths, tmp_path / "soup")


def test_modules_with_weights_of_their_own_are_refused(tmp_path: Path) -> None:
    """They would have to be averaged like the rest, in files that `transformers` does not know."""
    paths = sentences(tmp_path, dense=True)
    assert (paths[1] / "2_Dense" / "model.safetensors").exists()
    with pytest.raises(IncompatibleError, match=r"2_Dense/model\.safetensors, outside the transformer"):
        soup_of(paths, tmp_path / "soup")


def edited(path: Path, file: str, change: Callable[[Any], Any]) -> None:
    values = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(change(values)))


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        pytest.param(
            "1_Pooling/config.json",
            lambda values: {**values, "pooling_mode": "mean"},
            r"Pooling \(pooling_mode cls\), Normalize against Transformer, Pooling \(pooling_mode mean\), Normalize",
            id="pooling",
        ),
        pytest.param(
            "modules.json",
            lambda modules: modules[:2],
            r"cls\), Normalize against Transformer, Pooling \(pooling_mode cls\)\.",
            id="normalisation",
        ),
    ],
)
def test_embeddings_made_in_different_ways_are_refused(
    file: str, change: Callable[[Any], Any], told: str, tmp_path: Path
) -> None:
    paths = sentences(tmp_path)
    edited(paths[2], file, change)
    with pytest.raises(IncompatibleError, match=told):
        soup_of(paths, tmp_path / "soup")


def test_pooling_in_the_words_of_older_versions_is_the_same(tmp_path: Path) -> None:
    paths = sentences(tmp_path)
    modes = dict.fromkeys(("mean_tokens", "max_tokens", "mean_sqrt_len_tokens"), False) | {"cls_token": True}
    older = {f"pooling_mode_{mode}": used for mode, used in modes.items()} | {"word_embedding_dimension": 16}
    edited(paths[2], "1_Pooling/config.json", lambda _: older)
    names = ("Transformer", "Pooling", "Normalize")
    edited(
        paths[2],
        "modules.json",
        lambda modules: [
            {**each, "type": f"sentence_transformers.models.{name}"} for each, name in zip(modules, names, strict=True)
        ],
    )
    soup_of(paths, tmp_path / "soup")
    # A model without a list of modules is pooled by the mean, as the library does.
    for file in ("modules.json", "config_sentence_transformers.json"):
        (paths[2] / file).unlink()
    with pytest.raises(IncompatibleError, match=r"against Transformer, Pooling \(pooling_mode mean\)"):
        soup_of(paths, tmp_path / "other")
    for odd in ({"a": 1}, 5, [1]):
        edited(paths[2], "config.json", lambda values, odd=odd: {**values, "architectures": odd})
        with pytest.raises(IncompatibleError, match="its 'architectures' is"):
            soup_of(paths, tmp_path / "other")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("1_Pooling/config.json", lambda values: {**values, "pooling_mode": 5}, r"Pooling \(pooling_mode 5\)"),
        ("1_Pooling/config.json", lambda values: {**values, "x": "y" * 10**6}, r"x y+… \(1,000,\d+ characters\)"),
        ("1_Pooling/config.json", lambda _: [1], r"1_Pooling/config\.json is not a mapping but list"),
        (
            "modules.json",
            lambda modules: [*modules[:2], {**modules[2], "kwargs": ["task"]}],
            r"Normalize \(kwargs \['task'\]\)",
        ),
        ("config_sentence_transformers.json", lambda _: [1], r"config_sentence_transformers\.json is not a mapping"),
        ("generation_config.json", lambda _: "text", r"generation_config\.json is not a mapping but str"),
    ],
)
def test_odd_files_of_modules_and_settings_are_one_error(
    file: str, change: Callable[[Any], Any], told: str, tmp_path: Path
) -> None:
    paths = sentences(tmp_path)
    edited(paths[2], file, change)
    with pytest.raises((IncompatibleError, ResolveError), match=told) as raised:
        soup_of(paths, tmp_path / "soup")
    assert len(str(raised.value)) < 2000
    assert not (tmp_path / "soup").exists()


def test_other_libraries_layouts_are_refused_as_what_they_are(tmp_path: Path) -> None:
    """Their folders with weights are no runs of a sweep."""
    made, good = tmp_path / "made", sentences(tmp_path)[0]
    whole = {
        "pipeline": ("model_index.json", "{}", "text_encoder", "a pipeline of diffusers"),
        "clip": ("open_clip_config.json", "{}", "extra", "a model of open_clip"),
    }
    for name, (file, text, place, told) in whole.items():
        shutil.copytree(good, made / name / place)
        (made / name / file).write_text(text)
        with pytest.raises(ResolveError, match=rf"is {told} \({file}\), not a model of transformers"):
            check([made / name, good])
    (tmp_path / "lora").mkdir()
    shutil.copy(good / "model.safetensors", tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(ResolveError, match="is a LoRA for a pipeline of diffusers") as raised:
        check([tmp_path / "lora", good])
    assert raised.value.hint == ""
    shutil.copytree(good, tmp_path / "timm", ignore=shutil.ignore_patterns("*_*", "modules.json"))
    edited(
        tmp_path / "timm", "config.json", lambda _: {"architecture": "resnet18", "pretrained_cfg": {}, "num_classes": 2}
    )
    found = check([tmp_path / "timm", good])
    assert found.reasons[-1].message == "local:timm is a model of timm (resnet18), not of transformers."
    assert found.verdict == "refused"
    older = made / "older"
    shutil.copytree(good, older / "0_Transformer", ignore=shutil.ignore_patterns("*_*", "modules.json"))
    for file in ("modules.json", "1_Pooling"):
        shutil.move(good / file, older / file)
    edited(older, "modules.json", lambda modules: [{**modules[0], "path": "0_Transformer"}, *modules[1:]])
    with pytest.raises(ResolveError, match="begins with Transformer, in the folder '0_Transformer'") as raised:
        check([older, made])
    assert "SentenceTransformer(FOLDER).save" in raised.value.hint
    edited(older, "modules.json", lambda _: [{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}])
    with pytest.raises(ResolveError, match="begins with StaticEmbedding, which is no transformer"):
        check([older, made])
    for wrong in ("{}", "[]", "[1]", '[{"type": 1, "path": ""}]', '[{"path": ""}]'):
        (older / "modules.json").write_text(wrong)
        with pytest.raises(ResolveError, match=r"modules\.json is not a list of modules with `type` and `path`"):
            check([older, made])


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("generation_config.json", {"max_new_tokens": 9}, "generation_config.json: max_new_tokens nothing against 9."),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "find: "}, "similarity_fn_name": "dot"},
            'prompts nothing against {"query": "find: "}, similarity_fn_name nothing against "dot".',
        ),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, 'nothing against "{{ messages }}".'),
        ("chat_template.jinja", "{{ messages }}", 'chat templates: chat_template nothing against "{{ messages }}".'),
        ("sentence_bert_config.json", {"max_seq_length": 7}, "max_seq_length 32 against 7."),
    ],
)
def test_settings_that_differ_are_warnings_with_whose_will_be_used(
    file: str, values: Any, told: str, tmp_path: Path
) -> None:
    _, one, other = sentences(tmp_path)
    edited(one, "sentence_bert_config.json", lambda known: {**known, "max_seq_length": 32})
    if isinstance(values, str):
        (other / file).write_text(values)
    else:
        edited(other, file, lambda known: {**known, **values})
    report = check([one, other])
    (finding,) = [finding for finding in report.reasons if finding.code == "settings"]
    assert finding.message.startswith("local:a and local:b differ in ")
    assert told in finding.message
    assert finding.message.endswith("The soup will have local:a's.")
    assert not finding.refuses
    # Told by nobody: what the library takes anyhow.
    (other / file).unlink()
    if (one / file).exists():
        shutil.copy(one / file, other / file)
    usual = {"prompts": {"query": "", "document": ""}, "similarity_fn_name": "cosine", "__version__": {"torch": "1"}}
    edited(other, "config_sentence_transformers.json", lambda known: {**known, **usual})
    edited(other, "generation_config.json", lambda _: {"transformers_version": "4.1.0", "_from_model_config": True})
    assert [finding for finding in check([one, other]).reasons if finding.code == "settings"] == []


# ---- files that differ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folders", "hub"])
def test_files_that_differ_are_said_with_whose(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, log: pytest.LogCaptureFixture
) -> None:
    """And those of which only the version, a path or a page differs are not."""
    (tmp_path / "made").mkdir()
    torch.manual_seed(0)
    paths = relatives(*gpt2_slow_parts(tmp_path))
    a, b = paths[1:]
    (b / "generation_config.json").write_text('{"max_new_tokens": 9, "eos_token_id": 0}')
    (b / "chat_template.jinja").write_text("{{ messages }}")
    (a / "additional_chat_templates" / "rag.jinja").unlink()
    (a / "additional_chat_templates").rmdir()
    values = json.loads((b / "tokenizer_config.json").read_text())
    values |= {"name_or_path": "/home/me/b", "transformers_version": "4.1.0"}
    (b / "tokenizer_config.json").write_text(json.dumps(values, indent=1))
    (b / "README.md").write_text("---\nlicense: mit\n---\n# Another\n")
    (a / "config.json").write_text(
        json.dumps({**json.loads((a / "config.json").read_text()), "transformers_version": "4"})
    )
    names = ["local:a", "local:b"]
    if where == "hub":
        request.getfixturevalue("online")
        publish: Publish = request.getfixturevalue("publish")
        names = [publish(path.name, path) for path in paths][1:]
        soup = cook(names, tmp_path / "soup")
    else:
        soup = soup_of(paths, tmp_path / "soup")
    one, other = names
    lacking = f"{one} has no additional_chat_templates/rag.jinja, so the soup has none; {other} had one."
    heard = [line for line in log.messages if "differ in" in line or "has no" in line]
    differ = [f"[settings] {one} and {other} differ in {file}" for file in ("generation_config.json", "chat templates")]
    assert all(line.startswith(start) for line, start in zip(heard, [*differ, lacking], strict=True))
    assert lacking in soup.report.notes
    card = (soup.folder / "README.md").read_text().replace("\\", "")
    assert lacking in card
    assert all(f"{one} and {other} differ in {file}" in card for file in ("generation_config.json", "chat templates"))


def gpt2_slow_parts(tmp_path: Path) -> tuple[PreTrainedModel, Path, Callable[[Path], None]]:
    model, dress = gpt2_slow(tmp_path / "made")
    return model, tmp_path, dress


def test_a_tokenizer_and_a_processor_may_come_from_two(tmp_path: Path) -> None:
    """Where the donor has neither; and no path of this machine goes along."""
    (tmp_path / "made").mkdir()
    paths = relatives(*clip_parts(tmp_path))
    for path in paths[1:]:
        for file in path.glob("tokenizer*"):
            file.unlink()
    (paths[1] / "processor_config.json").unlink()
    expected = processed(paths[0])
    values = json.loads((paths[0] / "tokenizer_config.json").read_text())
    values |= {"name_or_path": str(tmp_path), "tokenizer_file": f"{tmp_path}/tokenizer.json"}
    (paths[0] / "tokenizer_config.json").write_text(json.dumps(values))
    config = json.loads((paths[1] / "config.json").read_text())
    config["text_config"] |= {"_name_or_path": str(tmp_path / "text"), "vocab_file": str(tmp_path / "vocab.json")}
    (paths[1] / "config.json").write_text(json.dumps(config))
    soup = soup_of(paths, tmp_path / "soup")
    assert processed(soup.folder) == expected
    for path in soup.folder.glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def clip_parts(tmp_path: Path) -> tuple[PreTrainedModel, Path, Callable[[Path], None]]:
    torch.manual_seed(0)
    model, dress = clip(tmp_path / "made")
    return model, tmp_path, dress


def test_code_of_a_model_is_not_taken_over_and_the_soup_loads_without(
    tmp_path: Path, online: LocalHub, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "made").mkdir()
    torch.manual_seed(0)
    model, dress = bert_fast(tmp_path / "made")
    paths = relatives(model, tmp_path, dress)
    for path in paths:
        (path / "modeling_mine.py").write_text("raise SystemExit('ran')\n")
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {"AutoModel": "modeling_mine.MyModel", "AutoConfig": "modeling_mine.MyConfig"}
        config["custom_pipelines"] = {"feature-extraction": {"impl": "modeling_mine.MyPipeline", "pt": ["AutoModel"]}}
        (path / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((path / "tokenizer_config.json").read_text())
        tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_mine.MyTokenizer", None]}
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    soup = soup_of(paths, tmp_path / "soup")
    assert "Code is not taken over: local:a brings modeling_mine.py." in log.messages
    assert not list(soup.folder.rglob("*.py"))
    for trusted in (False, True):
        assert isinstance(AutoModel.from_pretrained(soup.folder, trust_remote_code=trusted), BertModel)
        assert AutoTokenizer.from_pretrained(soup.folder, trust_remote_code=trusted)("hot soup")["input_ids"]
        extract = transformers.pipeline("feature-extraction", str(soup.folder), trust_remote_code=trusted)
        assert len(extract("hot soup")[0][0]) == 16
