"""Chat templates of strangers: what transformers makes of them, within bounds, whatever else this process does."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, LlamaConfig

from hf_soup.errors import ScoringError
from hf_soup.evaluation import chat_template
from hf_soup.evaluation.chat_template import ChatTemplateError, rendered
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.recipe import Scoring

CHAT = [{"role": "user", "content": "Hi \ud83d"}, {"role": "assistant", "content": "Yes. é\n"}]


def of(template: str | None) -> Any:
    return ByT5Tokenizer(chat_template=template)


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}])
def test_it_is_what_transformers_makes_of_it(options: dict[str, bool]) -> None:
    tokenizer = of(
        "{{ eos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    for chat in (CHAT, CHAT[::-1]):
        assert rendered(tokenizer, chat, **options) == tokenizer.apply_chat_template(chat, tokenize=False, **options)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "the donor's tokenizer has no chat template"),
        ("{% for %}", "the donor's chat template fails: Expected"),
        ("{{ raise_exception('a' * 10**6) }}", r"the donor's chat template fails: a{1000000}$"),
        ("{{ 'a' * 10**7 }}", "the donor's chat template fails: it makes 10,000,000 characters of "),
        pytest.param(
            "{{ 'a' * 10**10 }}", "the donor's chat template fails: it takes more than 1,024 MiB$",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory has no limit"),
        ),
    ],
    ids=["none", "damaged", "a long reason", "a long text", "memory"],
)  # fmt: skip
def test_what_is_refused(template: str | None, said: str) -> None:
    """The next template is rendered."""
    with pytest.raises(ChatTemplateError, match=said):
        rendered(of(template), CHAT)
    assert rendered(of("{{ messages[0].role }}"), CHAT) == "user"


def test_a_process_that_is_ended_is_begun_again() -> None:
    """By somebody; and by Ctrl-C in a session that goes on, where its answer would be taken for the next one."""
    quick = of("{{ messages[0].role }}")
    slow = of("{% for a in range(99999) %}{% for b in range(99) %}{% endfor %}{% endfor %}slow")
    assert rendered(quick, CHAT) == "user"
    os.kill(chat_template._renderer().pid, signal.SIGKILL)
    with pytest.raises(ChatTemplateError, match="it ended its process"):
        rendered(quick, CHAT)
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rendered(slow, CHAT)
    timer.join()
    assert rendered(quick, CHAT) == "user"


def test_what_takes_a_donor_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All conversations together, and beside another thread, where no process is forked."""
    assert rendered(of("ready"), CHAT) == "ready"
    monkeypatch.setattr(chat_template, "_SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "_EACH", 0.0005)
    of("{% for a in range(99999) %}{% endfor %}").save_pretrained(tmp_path)
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": CHAT[1:]})] * 10_000))
    scoring = Scoring(task="causal-lm", dataset=str(tmp_path / "chats.jsonl"))
    config, done = LlamaConfig(vocab_size=384).to_dict(), threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(ScoringError) as raised:
            prepare_datasets([("validation", scoring)], folder=tmp_path, config=config, quiet=True)
    finally:
        done.set()
        other.join()
    said = r"Cannot read row \d+ of chats.jsonl \(messages\): the donor's chat template fails: "
    assert re.fullmatch(said + r"it takes more than 0\.3 seconds", raised.value.message)
