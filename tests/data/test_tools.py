"""Tool calls, results and definitions: what every common spelling becomes, and what drops a row."""

import json

import pytest

from minisft.data.conversations import clean, one_per_answer, only_last_answer
from minisft.data.ledger import Ledger

ASK = {"role": "user", "content": "Weather in Rome?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "21 degrees"}
TELL = {"role": "assistant", "content": "It is 21 degrees."}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather now", "parameters": {}}}


def read(row):
    """The conversation of a row, its repairs, and its drop reasons."""
    ledger = Ledger()
    return clean(row, "here", ledger, reads_tools=True), list(ledger.repaired), list(ledger.dropped)


def messages(*turns, **row):
    return {"id": "x", "messages": list(turns)} | row


def sharegpt(*turns, **row):
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, value in turns]} | row


TEXT = json.dumps(CALL["function"])
SPELLINGS = {
    "messages": messages(ASK, CALLS, RESULT, TELL, tools=[TOOL]),
    "arguments as text": messages(
        ASK,
        CALLS | {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        RESULT,
        TELL,
        tools=json.dumps([TOOL["function"]]),
    ),
    "no content": messages(ASK, {"role": "assistant", "tool_calls": [CALL]}, RESULT, TELL, tools=[TOOL]),
    "content null": messages(ASK, CALLS | {"content": None}, RESULT, TELL, tools=[json.dumps(TOOL)]),
    "function_call": messages(
        ASK,
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "content": "21 degrees"},
        TELL,
        functions=[TOOL["function"]],
    ),
    "ShareGPT": sharegpt(
        ("human", ASK["content"]),
        ("function_call", TEXT),
        ("observation", "21 degrees"),
        ("gpt", TELL["content"]),
        tools=json.dumps([TOOL["function"]]),
    ),
    "ShareGPT, a list of calls": sharegpt(
        ("human", ASK["content"]),
        ("function_call", f"[{TEXT}]"),
        ("tool", "21 degrees"),
        ("gpt", TELL["content"]),
        tools=[TOOL],
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_conversation(name):
    found, repairs, dropped = read(SPELLINGS[name])
    assert (repairs, dropped) == ([], [])
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert [m.content for m in found.messages] == ["Weather in Rome?", "", "21 degrees", "It is 21 degrees."]
    assert json.loads(found.messages[1].tool) == {"tool_calls": [CALL]}
    assert json.loads(found.tools) == [TOOL]
    assert read(found.to_sharegpt())[0] == found, "what is written to test.jsonl is read as it was"
    assert [one.tools for one in one_per_answer(found)] == [found.tools] * 2
    assert only_last_answer(found).tools == found.tools


@pytest.mark.parametrize("name", SPELLINGS)
def test_without_a_template_that_shows_tools_the_row_is_dropped(name):
    ledger = Ledger()
    assert clean(SPELLINGS[name], "here", ledger) is None
    (reason,) = ledger.dropped
    assert reason.startswith(("tools that the template", "tool calls that the template", "unknown role"))


def test_ids_and_names_of_results_are_kept():
    called = CALLS | {"tool_calls": [CALL | {"id": "call00001"}]}
    found, _, _ = read(messages(ASK, called, RESULT | {"name": "weather", "tool_call_id": "call00001"}, TELL))
    assert json.loads(found.messages[1].tool)["tool_calls"][0]["id"] == "call00001"
    assert json.loads(found.messages[2].tool) == {"name": "weather", "tool_call_id": "call00001"}
    assert read(found.to_sharegpt())[0] == found


def test_results_that_are_no_text_become_their_json():
    found, _, _ = read(messages(ASK, CALLS, RESULT | {"content": {"degrees": 21}}, TELL))
    assert found.messages[2].content == '{"degrees": 21}'
    found, _, _ = read(messages(ASK, CALLS, RESULT | {"content": [{"type": "text", "text": "21"}]}, TELL))
    assert found.messages[2].content == "21"


def test_nulls_that_tables_fill_in_are_removed_and_counted():
    filled = {"name": "weather", "arguments": {"city": "Rome", "date": None}}
    found, repairs, _ = read(messages(ASK, CALLS | {"tool_calls": [{"function": filled}]}, RESULT, TELL))
    assert json.loads(found.messages[1].tool) == {"tool_calls": [CALL]}
    assert repairs == ["null in a tool call or definition: removed"]


def test_two_results_and_an_unanswered_one():
    twice = CALLS | {"tool_calls": [CALL, CALL]}
    found, _, _ = read(messages(ASK, twice, RESULT, RESULT, TELL))
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    found, repairs, _ = read(messages(ASK, CALLS, RESULT))
    assert [m.role for m in found.messages] == ["user", "assistant"]
    assert repairs == ["last question has no answer: removed"]


def test_an_answer_before_its_calls_is_joined_to_them():
    found, repairs, _ = read(messages(ASK, TELL | {"content": "I look."}, CALLS | {"content": "Now."}, RESULT, TELL))
    assert [m.content for m in found.messages] == [ASK["content"], "I look.\n\nNow.", "21 degrees", TELL["content"]]
    assert json.loads(found.messages[1].tool) == {"tool_calls": [CALL]}
    assert repairs == ["consecutive turns of one role: joined"]


BAD = {
    "a result without a call": (messages(ASK, RESULT, TELL), "the result of a tool that was not called"),
    "a result after an answer": (messages(ASK, TELL, RESULT, TELL), "the result of a tool that was not called"),
    "a result first": (messages(RESULT, ASK, TELL), "the result of a tool that was not called"),
    "a question that calls": (messages(ASK | {"tool_calls": [CALL]}, TELL), "tool calls of another role"),
    "no name": (
        messages(ASK, CALLS | {"tool_calls": [{"function": {"arguments": {"a": 1}}}]}),
        "a tool call without a name",
    ),
    "a number": (messages(ASK, CALLS | {"tool_calls": [7]}), "a tool call without a name"),
    "arguments in a list": (
        messages(ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": [1]}]}),
        "a tool call whose arguments are no object",
    ),
    **{
        f"arguments that are {value!r}": (
            messages(ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": value}]}),
            "a tool call whose arguments are no object",
        )
        for value in (0, False, 0.0, True, "0", "false", '""', "[]", "null")
    },
    "arguments that are broken": (
        messages(ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": "{"}]}),
        "a tool call or definition that is not JSON",
    ),
    "an argument twice": (
        messages(ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}),
        "a tool call or definition that is not JSON",
    ),
    "not a number": (
        messages(ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": {"a": float("nan")}}]}),
        "a tool call or definition that is not JSON",
    ),
    "ShareGPT text": (sharegpt(("human", "Hi"), ("function_call", "look it up")), "a tool call or definition that is"),
    "tools without names": (messages(ASK, TELL, tools=[{"type": "function"}]), "tools that are not functions"),
    "tools as text": (messages(ASK, TELL, tools="a hammer"), "a tool call or definition that is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_calls_that_cannot_be_read_drop_the_row_for_a_reason(name):
    row, reason = BAD[name]
    found, _, dropped = read(row)
    assert found is None
    assert len(dropped) == 1 and dropped[0].startswith(reason)


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    "call",
    [
        {"name": "weather", "args": {"city": "Rome"}, "id": "c1", "type": "tool_call"},  # LangChain
        {"name": "weather", "input": {"city": "Rome"}, "type": "tool_use"},  # Anthropic
        {"function": {"name": "weather", "arguments": None, "parameters": {"city": "Rome"}}},  # a table's null
    ],
)
def test_arguments_under_other_names_are_read(call):
    found, _, dropped = read(messages(ASK, CALLS | {"tool_calls": [call]}, RESULT, TELL))
    assert not dropped
    assert json.loads(found.messages[1].tool)["tool_calls"][0]["function"] == CALL["function"]


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_a_call_without_arguments_has_none(nothing):
    call = {"name": "now", "arguments": nothing}
    found, _, dropped = read(messages(ASK, CALLS | {"tool_calls": [call]}, RESULT, TELL))
    assert not dropped
    assert json.loads(found.messages[1].tool)["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.attack("16")
def test_other_keys_of_a_call_are_counted():
    ledger = Ledger()
    call = CALL | {"index": 0, "confidence": 0.5, "\x1b[31mred": 1}
    assert clean(messages(ASK, CALLS | {"tool_calls": [call]}, RESULT, TELL), "here", ledger, reads_tools=True)
    assert list(ledger.unread) == ["confidence (of a tool call)", "\\x1b[31mred (of a tool call)"]


def test_texts_in_calls_and_definitions_are_repaired_like_all_others():
    code = {
        "type": "function",
        "function": {"name": "run", "arguments": {"code": "if x &lt; 0:\r\n  y = &quot;n&quot;"}},
    }
    tool = {"type": "function", "function": {"name": "run", "description": "runs &lt;code&gt;"}}
    asked = ASK | {"content": "Run &lt;this&gt; &amp; &quot;that&quot;"}
    ledger = Ledger()
    row = messages(asked, CALLS | {"tool_calls": [code]}, RESULT, TELL, tools=[tool])
    found = clean(row, "here", ledger, escaped=True, reads_tools=True)
    arguments = json.loads(found.messages[1].tool)["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"code": 'if x < 0:\n  y = "n"'}
    assert json.loads(found.tools)[0]["function"]["description"] == "runs <code>"
    assert list(ledger.repaired) == ["HTML-escaped text: unescaped", "CR or CRLF line endings: converted to LF"]


def test_half_characters_in_calls_are_replaced():
    found, _, _ = read(messages(ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}))
    assert found.messages[1].tool.encode()
