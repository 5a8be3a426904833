"""Segments -> `input_ids` and `labels`, in one pass.

A label is the token's own id where the token is trained and -100 where it is not (the loss ignores -100). Ids
and labels are appended together, segment by segment, so they cannot drift apart. The model shifts by itself:
`labels[i]` is predicted from `input_ids[:i]`.
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
    """One training example: `input_ids` and `labels`, lists of one length; `truncated` if it did not fit."""

    id: str
    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def trained(self) -> int:
        """How many tokens the loss sees; the first token of a row is never predicted."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX) - (self.labels[:1] not in ([], [IGNORE_INDEX]))


def encode(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    truncation: str = "token",
) -> Row:
    """Encode up to `max_length` tokens. An answer that is cut has no EOS: it did not end there.

    `truncation` is `token` (cut after exactly `max_length` tokens), `turn` (keep the answers that fit whole) or
    `drop` (a row that does not fit is empty).
    """
    draft = Draft(conversation, template, tokenizer, max_length)
    while wanted := draft.wanted():
        draft.add([tokenizer.encode(text, after) for after, text in wanted])
    return draft.row(truncation)


def encode_segments(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[int]:
    """The ids of some segments, whole; a control token the tokenizer lacks (BOS, for some) is no token at all."""
    ids: list[int] = []
    for segment in segments:
        ids += _control_ids(segment, tokenizer) if segment.control else tokenizer.encode(segment.text, segment.after)
    return ids


def _control_ids(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    token_id = tokenizer.control_id(segment.control)
    return [] if token_id is None else [token_id]


class Draft:
    """A row in the making, which asks for the ids of no more text than it can hold.

    `wanted()` is what to encode next, as pairs of `Segment.after` and text, and empty once the row is full or
    complete; `add(…)` takes the ids. That a caller encodes, and not the draft, is what lets `encoding` do
    hundreds of drafts in one batch.
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
        self._rest: Segment | None = None  # of a segment of which only a part was encoded
        self._characters_per_token = characters_per_token  # a guess: too little only costs another round
        self._round: list[tuple[Segment, int]] = []  # what is being encoded: segments, each up to a character

    def wanted(self) -> list[tuple[str, str]]:
        while len(self.input_ids) <= self.max_length:
            self._round = self._plan()
            texts = [(segment.after, segment.text[:end]) for segment, end in self._round if segment.text]
            if texts or not self._round:
                return texts
            self.add([])  # control tokens alone, an EOS mostly: nothing to encode
        return []

    def _plan(self) -> list[tuple[Segment, int]]:
        """Segments for about as much text as the row has room for."""
        planned: list[tuple[Segment, int]] = []
        room = (self.max_length + 1 - len(self.input_ids)) * self._characters_per_token
        while room > 0:
            segment, self._rest = self._rest or next(self._segments, None), None
            if segment is None:
                break
            text = segment.text or ""
            end = cut_point(text, int(room)) if self.tokenizer.cuts_at_spaces else len(text)
            planned.append((segment, end))
            if end < len(text):
                break
            room -= end + self._characters_per_token * (segment.control is not None)
        return planned

    def add(self, found: list[list[int]]) -> None:
        """Take the ids of what was wanted, in its order."""
        ids_of_texts = iter(found)
        for segment, end in self._round:
            if segment.control:
                self._append(segment, _control_ids(segment, self.tokenizer))
                if segment.control == "eos":
                    self.ends.append(len(self.input_ids))
            elif segment.text:
                self._add_text(segment, end, next(ids_of_texts))
            if len(self.input_ids) > self.max_length:
                break

    def _add_text(self, segment: Segment, end: int, ids: list[int]) -> None:
        unseen = segment.text[end:]
        if unseen and len(self.input_ids) + len(ids) <= self.max_length:  # more text is needed than was guessed
            self._characters_per_token *= 2
            if not self.tokenizer.continues_text:
                self._rest = segment  # all of it anew: what follows could not be encoded as a continuation
                return
            self._rest = replace(segment, text=unseen, after="text")
        self.encoded_characters += end
        self._append(segment, ids)

    def _append(self, segment: Segment, ids: list[int]) -> None:
        self.input_ids += ids
        self.labels += ids if segment.trained else [IGNORE_INDEX] * len(ids)

    def row(self, truncation: str) -> Row:
        """What the row became, cut as `truncation` says."""
        truncated = len(self.input_ids) > self.max_length
        length = min(self.max_length, len(self.input_ids))
        if truncated and truncation == "turn":
            length = max((end for end in self.ends if end <= self.max_length), default=0)
        elif truncated and truncation == "drop":
            length = 0
        return Row(self.conversation.id, self.input_ids[:length], self.labels[:length], truncated)


_BETWEEN_WORDS = re.compile(r"[A-Za-z](?= [A-Za-z])")


def cut_point(text: str, characters: int) -> int:
    """Where to cut `text` after at least `characters`: before a space between two words, or else at its end.

    A tokenizer that `cuts_at_spaces` gives the part before the cut the same ids alone as in the whole.
    """
    if characters + 100 >= len(text):
        return len(text)
    match = _BETWEEN_WORDS.search(text, characters)
    return match.end() if match else len(text)


def require_truncation(truncation: str) -> None:
    if truncation not in TRUNCATIONS:
        raise UserError(f"truncation {truncation!r} is not known: use {', '.join(TRUNCATIONS)}")
