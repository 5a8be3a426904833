"""The Mistral chat templates, as segments.

    v1        <s>[INST] question [/INST] answer</s>              [INST] is text; system prompt: first question
    v2, v3    <s> [INST] question [/INST] answer </s>            [INST] is one id; system prompt: last question
    v7        <s> [SYSTEM_PROMPT] … [/SYSTEM_PROMPT] [INST] …    as v3; system prompt: where it stands

A segment is a piece of text or one control token, and it knows who speaks, in which turn, and whether it is
trained. Each segment is encoded alone and the ids are concatenated, exactly as mistral-common does it
(`encode_user_message`, `encode_assistant_message`, `encode_system_message` of each `InstructTokenizer`): no marker
has to be searched for afterwards. v3-tekken is v3 with another tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.chat.template import Segment
from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.chat.tokenizers import Tokenizer

INST, END_INST = "[INST]", "[/INST]"
SYSTEM, END_SYSTEM = "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"


@dataclass(frozen=True)
class Version:
    """What one version does differently. `system_in` is the question that takes the system prompt; "" for none."""

    control_tokens: tuple[str, ...] = (INST, END_INST)
    system_in: str = "last"
    jinja_file: str = "mistral_v3.jinja"


VERSIONS = {
    "v1": Version((), "first", "mistral_v1.jinja"),
    "v2": Version(),
    "v3": Version(),
    "v3-tekken": Version(),
    "v7": Version((INST, END_INST, SYSTEM, END_SYSTEM), "", "mistral_v7.jinja"),
}


@dataclass(frozen=True)
class MistralTemplate:
    """Turns a conversation into segments.

    `written_space`: v1 as one text reads `[/INST] answer`. Mistral's own tokenizers encode the answer alone and
    mark its start with `▁`; every other tokenizer continues the text, so there the space is written. `has_bos`
    says whether the tokenizer has a BOS token at all.
    """

    name: str = "v1"
    written_space: bool = False
    has_bos: bool = True

    def __post_init__(self) -> None:
        if self.name not in VERSIONS:
            raise UserError(f"template {self.name!r} is not known: use one of {', '.join(VERSIONS)}")

    def fitted_to(self, tokenizer: Tokenizer) -> MistralTemplate:
        """The same template with the space and the BOS that `tokenizer` needs."""
        return replace(self, written_space=tokenizer.continues_text, has_bos=tokenizer.bos_id is not None)

    @property
    def version(self) -> Version:
        return VERSIONS[self.name]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return self.version.control_tokens

    @property
    def markers_are_text(self) -> bool:
        return not self.control_tokens

    @property
    def system_has_its_place(self) -> bool:
        """Whether a system prompt is a message of its own, and not part of a question."""
        return not self.version.system_in

    def trained_text(self, answer: str) -> str:
        """An answer as it is trained: where control tokens follow, spaces at its end are cut, as Mistral does it."""
        return answer if self.markers_are_text else answer.rstrip(" ")

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The segments of a whole conversation, lazily, so that a full row can stop asking.

        Any order of roles is normalized as Mistral's reference does it; see `normalized`.
        """
        messages = self.normalized(conversation.messages)
        system = "\n\n".join(m.content for m in conversation.messages if m.role == "system" and m.content)
        users = [i for i, m in enumerate(messages) if m.role == "user"]
        takes_system = {"first": users[:1], "last": users[-1:]}.get(self.version.system_in, [])
        yield Segment("template", 0, False, control="bos")
        turn = 0
        start = "control" if self.has_bos else "nothing"
        for i, message in enumerate(messages):
            if message.role == "assistant":
                yield from self._answer(message, turn)
                turn += 1
            elif message.role == "system":
                yield from _enclosed(SYSTEM, message.content, END_SYSTEM, "system", turn)
            else:
                content = f"{system}\n\n{message.content}" if system and i in takes_system else message.content
                if self.markers_are_text:
                    yield Segment("user", turn, False, text=f"[INST] {content} [/INST]", after=start)
                else:
                    yield from _enclosed(INST, content, END_INST, "user", turn)
            start = "text" if self.markers_are_text and message.role == "user" else "control"

    def _answer(self, message: Message, turn: int) -> Iterator[Segment]:
        if self.markers_are_text:
            text = " " + message.content if self.written_space else message.content
            yield Segment("assistant", turn, message.trained, text=text, after="text")
        else:
            yield Segment("assistant", turn, message.trained, text=self.trained_text(message.content))
        yield Segment("assistant", turn, message.trained, control="eos")

    def normalized(self, messages: tuple[Message, ...]) -> list[Message]:
        """Mistral's own normalization (`InstructRequestNormalizer` in mistral-common).

        Neighbours of one role and weight join with a blank line; v1 to v3 take the system prompts out, but a
        system prompt between two questions keeps them apart, and a conversation that begins with an answer gets an
        empty question first. v7 leaves every system prompt in its place.
        """
        joined: list[Message] = []
        for (role, trained), group in itertools.groupby(messages, lambda m: (m.role, _weight(m))):
            texts = [m.content for m in group]
            if role != "system":
                joined.append(Message(role, "\n\n".join(text for text in texts if text), trained))
            elif self.system_has_its_place:
                joined += [Message(role, text) for text in texts]
        if not joined or (not self.system_has_its_place and joined[0].role != "user"):
            joined.insert(0, Message("user", ""))
        return joined

    def prompt_segments(self, conversation: Conversation) -> list[Segment]:
        """The segments before the last answer: what inference starts from, made by the same code as training."""
        segments = list(self.segments(conversation))
        last = segments[-1].turn
        return [s for s in segments if s.turn < last or s.role != "assistant"]

    def same_at_every_turn(self, conversation: Conversation) -> bool:
        """Whether each answer's prompt in training is what inference builds at that turn.

        v2 and v3 put the system prompt into the last question. A conversation of several turns then shows it to
        the model once, late, while inference shows it at every turn. v1 puts it into the first question, also where
        it comes after answers, which inference gave without it. Training one row per answer
        (`conversations.one_per_answer`) restores the equality.
        """
        roles = [m.role for m in conversation.messages if m.content or m.role != "system"]
        if self.system_has_its_place or not {"system", "user", "assistant"} <= set(roles):
            return True
        if self.version.system_in == "first":
            return "system" not in roles[roles.index("assistant") :]
        before_last = "".join(role[0] for role in roles).rpartition("u")[0]
        return "a" not in before_last.partition("s")[2]

    def jinja(self) -> str:
        """The same template as a Jinja chat template, to be saved with the model for plain transformers.

        It gives the ids of training at every turn (but see `same_at_every_turn`), with three exceptions. A message
        contains the text of an added token: plain transformers parses that, this package's tokenizers never do. A
        control token takes in the space beside it (`lstrip`, `rstrip`). Under v1, whose markers are text, a piece of
        the vocabulary reaches from `[/INST]` into the answer (`]▁a`); no vocabulary has such pieces that was learned
        word by word. Like Mistral's own templates it refuses roles out of turn instead of mending them.
        """
        return Path(__file__).with_name(self.version.jinja_file).read_text(encoding="utf-8")


def _weight(message: Message) -> bool:
    """Only answers have one; other neighbours always join."""
    return message.trained or message.role != "assistant"


def _enclosed(opening: str, text: str, closing: str, role: str, turn: int) -> Iterator[Segment]:
    yield Segment(role, turn, False, control=opening)
    yield Segment(role, turn, False, text=text)
    yield Segment(role, turn, False, control=closing)
