"""The Mistral chat templates v1 to v7, as segments.

    v1        <s>[INST] question [/INST] answer</s>              [INST] is text; system prompt in the first question
    v2, v3    <s> [INST] question [/INST] answer </s>            [INST] is one id; system prompt in the last question
    v7        <s> [SYSTEM_PROMPT] … [/SYSTEM_PROMPT] [INST] …    as v3; system prompt is a message

A segment is a piece of text or one control token, with its role, its turn, and whether it is
trained. Each segment is encoded alone and the ids are concatenated, exactly as in mistral-common
(`encode_user_message`, `encode_assistant_message`, `encode_system_message` of each
`InstructTokenizer`), so the label code never has to search for markers. v3-tekken is v3 with
another tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minisft.chat.template import Segment
from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.chat.tokenizers import Tokenizer

INST, END_INST = "[INST]", "[/INST]"
SYSTEM, END_SYSTEM = "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"


@dataclass(frozen=True)
class Version:
    """How one version differs.

    `system_in`: the question that contains the system prompt, `first` or `last`, or "".
    """

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
    """Turns a conversation into segments. Raises `UserError` for an unknown `name`.

    `written_space`: whether a space is written before an answer of v1, which as text reads
    `[/INST] answer`. Mistral's own tokenizers encode the answer alone and mark its start with `▁`;
    every other tokenizer continues the text, so the space must be in it. `has_bos`: whether the
    tokenizer has a BOS token.
    """

    name: str = "v1"
    written_space: bool = False
    has_bos: bool = True

    def __post_init__(self) -> None:
        if self.name not in VERSIONS:
            raise UserError(f"template {self.name!r} is not known: use one of {', '.join(VERSIONS)}")

    def marks_and_stops(self, hf: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The control tokens of this version; generation stops at EOS alone."""
        return self.control_tokens, (hf.eos_token,)

    def fitted_to(self, tokenizer: Tokenizer) -> MistralTemplate:
        """The same template with the `written_space` and `has_bos` of `tokenizer`."""
        return replace(self, written_space=tokenizer.continues_text, has_bos=tokenizer.bos_id is not None)

    @property
    def version(self) -> Version:
        return VERSIONS[self.name]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return self.version.control_tokens

    @property
    def markers(self) -> str:
        return "control" if self.control_tokens else "text"

    @property
    def system_has_its_place(self) -> bool:
        """Whether a system prompt is a separate message instead of part of a question."""
        return not self.version.system_in

    def trained_text(self, answer: str) -> str:
        """An answer as it is trained.

        Like Mistral, v2 and later cut trailing spaces; v1 keeps them.
        """
        return answer.rstrip(" ") if self.control_tokens else answer

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """Yield the segments of a whole conversation; the caller may stop when its row is full.

        Any order of roles is normalized as in Mistral's reference; see `normalized`.
        """
        messages = self.normalized(conversation.messages)
        system = "\n\n".join(m.content for m in conversation.messages if m.role == "system" and m.content)
        questions = [i for i, m in enumerate(messages) if m.role == "user"]
        with_system = {"first": questions[:1], "last": questions[-1:]}.get(self.version.system_in, [])
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
                content = f"{system}\n\n{message.content}" if system and i in with_system else message.content
                if not self.control_tokens:
                    yield Segment("user", turn, False, text=f"[INST] {content} [/INST]", after=start)
                else:
                    yield from _enclosed(INST, content, END_INST, "user", turn)
            start = "text" if not self.control_tokens and message.role == "user" else "control"

    def _answer(self, message: Message, turn: int) -> Iterator[Segment]:
        if not self.control_tokens:
            text = " " + message.content if self.written_space else message.content
            yield Segment("assistant", turn, message.trained, text=text, after="text")
        else:
            yield Segment("assistant", turn, message.trained, text=self.trained_text(message.content))
        yield Segment("assistant", turn, message.trained, control="eos")

    def normalized(self, messages: tuple[Message, ...]) -> list[Message]:
        """Normalize messages as `InstructRequestNormalizer` in mistral-common does.

        Adjacent messages of one role and weight are joined with a blank line. v1 to v3 remove the
        system prompts (`segments` adds them to a question), but two questions with a system prompt
        between them stay separate, and a conversation that begins with an answer gets an empty
        question first. v7 leaves every system prompt in place.
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
        """The prompt for inference: the segments before the last answer, made as in training."""
        segments = list(self.segments(conversation))
        last = segments[-1].turn
        return [s for s in segments if s.turn < last or s.role != "assistant"]

    def leaves_out(self, conversation: Conversation) -> list[str]:
        """The reasoning of an answer has no place in these templates."""
        if not any(message.reasoning for message in conversation.messages):
            return []
        return [f"reasoning left out: the template {self.name} has no place for it"]

    def may_follow(self, before: str, control: str) -> bool:
        """True: the markers of these templates say more than an order."""
        return True

    opening: ClassVar[tuple[Segment, ...]] = ()
    has_tools: ClassVar[bool] = False
    text_arguments: ClassVar[bool] = False
    difference = "system prompt not where inference puts it"

    def same_at_every_turn(self, conversation: Conversation) -> bool:
        """Whether each trained answer's prompt equals the prompt of inference at that turn.

        v2 and v3 put the system prompt into the last question: in a conversation of several turns
        the model sees it once, late, but at inference it sees it at every turn. v1 puts it into the
        first question, even if it comes after answers that inference generated without it. Training
        one row per answer (`conversations.one_per_answer`) makes the prompts equal.
        """
        answers = [m.trained for m in conversation.messages if m.role == "assistant"]
        if not any(answers[:-1]):
            return True  # the last prompt is the beginning of the row
        roles = [m.role for m in conversation.messages if m.content or m.role != "system"]
        if self.system_has_its_place or not {"system", "user", "assistant"} <= set(roles):
            return True
        if self.version.system_in == "first":
            return "system" not in roles[roles.index("assistant") :]
        before_last = "".join(role[0] for role in roles).rpartition("u")[0]
        return "a" not in before_last.partition("s")[2]

    def jinja(self) -> str:
        """The same template in Jinja, to save with the model for plain transformers.

        It yields the ids of training at every turn (but see `same_at_every_turn`), with three
        exceptions. (1) A message contains the text of an added token: plain transformers parses it,
        this package's tokenizers never do. (2) A control token absorbs the space next to it
        (`lstrip`, `rstrip`). (3) Under v1, whose markers are text, a vocabulary piece crosses from
        `[/INST]` into the answer (`]▁a`); vocabularies learned word by word have no such pieces.
        Like Mistral's own templates it rejects roles out of order instead of normalizing them.
        """
        return Path(__file__).with_name(self.version.jinja_file).read_text(encoding="utf-8")


def _weight(message: Message) -> bool:
    """Whether an answer is trained; True for other roles, so that their neighbors always join."""
    return message.trained or message.role != "assistant"


def _enclosed(opening: str, text: str, closing: str, role: str, turn: int) -> Iterator[Segment]:
    yield Segment(role, turn, False, control=opening)
    yield Segment(role, turn, False, text=text)
    yield Segment(role, turn, False, control=closing)
