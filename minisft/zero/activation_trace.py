"""What a step needs beside the states: activations, logits and the loss, found without allocating any of it.

The real model class, the real batch layout, the real loss and the real backward pass run on fake tensors: PyTorch
computes the shapes of all that they would allocate, and `TensorTracker` counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from minisft.errors import UserError
from minisft.model.configs import with_layers
from minisft.model.meta_model import LayerKind, layer_kinds, layers_of, meta_model, repetition, shallow
from minisft.system import silenced

COPIES = "copies of a bucket"
ACTIVATIONS, LOGITS, GRADIENTS, BACKWARD = "activations", "logits and loss", "gradients", "temporaries of backward"

DEEP = 8  # layers beyond which a model may be traced with fewer
MOST_CALLS = 25_000  # of PyTorch in forward, which are traced in half a minute on a slow machine


@dataclass(frozen=True)
class Stretch:
    """The worst moment between the arrivals of two gradients (before the first, of forward as well).

    `held`: bytes alive by owner, without the gradients that have arrived. Those were `arrived` elements of `staying`
    bytes, and the next one has `arriving` bytes (0 after the last). `layer` is the decoder layer of the next one.
    """

    held: dict[str, int]
    arrived: int
    staying: int
    arriving: int
    layer: int | None = None


@dataclass(frozen=True)
class ActivationTrace:
    """Bytes beside the states, for one micro-batch.

    `retained`: what forward keeps for backward, by owner. `stretches`: how backward goes, gradient by gradient; of a
    deep model those of the layers at both ends, between which no layer is worse than both.
    """

    retained: dict[str, int]
    stretches: tuple[Stretch, ...]

    @property
    def peak(self) -> dict[str, int]:
        """The most that is alive at once, by owner, if each gradient stays as it arrives."""
        return _largest(s.held | ({GRADIENTS: s.staying} if s.staying else {}) for s in self.stretches)

    @property
    def peak_freeing(self) -> dict[str, int]:
        """The same if each gradient goes as soon as it is there, as at ZeRO's stages 2 and 3: into a bucket."""
        return _largest(s.held for s in self.stretches)

    @property
    def reducing(self) -> dict[str, int]:
        """The same if each is copied twice to be reduced, as at stage 3 where a gradient fills the bucket."""
        return _largest(s.held | {COPIES: 2 * s.arriving} for s in self.stretches if s.arriving)


def _largest(held: Iterable[dict[str, int]]) -> dict[str, int]:
    return max(held, key=lambda owners: sum(owners.values()))


def trace_activations(
    config: Any,
    lengths: Sequence[int],
    *,
    trained: int | None = None,
    precision: str = "fp32",
    half_weights: bool = False,
    activation_checkpointing: bool = False,
    on_gpu: bool = False,
    trust_remote_code: bool = False,
    layers: Sequence[LayerKind] | None = None,
) -> ActivationTrace:
    """One micro-batch of rows of these `lengths`, in tokens, through the model of a transformers `config`.

    `trained` of the tokens have a loss; all, if not given. `half_weights` is DeepSpeed's way (weights in bf16 or
    fp16); else half precision is autocast over fp32 weights. `on_gpu` counts what CUDA's kernels keep where
    PyTorch is built for CUDA, and elsewhere what a CPU's keep. `layers` is `Shapes.layers` of this config, where it is
    known. Raises `UserError` for a model that cannot be traced; its states can be predicted all the same.
    """
    options = {
        "lengths": lengths,
        "trained": trained,
        "precision": precision,
        "half_weights": half_weights,
        "activation_checkpointing": activation_checkpointing,
        "on_gpu": on_gpu,
        "trust_remote_code": trust_remote_code,
    }
    try:
        with silenced("torch._subclasses.fake_tensor"):
            return _all_layers(config, layers, **options)
    except Exception as error:  # whatever a model's own code raises on tensors without values
        reason = " ".join(str(error).split())[:200]
        name = type(config).__name__
        raise UserError(
            f"{name} cannot be traced without its weights ({type(error).__name__}: {reason}): only its states can be "
            "predicted, not its activations"
        ) from error


def _all_layers(config: Any, kinds: Sequence[LayerKind] | None = None, **options: Any) -> ActivationTrace:
    """The trace of a model with all its layers; of a deep one, from two shallow ones where its layers repeat."""
    layers = getattr(config, "num_hidden_layers", 0)
    found = None
    if isinstance(layers, int) and layers > DEEP:
        kinds = layer_kinds(meta_model(config, options["trust_remote_code"])) if kinds is None else kinds
        found = _from_shallow(config, list(kinds), **options) if len(kinds) == layers else None
    return found or _trace(config, **options)


def _from_shallow(config: Any, kinds: list[LayerKind], **options: Any) -> ActivationTrace | None:
    """The trace of a deep model, extended from those of its first layers; None where that gains nothing or fails."""
    start, period = repetition(kinds)
    few = shallow(len(kinds), start, period)
    if 2 * few + period >= len(kinds):
        return None
    try:
        pair = [with_layers(config, n) for n in (few, few + period)]
        for c in pair:  # what a config has per layer may be counted from the end
            if layer_kinds(meta_model(c, options["trust_remote_code"])) != kinds[: c.num_hidden_layers]:
                return None
        a, b = (_trace(c, **options) for c in pair)
    except TooManyCalls:
        raise
    except Exception:  # some models cannot have so few
        return None
    return _extended(a, b, (len(kinds) - few) // period, start + (few - start) // 2)


def _extended(a: ActivationTrace, b: ActivationTrace, times: int, middle: int) -> ActivationTrace | None:
    """The trace of a model with `times` periods more than `a`, of which `b` has one; None if they do not fit together.

    Each further period adds the same to what is retained, and to every stretch: of the beginning of backward, through
    the layers from `middle` on, counted from its beginning, and of the rest counted from its end. Both have a whole
    period. From one period to the next the same stretch changes evenly, so none in between is worse than those at both
    ends.
    """

    def extended(x: int, y: int) -> int:
        return x + (y - x) * times

    def all_extended(x: dict[str, int], y: dict[str, int]) -> dict[str, int]:
        return {owner: extended(x.get(owner, 0), y.get(owner, 0)) for owner in x | y}

    below = (i for i, s in enumerate(a.stretches) if s.layer is not None and s.layer < middle)
    cut, more = next(below, 0), len(b.stretches) - len(a.stretches)
    pairs = list(zip(a.stretches, b.stretches[:cut] + b.stretches[cut + more :], strict=False))
    if more < 0 or len(pairs) < len(a.stretches) or any(x.arriving != y.arriving for x, y in pairs):
        return None
    stretches = tuple(
        Stretch(
            all_extended(x.held, y.held), extended(x.arrived, y.arrived), extended(x.staying, y.staying), x.arriving
        )
        for x, y in pairs
    )
    return ActivationTrace(all_extended(a.retained, b.retained), stretches)


class TooManyCalls(RuntimeError):
    """A trace would take minutes."""


def _bounded() -> Any:
    """Raise `TooManyCalls` where a model calls PyTorch more than `MOST_CALLS` times: in a loop over tokens, say.

    A mode of Python's calls: an exception inside of a dispatch mode may end the process, if C++ is in between.
    """
    from torch.overrides import TorchFunctionMode

    class Bounded(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            if self.calls > MOST_CALLS:
                raise TooManyCalls(f"more than {MOST_CALLS:,} calls of PyTorch: ask about fewer or shorter rows")
            return func(*args, **(kwargs or {}))

    return Bounded()


def _trace(
    config: Any,
    *,
    lengths: Sequence[int],
    trained: int | None,
    precision: str,
    half_weights: bool,
    activation_checkpointing: bool,
    on_gpu: bool,
    trust_remote_code: bool,
    real: bool = False,
) -> ActivationTrace:
    """Forward and backward of one micro-batch on tensors without values; `real` uses tensors with values.

    Each gradient is freed as it arrives, and the sizes of those that would have stayed are added up: one pass gives
    the memory with and without keeping them.
    """
    from contextlib import nullcontext

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from minisft.model.loss import LossHead, summed_loss, supports_loss_head
    from minisft.zero.tensor_tracker import TensorTracker

    device = "cuda" if on_gpu and torch.backends.cuda.is_built() else "cpu"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    dtype = half if half_weights and half else torch.float32
    with_head = supports_loss_head(config, trust_remote_code)
    fake = None if real else FakeTensorMode()
    with fake or nullcontext():
        model, padding_free = _build(config, device, dtype, activation_checkpointing, trust_remote_code)
        head = LossHead(model.get_output_embeddings()) if with_head else None
        inputs = _inputs(lengths, device, padding_free, fake)
        with torch.device(device):
            positions, targets = (torch.zeros(trained or sum(lengths), dtype=torch.int64) for _ in range(2))
        tracker = TensorTracker(ACTIVATIONS)
        backward = _Backward(model, tracker)
        if head is not None:
            head.around = lambda: tracker.owned_by(LOGITS)
            head.most_chunks = None if real else 2
        cast = torch.autocast(device, dtype=half) if half and not half_weights else nullcontext()
        with tracker:
            with cast, nullcontext() if real else _bounded():
                loss = summed_loss(model, inputs, positions, targets, head, padding_free)
            retained = dict(tracker.held)
            tracker.phase, tracker.owner = "backward", BACKWARD
            loss.backward()
        backward.end_stretch(0)
        return ActivationTrace(retained, tuple(backward.stretches))


def _build(
    config: Any, device: str, dtype: Any, activation_checkpointing: bool, trust_remote_code: bool
) -> tuple[Any, bool]:
    """The model as training runs it, and whether its batches are free of padding."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free

    config = deepcopy(config)
    config.use_cache = False
    with torch.device(device), no_init_weights():  # the values do not matter: only bytes are counted
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # initializing the weights would have done it
    model.train()
    padding_free = supports_padding_free(model)
    if padding_free:
        model.set_attn_implementation(PER_DOCUMENT)
    if activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, padding_free


def _inputs(lengths: Sequence[int], device: str, padding_free: bool, fake: Any) -> dict[str, Any]:
    """A batch of rows of these lengths, as the collators make it. `fake` is the mode of tensors without values."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    shape = (1, sum(lengths)) if padding_free else (len(lengths), max(lengths))
    with torch.device(device):
        inputs: dict[str, Any] = {"input_ids": torch.ones(shape, dtype=torch.int64)}
        if not padding_free:
            return inputs | {"attention_mask": torch.ones(shape, dtype=torch.int64)}
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.int64)
    with unset_fake_temporarily():  # attention reads the bounds of the rows as numbers, so they need values
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if device == "cuda" and fake:
        bounds = fake.from_tensor(bounds).to(device)
    return inputs | {"max_length_q": max(lengths), "cu_seq_lens_q": bounds}


class _Backward:
    """Frees each gradient as it arrives, and records a `Stretch` between every two arrivals."""

    def __init__(self, model: Any, tracker: Any):
        self.tracker = tracker
        self.stretches: list[Stretch] = []
        self.elements = self.bytes = 0  # of the gradients that have arrived
        self.layer_of = {p: i for i, parts in enumerate(layers_of(model)) for part in parts for p in part.parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.ignore(tensor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, parameter: Any) -> None:
        self.end_stretch(parameter.grad.nbytes, self.layer_of.get(parameter))
        self.elements += parameter.numel()
        self.bytes += parameter.grad.nbytes
        parameter.grad = None

    def end_stretch(self, arriving: int, layer: int | None = None) -> None:
        from minisft.zero.tensor_tracker import Moment

        held = dict(self.tracker.peak.held)
        self.stretches.append(Stretch(held, self.elements, self.bytes, arriving, layer))
        self.tracker.peak = Moment("backward", {})
