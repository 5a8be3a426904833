"""A model of a transformers config without its weights: on PyTorch's meta device, where tensors have shapes alone.

What a config asks for costs nothing there but the modules themselves, so these are counted as they are made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from minisft.data.model_folder import quiet
from minisft.errors import UserError

MOST_MODULES = 100_000  # DeepSeek-V3's 61 layers with a module for each of their 256 experts are 75,000
MOST_PARAMETERS = 10**15  # beyond, sums of bytes leave 64 bits
PLAIN = (bool, int, float, str, type(None))

LayerKind = tuple[Any, ...]  # equal for layers that compute the same on tensors of the same shapes


def meta_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The torch module of a config. Raises `UserError` if none can be built, or only an absurdly large one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with quiet(), warnings.catch_warnings(), _bounded(), torch.device("meta"), no_init_weights():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()  # which comes with initializing them
    except UserError:
        raise
    except Exception as error:  # each model's code raises its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"no {config.model_type} model can be built from this config ({reason}): correct it") from error
    if (parameters := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
        raise UserError(f"the model of this config has {parameters:.1e} parameters: correct its sizes")
    return model


@contextmanager
def _bounded() -> Iterator[None]:
    """Let no model be built that has more than `MOST_MODULES`."""
    from torch.nn.modules.module import register_module_module_registration_hook

    made = 0

    def count(*module: Any) -> None:
        nonlocal made
        made += 1
        if made > MOST_MODULES:
            raise UserError(f"the model of this config has more than {MOST_MODULES:,} modules: correct its sizes")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def layers_of(model: Any) -> list[tuple[Any, ...]]:
    """The modules of each decoder layer, in order; nothing if they are not kept in lists of that length."""
    from torch.nn import ModuleList

    length = getattr(model.config, "num_hidden_layers", None)
    lists, inside = [], set()
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == length and not name.startswith(tuple(inside)):
            lists.append(module)
            inside.add(f"{name}.")
    return list(zip(*lists, strict=True))


def layer_kinds(model: Any) -> list[LayerKind]:
    """For each decoder layer what it consists of: classes, shapes, and settings that are plain values.

    Attributes that only say which layer it is do not count. What a config lists layer by layer counts.
    """
    layers = layers_of(model)
    named = [[(f"{i}.{n}", m) for i, part in enumerate(layer) for n, m in part.named_modules()] for layer in layers]
    numbers, others = set(), set()  # names of whole numbers that are everywhere the layer's position, and the rest
    for position, modules in enumerate(named):
        for key, value in ((key, value) for _, m in modules for key, value in vars(m).items() if type(value) is int):
            (numbers if value == position else others).add(key)
    lists = [v for v in vars(model.config).values() if isinstance(v, list) and len(v) == len(layers)]
    known: dict[LayerKind, LayerKind] = {}
    kinds = []
    for position, modules in enumerate(named):
        listed = tuple(repr(values[position]) for values in lists)
        kind = (listed, *((name, type(module), *_plain(module, numbers - others)) for name, module in modules))
        kinds.append(known.setdefault(kind, kind))
    return kinds


def _plain(module: Any, positions: set[str]) -> Iterator[tuple[str, str]]:
    """What tells a module from others of its class: its own tensors' shapes, and its plain attributes."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
    for key, value in sorted(vars(module).items()):
        values = value if isinstance(value, list | tuple) else [value]
        if key not in positions and all(isinstance(one, PLAIN) for one in values):
            yield key, repr(value)


def repetition(kinds: Sequence[LayerKind]) -> tuple[int, int]:
    """(start, period): from layer `start` on, up to the last, each layer is like the one `period` later.

    The pair with which the fewest layers have to be traced: `shallow` says how many.
    """
    found = [(_first_of_tail(kinds, period), period) for period in range(1, len(kinds) // 2 + 1)]
    return min(found, key=lambda pair: shallow(len(kinds), *pair) + pair[1], default=(len(kinds), 1))


def _first_of_tail(kinds: Sequence[LayerKind], period: int) -> int:
    start = len(kinds) - period
    while start > 0 and kinds[start - 1] is kinds[start - 1 + period]:
        start -= 1
    return start


def shallow(layers: int, start: int, period: int) -> int:
    """How many of the first layers stand for all: those before `start`, and two or more periods up to where it ends."""
    return start + max(2, -(-3 // period)) * period + (layers - start) % period
