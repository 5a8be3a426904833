"""Makes a run's training and test rows: reads, splits, selects and encodes conversations.

data/train.arrow   id, input_ids, labels; `datasets.Dataset.from_file` maps it into memory
data/test.jsonl    the test conversations, cleaned, in ShareGPT's format
data/test.arrow    the first `eval_rows` of them that fit, as rows for the test loss
data/made_of.json  what the rows were made from, with the checksums of the three files
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from minisft.chat.registry import template_for
from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import Tokenizer
from minisft.checksums import Digests, code_digest, digest, remember, remembered
from minisft.data.conversations import Conversation
from minisft.data.data_files import files_of
from minisft.data.ledger import Ledger
from minisft.data.model_folder import WEIGHTS_SUFFIX, files_of_a_model, small_model_files
from minisft.data.read_files import read
from minisft.data.splits import assign, count_side, select
from minisft.errors import UserError
from minisft.files import read_json, remove_all, write_json
from minisft.labels.encode_dataset import encode_stream
from minisft.labels.encode_row import Row

if TYPE_CHECKING:
    import pyarrow

    from minisft.run.config import RunConfig
    from minisft.run.folder import Run

LEDGER = "ledger.json"  # beside the data folder
TRAIN, TEST, TEST_ROWS = FILES = "train.arrow", "test.jsonl", "test.arrow"
MADE_OF = "made_of.json"
CODE = ("data", "chat", "labels", "training/dataset")  # the code that decides the rows, besides settings and data
ROWS_AT_ONCE = 256
KNOWN_ROWS = "rows.json"  # in the cache folder
MOST_REMEMBERED = 200  # row sets in the cache, which later runs with the same settings can copy


def write_data(config: RunConfig, source: Path, tokenizer: Tokenizer, folder: Path, ledger: Ledger) -> int:
    """Write the three files into `folder`; return the number of training rows.

    The source is read twice, once to decide the split, which needs every id, and once to encode, so
    that memory does not grow with its size. Raises `UserError` if the source cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    template = template_for(tokenizer, config.template)
    split = assign(read(source, ledger, reads_tools=template.has_tools), config.test_fraction, config.seed, ledger)
    for stage in ("train side of the split", "test side of the split", "test", "train"):
        ledger.count(stage, rows=0)  # fixes the order in which the ledger shows them
    with (folder / TEST).open("w", encoding="utf-8") as test:

        def train_side() -> Iterator[Conversation]:
            # The first pass has recorded the cleaning.
            for conversation in read(source, Ledger(), reads_tools=template.has_tools):
                side = split.side(conversation)
                count_side(side, conversation, ledger)
                if side == "train":
                    yield conversation
                elif side == "test":
                    _write_test(test, conversation, config, ledger)

        selected = select(train_side(), "train", ledger, config.max_characters, config.max_rows)
        rows = _encoded(selected, config, template, tokenizer, ledger)
        written = write_rows(rows, folder / TRAIN)
    test_ledger = Ledger()
    write_rows(_test_rows(config, template, tokenizer, folder / TEST, test_ledger), folder / TEST_ROWS)
    ledger.dropped |= {f"test loss: {reason}": rows for reason, rows in test_ledger.dropped.items()}
    for note in test_ledger.notes:
        ledger.note(note)
    return written


def describe_rows(config: RunConfig, source: Path, model: Path | None, digests: Digests) -> dict[str, Any]:
    """Return what the rows depend on: code, settings, data, and the tokenizer in `model` if it is still there."""
    ledger = Ledger()  # its notes name files that are not read
    # The names of the rows contain the names of their files.
    files = [[file.name, digests.of(file.path)] for file in files_of(source, ledger)]
    # Any small file of a model may be part of its tokenizer: vocab.json, merges.txt, tokenizer.model, ...
    files += [[file.name, digests.of(file)] for file in (small_model_files(model) if model else ())]
    return {"code": code_digest(*CODE), "files": files, "notes": ledger.notes, **config.values_that_shape_rows()}


def copy_known_rows(wanted: dict[str, Any], runs: Iterable[Path], folder: Path) -> int | None:
    """Copy the rows that `wanted` describes, and their ledger, from the first run that has them.

    Returns the number of training rows, or None if no run has them. The checksums that belong to
    `wanted` come from this machine's own cache, not from a run folder, which may come from somebody
    else: only files with the same content are copied.
    """
    known = remembered(KNOWN_ROWS, dict[str, MadeRows]).get(_key(wanted))
    if known is None:
        return None
    for run in runs:
        with suppress(OSError, UserError):  # the run may be removed at this moment
            if _sums(run) == known.sha256:
                folder.mkdir(parents=True)
                for name in FILES:
                    shutil.copyfile(run / "data" / name, folder / name)
                shutil.copyfile(run / LEDGER, folder.parent / LEDGER)
                if _sums(folder.parent) == known.sha256:
                    _describe(folder, wanted, known)
                    return known.rows
        remove_all(folder)
    return None


def remember_rows(wanted: dict[str, Any], rows: int, folder: Path) -> None:
    """Record in `folder` and in this machine's cache what the rows in `folder` were made from."""
    made = MadeRows(rows, _sums(folder.parent))
    _describe(folder, wanted, made)
    remember(KNOWN_ROWS, _key(wanted), vars(made), MOST_REMEMBERED)


def made_by_this_code(run_folder: Path) -> bool:
    """Return whether the present code made the rows of a run."""
    made = read_json(run_folder / "data" / MADE_OF, MadeRows)
    return made is not None and made.made_of.get("code") == code_digest(*CODE)


def made_from(run: Run, wanted: dict[str, Any]) -> bool:
    """Return whether the rows of a run were made from the files that `wanted` names.

    If these are only the data, because the model is gone, the run's model is taken for unchanged.
    """
    made = read_json(run.folder / "data" / MADE_OF, MadeRows)
    if made is None or not made.made_of:  # runs of earlier versions do not say it
        return True
    small = [[Path(name).name, digest] for name, digest in run.model_files.items() if not name.endswith(WEIGHTS_SUFFIX)]
    return made.made_of.get("files") in (wanted["files"], [*wanted["files"], *small])


def training_rows_digest(run_folder: Path) -> str:
    """Return the recorded checksum of a run's training rows; "" if it has none."""
    made = read_json(run_folder / "data" / MADE_OF, MadeRows)
    return made.sha256.get(TRAIN, "") if made else ""


def require_as_made(run_folder: Path) -> None:
    """Raise `UserError` if the rows of a run have changed since they were prepared."""
    made = read_json(run_folder / "data" / MADE_OF, MadeRows)
    if made is None or not {*FILES} <= made.sha256.keys():
        file = run_folder / "data" / MADE_OF
        raise UserError(f"{file} lacks checksums of the rows: prepare the run again with --overwrite")
    for name, expected in made.sha256.items():
        file = run_folder / name if name == LEDGER else run_folder / "data" / name
        if not file.is_file() or Digests().of(file) != expected:
            raise UserError(f"{file} is not as it was prepared: prepare the run again with --overwrite")


def model_files(folder: Path, digests: Digests) -> dict[str, str]:
    """Return the checksums of a model's weights, configuration and tokenizer, by file name."""
    return {str(file.relative_to(folder)): digests.of(file) for file in files_of_a_model(folder)}


def changed_model(run: Run, weights: bool = True) -> str:
    """Describe the first file of the start model that has changed since `prepare`; "" if none.

    Without `weights` only config and tokenizer are compared.
    """
    digests = Digests()
    files = files_of_a_model(run.model_folder) if run.model_folder.is_dir() else []
    present = {str(file.relative_to(run.model_folder)) for file in files}
    added = sorted(name for name in present - run.model_files.keys() if weights or not name.endswith(WEIGHTS_SUFFIX))
    if run.model_files and added:  # runs of earlier versions have no checksums
        return f"{run.model_folder / added[0]} was added after the run was prepared"
    for name, expected in run.model_files.items():
        if not weights and name.endswith(WEIGHTS_SUFFIX):
            continue
        file = run.model_folder / name
        if not file.is_file():
            return f"{file} was removed after the run was prepared"
        if digests.of(file) != expected:
            return f"{file} has changed since the run was prepared"
    return ""


def require_same_model(run: Run) -> None:
    """Raise `UserError` if the start model has changed since the run was prepared."""
    if changed := changed_model(run):
        raise UserError(f"{changed}: prepare it again, under another --name or with --overwrite")


@dataclass(frozen=True)
class MadeRows:
    """Prepared rows: the number to train, each file's checksum, and what they were made from."""

    rows: int
    sha256: dict[str, str]
    made_of: dict[str, Any] = field(default_factory=dict)


def _key(wanted: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()


def _describe(folder: Path, wanted: dict[str, Any], made: MadeRows) -> None:
    write_json(folder / MADE_OF, vars(made) | {"made_of": wanted})


def _sums(run: Path) -> dict[str, str]:
    return {name: digest(run / "data" / name) for name in FILES} | {LEDGER: digest(run / LEDGER)}


def _encoded(
    conversations: Iterable[Conversation],
    config: RunConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    ledger: Ledger,
) -> Iterator[Row]:
    return encode_stream(
        conversations,
        template,
        tokenizer,
        max_length=config.max_length,
        ledger=ledger,
        truncation=config.truncation,
        train_on=config.train_on,
    )


def _test_rows(
    config: RunConfig, template: ChatTemplate, tokenizer: Tokenizer, file: Path, ledger: Ledger
) -> Iterator[Row]:
    if not config.eval_rows or not file.stat().st_size:
        return iter(())
    test = read(file, Ledger(), is_clean=True, reads_tools=template.has_tools)
    rows = _encoded(test, config, template, tokenizer, ledger)
    return itertools.islice(rows, config.eval_rows)


def _write_test(stream: TextIO, conversation: Conversation, config: RunConfig, ledger: Ledger) -> None:
    for selected in select([conversation], "test", ledger, config.max_characters, None):
        stream.write(json.dumps(selected.to_sharegpt(), ensure_ascii=False) + "\n")


def write_rows(rows: Iterable[Row], file: Path) -> int:
    """Write rows as an Arrow stream; return their number."""
    import pyarrow

    schema = _schema()
    written, rest = 0, iter(rows)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rest, ROWS_AT_ONCE)):
            values = [{name: getattr(row, name) for name in schema.names} for row in batch]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(values, schema))
            written += len(batch)
    return written


def load_rows(folder: Path, name: str = TRAIN) -> Any:
    """Return rows as a memory-mapped `datasets.Dataset`. Raises `UserError` if damaged."""
    from datasets import Dataset

    _require_rows(folder / name)
    return Dataset.from_file(str(folder / name))


def _schema() -> pyarrow.Schema:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema([("id", pyarrow.string()), ("input_ids", ids), ("labels", ids)])


def _require_rows(file: Path) -> None:
    """Raise `UserError` unless an Arrow stream holds valid rows; no offset is used before that."""
    import pyarrow
    import pyarrow.compute as compute

    try:
        with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            if not stream.schema.equals(_schema()):
                raise ValueError("its columns are not id, input_ids and labels")
            for batch in stream:
                batch.validate(full=True)
                lengths = [compute.list_value_length(batch.column(name)) for name in ("input_ids", "labels")]
                if not lengths[0].equals(lengths[1]) or any(column.null_count for column in batch.columns):
                    raise ValueError("a row does not have as many labels as ids")
                smallest = compute.min(batch.column("input_ids").flatten()).as_py()
                if smallest is not None and smallest < 0:
                    raise ValueError(f"an id is {smallest}")
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file} is damaged ({reason}): prepare the run again with --overwrite") from error


def row_lengths(rows: Any) -> list[int]:
    """Return the number of tokens of every row of `load_rows`, without reading the tokens."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(rows.data.column("input_ids")).to_pylist()
