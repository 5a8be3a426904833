"""Collates rows into the tensors that the model receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.labels.encode_row import IGNORE_INDEX

Row = Mapping[str, Any]  # id, input_ids, labels


@dataclass(frozen=True)
class PadRight:
    """Pads a micro-batch to its longest row, not to the maximum length.

    Returns `input_ids`, `attention_mask` and `labels`, int64 tensors of shape [rows, longest]. The
    labels are copied, never rebuilt from the ids, which is the bug of
    `DataCollatorForLanguageModeling(mlm=False)`. The attention mask follows from the row's length,
    so an EOS stays visible even if the pad id equals EOS.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORE_INDEX)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.as_tensor(row["input_ids"])
            labels[i, :length] = torch.as_tensor(row["labels"])
            attention_mask[i, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class PaddingFree:
    """Concatenates the rows of a micro-batch, without any padding.

    Returns `input_ids`, `position_ids` (restarting at 0 in each row) and `labels`, int64 tensors of
    shape [1, tokens]. Under transformers' own names it adds `cu_seq_lens_q`, the offsets of the
    rows, int32 of shape [rows + 1], and `max_length_q`, the length of the longest row. A row may
    also be a pack, a list of rows (`minisft.training.batch_sampler.Packs`). The model needs an
    attention that keeps the rows apart, `minisft.model.packed_attention.PER_DOCUMENT`.
    """

    def __call__(self, rows: Sequence[Row | list[Row]]) -> dict[str, Any]:
        import torch

        flat = unpacked(rows)
        lengths = [len(row["input_ids"]) for row in flat]
        labels: list[int] = []
        for row in flat:
            # A row's first token must not be predicted from the end of the previous row.
            labels += [IGNORE_INDEX, *row["labels"][1:]]
        return {
            "input_ids": torch.tensor([[i for row in flat for i in row["input_ids"]]]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "labels": torch.tensor([labels]),
            "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            "max_length_q": max(lengths),
        }


def portions(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Split rows of these `lengths` into slices of at most `most` tokens, or of a single row."""
    start, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > start and tokens + length > most:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += length
    if lengths:
        yield slice(start, len(lengths))


def unpacked(rows: Sequence[Row | list[Row]]) -> list[Row]:
    """Return all rows, with packs replaced by their rows."""
    return [row for entry in rows for row in (entry if isinstance(entry, list) else [entry])]


@dataclass(frozen=True)
class WithRows:
    """Adds `rows` to what another collator returns: (id, tokens, trained tokens) of each row.

    With it, tokens are counted without reading from the device, and an error can name the rows of
    its batch.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, rows: Sequence[Row | list[Row]]) -> dict[str, Any]:
        counts = [
            (row["id"], len(row["input_ids"]), sum(label != IGNORE_INDEX for label in row["labels"][1:]))
            for row in unpacked(rows)
        ]
        return self.collate(rows) | {"rows": counts}


def pad_left(rows: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """Pad prompts for generation on the left, so that all answers start at the same position.

    Returns `input_ids` and `attention_mask`, int64 tensors of shape [rows, longest].
    """
    import torch

    longest = max(map(len, rows))
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in rows])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask}
