"""Pickles: tensors that safetensors stores, and nothing that takes more memory or time than its file."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hf_soup._util import isolated as apart
from hf_soup.checkpoint import LocalFolder, pickles
from hf_soup.checkpoint.pickles import convert_pickle, require_plain
from hf_soup.errors import ResolveError

SOME = torch.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": SOME, "b": SOME, "c": SOME.half(), "d": torch.nn.Parameter(SOME)},
        lambda: {"a": SOME.t(), "b": torch.zeros(100, 100)[3:5], "c": torch.zeros(0, 3), "d": torch.tensor(1.5)},
        lambda: {"position_ids": torch.arange(512).expand((1, -1))},
    ],
    ids=["tied", "views", "a BERT's positions"],
)
def test_what_is_published_is_taken(make: Callable[[], Any], zipped: bool, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    require_plain(tmp_path / "a.bin", "acme/a")


def test_what_was_saved_on_another_device_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"a": SOME}, tmp_path / "a.bin")
    require_plain(tmp_path / "a.bin", "acme/a")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "expanded": (lambda: {"a": torch.zeros(1).expand(2**34)}, "holds 'a' of 68,719,476,736 bytes, but no more than 4"),
    "overlapping": (lambda: {"a": torch.zeros(2**10).as_strided((2**9, 2**9), (1, 1))}, "holds 'a' of 1,048,576 bytes"),
    "meta": (lambda: {"a": torch.empty(2**34, device="meta")}, "holds 'a' of 68,719,476,736 bytes"),
    "shared": (lambda: dict.fromkeys(map(str, range(50)), torch.zeros(2**10)), "holds tensors of 204,800 bytes that"),
    "complex": (
        lambda: {"a": SOME.to(torch.complex64)},
        "holds 'a' in the type torch.complex64, which is not averaged",
    ),
    "float8": (lambda: {"a": SOME.to(torch.float8_e4m3fn)}, "holds 'a' in the type torch.float8_e4m3fn"),
    "sparse": (lambda: {"a": SOME.to_sparse()}, "holds 'a' as a tensor that is sparse"),
    "half a character": (lambda: {"a\udcff": SOME}, r"names a tensor 'a\\udcff', which is no text"),
    "a number": (lambda: {5: SOME}, "names a tensor 5, which is no text"),
    "nobody": (lambda: {None: SOME}, "names a tensor None, which is no text"),
    "within": (lambda: {"state_dict": {"a": SOME}}, "is not a mapping from names to tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_averaged_or_takes_too_much_is_refused(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    torch.save(make(), tmp_path / "a.bin")
    with pytest.raises(ResolveError, match=f"acme/a: a.bin {said}"):
        require_plain(tmp_path / "a.bin", "acme/a")


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.quantize_per_tensor(SOME, 0.1, 0, torch.qint8)}, tmp_path / "a.bin")
    with pytest.raises(ResolveError, match=r"a.bin holds quantised tensors"):
        require_plain(tmp_path / "a.bin", "acme/a")
    assert capfd.readouterr() == ("", "")


def test_a_compressed_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(ResolveError, match=r"a.bin is compressed"):
        require_plain(tmp_path / "a.bin", "acme/a")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is begun for it")
def test_a_pickle_that_takes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To hash 40 pairs of pairs takes as many steps as 2⁴⁰ have."""
    monkeypatch.setattr(apart, "is_only_thread", lambda: True)
    monkeypatch.setattr(pickles, "_SECONDS", 0.3)
    key: tuple[Any, ...] = ()
    for _ in range(40):
        key = (key, key)
    magic, version, about = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}
    begin = b"".join(pickle.dumps(each, protocol=2) for each in (magic, version, about))
    (tmp_path / "a.bin").write_bytes(begin + b"\x80\x02}" + pickle.dumps(key, protocol=2)[2:-1] + b"K\x01s.")
    with pytest.raises(ResolveError, match=r"a.bin cannot be read as tensors alone \(it took more than 0.3 seconds\)"):
        require_plain(tmp_path / "a.bin", "acme/a")


def test_what_only_shows_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_soup.hub.own_cache_folder", lambda: tmp_path / "cache")

    def convert() -> None:
        convert_pickle("acme/a", LocalFolder.of(tmp_path, tmp_path.iterdir()))

    torch.save({"b": torch.empty(3, device="meta")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ResolveError, match=r"'b' in pytorch_model.bin has a shape and no numbers"):
        convert()
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResolveError, match="cannot be read as tensors alone"):
        convert()
    (tmp_path / "pytorch_model.bin").unlink()
    for part in ("1.bin", "2.bin"):
        torch.save({"b": torch.zeros(3)}, tmp_path / part)
    index = {"weight_map": {"b": "1.bin", "c": "2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ResolveError, match=r"'b' is in 2.bin and in another file"):
        convert()


def test_what_another_process_converted_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened it has noted its state, and would find another file in its place."""
    monkeypatch.setattr("hf_soup.hub.own_cache_folder", lambda: tmp_path / "cache")
    torch.save({"a": SOME}, tmp_path / "pytorch_model.bin")
    written, states = safetensors.torch.save_file, []

    def both(tensors: Any, partial: Path, **more: Any) -> None:
        written(tensors, partial, **more)
        written(tensors, partial.parent / "model.safetensors", **more)
        states.append((partial.parent / "model.safetensors").stat().st_ino)

    monkeypatch.setattr(safetensors.torch, "save_file", both)
    found = convert_pickle("acme/a", LocalFolder.of(tmp_path, tmp_path.iterdir()))
    assert [stamp[1] for stamp in found.stamps.values()] == states
    assert {path.name for path in found.path.iterdir()} == {"model.safetensors", "model.safetensors.sha256"}
