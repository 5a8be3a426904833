"""Answers to the exercises of lesson 02, as learners write them."""

import torch


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


WRONG = {
    "02.labels": [
        (lambda p: rows(p, lambda role, i: -100 if role != "assistant" else i), "never learn to stop"),
        (lambda p: rows(p, lambda role, i: i), "Everything is trained"),
        (lambda p: rows(p, lambda role, i: -100 if role == "user" else i), "BOS is trained"),
        (shifted, "shifted by one"),
        (lambda p: rows(p, lambda role, i: i if role in ("user", "bos") else -100), "wrong way round"),
        (lambda p: rows(p, lambda role, i: 0), "entry 1"),
    ],
}
RIGHT = {"02.labels": [with_zip, with_tensors, with_slices]}
