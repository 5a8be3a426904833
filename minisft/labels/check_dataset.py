"""The invariants on whole data sets: conversations, encoded here and checked, or rows that any tool tokenized.

Both entry points stream, and give a `CheckReport`: per invariant how many rows were checked and how many failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from minisft.chat.mistral_reference import reference
from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation, one_per_answer, only_last_answer
from minisft.data.download import Say
from minisft.data.ledger import FIRST, Ledger
from minisft.errors import UserError
from minisft.labels.encode_dataset import encode_stream, require_max_length, require_train_on
from minisft.labels.encode_row import IGNORE_INDEX, Row, encode, require_truncation
from minisft.labels.invariants import ALWAYS, INVARIANTS, KNOWN, Violation, check_row
from minisft.labels.pretokenized import RawRow

STEP = 2000  # rows between two lines of progress


@dataclass
class Tally:
    """One invariant: rows checked, rows failed, and the first few violations."""

    checked: int = 0
    failed: int = 0
    first: list[Violation] = field(default_factory=list)


@dataclass
class CheckReport:
    """What a check found. `ok` if every invariant holds for every row."""

    rows: int = 0
    invariants: dict[str, Tally] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not any(tally.failed for tally in self.invariants.values())

    def add(self, checked: Iterable[str], violations: Iterable[Violation]) -> None:
        """Count one row: the invariants it was checked for, and those it violates."""
        self.rows += 1
        for name in checked:
            self.invariants.setdefault(name, Tally()).checked += 1
        for violation in violations:
            tally = self.invariants.setdefault(violation.invariant, Tally())
            tally.failed += 1
            if len(tally.first) < FIRST:
                tally.first.append(violation)

    def to_dict(self) -> dict[str, Any]:
        """`{"ok", "rows", "invariants": {name: {"means", "checked", "failed", "first": […], "mend"}}}`"""
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
            lines += [f"{'':>21} to mend: {INVARIANTS[name][1]}"] if tally.failed else []
        lines.append(f"{self.rows:,} rows: " + ("every invariant holds" if self.ok else "NOT all invariants hold"))
        return "\n".join(lines)

    def _in_order(self) -> list[tuple[str, Tally]]:
        return [(name, self.invariants[name]) for name in INVARIANTS if name in self.invariants]


# --- conversations -----------------------------------------------------------------------------------------


def check_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int = 2048,
    truncation: str = "token",
    train_on: str = "all",
    say: Say | None = None,
) -> CheckReport:
    """Encode conversations as training does, and check every row against the conversation it came from.

    With one of Mistral's own tokenizers ids and masks are also compared with mistral-common's. `say` takes lines of
    progress. Raises `UserError` for settings that cannot work, and if not a single row is left to check.
    """
    report, ledger = CheckReport(), Ledger()
    names = [*ALWAYS, "max length", *KNOWN]
    waiting: deque[Conversation] = deque()  # what was read and has not come back as a row

    def watched() -> Iterator[Conversation]:
        for conversation in conversations:
            waiting.extend(_as_trained(conversation, train_on))
            yield conversation

    rows = encode_stream(
        watched(), template, tokenizer, max_length=max_length, ledger=ledger, truncation=truncation, train_on=train_on
    )
    for row in rows:
        while (conversation := waiting.popleft()).id != row.id:
            pass  # it was dropped: no row, nothing to check
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
        expected = _expected(conversation, tokenizer)
        if expected:
            violations += _compared(row, *expected, tokenizer)
        report.add([*names, "reference"] if expected else names, violations)
        _progress(report, say)
    if not report.rows:
        why = ", ".join(f"{reason} ({entry.rows})" for reason, entry in ledger.dropped.items()) or "no conversations"
        raise UserError(f"no row is left to check: {why}; give a larger --max-length or other data")
    return report


def _as_trained(conversation: Conversation, train_on: str) -> list[Conversation]:
    if train_on == "each":
        return list(one_per_answer(conversation))
    return [only_last_answer(conversation) if train_on == "last" else conversation]


def _expected(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]] | None:
    if not tokenizer.name.startswith("mistral:"):
        return None
    try:
        return reference(conversation, tokenizer.template_name)
    except UserError:  # an empty answer: mistral-common has no ids for it
        return None


def _compared(row: Row, ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> Iterator[Violation]:
    """The row against the first ids of the reference, as far as the row goes."""
    labels = [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)]
    yield from _differences(row, ids, labels, "reference", "mistral-common", tokenizer)


def _differences(
    row: Row, ids: list[int], labels: list[int], invariant: str, whose: str, tokenizer: Tokenizer
) -> Iterator[Violation]:
    for name, ours, theirs in (("id", row.input_ids, ids), ("label", row.labels, labels)):
        for i, found in enumerate(ours):
            wanted = theirs[i] if i < len(theirs) else "nothing"
            if found != wanted:
                turn = row.input_ids[1:i].count(tokenizer.eos_id)
                yield Violation(row.id, turn, i, invariant, f"{name} {found}, and {whose} has {wanted}")
                return


# --- rows that are tokenized already -----------------------------------------------------------------------


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
    """Check rows of ids and labels, whichever tool made them.

    Only a row of `max_length` tokens may lack its last EOS. Without `max_length` the longest row counts as full, and
    `rows` is gone through twice. `against` has the conversations that the rows were made of, by id: then ids and
    labels must equal what `labels.encode` gives with the same `max_length`, `truncation` and `train_on`. Best in the
    rows' order: what is passed over stays in memory. Raises `UserError` if rows have no ids and `against` is given.
    """
    require_truncation(truncation)
    require_train_on(train_on)
    if max_length is not None:
        require_max_length(max_length)
    report = CheckReport()
    limited = max_length is not None
    if not limited:
        rows = rows if iter(rows) is not rows else list(rows)
        max_length = max((len(row.input_ids) for row in rows if isinstance(row.input_ids, list)), default=0)
    source = None if against is None else _ById(against, train_on)
    for raw in rows:
        name = raw.id or raw.where
        if raw.problem:
            report.add(["row"], [Violation(name, None, None, "row", raw.problem)])
            continue
        if source and raw.id is None:
            raise UserError(f"{raw.where} has no id: comparing with conversations needs their ids in a column id")
        conversation = source.find(raw.id) if source else None
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
        if source and not any(v.invariant in ("row", "length") for v in violations):
            violations += _against(name, raw, conversation, template, tokenizer, max_length, truncation)
        names = [*ALWAYS, *(["max length"] if limited else []), *([*KNOWN, "against"] if source else [])]
        report.add(names, violations)
        _progress(report, say)
    return report


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
    ours = encode(conversation, template, tokenizer, max_length, truncation)
    found = Row(name, raw.input_ids, raw.labels)
    differences = list(_differences(found, ours.input_ids, ours.labels, "against", "minisft encode", tokenizer))
    if not differences and len(raw.input_ids) < len(ours.input_ids):
        last = len(raw.input_ids) - 1
        message = f"the row ends here, and minisft encode has {len(ours.input_ids)} tokens"
        return [Violation(name, raw.input_ids[1:last].count(tokenizer.eos_id), last, "against", message)]
    return differences


class _ById:
    """Finds conversations by id. Reads on only as far as it must, and keeps only what it passed over."""

    def __init__(self, conversations: Iterable[Conversation], train_on: str):
        self._rest = iter(conversations)
        self._train_on = train_on
        self._passed: dict[str, Conversation] = {}

    def find(self, row_id: str) -> Conversation | None:
        while row_id not in self._passed:
            conversation = next(self._rest, None)
            if conversation is None:
                return None
            self._passed |= {part.id: part for part in _as_trained(conversation, self._train_on)}
        return self._passed.pop(row_id)


def _progress(report: CheckReport, say: Say | None) -> None:
    if say and report.rows % STEP == 0:
        failed = sum(tally.failed for tally in report.invariants.values())
        say(f"{report.rows:,} rows checked, {failed:,} violations")
