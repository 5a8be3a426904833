"""Encode one conversation: build `input_ids` and `labels` from its segments in one pass.

A label is the token's own id if the token is trained, otherwise -100, which the loss ignores. Ids
and labels are appended together, segment by segment, so they always correspond. Labels are not
shifted, because the model does that: `labels[i]` is predicted from `input_ids[:i]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from minisft.chat.mistral import Segment
from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation
from minisft.errors import UserError

IGNORE_INDEX = -100
TRUNCATIONS = ("token", "turn", "drop")


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: ids and labels of equal length; `truncated` if it did not fit."""

    id: str
    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def trained(self) -> int:
        """The number of tokens in the loss; the first token of a row is never predicted."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX) - (self.labels[:1] not in ([], [IGNORE_INDEX]))


def encode(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    truncation: str = "token",
) -> Row:
    """Encode a conversation into a row of at most `max_length` tokens.

    `truncation` is `token` (cut after exactly `max_length` tokens), `turn` (keep only answers that
    fit completely) or `drop` (a row that does not fit is empty). An answer that is cut gets no EOS,
    so the model does not learn to stop there.
    """
    draft = Draft(conversation, template, tokenizer, max_length)
    while wanted := draft.wanted():
        draft.add([tokenizer.encode(text, after) for after, text in wanted])
    return draft.row(truncation)


def encode_segments(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of complete segments, without control tokens that the tokenizer lacks."""
    ids: list[int] = []
    for segment in segments:
        if segment.control:
            ids += _control_ids(segment.control, tokenizer)
        elif segment.text is not None:
            ids += tokenizer.encode(segment.text, segment.after)
    return ids


def _control_ids(control: str, tokenizer: Tokenizer) -> list[int]:
    token_id = tokenizer.control_id(control)
    return [] if token_id is None else [token_id]


class Draft:
    """An unfinished row, which requests no more encoded text than it can hold.

    `wanted()` returns the texts to encode next, as pairs of `Segment.after` and text; it is empty
    once the row is full or complete. `add()` takes their ids. The caller encodes, so
    `encode_dataset` can encode hundreds of drafts in one batch.
    """

    def __init__(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        max_length: int,
        characters_per_token: float = 5,
    ):
        self.conversation, self.tokenizer, self.max_length = conversation, tokenizer, max_length
        self.input_ids: list[int] = []
        self.labels: list[int] = []
        self.ends: list[int] = []  # the row's length after each whole answer
        self.encoded_characters = 0
        self._segments = template.segments(conversation)
        self._remainder: Segment | None = None  # the unencoded part of a segment
        self._characters_per_token = characters_per_token  # an estimate; if too low, it costs another round
        # The segments of the current round, each with the number of its characters to encode.
        self._round: list[tuple[Segment, int]] = []

    def wanted(self) -> list[tuple[str, str]]:
        """Return the texts to encode next, as (`Segment.after`, text); empty if there are none."""
        while len(self.input_ids) <= self.max_length:
            self._round = self._plan()
            texts = [(segment.after, segment.text[:end]) for segment, end in self._round if segment.text]
            if texts or not self._round:
                return texts
            self.add([])  # only control tokens, usually an EOS: nothing to encode
        return []

    def _plan(self) -> list[tuple[Segment, int]]:
        """Choose segments with about as much text as still fits in the row."""
        planned: list[tuple[Segment, int]] = []
        space = (self.max_length + 1 - len(self.input_ids)) * self._characters_per_token
        while space > 0:  # characters
            segment, self._remainder = self._remainder or next(self._segments, None), None
            if segment is None:
                break
            text = segment.text or ""
            end = cut_point(text, int(space)) if self.tokenizer.cuts_at_spaces else len(text)
            planned.append((segment, end))
            if end < len(text):
                break
            space -= end + self._characters_per_token * (segment.control is not None)
        return planned

    def add(self, found: list[list[int]]) -> None:
        """Append the ids of the texts that `wanted()` returned, in the same order."""
        ids_of_texts = iter(found)
        for segment, end in self._round:
            if segment.control:
                self._append(segment, _control_ids(segment.control, self.tokenizer))
                if segment.is_end:
                    self.ends.append(len(self.input_ids))
            elif segment.text:
                self._add_text(segment, segment.text, end, next(ids_of_texts))
            if len(self.input_ids) > self.max_length:
                break

    def _add_text(self, segment: Segment, text: str, end: int, ids: list[int]) -> None:
        """Append the `ids` of the first `end` characters of a segment's text."""
        unseen = text[end:]
        if unseen and len(self.input_ids) + len(ids) <= self.max_length:  # the estimate was too low
            self._characters_per_token *= 2
            if not self.tokenizer.continues_text:
                self._remainder = segment  # encode all of it again: the rest alone would get other ids
                return
            self._remainder = replace(segment, text=unseen, after="text")
        self.encoded_characters += end
        self._append(segment, ids)

    def _append(self, segment: Segment, ids: list[int]) -> None:
        self.input_ids += ids
        self.labels += ids if segment.trained else [IGNORE_INDEX] * len(ids)

    def row(self, truncation: str) -> Row:
        """Return the row, truncated by the method `truncation`."""
        truncated = len(self.input_ids) > self.max_length
        length = min(self.max_length, len(self.input_ids))
        if truncated and truncation == "turn":
            length = max((end for end in self.ends if end <= self.max_length), default=0)
        elif truncated and truncation == "drop":
            length = 0
        return Row(self.conversation.id, self.input_ids[:length], self.labels[:length], truncated)


_BETWEEN_WORDS = re.compile(r"[A-Za-z](?= [A-Za-z])")


def cut_point(text: str, characters: int) -> int:
    """Return where to cut `text` after at least `characters`.

    The cut is before a space between two words, or at the end of the text. A tokenizer with
    `cuts_at_spaces` gives the part before the cut the same ids alone as in the complete text.
    """
    if characters + 100 >= len(text):
        return len(text)
    match = _BETWEEN_WORDS.search(text, characters)
    return match.end() if match else len(text)


def require_truncation(truncation: str) -> None:
    """Raise `UserError` unless `truncation` is one of `TRUNCATIONS`."""
    if truncation not in TRUNCATIONS:
        raise UserError(f"truncation {truncation!r} is not known: use {', '.join(TRUNCATIONS)}")
