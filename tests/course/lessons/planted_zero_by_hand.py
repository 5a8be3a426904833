"""Answers to the exercises of lesson 07, as learners write them."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


def piece_size(parts):
    return (len(parts[0]) + len(parts) - 1) // len(parts)


def with_numpy(parts):
    whole = np.sum(np.array(parts), axis=0)
    size = piece_size(parts)
    return [whole[r * size : (r + 1) * size] for r in range(len(parts))], np.tile(whole, (len(parts), 1))


def with_tensors(parts):
    whole, size = torch.tensor(parts).sum(dim=0), piece_size(parts)
    return tuple(whole[r * size : r * size + size] for r in range(len(parts))), (whole,) * len(parts)


def around_a_ring(parts):
    """The pieces travel: after world - 1 hops rank r has the sum of piece r."""
    world, size = len(parts), piece_size(parts)
    pieces = [[part[i * size : i * size + size] for i in range(world)] for part in parts]
    for hop in range(world - 1):
        for rank in range(world):
            i = (rank - hop - 1) % world
            neighbour = pieces[(rank + 1) % world]
            neighbour[i] = [a + b for a, b in zip(neighbour[i], pieces[rank][i], strict=True)]
    scattered = [pieces[rank][rank] for rank in range(world)]
    return scattered, [[number for piece in scattered for number in piece] for _ in parts]


def means(parts):
    scattered, gathered = with_numpy(parts)
    return [piece / len(parts) for piece in scattered], gathered / len(parts)


def only_scattered(parts):
    size = piece_size(parts)
    mine = [part[r * size : r * size + size] for r, part in enumerate(parts)]
    return mine, [[number for piece in mine for number in piece]] * len(parts)


def without_the_gather(parts):
    scattered, _ = with_numpy(parts)
    return scattered, scattered


def rounded_down(parts):
    size, whole = len(parts[0]) // len(parts), np.sum(parts, axis=0)
    pieces = [whole[r * size : (r + 1) * size] for r in range(len(parts))]
    return pieces, [np.concatenate(pieces)] * len(parts)


def whole_at_once(parts):
    whole = np.sum(parts, axis=0)
    return [whole] * len(parts), [whole] * len(parts)


# --- stage 1 -----------------------------------------------------------------------------------------------


def padded_gradient(weights, model):
    return F.pad(model.gradient(weights), (0, weights.numel() - model.size))


def share(weights, mine):
    dist.all_gather(list(weights.chunk(2)), mine.clone())


def right1(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    dist.all_reduce(gradient)
    state["step"] = state["step"] + 1
    half, rank = weights.numel() // 2, dist.get_rank()
    here = slice(rank * half, (rank + 1) * half)
    adamw(weights[here], gradient[here] / 2, state["averages"], state["step"])
    share(weights, weights[here])


def right1_with_broadcasts(weights, state, model, adamw):
    g = padded_gradient(weights, model) / dist.get_world_size()
    dist.all_reduce(g)
    state["step"] += 1
    slices = weights.split(len(weights) // 2)
    mine = slices[dist.get_rank()].clone()
    adamw(mine, g.split(len(g) // 2)[dist.get_rank()], state["averages"], state["step"])
    for owner, part in enumerate(slices):
        if owner == dist.get_rank():
            part.copy_(mine)
        dist.broadcast(part, src=owner)


def right1_with_reduce_scatter(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    mine = torch.empty(len(gradient) // 2)
    dist.reduce_scatter_single(mine, gradient)
    state["step"] += 1
    part = weights.view(2, -1)[dist.get_rank()]
    adamw(part, mine / 2, state["averages"], state["step"])
    share(weights, part)


def summed1(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    dist.all_reduce(gradient)
    state["step"] += 1
    mine = weights.chunk(2)[dist.get_rank()]
    adamw(mine, gradient.chunk(2)[dist.get_rank()], state["averages"], state["step"])
    share(weights, mine)


def own_rows1(weights, state, model, adamw):
    state["step"] += 1
    mine = weights.chunk(2)[dist.get_rank()]
    adamw(mine, padded_gradient(weights, model).chunk(2)[dist.get_rank()], state["averages"], state["step"])
    share(weights, mine)


def all_averages1(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    dist.all_reduce(gradient)
    state["step"] += 1
    adamw(weights, gradient / 2, state["averages"], state["step"])


def not_gathered1(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    dist.all_reduce(gradient)
    state["step"] += 1
    rank = dist.get_rank()
    adamw(weights.chunk(2)[rank], gradient.chunk(2)[rank] / 2, state["averages"], state["step"])


def always_step_1(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    dist.all_reduce(gradient)
    mine = weights.chunk(2)[dist.get_rank()]
    adamw(mine, gradient.chunk(2)[dist.get_rank()] / 2, state["averages"], 1)
    share(weights, mine)


def step_0(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    dist.all_reduce(gradient)
    mine = weights.chunk(2)[dist.get_rank()]
    adamw(mine, gradient.chunk(2)[dist.get_rank()] / 2, state["averages"], state["step"])
    state["step"] += 1
    share(weights, mine)


def without_padding1(weights, state, model, adamw):
    gradient = model.gradient(weights)
    dist.all_reduce(gradient)
    state["step"] += 1
    mine = weights.chunk(2)[dist.get_rank()]
    adamw(mine, gradient.chunk(2)[dist.get_rank()] / 2, state["averages"], state["step"])
    share(weights, mine)


def only_rank_0_reduces(weights, state, model, adamw):
    gradient = padded_gradient(weights, model)
    if dist.get_rank() == 0:
        dist.all_reduce(gradient)
    state["step"] += 1


# --- stage 2 -----------------------------------------------------------------------------------------------


def finish2(weights, state, adamw, gradient):
    state["step"] += 1
    mine = weights.chunk(2)[dist.get_rank()]
    adamw(mine, gradient, state["averages"], state["step"])
    share(weights, mine)


def overlaps(weights, first, gradient):
    """Where each owner's slice and a layer overlap: owner, in the slice, in the gradient."""
    half = len(weights) // 2
    for owner in (0, 1):
        places = [p for p in range(first, first + len(gradient)) if p // half == owner]
        if places:
            begin, end = places[0], places[-1] + 1
            yield owner, slice(begin - owner * half, end - owner * half), slice(begin - first, end - first)


def right2(weights, state, model, adamw):
    mine = torch.zeros(len(weights) // 2)
    for first, gradient in model.backward(weights):
        for owner, there, here in overlaps(weights, first, gradient):
            dist.reduce(gradient[here], owner)
            if dist.get_rank() == owner:
                mine[there] += gradient[here]
    finish2(weights, state, adamw, mine / 2)


def right2_divided_first(weights, state, model, adamw):
    mine = torch.zeros(len(weights) // 2)
    for first, gradient in model.backward(weights):
        gradient = gradient / 2
        for owner, there, here in overlaps(weights, first, gradient):
            part = gradient[here].clone()
            dist.reduce(part, dst=owner)
            if owner == dist.get_rank():
                mine[there] = part
    finish2(weights, state, adamw, mine)


def right2_with_all_reduce(weights, state, model, adamw):
    """Sends more than it must, and keeps no more."""
    half, rank = len(weights) // 2, dist.get_rank()
    mine = torch.zeros(half)
    for first, gradient in model.backward(weights):
        dist.all_reduce(gradient)
        for owner, there, here in overlaps(weights, first, gradient):
            if owner == rank:
                mine[there] = gradient[here] / 2
    finish2(weights, state, adamw, mine)


def summed2(weights, state, model, adamw):
    mine = torch.zeros(len(weights) // 2)
    for first, gradient in model.backward(weights):
        dist.all_reduce(gradient)
        for owner, there, here in overlaps(weights, first, gradient):
            if owner == dist.get_rank():
                mine[there] = gradient[here]
    finish2(weights, state, adamw, mine)


def own_rows2(weights, state, model, adamw):
    mine = torch.zeros(len(weights) // 2)
    for first, gradient in model.backward(weights):
        for owner, there, here in overlaps(weights, first, gradient):
            if owner == dist.get_rank():
                mine[there] = gradient[here]
    finish2(weights, state, adamw, mine)


def kept_whole2(weights, state, model, adamw):
    whole = torch.zeros(len(weights))
    for first, gradient in model.backward(weights):
        whole[first : first + len(gradient)] = gradient
    dist.all_reduce(whole)
    finish2(weights, state, adamw, whole.chunk(2)[dist.get_rank()] / 2)


def at_the_start2(weights, state, model, adamw):
    mine = torch.zeros(len(weights) // 2)
    for first, gradient in model.backward(weights):
        dist.all_reduce(gradient)
        for owner, _, here in overlaps(weights, first, gradient):
            if owner == dist.get_rank():
                mine[: here.stop - here.start] = gradient[here] / 2
    finish2(weights, state, adamw, mine)


def not_gathered2(weights, state, model, adamw):
    whole = padded_gradient(weights, model)
    mine = torch.empty(len(weights) // 2)
    dist.reduce_scatter_single(mine, whole)
    del whole
    state["step"] += 1
    adamw(weights.chunk(2)[dist.get_rank()], mine / 2, state["averages"], state["step"])


# --- stage 3 -----------------------------------------------------------------------------------------------


def whole_layer(layer, mine):
    parts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: layer.size]


def my_gradient(gradient, mine):
    kept = torch.empty_like(mine)
    dist.reduce_scatter_single(kept, F.pad(gradient, (0, 2 * len(mine) - len(gradient))))
    return kept / 2


def forward3(slices, model):
    xs = [None]
    for layer, mine in zip(model.layers, slices, strict=True):
        xs.append(layer.forward(whole_layer(layer, mine), xs[-1]))
    return xs


def right3(slices, state, model, adamw):
    xs, down = forward3(slices, model), None
    state["step"] += 1
    for i in reversed(range(len(slices))):
        gradient, down = model.layers[i].backward(whole_layer(model.layers[i], slices[i]), xs[i], down)
        adamw(slices[i], my_gradient(gradient, slices[i]), state["averages"][i], state["step"])
    return xs[-1]


def right3_afterwards(slices, state, model, adamw):
    xs, down, kept = forward3(slices, model), None, []
    for layer, mine, x in list(zip(model.layers, slices, xs, strict=False))[::-1]:
        gradient, down = layer.backward(whole_layer(layer, mine), x, down)
        kept.insert(0, my_gradient(gradient, mine))
    state["step"] += 1
    for args in zip(slices, kept, state["averages"], strict=True):
        adamw(*args, state["step"])
    return xs[-1].item()


def right3_with_all_reduce(slices, state, model, adamw):
    xs, down = forward3(slices, model), None
    state["step"] += 1
    for i in range(len(slices) - 1, -1, -1):
        layer, mine = model.layers[i], slices[i]
        gradient, down = layer.backward(whole_layer(layer, mine), xs[i], down)
        dist.all_reduce(gradient)
        part = F.pad(gradient, (0, layer.size % 2)).chunk(2)[dist.get_rank()] / 2
        adamw(mine, part.contiguous(), state["averages"][i], state["step"])
    return xs[-1]


def summed3(slices, state, model, adamw):
    xs, down = forward3(slices, model), None
    state["step"] += 1
    for i in reversed(range(len(slices))):
        gradient, down = model.layers[i].backward(whole_layer(model.layers[i], slices[i]), xs[i], down)
        adamw(slices[i], my_gradient(gradient, slices[i]) * 2, state["averages"][i], state["step"])
    return xs[-1]


def own_rows3(slices, state, model, adamw):
    xs, down = forward3(slices, model), None
    state["step"] += 1
    for i in reversed(range(len(slices))):
        gradient, down = model.layers[i].backward(whole_layer(model.layers[i], slices[i]), xs[i], down)
        mine = F.pad(gradient, (0, len(gradient) % 2)).chunk(2)[dist.get_rank()].clone()
        adamw(slices[i], mine, state["averages"][i], state["step"])
    return xs[-1]


def step_per_layer3(slices, state, model, adamw):
    xs, down, kept = forward3(slices, model), None, {}
    for i in reversed(range(len(slices))):
        gradient, down = model.layers[i].backward(whole_layer(model.layers[i], slices[i]), xs[i], down)
        kept[i] = my_gradient(gradient, slices[i])
    for i in range(len(slices)):
        state["step"] += 1
        adamw(slices[i], kept[i], state["averages"][i], state["step"])
    return xs[-1]


def layers_stay3(slices, state, model, adamw):
    wholes = [whole_layer(layer, mine) for layer, mine in zip(model.layers, slices, strict=True)]
    x, xs, down = None, [], None
    for layer, whole in zip(model.layers, wholes, strict=True):
        xs.append(x)
        x = layer.forward(whole, x)
    state["step"] += 1
    for i in reversed(range(len(slices))):
        gradient, down = model.layers[i].backward(wholes[i], xs[i], down)
        adamw(slices[i], my_gradient(gradient, slices[i]), state["averages"][i], state["step"])
    return x


def padding_stays3(slices, state, model, adamw):
    x = None
    for layer, mine in zip(model.layers, slices, strict=True):
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        x = layer.forward(torch.cat(parts), x)
    return x


def no_loss3(slices, state, model, adamw):
    right3(slices, state, model, adamw)


WRONG = {
    "07.all_reduce": [
        (means, "averaged"),
        (only_scattered, "reduces nothing"),
        (without_the_gather, "second half is missing"),
        (rounded_down, "do not divide"),
        (whole_at_once, "after the reduce-scatter already"),
    ],
    "07.zero1": [
        (summed1, "summed and not averaged"),
        (own_rows1, "never arrive"),
        (all_averages1, "nothing is saved"),
        (not_gathered1, "not gathered"),
        (always_step_1, "same step number"),
        (step_0, "the first step is 1"),
        (without_padding1, "is the padding missing?"),
        (only_rank_0_reduces, "the other rank made no matching call"),
    ],
    "07.zero2": [
        (summed2, "summed and not averaged"),
        (own_rows2, "never arrive"),
        (kept_whole2, "whole gradient is kept"),
        (at_the_start2, "start of the slice"),
        (not_gathered2, "not gathered"),
    ],
    "07.zero3": [
        (summed3, "summed and not averaged"),
        (own_rows3, "never arrive"),
        (step_per_layer3, "grows with every layer"),
        (layers_stay3, "All gathered layers stay"),
        (padding_stays3, "cut off the padding"),
        (no_loss3, "return the loss"),
    ],
}
RIGHT = {
    "07.all_reduce": [with_numpy, with_tensors, around_a_ring],
    "07.zero1": [right1, right1_with_broadcasts, right1_with_reduce_scatter],
    "07.zero2": [right2, right2_divided_first, right2_with_all_reduce],
    "07.zero3": [right3, right3_afterwards, right3_with_all_reduce],
}
