"""Renders chat templates in a process of its own, whose time and memory the system limits.

    python -m minisft.chat.render_process < requests > replies

`render` starts it. A chat template comes with a model, perhaps from somebody else, and is a
program: it may loop for ever, fill the memory, or compute `9**9**9`. Jinja's sandbox stops none of
these, and no signal interrupts a single operation in C. The system does stop a process, in
whichever thread it is waited for.

Requests and replies are lines of JSON. The process ends when its standard input is closed.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from minisft import processes
from minisft.chat.template import RefusedConversation
from minisft.text import one_line

MOST_SECONDS = 10.0  # for rendering one conversation
MOST_MEMORY = 512  # MiB for templates and texts, beside Python's own
OUT_OF_MEMORY = 3  # exit code
MOST_CHARACTERS = 1 << 25  # of a rendering: 16 times a conversation of `LONGEST_MESSAGE`


def render(template: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """The text of a chat.

    Args:
        template: `source`, in Jinja, and `variables`, such as the special tokens.
        request: `messages`, `tools` and `add_generation_prompt`, as templates of transformers
            take them.

    Raises `RefusedConversation` with the template's own words, or for one that exceeds a limit.
    """
    return _text(template, request)


def render_as_transformers(source: str, request: Mapping[str, Any], hf: Any, control: Collection[str]) -> str:
    """The text that `hf.apply_chat_template` makes of `request` for its own tokenization.

    `hf` is a tokenizer of transformers. Special tokens and those of `control` that a message spells
    have transformers' marks around them: `hf(text, sanitize_control_tokens=True)` makes text of
    these. Raises `RefusedConversation`.
    """
    template = {"source": source, "variables": dict(hf.special_tokens_map)}
    added = [[token.content, token.special] for token in hf.added_tokens_decoder.values()]
    return _text(template, {**request, "added_tokens": added, "chat_control_tokens": [*control]})


def _text(template: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    reply = _renderer(os.getpid()).reply(template, request)
    if "error" in reply:
        raise RefusedConversation(f"the template refuses it: {one_line(reply['error'], 100)}")
    return reply["text"]


@functools.cache
def _renderer(pid: int) -> _Renderer:
    """The renderer of the process `pid`: one that was forked must not read its parent's replies."""
    return _Renderer()


class _Renderer:
    """The rendering process, which is started when it is needed and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._template: Mapping[str, Any] | None = None  # the one that the process has

    def reply(self, template: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, str]:
        """The reply to a request: its `text`, or the `error`."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = processes.python("-m", __name__)
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=processes.environment()
                )
                self._template = None
            new = None if template == self._template else template
            self._template = template
            line = json.dumps({"template": new, "seconds": MOST_SECONDS, "request": request}) + "\n"
            try:
                return self._answer(self._process, line.encode())
            except BaseException:  # interrupted: the next request must not get this reply
                self._process.kill()
                self._process.wait()
                raise

    def _answer(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        code = process.wait()
        with suppress(BrokenPipeError), process:  # closes the pipes
            pass
        if code == -signal.SIGALRM:
            return {"error": f"it takes more than {MOST_SECONDS:g} s"}
        if code == OUT_OF_MEMORY:
            return {"error": f"it needs more than {MOST_MEMORY} MiB of memory"}
        return {"error": f"its process ended with exit code {code}"}


# --- in the rendering process ---------------------------------------------------------------------


def main() -> None:
    """Answer the requests on standard input."""
    import transformers.tokenization_utils_base  # before the first time limit  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that waits
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback when that process is gone
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process, even in the middle of an operation
    _limit_memory()
    template: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        template = asked["template"] or template
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        try:
            request = asked["request"]
            text = (_as_transformers if "added_tokens" in request else _rendered)(template, request)
            too_long = f"it writes more than {MOST_CHARACTERS:,} characters"
            reply = {"text": text} if len(text) <= MOST_CHARACTERS else {"error": too_long}
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # what it still holds would be missing for the next template
        except Exception as error:  # a template may raise anything
            reply = {"error": str(error)[:1000] or type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _rendered(template: Mapping[str, Any], request: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [request.pop("messages")]
    # The texts of several chats, and their generation spans.
    texts: Any = render_jinja_template(chat, chat_template=template["source"], **request, **template["variables"])
    return texts[0][0]


def _as_transformers(template: Mapping[str, Any], request: dict[str, Any]) -> str:
    from transformers import AddedToken
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    class TextTokenizer(PreTrainedTokenizerBase):
        """Renders and marks as every tokenizer of transformers does, and leaves out the tokenization."""

        special_tokens_map = template["variables"]
        added_tokens_decoder = {  # noqa: RUF012 (a property of its base)
            i: AddedToken(content, special=special) for i, (content, special) in enumerate(request.pop("added_tokens"))
        }

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": text}

    tokenizer = TextTokenizer(chat_control_tokens=request.pop("chat_control_tokens"))
    messages = request.pop("messages")
    made: Any = tokenizer.apply_chat_template(
        messages, chat_template=template["source"], sanitize_control_tokens=True, **request
    )
    return made["input_ids"]


def _limit_memory() -> None:
    """Let allocations fail beyond `MOST_MEMORY` (Linux; elsewhere the system may have no such limit)."""
    import psutil

    most = psutil.Process().memory_info().vms + (MOST_MEMORY << 20)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
