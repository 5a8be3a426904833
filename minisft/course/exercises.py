"""What the notebooks need: a check that tells "not attempted" from "wrong", and says where; a model to play with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check(answer: Sequence[Any] | None, expected: Sequence[Any], what: str = "position") -> str:
    """Compare an exercise's answer with what the package computes; returns one sentence to show."""
    if answer is None:
        return "Not attempted yet: replace None and run this cell again."
    if len(answer) != len(expected):
        return f"Not yet: your answer has {len(answer)} entries, and {len(expected)} are expected."
    for i, (mine, right) in enumerate(zip(answer, expected, strict=True)):
        if mine != right:
            return f"Not yet: look at {what} {i}, where you have {mine!r}."
    return f"Right: all {len(expected)} agree."


def small_model(folder: Path, like: Path) -> Path:
    """A model that steps many times a second: one narrow layer of random weights, with the tokenizer of `like`.

    Both are model folders; returns `folder`.
    """
    import torch

    if not torch.cuda.is_available():  # DeepSpeed, which comes in with the model's class, would search, and say so
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.from_pretrained(like, local_files_only=True, **size, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like, local_files_only=True).save_pretrained(folder)
    return folder
