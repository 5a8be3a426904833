"""The tiny model of notebook 07, its AdamW, and functions sent to two processes."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from minisft.course.exercises import RaisedElsewhere
from minisft.course.experiments.by_hand import (
    CONTEXT,
    Task,
    adamw,
    character_model,
    character_rows,
    flat,
    pytorch_adamw,
)
from minisft.course.experiments.two_ranks import source_of, train
from minisft.errors import UserError

ROWS = character_rows("the quick brown fox jumps over the lazy dog, 12 times")


def test_layers_and_adamw_equal_pytorch_bit_for_bit():
    model, rows = character_model(), torch.tensor(ROWS)
    optimizer, weights, averages = pytorch_adamw(model.parameters()), flat(model), {}
    for step in range(1, 4):
        loss = cross_entropy(model(rows[:, :CONTEXT]), rows[:, CONTEXT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand = Task([[ROWS]]).model(0, 0)
        adamw(weights, by_hand.gradient(weights), averages, step)
        assert torch.equal(by_hand.loss, loss.detach()) and torch.equal(weights, flat(model))


def test_a_row_is_four_characters_and_the_next_and_unknown_ones_are_left_out():
    assert len(ROWS) == 53 - CONTEXT and all(len(row) == CONTEXT + 1 for row in ROWS)
    assert character_rows("Ab€cde") == character_rows("abcde")


@pytest.mark.parametrize("step, size, says", [(0, 3, "the first step is 1"), (1, 2, "is the padding missing?")])
def test_adamw_says_what_is_wrong(step, size, says):
    with pytest.raises(ValueError, match=says):
        adamw(torch.zeros(3), torch.zeros(size), {}, step)


def test_a_layer_wants_its_weights_whole_and_without_padding():
    layer = Task([[[1.0, 2.0]]], (2,)).model(0, 0).layers[0]
    with pytest.raises(ValueError, match="2 weights and got 1: gather them"):
        layer.forward(torch.zeros(1), None)


def half(number):
    return number / DIVISOR


DIVISOR = 2


def uses_others(number):
    return [half(n) + torch.zeros(1) for n in (number,)]


def test_a_source_brings_what_the_function_uses():
    space = {}
    exec(source_of(uses_others)["source"], space)
    assert space["uses_others"](3) == [torch.tensor([1.5])]


def test_a_function_without_a_source_is_refused():
    space = {}
    exec("def unknown(): pass", space)
    with pytest.raises(UserError, match="define it in a cell"):
        source_of(space["unknown"])
    with pytest.raises(UserError, match="with def"):
        source_of(lambda: None)


def raises_on_rank_1(weights, state, model, adamw):
    if torch.distributed.get_rank():
        raise KeyError("no such slice")
    torch.distributed.barrier()


@pytest.mark.distributed
def test_an_error_on_one_rank_ends_both_and_is_the_one_that_is_told():
    with pytest.raises(RaisedElsewhere) as raised:
        train(raises_on_rank_1, Task([[[1.0], [1.0]]], (1,)))
    assert raised.value.kind == "KeyError" and raised.value.line == 'raise KeyError("no such slice")'
