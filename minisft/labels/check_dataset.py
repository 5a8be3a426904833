"""Check the invariants on whole data sets: conversations encoded here, or rows from any tool.

Both entry points stream their input and return a `CheckReport`, which counts checked and failed
rows per invariant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from minisft.chat.template import ChatTemplate, RefusedConversation
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation, one_per_answer, only_last_answer
from minisft.data.download import Say
from minisft.data.ledger import FIRST, Ledger
from minisft.errors import UserError
from minisft.labels.encode_dataset import encode_stream, require_max_length, require_train_on
from minisft.labels.encode_row import IGNORE_INDEX, Row, encode, require_truncation
from minisft.labels.invariants import ALWAYS, INVARIANTS, KNOWN, Violation, check_row
from minisft.labels.pretokenized import RawRow
from minisft.labels.references import has_control_key, mistral_row, transformers_prompt

STEP = 2000  # rows between two progress lines


@dataclass
class Tally:
    """Rows checked and failed for one invariant, and the first few violations."""

    checked: int = 0
    failed: int = 0
    first: list[Violation] = field(default_factory=list)


@dataclass
class CheckReport:
    """The result of a check: the number of rows, and a tally per invariant that was checked."""

    rows: int = 0
    invariants: dict[str, Tally] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no row violates an invariant."""
        return not any(tally.failed for tally in self.invariants.values())

    def add(self, checked: Iterable[str], violations: Iterable[Violation], rows: int = 1) -> None:
        """Count one row, or none: the names of the invariants checked, and the violations found."""
        self.rows += rows
        for name in checked:
            self.invariants.setdefault(name, Tally()).checked += 1
        for violation in violations:
            tally = self.invariants.setdefault(violation.invariant, Tally())
            tally.failed += 1
            if len(tally.first) < FIRST:
                tally.first.append(violation)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON.

        `{"ok", "rows", "invariants": {name: {"means", "checked", "failed", "first": […],
        "mend"}}}`, where `mend` says how to fix violations.
        """
        invariants = {
            name: {"means": INVARIANTS[name][0], **asdict(tally), "mend": INVARIANTS[name][1]}
            for name, tally in self._in_order()
        }
        return {"ok": self.ok, "rows": self.rows, "invariants": invariants}

    def __str__(self) -> str:
        lines = [f"{'checked':>9} {'failed':>9}"]
        for name, tally in self._in_order():
            lines.append(f"{tally.checked:>9,} {tally.failed:>9,}  {name}: {INVARIANTS[name][0]}")
            lines += [f"{'':>21} {violation}" for violation in tally.first]
            lines += [f"{'':>21} … and {tally.failed - FIRST:,} rows more"] if tally.failed > FIRST else []
            lines += [f"{'':>21} to fix: {INVARIANTS[name][1]}"] if tally.failed else []
        lines.append(f"{self.rows:,} rows: " + ("every invariant holds" if self.ok else "NOT all invariants hold"))
        return "\n".join(lines)

    def _in_order(self) -> list[tuple[str, Tally]]:
        return [(name, self.invariants[name]) for name in INVARIANTS if name in self.invariants]


# --- conversations ------------------------------------------------------------------------------


def check_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int = 2048,
    truncation: str = "token",
    train_on: str = "all",
    say: Say | None = None,
    ledger: Ledger | None = None,
) -> CheckReport:
    """Encode conversations as training does, and check every row against its conversation.

    With one of Mistral's own tokenizers, ids and masks are also compared with those of
    mistral-common; with a model's own template, the ids before the first trained answer with the
    prompt of plain transformers. `say` prints progress, and `ledger` counts the rows that are dropped. Raises
    `UserError` for invalid settings, and if no row is left to check.
    """
    report, ledger = CheckReport(), ledger or Ledger()
    names = [*_always(template), "max length", *KNOWN]
    pending: deque[Conversation] = deque()  # conversations read, whose rows have not been returned yet

    def tracked() -> Iterator[Conversation]:
        for conversation in conversations:
            pending.extend(_as_trained(conversation, train_on))
            yield conversation

    rows = encode_stream(
        tracked(), template, tokenizer, max_length=max_length, ledger=ledger, truncation=truncation, train_on=train_on
    )
    for row in rows:
        while (conversation := pending.popleft()).id != row.id:
            pass  # this conversation was dropped and has no row
        violations = check_row(
            row.id,
            row.input_ids,
            row.labels,
            template,
            tokenizer,
            max_length=max_length,
            conversation=conversation,
            truncation=truncation,
        )
        expected = mistral_row(conversation, tokenizer)
        if expected:
            ids, mask = expected
            labels = [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)]
            # The reference is not truncated, so only its first ids are compared.
            violations += _differences(row, ids, labels, "reference", "mistral-common", tokenizer)
        has_prompt = template.markers == "own" and template.same_at_every_turn(conversation)
        has_prompt = has_prompt and not has_control_key(conversation, tokenizer)
        if has_prompt:
            violations += _prompt_differences(row, conversation, template, tokenizer)
        report.add([*names, "reference"] if expected or has_prompt else names, violations)
        _progress(report, say)
    if not report.rows:
        reasons = ", ".join(f"{reason} ({entry.rows})" for reason, entry in ledger.dropped.items())
        raise UserError(
            f"no row is left to check: {reasons or 'no conversations'}; give a larger --max-length or other data"
        )
    return report


def _always(template: ChatTemplate) -> list[str]:
    """The invariants of every row; a model's own template decides itself about BOS."""
    return [name for name in ALWAYS if name != "bos" or template.markers != "own"]


def _as_trained(conversation: Conversation, train_on: str) -> list[Conversation]:
    if train_on == "each":
        return list(one_per_answer(conversation))
    return [only_last_answer(conversation) if train_on == "last" else conversation]


def _prompt_differences(
    row: Row, conversation: Conversation, template: ChatTemplate, tokenizer: Any
) -> Iterator[Violation]:
    """Yield the first difference between the ids before the first trained answer and its prompt at inference.

    The prompt is that of plain transformers.
    """
    try:
        prompt = transformers_prompt(conversation, template, tokenizer)
    except RefusedConversation as reason:
        yield Violation(row.id, 0, None, "reference", f"plain transformers makes no prompt: {reason}")
        return
    begin = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), len(row.labels))
    before = Row(row.id, row.input_ids[:begin], [IGNORE_INDEX] * begin)
    labels = [IGNORE_INDEX] * len(prompt)
    differences = list(_differences(before, prompt, labels, "reference", "plain transformers", tokenizer))
    yield from differences
    if not differences and begin < min(len(prompt), len(row.input_ids)):
        yield Violation(row.id, 0, begin, "reference", f"trained from here, but the prompt has {len(prompt)} tokens")


def _differences(
    row: Row, ids: list[int], labels: list[int], invariant: str, source: str, tokenizer: Tokenizer
) -> Iterator[Violation]:
    """Yield the first difference between the row and `ids` and `labels`, which `source` made."""
    for name, actual, expected in (("id", row.input_ids, ids), ("label", row.labels, labels)):
        for i, value in enumerate(actual):
            wanted = expected[i] if i < len(expected) else "nothing"
            if value != wanted:
                turn = row.input_ids[1:i].count(tokenizer.eos_id)
                yield Violation(row.id, turn, i, invariant, f"{name} {value}, but {source} has {wanted}")
                return


# --- rows that are already tokenized ------------------------------------------------------------


def check_tokenized(
    rows: Iterable[RawRow],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    truncation: str = "token",
    train_on: str = "all",
    against: Iterable[Conversation] | None = None,
    say: Say | None = None,
) -> CheckReport:
    """Check rows of ids and labels from any tool.

    Only a row of `max_length` tokens may lack its last EOS. Without `max_length`, rows as long as
    the longest row count as full, and `rows` is iterated twice. `against` are the conversations
    that the rows were made from: ids and labels must then equal those of `labels.encode` with the
    same `max_length`, `truncation` and `train_on`. They are matched by id, best in the order of the
    rows, because skipped conversations stay in memory. Raises `UserError` for invalid settings, and
    if `against` is given and a row has no id.
    """
    require_truncation(truncation)
    require_train_on(train_on)
    report = CheckReport()
    limited = max_length is not None
    if max_length is None:
        rows = rows if iter(rows) is not rows else list(rows)  # an iterator can be read only once
        max_length = max((len(row.input_ids) for row in rows if isinstance(row.input_ids, list)), default=0)
    else:
        require_max_length(max_length)
    source = None if against is None else _ById(against, train_on)
    for raw in rows:
        name = raw.id or raw.where
        if raw.problem:
            report.add(["row"], [Violation(name, None, None, "row", raw.problem)])
            continue
        conversation = None
        if source:
            if raw.id is None:
                raise UserError(f"{raw.where} has no id: to compare rows with conversations, add a column id")
            conversation = source.find(raw.id)
        violations = check_row(
            name,
            raw.input_ids,
            raw.labels,
            template,
            tokenizer,
            max_length=max_length,
            conversation=conversation,
            truncation=truncation,
        )
        if source and not any(v.invariant in ("row", "length", "against") for v in violations):
            violations += _against(name, raw, conversation, template, tokenizer, max_length, truncation)
        names = [*_always(template), *(["max length"] if limited else []), *([*KNOWN, "against"] if source else [])]
        report.add(names, violations)
        _progress(report, say)
    for conversation in source.remaining() if source else ():
        if _has_row(conversation, template, tokenizer, max_length, truncation):
            missing = Violation(conversation.id, None, None, "against", "this conversation has no row")
            report.add(["against"], [missing], rows=0)
    return report


def _has_row(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, max_length: int, truncation: str
) -> bool:
    """Whether encoding a conversation gives a row with a trained token."""
    with suppress(RefusedConversation):
        return encode(conversation, template, tokenizer, max_length, truncation).trained > 0
    return False


def _against(
    name: str,
    raw: RawRow,
    conversation: Conversation | None,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    truncation: str,
) -> list[Violation]:
    if conversation is None:
        return [Violation(name, None, None, "against", "no conversation has this id")]
    expected = encode(conversation, template, tokenizer, max_length, truncation)
    row = Row(name, raw.input_ids, raw.labels)
    differences = list(_differences(row, expected.input_ids, expected.labels, "against", "minisft encode", tokenizer))
    if not differences and len(raw.input_ids) < len(expected.input_ids):
        last = len(raw.input_ids) - 1
        message = f"the row ends here, but minisft encode gives {len(expected.input_ids)} tokens"
        return [Violation(name, raw.input_ids[1:last].count(tokenizer.eos_id), last, "against", message)]
    return differences


class _ById:
    """Finds conversations by id; reads no further than necessary, and keeps only skipped ones."""

    def __init__(self, conversations: Iterable[Conversation], train_on: str):
        self._unread = iter(conversations)
        self._train_on = train_on
        self._skipped: dict[str, Conversation] = {}

    def remaining(self) -> Iterator[Conversation]:
        """Yield the conversations that no row was found for."""
        yield from self._skipped.values()
        for conversation in self._unread:
            yield from _as_trained(conversation, self._train_on)

    def find(self, row_id: str) -> Conversation | None:
        """Return the conversation of a row, once; None if there is none with this id."""
        while row_id not in self._skipped:
            conversation = next(self._unread, None)
            if conversation is None:
                return None
            self._skipped |= {part.id: part for part in _as_trained(conversation, self._train_on)}
        return self._skipped.pop(row_id)


def _progress(report: CheckReport, say: Say | None) -> None:
    if say and report.rows % STEP == 0:
        failed = sum(tally.failed for tally in report.invariants.values())
        say(f"{report.rows:,} rows checked, {failed:,} violations")
