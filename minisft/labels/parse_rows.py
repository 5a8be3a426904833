"""Find prompts and answers in a row of unknown origin, using only the template's markers.

Templates v2 and later have ids for `[INST]` and `[/INST]`. v1 writes them as text, so only EOS is
certain; the check for v1 is that every trained run directly follows the text `[/INST]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import Tokenizer
from minisft.labels.encode_row import IGNORE_INDEX, encode_segments

Found = Iterator[tuple[str, int | None, str]]  # the violated invariant, the position, a message


@dataclass(frozen=True)
class ParsedRow:
    """A well-formed row: ids and labels of equal length; `full` if it may have been cut."""

    ids: list[int]
    labels: list[int]
    tokenizer: Tokenizer
    full: bool = False

    @property
    def start(self) -> int:
        """The position where the text begins: after BOS, if the row starts with it."""
        return 1 if self.ids[:1] == [self.tokenizer.bos_id] else 0

    def trained(self, position: int) -> bool:
        """Whether the token at `position` is trained."""
        return self.labels[position] != IGNORE_INDEX

    def first_trained(self, begin: int, end: int) -> int | None:
        """Return the first trained position in [`begin`, `end`), or None."""
        return next((i for i in range(begin, end) if self.labels[i] != IGNORE_INDEX), None)

    def piece(self, position: int) -> str:
        """Describe the token at `position`."""
        return describe(self.ids[position], self.tokenizer)

    def spelt(self, begin: int, end: int) -> bytes:
        """Return the text of the tokens in [`begin`, `end`), as bytes."""
        return b"".join(map(self.tokenizer.token_bytes, self.ids[begin:end]))


def describe(token_id: int, tokenizer: Tokenizer) -> str:
    """Return a token's id and text, for messages."""
    return f"id {token_id} ({tokenizer.piece(token_id)})"


def by_control_tokens(row: ParsedRow, template: ChatTemplate, controls: list[int]) -> Found:
    """Check a row whose template has control tokens for its markers.

    `[INST] … [/INST]` and `[SYSTEM_PROMPT] … [/SYSTEM_PROMPT]` are prompts; the tokens after them,
    up to EOS, are an answer. `controls` are the positions of all control tokens.
    """
    names = [row.tokenizer.control_id(name) for name in template.control_tokens]
    closing_of = dict(zip(names[::2], names[1::2], strict=True))
    eos, bos = row.tokenizer.eos_id, row.tokenizer.bos_id
    begin, asked = row.start, False  # start of the current span, and whether it follows a question
    closing: int | None = None  # the token that ends the current span, if it is a prompt
    before: bool | None = None  # whether the answer directly before the current span is trained
    for i in (i for i in controls if i >= row.start):
        token = row.ids[i]
        if closing is not None and token == closing:
            yield from _prompt(row, begin, i + 1)
            begin, closing, asked, before = i + 1, None, True, None
        elif closing is None and token in closing_of:
            if begin < i:
                yield "eos", i, f"{row.piece(i)} follows an answer without EOS"
            begin, closing = i, closing_of[token]
        elif closing is None and token == eos and (asked or _is_second(row, before, begin, i + 1)):
            yield from _answer(row, begin, i + 1)
            before = row.first_trained(begin, i + 1) is not None
            begin, asked = i + 1, False
        elif token != bos or bos == eos:
            yield "control", i, f"{row.piece(i)} is not allowed here"
    last = len(row.ids) - 1
    is_second = closing is None and _is_second(row, before, begin, len(row.ids))
    if closing is not None:
        yield from _prompt(row, begin, len(row.ids))
    elif begin <= last:
        if not asked and not is_second:
            yield "control", begin, f"{row.piece(begin)} is where a question or a system prompt should begin"
        yield from _answer(row, begin, len(row.ids))
    if (closing is not None or asked or is_second) and not row.full:
        yield "eos", last, f"the row ends in {row.piece(last)}, not in EOS"


def by_text(row: ParsedRow, template: ChatTemplate, controls: list[int]) -> Found:
    """Check a row of template v1: up to each EOS it is `[INST] question [/INST] answer`."""
    eos, bos = row.tokenizer.eos_id, row.tokenizer.bos_id
    begin = row.start
    before: bool | None = None  # whether the answer directly before the current span is trained
    for i in (i for i in controls if i >= row.start):
        if row.ids[i] == eos and i > begin:
            yield from _exchange(row, begin, i + 1, before)
            before = row.first_trained(begin, i + 1) is not None
            begin = i + 1
        elif row.ids[i] != bos or bos == eos:
            yield "control", i, f"{row.piece(i)} is not allowed here"
    last = len(row.ids) - 1
    if begin <= last:
        yield from _exchange(row, begin, len(row.ids), before)
        if not row.full:
            yield "eos", last, f"the row ends in {row.piece(last)}, not in EOS"


def by_opening(row: ParsedRow, template: ChatTemplate, controls: list[int]) -> Found:
    """Check a row of a model's own template: each trained run follows the opening and ends in EOS.

    Its control tokens have to be those of the template, in an order in which it writes them.
    """
    before = ""
    for i in controls:
        control = row.tokenizer.token_bytes(row.ids[i]).decode()
        if not template.may_follow(before, control):
            where = f"after {before}" if before else "as the first control token"
            yield "control", i, f"{row.piece(i)} is {where}, where the template does not write it"
        before = control
    opening = encode_segments(template.opening, row.tokenizer)
    start = row.first_trained(0, len(row.ids))
    while start is not None:
        end = next((i for i in range(start, len(row.ids)) if not row.trained(i)), len(row.ids))
        if row.ids[max(0, start - len(opening)) : start] != opening:
            yield (
                "prompt",
                start,
                f"{row.piece(start)} is trained but does not follow the template's opening of an answer",
            )
        if row.ids[end - 1] not in row.tokenizer.stop_ids and not (row.full and end == len(row.ids)):
            yield "eos", end - 1, f"the trained tokens end in {row.piece(end - 1)}, at which generation does not stop"
        start = row.first_trained(end, len(row.ids))


def _exchange(row: ParsedRow, begin: int, end: int, before: bool | None) -> Found:
    trained = row.first_trained(begin, end)
    if trained in (begin, None) and _is_second(row, before, begin, end) and b"[INST]" not in row.spelt(begin, end):
        yield from _answer(row, begin, end)
        return
    question = row.spelt(begin, end if trained is None else trained).strip(b" ")
    if not question.startswith(b"[INST]") and not (row.full and end == len(row.ids) and b"[INST]".startswith(question)):
        yield "control", begin, f"{row.piece(begin)} is where a question's [INST] should begin"
    if trained is None:
        return
    if not question.endswith(b"[/INST]"):
        yield "prompt", trained, f"{row.piece(trained)} is trained but does not directly follow [/INST]"
    _, _, after = row.spelt(trained, end).partition(b"[INST]")
    if b"[/INST]" in after:
        yield "prompt", trained, "[INST] … [/INST] is trained (if the answer quotes it, give --against)"
    yield from _run(row, trained, end)


def _is_second(row: ParsedRow, before: bool | None, begin: int, end: int) -> bool:
    """Whether a span can be an answer directly after an answer: exactly one of the two is trained.

    Consecutive answers of equal weight are joined, those of different weight are not. `before` is
    None if no answer precedes.
    """
    if before is None or begin == end or row.ids[begin] == row.tokenizer.eos_id:
        return False
    return (row.first_trained(begin, end) is not None) != before


def _prompt(row: ParsedRow, begin: int, end: int) -> Found:
    trained = row.first_trained(begin, end)
    if trained is not None:
        yield "prompt", trained, f"{row.piece(trained)} of a prompt is trained"


def _answer(row: ParsedRow, begin: int, end: int) -> Found:
    trained = row.first_trained(begin, end)
    if trained is None:
        return
    if trained > begin:
        yield "whole", trained, f"training starts at {row.piece(trained)}, {trained - begin} tokens into the answer"
    yield from _run(row, trained, end)


def _run(row: ParsedRow, trained: int, end: int) -> Found:
    stop = next((i for i in range(trained, end) if not row.trained(i)), None)
    if stop is not None:
        is_eos = row.ids[stop] == row.tokenizer.eos_id
        problem = "its EOS is not trained" if is_eos else f"training stops at {row.piece(stop)}"
        yield "eos", stop, f"{problem}, but started at token {trained}"


PARSERS = {"text": by_text, "control": by_control_tokens, "own": by_opening}  # by `ChatTemplate.markers`
