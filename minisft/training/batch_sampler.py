"""Decides which rows make up each global batch and how the ranks divide it, for any strategy.

The rows of a global batch depend on the seed and the epoch only. Ranks, micro-batches and
accumulation just divide them, so one process and eight GPUs see the same rows at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 32  # global batches per window; rows of padded batches are sorted by length within a window


@dataclass
class RankBatches:
    """A batch sampler for torch's DataLoader: one rank's micro-batches, as lists of row indices.

    `lengths` holds the number of tokens of every row. The rows of a global batch number
    `batch_size * accumulation * ranks`; an incomplete one at the end of an epoch is dropped, and
    the next epoch shuffles all rows again. With `by_length`, for padded batches, rows of similar
    length share a global batch, and the global batches come in random order.
    """

    lengths: Sequence[int]
    batch_size: int
    accumulation: int = 1
    ranks: int = 1
    rank: int = 0
    seed: int = 0
    by_length: bool = False
    epoch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def batch_sampler(self) -> RankBatches:
        """This object: Trainer calls `set_epoch` on a loader's `batch_sampler.batch_sampler`."""
        return self

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.ranks

    def __len__(self) -> int:
        return len(self.lengths) // self.global_batch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.global_batches():
            yield from self.shares(rows)[self.rank]

    def global_batches(self) -> list[list[int]]:
        """Return this epoch's global batches, as row indices; they are the same on every rank."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.global_batch
        order = order[: len(order) // size * size]
        if self.by_length:
            step = WINDOW * size
            windows = [order[i : i + step] for i in range(0, len(order), step)]
            order = [row for w in windows for row in sorted(w, key=self.lengths.__getitem__)]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        if self.by_length:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def shares(self, rows: list[int]) -> list[list[list[int]]]:
        """Divide a global batch: return, for each rank, its micro-batches.

        The micro-batches that the ranks compute at the same time have rows of similar length and
        nearly equal token counts, so that no rank waits long for the others and padding is short.
        """
        order = sorted(rows, key=lambda row: (-self.lengths[row], row))
        at_once = self.batch_size * self.ranks
        by_rank: list[list[list[int]]] = [[] for _ in range(self.ranks)]
        for start in range(0, len(order), at_once):
            micro_batches: list[list[int]] = [[] for _ in range(self.ranks)]
            for row in order[start : start + at_once]:  # longest first, each to the rank with the fewest tokens
                not_full = [batch for batch in micro_batches if len(batch) < self.batch_size]
                min(not_full, key=lambda batch: sum(self.lengths[r] for r in batch)).append(row)
            for rank, batch in enumerate(micro_batches):
                by_rank[rank].append(batch)
        return by_rank


class Packs:
    """A dataset of packs: each item is a list of rows with at most `max_length` tokens in total.

    First-fit decreasing: the longest row first, each into the first pack that has room. Attention
    and position ids keep the rows of a pack apart; packing only gives every micro-batch about the
    same number of tokens.
    """

    def __init__(self, rows: Any, lengths: Sequence[int], max_length: int):
        self.rows = rows
        self.members: list[list[int]] = []
        room: list[int] = []
        first_open = 0
        for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            pack = next((i for i in range(first_open, len(room)) if room[i] >= lengths[row]), None)
            if pack is None:
                pack = len(room)
                self.members.append([])
                room.append(max_length)
            self.members[pack].append(row)
            room[pack] -= lengths[row]
            shortest = 2  # every row has at least BOS and one more token
            while first_open < len(room) and room[first_open] < shortest:
                first_open += 1
        self.lengths = [sum(lengths[i] for i in members) for members in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.rows[i] for i in self.members[index]]
