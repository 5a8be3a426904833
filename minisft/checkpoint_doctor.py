"""Whether a checkpoint can be used, found out before a model is built from it.

transformers loads a good deal that is broken: a tensor that is missing becomes random numbers, with a warning. Here
each checkpoint is looked at first, its file headers before its values, and what is wrong is one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minisft.checkpoints import damage
from minisft.errors import UserError
from minisft.preflight import model_config
from minisft.runs import Run, read_json

INDEX = "model.safetensors.index.json"
Shape = tuple[int, ...]
Place = dict[str, tuple[Path, Shape]]  # of each tensor its file, and its shape there


def ailment(run: Run, folder: Path) -> str:
    """Why the checkpoint `folder` of `run` cannot be used, in one sentence without its name; empty if it can."""
    try:
        config = model_config(folder, run.config.trust_remote_code) if (folder / "config.json").exists() else None
        if config is None:
            return "it has no config.json"
        own = model_config(run.model_folder, run.config.trust_remote_code)
    except UserError as error:
        return str(error)
    if config.model_type != own.model_type:
        return f"it is of another architecture: a {config.model_type} model, and the run's is {own.model_type}"
    files = weight_files(folder)
    if not files:
        return _no_weights(folder)
    for find in (_unreadable, _differs_from_manifest):
        if wrong := find(folder, files):
            return wrong
    place = {name: (file, shape) for file in files for name, shape in _header(file).items()}
    expected = list(_tensors(config, run.config.trust_remote_code))
    return _misshapen(place, expected) or _no_longer_tied(place, expected) or _bad_values(files) or _no_words(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint that transformers would read, in name order."""
    if (folder / INDEX).exists():
        named = (read_json(folder / INDEX) or {}).get("weight_map", {}).values()
        return [folder / name for name in sorted(set(named))]
    return [folder / "model.safetensors"] if (folder / "model.safetensors").exists() else []


def _no_weights(folder: Path) -> str:
    if any(folder.glob("global_step*")) or any(folder.rglob("*zero_pp_rank*")):
        return (
            "its weights are still split over the ranks (ZeRO shards and no model.safetensors): gather them with its "
            "zero_to_fp32.py, or train with stage3_gather_16bit_weights_on_model_save"
        )
    return "it has no model.safetensors"


def _unreadable(folder: Path, files: Iterable[Path]) -> str:
    for file in files:
        try:
            _header(file)
        except FileNotFoundError:
            return f"{file.name} is missing"
        except Exception as error:  # safetensors has an error class of its own
            return f"{file.name} cannot be read ({str(error)[:100]})"
    return ""


def _differs_from_manifest(folder: Path, files: Iterable[Path]) -> str:
    return damage(folder, {file.name for file in files})


def _header(file: Path) -> dict[str, Shape]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118


def _misshapen(place: Place, expected: list[dict[str, Shape]]) -> str:
    for same in expected:
        here = [name for name in same if name in place]
        if not here:
            return f"the tensor {' = '.join(same)} is missing"
        for name in here:
            shape = place[name][1]
            if shape != same[name]:
                what = "is empty" if not math.prod(shape) else f"has the shape {list(shape)}"
                return f"the tensor {name} {what}, and its config.json asks for {list(same[name])}"
    return ""


def _no_longer_tied(place: Place, expected: list[dict[str, Shape]]) -> str:
    import torch

    for same in expected:
        first, *others = [name for name in same if name in place]
        for other in others:
            if not torch.equal(_tensor(place[first][0], first), _tensor(place[other][0], other)):
                return f"{other} differs from {first}, and by its config.json they are one tensor"
    return ""


def _tensor(file: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.get_tensor(name)


def _tensors(config: Any, trust_remote_code: bool) -> Iterator[dict[str, Shape]]:
    """Of each tensor of the model its names, more than one where it is tied, with its shape; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    together: dict[int, dict[str, Shape]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        together.setdefault(id(tensor), {})[name] = tuple(tensor.shape)
    yield from together.values()


def _bad_values(files: Iterable[Path]) -> str:
    import torch
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                tensor = stream.get_tensor(name)
                if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
                    return f"{int((~finite).sum())} of the {tensor.numel()} values of {name} are not finite"
    return ""


def _no_words(folder: Path) -> str:
    if not (folder / "tokenizer.json").exists():
        return "it has no tokenizer.json"
    settings = read_json(folder / "tokenizer_config.json") or {}
    if not (folder / "chat_template.jinja").exists() and not settings.get("chat_template"):
        return "its tokenizer has no chat template"
    return ""
