"""The ledger: what happened to every row and every token between the file and the loss.

Each stage counts rows and tokens; each row that leaves, and each that was mended, has a line with its reason. The
ledger keeps counts and the first few ids of a reason, so it stays small however large the data set is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

FIRST = 5  # ids that a reason names
MOST = 200  # different reasons, keys or lines; a damaged file may have an unknown role in every row


@dataclass
class Stage:
    """Rows and tokens after one step. `tokens` counts what was encoded; `characters` what was not (yet)."""

    rows: int = 0
    tokens: int = 0
    characters: int = 0


@dataclass
class Reason:
    """How many rows it concerns, and the first few of them by id."""

    rows: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """Rows and tokens through each stage, and every reason for a loss or a repair.

    `stages` is in the order of the work: raw, cleaned, …, templated, truncated, trained. Text that was never encoded
    (a long conversation's rest, a dropped row) enters a stage's token count by its characters, at the ratio measured
    on the text that was encoded; such a count is marked as estimated. `unread` counts the rows that were kept and have
    a key that nothing reads, by its name. `lost` says what a damaged file withheld, and `notes` what else to know.
    """

    stages: dict[str, Stage] = field(default_factory=lambda: defaultdict(Stage))
    dropped: dict[str, Reason] = field(default_factory=lambda: defaultdict(Reason))
    repaired: dict[str, Reason] = field(default_factory=lambda: defaultdict(Reason))
    unread: dict[str, Reason] = field(default_factory=lambda: defaultdict(Reason))
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    encoded_tokens: int = 0
    encoded_characters: int = 0

    def count(self, stage: str, rows: int = 1, tokens: int = 0, characters: int = 0) -> None:
        entry = self.stages[stage]
        entry.rows += rows
        entry.tokens += tokens
        entry.characters += characters

    def drop(self, reason: str, row: str) -> None:
        _add(self.dropped, reason, row)

    def repair(self, reason: str, row: str) -> None:
        _add(self.repaired, reason, row)

    def leave_unread(self, key: str, row: str) -> None:
        _add(self.unread, key, row, "other keys")

    def lose(self, what: str) -> None:
        _append(self.lost, what)

    def note(self, what: str) -> None:
        _append(self.notes, what)

    @property
    def tokens_per_character(self) -> float | None:
        """Measured on the text that was encoded so far; None before any was."""
        return self.encoded_tokens / self.encoded_characters if self.encoded_characters else None

    def tokens(self, stage: str) -> int | None:
        """The tokens of a stage, unencoded text included at the measured ratio; None if nothing was encoded."""
        entry = self.stages.get(stage, Stage())
        if not entry.characters:
            return entry.tokens
        ratio = self.tokens_per_character
        return None if ratio is None else entry.tokens + round(entry.characters * ratio)

    def to_dict(self) -> dict[str, Any]:
        """`{"stages": {name: {"rows", "tokens", "estimated"}}, "dropped": {reason: {"rows", "first"}}, …}`"""

        def reasons(entries: dict[str, Reason]) -> dict[str, Any]:
            return {name: {"rows": entry.rows, "first": entry.first} for name, entry in entries.items()}

        stages = {
            name: {"rows": entry.rows, "tokens": self.tokens(name), "estimated": entry.characters > 0}
            for name, entry in self.stages.items()
        }
        return {
            "stages": stages,
            "dropped": reasons(self.dropped),
            "repaired": reasons(self.repaired),
            "unread": reasons(self.unread),
            "lost": self.lost,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"{'rows':>11} {'tokens':>15}"]
        for name, entry in self.stages.items():
            tokens = self.tokens(name)
            shown = "" if tokens is None else f"{'≈ ' if entry.characters else ''}{tokens:,}"
            lines.append(f"{entry.rows:>11,} {shown:>15}  {name}")
        for title, entries in (("dropped", self.dropped), ("mended", self.repaired), ("not read", self.unread)):
            for reason, entry in sorted(entries.items(), key=lambda item: -item[1].rows):
                lines.append(f"{entry.rows:>11,} {'':>15}  {title}: {reason}")
        lines += [f"{'lost':>11} {'':>15}  {what}" for what in self.lost]
        lines += [f"{'note':>11} {'':>15}  {what}" for what in self.notes]
        if any(entry.characters for entry in self.stages.values()) and self.tokens_per_character:
            lines.append("≈ counts text that was not encoded at the tokens per character of the text that was")
        return "\n".join(lines)


def _add(entries: dict[str, Reason], reason: str, row: str, others: str = "another reason") -> None:
    entry = entries[reason if reason in entries or len(entries) < MOST else others]
    entry.rows += 1
    if len(entry.first) < FIRST:
        entry.first.append(row)


def _append(lines: list[str], line: str) -> None:
    """Once each, and not without end: a folder may have any number of files."""
    if line not in lines and len(lines) < MOST:
        lines.append(line)
