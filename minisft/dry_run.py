"""What a step needs beside the states: activations, logits and the loss, found without allocating any of it.

The real model class, the real batch layout, the real loss and the real backward pass run on fake tensors: PyTorch
computes the shapes of all that they would allocate, and `Allocations` counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from minisft.errors import UserError
from minisft.models import with_layers

COPIES = "copies of a bucket"
ACTIVATIONS, LOGITS, GRADIENTS, BACKWARD = "activations", "logits and loss", "gradients", "temporaries of backward"

DEEP = 8  # layers from which on a model is traced with fewer


@dataclass(frozen=True)
class DryRun:
    """Bytes beside the states, for one micro-batch.

    `retained`: what forward keeps for backward, by owner. `peak`: the most that is alive at once, by owner, the
    parameters' gradients as they arrive included (all of them stay). `peak_freeing`: the same if each gradient goes
    as soon as it is there, as with ZeRO's stages 2 and 3, where it moves into a bucket. `gradients_then`: how many
    elements of the gradients had arrived by each of the two moments of `moments_freeing`, the most before and after
    the middle of backward; a rank of stage 2 keeps its share of those. `reducing`: the most if each gradient, as it
    arrives, is copied twice to be reduced, as stage 3 does with a bucket that it fills.
    """

    retained: dict[str, int]
    peak: dict[str, int]
    moments_freeing: tuple[dict[str, int], dict[str, int]]
    gradients_then: tuple[int, int]
    reducing: dict[str, int]

    @property
    def peak_freeing(self) -> dict[str, int]:
        return max(self.moments_freeing, key=lambda held: sum(held.values()))


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
    fp16); else half precision is autocast over fp32 weights. `on_gpu` counts what CUDA's kernels keep. Raises
    `UserError` for a model that cannot be traced; its states can be predicted all the same.
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
    return DryRun(found.retained, found.peak, (found.early, found.late), found.arrived, found.reducing)


@dataclass(frozen=True)
class _Trace:
    """Bytes by owner: what forward retains, and the most that is alive before and after the middle of backward.

    `early` and `late` without the gradients that have arrived, `early_staying` and `late_staying` with them; `arrived`
    are the elements of those.
    """

    retained: dict[str, int]
    early: dict[str, int]
    late: dict[str, int]
    early_staying: dict[str, int]
    late_staying: dict[str, int]
    arrived: tuple[int, int]
    reducing: dict[str, int]

    @property
    def peak(self) -> dict[str, int]:
        return max(self.early_staying, self.late_staying, key=lambda held: sum(held.values()))


def _all_layers(config: Any, **options: Any) -> _Trace:
    """The trace of a model with all its layers; of a deep one from two shallow ones, if its layers are all alike.

    Each further layer then adds the same: to what is retained, to what is alive as backward begins and as it ends.
    All have an even number of layers, or all an odd one: else the middle would be in the midst of a layer for some.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(layers, int) or layers <= DEEP or len(set(kinds or ())) > 1:
        return _trace(config, **options)
    few = 2 + layers % 2
    more = few + 2
    a, b = (_trace(with_layers(config, n), **options) for n in (few, more))

    def extended(which: str) -> dict[str, int]:
        x, y = getattr(a, which), getattr(b, which)
        each = {owner: (y.get(owner, 0) - x.get(owner, 0)) // (more - few) for owner in {*x, *y}}
        return {owner: x.get(owner, 0) + size * (layers - few) for owner, size in each.items()}

    arrived = [x + (y - x) // (more - few) * (layers - few) for x, y in zip(a.arrived, b.arrived, strict=True)]
    held = {field.name: extended(field.name) for field in fields(_Trace) if field.name != "arrived"}
    return _Trace(**held, arrived=tuple(arrived))


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
) -> _Trace:
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

    device = "cuda" if on_gpu else "cpu"
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
        if precision == "bf16" and needs_wide_products(device):
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
            if on_gpu and fake:
                inputs["cu_seq_lens_q"] = fake.from_tensor(inputs["cu_seq_lens_q"]).to(device)

        count = Allocations(ACTIVATIONS)
        parameters = list(model.parameters())
        for tensor in (*parameters, *model.buffers()):
            count.ignore(tensor)
        here = kept = 0  # gradients that have arrived, and their bytes
        freeing, staying = ([Moment("forward", {}), Moment("backward", {})] for _ in range(2))  # before and after half
        reducing: dict[str, int] = {}

        def keep_peak() -> None:
            """Book the most since the gradient before, and begin anew."""
            half = here > len(parameters) // 2
            most = count.peak
            freeing[half] = max(freeing[half], most, key=lambda moment: moment.total)
            most = Moment(most.phase, most.held | {GRADIENTS: kept}, most.mark) if kept else most
            staying[half] = max(staying[half], most, key=lambda moment: moment.total)
            count.peak = Moment("backward", {})

        def arrived(parameter: Any) -> None:
            nonlocal here, kept, reducing
            here += 1
            copied = {**count.peak.held, COPIES: 2 * parameter.grad.nbytes}
            reducing = max(reducing, copied, key=lambda held: sum(held.values()))
            keep_peak()
            count.mark += parameter.numel()
            kept += parameter.grad.nbytes
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
        here += 1
        keep_peak()
        held = [moment.held for moment in (*freeing, *staying)]
        return _Trace(retained, *held, arrived=tuple(moment.mark for moment in freeing), reducing=reducing)
