"""bf16 products on processors that cannot multiply bf16: the same numbers through fp32, several times faster.

A bf16 product with fp32 accumulation rounds its inputs to bf16, multiplies exactly and adds in fp32. Where the
processor has no instruction for that (no AVX-512, no AMX: most laptops), PyTorch falls back to a plain loop; rounding
the inputs and multiplying in fp32 gives the same sums, up to their order, at the speed of fp32. The activations that
are kept for the backward pass stay bf16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def needs_wide_products(device_type: str) -> bool:
    """Whether PyTorch would multiply bf16 matrices by a plain loop on this device."""
    return device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen_linear_layers(model: torch.nn.Module) -> None:
    """Let every linear layer of `model` but its output layer compute in bf16 by way of fp32.

    The output layer has its own way, `minisft.model.loss.LossHead`. Parameters, hooks and names stay as they are.
    """
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings():
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _WideLinear.apply(x, layer.weight, layer.bias)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            rounded = x.to(torch.bfloat16)
            ctx.save_for_backward(rounded, weight)  # the parameter itself: ZeRO-3 fills it again before backward
            ctx.dtypes = x.dtype, None if bias is None else bias.dtype
            y = rounded.float() @ weight.to(torch.bfloat16).float().T
            if bias is not None:
                y += bias
            return y.to(torch.bfloat16)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rounded, weight = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        d_x = d_weight = d_bias = None
        with torch.autocast("cpu", enabled=False):
            slope = slope.float()
            rows = slope.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_x = (slope @ weight.to(torch.bfloat16).float()).to(x_dtype)
            if ctx.needs_input_grad[1]:
                d_weight = (rows.T @ rounded.float().flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                d_bias = rows.sum(dim=0).to(bias_dtype)
        return d_x, d_weight, d_bias
