"""The Mistral v1 chat template, as segments.

    <s>[INST] question [/INST] answer</s>[INST] next question [/INST] next answer</s>

A segment is a piece of text or one control token, and it knows who speaks, in which turn, and whether it is
trained. Each segment is encoded alone and the ids are concatenated, exactly as mistral-common does it
(`encode_user_message`, `encode_assistant_message`): no marker has to be searched for afterwards.
In v1 `[INST]` and `[/INST]` are ordinary text, and a system prompt goes into the first question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minisft.conversations import Conversation
from minisft.errors import UserError
from minisft.tokens import Tokenizer

VERSIONS = ("v1",)


@dataclass(frozen=True, slots=True)
class Segment:
    """`text`, or the control token named by `control` (`bos` or `eos`); exactly one of them is set."""

    role: str
    turn: int
    trained: bool
    text: str | None = None
    control: str | None = None


@dataclass(frozen=True)
class MistralTemplate:
    """Turns a conversation into segments.

    `space` is written before an answer. SentencePiece marks the start of every segment with `▁`, so Mistral's
    own text form reads `[/INST] answer`; a byte-level tokenizer adds no such mark, and there the space has to be
    written. It also keeps the two segments from merging into one token when the whole text is encoded at once.
    """

    version: str = "v1"
    space: str = ""

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise UserError(f"template {self.version!r} is not known: use one of {', '.join(VERSIONS)}")

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, version: str = "v1") -> MistralTemplate:
        return cls(version, "" if tokenizer.marks_start else " ")

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The segments of a whole conversation, lazily, so that a full row can stop asking."""
        system = "\n\n".join(m.content for m in conversation.messages if m.role == "system")
        yield Segment("template", 0, False, control="bos")
        turn = 0
        for message in conversation.messages:
            if message.role == "user":
                content = f"{system}\n\n{message.content}" if system else message.content
                system = ""
                yield Segment("user", turn, False, text=f"[INST] {content} [/INST]")
            elif message.role == "assistant":
                yield Segment("assistant", turn, True, text=self.space + message.content)
                yield Segment("assistant", turn, True, control="eos")
                turn += 1

    def prompt_segments(self, conversation: Conversation) -> list[Segment]:
        """The segments before the last answer: what inference starts from, made by the same code as training."""
        segments = list(self.segments(conversation))
        last = segments[-1].turn
        return [s for s in segments if s.turn < last or s.role != "assistant"]

    def jinja(self) -> str:
        """The same template as a Jinja chat template, to be saved with the model for plain transformers.

        On byte-level tokenizers without a prefix space it gives the ids of training, turn by turn. Elsewhere it may
        not: plain transformers encodes the text whole, and does not mark the start of each segment with `▁`. Nor
        does it keep control tokens out of a message's text, as the tokenizers of this package do.
        """
        return _JINJA_V1


def encode_segment(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    """The token ids of one segment; a control token the tokenizer lacks (BOS, for some) is no token at all."""
    if segment.control is None:
        return tokenizer.encode(segment.text)
    token_id = tokenizer.bos_id if segment.control == "bos" else tokenizer.eos_id
    return [] if token_id is None else [token_id]


_JINJA_V1 = """\
{{- bos_token -}}
{%- set ns = namespace(system='', expect='user') -%}
{%- for m in messages if m['role'] == 'system' -%}
{%- set ns.system = ns.system + m['content'] + '\\n\\n' -%}
{%- endfor -%}
{%- for m in messages if m['role'] != 'system' -%}
{%- if m['role'] != ns.expect -%}
{{- raise_exception('user and assistant must take turns, and a user begins') -}}
{%- endif -%}
{%- if m['role'] == 'user' -%}
{{- '[INST] ' + ns.system + m['content'] + ' [/INST]' -}}
{%- set ns.system = '' -%}{%- set ns.expect = 'assistant' -%}
{%- else -%}
{{- ' ' + m['content'] + eos_token -}}
{%- set ns.expect = 'user' -%}
{%- endif -%}
{%- endfor -%}
"""
