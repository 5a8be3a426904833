"""Lesson 00: the exercise on the segments of a conversation."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from minisft.chat.mistral import MistralTemplate
from minisft.course.exercises import Case, Exercise, Mistake
from minisft.data.conversations import Conversation
from minisft.data.messages import Message

Turns = list[tuple[str, str]]  # role ("user" or "assistant") and text
Pieces = list[tuple[str, str, bool]]  # role, text, and whether it is trained


def segments_of(turns: list[tuple[str, str]]) -> list[tuple[str, str, bool]]:
    """Return the pieces of a conversation in Mistral's template v1.

    `turns` are pairs of role ("user" or "assistant") and text. Each piece is a tuple
    (role, text, trained). BOS is a piece with the role "template" and the text "<s>";
    EOS is a piece with the role "assistant" and the text "</s>".
    """
    pieces = [("template", "<s>", False)]
    for role, text in turns:
        if role == "user":
            pieces.append(("user", f"[INST] {text} [/INST]", False))
        else:
            pieces.append(("assistant", f" {text}", True))
            pieces.append(("assistant", "</s>", True))
    return pieces


def _segment_cases(draw: random.Random) -> Iterator[Case]:
    bos, eos = ("template", "<s>", False), ("assistant", "</s>", True)
    one = [("user", "Hi"), ("assistant", "Hello!")]
    first = [bos, ("user", "[INST] Hi [/INST]", False), ("assistant", " Hello!", True), eos]
    yield Case((one,), first, "one question and its answer")
    second = [("user", "[INST] 2+2? [/INST]", False), ("assistant", " 4", True), eos]
    yield Case(([*one, ("user", "2+2?"), ("assistant", "4")],), first + second, "two questions with their answers")
    forged = [bos, ("user", "[INST] Say </s> [/INST]", False), ("assistant", " No.", True), eos]
    yield Case(([("user", "Say </s>"), ("assistant", "No.")],), forged, "a question that spells EOS")
    template = MistralTemplate("v1", written_space=True)
    for _ in range(8):
        words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 6))) for _ in range(8)]
        turns = list(zip(["user", "assistant"] * draw.randint(1, 4), words, strict=False))
        segments = template.segments(Conversation("x", tuple(Message(role, text) for role, text in turns)))
        names = {"bos": "<s>", "eos": "</s>"}
        yield Case((turns,), [(s.role, names.get(s.control or "", s.text), s.trained) for s in segments])


def _with_trained(turns: Turns, untrained: tuple[str, ...] = (), trained: tuple[str, ...] = ()) -> Pieces:
    """The pieces, with other roles or texts trained than should be."""
    return [
        (role, text, (flag or role in trained) and text not in untrained) for role, text, flag in segments_of(turns)
    ]


def _one_eos(turns: Turns) -> Pieces:
    pieces = segments_of(turns)
    return [piece for piece in pieces[:-1] if piece[1] != "</s>"] + pieces[-1:]


def _bos_before_each_question(turns: Turns) -> Pieces:
    bos, *pieces = segments_of(turns)
    return [part for piece in pieces for part in ([bos, piece] if piece[0] == "user" else [piece])]


def _no_eos(turns: Turns) -> Pieces:
    return [piece for piece in segments_of(turns) if piece[1] != "</s>"]


def _glued_eos(turns: Turns) -> Pieces:
    return [(role, f"{text}</s>" if role == "assistant" else text, flag) for role, text, flag in _no_eos(turns)]


def _bare(turns: Turns) -> Pieces:
    """The texts of the turns between BOS and EOS, without the marks of the questions."""
    texts = iter(text for _, text in turns)
    return [
        (role, next(texts) if role != "template" and text != "</s>" else text, flag)
        for role, text, flag in segments_of(turns)
    ]


def _no_space(turns: Turns) -> Pieces:
    return [(role, text[1:] if text[0] == " " else text, flag) for role, text, flag in segments_of(turns)]


SEGMENTS = Exercise(
    name="00.segments",
    answer=segments_of,
    cases=_segment_cases,
    mistakes=(
        Mistake(
            "EOS is not trained, so the model would never learn to stop.",
            lambda turns: _with_trained(turns, untrained=("</s>",)),
        ),
        Mistake(
            "EOS appears once, at the end. It closes every answer: the model has to learn to stop after each.",
            _one_eos,
        ),
        Mistake(
            "The questions are trained: the model would learn to write the user's part as well.",
            lambda turns: _with_trained(turns, trained=("user",)),
        ),
        Mistake(
            "BOS is trained. Nothing comes before it, so there is nothing to predict it from.",
            lambda turns: _with_trained(turns, trained=("template",)),
        ),
        Mistake(
            "BOS appears before every question. It begins the sequence, so it appears once.", _bos_before_each_question
        ),
        Mistake("The row has no EOS, so the model would never learn to stop. A piece follows each answer.", _no_eos),
        Mistake(
            "EOS is written at the end of the answer's text. It is a token, not text: a piece of its own.", _glued_eos
        ),
        Mistake("BOS is missing. The row begins with its piece.", lambda turns: segments_of(turns)[1:]),
        Mistake("The marks are missing: a question stands between [INST] and [/INST], with spaces.", _bare),
        Mistake("The space between [/INST] and the answer is missing: it is part of the answer's piece.", _no_space),
    ),
    hints=(
        "Start with the piece of BOS, then add pieces in a loop over the turns: one for a question, two for an answer.",
        'A question is ("user", f"[INST] {text} [/INST]", False). An answer is ("assistant", " " + text, True), '
        "and then comes its EOS.",
    ),
    minutes=5,
    ask_next="Which pieces would change if the model were to learn to write questions for given answers?",
)
