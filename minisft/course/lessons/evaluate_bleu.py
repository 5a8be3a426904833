"""Lesson 05: exercises on BLEU."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from minisft.course.exercises import Case, Exercise, Mistake

Answer = tuple[Sequence[int], Sequence[int], int, int]  # matched, total, words, words of the reference
WORDS = ("a", "b", "c", "d", "e")


def clipped_precision(output: str, reference: str, n: int) -> tuple[int, int]:
    """Return (matched, total) of the output's sequences of `n` words.

    Words are separated by white space. `total` counts the sequences in the output.
    `matched` counts those that the reference contains as well, each sequence at most
    as often as it occurs in the reference.
    """
    from collections import Counter

    def sequences(text: str) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    produced = sequences(output)
    return (produced & sequences(reference)).total(), produced.total()


def _clipped_cases(draw: random.Random) -> Iterator[Case]:
    from sacrebleu.metrics import BLEU

    paper = ("the the the the the the the", "the cat is on the mat", 1)
    yield Case(paper, (2, 7), "the example of the BLEU paper")
    yield Case(("the cat sat", "the cat sat on the mat", 2), (2, 2), "a short output whose words all match")
    yield Case(("so it is", "so it was", 4), (0, 0), "an output of fewer than n words")
    for _ in range(15):
        output, reference = (" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(2))
        n = draw.randint(1, 3)
        scored = BLEU(tokenize="none").corpus_score([output], [[reference]])
        yield Case((output, reference, n), (scored.counts[n - 1], scored.totals[n - 1]))


def _ngrams(parts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]


def _unclipped(output: str, reference: str, n: int) -> tuple[int, int]:
    produced, wanted = _ngrams(output.split(), n), _ngrams(reference.split(), n)
    return sum(ngram in wanted for ngram in produced), len(produced)


def _each_once(output: str, reference: str, n: int) -> tuple[int, int]:
    produced, wanted = (set(_ngrams(text.split(), n)) for text in (output, reference))
    return len(produced & wanted), len(produced)


def _of_the_reference(output: str, reference: str, n: int) -> tuple[int, int]:
    matched, _ = clipped_precision(output, reference, n)
    return matched, len(_ngrams(reference.split(), n))


def _without_the_last(output: str, reference: str, n: int) -> tuple[int, int]:
    produced, wanted = (Counter(_ngrams(text.split(), n)[:-1]) for text in (output, reference))
    return (produced & wanted).total(), produced.total()


def _of_characters(output: str, reference: str, n: int) -> tuple[int, int]:
    produced, wanted = (Counter(_ngrams(text, n)) for text in (output, reference))
    return (produced & wanted).total(), produced.total()


CLIPPED = Exercise(
    name="05.clipped_precision",
    answer=clipped_precision,
    cases=_clipped_cases,
    mistakes=(
        Mistake(
            "The matches are not clipped. A sequence counts at most as often as it is in the reference; otherwise "
            "repeating one good word would give a perfect score.",
            _unclipped,
        ),
        Mistake("Each sequence is counted once. Repeated ones count too, up to their number.", _each_once),
        Mistake(
            "The total is that of the reference. That is recall; precision divides by what the output contains.",
            _of_the_reference,
        ),
        Mistake("The last sequence is missing: k words contain k - n + 1 sequences of n words.", _without_the_last),
        Mistake("These are sequences of characters, as in chrF. BLEU compares words.", _of_characters),
    ),
    hints=(
        "Count the sequences of each text with a `Counter`; a tuple of words can be its key.",
        "`a & b` of two Counters keeps the smaller count of each key, and `.total()` adds the counts up.",
    ),
    minutes=10,
    ask_next="What changes with several references for one question?",
)


def corpus_bleu(answers: list[tuple]) -> float:
    """Return the BLEU of all answers together, from 0 to 100, without smoothing.

    Each answer is a tuple (matched, total, words, reference_words). `matched` and
    `total` are lists of four counts, for sequences of 1, 2, 3 and 4 words; `words` and
    `reference_words` are the lengths of the output and of the reference.
    """
    import math

    precisions = []
    for n in range(4):
        matched = sum(answer[0][n] for answer in answers)
        precisions.append(matched / sum(answer[1][n] for answer in answers))
    words = sum(answer[2] for answer in answers)
    reference_words = sum(answer[3] for answer in answers)
    penalty = min(1, math.exp(1 - reference_words / words))
    return 100 * math.prod(precisions) ** (1 / 4) * penalty


def _bleu_cases(draw: random.Random) -> Iterator[Case]:
    from sacrebleu.metrics import BLEU

    toy = ([7, 6, 5, 4], [7, 6, 5, 4], 7, 10)
    yield Case(([toy],), 65.1439, "an output that is too short and otherwise perfect")
    long = ([5, 4, 3, 2], [10, 9, 8, 7], 10, 5)
    yield Case(([long],), 39.2813, "an output twice as long as its reference")
    yield Case(([([3, 2, 1, 0], [6, 5, 4, 3], 6, 6)],), 0.0, "an output without four matching words in a row")
    metric = BLEU(tokenize="none", smooth_method="none")
    for _ in range(8):
        references = [draw.choices(WORDS, k=draw.randint(8, 14)) for _ in range(draw.randint(2, 4))]
        lines = [" ".join(words) for words in references]
        most = draw.choice((2, 16))  # words of an output, more than its reference has; short and long ones
        outputs = [" ".join([*words[: 5 + draw.randint(0, 3)], *draw.choices(WORDS, k=most)]) for words in references]
        scored = [metric.corpus_score([o], [[r]]) for o, r in zip(outputs, lines, strict=True)]
        answers = [(s.counts, s.totals, s.sys_len, s.ref_len) for s in scored]
        yield Case((answers,), metric.corpus_score(outputs, [lines]).score)


def _precisions(answers: Sequence[Answer]) -> list[float]:
    return [sum(a[0][n] for a in answers) / sum(a[1][n] for a in answers) for n in range(4)]


def _lengths(answers: Sequence[Answer]) -> float:
    """Words of the references over words of the outputs."""
    return sum(a[3] for a in answers) / sum(a[2] for a in answers)


def _bleu(precisions: Sequence[float], penalty: float) -> float:
    return 100 * math.prod(precisions) ** 0.25 * penalty


def _penalty(answers: Sequence[Answer]) -> float:
    return min(1.0, math.exp(1 - _lengths(answers)))


def _averaged_precisions(answers: Sequence[Answer]) -> float:
    each = [_precisions([answer]) for answer in answers]
    return _bleu([sum(p[n] for p in each) / len(each) for n in range(4)], _penalty(answers))


BLEU_OF_COUNTS = Exercise(
    name="05.bleu",
    answer=corpus_bleu,
    cases=_bleu_cases,
    mistakes=(
        Mistake(
            "This is the arithmetic mean of the precisions. BLEU takes the geometric one: a precision of 0 makes it 0.",
            lambda answers: 100 * sum(_precisions(answers)) / 4 * _penalty(answers),
        ),
        Mistake(
            "The brevity penalty is missing. Without it, one safe word would score 100.",
            lambda answers: _bleu(_precisions(answers), 1.0),
        ),
        Mistake(
            "The penalty also changes scores of long outputs. It is 1 for them: precision has lowered them already.",
            lambda answers: _bleu(_precisions(answers), math.exp(1 - _lengths(answers))),
        ),
        Mistake(
            "This is the mean of the answers' own scores. Corpus BLEU adds up the counts of all answers first, so that "
            "one answer without a match does not decide.",
            lambda answers: sum(corpus_bleu([answer]) for answer in answers) / len(answers),
        ),
        Mistake(
            "The precisions are averaged over the answers. Add up the counts and divide once, so that long answers "
            "weigh more than short ones.",
            _averaged_precisions,
        ),
        Mistake(
            "The score runs from 0 to 1. BLEU is reported from 0 to 100.", lambda answers: corpus_bleu(answers) / 100
        ),
        Mistake(
            "The penalty is the ratio of the lengths. It is exp(1 - r / c).",
            lambda answers: _bleu(_precisions(answers), min(1.0, 1 / _lengths(answers))),
        ),
    ),
    hints=(
        "Add up the four matched counts, the four totals and both lengths over all answers, and divide only then.",
        "100 times the product of the four precisions to the power 1/4, times min(1, exp(1 - r / c)).",
    ),
    minutes=12,
    ask_next="Why do sentence scores need smoothing more often than corpus scores?",
    tolerance=1e-4,
)
