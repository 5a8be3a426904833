"""Whether a checkpoint can be used, found out before a model is built from it.

transformers loads a good deal that is broken: a tensor that is missing becomes random numbers, with a warning. Here
each checkpoint is looked at first, its file headers before its values, and what is wrong is one sentence. Which tensors
a model wants, and under which names they are saved, transformers itself says, by loading them without their values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisft.checkpoints import damage
from minisft.errors import UserError
from minisft.files import read_json
from minisft.preflight import model_config
from minisft.runs import Run
from minisft.tokens import HuggingFaceTokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def ailment(run: Run, folder: Path) -> str:
    """Why the checkpoint `folder` of `run` cannot be used, in one sentence without its name; empty if it can.

    The model before training may be given as well; it needs no chat template.
    """
    try:
        return _ailment(run, folder)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a library raises on files that somebody has damaged
        return f"it cannot be examined ({type(error).__name__}: {' '.join(str(error).split())[:150]})"


def _ailment(run: Run, folder: Path) -> str:
    trust = run.config.trust_remote_code
    if not (folder / "config.json").exists():
        return "it has no config.json"
    config, own = model_config(folder, trust), model_config(run.model_folder, trust)
    if config.model_type != own.model_type:
        return f"it is of another architecture: a {config.model_type} model, and the run's is {own.model_type}"
    files = weight_files(folder)
    if not files:
        return _no_weights(folder)
    if wrong := _unreadable(files) or damage(folder, {file.name for file in files}):
        return wrong
    model, found = _without_values(folder, trust)
    return (
        _misfit(found)
        or _no_longer_tied(model, files)
        or _bad_values(files)
        or _no_words(run, folder, config.get_text_config().vocab_size)
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint that transformers would read, in name order."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        if index is not None:
            raise UserError(f"{INDEX} does not say in which file each tensor is")
        return []
    return [folder / name for name in sorted(set(names.values()))]


def _no_weights(folder: Path) -> str:
    if any(folder.glob("global_step*")) or any(folder.rglob("*zero_pp_rank*")):
        return (
            f"its weights are still split over the ranks (ZeRO shards and no {WEIGHTS}): gather them with its "
            "zero_to_fp32.py, or train with stage3_gather_16bit_weights_on_model_save"
        )
    return f"it has no {WEIGHTS}"


def _unreadable(files: Iterable[Path]) -> str:
    for file in files:
        try:
            list(_tensors_of(file))
        except FileNotFoundError:
            return f"{file.name} is missing"
        except Exception as error:  # safetensors has an error class of its own
            return f"{file.name} cannot be read ({str(error)[:100]})"
    return ""


def _without_values(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The model on PyTorch's meta device, and what transformers says of how its tensors and the files' agree."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report: what it says is said here, in one sentence."""
    from transformers.utils import logging as hf_logging

    log = logging.getLogger("transformers")
    before, bar = log.level, hf_logging.is_progress_bar_enabled()
    log.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(before)
        if bar:
            hf_logging.enable_progress_bar()


def _misfit(found: dict[str, Any]) -> str:
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        what = "is empty" if not math.prod(shape) else f"has the shape {list(shape)}"
        return f"the tensor {name} {what}, and its config.json asks for {list(wanted)}"
    for keys, what in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "has no place in the model of its config.json"),
    ):
        if names := sorted(found[keys]):
            more = f", and {len(names) - 1} more" if names[1:] else ""
            return f"the tensor {names[0]}{more} {what}"
    return "; ".join(map(str, found.get("error_msgs") or ()))[:200]


def _no_longer_tied(model: Any, files: Iterable[Path]) -> str:
    import torch

    place = {name: file for file in files for name in _tensors_of(file)}
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in place and other in place:
            pair = [_tensor(place[which], which) for which in (name, other)]
            if not torch.equal(*pair):
                return f"{name} differs from {other}, and by its config.json they are one tensor"
    return ""


def _tensors_of(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return list(stream.keys())


def _tensor(file: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.get_tensor(name)


def _bad_values(files: Iterable[Path]) -> str:
    import torch
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                tensor = stream.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                if tensor.element_size() == 1:  # 8-bit floats know no isfinite
                    tensor = tensor.float()
                if not (finite := torch.isfinite(tensor)).all():
                    return f"{int((~finite).sum())} of the {tensor.numel()} values of {name} are not finite"
    return ""


def _no_words(run: Run, folder: Path, vocabulary: int) -> str:
    if folder == run.model_folder:
        return ""  # that it has a tokenizer was seen when the run was made, and its template is the run's
    if not (folder / "tokenizer.json").exists():
        return "it has no tokenizer.json"
    tokenizer = HuggingFaceTokenizer(folder)
    if len(tokenizer.hf) > vocabulary:
        return f"its tokenizer has {len(tokenizer.hf)} tokens, and its model embeddings for {vocabulary}"
    return "" if tokenizer.hf.chat_template else "its tokenizer has no chat template"
