"""Encode whole data sets on all cores: a stream of conversations in, a stream of rows out.

Only one batch of conversations is in memory at a time. Each conversation is encoded only until its
row is full, which saves most of the work at short maximum lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from minisft.chat.template import ChatTemplate, RefusedConversation
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation, one_per_answer, only_last_answer
from minisft.data.ledger import Ledger
from minisft.errors import UserError
from minisft.labels.encode_row import Draft, Row, require_truncation
from minisft.text import one_line

BATCH = 256  # conversations in memory
TRAIN_ON = ("all", "last", "each")
MARKER = 32  # characters of a text that may be a template's marker
MOST_MARKERS = 1_000
REFUSED = "refused by the chat template"


def encode_stream(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    ledger: Ledger,
    truncation: str = "token",
    train_on: str = "all",
) -> Iterator[Row]:
    """Yield rows of at most `max_length` tokens, in the order of their conversations.

    `truncation` is `token`, `turn` or `drop` (see `encode_row.encode`). `train_on` is `all` answers
    of a conversation, the `last` answer only, or `each` answer in a separate row. `ledger` counts
    the stages templated, truncated and trained; a row without a trained token is dropped and
    counted. Raises `UserError` for invalid settings before the first row is encoded.
    """
    require_truncation(truncation)
    require_train_on(train_on)
    require_max_length(max_length)
    return _encode(conversations, template, tokenizer, max_length, ledger, truncation, train_on)


def require_train_on(train_on: str) -> None:
    """Raise `UserError` unless `train_on` is one of `TRAIN_ON`."""
    if train_on not in TRAIN_ON:
        raise UserError(f"train on {train_on!r} is not known: use {', '.join(TRAIN_ON)}")


def require_max_length(max_length: int) -> None:
    """Raise `UserError` unless a row of `max_length` tokens can hold an answer."""
    if max_length < 2:
        raise UserError(f"max length {max_length} leaves no room for an answer: give at least 2 tokens")


def _encode(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    ledger: Ledger,
    truncation: str,
    train_on: str,
) -> Iterator[Row]:
    prepared = _prepared(conversations, train_on)
    markers: dict[tuple[str, str], list[int]] = {}
    while batch := list(itertools.islice(prepared, BATCH)):
        # Characters per token, 10% more than measured so far: most rows are full after one round.
        guess = 1.1 / (ledger.tokens_per_character or 0.22)
        drafts = []
        for conversation in batch:
            try:
                if not template.same_at_every_turn(conversation):
                    ledger.repair(_other_prompts(template, train_on), conversation.id)
                for reason in template.leaves_out(conversation):
                    ledger.repair(reason, conversation.id)
                drafts.append(Draft(conversation, template, tokenizer, max_length, guess))
            except RefusedConversation as refusal:
                ledger.drop(REFUSED, conversation.id)
                if ledger.dropped[REFUSED].rows == 1:
                    ledger.note(f"the first conversation that the template {template.name} refused: {refusal}")
        _fill(drafts, tokenizer, markers)
        for draft in drafts:
            row = draft.row(truncation)
            for word in tokenizer.added_words.keys() & row.input_ids if tokenizer.added_words else ():
                name = tokenizer.added_words[word]
                if any(name in text for m in draft.conversation.messages for text in (m.content, m.reasoning, m.tool)):
                    ledger.note(
                        f"{one_line(name, 40)} in a text is one token, id {word}: an added word, not a control token"
                    )
            if _count(draft, row, ledger, max_length, truncation):
                yield row


def _prepared(conversations: Iterable[Conversation], train_on: str) -> Iterator[Conversation]:
    for conversation in conversations:
        if train_on == "each":
            yield from one_per_answer(conversation)
        else:
            yield only_last_answer(conversation) if train_on == "last" else conversation


def _other_prompts(template: ChatTemplate, train_on: str) -> str:
    if train_on == "all":
        return f"{template.difference} ({template.name}): train on each answer to fix this"
    return f"the template {template.name} writes another prompt at inference than before a trained answer"


def _fill(drafts: list[Draft], tokenizer: Tokenizer, markers: dict[tuple[str, str], list[int]]) -> None:
    """Encode the texts that the drafts request, all in one batch, until none requests more.

    `markers` keeps the ids of short texts, because every row has the same ones.
    """
    while drafts:
        requests = [(draft, wanted) for draft in drafts if (wanted := draft.wanted())]
        ids = {request: markers[request] for _, wanted in requests for request in wanted if request in markers}
        texts: dict[str, dict[str, None]] = {}  # by `Segment.after`: each batch has one kind of predecessor
        for _, wanted in requests:
            for after, text in wanted:
                if (after, text) not in ids:
                    texts.setdefault(after, {})[text] = None
        for after, group in texts.items():
            encoded = dict(
                zip(((after, text) for text in group), tokenizer.encode_batch(list(group), after), strict=True)
            )
            ids |= encoded
            if len(markers) < MOST_MARKERS:
                markers |= {request: own for request, own in encoded.items() if len(request[1]) <= MARKER}
        for draft, wanted in requests:
            draft.add([ids[request] for request in wanted])
        drafts = [draft for draft, _ in requests]


def _count(draft: Draft, row: Row, ledger: Ledger, max_length: int, truncation: str) -> bool:
    """Count one row in the ledger; returns whether the row is kept."""
    total_characters = draft.conversation.characters
    ledger.encoded_tokens += len(draft.input_ids)
    ledger.encoded_characters += draft.encoded_characters
    # The text beyond a full row was not encoded, so only its characters can be counted.
    unseen = max(0, total_characters - draft.encoded_characters) if row.truncated else 0
    ledger.count("templated", tokens=len(draft.input_ids), characters=unseen)
    if row.truncated and truncation == "drop":
        ledger.drop(f"longer than {max_length} tokens", row.id)
        return False
    if not row.trained:
        ledger.drop(f"no answer within {max_length} tokens" if row.truncated else "no answer to train", row.id)
        return False
    if row.truncated:
        ledger.repair(f"cut to {max_length} tokens, at the {truncation}", row.id)
    ledger.count("truncated", tokens=len(row.input_ids))
    ledger.count("trained", tokens=row.trained)
    return True
