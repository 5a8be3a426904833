"""Read a model's transformers config; reject all but text-only causal language models."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from minisft.data.model_folder import clean_logs, is_quantized, model_json, quiet
from minisft.errors import UserError
from minisft.text import one_line

SENSE = re.compile("vision|visual|image|audio|speech|video")  # config keys of an encoder beside the language model
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def require_positions(model: Any, length: int) -> None:
    """Raise `UserError` if `length` tokens exceed the positions of a model. `model` is its
    transformers config.
    """
    positions = positions_of(model)
    if positions and length > positions:
        raise UserError(
            f"max length is {length}, and the model has {positions} positions: give at most --max-length {positions}"
        )


def model_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read the transformers config of the language model in `folder`, which may also be the path of
    a `config.json`.

    Raises `UserError` if transformers cannot read it or it is not a text-only causal language
    model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    file = folder if folder.is_file() else folder / "config.json"
    require_plain_text_model(model_json(file, trust_remote_code), file)
    clean_logs()
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # different damage raises different exceptions
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} contains code of its own: read it, and give --trust-remote-code if you trust it"
            ) from error
        raise UserError(f"{file} has a model_type that transformers does not know, or is damaged ({reason})") from error
    require_language_model(config, file)
    _require_valid_values(config, file)
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise UserError(f"{file} has the key text_config, which a {config.model_type} model does not have: remove it")
    _require_valid_values(text, file)
    return config


def require_plain_text_model(config: dict[str, Any], file: Path) -> None:
    """Raise `UserError` for the `config.json` of quantized weights, or of a model with image, audio
    or video input.
    """
    if is_quantized(config):
        raise UserError(
            f"{file} is of quantized weights (quantization_config), which cannot be trained: use the model's "
            "unquantized weights"
        )
    modalities = [key for key, value in config.items() if value and key.endswith("_config") and SENSE.search(key)]
    if modalities:
        raise UserError(
            f"{file} is of a model that takes more than text ({one_line(modalities[0], 60)}), which cannot be trained "
            "here: use a text-only language model"
        )


def _require_valid_values(config: Any, file: Path) -> None:
    """Raise `UserError` for values that transformers accepts from a `config.json` but no model can
    have.
    """
    for name in vars(config):
        if callable(getattr(type(config), name, None)):
            raise UserError(
                f"{file} has the key {name}, which would replace a method of the transformers config: remove it"
            )
    for name in SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{file} sets {name} to {value}: give at least 1")


def require_language_model(config: Any, source: str | Path) -> None:
    """Raise `UserError` unless a model of this transformers config predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not known and not own_code:
        raise UserError(
            f"{source} is of a {config.model_type} model, which does not predict the next token from those before it: "
            "use a causal language model"
        )


def positions_of(config: Any) -> int | None:
    """Return the number of positions of a transformers config's model, or None if it sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is None or positions > 0 else None  # some configs use -1 for no limit


def with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a transformers config with only the first `layers` layers."""
    config, old_layers = deepcopy(config), config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == old_layers:  # one entry per layer, such as `layer_types`
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers
    return config
