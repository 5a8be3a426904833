"""Lesson 05: what a score says about a chat model, and what it does not."""

from __future__ import annotations

import random
from collections.abc import Iterator

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.lessons.evaluate_bleu import BLEU_OF_COUNTS, CLIPPED
from minisft.course.lessons.evaluate_paired import PAIRED
from minisft.course.predictions import Choice, Number, Several
from minisft.evaluation.generate import before_stop


def reply_of(emitted: list[int], stop_ids: list[int], limit: int) -> tuple[list, bool]:
    """Return (ids, stopped): the reply that is kept, and whether a stop token ended it.

    `emitted` are the ids that the model emits, in order. Each of `stop_ids` ends the
    reply and is no part of it. At most `limit` ids are emitted, a stop token included.
    """
    ids: list[int] = []
    for token in emitted[:limit]:
        if token in stop_ids:
            return ids, True
        ids.append(token)
    return ids, False


def _stop_cases(draw: random.Random) -> Iterator[Case]:
    yield Case(([5, 6, 2, 7], [2], 10), ([5, 6], True), "an answer that ends in a stop token")
    yield Case(([5, 6, 7], [2], 3), ([5, 6, 7], False), "an answer that reaches the limit")
    yield Case(([5, 9, 2], [2, 9], 8), ([5], True), "a model with two stop tokens")
    yield Case(([5, 6, 2], [2], 3), ([5, 6], True), "a stop token that is the last allowed id")
    yield Case(([5, 6, 2], [2], 2), ([5, 6], False), "a stop token just after the limit")
    yield Case(([5, 6], [2], 12), ([5, 6], False), "ids that run out before the limit, without a stop token")
    for _ in range(20):
        emitted = [draw.randint(0, 6) for _ in range(draw.randint(1, 10))]
        stop_ids = draw.sample(range(7), draw.randint(1, 2))
        limit = draw.randint(1, 12)
        kept = before_stop(emitted[:limit], stop_ids)
        yield Case((emitted, stop_ids, limit), (kept, len(kept) < len(emitted[:limit])))


def _stop_at_last(emitted: list[int], stop_ids: list[int], limit: int) -> tuple[list[int], bool]:
    stops = [i for i, token in enumerate(emitted[:limit]) if token in stop_ids]
    return (emitted[: stops[-1]], True) if stops else (emitted[:limit], False)


def _stop_token_kept(emitted: list[int], stop_ids: list[int], limit: int) -> tuple[list[int], bool]:
    ids, stopped = reply_of(emitted, stop_ids, limit)
    return emitted[: len(ids) + stopped], stopped


STOP = Exercise(
    name="05.stop",
    answer=reply_of,
    cases=_stop_cases,
    mistakes=(
        Mistake(
            "The stop token is kept in the reply. It would be scored as a word and shown to the user.", _stop_token_kept
        ),
        Mistake(
            "Only the first of the stop tokens ends a reply. A model may have several, and each of them must end it.",
            lambda emitted, stop_ids, limit: reply_of(emitted, stop_ids[:1], limit),
        ),
        Mistake(
            "The limit counts only the ids that are kept. The stop token takes one of the allowed ids as well.",
            lambda emitted, stop_ids, limit: (
                before_stop(emitted, stop_ids)[:limit],
                len(before_stop(emitted, stop_ids)) < min(len(emitted), limit + 1),
            ),
        ),
        Mistake(
            "The limit is ignored, so a model that never stops would never be scored.",
            lambda emitted, stop_ids, limit: reply_of(emitted, stop_ids, len(emitted)),
        ),
        Mistake(
            "`stopped` follows from the length, which is below the limit. But the ids ran out without a stop token, so "
            "the reply did not stop by itself: only a stop token says so.",
            lambda emitted, stop_ids, limit: (
                reply_of(emitted, stop_ids, limit)[0],
                len(reply_of(emitted, stop_ids, limit)[0]) < limit,
            ),
        ),
        Mistake(
            "A reply without a stop token did not stop by itself: it was cut off or ran out, and a report must say so.",
            lambda emitted, stop_ids, limit: (reply_of(emitted, stop_ids, limit)[0], True),
        ),
        Mistake(
            "The reply ends at the last stop token. It ends at the first: what follows is another turn.", _stop_at_last
        ),
    ),
    hints=(
        "Cut the ids at the limit first, then look for the first stop token among those that are left.",
        "Loop over `emitted[:limit]`: return what you have and True at a stop token, else append; after the loop, "
        "return False.",
    ),
    minutes=8,
    ask_next="How would you stop at a text, such as a blank line, whose characters may be split over several tokens?",
)

VARIANTS = ("the same", "in capitals", "its last word changed", "a word in its middle changed")

LESSON = Lesson(
    objectives=(
        "show that a prompt ends exactly where the answer begins in training",
        "compute BLEU from counts, and say what it rewards and what it cannot see",
        "say how exactly a difference between two checkpoints is known, and how many answers it would take",
        "find contaminated questions and damaged checkpoints before a score is believed",
    ),
    minutes=90,
    predictions={
        "untrained": Choice(
            asks="what the model does after [/INST] before it is trained",
            stand_in="answers",
            options=("answers", "writes something else", "writes nothing"),
            lesson="A template that a model has never seen is not a question to it.",
        ),
        "brevity": Number(
            asks="BLEU of an output that has 7 of the 10 words, all of them right",
            stand_in=70,
            within=0.02,
            lesson="The penalty is exp(1 - 10 / 7), which is less than 7 / 10.",
        ),
        "echo": Choice(
            asks="which output gets the higher BLEU",
            stand_in="the paraphrase",
            options=("the paraphrase", "the echo"),
            lesson="BLEU counts shared words, and an echo shares most of them.",
        ),
        "same": Number(
            asks="how many answers of all three ZeRO runs are those of vanilla, word for word",
            stand_in=15,
            lesson="ZeRO changes where tensors are stored; the weights differ by rounding only.",
        ),
        "needed": Number(
            asks="how many times as many answers give plus and minus 2 points",
            stand_in=2.5,
            within=0.2,
            lesson="The interval shrinks with the square root: half the width takes four times as many answers.",
        ),
        "template": Choice(
            asks="which template has the lower loss after training",
            stand_in="v1",
            options=("v1", "ChatML"),
            lesson="The model knew ChatML before, and a few steps do not teach a new template as well.",
        ),
        "found": Several(
            asks="which variants of a trained question are found",
            stand_in=list(VARIANTS[:2]),
            options=VARIANTS,
            lesson="Sequences of five words survive a change at the end; one in the middle breaks five of them.",
        ),
        "hardest": Choice(
            asks="which tokens of an answer cost the most on average",
            stand_in="EOS",
            options=("the first", "those between", "EOS"),
            lesson="The first tokens decide which of many possible answers it is, and nothing before them tells.",
        ),
    },
    exercises=(STOP, CLIPPED, BLEU_OF_COUNTS, PAIRED),
    misconceptions=(
        "That a higher BLEU means a better answer. It means more words shared with one reference.",
        "That overlapping intervals mean no difference. Both models answered the same questions: compare in pairs.",
        "That a p-value of 0.05 means a probability of 95% that the model is better. It says how often chance alone "
        "would give so large a difference.",
        "That a checkpoint that loads is whole. transformers fills a missing tensor with random numbers.",
    ),
)
