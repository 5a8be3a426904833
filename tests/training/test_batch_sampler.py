"""Every strategy must see the same rows at every step, whoever gets which of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.training.batch_sampler import Packs, RankBatches

SHAPES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]  # batch size, accumulation, ranks: all are 8 rows
LENGTHS = st.lists(st.integers(2, 60), min_size=8, max_size=70)


@given(lengths=LENGTHS, seed=st.integers(0, 1000), epoch=st.integers(0, 3), by_length=st.booleans())
def test_the_same_rows_in_every_step_however_they_are_shared_out(lengths, seed, epoch, by_length):
    seen = []
    for size, accumulation, ranks in SHAPES:
        of_ranks = []
        for rank in range(ranks):
            batches = RankBatches(lengths, size, accumulation, ranks, rank, seed, by_length)
            batches.set_epoch(epoch)
            of_ranks.append(list(batches))
            assert len(of_ranks[-1]) == len(batches)
            assert {len(micro) for micro in of_ranks[-1]} <= {size}
        steps = []
        for start in range(0, len(of_ranks[0]), accumulation):
            steps.append(sorted(row for b in of_ranks for micro in b[start : start + accumulation] for row in micro))
        seen.append(steps)
    assert all(steps == seen[0] for steps in seen)
    rows = [row for step in seen[0] for row in step]
    assert len(rows) == len(set(rows)) == len(lengths) // 8 * 8


def test_epochs_and_seeds_shuffle_anew_and_repeat_themselves():
    def order(seed, epoch):
        batches = RankBatches(range(2, 66), 8, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 0)


def test_ranks_get_nearly_the_same_number_of_tokens():
    lengths = [500, 400, 300, 200, 100, 100, 100, 100]
    shares = RankBatches(lengths, batch_size=4, ranks=2).shares(list(range(8)))
    tokens = [sum(lengths[row] for micro in share for row in micro) for share in shares]
    assert max(tokens) - min(tokens) <= 100


def test_padded_batches_have_rows_of_like_length():
    import random

    chance = random.Random(0)
    lengths = [chance.randint(2, 500) for _ in range(320)]

    def padding(by_length):
        batches = RankBatches(lengths, 8, by_length=by_length)
        return sum(len(b) * max(lengths[r] for r in b) - sum(lengths[r] for r in b) for b in batches)

    assert padding(True) < 0.1 * padding(False)


@given(lengths=st.lists(st.integers(2, 50), max_size=80))
def test_packs_hold_every_row_once_and_no_pack_is_too_long(lengths):
    packs = Packs(list(range(len(lengths))), lengths, max_length=50)
    members = [row for i in range(len(packs)) for row in packs[i]]
    assert sorted(members) == list(range(len(lengths)))
    assert all(total <= 50 for total in packs.lengths)
    assert all(a + b > 50 for a, b in zip(packs.lengths, packs.lengths[1:], strict=False) if len(packs) == 2)


@pytest.mark.parametrize("rows", [0, 7])
def test_too_few_rows_make_no_batch(rows):
    assert len(RankBatches([5] * rows, 8)) == 0
