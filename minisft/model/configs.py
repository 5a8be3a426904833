"""The transformers config of a model folder: read, checked, and refused where no language model can have it."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from minisft.data.model_folder import (
    clean_logs,
    is_quantized,
    model_json,
    quiet,
)
from minisft.errors import UserError
from minisft.text import one_line

SENSE = re.compile("vision|visual|image|audio|speech|video")  # a part beside the language model
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def require_positions(model: Any, length: int) -> None:
    """Raise `UserError` where rows of `length` tokens have more positions than the model of a transformers config."""
    positions = positions_of(model)
    if positions and length > positions:
        raise UserError(
            f"max length is {length}, and the model has {positions} positions: give at most --max-length {positions}"
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


def positions_of(config: Any) -> int | None:
    """How many positions the model of a transformers config has; None where it sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is None or positions > 0 else None  # some write -1


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a transformers config, with so many layers."""
    config, had = deepcopy(config), config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == had:  # one entry for each layer, as `layer_types`
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers
    return config
