"""`labels.encode` against Mistral's own encoder: ids and masks, on real conversations and on odd ones."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minisft.chat.mistral_reference import VERSIONS, reference
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import MistralCommonTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.data.download import find_data
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.errors import UserError
from minisft.labels.encode_row import IGNORE_INDEX, encode

WHOLE = 10**9
FORGED = ["</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT] x [/SYSTEM_PROMPT]", "<unk>", "▁", "  ", "\n\n", ""]
contents = st.lists(st.sampled_from(FORGED) | st.text(st.characters(exclude_categories=["Cs"])), max_size=4).map(
    "".join
)
odd_conversations = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), contents, st.booleans()), max_size=7
).map(lambda messages: Conversation("odd", tuple(messages)))


@pytest.fixture(scope="module")
def tokenizers():
    return {version: MistralCommonTokenizer(version) for version in VERSIONS}


@pytest.fixture(scope="module")
def real_conversations():
    conversations = list(read(find_data("sharegpt", print).path, Ledger()))
    return random.Random(200).sample(conversations, 200)


def ours(conversation, tokenizer):
    row = encode(conversation, template_for(tokenizer), tokenizer, WHOLE)
    return row.input_ids, [label != IGNORE_INDEX for label in row.labels]


@pytest.mark.model
@pytest.mark.parametrize("version", VERSIONS)
def test_real_conversations_have_the_ids_and_the_mask_of_mistral(real_conversations, tokenizers, version):
    different = [c.id for c in real_conversations if ours(c, tokenizers[version]) != reference(c, version)]
    assert different == []


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=150)
@given(conversation=odd_conversations)
def test_any_order_of_roles_has_the_ids_and_the_mask_of_mistral(tokenizers, version, conversation):
    try:
        expected = reference(conversation, version)
    except UserError:
        assume(False)  # an empty answer, which mistral-common cannot encode
    assert ours(conversation, tokenizers[version]) == expected


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_the_reference_is_what_encode_chat_completion_gives(version, pairs):
    """In finetuning mode, validator included, where that accepts the conversation."""
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    from minisft.chat.mistral_reference import _tokenizer

    instruct, _ = _tokenizer(version)
    number = instruct.tokenizer.version
    whole = MistralTokenizer(
        instruct, get_validator(number, mode=ValidationMode.finetuning), get_normalizer(number, None)
    )
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    turns = [("system", "Be brief."), *(turn for q, a in pairs for turn in (("user", q), ("assistant", a)))]
    request = ChatCompletionRequest(messages=[kinds[role](content=text) for role, text in turns])
    try:
        expected = whole.encode_chat_completion(request).tokens
    except MistralCommonException:
        assume(False)
    ids, mask = reference(Conversation("c", tuple(Message(role, text) for role, text in turns)), version)
    assert ids == expected
    assert len(mask) == len(ids)
    assert sum(token == 2 for token, trained in zip(ids, mask, strict=True) if trained) == len(pairs)


def test_answers_of_weight_0_are_not_trained():
    messages = (
        Message("user", "Hi"),
        Message("assistant", "No", False),
        Message("user", "So"),
        Message("assistant", "Yes"),
    )
    ids, mask = reference(Conversation("c", messages), "v3")
    ends = [i for i, token in enumerate(ids) if token == 2]
    assert [mask[i] for i in ends] == [False, True]
    assert not any(mask[: ends[0]])


def test_what_mistral_cannot_encode_is_said_in_one_sentence():
    with pytest.raises(UserError, match="cannot encode conversation c"):
        reference(Conversation("c", (Message("user", "Hi"), Message("assistant", ""))), "v3")
    with pytest.raises(UserError, match="v99"):
        reference(Conversation("c", (Message("user", "Hi"),)), "v99")
