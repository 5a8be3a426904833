"""Ten thousand generated conversations: whatever the text, no invariant breaks and no text becomes a control token."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from conftest import RHYME
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.chat.mistral import VERSIONS
from minisft.chat.mistral_reference import reference
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer, MistralCommonTokenizer, load_tokenizer
from minisft.data.conversations import Conversation, Message, clean
from minisft.data.ledger import Ledger
from minisft.errors import UserError
from minisft.labels.encode_row import IGNORE_INDEX, TRUNCATIONS, encode
from minisft.labels.invariants import check_row

GENERATED = Counter()  # conversations that went through all checks, by test
thorough = settings(max_examples=1000, database=None)

NAMES = [*(f"mistral:{version}" for version in VERSIONS), "tiny:v1", "tiny:v7"]
CONTROLS = [
    "<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>", "<repo_name>",
    "[INST]", "[/INST]", "[INST] x [/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[PREFIX]", "[IMG]", "[control_8]", "<SPECIAL_20>", "<0x0A>", "<\\s>", "[\\INST]", "<|im_start|>user\n", "▁</s>",
    "\ufdd0\ufdd12\ufdd1\ufdd0", "Ġ", "<s", "/s>",
]  # fmt: skip
ODDITIES = [
    "\u200b", "\u200d\ufeff", "\u202eright to left\u202c", "שלום", "\0", "\x1b[31m", " ", "  ", " " * 40, "\n\n", "\t",
    "▁▁", "é", "e\u0301", "👩‍👩‍👧‍👦", "漢字" * 30, "&lt;b&gt;", "\ufffd", "\uffff", "\U0010ffff",
    f"{RHYME} " * 4, "x" * 300, "stone walls while small birds " * 25, "international understanding " * 25,
]  # fmt: skip
DIRT = ["\ud800", "\udc80", "a\udcffb", "\r\n", "\r", "&amp;lt;", "&quot;"]

fragments = st.one_of(
    st.sampled_from(["Hi", "the cat sat", "2+2?", "why"]),
    st.integers(0, 999).map(lambda number: CONTROLS[number % len(CONTROLS)]),  # fixtures add to the list
    st.sampled_from(ODDITIES),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
contents = st.lists(fragments, max_size=3).map("".join)
answers = contents.map(lambda text: text or "ok")
lengths = st.one_of(st.just(10**6), st.integers(2, 60))
systems = st.one_of(st.none(), contents)
talks = st.lists(st.tuples(contents, answers, st.sampled_from([True, True, False]), systems), min_size=1, max_size=3)


@st.composite
def conversations(draw):
    messages = []
    for question, answer, trained, system in draw(talks):
        messages += [] if system is None else [Message("system", system)]
        messages += [Message("user", question), Message("assistant", answer, trained)]
    return Conversation("c", tuple(messages))


@pytest.fixture(scope="module")
def tokenizers(tiny_model):
    tiny = {f"tiny:{version}": HuggingFaceTokenizer(tiny_model, version) for version in ("v1", "v7")}
    mistral = {f"mistral:{version}": MistralCommonTokenizer(version) for version in VERSIONS}
    known = tiny | mistral
    # Whatever else these tokenizers have for control tokens is a temptation, too.
    pieces = {tokenizer.piece(token) for tokenizer in known.values() for token in tokenizer.control_ids}
    CONTROLS.extend(sorted(pieces - set(CONTROLS)))
    return known


def check(conversation, tokenizer, length, truncation):
    """Encode, and let every check that there is look at the row."""
    template = template_for(tokenizer)
    for message in conversation.messages:
        for after in ("nothing", "control", "text"):
            assert not tokenizer.control_ids.intersection(tokenizer.encode(message.content, after))
    row = encode(conversation, template, tokenizer, length, truncation)
    if not row.input_ids:
        assert row.truncated and truncation != "token"
        return
    forgiven = set() if row.trained else {"targets"}
    options = {"max_length": length, "truncation": truncation}
    violations = check_row("c", row.input_ids, row.labels, template, tokenizer, conversation=conversation, **options)
    assert {v.invariant for v in violations} <= forgiven, violations
    if template.markers != "text":  # where texts can look like marks
        violations = check_row("c", row.input_ids, row.labels, template, tokenizer, max_length=len(row.input_ids))
        assert {v.invariant for v in violations} <= forgiven, violations
    if not row.truncated:
        marks = [s.control for s in template.segments(conversation) if s.control]
        expected = [token for mark in marks if (token := tokenizer.control_id(mark)) is not None]
        assert [token for token in row.input_ids if token in tokenizer.control_ids] == expected
    if tokenizer.name.startswith("mistral"):
        ids, mask = reference(conversation, template.name)
        assert row.input_ids == ids[: len(row.input_ids)]
        assert [label != IGNORE_INDEX for label in row.labels] == mask[: len(row.labels)]
        assert row.truncated or len(ids) == len(row.input_ids)


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(conversation=conversations(), length=lengths, truncation=st.sampled_from(TRUNCATIONS))
def test_no_conversation_breaks_an_invariant(tokenizers, name, conversation, length, truncation):
    check(conversation, tokenizers[name], length, truncation)
    GENERATED[name] += 1


@pytest.mark.model
@thorough
@given(conversation=conversations(), length=lengths, truncation=st.sampled_from(TRUNCATIONS))
def test_no_conversation_breaks_an_invariant_with_smollm2(smollm2, conversation, length, truncation):
    check(conversation, smollm2, length, truncation)
    GENERATED["smollm2"] += 1


@pytest.fixture(scope="module")
def smollm2(tokenizers):
    tokenizer = load_tokenizer("smollm2")
    CONTROLS.extend({*tokenizer.hf.get_added_vocab(), *map(tokenizer.piece, tokenizer.control_ids)} - set(CONTROLS))
    return tokenizer


# --- raw rows, as dirty as they come -----------------------------------------------------------------------

dirty = st.lists(st.one_of(fragments, st.sampled_from(DIRT)), max_size=3).map("".join)
roles = st.sampled_from(["human", "gpt", "human", "gpt", "user", "assistant", "system", "chatgpt", "bing", " GPT "])
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": dirty}), max_size=2)
turns = st.lists(
    st.one_of(
        st.builds(lambda role, text: {"from": role, "value": text}, roles, dirty),
        st.builds(lambda role, text: {"role": role, "content": text}, roles, st.one_of(dirty, parts)),
        st.builds(
            lambda role, text, weight: {"from": role, "value": text, "weight": weight},
            roles,
            dirty,
            st.sampled_from([0, 1, 1.0, True, None, 0.5, "1"]),
        ),
    ),
    max_size=6,
)
nonsense = st.sampled_from([None, 1, "x", [], {}, {"from": "gpt"}, {"value": 3}, {"from": "tool", "value": "x"}])
rows = st.one_of(
    st.builds(lambda key, given: {"id": "r", key: given}, st.sampled_from(["conversations", "messages"]), turns),
    st.builds(lambda given: {"conversations": json.dumps(given)}, turns),
    st.builds(lambda given, odd: {"id": odd, "messages": [*given, odd]}, turns, nonsense),
    st.fixed_dictionaries({"instruction": dirty, "input": dirty, "output": dirty}),
    nonsense,
)


@pytest.mark.parametrize("name", NAMES)
@settings(thorough, max_examples=400)
@given(row=rows, length=lengths, truncation=st.sampled_from(TRUNCATIONS))
def test_no_row_gets_through_cleaning_and_breaks_an_invariant(tokenizers, name, row, length, truncation):
    ledger = Ledger()
    conversation = clean(row, "row 0", ledger)
    GENERATED["dirty"] += 1
    if conversation is None:
        assert sum(reason.rows for reason in ledger.dropped.values()) == 1
        return
    spoken = [(m.role, m.trained and m.role == "assistant") for m in conversation.messages if m.role != "system"]
    assert spoken[0][0] == "user" and spoken[-1][0] == "assistant" and all(a != b for a, b in pairwise(spoken))
    assert any(m.trained for m in conversation.messages if m.role == "assistant")
    check(conversation, tokenizers[name], length, truncation)


# --- any order of roles ------------------------------------------------------------------------------------

odd_messages = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), contents, st.booleans()), max_size=6
)


@pytest.mark.parametrize("version", VERSIONS)
@settings(thorough, max_examples=200)
@given(messages=odd_messages)
def test_any_order_of_roles_is_encoded_as_mistral_does(tokenizers, version, messages):
    tokenizer, conversation = tokenizers[f"mistral:{version}"], Conversation("odd", tuple(messages))
    template = template_for(tokenizer)
    row = encode(conversation, template, tokenizer, 10**6)
    violations = check_row("odd", row.input_ids, row.labels, template, tokenizer, conversation=conversation)
    assert {v.invariant for v in violations} <= (set() if row.trained else {"targets"}), violations
    try:
        ids, mask = reference(conversation, version)
    except UserError as error:
        assert "cannot encode" in str(error)
        assert any(m.role == "assistant" and not m.content for m in messages)
    else:
        assert row.input_ids == ids
        assert [label != IGNORE_INDEX for label in row.labels] == mask
    GENERATED["odd"] += 1


def test_ten_thousand_conversations_were_generated(request):
    """Counted where they passed, when the whole file was run."""
    mine = [item for item in request.session.items if item.path == request.path]
    if len(mine) < 2 * len(NAMES) + len(VERSIONS) + 1:
        pytest.skip("only a part of this file was run")
    print(dict(GENERATED))
    assert GENERATED.total() >= 10_000
