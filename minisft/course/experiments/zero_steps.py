# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""One optimizer step of ZeRO-1, ZeRO-2 and ZeRO-3: the solutions of notebook 07.

Every rank calls the function with its own data; `two_ranks` starts the ranks. Annotations are left
out, because learners write these functions.
"""

import torch
import torch.distributed as dist


def zero1_step(weights, state, model, adamw):
    """Take one step of ZeRO-1, on this rank: AdamW steps one slice of the weights.

    `weights`: all weights, flat and padded; update them in place, on every rank.
    `model.gradient(weights)`: the gradient of this rank's rows, [model.size].
    `state`: {"step": 0, "averages": {}} at first; this rank's own, kept between steps.
    `adamw(weights, gradient, averages, step)`: updates in place; steps count from 1.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    gradient = torch.zeros_like(weights)
    gradient[: model.size] = model.gradient(weights)
    dist.all_reduce(gradient)
    gradient /= world
    state["step"] += 1
    mine = weights.chunk(world)[rank]
    adamw(mine, gradient.chunk(world)[rank], state["averages"], state["step"])
    dist.all_gather_single(weights, mine.clone())


def zero2_step(weights, state, model, adamw):
    """Take one step of ZeRO-2, on this rank: keep one slice of the gradient, too.

    `model.backward(weights)` yields (first, gradient) of each layer, the last layer
    first: the gradient belongs to `weights[first : first + len(gradient)]`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    size = len(weights) // world
    kept = torch.zeros(size)
    for first, gradient in model.backward(weights):
        for owner in range(world):
            begin = max(first, owner * size)
            end = min(first + len(gradient), (owner + 1) * size)
            if begin < end:
                part = gradient[begin - first : end - first].clone()
                dist.reduce(part, dst=owner)
                if rank == owner:
                    kept[begin - owner * size : end - owner * size] = part / world
    state["step"] += 1
    mine = weights.chunk(world)[rank]
    adamw(mine, kept, state["averages"], state["step"])
    dist.all_gather_single(weights, mine.clone())


def zero3_step(slices, state, model, adamw):
    """Take one step of ZeRO-3, on this rank, and return the loss.

    `slices[i]`: this rank's slice of the weights of `model.layers[i]`, padded.
    `state`: {"step": 0, "averages": [{}, {}, ...]}, one entry per layer.
    `layer.forward(whole, x)` returns the output: x is None for the first layer, and
    the output of the last is the loss. `layer.backward(whole, x, down)` returns the
    gradients of `whole`, [layer.size], and of x; `down` is None for the last layer.
    """
    world = dist.get_world_size()

    def gathered(i):
        whole = torch.empty(world * len(slices[i]))
        dist.all_gather_single(whole, slices[i])
        return whole[: model.layers[i].size]

    inputs, gradients = [], {}
    x = down = None
    for i, layer in enumerate(model.layers):
        inputs.append(x)
        x = layer.forward(gathered(i), x)
    for i in reversed(range(len(slices))):
        gradient, down = model.layers[i].backward(gathered(i), inputs[i], down)
        padded = torch.zeros(world * len(slices[i]))
        padded[: len(gradient)] = gradient
        gradients[i] = torch.empty(len(slices[i]))
        dist.reduce_scatter_single(gradients[i], padded)
    state["step"] += 1
    for i, mine in enumerate(slices):
        adamw(mine, gradients[i] / world, state["averages"][i], state["step"])
    return x
