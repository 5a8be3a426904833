"""Talking to a model: answers as they come, in the template of training, before and after it.

    minisft chat zero2 --beside

What you type cannot forge a control token, and what the model says cannot move your cursor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, TextIO

from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError
from minisft.evaluation.answers import load_to_answer
from minisft.evaluation.eval_set import load_template, prompt_ids
from minisft.evaluation.generate import generate_stream
from minisft.launch.notebook_view import in_notebook
from minisft.model.configs import positions_of
from minisft.run.folder import Run, checkpoint_step
from minisft.text import say
from minisft.training.checkpoint_health import checkpoint_problem

REPLACEMENT = "\ufffd"  # what half a character decodes to


class ChatSession:
    """A conversation with the model in `folder`: what is said goes into the next prompt, as in training."""

    def __init__(self, run: Run, folder: Path):
        self.tokenizer, self.template = load_template(run.model_folder, run.config.template)
        self.model = load_to_answer(folder, self.tokenizer, run.precision, run.trust_remote_code)
        self.positions = positions_of(self.model.config) or 1 << 30
        self.messages: list[Message] = []

    def say(self, text: str, max_new_tokens: int = 200) -> Iterator[str]:
        """The answer to `text`, piece by piece. What no longer fits in the model's positions is forgotten first.

        Raises `UserError` for a text that does not fit even alone.
        """
        self.messages.append(Message("user", text))
        while len(ids := self.prompt()) + max_new_tokens > self.positions:
            if len(self.messages) == 1:
                self.messages.clear()
                raise UserError(
                    f"{len(ids)} tokens and an answer of {max_new_tokens} do not fit in the model's {self.positions} "
                    "positions: say it in fewer words"
                )
            del self.messages[:2]
        said: list[int] = []
        shown = ""
        for token in generate_stream(self.model, ids, eos_id=self.tokenizer.eos_id, max_new_tokens=max_new_tokens):
            said.append(token)
            text = self.tokenizer.decode(said).lstrip()
            if not text.endswith(REPLACEMENT):
                yield text[len(shown) :]
                shown = text
        if (text := self.tokenizer.decode(said).lstrip()) != shown:
            yield text[len(shown) :]
        self.messages.append(Message("assistant", text.strip()))

    def prompt(self) -> list[int]:
        """The ids of all that was said so far, up to where the next answer begins."""
        asked = Conversation("talk", (*self.messages, Message("assistant", "")))
        return prompt_ids(asked, self.template, self.tokenizer)


def open_sessions(run: Run, step: int | None = None, beside: bool = False) -> dict[str, ChatSession]:
    """A talk with a checkpoint of `run`, its last if no `step` is given; with `beside` the model before training first.

    Raises `UserError` where there is no such checkpoint, or where it cannot be used.
    """
    steps = {checkpoint_step(c): c for c in run.checkpoints}
    if not steps:
        raise UserError(f"{run.name} has no checkpoint to talk to (it is {run.status}): train it first")
    folder = steps.get(max(steps) if step is None else step)
    if folder is None:
        raise UserError(f"{run.name} has no checkpoint of step {step}: it has those of {', '.join(map(str, steps))}")
    if wrong := checkpoint_problem(run, folder):
        raise UserError(f"{run.name} {folder.name} cannot be used: {wrong}")
    if beside and (wrong := checkpoint_problem(run, run.model_folder)):
        raise UserError(f"the model before training, {run.model_folder}, cannot be used: {wrong}")
    before = {"before": ChatSession(run, run.model_folder)} if beside else {}
    return before | {f"step {checkpoint_step(folder)}": ChatSession(run, folder)}


def in_terminal(
    found: Mapping[str, ChatSession], asked: TextIO | None, out: TextIO | None, max_new_tokens: int = 200
) -> None:
    """Answer each line of `asked` until it ends."""
    prompt = "you> " if asked is not None and asked.isatty() else ""
    width = max(map(len, found))
    while True:
        say(prompt, end="", to=out)
        line = asked.readline() if asked is not None else ""
        if not line:
            say(to=out) if prompt else None
            return
        if not line.strip():
            continue
        for name, talk in found.items():
            say(f"{name:<{width}}> ", end="", to=out)
            said = ""
            try:
                for piece in talk.say(_sayable(line.strip()), max_new_tokens):
                    said += piece
                    say(piece, end="", to=out)
                if not said:
                    say("(nothing)", end="", to=out)
            except UserError as error:
                say(f"({error})", end="", to=out)
            say(to=out)


def _sayable(text: str) -> str:
    """The text with a question mark for each byte that was no character."""
    return text.encode("utf-8", "replace").decode()


class SideBySideChat:
    """For a notebook: `ask = SideBySideChat(run)`; `ask("a question")` streams answers before and after training."""

    def __init__(self, run: Run, step: int | None = None):
        self.talks = open_sessions(run, step, beside=True)

    def __call__(self, question: str, max_new_tokens: int = 60) -> None:
        """Show what the models say to `question`, asked alone, as they say it."""
        answers = dict.fromkeys(self.talks, "")
        show = _Table(question) if in_notebook() else None
        for name, talk in self.talks.items():
            talk.messages.clear()
            for piece in talk.say(question, max_new_tokens):
                answers[name] += piece
                if show:
                    show(answers)
            if not show:
                say(f"{name}: {answers[name]}")
        if show:
            show(answers)


class _Table:
    """One display that renews itself."""

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
    """A question and its answers by name, as HTML; all of it is escaped."""
    style = "text-align:left;vertical-align:top;white-space:pre-wrap"
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in answers)
    said = [escape(answer) or "<em>(nothing)</em>" for answer in answers.values()]
    cells = "".join(f"<td style='{style};width:{90 // len(answers)}%'>{answer}</td>" for answer in said)
    return f"<table><caption>{escape(question)}</caption><tr>{head}</tr><tr>{cells}</tr></table>"
