"""The commands for data: fetch, encode, show, check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from minisft.chat.registry import other_template, template_for
from minisft.cli import options as opt
from minisft.cli.options import app, local_paths, print_json
from minisft.errors import UserError
from minisft.files import as_json as json_text
from minisft.text import note, say

CheckedLength = Annotated[
    int | None,
    typer.Option(help="maximum row length, in tokens; default: 2048, or for tokenized data its longest row"),
]
Against = Annotated[
    str | None, typer.Option(help="for tokenized data, the conversations it was made from: ids and labels must match")
]


@app.command()
def fetch(
    model: opt.Model = "smollm2",
    data: opt.Data = "sharegpt",
    verify: Annotated[bool, typer.Option("--verify", help="compute the checksum of every cached file again")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Download the model and the data, and print source, size and license.

    Cached files that do not match their checksums are fetched again.
    """
    from minisft.data import download

    assets = [
        download.find_model(model, note, verify=verify, refetch=True),
        download.find_data(data, note, verify=verify, refetch=True),
    ]
    if as_json:
        print_json([vars(asset) | {"path": str(asset.path)} for asset in assets])
    else:
        for asset in assets:
            say(f"{asset}\n  in {asset.path}" + (f"\n  {asset.checked}" if asset.checked else ""))


@app.command()
def encode(
    data: opt.DataArgument,
    out: Annotated[Path, typer.Option(help="output file of JSON lines with id, input_ids and labels")],
    tokenizer: opt.TokenizerName = "smollm2",
    template: opt.Template = None,
    max_length: opt.MaxLength = 2048,
    truncation: opt.Truncation = "token",
    train_on: opt.TrainOn = "all",
    ledger: Annotated[Path | None, typer.Option(help="JSON file for the counts of dropped and repaired rows")] = None,
) -> None:
    """Tokenize conversations into token ids and labels, one JSON line per row."""
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.files import require_apart, user_output, user_path
    from minisft.labels.encode_dataset import encode_stream

    counts = Ledger()
    source = find_data(data, note).path
    out = user_path(out)
    outputs = [out]
    if ledger is not None:
        ledger = user_path(ledger)
        outputs.append(ledger)
    require_apart(outputs, [source, *local_paths(tokenizer)])
    loaded_tokenizer = load_tokenizer(tokenizer, template)
    if template is None and (remark := other_template(loaded_tokenizer)):
        note(remark)
    chat_template = template_for(loaded_tokenizer)
    rows = encode_stream(
        read(source, counts, reads_tools=chat_template.has_tools),
        chat_template,
        loaded_tokenizer,
        max_length=max_length,
        ledger=counts,
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
                why = ", ".join(f"{reason} ({entry.rows})" for reason, entry in list(counts.dropped.items())[:5])
                raise UserError(f"no row of {data} is left ({why}): give a larger --max-length or other data")
    finally:
        if ledger:  # also written if no row was usable, because it has the reasons
            with user_output(ledger) as stream:
                stream.write(json_text(counts.to_dict()) + "\n")
    note(counts)


@app.command()
def show(
    data: opt.DataArgument = "sharegpt",
    row: Annotated[int, typer.Option(help="index of the conversation among the usable ones, from 0")] = 0,
    tokenizer: opt.TokenizerName = "smollm2",
    template: opt.Template = None,
    max_length: opt.MaxLength = 256,
    truncation: opt.Truncation = "token",
) -> None:
    """Show every token of one conversation with its label."""
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
    loaded_tokenizer = load_tokenizer(tokenizer, template)
    chat_template = template_for(loaded_tokenizer)
    conversations = read(find_data(data, note).path, Ledger(), reads_tools=chat_template.has_tools)
    first = list(itertools.islice(conversations, min(max(0, row) + 1, sys.maxsize)))
    if not 0 <= row < len(first):
        raise UserError(f"--row {row} is outside {data}, which has {len(first)} usable conversations")
    encoded = encode(first[row], chat_template, loaded_tokenizer, max_length, truncation)
    say(Lens(encoded, loaded_tokenizer))


@app.command()
def check(
    data: opt.DataArgument,
    tokenizer: opt.TokenizerName = "smollm2",
    template: opt.Template = None,
    max_length: CheckedLength = None,
    truncation: opt.Truncation = "token",
    train_on: opt.TrainOn = "all",
    against: Against = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check the labels of every row, for conversations or for tokenized data.

    Prints the offending rows. The exit code is 1 if an invariant fails, or if a damaged file could
    not be read completely.
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
        raise UserError(f"--against goes with tokenized data, but {data} holds conversations: leave it out")
    loaded_tokenizer = load_tokenizer(tokenizer, template)
    chat_template = template_for(loaded_tokenizer)
    ledger = Ledger()
    originals = Ledger()  # of --against, whose dropped rows need no check
    settings: dict[str, Any] = {"truncation": truncation, "train_on": train_on, "say": note}
    if tokenized:
        source = (
            read(find_data(against, note).path, originals, reads_tools=chat_template.has_tools) if against else None
        )
        settings |= {"max_length": max_length, "against": source}
        report = check_tokenized(Tokenized(path), chat_template, loaded_tokenizer, **settings)
    else:
        settings |= {"max_length": 2048 if max_length is None else max_length, "ledger": ledger}
        conversations = read(path, ledger, reads_tools=chat_template.has_tools)
        report = check_conversations(conversations, chat_template, loaded_tokenizer, **settings)
    dropped = {reason: entry.rows for reason, entry in ledger.dropped.items()}
    lost = ledger.lost + originals.lost
    if as_json:
        print_json(report.to_dict() | {"dropped": dropped, "lost": lost})
    else:
        say(report)
    for reason, rows in dropped.items():
        note(f"not checked, because dropped: {reason} ({rows:,})")
    for what in lost:
        note(f"lost: {what}")
    for remark in ledger.notes:
        note(f"note: {remark}")
    sys.exit(0 if report.ok and not lost else 1)
