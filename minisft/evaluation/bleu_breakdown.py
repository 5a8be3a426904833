"""Break one BLEU score down: which n-grams match, and how the score follows from them.

Defined by Papineni et al. (2002), computed as in sacreBLEU (Post 2018): n-grams of one to four
tokens, each counted at most as often as in the reference; exponential smoothing (Chen and Cherry
2014, method 3); brevity penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from minisft.evaluation.metrics import ORDERS, as_line, tokenizer_for

# Darker for a longer n-gram; the number beside each token gives the same information without color.
SHADES = {1: "#e3eef7", 2: "#b7d4ea", 3: "#79b0d9", 4: "#4b93c7"}


@dataclass(frozen=True)
class BleuBreakdown:
    """BLEU of one text against one reference.

    `matched` and `total` count the output's n-grams of 1, 2, 3 and 4 tokens. `depth` holds, for
    each token of the output, the length of the longest matched n-gram that contains it, or 0;
    `reference_depth` is the same for the reference.
    """

    output: tuple[str, ...]
    reference: tuple[str, ...]
    matched: tuple[int, ...]
    total: tuple[int, ...]
    depth: tuple[int, ...]
    reference_depth: tuple[int, ...]

    @property
    def precisions(self) -> tuple[float, ...]:
        """The percentage of n-grams that match, for 1 to 4 tokens; smoothed where none matches."""
        precisions, smoothing = [], 1
        for matched, total in zip(self.matched, self.total, strict=True):
            if not matched:
                smoothing *= 2
            precisions.append(100 * (matched or 1 / smoothing) / total if total else 0.0)
        return tuple(precisions)

    @property
    def brevity_penalty(self) -> float:
        """1 for an output at least as long as the reference, less for a shorter output."""
        if not self.output:
            return 0.0
        return min(1.0, math.exp(1 - len(self.reference) / len(self.output)))

    @property
    def score(self) -> float:
        """BLEU, 0 to 100: the geometric mean of the precisions times the brevity penalty."""
        if not any(self.matched):
            return 0.0
        nonzero = [p for p, total in zip(self.precisions, self.total, strict=True) if total]
        if len(nonzero) < len(ORDERS):  # the output is shorter than four tokens: one precision is 0
            return 0.0
        return self.brevity_penalty * math.exp(sum(map(math.log, nonzero)) / len(nonzero))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def __str__(self) -> str:
        lines = [f"{'reference':<10} {_marked(self.reference, self.reference_depth)}"]
        lines += [f"{'output':<10} {_marked(self.output, self.depth)}"]
        lines += [
            f"{n}-grams    {matched:>3} of {total:>3}  {precision}" for n, matched, total, precision in self._rows()
        ]
        lines.append(f"brevity    {len(self.output)} tokens for {len(self.reference)}: {self.brevity_penalty:.3f}")
        return "\n".join([*lines, f"BLEU       {self.score:.2f}"])

    def html(self) -> str:
        """Return both texts with their matches, and the parts of the score; all text is escaped."""
        parts = [(f"{n}-grams", f"{matched} of {total}", precision) for n, matched, total, precision in self._rows()]
        lengths = f"{len(self.output)} tokens for {len(self.reference)}"
        parts += [("brevity penalty", lengths, f"{self.brevity_penalty:.3f}"), ("BLEU", "", f"<b>{self.score:.2f}</b>")]
        rows = "".join(
            f"<tr><th scope='row' style='text-align:left'>{name}</th><td>{counts}</td><td>{value}</td></tr>"
            for name, counts, value in parts
        )
        return (
            f"{_line('reference', self.reference, self.reference_depth)}{_line('output', self.output, self.depth)}"
            "<p style='font-size:85%'>Number and shade: the length, up to 4 tokens, of the longest n-gram that "
            "contains the token and occurs in both texts.</p>"
            f"<table><tr><th></th><th>matched</th><th>precision</th></tr>{rows}</table>"
        )

    def _rows(self) -> list[tuple[int, int, int, str]]:
        notes = [
            " (smoothed)" if total and not matched else ""
            for matched, total in zip(self.matched, self.total, strict=True)
        ]
        shares = [f"{p:6.2f}%{note}" for p, note in zip(self.precisions, notes, strict=True)]
        return list(zip(ORDERS, self.matched, self.total, shares, strict=True))


def break_down_bleu(output: str, reference: str, tokenize: str | None = None) -> BleuBreakdown:
    """Break down the BLEU of `output` against `reference`.

    `tokenize` is BLEU's tokenizer, as in `metrics.corpus_scores`.
    """
    from sacrebleu.metrics import BLEU

    split = BLEU(tokenize=tokenize or tokenizer_for([reference])).tokenizer
    output_tokens, reference_tokens = (tuple(split(as_line(text)).split()) for text in (output, reference))
    matched, total = [], []
    depth, reference_depth = [0] * len(output_tokens), [0] * len(reference_tokens)
    for n in reversed(ORDERS):
        ours, theirs = _starts_of(output_tokens, n), _starts_of(reference_tokens, n)
        common = {ngram: min(len(ours[ngram]), len(theirs[ngram])) for ngram in ours.keys() & theirs.keys()}
        for starts, marks in ((ours, depth), (theirs, reference_depth)):
            for ngram, count in common.items():
                # If it occurs more often than it counts, prefer occurrences inside longer matches.
                for start in sorted(starts[ngram], key=lambda i: -sum(marks[i : i + n]))[:count]:
                    marks[start : start + n] = [max(n, mark) for mark in marks[start : start + n]]
        matched.append(sum(common.values()))
        total.append(sum(map(len, ours.values())))
    return BleuBreakdown(
        output_tokens,
        reference_tokens,
        tuple(matched[::-1]),
        tuple(total[::-1]),
        tuple(depth),
        tuple(reference_depth),
    )


def _starts_of(tokens: Sequence[str], n: int) -> dict[tuple[str, ...], list[int]]:
    """Map each n-gram of `tokens` to the positions where it starts."""
    starts: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(tokens) - n + 1):
        starts.setdefault(tuple(tokens[start : start + n]), []).append(start)
    return starts


def _marked(tokens: Sequence[str], depth: Sequence[int]) -> str:
    return " ".join(f"{token}[{n}]" if n else token for token, n in zip(tokens, depth, strict=True)) or "(nothing)"


def _line(name: str, tokens: Sequence[str], depth: Sequence[int]) -> str:
    parts = [
        f"<span style='background:{SHADES[n]};color:#000;padding:0 2px'>{escape(token)}<sub>{n}</sub></span>"
        if n
        else f"<span>{escape(token)}</span>"
        for token, n in zip(tokens, depth, strict=True)
    ]
    return f"<p style='line-height:1.9'><b>{name}</b> {' '.join(parts) or '<em>(nothing)</em>'}</p>"
