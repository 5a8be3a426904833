"""What people would train with instead, for `training_speed`: TRL, the plain Trainer, and the original recipe.

    python peer_train.py '{"kind": "trl", "model": …, "rows": …, "max_length": 512, "batch": 8, "precision": "bf16", …}'

One process, some steps, one line of JSON at the end: seconds, tokens and trained tokens of every step. Each peer gets
the same weights, the same rows in the same order, the same optimizer, and no saving or reporting:

trl         SFTTrainer with `assistant_only_loss=True`, which prepares the rows from their messages; all else as TRL
            sets it, activation checkpointing included
trl-plain   the same without activation checkpointing: faster, larger
hf          the Trainer with rows that are padded to the longest of their batch, and full logits
original    the Trainer with rows that are padded to 2048 and full logits: the recipe of the original work

`trl` runs in an environment of its own, so this file needs nothing of minisft.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from worker import memory

IGNORE_INDEX = -100
ORIGINAL_LENGTH = 2048


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        _wait()
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.began)
        print(f"ended step {len(self.seconds)}", file=sys.stderr, flush=True)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def padded(rows: list[dict[str, list[int]]], pad_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    longest = length or max(len(row["input_ids"]) for row in rows)
    rest = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [pad_id] * n for row, n in zip(rows, rest, strict=True)]),
        "labels": torch.tensor([row["labels"] + [IGNORE_INDEX] * n for row, n in zip(rows, rest, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, rest, strict=True)]
        ),
    }


def sizes(row: dict[str, Any]) -> tuple[int, int]:
    """Tokens and trained tokens."""
    return len(row["input_ids"]), sum(label != IGNORE_INDEX for label in row["labels"][1:])


def in_order(base: type) -> type:
    class InOrder(base):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def trainer_of(settings: dict[str, Any], rows: list[dict[str, Any]], scratch: str) -> Trainer:
    on_gpu = torch.cuda.is_available()
    accumulation = settings.get("accumulation", 1)
    options = {
        "output_dir": scratch,
        "per_device_train_batch_size": settings["batch"] // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": settings["steps"],
        "learning_rate": 8e-6,
        "weight_decay": 1e-5,
        "max_grad_norm": 2.0,
        "bf16": settings["precision"] == "bf16",
        "fp16": settings["precision"] == "fp16",
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], local_files_only=True, dtype=torch.float32)
    if settings["kind"].startswith("trl"):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from trl_prepare import TEMPLATE

        tokenizer.chat_template = TEMPLATE
        if settings["kind"] == "trl-plain":
            options["gradient_checkpointing"] = False
        return in_order(SFTTrainer)(
            model=model,
            args=SFTConfig(**options, assistant_only_loss=True, max_length=settings["max_length"], packing=False),
            train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]),
            processing_class=tokenizer,
        )
    model.config.use_cache = False

    def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        warm_up = chosen[0] is rows[0]  # that step need not be long, and is not timed
        length = ORIGINAL_LENGTH if settings["kind"] == "original" and not warm_up else None
        return padded(chosen, tokenizer.pad_token_id, length)

    return in_order(Trainer)(
        model=model,
        args=TrainingArguments(**options, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=collate,
    )


def main() -> None:
    settings = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(settings, rows, scratch)
        clock = Clock()
        trainer.add_callback(clock)
        prepared = [(len(row["input_ids"]), sum(x != IGNORE_INDEX for x in row["labels"][1:])) for row in rows]
        if settings["kind"].startswith("trl"):
            made = [
                (len(r["input_ids"]), sum(x != IGNORE_INDEX for x in r["labels"][1:])) for r in trainer.train_dataset
            ]
            if made[: len(prepared)] != prepared:
                raise SystemExit("TRL made other rows of the same messages")
        trainer.train()
    per_step = [prepared[i : i + settings["batch"]] for i in range(0, len(prepared), settings["batch"])]
    print(
        json.dumps(
            {
                "seconds": clock.seconds,
                "tokens": [sum(n for n, _ in step) for step in per_step[: settings["steps"]]],
                "trained_tokens": [sum(n for _, n in step) for step in per_step[: settings["steps"]]],
                "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory("VmHWM"),
            }
        )
    )


if __name__ == "__main__":
    main()
