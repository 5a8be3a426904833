"""Check a model folder before a library reads it: its JSON, its files, their headers and values.

transformers follows the JSON in a folder. The JSON may name other weight files than the usual ones,
a base model elsewhere, or kernels on a hub, which are code; and transformers fills a missing tensor
with random numbers and only warns. So every function that loads a model calls `unreadable_reason`
before and `weights_mismatch` after. Both return one sentence without the folder's name, or `""` if
there is no problem.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from minisft.checksums import Digests, remember, remembered
from minisft.errors import UserError
from minisft.files import read_json
from minisft.text import harmless, one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LAYERS = re.compile(r"n_layers?|num_(hidden_)?layers")
# Suffixes of the files that a model and its tokenizer are read from.
WEIGHTS_SUFFIX = ".safetensors"
OF_A_MODEL = (WEIGHTS_SUFFIX, ".json", ".jinja", ".model", ".txt")
MORE_TEMPLATES = "additional_chat_templates"  # a folder of a model, from which transformers reads templates, too
MOST_BYTES = 4_000_000  # size limit of a config.json: transformers copies it several times
# Largest allowed values by key. transformers allocates lists of layers and tables of positions and
# frequencies before it reads a tensor, so a huge number would fill the memory.
LIMITS = (
    (re.compile(r"n_layers?|.*(layers|blocks)"), 1_000),
    (re.compile(r"num_labels"), 1 << 20),
    (re.compile(r".*\[\]"), 1 << 24),  # a number in a list
    (re.compile(r".*(dim|size|heads|experts|rank|positions|embeddings|embd|inner|ctx)"), 1 << 24),
)
# Implementations that are part of transformers or PyTorch. Any other name is a separate package, or
# a kernel that transformers downloads from a hub.
OWN_CODE = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
BUFFERS = ("inv_freq", "masked_bias", "position_ids")  # constants stored in older checkpoints; no model reads them
_RANK_FILES = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_TOKENIZER_CLASS = re.compile(r"(?!Auto|Rag)\w*(Tokenizer|TokenizerFast|Backend)")
FINITE = "finite.json"  # in the cache folder, by checksum
MOST_REMEMBERED = 500  # checksums of files whose values were all finite


# --- JSON --------------------------------------------------------------------------------------------------


def model_json(file: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Read a `config.json`.

    Raises `UserError` if it is missing or damaged, has a number above `LIMITS`, or requests code
    from elsewhere without `trust_remote_code`.
    """
    values = _json(file, MOST_BYTES)
    if values is None:
        raise UserError(f"{file} does not exist: give the folder that save_pretrained wrote")
    for key, value in _entries(values):
        built_in = OWN_CODE.get(key.lstrip("_"))
        if built_in is None or trust_remote_code:
            continue
        names = value.values() if isinstance(value, dict) else [value]  # a dict has a name for each sub-model
        if foreign := [name for name in names if name is not None and name not in built_in]:
            raise UserError(
                f"{file} asks for code from elsewhere ({key}: {one_line(foreign[0], 60)}): remove that key, or "
                "give --trust-remote-code if you trust it"
            )
    return values


def require_own_tokenizer(folder: Path) -> None:
    """Raise `UserError` if a model's JSON names another file than `tokenizer.json`, or no tokenizer.

    transformers would read any file, and load any class of that name that it has.
    """
    files = (_json(folder / "tokenizer_config.json") or {}).get("fast_tokenizer_files")
    if files not in (None, [], ["tokenizer.json"]):
        raise UserError(
            f"{folder / 'tokenizer_config.json'} names files elsewhere (fast_tokenizer_files): remove that key"
        )
    for name in ("tokenizer_config.json", "config.json"):
        class_name = (_json(folder / name) or {}).get("tokenizer_class")
        if class_name is not None and not (isinstance(class_name, str) and _TOKENIZER_CLASS.fullmatch(class_name)):
            raise UserError(
                f"the tokenizer_class {one_line(class_name, 60)!r} in {folder / name} is not a tokenizer: "
                "set it to the class of the tokenizer, such as PreTrainedTokenizerFast"
            )


def _json(file: Path, most_bytes: int | None = None) -> dict[str, Any] | None:
    """A JSON object within `LIMITS`, or None if the file does not exist. Raises `UserError`."""
    values = read_json(file, dict[str, Any], most_bytes)
    for key, value in _entries(values or {}):
        for pattern, most in LIMITS:
            if isinstance(value, int) and value > most and pattern.fullmatch(key):
                raise UserError(
                    f"{file} asks for {one_line(value, 40)} ({one_line(key, 60)}): at most {most} is allowed"
                )
    return values


def _entries(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, including nested ones; an item of a list has the key `key[]`."""
    # An explicit stack: deeply nested JSON would exceed Python's recursion limit.
    stack: list[tuple[str, Any]] = [("", values)]
    while stack:
        name, outer = stack.pop()
        item_key = f"{name.removesuffix('[]')}[]"
        for key, value in outer.items() if isinstance(outer, dict) else ((item_key, item) for item in outer):
            yield key, value
            if isinstance(value, dict | list):
                stack.append((key, value))


# --- files -------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, sorted by name; there may be none.

    Raises `UserError` for an index that names anything but safetensors files in its own folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        if index is not None:
            raise UserError(f"{INDEX} does not map each tensor to a file: save the model again")
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
    """Whether a `config.json` declares quantized weights, for the model or for a part of it."""
    return any(value for key, value in _entries(config) if key == "quantization_config")


def unreadable_reason(folder: Path, trust_remote_code: bool = False) -> str:
    """Why the model in `folder` cannot be loaded; `""` if its config, files and headers are valid.

    Raises `UserError` for damaged JSON or an invalid index.
    """
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    config = model_json(folder / "config.json", trust_remote_code)
    if config.get("transformers_weights") is not None:
        return "config.json names other weight files (transformers_weights): remove that key"
    if is_quantized(config):
        return "its weights are quantized (quantization_config in config.json): save them unquantized first"
    if (folder / ADAPTER).exists():
        return f"it holds an adapter ({ADAPTER}), whose base model is elsewhere: merge the two and save the result"
    for file in folder.iterdir():
        if _RANK_FILES.fullmatch(file.name):
            return f"its weights are split over ranks ({file.name}): consolidate them into {WEIGHTS}"
    weights = weight_files(folder)
    return _damaged_headers(weights, config) if weights else _no_weights(folder)


def _no_weights(folder: Path) -> str:
    """Explain why a folder has no weight files."""
    if any(folder.glob("global_step*")) or any(folder.rglob("*zero_pp_rank*")):
        return (
            f"its weights are still split over the ranks (ZeRO shards and no {WEIGHTS}): gather them with "
            "DeepSpeed's zero_to_fp32 (not with a script in the folder), or train with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    return f"it has no {WEIGHTS}"


def _damaged_headers(weights: Sequence[Path], config: dict[str, Any]) -> str:
    """What is wrong with the files or their headers; `""` if nothing is."""
    file_of: dict[str, Path] = {}  # tensor name -> the file that has it
    for file in weights:
        if not file.is_file():  # opening a pipe would block forever
            return f"{file.name} is {'not a regular file' if file.exists() else 'missing'}"
        try:
            names = tensors_of(file)
        except Exception as error:  # safetensors has its own exception class
            return f"{file.name} cannot be read ({one_line(error, 100)})"
        for name in names:
            if name in file_of:
                return f"the tensor {one_line(name, 100)} is in {file_of[name].name} and in {file.name}"
            file_of[name] = file
    layers = max((v for k, v in _entries(config) if LAYERS.fullmatch(k) and isinstance(v, int)), default=0)
    # Each layer has at least one tensor, so a model with more layers cannot be complete.
    if layers > len(file_of):
        return f"config.json asks for {layers} layers, but there are only {len(file_of)} tensors"
    return ""


# --- values ------------------------------------------------------------------------------------------------


def not_finite_reason(weights: Iterable[Path]) -> str:
    """Which tensor of the files `weights` has NaN or infinite values; `""` if all are finite.

    Checksums of finite files are remembered in the cache, so unchanged files are read only once.
    """
    finite, digests = remembered(FINITE), Digests()
    for file in weights:
        content = digests.of(file)
        if content in finite:
            continue
        if reason := _bad_values(file):
            return reason
        remember(FINITE, content, True, MOST_REMEMBERED)
    return ""


def _bad_values(file: Path) -> str:
    """The first tensor of a file with NaN or infinite values, as a sentence; else `""`."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            tensor = stream.get_tensor(name)
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.element_size() == 1:  # PyTorch has no arithmetic for 8-bit floats
                tensor = tensor.float()
            # The infinity norm is finite only if all values are: one pass, no temporary tensor.
            if torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)):
                continue
            count = int((~torch.isfinite(tensor)).sum())
            return f"{count} of the {tensor.numel()} values of {one_line(name, 100)} are not finite"
    return ""


# --- loading -----------------------------------------------------------------------------------------------


@cache
def clean_logs() -> None:
    """Make transformers escape control characters in its log, which quotes text from files."""
    from transformers.utils import logging as hf_logging

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = harmless(record.getMessage()), ()
        return True

    hf_logging.get_logger()  # creates the handler
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(clean)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers while it loads a model.

    Its report quotes names from the files; `weights_mismatch` puts the same facts in one sentence.
    """
    from transformers.utils import logging as hf_logging

    log = logging.getLogger("transformers")
    level, had_progress_bar = log.level, hf_logging.is_progress_bar_enabled()
    log.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        if had_progress_bar:
            hf_logging.enable_progress_bar()


def weights_mismatch(model: Any, found: dict[str, Any], weights: Sequence[Path]) -> str:
    """How a loaded model differs from its weight files; `""` if it does not.

    `found` is the `output_loading_info` of transformers, and `weights` are the files. Tensors that
    the model ties together must be equal if both are stored.
    """
    for name, shape, expected in sorted(found["mismatched_keys"]):
        problem = "is empty" if not math.prod(shape) else f"has the shape {list(shape)}"
        return f"the tensor {one_line(name, 100)} {problem}, but its config.json requires {list(expected)}"
    unexpected = [name for name in found["unexpected_keys"] if name.rpartition(".")[2] not in BUFFERS]
    for names, problem in (
        (sorted(found["missing_keys"]), "missing"),
        (sorted(unexpected), "not part of the model in config.json"),
    ):
        if len(names) == 1:
            return f"the tensor {one_line(names[0], 100)} is {problem}"
        if names:
            return f"the tensor {one_line(names[0], 100)} and {len(names) - 1} more are {problem}"
    errors = "; ".join(one_line(error) for error in found.get("error_msgs") or ())[:200]
    return errors or _no_longer_tied(model, weights)


def _no_longer_tied(model: Any, weights: Iterable[Path]) -> str:
    """The first pair of tied tensors that are stored with different values, as a sentence."""
    import torch

    file_of = {name: file for file in weights for name in tensors_of(file)}
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name not in file_of or other not in file_of:
            continue
        if not torch.equal(_tensor(file_of[name], name), _tensor(file_of[other], other)):
            return f"{name} differs from {other}, but its config.json ties the two"
    return ""


def _tensor(file: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.get_tensor(name)


def small_model_files(folder: Path) -> list[Path]:
    """The files of a model apart from its weights: config, tokenizer, template; sorted by name."""
    return [file for file in files_of_a_model(folder) if not file.name.endswith(WEIGHTS_SUFFIX)]


def files_of_a_model(folder: Path) -> list[Path]:
    """The files that a model and its tokenizer are read from, sorted by name."""
    files = [*folder.iterdir(), *folder.glob(f"{MORE_TEMPLATES}/*.jinja")]
    return sorted(file for file in files if file.name.endswith(OF_A_MODEL) and file.is_file())
