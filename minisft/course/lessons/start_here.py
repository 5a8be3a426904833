"""Lesson 00: one conversation, from raw text to a trained model."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.lessons.start_here_segments import SEGMENTS
from minisft.course.predictions import Choice, Interval, Number, Several
from minisft.data.conversations import Conversation
from minisft.data.messages import Message
from minisft.data.splits import Origins, Split, first_question

Rows = list[tuple[str, str]]  # id and first question
Sides = list[list[str]]  # ids for training, ids for testing


def sides_of(rows: list[tuple[str, str]], names: set[str]) -> list[list[str]]:
    """Return [ids for training, ids for testing], each in the order of the rows.

    `rows` are pairs of id and first question. An id such as "QWJhYvA_7" is the name of
    a conversation, an underscore, and the number of the part. `names` are those of the
    conversations for testing. A test row whose first question also occurs in training
    is in neither list.
    """
    train: list = []
    candidates: list = []
    for row_id, question in rows:
        name = row_id.rpartition("_")[0]
        (candidates if name in names else train).append((row_id, question))
    trained = {question for _, question in train}
    test = [row_id for row_id, question in candidates if question not in trained]
    return [[row_id for row_id, _ in train], test]


def _side_cases(draw: random.Random) -> Iterator[Case]:
    parts = [("QWJhYvA_0", "Hi"), ("b6Fq0Zk_0", "Why?"), ("QWJhYvA_7", "And now?")]
    yield Case((parts, {"QWJhYvA"}), (["b6Fq0Zk_0"], ["QWJhYvA_0", "QWJhYvA_7"]), "two parts of one conversation")
    leak = [("QWJhYvA_0", "Hi"), ("QWJhYvA_7", "And now?"), ("b6Fq0Zk_0", "Hi")]
    yield Case((leak, {"QWJhYvA"}), (["b6Fq0Zk_0"], ["QWJhYvA_7"]), "a test question that a later row trains")
    yield Case((leak[:2], set()), (["QWJhYvA_0", "QWJhYvA_7"], []), "no conversation for testing")
    for _ in range(8):
        names = ["a1B" + "".join(draw.choices(string.ascii_letters, k=4)) for _ in range(draw.randint(4, 9))]
        rows = [(f"{name}_{part}", draw.choice("abcdefgh")) for name in names for part in range(draw.randint(1, 4))]
        draw.shuffle(rows)
        test_names = set(names[: draw.randint(2, 3)])
        talks = [Conversation(row_id, (Message("user", asked), Message("assistant", "x"))) for row_id, asked in rows]
        trained = frozenset(first_question(c) for c in talks if c.id[:7] not in test_names)
        split = Split(frozenset(test_names), trained, Origins(frozenset(names)))
        sides = [[c.id for c in talks if split.side(c) == side] for side in ("train", "test")]
        yield Case((rows, test_names), sides)


def _by_name(rows: Rows, test_names: set[str]) -> Sides:
    """The split by name, without a look at the questions."""
    test = [row_id for row_id, _ in rows if row_id[:7] in test_names]
    return [[row_id for row_id, _ in rows if row_id not in test], test]


def _first_parts(rows: Rows, test_names: set[str]) -> Sides:
    train, test = sides_of(rows, test_names)
    first = {row_id[:7]: row_id for row_id, _ in reversed(rows)}.values()
    later = [row_id for row_id in test if row_id not in first]
    moved = [row_id for row_id, _ in rows if row_id in train or row_id in later]
    return [moved, [row_id for row_id in test if row_id in first]]


def _leaked_to_train(rows: Rows, test_names: set[str]) -> Sides:
    _, test = sides_of(rows, test_names)
    return [[row_id for row_id, _ in rows if row_id not in test], test]


def _leaks_of_earlier_rows(rows: Rows, test_names: set[str]) -> Sides:
    train: list[str] = []
    test: list[str] = []
    trained: set[str] = set()
    for row_id, asked in rows:
        if row_id[:7] not in test_names:
            train.append(row_id)
            trained.add(asked)
        elif asked not in trained:
            test.append(row_id)
    return [train, test]


SIDES = Exercise(
    name="00.sides",
    answer=sides_of,
    cases=_side_cases,
    mistakes=(
        Mistake(
            "Nothing is for testing: the whole id was looked up, with its part number. The name is what stands "
            "before the underscore.",
            lambda rows, test_names: [[row_id for row_id, _ in rows], []],
        ),
        Mistake(
            "Only the first part of a conversation is for testing, and the model trains on the rest of it.",
            _first_parts,
        ),
        Mistake(
            "Rows whose first question is trained are still for testing: a model that only remembers would score "
            "well on them.",
            _by_name,
        ),
        Mistake(
            "A test row with a trained question is moved to training, so one conversation is now on both sides. "
            "It belongs in neither list.",
            _leaked_to_train,
        ),
        Mistake(
            "Each question was compared with the rows before it only. A later row can train it as well: collect "
            "the trained questions first.",
            _leaks_of_earlier_rows,
        ),
        Mistake("The two lists are the wrong way round.", lambda rows, test_names: sides_of(rows, test_names)[::-1]),
    ),
    hints=(
        "Go through the rows twice: collect the questions of the training rows first, then fill the two lists.",
        'The name is row_id.rpartition("_")[0]. A row is for testing if its name is in names and its question '
        "is not among the collected ones.",
    ),
    minutes=8,
    ask_next="Two rows ask the same question in different words. Does this split notice? (No: notebook 05 does.)",
)


def global_loss(ranks: list[list[float]]) -> float:
    """Return the loss of one step: the mean over the trained tokens of all ranks.

    `ranks` holds one list per rank: the losses of its trained tokens.
    """
    total = sum(sum(losses) for losses in ranks)
    count = sum(len(losses) for losses in ranks)
    return total / count


def _loss_cases(draw: random.Random) -> Iterator[Case]:
    import numpy as np

    yield Case(([[1.0, 3.0, 5.0]],), 3.0, "one rank with three tokens")
    yield Case(([[2.0, 4.0], [1.0, 5.0]],), 3.0, "two ranks with two tokens each")
    yield Case(([[1.0], [3.0, 3.0, 5.0]],), 3.0, "one token on rank 0 and three on rank 1")
    for _ in range(8):
        ranks = [[draw.uniform(0, 6) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(2, 5))]
        yield Case((ranks,), float(np.concatenate(ranks).mean()))


LOSS = Exercise(
    name="00.loss",
    answer=global_loss,
    cases=_loss_cases,
    mistakes=(
        Mistake(
            "This is the mean of the ranks' means. A token on a rank with few tokens then weighs more, and the "
            "loss depends on how the rows were divided.",
            lambda ranks: sum(sum(losses) / len(losses) for losses in ranks) / len(ranks),
        ),
        Mistake(
            "This is the loss of rank 0 alone: the other ranks' tokens belong to the step too.",
            lambda ranks: sum(ranks[0]) / len(ranks[0]),
        ),
        Mistake(
            "This is the sum over all tokens. Without the division a step with long answers would move the model more.",
            lambda ranks: sum(map(sum, ranks)),
        ),
        Mistake(
            "The sum is divided by the number of ranks. Divide it by the number of tokens.",
            lambda ranks: sum(map(sum, ranks)) / len(ranks),
        ),
    ),
    hints=(
        "Which number of tokens does each rank contribute? A rank with more tokens has to weigh more.",
        "Divide once, at the end: the sum of all losses by the number of all tokens.",
    ),
    minutes=5,
    ask_next="A rank whose rows were all cut before their answers has no trained token. Does your function survive it?",
    tolerance=1e-6,
)

KINDS = ("BOS", "question", "answer", "EOS")
APART = ("identical bits", "equal to five digits", "about 1% apart", "far apart")
FORGED = ("plain text", "the EOS token", "an error")
OWN = ("stops at once", "answers and stops", "answers without an end")

LESSON = Lesson(
    objectives=(
        "follow a conversation from raw turns to segments, token ids and labels, and say what is trained",
        "name two bugs that train the wrong tokens without an error",
        "split conversations into train and test without a leak",
        "explain why the loss does not depend on how the work is divided, and what ZeRO changes instead",
        "tell what a training taught a model from what the model already knew",
    ),
    minutes=50,
    predictions={
        "kinds": Several(
            asks="the kinds of segment that are trained",
            stand_in=["answer"],
            lesson="EOS after an answer is trained too: a model that never learns EOS never stops.",
            options=KINDS,
        ),
        "trained": Number(
            asks="how many tokens of the toy row are trained",
            stand_in=4,
            lesson="Count the EOS after each answer, and the space before it if the tokenizer makes it a token.",
            unit="tokens",
        ),
        "forged": Choice(
            asks="what a tokenizer's default call makes of the characters of EOS in a message",
            stand_in="plain text",
            lesson="By default the text of a message can forge control tokens, so encode it as plain text.",
            options=FORGED,
        ),
        "begins": Number(
            asks="the share of ShareGPT's rows with an answer before any question",
            stand_in=1,
            lesson="Published data needs cleaning more often than it seems: look before you train.",
            unit="%",
            within=0.2,
        ),
        "apart": Choice(
            asks="how far the losses of the four strategies lie apart",
            stand_in="about 1% apart",
            lesson="ZeRO changes where tensors are stored, not what is computed; only the order of additions differs.",
            options=APART,
        ),
        "states": Number(
            asks="what a rank of ZeRO-1 holds between two steps, as a share of vanilla",
            stand_in=67,
            lesson="DeepSpeed keeps an fp32 copy of the rank's share of the parameters, which costs some of it.",
            unit="%",
            within=0.05,
        ),
        "stops": Interval(
            asks="how many of the 12 test answers the trained model ends by itself",
            stand_in=[0, 3],
            lesson="A few steps teach the format, and where to stop, long before they teach facts.",
            unit="answers",
        ),
        "own": Choice(
            asks="what the model before training does with a question in its own template",
            stand_in="stops at once",
            lesson="The model could answer already; training mostly taught it another template.",
            options=OWN,
        ),
    },
    exercises=(SEGMENTS, SIDES, LOSS),
    misconceptions=(
        "That fine-tuning teaches a model facts. A few steps mostly teach it a format, and when to stop.",
        "That a division over processes changes the result. It changes memory and time.",
        "That a falling loss shows that the right tokens are trained.",
    ),
)
