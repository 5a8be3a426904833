"""The verbs about data: fetch, encode, show, check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from minisft.chat.registry import template_for
from minisft.cli.options import (
    AsJson,
    Data,
    DataArgument,
    MaxLength,
    Model,
    Template,
    TokenizerName,
    TrainOn,
    Truncation,
    app,
    local_paths,
    print_json,
)
from minisft.errors import UserError
from minisft.files import as_json as json_text
from minisft.text import note, say


@app.command()
def fetch(
    model: Model = "smollm2",
    data: Data = "sharegpt",
    verify: Annotated[bool, typer.Option("--verify", help="read every cached file again and compare it")] = False,
    as_json: AsJson = False,
) -> None:
    """Put model and data into the cache; says from where, how large, and under which license.

    What is in the cache and differs from its checksum is fetched again.
    """
    from minisft.data import download

    options = {"verify": verify, "refetch": True}
    found = [download.find_model(model, note, **options), download.find_data(data, note, **options)]
    if as_json:
        print_json([{**vars(asset), "path": str(asset.path)} for asset in found])
    else:
        for asset in found:
            say(f"{asset}\n  in {asset.path}" + (f"\n  {asset.checked}" if asset.checked else ""))


@app.command()
def encode(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="the JSON lines to write: id, input_ids, labels")],
    tokenizer: TokenizerName = "smollm2",
    template: Template = None,
    max_length: MaxLength = 2048,
    truncation: Truncation = "token",
    train_on: TrainOn = "all",
    ledger: Annotated[Path | None, typer.Option(help="write what was dropped, where and why, as JSON")] = None,
) -> None:
    """Turn conversations into token ids and labels, one JSON line each."""
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.files import require_apart, user_output, user_path
    from minisft.labels.encode_dataset import encode_stream

    book = Ledger()
    source = find_data(data, note).path
    out, ledger = user_path(out), None if ledger is None else user_path(ledger)
    require_apart([out, *([ledger] if ledger else [])], [source, *local_paths(tokenizer)])
    using = load_tokenizer(tokenizer, template)
    form = template_for(using)
    rows = encode_stream(
        read(source, book),
        form,
        using,
        max_length=max_length,
        ledger=book,
        truncation=truncation,
        train_on=train_on,
    )
    try:
        with user_output(out) as stream:
            is_empty = True
            for row in rows:
                is_empty = False
                stream.write(json.dumps({"id": row.id, "input_ids": row.input_ids, "labels": row.labels}) + "\n")
            if is_empty:
                why = ", ".join(f"{reason} ({entry.rows})" for reason, entry in list(book.dropped.items())[:5])
                raise UserError(f"no row of {data} is left ({why}): give a larger --max-length or other data")
    finally:
        if ledger:  # it says why, also where no row was usable
            with user_output(ledger) as stream:
                stream.write(json_text(book.to_dict()) + "\n")
    note(book)


@app.command()
def show(
    data: DataArgument = "sharegpt",
    row: Annotated[int, typer.Option(help="which usable conversation, from 0")] = 0,
    tokenizer: TokenizerName = "smollm2",
    template: Template = None,
    max_length: MaxLength = 256,
    truncation: Truncation = "token",
) -> None:
    """The token lens: every token of one conversation with its label."""
    import itertools

    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.labels.encode_row import encode, require_truncation
    from minisft.labels.token_lens import Lens

    require_truncation(truncation)
    if max_length < 2:
        raise UserError(f"max length is {max_length}: give at least 2 tokens")
    using = load_tokenizer(tokenizer, template)
    before = list(itertools.islice(read(find_data(data, note).path, Ledger()), min(max(0, row) + 1, sys.maxsize)))
    if not 0 <= row < len(before):
        raise UserError(f"--row {row} is outside {data}, which has {len(before)} usable conversations")
    say(Lens(encode(before[row], template_for(using), using, max_length, truncation), using))


@app.command()
def check(
    data: DataArgument,
    tokenizer: TokenizerName = "smollm2",
    template: Template = None,
    max_length: Annotated[
        int | None, typer.Option(help="longest row, in tokens; 2048, or of tokenized data the longest, if not given")
    ] = None,
    truncation: Truncation = "token",
    train_on: TrainOn = "all",
    against: Annotated[
        str | None,
        typer.Option(help="the conversations that tokenized data was made of: its ids and labels must equal"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what must hold for every labelled row, on conversations or on data that is tokenized already.

    Exit code 1 and the offending rows where an invariant fails, or where a damaged file was not read to its end.
    """
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.labels.check_dataset import check_conversations, check_tokenized
    from minisft.labels.pretokenized import Tokenized, is_tokenized

    path = find_data(data, note).path
    tokenized = is_tokenized(path)
    if against and not tokenized:
        raise UserError(f"--against goes with tokenized data, and {data} has conversations: leave it out")
    using = load_tokenizer(tokenizer, template)
    form = template_for(using)
    settings = {"truncation": truncation, "train_on": train_on, "say": note}
    book = Ledger()
    if tokenized:
        source = read(find_data(against, note).path, Ledger()) if against else None
        report = check_tokenized(Tokenized(path), form, using, max_length=max_length, against=source, **settings)
    else:
        length = 2048 if max_length is None else max_length
        report = check_conversations(read(path, book), form, using, max_length=length, **settings)
    print_json(report.to_dict() | {"lost": book.lost}) if as_json else say(report)
    for what in book.lost:
        note(f"lost: {what}")
    sys.exit(0 if report.ok and not book.lost else 1)
