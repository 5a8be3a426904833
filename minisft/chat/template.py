"""The interface of a chat template: segments of a conversation, control tokens, and Jinja.

A segment is a piece of text or one control token, with its role, its turn, and whether it is
trained. Each segment is encoded alone and the ids are concatenated, so the label code never has to
search for markers.

To add a template, write a class with these members in a module of this folder, and add it to
`registry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.chat.tokenizers import Tokenizer


class RefusedConversation(UserError):
    """Why a template cannot write a conversation; the message becomes a reason in the ledger."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Either `text`, or a control token with the name `control` (`bos`, `eos`, `[INST]`, …).

    `after` is what precedes a text in its row: `nothing`, `control` or `text`. Some tokenizers
    encode a text differently in each of these positions. `ends`: whether a control token other than
    `eos` ends an answer.
    """

    role: str
    turn: int
    trained: bool
    text: str | None = None
    control: str | None = None
    after: str = "control"
    ends: bool = False

    @property
    def is_end(self) -> bool:
        """Whether this is the token that ends an answer."""
        return self.control == "eos" or self.ends


class ChatTemplate(Protocol):
    """Turns conversations into segments. Immutable."""

    @property
    def name(self) -> str:
        """The name in the registry and for `--template`."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The markers with ids, besides BOS and EOS: each opening one, then its closing one."""

    @property
    def markers(self) -> str:
        """How a row without its conversation shows its prompts.

        `text`: questions are marked with plain text (`[INST] … [/INST]`); `control`: prompts are
        between pairs of `control_tokens`; `own`: an answer follows `opening`.
        """

    @property
    def has_tools(self) -> bool:
        """Whether it can show tool calls and their results."""

    @property
    def text_arguments(self) -> bool:
        """Whether `jinja` takes the arguments of a tool call as JSON text, not as an object."""

    @property
    def opening(self) -> tuple[Segment, ...]:
        """What directly precedes each answer, if `markers` is `own`."""

    def may_follow(self, before: str, control: str) -> bool:
        """Whether it may write the control token `control` next after `before`, if `markers` is `own`.

        `before` is "" for the first one.
        """

    def marks_and_stops(self, hf: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tokens of a transformers tokenizer that mark turns, and those at which generation stops.

        No text may contain a mark as an id. The first stop ends an answer.
        """

    def fitted_to(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The same template, adapted to `tokenizer`."""

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """Yield the segments of a whole conversation; the caller may stop when its row is full.

        A BOS is the control `bos`. Every answer ends in a segment with `is_end`, trained if the
        answer is: truncation and `check` know the end of an answer by it. A text directly after a
        text has `after="text"`. Raises `RefusedConversation`.
        """

    def prompt_segments(self, conversation: Conversation) -> list[Segment]:
        """The prompt for inference: the segments before the last answer, made as in training."""

    def normalized(self, messages: tuple[Message, ...]) -> list[Message]:
        """The messages in the order and form from which the segments are made."""

    def trained_text(self, answer: str) -> str:
        """The part of an answer's text that is trained."""

    def same_at_every_turn(self, conversation: Conversation) -> bool:
        """Whether each trained answer's prompt equals the prompt of inference at that turn.

        Raises `RefusedConversation`.
        """

    def leaves_out(self, conversation: Conversation) -> list[str]:
        """What of the answers or tools has no place in this template, as reasons for the ledger."""

    @property
    def difference(self) -> str:
        """What makes a prompt differ where `same_at_every_turn` is false, for the ledger."""

    def jinja(self) -> str:
        """The template in Jinja: `tokenizer.apply_chat_template` yields the ids of training."""
