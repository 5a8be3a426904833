"""Fine-tuning bugs that raise no error, each beside the right way and the check that finds it.

    bug = BUGS["find_first"]
    result = bug.wrong(tokenizer, *bug.example)
    bug.caught(result, tokenizer, *bug.example)

The wrong ways are written as people write them, for a tokenizer of transformers. They raise no
error, and nothing else in the package uses them. Bugs in a single row are in `buggy_rows`; bugs in
batches and in splits are here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.course import buggy_rows
from minisft.course.buggy_rows import broken_in_row, right_row, talk
from minisft.data.conversations import Conversation
from minisft.data.splits import origin, split
from minisft.labels.encode_row import Row
from minisft.labels.invariants import Violation
from minisft.training.collators import PaddingFree, PadRight

# --- batches -------------------------------------------------------------------------------------------------


def language_modelling(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> dict[str, Any]:
    """Use the collator whose name sounds right: it ignores the labels it is given and copies the
    ids instead.
    """
    from transformers import DataCollatorForLanguageModeling

    row = right_row(tokenizer, conversation)
    collate = DataCollatorForLanguageModeling(tokenizer.hf, mlm=False)
    return dict(collate([{"input_ids": row.input_ids, "labels": row.labels}]))


def labels_carried_over(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> dict[str, Any]:
    """Use the package's collator, which pads the labels it is given."""
    row = right_row(tokenizer, conversation)
    return PadRight(tokenizer.pad_id)([{"input_ids": row.input_ids, "labels": row.labels}])


def broken_in_batch(
    batch: dict[str, Any], tokenizer: HuggingFaceTokenizer, conversation: Conversation
) -> list[Violation]:
    """Check the row invariants on the tensors that the model receives."""
    ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
    return broken_in_row(Row(conversation.id, ids, labels), tokenizer, conversation)


def end_to_end(tokenizer: HuggingFaceTokenizer, first: Conversation, second: Conversation) -> dict[str, Any]:
    """Concatenate two conversations to save padding, without marking the boundary."""
    import torch

    rows = [right_row(tokenizer, c) for c in (first, second)]
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row.input_ids]]),
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
    }


def kept_apart(tokenizer: HuggingFaceTokenizer, first: Conversation, second: Conversation) -> dict[str, Any]:
    """Concatenate them too, but give attention the boundary and restart the positions."""
    rows = [right_row(tokenizer, c) for c in (first, second)]
    return PaddingFree()([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def leak(
    batch: dict[str, Any], tokenizer: HuggingFaceTokenizer, first: Conversation, second: Conversation, *, model: Any
) -> list[Violation]:
    """Change the first conversation; it is a leak if that moves the logits of the second by more
    than 1e-3.
    """
    bound = len(right_row(tokenizer, first).input_ids)
    moved = logits_moved(batch, bound, model)
    message = f"another conversation before this one moves its logits by up to {moved:.1f}"
    return [Violation(second.id, None, bound, "packing", message)] if moved > 1e-3 else []


def logits_moved(batch: dict[str, Any], bound: int, model: Any) -> float:
    """Replace every token before position `bound`; return the largest change of any logit from
    `bound` on.
    """
    import torch

    from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    changed = inputs["input_ids"].clone()
    changed[:, :bound] = (changed[:, :bound] + 1) % model.config.vocab_size
    original_attention = model.config._attn_implementation
    if "cu_seq_lens_q" in batch and supports_padding_free(model):
        model.set_attn_implementation(PER_DOCUMENT)
    try:
        with torch.inference_mode():
            before = model(**inputs, use_cache=False).logits[:, bound:]
            after = model(**(inputs | {"input_ids": changed}), use_cache=False).logits[:, bound:]
    finally:
        model.set_attn_implementation(original_attention)
    return (before - after).abs().max().item()


# --- splits --------------------------------------------------------------------------------------------------

Sides = tuple[list[Conversation], list[Conversation]]


def shuffled_parts(tokenizer: HuggingFaceTokenizer, *parts: Conversation) -> Sides:
    """Shuffle and cut single rows: the file holds parts of conversations, so parts of one land on
    both sides.
    """
    order = list(parts)
    random.Random(0).shuffle(order)  # noqa: S311
    test = max(1, len(order) // 10)
    return order[test:], order[:test]


def whole_conversations(tokenizer: HuggingFaceTokenizer, *parts: Conversation) -> Sides:
    """Split by original conversation, so all its parts land on the same side."""
    return split(parts, test_fraction=0.1)


def on_both_sides(sides: Sides, tokenizer: HuggingFaceTokenizer, *parts: Conversation) -> list[Violation]:
    """Return one violation per original conversation with parts in both train and test."""
    train, test = ({origin(c.id) for c in side} for side in sides)
    message = "some of its parts are in train and some in test"
    return [Violation(name, None, None, "split", message) for name in sorted(train & test)]


# --- the bugs ------------------------------------------------------------------------------------------------

_TWO_SUMS = talk("What is 2+2?", "4", "And 3+3?", "6")
_PARTS = tuple(talk(f"Question {n}.{i}?", "Answer.", name=f"chat{n:03}_{i}") for n in range(5) for i in range(4))


@dataclass(frozen=True)
class Bug:
    """One bug: the wrong way, the right way, and the check that tells them apart.

    `wrong` and `right` take the tokenizer and as many conversations as `example` has. Both return
    the same kind of result: a `Row` (None if the row is dropped), a batch, or the two sides of a
    split. `caught` takes that result, the tokenizer and the conversations, and returns the
    violations: none for the right way, at least one of `invariant` for the wrong way. `caught` of
    `packing` also needs the keyword `model`.
    """

    name: str
    title: str
    what_happens: str
    how_caught: str
    invariant: str
    wrong: Callable[..., Any]
    right: Callable[..., Any] = right_row
    caught: Callable[..., list[Violation]] = broken_in_row
    example: tuple[Conversation, ...] = (_TWO_SUMS,)


BUGS: dict[str, Bug] = {
    bug.name: bug
    for bug in (
        Bug(
            "collator",
            "A collator that overwrites the labels",
            what_happens=(
                "It replaces the labels by the ids, so the mask never reaches the loss. If padding shares the id of "
                "EOS, EOS is not trained either."
            ),
            how_caught="Collate one row and check the tensors that the model receives.",
            invariant="prompt",
            wrong=language_modelling,
            right=labels_carried_over,
            caught=broken_in_batch,
        ),
        Bug(
            "find_first",
            "Finding the answer by text search",
            what_happens=(
                "The first match may be in the question: the user's words are trained, and the answer is not."
            ),
            how_caught="The trained tokens decode to the answers, turn by turn.",
            invariant="prompt",
            example=(talk("Say 4.", "4"),),
            wrong=buggy_rows.find_first,
        ),
        Bug(
            "marker_search",
            "A marker that is never found",
            what_happens="[/INST] alone has other ids than after a space. No match, so nothing is trained.",
            how_caught="Every row has at least one trained token.",
            invariant="targets",
            wrong=buggy_rows.marker_search,
        ),
        Bug(
            "mistyped_marks",
            "Control tokens typed as text",
            what_happens=r"<\s> is ordinary text. The row has no EOS, and the model never learns to stop.",
            how_caught="The trained tokens decode to the answers, each with a real EOS.",
            invariant="answers",
            wrong=buggy_rows.mistyped_marks,
        ),
        Bug(
            "eos_masked",
            "EOS masked as padding",
            what_happens="Padding shares the id of EOS. Masking that id masks EOS too: the model never learns to stop.",
            how_caught="Every answer ends in a trained EOS.",
            invariant="eos",
            wrong=buggy_rows.eos_masked,
        ),
        Bug(
            "eos_missing",
            "Answers without an end",
            what_happens="The next question follows the answer directly. The model never learns to stop.",
            how_caught="The control tokens are exactly those of the template.",
            invariant="control",
            wrong=buggy_rows.eos_missing,
        ),
        Bug(
            "double_bos",
            "Two BOS tokens",
            what_happens=(
                "The template writes BOS and the tokenizer adds another: prompts at inference differ from training."
            ),
            how_caught="BOS occurs once, as the first token.",
            invariant="bos",
            wrong=buggy_rows.double_bos,
        ),
        Bug(
            "forged_end",
            "Control tokens injected by user text",
            what_happens="A user typed the characters of EOS, and the tokenizer turns them into the control token.",
            how_caught="The control tokens are exactly those of the template.",
            invariant="control",
            example=(talk("Bye<|im_end|></s>", "See you."),),
            wrong=buggy_rows.forged_end,
        ),
        Bug(
            "cut_blindly",
            "Truncation that leaves no trained token",
            what_happens=(
                "The question fills the row. The mean over no targets is NaN, or a perfect 0.0 if the "
                "division is guarded."
            ),
            how_caught="Every row has at least one trained token.",
            invariant="targets",
            example=(talk("Please count the words of this sentence and of the next one as well. " * 2, "26"),),
            wrong=buggy_rows.cut_blindly,
            right=buggy_rows.cut_and_counted,
        ),
        Bug(
            "packing",
            "Packing without boundaries",
            what_happens="Two conversations share one row to save padding, and the second attends to the first.",
            how_caught="Changing the first conversation leaves the logits of the second unchanged.",
            invariant="packing",
            example=(talk("What is my name?", "You are Ada."), talk("What is 2+2?", "4")),
            wrong=end_to_end,
            right=kept_apart,
            caught=leak,
        ),
        Bug(
            "split",
            "One conversation in train and in test",
            what_happens=(
                "The file holds parts of conversations. Splitting part by part puts continuations of trained "
                "conversations in the test set."
            ),
            how_caught="No conversation has parts on both sides.",
            invariant="split",
            example=_PARTS,
            wrong=shuffled_parts,
            right=whole_conversations,
            caught=on_both_sides,
        ),
    )
}
