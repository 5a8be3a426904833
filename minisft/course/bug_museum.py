"""The bug museum: ways in which fine-tuning data goes wrong in silence, each beside the right way and its detector.

    exhibit = BUGS["find_first"]
    made = exhibit.wrong(tokenizer, *exhibit.example)
    exhibit.caught(made, tokenizer, *exhibit.example)

Every wrong variant is written as people write it, for a tokenizer of transformers. None of them raises anything, and
nothing else in the package uses them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.data.ledger import Ledger
from minisft.data.splits import origin, split
from minisft.labels.encode_dataset import encode_stream
from minisft.labels.encode_row import IGNORE_INDEX, Row, encode
from minisft.labels.invariants import Violation, check_row
from minisft.training.collators import PaddingFree, PadRight

LONGEST = 1 << 30  # tokens: no truncation
SHORT = 24  # tokens: what the truncation exhibit has room for


def talk(*contents: str, name: str = "talk") -> Conversation:
    """A conversation from its texts: the user's, the assistant's, the user's, and so on."""
    roles = ("user", "assistant")
    return Conversation(name, tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)))


# --- rows ----------------------------------------------------------------------------------------------------


def right_row(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    return encode(conversation, template_for(tokenizer), tokenizer, LONGEST)


def find_first(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Write everything as one text, then search the answers in it."""
    segments = list(template_for(tokenizer).segments(conversation))
    names = {"bos": tokenizer.hf.bos_token or "", "eos": tokenizer.hf.eos_token}
    text = "".join(s.text if s.control is None else names.get(s.control, s.control) for s in segments)
    encoded = tokenizer.hf(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [token_id if token_id == tokenizer.eos_id else IGNORE_INDEX for token_id in encoded.input_ids]
    for answer in (s.text for s in segments if s.trained and s.text):
        start = text.find(answer)  # the first occurrence, which may be the user's
        for i, (a, b) in enumerate(encoded.offset_mapping):
            if start <= a and b <= start + len(answer):
                labels[i] = encoded.input_ids[i]
    return Row(conversation.id, encoded.input_ids, labels)


def marker_search(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Search the ids of `[/INST]` among the row's ids, and train what follows up to EOS."""
    ids = right_row(tokenizer, conversation).input_ids
    marker = tokenizer.hf.encode("[/INST]", add_special_tokens=False)  # in a row it follows a space: other ids
    labels = [IGNORE_INDEX] * len(ids)
    for i in range(len(ids)):
        if ids[i : i + len(marker)] == marker:
            start = i + len(marker)
            end = ids.index(tokenizer.eos_id, start) + 1
            labels[start:end] = ids[start:end]
    return Row(conversation.id, ids, labels)


def mistyped_marks(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    r"""Type the marks as text, and from memory: `<\s>` and `[\INST]` mean nothing to any tokenizer."""
    typed = {"bos": "<s>", "eos": r"<\s>", "[/INST]": r"[\INST]"}
    ids: list[int] = []
    labels: list[int] = []
    for s in template_for(tokenizer).segments(conversation):
        text = s.text.replace("[/INST]", r"[\INST]") if s.control is None else typed.get(s.control, s.control)
        part = tokenizer.hf.encode(text, add_special_tokens=False)
        ids += part
        labels += part if s.trained else [IGNORE_INDEX] * len(part)
    return Row(conversation.id, ids, labels)


def eos_masked(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Set `pad_token = eos_token`, as many tutorials do, and then mask the padding by its id."""
    row = right_row(tokenizer, conversation)
    pad_id = tokenizer.eos_id
    return Row(row.id, row.input_ids, [IGNORE_INDEX if label == pad_id else label for label in row.labels])


def eos_missing(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Forget that an answer has an end."""
    row = right_row(tokenizer, conversation)
    kept = [i for i, token_id in enumerate(row.input_ids) if token_id != tokenizer.eos_id]
    return Row(row.id, [row.input_ids[i] for i in kept], [row.labels[i] for i in kept])


def double_bos(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Let the template write BOS, and the tokenizer add one."""
    row = right_row(tokenizer, conversation)
    return Row(row.id, [tokenizer.bos_id, *row.input_ids], [IGNORE_INDEX, *row.labels])


def forged_end(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Ask the tokenizer plainly: it parses control tokens out of what people wrote."""
    ids: list[int] = []
    labels: list[int] = []
    for s in template_for(tokenizer).segments(conversation):
        if s.control is None:
            part = tokenizer.hf.encode(s.text, add_special_tokens=False)
        else:
            part = [tokenizer.control_id(s.control)]
        ids += part
        labels += part if s.trained else [IGNORE_INDEX] * len(part)
    return Row(conversation.id, ids, labels)


def cut_blindly(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    """Cut at the maximum length and keep what is left, whatever that is."""
    row = right_row(tokenizer, conversation)
    return Row(row.id, row.input_ids[:SHORT], row.labels[:SHORT], len(row.input_ids) > SHORT)


def cut_and_counted(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row | None:
    """Cut likewise; a row without a trained token is dropped, with a line in the ledger."""
    template = template_for(tokenizer)
    rows = encode_stream([conversation], template, tokenizer, max_length=SHORT, ledger=Ledger())
    return next(rows, None)


def broken_in_row(row: Row | None, tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> list[Violation]:
    if row is None:
        return []
    template = template_for(tokenizer)
    most = SHORT if row.truncated else None
    return check_row(row.id, row.input_ids, row.labels, template, tokenizer, max_length=most, conversation=conversation)


# --- batches -------------------------------------------------------------------------------------------------


def language_modelling(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> dict[str, Any]:
    """The collator whose name sounds right. It makes labels of its own from the ids, and asks nobody."""
    from transformers import DataCollatorForLanguageModeling

    row = right_row(tokenizer, conversation)
    collate = DataCollatorForLanguageModeling(tokenizer.hf, mlm=False)
    return dict(collate([{"input_ids": row.input_ids, "labels": row.labels}]))


def labels_carried_over(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> dict[str, Any]:
    row = right_row(tokenizer, conversation)
    return PadRight(tokenizer.pad_id)([{"input_ids": row.input_ids, "labels": row.labels}])


def broken_in_batch(
    batch: dict[str, Any], tokenizer: HuggingFaceTokenizer, conversation: Conversation
) -> list[Violation]:
    """The same invariants, on the tensors that the model would receive."""
    ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
    return broken_in_row(Row(conversation.id, ids, labels), tokenizer, conversation)


def end_to_end(tokenizer: HuggingFaceTokenizer, first: Conversation, second: Conversation) -> dict[str, Any]:
    """Lay two conversations end to end to save padding, and tell nobody where one ends."""
    import torch

    rows = [right_row(tokenizer, c) for c in (first, second)]
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row.input_ids]]),
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
    }


def kept_apart(tokenizer: HuggingFaceTokenizer, first: Conversation, second: Conversation) -> dict[str, Any]:
    rows = [right_row(tokenizer, c) for c in (first, second)]
    return PaddingFree()([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def leak(
    batch: dict[str, Any], tokenizer: HuggingFaceTokenizer, first: Conversation, second: Conversation, *, model: Any
) -> list[Violation]:
    """Change the first conversation: the logits of the second must not move."""
    bound = len(right_row(tokenizer, first).input_ids)
    moved = logits_moved(batch, bound, model)
    message = f"another conversation before this one moves its logits by up to {moved:.1f}"
    return [Violation(second.id, None, bound, "packing", message)] if moved > 1e-3 else []


def logits_moved(batch: dict[str, Any], bound: int, model: Any) -> float:
    """By how much logits from position `bound` on change at most if every token before it becomes another."""
    import torch

    from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    changed = inputs["input_ids"].clone()
    changed[:, :bound] = (changed[:, :bound] + 1) % model.config.vocab_size
    usual = model.config._attn_implementation
    if "cu_seq_lens_q" in batch and supports_padding_free(model):
        model.set_attn_implementation(PER_DOCUMENT)
    try:
        with torch.inference_mode():
            before = model(**inputs, use_cache=False).logits[:, bound:]
            after = model(**(inputs | {"input_ids": changed}), use_cache=False).logits[:, bound:]
    finally:
        model.set_attn_implementation(usual)
    return (before - after).abs().max().item()


# --- splits --------------------------------------------------------------------------------------------------

Sides = tuple[list[Conversation], list[Conversation]]


def shuffled_parts(tokenizer: HuggingFaceTokenizer, *parts: Conversation) -> Sides:
    """Shuffle and cut. But the file holds parts of conversations, and parts of one land on both sides."""
    order = list(parts)
    random.Random(0).shuffle(order)  # noqa: S311
    test = max(1, len(order) // 10)
    return order[test:], order[:test]


def whole_conversations(tokenizer: HuggingFaceTokenizer, *parts: Conversation) -> Sides:
    return split(parts, test_fraction=0.1)


def on_both_sides(sides: Sides, tokenizer: HuggingFaceTokenizer, *parts: Conversation) -> list[Violation]:
    train, test = ({origin(c.id) for c in side} for side in sides)
    message = "parts of it are in train, and parts in test"
    return [Violation(name, None, None, "split", message) for name in sorted(train & test)]


# --- the exhibits --------------------------------------------------------------------------------------------

_TWO_SUMS = talk("What is 2+2?", "4", "And 3+3?", "6")
_PARTS = tuple(talk(f"Question {n}.{i}?", "Answer.", name=f"chat{n:03}_{i}") for n in range(5) for i in range(4))


@dataclass(frozen=True)
class Bug:
    """One bug. `wrong` and `right` take the tokenizer and then conversations, as many as `example` has.

    Both make the same thing of them: a `Row` (None where the row is dropped), a batch, or the two sides of a split.
    `caught` takes what was made, then the tokenizer and the conversations, and returns what it breaks: nothing for
    what is right, `invariant` among others for what is wrong. That of `packing` needs the keyword `model` as well.
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
    e.name: e
    for e in (
        Bug(
            "collator",
            "The collator that writes its own labels",
            what_happens=(
                "It replaces the labels by the ids, so the mask never reaches the loss. Where padding has the id "
                "of EOS, EOS is not trained either."
            ),
            how_caught="Collate one row, and check the tensors that the model receives.",
            invariant="prompt",
            wrong=language_modelling,
            right=labels_carried_over,
            caught=broken_in_batch,
        ),
        Bug(
            "find_first",
            "The answer is searched in the text",
            what_happens=(
                "The first occurrence may be in the question: the user's words are trained, and the answer is not."
            ),
            how_caught="What is trained, decoded, is the answers, turn by turn.",
            invariant="prompt",
            example=(talk("Say 4.", "4"),),
            wrong=find_first,
        ),
        Bug(
            "marker_search",
            "The marker that is never found",
            what_happens="[/INST] alone has other ids than after a space. Nothing is found, and nothing is trained.",
            how_caught="Every row has a token to learn from.",
            invariant="targets",
            wrong=marker_search,
        ),
        Bug(
            "mistyped_marks",
            "Control tokens typed as text",
            what_happens=r"<\s> is ordinary text. The row has no EOS, and the model never learns to stop.",
            how_caught="What is trained, decoded, is the answers and a real EOS.",
            invariant="answers",
            wrong=mistyped_marks,
        ),
        Bug(
            "eos_masked",
            "EOS masked as padding",
            what_happens="Padding shares the id of EOS and is masked by its id: the model never learns to stop.",
            how_caught="Every answer ends in a trained EOS.",
            invariant="eos",
            wrong=eos_masked,
        ),
        Bug(
            "eos_missing",
            "Answers without an end",
            what_happens="After an answer comes the next question. The model learns to go on, and never to stop.",
            how_caught="Control tokens are exactly those of the template.",
            invariant="control",
            wrong=eos_missing,
        ),
        Bug(
            "double_bos",
            "Two BOS",
            what_happens=(
                "The template writes BOS and the tokenizer adds one: no prompt at inference looks like training."
            ),
            how_caught="BOS occurs once, as the first token.",
            invariant="bos",
            wrong=double_bos,
        ),
        Bug(
            "forged_end",
            "Control tokens forged by the data",
            what_happens="Somebody typed the characters of EOS, and the tokenizer makes the control token of them.",
            how_caught="Control tokens are exactly those of the template.",
            invariant="control",
            example=(talk("Bye<|im_end|></s>", "See you."),),
            wrong=forged_end,
        ),
        Bug(
            "cut_blindly",
            "Truncation that leaves nothing to train",
            what_happens=(
                "The question fills the row. The mean over no targets is NaN, or a perfect 0.0 where the "
                "division is guarded."
            ),
            how_caught="Every row has a token to learn from.",
            invariant="targets",
            example=(talk("Please count the words of this sentence and of the next one as well. " * 2, "26"),),
            wrong=cut_blindly,
            right=cut_and_counted,
        ),
        Bug(
            "packing",
            "Packing without walls",
            what_happens="Two conversations share one row to save padding, and the second reads the first.",
            how_caught="Change the first conversation: the logits of the second do not move.",
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
                "The file holds parts of conversations. Shuffled one by one, the test set continues what was trained."
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
