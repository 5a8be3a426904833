"""Exercises of lesson 02 on one row: label it, and cut it to a limit."""

from __future__ import annotations

import random
from collections.abc import Iterator

from minisft.chat.registry import template_for
from minisft.course.buggy_rows import right_row, talk
from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons.label_masking_test import WORDS, shared_tokenizer
from minisft.labels.encode_row import IGNORE_INDEX, TRUNCATIONS, encode

Piece = tuple[str, list[int]]  # who wrote it ("user", "assistant", "bos" or "eos"), and its token ids
Lists = tuple[list[int], list[int]]  # ids and labels

# --- 02.labels -----------------------------------------------------------------------------------


def labels_of(pieces: list[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one row.

    `pieces` are the parts of a conversation in order, as (role, ids). The role is
    "bos", "user", "assistant", or "eos", which follows each answer. Answers are
    trained with their EOS.
    """
    input_ids, labels = [], []
    for role, ids in pieces:
        input_ids += ids
        labels += ids if role in ("assistant", "eos") else [-100] * len(ids)
    return input_ids, labels


def _label_cases(draw: random.Random) -> Iterator[Case]:
    one = [("bos", [1]), ("user", [10, 11]), ("assistant", [20]), ("eos", [2])]
    yield Case((one,), ([1, 10, 11, 20, 2], [-100, -100, -100, 20, 2]), "one question and its answer")
    two = [*one, ("user", [12]), ("assistant", [21, 22]), ("eos", [2])]
    row = ([1, 10, 11, 20, 2, 12, 21, 22, 2], [-100, -100, -100, 20, 2, -100, 21, 22, 2])
    yield Case((two,), row, "two questions with their answers")
    yield Case(([("bos", [1]), ("user", [2, 20])],), ([1, 2, 20], [-100] * 3), "a question that spells EOS")
    for _ in range(10):
        pieces: list[Piece] = [("bos", [1])]
        for role in ("user", "assistant") * draw.randint(1, 4):
            pieces.append((role, [draw.randint(3, 999) for _ in range(draw.randint(1, 6))]))
            pieces += [("eos", [2])] if role == "assistant" else []
        ids = [i for _, part in pieces for i in part]
        trained = [role in ("assistant", "eos") for role, part in pieces for _ in part]
        yield Case((pieces,), (ids, [i if t else IGNORE_INDEX for i, t in zip(ids, trained, strict=True)]))


def _relabeled(pieces: list[Piece], *trained: str) -> tuple[list[int], list[int]]:
    """Ids and labels of `pieces` if exactly the roles `trained` were trained."""
    ids = [i for _, part in pieces for i in part]
    return ids, [i if role in trained else IGNORE_INDEX for role, part in pieces for i in part]


def _shifted(pieces: list[Piece]) -> tuple[list[int], list[int]]:
    ids, labels = labels_of(pieces)
    return ids, [*labels[1:], IGNORE_INDEX]


LABELS = Exercise(
    name="02.labels",
    answer=labels_of,
    cases=_label_cases,
    mistakes=(
        Mistake(
            "The EOS after an answer is not trained, so the model would never learn to stop.",
            lambda pieces: _relabeled(pieces, "assistant"),
        ),
        Mistake(
            "Everything is trained, the questions included: the model would learn to write the user's part.",
            lambda pieces: _relabeled(pieces, "bos", "user", "assistant", "eos"),
        ),
        Mistake(
            "BOS is trained. It is never predicted, because nothing comes before it.",
            lambda pieces: _relabeled(pieces, "bos", "assistant", "eos"),
        ),
        Mistake(
            "The labels are shifted by one. The model shifts them itself: each label stays with its own id.", _shifted
        ),
        Mistake(
            "The mask is the wrong way round: the questions are trained and the answers are not.",
            lambda pieces: _relabeled(pieces, "bos", "user"),
        ),
    ),
    hints=(
        "Extend both lists in the same loop, once for each piece.",
        'A piece is trained if its role is "assistant" or "eos"; otherwise add -100 once for each of its ids.',
    ),
    minutes=10,
    ask_next="What would the model learn if only the EOS of the last answer were trained?",
)

# --- 02.truncate ---------------------------------------------------------------------------------


def truncated(
    input_ids: list[int], labels: list[int], ends: list[int], limit: int, method: str
) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of the row, cut to at most `limit` tokens.

    `ends` holds the length of the row after each answer, its EOS included. What happens
    to a row that is too long depends on `method`. "token": cut it at the limit. "turn":
    cut it after the last answer that fits. "drop": return two empty lists.
    """
    length = len(input_ids)
    if length > limit:
        fitting = [end for end in ends if end <= limit]
        length = {"token": limit, "turn": max(fitting, default=0), "drop": 0}[method]
    return input_ids[:length], labels[:length]


def _truncate_cases(draw: random.Random) -> Iterator[Case]:
    ids, labels = [1, 10, 20, 2, 11, 21, 22, 2], [-100, -100, 20, 2, -100, 21, 22, 2]
    six = ([1, 10, 20, 2, 11, 21], [-100, -100, 20, 2, -100, 21])
    four = ([1, 10, 20, 2], [-100, -100, 20, 2])
    for limit, method, expected, name in (
        (6, "token", six, "a row of 8 tokens cut at 6 with 'token'"),
        (6, "turn", four, "a row of 8 tokens cut at 6 with 'turn'"),
        (6, "drop", ([], []), "a row of 8 tokens and the limit 6 with 'drop'"),
        (8, "drop", (ids, labels), "a row of 8 tokens and the limit 8 with 'drop'"),
        (4, "turn", four, "a limit that is exactly the end of the first answer, with 'turn'"),
        (3, "turn", ([], []), "a limit before the end of the first answer, with 'turn'"),
    ):
        yield Case((ids, labels, [4, 8], limit, method), expected, name)
    tokenizer = shared_tokenizer()
    for _ in range(20):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(2 * draw.randint(1, 3))]
        whole = right_row(tokenizer, talk(*texts))
        ends = [i + 1 for i, label in enumerate(whole.labels) if label == tokenizer.eos_id]
        limit, method = draw.randint(2, len(whole.input_ids) + 2), draw.choice(TRUNCATIONS)
        row = encode(talk(*texts), template_for(tokenizer), tokenizer, limit, method)
        yield Case((whole.input_ids, whole.labels, ends, limit, method), (row.input_ids, row.labels))


def _cut_at(length: int, ids: list[int], labels: list[int]) -> Lists:
    return ids[:length], labels[:length]


def _drops_what_fits(ids: list[int], labels: list[int], ends: list[int], limit: int, method: str) -> Lists:
    return ([], []) if method == "drop" and len(ids) == limit else truncated(ids, labels, ends, limit, method)


def _misses_the_limit(ids: list[int], labels: list[int], ends: list[int], limit: int, method: str) -> Lists:
    fitting = max((end for end in ends if end < limit), default=0)
    return _cut_at(fitting, ids, labels) if method == "turn" and len(ids) > limit else _cut(ids, labels, limit, method)


def _cut(ids: list[int], labels: list[int], limit: int, method: str) -> Lists:
    """Cut a row that is not cut by turns."""
    return _cut_at(0 if method == "drop" and len(ids) > limit else limit, ids, labels)


def _cuts_if_none_fits(ids: list[int], labels: list[int], ends: list[int], limit: int, method: str) -> Lists:
    none_fits = method == "turn" and ends[0] > limit
    return truncated(ids, labels, ends, limit, "token" if none_fits else method)


def _ends_in_eos(ids: list[int], labels: list[int], ends: list[int], limit: int, method: str) -> Lists:
    if method != "token" or len(ids) <= limit:
        return truncated(ids, labels, ends, limit, method)
    eos_id = ids[ends[0] - 1]
    return [*ids[: limit - 1], eos_id], [*labels[: limit - 1], eos_id]


def _keeps_the_end(ids: list[int], labels: list[int], ends: list[int], limit: int, method: str) -> Lists:
    return (ids[-limit:], labels[-limit:]) if method == "token" else truncated(ids, labels, ends, limit, method)


TRUNCATE = Exercise(
    name="02.truncate",
    answer=truncated,
    cases=_truncate_cases,
    mistakes=(
        Mistake(
            'A row of exactly `limit` tokens fits, so "drop" keeps it. Compare with > and not >=.', _drops_what_fits
        ),
        Mistake("An answer that ends exactly at the limit fits, and you cut it away.", _misses_the_limit),
        Mistake(
            'No answer fits, and "turn" then leaves nothing. You keep a piece of the first one.', _cuts_if_none_fits
        ),
        Mistake(
            "The labels keep their old length: ids and labels no longer correspond. Cut both at the same length.",
            lambda ids, labels, ends, limit, method: (truncated(ids, labels, ends, limit, method)[0], labels),
        ),
        Mistake(
            "You end the cut row with EOS, which teaches the model to stop in the middle of a sentence.", _ends_in_eos
        ),
        Mistake(
            "You keep the end of the row. The model would learn answers whose questions are cut away.", _keeps_the_end
        ),
        Mistake(
            '"turn" must leave whole answers only. You cut at the limit, in the middle of one.',
            lambda ids, labels, ends, limit, method: _cut(ids, labels, limit, method),
        ),
        Mistake(
            '"drop" leaves nothing of a row that is too long. You keep the answers that fit, which is "turn".',
            lambda ids, labels, ends, limit, method: truncated(
                ids, labels, ends, limit, "turn" if method == "drop" else method
            ),
        ),
    ),
    hints=(
        "Decide how many tokens are left, once for each method; then cut both lists at that length.",
        'Only if `len(input_ids) > limit`: the length is `limit` for "token", 0 for "drop", and for "turn" the '
        "largest of the `ends` that is at most `limit`, or 0.",
    ),
    minutes=10,
    ask_next="Which method would you choose if most answers of your data are longer than the limit?",
)
