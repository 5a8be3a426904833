"""Predicted bytes: against live engines to the byte, against the paper's table, and as properties."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from zero_engines import tiny

from minisft.errors import UserError
from minisft.launch.cpu_comm_op import build_environment
from minisft.zero.communication import bytes_sent, predict_traffic
from minisft.zero.parameter_shapes import (
    Shapes,
    decayed_names,
    elements_touched,
    partition_size,
    split_size,
    sub_groups,
)
from minisft.zero.planner import traffic
from minisft.zero.state_memory import (
    ELEMENT,
    MOMENTS,
    OWNERS,
    generated_config,
    paper_formula,
    predict_states,
    total_bytes,
)
from minisft.zero.strategies import STRATEGIES, Strategy

PERSISTENCE = 100  # small enough for some of the tiny model's tensors, not for all
BUCKET = 4000
sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


def shapes_of(tied: bool, two_groups: bool) -> Shapes:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny(tied))
    if two_groups:
        return Shapes.of_model(model)
    return Shapes((tuple((name, p.numel()) for name, p in model.named_parameters()),))


# --- live engines ------------------------------------------------------------------------------------------


def cases(ranks: int) -> list[tuple[Shapes, dict]]:
    """Stages 0 to 3, fp32 and bf16, one and two param groups, tied and untied; then offloading and accumulation."""
    grid = itertools.product(("zero0", "zero1", "zero2", "zero3"), ("fp32", "bf16"), (False, True), (False, True), (1,))
    offloading = [name for name, strategy in STRATEGIES.items() if strategy.offloads]
    more = itertools.product(offloading, ("fp32", "bf16"), (True,), (False,), (1, 2))
    again = itertools.product(("zero0", "zero1", "zero2", "zero3"), ("bf16",), (True,), (False,), (3,))
    made = []
    for strategy, precision, two_groups, tied, accumulation in itertools.chain(grid, more, again):
        shapes = shapes_of(tied, two_groups)
        config = generated_config(shapes, strategy, ranks, precision)
        config |= {"gradient_accumulation_steps": accumulation, "train_batch_size": accumulation * ranks}
        zero = config["zero_optimization"]
        zero |= {key: BUCKET for key, value in zero.items() if key.endswith("bucket_size") and value}
        if zero["stage"] == 3:  # nothing is kept from one use to the next
            zero |= {"stage3_param_persistence_threshold": PERSISTENCE, "stage3_max_reuse_distance": 0}
            zero["stage3_max_live_parameters"] = 0
            if tied:  # stepped in several parts
                zero["sub_group_size"] = 1000
        about = {"strategy": strategy, "precision": precision, "accumulation": accumulation, "deepspeed": config}
        made.append((shapes, about | {"stage": zero["stage"], "two_groups": two_groups, "tied": tied}))
    return made


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_live_engines_hold_and_send_what_is_predicted_to_the_byte(ranks, tmp_path, monkeypatch):
    one_more = Strategy("zero1-offload", "deepspeed", stage=1, offloads_optimizer=True)
    monkeypatch.setitem(STRATEGIES, one_more.name, one_more)
    chosen = cases(ranks)
    out = tmp_path / "measured.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)),
            *(str(Path(__file__).parents[1] / "zero_engines.py"), str(out), json.dumps([about for _, about in chosen])),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env=dict(os.environ) | build_environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (shapes, about), measured in zip(chosen, json.loads(out.read_text()), strict=True):
        strategy, precision, deepspeed = about["strategy"], about["precision"], about["deepspeed"]
        predicted = predict_states(shapes, strategy, ranks, precision, deepspeed)
        for rank in range(ranks):
            for moment in MOMENTS:
                found = {owner: measured[rank][moment][owner] for owner in OWNERS}
                assert found == predicted[rank][moment], (about, rank, moment)
        if ranks == 1:
            continue
        moved = predict_traffic(shapes, strategy, ranks, precision, about["accumulation"], deepspeed)
        for operation, size in measured[0]["communication"].items():
            # Norms and flags are reduced, too: some bytes.
            slack = 64 if operation == "all-reduce" else 0
            if about["tied"] and strategy.startswith("zero3") and operation == "all-gather":
                slack = 2 * 97 * 20 * 4 + 4 * ranks  # the tied weights are gathered for each of their uses
            assert moved[operation] <= size <= moved[operation] + slack, (about, operation)


@given(st.sampled_from(list(STRATEGIES)[1:]), st.integers(2, 64), st.sampled_from(["fp32", "bf16"]), st.integers(1, 16))
def test_traffic_is_the_papers(strategy, ranks, precision, accumulation):
    """Section 7: 2 for data parallelism and stages 1 and 2, 3 for stage 3; the planner's factors under accumulation."""
    shapes = Shapes(((("a", 4_000_000), ("b", 6_000_000)),))
    moved = predict_traffic(shapes, strategy, ranks, precision, accumulation)
    whole = bytes_sent(moved, ranks) * ranks / (ranks - 1) / ELEMENT[precision] / shapes.parameters
    assert whole == pytest.approx(traffic(strategy, accumulation, precision), rel=1e-3)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 8), st.integers(1, 9000))
def test_sub_groups_are_those_that_deepspeed_makes(sizes, ranks, limit):
    from types import SimpleNamespace

    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    parts = [SimpleNamespace(partition_numel=lambda n=n: -(-n // ranks)) for n in sizes]
    theirs = DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(SimpleNamespace(sub_group_size=limit), parts)
    ours = sub_groups([("", n) for n in sizes], ranks, {"sub_group_size": limit})
    assert ours == [sum(p.partition_numel() for p in some) for some in theirs]


# --- the paper ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "ranks", "gigabytes"),
    [
        (7.5e9, 64, ("120", "31.4", "16.6", "1.9")),
        (128e9, 1024, ("2048", "513.5", "257.8", "2")),
        (1e12, 1024, ("16000", "4012", "2014", "15.6")),
    ],
)
def test_the_papers_table(parameters, ranks, gigabytes):
    """Rajbhandari et al. 2020, figure 1 and table 1, to the digits printed there."""
    for stage, expected in enumerate(gigabytes):
        digits = len(expected.partition(".")[2])
        assert f"{paper_formula(parameters, ranks, stage) / 1e9:.{digits}f}" == expected


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3"])
def test_the_exact_prediction_approaches_the_paper_for_a_large_model(strategy):
    """Without buckets and small tensors, in half precision, the two differ by padding and borders alone."""
    layer = [("a", 40_000_000), ("b", 4_096)]
    shapes = Shapes((tuple((f"{i}.{name}", n) for i in range(40) for name, n in layer),))
    config = generated_config(shapes, strategy, 8, "bf16")
    config["zero_optimization"] |= {"reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0}
    found = predict_states(shapes, strategy, 8, "bf16", config)
    stage = int(strategy[-1])
    # At stages 1 and 2 a rank's own gradients are all that is left after backward.
    expected = paper_formula(shapes.parameters, 8, 2 if stage == 1 else stage)
    assert total_bytes(found[3]["after backward"]) == pytest.approx(expected, rel=0.02)


# --- properties --------------------------------------------------------------------------------------------


@given(sizes, st.integers(1, 9))
def test_slices_cover_a_group_and_little_more(group, ranks):
    elements = sum(group)
    part = partition_size(elements, ranks)
    assert elements <= part * ranks < elements + 2 * ranks


@given(sizes, st.integers(1, 9))
def test_touching_counts_every_parameter_that_a_slice_meets(group, ranks):
    """Against the definition, element by element."""
    named = [(str(i), n) for i, n in enumerate(group)]
    part = partition_size(sum(group), ranks)
    found = elements_touched(named, ranks)
    for rank in range(ranks):
        begin, end = rank * part, (rank + 1) * part
        at, expected = 0, 0
        for n in group:
            expected += n if max(at, begin) < min(at + n, end) else 0
            at += n
        padding = max(0, end - max(begin, at))
        assert found[rank] == expected + padding


@given(sizes, st.integers(1, 9))
def test_stage_3_splits_each_tensor_by_itself(group, ranks):
    split = split_size([(str(i), n) for i, n in enumerate(group)], ranks)
    assert sum(group) <= split * ranks < sum(group) + ranks * len(group)


@given(sizes, st.sampled_from(["fp32", "bf16", "fp16"]), st.integers(1, 6))
def test_more_splitting_never_holds_more_states(group, precision, ranks):
    shapes = Shapes((tuple((str(i), n) for i, n in enumerate(group)),))
    states = {}
    for strategy in ("zero0", "zero1", "zero3"):
        (rank, *_) = predict_states(shapes, strategy, ranks, precision)
        states[strategy] = rank["at rest"]["optimizer states"] + rank["at rest"]["fp32 masters"]
    slack = 12 * 2 * ranks + 12 * len(group) + (4 * shapes.parameters if precision == "fp32" else 0)
    assert states["zero1"] <= states["zero0"] + slack
    assert states["zero3"] <= states["zero1"] + slack


def test_shared_parameters_count_once_and_groups_are_trainers():
    tied, untied = shapes_of(True, True), shapes_of(False, True)
    assert untied.parameters - tied.parameters == 97 * 20
    assert len(tied.groups) == 2
    assert all("norm" in name for name, _ in tied.groups[1])
    assert not any("norm" in name for name, _ in tied.groups[0])


def test_every_strategy_has_an_answer_for_every_rank():
    shapes = shapes_of(True, True)
    for strategy in STRATEGIES:
        ranks = 1 if strategy == "vanilla" else 5
        predicted = predict_states(shapes, strategy, ranks, "bf16")
        assert len(predicted) == ranks
        for rank in predicted:
            assert tuple(rank) == MOMENTS
            assert all(tuple(owners) == OWNERS for owners in rank.values())
            assert total_bytes(rank["after backward"]) >= total_bytes(rank["at rest"]) > 0


@pytest.mark.parametrize(
    ("strategy", "ranks", "precision", "said"),
    [("zero4", 2, "bf16", "unknown strategy"), ("zero2", 0, "bf16", "ranks is 0"), ("zero2", 2, "int8", "precision")],
)
def test_what_cannot_be_is_refused(strategy, ranks, precision, said):
    with pytest.raises(UserError, match=said):
        predict_states(shapes_of(True, True), strategy, ranks, precision)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gpt2", "qwen3", "gemma2", "opt", "bloom", "gpt_neox", "phi", "mamba"]
)
def test_weight_decay_is_for_those_that_trainer_gives_it(kind):
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, vocab_size=300, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert decayed_names(model) == set(Trainer.get_decay_parameter_names(None, model))
    assert 0 < len(decayed_names(model)) < len(list(model.parameters()))
