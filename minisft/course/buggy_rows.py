"""Rows encoded the right way, and the usual wrong ways: one function per bug.

Each takes a tokenizer of transformers and a conversation and returns a `Row`, or None where the row
is dropped. The wrong ways are written as people write them: none raises an error, and only
`bug_museum` uses them.
"""

from __future__ import annotations

from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.data.ledger import Ledger
from minisft.labels.encode_dataset import encode_stream
from minisft.labels.encode_row import IGNORE_INDEX, Row, encode
from minisft.labels.invariants import Violation, check_row

LONGEST = 1 << 30  # tokens: no truncation
SHORT = 24  # tokens: the maximum length in the truncation example


def talk(*contents: str, name: str = "talk") -> Conversation:
    """Build a conversation from its texts, which alternate between user and assistant, user first."""
    roles = ("user", "assistant")
    return Conversation(name, tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)))


def right_row(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Encode the conversation as the package does, without truncation."""
    return encode(conversation, template_for(tokenizer), tokenizer, LONGEST)


def find_first(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Render everything as one string, then search it for the answers."""
    segments = list(template_for(tokenizer).segments(conversation))
    names = {"bos": tokenizer.hf.bos_token or "", "eos": tokenizer.hf.eos_token}
    text = "".join((s.text or "") if s.control is None else names.get(s.control, s.control) for s in segments)
    encoded = tokenizer.hf(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [token_id if token_id == tokenizer.eos_id else IGNORE_INDEX for token_id in encoded.input_ids]
    for answer in (s.text for s in segments if s.trained and s.text):
        start = text.find(answer)  # the first occurrence, which may be in the user's text
        for i, (a, b) in enumerate(encoded.offset_mapping):
            if start <= a and b <= start + len(answer):
                labels[i] = encoded.input_ids[i]
    return Row(conversation.id, encoded.input_ids, labels)


def marker_search(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Search the row's ids for the ids of `[/INST]`, and train what follows up to EOS."""
    ids = right_row(tokenizer, conversation).input_ids
    marker = tokenizer.hf.encode("[/INST]", add_special_tokens=False)  # in a row it follows a space and gets other ids
    labels = [IGNORE_INDEX] * len(ids)
    for i in range(len(ids)):
        if ids[i : i + len(marker)] == marker:
            start = i + len(marker)
            end = ids.index(tokenizer.eos_id, start) + 1
            labels[start:end] = ids[start:end]
    return Row(conversation.id, ids, labels)


def mistyped_marks(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    r"""Type the control tokens as text, and misremember them: to a tokenizer `<\s>` and `[\INST]`
    are plain text.
    """
    typed = {"bos": "<s>", "eos": r"<\s>", "[/INST]": r"[\INST]"}
    ids: list[int] = []
    labels: list[int] = []
    for s in template_for(tokenizer).segments(conversation):
        plain = (s.text or "").replace("[/INST]", r"[\INST]")
        text = plain if s.control is None else typed.get(s.control, s.control)
        part = tokenizer.hf.encode(text, add_special_tokens=False)
        ids += part
        labels += part if s.trained else [IGNORE_INDEX] * len(part)
    return Row(conversation.id, ids, labels)


def eos_masked(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Set `pad_token = eos_token`, as many tutorials do, then mask padding by its id, which masks
    EOS too.
    """
    row = right_row(tokenizer, conversation)
    pad_id = tokenizer.eos_id
    return Row(row.id, row.input_ids, [IGNORE_INDEX if label == pad_id else label for label in row.labels])


def eos_missing(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Leave out the EOS after each answer."""
    row = right_row(tokenizer, conversation)
    positions = [i for i, token_id in enumerate(row.input_ids) if token_id != tokenizer.eos_id]
    return Row(row.id, [row.input_ids[i] for i in positions], [row.labels[i] for i in positions])


def double_bos(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Let the template write BOS and the tokenizer add another."""
    row = right_row(tokenizer, conversation)
    return Row(row.id, [tokenizer.bos_id, *row.input_ids], [IGNORE_INDEX, *row.labels])


def forged_end(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Call the tokenizer with its defaults, so it parses control tokens out of user text."""
    ids: list[int] = []
    labels: list[int] = []
    for s in template_for(tokenizer).segments(conversation):
        if s.control is None:
            part = tokenizer.hf.encode(s.text, add_special_tokens=False)
        else:
            part = [tokenizer.control_id(s.control)]
        ids += part
        labels += part if s.trained else [IGNORE_INDEX] * len(part)
    return Row(conversation.id, ids, labels)


def cut_blindly(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Truncate at the maximum length without checking that a trained token is left."""
    row = right_row(tokenizer, conversation)
    return Row(row.id, row.input_ids[:SHORT], row.labels[:SHORT], len(row.input_ids) > SHORT)


def cut_and_counted(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row | None:
    """Truncate too, but drop a row without a trained token and count it in the ledger."""
    template = template_for(tokenizer)
    rows = encode_stream([conversation], template, tokenizer, max_length=SHORT, ledger=Ledger())
    return next(rows, None)


def broken_in_row(row: Row | None, tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> list[Violation]:
    """Return the invariants that a row violates; a dropped row (None) violates none."""
    if row is None:
        return []
    template = template_for(tokenizer)
    max_length = SHORT if row.truncated else None
    return check_row(
        row.id, row.input_ids, row.labels, template, tokenizer, max_length=max_length, conversation=conversation
    )
