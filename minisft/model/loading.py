"""Load a model safely, and add embeddings for tokens that only the tokenizer has."""

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
    """Load a model in fp32, with an embedding for every token of `tokenizer`.

    Only safetensors are read. Raises `UserError` if a tensor is missing or unexpected, or a value
    is not finite. The model folder's own code runs only with `trust_remote_code`.

    The embedding of a control token that a template adds (v2, v3, v7) starts as the mean of the
    embeddings of its text, for example `[INST]`: close to what the model knows, and the same on
    every rank. The output layer grows likewise.
    """
    model, problem = _loaded(folder, trust_remote_code)
    if problem:
        raise UserError(f"{folder} is not a checkpoint that transformers can load ({problem})")
    old_size = model.config.get_text_config().vocab_size
    if tokenizer.vocab_size > old_size:  # ids may have gaps, so there may be fewer tokens than that
        model.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
        _initialize_new_rows(model, tokenizer, old_size)
    return model


def _loaded(folder: Path, trust_remote_code: bool) -> tuple[Any, str]:
    """Load the model; returns (model, ""), or (anything, reason) if it cannot be used."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        if problem := unreadable_reason(folder, trust_remote_code):
            return None, problem
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
        model, loading_info = loaded  # a pair, because of output_loading_info
        files = weight_files(folder)
        return model, weights_mismatch(model, loading_info, files) or not_finite_reason(files)
    except Exception as error:  # each library that reads a file raises different exceptions
        return None, one_line(error, 200)


def _initialize_new_rows(model: Any, tokenizer: HuggingFaceTokenizer, old_size: int) -> None:
    """Set each new control token's row to the mean of its text's rows, and other new rows to the
    overall mean.
    """
    import torch

    tables = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)  # untied output layer
    for table in tables:
        with torch.no_grad(), _gathered(table):
            table[old_size:] = table[:old_size].mean(dim=0)
            for name in template_named(tokenizer.template_name).control_tokens:
                token_id = tokenizer.control_id(name)
                assert token_id is not None  # `HuggingFaceTokenizer` adds its template's control tokens
                if token_id >= old_size:
                    table[token_id] = table[tokenizer.encode(name, after="text")].mean(dim=0)


def _gathered(parameter: Any) -> Any:
    """Gather a parameter that ZeRO stage 3 partitioned, and scatter rank 0's changes on exit."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
