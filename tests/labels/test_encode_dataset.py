"""Streams of rows: what is trained, what is left out and why, and memory that does not grow with the data."""

import tracemalloc

import pytest
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import A, talk
from tokenizer_kinds import KINDS, tokenizer_of

from minisft.chat.mistral_reference import reference
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import load_tokenizer
from minisft.data.conversations import Conversation, Message, clean
from minisft.data.ledger import Ledger
from minisft.errors import UserError
from minisft.labels.encode_dataset import BATCH, encode_stream
from minisft.labels.encode_row import IGNORE_INDEX, encode
from minisft.labels.invariants import check_row
from minisft.training.dataset import load_rows, write_rows

LONG_QUESTION = talk(("user", "word " * 200), ("assistant", "ok"))


def encoded(conversations, version="v1", kind="byte level", **options):
    tokenizer = tokenizer_of(kind, version)
    ledger = Ledger()
    template = template_for(tokenizer)
    rows = list(encode_stream(conversations, template, tokenizer, **({"max_length": 64} | options), ledger=ledger))
    adds_up(rows, ledger)
    return rows, ledger


def adds_up(rows, ledger):
    stages = ledger.stages
    assert stages["truncated"].rows == stages["trained"].rows == len(rows)
    assert stages["templated"].rows == len(rows) + sum(entry.rows for entry in ledger.dropped.values())
    assert stages["truncated"].tokens == sum(len(row.input_ids) for row in rows)
    assert stages["trained"].tokens == sum(row.trained for row in rows)
    shown = ledger.to_dict()["stages"]
    assert not shown["truncated"]["estimated"]
    assert not shown["trained"]["estimated"]
    assert all(row.trained for row in rows)
    if rows:
        assert shown["templated"]["tokens"] >= shown["truncated"]["tokens"] >= shown["trained"]["tokens"]


def test_rows_without_a_target_are_dropped_and_counted():
    rows, ledger = encoded([A, LONG_QUESTION])
    assert len(rows) == 1
    assert ledger.dropped["no answer within 64 tokens"].rows == 1
    assert ledger.stages["trained"].tokens == sum(label != IGNORE_INDEX for label in rows[0].labels)


@pytest.mark.parametrize(
    ("truncation", "dropped", "cut"),
    [
        ("token", {"no answer within 40 tokens": 1}, {"cut to 40 tokens, at the token": 1}),
        ("turn", {"no answer within 40 tokens": 1}, {"cut to 40 tokens, at the turn": 1}),
        ("drop", {"longer than 40 tokens": 2}, {}),
    ],
)
def test_each_truncation_has_its_lines(truncation, dropped, cut):
    long_talk = talk(*[turn for _ in range(9) for turn in (("user", "the cat"), ("assistant", "sat on a mat"))])
    rows, ledger = encoded([long_talk, LONG_QUESTION, A], max_length=40, truncation=truncation)
    assert {reason: entry.rows for reason, entry in ledger.dropped.items()} == dropped
    assert {reason: entry.rows for reason, entry in ledger.repaired.items()} == cut
    eos = tokenizer_of("byte level").eos_id
    if truncation == "token":
        assert len(rows[0].input_ids) == 40
    if truncation == "turn":
        assert rows[0].input_ids[-1] == eos
    assert [row.truncated for row in rows] == [True, False][-len(rows) :]


def test_what_was_not_encoded_is_estimated_and_marked():
    talks = [talk(("user", "the cat"), ("assistant", "sat on a mat " * 1000)) for _ in range(3)]
    _, ledger = encoded(talks)
    shown = ledger.to_dict()["stages"]["templated"]
    assert shown["estimated"]
    whole = sum(len(row.input_ids) for row in encoded(talks, max_length=10**6)[0])
    assert shown["tokens"] == pytest.approx(whole, rel=0.2)
    assert "≈" in str(ledger)
    _, exact = encoded(talks, max_length=10**6)
    assert exact.to_dict()["stages"]["templated"] == {"rows": 3, "tokens": whole, "estimated": False}


TURNS = (
    Message("system", "s"),
    Message("user", "a"),
    Message("assistant", "b", False),
    Message("user", "c"),
    Message("assistant", "d"),
    Message("user", "e"),
    Message("assistant", "f"),
)


def answers_trained(rows, tokenizer):
    return ["".join(tokenizer.decode([i for i in row.labels if i != IGNORE_INDEX]).split()) for row in rows]


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_train_on_all_the_last_or_each_answer(version):
    tokenizer = tokenizer_of("byte level", version)
    made = Conversation("x", TURNS)
    found = {on: encoded([made], version, train_on=on)[0] for on in ("all", "last", "each")}
    assert {on: answers_trained(rows, tokenizer) for on, rows in found.items()} == {
        "all": ["d</s>f</s>"],
        "last": ["f</s>"],
        "each": ["d</s>", "f</s>"],
    }
    assert [row.id for row in found["each"]] == ["x@2", "x@3"]
    assert found["all"][0].input_ids == found["last"][0].input_ids == found["each"][1].input_ids


@pytest.mark.parametrize(("version", "warned"), [("v1", 0), ("v2", 1), ("v3", 1), ("v7", 0)])
def test_a_system_prompt_out_of_place_has_its_line(version, warned):
    made = Conversation("x", TURNS)
    _, ledger = encoded([made], version)
    line = f"system prompt not where inference puts it ({version}): train on each answer to fix this"
    assert ledger.repaired[line].rows == warned
    for train_on in ("each", "last"):
        assert line not in encoded([made], version, train_on=train_on)[1].repaired


@pytest.mark.attack("16")
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v3-tekken", "v7"])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_answers_of_different_weight_stay_apart_as_in_the_reference(version, weights):
    answers = [{"role": "assistant", "content": f"Hello {i}.", "weight": weight} for i, weight in enumerate(weights)]
    turns = [{"role": "user", "content": "Hi"}, *answers, {"role": "user", "content": "Bye"}, answers[0]]
    tokenizer = load_tokenizer(f"mistral:{version}")
    template = template_for(tokenizer)
    conversation = clean({"messages": turns}, "here", Ledger())
    (row,) = encode_stream([conversation], template, tokenizer, max_length=99, ledger=Ledger())
    ids, mask = reference(conversation, version)
    assert row.input_ids == ids
    assert [label != IGNORE_INDEX for label in row.labels] == mask
    for known in (None, conversation):
        violations = check_row("x", row.input_ids, row.labels, template, tokenizer, max_length=99, conversation=known)
        assert not violations
    for length in range(4, len(ids)):  # cut anywhere
        cut = encode(conversation, template, tokenizer, length)
        violations = check_row("x", cut.input_ids, cut.labels, template, tokenizer, max_length=length)
        assert {v.invariant for v in violations} <= {"targets"}


@pytest.mark.attack("16")
def test_two_answers_of_one_weight_without_a_question_are_still_violations():
    tokenizer = load_tokenizer("mistral:v3")
    template = template_for(tokenizer)
    row = encode(A, template, tokenizer, 99)
    answer = tokenizer.encode("more", "control")
    for trained in (True, False):
        labels = answer if trained else [IGNORE_INDEX] * len(answer)
        ids = [*row.input_ids, *answer, tokenizer.eos_id, *answer, tokenizer.eos_id]
        more = [*labels, tokenizer.eos_id if trained else IGNORE_INDEX]
        violations = check_row("x", ids, [*row.labels, *more, *more], template, tokenizer, max_length=99)
        assert "control" in {v.invariant for v in violations}


def test_a_last_answer_of_weight_0_leaves_nothing_to_train():
    turns = (*TURNS[:-1], Message("assistant", "f", False))
    rows, ledger = encoded([Conversation("x", turns)], train_on="last")
    assert rows == []
    assert ledger.dropped["no answer to train"].first == ["x"]


@settings(max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=4), max_size=8),
    max_length=st.integers(2, 80),
    truncation=st.sampled_from(["token", "turn", "drop"]),
    train_on=st.sampled_from(["all", "last", "each"]),
    kind=st.sampled_from([*KINDS]),
    version=st.sampled_from(["v1", "v3", "v7"]),
)
def test_the_ledger_adds_up_whatever_is_asked(lengths, max_length, truncation, train_on, kind, version):
    talks = [
        Conversation(
            f"c{i}",
            tuple(
                message
                for n in numbers
                for message in (Message("user", "the cat " * n), Message("assistant", "sat on " * n, n % 5 != 3))
            ),
        )
        for i, numbers in enumerate(lengths)
    ]
    options = {"max_length": max_length, "truncation": truncation, "train_on": train_on}
    rows, _ = encoded(talks, version, kind, **options)
    assert all(len(row.input_ids) == len(row.labels) <= max_length for row in rows)
    order = [int(row.id.partition("@")[0][1:]) for row in rows]
    assert order == sorted(order)


def test_batches_do_not_show():
    """More conversations than are in flight at once: the same rows as one by one."""
    talks = [talk(("user", WORDS[i % 9] * (i % 40)), ("assistant", "ok " * (i % 50))) for i in range(2 * BATCH + 7)]
    tokenizer = tokenizer_of("byte level", "v3")
    template = template_for(tokenizer)
    alone = [encode(c, template, tokenizer, 64) for c in talks]
    assert encoded(talks, "v3")[0] == [row for row in alone if row.trained]


def test_nothing_is_encoded_before_a_row_is_asked_for_and_bad_settings_are_refused_at_once():
    tokenizer = tokenizer_of("byte level")
    template = template_for(tokenizer)

    def unread():
        raise AssertionError
        yield

    encode_stream(unread(), template, tokenizer, max_length=9, ledger=Ledger())
    for options, says in (
        ({"max_length": 1}, "at least 2"),
        ({"max_length": 9, "truncation": "word"}, "use token, turn, drop"),
        ({"max_length": 9, "train_on": "first"}, "use all, last, each"),
    ):
        with pytest.raises(UserError, match=says):
            encode_stream(unread(), template, tokenizer, ledger=Ledger(), **options)


def test_memory_does_not_grow_with_the_data():
    tokenizer = tokenizer_of("byte level")
    template = template_for(tokenizer)

    def peak(count):
        talks = (talk(("user", "the cat"), ("assistant", f"sat {i}")) for i in range(count))
        tracemalloc.start()
        made = sum(1 for _ in encode_stream(talks, template, tokenizer, max_length=20, ledger=Ledger()))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made == count
        return used

    peak(1000)  # what is loaded once
    assert peak(20_000) < 1.3 * peak(1000)


def test_rows_survive_being_written_and_read(tmp_path):
    rows, _ = encoded([A, Conversation("é", TURNS), *[A] * 600], "v3")
    assert write_rows(iter(rows), tmp_path / "train.arrow") == 602
    found = load_rows(tmp_path)
    assert found["id"] == [row.id for row in rows]
    assert found["input_ids"] == [row.input_ids for row in rows]
    assert found["labels"] == [row.labels for row in rows]
    (tmp_path / "none").mkdir()
    assert write_rows([], tmp_path / "none" / "train.arrow") == 0
    assert len(load_rows(tmp_path / "none")) == 0
