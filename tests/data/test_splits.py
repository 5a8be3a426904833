import random

import pytest
from conftest import write_sharegpt
from hypothesis import given
from hypothesis import strategies as st

from minisft.data.conversations import Conversation, Message
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.data.splits import assign, first_question, origin, select, split

LEAK = "test: its first question is in train too"


def made(ids, question="q{}"):
    """One conversation per id, each with a different question by default."""
    return [
        Conversation(name, (Message("user", question.format(i)), Message("assistant", "a")))
        for i, name in enumerate(ids)
    ]


def test_split_is_nine_to_one_seeded_and_independent_of_order(tmp_path):
    conversations = list(read(write_sharegpt(tmp_path / "d.json", 200), Ledger()))
    train, test = split(conversations)
    assert (len(train), len(test)) == (180, 20)
    shuffled = random.Random(1).sample(conversations, len(conversations))
    assert {c.id for c in split(shuffled)[1]} == {c.id for c in test}
    assert {c.id for c in split(conversations, seed=1)[1]} != {c.id for c in test}


@given(
    parts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), unique=True, max_size=80),
    questions=st.integers(1, 50),
    seed=st.integers(0, 3),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_split_never_parts_a_conversation_shares_no_question_and_loses_none(parts, questions, seed, fraction):
    conversations = [
        Conversation(f"abcde{group:02d}_{part}", (Message("user", f"q{i % questions}"), Message("assistant", "a")))
        for i, (group, part) in enumerate(parts)
    ]
    ledger = Ledger()
    train, test = split(conversations, fraction, seed, ledger)
    assert {origin(c.id) for c in train}.isdisjoint(origin(c.id) for c in test)
    assert {first_question(c) for c in train}.isdisjoint(first_question(c) for c in test)
    leaked = ledger.dropped[LEAK].rows
    assert len(train) + len(test) + leaked == len(conversations)
    if len({origin(c.id) for c in conversations}) > 1:
        assert train
        assert test or leaked
    else:
        assert train == conversations
    assert ledger.stages["train side of the split"].rows == len(train)
    assert ledger.stages["test side of the split"].rows == len(test)


def test_a_test_question_that_is_in_train_too_is_left_out_with_its_line():
    conversations = made([f"r{i}" for i in range(40)], question="same")
    ledger = Ledger()
    train, test = split(conversations, ledger=ledger)
    assert (len(train), test) == (36, [])
    assert ledger.dropped[LEAK].rows == 4
    assert len(ledger.dropped[LEAK].first) == 4


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([("user", "Hi  there\n")], [("user", "hi THERE")], True),
        ([("user", "Hi")], [("user", "Ho")], False),
        ([("system", "s"), ("user", "Hi")], [("user", "Hi")], False),
        ([("user", "a b")], [("system", "a"), ("user", "b")], False),
        ([("user", "Hi"), ("assistant", "x")], [("user", "Hi"), ("assistant", "y"), ("user", "z")], True),
    ],
)
def test_questions_are_compared_without_case_and_white_space(one, other, same):
    one, other = (
        Conversation("x", tuple(Message(role, text) for role, text in [*turns, ("assistant", "a")]))
        for turns in (one, other)
    )
    assert (first_question(one) == first_question(other)) == same


def test_only_sharegpts_own_ids_are_grouped():
    assert origin("QWJhYvA_7") == origin("QWJhYvA_0#2") == "QWJhYvA"
    assert origin("identity_12") != origin("identity_13")
    assert origin("row-5#2") == origin("row-5")
    assert origin("example_12") != origin("example_13")


@pytest.mark.parametrize("name", ["QWJhYvA", "abc1234", "banana1"])
@pytest.mark.parametrize("copies", [2, 5, 12, 40, 200])
@pytest.mark.parametrize("parts", [2, 5, 10])
def test_copies_of_several_parts_stay_with_their_conversation(name, copies, parts):
    """A file that was joined from many, each with the same ids and other texts; `read` numbers the copies."""
    ids = [f"{name}_{part}#{copy}".removesuffix("#1") for part in range(parts) for copy in range(1, copies + 1)]
    train, test = split(made([*ids, *(f"row-{i}" for i in range(100))]))
    assert {c.id[:7] for c in train if c.id in ids}.isdisjoint(c.id[:7] for c in test)


def copied(sizes):
    """Ids that are repeated, as `read` numbers them."""
    return [f"{name}#{copy}".removesuffix("#1") for name, size in sizes.items() for copy in range(1, size + 1)]


UUIDS = [f"3f2b8c1e-77aa-4d0b-9c5e-{i:012x}" for i in range(40)]


@pytest.mark.parametrize(
    "sizes",
    [
        dict.fromkeys(UUIDS[:8], 11),
        dict.fromkeys(UUIDS[:8], 40),
        dict.fromkeys([str(i) for i in range(40)], 25),
        {f"conv-{i}": 5 + i for i in range(30)},
        {"unknown": 200} | {f"row-{i}": 1 for i in range(800)},
    ],
    ids=["8 x 11", "8 x 40", "40 x 25", "5 to 34", "200 + 800"],
)
@pytest.mark.parametrize("seed", range(5))
def test_rows_with_one_id_stay_on_one_side(sizes, seed):
    ledger = Ledger()
    sides = split(made(copied(sizes)), seed=seed, ledger=ledger)
    train, test = ({c.id.partition("#")[0] for c in side} for side in sides)
    assert train.isdisjoint(test)
    assert ledger.notes == []


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"x": 199}, "1 id has rows on both sides of the split (x), because"),
        ({"alpaca": 1000, "dolly": 500, "lima": 100}, "2 ids have rows on both sides of the split (alpaca, dolly)"),
        ({"x\n": 900} | {f"row-{i}": 1 for i in range(100)}, "1 id has rows on both sides"),
        (dict.fromkeys(UUIDS[:5], 40), f"5 ids have rows on both sides of the split ({UUIDS[0]}, "),
    ],
    ids=["one", "sources", "default", "large"],
)
def test_an_id_that_most_rows_have_is_a_label_and_that_is_said(sizes, says):
    ledger = Ledger()
    train, test = split(made(copied(sizes)), ledger=ledger)
    assert len(test) == round(0.1 * (len(train) + len(test)))
    (note,) = ledger.notes
    assert says in note and "\n" not in note


NAMES = ["example", "medical", "finance", "message", "Chapter", "PROBLEM", "history", "topic12", "batch1a", "science"]


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    "ids",
    [
        [f"example_{i}" for i in range(60)],
        [f"example_{i}" for i in range(10)],
        [f"{name}_{i}" for name in ("medical", "finance") for i in range(100)],
        [f"message_{i}" for i in range(30)],
        [f"topic{k:02d}_{i}" for k in range(10) for i in range(100)],
        [f"issue#{i}" for i in range(50)],
        [f"example_{i}" for i in range(100)] + [f"Qq{i:02d}wE{i % 9}_0" for i in range(100)],
    ],
    ids=lambda ids: f"{ids[0]} … {ids[-1]}",
)
def test_names_with_numbers_are_rows_of_their_own(ids):
    ledger = Ledger()
    train, test = split(made(ids), ledger=ledger)
    assert (len(train), len(test)) == (len(ids) - round(0.1 * len(ids)), round(0.1 * len(ids)))
    assert ledger.notes == []


@pytest.mark.attack("16")
@given(
    sizes=st.dictionaries(st.sampled_from(NAMES), st.integers(11, 60), min_size=1, max_size=4),
    seed=st.integers(0, 5),
    fraction=st.sampled_from([0.1, 0.3]),
)
def test_the_test_share_is_the_one_asked_for_or_it_is_said(sizes, seed, fraction):
    conversations = made([f"{name}_{i}" for name, size in sizes.items() for i in range(size)])
    ledger = Ledger()
    test = split(conversations, fraction, seed, ledger)[1]
    assert len(test) == round(fraction * len(conversations))
    assert not ledger.notes


@pytest.mark.attack("16")
def test_parts_of_a_conversation_stay_together_where_names_are_random():
    """Some random names look like words, and some have many parts; they are conversations, too."""
    chance = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    names = ["".join(chance.choices(letters, k=7)) for _ in range(400)] + ["banana" + c for c in "abcdefghij"]
    conversations = made([f"{name}_{i}" for name in names for i in range(chance.choice([1, 1, 2, 3, 30]))])
    ledger = Ledger()
    train, test = split(conversations, ledger=ledger)
    assert {c.id[:7] for c in train}.isdisjoint(c.id[:7] for c in test)
    assert len(test) == round(0.1 * len(conversations))
    assert ledger.notes == []


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    ("ids", "question", "says"),
    [
        (
            [f"QWJhYvA_{i}" for i in range(50)],
            "q{}",
            "the test side has 0 of 50 rows instead of 10%; parts of",
        ),
        (["alone"], "q{}", "the test side has 0 of 1 rows instead of 10%; a single conversation"),
        ([f"r{i}" for i in range(40)], "same", "the test side has 0 of 40 rows instead of 10%; 4 more have"),
        ([f"QWJhYvA_{i}" for i in range(50)] + [f"mZ7kQ1x_{i}" for i in range(40)], "q{}", "has 40 of 90 rows"),
    ],
)
def test_a_test_side_that_is_empty_or_far_from_what_was_asked_for_is_said(ids, question, says):
    ledger = Ledger()
    split(made(ids, question), ledger=ledger)
    (note,) = ledger.notes
    assert says in note
    assert f"note                  {note}" in str(ledger)
    assert ledger.to_dict()["notes"] == [note]


def test_a_single_conversation_in_parts_larger_than_the_test_set():
    """Both origins are larger than a tenth of the rows, so the smaller one is the test set."""
    conversations = made([f"aaaaaaa_{i}" for i in range(5)] + [f"bbbbbbb_{i}" for i in range(4)])
    assert {origin(c.id) for c in split(conversations)[1]} == {"bbbbbbb"}
    assert assign([]).test_origins == frozenset()


def test_select_counts_what_it_leaves_out():
    ledger = Ledger()
    kept = list(select(made("abcd"), "train", ledger, max_characters=None, max_rows=3))
    assert [c.id for c in kept] == ["a", "b", "c"]
    assert ledger.dropped["train: beyond the first 3 rows"].first == ["d"]
    assert list(select(made("ab"), "train", ledger, max_characters=2, max_rows=None)) == []
    assert ledger.dropped["train: longer than 2 characters"].first == ["a", "b"]
    assert ledger.to_dict()["stages"]["train"]["rows"] == 3
