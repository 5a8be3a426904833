"""Segments -> `input_ids` and `labels`, in one pass.

A label is the token's own id where the token is trained and -100 where it is not (the loss ignores -100). Ids
and labels are appended together, segment by segment, so they cannot drift apart. The model shifts by itself:
`labels[i]` is predicted from `input_ids[:i]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minisft.conversations import Conversation, Ledger
from minisft.errors import UserError
from minisft.mistral import MistralTemplate, encode_segment
from minisft.tokens import Tokenizer

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: `input_ids` and `labels`, lists of one length; `truncated` if it did not fit."""

    id: str
    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def trained(self) -> int:
        """How many tokens the loss sees; the first token of a row is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode(conversation: Conversation, template: MistralTemplate, tokenizer: Tokenizer, max_length: int) -> Row:
    """Encode up to `max_length` tokens. An answer that is cut has no EOS: it did not end there."""
    input_ids: list[int] = []
    labels: list[int] = []
    for segment in template.segments(conversation):
        if len(input_ids) > max_length:
            break  # the row is full: what follows need not be encoded
        ids = encode_segment(segment, tokenizer)
        input_ids += ids
        labels += ids if segment.trained else [IGNORE_INDEX] * len(ids)
    truncated = len(input_ids) > max_length
    return Row(conversation.id, input_ids[:max_length], labels[:max_length], truncated)


def encode_all(
    conversations: Iterable[Conversation],
    template: MistralTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    ledger: Ledger,
) -> list[Row]:
    """Encode every conversation; rows in which no trained token is left are dropped and counted."""
    if max_length < 2:
        raise UserError(f"max length {max_length} leaves no room for an answer: give at least 2 tokens")
    rows = []
    for conversation in conversations:
        row = encode(conversation, template, tokenizer, max_length)
        if not row.trained:
            ledger.drop(f"no answer within {max_length} tokens", row.id)
            continue
        if row.truncated:
            ledger.repair(f"truncated to {max_length} tokens", row.id)
        rows.append(row)
    ledger.stages["encoded rows"] = len(rows)
    ledger.stages["tokens"] = sum(len(row.input_ids) for row in rows)
    ledger.stages["trained tokens"] = sum(row.trained for row in rows)
    return rows
