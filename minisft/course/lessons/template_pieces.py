"""Two exercises of lesson 01: the pieces of Mistral's templates, and the answers in anybody's template."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from minisft.chat.jinja_template import ControlToken
from minisft.chat.mistral import MistralTemplate
from minisft.chat.own_template import OwnTemplate
from minisft.course.exercises import Case, Exercise, Mistake
from minisft.data.conversations import Conversation, Message

# No `from __future__ import annotations`: a notebook runs the signatures below, so a name that it
# does not import stands in quotes.
Turns = list[tuple[str, str]]  # (role, text), or (question, answer)
Pieces = list[tuple[str, str]]  # ("control", name) or ("text", text)
Spans = list[tuple[int, int]]


# --- 01.pieces ---------------------------------------------------------------------------------------------


def template_pieces(
    version: str,
    system: str,
    turns: list[tuple[str, str]],
) -> list[tuple[str, str]]:
    """Return the pieces of a conversation in the template "v1", "v3" or "v7".

    A piece is ("control", name), for one id, or ("text", text). The names are "bos",
    "eos", "[INST]", "[/INST]", "[SYSTEM_PROMPT]" and "[/SYSTEM_PROMPT]". `system` is
    the system prompt, or "" if there is none; `turns` are pairs of question and answer.
    """
    pieces = [("control", "bos")]
    if version == "v7" and system:
        pieces += [("control", "[SYSTEM_PROMPT]"), ("text", system)]
        pieces += [("control", "[/SYSTEM_PROMPT]")]
    place = {"v1": 0, "v3": len(turns) - 1}.get(version)
    for number, (question, answer) in enumerate(turns):
        if system and number == place:
            question = f"{system}\n\n{question}"
        if version == "v1":
            pieces.append(("text", f"[INST] {question} [/INST]"))
        else:
            pieces += [("control", "[INST]"), ("text", question)]
            pieces.append(("control", "[/INST]"))
        pieces += [("text", answer), ("control", "eos")]
    return pieces


BOS, EOS = ("control", "bos"), ("control", "eos")
INST, END_INST = ("control", "[INST]"), ("control", "[/INST]")


def _piece_cases(draw: random.Random) -> Iterator[Case]:
    turns = [("Hi", "Ahoy!"), ("Bye", "Farewell!")]
    v1 = [BOS, ("text", "[INST] Be a pirate.\n\nHi [/INST]"), ("text", "Ahoy!"), EOS]
    v1 += [("text", "[INST] Bye [/INST]"), ("text", "Farewell!"), EOS]
    yield Case(("v1", "Be a pirate.", turns), v1, "the pirate in v1")
    v3 = [BOS, INST, ("text", "Hi"), END_INST, ("text", "Ahoy!"), EOS]
    v3 += [INST, ("text", "Be a pirate.\n\nBye"), END_INST, ("text", "Farewell!"), EOS]
    yield Case(("v3", "Be a pirate.", turns), v3, "the pirate in v3")
    v7 = [BOS, ("control", "[SYSTEM_PROMPT]"), ("text", "Be a pirate."), ("control", "[/SYSTEM_PROMPT]")]
    v7 += [INST, ("text", "Hi"), END_INST, ("text", "Ahoy!"), EOS]
    v7 += [INST, ("text", "Bye"), END_INST, ("text", "Farewell!"), EOS]
    yield Case(("v7", "Be a pirate.", turns), v7, "the pirate in v7")
    plain = [BOS, INST, ("text", "Hi"), END_INST, ("text", "Ahoy!"), EOS]
    yield Case(("v3", "", turns[:1]), plain, "v3 without a system prompt")
    yield Case(("v7", "", turns[:1]), plain, "v7 without a system prompt")
    for _ in range(15):
        version, system = draw.choice(("v1", "v3", "v7")), draw.choice(("", "Be brief.", "Rhyme."))
        turns = [
            (draw.choice(("Hi", "2+2?", "Why?")), draw.choice(("Ok", "4", "No."))) for _ in range(draw.randint(1, 4))
        ]
        messages = [Message("system", system)] if system else []
        messages += [Message(*turn) for pair in turns for turn in zip(("user", "assistant"), pair, strict=True)]
        segments = MistralTemplate(version).segments(Conversation("random", tuple(messages)))
        pieces = [("control", s.control) if s.control else ("text", s.text) for s in segments]
        yield Case((version, system, turns), pieces)


def _arranged(
    version: str,
    system: str,
    turns: Turns,
    *,
    places: Mapping[str, int | str] | None = None,
    joint: str = "\n\n",
    question: Callable[[str], Pieces] | None = None,
    always: bool = False,
) -> Pieces:
    """The pieces with the system prompt in the questions `places`: "all", or a number from 0 or from -1."""
    place = (places or {"v1": 0, "v3": -1}).get(version)
    pieces = [BOS]
    if place is None and (system or always):
        pieces += [("control", "[SYSTEM_PROMPT]"), ("text", system), ("control", "[/SYSTEM_PROMPT]")]
    for number, (asked, answer) in enumerate(turns):
        if place is not None and (place == "all" or number in (place, len(turns) + int(place))) and (system or always):
            asked = f"{system}{joint}{asked}"
        if version == "v1":
            pieces.append(("text", f"[INST] {asked} [/INST]"))
        else:
            pieces += question(asked) if question else [INST, ("text", asked), END_INST]
        pieces += [("text", answer), EOS]
    return pieces


PIECES = Exercise(
    name="01.pieces",
    answer=template_pieces,
    cases=_piece_cases,
    mistakes=(
        Mistake(
            "In v3 the system prompt stands before the first question, as in v1. It belongs before the last.",
            lambda *args: _arranged(*args, places={"v1": 0, "v3": 0}),
        ),
        Mistake(
            "In v1 the system prompt stands before the last question. It belongs before the first.",
            lambda *args: _arranged(*args, places={"v1": -1, "v3": -1}),
        ),
        Mistake(
            "The system prompt is repeated before every question. v1 and v3 write it once.",
            lambda *args: _arranged(*args, places={"v1": "all", "v3": "all"}),
        ),
        Mistake(
            "In v7 the system prompt is part of a question. It has its own place there, between its own control ids.",
            lambda *args: _arranged(*args, places={"v1": 0, "v3": -1, "v7": 0}),
        ),
        Mistake(
            "The system prompt and the question run into each other: a blank line stands between them.",
            lambda *args: _arranged(*args, joint="\n"),
        ),
        Mistake(
            "The markers of v3 and v7 are written as text. There each of them is one control id.",
            lambda *args: _arranged(*args, question=lambda asked: [("text", f"[INST] {asked} [/INST]")]),
        ),
        Mistake(
            "The question has spaces around it. They belong to v1; from v2 on there are none.",
            lambda *args: _arranged(*args, question=lambda asked: [INST, ("text", f" {asked} "), END_INST]),
        ),
        Mistake(
            "Without a system prompt something of it is still written: a blank line, or a pair of control ids.",
            lambda *args: _arranged(*args, always=True),
        ),
    ),
    hints=(
        "Decide once, before the loop, which number of question gets the system prompt in this version.",
        '`{"v1": 0, "v3": len(turns) - 1}.get(version)` is that number, or None in v7. Test `system` as well.',
    ),
    minutes=12,
    ask_next="Which of the three templates lets an application change the system prompt in the middle of a chat?",
)


# --- 01.spans ----------------------------------------------------------------------------------------------


def answer_spans(
    render: "Callable[[list[tuple[str, str]]], str]",
    messages: list[tuple[str, str]],
    end: str,
) -> list[tuple[int, int]]:
    """Return where the trained characters of each answer are in `render(messages)`.

    `render` is a chat template: it turns messages, as (role, content), into one string.
    It writes each content as it is, once and in order. A span is (start, stop), as in a
    slice: from the first character of an answer's content through the text `end`, which
    the template writes after it.
    """
    rest = render([(role, f"m4rk{i}kr4m") for i, (role, _) in enumerate(messages)])
    spans, position = [], 0  # position: in the rendering of the real contents
    for i, (role, content) in enumerate(messages):
        before, _, rest = rest.partition(f"m4rk{i}kr4m")
        start = position + len(before)
        position = start + len(content)
        if role == "assistant":
            spans.append((start, position + rest.index(end) + len(end)))
    return spans


HEADER = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = f"{{% for m in messages %}}{{{{ {HEADER} }}}}{{% endfor %}}{PROMPT}"
WITH_SYSTEM = f"{{{{ '<|im_start|>system\nSay yes, user.<|im_end|>\n' }}}}{CHATML}"


class _Rendering:
    """A Jinja template as a function of (role, content) tuples."""

    def __init__(self, source: str):
        control = {name: ControlToken(name, False, False) for name in ("<|im_start|>", "<|im_end|>")}
        stops = ("<|im_end|>",)
        self.template = OwnTemplate(source=source, control=control, ends=stops, stops=stops)

    def __call__(self, messages: Turns) -> str:
        return self.template.render([Message(*message) for message in messages])

    def __repr__(self) -> str:
        return "render"

    def __deepcopy__(self, memo: Any) -> "_Rendering":
        return self  # it never changes


def _package_spans(template: OwnTemplate, conversation: Conversation) -> Spans:
    spans: dict[int, tuple[int, int]] = {}
    position = 0
    for piece in template.labelled(conversation)[0]:
        if piece.answer is not None:
            start, _ = spans.get(piece.answer, (position, 0))
            spans[piece.answer] = start, position + len(piece.text)
        position += len(piece.text)
    return list(spans.values())


def _span_cases(draw: random.Random) -> Iterator[Case]:
    chatml, with_system = _Rendering(CHATML), _Rendering(WITH_SYSTEM)

    def case(question: str, answer: str, spans: Spans, name: str) -> Case:
        return Case((chatml, [("user", question), ("assistant", answer)], "<|im_end|>"), spans, name)

    yield case("Hi", "Yo", [(52, 64)], "one question and its answer in ChatML")
    yield case("Say yes", "yes", [(57, 70)], "an answer that its question contains")
    yield case("Which letter?", "a", [(63, 74)], "an answer that the template's own words contain")
    yield case("Hi", "  Yo\n", [(52, 67)], "an answer with white space around it")
    yield case("Hi", "Use <|im_end|>.", [(52, 77)], "an answer that spells the end token")
    words = ("yes", "user", "assistant", "a", " 4 ", "Say yes", "No.", "im", "system", "Hi ")
    for _ in range(15):
        turns = [(role, draw.choice(words)) for role in ("user", "assistant") * draw.randint(1, 3)]
        render = draw.choice((chatml, with_system))
        conversation = Conversation("random", tuple(Message(*turn) for turn in turns))
        yield Case((render, turns, "<|im_end|>"), _package_spans(render.template, conversation))


def _searched(render: Callable[[Turns], str], messages: Turns, end: str, *, walk: bool) -> Spans:
    """Each content searched for in the text: from the start, or behind the content before it."""
    text, spans, cursor = render(messages), [], 0
    for role, content in messages:
        start = text.find(content, cursor)
        if walk:
            cursor = start + len(content)
        if role == "assistant":
            spans.append((start, start + len(content) + len(end)))
    return spans


def _marked(
    render: Callable[[Turns], str],
    messages: Turns,
    end: str,
    *,
    header: bool = False,
    whose: tuple[str, ...] = ("assistant",),
    length: Callable[[str, str], int] = lambda content, mark: len(content),
    tail: Callable[[str], int] = len,
) -> Spans:
    """Spans found by marks, with one step done in another way."""
    marks = [f"m4rk{i}kr4m" for i in range(len(messages))]
    rest = render([(role, mark) for (role, _), mark in zip(messages, marks, strict=True)])
    spans, position = [], 0
    for (role, content), mark in zip(messages, marks, strict=True):
        before, _, rest = rest.partition(mark)
        start = position + len(before)
        stop = start + length(content, mark)
        if role in whose:
            spans.append((position if header else start, stop + tail(end)))
        position = stop
    return spans


def _ended_at_first(render: Callable[[Turns], str], messages: Turns, end: str) -> Spans:
    text = render(messages)
    starts = [start for start, _ in answer_spans(render, messages, end)]
    return [(start, text.index(end, start) + len(end)) for start in starts]


SPANS = Exercise(
    name="01.spans",
    answer=answer_spans,
    cases=_span_cases,
    mistakes=(
        Mistake(
            "Answers are searched for from the start of the text. The question may contain the answer's words, and "
            "then a part of the question is trained.",
            lambda *args: _searched(*args, walk=False),
        ),
        Mistake(
            "Each content is searched for behind the one before it. The template's own words, such as the role in a "
            "header, come first and may be found instead.",
            lambda *args: _searched(*args, walk=True),
        ),
        Mistake(
            "The end token is not part of the span, so the model would never learn to stop.",
            lambda *args: _marked(*args, tail=lambda end: 0),
        ),
        Mistake(
            "The end token is searched for behind the start of the answer. An answer may spell it, and would be cut.",
            _ended_at_first,
        ),
        Mistake(
            "The positions are those of the rendering with marks. The contents have other lengths than the marks.",
            lambda *args: _marked(*args, length=lambda content, mark: len(mark)),
        ),
        Mistake(
            "The questions have spans, too. Only answers are trained.",
            lambda *args: _marked(*args, whose=("user", "assistant")),
        ),
        Mistake(
            "The header before an answer is part of its span. At inference the generation prompt already has it.",
            lambda *args: _marked(*args, header=True),
        ),
        Mistake(
            "The contents are stripped before they are measured. This template writes them as they are.",
            lambda *args: _marked(*args, length=lambda content, mark: len(content.strip())),
        ),
    ),
    hints=(
        "Render the same roles with a mark in the place of each content: what stands between the marks is the "
        "template's own text, and its length does not depend on the contents.",
        "`before, _, rest = rest.partition(mark)` cuts off the text before a content. Add `len(before)` and then "
        "`len(content)` to a position that starts at 0; search for `end` in `rest` only.",
    ),
    minutes=20,
    ask_next="What does your function return for a template that trims contents, and how could it notice?",
)
