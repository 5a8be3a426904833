"""What a `RunConfig` alone cannot know: whether it fits the model, the device, the memory and the disk.

`prepare` asks all of it before anything starts. What cannot work is refused, what may not work is said.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisft import system
from minisft.data.model_folder import clean_logs, is_quantized, model_json, quiet
from minisft.errors import UserError
from minisft.model.load_model import positions_of
from minisft.run.folder import RunConfig, outputs_root
from minisft.text import one_line

GB = 1e9
SENSE = re.compile("vision|visual|image|audio|speech|video")  # a part beside the language model
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def resolve_precision(asked: str) -> tuple[str, bool]:
    """(`fp32`, `bf16` or `fp16`; whether there is a GPU). `auto` takes what the device computes fast."""
    import torch

    on_gpu = torch.cuda.is_available()
    if asked == "fp16" and not on_gpu:
        raise UserError("fp16 needs a GPU: use --precision bf16 or fp32 on a CPU")
    if asked == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: use --precision fp16 or fp32")
    if asked != "auto":
        return asked, on_gpu
    if on_gpu:
        return ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"), True
    able = torch.cpu.get_capabilities()
    return ("bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"), False


def require_fit(config: RunConfig, model: Any, rows: int) -> None:
    """Raise `UserError` where the data or the model (its transformers config) is too small for the settings."""
    require_positions(model, config.max_length)
    if not rows:
        raise UserError(
            f"no training row is left of {config.data} (max length {config.max_length}, max characters "
            f"{config.max_characters}, truncation {config.truncation}): allow more, or give more data"
        )
    if rows < config.global_batch and config.batching != "packed":
        raise UserError(
            f"{rows} training rows do not fill one global batch of {config.global_batch} (batch size "
            f"{config.batch_size} x accumulation {config.accumulation} x ranks {config.ranks}): lower one of them, or "
            "give more data"
        )


def require_positions(model: Any, length: int) -> None:
    """Raise `UserError` where rows of `length` tokens have more positions than the model of a transformers config."""
    positions = positions_of(model)
    if positions and length > positions:
        raise UserError(
            f"max length is {length}, and the model has {positions} positions: give at most --max-length {positions}"
        )


def require_space(config: RunConfig, rows: int, parameters: int) -> None:
    """Refuse at once what could only fail at the first save. Raises `UserError`."""
    per_epoch = max(1, rows // config.global_batch)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    saves = math.ceil(steps / (config.save_steps or per_epoch))
    each = parameters * (16 if config.resumable else 4)
    # Besides those to keep: the best, and the one being written.
    need = each * min(saves, saves if config.keep_checkpoints is None else config.keep_checkpoints + 2)
    place = outputs_root()
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < need:
        raise UserError(
            f"no space left for {saves} checkpoints: they need {need / GB:.1f} GB and {place} has "
            f"{free / GB:.1f} GB free; free some, save less often (--save-steps), or keep fewer (--keep-checkpoints)"
        )


def state_bytes(config: RunConfig, model: Any, precision: str, on_gpu: bool) -> float:
    """Bytes of states on the fullest rank of a run; on a GPU those that lie there alone."""
    from minisft.zero import state_memory

    shapes = state_memory.Shapes.of_config(model, config.trust_remote_code)
    deepspeed = state_memory.generated(shapes, config.strategy, config.ranks, precision)
    held = state_memory.predict(shapes, config.strategy, config.ranks, precision, deepspeed)
    if on_gpu:
        ranks = state_memory.distinct(held)
        return max(state_memory.total(state_memory.on_gpu(rank["after backward"], deepspeed)) for rank in ranks)
    return state_memory.most(held, "after backward")


def activation_bytes(config: RunConfig, model: Any, precision: str) -> float:
    """About what one micro-batch keeps for the backward pass, in bytes.

    34 bytes per token, layer and hidden unit in half precision (Korthikanti et al. 2022, eq. 2, without the attention
    matrices, which are not kept), twice that in fp32; with activation checkpointing the layers' inputs alone.
    """
    text = model.get_text_config()
    per_unit = (2 if config.activation_checkpointing else 34) * (2 if precision == "fp32" else 1)
    return config.batch_size * config.max_length * text.num_hidden_layers * text.hidden_size * per_unit


def warn_of_memory(config: RunConfig, model: Any, precision: str, on_gpu: bool, say: Callable[[str], None]) -> None:
    """Say so where a run will probably need more memory than is free, with both numbers."""
    states = state_bytes(config, model, precision, on_gpu)
    try:
        activations = activation_bytes(config, model, precision)
    except AttributeError:  # an architecture that counts its layers in its own way
        activations = 0.0
    if on_gpu:
        import torch

        need, free, what = states + activations, torch.cuda.mem_get_info()[0], "of GPU memory"
    else:
        need, free, what = config.ranks * (states + activations), system.memory()[1], "of memory"
    if need > free:
        say(
            f"Warning: this run may need about {need / GB:.1f} GB {what} ({config.ranks} x {states / GB:.1f} GB of "
            f"model states, up to {activations / GB:.1f} GB of activations each) and {free / GB:.1f} GB are free: a "
            "smaller --batch-size with more --accumulation trains the same, --activation-checkpointing saves more"
        )


def warn_of_cores(config: RunConfig, say: Callable[[str], None]) -> None:
    """Say so where ranks on CPUs would outnumber the cores of this machine."""
    cores = system.cores()
    if config.ranks > cores:
        say(
            f"Warning: {config.ranks} ranks share {cores} core{'s' if cores > 1 else ''} here, and each waits for all "
            f"others: far slower than --ranks {cores}, though it computes the same at the same global batch"
        )


def model_config(folder: Path, trust_remote_code: bool) -> Any:
    """The transformers config of the language model in `folder`, which may be its `config.json` itself.

    Raises `UserError` if transformers knows none such.
    """
    from transformers import AutoConfig, PreTrainedConfig

    file = folder if folder.is_file() else folder / "config.json"
    require_plain_text_model(model_json(file, trust_remote_code), file)
    clean_logs()
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of damage raises an error of its own
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} brings code of its own: read it, and give --trust-remote-code if you trust it"
            ) from error
        raise UserError(f"{file} is of no model that transformers knows ({reason})") from error
    require_language_model(config, file)
    _require_sense(config, file)
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise UserError(f"{file} has a key text_config, which a {config.model_type} model has not: remove it")
    _require_sense(text, file)
    return config


def require_plain_text_model(config: dict[str, Any], file: Path) -> None:
    """Refuse a `config.json` of quantized weights, or of a model that also sees or hears. Raises `UserError`."""
    if is_quantized(config):
        raise UserError(
            f"{file} is of quantized weights (quantization_config), which cannot be trained as they are: take the "
            "model whose weights are plain numbers"
        )
    senses = [key for key, value in config.items() if value and key.endswith("_config") and SENSE.search(key)]
    if senses:
        raise UserError(
            f"{file} is of a model that takes more than text ({one_line(senses[0], 60)}), and only language models of "
            "text alone are trained here: take one"
        )


def _require_sense(config: Any, file: Path) -> None:
    """Raise `UserError` for what transformers takes over from a `config.json` and no model can have."""
    for name in vars(config):
        if callable(getattr(type(config), name, None)):
            raise UserError(f"{file} has the key {name}, in the place of a function of transformers: remove it")
    for name in SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{file} says that {name} is {value}: give at least 1")


def require_language_model(config: Any, source: str | Path) -> None:
    """Raise `UserError` unless a model of this transformers config predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not known and not own_code:
        raise UserError(
            f"{source} is of a {config.model_type} model, which does not predict the next token from those before it: "
            "take a causal language model"
        )
