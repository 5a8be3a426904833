"""Let a model answer: batches of prompts, the loss of given answers, or a few questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError
from minisft.evaluation.eval_set import UNLIMITED, load_template, prompt_ids
from minisft.evaluation.generate import attending, generate_batched
from minisft.labels.encode_row import Row, encode
from minisft.model.loading import load_model
from minisft.training.checkpoint_health import require_sound
from minisft.training.collators import PaddingFree, PadRight, portions

TOKENS_AT_ONCE = 4096  # per batch when computing a loss


@dataclass(frozen=True)
class Answer:
    """One generated reply; `stopped` if the model ended it with a stop token."""

    text: str
    stopped: bool


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: HuggingFaceTokenizer,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Generate greedy answers to `prompts` (token ids).

    Yields (index of the prompt, answer) as soon as each answer is complete.
    """
    replies = generate_batched(
        model,
        prompts,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    for reply in replies:
        yield reply.index, Answer(tokenizer.decode(reply.ids).strip(), reply.stopped)


def answer_loss(
    model: Any, conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: HuggingFaceTokenizer
) -> tuple[float, int]:
    """Compute the teacher-forced loss of the conversations' answers; see `loss_of_rows`."""
    return loss_of_rows(model, [encode(c, template, tokenizer, UNLIMITED) for c in conversations], tokenizer.pad_id)


def loss_of_rows(model: Any, rows: Sequence[Row], pad_id: int) -> tuple[float, int]:
    """Compute the loss of encoded rows.

    Returns (mean over the trained tokens of all rows, in nats; number of these tokens). Raises
    `UserError` if no token is trained: a mean over nothing would be a false 0.
    """
    import torch

    from minisft.model.loss import summed_loss, trained_positions
    from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free

    if not any(row.trained for row in rows):
        raise UserError(
            "no token of these answers is trained, so they have no loss: use other rows or another template"
        )
    # Sorted by length, so that a padded batch contains little padding.
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    padding_free = supports_padding_free(model)
    collate = PaddingFree() if padding_free else PadRight(pad_id)
    total, count = 0.0, 0
    with attending(model, PER_DOCUMENT) if padding_free else nullcontext():
        for portion in portions([len(row.input_ids) for row in rows], TOKENS_AT_ONCE):
            examples = [{"id": r.id, "input_ids": r.input_ids, "labels": r.labels} for r in rows[portion]]
            batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in collate(examples).items()}
            positions, targets = trained_positions(batch.pop("labels"))
            with torch.inference_mode():
                batch["use_cache"] = False
                total += float(summed_loss(model, batch, positions, targets, None, padding_free))
            count += len(targets)
    return total / count, count


def ask(folder: Path, questions: Sequence[str], max_new_tokens: int = 40, template: str = "v1") -> list[Answer]:
    """Answer each question alone, greedily, with the model in `folder` and the training template.

    Raises `UserError` if the model folder cannot be used.
    """
    require_sound(folder)
    tokenizer, chat_template = load_template(folder, template)
    conversations = [Conversation("asked", (Message("user", q), Message("assistant", ""))) for q in questions]
    prompts = [prompt_ids(c, chat_template, tokenizer) for c in conversations]
    answers = dict(generate(load_to_answer(folder, tokenizer), prompts, tokenizer, max_new_tokens, len(prompts)))
    return [answers[i] for i in range(len(prompts))]


def load_to_answer(
    folder: Path, tokenizer: HuggingFaceTokenizer, precision: str = "fp32", trust_remote_code: bool = False
) -> Any:
    """Load a model for inference.

    If a GPU is available it runs there in its training `precision`; otherwise in fp32 on the CPU.
    """
    import torch

    model = load_model(folder, tokenizer, trust_remote_code).eval()
    if not torch.cuda.is_available():
        return model
    return model.to("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
