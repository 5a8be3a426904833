"""Scores of answers against references, all of them sacreBLEU's own, each with its signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisft.errors import UserError


def corpus_scores(outputs: Sequence[str], references: Sequence[str], resamples: int = 1000) -> dict[str, Any]:
    """Corpus BLEU and chrF (0 to 100) of `outputs`, one reference each, and the ratio of their lengths.

    `bleu_interval` and `chrf_interval` are [low, high] at 95% by bootstrap resampling (Koehn 2004): sacreBLEU's mean
    over `resamples` corpora drawn from these rows, less and plus half the width of the middle 95% of them, cut at 0 and
    100. They say how far another draw of as many rows might lie; empty without resamples. Texts count as lines: any
    white space as one blank.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if not outputs:
        raise UserError("there is no answer to score: evaluate at least one row")
    found: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        lines = [one_line(text) for text in outputs], [[one_line(text) for text in references]]
        _plain_numbers(metric)
        score = metric.corpus_score(*lines, n_bootstrap=resamples or 1)
        found[name] = score.score
        edges = (score._mean - score._ci, score._mean + score._ci)
        found[f"{name}_interval"] = [min(100.0, max(0.0, edge)) for edge in edges] if resamples else []
        found[f"{name}_signature"] = str(metric.get_signature())
        if name == "bleu":
            found["length_ratio"] = score.sys_len / max(1, score.ref_len)
    return found


def paired_bootstrap(
    before: Sequence[str], after: Sequence[str], references: Sequence[str], resamples: int = 1000
) -> float:
    """How often chance alone makes corpus BLEU differ as much as between two systems' answers to the same questions.

    The p-value of sacreBLEU's paired bootstrap (Koehn 2004): questions are drawn, and both are scored on those.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    if not references:
        raise UserError("there is no answer to compare: evaluate at least one row")
    metric = BLEU()
    _plain_numbers(metric)
    systems = [(name, [one_line(text) for text in said]) for name, said in (("before", before), ("after", after))]
    test = PairedTest(
        systems, {"BLEU": metric}, [[one_line(text) for text in references]], test_type="bs", n_samples=resamples
    )
    _, scores = test()
    a, b = scores["BLEU"]
    return 1.0 if a.score == b.score else float(b.p_value)  # it would find a difference of nothing significant


def _plain_numbers(metric: Any) -> None:
    """Make all its scores Python's floats: sacreBLEU 2.6 mixes in NumPy's, of which it can then take no mean."""
    compute = metric._compute_score_from_stats

    def as_float(statistics: Any) -> Any:
        found = compute(statistics)
        found.score = float(found.score)
        return found

    metric._compute_score_from_stats = as_float


def one_line(text: str) -> str:
    """The text as the one line that it is in the files which sacreBLEU's command reads."""
    return " ".join(text.split())
