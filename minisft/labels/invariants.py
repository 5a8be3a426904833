"""Check the invariants that every labelled row must satisfy, whichever tool made it.

`check_row` finds the first token that violates each invariant. If the conversation of the row is
known, its segments are encoded again, one by one, and the row must equal them. Otherwise the
template's markers separate prompts from answers. `INVARIANTS` explains each invariant and how to
fix a violation.
"""

from __future__ import annotations

import itertools
import unicodedata
from dataclasses import dataclass
from typing import Any

from minisft.chat.template import ChatTemplate, RefusedConversation
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation, Message
from minisft.labels.encode_row import IGNORE_INDEX, encode_segments
from minisft.labels.parse_rows import PARSERS, Found, ParsedRow, describe
from minisft.text import one_line

# Name -> (what it means, how to fix a violation).
INVARIANTS = {
    "row": (
        "ids and labels are lists of token ids in the tokenizer's vocabulary",
        "repair or drop these rows, and check that --tokenizer is the one that made them",
    ),
    "length": ("ids and labels have the same length", "build both in one pass, token by token"),
    "labels": (
        "each label is -100 or the id at the same position",
        "do not shift labels (the model does), and do not let a collator rebuild them",
    ),
    "max length": ("no row is longer than the maximum", "truncate ids and labels together"),
    "bos": ("there is one BOS, the first token", "let either the template or the tokenizer add it, not both"),
    "control": (
        "the control tokens are exactly those of the template",
        "encode text without parsing special tokens, so that it cannot forge a turn, and remove padding",
    ),
    "text": ("text tokens equal those of the template and tokenizer", "encode the row again"),
    "trained control": (
        "EOS is the only trained control token, or one that an own template writes inside an answer",
        "mask BOS and the template's markers",
    ),
    "eos": (
        "every answer ends in a trained EOS, unless the row was cut there",
        "append the real EOS id to each answer and train it; if rows were cut, give --max-length",
    ),
    "prompt": ("no token of a prompt is trained", "mask by segment, not by searching for text or markers"),
    "whole": ("an answer is trained from its first token or not at all", "mask by segment, not by prefix lengths"),
    "answers": ("the trained spans, decoded, are the answers", "mask by segment, not by searching for text"),
    "cut": ("a row is cut only at the maximum length", "do not cut characters or turns before encoding"),
    "targets": ("a row has a trained token", "drop rows without one: their loss is NaN or a false 0"),
    "reference": (
        "ids and mask equal mistral-common's; before an answer of an own template, the prompt of plain transformers",
        "encode each message alone, and the prompt of each answer as inference does",
    ),
    "against": ("ids and labels equal those of minisft encode", "encode the row again"),
}
ALWAYS = ("row", "length", "labels", "bos", "control", "trained control", "eos", "prompt", "whole", "targets")
KNOWN = ("text", "answers", "cut")


@dataclass(frozen=True, slots=True)
class Violation:
    """One violated invariant: the row's id, the answer's index (from 0), the token's position."""

    row: str
    turn: int | None
    token: int | None
    invariant: str
    message: str

    def __str__(self) -> str:
        location = [f"row {one_line(self.row)}"]
        location += [] if self.turn is None else [f"turn {self.turn}"]
        location += [] if self.token is None else [f"token {self.token}"]
        return f"{', '.join(location)}: {self.message}"


def check_row(
    row: str,
    input_ids: Any,
    labels: Any,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    conversation: Conversation | None = None,
    truncation: str = "token",
) -> list[Violation]:
    """Return the violated invariants of one row, each at its first token; empty if all hold.

    `input_ids` and `labels` should be lists of ints of equal length; anything else is reported. A
    row of `max_length` tokens may have been cut; without `max_length` no row was. `conversation` is
    the conversation of the row, with `trained` set for the answers that the row trains; it makes
    the check exact. `truncation` is how the row was cut, as in `encode_row.encode`.
    """
    first: dict[str, Violation] = {}

    def note(violations: Found) -> None:
        for invariant, token, message in violations:
            if invariant in first:  # may be violated at every token, and finding the turn is slow
                continue
            turn = None if token is None else _turn(input_ids, token, tokenizer)
            first[invariant] = Violation(row, turn, token, invariant, message)

    note(_malformed(input_ids, labels, tokenizer))
    if first:
        return list(first.values())
    labelled = ParsedRow(input_ids, labels, tokenizer, full=max_length is not None and len(input_ids) >= max_length)
    controls = [i for i, token in enumerate(input_ids) if token in tokenizer.control_ids]
    note(_labels(labelled, _not_trained(labelled, controls, template, conversation is not None)))
    if template.markers != "own":
        note(_bos(labelled))
    if max_length is not None and len(input_ids) > max_length:
        note(iter([("max length", max_length, f"{len(input_ids)} tokens, but at most {max_length} are allowed")]))
    if conversation:
        note(_as_encoded(labelled, conversation, template, max_length, truncation))
    else:
        note(PARSERS[template.markers](labelled, template, controls))
    return list(first.values())


def _turn(ids: list[int], position: int, tokenizer: Tokenizer) -> int:
    """Return the number of answers that ended before this position."""
    start = 1 if ids[:1] == [tokenizer.bos_id] else 0
    return ids[start:position].count(tokenizer.eos_id)


# --- for any template ---------------------------------------------------------------------------


def _malformed(ids: Any, labels: Any, tokenizer: Tokenizer) -> Found:
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list):
            yield "row", None, f"{name} is {_kind(values)}, not a list of ids"
            return
        position = next((i for i, value in enumerate(values) if type(value) is not int), None)
        if position is not None:
            yield "row", None, f"{name} has {_kind(values[position])} at position {position}, not an id"
            return
    if not ids:
        yield "row", None, "no tokens at all"
    elif min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        position = next(i for i, token in enumerate(ids) if not 0 <= token < tokenizer.vocab_size)
        yield "row", position, f"id {ids[position]} is not one of the tokenizer's {tokenizer.vocab_size} ids"
    elif len(ids) != len(labels):
        yield "length", None, f"{len(ids)} ids and {len(labels)} labels"


def _not_trained(row: ParsedRow, controls: list[int], template: ChatTemplate, is_known: bool) -> list[int]:
    """The positions of `controls` that may not be trained, whatever the answers are.

    A model's own template may write control tokens inside an answer (gpt-oss, calls of LFM 2). If
    the conversation is known, its segments decide; otherwise those before an answer count.
    """
    if template.markers != "own":
        return [i for i in controls if row.ids[i] != row.tokenizer.eos_id or i < row.start]
    if is_known:
        return []
    before = {row.tokenizer.control_id(segment.control) for segment in template.opening if segment.control}
    return [i for i in controls if row.ids[i] in before | {row.tokenizer.bos_id} - {row.tokenizer.eos_id}]


def _labels(row: ParsedRow, controls: list[int]) -> Found:
    for i, (token, label) in enumerate(zip(row.ids, row.labels, strict=True)):
        if label not in (IGNORE_INDEX, token):
            yield "labels", i, f"{row.piece(i)} has label {label}"
            break
    for i in controls:
        if row.trained(i):
            yield "trained control", i, f"{row.piece(i)} is trained"
    if row.first_trained(1, len(row.ids)) is None:  # the first token is never predicted
        yield "targets", None, f"none of the row's {len(row.ids)} tokens is trained"


def _bos(row: ParsedRow) -> Found:
    bos = row.tokenizer.bos_id
    if bos is None:
        return
    if row.ids[0] != bos:
        yield "bos", 0, f"the row starts with {row.piece(0)}, not with BOS"
    elif bos != row.tokenizer.eos_id and row.ids.count(bos) > 1:
        yield (
            "bos",
            row.ids.index(bos, 1),
            f"BOS again; it occurs {row.ids.count(bos)} times (packed rows need position_ids)",
        )
    elif bos == row.tokenizer.eos_id and row.ids[1:2] == [bos]:
        yield "bos", 1, "BOS again"


# --- when the conversation is known -------------------------------------------------------------


def _as_encoded(
    row: ParsedRow, conversation: Conversation, template: ChatTemplate, max_length: int | None, truncation: str
) -> Found:
    """Compare a row with the segments of its conversation, each encoded alone and completely."""
    tokenizer = row.tokenizer
    expected: list[int] = []
    mask: list[bool] = []
    ends = []  # the position after each answer
    try:
        segments = list(template.segments(conversation))
    except RefusedConversation as reason:
        yield "against", None, f"the template refuses this conversation: {reason}"
        return
    for segment in segments:
        ids = encode_segments([segment], tokenizer)
        expected += ids
        mask += [segment.trained] * len(ids)
        if segment.is_end:
            ends.append(len(expected))
    same = _common_prefix(row.ids, expected)
    if same < len(row.ids):
        wanted = expected[same] if same < len(expected) else None
        is_control = bool({row.ids[same], wanted} & tokenizer.control_ids)
        correct = "no token" if wanted is None else describe(wanted, tokenizer)
        yield "control" if is_control else "text", same, f"{row.piece(same)} is where {correct} should be"
    yield from _mask(row, mask[:same])
    length = len(row.ids)
    if same == length < len(expected):
        next_end = next((end for end in ends if end > length), len(expected))
        at_turn = truncation == "turn" and length in ends and max_length is not None and next_end > max_length
        if not at_turn and (truncation == "drop" or max_length is None or length < max_length):
            yield "cut", length - 1, f"the row ends here, at {length} of the conversation's {len(expected)} tokens"
    yield from _answers(row, template, conversation, whole=length >= len(expected))


def _common_prefix(ids: list[int], expected: list[int]) -> int:
    """Return how many ids are equal from the start."""
    pairs = enumerate(zip(ids, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(expected)))


def _mask(row: ParsedRow, mask: list[bool]) -> Found:
    for i, wanted in enumerate(mask):
        if row.trained(i) and not wanted:
            yield "prompt", i, f"{row.piece(i)} is trained but is not part of a trained answer"
        elif wanted and not row.trained(i):
            # Training stops within the answer or before its EOS, or else it starts too late.
            stops_early = row.ids[i] == row.tokenizer.eos_id or (row.trained(i - 1) and mask[i - 1])
            yield "eos" if stops_early else "whole", i, f"{row.piece(i)} of an answer is not trained"


def _answers(row: ParsedRow, template: ChatTemplate, conversation: Conversation, whole: bool) -> Found:
    answers = [template.trained_text(m.content) for m in template.normalized(conversation.messages) if _is_trained(m)]
    spans = _trained_spans(row)
    may_be_fewer = template.markers == "own"  # an answer that such a template changes is not trained
    remaining = iter(answers)
    for start, end in spans:
        complete = row.ids[end - 1] == row.tokenizer.eos_id
        spelt = row.spelt(start, end - complete)
        candidates = remaining if may_be_fewer else itertools.islice(remaining, 1)
        answer = next((a for a in candidates if not may_be_fewer or not complete or _contains(spelt, a)), None)
        if answer is None and not may_be_fewer:
            break  # more spans than answers, as counted below
        if answer is None:
            yield "answers", start, f"the trained text is no answer: {spelt[:40].decode(errors='replace')!r}"
            break
        if not may_be_fewer and not _spells(spelt, answer, row.tokenizer, complete or end < len(row.ids)):
            shown = spelt[:40].decode(errors="replace")
            yield "answers", start, f"the trained text is {shown!r}, but the answer is {answer[:40]!r}"
        elif (
            complete and row.tokenizer.unk_id not in row.ids[start:end] and _letters(spelt) < _letters(answer.encode())
        ):
            shown = spelt[:40].decode(errors="replace")
            yield "answers", start, f"letters of the answer have no token: {shown!r} is trained"
    if len(spans) > len(answers) or (whole and len(spans) < len(answers) and not may_be_fewer):
        yield "answers", None, f"{len(spans)} trained spans, but {len(answers)} answers to train"


def _contains(spelt: bytes, answer: str) -> bool:
    """Whether a trained text has the answer in it, white space aside: a template may write more around it."""
    return "".join(answer.split()) in "".join(spelt.decode(errors="replace").split())


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.trained


def _trained_spans(row: ParsedRow) -> list[tuple[int, int]]:
    """Return (start, end) of each run of trained tokens; an EOS also ends a run."""
    spans = []
    start: int | None = None
    for i, (token, label) in enumerate(zip(row.ids, row.labels, strict=True)):
        if label == IGNORE_INDEX:
            if start is not None:
                spans.append((start, i))
            start = None
            continue
        start = i if start is None else start
        if token == row.tokenizer.eos_id:
            spans.append((start, i + 1))
            start = None
    return spans if start is None else [*spans, (start, len(row.ids))]


def _spells(spelt: bytes, answer: str, tokenizer: Tokenizer, complete: bool) -> bool:
    """Whether `spelt` is the answer, or its beginning if not `complete`.

    The template or the tokenizer may add one space before it.
    """

    def fits(text: bytes) -> bool:
        variants = (text, b" " + text)
        return spelt in variants if complete else any(variant.startswith(spelt) for variant in variants)

    if fits(answer.encode()) or fits(answer.replace("▁", " ").encode()):  # SentencePiece writes `▁` for a space
        return True
    # Some tokenizers change text (lower case, NFC, unknown tokens): compare with their output.
    return tokenizer.continues_text and fits(
        b"".join(map(tokenizer.token_bytes, tokenizer.encode(answer, after="text")))
    )


def _letters(text: bytes) -> int:
    """The number of letters and digits, however accents are written."""
    return sum(map(str.isalnum, unicodedata.normalize("NFKC", text.decode(errors="ignore"))))


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
