"""A model of one narrow layer: many steps per second, where the real model is not the subject."""

from __future__ import annotations

from pathlib import Path

from minisft.system import skip_accelerator_search


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
