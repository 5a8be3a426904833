"""What a chat template is: the segments of a conversation, its control tokens, and the same as Jinja.

A segment is a piece of text or one control token, and it knows who speaks, in which turn, and whether it is trained.
Each segment is encoded alone and the ids are concatenated, so no marker has to be searched for afterwards.

To add a template, write a class with these members in a module of this folder, and enter it in `registry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from minisft.data.conversations import Conversation, Message

if TYPE_CHECKING:
    from minisft.chat.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Segment:
    """`text`, or the control token named by `control` (`bos`, `eos`, `[INST]`, …); exactly one of them is set.

    `after` is what comes before a text in its row: `nothing`, `control` or `text`. Some tokenizers encode a text
    differently at each of these places.
    """

    role: str
    turn: int
    trained: bool
    text: str | None = None
    control: str | None = None
    after: str = "control"


class ChatTemplate(Protocol):
    """Turns conversations into segments. Immutable."""

    @property
    def name(self) -> str:
        """The name in the registry, as `--template` takes it."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The markers that need ids of their own, besides BOS and EOS: each opening one followed by its closing one."""

    @property
    def markers_are_text(self) -> bool:
        """Whether questions are marked by plain text (`[INST] … [/INST]`) instead of control tokens."""

    def fitted_to(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The same template as `tokenizer` needs it."""

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The segments of a whole conversation, lazily, so that a full row can stop asking."""

    def prompt_segments(self, conversation: Conversation) -> list[Segment]:
        """The segments before the last answer: what inference starts from, made by the same code as training."""

    def normalized(self, messages: tuple[Message, ...]) -> list[Message]:
        """The messages as the template arranges them before it makes segments."""

    def trained_text(self, answer: str) -> str:
        """What is trained of an answer's text."""

    def same_at_every_turn(self, conversation: Conversation) -> bool:
        """Whether each answer's prompt in training is what inference builds at that turn."""

    def jinja(self) -> str:
        """The template for plain transformers: `tokenizer.apply_chat_template` gives the ids of training."""
