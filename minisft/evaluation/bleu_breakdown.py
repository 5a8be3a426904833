"""BLEU taken apart: which runs of words two texts share, and how that becomes one number.

Papineni et al. (2002), as sacreBLEU computes it (Post 2018): runs of one to four tokens, each counted at most as often
as the reference has it, exponential smoothing (Chen and Cherry 2014, method 3), brevity penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from minisft.evaluation.metrics import ORDERS, as_line, tokenizer_for

# From light to strong with the length of the longest shared run; the number beside a token says the same.
SHADES = {1: "#e3eef7", 2: "#b7d4ea", 3: "#79b0d9", 4: "#4b93c7"}


@dataclass(frozen=True)
class BleuBreakdown:
    """BLEU of one text against one reference.

    `matched` and `total` count runs of 1, 2, 3 and 4 tokens of the output; `depth` says for each token of the output,
    and `reference_depth` of the reference, the longest matched run that it is part of, 0 for none.
    """

    output: tuple[str, ...]
    reference: tuple[str, ...]
    matched: tuple[int, ...]
    total: tuple[int, ...]
    depth: tuple[int, ...]
    reference_depth: tuple[int, ...]

    @property
    def precisions(self) -> tuple[float, ...]:
        """The share of the output's runs that match, in percent, for 1 to 4 tokens; smoothed where none does."""
        found, smoothing = [], 1
        for matched, total in zip(self.matched, self.total, strict=True):
            if not matched:
                smoothing *= 2
            found.append(100 * (matched or 1 / smoothing) / total if total else 0.0)
        return tuple(found)

    @property
    def brevity_penalty(self) -> float:
        """1 for an output at least as long as the reference, less for a shorter one."""
        if not self.output:
            return 0.0
        return min(1.0, math.exp(1 - len(self.reference) / len(self.output)))

    @property
    def score(self) -> float:
        """BLEU, 0 to 100: the geometric mean of the precisions times the brevity penalty."""
        if not any(self.matched):
            return 0.0
        counted = [p for p, total in zip(self.precisions, self.total, strict=True) if total]
        if len(counted) < len(ORDERS):  # a precision of a run that the text is too short for is 0
            return 0.0
        return self.brevity_penalty * math.exp(sum(map(math.log, counted)) / len(counted))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def __str__(self) -> str:
        lines = [f"{'reference':<10} {_told(self.reference, self.reference_depth)}"]
        lines += [f"{'output':<10} {_told(self.output, self.depth)}"]
        lines += [
            f"{n}-grams    {matched:>3} of {total:>3}  {precision}" for n, matched, total, precision in self._rows()
        ]
        lines.append(f"brevity    {len(self.output)} tokens for {len(self.reference)}: {self.brevity_penalty:.3f}")
        return "\n".join([*lines, f"BLEU       {self.score:.2f}"])

    def html(self) -> str:
        """Both texts with their matches, and the parts of the score; both are untrusted and escaped."""
        about = [(f"{n}-grams", f"{matched} of {total}", precision) for n, matched, total, precision in self._rows()]
        lengths = f"{len(self.output)} tokens for {len(self.reference)}"
        about += [("brevity penalty", lengths, f"{self.brevity_penalty:.3f}"), ("BLEU", "", f"<b>{self.score:.2f}</b>")]
        rows = "".join(
            f"<tr><th scope='row' style='text-align:left'>{name}</th><td>{of}</td><td>{value}</td></tr>"
            for name, of, value in about
        )
        return (
            f"{_line('reference', self.reference, self.reference_depth)}{_line('output', self.output, self.depth)}"
            "<p style='font-size:85%'>A number and its shade: the longest run of tokens, up to 4, that both texts have "
            "and this token is part of.</p>"
            f"<table><tr><th></th><th>matched</th><th>precision</th></tr>{rows}</table>"
        )

    def _rows(self) -> list[tuple[int, int, int, str]]:
        smoothed = [
            " (smoothed)" if total and not matched else ""
            for matched, total in zip(self.matched, self.total, strict=True)
        ]
        shares = [f"{p:6.2f}%{note}" for p, note in zip(self.precisions, smoothed, strict=True)]
        return list(zip(ORDERS, self.matched, self.total, shares, strict=True))


def break_down_bleu(output: str, reference: str, tokenize: str | None = None) -> BleuBreakdown:
    """Take the BLEU of `output` against `reference` apart; `tokenize` as in `scores.corpus_scores`."""
    from sacrebleu.metrics import BLEU

    split = BLEU(tokenize=tokenize or tokenizer_for([reference])).tokenizer
    words, wanted = (tuple(split(as_line(text)).split()) for text in (output, reference))
    matched, total = [], []
    depth, reference_depth = [0] * len(words), [0] * len(wanted)
    for n in reversed(ORDERS):
        ours, theirs = _places(words, n), _places(wanted, n)
        both = {run: min(len(ours[run]), len(theirs[run])) for run in ours.keys() & theirs.keys()}
        for places, marks in ((ours, depth), (theirs, reference_depth)):
            for run, count in both.items():
                # Where a run stands more often than it counts: first where a longer one was found already.
                for start in sorted(places[run], key=lambda i: -sum(marks[i : i + n]))[:count]:
                    marks[start : start + n] = [max(n, mark) for mark in marks[start : start + n]]
        matched.append(sum(both.values()))
        total.append(sum(map(len, ours.values())))
    return BleuBreakdown(words, wanted, tuple(matched[::-1]), tuple(total[::-1]), tuple(depth), tuple(reference_depth))


def _places(words: Sequence[str], n: int) -> dict[tuple[str, ...], list[int]]:
    places: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(words) - n + 1):
        places.setdefault(tuple(words[start : start + n]), []).append(start)
    return places


def _told(words: Sequence[str], depth: Sequence[int]) -> str:
    return " ".join(f"{word}[{n}]" if n else word for word, n in zip(words, depth, strict=True)) or "(nothing)"


def _line(name: str, words: Sequence[str], depth: Sequence[int]) -> str:
    parts = [
        f"<span style='background:{SHADES[n]};color:#000;padding:0 2px'>{escape(word)}<sub>{n}</sub></span>"
        if n
        else f"<span>{escape(word)}</span>"
        for word, n in zip(words, depth, strict=True)
    ]
    return f"<p style='line-height:1.9'><b>{name}</b> {' '.join(parts) or '<em>(nothing)</em>'}</p>"
