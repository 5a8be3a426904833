"""Every kind of dirt in a row, and the line in the ledger that it must produce."""

import json
import time
from decimal import Decimal
from itertools import pairwise

import pytest
from conftest import sharegpt_row
from hypothesis import given
from hypothesis import strategies as st

from minisft.data.conversations import (
    LONGEST_MESSAGE,
    Conversation,
    Message,
    UnusableRow,
    clean,
    one_per_answer,
    only_last_answer,
)
from minisft.data.ledger import FIRST, MOST, Ledger
from minisft.data.messages import is_empty

GOOD = (("human", "Hi"), ("gpt", "Hello!"))


def cleaned(row, where="here"):
    """Clean one row: its turns as pairs (None if it was dropped), its repairs, and its drop reasons."""
    ledger = Ledger()
    found = clean(row, where, ledger)
    return found and [(m.role, m.content) for m in found.messages], list(ledger.repaired), list(ledger.dropped)


def talk(*turns):
    return cleaned(sharegpt_row("x", *turns))


@pytest.mark.parametrize(
    ("turns", "kept", "repaired"),
    [
        (GOOD, ["Hi", "Hello!"], []),
        ((("gpt", "…"), *GOOD), ["Hi", "Hello!"], ["answer before any question: removed"]),
        ((*GOOD, ("human", "more?")), ["Hi", "Hello!"], ["last question has no answer: removed"]),
        ((("human", "A"), ("human", "B"), ("gpt", "C")), ["A\n\nB", "C"], ["consecutive turns of one role: joined"]),
        ((("human", "A"), ("gpt", "B"), ("gpt", "C")), ["A", "B\n\nC"], ["consecutive turns of one role: joined"]),
        ((*GOOD, ("human", " "), ("gpt", "B")), ["Hi", "Hello!"], ["empty turn: cut there"]),
        ((("system", "Be brief."), *GOOD), ["Be brief.", "Hi", "Hello!"], []),
        ((("system", " \n"), *GOOD), ["Hi", "Hello!"], []),
        ((*GOOD, ("system", "now"), ("user", "A"), ("bard", "B")), ["Hi", "Hello!", "now", "A", "B"], []),
        (((" USER ", "A"), ("Bing", "B")), ["A", "B"], []),
        ((("human", "A\r\nB\rC"), ("gpt", "D")), ["A\nB\nC", "D"], ["CR or CRLF line endings: converted to LF"]),
        (
            (("human", "A\udcff\udcfeB"), ("gpt", "D")),
            ["A\N{REPLACEMENT CHARACTER}B", "D"],
            ["invalid UTF-8: replaced"],
        ),
        ((("human", "A\ud83d"), ("gpt", "B")), ["A?", "B"], ["half a surrogate pair: replaced"]),
        ((("human", " A "), ("gpt", "\n B\t")), [" A ", "\n B\t"], []),
    ],
)
def test_repairable_rows_are_repaired_and_counted(turns, kept, repaired):
    found, repairs, dropped = talk(*turns)
    assert [content for _, content in found] == kept
    assert (repairs, dropped) == (repaired, [])


@pytest.mark.parametrize("blank", ["", "  \n", "\u200b", "\ufeff \x00", "\u00ad\u200d", "\xa0"])
def test_an_empty_answer_ends_the_conversation_before_it(blank):
    found, repairs, _ = talk(("human", "A"), ("gpt", "B"), ("human", "C"), ("gpt", blank), ("human", "D"), ("gpt", "E"))
    assert found == [("user", "A"), ("assistant", "B")]
    assert repairs == ["empty turn: cut there", "last question has no answer: removed"]
    assert talk(("human", "A"), ("gpt", blank))[2] == ["no question with an answer"]


def turn(**changes):
    return {"id": "x", "conversations": [{"from": "human", "value": "Hi"} | changes, {"from": "gpt", "value": "ok"}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *((value, "row is not an object") for value in (17, None, True, 1.5, [], [[]])),
        ({}, "row of an unknown shape"),
        ({"id": "x"}, "row of an unknown shape"),
        ({"conversations": None}, "row of an unknown shape"),
        ({"conversations": {"from": "human"}}, "row of an unknown shape"),
        ({"instruction": "Add"}, "row of an unknown shape"),
        ({"conversations": []}, "empty conversation"),
        ({"messages": []}, "empty conversation"),
        ({"conversations": ["Hi", "Hello"]}, "a turn without role and text"),
        ({"conversations": [{}]}, "a turn without role and text"),
        ({"conversations": [{"role": "user"}]}, "a turn without role and text"),
        (turn(value=None), "no question with an answer"),
        ({"from": "human", "value": "Hi"}, "a turn by itself: make a list of the turns of each conversation"),
        *((turn(value=value), "a turn without role and text") for value in (3, 2.5, True, {"text": "Hi"})),
        *((turn(**{"from": role}), "a turn without role and text") for role in (None, 3, ["user"], {})),
        (turn(value=[{"type": "image_url", "image_url": "x"}]), "needs images"),
        (turn(value=[{"type": "json", "json": {}}]), "a turn with parts other than text"),
        (turn(value=["Hi"]), "a turn with parts other than text"),
        (turn(**{"from": "tool"}), "unknown role 'tool'"),
        (turn(**{"from": ""}), "unknown role ''"),
        (turn(**{"from": "\x1b[31m\ud800" + "x" * 99}), r"unknown role '\x1b[31m\ud800xxxxxxxxxxxxxx'"),
        *((turn(weight=weight), "a weight other than 0 or 1") for weight in (2, -1, 0.5, "2", [], {}, float("nan"))),
        (turn(train="yes"), "a weight other than 0 or 1"),
        (sharegpt_row("x", ("gpt", "A")), "no question with an answer"),
        (sharegpt_row("x", ("human", "A")), "no question with an answer"),
        (sharegpt_row("x", ("system", "A"), ("human", "B")), "no question with an answer"),
        ({"instruction": "Add", "output": ""}, "no question with an answer"),
        ({"instruction": "Add", "output": None}, "no question with an answer"),
        ({"instruction": " ", "input": "", "output": "3"}, "no question with an answer"),
        ({"instruction": "Add", "output": {"text": "3"}}, "a turn without role and text"),
        ({"instruction": "Add", "output": float("nan")}, "a turn without role and text"),
        ({"instruction": "Add", "output": 10**4000}, "a turn without role and text"),
        ({"instruction": 3, "output": "x"}, "a turn without role and text"),
        ({"instruction": ["Add"], "output": "3"}, "a turn without role and text"),
        ("no JSON", "text in place of a list of turns"),
        ("[" * 100_000, "text in place of a list of turns"),
        ('"twice"', "row is not an object"),
        ({"conversations": "Human: Hi"}, "text in place of a list of turns"),
        ({"conversations": "3"}, "row of an unknown shape"),
        (turn(value="x" * (LONGEST_MESSAGE + 1)), "a message of more than 2,000,000 characters"),
        (UnusableRow("row is not valid JSON"), "row is not valid JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_dropped_row_has_its_reason(row, reason):
    found, _, dropped = cleaned(row)
    assert found is None
    assert len(dropped) == 1
    assert dropped[0].startswith(reason)
    dropped[0].encode()  # can be written to a file


def test_messages_and_alpaca_rows_become_conversations():
    rows = {
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]},
        "parts": {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
            ]
        },
        "a list without a name": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ok"}],
        "WildChat's name for it": {
            "conversation": [{"role": "user", "content": "Hi"}, {"role": "model", "content": "ok"}]
        },
        "a system prompt of null": {
            "messages": [
                {"role": "developer", "content": None},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "ok"},
            ]
        },
        "a table's empty columns": {
            "messages": None,
            "conversations": [
                {"from": None, "role": "user", "value": None, "content": "Hi", "weight": None},
                {"from": "gpt", "role": None, "value": "ok", "content": None, "weight": None},
            ],
        },
    }
    assert cleaned(rows.pop("parts")) == ([("user", "H\n\ni"), ("assistant", "ok")], [], [])
    for name, row in rows.items():
        assert cleaned(row) == ([("user", "Hi"), ("assistant", "ok")], [], []), name


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ({}, ["Add", "3"]),
        ({"input": ""}, ["Add", "3"]),
        ({"input": None, "system": None}, ["Add", "3"]),
        ({"input": "1 and 2"}, ["Add\n\n1 and 2", "3"]),
        ({"input": "1 and 2", "system": "Be brief."}, ["Be brief.", "Add\n\n1 and 2", "3"]),
        ({"instruction": "", "input": "1+2?"}, ["1+2?", "3"]),
    ],
)
def test_alpaca_with_and_without_input_and_system(given, turns):
    found, repairs, _ = cleaned({"instruction": "Add", "output": "3"} | given)
    assert [content for _, content in found] == turns
    assert repairs == ["instruction/output: converted"]


@pytest.mark.parametrize(
    "row",
    [
        json.dumps(sharegpt_row("x", *GOOD)),
        sharegpt_row("x") | {"conversations": json.dumps(sharegpt_row("x", *GOOD)["conversations"])},
        json.dumps({"messages": json.dumps([{"role": "user", "content": "Hi"}, {"role": "gpt", "content": "Hello!"}])}),
    ],
    ids=["the row", "its turns", "both"],
)
def test_json_inside_a_string_is_parsed(row):
    assert cleaned(row) == ([("user", "Hi"), ("assistant", "Hello!")], ["JSON inside a string: parsed"], [])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("abc", "abc"),
        (7, "7"),
        (0, "0"),
        (None, "here"),
        ("", "here"),
        (True, "here"),
        (["a"], "here"),
        ({}, "here"),
        ("long" * 1000, "here"),
        ("\ud800", "?"),
    ],
    ids=repr,
)
def test_a_row_goes_by_its_id_or_its_place(given, name):
    row = sharegpt_row("x", *GOOD) | {"id": given}
    assert clean(row, "here", Ledger()).id == name
    assert clean(json.dumps(row), "here", Ledger()).id == name


@pytest.mark.parametrize(
    ("texts", "repaired"),
    [
        (("1 &lt; 2 &amp;&amp; x", "&quot;yes&quot;"), ("1 < 2 && x", '"yes"')),
        (("&#39;a&#39;", "b"), ("'a'", "b")),
        (("&lt;a&gt;&#13;\nb", "ok"), ("<a>\nb", "ok")),
        (("What is &lt;?", "It stands for <."), None),  # the text is about entities
        (("&lt;b&gt; in R&D", "ok"), None),  # a bare & would have been escaped too
        (("AT&amp;T", "ok"), None),  # no markup at all: more likely meant
        (("fish & chips", "ok"), None),
    ],
)
def test_html_is_unescaped_only_where_the_whole_conversation_was_escaped(texts, repaired):
    found, repairs, _ = talk(("human", texts[0]), ("gpt", texts[1]))
    assert tuple(content for _, content in found) == (repaired or texts)
    assert ("HTML-escaped text: unescaped" in repairs) == (repaired is not None)


def test_weights_decide_which_answers_are_trained():
    def trained(*weights):
        turns = [
            turn
            for i, weight in enumerate(weights)
            for turn in (
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": f"a{i}"} | ({} if weight is None else {"weight": weight}),
            )
        ]
        ledger = Ledger()
        found = clean({"messages": turns}, "here", ledger)
        return found and [m.trained for m in found.messages if m.role == "assistant"], list(ledger.dropped)

    assert trained(0, 1, None) == ([False, True, True], [])
    assert trained(False, True) == ([False, True], [])
    assert trained(0.0, 1.0) == trained("0", "1") == trained("false", " True") == ([False, True], [])
    assert trained(0) == (None, ["every answer has weight 0"])
    half = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]}
    half["conversations"] += [{"from": "gpt", "value": "b"}, {"from": "gpt", "value": "c", "train": True}]
    ledger = Ledger()
    answers = clean(half, "here", ledger).messages[1:]  # only answers of the same weight are joined
    assert [(m.content, m.trained) for m in answers] == [("a", False), ("b\n\nc", True)]
    assert not ledger.dropped


def test_a_conversation_survives_being_written_and_read_again():
    turns = (Message("system", "s"), Message("user", "q"), Message("assistant", "a", False))
    made = Conversation("x", (*turns, Message("user", "é🙂"), Message("assistant", "b")))
    assert clean(json.loads(json.dumps(made.to_sharegpt())), "here", Ledger()) == made
    assert (made.answers, made.characters) == (2, 6)


def test_one_row_per_answer_and_the_last_answer_alone():
    turns = [
        Message("user", "q0"),
        Message("assistant", "a0"),
        Message("user", "q1"),
        Message("assistant", "a1", False),
    ]
    made = Conversation("x", (*turns, Message("user", "q2"), Message("assistant", "a2")))
    parts = list(one_per_answer(made))
    assert [(part.id, len(part.messages)) for part in parts] == [("x@1", 2), ("x@3", 6)]
    assert all([m.content for m in part.messages if m.role == "assistant" and m.trained] == [part.messages[-1].content]
               for part in parts)  # fmt: skip
    assert [m.trained for m in only_last_answer(made).messages if m.role == "assistant"] == [False, False, True]


# --- keys that change what a row means ---------------------------------------------------------------------

ASK, TELL = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def talk_with(row=None, ask=None, tell=None):
    """A question and its answer, with more keys in the row, in the question or in the answer."""
    return {"messages": [ASK | (ask or {}), TELL | (tell or {})]} | (row or {})


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *((talk_with({key: value}), "marked as undesirable") for key, value in (
            ("label", False), ("label", 0), ("label", "false"), ("label", "0"), ("kto_tag", False), ("chosen", False),
            ("desirable", 0.0), ("label", "undesirable"),
        )),
        ({"prompt": "2+2?", "completion": "5", "label": False}, "marked as undesirable"),
        ({"image": "x.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]},
         "needs images"),
        *((talk_with({key: value}), "needs images") for key, value in (
            ("images", ["a.png"]), ("image", {"bytes": "x", "path": None}), ("image_url", "http://x"),
        )),
        (talk_with(ask={"images": ["a.png"]}), "needs images"),
        (talk_with(ask={"content": [{"type": "text", "text": "Look"}, {"type": "image"}]}), "needs images"),
        (talk_with(ask={"content": [{"type": "text", "text": "Look", "image": "a.png"}]}), "needs images"),
        (talk_with({"videos": ["a"]}), "needs videos"),
        (talk_with(tell={"audio": {"id": "a"}}), "needs audio"),
        (talk_with(tell={"function_call": {"name": "weather", "arguments": "{}"}}), "tool calls that the template"),
        (talk_with(tell={"content": "", "tool_calls": [TOOL]}), "tool calls that the template"),
        (talk_with(tell={"content": None, "tool_calls": [TOOL]}), "tool calls that the template"),
        (talk_with({"tools": [TOOL]}), "tools that the template"),
        (talk_with({"tools": json.dumps([TOOL])}), "tools that the template"),
        (talk_with({"documents": ["x"]}), "documents that the template"),
        (talk_with({"weight": 0}), "a row of weight 0"),
        (talk_with({"weight": 0.5}), "a weight other than 0 or 1"),
        (talk_with({"train": False}), "a row of weight 0"),
        (talk_with(tell={"loss": False}), "every answer has weight 0"),
        (talk_with(tell={"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}), "weights for parts"),
        (talk_with({"system": {"text": "x"}}), "a system prompt that is not text"),
        ({"instruction": "2+2?", "output": "4", "history": "1+1?"}, "a history that is not pairs"),
        ({"instruction": "2+2?", "output": "4", "history": [["1+1?"]]}, "a history that is not pairs"),
        ({"prompt": "2+2?", "rejected": "5"}, "row of an unknown shape"),
    ],
    ids=lambda value: json.dumps(value)[-40:],
)  # fmt: skip
def test_a_row_that_means_something_else_is_dropped(row, reason):
    found, _, dropped = cleaned(row)
    assert found is None
    assert len(dropped) == 1
    assert dropped[0].startswith(reason)


HISTORY = [("user", "1+1?"), ("assistant", "2")]
PAIR = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    ("row", "turns", "unread"),
    [
        (talk_with({"label": True}), PAIR, []),
        (talk_with({"label": "positive"}), PAIR, ["label"]),
        (talk_with({"weight": 1.0}, tell={"loss": True, "weight": 1}), PAIR, []),
        (talk_with(tell={"loss": 0.73}), PAIR, ["loss (of a turn)"]),
        (talk_with(ask={"weight": 1}), PAIR, ["weight (of a turn)"]),  # a question is never trained
        (talk_with(ask={"weight": 0}), PAIR, []),
        (talk_with({"chosen": [TELL], "rejected": [ASK]}), PAIR, ["chosen", "rejected"]),
        ({"messages": [ASK], "chosen": [TELL], "rejected": [TELL]}, PAIR, ["rejected"]),
        ({"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}}, PAIR, []),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, PAIR, ["rejected"]),
        ({"prompt": "2+2?", "chosen": [ASK, TELL], "rejected": [ASK, TELL]}, PAIR, ["rejected"]),
        ({"prompt": [ASK], "chosen": [{"role": "system", "content": "s"}, ASK, TELL]}, [("system", "s"), *PAIR], []),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL], "score_chosen": 0.0}, PAIR, ["rejected", "score_chosen"]),
        (talk_with({"system": "s"}), [("system", "s"), *PAIR], []),
        (talk_with({"thinking": True}), PAIR, ["thinking"]),
        (talk_with({"system_prompt": "s", "system": ""}), [("system", "s"), *PAIR], []),
        (talk_with({"system": [{"type": "text", "text": "s"}]}), [("system", "s"), *PAIR], []),
        ({"messages": [{"role": "system", "content": "own"}, ASK, TELL], "system": "s"},
         [("system", "own"), *PAIR], ["system"]),
        ({"messages": [{"role": "system", "content": "s"}, ASK, TELL], "system": "s"}, [("system", "s"), *PAIR], []),
        ({"messages": [{"role": "system", "content": ""}, ASK, TELL], "system": "s"}, [("system", "s"), *PAIR], []),
        ({"instruction": "2+2?", "output": "4", "history": [["1+1?", "2"]]}, HISTORY + PAIR, []),
        ({"instruction": "2+2?", "output": "4", "history": [["", ""]]}, PAIR, []),
        (talk_with({"history": [["1+1?", "2"]], "system": "s"}), [("system", "s"), *HISTORY, *PAIR], []),
        (talk_with({"history": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}),
         HISTORY + PAIR, []),
        ({"prompt": "2+2?", "completion": "4"}, PAIR, []),
        ({"prompt": [ASK], "completion": [TELL]}, PAIR, []),
        ({"prompt": "2+2?", "response": "4", "source": "x"}, PAIR, ["source"]),
        ({"question": "2+2?", "response": "4"}, PAIR, []),
        ({"question": "2+2?", "answer": "4", "system_prompt": "s"}, [("system", "s"), *PAIR], []),
        ({"instruction": "2+2?", "context": "Numbers.", "response": "4", "category": "qa"},
         [("user", "2+2?\n\nNumbers."), PAIR[1]], ["category"]),
        ({"instruction": "2+2?", "output": "4", "response": "four"}, PAIR, ["response"]),
        ({"instruction": "2+2?", "output": "", "response": "4"}, PAIR, []),
        ({"conversations": [], "messages": [ASK, TELL]}, PAIR, []),
        ({"conversations": "", "messages": [ASK, TELL]}, PAIR, []),
        ({"conversations": "see messages", "messages": [ASK, TELL]}, PAIR, ["conversations"]),
        ({"messages": [], "instruction": "2+2?", "output": "4"}, PAIR, []),
        (talk_with({"prompt": "2+2?", "prompt_id": "x"}), PAIR, ["prompt", "prompt_id"]),
        (talk_with(ask={"value": ""}), PAIR, []),
        (talk_with(ask={"value": "other"}), [("user", "other"), PAIR[1]], ["content (of a turn)"]),
        (talk_with(ask={"name": "Ann", "content": [{"type": "text", "text": "2+2?", "cache": True}]}),
         PAIR, ["cache (of a part)", "name (of a turn)"]),
        (talk_with({"tools": None, "images": [], "rejected": "", "n": {}, "x": {"y": [None]}}), PAIR, []),
        (talk_with({"tools": "[]", "image": {"bytes": None, "path": None}, "history": []}), PAIR, []),
        (talk_with(tell={"tool_calls": None, "function_call": {"name": None}, "images": []}), PAIR, []),
        (talk_with({"id": ["odd"], "\x1b[31m\ud800" + "x" * 99: 1}), PAIR, ["id", "\\x1b[31m\\ud800" + "x" * 45 + "…"]),
    ],
    ids=lambda value: json.dumps(value)[-40:],
)  # fmt: skip
def test_which_keys_are_applied_and_which_are_counted_by_name(row, turns, unread):
    ledger = Ledger()
    found = clean(row, "here", ledger)
    assert [(m.role, m.content) for m in found.messages] == turns
    assert sorted(ledger.unread) == sorted(unread)
    assert all(entry.rows == 1 and entry.first == [found.id] for entry in ledger.unread.values())
    assert not ledger.dropped


@pytest.mark.attack("16")
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_belongs_to_its_answer_or_is_left_out_with_a_line(key):
    row = talk_with(tell={key: "Two and\r\ntwo."})
    conversation = clean(row, "here", Ledger())
    assert [(m.content, m.reasoning) for m in conversation.messages] == [("2+2?", ""), ("4", "Two and\ntwo.")]
    again = clean(conversation.to_sharegpt(), "here", Ledger())
    assert again == conversation
    for row in (talk_with({key: "Two and two."}),
                talk_with(tell={"content": [{"type": key, key: "Two"}, {"type": "text", "text": "4"}]})):  # fmt: skip
        found, repairs, dropped = cleaned(row)
        assert (found, repairs, dropped) == (PAIR, ["reasoning that belongs to no answer: left out"], [])


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", "0"), ("weight", Decimal("0.0")), ("train", "false"), ("loss", False), ("weight", [1, 0])],
)
def test_a_row_of_no_weight_in_any_spelling_is_dropped(key, value):
    found, _, dropped = cleaned(talk_with({key: value}))
    assert not found and dropped in (["a row of weight 0"], ["weights of a row as a list"])
    assert cleaned(talk_with({key: None}))[2] == []


@pytest.mark.parametrize("value", ["70 kg", "", {"kg": 70}])
def test_a_column_that_only_has_the_name_of_a_weight_is_none(value):
    assert cleaned(talk_with({"weight": value})) == (PAIR, [], [])
    assert cleaned(talk_with({"weight": Decimal("0.5")}))[2] == ["a weight other than 0 or 1"]


@pytest.mark.attack("16")
@pytest.mark.parametrize(("value", "text"), [(4, "4"), (4.5, "4.5"), (True, "true"), (False, "false"), (-0.0, "-0.0")])
def test_a_number_as_an_answer_is_text(value, text):
    repair = "number as an answer: converted to text"
    assert cleaned(talk_with(tell={"content": value})) == ([PAIR[0], ("assistant", text)], [repair], [])
    found, repairs, _ = cleaned({"instruction": "2+2?", "output": value})
    assert (found[1], repairs) == (("assistant", text), ["instruction/output: converted", repair])


@pytest.mark.attack("15")
def test_numbers_without_end_are_no_names_and_no_answers():
    huge = 10**5000  # Python refuses to convert it to text
    assert clean(sharegpt_row("x", *GOOD) | {"id": huge}, "here", Ledger()).id == "here"
    assert cleaned(talk_with(tell={"content": huge}))[2] == ["a turn without role and text"]
    assert cleaned(talk_with(tell={"weight": huge}))[2] == ["a weight other than 0 or 1"]


AFFIRMATIVE = (True, 1, 1.0, "true", "1", "True", "TRUE")
SAYS_NOTHING = (None, "", [], {}, False, 0, "[]", "{}", "null")
known_keys = st.sampled_from(
    ["label", "rejected", "chosen", "image", "images", "tools", "tool_calls", "function_call", "reasoning", "thinking",
     "reasoning_content", "system", "system_prompt", "history", "weight", "train", "loss", "prompt", "completion",
     "audio", "context", "answer", "kto_tag", "documents"]
)  # fmt: skip


@pytest.mark.attack("16")
@given(
    row=st.sampled_from([talk_with(), {"instruction": "2+2?", "output": "4"}, {"prompt": [ASK], "completion": [TELL]}]),
    key=known_keys | st.text(min_size=1, max_size=4),
    value=st.sampled_from([True, 1, 0.5, "x", "false", [1], {"a": "b"}, [TELL]]) | st.deferred(lambda: json_values),
    where=st.sampled_from(["row", "turn"]),
)
def test_no_key_with_a_value_is_ignored_in_silence(row, key, value, where):
    """The key drops or changes the row, or is counted, or its value states the default."""
    row = json.loads(json.dumps(row))
    target = row if where == "row" or "instruction" in row else (row.get("messages") or row["completion"])[-1]
    if key in target or key == "id":
        return
    before = cleaned(row)
    target[key] = value
    ledger = Ledger()
    found = clean(row, "here", ledger)
    if (
        found is None
        or any(m.reasoning for m in found.messages)
        or [(m.role, m.content) for m in found.messages] != before[0]
    ):
        assert (found is None) == bool(ledger.dropped)
        return
    same = value in AFFIRMATIVE or value in SAYS_NOTHING or (isinstance(value, str) and value.strip() in SAYS_NOTHING)
    counted = ledger.unread or ledger.repaired.keys() != set(before[1])
    assert counted or same or is_empty(value) or value in ("2+2?", "4") or not str(value).strip()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["human", "gpt", "system", "user", "assistant", "tool"]) | json_values
turns_of_rows = st.fixed_dictionaries(
    {}, optional={"from": roles, "role": roles, "value": st.text(max_size=4) | json_values, "content": json_values,
                  "weight": st.sampled_from([0, 1, None, True]) | json_values},
)  # fmt: skip
lists_of_turns = st.lists(turns_of_rows, max_size=5) | json_values
rows = json_values | st.fixed_dictionaries(
    {},
    optional={"id": json_values, "conversations": lists_of_turns, "messages": lists_of_turns}
    | dict.fromkeys(("instruction", "input", "output", "system"), st.text(max_size=4) | json_values)
    | dict.fromkeys(("prompt", "completion", "chosen", "history"), lists_of_turns | st.text(max_size=4))
    | dict.fromkeys(("label", "images", "tools", "reasoning", "weight", "n"), json_values),
)


@given(rows | rows.map(json.dumps))
def test_any_row_is_kept_or_dropped_with_one_line(row):
    ledger = Ledger()
    found = clean(row, "here", ledger)
    assert sum(entry.rows for entry in ledger.dropped.values()) == (found is None)
    if found is not None:
        well_formed(found)


@given(st.lists(st.tuples(st.sampled_from(["human", "gpt", "system", "user"]), st.text(max_size=5)), max_size=8))
def test_whatever_comes_in_what_is_kept_alternates_and_ends_in_an_answer(turns):
    ledger = Ledger()
    found = clean(sharegpt_row("x", *turns), "here", ledger)
    assert (found is None) == bool(ledger.dropped)
    if found is not None:
        well_formed(found)
        # Cleaning a clean conversation changes nothing.
        again = Ledger()
        assert clean(found.to_sharegpt(), "here", again).messages == found.messages
        assert set(again.repaired) <= {"HTML-escaped text: unescaped"}


def well_formed(conversation):
    spoken = [m for m in conversation.messages if m.role != "system"]
    assert spoken[0].role == "user" and spoken[-1].role == "assistant"
    for one, next_one in pairwise(spoken):  # turns alternate, except answers of different weight
        assert one.role != next_one.role or (one.role == "assistant" and one.trained != next_one.trained)
    assert all(m.content.strip() for m in conversation.messages)
    assert any(m.trained for m in conversation.messages if m.role == "assistant")
    json.dumps(conversation.to_sharegpt(), ensure_ascii=False).encode()


def test_the_ledger_stays_small_whatever_the_rows_are():
    ledger = Ledger()
    for i in range(5000):
        clean(sharegpt_row(f"r{i}", (f"role{i}", "Hi")), "here", ledger)
    assert len(ledger.dropped) == MOST + 1
    assert sum(entry.rows for entry in ledger.dropped.values()) == 5000
    assert all(len(entry.first) <= FIRST for entry in ledger.dropped.values())


@pytest.mark.attack("16")
def test_keys_are_counted_by_name_however_many_there_are():
    ledger = Ledger()
    for i in range(1000):
        clean(sharegpt_row(f"r{i}", *GOOD) | {"source": "web", f"key{i}": 1}, "here", ledger)
    assert ledger.unread["source"].rows == 1000
    assert len(ledger.unread) == MOST + 1
    assert ledger.unread["other keys"].rows == 1000 - (MOST - 1)
    assert "      1,000                  not read: source" in str(ledger).splitlines()
    assert ledger.to_dict()["unread"]["source"] == {"rows": 1000, "first": [f"r{i}" for i in range(FIRST)]}


@pytest.mark.attack("12")
def test_a_row_of_very_many_turns_or_keys_takes_seconds():
    many = 300_000
    began = time.process_time()
    parts = talk(*[("human", "a")] * many, *[("gpt", "b")] * many)[0]
    assert [len(content) for _, content in parts] == [3 * many - 2] * 2
    assert cleaned({f"k{i}": 1 for i in range(many)} | sharegpt_row("x", *GOOD))[0]
    assert cleaned({"x\x1b" * 5_000_000: 1} | sharegpt_row("x", *GOOD))[0]
    assert cleaned(sharegpt_row("x", *[("human", "a"), ("gpt", "b" * 700_000)], *[("gpt", "b" * 700_000)] * 2))[2] == [
        "a message of more than 2,000,000 characters"
    ]
    assert time.process_time() - began < 15
    turns = Conversation("x", (Message("user", "q"), Message("assistant", "a")) * 2000)
    began = time.process_time()
    assert sum(len(part.messages) for part in one_per_answer(turns)) == 2000 * 2001
    assert time.process_time() - began < 2


def test_the_ledger_can_be_read():
    ledger = Ledger()
    ledger.count("raw", rows=1200, characters=5000)
    assert ledger.to_dict()["stages"]["raw"] == {"rows": 1200, "tokens": None, "estimated": True}
    assert "≈" not in str(ledger)
    ledger.encoded_tokens, ledger.encoded_characters = 200, 1000
    ledger.count("trained", tokens=77)
    ledger.drop("empty conversation", "a")
    ledger.repair("CR or CRLF line endings: converted to LF", "b")
    ledger.lose("x.json is cut off")
    lines = str(ledger).splitlines()
    assert lines[1].split() == ["1,200", "≈", "1,000", "raw"]
    assert lines[2].split() == ["1", "77", "trained"]
    assert lines[3].split() == ["1", "dropped:", "empty", "conversation"]
    assert lines[4].endswith("repaired: CR or CRLF line endings: converted to LF")
    assert lines[5].split() == ["lost", "x.json", "is", "cut", "off"]
    assert ledger.to_dict()["stages"]["trained"] == {"rows": 1, "tokens": 77, "estimated": False}
    assert ledger.to_dict()["dropped"] == {"empty conversation": {"rows": 1, "first": ["a"]}}
    assert ledger.tokens("no such stage") == 0
    assert "no such stage" not in ledger.stages
