"""Lesson 02: which tokens the loss sees."""

from __future__ import annotations

from minisft.course.lessons import Lesson
from minisft.course.lessons.label_masking_batches import COLLATE, LOSS
from minisft.course.lessons.label_masking_rows import LABELS, TRUNCATE
from minisft.course.lessons.label_masking_test import TEST
from minisft.course.predictions import Choice, Interval, Number, Several

LABELING_BUGS = (
    *("collator", "find_first", "marker_search", "mistyped_marks"),
    *("eos_masked", "eos_missing", "double_bos", "forged_end"),
)

LESSON = Lesson(
    objectives=(
        "write the labels of a row, and say why each token is trained or not",
        "compute the loss of a batch from logits and labels",
        "truncate a row and pad a batch without training the wrong tokens",
        "write a test that finds masking bugs, which raise no error",
    ),
    minutes=110,
    predictions={
        "divisor": Number(
            asks="the number by which the sum is divided when one of three tokens has the label -100",
            stand_in=3,
            lesson="A masked token is neither in the sum nor in the count.",
        ),
        "position": Number(
            asks="the position whose output is compared with the label at position 15",
            stand_in=15,
            lesson="The output at a position predicts the next token, so the label at 15 belongs to the output at 14.",
        ),
        "weight": Number(
            asks="the trained tokens that are left when the first of two answers has weight 0",
            stand_in=9,
            unit="tokens",
            lesson="The EOS belongs to its answer: it is masked with it.",
        ),
        "kept": Interval(
            asks="the share of the trained tokens that a cut at 512 tokens keeps",
            stand_in=[60, 90],
            unit="%",
            lesson="Real conversations are much longer than they seem: measure lengths before choosing a limit.",
        ),
        "padding": Number(
            asks="the share of the positions that is padding in a batch of eight real rows",
            stand_in=20,
            within=0.2,
            unit="%",
            lesson="The longest row sets the length of all, and most rows are much shorter.",
        ),
        "searched": Choice(
            asks="which 4 is trained when the answer is found by text search",
            options=("the 4 of the question", "the 4 of the answer", "both"),
            stand_in="the 4 of the answer",
            lesson="A text search finds the first match, and the user may have written the same words before.",
        ),
        "no_targets": Choice(
            asks="the loss that a model returns for a row without targets",
            options=("0.0", "nan", "an error"),
            stand_in="0.0",
            lesson="The mean of nothing is 0/0, and one such row makes every weight NaN.",
        ),
        "rare": Several(
            asks="the bugs that strike fewer than one real row in ten",
            options=LABELING_BUGS,
            stand_in=["double_bos", "eos_masked"],
            lesson="A bug is rare if it needs unusual text; a bug of the format strikes every row.",
        ),
        "masked": Choice(
            asks="the mean loss of the masked tokens after training, compared with before",
            options=("lower", "equal", "higher"),
            stand_in="equal",
            lesson="Nothing holds the loss of tokens that are not trained: it drifts with every step.",
        ),
    },
    exercises=(LABELS, LOSS, TRUNCATE, COLLATE, TEST),
    misconceptions=(
        "That a masked token is not read. It is: every later token is predicted from it.",
        "That the data must shift the labels. The model does: shifting them twice trains it to skip a token.",
        "That a falling loss shows that the labels are right. It falls with wrong labels, too.",
        "That the pad id tells padding from text. Where it is the id of EOS, only the length of the row does.",
    ),
)
