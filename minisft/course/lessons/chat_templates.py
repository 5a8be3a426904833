"""Lesson 01: from ShareGPT to exact ids, and where each part of a chat template comes from."""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

from minisft.chat.mistral import MistralTemplate
from minisft.chat.tokenizers import load_tokenizer
from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.lessons.chat_turns import TURNS, Turns
from minisft.course.lessons.template_pieces import PIECES, SPANS
from minisft.course.predictions import Number, Several
from minisft.data.conversations import Conversation, Message

# No `from __future__ import annotations`: a notebook runs the signatures below, so a name that it
# does not import stands in quotes.


# --- 01.v1 -------------------------------------------------------------------------------------------------


def v1_ids(
    messages: list[tuple[str, str]],
    encode: "Callable[[str], list[int]]",
    bos: int,
    eos: int,
) -> list[int]:
    """Return the ids of a conversation in Mistral's v1 template.

    `messages` are (role, text), the role "user" or "assistant". `encode` returns the
    ids of one text. A question is written as the text `[INST] question [/INST]`. The id
    `bos` comes once, at the start, and `eos` after every answer.
    """
    ids = [bos]
    for role, text in messages:
        if role == "user":
            ids += encode(f"[INST] {text} [/INST]")
        else:
            ids += [*encode(text), eos]
    return ids


class _Toy:
    """A tokenizer of characters that, like Mistral's first, writes a space before each text."""

    def __call__(self, text: str) -> list[int]:
        return [32, *map(ord, text)]

    def __repr__(self) -> str:
        return "encode"


@functools.cache
def _mistral() -> Any:
    return load_tokenizer("mistral:v1")


def _mistral_encode(text: str) -> list[int]:
    ids: list[int] = _mistral().encode(text)
    return ids


# As mistral-common encodes "Hi", "Hello!", "2+2?", "4".
HI = [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793, 22557, 28808, 2]
SUM = [733, 16289, 28793, 28705, 28750, 28806, 28750, 28804, 733, 28748, 16289, 28793, 28705, 28781, 2]


def _v1_cases(draw: random.Random) -> Iterator[Case]:
    two = [("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?"), ("assistant", "4")]
    yield Case((two[:2], _mistral_encode, 1, 2), HI, "one question and its answer, with Mistral's tokenizer")
    yield Case((two, _mistral_encode, 1, 2), HI + SUM, "two questions with their answers, with Mistral's tokenizer")
    spaced = ([("user", "a"), ("assistant", " b ")], _Toy(), 1, 2)
    ids = [1, 32, *b"[INST] a [/INST]", 32, *b" b ", 2]
    yield Case(spaced, ids, "an answer with spaces around it, one id for each character")
    forged = [1, 32, *b"[INST] </s> [/INST]", 32, *b"b", 2]
    yield Case(([("user", "</s>"), ("assistant", "b")], _Toy(), 1, 2), forged, "a question that spells EOS")
    for _ in range(10):
        roles = ("user", "assistant") * draw.randint(1, 3)
        messages = [(role, draw.choice(("Hi", "ok ", "é", "[INST]", "x = 1", "</s>"))) for role in roles]
        bos, eos = draw.sample(range(1000, 2000), 2)
        conversation = Conversation("random", tuple(Message(*turn) for turn in messages))
        ids = []
        for segment in MistralTemplate("v1").segments(conversation):
            ids += _Toy()(segment.text) if segment.text is not None else [bos if segment.control == "bos" else eos]
        yield Case((messages, _Toy(), bos, eos), ids)


def _v1_of(question: tuple[str, ...], answer: tuple[str, ...], start: tuple[str, ...] = ("bos",)) -> Callable[..., Any]:
    """A function that writes these parts for each question and answer: "bos", "eos" or a format."""

    def ids_of(messages: Turns, encode: Callable[[str], list[int]], bos: int, eos: int) -> list[int]:
        controls, ids = {"bos": bos, "eos": eos}, [bos] * len(start)
        for role, text in messages:
            for part in question if role == "user" else answer:
                ids += [controls[part]] if part in controls else encode(part.format(text))
        return ids

    return ids_of


def _as_one_string(messages: Turns, encode: Callable[[str], list[int]], bos: int, eos: int) -> list[int]:
    parts = [f"[INST] {text} [/INST]" if role == "user" else f"{text}</s>" for role, text in messages]
    return encode("<s>" + "".join(parts))


_ASKED, _ANSWERED = ("[INST] {} [/INST]",), ("{}", "eos")
V1 = Exercise(
    name="01.v1",
    answer=v1_ids,
    cases=_v1_cases,
    mistakes=(
        Mistake(
            "BOS comes before each question. It marks the start of a row, so the model meets it once at inference.",
            _v1_of(("bos", *_ASKED), _ANSWERED, ()),
        ),
        Mistake(
            "No EOS follows the answers. A model that never reads EOS never learns to stop.", _v1_of(_ASKED, ("{}",))
        ),
        Mistake(
            "EOS follows the question instead of the answer: the model would stop before it answers.",
            _v1_of((*_ASKED, "eos"), ("{}",)),
        ),
        Mistake(
            "EOS follows each question as well. Only an answer ends a turn of the model.",
            _v1_of((*_ASKED, "eos"), _ANSWERED),
        ),
        Mistake(
            "Only the last answer ends in EOS. Every answer has to, or the model learns to write the next question.",
            lambda messages, encode, bos, eos: [*_v1_of(_ASKED, ("{}",))(messages, encode, bos, eos), eos],
        ),
        Mistake(
            "The space before the answer is doubled: the tokenizer writes one itself.", _v1_of(_ASKED, (" {}", "eos"))
        ),
        Mistake(
            "The spaces inside the markers are lost. In v1 they are part of the text.",
            _v1_of(("[INST]{}[/INST]",), _ANSWERED),
        ),
        Mistake(
            "BOS and EOS are written as text, so they become ordinary characters. Insert their ids by number.",
            _as_one_string,
        ),
    ),
    hints=(
        "Start from `[bos]` and extend this list once for each message.",
        'A question adds `encode(f"[INST] {text} [/INST]")`; an answer adds `encode(text)` and then `[eos]`.',
    ),
    minutes=8,
    ask_next="Why does encoding the conversation as one string give other ids than encoding its parts?",
)


LESSON = Lesson(
    objectives=(
        "clean a raw chat into questions that alternate with answers, and count what that costs in rows and in tokens",
        "write the ids of a conversation in Mistral's templates by hand, and prove them against Mistral's own encoder",
        "recognize the usual faults of a template: doubled BOS, missing EOS, stray spaces, forged control ids",
        "say which answers have another prompt at inference than in training, and make them equal",
        "label the answers in a template that somebody else wrote",
    ),
    minutes=90,
    predictions={
        "rows": Several(
            asks="which of six flawed rows can still be used",
            stand_in=["c", "d"],
            lesson="A flaw costs the turns that it touches; the row is kept if an answered question remains.",
            options=tuple("abcdef"),
        ),
        "share": Number(
            asks="the share of the file's tokens that is trained",
            stand_in=80,
            lesson="Rows hide what is lost: cleaning, truncation and the mask each remove tokens, and few rows.",
            unit="%",
            within=0.2,
        ),
        "controls": Number(
            asks="the number of BOS and EOS ids after the whole string is encoded",
            stand_in=3,
            lesson="A tokenizer that treats text as text makes no control id of any text, not even of the template's.",
        ),
        "unprompted": Several(
            asks="the versions in which “Ahoy!” is trained before the system prompt is read",
            stand_in=[],
            lesson="v2 and v3 put the system prompt into the last question, after every earlier answer.",
            options=("v1", "v2", "v3", "v3-tekken", "v7"),
        ),
        "spaces": Several(
            asks="the spaces inside v1's markers that become an id of their own in v3",
            stand_in=["the first", "the second"],
            lesson="A space before a word is part of the word's token; a space with no word behind it is a token.",
            options=("the first", "the second"),
        ),
        "forged": Number(
            asks="the number of control ids if the text is parsed as markup",
            stand_in=4,
            lesson="Whoever writes the text then writes control ids, and with them whole turns.",
        ),
        "parity": Several(
            asks="where the prompt of inference differs from the row of training",
            stand_in=[],
            lesson="At inference every question is the last one in its turn, and v3 gives it the system prompt.",
            options=tuple(f"{version}, turn {turn}" for version in ("v1", "v3", "v7") for turn in (1, 2)),
        ),
        "trained": Number(
            asks="the number of trained tokens of two short answers in ChatML",
            stand_in=7,
            lesson="Training goes up to the token at which generation stops: the line end after it is not trained.",
        ),
        "tools": Several(
            asks="which turns of a tool call are trained",
            stand_in=["last answer"],
            lesson="What the model has to produce is trained: the call as well. The result comes from outside.",
            options=("question", "call", "result", "last answer"),
        ),
    },
    exercises=(TURNS, V1, PIECES, SPANS),
    misconceptions=(
        "That the number of rows says how much is trained. Most of what is lost is lost within rows.",
        "That a template is a string. It is a list of pieces: control ids by number, and texts encoded one by one.",
        "That a mask found by the lengths of prefixes is exact. In v2 and v3 a prompt is no prefix of the row.",
        "That a search finds the answers in a rendered text. An answer may also occur in a question or in a header.",
    ),
)
