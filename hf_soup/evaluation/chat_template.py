"""A stranger's chat template, rendered in a process of its own that takes no more time, memory and text than it may.

Templates are programs: loops in loops take for ever, and one product of a text takes all memory. The process is a new
one, as data are read by threads, beside which none is forked; it begins with the first conversation, and renders those
of every template.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from hf_soup._util.isolated import limit_memory
from hf_soup._util.text import first_line

#: Seconds that a template may take for all conversations together, and those that each adds to them.
_SECONDS, _EACH = 30.0, 0.02
#: Bytes beside what the process has when it begins.
_BYTES = 1 << 30
#: Characters that a template may make, and how many for each that it is given.
_CHARACTERS, _TIMES = 100_000, 10
_ASKING = threading.Lock()


class ChatTemplateError(ValueError):
    """The donor's chat template makes no text of a conversation."""


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text that the chat template of the donor's tokenizer makes of a conversation.

    Args:
        tokenizer: Of transformers.
        messages: The conversation.
        options: As ``apply_chat_template`` has them.

    Raises:
        ChatTemplateError: There is no template, it fails, or it takes or makes too much.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError("the donor's tokenizer has no chat template, which makes texts of conversations")
    template = {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
    asked = {"conversations": [messages], **template, **options}
    answer = _answer(json.dumps([_SECONDS, _EACH, asked], default=str))
    if "text" not in answer:
        raise ChatTemplateError(f"the donor's chat template fails: {answer['error']}")
    return answer["text"]


def _answer(line: str) -> dict[str, str]:
    """Of the process, which is begun where it is not there."""
    with _ASKING:
        process, answer = _renderer(), ""
        try:
            with suppress(BrokenPipeError):  # somebody ended it
                print(line, file=process.stdin, flush=True)
            answer = process.stdout.readline()  # type: ignore[union-attr]  # it is a pipe
        finally:
            if not answer:  # it has ended; or Ctrl-C, after which its answer would be taken for the next one
                _renderer.cache_clear()
                process.kill()
                process.communicate()
    if not answer:
        in_time = process.returncode != -signal.SIGALRM
        return {"error": "it ended its process" if in_time else f"it takes more than {_SECONDS:g} seconds"}
    return json.loads(answer)  # type: ignore[no-any-return]


@cache
def _renderer() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from hf_soup.evaluation.chat_template import serve; serve()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,  # Ctrl-C is not for it
    )  # fmt: skip
    atexit.register(process.communicate)
    atexit.register(process.kill)  # which comes first
    return process


def serve() -> None:
    """The other process: renders the conversations that it is asked for."""
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(_BYTES)
    left: dict[str, float] = {}
    for line in sys.stdin:
        seconds, more, asked = json.loads(line)
        # Which ends the process, whatever it is at.
        signal.setitimer(signal.ITIMER_REAL, left.get(asked["chat_template"], seconds))
        try:
            text = render_jinja_template(**asked)[0][0]
            if len(text) > _CHARACTERS + _TIMES * len(line):
                raise ValueError(f"it makes {len(text):,} characters of {len(line):,}")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it takes more than {_BYTES >> 20:,} MiB"}
        except Exception as error:  # noqa: BLE001 -- whatever a stranger's template raises
            answer = {"error": first_line(error)}
        left[asked["chat_template"]] = more + signal.setitimer(signal.ITIMER_REAL, 0)[0]
        print(json.dumps(answer), flush=True)  # noqa: T201
