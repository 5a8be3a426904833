from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.planner import RESERVED, plan, state_bytes, traffic

GB = 1e9


def test_a_small_model_needs_no_splitting():
    found = plan(135e6, 2, 80 * GB, precision="fp32")
    assert found.best.strategy == "ddp"
    assert all(option.fits for option in found.options)


def test_in_half_precision_ddp_sends_fp32_gradients():
    """Autocast leaves weights and gradients in fp32: `predict_traffic` counts 4 bytes per parameter."""
    assert plan(135e6, 2, 80 * GB, precision="bf16").best.strategy == "zero1"
    assert traffic("ddp") == 2 * traffic("zero1") == 2 * traffic("ddp", precision="fp32")


def test_seven_billion_on_eight_gpus():
    """112 GB of states: not whole, but split by stage 1 (14 + 14 + 10.5 GB)."""
    found = plan(7e9, 8, 80 * GB)
    assert {o.strategy: o.fits for o in found.options if not o.fits} == {"ddp": False}
    assert found.best.strategy == "zero1"
    assert "nothing that fits sends less" in found.reason
    assert "ddp would send no more, but does not fit" in plan(7e9, 8, 80 * GB, precision="fp32").reason
    assert "zero1, zero2 would send no more, but do not fit" in plan(7e9, 8, 24 * GB).reason
    assert plan(7e9, 8, 24 * GB).best.strategy == "zero3"


def test_nothing_fits_and_it_is_said_by_how_much():
    found = plan(1e12, 8, 80 * GB)
    assert found.best is None
    assert "even zero3 needs 2,000.0 GB" in found.reason


def test_offloading_is_the_last_resort():
    """13 billion parameters on two GPUs: 104 GB of ZeRO-3's states do not fit, 26 GB of parameters alone do."""
    found = plan(13e9, 2, 80 * GB)
    assert found.best.strategy == "zero2-offload"
    assert "; zero1, zero2 would send no more, but do not fit" in found.reason
    assert plan(13e9, 16, 80 * GB).best.strategy == "zero1"


def test_what_is_offloaded_lies_in_main_memory():
    """20 bytes for each parameter: bf16 and fp32 gradients, masters, Adam's two averages, and bf16 parameters."""
    shapes = Shapes((tuple((f"t{i}", 130_000_000) for i in range(100)),))
    found = plan(shapes, 2, 10 * GB)
    assert found.best.strategy == "zero3-offload"
    assert "; it needs 130.0 GB of main memory for each GPU as well" in found.reason


def test_known_peaks_decide():
    assert plan(1e9, 2, 80 * GB, precision="fp32", peaks={"ddp": 90 * GB}).best.strategy == "zero1"


def test_a_trillion_parameters_on_ten_thousand_ranks_takes_milliseconds():
    began = time.perf_counter()
    assert plan(1e12, 10_000, 80 * GB).best.strategy == "zero3"
    assert time.perf_counter() - began < 0.5, "arithmetic alone: a machine would have to stand still"


def test_accumulation_is_where_stage_1_beats_stage_2():
    assert traffic("zero1") == traffic("zero2") == traffic("ddp", precision="fp32") == 2
    assert traffic("zero1", 8) == 2 < traffic("zero2", 8) < traffic("zero3", 8)


@given(st.floats(1e6, 1e12), st.integers(2, 4096), st.floats(2, 200))
def test_an_option_fits_where_its_states_do(parameters, ranks, gigabytes):
    for option in plan(parameters, ranks, gigabytes * GB).options:
        states = state_bytes(parameters, option.strategy, ranks)
        assert option.states == states
        assert option.fits == (states <= gigabytes * GB - RESERVED)


@pytest.mark.parametrize(
    ("parameters", "ranks", "gpu"), [(0, 2, 80), (7e9, 0, 80), (7e9, 2, 1), (7e9, 2, float("nan"))]
)
def test_what_cannot_be_is_refused(parameters, ranks, gpu):
    with pytest.raises(UserError):
        plan(parameters, ranks, gpu * GB)
