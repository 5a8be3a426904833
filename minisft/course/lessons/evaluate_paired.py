"""Lesson 05: the exercise on the paired bootstrap."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.evaluation.metrics import two_sided_p

Counts = Sequence[tuple[int, int]]  # matched and total of each question


def paired_p(first: list[tuple], second: list[tuple], samples: list[list]) -> float:
    """Return the p-value of the difference between two systems on the same questions.

    `first` and `second` hold (matched, total) for each question. The score of several
    questions is 100 times their matched, added up, over their totals, added up. Each of
    `samples` lists the questions of one resample, drawn with replacement.

    Take the difference, second less first, on each sample, and subtract the mean of
    these differences. p is (k + 1) / (number of samples + 1), where k counts those that
    are at least as far from 0 as the difference on all questions.
    """

    def difference(questions: list | range) -> float:
        scores = []
        for counts in (first, second):
            drawn = [counts[q] for q in questions]
            scores.append(100 * sum(m for m, _ in drawn) / sum(t for _, t in drawn))
        return scores[1] - scores[0]

    differences = [difference(sample) for sample in samples]
    mean = sum(differences) / len(differences)
    observed = abs(difference(range(len(first))))
    k = sum(abs(value - mean) >= observed for value in differences)
    return (k + 1) / (len(samples) + 1)


def _paired_cases(draw: random.Random) -> Iterator[Case]:
    import numpy as np

    same_gain = ([(1, 2), (2, 4)], [(2, 2), (4, 4)], [[0, 0], [0, 1], [1, 1]])
    yield Case(same_gain, 0.25, "a second system that gains the same on every question")
    one_gains = ([(0, 10), (5, 10)], [(4, 10), (5, 10)], [[0, 0], [0, 1], [1, 1], [0, 0]])
    yield Case(one_gains, 0.4, "a second system that gains on one of two questions")
    made = 0
    while made < 12:
        questions = draw.randint(6, 9)
        totals = [draw.randint(5, 20) for _ in range(questions)]
        first, second = ([(draw.randint(0, total), total) for total in totals] for _ in range(2))
        samples = [draw.choices(range(questions), k=questions) for _ in range(39)]
        counts = [np.array(one) for one in (first, second)]
        scores = [[100 * c[s, 0].sum() / c[s, 1].sum() for s in [*samples, range(questions)]] for c in counts]
        *resampled, observed = (b - a for a, b in zip(*scores, strict=True))
        distances = [abs(abs(value - np.mean(resampled)) - abs(observed)) for value in resampled]
        if min(distances) > 1e-6 and 1 < abs(observed) < 12:  # no tie, which rounding would decide
            made += 1
            yield Case((first, second, samples), two_sided_p(resampled, observed))


def _score(counts: Counts, questions: Sequence[int]) -> float:
    return 100 * sum(counts[q][0] for q in questions) / sum(counts[q][1] for q in questions)


def _mean_score(counts: Counts, questions: Sequence[int]) -> float:
    return sum(100 * counts[q][0] / counts[q][1] for q in questions) / len(questions)


def _resampled(
    as_large: Callable[[float, float, float], bool] = lambda value, mean, observed: abs(value - mean) >= abs(observed),
    score: Callable[[Counts, Sequence[int]], float] = _score,
    partner: Callable[[list[Any]], list[Any]] = list,
    added: int = 1,
) -> Callable[[Counts, Counts, list[Any]], float]:
    """The answer to 05.paired_bootstrap with one part replaced; `partner` makes the second system's samples."""

    def p_of(first: Counts, second: Counts, samples: list[Any]) -> float:
        pairs = zip(samples, partner(samples), strict=True)
        values = [score(second, theirs) - score(first, ours) for ours, theirs in pairs]
        everything = range(len(first))
        observed = score(second, everything) - score(first, everything)
        mean = sum(values) / len(values)
        return (sum(as_large(value, mean, observed) for value in values) + added) / (len(values) + added)

    return p_of


def _distinct(answer: Callable[..., float]) -> Callable[..., float]:
    return lambda first, second, samples: answer(first, second, [sorted(set(sample)) for sample in samples])


UNPAIRED = (
    "The two systems are scored on different samples. Then p also contains how much the questions differ, which "
    "pairing removes: score both on the same sample."
)
ONE_SIDED = (
    "This counts one direction only, about half of what chance can do. Nobody promised which system would win: "
    "compare distances from 0."
)

PAIRED = Exercise(
    name="05.paired_bootstrap",
    answer=paired_p,
    cases=_paired_cases,
    mistakes=(
        Mistake(UNPAIRED, _resampled(partner=lambda samples: samples[::-1])),
        Mistake(UNPAIRED, _resampled(partner=lambda samples: [*samples[1:], samples[0]])),
        Mistake(ONE_SIDED, _resampled(lambda value, mean, observed: value - mean >= abs(observed))),
        Mistake(ONE_SIDED, _resampled(lambda value, mean, observed: value - mean >= observed)),
        Mistake(
            "Each question is scored once per sample. Drawn with replacement, a question counts as often as it was "
            "drawn; otherwise the samples differ too little.",
            _distinct(_resampled()),
        ),
        Mistake(
            "The mean is not subtracted. The resampled differences scatter around the observed one, so about half of "
            "them are larger than it, whatever the systems are.",
            _resampled(lambda value, mean, observed: abs(value) >= abs(observed)),
        ),
        Mistake(
            "The score of a sample is the mean of its questions' scores. Add up the counts first, as BLEU does.",
            _resampled(score=_mean_score),
        ),
        Mistake(
            "The 1 is missing above and below. It counts the observed difference itself; without it p can be 0, which "
            "no finite number of samples can show.",
            _resampled(added=0),
        ),
    ),
    hints=(
        "Write the difference on a list of questions as a function; call it for each sample and for all questions.",
        "k is the number of samples with abs(difference - mean) >= abs(difference on all questions).",
    ),
    minutes=15,
    ask_next="What would p be for 10 questions that were each copied ten times, and why would it be wrong?",
)
