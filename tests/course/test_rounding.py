import pytest
import torch
from samples import ROWS
from transformers import AutoModelForCausalLM

from minisft.course.experiments.rounding import distance_to_next, move
from minisft.training.collators import PadRight


def test_small_updates_move_fp32_weights_and_leave_most_bf16_weights_where_they_are(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    start = {name: p.clone() for name, p in model.named_parameters()}
    batch = PadRight(0)(ROWS)
    low = move(model, batch, torch.bfloat16)
    full = move(model, batch, torch.float32)
    assert low.share < 0.4
    assert full.share > 0.95
    assert full.losses[-1] < full.losses[0]
    assert move(model, batch, torch.bfloat16, learning_rate=1e-2).share > 0.95, "large updates do arrive"
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters()), "the model itself stays"


@pytest.mark.parametrize(("value", "step"), [(1.0, 2**-7), (0.05, 2**-12), (2.0, 2**-6)])
def test_the_next_number(value, step):
    assert distance_to_next(value) == step
