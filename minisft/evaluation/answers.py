"""A model answers: many prompts at once, the loss of given answers, and a question or two of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.evaluation.eval_set import load_template, prompt_ids
from minisft.evaluation.generate import attending, generate_batched
from minisft.labels.encode_row import encode
from minisft.model.loading import load_model
from minisft.training.checkpoint_health import require_sound
from minisft.training.collators import PaddingFree, PadRight, portions

TOKENS_AT_ONCE = 4096  # of the batches whose loss is taken


@dataclass(frozen=True)
class Answer:
    """One generated reply; `stopped` if the model ended it by itself, with EOS."""

    text: str
    stopped: bool


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: HuggingFaceTokenizer,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Greedy answers to `prompts` (token ids) as they come, each with the number of its prompt."""
    ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    for reply in generate_batched(model, prompts, **ids, max_new_tokens=max_new_tokens, batch_size=batch_size):
        yield reply.index, Answer(tokenizer.decode(reply.ids).strip(), reply.stopped)


def answer_loss(
    model: Any, conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: HuggingFaceTokenizer
) -> tuple[float, int]:
    """Teacher-forced loss in nats: the mean over all trained tokens of all rows; and how many those are."""
    import torch

    from minisft.model.loss import summed_loss, trained_positions
    from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free

    rows = sorted((encode(c, template, tokenizer, 1 << 30) for c in conversations), key=lambda row: len(row.input_ids))
    padding_free = supports_padding_free(model)
    collate = PaddingFree() if padding_free else PadRight(tokenizer.pad_id)
    total, count = 0.0, 0
    with attending(model, PER_DOCUMENT) if padding_free else nullcontext():
        for chosen in portions([len(row.input_ids) for row in rows], TOKENS_AT_ONCE):
            part = [{"id": r.id, "input_ids": r.input_ids, "labels": r.labels} for r in rows[chosen]]
            batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in collate(part).items()}
            positions, targets = trained_positions(batch.pop("labels"))
            with torch.inference_mode():
                batch["use_cache"] = False
                total += float(summed_loss(model, batch, positions, targets, None, padding_free))
            count += len(targets)
    return total / max(1, count), count


def ask(folder: Path, questions: Sequence[str], max_new_tokens: int = 40, template: str = "v1") -> list[Answer]:
    """Greedy answers of the model in `folder` to questions, each asked alone, in the template of training."""
    require_sound(folder)
    tokenizer, form = load_template(folder, template)
    asked = [Conversation("asked", (Message("user", q), Message("assistant", ""))) for q in questions]
    prompts = [prompt_ids(c, form, tokenizer) for c in asked]
    found = dict(generate(load_to_answer(folder, tokenizer), prompts, tokenizer, max_new_tokens, len(asked)))
    return [found[i] for i in range(len(asked))]


def load_to_answer(
    folder: Path, tokenizer: HuggingFaceTokenizer, precision: str = "fp32", trust_remote_code: bool = False
) -> Any:
    """A model for inference: in fp32, or on a GPU, if there is one, in the `precision` of its training."""
    import torch

    model = load_model(folder, tokenizer, trust_remote_code).eval()
    if not torch.cuda.is_available():
        return model
    return model.to("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
