"""Which rows make up each global batch, and which rank gets which of them when: decided once, for every strategy alike.

The rows of a global batch depend on the seed and the epoch alone. Ranks, micro-batches and accumulation only share
them out, so one process and eight GPUs see the same rows at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 32  # global batches whose rows are sorted by length together, where batches are padded


@dataclass
class RankBatches:
    """The micro-batches of one rank in order, each a list of row indices; a batch sampler for torch's DataLoader.

    `lengths` holds the tokens of every row. A global batch is `batch_size * accumulation * ranks` rows; those that are
    left at an epoch's end, fewer than that, wait for the next shuffle. With `by_length`, which padded batches want,
    rows of like length come into the same global batch, and the global batches come in random order.
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
        """What Trainer looks for, to tell the epoch to."""
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
        """This epoch's global batches, as row indices: the same for every rank."""
        import torch

        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=chance).tolist()
        size = self.global_batch
        order = order[: len(order) // size * size]
        if self.by_length:
            step = WINDOW * size
            windows = [order[i : i + step] for i in range(0, len(order), step)]
            order = [row for w in windows for row in sorted(w, key=self.lengths.__getitem__)]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        if self.by_length:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=chance).tolist()]
        return batches

    def shares(self, rows: list[int]) -> list[list[list[int]]]:
        """A global batch shared out: for each rank its micro-batches.

        The ranks' micro-batches of one moment have rows of like length and nearly equal sums of tokens: nobody waits
        long for the others, and little is padded.
        """
        order = sorted(rows, key=lambda row: (-self.lengths[row], row))
        at_once = self.batch_size * self.ranks
        shared: list[list[list[int]]] = [[] for _ in range(self.ranks)]
        for start in range(0, len(order), at_once):
            hands: list[list[int]] = [[] for _ in range(self.ranks)]
            for row in order[start : start + at_once]:  # longest first, each to the rank that has least so far
                open_hands = [hand for hand in hands if len(hand) < self.batch_size]
                min(open_hands, key=lambda hand: sum(self.lengths[r] for r in hand)).append(row)
            for rank, hand in enumerate(hands):
                shared[rank].append(hand)
        return shared


class Packs:
    """Rows packed into entries of at most `max_length` tokens, as a dataset whose items are lists of rows.

    First-fit decreasing: the longest row first, each into the first pack that has room. Attention and position ids
    keep the rows of a pack apart; a pack is only a way to give every micro-batch about the same number of tokens.
    """

    def __init__(self, rows: Any, lengths: Sequence[int], max_length: int):
        self.rows = rows
        self.members: list[list[int]] = []
        room: list[int] = []
        first_open = 0
        for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            place = next((i for i in range(first_open, len(room)) if room[i] >= lengths[row]), None)
            if place is None:
                place = len(room)
                self.members.append([])
                room.append(max_length)
            self.members[place].append(row)
            room[place] -= lengths[row]
            shortest = 2  # no row has fewer tokens: BOS and one more
            while first_open < len(room) and room[first_open] < shortest:
                first_open += 1
        self.lengths = [sum(lengths[i] for i in members) for members in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.rows[i] for i in self.members[index]]
