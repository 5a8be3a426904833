"""Answers to the exercises of lesson 03, as learners write them."""

import math
from fractions import Fraction

import numpy as np
import torch

from minisft.zero import paper_formula


# 03.state_bytes
def without_masters(parameters, ranks, stage, precision):
    p, g = (2, 2) if precision == "half" else (4, 4)
    adam = 8 / ranks if stage > 0 else 8
    g = g / ranks if stage > 1 else g
    p = p / ranks if stage > 2 else p
    return parameters * (p + g + adam)


def one_average(parameters, ranks, stage, precision):
    base = {"half": [2, 2, 4 + 4], "fp32": [4, 4, 4]}[precision]
    for i in range(stage):
        base[2 - i] /= ranks
    return parameters * sum(base)


def table(parameters, ranks, stage, precision):
    base = {"half": [2, 2, 12], "fp32": [4, 4, 8]}[precision]
    for i in range(stage):
        base[2 - i] /= ranks
    return parameters * sum(base)


def masters_always(parameters, ranks, stage, precision):
    base = [2, 2, 12] if precision == "half" else [4, 4, 12]
    for i in range(stage):
        base[2 - i] /= ranks
    return parameters * sum(base)


def gradients_early(n, w, stage, precision):
    e = 2 if precision == "half" else 4
    rest = (16 - e) * n
    return table(n, w, stage, precision) if stage != 1 else e * n + rest / w


def parameters_early(n, w, stage, precision):
    return table(n, w, 3 if stage == 2 else stage, precision)


def all_split(n, w, stage, precision):
    return 16 * n / w if stage else 16 * n


def with_fractions(n, w, stage, precision):
    e, m = (2, 12) if precision == "half" else (4, 8)
    part = Fraction(1, w)
    sizes = zip((e, e, m), (3, 2, 1), strict=True)
    return float(sum(n * size * (part if stage >= first else 1) for size, first in sizes))


def as_tensor(n, w, stage, precision):
    sizes = torch.tensor([8.0, 4.0, 2.0, 2.0] if precision == "half" else [8.0, 0.0, 4.0, 4.0], dtype=torch.float64)
    split = torch.tensor([stage >= 1, stage >= 1, stage >= 2, stage >= 3])
    return torch.where(split, sizes / w, sizes).sum() * n


# 03.partition
def cut(n, w, length):
    return [(r * length, r * length + length) for r in range(w)]


def cropped(n, w):
    size = 2 * math.ceil(n / (2 * w))
    out = []
    for r in range(w):
        begin, end = r * size, (r + 1) * size
        out.append([min(begin, n), min(end, n)])
    return out


def last_takes_the_rest(n, w):
    size = n // w
    starts = [r * size for r in range(w)]
    return list(zip(starts, [*starts[1:], n], strict=True))


def inclusive(n, w):
    size = 2 * math.ceil(n / (2 * w))
    return [(r * size, r * size + size - 1) for r in range(w)]


def numpy_slices(n, w):
    padded = n + -n % (2 * w)
    return np.arange(padded).reshape(w, -1)[:, [0, -1]] + np.array([0, 1])


def torch_slices(n, w):
    size = (n + 2 * w - 1) // (2 * w) * 2
    starts = torch.arange(w) * size
    return torch.stack([starts, starts + size], dim=1)


def loop_slices(n, w):
    while n % (2 * w):
        n += 1
    return tuple((start, start + n // w) for start in range(0, n, n // w))


# 03.owners
def even(sizes, w):
    return 2 * math.ceil(sum(sizes) / (2 * w))


def touching(sizes, w):
    length, begin, out = even(sizes, w), 0, []
    for size in sizes:
        out.append([r for r in range(w) if begin <= (r + 1) * length and r * length <= begin + size])
        begin += size
    return out


def one_owner(sizes, w):
    length, at, out = even(sizes, w), 0, []
    for size in sizes:
        out.append([at // length])
        at += size
    return out


def ends_only(sizes, w):
    length, at, out = even(sizes, w), 0, []
    for size in sizes:
        first, last = at // length, (at + size - 1) // length
        out.append([first] if first == last else [first, last])
        at += size
    return out


def border_twice(sizes, w):
    length, at, out = even(sizes, w), 0, []
    for size in sizes:
        out.append(list(range(at // length, (at + size) // length + 1)))
        at += size
    return out


def not_even(sizes, w):
    length, at, out = math.ceil(sum(sizes) / w), 0, []
    for size in sizes:
        out.append([r for r in range(w) if at < (r + 1) * length and r * length < at + size])
        at += size
    return out


def from_zero(sizes, w):
    return [[r for r in range(w) if r * even(sizes, w) < size] for size in sizes]


def overlaps(sizes, w):
    length, at, out = even(sizes, w), 0, []
    for size in sizes:
        out.append(tuple(r for r in range(w) if max(at, r * length) < min(at + size, (r + 1) * length)))
        at += size
    return tuple(out)


def element_by_element(sizes, w):
    length, at, out = even(sizes, w), 0, []
    for size in sizes:
        out.append(sorted({i // length for i in range(at, at + size)}))
        at += size
    return out


def with_tensors(sizes, w):
    owner = torch.arange(sum(sizes)) // even(sizes, w)
    return [part.unique() for part in owner.split(list(sizes))]


# 03.traffic
def ring(amount, w):
    return amount * (w - 1) / w


def whole(size, w, stage, n):
    return size * {0: 2, 1: 2, 2: 1 + n, 3: 3 * n}[stage]


def stage1_every_time(size, w, stage, n):
    return ring(size * {0: 2, 1: 1 + n, 2: 1 + n, 3: 3 * n}[stage], w)


def stage2_once(size, w, stage, n):
    return ring(3 * n * size if stage == 3 else 2 * size, w)


def stage2_gathers(size, w, stage, n):
    return ring(size * {0: 2, 1: 2, 2: 2 * n, 3: 3 * n}[stage], w)


def gathers_once(size, w, stage, n):
    return ring(size * {0: 2, 1: 2, 2: 1 + n, 3: 2 * n}[stage], w)


def paper_alone(size, w, stage, n):
    return ring(size * (3 if stage == 3 else n + 1 if stage == 2 else 2), w)


def by_operations(size, w, stage, n):
    reduce = gather = size * (w - 1) / w
    total = 0
    for _ in range(n):
        total += reduce if stage >= 2 else 0
        total += 2 * gather if stage == 3 else 0
    total += reduce if stage < 2 else 0
    return np.float64(total + (gather if stage < 3 else 0))


def with_match(size, w, stage, n):
    match stage:
        case 0 | 1:
            times = 2
        case 2:
            times = n + 1
        case _:
            times = 3 * n
    return torch.tensor(times * size * (w - 1) / w, dtype=torch.float64)


# 03.smallest_stage
def no_reserve(p, w, gpu):
    return next((s for s in range(4) if paper_formula(p, w, s) <= gpu), None)


def three_at_last(p, w, gpu):
    for s in (0, 1, 2):
        if paper_formula(p, w, s) + 1.5e9 <= gpu:
            return s
    return 3


def leanest(p, w, gpu):
    fits = [s for s in range(4) if paper_formula(p, w, s) <= gpu - 1.5e9]
    return max(fits) if fits else None


def from_one(p, w, gpu):
    return next((s for s in (1, 2, 3) if paper_formula(p, w, s) <= gpu - 1.5e9), None)


def all_gpus(p, w, gpu):
    return next((s for s in range(4) if paper_formula(p, w, s) <= w * gpu - 1.5e9), None)


def by_hand(p, w, gpu):
    sizes = [16 * p, 4 * p + 12 * p / w, 2 * p + 14 * p / w, 16 * p / w]
    fits = [i for i, size in enumerate(sizes) if size + 1.5e9 <= gpu]
    return min(fits, default=None)


def by_argmax(p, w, gpu):
    fits = np.array([paper_formula(p, w, s) <= gpu - 1.5e9 for s in range(4)])
    return fits.argmax() if fits.any() else None


def backwards(p, w, gpu):
    best = None
    for s in (3, 2, 1, 0):
        if paper_formula(p, w, s) <= gpu - 1.5e9:
            best = s
    return best


WRONG = {
    "03.state_bytes": [
        (without_masters, "master copy is missing"),
        (one_average, "counted once"),
        (masters_always, "a master copy in fp32 too"),
        (gradients_early, "already split at stage 1"),
        (parameters_early, "already split at stage 2"),
        (all_split, "Everything is divided"),
        (lambda n, w, stage, precision: 0, "it is 0"),
        (lambda n, w, stage, precision: n * w / stage, "ZeroDivisionError"),
    ],
    "03.partition": [
        (cropped, "padding is forgotten"),
        (lambda n, w: cut(n, w, math.ceil(n / w)), "multiple of the ranks only"),
        (lambda n, w: cut(n, w, int(n / w)), "elements are lost"),
        (last_takes_the_rest, "takes the remainder"),
        (inclusive, "ends are included"),
        (lambda n, w: cut(n, w, 2 * w * (n // (2 * w) + 1) // w), "even where it divides evenly"),
        (lambda n, w: cut(n, w + 1, 2 * math.ceil(n / (2 * w))), "5 entries, and 4 are expected"),
    ],
    "03.owners": [
        (one_owner, "given to one rank"),
        (ends_only, "Only the first and the last"),
        (border_twice, "given to the next rank as well"),
        (not_even, "slices are too short"),
        (from_zero, "begins at 0 again"),
        (touching, "no element in the next slice"),
        (lambda sizes, w: [[*range(w)] for _ in sizes], "That is stage 3"),
        (lambda sizes, w: [], "0 entries"),
    ],
    "03.traffic": [
        (whole, "is forgotten"),
        (stage1_every_time, "Stage 1 is multiplied"),
        (stage2_once, "Stage 2 reduces only once"),
        (stage2_gathers, "Stage 2 gathers the parameters"),
        (gathers_once, "once per micro-batch. It gathers them in forward"),
        (paper_alone, "left out at stage 3"),
        (lambda size, w, stage, n: 2 * size, "is expected"),
    ],
    "03.smallest_stage": [
        (no_reserve, "forgotten"),
        (three_at_last, "where nothing fits"),
        (leanest, "sends the most"),
        (from_one, "Stage 0 is left out"),
        (all_gpus, "all GPUs is added up"),
        (lambda p, w, gpu: by_hand(p, w, gpu) or None, "`0 or None` is None"),
        (lambda p, w, gpu: next((s for s in range(3) if by_hand(p, w, gpu) == s), None), "Stage 3 is never tried"),
        (lambda p, w, gpu: next((s for s in range(4) if paper_formula(p, w, s) < gpu - 1.5e9), None), "exactly fit"),
        (lambda p, w, gpu: None, "returns nothing"),
        (lambda p, w, gpu: str(by_hand(p, w, gpu)), "is expected"),
    ],
}
RIGHT = {
    "03.state_bytes": [table, with_fractions, as_tensor],
    "03.partition": [numpy_slices, torch_slices, loop_slices],
    "03.owners": [overlaps, element_by_element, with_tensors],
    "03.traffic": [by_operations, with_match, lambda s, w, stage, n: ring(s * [2, 2, 1 + n, 3 * n][stage], w)],
    "03.smallest_stage": [by_hand, by_argmax, backwards],
}
