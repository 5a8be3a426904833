"""What a step needs beside the states: activations, logits and the loss, found without allocating any of it.

The real model class, the real batch layout, the real loss and the real backward pass run on fake tensors: PyTorch
computes the shapes of all that they would allocate, and `Allocations` counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from minisft.errors import UserError
from minisft.models import with_layers

COPIES = "copies of a bucket"
ACTIVATIONS, LOGITS, GRADIENTS, BACKWARD = "activations", "logits and loss", "gradients", "temporaries of backward"

DEEP, FEW = 8, 3  # layers beyond which a model is traced with fewer, and with how many


@dataclass(frozen=True)
class Stretch:
    """The worst moment between the arrivals of two gradients (before the first, of forward as well).

    `held`: bytes alive by owner, without the gradients that have arrived. Those were `arrived` elements of `staying`
    bytes, and the next one has `arriving` bytes (0 after the last).
    """

    held: dict[str, int]
    arrived: int
    staying: int
    arriving: int


@dataclass(frozen=True)
class DryRun:
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


def dry_run(
    config: Any,
    lengths: Sequence[int],
    *,
    trained: int | None = None,
    precision: str = "fp32",
    half_weights: bool = False,
    activation_checkpointing: bool = False,
    on_gpu: bool = False,
    trust_remote_code: bool = False,
) -> DryRun:
    """One micro-batch of rows of these `lengths`, in tokens, through the model of a transformers `config`.

    `trained` of the tokens have a loss; all, if not given. `half_weights` is DeepSpeed's way (weights in bf16 or
    fp16); else half precision is autocast over fp32 weights. `on_gpu` counts what CUDA's kernels keep where
    PyTorch is built for CUDA, and elsewhere what a CPU's keep. Raises `UserError` for a model that cannot be traced;
    its states can be predicted all the same.
    """
    options = {
        **{"lengths": lengths, "trained": trained, "precision": precision, "half_weights": half_weights},
        **{"activation_checkpointing": activation_checkpointing},
        **{"on_gpu": on_gpu, "trust_remote_code": trust_remote_code},
    }
    quiet = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a stack trace beside raising
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        found = _all_layers(config, **options)
    except Exception as error:  # whatever a model's own code raises on tensors without values
        reason = " ".join(str(error).split())[:200]
        name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise UserError(
            f"{name} cannot be traced without its weights ({type(error).__name__}: {reason}): only its states can be "
            "predicted, not its activations"
        ) from error
    finally:
        quiet.setLevel(level)
    return found


def _all_layers(config: Any, **options: Any) -> DryRun:
    """The trace of a model with all its layers; of a deep one from two shallow ones, if its layers are all alike.

    Each further layer then adds the same to what is retained, and to every stretch: of the first half of backward
    counted from its beginning, of the second from its end. Each half has a whole layer. From one layer to the next
    the same stretch changes evenly, so that no layer in between is worse than those at both ends.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(layers, int) or layers <= DEEP or len(set(kinds or ())) > 1:
        return _trace(config, **options)
    try:
        a, b = (_trace(with_layers(config, n), **options) for n in (FEW, FEW + 1))
    except Exception:  # some models cannot have so few
        return _trace(config, **options)

    def extended(x: int, y: int) -> int:
        return x + (y - x) * (layers - FEW)

    def all_extended(x: dict[str, int], y: dict[str, int]) -> dict[str, int]:
        return {owner: extended(x.get(owner, 0), y.get(owner, 0)) for owner in {*x, *y}}

    half = len(a.stretches) // 2
    pairs = [*zip(a.stretches[:half], b.stretches, strict=False)]
    pairs += zip(a.stretches[half:], b.stretches[half - len(a.stretches) :], strict=True)
    stretches = tuple(
        Stretch(
            all_extended(x.held, y.held),
            extended(x.arrived, y.arrived),
            extended(x.staying, y.staying),
            extended(x.arriving, y.arriving),
        )
        for x, y in pairs
    )
    return DryRun(all_extended(a.retained, b.retained), stretches)


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
) -> DryRun:
    """`real` runs on tensors that have values.

    Each gradient is let go as it arrives, and those that would have stayed are added up: one pass tells both.
    """
    from contextlib import nullcontext

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from minisft.allocations import Allocations, Moment
    from minisft.attention import PER_DOCUMENT, supports_padding_free
    from minisft.loss import LossHead, summed_loss, supports_loss_head
    from minisft.wide_products import needs_wide_products, widen_linear_layers

    device = "cuda" if on_gpu and torch.backends.cuda.is_built() else "cpu"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    dtype = half if half_weights and half else torch.float32
    config = deepcopy(config)
    config.use_cache = False
    with_head = supports_loss_head(config, trust_remote_code)
    fake = None if real else FakeTensorMode()
    with fake or nullcontext():
        with torch.device(device), no_init_weights():  # whatever the values: their bytes are the same
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()  # which comes with initialising them
        model.train()
        padding_free = supports_padding_free(model)
        if padding_free:
            model.set_attn_implementation(PER_DOCUMENT)
        if activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if precision == "bf16" and not on_gpu and needs_wide_products(device):
            widen_linear_layers(model)
        head = LossHead(model.get_output_embeddings()) if with_head else None
        tokens = sum(lengths)
        with torch.device(device):
            shape = (1, tokens) if padding_free else (len(lengths), max(lengths))
            inputs = {"input_ids": torch.ones(shape, dtype=torch.int64)}
            positions, targets = (torch.zeros(trained or tokens, dtype=torch.int64) for _ in range(2))
            if padding_free:
                inputs["position_ids"] = torch.zeros(shape, dtype=torch.int64)
                inputs["max_length_q"] = max(lengths)
            else:
                inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        if padding_free:  # the bounds are read as numbers, so they are real
            with unset_fake_temporarily():
                inputs["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            if device == "cuda" and fake:
                inputs["cu_seq_lens_q"] = fake.from_tensor(inputs["cu_seq_lens_q"]).to(device)

        count = Allocations(ACTIVATIONS)
        parameters = list(model.parameters())
        for tensor in (*parameters, *model.buffers()):
            count.ignore(tensor)
        stretches: list[Stretch] = []
        elements = size = 0  # of the gradients that have arrived

        def end_stretch(arriving: int) -> None:
            stretches.append(Stretch(dict(count.peak.held), elements, size, arriving))
            count.peak = Moment("backward", {})

        def arrived(parameter: Any) -> None:
            nonlocal elements, size
            end_stretch(parameter.grad.nbytes)
            elements += parameter.numel()
            size += parameter.grad.nbytes
            parameter.grad = None

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)
        if head is not None:
            head.around = lambda: count.owned_by(LOGITS)
            head.most_chunks = None if real else 2
        cast = torch.autocast(device, dtype=half) if half and not half_weights else nullcontext()
        with count:
            with cast:
                loss = summed_loss(model, inputs, positions, targets, head, padding_free)
            retained = dict(count.held)
            count.phase, count.owner = "backward", BACKWARD
            loss.backward()
        end_stretch(0)
        return DryRun(retained, tuple(stretches))
