"""The contract that other packages test their tasks with holds for the built-in ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_soup.testing import TaskTests

TEXTS = ["one good day", "a sad film", "what a good book", "awful", "good", "a sad sad day"]


class TestTextClassification(TaskTests):
    task = "text-classification"
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, family: Path) -> Path:
        return family / "a"


class TestLossOfClasses(TestTextClassification):
    keys = {"metric": "loss"}  # noqa: RUF012


class TestCausalLM(TaskTests):
    task = "causal-lm"
    rows = [{"text": text} for text in (*TEXTS, " ".join(TEXTS) * 3)]  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, language_family: Path) -> Path:
        return language_family / "one"


class TestConversations(TestCausalLM):
    keys = {"assistant_only": True}  # noqa: RUF012
    rows = [  # noqa: RUF012
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": other}]}
        for text, other in zip(TEXTS, reversed(TEXTS), strict=True)
    ]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, language_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("chat") / "model"
        shutil.copytree(language_family / "one", folder)
        template = "{% for each in messages %}[{{ each.role }}]{{ each.content }}{% endfor %}"
        (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
        return folder


class TestMultipleChoiceLM(TaskTests):
    task = "multiple-choice-lm"
    rows = [  # noqa: RUF012
        {"question": text, "choices": ["yes", "no", "maybe so"][: 2 + number % 2], "label": number % 2}
        for number, text in enumerate(TEXTS)
    ]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, language_family: Path) -> Path:
        return language_family / "one"

    def other(self, outputs: Any) -> Any:
        return outputs[[2, 3, 0, 1, 4, 5]]  # of as many choices
