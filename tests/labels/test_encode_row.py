"""A row is the first tokens of the whole conversation's, however early its encoding stopped."""

import itertools

import pytest
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import A, talk
from tokenizer_kinds import KINDS, tokenizer_of

from minisft.chat.mistral import VERSIONS
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer, MistralCommonTokenizer, load_tokenizer
from minisft.data.conversations import Conversation, Message
from minisft.data.ledger import Ledger
from minisft.errors import UserError
from minisft.labels.encode_dataset import encode_stream
from minisft.labels.encode_row import (
    IGNORE_INDEX,
    TRUNCATIONS,
    Draft,
    Row,
    cut_point,
    encode,
    encode_segments,
    require_truncation,
)

LENGTHS = [2, 17, 100, 1000, 10**6]


def whole_row(conversation, template, tokenizer):
    """All of it, segment by segment, with no early stop: what `encode` must give the beginning of."""
    ids, labels, ends = [], [], []
    for segment in template.segments(conversation):
        part = encode_segments([segment], tokenizer)
        ids += part
        labels += part if segment.trained else [IGNORE_INDEX] * len(part)
        if segment.control == "eos":
            ends.append(len(ids))
    return ids, labels, ends


def check_cuts(conversations, tokenizer, lengths):
    template = template_for(tokenizer)
    whole = [whole_row(c, template, tokenizer) for c in conversations]
    for length in lengths:
        streamed = {
            row.id: row for row in encode_stream(conversations, template, tokenizer, max_length=length, ledger=Ledger())
        }
        for conversation, (ids, labels, ends) in zip(conversations, whole, strict=True):
            expected = Row(conversation.id, ids[:length], labels[:length], len(ids) > length)
            assert encode(conversation, template, tokenizer, length) == expected
            # The stream leaves out what has nothing to train.
            assert streamed.get(conversation.id, expected) == expected
            assert (conversation.id in streamed) == (expected.trained > 0)
            turn = length if len(ids) <= length else max((end for end in ends if end <= length), default=0)
            assert encode(conversation, template, tokenizer, length, "turn").input_ids == ids[:turn]
            dropped = encode(conversation, template, tokenizer, length, "drop")
            assert dropped.input_ids == (ids if len(ids) <= length else [])


@pytest.fixture(scope="module")
def real_conversations():
    from minisft.data.download import find_data
    from minisft.data.read_files import read

    found = itertools.islice(read(find_data("sharegpt", print).path, Ledger()), 0, 1500, 10)
    return list(found)


@pytest.mark.model
@pytest.mark.parametrize("source", ["smollm2", *(f"mistral:{version}" for version in VERSIONS)])
def test_real_conversations_are_cut_exactly(real_conversations, source):
    tokenizer = load_tokenizer(source)
    assert tokenizer.cuts_at_spaces
    assert len(real_conversations) == 150
    check_cuts(real_conversations, tokenizer, LENGTHS)


pieces = st.sampled_from(
    [
        *WORDS[:6],
        "antidisestablishmentarianism",
        "a" * 150,
        "é",
        "🙂",
        "▁",
        "\n",
        " ",
        " " * 40,
        "'s",
        "12",
        "]",
        "</s>",
        "\u0301",
    ]
)
long_texts = st.tuples(st.lists(pieces, min_size=1, max_size=12), st.sampled_from(["", " "]), st.integers(1, 12)).map(
    lambda drawn: drawn[1].join(drawn[0] * drawn[2])
)
long_talks = st.lists(st.tuples(long_texts, long_texts), min_size=1, max_size=3).map(
    lambda pairs: talk(*(turn for q, a in pairs for turn in (("user", q), ("assistant", a))))
)


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
@settings(max_examples=25)
@given(conversation=long_talks, length=st.integers(2, 200), guess=st.sampled_from([0.01, 1, 5, 60]))
def test_any_text_is_cut_exactly_however_wrong_the_guess(kind, version, conversation, length, guess):
    tokenizer = mistral(version) if kind == "mistral" else tokenizer_of(kind, version)
    template = template_for(tokenizer)
    check_cuts([conversation], tokenizer, [length])
    ids, labels, _ = whole_row(conversation, template, tokenizer)
    draft = Draft(conversation, template, tokenizer, length, guess)
    rounds = 0
    while wanted := draft.wanted():
        draft.add([tokenizer.encode(text, after) for after, text in wanted])
        rounds += 1
    row = draft.row("token")
    assert (row.input_ids, row.labels) == (ids[:length], labels[:length])
    assert rounds < 60


def mistral(version, known={}):  # noqa: B006 -- loading takes a second
    if version not in known:
        known[version] = MistralCommonTokenizer(version)
    return known[version]


def test_a_long_text_is_not_encoded_to_its_end(monkeypatch):
    tokenizer = mistral("v3")
    template = template_for(tokenizer)
    seen = []
    real = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, after: seen.append(len(text)) or real(text))
    encode(talk(("user", "Hi"), ("assistant", "the cat sat " * 100_000)), template, tokenizer, 100)
    assert sum(seen) < 2000


def test_an_eos_after_text_that_was_shorter_than_guessed_is_there():
    """600 spaces are a handful of tokens: the row has room, and only the control token is left to take."""
    tokenizer = tokenizer_of("neox")
    template = template_for(tokenizer)
    row = encode(talk(("user", "a"), ("assistant", " " * 600)), template, tokenizer, 60)
    assert not row.truncated
    assert row.input_ids[-1] == row.labels[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("text", "characters", "end"),
    [("the cat " * 40, 10, 11), ("the cat " * 40, 3, 7), ("a" * 400, 10, 400), ("a  b" * 100, 5, 400), ("a b", 0, 3)],
)
def test_texts_are_cut_before_a_space_between_two_words(text, characters, end):
    assert cut_point(text, characters) == end


def test_a_cut_answer_has_no_eos_and_turn_keeps_whole_answers():
    tokenizer = tokenizer_of("byte level")
    template = template_for(tokenizer)
    ids, _, (first, last) = whole_row(A, template, tokenizer)
    assert last == len(ids)
    for length in range(2, len(ids) + 2):
        rows = {truncation: encode(A, template, tokenizer, length, truncation) for truncation in TRUNCATIONS}
        assert rows["token"].input_ids.count(tokenizer.eos_id) == (length >= first) + (length >= last)
        assert len(rows["turn"].input_ids) == (last if length >= last else first if length >= first else 0)
        assert rows["drop"].input_ids == (ids if length >= last else [])
        assert {row.truncated for row in rows.values()} == {length < last}


def test_weights_0_are_not_trained_and_the_first_token_never_is():
    turns = (Message("user", "a"), Message("assistant", "b", False), Message("user", "c"), Message("assistant", "d"))
    tokenizer = tokenizer_of("byte level")
    template = template_for(tokenizer)
    row = encode(Conversation("x", turns), template, tokenizer, 99)
    ends = [i for i, token in enumerate(row.input_ids) if token == tokenizer.eos_id]
    assert [row.labels[i] == tokenizer.eos_id for i in ends] == [False, True]
    assert row.trained == sum(label != IGNORE_INDEX for label in row.labels) == 3
    assert Row("x", [1, 2], [1, 2]).trained == 1
    assert Row("x", [], []).trained == 0


def test_an_unknown_truncation_is_refused():
    with pytest.raises(UserError, match="'word' is not known: use token, turn, drop"):
        require_truncation("word")


@settings(max_examples=40)
@given(
    pairs=st.lists(
        st.tuples(*[st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join)] * 2), min_size=1, max_size=4
    ),
    max_length=st.integers(2, 60),
)
def test_truncation_is_a_prefix_of_the_whole_row(tiny_model, pairs, max_length):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    conversation = talk(*(turn for q, a in pairs for turn in (("user", q), ("assistant", a))))
    check_cuts([conversation], tokenizer, [max_length])
