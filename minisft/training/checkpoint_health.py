"""Whether a model folder or a checkpoint can be used, found out without keeping a model of it.

Each is examined before it is trained, evaluated or talked to: its files' headers before their values. Which tensors a
model wants, and under which names they are saved, transformers itself says, by loading them without their values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from minisft.run.folder import Run, checkpoint_step, manifest_of
from minisft.text import one_line
from minisft.training.checkpoints import checkpoint_damage
from minisft.training.dataset import changed_model


def model_problem(folder: Path, *, trust_remote_code: bool = False, values: bool = True) -> str:
    """Why the model in `folder` cannot be used, in one sentence without its name; empty if it can.

    Looks at config, files, headers, tensors that are missing, unexpected or of another shape, and tied weights; with
    `values` also at every number, once for each content. The tokenizer is examined where it is loaded.
    """
    return _said(lambda: _flaw(folder, trust_remote_code, values))


def require_sound(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise `UserError` if `model_problem` finds something."""
    if wrong := model_problem(folder, trust_remote_code=trust_remote_code):
        raise UserError(f"the model in {folder} cannot be used: {wrong}")


def checkpoint_problem(run: Run, folder: Path) -> str:
    """Why the checkpoint `folder` of `run` cannot be used, in one sentence without its name; empty if it can.

    The model before training may be given as well; it needs no chat template.
    """
    return _said(lambda: _ailment(run, folder))


def _said(examine: Any) -> str:
    try:
        return one_line(examine())
    except UserError as error:
        return one_line(error)
    except Exception as error:  # whatever a library raises on files that somebody has damaged
        return f"it cannot be examined ({type(error).__name__}: {one_line(error, 150)})"


def _flaw(folder: Path, trust_remote_code: bool, values: bool) -> str:
    if wrong := unreadable_reason(folder, trust_remote_code):
        return wrong
    model_config(folder, trust_remote_code)
    files = weight_files(folder)
    model, found = _without_values(folder, trust_remote_code)
    return weights_mismatch(model, found, files) or (not_finite_reason(files) if values else "")


def _ailment(run: Run, folder: Path) -> str:
    trust = run.trust_remote_code
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    config, own = model_config(folder, trust), model_config(run.model_folder, trust)
    if config.model_type != own.model_type:
        return f"it is of another architecture: a {config.model_type} model, and the run's is {own.model_type}"
    return (
        _flaw(folder, trust, values=True)
        or _not_as_written(run, folder)
        or _no_words(run, folder, config.get_text_config().vocab_size)
    )


def _not_as_written(run: Run, folder: Path) -> str:
    """How a checkpoint differs from what its run wrote, its optimizer states aside; the start model, from then."""
    if folder == run.model_folder:
        return changed_model(run)
    manifest = manifest_of(folder) or {}
    step = manifest.get("step")
    if step is not None and folder in run.checkpoints and step != checkpoint_step(folder):
        return f"its manifest is that of step {step}"
    if not run.wrote(manifest):
        return "its manifest is that of another run"
    return checkpoint_damage(folder, {name for name in manifest.get("files", ()) if name.endswith(OF_A_MODEL)})


def _without_values(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The model on PyTorch's meta device, and what transformers says of how its tensors and the files' agree."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )


def _no_words(run: Run, folder: Path, vocabulary: int) -> str:
    if folder == run.model_folder:
        return ""  # that it has a tokenizer was seen when the run was made, and its template is the run's
    if not (folder / "tokenizer.json").exists():
        return "it has no tokenizer.json"
    tokenizer = HuggingFaceTokenizer(folder)
    if len(tokenizer.hf) > vocabulary:
        return f"its tokenizer has {len(tokenizer.hf)} tokens, and its model embeddings for {vocabulary}"
    return "" if tokenizer.hf.chat_template else "its tokenizer has no chat template"
