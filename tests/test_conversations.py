import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import sharegpt_row, write_sharegpt
from hypothesis import given
from hypothesis import strategies as st

from minisft.conversations import Conversation, Ledger, Message, clean, origin, read, select, split
from minisft.errors import UserError

GOOD = sharegpt_row("a", ("human", "Hi"), ("gpt", "Hello!"))


def cleaned(*turns, ledger=None):
    return clean(sharegpt_row("x", *turns), "here", ledger if ledger is not None else Ledger())


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "bom", "one-object"])
def test_every_format_gives_the_same_conversations(tmp_path, form):
    rows = [GOOD, sharegpt_row("b", ("user", "é🙂"), ("assistant", "Ja"))]
    file = tmp_path / f"data.{form}"
    if form == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif form == "bom":
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    elif form == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        rows = rows[:1]
        file.write_text(json.dumps(rows[0], indent=2))
    found = read(file, Ledger())
    assert [c.id for c in found] == [r["id"] for r in rows]
    assert found[0].messages == (Message("user", "Hi"), Message("assistant", "Hello!"))


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_cut_list_keeps_every_whole_row_and_says_so(tmp_path, cut):
    rows = [sharegpt_row(f"r{i}", ("human", "question " * 20), ("gpt", "answer " * 20)) for i in range(6)]
    whole = json.dumps(rows)
    ends = [whole.index(json.dumps(row)) + len(json.dumps(row)) for row in rows]
    file = tmp_path / "cut.json"
    file.write_text(whole[: ends[cut - 1] + 60])
    ledger = Ledger()
    assert [c.id for c in read(file, ledger)] == [f"r{i}" for i in range(cut)]
    assert f"after {cut} whole rows" in ledger.lost


def test_a_bad_line_is_counted_and_the_rest_is_read(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{{broken\n{json.dumps(GOOD | {'id': 'c'})}\n")
    ledger = Ledger()
    assert [c.id for c in read(file, ledger)] == ["a", "c"]
    assert ledger.dropped["line is not valid JSON"] == ["data.jsonl line 2"]
    assert ledger.stages["read from the file"] == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("   \n", "is empty"),
        ("hello", "not JSON"),
        ("[1, 2", "a int, not an object"),
        ("[{]", "not JSON"),
        ("{oops", "not JSON"),
        ("[]", "no usable conversation"),
        (json.dumps([{"instruction": "Add", "output": "3"}]), "Alpaca"),
        (json.dumps([{"messages": [{"role": "user", "content": "Hi"}]}]), "messages shape"),
        (json.dumps([{"text": "Hi", "n": 1}]), "keys 'text', 'n'"),
        (json.dumps([sharegpt_row("a", ("human", "Hi"))]), "no usable conversation"),
        ("PAR1 but not really", "damaged Parquet"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, says):
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read(file, Ledger())
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.json", Ledger())


def test_cleaning_repairs_and_counts():
    ledger = Ledger()
    found = cleaned(("gpt", "…"), ("human", "A"), ("human", "B"), ("bing", "C"), ("human", "D"), ledger=ledger)
    assert found.messages == (Message("user", "A\n\nB"), Message("assistant", "C"))
    assert set(ledger.repaired) == {
        "answer before any question: removed",
        "neighbours of one role: joined",
        "last question has no answer: removed",
    }


@pytest.mark.parametrize("blank", ["", "  \n", "\u200b", "\ufeff \x00"])
def test_an_empty_answer_ends_the_conversation_before_it(blank):
    found = cleaned(("human", "A"), ("gpt", "B"), ("human", "C"), ("gpt", blank), ("human", "D"), ("gpt", "E"))
    assert [m.content for m in found.messages] == ["A", "B"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "x"}, "no list of conversations"),
        (sharegpt_row("x"), "empty conversation"),
        (sharegpt_row("x", ("tool", "1"), ("gpt", "2")), "unknown role 'tool'"),
        ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, "a turn without role and text"),
        (sharegpt_row("x", ("gpt", "A")), "no question with an answer"),
        (17, "no list of conversations"),
    ],
)
def test_a_dropped_row_has_its_reason(row, reason):
    ledger = Ledger()
    assert clean(row, "here", ledger) is None
    assert list(ledger.dropped) == [reason]


def test_half_a_surrogate_pair_becomes_encodable():
    ledger = Ledger()
    found = cleaned(("human", "A\ud83d"), ("gpt", "B"), ledger=ledger)
    found.messages[0].content.encode()
    assert ledger.repaired["half a surrogate pair: replaced"] == ["x"]


@given(st.lists(st.tuples(st.sampled_from(["human", "gpt", "system", "user", "x"]), st.text(max_size=5)), max_size=8))
def test_whatever_comes_in_what_is_kept_alternates_and_ends_in_an_answer(turns):
    ledger = Ledger()
    found = cleaned(*turns, ledger=ledger)
    if found is None:
        assert sum(map(len, ledger.dropped.values())) == 1
        return
    roles = [m.role for m in found.messages if m.role != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert roles
    assert all(m.content.strip() for m in found.messages)


def test_rows_in_equal_rows_kept_plus_dropped(tmp_path):
    rows = [GOOD, sharegpt_row("b"), sharegpt_row("c", ("gpt", "A")), GOOD, GOOD | {"id": "a#2"}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    ledger = Ledger()
    kept = read(file, ledger)
    assert [c.id for c in kept] == ["a", "a#2", "a#2#2"]
    assert len(rows) == len(kept) + sum(map(len, ledger.dropped.values()))


def made(ids):
    return [Conversation(i, (Message("user", "q"), Message("assistant", "a"))) for i in ids]


def test_split_is_nine_to_one_seeded_and_independent_of_order(tmp_path):
    conversations = read(write_sharegpt(tmp_path / "d.json", 200), Ledger())
    train, test = split(conversations)
    assert (len(train), len(test)) == (180, 20)
    shuffled = random.Random(1).sample(conversations, len(conversations))
    assert {c.id for c in split(shuffled)[1]} == {c.id for c in test}
    assert {c.id for c in split(conversations, seed=1)[1]} != {c.id for c in test}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), unique=True, max_size=80), st.integers(0, 3))
def test_split_never_parts_a_conversation_and_loses_none(parts, seed):
    conversations = made([f"abcde{group:02d}_{part}" for group, part in parts])
    train, test = split(conversations, seed=seed)
    assert sorted(c.id for c in train + test) == sorted(c.id for c in conversations)
    assert {origin(c.id) for c in train}.isdisjoint(origin(c.id) for c in test)
    if len({origin(c.id) for c in conversations}) > 1:
        assert train
        assert test


def test_only_sharegpts_own_ids_are_grouped():
    assert origin("QWJhYvA_7") == origin("QWJhYvA_0#2") == "QWJhYvA"
    assert origin("identity_12") != origin("identity_13")
    assert origin("row-5#2") == origin("row-5")


def test_select_counts_what_it_leaves_out():
    ledger = Ledger()
    kept = select(made("abcd"), "train", ledger, max_characters=None, max_rows=3)
    assert len(kept) == 3
    assert ledger.dropped == {"train: beyond the first 3 rows": ["d"]}
    assert select(made("ab"), "train", ledger, max_characters=1, max_rows=None) == []


@pytest.mark.model
def test_the_packaged_sharegpt_is_read_to_its_last_whole_conversation():
    from minisft.assets import find_data

    ledger = Ledger()
    conversations = read(find_data().path, ledger)
    assert ledger.stages["read from the file"] == 17_671
    assert len(conversations) + sum(map(len, ledger.dropped.values())) == 17_671
    assert len(ledger.dropped["empty conversation"]) == 126
    assert len(ledger.repaired["answer before any question: removed"]) == 6_358
    assert "17,671 whole rows" in ledger.lost
    train, test = split(conversations)
    assert len(test) == round(0.1 * len(conversations))
    assert {origin(c.id) for c in train}.isdisjoint(origin(c.id) for c in test)
