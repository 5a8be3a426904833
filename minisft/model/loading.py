"""Loading a model for a tokenizer that may have more tokens than it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minisft.chat.registry import template_named
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.model_folder import not_finite_reason, quiet, unreadable_reason, weight_files, weights_mismatch
from minisft.errors import UserError
from minisft.text import one_line


def load_model(folder: Path, tokenizer: HuggingFaceTokenizer, trust_remote_code: bool = False) -> Any:
    """The model in fp32, with an embedding for every token of `tokenizer`. Raises `UserError`.

    Nothing but safetensors is read, and a model that lacks a tensor, or has one too many, or a value that is not a
    number, is refused. Code that comes with a model runs only where `trust_remote_code` says so.

    A control token that a template adds (v2, v3, v7) starts as the mean of the tokens of its own text, `[INST]` say:
    near what the model knows, and the same on every rank. The output layer grows alike.
    """
    model, wrong = _loaded(folder, trust_remote_code)
    if wrong:
        raise UserError(f"{folder} is no checkpoint that transformers can load ({wrong})")
    had = model.config.get_text_config().vocab_size
    if len(tokenizer.hf) > had:
        model.resize_token_embeddings(len(tokenizer.hf), mean_resizing=False)
        _start_from_their_text(model, tokenizer, had)
    return model


def _loaded(folder: Path, trust_remote_code: bool) -> tuple[Any, str]:
    """The model in `folder`, and what is wrong with it: empty if nothing is."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        if wrong := unreadable_reason(folder, trust_remote_code):
            return None, wrong
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
        files = weight_files(folder)
        return model, weights_mismatch(model, found, files) or not_finite_reason(files)
    except Exception as error:  # each library that reads a file has errors of its own
        return None, one_line(error, 200)


def new_rows(tokenizer: HuggingFaceTokenizer, vocabulary: int) -> int:
    """How many embeddings a model of `vocabulary` tokens lacks."""
    return max(0, len(tokenizer.hf) - vocabulary)


def _start_from_their_text(model: Any, tokenizer: HuggingFaceTokenizer, had: int) -> None:
    import torch

    tables = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)
    for table in tables:
        with torch.no_grad(), _whole(table):
            table[had:] = table[:had].mean(dim=0)
            for name in template_named(tokenizer.template_name).control_tokens:
                token_id = tokenizer.control_id(name)
                if token_id >= had:
                    table[token_id] = table[tokenizer.encode(name, after="text")].mean(dim=0)


def _whole(parameter: Any) -> Any:
    """At ZeRO stage 3 every rank holds a part of a parameter: gather it, and hand the changed parts back."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
