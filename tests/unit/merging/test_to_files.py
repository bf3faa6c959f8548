"""The streaming engine on real files: the same bytes however the work is cut, and errors that name the place."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import candidate, files_here, make_plan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_soup._util.io import in_memory
from hf_soup.checkpoint import ITEM_BYTES, RowRange, TensorInfo, read_header
from hf_soup.errors import MergeError
from hf_soup.hub import FileHasher, known_sha256, stamp_of
from hf_soup.merging import (
    BLOCK_BYTES,
    Materializer,
    MergeResult,
    Plan,
    ProcessGroup,
    StatisticsStore,
    Workspace,
    digest_of,
    engine,
    merge,
    plan as plan_module,
    workers,
)
from hf_soup.merging.arithmetic import Aids
from hf_soup.merging.to_files import _share
from hf_soup.merging.weight_files import WeightFile, WeightFiles
from hf_soup.methods import METHODS, round_into
from hf_soup.methods.linear import linear

Model = Mapping[str, Tensor]
#: In which a block of 16-bit numbers is written.
SLICES = BLOCK_BYTES // (2 * engine.SLICE_ELEMENTS)
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (1300, 1700),  # more than one block
    "layer.weight": (37, 41),
    "norm.bias": (41,),
    "scale": (),
    "empty": (0, 5),
}


def model(seed: int, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {name: (0.05 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


class Pot:
    """Ingredients in files, what to make of them, and where."""

    def __init__(self, folder: Path, models: Sequence[Model], weights: Sequence[float] | None = None, **options: Any):
        folder.mkdir(exist_ok=True)
        self.folder, self.models = folder, models
        self.paths: list[dict[str, Path]] = []
        found: list[dict[str, TensorInfo]] = []
        for number, tensors in enumerate(models):
            path = folder / f"{number}.safetensors"
            save_file(dict(tensors), path)
            data = path.read_bytes()
            header = read_header(lambda _, start, stop, data=data: data[start:stop], "m", len(data), "m")
            found.append({info.name: info for info in header})
            self.paths.append({"m": path})
        self.align(found)
        names = [f"acme/{number}@0" for number in range(len(models))]
        self.plan: Plan = make_plan(names, found, weights or [1.0] * len(models), **options)

    def align(self, found: Sequence[dict[str, TensorInfo]]) -> None:
        """Nothing is anywhere else here."""

    def cook(self, name: str = "soup", **options: Any) -> tuple[MergeResult, Path]:
        with Workspace(self.folder / name) as staging:
            staging.open(self.plan.fingerprint, self.plan.outline())
            options = {"threads": 2, "quiet": True} | options
            return merge(self.plan, files_here(self.paths), staging, **options), staging.publish()

    def refused(self, name: str = "soup", **options: Any) -> str:
        with pytest.raises(MergeError) as error:
            self.cook(name, **options)
        assert not (self.folder / name).exists()
        return str(error.value)


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True, scope="module")
def small_units() -> Iterator[None]:
    """A block each, so that small models have many; done by threads of this process, which tests can look into."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)
        patch.setattr(workers, "_WORTH", 1 << 40)
        yield


@pytest.fixture(scope="module")
def pot(module_path: Path) -> Pot:
    """Three models of several blocks, whose weights make every product and sum round."""
    return Pot(module_path / "pot", [model(seed) for seed in range(3)], [0.1, 3.0, 0.7], max_file_bytes=3000)


@pytest.fixture(scope="module")
def reference(pot: Pot) -> tuple[str, dict[str, str]]:
    merged, folder = pot.cook("reference", threads=1)
    return merged.digest, file_hashes(folder)


# ---- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("written", [None, "bfloat16", "float16", "float32", "float64"], ids=str)
def test_the_files_hold_what_the_method_gives(tmp_path: Path, read: torch.dtype, written: str | None) -> None:
    """Every tensor, of every shape, rounded once to the type that is written."""
    models = [model(seed, read, {**SHAPES, "embed.weight": (13, 17)}) for seed in range(3)]
    pot = Pot(tmp_path, models, [0.1, 3.0, 0.7], dtype=written)
    _, folder = pot.cook()
    found = loaded(folder)
    assert found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        parts = [each[name].double() if written == "float64" else each[name] for each in models]
        mixed = linear(parts, [0.1, 3.0, 0.7])
        expected = torch.empty_like(mixed, dtype=getattr(torch, written) if written else read)
        round_into(mixed, expected)
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors"]


def test_every_file_is_one_that_safetensors_reads(pot: Pot, tmp_path: Path) -> None:
    """Cut by size and listed in the index; headers are padded, so that tensors are aligned."""
    _, folder = pot.cook("many")
    index = pot.plan.layout.index
    assert index is not None
    assert len(pot.plan.layout.files) == len(set(index["weight_map"].values())) == 3
    for file in pot.plan.layout.files:
        path = folder / file.name
        assert path.stat().st_size == file.size
        assert path.read_bytes()[: len(file.header)] == file.header
        assert len(file.header) % 8 == 0
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 -- it is no mapping
                assert index["weight_map"][name] == file.name
                assert tuple(opened.get_tensor(name).shape) == SHAPES[name]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded(folder).values())


def test_the_digest_is_the_one_that_is_documented(pot: Pot) -> None:
    """sha256 over the lines ``name dtype shape root``, worked out from the files by themselves."""
    merged, folder = pot.cook("digest")
    lines = []
    for name, tensor in sorted(loaded(folder).items()):
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        blocks = [data[start : start + (4 << 20)] for start in range(0, len(data), 4 << 20)]
        root = hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()
        assert merged.roots[name] == root
        lines.append(f"{name} BF16 {list(tensor.shape)} {root}\n")
    assert merged.digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert BLOCK_BYTES == 4 << 20
    entries = [("b", "F32", (2, 3), "00"), ("a", "I64", (), "11")]
    assert digest_of(iter(entries)) == digest_of(iter(entries[::-1]))


def test_a_soup_of_one_is_that_model(tmp_path: Path) -> None:
    """Its −0 too, and its integers."""
    one = {**model(0), "zeros": torch.tensor([0.0, -0.0]), "ids": torch.arange(5)}
    _, folder = Pot(tmp_path, [one]).cook()
    found = loaded(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in one.items())
    assert found["zeros"].signbit().tolist() == [False, True]


def test_types_that_differ_between_ingredients(tmp_path: Path) -> None:
    kinds = [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)]
    models: list[dict[str, Tensor]] = [{}, {}]
    for number, pair in enumerate(kinds):
        for tensors, dtype in zip(models, pair, strict=True):
            tensors[str(number)] = torch.tensor([1.0, 1 / 1024], dtype=dtype)
    _, folder = Pot(tmp_path, models).cook()
    found = loaded(folder)
    assert [found[str(number)].dtype for number in range(3)] == [torch.bfloat16, torch.float32, torch.float64]
    assert all(tensor.tolist() == [1.0, 1 / 1024] for tensor in found.values())


INTEGERS = [
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_what_is_not_averaged_passes_and_is_reported_where_it_differs(tmp_path: Path, dtype: torch.dtype) -> None:
    same, first, second = (torch.tensor(values, dtype=dtype) for values in ([1, 0, 1], [1, 0, 0], [1, 1, 0]))
    models = [{"w": torch.ones(2), "same": same, "other": first}, {"w": torch.ones(2), "same": same, "other": second}]
    merged, folder = Pot(tmp_path, models, dtype="float16").cook()
    assert merged.differing == ("other",)
    found = loaded(folder)
    assert torch.equal(found["same"], same)
    assert torch.equal(found["other"], first)
    assert found["w"].dtype == torch.float16


# ---- the same bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("slice_elements", [None, 100_003, (1 << 18) + 1])
def test_threads_and_slices_do_not_show(
    pot: Pot, reference: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, threads: int, slice_elements: int | None
) -> None:
    if slice_elements:
        monkeypatch.setattr(engine, "SLICE_ELEMENTS", slice_elements)
    merged, folder = pot.cook(f"t{threads}s{slice_elements}", threads=threads)
    assert (merged.digest, file_hashes(folder)) == reference


def in_a_world(
    pot: Pot, staging: Workspace, size: int, supply: Callable[[], WeightFiles] | None = None
) -> list[MergeResult | BaseException]:
    """What every process of a world would do, on threads."""
    supply = supply or (lambda: files_here(pot.paths))
    meeting = threading.Barrier(size, timeout=30)
    told: list[object] = [None] * size

    def process(rank: int) -> MergeResult | BaseException:
        def gather(value: object) -> list[object]:
            told[rank] = value
            meeting.wait()
            return told

        try:
            here = ProcessGroup(rank, size, lambda: meeting.wait() and None, gather=gather)
            return merge(pot.plan, supply(), staging, world=here, threads=2, quiet=True)
        except Exception as error:  # noqa: BLE001 -- handed back
            meeting.abort()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(process, range(size)))


def test_what_another_process_hashed_is_not_believed_of_a_file_that_changed_since(
    pot: Pot, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, finish = [source["m"] for source in pot.paths], FileHasher.finish
    stamps = {path: stamp_of(path) for path in paths}

    def then_changed(hasher: FileHasher) -> str:
        digest = finish(hasher)
        if hasher._path == paths[1]:
            os.utime(paths[1], ns=(1, 1))
        return digest

    def supply() -> WeightFiles:
        return WeightFiles([{"m": WeightFile(0, path, follow=True, stamp=stamps[path])} for path in paths])

    monkeypatch.setattr(FileHasher, "finish", then_changed)
    with Workspace(pot.folder / "changing") as staging:
        staging.open(pot.plan.fingerprint, pot.plan.outline())
        first, *_ = in_a_world(pot, staging, 2, supply)
    assert isinstance(first, MergeResult)
    assert known_sha256(paths[1]) is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_number_of_processes_does_not_show(pot: Pot, reference: tuple[str, Any], size: int) -> None:
    with Workspace(pot.folder / f"world{size}") as staging:
        staging.open(pot.plan.fingerprint, pot.plan.outline())
        first, *others = in_a_world(pot, staging, size)
        assert isinstance(first, MergeResult)
        assert all(isinstance(other, MergeResult) and not other.digest for other in others)
        wrote = {path.name for path in staging.root.glob("journal.*") if path.stat().st_size > len("[]\n")}
        folder = staging.publish()
    assert wrote <= {f"journal.{rank}" for rank in range(size)}
    assert len(wrote) == min(size, 2)  # there are two blocks of some size
    assert (first.digest, file_hashes(folder)) == reference


def test_a_share_is_every_unit_once(pot: Pot, long: Pot) -> None:
    """And every unit is blocks that follow each other, no more than fit, within one run."""
    for each in (pot, long):
        plan = each.plan
        assert [entry for unit in plan.units for entry in plan.blocks_of(unit)] == list(plan.layout.blocks(0, 0))
        assert all(sum(size for _, _, size in plan.blocks_of(unit)) == unit.size <= BLOCK_BYTES for unit in plan.units)
        for size in (1, 2, 3, 7, 50):
            shares = [_share(plan, set(), ProcessGroup(rank, size)) for rank in range(size)]
            assert [number for share in shares for number in share] == list(range(len(plan.units)))


def test_too_large_a_sum_changes_no_other_entry_of_its_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added up in float64, its neighbours are not: else bits would depend on where slices are cut."""
    models = [{"w": model(seed, shapes={"w": (40_000,)})["w"]} for seed in range(3)]
    weights = [1.0, 3.0, 2.0]
    for each in models:
        each["w"][20_000] = torch.finfo(torch.bfloat16).max
    pot = Pot(tmp_path, models, [1.0] * 3, dtype="float32")
    _, folder = pot.cook("uniform")
    assert loaded(folder)["w"][20_000].item() == torch.finfo(torch.bfloat16).max
    plain = linear([each["w"] for each in models], weights)
    assert plain[20_000].isinf()
    pot = Pot(tmp_path, models, weights, dtype="float32")
    digests = set()
    for number, elements in enumerate((1 << 18, 16_385, 20_001)):
        monkeypatch.setattr(engine, "SLICE_ELEMENTS", elements)
        merged, folder = pot.cook(f"cut{number}")
        digests.add(merged.digest)
        found = loaded(folder)["w"]
        assert found[20_000].item() == torch.finfo(torch.bfloat16).max
        keep = torch.arange(40_000) != 20_000
        assert torch.equal(found[keep], plain[keep])
    assert len(digests) == 1


# ---- what cannot be averaged --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("written", [None, "float64"])
def test_a_broken_ingredient_is_named_with_the_place(
    tmp_path: Path, value: str, dtype: torch.dtype, written: str | None
) -> None:
    models = [{"a.b": torch.ones(700, 600, 2, dtype=dtype)} for _ in range(3)]
    models[1]["a.b"][655, 432, 1] = float(value)
    said = Pot(tmp_path, models, dtype=written).refused()
    assert f"'a.b' of acme/1@0 holds {value} at [655, 432, 1]." in said
    assert "leave it out" in said


def test_infinity_that_all_share_passes(tmp_path: Path) -> None:
    """A mask of −Inf is a constant of the model, not a fault; a NaN beside it still is one."""
    mask = torch.tensor([1.0, -torch.inf, torch.inf], dtype=torch.float16)
    _, folder = Pot(tmp_path, [{"mask": mask}, {"mask": mask}], [0.3, 0.9], dtype="bfloat16").cook()
    assert loaded(folder)["mask"].tolist() == mask.tolist()
    said = Pot(tmp_path, [{"mask": mask}, {"mask": -mask}]).refused(name="soup2")
    assert "'mask' of acme/0@0 holds -inf at [1]." in said
    some = torch.zeros_like(mask)
    said = Pot(tmp_path, [{"mask": some}, {"mask": mask}, {"mask": mask}]).refused(name="soup3")
    assert "'mask' of acme/1@0 and acme/2@0 hold -inf at [1]." in said
    assert "Only an infinity that all ingredients, and the base where it counts, have at one place is copied." in said


class Kin(Pot):
    """Ingredients and, if the method goes by it, their ancestor."""

    def __init__(self, folder: Path, models: Sequence[Model], method: str, **options: Any) -> None:
        base = METHODS[method].needs_base
        models = models if base else models[:-1]
        super().__init__(folder, models, [1.0] * len(models), method=method, with_base=base, **options)

    def blend(self) -> Mapping[str, Tensor]:
        with closing(Materializer(self.plan.layout, self.paths)) as materializer:
            return materializer.materialize(self.plan)


def kin(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Two ingredients and their ancestor, so small that LAPACK refuses what is no number."""
    base, *others = ({"w": model(seed, shapes={"w": (20, 41)})["w"].double()} for seed in range(3))
    return [*({"w": (base["w"] + 0.2 * each["w"]).to(dtype)} for each in others), {"w": base["w"].to(dtype)}]


#: One of each kind: in slices, trimmed, measured first, and whole in several ways.
KINDS = ["task_arithmetic", "ties", "breadcrumbs", "sce", "model_stock", "slerp", "della", "tsv_m", "iso_c", "knots"]


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("method", KINDS)
def test_a_broken_ingredient_or_ancestor_is_named_by_any_method(tmp_path: Path, method: str, value: str) -> None:
    for broken in range(2 + METHODS[method].needs_base):
        models = kin(torch.bfloat16)
        models[broken]["w"][3, 5] = float(value)
        said = Kin(tmp_path / str(broken), models, method).refused()
        assert f"'w' of acme/{broken}@0 holds {value} at [3, 5]." in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", KINDS)
def test_infinity_that_all_share_passes_by_any_method(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """All else is as if it were zero, in what is scored too."""
    models = kin(dtype)
    for each in models:
        each["w"][3, 5] = 0.0
    expected = loaded(Kin(tmp_path / "zero", models, method).cook()[1])
    for each in [*models, expected]:
        each["w"][3, 5] = -torch.inf
    pot = Kin(tmp_path / "infinite", models, method)
    for found in (loaded(pot.cook()[1]), pot.blend()):
        assert torch.equal(found["w"], expected["w"])


@pytest.mark.parametrize("method", [name for name in KINDS if name != "slerp"])
def test_differences_that_float32_cannot_hold(tmp_path: Path, method: str) -> None:
    """Of 16-bit numbers: float64 holds them, as it holds those of the same models in 32 bits."""
    models = [{"w": each["w"].clone()} for each in kin(torch.bfloat16)]
    for each, value in zip(models, [3e38, 2.5e38, -2e38], strict=True):
        each["w"][3, 5] = value
    wide = [{"w": each["w"].float()} for each in models]
    parameters = {"task_arithmetic": {"scale": 0.5}, "iso_c": {"scale": 0.1}, "della": {"scale": 0.3}}.get(method, {})
    options = {"parameters": parameters, "dtype": "bfloat16"}
    found, expected = (
        loaded(Kin(tmp_path / str(number), each, method, **options).cook()[1])["w"].double()
        for number, each in enumerate([models, wide])
    )
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-9)
    assert expected[3, 5].abs() > 1e37


@pytest.mark.parametrize("method", ["linear", *KINDS])
def test_float64_is_computed_in_float64(tmp_path: Path, method: str) -> None:
    """What is stored in 16 bits is worked on as if it were stored in 64, in what is scored too."""
    models = kin(torch.bfloat16)
    wide = [{"w": each["w"].double()} for each in models]
    pots = [Kin(tmp_path / name, each, method, dtype="float64") for name, each in (("a", models), ("b", wide))]
    found, expected = (loaded(pot.cook()[1])["w"] for pot in pots)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)
    assert torch.equal(pots[0].blend()["w"], found)


@pytest.mark.parametrize(("value", "fits"), [(65_504.0, True), (65_519.0, True), (65_520.0, False), (1e30, False)])
def test_what_float16_cannot_hold_is_named(tmp_path: Path, value: float, fits: bool) -> None:
    models = [{"w": torch.tensor([[0.0, -value]])} for _ in range(2)]
    pot = Pot(tmp_path, models, dtype="float16")
    if fits:
        assert loaded(pot.cook()[1])["w"].tolist() == [[0.0, -65_504.0]]
    else:
        said = pot.refused()
        assert f"'w' at [0, 1] would be -{value:g}, which float16 cannot hold." in said
        assert "`dtype: bfloat16`" in said


def test_what_no_type_can_hold_is_not_blamed_on_the_type(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([[0.0, 3e38]])} for _ in range(2)]
    said = Pot(tmp_path, models, parameters={"normalize": False}).refused()
    assert "'w' at [0, 1] would be 6e+38, which float32 cannot hold.\nGive the method smaller numbers" in said


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    pot = Pot(tmp_path, [model(0), model(1)])
    os.truncate(pot.paths[1]["m"], pot.paths[1]["m"].stat().st_size - 10_000)
    said = pot.refused()
    assert "acme/1@0: m ended in the middle of '" in said


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    pot = Pot(tmp_path, [model(0), model(1)])
    pot.paths[1]["m"].unlink()
    said = pot.refused()
    assert "No such file" in said
    assert "1.safetensors" in said


def test_blocks_that_nobody_wrote_are_missed(pot: Pot) -> None:
    """As when a process of the world works in another folder."""
    meeting = threading.Barrier(2, timeout=30)
    with Workspace(pot.folder / "alone") as staging, ThreadPoolExecutor(1) as pool:
        staging.open(pot.plan.fingerprint, pot.plan.outline())
        idle = pool.submit(lambda: [meeting.wait() for _ in range(3)])
        with pytest.raises(MergeError, match="parts of 'alone' were not written"):
            merge(
                pot.plan,
                files_here(pot.paths),
                staging,
                world=ProcessGroup(0, 2, lambda: meeting.wait() and None),
                quiet=True,
            )
        idle.result()


# ---- the disk -----------------------------------------------------------------------------------------------


def test_a_full_disk_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pot = Pot(tmp_path, [model(0), model(1)])

    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        said = pot.refused()
    assert "No space left on device" in said
    assert "make room" in said
    assert pot.cook()[0].digest == pot.cook("again")[0].digest


def test_a_limit_on_the_size_of_files_is_one_clear_error(tmp_path: Path) -> None:
    """The same on a real descriptor: the kernel refuses to make the file that large."""
    pot = Pot(tmp_path, [model(0), model(1)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        said = pot.refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Cannot make 'soup': File too large" in said


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_reserves_nothing_will_do(
    pot: Pot, reference: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unsupported(descriptor: int, start: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    merged, folder = pot.cook(f"plain{code}")
    assert (merged.digest, file_hashes(folder)) == reference


def test_a_disk_that_fails_in_the_middle_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {str(number): (1 << 21,) for number in range(4)}  # a block each
    pot = Pot(tmp_path, [model(seed, shapes=shapes) for seed in range(2)])
    write, calls = os.pwrite, []

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2 * SLICES + 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        assert "Input/output error" in pot.refused(threads=1)
    merged, _ = pot.cook()
    assert merged.resumed == 2 * BLOCK_BYTES
    assert merged.digest == pot.cook("fresh")[0].digest


def test_short_reads_and_writes_are_continued(
    pot: Pot, reference: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network file systems do, and Linux beyond 2 GiB."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: read(file, [views[0][:99_999]], offset))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:999_999], offset))
    merged, folder = pot.cook("short")
    assert (merged.digest, file_hashes(folder)) == reference


def test_more_files_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    pot = Pot(tmp_path, [model(seed, shapes={"w": (3,)}) for seed in range(40)])
    expected = pot.cook("other")[0].digest
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    twenty_more = sorted({*range(len(opened) + 21)} - opened)[20]
    resource.setrlimit(resource.RLIMIT_NOFILE, (twenty_more, hard))
    try:
        assert pot.cook("soup", threads=1)[0].digest == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- stopping -----------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A disk that takes 3 ms for a slice; the list holds those that it wrote."""
    write, calls = os.pwrite, []

    def slowly(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.003)
        calls.append(offset)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slowly)
    yield calls
    monkeypatch.undo()


@pytest.fixture(scope="module")
def long(module_path: Path) -> Pot:
    """Sixteen blocks."""
    drawn = [model(seed, shapes={"w": (1 << 21,)})["w"] for seed in range(2)]
    return Pot(module_path / "long", [{f"{number:02}": each + number for number in range(16)} for each in drawn])


def test_ctrl_c_stops_the_threads_and_what_is_finished_stays(long: Pot, slow: list[int]) -> None:
    """The main thread gets the signal while the others write; none of them goes on after its block."""
    main = threading.get_ident()

    def interrupt() -> None:
        while len(slow) < 4 * SLICES:
            time.sleep(0.001)
        import signal

        signal.pthread_kill(main, signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        long.cook()
    killer.join()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    written = len(slow)
    assert 4 * SLICES <= written <= 8 * SLICES
    assert written % SLICES == 0
    time.sleep(0.1)
    assert len(slow) == written
    merged, _ = long.cook()
    assert merged.resumed == written // SLICES * BLOCK_BYTES
    assert len(slow) == 16 * SLICES  # and no finished block was written again
    assert merged.digest == long.cook("fresh")[0].digest


def test_an_error_in_one_thread_stops_the_others(tmp_path: Path, slow: list[int]) -> None:
    models = [{f"{number:02}": torch.ones(1 << 21, dtype=torch.bfloat16) for number in range(16)} for _ in range(2)]
    models[1]["01"][77] = torch.nan
    said = Pot(tmp_path, models).refused(threads=2)
    assert "'01' of acme/1@0 holds nan at [77]." in said
    assert len(slow) <= 6 * SLICES


# ---- memory -------------------------------------------------------------------------------------------------


def test_memory_grows_neither_with_the_model_nor_with_the_number_of_ingredients(tmp_path: Path) -> None:
    """Peaks of a whole process: after two ingredients of 8 MB, and after sixteen of 64 MB."""
    code = (
        "import pickle, re, sys\nfrom pathlib import Path\nfrom hf_soup.merging.to_files import merge\n"
        "from hf_soup.merging.workspace import Workspace\n"
        "for folder in map(Path, sys.argv[1:]):\n"
        "    with Workspace(folder / 'soup') as staging:\n"
        "        plan, supply = pickle.loads((folder / 'job').read_bytes())\n"
        "        merge(plan, supply, staging, threads=2, quiet=True)\n"
        # Not getrusage, where a child begins with its parent's peak.
        "    print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    for name, rows, n in (("small", 4, 2), ("large", 32, 16)):
        pot = Pot(tmp_path / name, [{"w": torch.full((rows, 1 << 20), 0.5, dtype=torch.bfloat16)}])
        tensor, (at,) = pot.plan.layout.tensors[0], pot.plan.layout.runs[0].segments[0].extents
        info = TensorInfo("w", at.dtype, tensor.shape, at.file, at.offset, tensor.size)
        plan = make_plan([f"acme/{i}@0" for i in range(n)], [{"w": info}] * n, [1.0 + i for i in range(n)])
        with Workspace(tmp_path / name / "soup") as staging:
            staging.open(plan.fingerprint, plan.outline())
        (tmp_path / name / "job").write_bytes(pickle.dumps((plan, files_here(pot.paths * n))))
    command = [sys.executable, "-c", code, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert large - small < 60 << 10, (small, large)


@pytest.mark.parametrize("threads", [1, 2, 16, 128])
@pytest.mark.parametrize("n", [2, 32, 500])
@pytest.mark.parametrize("dtype", ["BF16", "F64"])
def test_all_threads_together_hold_no_more_than_is_documented(threads: int, n: int, dtype: str) -> None:
    """Slices, accumulator and output of every thread, down to slices that are too small to be worth it."""
    info = TensorInfo("w", dtype, (1 << 24,), "m", 8, (1 << 24) * ITEM_BYTES[dtype])
    plan = make_plan([str(i) for i in range(n)], [{"w": info}] * n, [1.0] * n)
    step = engine.Engine(plan, WeightFiles([]), [], threads, Aids({}, StatisticsStore(plan)))._step(plan.runs[0])
    held = threads * step * (n * ITEM_BYTES[dtype] + ITEM_BYTES[dtype] + (4 if dtype == "BF16" else 8))
    assert held <= 96 << 20 or step == 1 << 13
    assert step <= 1 << 18


def test_what_is_in_memory_is_known() -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:  # on a disk, wherever the others are
        path = Path(file.name)
        path.write_bytes(bytes(1 << 20))
        assert in_memory(path)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not in_memory(path)


# ---- rows that lie elsewhere --------------------------------------------------------------------------------


ORDER = [5, 0, 1, 2, 4, 3]


class PatchedPot(Pot):
    """Three models: the second's rows of ``out`` in another order, the third with three rows more of ``table``, and
    ``head`` only in the second."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16, weights: Sequence[float] = (1, 1, 1)) -> None:
        shapes = {"table": (430, 5000), "layer": (37, 41), "out": (6, 40), "bias": (6,)}
        a, b, c = (dict(model(seed, dtype, shapes)) for seed in range(3))
        b |= model(7, dtype, {"head": (5, 3)})
        c |= model(8, dtype, {"table": (433, 5000)})
        super().__init__(folder, [a, b, c], weights, patched={"table", "out", "bias", "head"})

    def align(self, found: Sequence[dict[str, TensorInfo]]) -> None:
        for name in ("out", "bias"):
            order = [RowRange(5, 0, 1), RowRange(0, 1, 3), RowRange(4, 4, 1), RowRange(3, 5, 1)]
            found[1][name] = found[1][name].moved(order, 6)
        for each in found[:2]:
            each["table"] = each["table"].moved([RowRange(0, 0, 430)], 433)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [(1, 1, 1), (3.0, 0.1, 0.7), (1, 0, 2)])
def test_rows_are_averaged_over_those_who_have_them(
    tmp_path: Path, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    """Moved, lacking, and whole tensors that one source has alone; the blend in memory gives the same bits."""
    pot = PatchedPot(tmp_path, dtype, weights)
    a, b, c = pot.models
    _, folder = pot.cook()
    found = loaded(folder)

    def mean(*parts: Tensor, by: Sequence[float] = weights) -> Tensor:
        rounded = torch.empty_like(parts[0])
        round_into(linear(parts, by), rounded)
        return rounded

    assert torch.equal(found["out"], mean(a["out"], b["out"][ORDER], c["out"]))
    assert torch.equal(found["bias"], mean(a["bias"], b["bias"][ORDER], c["bias"]))
    assert torch.equal(found["layer"], mean(a["layer"], b["layer"], c["layer"]))
    assert torch.equal(found["table"][:430], mean(a["table"], b["table"], c["table"][:430]))
    assert torch.equal(found["table"][430:], c["table"][430:])
    assert torch.equal(found["head"], b["head"])
    materializer = Materializer(pot.plan.layout, pot.paths)
    made = materializer.materialize(pot.plan)
    assert all(torch.equal(made[name], tensor) for name, tensor in found.items())
    without = materializer.materialize(candidate(pot.plan, {0: 1.0, 2: 1.0}))
    assert torch.equal(without["head"], b["head"])
    assert torch.equal(without["table"][430:], c["table"][430:])
    assert torch.equal(without["out"], mean(a["out"], c["out"], by=(1, 1)))
    materializer.close()


def test_a_plan_with_moved_rows_survives_being_written(tmp_path: Path) -> None:
    pot = PatchedPot(tmp_path)
    again = pickle.loads(pickle.dumps(pot.plan))
    assert again == pot.plan
    assert again.fingerprint == pot.plan.fingerprint


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("elements", [1 << 13, 1 << 18])
def test_moved_rows_do_not_show_in_threads_and_slices(
    tmp_path: Path, threads: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pot = PatchedPot(tmp_path, weights=(3.0, 0.1, 0.7))
    first, _ = pot.cook("first")
    monkeypatch.setattr(engine, "SLICE_ELEMENTS", elements)
    second, _ = pot.cook("second", threads=threads)
    assert first.digest == second.digest


def test_a_number_that_is_none_in_a_moved_row_is_named(tmp_path: Path) -> None:
    pot = PatchedPot(tmp_path, torch.float32)
    tensors = {**pot.models[1]}
    tensors["out"][5, 2] = float("nan")
    save_file(tensors, pot.paths[1]["m"])
    assert "'out' of acme/1@0 holds nan at [0, 2]" in pot.refused()
