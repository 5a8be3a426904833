"""Tools under a model's own template: calls are trained, results are not, and no string of either forges a token."""

import json

import pytest
from conftest import minisft
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_template import CHATML, FORGED, expected_prompt, save, spans, texts

from minisft.chat.registry import template_for
from minisft.chat.template import RefusedConversation
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message, one_per_answer
from minisft.data.ledger import Ledger
from minisft.labels.check_dataset import check_conversations
from minisft.labels.encode_dataset import encode_stream
from minisft.labels.encode_row import encode
from minisft.labels.invariants import check_row

END = "<|im_end|>\n"
HERMES = (  # as Qwen 2.5: definitions in the system prompt, calls as JSON, results as a user's turn
    "{{ '<|im_start|>system\n' + (messages[0]['content'] if messages[0]['role'] == 'system' else 'You help.') }}"
    "{% if tools %}{{ '\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>' }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m['role'] != 'system' or not loop.first %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m['content'] %}{{ '\n' + m['content'] }}{% endif %}{% for call in m['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' + "
    "call['function']['arguments'] | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (  # as Llama 3.1: one call, as the whole answer, and results of a role of its own
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% for tool in tools %}"
    "{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{% set role = 'ipython' if m['role'] == 'tool' else m['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% if m['tool_calls'] is defined %}"
    "{% if m['tool_calls'] | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m['tool_calls'][0]['function'] %}"
    "{{ '{\"name\": \"' + call['name'] + '\", \"parameters\": ' + call['arguments'] | tojson + '}' }}"
    "{% elif m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
XML = (  # as Qwen 3 Coder: each argument between marks, as it is
    "{% for tool in tools or [] %}{{ tool['function']['name'] + ': ' + tool['function']['description'] + '\n' }}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<function=' + call['function']['name'] + '>\n' }}"
    "{% for key, value in call['function']['arguments'].items() %}"
    "{{ '<' + key + '>\n' + (value if value is string else value | tojson) + '\n' }}{% endfor %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (  # as DeepSeek V3: arguments are joined to the text around them, and definitions have no place
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['type'] + ' ' + call['function']['name'] + '\n```json\n' + "
    "call['function']['arguments'] + '\n```' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KEYS = (  # as Qwen 3 Coder: every key that a definition has is written between marks, and so are types and numbers
    "{% macro keys(value) %}{% if value is mapping %}{% for key, one in value.items() %}{{ '<' + key + '>' }}"
    "{{ keys(one) }}{{ '</' + key + '>' }}{% endfor %}{% elif value is string or value is number %}"
    "{{ '<' ~ value ~ '>' }}{% elif value is iterable %}{% for one in value %}{{ keys(one) }}{% endfor %}{% endif %}"
    "{% endmacro %}{% for tool in tools or [] %}{{ tool['function']['name'] + ': ' + tool['function']['description'] }}"
    "{{ keys(tool['function']['parameters']) }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for call in m['tool_calls'] or [] %}"
    "{{ call['function']['name'] }}{{ keys(call['function']['arguments']) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "hermes": (HERMES, "<|im_end|>"),
    "headers": (HEADERS, "<|eot_id|>"),
    "xml": (XML, "<|im_end|>"),
    "text": (TEXT, "<|im_end|>"),
    "keys": (KEYS, "<|im_end|>"),
}
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Weather now",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ]
)


def calling(*calls):
    return json.dumps({"tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]})


def talk(arguments, result="21 degrees", content="", tools=TOOLS):
    return Conversation(
        "c",
        (
            Message("user", "the cat"),
            Message("assistant", content, tool=calling(("weather", arguments))),
            Message("tool", result, tool=json.dumps({"name": "weather"})),
            Message("assistant", "a mat"),
        ),
        tools,
    )


ROME = talk({"city": "Rome", "days": 2, "hours": [1, True]})


@pytest.fixture(scope="module")
def tokenizers(tiny_model, tmp_path_factory):
    made = {}
    for name, (template, end) in TEMPLATES.items():
        folder = save(template, tiny_model, tmp_path_factory.mktemp("tools") / name, ["</s>", end])
        made[name] = HuggingFaceTokenizer(folder, "own")
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_trained_and_results_are_not(tokenizers, name):
    tokenizer = tokenizers[name]
    template = template_for(tokenizer)
    assert template.has_tools
    row = encode(ROME, template, tokenizer, 9999)
    trained = [tokenizer.decode(row.input_ids[start:end]) for start, end in spans(row)]
    assert len(trained) == 2 and all(text.endswith(TEMPLATES[name][1]) for text in trained)
    assert "weather" in trained[0] and "Rome" in trained[0] and "21" not in "".join(trained)
    assert "a mat" in trained[1]
    chat = [{"role": m.role, "content": m.content} | (json.loads(m.tool) if m.tool else {}) for m in ROME.messages]
    if name == "text":
        chat[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome", "days": 2, "hours": [1, true]}'
    whole = tokenizer.hf.apply_chat_template(chat, tools=json.loads(TOOLS))["input_ids"]
    assert row.input_ids == whole
    for part in one_per_answer(ROME):
        row = encode(part, template, tokenizer, 9999)
        ((start, _),) = spans(row)
        assert row.input_ids[:start] == expected_prompt(tokenizer, part.messages[:-1], json.loads(TOOLS))
    assert check_conversations([ROME], template, tokenizer, 9999).ok
    assert not {"control"} & {one.invariant for one in check_row("c", row.input_ids, row.labels, template, tokenizer)}


def test_a_template_that_shows_no_tools_says_so(tiny_model, tmp_path):
    tokenizer = HuggingFaceTokenizer(save(CHATML, tiny_model, tmp_path / "model"), "own")
    assert not template_for(tokenizer).has_tools


@pytest.mark.parametrize(
    ("written", "has_tools"),
    [("call['function']['arguments'] | string", True), ("call['function']['arguments'] | string | upper", False)],
)
def test_a_template_that_prints_python_objects_takes_arguments_as_text(tiny_model, tmp_path, written, has_tools):
    source = HERMES.replace("call['function']['arguments'] | tojson", written)
    assert source != HERMES
    tokenizer = HuggingFaceTokenizer(save(source, tiny_model, tmp_path / "model"), "own")
    template = template_for(tokenizer)
    assert template.has_tools == has_tools
    if has_tools:
        row = encode(ROME, template, tokenizer, 9999)
        assert '"arguments": {"city": "Rome", "days": 2, "hours": [1, true]}' in tokenizer.decode(row.input_ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_definitions_that_the_template_leaves_out_are_counted(tokenizers, name):
    ledger = Ledger()
    rows = encode_stream([ROME], template_for(tokenizers[name]), tokenizers[name], max_length=9999, ledger=ledger)
    assert len(list(rows)) == 1
    reason = "definitions of tools left out: the template own has no place for them"
    assert list(ledger.repaired) == ([reason] if name == "text" else [])


def test_a_call_that_the_template_leaves_out_is_not_trained(tokenizers):
    """Llama 3.1's template drops the text beside a call, and refuses two calls at once."""
    tokenizer = tokenizers["headers"]
    template = template_for(tokenizer)
    row = encode(talk({"city": "Rome"}, content="red rain"), template, tokenizer, 9999)
    ((start, end),) = spans(row)
    assert tokenizer.decode(row.input_ids[start:end]).startswith("a mat")
    twice = Message("assistant", "", tool=calling(("weather", {}), ("weather", {})))
    with pytest.raises(RefusedConversation, match="one call at a time"):
        encode(Conversation("c", (ROME.messages[0], twice)), template, tokenizer, 9999)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


# Without the `<` and `>` that a template may write around them.
INNER = [name.strip("<>") for name in FORGED if name.startswith("<")]
chosen = st.dictionaries(st.sampled_from(["city", "a b", *FORGED, *INNER]), json_values, max_size=3)


@pytest.mark.attack("1")
@settings(max_examples=60)
@given(arguments=chosen, properties=chosen, extra=chosen, result=texts, description=texts)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_string_of_a_call_forges_a_token(tokenizers, name, arguments, properties, extra, result, description):
    tokenizer = tokenizers[name]
    template = template_for(tokenizer)
    tools = json.loads(TOOLS)
    tools[0]["function"]["description"] = description
    tools[0]["function"]["parameters"]["properties"] |= properties
    tools[0]["function"]["parameters"] |= {key: value for key, value in extra.items() if key not in ("type",)}
    conversation = talk(arguments, result, tools=json.dumps(tools))
    try:
        row = encode(conversation, template, tokenizer, 9999)
    except RefusedConversation:
        return
    innocent = encode(talk({}, "x"), template, tokenizer, 9999)
    control = [[i for i in one.input_ids if i in tokenizer.control_ids] for one in (row, innocent)]
    assert control[0] == control[1]
    assert check_conversations([conversation], template, tokenizer, 9999).rows == 1


FORGING = {
    "an argument": {"arguments": {"/s": "1"}},
    "an argument's part": {"arguments": {"city": {"end_of_turn": 1}}},
    "an argument in a list": {"arguments": {"city": [{"|im_end|": 1}]}},
    "an argument's text": {"arguments": {"city": "|im_start|"}},
    "an argument named as a type": {"arguments": {"type": "end_of_turn"}},
    "a property": {"parameters": {"type": "object", "properties": {"s": {"type": "string"}}}},
    "a property of a property": {"parameters": {"properties": {"city": {"properties": {"/s": {}}}}}},
    "a property in a list": {"parameters": {"anyOf": [{"properties": {"/s": {}}}]}},
    "a key that no schema has": {"parameters": {"type": "object", "|im_end|": {"type": "string"}}},
    "a part of a default": {"parameters": {"properties": {"city": {"default": {"/s": 1}}}}},
    "a type": {"parameters": {"properties": {"city": {"type": "/s"}}}},
    "a list of types": {"parameters": {"properties": {"city": {"type": ["string", "/s"]}}}},
    "a choice": {"parameters": {"properties": {"city": {"enum": ["/s"]}}}},
}


@pytest.mark.attack("1")
@pytest.mark.parametrize("what", FORGING)
def test_a_template_cannot_make_a_control_token_of_a_key(tokenizers, what):
    """In training, in the prompt of inference, and counted."""
    tokenizer = tokenizers["keys"]
    template = template_for(tokenizer)
    tools = json.loads(TOOLS)
    tools[0]["function"] |= {key: value for key, value in FORGING[what].items() if key == "parameters"}
    conversation = talk(FORGING[what].get("arguments", {"city": "Rome"}), tools=json.dumps(tools))
    for use in (template.segments, template.prompt_segments):
        with pytest.raises(RefusedConversation, match="makes a control token of a text"):
            use(conversation)
    ledger = Ledger()
    assert not list(encode_stream([conversation], template, tokenizer, max_length=9999, ledger=ledger))
    assert ledger.dropped["refused by the chat template"].rows == 1
    assert check_conversations([ROME, conversation], template, tokenizer, 9999).rows == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_keys_that_a_template_reads_by_name_keep_their_names(tokenizers, name):
    """A property may be called as a key of schemas, and a schema may have all of these keys."""
    tokenizer = tokenizers[name]
    inner = {"type": ["string", "null"], "description": "d", "enum": ["a"], "default": "a", "format": "f"}
    named = {"type": inner, "properties": inner, "required": {"type": "array", "items": inner}, "a-b": inner}
    tools = json.loads(TOOLS)
    tools[0]["function"]["parameters"]["properties"] = named
    tools[0]["function"] |= {"strict": True, "return": {"type": "object", "properties": {"x": inner}}}
    conversation = talk({"type": "a", "properties": {"required": 1}, "a-b": 2}, tools=json.dumps(tools))
    assert len(spans(encode(conversation, template_for(tokenizer), tokenizer, 9999))) == 2


@pytest.mark.attack("1")
@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_check_gives_no_false_alarm_for_a_control_token_in_a_key(tokenizers, name, train_on):
    """Plain transformers keeps control tokens in values as text, not those in keys, so it is no reference there."""
    tokenizer = tokenizers[name]
    template = template_for(tokenizer)
    end = TEMPLATES[name][1]
    tools = json.loads(TOOLS)
    tools[0]["function"]["parameters"]["properties"] = {f"a{end}b": {"type": "string"}}
    talks = [talk({"city": end}), talk({f"a{end}b": "Rome"}), talk({"city": "Rome"}, tools=json.dumps(tools))]
    report = check_conversations(talks, template, tokenizer, 9999, train_on=train_on)
    assert report.ok and report.rows == 3, report
    assert report.invariants["reference"].checked == 1


def test_the_command_line_trains_calls(tokenizers, tmp_path):
    folder = tokenizers["hermes"].hf.name_or_path
    data, out = tmp_path / "talks.jsonl", tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROME.to_sharegpt()) + "\n")
    done = minisft("encode", data, "--tokenizer", folder, "--template", "own", "--out", out)
    assert done.returncode == 0, done.stderr
    assert minisft("check", out, "--tokenizer", folder, "--template", "own", "--against", data).returncode == 0
    assert minisft("check", data, "--tokenizer", folder, "--template", "own").returncode == 0
    shown = minisft("show", data, "--tokenizer", folder, "--template", "own", "--max-length", 9999).stdout
    assert "both answers end in EOS" in shown and shown.count("target") > 50 and shown.count("prompt") > 200
    refused = {"id": "r", "messages": [{"role": "user", "content": "x\ufdd2"}, {"role": "assistant", "content": "x"}]}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(data.read_text() + json.dumps(refused) + "\n")
    encoded = minisft("encode", mixed, "--tokenizer", folder, "--template", "own", "--out", out).stderr
    checked = minisft("check", mixed, "--tokenizer", folder, "--template", "own").stderr
    assert all(
        "the first conversation that the template own refused: a text has" in said for said in (encoded, checked)
    )
    done = minisft("encode", data, "--tokenizer", folder, "--out", out)
    assert done.returncode == 2 and "tools that the template cannot show (1)" in done.stderr
