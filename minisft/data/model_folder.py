"""What a model folder holds, examined before a library reads it: its JSON, its files, their headers and their values.

transformers follows what the JSON in a folder says. That may name other weight files than the usual ones, a base model
somewhere else, or kernels of a hub, which are code; and a tensor that is missing becomes random numbers, with a
warning. So whatever loads a model asks `unreadable_reason` before and `weights_mismatch` after. Both return one
sentence without the folder's name, empty if all is well.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from minisft import checksums
from minisft.checksums import Digests
from minisft.errors import UserError
from minisft.files import read_json, write_json
from minisft.text import harmless, one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LAYERS = re.compile(r"n_layers?|num_(hidden_)?layers")
OF_A_MODEL = (
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
)  # endings of what a model and its tokenizer are read from
MOST_BYTES = 4_000_000  # of a config.json: transformers copies it several times
# transformers makes lists of layers and tables of positions and frequencies before it reads a tensor.
LIMITS = (
    (LAYERS, 1_000),
    (re.compile(r"num_labels"), 1 << 20),
    (re.compile(r".*\[\]"), 1 << 24),  # a number in a list
    (re.compile(r".*(dim|size|heads|experts|rank|positions|embeddings|embd|inner|ctx)"), 1 << 24),
)
# What a config may choose by itself. Any other name is a package, or a kernel that transformers gets from a hub.
OWN_CODE = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
BUFFERS = ("inv_freq", "masked_bias", "position_ids")  # constants that older checkpoints hold and no model reads
_RANK_FILES = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_TOKENIZER_CLASS = re.compile(r"(?!Auto|Rag)\w*(Tokenizer|TokenizerFast|Backend)")
MOST_REMEMBERED = 500


# --- JSON --------------------------------------------------------------------------------------------------


def model_json(file: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The values of a `config.json`. Raises `UserError` if it is damaged, absurd, or asks for code from elsewhere."""
    values = _json(file, MOST_BYTES)
    if values is None:
        raise UserError(f"{file} does not exist: give the folder that save_pretrained wrote")
    for key, value in _entries(values):
        own = OWN_CODE.get(key.lstrip("_"))
        if own is None or trust_remote_code:
            continue
        chosen = value.values() if isinstance(value, dict) else [value]
        if foreign := [name for name in chosen if name is not None and name not in own]:
            raise UserError(
                f"{file} asks for code from elsewhere ({key}: {one_line(foreign[0], 60)}): remove that key, or "
                "give --trust-remote-code if you trust it"
            )
    return values


def require_tokenizer_class(folder: Path) -> None:
    """Raise `UserError` if the tokenizer's class is not a tokenizer's: transformers would load anything it has."""
    for name in ("tokenizer_config.json", "config.json"):
        found = (_json(folder / name) or {}).get("tokenizer_class")
        if found is not None and not (isinstance(found, str) and _TOKENIZER_CLASS.fullmatch(found)):
            raise UserError(f"the tokenizer_class {one_line(found, 60)!r} in {folder / name} is not one of a tokenizer")


def _json(file: Path, most_bytes: int | None = None) -> dict[str, Any] | None:
    values = read_json(file, dict[str, Any], most_bytes)
    for key, value in _entries(values or {}):
        for named, most in LIMITS:
            if isinstance(value, int) and value > most and named.fullmatch(key):
                raise UserError(f"{file} asks for {one_line(value, 40)} ({one_line(key, 60)}): at most {most} is read")
    return values


def _entries(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, those of the configs and lists inside included; what is in a list as `key[]`."""
    inside: list[tuple[str, Any]] = [("", values)]
    while inside:
        name, outer = inside.pop()
        in_list = f"{name.removesuffix('[]')}[]"
        for key, value in outer.items() if isinstance(outer, dict) else ((in_list, value) for value in outer):
            yield key, value
            if isinstance(value, dict | list):
                inside.append((key, value))


# --- files -------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, in name order; none if there are none.

    Raises `UserError` for an index that names anything but safetensors files of its own folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        if index is not None:
            raise UserError(f"{INDEX} does not say in which file each tensor is")
        return []
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{INDEX} names {one_line(name, 60)!r}, which is not a safetensors file of this folder")
    return [folder / name for name in sorted(set(names.values()))]


def tensors_of(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return list(stream.keys())


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether a `config.json` says that its weights, or a part of them, are no plain numbers."""
    return any(value for key, value in _entries(config) if key == "quantization_config")


def unreadable_reason(folder: Path, trust_remote_code: bool = False) -> str:
    """Why the model in `folder` cannot be loaded as it stands; empty if its config, files and headers are sound.

    Raises `UserError` for JSON that is damaged.
    """
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    config = model_json(folder / "config.json", trust_remote_code)
    if config.get("transformers_weights") is not None:
        return "config.json names weight files of its own (transformers_weights): remove that key"
    if is_quantized(config):
        return "its weights are quantized (quantization_config in config.json): save them as plain numbers first"
    if (folder / ADAPTER).exists():
        return f"it holds an adapter ({ADAPTER}), whose base model is elsewhere: merge the two and save the result"
    for file in folder.iterdir():
        if _RANK_FILES.fullmatch(file.name):
            return f"its weights are split over ranks ({file.name}): consolidate them into {WEIGHTS}"
    weights = weight_files(folder)
    return _damaged_headers(weights, config) if weights else _no_weights(folder)


def _no_weights(folder: Path) -> str:
    if any(folder.glob("global_step*")) or any(folder.rglob("*zero_pp_rank*")):
        return (
            f"its weights are still split over the ranks (ZeRO shards and no {WEIGHTS}): gather them with "
            "DeepSpeed's own zero_to_fp32 (not with a script in the folder), or train with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    return f"it has no {WEIGHTS}"


def _damaged_headers(weights: Sequence[Path], config: dict[str, Any]) -> str:
    place: dict[str, Path] = {}
    for file in weights:
        if not file.is_file():  # opening a pipe would wait for ever
            return f"{file.name} is {'not a regular file' if file.exists() else 'missing'}"
        try:
            names = tensors_of(file)
        except Exception as error:  # safetensors has an error class of its own
            return f"{file.name} cannot be read ({one_line(error, 100)})"
        for name in names:
            if name in place:
                return f"the tensor {one_line(name, 100)} is in {place[name].name} and in {file.name}"
            place[name] = file
    layers = max((v for k, v in _entries(config) if LAYERS.fullmatch(k) and isinstance(v, int)), default=0)
    if layers > len(place):
        return f"config.json asks for {layers} layers, and there are only {len(place)} tensors"
    return ""


# --- values ------------------------------------------------------------------------------------------------


def not_finite_reason(weights: Iterable[Path]) -> str:
    """Which tensor of the files `weights` has values that are not finite; what was found sound is not read again."""
    sound, digests = _found_finite(), Digests()
    for file in weights:
        content = digests.of(file)
        if content in sound:
            continue
        if wrong := _bad_values(file):
            return wrong
        sound = [*sound[1 - MOST_REMEMBERED :], content]
        with suppress(OSError, UserError):  # a cache that cannot be written costs time alone
            _finite_memory().parent.mkdir(parents=True, exist_ok=True)
            write_json(_finite_memory(), sound)
    return ""


def _finite_memory() -> Path:
    """The file for the checksums of weights whose values were all finite, beside those of all files."""
    return checksums.digest_memory().with_name("finite.json")


def _found_finite() -> list[str]:
    with suppress(OSError, UserError):  # what was looked at once can be looked at again
        return read_json(_finite_memory(), list[str]) or []
    return []


def _bad_values(file: Path) -> str:
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            tensor = stream.get_tensor(name)
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.element_size() == 1:  # PyTorch has no arithmetic for 8-bit floats
                tensor = tensor.float()
            # The largest magnitude is not finite if one value is not: a single pass, and no tensor beside it.
            if torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)):
                continue
            count = int((~torch.isfinite(tensor)).sum())
            return f"{count} of the {tensor.numel()} values of {one_line(name, 100)} are not finite"
    return ""


# --- loading -----------------------------------------------------------------------------------------------


@cache
def clean_logs() -> None:
    """Have control characters written out in whatever transformers logs: it quotes names and values from the files."""
    from transformers.utils import logging as hf_logging

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = harmless(record.getMessage()), ()
        return True

    hf_logging.get_logger()  # which makes the handler
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(clean)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own report, which quotes names from the files: what it reports is said in one sentence."""
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


def weights_mismatch(model: Any, found: dict[str, Any], weights: Sequence[Path]) -> str:
    """What does not fit between a model's config and its files `weights`, by what transformers reports of loading them.

    `found` is its `output_loading_info`. Tensors that are one in the model must be equal where both are in the files.
    """
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        what = "is empty" if not math.prod(shape) else f"has the shape {list(shape)}"
        return f"the tensor {one_line(name, 100)} {what}, and its config.json asks for {list(wanted)}"
    unexpected = [name for name in found["unexpected_keys"] if name.rpartition(".")[2] not in BUFFERS]
    for names, what in (
        (sorted(found["missing_keys"]), "is missing"),
        (sorted(unexpected), "has no place in the model of its config.json"),
    ):
        if names:
            more = f", and {len(names) - 1} more" if names[1:] else ""
            return f"the tensor {one_line(names[0], 100)}{more} {what}"
    return "; ".join(one_line(error) for error in found.get("error_msgs") or ())[:200] or _no_longer_tied(
        model, weights
    )


def _no_longer_tied(model: Any, weights: Iterable[Path]) -> str:
    import torch

    place = {name: file for file in weights for name in tensors_of(file)}
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in place and other in place:
            pair = [_tensor(place[which], which) for which in (name, other)]
            if not torch.equal(*pair):
                return f"{name} differs from {other}, and by its config.json they are one tensor"
    return ""


def _tensor(file: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.get_tensor(name)
