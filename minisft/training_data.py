"""What a run trains and is tested on: read, split, chosen, encoded and written, one conversation at a time.

data/train.arrow   id, input_ids, labels; `datasets.Dataset.from_file` maps it into memory
data/test.jsonl    the test conversations, cleaned, in ShareGPT's shape
data/test.arrow    the first `eval_rows` of them that fit, as rows: the test loss of each checkpoint is theirs
data/made_of.json  from what they were made, so that another run which wants the same takes a copy of them
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from minisft.conversations import Conversation
from minisft.encoding import encode_stream
from minisft.files import digest
from minisft.labels import Row
from minisft.ledger import Ledger
from minisft.mistral import MistralTemplate
from minisft.reading import read
from minisft.splits import assign, count_side, select
from minisft.tokens import Tokenizer

if TYPE_CHECKING:
    from minisft.runs import RunConfig

TRAIN, TEST, TEST_ROWS = "train.arrow", "test.jsonl", "test.arrow"
MADE_OF = "made_of.json"
MATTERS = (  # of a `RunConfig`, to its rows
    "template",
    "max_length",
    "truncation",
    "train_on",
    "max_characters",
    "max_rows",
    "test_fraction",
    "seed",
    "eval_rows",
)
ROWS_AT_ONCE = 256


def write_data(config: RunConfig, source: Path, tokenizer: Tokenizer, folder: Path, ledger: Ledger) -> int:
    """Write the three files into `folder`; returns how many rows there are to train.

    The file is read twice: once to decide the split, which needs every id, and once to encode. So its size does
    not matter for the memory. Raises `UserError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = assign(read(source, ledger), config.test_fraction, config.seed)
    for stage in ("train side of the split", "test side of the split", "test", "train"):
        ledger.count(stage, rows=0)  # in the order in which they are read best
    with (folder / TEST).open("w", encoding="utf-8") as test:

        def train_side() -> Iterator[Conversation]:
            for conversation in read(source, Ledger()):  # cleaning is booked already
                side = split.side(conversation)
                count_side(side, conversation, ledger)
                if side == "train":
                    yield conversation
                elif side == "test":
                    _write_test(test, conversation, config, ledger)

        chosen = select(train_side(), "train", ledger, config.max_characters, config.max_rows)
        rows = _encoded(chosen, config, tokenizer, ledger)
        written = write_rows(rows, folder / TRAIN)
    write_rows(_test_rows(config, tokenizer, folder / TEST), folder / TEST_ROWS)
    return written


def made_of(config: RunConfig, source: Path, model: Path) -> dict[str, Any]:
    """What the rows depend on: settings, the data, and the tokenizer in the folder `model`; files by size and time."""
    files = [source, *sorted(model.glob("*token*")), model / "config.json"]
    files = [file for file in files if file.is_file()]
    about = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"package": version("minisft"), "files": about, **{name: getattr(config, name) for name in MATTERS}}


def take_over(wanted: dict[str, Any], runs: Iterable[Path], folder: Path) -> int | None:
    """Copy into `folder` the rows, and the ledger beside it, of the first run folder of `runs` that has the same.

    Returns how many rows there are to train, or None if none has. Rows that are not as they were written are not taken.
    """
    for run in runs:
        try:
            known = json.loads((run / "data" / MADE_OF).read_text())
            if known["made_of"] == wanted:
                shutil.copytree(run / "data", folder)
                shutil.copyfile(run / "ledger.json", folder.parent / "ledger.json")
                if _sums(folder) == known["sha256"]:
                    return int(known["rows"])
        except (OSError, ValueError, KeyError, TypeError):  # a run that somebody removes or has damaged
            pass
        shutil.rmtree(folder, ignore_errors=True)
    return None


def remember(wanted: dict[str, Any], rows: int, folder: Path) -> None:
    """Write down of what the rows in `folder` were made."""
    about = {"made_of": wanted, "rows": rows, "sha256": _sums(folder)}
    (folder / MADE_OF).write_text(json.dumps(about, indent=2) + "\n")


def _sums(folder: Path) -> dict[str, str]:
    return {name: digest(folder / name) for name in (TRAIN, TEST, TEST_ROWS)}


def _encoded(
    conversations: Iterable[Conversation], config: RunConfig, tokenizer: Tokenizer, ledger: Ledger
) -> Iterator[Row]:
    return encode_stream(
        conversations,
        MistralTemplate.for_tokenizer(tokenizer, config.template),
        tokenizer,
        max_length=config.max_length,
        ledger=ledger,
        truncation=config.truncation,
        train_on=config.train_on,
    )


def _test_rows(config: RunConfig, tokenizer: Tokenizer, file: Path) -> Iterator[Row]:
    if not config.eval_rows or not file.stat().st_size:
        return iter(())
    rows = _encoded(read(file, Ledger()), config, tokenizer, Ledger())
    return itertools.islice(rows, config.eval_rows)


def _write_test(stream: TextIO, conversation: Conversation, config: RunConfig, ledger: Ledger) -> None:
    for chosen in select([conversation], "test", ledger, config.max_characters, None):
        stream.write(json.dumps(chosen.to_sharegpt(), ensure_ascii=False) + "\n")


def write_rows(rows: Iterable[Row], file: Path) -> int:
    """Write rows as an Arrow stream; returns how many there were."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("id", pyarrow.string()), ("input_ids", ids), ("labels", ids)])
    written = 0
    held: list[Row] = []

    def flush(writer: Any) -> None:
        columns = [[getattr(row, name) for row in held] for name in schema.names]
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        writer.write_batch(pyarrow.record_batch(arrays, schema))
        held.clear()

    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for row in rows:
            held.append(row)
            written += 1
            if len(held) == ROWS_AT_ONCE:
                flush(writer)
        if held:
            flush(writer)
    return written


def load_rows(folder: Path, name: str = TRAIN) -> Any:
    """Rows of a run as a `datasets.Dataset`, mapped and not loaded."""
    from datasets import Dataset

    return Dataset.from_file(str(folder / name))


def row_lengths(rows: Any) -> list[int]:
    """The number of tokens of every row of `load_rows`, without reading the tokens."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(rows.data.column("input_ids")).to_pylist()
