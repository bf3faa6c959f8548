"""Headers, indexes and configs that strangers wrote: bounded, validated, and refused with the place and the value."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from hf_soup.checkpoint import TensorInfo, front_matter, open_all, open_checkpoint, read_header
from hf_soup.errors import ResolveError, SoupError
from hf_soup.recipe import Ingredient


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, and any length that it claims to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors_of(content: bytes) -> list[TensorInfo]:
    return read_header(lambda _, start, stop: content[start:stop], "model.safetensors", len(content), "acme/a")


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_is_read_as_safetensors_wrote_it() -> None:
    written = {"b": torch.zeros(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    content = save(written, {"format": "pt"})
    found = {tensor.name: tensor for tensor in tensors_of(content)}
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (5,), "b": (2, 3), "none": (0, 4)}
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": "BF16", "b": "F32", "none": "F32"}
    assert content[found["a"].offset :][: found["a"].size] == written["a"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("card", ["\ufeff---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\n# A\r\n"])
def test_a_card_is_read_as_any_editor_saves_it(card: str) -> None:
    assert front_matter(card.encode()) == {"license": "mit"}


def test_a_header_of_any_length_costs_two_reads() -> None:
    content = save({f"layer.{number}": torch.zeros(1) for number in range(3000)})
    reads = []

    def read(_: str, start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return content[start:stop]

    assert len(read_header(read, "model.safetensors", len(content), "acme/a")) == 3000
    assert len(reads) == 2
    assert reads[1][0] == reads[0][1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes"),
        (b"\0" * 9, "it has 9 bytes"),
        (file_of({"a": entry()}, bytes(8))[:40], "bytes long, in a file of 40"),
        (file_of({}, length=2**63), "its header says it is 9,223,372,036,854,775,808 bytes long"),
        (file_of({}, b"abc", length=1), "its header is not JSON"),
        (file_of(b"\xff\xfe{}"), "its header is not JSON"),
        (file_of(b"[" * 50_000 + b"]" * 50_000), "its header is not"),
        (file_of(b'{"a":' * 50_000), "its header is not JSON"),
        (file_of(b"9" * 5000), "its header is not"),
        (file_of([]), "its header is not a mapping"),
        (file_of({"a": 3}), "the entry of 'a' is 3"),
        (file_of({"a": {"dtype": "F32", "shape": [2]}}), "the entry of 'a' is"),
        (file_of({"a": entry(shape=None)}), "the entry of 'a' is"),
        (file_of({"a": entry(offsets=[0, 4, 8])}), "the entry of 'a' is"),
        (file_of({"a": entry(dtype="F31")}, bytes(8)), "'a' has the element type 'F31'"),
        (file_of({"a": entry(dtype=["F32"])}, bytes(8)), "the entry of 'a' is"),
        (file_of({"a": entry(shape=[-2])}, bytes(8)), "not whole numbers"),
        (file_of({"a": entry(shape=[2.0])}, bytes(8)), "not whole numbers"),
        (file_of({"a": entry(shape=[True, 2])}, bytes(8)), "not whole numbers"),
        (file_of({"a": entry(shape="22")}, bytes(8)), "not whole numbers"),
        (file_of({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "needs"),
        (file_of({"a": entry(shape=[1] * 100_000)}, bytes(8)), "the entry of 'a' is"),
        (file_of({"a" * 1000: entry()}, bytes(8)), "a tensor's name has 1,000 characters"),
        (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "needs 8 bytes, not -8"),
        (file_of({"a": entry(offsets=[-8, 0])}, bytes(8)), "not whole numbers"),
        (file_of({"a": entry(offsets=[0, 12])}, bytes(12)), "needs 8 bytes, not 12"),
        (file_of({"a": entry(), "b": entry()}, bytes(8)), "'b' overlaps the tensor before it"),
        (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b' overlaps the tensor before it"),
        (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "'b' leaves a hole before it"),
        (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), "'a' leaves a hole before it"),
        (file_of({"a": entry()}, bytes(7)), "the file has"),
        (file_of({"a": entry()}, bytes(9)), "the file has"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_header_that_lies_is_refused(content: bytes, said: str) -> None:
    """With the model, the file and what is wrong; in a message of bounded length."""
    with pytest.raises(ResolveError) as raised:
        tensors_of(content)
    message = str(raised.value)
    assert message.startswith("acme/a: model.safetensors is not a valid safetensors file: ")
    assert said in message
    assert "download or upload it again" in message
    assert len(message) < 800


def test_a_quantised_tensor_is_refused_by_name() -> None:
    with pytest.raises(ResolveError, match="acme/a is quantised: 'a' is stored as F8_E4M3"):
        tensors_of(file_of({"a": entry("F8_E4M3", [8])}, bytes(8)))


WHOLE = '{"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('{"format": "pt"}', '{"format": 1}', "its '__metadata__' is no mapping from texts to texts"),
        ('{"format": "pt"}', '{"format": null}', "its '__metadata__' is no mapping from texts to texts"),
        ('{"format": "pt"}', "[]", "its '__metadata__' is no mapping from texts to texts"),
        ('{"format": "pt"}', '{"format": "\\ud800"}', "its '__metadata__' is no mapping from texts to texts"),
        ('{"format": "pt"}', '{}, "__metadata__": {}', "its header has '__metadata__' twice"),
        ("[2]", '[3], "shape": [2]', "its header has 'shape' twice"),
        ("[2]", '[2], "more": NaN', "the entry of 'a' is"),
        ("[0, 8]", "[-0, 8]", "its header has a number -0"),
        ("[2]", "[1099511627776, 1099511627776, 0]", "too large to be counted"),
        ("[0, 8]}", "[0, 8]", "its header is not JSON"),
        ('{"__', '\ufeff{"__', "its header is not JSON"),
    ],
)
def test_a_header_that_safetensors_refuses(old: str, new: str, said: str) -> None:
    """Or a soup would be made, and called identical, of what nobody can load."""
    content = file_of(WHOLE.replace(old, new).encode(), b"" if "0]" in new and "," in new[:16] else bytes(8))
    with pytest.raises(SafetensorError):
        deserialize(content)
    with pytest.raises(ResolveError, match=said):
        tensors_of(content)
    for encoding in ("utf-16", "utf-16-le", "utf-32-le"):
        with pytest.raises(ResolveError, match="its header is not JSON"):
            tensors_of(file_of(WHOLE.encode(encoding), bytes(8)))


def test_what_is_read_is_what_safetensors_reads() -> None:
    """Headers of which words are changed, left out or put twice, as both read them."""
    random, read = Random(0), Counter[bool]()
    more = '{"b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]}, "c": {"dtype": "U8", "shape": [], '
    whole = re.findall(r'"\w*"|\d+|[^ ]', more + '"data_offsets": [12, 13]}, ' + WHOLE[1:])
    strange = ["", " ", "null", "NaN", "-0", "1e0", "2.0", "[]", "{}", "true", r'"\ud800"', '"ä"', r'"d\u0074ype"']
    for _ in range(3000):
        words = whole.copy()
        for _ in range(random.randint(0, 2)):
            begin = random.randrange(len(words))
            end = begin + random.choice([0, 1, 1, 4])
            words[begin:end] = [random.choice([*strange, *whole])] if random.random() < 0.7 else words[begin:end] * 2
        text = "".join(words)
        content = file_of(text.encode(), bytes(13))
        try:
            ours = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors_of(content)}
        except ResolveError:
            read[False] += 1
            continue
        read[True] += 1
        assert ours == {name: (of["dtype"], tuple(of["shape"])) for name, of in deserialize(content)}, text
    assert min(read.values()) > 300


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
_dtypes = st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "X"])
_entries = st.fixed_dictionaries(
    {
        "dtype": _dtypes | _json,
        "shape": st.lists(st.integers(-2, 2**65), max_size=4) | _json,
        "data_offsets": st.tuples(st.integers(-8, 64), st.integers(-8, 64)) | _json,
    }
)


@given(st.dictionaries(st.text(max_size=4), _entries | _json, max_size=4) | _json, st.binary(max_size=64))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_header_is_tensors_or_an_error(header: object, data: bytes) -> None:
    content = file_of(header, data)
    try:
        found = tensors_of(content)
    except SoupError as error:
        said = str(error)
    else:
        said = "tensors"
        assert sum(tensor.size for tensor in found) == len(data)
    assert 0 < len(said) < 1000


@given(st.binary(max_size=200), st.integers(0, 300) | st.integers(0, 2**64 - 1))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_bytes_are_tensors_or_an_error(text: bytes, length: int) -> None:
    for content in (text, file_of(text, length=length)):
        with suppress(SoupError):
            tensors_of(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def change(file: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def claim(file: str, size: int) -> Callable[[Path], object]:
    """A file that takes no room on disk and is read as zeros."""

    def make(folder: Path) -> None:
        with (folder / file).open("wb") as opened:
            opened.truncate(size)

    return make


def index_of(**shards: object) -> Callable[[Path], object]:
    return change("model.safetensors.index.json", json.dumps({"weight_map": shards}))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json: it is not a transformers model"),
        (change("config.json", ""), "config.json is not a mapping but NoneType"),
        (change("config.json", "{'a': 1}"), "config.json is not valid JSON"),
        (change("config.json", b"\xff\xff\xff"), "config.json is not valid JSON"),
        (change("config.json", '{"id2label": {"0": "\\ud800"}}'), "config.json is not valid JSON"),
        (change("config.json", "[" * 100_000), "config.json is not valid JSON"),
        (change("config.json", "[]"), "config.json is not a mapping but list"),
        (change("config.json", "9" * 10_000), "config.json is not"),
        (claim("config.json", 5_000_000), "config.json has 5,000,000 bytes, more than any such file needs"),
        (claim(INDEX, 200_000_000), f"{INDEX} has 200,000,000 bytes"),
        (change(INDEX, "{}"), f"{INDEX} has no weight_map"),
        (change(INDEX, '{"weight_map": []}'), f"{INDEX} has no weight_map"),
        (index_of(a=3), f"{INDEX} has no weight_map"),
        (index_of(), "without a single tensor"),
        (index_of(a="model-1.safetensors", b="model-3.safetensors"), "1 files that are not there: model-3.safetensors"),
        (index_of(a="../model/model-1.safetensors"), "files that are not there: ../model/model-1.safetensors"),
        (index_of(a="/etc/passwd"), "files that are not there: /etc/passwd"),
        (index_of(a="model-2.safetensors", b="model-2.safetensors"), "1 tensors that are not in the file it says: a"),
        (index_of(a="model-1.safetensors", c="model-1.safetensors"), "1 tensors that are not in the file it says: c"),
        (index_of(a="config.json"), "config.json is not a valid safetensors file"),
        (lambda folder: shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors"), "'a' twice"),
        (claim("model-2.safetensors", 0), "model-2.safetensors is not a valid safetensors file: it has 0 bytes"),
        (lambda folder: (folder / INDEX).unlink(), "has neither model.safetensors nor"),
    ],
)  # fmt: skip
def test_a_folder_that_is_damaged_is_refused(folder: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(folder)
    with pytest.raises(ResolveError) as raised:
        open_checkpoint(str(folder))
    assert said in str(raised.value)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["\\ud800x", "a\\nb", "\\u0000"])
def test_a_name_that_cannot_be_written_is_refused_at_once(name: str) -> None:
    """Not after the merge, where the digest would need it."""
    header = f'{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}'.encode()
    with pytest.raises(ResolveError, match="a tensor's name is"):
        tensors_of(len(header).to_bytes(8, "little") + header + bytes(8))


def test_a_folder_is_pinned_by_its_weights(folder: Path) -> None:
    found = open_checkpoint(str(folder))
    assert found.model == "local:model"
    assert found.revision.startswith("sha256:")
    assert str(found) == f"local:model@{found.revision[7:14]}"
    assert {name: tensor.file for name, tensor in found.tensors.items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }
    assert open_checkpoint(Ingredient(model=str(folder), revision=found.revision)).revision == found.revision
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    with pytest.raises(ResolveError, match="are not the ones that the recipe names"):
        open_checkpoint(Ingredient(model=str(folder), revision=found.revision))
    with pytest.raises(ResolveError, match="is a folder, which has no revision 'main'"):
        open_checkpoint(Ingredient(model=str(folder), revision="main"))


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    for name, files, said in [
        (
            "adapter",
            {"adapter_config.json": "{}"},
            "is an adapter with `peft_type: None`, which is not known how to add up.\nOnly LoRA",
        ),
        ("pickled", {"config.json": "{}", "pytorch_model.bin": "x"}, "only pytorch_model.bin: a pickle can run code"),
        ("empty", {}, "has no config.json: it is not a transformers model.\nIt holds nothing."),
        ("run", {"checkpoint-20/config.json": "{}"}, "name a checkpoint of it, as checkpoint-20, or cook it with"),
        ("weightless", {"config.json": "{}"}, "has no weights"),
        (
            "gguf",
            {"m-Q4_K_M.gguf": "x"},
            "llama.cpp (m-Q4_K_M.gguf), not a model of transformers.\nUse the model that",
        ),
        (
            "deep speed",
            {"config.json": "{}", "zero_to_fp32.py": "", "global_step9/zero_pp_rank_0_mp_rank_00_optim.pt": ""},
            "python -m deepspeed.utils.zero_to_fp32 '",
        ),
        ("parts", {"__0_0.distcp": "", ".metadata": ""}, "/parts CONVERTED\nThen put config.json"),
        (
            "fsdp",
            {"pytorch_model_fsdp_0/__0_0.distcp": "", "optimizer_0/__0_0.distcp": ""},
            "fsdp/pytorch_model_fsdp_0 CONVERTED",
        ),
        ("variant", {"config.json": "{}", "model.fp16.safetensors": "x"}, "its safetensors files are model.fp16"),
    ]:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(content)
        with pytest.raises(ResolveError) as raised:
            open_checkpoint(str(tmp_path / name))
        assert said in str(raised.value)
    (tmp_path / "file").write_text("")
    for model in (str(tmp_path / "file"), "./nowhere", "a/b/../c", "~nobody/x"):
        with pytest.raises(ResolveError, match="neither a folder nor a Hub id"):
            open_checkpoint(model)
    with pytest.raises(ResolveError, match="was a folder on the machine where the recipe was resolved"):
        open_checkpoint("local:model")


def test_every_model_that_cannot_be_opened_is_listed(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ResolveError) as raised:
        open_all([str(folder), str(tmp_path / "one"), str(tmp_path / "two")])
    assert str(tmp_path / "one") in str(raised.value)
    assert str(tmp_path / "two") in str(raised.value)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("owned"),))


def test_a_pickle_is_read_as_tensors_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Only when it is allowed by name, and never run."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    for file in folder.glob("*model*"):
        file.unlink()
    torch.save({"a": torch.arange(3.0)}, folder / "pytorch_model.bin")
    with pytest.raises(ResolveError, match="a pickle can run code"):
        open_checkpoint(str(folder))
    found = open_checkpoint(str(folder), allow_pickle=True)
    tensor = found.tensors["a"]
    data = found.weights.source.read(tensor.file, tensor.offset + 4, tensor.offset + 12)
    assert data == torch.tensor([1.0, 2.0]).numpy().tobytes()
    assert found.notes == ("its weights were converted from pytorch_model.bin",)
    torch.save({"a": Malice()}, folder / "pytorch_model.bin")
    with pytest.raises(ResolveError, match="cannot be read as tensors alone"):
        open_checkpoint(str(folder), allow_pickle=True)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ResolveError, match="is not a mapping from names to tensors"):
        open_checkpoint(str(folder), allow_pickle=True)
    assert not (tmp_path / "owned").exists()
