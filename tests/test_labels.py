import pytest
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mistral import A, talk

from minisft.conversations import Ledger
from minisft.errors import UserError
from minisft.labels import IGNORE_INDEX, encode, encode_all
from minisft.mistral import MistralTemplate
from minisft.tokens import HuggingFaceTokenizer

sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=40)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4), st.integers(2, 60))
def test_truncation_is_a_prefix_of_the_whole_row(tiny_model, pairs, max_length):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    template = MistralTemplate.for_tokenizer(tokenizer)
    conversation = talk(*(turn for q, a in pairs for turn in (("user", q), ("assistant", a))))
    whole = encode(conversation, template, tokenizer, 10_000)
    row = encode(conversation, template, tokenizer, max_length)
    assert row.input_ids == whole.input_ids[:max_length]
    assert row.labels == whole.labels[:max_length]
    assert row.truncated == (len(whole.input_ids) > max_length)


def test_rows_without_a_target_are_dropped_and_counted(tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    template = MistralTemplate.for_tokenizer(tokenizer)
    long_question = talk(("user", "word " * 200), ("assistant", "ok"))
    ledger = Ledger()
    rows = encode_all([A, long_question], template, tokenizer, 64, ledger)
    assert len(rows) == 1
    assert sum(map(len, ledger.dropped.values())) == 1
    assert ledger.stages["trained tokens"] == rows[0].trained == sum(x != IGNORE_INDEX for x in rows[0].labels)


def test_too_small_a_length_is_refused(tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    with pytest.raises(UserError, match="at least 2"):
        encode_all([A], MistralTemplate.for_tokenizer(tokenizer), tokenizer, 1, Ledger())
