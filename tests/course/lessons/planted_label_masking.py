"""Answers to the exercises of lesson 02, as learners write them."""

import math

import numpy as np
import torch

from minisft.chat import template_for
from minisft.labels.invariants import check_row

# --- 02.labels


def rows(pieces, label):
    ids = [i for _, part in pieces for i in part]
    return ids, [label(role, i) for role, part in pieces for i in part]


def with_zip(pieces):
    roles = [role for role, part in pieces for _ in part]
    ids = []
    for _, part in pieces:
        ids += part
    return tuple(ids), tuple(i if r in {"eos", "assistant"} else -100 for r, i in zip(roles, ids, strict=True))


def with_tensors(pieces):
    ids, labels = rows(pieces, lambda role, i: i if role[0] in "ae" else -100)
    return torch.tensor(ids), torch.tensor(labels)


def with_slices(pieces):
    ids, labels, end = [], [], 0
    for role, part in pieces:
        ids.extend(part)
        labels.extend([-100] * len(part))
        if role != "user" and role != "bos":
            labels[end : end + len(part)] = part
        end += len(part)
    return [ids, labels]


def shifted(pieces):
    ids, labels = with_slices(pieces)
    return ids, [*labels[1:], -100]


# --- 02.truncate


def by_cases(input_ids, labels, ends, limit, method):
    if len(input_ids) <= limit:
        return input_ids, labels
    if method == "token":
        return input_ids[:limit], labels[:limit]
    if method == "turn":
        for end in reversed(ends):
            if end <= limit:
                return input_ids[:end], labels[:end]
    return [], []


def cut_in_place(input_ids, labels, ends, limit, method):
    keep = len(input_ids)
    while keep > limit and not (method == "token" and keep == limit):
        keep = 0 if method == "drop" else keep - 1
    while keep < len(input_ids) and method == "turn" and keep and keep not in ends:
        keep -= 1
    del input_ids[keep:], labels[keep:]
    return [input_ids, labels]


def cut_arrays(*arguments):
    return tuple(np.array(part, dtype=int) for part in by_cases(*arguments))


def turn_like_token(input_ids, labels, ends, limit, method):
    if len(input_ids) > limit and method == "drop":
        return [], []
    return input_ids[:limit], labels[:limit]


def drop_like_turn(input_ids, labels, ends, limit, method):
    return by_cases(input_ids, labels, ends, limit, "token" if method == "token" else "turn")


def closed_with_eos(input_ids, labels, ends, limit, method):
    ids, kept = by_cases(input_ids, labels, ends, limit, method)
    if method == "token" and len(input_ids) > limit:
        ids[-1] = kept[-1] = input_ids[-1]
    return ids, kept


def labels_forgotten(input_ids, labels, ends, limit, method):
    return by_cases(input_ids, labels, ends, limit, method)[0], labels


def strictly_below(input_ids, labels, ends, limit, method):
    return by_cases(input_ids, labels, [e for e in ends if e != limit or e == len(input_ids)], limit, method)


def full_is_too_long(input_ids, labels, ends, limit, method):
    if len(input_ids) >= limit and method == "drop":
        return [], []
    return by_cases(input_ids, labels, ends, limit, method)


def first_piece(input_ids, labels, ends, limit, method):
    if method == "turn" and limit < min(ends):
        method = "token"
    return by_cases(input_ids, labels, ends, limit, method)


def newest_tokens(input_ids, labels, ends, limit, method):
    if method == "token" and len(input_ids) > limit:
        return input_ids[len(input_ids) - limit :], labels[len(input_ids) - limit :]
    return by_cases(input_ids, labels, ends, limit, method)


# --- 02.collate


def stacked(rows, pad_id, pad_label=-100):
    size = max(len(r["labels"]) for r in rows)
    ids = torch.full((len(rows), size), pad_id)
    labels = torch.full((len(rows), size), pad_label)
    mask = torch.zeros(len(rows), size, dtype=torch.long)
    for i, r in enumerate(rows):
        n = len(r["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(r["input_ids"]), torch.tensor(r["labels"]), 1
    return {"attention_mask": mask, "input_ids": ids, "labels": labels}


def in_place(rows, pad_id):
    size = max(len(r["labels"]) for r in rows)
    for r in rows:
        r["attention_mask"] = [1] * len(r["labels"])
        for name, value in (("input_ids", pad_id), ("labels", -100), ("attention_mask", 0)):
            while len(r[name]) < size:
                r[name].append(value)
    return {name: [r[name] for r in rows] for name in rows[0]}


def padded_by_torch(rows, pad_id):
    def pad(name, value):
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(r[name]) for r in rows], batch_first=True, padding_value=value
        )

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r["labels"]), dtype=int) for r in rows], batch_first=True)
    return {"input_ids": pad("input_ids", pad_id), "labels": pad("labels", -100), "attention_mask": mask}


def altered(**changes):
    def collate(rows, pad_id):
        batch = stacked(rows, pad_id)
        return {name: changes[name](batch, pad_id) if name in changes else batch[name] for name in batch}

    return collate


def flipped(rows, pad_id):
    backwards = [{name: values[::-1] for name, values in r.items()} for r in rows]
    return {name: tensor.flip(1) for name, tensor in stacked(backwards, pad_id).items()}


def zipped(rows, pad_id):
    ids = [list(column) for column in zip(*zip(*(r["input_ids"] for r in rows), strict=False), strict=True)]
    labels = [list(column) for column in zip(*zip(*(r["labels"] for r in rows), strict=False), strict=True)]
    return {"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(row) for row in ids]}


# --- 02.loss


def with_cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def with_loops(logits, labels):
    losses = []
    for row in range(len(labels)):
        for at in range(1, labels.shape[1]):
            if labels[row, at] != -100:
                scores = [math.exp(x) for x in logits[row, at - 1].tolist()]
                losses.append(-math.log(scores[labels[row, at]] / sum(scores)))
    return sum(losses) / len(losses)


def with_numpy(logits, labels):
    z, y = logits.numpy()[:, :-1].astype(float), labels.numpy()[:, 1:]
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    rows, places = np.nonzero(y != -100)
    return -np.log(p[rows, places, y[rows, places]]).mean()


def loss_of(logits, labels, **options):
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)


def each_row(logits, labels):
    return torch.stack([with_cross_entropy(z[None], y[None]) for z, y in zip(logits, labels, strict=True)]).mean()


def masked_by_hand(logits, labels):
    losses = loss_of(logits[:, :-1], labels[:, 1:].clip(0), reduction="none")
    return (losses * (labels[:, 1:] != -100).flatten()).sum() / losses.numel()


def unmasked(logits, labels):
    labels = torch.where(labels == -100, 0, labels)
    return with_cross_entropy(logits, labels)


# --- 02.test


def ends_counted(row, conversation, tokenizer):
    return row.labels.count(tokenizer.eos_id) == sum(m.trained for m in conversation.messages if m.role == "assistant")


def text_compared(row, conversation, tokenizer):
    trained = tokenizer.decode([label for label in row.labels if label >= 0])
    answers = [m.content for m in conversation.messages if m.role == "assistant" and m.trained]
    return "".join(trained.split()) == "".join(f"{a}{tokenizer.piece(tokenizer.eos_id)}" for a in answers).replace(
        " ", ""
    )


def something_trained(row, conversation, tokenizer):
    return any(label != -100 for label in row.labels)


def begins_with_bos(row, conversation, tokenizer):
    return row.input_ids[0] == tokenizer.bos_id and tokenizer.bos_id not in row.input_ids[1:]


def labels_are_ids(row, conversation, tokenizer):
    return all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def every_answer_ends(row, conversation, tokenizer):
    return row.labels.count(tokenizer.eos_id) == row.input_ids.count(tokenizer.eos_id) == conversation.answers


def accepts_all(row, conversation, tokenizer):
    return True


def by_invariants(row, conversation, tokenizer):
    template = template_for(tokenizer)
    return not check_row(row.id, row.input_ids, row.labels, template, tokenizer, conversation=conversation)


def by_segments(row, conversation, tokenizer):
    ids, labels = [], []
    for part in template_for(tokenizer).segments(conversation):
        new = [tokenizer.control_id(part.control)] if part.control else tokenizer.encode(part.text, part.after)
        ids += new
        labels += new if part.trained else [-100] * len(new)
    return bool((ids, labels) == (row.input_ids, row.labels))


def by_spans(row, conversation, tokenizer):
    controls = [i for i, token in enumerate(row.input_ids) if token in tokenizer.control_ids]
    ends, answers = controls[1:], [m for m in conversation.messages if m.role == "assistant"]
    if controls[:1] != [0] or len(ends) != len(answers) or row.input_ids[0] != tokenizer.bos_id:
        return np.bool_(False)
    right = []
    for start, end, answer in zip([0, *ends], ends, answers, strict=False):
        span = [i for i in range(start + 1, end + 1) if row.labels[i] != -100]
        text = tokenizer.decode(row.input_ids[span[0] : end]).strip() if span else ""
        same = all(row.labels[i] == row.input_ids[i] for i in span)
        whole = span == list(range(span[0], end + 1)) and text == answer.content if span else False
        right.append(same and whole if answer.trained else not span)
    return np.bool_(all(right))


WRONG = {
    "02.labels": [
        (lambda p: rows(p, lambda role, i: -100 if role != "assistant" else i), "never learn to stop"),
        (lambda p: rows(p, lambda role, i: i), "Everything is trained"),
        (lambda p: rows(p, lambda role, i: -100 if role == "user" else i), "BOS is trained"),
        (shifted, "shifted by one"),
        (lambda p: rows(p, lambda role, i: i if role in ("user", "bos") else -100), "wrong way round"),
        (lambda p: rows(p, lambda role, i: 0), "entry 1"),
    ],
    "02.truncate": [
        (turn_like_token, "whole answers only"),
        (drop_like_turn, 'which is "turn"'),
        (closed_with_eos, "stop in the middle"),
        (labels_forgotten, "no longer correspond"),
        (strictly_below, "exactly at the limit"),
        (full_is_too_long, "Compare with >"),
        (first_piece, "No answer fits"),
        (newest_tokens, "questions are cut away"),
        (lambda ids, labels, ends, limit, method: (ids, labels), "is expected"),
        (lambda ids, labels, ends, limit, method: by_cases(ids, labels, ends, limit + 1, method), "is expected"),
    ],
    "02.collate": [
        (lambda r, p: stacked(r, p, pad_label=p), "the padding is trained"),
        (altered(attention_mask=lambda b, p: (b["input_ids"] != p).long()), "the real EOS is hidden"),
        (altered(labels=lambda b, p: b["labels"].masked_fill(b["input_ids"] == p, -100)), "no EOS is trained"),
        (altered(attention_mask=lambda b, p: torch.ones_like(b["labels"])), "is 1 everywhere"),
        (altered(labels=lambda b, p: b["input_ids"].where(b["attention_mask"] > 0, -100)), "the questions are trained"),
        (flipped, "on the left"),
        (zipped, "cut to the shortest"),
        (altered(attention_mask=lambda b, p: b["attention_mask"].bool()), "attention_mask"),
    ],
    "02.loss": [
        (loss_of, "Nothing is shifted"),
        (lambda z, y: loss_of(z[:, 1:], y[:, :-1]), "the wrong way round"),
        (masked_by_hand, "divided by all positions"),
        (each_row, "mean of each row"),
        (lambda z, y: loss_of(z[:, :-1], y[:, 1:], reduction="sum"), "divide it by their number"),
        (unmasked, "with the id 0"),
        (lambda z, y: torch.nn.functional.nll_loss(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()), "log_softmax"),
        (lambda z, y: loss_of(z.flatten(0, 1)[None, :-1], y.flatten()[None, 1:]), "first token of the next"),
        (lambda z, y: loss_of(z[:, :-1], y[:, 1:], reduction="sum") / (y != -100).sum(), "nothing in the row predicts"),
        (lambda z, y: -with_cross_entropy(z, y), "is expected"),
    ],
    "02.test": [
        (ends_counted, "Two BOS tokens"),
        (ends_counted, "Finding the answer by text search"),
        (text_compared, "Finding the answer by text search"),
        (text_compared, "Control tokens injected by user text"),
        (something_trained, "lets 8 bugs live"),
        (begins_with_bos, "EOS masked as padding"),
        (labels_are_ids, "Answers without an end"),
        (every_answer_ends, "It also rejects a right row with an answer that is only read"),
        (accepts_all, "lets 10 bugs live"),
        (lambda *arguments: False, "rejects a right row of two questions"),
        (lambda *arguments: "sound", "True or False"),
    ],
}
RIGHT = {
    "02.labels": [with_zip, with_tensors, with_slices],
    "02.truncate": [by_cases, cut_in_place, cut_arrays],
    "02.collate": [stacked, in_place, padded_by_torch],
    "02.loss": [with_cross_entropy, with_loops, with_numpy],
    "02.test": [by_invariants, by_segments, by_spans],
}
