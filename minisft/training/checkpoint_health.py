"""Checks whether a model folder or a checkpoint can be used, without keeping a model in memory.

Each folder is checked before it is trained, evaluated or used for chat: first the headers of its
files, then their values. transformers itself tells which tensors a model needs and under which
names they are saved: it loads the model on the meta device, without values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.model_folder import (
    OF_A_MODEL,
    not_finite_reason,
    quiet,
    unreadable_reason,
    weight_files,
    weights_mismatch,
)
from minisft.errors import UserError
from minisft.model.configs import model_config
from minisft.run.folder import MANIFEST, Run, checkpoint_step, manifest_of
from minisft.text import one_line
from minisft.training.checkpoints import checkpoint_damage
from minisft.training.dataset import changed_model

P = ParamSpec("P")


def in_one_sentence(find_problem: Callable[P, str]) -> Callable[P, str]:
    """Turn whatever a check of a model folder raises into the sentence that it returns for a problem."""

    @functools.wraps(find_problem)
    def problem(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            return one_line(find_problem(*args, **kwargs))
        except UserError as error:
            return one_line(error)
        except Exception as error:  # libraries raise all kinds of errors for damaged files
            return f"it cannot be examined ({type(error).__name__}: {one_line(error, 150)})"

    return problem


@in_one_sentence
def model_problem(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Return in one sentence, without its name, why a model cannot be used; "" if it can.

    Checks the config, the files, their headers, tied weights, tensors that are missing, unexpected
    or of another shape, and that every number is finite, once per file content. The tokenizer is
    checked where it is loaded.
    """
    if reason := unreadable_reason(folder, trust_remote_code):
        return reason
    model_config(folder, trust_remote_code)
    files = weight_files(folder)
    model, loading_info = _without_values(folder, trust_remote_code)
    return weights_mismatch(model, loading_info, files) or not_finite_reason(files)


def require_sound(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise `UserError` if `model_problem` finds something."""
    if problem := model_problem(folder, trust_remote_code=trust_remote_code):
        raise UserError(f"the model in {folder} cannot be used: {problem}")


def checkpoint_problem(run: Run, folder: Path) -> str:
    """Return in one sentence, without its name, why a checkpoint cannot be used; "" if it can.

    `folder` may also be the model before training, which needs no chat template.
    """
    return content_problem(run, folder) or origin_problem(run, folder)


@in_one_sentence
def content_problem(run: Run, folder: Path) -> str:
    """Do as `checkpoint_problem`, for a checkpoint whose `origin_problem` is known to be ""."""
    trust = run.trust_remote_code
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    config, own = model_config(folder, trust), model_config(run.model_folder, trust)
    if config.model_type != own.model_type:
        return f"it has another architecture: a {config.model_type} model, and the run's is {own.model_type}"
    return (
        model_problem(folder, trust_remote_code=trust)
        or (checkpoint_damage(folder, only=OF_A_MODEL) if folder != run.model_folder else "")
        or _tokenizer_problem(run, folder, config.get_text_config().vocab_size)
    )


@in_one_sentence
def origin_problem(run: Run, folder: Path) -> str:
    """Say why a checkpoint is not of this run and this step; "" if it is. Its weights are not read.

    The start model is compared with its state when the run was prepared.
    """
    if folder == run.model_folder:
        return changed_model(run)
    if changed := changed_model(run, weights=False):  # prompts are made with the start model's tokenizer
        return changed
    manifest = manifest_of(folder)
    if manifest is None:
        return f"it has no {MANIFEST}"
    step = manifest.get("step")
    if step is not None and folder in run.checkpoints and step != checkpoint_step(folder):
        return f"its manifest is that of step {step}"
    if not run.wrote(manifest):
        return "its manifest is that of another run"
    return ""


def _without_values(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Return the model on PyTorch's meta device, and transformers' report on the files' tensors."""
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    return loaded  # a pair, because of `output_loading_info`


def _tokenizer_problem(run: Run, folder: Path, vocabulary: int) -> str:
    if folder == run.model_folder:
        return ""  # `prepare` has loaded its tokenizer, and the template is that of the run
    if not (folder / "tokenizer.json").exists():
        return "it has no tokenizer.json"
    tokenizer = HuggingFaceTokenizer(folder)
    if len(tokenizer.hf) > vocabulary:
        return f"its tokenizer has {len(tokenizer.hf)} tokens, but its model has embeddings for {vocabulary}"
    return "" if tokenizer.hf.chat_template else "its tokenizer has no chat template"
