"""The token lens: show every token of a row with its label, in notebooks, terminals and figures.

The text of a row is untrusted. All of it passes through `visible`, so that no character can move
the cursor, change the direction of the line or hide. In HTML it is also escaped.
"""

from __future__ import annotations

import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

from minisft.chat.tokenizers import Tokenizer
from minisft.labels.encode_row import IGNORE_INDEX, Row
from minisft.labels.token_lens_html import (
    FOLD,
    KINDS,
    LONGEST,
    MOST_LOSS,
    bar_height,
    box_html,
    count_of,
    folded,
    loss_bar,
    marks_of,
)
from minisft.text import visible

_WIDTHS = {"position": 8, "id": 7, "label": 7, "predicts": 8, "loss": 6}  # columns in a terminal


@dataclass(frozen=True)
class Box:
    """Tokens `start` to `stop` shown as one: a single token, or several that form characters."""

    start: int
    stop: int
    text: str
    kinds: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Lens:
    """Shows `row`. `losses` are in nats, None where unknown; `attention_mask` is 0 for padding."""

    row: Row
    tokenizer: Tokenizer
    losses: Sequence[float | None] | None = None
    attention_mask: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, values in (("losses", self.losses), ("attention_mask", self.attention_mask)):
            if values is not None and len(values) != len(self.row.input_ids):
                raise ValueError(f"{name} has {len(values)} values for the row's {len(self.row.input_ids)} tokens")

    def __repr__(self) -> str:
        return self.verdict

    def __str__(self) -> str:
        return self.to_text()

    # --- what each token is -----------------------------------------------------------------------

    def is_trained(self, i: int) -> bool:
        """Whether token `i` is in the loss; token 0 never is, because nothing precedes it."""
        return i > 0 and self.row.labels[i] != IGNORE_INDEX

    def is_padding(self, i: int) -> bool:
        """Whether the attention mask hides token `i`."""
        return self.attention_mask is not None and not self.attention_mask[i]

    def kinds(self, i: int) -> tuple[str, ...]:
        """Return the kinds of token `i`: padding, control or added word; and target or prompt."""
        token_id = self.row.input_ids[i]
        is_control = token_id in self.tokenizer.control_ids
        role = "padding" if self.is_padding(i) else "control" if is_control else ""
        training = "target" if self.is_trained(i) else "" if role else "prompt"
        word = "" if role or token_id not in self.tokenizer.added_words else "added word"
        return tuple(filter(None, (role or word, training)))

    def loss(self, i: int) -> float | None:
        """Return the loss of token `i` in nats, or None if there is none."""
        loss = None if i < 1 or self.losses is None else self.losses[i]
        return None if loss is None else float(loss)

    @cached_property
    def boxes(self) -> list[Box]:
        """The boxes of the row, in order; each token is in exactly one."""
        boxes: list[Box] = []
        start = 0
        while start < len(self.row.input_ids):
            stop = self._box_stop(start)
            text = visible(b"".join(map(self.tokenizer.token_bytes, self.row.input_ids[start:stop])))
            boxes.append(Box(start, stop, text, self.kinds(start)))
            start = stop
        return boxes

    def _box_stop(self, start: int) -> int:
        """The end of the shortest run of one kind that is whole characters; else `start` + 1."""
        kinds, decoder = self.kinds(start), getincrementaldecoder("utf-8")()
        for i in range(start, len(self.row.input_ids)):
            if "control" in kinds or self.kinds(i) != kinds:
                break
            try:
                decoder.decode(self.tokenizer.token_bytes(self.row.input_ids[i]))
            except UnicodeDecodeError:
                break
            if not decoder.getstate()[0]:  # no incomplete character remains
                return i + 1
        return start + 1

    @cached_property
    def _box_of(self) -> list[Box]:
        return [box for box in self.boxes for _ in range(box.start, box.stop)]

    def facts(self, i: int) -> dict[str, str]:
        """Return everything known about token `i`, as text by column name.

        `predicts` is the label of the next token, which is predicted at position `i`.
        """
        box, kinds, loss = self._box_of[i], self.kinds(i), self.loss(i)
        text, size = visible(self.tokenizer.token_bytes(self.row.input_ids[i])), box.stop - box.start
        predicts = i + 1 < len(self.row.labels) and self.is_trained(i + 1)
        return {
            "position": f"{i}",
            "id": f"{self.row.input_ids[i]}",
            "label": f"{self.row.labels[i]}",
            "predicts": f"{self.row.labels[i + 1]}" if predicts else "-",
            **({} if self.losses is None else {"loss": "-" if loss is None else f"{loss:.2f}"}),
            "kind": f"{marks_of(kinds)} {', '.join(kinds)}".strip(),
            "token": text if size == 1 else f"{text} ({i - box.start + 1} of {size} tokens of {box.text})",
        }

    # --- what the row is --------------------------------------------------------------------------

    @cached_property
    def verdict(self) -> str:
        """The row in one line: how many tokens are trained, and whether its answers end in EOS."""
        ids, labels = self.row.input_ids, self.row.labels
        trained = [i for i in range(len(ids)) if self.is_trained(i)]
        padding = [i for i in range(len(ids)) if self.is_padding(i)]
        parts = [f"{len(trained)} of {count_of(len(ids), 'token')} trained" if trained else "no token is trained"]
        if trained:
            parts.append(self._how_answers_end())
        if self.row.truncated and "cut off" not in parts[-1]:
            parts.append("the row was cut off")
        if padding:
            parts.append(f"{count_of(len(padding), 'token')} of padding")
        if count := sum(map(self.is_trained, padding)):
            parts.append(f"padding trained by mistake: {count_of(count, 'token')}")
        if count := sum(labels[i] != ids[i] for i in trained):
            parts.append(f"labels that are not their token's id: {count}")
        return "; ".join(parts)

    def _how_answers_end(self) -> str:
        """Describe how the answers end.

        An answer is a run of trained tokens, which a trained EOS also ends.
        """
        labels, eos_id = self.row.labels, self.tokenizer.eos_id
        trained = [*map(self.is_trained, range(len(labels))), False]
        ends = [i for i, label in enumerate(labels) if trained[i] and (label == eos_id or not trained[i + 1])]
        problems = {n: "does not end in EOS" for n, end in enumerate(ends, 1) if labels[end] != eos_id}
        count, correct = len(ends), len(ends) - len(problems)
        if count in problems and ends[-1] + 1 == self.cut_at:
            problems[count] = "was cut off"
        if count == 1:
            return f"the answer {problems.get(1, 'ends in EOS')}"
        if not problems:
            return f"{'both' if count == 2 else f'all {count}'} answers end in EOS"
        sentences = [f"answer {n} {problem}" for n, problem in problems.items()]
        if len(sentences) > 4:
            sentences[2:-1] = [f"nor do {len(sentences) - 3} more"]
        return f"{correct or 'none'} of {count} answers end{'s' * (correct < 2)} in EOS: {', '.join(sentences)}"

    @cached_property
    def cut_at(self) -> int | None:
        """The position where the row was cut off, before any padding; None if it was not."""
        if not self.row.truncated:
            return None
        return max((i + 1 for i in range(len(self.row.input_ids)) if not self.is_padding(i)), default=0)

    @cached_property
    def loss_line(self) -> str:
        """The mean loss over the trained tokens, as text; empty if no loss is known."""
        known = [loss for i in range(len(self.row.labels)) if self.is_trained(i) and (loss := self.loss(i)) is not None]
        if not known:
            return ""
        return f"mean loss over the {count_of(len(known), 'trained token')}: {math.fsum(known) / len(known):.3f} nats"

    # --- how it is shown --------------------------------------------------------------------------

    def _walk(
        self, items: Sequence[Any], show: Callable[[Any], Any], note: Callable[[str, str], Any], fold: int
    ) -> list:
        """Show each of `items` (boxes or tokens), with notes at the cut and at a folded middle."""
        head, middle, tail = folded(items, fold)
        shown = []
        for n, item in enumerate([*head, *tail], 1):
            shown.append(show(item))
            if item.stop == self.cut_at:
                shown.append(note("cut off", f"cut off: {KINDS['cut off'].meaning}"))
            if middle and n == len(head):
                shown.append(note("folded", self._more(middle)))
        return shown

    def _more(self, items: Sequence[Any]) -> str:
        """Describe folded items, for example `1,204 more tokens (812 prompt, 392 trained)`."""
        tokens = range(items[0].start, items[-1].stop)
        trained = sum(map(self.is_trained, tokens))
        padding = sum(self.is_padding(i) and not self.is_trained(i) for i in tokens)
        counts = {"prompt": len(tokens) - trained - padding, "trained": trained, "padding": padding}
        kinds = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        return f"{count_of(len(tokens), 'more token')} ({kinds})"

    @property
    def _tokens(self) -> list[range]:
        return [range(i, i + 1) for i in range(len(self.row.input_ids))]

    @property
    def _columns(self) -> list[str]:
        names = ["position", "id", "token", "kind", "label", "predicts", "loss"]
        return names if self.losses is not None else names[:-1]

    def to_text(self, full: bool = False) -> str:
        """Return one line per token; the middle of a long row is omitted unless `full`."""

        def line(facts: dict[str, str]) -> str:
            numbers = " ".join(f"{facts[name]:>{width}}" for name, width in _WIDTHS.items() if name in facts)
            return f"{numbers}  {facts['kind']:<18} {facts['token']}"

        def note(kind: str, text: str) -> str:
            return f"{'':8} {KINDS[kind].mark} {text}{'; to_text(full=True) shows them' * (kind == 'folded')}"

        fold = len(self._tokens) if full else FOLD
        lines = self._walk(self._tokens, lambda token: line(self.facts(token.start)), note, fold)
        return "\n".join(filter(None, (self.verdict, self.loss_line, line({n: n for n in self._columns}), *lines)))

    def figure(self, title: str = "", width: float = 660) -> Any:
        """Draw the row as a `Picture`, `width` points wide; the default title is the verdict."""
        from minisft.labels.token_figure import draw_tokens

        def tile(box: Box) -> tuple[str, tuple[str, ...], list[float]]:
            losses = [loss for i in range(box.start, box.stop) if (loss := self.loss(i)) is not None]
            return f"{marks_of(box.kinds)} {box.text}".strip(), box.kinds, list(map(bar_height, losses))

        tiles = self._walk(self.boxes, tile, lambda kind, text: (f"{KINDS[kind].mark} {text}", (kind,), []), FOLD)
        entries = [f"{KINDS[kind].mark} {kind}: {KINDS[kind].meaning}".strip() for kind in self._present]
        legend = "     ".join([*entries, *filter(None, [self.loss_line])])
        alt = f"A row as {count_of(len(self.row.input_ids), 'token')}; {self.row.trained} of them are trained, marked ●"
        alt = ". ".join(filter(None, (alt, self.verdict, self.loss_line)))
        return draw_tokens(tiles, title or self.verdict, legend, alt, width)

    @property
    def _present(self) -> list[str]:
        """The kinds of token in this row, in the order of `KINDS`."""
        present = {kind for box in self.boxes for kind in box.kinds}
        return [kind for kind in KINDS if kind in present]

    def _repr_html_(self) -> str:
        parts = folded(self.boxes, FOLD)
        head, middle, tail = map(self._strip, parts)
        if middle:
            middle = f'<details><summary style="cursor:pointer">{self._more(parts[1])}</summary>{middle}</details>'
        loss = f"<div>{self.loss_line}</div>" if self.loss_line else ""
        return (
            f'<div dir="ltr" class="mathjax_ignore" style="text-align:left"><div><strong>{self.verdict}</strong></div>'
            f"{loss}{head}{middle}{tail}{self._legend()}{self._table()}</div>"
        )

    def _strip(self, boxes: Sequence[Box]) -> str:
        """The boxes as HTML, hidden from screen readers, which read the table instead."""
        shown = self._walk(boxes, self._box_html, lambda kind, text: box_html((kind,), text), LONGEST)
        style = "font-family:monospace;line-height:1.6;margin:6px 0;word-break:break-all"
        return f'<div aria-hidden="true" style="{style}">{"".join(shown)}</div>' if shown else ""

    def _box_html(self, box: Box) -> str:
        tokens, titles = range(box.start, box.stop), [", ".join(box.kinds)]
        for i in tokens:
            titles.append(", ".join(f"{name} {fact}" for name, fact in self.facts(i).items() if name in _WIDTHS))
        below = f'<sup dir="ltr">{len(tokens)}</sup>' if len(tokens) > 1 else ""
        if self.losses is not None:
            bars = "".join(loss_bar(loss, self.is_trained(i)) for i in tokens if (loss := self.loss(i)) is not None)
            below += f'<span style="display:block;line-height:1">{bars}</span>'
        return box_html(box.kinds, box.text, "\n".join(titles), below, "top" if self.losses is not None else "baseline")

    def _legend(self) -> str:
        entries = [f"{box_html((kind,), kind)} {KINDS[kind].meaning}" for kind in self._present]
        if len(self.boxes) < len(self.row.input_ids):
            entries.append("<sup>2</sup> two tokens that only together form characters")
        if self.losses is not None:
            entries.append(
                f"{loss_bar(2, True)} loss of 2 nats, {loss_bar(MOST_LOSS, True)} of {MOST_LOSS:.0f} or more"
            )
            entries.append(f"{loss_bar(4, False)} not counted")
        spans = (f'<span style="display:inline-block;margin-right:18px">{entry}</span>' for entry in entries)
        return f'<div style="font-size:85%;line-height:2">{"".join(spans)}</div>'

    def _table(self) -> str:
        def cells(tag: str, facts: dict[str, str]) -> str:
            left = {"token": ' style="text-align:left"', "kind": ' style="text-align:left"'}
            return "".join(f"<{tag}{left.get(n, '')}>{escape(facts[n])}</{tag[:2]}>" for n in self._columns)

        def note(kind: str, text: str) -> str:
            text += " left out" * (kind == "folded")
            return f'<td colspan="{len(self._columns)}" style="text-align:left">{KINDS[kind].mark} {text}</td>'

        rows = self._walk(self._tokens, lambda token: cells("td", self.facts(token.start)), note, LONGEST)
        return (
            '<details><summary style="cursor:pointer">as a table</summary>'
            '<table cellpadding="3" style="font-family:monospace;text-align:right">'
            f'<caption style="text-align:left">{self.verdict}</caption>'
            f"<thead><tr>{cells('th scope=col', {n: n for n in self._columns})}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></details>"
        )


def lens(row: Row, tokenizer: Tokenizer, model: Any = None) -> Lens:
    """Return the lens on `row`; with a causal language model, also its loss on each token."""
    return Lens(row, tokenizer, None if model is None else token_losses(model, row.input_ids))


def token_losses(model: Any, input_ids: list[int]) -> list[float | None]:
    """Return the cross-entropy of each token in nats; None for the first, which has no context."""
    import torch

    if len(input_ids) < 2:
        return [None] * len(input_ids)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([input_ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    finally:
        for module, training in modes.items():
            module.training = training
    return [None, *losses.tolist()]
