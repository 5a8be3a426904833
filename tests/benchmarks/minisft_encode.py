"""minisft's side of `encoding_speed`, and the bare Rust tokenizer's, which is the most that any preparation can reach.

`way` is `stream` (rows are counted and let go), `arrow` (rows are written as a run's training file is),
`encode_batch` or `encode_batch_fast` (the bare tokenizer; only the calls themselves are timed).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from worker import Prepare, messages_in, serve

from minisft.chat.mistral import MistralTemplate
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.data.ledger import Ledger
from minisft.labels.encode_dataset import encode_stream
from minisft.labels.encode_row import Row
from minisft.training.dataset import write_rows

TEXTS_AT_ONCE = 4096  # enough to keep all cores busy; encodings are large objects


def load(settings: dict[str, Any]) -> Prepare:
    tokenizer = HuggingFaceTokenizer(settings["model"])
    template = template_for(tokenizer)
    conversations = [
        Conversation(row["id"], tuple(Message(**message) for message in row["messages"]))
        for row in messages_in(settings["data"])
    ]
    warm_up = conversations[: settings["warm_up"]]

    def stream(chosen: list[Conversation]) -> Any:
        return encode_stream(chosen, template, tokenizer, max_length=settings["max_length"], ledger=Ledger())

    if settings["way"].startswith("encode_batch"):
        kept = list(stream(conversations))
        by_id = {conversation.id: conversation for conversation in conversations}
        texts = [text for row in kept for text in _texts(row, by_id[row.id], template, tokenizer)]
        rows, tokens = len(kept), sum(len(row.input_ids) for row in kept)
        del kept, by_id
        return _bare(Path(settings["model"]), settings["way"], texts, {"rows": rows, "tokens": tokens})

    def prepare(keep: Path | None = None, chosen: list[Conversation] = conversations) -> dict[str, Any]:
        rows = tokens = 0
        start = time.perf_counter()
        for row in stream(chosen):
            rows += 1
            tokens += len(row.input_ids)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "rows": rows, "tokens": tokens}

    def prepare_file(keep: Path | None = None, chosen: list[Conversation] = conversations) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            ledger = Ledger()
            rows = encode_stream(chosen, template, tokenizer, max_length=settings["max_length"], ledger=ledger)
            start = time.perf_counter()
            count = write_rows(rows, keep or Path(scratch) / "rows.arrow")
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "rows": count, "tokens": ledger.stages["truncated"].tokens}

    chosen_way = prepare if settings["way"] == "stream" else prepare_file
    chosen_way(chosen=warm_up)
    return chosen_way


def _texts(row: Row, conversation: Conversation, template: MistralTemplate, tokenizer: HuggingFaceTokenizer) -> list:
    """The text of a row that was kept, by segments; where the row was cut, so is the text."""
    texts, room = [], len(row.input_ids)
    for segment in template.segments(conversation):
        if segment.control:
            room -= tokenizer.control_id(segment.control) is not None
            continue
        if room <= 0:
            break
        ids = tokenizer.encode(segment.text, segment.after)
        texts.append(segment.text if len(ids) <= room else tokenizer.decode(ids[:room]))
        room -= len(ids)
    return texts


def _bare(model: Path, method: str, texts: list[str], kept: dict[str, int]) -> Prepare:
    from tokenizers import Tokenizer

    encode = getattr(Tokenizer.from_file(str(model / "tokenizer.json")), method)
    batches = [texts[i : i + TEXTS_AT_ONCE] for i in range(0, len(texts), TEXTS_AT_ONCE)]
    encode(texts[:100], add_special_tokens=False)

    def prepare(keep: Path | None = None) -> dict[str, Any]:
        seconds = 0.0
        for batch in batches:
            start = time.perf_counter()
            encodings = encode(batch, add_special_tokens=False)
            seconds += time.perf_counter() - start
            del encodings
        return kept | {"seconds": seconds}

    return prepare


if __name__ == "__main__":
    serve(load)
