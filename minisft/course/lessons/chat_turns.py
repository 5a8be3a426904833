"""Lesson 01: the exercise on cleaning the turns of a conversation."""

import itertools
import random
from collections.abc import Callable, Iterator

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.data.conversations import clean, is_blank
from minisft.data.ledger import Ledger

# No `from __future__ import annotations`: a notebook runs the signatures below.
Turns = list[tuple[str, str]]  # (role, text)


def clean_turns(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the usable part of a conversation, as (role, text); [] if there is none.

    `turns` are (role, text), the role "user" or "assistant". Read them in order;
    for each turn, only the first rule that fits is used:
    1. an answer before the first question is removed;
    2. at a blank turn (`is_blank(text)`) reading stops;
    3. a turn of the same role as the one before is joined to it with a blank line.
    At the end, a last question without an answer is removed. Texts stay as they are.
    """
    cleaned: list[tuple[str, str]] = []
    for role, text in turns:
        if not cleaned and role == "assistant":
            continue
        if is_blank(text):
            break
        if cleaned and cleaned[-1][0] == role:
            cleaned[-1] = (role, f"{cleaned[-1][1]}\n\n{text}")
        else:
            cleaned.append((role, text))
    return cleaned[:-1] if cleaned and cleaned[-1][0] == "user" else cleaned


def _turn_cases(draw: random.Random) -> Iterator[Case]:
    hello = [("user", "Hello?"), ("assistant", "I am here.")]
    yield Case((hello,), hello, "a conversation without a flaw")
    yield Case(([("assistant", "… why."), *hello],), hello, "an answer before the first question")
    double = [("user", "Hello?"), ("user", "Anyone?"), ("assistant", "  Here.")]
    yield Case(([("assistant", " "), *hello],), hello, "a blank answer before the first question")
    yield Case((double,), [("user", "Hello?\n\nAnyone?"), ("assistant", "  Here.")], "two questions in a row")
    gap = [*hello, ("user", "Sing!"), ("assistant", "\u200b"), ("user", "Bye"), ("assistant", "Bye!")]
    yield Case((gap,), hello, "an answer in the middle that is a zero-width space")
    yield Case(([*hello, ("user", "Wait")],), hello, "a last question without an answer")
    yield Case(([("assistant", "Alone.")],), [], "an answer alone")
    for _ in range(20):
        roles = [draw.choice(("user", "assistant")) for _ in range(draw.randint(1, 7))]
        texts = [draw.choice(("Hi", "Yes.", "  x = 1", "Why?\n", "Ok", "2 + 2", " ", "\u200b")) for _ in roles]
        turns = list(zip(roles, texts, strict=True))
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        kept = clean(row, "a random row", Ledger(), escaped=False)
        yield Case((turns,), [(m.role, m.content) for m in kept.messages] if kept else [])


def _cleaned(
    turns: Turns,
    lead: bool = True,
    blank: Callable[[str], bool] = is_blank,
    stop: bool = True,
    joint: str | None = "\n\n",
    tail: bool = True,
    form: Callable[[str], str] = str,
) -> Turns:
    """The turns cleaned with one step left out or done in another way."""
    cleaned: Turns = []
    for role, text in turns:
        if lead and not cleaned and role == "assistant":
            continue
        if blank(text):
            if stop:
                break
            continue
        if joint is not None and cleaned and cleaned[-1][0] == role:
            cleaned[-1] = (role, f"{cleaned[-1][1]}{joint}{form(text)}")
        else:
            cleaned.append((role, form(text)))
    return cleaned[:-1] if tail and cleaned and cleaned[-1][0] == "user" else cleaned


def _until_blank(turns: Turns) -> Turns:
    """The turns before the first blank one, whoever wrote it."""
    return list(itertools.takewhile(lambda turn: not is_blank(turn[1]), turns))


def _all_or_nothing(turns: Turns) -> Turns:
    cleaned = clean_turns(turns)
    return cleaned if cleaned == turns else []


TURNS = Exercise(
    name="01.turns",
    answer=clean_turns,
    cases=_turn_cases,
    mistakes=(
        Mistake(
            "Rule 1 comes before rule 2: a blank answer before any question is removed, and reading continues.",
            lambda turns: _cleaned(_until_blank(turns)),
        ),
        Mistake(
            "The answer before the first question is kept. A model cannot learn from an answer whose question is "
            "missing.",
            lambda turns: _cleaned(turns, lead=False),
        ),
        Mistake(
            "A blank turn is skipped, and reading continues. What follows then answers another question.",
            lambda turns: _cleaned(turns, stop=False),
        ),
        Mistake(
            "A zero-width space counts as text. It has no width on a screen and teaches an empty answer.",
            lambda turns: _cleaned(turns, blank=lambda text: not text.strip()),
        ),
        Mistake(
            "Two turns of one role stay separate. The template would write two questions in a row, which the model "
            "never meets at inference.",
            lambda turns: _cleaned(turns, joint=None),
        ),
        *(
            Mistake(
                f"Joined turns have {between} between them. A blank line keeps them two paragraphs.",
                lambda turns, joint=joint: _cleaned(turns, joint=joint),
            )
            for joint, between in {"\n": "one line end", " ": "a space", "": "nothing"}.items()
        ),
        Mistake(
            "The last question stays without an answer: tokens that the model reads and nothing is learned from.",
            lambda turns: _cleaned(turns, tail=False),
        ),
        Mistake(
            "The texts are stripped. Leading spaces are part of an answer: code is indented with them.",
            lambda turns: _cleaned(turns, form=str.strip),
        ),
        Mistake("A conversation with any flaw is dropped whole, together with its good turns.", _all_or_nothing),
    ),
    hints=(
        "One loop over the turns, with a list of the turns kept so far; its last entry says which role came before.",
        "Test in this order: `not kept and role == 'assistant'`, `is_blank(text)`, `kept[-1][0] == role`. "
        "Remove a last question after the loop.",
    ),
    minutes=10,
    ask_next="Which of these repairs would you refuse in a data set of code reviews, and why?",
)
