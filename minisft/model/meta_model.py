"""Build a model without weights, on PyTorch's meta device, where tensors have only shapes.

The only cost of a large config there is its modules, so they are counted during construction and
limited.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from minisft.data.model_folder import quiet
from minisft.errors import UserError

MOST_MODULES = 100_000  # DeepSeek-V3's 61 layers with a module for each of their 256 experts are 75,000
MOST_PARAMETERS = 10**15  # more would overflow 64-bit sums of bytes
PLAIN = (bool, int, float, str, type(None))

LayerKind = tuple[Any, ...]  # equal for layers that compute the same on tensors of the same shapes


def meta_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Build the torch module of a config. Raises `UserError` if it cannot be built or is absurdly
    large.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with quiet(), warnings.catch_warnings(), _bounded(), torch.device("meta"), no_init_weights():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()  # skipped with the initialization
    except UserError:
        raise
    except Exception as error:  # each model's code raises different exceptions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"no {config.model_type} model can be built from this config ({reason}): correct it") from error
    if (parameters := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
        raise UserError(f"the model of this config has {parameters:.1e} parameters: correct its sizes")
    return model


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise `UserError` inside this context once more than `MOST_MODULES` modules exist."""
    from torch.nn.modules.module import register_module_module_registration_hook

    module_count = 0

    def count(*module: Any) -> None:
        nonlocal module_count
        module_count += 1
        if module_count > MOST_MODULES:
            raise UserError(f"the model of this config has more than {MOST_MODULES:,} modules: correct its sizes")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def layers_of(model: Any) -> list[tuple[Any, ...]]:
    """Return the modules of each decoder layer, in order; empty if no `ModuleList` has one entry
    per layer.
    """
    from torch.nn import ModuleList

    length = getattr(model.config, "num_hidden_layers", None)
    lists = []
    nested: set[str] = set()  # name prefixes of modules inside a list that was taken
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == length and not name.startswith(tuple(nested)):
            lists.append(module)
            nested.add(f"{name}.")
    return list(zip(*lists, strict=True))


def layer_kinds(model: Any) -> list[LayerKind]:
    """Describe each decoder layer by its classes, shapes and plain attribute values; equal layers
    get the same object.

    Attributes that only hold the layer's index are ignored. Per-layer lists in the config are
    included.
    """
    layers = layers_of(model)
    named = [[(f"{i}.{n}", m) for i, part in enumerate(layer) for n, m in part.named_modules()] for layer in layers]
    # Names of int attributes that equal the layer's position in some layer, and that differ from it in some layer.
    numbers: set[str] = set()
    others: set[str] = set()
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
    """Yield what distinguishes a module from others of its class: tensor shapes and plain
    attributes.
    """
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
    for key, value in sorted(vars(module).items()):
        values = value if isinstance(value, list | tuple) else [value]
        if key not in positions and all(isinstance(one, PLAIN) for one in values):
            yield key, repr(value)


def repetition(kinds: Sequence[LayerKind]) -> tuple[int, int]:
    """Return (start, period): from layer `start` on, each layer equals the one `period` later, if
    there is one.

    Of all such pairs, this one needs the fewest traced layers, as counted by `shallow`.
    """
    pairs = [(_first_of_tail(kinds, period), period) for period in range(1, len(kinds) // 2 + 1)]
    return min(pairs, key=lambda pair: shallow(len(kinds), *pair) + pair[1], default=(len(kinds), 1))


def _first_of_tail(kinds: Sequence[LayerKind], period: int) -> int:
    """Return the first layer from which on the layers repeat with this period."""
    start = len(kinds) - period
    while start > 0 and kinds[start - 1] is kinds[start - 1 + period]:
        start -= 1
    return start


def shallow(layers: int, start: int, period: int) -> int:
    """Return how many layers to trace instead of all: those before `start`, at least two periods,
    and the remainder.
    """
    return start + max(2, -(-3 // period)) * period + (layers - start) % period
