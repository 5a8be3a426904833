"""ShareGPT conversations: reading them from dirty files, cleaning them, splitting them, and accounting for it.

Every row that a file holds ends up in exactly one place of the `Ledger`: kept, or dropped for a counted reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisft.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
BAD_LINE = "line is not valid JSON"
SHAREGPT_SHAPE = '{"id": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is `system`, `user` or `assistant`; `content` is untrusted text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What remains after cleaning: system prompts, then user and assistant in turn, an answer last."""

    id: str
    messages: tuple[Message, ...]

    @property
    def characters(self) -> int:
        return sum(len(m.content) for m in self.messages)

    def to_sharegpt(self) -> dict[str, Any]:
        """The row in ShareGPT's own shape, for writing it back to a file."""
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [{"from": names[m.role], "value": m.content} for m in self.messages]
        return {"id": self.id, "conversations": turns}


@dataclass
class Ledger:
    """What happened to every row, with the first few ids for each reason, so that nothing vanishes silently.

    `stages` maps a stage (`read`, `cleaned`, `train`, …) to the number of rows after it. `dropped` and
    `repaired` map a reason to the ids of the rows it concerns. `lost` says what a damaged file withheld.
    """

    stages: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    repaired: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    lost: str | None = None

    def drop(self, reason: str, row: str) -> None:
        self.dropped[reason].append(row)

    def repair(self, reason: str, row: str) -> None:
        self.repaired[reason].append(row)

    def to_dict(self) -> dict[str, Any]:
        def counted(rows: dict[str, list[str]]) -> dict[str, Any]:
            return {reason: {"rows": len(ids), "first": ids[:5]} for reason, ids in rows.items()}

        return {
            "stages": self.stages,
            "dropped": counted(self.dropped),
            "repaired": counted(self.repaired),
            "lost": self.lost,
        }

    def __str__(self) -> str:
        lines = [f"{count:>9,}  {stage}" for stage, count in self.stages.items()]
        for title, rows in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, ids in sorted(rows.items(), key=lambda item: -len(item[1])):
                lines.append(f"{len(ids):>9,}  {title}: {reason}")
        return "\n".join(lines + ([f"     lost  {self.lost}"] if self.lost else []))


# --- reading -----------------------------------------------------------------------------------------------


def read(path: Path | str, ledger: Ledger) -> list[Conversation]:
    """Every usable conversation of a ShareGPT file (JSON, JSONL, Parquet) or of a folder of such files.

    A JSON list that is cut off is read up to its last whole row, and `ledger.lost` says so. Raises `UserError`
    if the path is missing, empty, no JSON, of another shape, or without a single usable conversation.
    """
    path = Path(path)
    seen: set[str] = set()
    kept = []
    rows = 0
    for where, row in _rows_of(path, ledger):
        if rows == 0:
            _require_sharegpt(row, where)
        rows += 1
        conversation = clean(row, where, ledger)
        if conversation is None:
            continue
        if conversation.id in seen:  # ids name rows in every later message, so they must be unique
            ledger.repair("id seen before: numbered", conversation.id)
            numbered = (f"{conversation.id}#{n}" for n in itertools.count(2))
            conversation = Conversation(next(i for i in numbered if i not in seen), conversation.messages)
        seen.add(conversation.id)
        kept.append(conversation)
    ledger.stages["read from the file"] = rows + len(ledger.dropped.get(BAD_LINE, []))
    ledger.stages["usable conversations"] = len(kept)
    if not kept:
        why = ", ".join(f"{reason} ({len(ids)})" for reason, ids in ledger.dropped.items()) or ledger.lost or "no rows"
        raise UserError(f"{path} has no usable conversation: {why}; each needs a question and its answer")
    return kept


def _rows_of(path: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in {".json", ".jsonl", ".parquet"} and p.is_file())
        files = [p for p in files if not p.name.startswith("dataset_info")]  # the hub's own description of the data
        if not files:
            raise UserError(f"folder {path} has no .json, .jsonl or .parquet file: give a file of conversations")
    else:
        files = [path]
    for file in files:
        if not file.exists():
            raise UserError(f"data file {file} does not exist: check the path, or use --data sharegpt")
        if file.stat().st_size == 0:
            raise UserError(f"data file {file} is empty: fetch or export it again")
        yield from _rows_of_file(file, ledger)


def _rows_of_file(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        yield from _rows_of_parquet(file)
        return
    match head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
        case b"[":
            yield from _rows_of_list(file, ledger)
        case b"{":
            yield from _rows_of_lines(file, ledger)
        case b"":
            raise UserError(f"data file {file} is empty: fetch or export it again")
        case _:
            raise UserError(f"data file {file} is not JSON, JSON lines or Parquet: it starts with {head[:20]!r}")


def _rows_of_list(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    import ijson

    index = 0
    with file.open("rb") as stream:
        if stream.read(3) != b"\xef\xbb\xbf":
            stream.seek(0)
        try:
            for row in ijson.items(stream, "item", use_float=True):
                yield f"{file.name} row {index}", row
                index += 1
        except (ijson.JSONError, UnicodeDecodeError) as error:
            if index == 0:
                raise UserError(f"data file {file} is not JSON: {_one_line(error)}") from error
            ledger.lost = (f"{ledger.lost}; " if ledger.lost else "") + (
                f"{file.name} is cut off or damaged after {index:,} whole rows ({_one_line(error)}); "
                "what follows could not be read"
            )


def _rows_of_lines(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file.name} line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == 1:
                    row = _single_object(file, error)
                    yield where, row
                    return
                ledger.drop(BAD_LINE, where)
                continue
            yield where, row


def _single_object(file: Path, error: Exception) -> Any:
    """A file that opens with `{` but not a whole line of it: one pretty-printed object, or no JSON at all."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"data file {file} is not JSON: line 1, {_one_line(error)}") from error


def _rows_of_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        index = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{file.name} row {index}", row
                index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {file} is damaged Parquet ({_one_line(error)}): fetch it again") from error


def _require_sharegpt(row: Any, where: str) -> None:
    """Refuse a file of another shape by its first row, and name the shape."""
    if isinstance(row, dict) and isinstance(row.get("conversations"), list):
        return
    if not isinstance(row, dict):
        shape = f"a {type(row).__name__}, not an object"
    elif "messages" in row:
        shape = 'the messages shape ("role"/"content")'
    elif "instruction" in row:
        shape = 'the Alpaca shape ("instruction"/"output")'
    else:
        shape = f"an object with the keys {', '.join(map(repr, list(row)[:6])) or '(none)'}"
    raise UserError(f"{where} is {shape}, not ShareGPT: convert each row to {SHAREGPT_SHAPE}")


def _one_line(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].strip()


# --- cleaning ----------------------------------------------------------------------------------------------


def clean(row: Any, where: str, ledger: Ledger) -> Conversation | None:
    """One raw row -> a conversation that alternates and ends in an answer, or None with a line in the ledger."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    row_id = _encodable(str(row.get("id") or where)) if isinstance(row, dict) else where
    if not isinstance(turns, list):
        return ledger.drop("no list of conversations", row_id)
    if not turns:
        return ledger.drop("empty conversation", row_id)
    messages = []
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            return ledger.drop("a turn without role and text", row_id)
        role = ROLES.get(turn["from"].strip().lower())
        if role is None:
            return ledger.drop(f"unknown role {turn['from'][:20]!r}", row_id)
        messages.append(Message(role, _whole_characters(turn["value"], row_id, ledger)))

    system = [m for m in messages if m.role == "system" and not _is_blank(m.content)]
    spoken = [m for m in messages if m.role != "system"]
    if spoken and spoken[0].role == "assistant":
        ledger.repair("answer before any question: removed", row_id)
        while spoken and spoken[0].role == "assistant":
            spoken.pop(0)
    filled = list(itertools.takewhile(lambda m: not _is_blank(m.content), spoken))
    if len(filled) < len(spoken):
        ledger.repair("empty turn: cut there", row_id)
        spoken = filled
    joined: list[Message] = []
    for turn in spoken:
        if joined and joined[-1].role == turn.role:
            joined[-1] = Message(turn.role, joined[-1].content + "\n\n" + turn.content)
        else:
            joined.append(turn)
    if len(joined) < len(spoken):
        ledger.repair("neighbours of one role: joined", row_id)
    if joined and joined[-1].role == "user":
        if len(joined) > 1:
            ledger.repair("last question has no answer: removed", row_id)
        joined.pop()
    if not joined:
        return ledger.drop("no question with an answer", row_id)
    return Conversation(row_id, (*system, *joined))


def _is_blank(text: str) -> bool:
    """Nothing to see: spaces, line ends, and such as the zero-width space, which ShareGPT has for answers."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def _whole_characters(text: str, row_id: str, ledger: Ledger) -> str:
    """JSON may escape half a surrogate pair, which no tokenizer can encode: replace it."""
    whole = _encodable(text)
    if whole != text:
        ledger.repair("half a surrogate pair: replaced", row_id)
    return whole


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


# --- splitting ---------------------------------------------------------------------------------------------


def split(
    conversations: Sequence[Conversation], test_fraction: float = 0.1, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into train and test, 9:1 by default, by whole conversation.

    ShareGPT V3 comes already cut into parts (`QWJhYvA_0`, `QWJhYvA_7`, …); parts of one conversation go to the
    same side, else the test set would hold the continuation of what was trained. The order is a seeded hash of
    the conversation's id, so the same conversation lands on the same side however the file is ordered.
    """
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        groups[origin(conversation.id)].append(conversation)
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    wanted = max(1, round(test_fraction * len(conversations))) if len(groups) > 1 else 0
    test_names: set[str] = set()
    taken = 0
    for name in order:
        if taken + len(groups[name]) <= wanted:
            test_names.add(name)
            taken += len(groups[name])
    if wanted and not test_names:  # every conversation came in more parts than the test set may hold
        test_names.add(min(order, key=lambda name: len(groups[name])))
    train = [c for c in conversations if origin(c.id) not in test_names]
    test = [c for c in conversations if origin(c.id) in test_names]
    return train, test


def origin(conversation_id: str) -> str:
    """The conversation that a ShareGPT part was cut from: `QWJhYvA_7` -> `QWJhYvA`; other ids stand for themselves."""
    match = re.fullmatch(r"([A-Za-z0-9]{7})_\d+(#\d+)?", conversation_id)
    return match[1] if match else conversation_id.partition("#")[0]


def select(
    conversations: Iterable[Conversation],
    stage: str,
    ledger: Ledger,
    max_characters: int | None,
    max_rows: int | None,
) -> list[Conversation]:
    """The first `max_rows` conversations of at most `max_characters`; the rest is counted in the ledger."""
    kept = []
    for conversation in conversations:
        if max_characters is not None and conversation.characters > max_characters:
            ledger.drop(f"{stage}: longer than {max_characters} characters", conversation.id)
        elif max_rows is not None and len(kept) >= max_rows:
            ledger.drop(f"{stage}: beyond the first {max_rows} rows", conversation.id)
        else:
            kept.append(conversation)
    ledger.stages[stage] = len(kept)
    return kept
