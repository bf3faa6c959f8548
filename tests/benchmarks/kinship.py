"""How alike weights of known lineage are: the distributions behind the thresholds of `hf_soup.lineage.similarity`.

    python tests/benchmarks/kinship.py [--seeds 2] [--folder DIR] [--plot docs/kinship.png]

Trains zoos on as many processes as there are cores: vision transformers of 136 thousand parameters on handwritten
digits, one zoo a seed, and Llamas of a million on Python's own library; and narrower ones of both, whose ancestors
were hardly trained. Prints tables, for docs/lineage.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import lineage_zoo
import text_zoo
from lineage_zoo import Member, Step

from hf_soup.checkpoint import open_checkpoint, sampling as samples
from hf_soup.lineage import similarity as kinship
from hf_soup.lineage.similarity import Similarity

#: Hot runs that go further than the zoo's: as long as one that was bad, and three times as hot.
VIT_PLAN: dict[str, Step] = {
    **lineage_zoo.PLAN,
    "A-worst-1": lineage_zoo.tuned("A", 21, "worst", learning_rate=1e-2, epochs=240),
    "A-worst-2": lineage_zoo.tuned("A", 22, "worst", learning_rate=3e-2, epochs=48),
}
_HEAD = ("classifier.", "score.", "lm_head.")
Sample = dict[str, np.ndarray]


@dataclass
class Zoo:
    """Members, and what is sampled of their bodies and heads."""

    title: str
    members: dict[str, Member]
    bodies: dict[str, Sample] = field(default_factory=dict)
    heads: dict[str, Sample] = field(default_factory=dict)

    def of(self, *kinds: str, line: str = "A", parent: str | None = None) -> list[str]:
        """Names of members of some kinds in an ancestor's line, or started from one member."""
        found = [
            member.name
            for member in self.members.values()
            if member.kind in kinds and lineage_zoo.first_base(self.members, member.name) == line
        ]
        return [name for name in found if parent is None or self.members[name].ancestor == parent]


def make(title: str, folder: Path, seed: int) -> dict[str, Member]:
    """Train a zoo, in a process of its own."""
    hidden = HIDDEN[seed % len(HIDDEN)]
    plans = {
        VIT: VIT_PLAN,
        YOUNG: lineage_zoo.young(hidden),
        TEXT: text_zoo.PLAN,
        YOUNG_TEXT: text_zoo.young(hidden),
    }
    return lineage_zoo.make_planned(plans[title], folder, seed=seed)


def sampled(title: str, members: dict[str, Member], folder: Path) -> Zoo:
    """Samples of all members, and of some in another guise."""
    zoo = Zoo(title, members)
    folders = {name: member.folder for name, member in members.items()}
    order = [3, 0, 1, 2] if title in TEXTS else [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    for name in ("A-light-1", "A-light-2", "A-heavy-1"):
        for guise, change in {
            "neurons": lineage_zoo.permuted_neurons,
            "one layer": lambda source, out: lineage_zoo.permuted_neurons(source, out, layers=1),
            "half": lambda source, out: lineage_zoo.some_neurons(source, out, 0.5),
            "hidden": lineage_zoo.permuted_hidden,
            "labels": lambda source, out: lineage_zoo.permuted_labels(source, out, order),
            "bfloat16": lambda source, out: lineage_zoo.other_dtype(source, out, "bfloat16"),
        }.items():
            out = folder / f"{name} {guise}"
            folders[out.name] = out if out.exists() else change(members[name].folder, out)
        if title not in TEXTS:
            for guise, heads in (("two heads", [1, 0, 2, 3]), ("three heads", [0, 2, 3, 1])):
                out = folder / f"{name} {guise}"
                if not out.exists():
                    lineage_zoo.permuted_heads(members[name].folder, out, heads)
                folders[out.name] = out
    for names in ([name for name in folders if "CLIP" not in name], ["CLIP-1", "CLIP-2", "CLIP"]):
        if names[0] not in folders:
            continue
        opened = [open_checkpoint(str(folders[name])) for name in names]
        shared = set.intersection(*(set(each.tensors) for each in opened))
        donor = opened[names.index("A-light-1")] if "A-light-1" in names else opened[0]
        shapes = {name: info.shape for name, info in donor.tensors.items()}
        body = samples.choose_rows({name: shape for name, shape in shapes.items() if name in shared and _is_body(name)})
        head = samples.choose_rows(
            {name: shape for name, shape in shapes.items() if not _is_body(name)}, samples.HEAD_TENSORS
        )
        for name, found in zip(
            names, samples.read_samples([(each, each.tensors) for each in opened], [*body, *head])[0], strict=True
        ):
            zoo.bodies[name] = {tensor: rows for tensor, rows in found.items() if _is_body(tensor)}
            zoo.heads[name] = {tensor: rows for tensor, rows in found.items() if not _is_body(tensor)}
    return zoo


def _is_body(name: str) -> bool:
    return not name.startswith(_HEAD)


# ---- which pairs --------------------------------------------------------------------------------------------

Pairs = list[tuple[str, str]]


def _across(some: Iterable[str], others: Iterable[str]) -> Pairs:
    return [(a, b) for a, b in product(some, others) if a != b]


def pairs_of(zoo: Zoo) -> dict[str, Pairs]:
    """Kinds of pairs, from the nearest to the farthest."""
    light, heavy, hot = (zoo.of(kind, parent="A") for kind in ("light", "heavy", "hot"))
    worst, heads = zoo.of("worst"), zoo.of("head")
    continued = zoo.of("light", parent="A-continued")
    tuned = [*light, *heavy, *heads, *zoo.of("frozen")]
    b, a2 = zoo.of("light", line="B"), zoo.of("light", line="A2")
    again = ["A-again"]

    def guised(guise: str) -> Pairs:
        return [(a, f"{name} {guise}") for name in ("A-light-1", "A-light-2", "A-heavy-1") for a in light if a != name]

    towers = [name for name in ("CLIP-1", "CLIP-2") if name in zoo.members]
    return {
        "the same in bfloat16": [(name, f"{name} bfloat16") for name in ("A-light-1", "A-light-2", "A-heavy-1")],
        "light siblings": [*combinations(light, 2)],
        "frozen body and light": _across(zoo.of("frozen"), light),
        "body, heads apart": [*combinations(heads, 2), *_across(heads, light)],
        "fine-tune of a fine-tune": _across(again, light),
        "heavy": [*combinations(heavy, 2), *_across(heavy, light)],
        "via continued pretraining": [*combinations(continued, 2), *_across(continued, light)],
        "one hot": _across(hot, [*light, *heavy]),
        "both hot": [*combinations(hot, 2)],
        "one or both far too hot": [*combinations(worst, 2), *_across(worst, [*hot, *light])],
        "own ancestor": _across(["A"], tuned) + _across(["B"], b) + _across(["A2"], a2),
        "own ancestor, hot": _across(["A"], hot),
        "own ancestor, far too hot": _across(["A"], worst),
        "earlier ancestor": _across(["A"], [*continued, *again]),
        "towers and their whole CLIP": [*combinations(towers, 2), *_across(["CLIP"], towers)] if towers else [],
        "same random start": _across(["A", *light, *heavy], ["A2", *a2]),
        "unrelated": _across(["A", *light, *heavy, *hot, *worst, *continued, "A2", *a2], ["B", *b]),
        "neurons of one layer permuted": guised("one layer"),
        "neurons of all layers permuted": guised("neurons"),
        "half of the neurons permuted": guised("half"),
        "two of four heads swapped": guised("two heads") if zoo.title not in TEXTS else [],
        "three of four heads permuted": guised("three heads") if zoo.title not in TEXTS else [],
        "hidden dimension permuted": guised("hidden"),
    }


def head_pairs_of(zoo: Zoo) -> dict[str, Pairs]:
    """Kinds of pairs of heads."""
    light, heavy, hot = (zoo.of(kind, parent="A") for kind in ("light", "heavy", "hot"))
    heads, continued, b = zoo.of("head"), zoo.of("light", parent="A-continued"), zoo.of("light", line="B")
    return {
        "one start, light and heavy": [*combinations([*light, *heavy], 2), *_across(["A-again"], light)],
        "one start, frozen body": _across(zoo.of("frozen"), [*light, *heavy]),
        "one start, hot": [*combinations(hot, 2), *_across(hot, [*light, *heavy])],
        "one recipe, continued pretraining between": _across(continued, light),
        "one recipe, other ancestor": _across(b, light),
        "started apart": [*combinations(heads, 2), *_across(heads, [*light, *heavy])],
        "rows permuted": [(name, f"{name} labels") for name in ("A-light-1", "A-light-2", "A-heavy-1")],
    }


def bases_of(zoo: Zoo) -> dict[str, list[tuple[str, str, str]]]:
    """Kinds of bases, each with two models and the base that their task vectors are measured from."""
    light, heavy, hot = (zoo.of(kind, parent="A") for kind in ("light", "heavy", "hot"))
    continued, heads, worst = zoo.of("light", parent="A-continued"), zoo.of("head"), zoo.of("worst")
    b, a2, usual = zoo.of("light", line="B"), zoo.of("light", line="A2"), [*light, *heavy, *heads]

    def from_base(base: str, models: Sequence[str]) -> list[tuple[str, str, str]]:
        return [(one, other, base) for one, other in combinations(models, 2)]

    towers = from_base("CLIP", ["CLIP-1", "CLIP-2"]) if "CLIP" in zoo.members else []
    return {
        "the right one": from_base("A", usual) + from_base("B", b) + from_base("A2", a2)
        + from_base("A-continued", continued) + towers,
        "the right one, some hot": [(one, other, "A") for one, other in _across(hot, usual)] + from_base("A", hot),
        "the right one, some far too hot": [(one, other, "A") for one, other in _across(worst, [*usual, *hot])]
        + from_base("A", worst),
        "that of a fine-tune and of a fine-tune of it": [("A-light-1", "A-again", "A")],
        "an earlier one (before continued pretraining)": from_base("A", continued),
        "a later one (after continued pretraining)": from_base("A-continued", usual if continued else []),
        "a sibling": [(o, e, s) for s in light for o, e in combinations([n for n in usual if n != s], 2)],
        "same random start": from_base("A2", usual) + from_base("A", a2),
        "a stranger": from_base("B", [*usual, *hot, *worst]) + from_base("A", b) + from_base("A2", b),
    }  # fmt: skip


# ---- what they have in common -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alike:
    """What two models have in common."""

    median: float
    rows: float
    lowest: float
    verdict: bool
    apart: bool
    low: bool


def alike(read: dict[str, Sample], a: str, b: str) -> Alike:
    """Of bodies or of heads."""
    found: Similarity = kinship.measure_similarity([read[a], read[b]], [a, b], "body")
    tensors = found.by_tensor[:, 0, 1]
    tensors = tensors[np.isfinite(tensors)]
    rows = float(found.rows[0, 1])
    lowest = float(tensors.min())
    apart, low = (bool(each[:, 0, 1].any()) for each in (found.tensors_unrelated, found.tensors_drifted))
    return Alike(float(found.cosines[0, 1]), rows, lowest, bool(found.related[0, 1]), apart, low)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Minimum … median … maximum."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    return " … ".join(f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))


def table(
    title: str, zoos: Sequence[Zoo], pairs_in: Callable[[Zoo], dict[str, Pairs]], part: str
) -> dict[str, list[Alike]]:
    """Print what pairs of each kind have in common, and return it."""
    known: dict[str, list[Alike]] = {}
    heads = part == "heads"
    rest = (
        ""
        if heads
        else " rows that find themselves | lowest tensor | related | a tensor unrelated | a tensor drifted |"
    )
    print(f"\n### {title}\n\n| pair | pairs | median cosine |{rest}\n|---|---|---|{'' if heads else '---|' * 5}")
    for kind in pairs_in(zoos[0]):
        found = [alike(getattr(zoo, part), a, b) for zoo in zoos for a, b in pairs_in(zoo)[kind]]
        if not found:
            continue
        known[kind] = found
        row = f"| {kind} | {len(found)} | {spread([each.median for each in found])} |"
        if not heads:
            row += f" {spread([each.rows for each in found])} | {spread([each.lowest for each in found])} |"
            row += f" {sum(each.verdict for each in found)} |"
            row += f" {sum(each.apart for each in found)} | {sum(each.low for each in found)} |"
        print(row)
    return known


def bases(title: str, zoos: Sequence[Zoo]) -> dict[str, list[tuple[float, float]]]:
    """Print cosines and sizes of task vectors from each kind of base, and return them."""
    known: dict[str, list[tuple[float, float]]] = {}
    for zoo in zoos:
        names = list(zoo.bodies)
        everyone = kinship.measure_similarity([zoo.bodies[name] for name in names], names, "body")
        for kind, wanted in bases_of(zoo).items():
            for one, other, base in wanted:
                moved = everyone.task_vectors([names.index(one), names.index(other)], names.index(base))
                known.setdefault(kind, []).extend([moved] if moved else [])
    print(f"\n### {title}: two task vectors, from several bases\n")
    print(f"| base | pairs | cosine | size relative to the base | size where the cosine is above {kinship.WRONG_BASE} |"
          " taken for wrong |\n|---|---|---|---|---|---|")  # fmt: skip
    for kind, found in known.items():
        alike_ones = [size for cosine, size in found if cosine > kinship.WRONG_BASE]
        wrong = sum(size > kinship.FAR_FROM_BASE for size in alike_ones)
        cosines, sizes = zip(*found, strict=True)
        print(f"| {kind} | {len(found)} | {spread(cosines)} | {spread(sizes)} | {spread(alike_ones)} | {wrong} |")
    return known


_UNRELATED = ("unrelated", "hidden dimension permuted")
_MOVED_ABOUT = ("neurons of one layer permuted", "neurons of all layers permuted")
_IN_PART = ("half of the neurons permuted", "two of four heads swapped", "three of four heads permuted")
_HOT = ("one hot", "both hot", "own ancestor, hot", "one or both far too hot", "own ancestor, far too hot")


def margins(
    bodies: dict[str, dict[str, list[Alike]]],
    heads: dict[str, list[float]],
    moved: dict[str, list[tuple[float, float]]],
) -> None:
    """Print each threshold between what was measured on both of its sides."""
    pairs = [(kind, pair) for found in bodies.values() for kind, each in found.items() for pair in each]
    kin = [each for kind, each in pairs if kind not in (*_UNRELATED, *_MOVED_ABOUT, *_IN_PART)]
    ordinary = [
        each for kind, each in pairs if kind not in (*_UNRELATED, *_MOVED_ABOUT, *_IN_PART, *_HOT, "same random start")
    ]
    strange = [each for kind, each in pairs if kind in _UNRELATED]
    hot = [each for kind, each in pairs if kind in _HOT]
    permuted = [each for kind, each in pairs if kind in _MOVED_ABOUT]
    far = [size for kind in ("same random start",) for cosine, size in moved[kind] if cosine > kinship.WRONG_BASE]
    near = [
        (size, kind) for kind, found in moved.items() for cosine, size in found
        if cosine > kinship.WRONG_BASE and kind not in ("same random start", "a stranger")
    ]  # fmt: skip
    together = [c for kind, found in heads.items() if kind.startswith("one start") for c in found]
    cold = [c for kind, found in heads.items() if kind.startswith("one start") and "hot" not in kind for c in found]
    apart = [c for kind in ("started apart", "rows permuted") for c in heads[kind]]
    sure, tensor = kinship.SURELY_RELATED, kinship.TENSOR_UNRELATED
    broken = max(each.median for each in kin if each.lowest < tensor)
    lowest = min(each.lowest for each in kin if each.median >= sure)
    share = min(each.lowest / each.median for each in kin if each.median >= sure)
    cold_median, cold_rows = min(each.median for each in ordinary), min(each.rows for each in ordinary)
    rows = [
        ("UNRELATED", kinship.UNRELATED, f"unrelated {max(each.median for each in strange):.3f}",
         f"related {min(each.median for each in kin):.3f}; without hot runs {cold_median:.3f}"),
        ("SAME_ROWS", kinship.SAME_ROWS, f"unrelated {max(each.rows for each in strange):.3f}",
         f"related {min(each.rows for each in kin):.3f}; without hot runs {cold_rows:.3f}"),
        ("DRIFTED", kinship.DRIFTED, f"hot runs {max(each.median for each in hot):.3f}",
         f"without hot runs {cold_median:.3f}"),
        ("SURELY_RELATED", sure, f"related, with an unrelated tensor {broken:.3f}",
         f"a permuted MLP {min(each.median for each in permuted):.3f}"),
        ("SURELY_RELATED, then TENSOR_UNRELATED for each tensor", tensor,
         f"a permuted MLP {max(each.lowest for each in permuted):.3f}", f"lowest tensor of related ones {lowest:.3f}"),
        ("TENSOR_DRIFTED, of the median", kinship.TENSOR_DRIFTED,
         f"half of the neurons {max(e.lowest / e.median for k, e in pairs if k == _IN_PART[0]):.3f}",
         f"surely related {share:.3f}; without hot runs {min(e.lowest / e.median for e in ordinary):.3f}"),
        ("HEADS_UNRELATED", kinship.HEADS_UNRELATED, f"apart or permuted {max(apart):.3f}",
         f"together {min(together):.3f}; without hot runs {min(cold):.3f}"),
        ("FAR_FROM_BASE", kinship.FAR_FROM_BASE, f"related {max(near)[0]:.3f} ({max(near)[1]})",
         f"same random start {min(far):.3f}"),
    ]  # fmt: skip
    print("\n### Thresholds\n\n| threshold | value | highest below | lowest above |\n|---|---|---|---|")
    for name, value, below, above in rows:
        print(f"| {name} | {value} | {below} | {above} |")


def coverage() -> None:
    """Print in how many layers of deep models an MLP with its neurons in another order would be seen."""
    print("\n### Layers whose MLP is among the sampled tensors\n")
    print("| model | sampled tensors | layers seen |\n|---|---|---|")
    for title, layers, hidden, parts in (
        ("ViT-B", 12, 768, {"attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.o": 1, "mlp.fc1": 4, "mlp.fc2": 1}),
        ("Llama, 32 layers", 32, 4096, _LLAMA),
        ("Llama, 80 layers", 80, 8192, _LLAMA),
    ):
        shapes = {
            f"layers.{layer}.{part}": (hidden * times, hidden)
            for layer in range(layers)
            for part, times in parts.items()
        }
        picked = [pick.name for pick in samples.choose_rows({"embedding": (30_000, hidden), **shapes})]
        seen = {name.split(".")[1] for name in picked if "mlp" in name}
        print(f"| {title} | {len(picked)} | {len(seen)} of {layers} |")


_LLAMA = {
    "attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.o": 1, "mlp.gate": 3, "mlp.up": 3, "mlp.down": 1,
}  # fmt: skip


def accuracies(title: str, zoos: Sequence[Zoo], measure: Callable[[Path], float]) -> None:
    """Print how well the fine-tunes do what they were trained for."""
    kinds: dict[str, list[float]] = {}
    for zoo in zoos:
        for member in zoo.members.values():
            if member.kind not in ("ancestor", "continued"):
                kinds.setdefault(member.kind, []).append(measure(member.folder))
    print(f"\n{title}, accuracy on test data: " + "; ".join(f"{kind} {spread(each)}" for kind, each in kinds.items()))


VIT, TEXT = "ViT, 136 k parameters", "Llama, 1.0 M parameters"
HIDDEN = (32, 48, 64)
YOUNG, YOUNG_TEXT = (f"{kind}, hidden size 32 to 64, ancestors of 36 steps" for kind in ("ViT", "Llama"))
TEXTS = (TEXT, YOUNG_TEXT)


def plot(found: dict[str, dict[str, list[Alike]]], out: Path) -> None:
    """Median cosines by kind of pair, and the thresholds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(kind for each in found.values() for kind in each))
    figure, axes = pyplot.subplots(figsize=(9, 0.34 * len(kinds) + 1.3))
    jitter = np.random.default_rng(0)
    for number, (title, each) in enumerate(found.items()):
        for kind, pairs in each.items():
            values = [pair.median for pair in pairs]
            height = kinds.index(kind) + 0.2 * (number - 1.5) + jitter.uniform(-0.1, 0.1, len(values))
            axes.plot(values, height, ".", color=f"C{number}", markersize=4, alpha=0.5, label=title)
    for value, label in ((kinship.UNRELATED, "UNRELATED"), (kinship.DRIFTED, "DRIFTED")):
        axes.axvline(value, color="black", linewidth=0.8, linestyle="--")
        axes.text(value, -0.9, f"{label} {value}", ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(len(kinds) - 0.4, -0.9)
    axes.set_xlim(-0.1, 1.03)
    axes.set_xlabel("median cosine of the sampled tensors of the body")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="lower center")
    axes.grid(axis="x", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    size = out.stat().st_size
    assert size < 150_000, f"{out} has {size:,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench" / "kinship")
    parser.add_argument("--seeds", type=int, default=2, help="zoos of vision transformers")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    jobs = [(TEXT, options.folder / "text-0", 0)]
    jobs += [(VIT, options.folder / f"vit-{seed}", seed) for seed in range(options.seeds)]
    for title, name in ((YOUNG, "young"), (YOUNG_TEXT, "young-text")):
        jobs += [(title, options.folder / f"{name}-{seed}", seed) for seed in range(options.seeds)]
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(min(cores, len(jobs)), mp_context=get_context("spawn")) as pool:
        made = list(pool.map(make, *zip(*jobs, strict=True)))
    zoos = [sampled(title, members, folder) for (title, folder, _), members in zip(jobs, made, strict=True)]
    found: dict[str, dict[str, list[Alike]]] = {}
    heads: dict[str, list[float]] = {}
    moved: dict[str, list[tuple[float, float]]] = {}
    with lineage_zoo.quiet_and_alone():
        for title in (VIT, YOUNG, *TEXTS):
            measure = text_zoo.accuracy if title in TEXTS else lineage_zoo.accuracy
            mine = [zoo for zoo in zoos if zoo.title == title]
            accuracies(title, mine, measure)
            found[title] = table(f"{title}: bodies", mine, pairs_of, "bodies")
            for kind, each in table(f"{title}: heads", mine, head_pairs_of, "heads").items():
                heads.setdefault(kind, []).extend(pair.median for pair in each)
            for kind, pairs in bases(title, mine).items():
                moved.setdefault(kind, []).extend(pairs)
    margins(found, heads, moved)
    coverage()
    if options.plot:
        plot(found, options.plot)
    print(f"\n{time.perf_counter() - started:.0f} s, {len(zoos)} zoos, {cores} cores")


if __name__ == "__main__":
    main()
