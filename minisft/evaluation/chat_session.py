"""Chat with a model: stream its answers, in the training template, before and after training.

    minisft chat zero2 --beside

Typed text cannot forge a control token, and the model's output cannot control the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TextIO

from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError
from minisft.evaluation.answers import load_to_answer
from minisft.evaluation.chat_reply import reply_message
from minisft.evaluation.eval_set import load_template, prompt_ids
from minisft.evaluation.generate import generate_stream
from minisft.launch.notebook_view import in_notebook
from minisft.model.configs import positions_of
from minisft.run.folder import Run, checkpoint_step
from minisft.text import say
from minisft.training.checkpoint_health import checkpoint_problem

REPLACEMENT = "\ufffd"  # decoded from the first bytes of an incomplete character


class ChatSession:
    """A chat with the model in `folder`; each prompt contains all earlier messages."""

    def __init__(self, run: Run, folder: Path):
        self.tokenizer, self.template = load_template(run.model_folder, run.config.template)
        self.model = load_to_answer(folder, self.tokenizer, run.precision, run.trust_remote_code)
        self.positions = positions_of(self.model.config) or 1 << 30
        self.messages: list[Message] = []

    def say(self, text: str, max_new_tokens: int = 200) -> Iterator[str]:
        """Stream the answer to `text`.

        The oldest exchanges are dropped if the conversation exceeds the model's positions.

        Raises `UserError` if `text` alone does not fit, or if the template refuses it: it is then
        no part of the conversation.
        """
        messages = [*self.messages, Message("user", text)]
        while len(ids := self.prompt(messages)) + max_new_tokens > self.positions:
            if len(messages) == 1:
                raise UserError(
                    f"{len(ids)} tokens and an answer of {max_new_tokens} do not fit in the model's {self.positions} "
                    "positions: use a shorter message"
                )
            del messages[:2]
        answer_ids: list[int] = []
        shown = ""
        for token in generate_stream(self.model, ids, stop_ids=self.tokenizer.stop_ids, max_new_tokens=max_new_tokens):
            answer_ids.append(token)
            answer = self.tokenizer.decode(answer_ids).lstrip()
            if not answer.endswith(REPLACEMENT):
                yield answer[len(shown) :]
                shown = answer
        reply = self.tokenizer.decode(answer_ids)
        if (answer := reply.lstrip()) != shown:
            yield answer[len(shown) :]
        answered = reply_message(reply, answer_ids, messages, self.template, self.tokenizer)
        self.messages[:] = [*messages, answered]

    def prompt(self, messages: Sequence[Message] | None = None) -> list[int]:
        """Return the ids of `messages`, by default those so far, up to where the next answer begins."""
        conversation = Conversation("talk", (*(messages or self.messages), Message("assistant", "")))
        return prompt_ids(conversation, self.template, self.tokenizer)


def open_sessions(run: Run, step: int | None = None, beside: bool = False) -> dict[str, ChatSession]:
    """Open a chat with a checkpoint of `run`, the last by default.

    With `beside`, also open one with the model before training.

    Returns sessions by name, the model before training first. Raises `UserError` if the checkpoint
    does not exist or cannot be used.
    """
    steps = {checkpoint_step(c): c for c in run.checkpoints}
    if not steps:
        raise UserError(f"{run.name} has no checkpoint to talk to (it is {run.status}): train it first")
    folder = steps.get(max(steps) if step is None else step)
    if folder is None:
        raise UserError(f"{run.name} has no checkpoint of step {step}: it has those of {', '.join(map(str, steps))}")
    if problem := checkpoint_problem(run, folder):
        raise UserError(f"{run.name} {folder.name} cannot be used: {problem}")
    if beside and (problem := checkpoint_problem(run, run.model_folder)):
        raise UserError(f"the model before training, {run.model_folder}, cannot be used: {problem}")
    before = {"before": ChatSession(run, run.model_folder)} if beside else {}
    return before | {f"step {checkpoint_step(folder)}": ChatSession(run, folder)}


def in_terminal(
    found: Mapping[str, ChatSession], asked: TextIO | None, out: TextIO | None, max_new_tokens: int = 200
) -> None:
    """Answer each line of `asked` until it ends, with every session in `found` (by name)."""
    prompt = "you> " if asked is not None and asked.isatty() else ""
    width = max(map(len, found))
    while True:
        say(prompt, end="", to=out)
        line = asked.readline() if asked is not None else ""
        if not line:
            if prompt:
                say(to=out)
            return
        if not line.strip():
            continue
        for name, session in found.items():
            say(f"{name:<{width}}> ", end="", to=out)
            is_empty = True
            try:
                for piece in session.say(_valid_text(line.strip()), max_new_tokens):
                    is_empty = is_empty and not piece
                    say(piece, end="", to=out)
                if is_empty:
                    say("(nothing)", end="", to=out)
            except UserError as error:
                say(f"({error})", end="", to=out)
            say(to=out)


def _valid_text(text: str) -> str:
    """Replace each byte that was not valid UTF-8 with a question mark."""
    return text.encode("utf-8", "replace").decode()


class SideBySideChat:
    """Stream answers before and after training side by side, in a notebook.

    `ask = SideBySideChat(run)`, then `ask("a question")`.
    """

    def __init__(self, run: Run, step: int | None = None):
        self.talks = open_sessions(run, step, beside=True)

    def __call__(self, question: str, max_new_tokens: int = 60) -> None:
        """Ask `question` without earlier messages, and show the answers as they are generated."""
        answers = dict.fromkeys(self.talks, "")
        show = _Table(question) if in_notebook() else None
        for name, session in self.talks.items():
            session.messages.clear()
            for piece in session.say(question, max_new_tokens):
                answers[name] += piece
                if show:
                    show(answers)
            if not show:
                say(f"{name}: {answers[name]}")
        if show:
            show(answers)


class _Table:
    """One notebook output that is updated in place."""

    def __init__(self, question: str):
        self.question = question
        self.handle: Any = None

    def __call__(self, answers: Mapping[str, str]) -> None:
        from IPython.display import display

        data = {"text/html": answers_as_html(self.question, answers), "text/plain": str(dict(answers))}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def answers_as_html(question: str, answers: Mapping[str, str]) -> str:
    """Return an HTML table of a question and its answers by name; all text is escaped."""
    style = "text-align:left;vertical-align:top;white-space:pre-wrap"
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in answers)
    escaped = [escape(answer) or "<em>(nothing)</em>" for answer in answers.values()]
    cells = "".join(f"<td style='{style};width:{90 // len(answers)}%'>{answer}</td>" for answer in escaped)
    return f"<table><caption>{escape(question)}</caption><tr>{head}</tr><tr>{cells}</tr></table>"
