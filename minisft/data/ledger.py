"""Count what happens to every row and token between the data file and the loss.

Each stage counts its rows and tokens, and each dropped or repaired row is counted under a reason.
The ledger keeps only counts and the first few ids per reason, so it stays small for any data set.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

FIRST = 5  # row ids kept per reason
MOST = 200  # distinct reasons, keys or lines kept; a damaged file may have a new unknown role in every row


class UnusableRow(ValueError):
    """Why a raw row yields no conversation; the message becomes a reason in the ledger."""


@dataclass
class Stage:
    """Rows and tokens after one step.

    `tokens` counts encoded text in tokens; `characters` counts text that is not encoded (yet).
    """

    rows: int = 0
    tokens: int = 0
    characters: int = 0


@dataclass
class Reason:
    """How many rows a reason applies to, and the ids of the first few."""

    rows: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """Rows and tokens at each stage, and a count for every reason for a loss or repair.

    `stages` is in processing order: raw, cleaned, …, templated, truncated, trained. Text that was
    never encoded (the cut part of a long conversation, a dropped row) adds its characters to a
    stage; `tokens` converts them at the ratio measured on encoded text and marks the count as
    estimated. `unread` counts, by key, the kept rows with a key that nothing reads. `lost`
    describes data that a damaged file withheld, and `notes` holds other remarks.
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
        """Add rows, and their encoded tokens or unencoded characters, to a stage."""
        entry = self.stages[stage]
        entry.rows += rows
        entry.tokens += tokens
        entry.characters += characters

    def drop(self, reason: str, row: str) -> None:
        """Count the row with id `row` as dropped."""
        _add(self.dropped, reason, row)

    def repair(self, reason: str, row: str) -> None:
        """Count one repair of the row with id `row`."""
        _add(self.repaired, reason, row)

    def leave_unread(self, key: str, row: str) -> None:
        """Count a key that nothing reads in the row with id `row`."""
        _add(self.unread, key, row, "other keys")

    def lose(self, what: str) -> None:
        """Record data that could not be read, as a sentence."""
        _append(self.lost, what)

    def note(self, what: str) -> None:
        """Record any other remark, as a sentence."""
        _append(self.notes, what)

    @property
    def tokens_per_character(self) -> float | None:
        """The ratio measured on all text encoded so far; None before any text was encoded."""
        return self.encoded_tokens / self.encoded_characters if self.encoded_characters else None

    def tokens(self, stage: str) -> int | None:
        """The tokens of a stage, with unencoded text converted at the measured ratio.

        None if the stage has unencoded text and no ratio was measured.
        """
        entry = self.stages.get(stage, Stage())
        if not entry.characters:
            return entry.tokens
        ratio = self.tokens_per_character
        return None if ratio is None else entry.tokens + round(entry.characters * ratio)

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON values.

        `{"stages": {name: {"rows", "tokens", "estimated"}}, "dropped": {reason: {"rows",
        "first"}}, …}`
        """

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
        for title, reasons in (("dropped", self.dropped), ("repaired", self.repaired), ("not read", self.unread)):
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1].rows):
                lines.append(f"{count.rows:>11,} {'':>15}  {title}: {reason}")
        lines += [f"{'lost':>11} {'':>15}  {what}" for what in self.lost]
        lines += [f"{'note':>11} {'':>15}  {what}" for what in self.notes]
        if any(entry.characters for entry in self.stages.values()) and self.tokens_per_character:
            lines.append("≈ includes unencoded text, estimated at the tokens per character of the encoded text")
        return "\n".join(lines)


def _add(entries: dict[str, Reason], reason: str, row: str, others: str = "another reason") -> None:
    entry = entries[reason if reason in entries or len(entries) < MOST else others]
    entry.rows += 1
    if len(entry.first) < FIRST:
        entry.first.append(row)


def _append(lines: list[str], line: str) -> None:
    """Add a line unless it is a duplicate or the list is full (folders may have many files)."""
    if line not in lines and len(lines) < MOST:
        lines.append(line)
