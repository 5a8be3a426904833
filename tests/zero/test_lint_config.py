"""The linter, with DeepSpeed's own configuration classes as the oracle of what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import minisft
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.zero.lint_config import lint, lint_file
from minisft.zero.lint_keys import (
    ALIASES,
    AT_STAGE_3,
    AT_STAGES_1_AND_2,
    REMOVED_KEYS,
    TOP_KEYS,
    ZERO_KEYS,
)
from minisft.zero.strategies import STRATEGIES, deepspeed_config

GATHER = "stage3_gather_16bit_weights_on_model_save"

# The three configurations of the work that this course follows, by their description, with a batch for each.
ORIGINAL_1 = {"train_micro_batch_size_per_gpu": 8, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
ORIGINAL_2 = {
    "train_micro_batch_size_per_gpu": 8,
    "fp16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
    },
}
ORIGINAL_3 = {
    "train_micro_batch_size_per_gpu": 8,
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    },
    GATHER: True,
}
BATCH = {"train_micro_batch_size_per_gpu": 1}


def keys(config, severity=None, **about):
    return {f.key for f in lint(config, **about) if severity in (None, f.severity)}


def zero(**settings):
    return BATCH | {"zero_optimization": settings}


# What such files look like in the wild, and what must be said of each.
CASES = [
    (ORIGINAL_1, set(), {"zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size"}),
    (ORIGINAL_2, set(), {"zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size"}),
    (ORIGINAL_3, {GATHER}, {f"zero_optimization.{GATHER}", "zero_optimization.reduce_bucket_size"}),
    # all "auto", as Trainer wants them
    (
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "sub_group_size": 1e9,
                GATHER: True,
            },
        },
        set(),
        set(),
    ),
    # "auto" where nobody fills it in
    (zero(stage=3, stage3_max_live_parameters="auto"), set(), {"zero_optimization.stage3_max_live_parameters"}),
    (zero(stage=0) | {"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, set(), set()),
    (zero(stage=0) | {"bf16": {"enabled": True}, "fp16": {"enabled": "false"}}, set(), set()),
    (zero(stage=0) | {"_comment": "of ours"}, set(), {"_comment"}),
    (BATCH | {"zero_optimization": None}, {"zero_optimization"}, set()),
    (BATCH | {"zero_optimization": True}, set(), {"zero_optimization"}),
    (zero(stage=1, reduce_bucket_size="500000000", allgather_bucket_size=1), set(), set()),
    (BATCH | {"steps_per_print": "auto", "zero_optimization": {"stage": 0}}, {"steps_per_print"}, set()),
    # stage-3 keys at stage 2
    (zero(stage=2, stage3_max_live_parameters=1e9), set(), {"zero_optimization.stage3_max_live_parameters"}),
    (zero(stage=2, offload_param={"device": "cpu"}), set(), {"zero_optimization.offload_param"}),
    # both half precisions
    (zero(stage=0) | {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {"fp16"}, set()),
    # a block that forgets to say so
    (zero(stage=0) | {"fp16": {"loss_scale": 0}}, set(), {"fp16.enabled"}),
    # misspelt inside, which DeepSpeed refuses, and outside, which it does not
    (zero(stage=2, reduce_buckett_size=1), {"zero_optimization.reduce_buckett_size"}, None),
    (BATCH | {"zero_optimisation": {"stage": 2}}, {"zero_optimisation"}, {"zero_optimization"}),
    (BATCH | {"stage": 2}, {"stage"}, {"zero_optimization"}),
    # misplaced inside
    (zero(stage=0, gradient_clipping=1.0), {"zero_optimization.gradient_clipping"}, set()),
    # the old ways
    (zero(stage=2, cpu_offload=True), set(), {"zero_optimization.cpu_offload"}),
    (zero(stage=0) | {"amp": {"enabled": True}}, {"amp"}, set()),
    # an optimizer and a scheduler of DeepSpeed's
    (
        zero(stage=0) | {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR", "params": {}}},
        set(),
        {"optimizer"},
    ),
    # offload without a place
    (zero(stage=3, offload_optimizer={"device": "nvme"}), {"zero_optimization.offload_optimizer.nvme_path"}, None),
    (zero(stage=3, offload_optimizer={"devise": "cpu"}), {"zero_optimization.offload_optimizer.devise"}, None),
    # nothing that says how large a batch is
    ({"zero_optimization": {"stage": 0}}, {"train_batch_size"}, set()),
    (zero(stage=7), {"zero_optimization.stage"}, set()),
    (zero(stage=True), {"zero_optimization.stage"}, set()),
]


@pytest.mark.parametrize(("config", "errors", "warnings"), CASES)
def test_what_is_said_of_a_configuration(config, errors, warnings):
    assert keys(config, "error") == errors
    if warnings is not None:
        assert warnings <= keys(config, "warning")
        assert warnings or not keys(config, "warning")


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.startswith("zero")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_is_wrong_with_what_minisft_generates(strategy, precision):
    config = deepspeed_config(
        strategy,
        micro_batch=4,
        accumulation=2,
        ranks=2,
        max_grad_norm=1.0,
        precision=precision,
        largest_tensor=28_311_552,
        on_gpu=True,
    )
    assert lint(config, ranks=2, parameters=134_515_008) == []


ANY = [True, False, 0, 1.5, "x", "auto", "", [], [1], ["a", "b"], [[1, 2], [3, 4]], {}, {"a": None}, None, 10**25]


@pytest.mark.parametrize("params", ANY)
@pytest.mark.parametrize("of", [("scheduler", "WarmupLR"), ("scheduler", "StepLR"), ("optimizer", "AdamW")])
def test_params_of_any_type_get_findings(of, params):
    """Whatever is no object is an error, unless the block needs no params."""
    block, name = of
    found = keys(zero(stage=2) | {block: {"type": name, "params": params}}, "error")
    is_object = isinstance(params, dict) or (params in (None, "auto") and block == "optimizer")
    assert is_object or any(key.startswith(block) or key == "DeepSpeed" for key in found), found


@pytest.mark.parametrize("value", ANY)
@pytest.mark.parametrize("stage", [2, 3])
def test_any_value_of_any_zero_key_gets_findings(stage, value):
    for key in [*ZERO_KEYS, *ALIASES]:
        lint(zero(**{"stage": stage, key: value}))


def test_batch_arithmetic():
    def at(ranks, **sizes):
        return keys(sizes | {"zero_optimization": {"stage": 0}}, "error", ranks=ranks)

    names = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert at(2, **names) == set()
    assert at(None, **names) == set()
    assert at(3, **names) == {"train_batch_size"}
    assert at(3, train_batch_size=16) == {"train_batch_size"}
    assert at(None, train_batch_size=16, train_micro_batch_size_per_gpu=3) == {"train_batch_size"}
    assert at(2, train_micro_batch_size_per_gpu=0) == {"train_micro_batch_size_per_gpu"}
    assert at(2, train_micro_batch_size_per_gpu=2.5) == {"train_micro_batch_size_per_gpu"}


def test_buckets_are_held_against_the_model():
    found = {f.key: f.message for f in lint(zero(stage=3, **{GATHER: True}), parameters=276_000)}
    assert "500,000,000" in found["zero_optimization.reduce_bucket_size"]
    assert "276,000" in found["zero_optimization.reduce_bucket_size"]
    assert "zero_optimization.stage3_max_live_parameters" in found
    small = zero(
        stage=3,
        reduce_bucket_size=100_000,
        stage3_prefetch_bucket_size=100_000,
        stage3_max_live_parameters=100_000,
        stage3_max_reuse_distance=100_000,
        **{GATHER: True},
    )
    assert lint(small, parameters=276_000) == []


def test_spelling_is_suggested():
    (finding,) = lint(zero(stage=0) | {"gradient_cliping": 1.0})
    assert "gradient_clipping" in finding.message
    assert str(finding).startswith("error: gradient_cliping")


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1]", "a list"), ("null", "null"), ("3", "a number"), ('"x"', "a string"), ("{", "not valid JSON")],
)
def test_a_file_that_holds_no_object(tmp_path, text, said):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        lint_file(file)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (zero(stage=0, compute_grad_norm=False), "zero_optimization"),
        (zero(stage=2, reduce_bucket_size=0), "zero_optimization.reduce_bucket_size"),
        (zero(stage=2, offload_optimizer="cpu"), "zero_optimization.offload_optimizer"),
        (zero(stage=2, offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device"),
        (zero(stage=3, stage3_max_live_parameters=-1), "zero_optimization.stage3_max_live_parameters"),
        (zero(stage=3, overlap_comm="sometimes"), "zero_optimization.overlap_comm"),
        (zero(stage=0) | {"fp16": {"enabled": True, "loss_scale": -1}}, "fp16.loss_scale"),
        (zero(stage=0) | {"communication_data_type": "float16"}, "DeepSpeed"),
        (zero(stage=0) | {"tensorboard": {"enabled": True, "foo": 1}}, "tensorboard.foo"),
        (zero(stage=0) | {"comms_logger": {"x": 1}}, "comms_logger.x"),
        (zero(stage=3, cpu_offload=True, offload_optimizer={"device": "cpu"}), "DeepSpeed"),
    ],
)
def test_of_a_file_deepspeed_is_asked_as_well(tmp_path, config, key):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    assert key in {f.key for f in lint_file(file) if f.severity == "error"}, lint_file(file)


def test_deepspeed_has_nothing_against_what_is_legal(tmp_path):
    legal = [config for config, errors, _ in CASES if not errors]
    assert len(legal) > 10
    for config in legal:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(config))
        assert [f for f in lint_file(file) if f.severity == "error"] == []


@pytest.mark.parametrize("size", ["NaN", "1e999", "-1", '"many"', "true"])
def test_a_size_that_is_none(tmp_path, size):
    file = tmp_path / "ds.json"
    file.write_text(f'{{"train_batch_size": 2, "zero_optimization": {{"stage": 2, "reduce_bucket_size": {size}}}}}')
    assert "zero_optimization.reduce_bucket_size" in {
        f.key for f in lint_file(file, parameters=10) if f.severity == "error"
    }


def test_sequence_parallel_ranks_share_rows():
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    assert keys(sizes | {"zero_optimization": {"stage": 0}, "sequence_parallel_size": 2}, "error", ranks=8) == set()
    assert keys(sizes | {"zero_optimization": {"stage": 0}}, "error", ranks=8) == {"train_batch_size"}


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no file"):
        lint_file(tmp_path / "none.json")
    with pytest.raises(UserError, match="not a text file"):
        lint_file(tmp_path)


def test_a_key_written_twice(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 2, "train_batch_size": 4, "zero_optimization": {"stage": 0}}')
    assert [f.key for f in lint_file(file) if f.severity == "error"] == ["train_batch_size"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**10) | st.floats() | st.sampled_from(["auto", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from([*ZERO_KEYS, *ALIASES, *TOP_KEYS, "enabled", "device"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*sorted(TOP_KEYS), "stage", "x"]), JSON, max_size=5))
def test_any_object_is_answered(config):
    for finding in lint(config, ranks=3, parameters=1000):
        assert finding.severity in ("error", "warning")
        assert json.dumps(str(finding))


# --- against DeepSpeed itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed_zero():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


def test_the_keys_are_deepspeeds(deepspeed_zero):
    fields = deepspeed_zero.model_fields
    assert set(ZERO_KEYS) == {field.alias or name for name, field in fields.items()}
    assert set(ZERO_KEYS) >= AT_STAGE_3 | AT_STAGES_1_AND_2
    assert not AT_STAGE_3 & AT_STAGES_1_AND_2


@pytest.mark.parametrize(("config", "errors", "warnings"), CASES)
def test_deepspeed_refuses_no_zero_block_that_passes(deepspeed_zero, config, errors, warnings):
    block = config.get("zero_optimization")
    if not isinstance(block, dict):
        return
    block = {key: value for key, value in block.items() if value != "auto"}  # it drops those itself
    refused = False
    try:
        deepspeed_zero(**block)
    except Exception:
        refused = True
    ours = {key for key in errors if key.startswith("zero_optimization.")}
    assert refused <= bool(ours)


# --- against DeepSpeed's engine -----------------------------------------------------------------------------

SMALL = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
BF16 = {"bf16": {"enabled": True}}
CPU = {"offload_optimizer": {"device": "cpu"}}


def at(stage=2, zero=None, **more):
    return BATCH | {"zero_optimization": {"stage": stage} | SMALL | (zero or {})} | more


def optimizer(kind="AdamW", stage=2, beside=None, **params):
    return at(stage, optimizer={"type": kind, "params": params} | (beside or {}))


def scheduler(kind="WarmupLR", stage=2, beside=None, **params):
    return at(stage, scheduler={"type": kind, "params": params} | (beside or {}))


# What an engine does, and with which key. "taken for true": any text is, also "false".
ENGINES = [
    (at(), "used", ""),
    (at(gradient_clipping=2), "used", ""),
    (at(gradient_clipping=-1), "used", ""),
    (at(gradient_clipping="1.0"), "refused", "gradient_clipping"),
    (at(0, gradient_clipping="1.0"), "refused", "gradient_clipping"),
    (at(3, gradient_clipping="1.0"), "refused", "gradient_clipping"),
    (at(gradient_clipping="1.0", **BF16), "refused", "gradient_clipping"),
    (at(gradient_clipping=None), "refused", "gradient_clipping"),
    (at(steps_per_print="10"), "refused", "steps_per_print"),
    (at(steps_per_print=0), "refused", "steps_per_print"),
    (at(steps_per_print=None), "used", ""),
    (at(log_level="loud"), "refused", "log_level"),
    (at(wall_clock_breakdown="false"), "refused", "wall_clock_breakdown"),
    (at(memory_breakdown="false"), "taken for true", "memory_breakdown"),
    (at(zero_allow_untested_optimizer="false"), "taken for true", "zero_allow_untested_optimizer"),
    (at(vocabulary_size="100"), "refused", "DeepSpeed"),
    (at(communication_data_type=16), "refused", "DeepSpeed"),
    (at(prescale_gradients=True), "refused", "prescale_gradients"),
    (at(3, prescale_gradients=True), "refused", "prescale_gradients"),
    (at(prescale_gradients="false"), "refused", "prescale_gradients"),
    (at(1, prescale_gradients=True), "used", ""),
    (at(0, prescale_gradients=True), "used", ""),
    (at(2, {"reduce_scatter": False}, prescale_gradients=True), "used", ""),
    (at(3, {"reduce_scatter": False}, prescale_gradients=True), "used", ""),
    (at(prescale_gradients=True, gradient_allreduce_op="sum"), "used", ""),
    (at(gradient_predivide_factor=2.0), "refused", "gradient_predivide_factor"),
    (at(3, gradient_predivide_factor=2.0), "refused", "gradient_predivide_factor"),
    (at(gradient_predivide_factor="1.0"), "refused", "gradient_predivide_factor"),
    (at(gradient_predivide_factor=1), "used", ""),
    (at(1, gradient_predivide_factor=2.0), "used", ""),
    (at(3, gradient_allreduce_op="sum"), "refused", "DeepSpeed"),
    (at(1, {"legacy_stage1": True}), "refused", "zero_optimization.legacy_stage1"),
    (at(1, {"overlap_comm": True}, managed_gradient_accumulation=False), "refused", "managed_gradient_accumulation"),
    (at(2, {"overlap_comm": True}, managed_gradient_accumulation=False), "used", ""),
    (at(data_types={"grad_accum_dtype": "float17"}), "refused", "data_types"),
    (at(data_types={"param_dtype": "bf16"}), "refused", "data_types"),
    (at(data_types={"grad_accum_dtype": "fp32"}), "used", ""),
    (at(0, data_types={"grad_accum_dtype": "fp32"}, **BF16), "refused", "data_types.grad_accum_dtype"),
    (at(2, data_types={"grad_accum_dtype": "fp32"}, **BF16), "used", ""),
    (
        at(1, bf16={"enabled": True, "bf16_master_weights_and_grads": True}),
        "refused",
        "bf16.bf16_master_weights_and_grads",
    ),
    (at(0, bf16={"enabled": True, "bf16_master_weights_and_grads": True}), "refused", "DeepSpeed"),
    (at(torch_autocast={"enabled": True, "dtype": "float17"}), "refused", "DeepSpeed"),
    (at(checkpoint={"tag_validation": "nope"}), "refused", "DeepSpeed"),
    (at(aio=[1]), "refused", "DeepSpeed"),
    # optimizers
    (optimizer(lr=5e-6), "used", ""),
    (optimizer("adam", lr=5e-6, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1), "used", ""),
    (optimizer("AdamW", beside={"lr": 5e-6}), "ignored", "optimizer.lr"),
    (optimizer("AdamW", beside={"legacy_fusion": True}, lr=1), "used", ""),
    (optimizer(lrr=5e-6), "refused", "optimizer.params.lrr"),
    (optimizer(lr=5e-6, max_grad_norm=1.0), "refused", "optimizer.params"),
    (optimizer(lr="5e-6", torch_adam=True), "refused", "optimizer.params.lr"),
    (optimizer(betas=[0.9]), "refused", "optimizer.params.betas"),
    (optimizer(torch_adam=True, bias_correction=True), "refused", "optimizer.params.bias_correction"),
    (optimizer(amsgrad=True), "refused", "optimizer.params"),
    (optimizer("AdamV", lr=1), "refused", "optimizer.type"),
    (optimizer("OneBitAdam", lr=1), "refused", "optimizer.type"),
    (optimizer("FusedAdam", lr=1), "refused", "optimizer.type"),
    (optimizer("SGD", lr=1), "refused", "optimizer.type"),
    (optimizer("sgd", stage=0, lr=1), "refused", "optimizer.type"),
    (optimizer("SGD", stage=0, lr=1), "used", ""),
    (optimizer("SGD", lr=1) | {"zero_allow_untested_optimizer": True}, "used", ""),
    (optimizer("Adagrad", lr=1), "used", ""),
    (optimizer("Lion", lr=1), "used", ""),
    (optimizer("Lion", lr=1, eps=1), "refused", "optimizer.params.eps"),
    (optimizer("Lamb", lr=1), "refused", "optimizer.type"),
    (optimizer("Muon", lr=1, epss=1), "ignored", "optimizer.params.epss"),
    (optimizer("lr_scheduler", stage=0), "refused", "optimizer"),
    (at(optimizer={"params": {"lr": 1}}), "refused", "optimizer.type"),
    (at(0, optimizer={"params": {"lr": 1}}), "refused", "optimizer.type"),
    (at(optimizer={"type": 3}), "refused", "DeepSpeed"),
    (at(optimizer={"type": "AdamW", "params": [1]}), "refused", "DeepSpeed"),
    (at(optimizer="AdamW"), "refused", "optimizer"),
    # schedulers
    (scheduler(warmup_num_steps=3), "used", ""),
    (scheduler(beside={"warmup_num_steps": 3}), "ignored", "scheduler.warmup_num_steps"),
    (scheduler(warmup_steps=3), "refused", "scheduler.params.warmup_steps"),
    (scheduler(warmup_num_steps=0), "refused", "scheduler.params"),
    (scheduler(warmup_num_steps=3.0), "refused", "scheduler.params"),
    (scheduler("warmuplr"), "refused", "scheduler.type"),
    (scheduler("CosineAnnealing"), "refused", "scheduler.type"),
    (scheduler("WarmupDecayLR", warmup_num_steps=3), "refused", "scheduler.params"),
    (scheduler("WarmupDecayLR", warmup_num_steps=3, total_num_steps="9"), "refused", "scheduler.params"),
    (scheduler("WarmupDecayLR", warmup_num_steps=3, total_num_steps=9), "used", ""),
    (scheduler("OneCycle", cycle_min_lr=1, cycle_max_lr=2), "used", ""),
    (scheduler("CosineAnnealingLR", T_max=9), "refused", "scheduler.type"),
    (scheduler("CosineAnnealingLR", stage=0, T_max=9), "used", ""),
    (scheduler("CosineAnnealingLR", stage=0), "refused", "scheduler"),
    (at(scheduler={"type": "WarmupLR"}), "refused", "scheduler.params"),
    (at(scheduler={"params": {}}), "ignored", "scheduler.params"),
    (at(scheduler=None), "refused", "scheduler"),
    # misspelt inside
    (at(aio={"que_depth": 8}), "ignored", "aio.que_depth"),
    (at(aio={"queue_depth": 8}), "used", ""),
    (at(flops_profiler={"enable": True}), "ignored", "flops_profiler.enable"),
    (
        at(activation_checkpointing={"partition_activation": True}),
        "ignored",
        "activation_checkpointing.partition_activation",
    ),
    (at(data_types={"grad_acum_dtype": "fp32"}), "ignored", "data_types.grad_acum_dtype"),
    (at(checkpoint={"use_node_local": True}), "ignored", "checkpoint.use_node_local"),
    (at(autotuning={"enable": True}), "ignored", "autotuning.enable"),
    (at(torch_autocast={"enable": True}), "ignored", "torch_autocast.enable"),
    (at(timers={"throughputt": {}}), "ignored", "timers.throughputt"),
    (at(tensorboard={"enable": True}), "refused", "tensorboard.enable"),
    (at(gradient_cliping=1.0), "ignored", "gradient_cliping"),
]


def without(config, key):
    inner, *rest = key.split(".", 1)
    if not rest:
        return {name: value for name, value in config.items() if name != inner}
    return config | {inner: without(config[inner], rest[0])}


def differing(config):
    return {key: value for key, value in config.items() if key != "zero_optimization"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """What an engine makes of each configuration, and of those without the key that it is said to ignore."""
    out = tmp_path_factory.mktemp("engines") / "found.json"
    configs = [config for config, _, _ in ENGINES]
    configs += [without(config, key) for config, what, key in ENGINES if what == "ignored"]
    worker = Path(__file__).parents[1] / "lint_engines.py"
    done = subprocess.run(
        [sys.executable, "-P", worker, out, json.dumps(configs)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    return found[: len(ENGINES)], found[len(ENGINES) :]


def test_the_table_is_what_engines_do(engines):
    found, without_keys = engines
    plain = iter(without_keys)
    for (config, what, key), made in zip(ENGINES, found, strict=True):
        assert ("refused" in made) == (what == "refused"), (config, made)
        if what == "ignored":
            assert made == next(plain), (config, key)


@pytest.mark.parametrize(("config", "what", "key"), ENGINES, ids=[json.dumps(differing(c)) for c, _, _ in ENGINES])
def test_the_linter_agrees_with_the_engine(tmp_path, config, what, key):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    errors = {f.key: f.message for f in lint_file(file) if f.severity == "error"}
    if what == "used":
        assert errors == {}
    elif what == "ignored":
        assert "is ignored by DeepSpeed" in errors[key]
    else:
        assert key in errors, errors


# --- files of anybody ---------------------------------------------------------------------------------------

ZERO = {"stage": 2}


@pytest.mark.attack("12")
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(BATCH | {f"gradient_clippin{i}": 1 for i in range(200_000)}),
        "{" + ",".join(f'"a{i}": 1, "a{i}": 2' for i in range(50_000)) + "}",
        "[" * 1_000_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"train_batch_size": ' + "9" * 4000 + "}",
        '{"train_batch_size": ' + "9" * 200_000 + "}",
        json.dumps({"optimizer": {"type": "A" * 10_000_000}}),
    ],
    ids=["keys", "keys written twice", "no end", "deep", "deep lists", "digits", "more digits", "a long text"],
)
def test_what_is_no_configuration_by_its_size_is_one_sentence(tmp_path, text):
    file = tmp_path / "ds.json"
    file.write_text(text)
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        lint_file(file)
    assert len(str(error.value)) < 400
    assert time.perf_counter() - began < 10


@pytest.mark.attack("12")
@pytest.mark.parametrize(
    "config",
    [
        {f"gradient_clippin{i}": 1 for i in range(8000)},
        {"zero_optimization": ZERO | {f"stage3_max_live_par{i}": 1 for i in range(7000)}},
        {"optimizer": {"type": "AdamW", "params": {f"weight_deca{i}": 1 for i in range(9000)}}},
        {"aio": {f"queue_dept{i}": 1 for i in range(9000)}},
    ],
    ids=["beside", "zero", "optimizer", "aio"],
)
def test_the_largest_that_is_read_takes_seconds(tmp_path, config):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(BATCH | {"zero_optimization": ZERO} | config))
    began = time.perf_counter()
    assert any("did you mean" in finding.message for finding in lint_file(file))
    assert time.perf_counter() - began < 20


@pytest.mark.attack("13")
def test_what_a_file_says_gives_a_terminal_no_orders(tmp_path):
    file = tmp_path / "ds\x1b[31m.json"
    escapes = {"\x1b]0;title\x07": 1, "\x1b[31m": "\x1b[2J", "a\nerror: forged: line": 1, "\u202e\x9b": 1}
    config = (
        BATCH
        | escapes
        | {
            "zero_optimization": ZERO | escapes | {"offload_optimizer": escapes},
            "aio": escapes,
            "fp16": escapes,
            "tensorboard": escapes,
            "optimizer": {"type": "\x1b[31m", "params": escapes},
            "scheduler": {"type": "\x1b[31m", "params": escapes} | escapes,
            "gradient_clipping": "\x1b[31m",
            "communication_data_type": "\x1b[31m",
        }
    )
    file.write_text(json.dumps(config))
    said, listed = minisft("lint", file), minisft("lint", file, "--json")
    assert said.returncode == listed.returncode == 1
    for text in (said.stdout, listed.stdout):
        assert text.replace("\n", "").isprintable()
    assert "error: forged: line" not in said.stdout.splitlines()
    assert "\x1b[31m" in {finding["key"] for finding in json.loads(listed.stdout)}
    assert len(said.stdout.splitlines()) == len(json.loads(listed.stdout))


@pytest.mark.attack("15")
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0", b'{"a": "\\ud800"}', b"{,}", b"[1]"])
def test_a_file_that_is_damaged_is_one_sentence(tmp_path, content):
    file = tmp_path / "ds.json"
    file.write_bytes(content)
    done = minisft("lint", file)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.attack("15")
def test_what_is_no_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("/dev/zero", "/dev/full", tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / ("x" * 300)):
        done = minisft("lint", name)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["auto", "AdamW"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["type", "params", "lr", "stage", "enabled"]), inner)
    ),
    max_leaves=6,
)


@pytest.mark.attack("15")
@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*sorted(TOP_KEYS | REMOVED_KEYS), "\x1b"]) | st.text(max_size=3), ANY, max_size=4)
)
def test_a_file_of_any_object_is_answered(tmp_path_factory, config):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(config))
    try:
        found = lint_file(file, ranks=3, parameters=1000)
    except UserError as error:
        assert "not valid JSON" in str(error) or "digits" in str(error)
    else:
        assert all(str(finding).isprintable() for finding in found)
