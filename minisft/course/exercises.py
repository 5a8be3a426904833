"""Helpers for exercises: an answer check that locates the first error, and a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisft.system import skip_accelerator_search


def check(answer: Any, expected: Sequence[Any], what: str = "position") -> str:
    """Compare an exercise's answer, a sequence, with what the package computes.

    `what` names one entry of the answer. Returns one sentence to show: not attempted (None), wrong
    and where, or right.
    """
    if answer is None:
        return "Not attempted yet: replace None and run this cell again."
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return f"Not yet: give a list of {len(expected)} entries, in order, not a {type(answer).__name__}."
    if len(answer) != len(expected):
        return f"Not yet: your answer has {len(answer)} entries, and {len(expected)} are expected."
    for i, (given, right) in enumerate(zip(answer, expected, strict=True)):
        if given != right:
            return f"Not yet: look at {what} {i}, where you have {given!r}."
    return f"Right: all {len(expected)} agree."


def small_model(folder: Path, like: Path) -> Path:
    """Write a model of one narrow layer with random weights and the tokenizer of `like`: many steps
    per second.

    `folder` and `like` are model folders; returns `folder`.
    """
    skip_accelerator_search()  # the model class imports DeepSpeed
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.from_pretrained(like, local_files_only=True, **size, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like, local_files_only=True).save_pretrained(folder)
    return folder
