"""Exercises of lesson 02 on a batch: pad it, and compute its loss."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.labels.encode_row import IGNORE_INDEX
from minisft.training.collators import PadRight

Rows = list[dict[str, list[int]]]
Batch = dict[str, list[list[int]]]

# --- 02.collate ----------------------------------------------------------------------------------


def collated(
    rows: list[dict[str, list[int]]],
    pad_id: int,
) -> dict[str, list[list[int]]]:
    """Return the batch of `rows`, padded on the right to the longest of them.

    Each row has "input_ids" and "labels". The batch has both, and "attention_mask": 1
    for a token of the row and 0 for padding. Each of them is a list of one list per
    row, or a tensor.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        length = len(row["input_ids"])
        missing = longest - length
        batch["input_ids"].append(row["input_ids"] + [pad_id] * missing)
        batch["labels"].append(row["labels"] + [-100] * missing)
        batch["attention_mask"].append([1] * length + [0] * missing)
    return batch


def _collate_cases(draw: random.Random) -> Iterator[Case]:
    long = {"input_ids": [1, 10, 20, 2], "labels": [-100, -100, 20, 2]}
    short = {"input_ids": [1, 21, 2], "labels": [-100, 21, 2]}
    ids, labels = [[1, 10, 20, 2], [1, 21, 2, 9]], [[-100, -100, 20, 2], [-100, 21, 2, -100]]
    batch = {"input_ids": ids, "labels": labels, "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]]}
    yield Case(([long, short], 9), batch, "a row of four tokens and one of three")
    batch = batch | {"input_ids": [ids[0], [1, 21, 2, 2]]}
    yield Case(([long, short], 2), batch, "rows whose padding has the id of EOS")
    one = {"input_ids": [[1, 21, 2]], "labels": [[-100, 21, 2]], "attention_mask": [[1, 1, 1]]}
    yield Case(([short], 9), one, "one row, which needs no padding")
    for _ in range(8):
        rows = [_random_row(draw) for _ in range(draw.randint(2, 4))]
        pad_id = draw.choice((0, 2))
        yield Case((rows, pad_id), PadRight(pad_id)(rows))


def _random_row(draw: random.Random) -> dict[str, list[int]]:
    question = [1, *draw.choices(range(3, 99), k=draw.randint(1, 4))]
    answer = [*draw.choices(range(3, 99), k=draw.randint(1, 4)), 2]
    return {"input_ids": question + answer, "labels": [IGNORE_INDEX] * len(question) + answer}


def _padded_on_the_left(rows: Rows, pad_id: int) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return [filler] * (longest - len(values)) + values

    return {
        "input_ids": [padded(row["input_ids"], pad_id) for row in rows],
        "labels": [padded(row["labels"], IGNORE_INDEX) for row in rows],
        "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in rows],
    }


def _cut_to_the_shortest(rows: Rows, pad_id: int) -> Batch:
    shortest = min(len(row["input_ids"]) for row in rows)
    return collated([{name: values[:shortest] for name, values in row.items()} for row in rows], pad_id)


def _changed(name: str, change: Callable[[int, int, int, int], int]) -> Callable[[Rows, int], Batch]:
    """A collator whose entries of `name` are those of `change`(id, label, mask, pad id)."""

    def collate(rows: Rows, pad_id: int) -> Batch:
        batch = collated(rows, pad_id)
        lists = zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        return batch | {name: [[change(*entry, pad_id) for entry in zip(*row, strict=True)] for row in lists]}

    return collate


COLLATE = Exercise(
    name="02.collate",
    answer=collated,
    cases=_collate_cases,
    mistakes=(
        Mistake(
            "The labels are padded with the pad id, so the padding is trained. Pad the labels with -100.",
            _changed("labels", lambda token, label, mask, pad_id: label if mask else pad_id),
        ),
        Mistake(
            "The attention mask follows from the id: where padding has the id of EOS, the real EOS is hidden too. "
            "Make the mask from the length of the row.",
            _changed("attention_mask", lambda token, label, mask, pad_id: int(token != pad_id)),
        ),
        Mistake(
            "Labels are masked wherever the id is the pad id: if padding has the id of EOS, no EOS is trained.",
            _changed("labels", lambda token, label, mask, pad_id: label if token != pad_id else IGNORE_INDEX),
        ),
        Mistake(
            "The attention mask is 1 everywhere. Padding would be attended to like text.",
            _changed("attention_mask", lambda token, label, mask, pad_id: 1),
        ),
        Mistake(
            "The labels are made from the ids again, so the questions are trained. Copy the labels of the row.",
            _changed("labels", lambda token, label, mask, pad_id: token if mask else IGNORE_INDEX),
        ),
        Mistake(
            "The padding is on the left. That is for generation, where all answers start at the same position; for "
            "training it moves the tokens away from the positions 0, 1, 2.",
            _padded_on_the_left,
        ),
        Mistake(
            "The rows are cut to the shortest: the ends of the others, with their EOS, are lost.", _cut_to_the_shortest
        ),
    ),
    hints=(
        "Find the longest row first; every list of the batch gets that length.",
        "The length of the row says how many entries are real: append [pad_id], [-100] and [0] as often as entries "
        "are missing.",
    ),
    minutes=10,
    ask_next="What changes if batches are made of rows of similar length, and what may go wrong then?",
)

# --- 02.loss -------------------------------------------------------------------------------------


def masked_loss(logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Return the mean loss of all targets in a batch, in nats.

    `logits` is [rows, tokens, vocabulary], `labels` is [rows, tokens]. The logits at a
    position predict the token at the next one. A label of -100 is no target.
    """
    log_probs = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    is_target = targets != -100
    chosen = log_probs[is_target].gather(1, targets[is_target][:, None])
    return -chosen.mean()


# Probabilities of three tokens after each of four positions.
_P = [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 8, 3 / 8, 1 / 2], [1 / 16, 7 / 16, 1 / 2]]


def _loss_cases(draw: random.Random) -> Iterator[Case]:
    one = torch.tensor([_P]).log()
    ln2 = 0.6931472
    yield Case((one, torch.tensor([[-100, 0, 1, 0]])), 2 * ln2, "three targets with the probabilities 1/2, 1/4 and 1/8")
    yield Case((one, torch.tensor([[-100, -100, 1, 0]])), 2.5 * ln2, "two targets with the probabilities 1/4 and 1/8")
    two = torch.tensor([[-100, 0, 1, -100], [-100, -100, -100, 0]])
    yield Case((one.repeat(2, 1, 1), two), 2 * ln2, "a row with two targets and a row with one")
    yield Case((one, torch.tensor([[2, 0, 1, 0]])), 2 * ln2, "a row whose first label is a token")
    first = torch.tensor([[-100, 0, 1, -100], [0, -100, -100, 0]])
    yield Case((one.repeat(2, 1, 1), first), 2 * ln2, "two rows, of which the second begins with a label")
    for _ in range(8):
        yield _random_loss(draw)


def _random_loss(draw: random.Random) -> Case:
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    rows, tokens, vocabulary = draw.randint(1, 3), draw.randint(4, 6), 5
    logits = 2 * torch.randn(rows, tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (rows, tokens), generator=generator)
    for row in range(rows):
        labels[row, : draw.randint(1, tokens - 2)] = IGNORE_INDEX
    return Case((logits, labels), float(ForCausalLMLoss(logits, labels, vocabulary)))


Loss = Callable[[torch.Tensor, torch.Tensor], Any]


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each position, without any shift, as [rows, tokens]; 0 where the label is -100."""
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def _shifted_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _losses(logits[:, :-1], labels[:, 1:])


def _mean(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return losses.sum() / (labels != IGNORE_INDEX).sum()


def _mean_of_row_means(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    targets = (labels[:, 1:] != IGNORE_INDEX).sum(1)
    return (_shifted_losses(logits, labels).sum(1) / targets).mean()


def _without_softmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    targets = labels[:, 1:]
    is_target = targets != IGNORE_INDEX
    return -logits[:, :-1][is_target].gather(1, targets[is_target][:, None]).mean()


def _across_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:])


_IN_THE_MEAN = (
    "The sum is divided by all positions. A position without a target is neither in the sum nor in the count: "
    "otherwise a batch with more padding has a lower loss."
)

LOSS = Exercise(
    name="02.loss",
    answer=masked_loss,
    cases=_loss_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "Nothing is shifted: each position is compared with its own token, which the model has already read.",
            lambda logits, labels: _mean(_losses(logits, labels), labels),
        ),
        Mistake(
            "The shift is the wrong way round: the output at a position is compared with the token before it.",
            lambda logits, labels: _mean(_losses(logits[:, 1:], labels[:, :-1]), labels[:, :-1]),
        ),
        Mistake(
            "The first label of a row is counted, but nothing in the row predicts it: count the shifted labels.",
            lambda logits, labels: _mean(_shifted_losses(logits, labels), labels),
        ),
        Mistake(
            "The last output of one row predicts the first token of the next: shift each row, then flatten.",
            _across_rows,
        ),
        Mistake(_IN_THE_MEAN, lambda logits, labels: _shifted_losses(logits, labels).mean()),
        Mistake(_IN_THE_MEAN, lambda logits, labels: _shifted_losses(logits, labels).sum() / labels.numel()),
        Mistake(
            "You take the mean of each row and then the mean of the rows: a target of a row with few targets counts "
            "more than others. Take one mean over all targets.",
            _mean_of_row_means,
        ),
        Mistake(
            "That is the sum over the targets: divide it by their number.",
            lambda logits, labels: _shifted_losses(logits, labels).sum(),
        ),
        Mistake(
            "The positions with -100 are counted as targets, with the id 0.",
            lambda logits, labels: _shifted_losses(logits, labels.clamp(min=0)).mean(),
        ),
        Mistake(
            "Logits are no logarithms of probabilities yet: apply log_softmax over the last axis.", _without_softmax
        ),
    ),
    hints=(
        "Cut first: the logits without the last position, the labels without the first. Then all entries match.",
        "With `is_target = targets != -100`, both `log_probs[is_target]` and `targets[is_target]` have one entry per "
        "target; `gather(1, …)` picks the log-probability of each.",
    ),
    minutes=15,
    ask_next="With two micro-batches of different size, what must you divide by so that both count alike?",
)
