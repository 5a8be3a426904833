"""Collation: what the model really receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.labels.encode_row import IGNORE_INDEX

Row = Mapping[str, Any]  # id, input_ids, labels


@dataclass(frozen=True)
class PadRight:
    """Pads a micro-batch to its longest row, not to the maximum length.

    Returns `input_ids`, `attention_mask` and `labels`, int64 tensors of shape [rows, longest]. The labels are
    carried over, never rebuilt from the ids: that is the bug of `DataCollatorForLanguageModeling(mlm=False)`.
    Padding is found by length, so a pad id that equals EOS hides no EOS.
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
    """Lays the rows of a micro-batch end to end, without one token of padding.

    Returns `input_ids`, `position_ids` (restarting with each row) and `labels`, int64 tensors of shape [1, tokens],
    and by transformers' own names `cu_seq_lens_q`, int32 of shape [rows + 1], where each row begins, and
    `max_length_q`, the longest row. A row may also be a pack, a list of rows (`minisft.training.batch_sampler.Packs`).
    It needs an attention that keeps the rows apart, `minisft.model.packed_attention.PER_DOCUMENT`.
    """

    def __call__(self, rows: Sequence[Row | Sequence[Row]]) -> dict[str, Any]:
        import torch

        flat = unpacked(rows)
        lengths = [len(row["input_ids"]) for row in flat]
        labels: list[int] = []
        for row in flat:
            # A row's first token has nothing before it: it must not be predicted from the end of the row before.
            labels += [IGNORE_INDEX, *row["labels"][1:]]
        return {
            "input_ids": torch.tensor([[i for row in flat for i in row["input_ids"]]]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "labels": torch.tensor([labels]),
            "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            "max_length_q": max(lengths),
        }


def portions(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Rows of these `lengths` in order, in slices of at most `most` tokens, and of at least one row."""
    start, held = 0, 0
    for i, length in enumerate(lengths):
        if i > start and held + length > most:
            yield slice(start, i)
            start, held = i, 0
        held += length
    if lengths:
        yield slice(start, len(lengths))


def unpacked(rows: Sequence[Row | Sequence[Row]]) -> list[Row]:
    """The rows themselves, where some may be packs of rows."""
    return [row for entry in rows for row in (entry if isinstance(entry, list) else [entry])]


@dataclass(frozen=True)
class WithRows:
    """What a collator returns and, as `rows`, for each row its id, its tokens and its trained tokens.

    For counting without asking the device, and for naming the rows of a batch that goes wrong.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, rows: Sequence[Row | Sequence[Row]]) -> dict[str, Any]:
        about = [
            (row["id"], len(row["input_ids"]), sum(label != IGNORE_INDEX for label in row["labels"][1:]))
            for row in unpacked(rows)
        ]
        return self.collate(rows) | {"rows": about}


def pad_left(rows: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """Prompts for generation, int64 [rows, longest]: padded on the left, so that all answers start together."""
    import torch

    longest = max(map(len, rows))
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in rows])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask}
