"""Answers to the exercises of lesson 00, as learners write them."""

import numpy as np
import torch


def pieces(turns, bos=False, user=False, eos=True, space=" "):
    result = [("template", "<s>", bos)]
    for i, (role, text) in enumerate(turns):
        if i % 2 == 0:
            result += [(role, "[INST] " + text + " [/INST]", user)]
        else:
            result += [(role, space + text, True), (role, "</s>", eos)]
    return result


def eos_at_the_end(turns):
    result = [("template", "<s>", False)]
    for role, text in turns:
        result.append((role, f"[INST] {text} [/INST]", False) if role == "user" else (role, f" {text}", True))
    result.append(("assistant", "</s>", True))
    return result


def bos_per_exchange(turns):
    return [piece for i in range(0, len(turns), 2) for piece in pieces(turns[i : i + 2])]


def without_marks(turns):
    return [
        (role, text.replace("[INST] ", "").replace(" [/INST]", ""), flag)
        for role, text, flag in pieces(turns, space="")
    ]


def no_bos(turns):
    return pieces(turns)[1:]


def segments_in_pairs(turns):
    result = [["template", "<s>", False]]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        result.append(["user", f"[INST] {question[1]} [/INST]", False])
        result.extend([["assistant", f" {answer[1]}", True], ["assistant", "</s>", True]])
    return result


def segments_as_tuple(turns):
    made = {
        "user": lambda text: (("user", f"[INST] {text} [/INST]", False),),
        "assistant": lambda text: (("assistant", " " + text, True), ("assistant", "</s>", True)),
    }
    return (("template", "<s>", False), *(piece for role, text in turns for piece in made[role](text)))


def split_name(row_id):
    return row_id.split("_")[0]


def forgets_the_leak(rows, names):
    test = [i for i, _ in rows if split_name(i) in names]
    return [i for i, _ in rows if i not in test], test


def whole_id(rows, names):
    return [i for i, _ in rows if i not in names], [i for i, _ in rows if i in names]


def drops_as_it_goes(rows, names):
    train, test, questions = [], [], []
    for i, q in rows:
        if split_name(i) in names and q not in questions:
            test += [i]
        elif split_name(i) not in names:
            train += [i]
            questions += [q]
    return train, test


def trains_leaks(rows, names):
    questions = {q for i, q in rows if split_name(i) not in names}
    is_test = {i: split_name(i) in names and q not in questions for i, q in rows}
    return [i for i in is_test if not is_test[i]], [i for i in is_test if is_test[i]]


def right_sides(rows, names):
    questions = [q for i, q in rows if split_name(i) not in names]
    train = [i for i, _ in rows if split_name(i) not in names]
    return train, [i for i, q in rows if split_name(i) in names and q not in questions]


def sides_by_loop(rows, names):
    rest, train, asked = [], [], set()
    for row in rows:
        if any(row[0].startswith(name + "_") for name in names):
            rest.append(row)
        else:
            train.append(row[0])
            asked.add(row[1])
    return [train, [i for i, q in rest if q not in asked]]


def sides_as_arrays(rows, names):
    train, test = right_sides(rows, names)
    return np.array(train, dtype=object), tuple(test)


def mean(values):
    return sum(values) / len(values)


WRONG = {
    "00.segments": [
        (lambda t: pieces(t, eos=False), "never learn to stop"),
        (eos_at_the_end, "closes every answer"),
        (lambda t: pieces(t, user=True), "questions are trained"),
        (lambda t: pieces(t, bos=True), "BOS is trained"),
        (bos_per_exchange, "BOS appears before every question"),
        (lambda t: pieces(t, space=""), "The space between"),
        (no_bos, "BOS is missing"),
        (lambda t: [p for p in pieces(t) if p[1] != "</s>"], "The row has no EOS"),
        (
            lambda t: [(r, x + "</s>" * (r == "assistant"), f) for r, x, f in pieces(t) if x != "</s>"],
            "a piece of its own",
        ),
        (without_marks, "The marks are missing"),
        (lambda t: [], "0 entries"),
    ],
    "00.sides": [
        (forgets_the_leak, "only remembers would score well"),
        (whole_id, "with its part number"),
        (drops_as_it_goes, "rows before it only"),
        (trains_leaks, "It belongs in neither list"),
        (lambda r, n: right_sides(r, n)[::-1], "wrong way round"),
        (lambda r, n: right_sides(r, n)[0], "for two parts of one conversation"),
    ],
    "00.loss": [
        (lambda ranks: mean([mean(losses) for losses in ranks]), "mean of the ranks' means"),
        (lambda ranks: np.mean(ranks[0]), "rank 0 alone"),
        (lambda ranks: sum(x for losses in ranks for x in losses), "sum over all tokens"),
        (lambda ranks: sum(x for losses in ranks for x in losses) / len(ranks), "by the number of ranks"),
        (
            lambda ranks: torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in ranks]).mean(),
            "for one token on rank 0",
        ),
    ],
}
RIGHT = {
    "00.segments": [lambda t: pieces(t), segments_in_pairs, segments_as_tuple],
    "00.sides": [right_sides, sides_by_loop, sides_as_arrays],
    "00.loss": [
        lambda ranks: np.mean(np.concatenate(ranks)),
        lambda ranks: torch.cat([torch.tensor(losses) for losses in ranks]).mean(),
        lambda ranks: mean([x for losses in ranks for x in losses]),
    ],
}
