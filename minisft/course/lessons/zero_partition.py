"""Exercises of lesson 03 on the flat array that stages 1 and 2 cut into equal slices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.zero.parameter_shapes import Shapes, partition_size


def partition(elements: int, ranks: int) -> list[tuple[int, int]]:
    """Return the slice (start, end) of a flat array that each rank owns, in rank order.

    All slices have the same length. The array has `elements` entries and is padded to
    the next multiple of 2 x `ranks`, so the last slices may end behind it.
    """
    length = -(-elements // (2 * ranks)) * 2
    return [(rank * length, (rank + 1) * length) for rank in range(ranks)]


def _slices(length: int, ranks: int) -> list[tuple[int, int]]:
    return [(rank * length, (rank + 1) * length) for rank in range(ranks)]


def _partition_cases(draw: random.Random) -> Iterator[Case]:
    yield Case((16, 4), [(0, 4), (4, 8), (8, 12), (12, 16)], "16 elements on 4 ranks, which need no padding")
    yield Case((10, 2), [(0, 6), (6, 12)], "10 elements on 2 ranks, with 2 of padding")
    yield Case((3, 4), [(0, 2), (2, 4), (4, 6), (6, 8)], "3 elements on 4 ranks, of which two own padding alone")
    for _ in range(20):
        elements, ranks = draw.randint(1, 9999), draw.randint(1, 16)
        (length,) = Shapes(((("flat", elements),),)).parts(ranks)
        yield Case((elements, ranks), _slices(length, ranks))


PARTITION = Exercise(
    name="03.partition",
    answer=partition,
    cases=_partition_cases,
    mistakes=(
        Mistake(
            "The padding is forgotten: the last slices are shorter. Collectives send slices of equal length.",
            lambda n, w: [(min(a, n), min(b, n)) for a, b in _slices(partition_size(n, w), w)],
        ),
        Mistake(
            "It is padded to a multiple of the ranks only. DeepSpeed pads to twice that, so that each slice of "
            "2-byte numbers begins at a multiple of 4 bytes.",
            lambda n, w: _slices(-(-n // w), w),
        ),
        Mistake(
            "The last elements are lost: the length is rounded down, and nobody owns what is left over.",
            lambda n, w: _slices(n // w, w),
        ),
        Mistake(
            "The last rank takes the remainder, so its slice is longer than the others.",
            lambda n, w: [*_slices(n // w, w)[:-1], (n // w * (w - 1), n)],
        ),
        Mistake(
            "The ends are included. A slice ends where the next one begins.",
            lambda n, w: [(a, b - 1) for a, b in _slices(partition_size(n, w), w)],
        ),
        Mistake(
            "The array is padded by a whole multiple even where it divides evenly.",
            lambda n, w: _slices((n // (2 * w) + 1) * 2, w),
        ),
    ),
    hints=(
        "Find the common length first: elements over ranks, rounded up, and made even.",
        "-(-a // b) rounds a / b up. Rank r then owns from r x length to (r + 1) x length.",
    ),
    minutes=8,
    ask_next="How many elements can padding cost at most, and when does that matter?",
)


def owners(sizes: list[int], ranks: int) -> list[list[int]]:
    """Return for each tensor the ranks that own a part of it, at stages 1 and 2.

    `sizes` are the numbers of elements of the tensors, in the order of the flat array.
    It is cut into equal slices: the sum over `ranks`, rounded up to an even number.
    """
    length = -(-sum(sizes) // (2 * ranks)) * 2
    found, start = [], 0
    for size in sizes:
        last = start + size - 1
        found.append(list(range(start // length, last // length + 1)))
        start += size
    return found


def _by_element(sizes: list[int], length: int) -> list[list[int]]:
    """The owners, found from the owner of every single element."""
    owner = np.arange(sum(sizes)) // length
    return [np.unique(part).tolist() for part in np.split(owner, np.cumsum(sizes)[:-1])]


def _length(sizes: list[int], ranks: int) -> int:
    return partition_size(sum(sizes), ranks)


def _owner_cases(draw: random.Random) -> Iterator[Case]:
    yield Case(([4, 4, 4], 3), [[0], [1], [2]], "three tensors that end at the borders, on 3 ranks")
    yield Case(([3, 2, 3], 2), [[0], [0, 1], [1]], "three tensors, of which the second crosses the border")
    yield Case(([1, 12, 1], 3), [[0], [0, 1, 2], [2]], "a tensor that three ranks share")
    yield Case(([3, 3], 2), [[0], [0, 1]], "two tensors of 3 elements, on 2 ranks")
    yield Case(([5, 1], 4), [[0, 1, 2], [2]], "six elements on 4 ranks, of which one owns padding alone")
    for _ in range(20):
        sizes, ranks = [draw.randint(1, 60) for _ in range(draw.randint(2, 8))], draw.randint(2, 5)
        yield Case((sizes, ranks), _by_element(sizes, _length(sizes, ranks)))


def _end_counts(sizes: list[int], ranks: int) -> list[list[int]]:
    """Ends taken as the tensors' own: one that ends at a border goes to the next rank as well."""
    length, ends = _length(sizes, ranks), np.cumsum(sizes).tolist()
    return [list(range((b - s) // length, b // length + 1)) for s, b in zip(sizes, ends, strict=True)]


def _touching(begin_counts: bool, end_counts: bool) -> Callable[[list[int], int], list[list[int]]]:
    """Tensors and slices compared with `<=` or `>=`, so that a border belongs to both of its sides."""

    def owners_of(sizes: list[int], ranks: int) -> list[list[int]]:
        length, ends = _length(sizes, ranks), np.cumsum(sizes).tolist()

        def owns(rank: int, begin: int, end: int) -> bool:
            return begin < (rank + 1) * length + begin_counts and rank * length < end + end_counts

        return [[r for r in range(ranks) if owns(r, b - s, b)] for s, b in zip(sizes, ends, strict=True)]

    return owners_of


NEXT_AS_WELL = "A tensor that ends at a border is given to the next rank as well. Its last element is the one before."
OWNERS_OF_TENSORS = Exercise(
    name="03.owners",
    answer=owners,
    cases=_owner_cases,
    mistakes=(
        Mistake(
            "Each tensor is given to one rank. The borders fall where they fall, so a tensor may have two owners or "
            "more.",
            lambda sizes, ranks: [part[:1] for part in _by_element(sizes, _length(sizes, ranks))],
        ),
        Mistake(
            "Only the first and the last owner are listed. The ranks between them own a part of the tensor, too.",
            lambda sizes, ranks: [sorted({p[0], p[-1]}) for p in _by_element(sizes, _length(sizes, ranks))],
        ),
        Mistake(NEXT_AS_WELL, _end_counts),
        Mistake(NEXT_AS_WELL, _touching(False, True)),
        Mistake(
            "A tensor that begins at a border is given to the rank before as well. That rank's slice ends just before "
            "it: compare with `<`.",
            _touching(True, False),
        ),
        Mistake(
            "Tensors that only touch a border have owners on both of its sides. A tensor that ends at the border has "
            "no element in the next slice: compare with `<` and `>`.",
            _touching(True, True),
        ),
        Mistake(
            "The slices are too short: their length has to be made even, so a border may lie further on.",
            lambda sizes, ranks: _by_element(sizes, -(-sum(sizes) // ranks)),
        ),
        Mistake(
            "Every tensor is split over all ranks. That is stage 3; stages 1 and 2 cut the flat array.",
            lambda sizes, ranks: [list(range(ranks)) for _ in sizes],
        ),
        Mistake(
            "The position begins at 0 again for each tensor. The tensors lie one behind the other in the array.",
            lambda sizes, ranks: [list(range(-(-n // _length(sizes, ranks)))) for n in sizes],
        ),
    ),
    hints=(
        "Find the common length of the slices first; then follow the position of each tensor's first and last element.",
        "The element at position i belongs to rank i // length; the last element of a tensor is at start + size - 1.",
    ),
    minutes=12,
    ask_next="Which ranks keep a tensor's whole gradient after backward, and what does that cost?",
)
