"""The data of the demo with language models: pages of Python's manual as a data set repo, and code for the ancestor."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from hf_soup.demo.training import write_card

#: Letters of a text, which are its bytes too: all others are left out.
LENGTH = 128
#: Texts of a page that validation or test data have at most, as those of one page say less than as many of several.
_FROM_A_PAGE = 12


def make_dataset(folder: Path, seed: int, sizes: tuple[int, int]) -> None:
    """Write the manual as a data set repo: a JSON lines file of texts for each split, and a card."""
    splits = pages_of(seed, sizes)
    (folder / "data").mkdir(parents=True)
    for name, pages in splits.items():
        rows = [{"text": text, "page": number} for number, page in enumerate(pages) for text in page]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    front = {
        "license": "other",
        "license_name": "psf-2.0",
        "license_link": "https://docs.python.org/3/license.html",
        "language": "en",
        "pretty_name": "Pages of Python's manual",
        "task_categories": ["text-generation"],
        "size_categories": ["1K<n<10K"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}.jsonl"} for name in splits],
            }
        ],
    }
    counts = {name: sum(map(len, pages)) for name, pages in splits.items()}
    write_card(folder, front, _DATASET_CARD.format(seed=seed, length=LENGTH, **counts))


def pages_of(seed: int, sizes: tuple[int, int]) -> dict[str, list[list[str]]]:
    """The manual in splits, by page, in an order that the seed decides: the texts of each page.

    Args:
        seed: Of the order.
        sizes: How many validation and test texts there are, of no page more than a few.
    """
    pages = _pages()
    random.Random(seed).shuffle(pages)
    splits = {}
    for name, size in zip(("validation", "test"), sizes, strict=True):
        parts: list[list[str]] = []
        while (missing := size - sum(map(len, parts))) > 0:
            parts.append(_pieces(pages.pop())[: min(_FROM_A_PAGE, missing)])
        splits[name] = parts
    return {"train": [_pieces(page) for page in pages], **splits}


def splits_of(seed: int, sizes: tuple[int, int]) -> dict[str, list[str]]:
    """The texts of `pages_of`."""
    return {name: [text for page in pages for text in page] for name, pages in pages_of(seed, sizes).items()}


def code() -> list[str]:
    """The modules of Python's standard library, in texts as long as those of the manual."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    modules = [module for module in modules if module.name != "pdb.py"]  # its docstring is a page of the manual
    return [text for module in modules for text in _pieces(module.read_text(encoding="utf-8", errors="ignore"))]


def _pages() -> list[str]:
    """The manual that comes with ``pydoc``; what stands on several pages stays on the shortest of them alone."""
    seen = set[str]()
    return [
        "\n\n".join(_new(page.split("\n\n"), seen))
        for page in sorted(topics.values(), key=lambda page: (len(page), page))
    ]


def _new(paragraphs: Iterable[str], seen: set[str]) -> list[str]:
    new = []
    for paragraph in paragraphs:
        words = " ".join(paragraph.split())
        if words not in seen:
            new.append(paragraph)
            seen.add(words)
    return new


def _pieces(text: str) -> list[str]:
    text = text.encode("ascii", "ignore").decode("ascii")
    return [text[begin : begin + LENGTH] for begin in range(0, len(text) - LENGTH + 1, LENGTH)]


_DATASET_CARD = """
# Pages of Python's manual

The pages that Python's own `help()` shows (`pydoc_data.topics`), in texts of {length} letters, of which all are in
ASCII: others are left out, as is what is too short at the end of a page.

| split | texts | |
|---|---|---|
| train | {train:,} | for fine-tuning |
| validation | {validation:,} | held out: for choosing among models and soups |
| test | {test:,} | looked at once, at the end |

What is split are pages, in a random order (seed {seed}). A paragraph that stands on several pages is kept on the
shortest of them alone, so no split has one of another. The ancestor has read no page. **Texts of a page resemble each
other**: the column `page` says which they are, and `hf-soup` draws pages for its intervals. All pages are of one
manual: `test` says nothing about other texts.

Written by `hf-soup demo --lm`; meant for that, not as a benchmark.
"""
