"""The linter, with DeepSpeed's own configuration classes as the oracle of what it refuses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.lint import (
    ALIASES,
    DEPRECATED_ZERO_KEYS,
    HALF_KEYS,
    OFFLOAD_KEYS,
    REMOVED_KEYS,
    TOP_KEYS,
    ZERO_KEYS,
    lint,
    lint_file,
)
from minisft.zero_config import STRATEGIES, deepspeed_config

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
    (zero(stage=0) | {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}, set(), {"optimizer"}),
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
    with pytest.raises(UserError, match="no text file"):
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
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    fields = deepspeed_zero.model_fields
    assert set(ZERO_KEYS) == {field.alias or name for name, field in fields.items()}
    assert set(ALIASES) == {name for name, field in fields.items() if field.alias}
    deprecated = {name for name, f in fields.items() if (f.json_schema_extra or {}).get("deprecated")}
    assert set(DEPRECATED_ZERO_KEYS) == deprecated
    assert set(REMOVED_KEYS) == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert {"fp16": set(DeepSpeedFP16Config.model_fields), "bf16": set(DeepSpeedBF16Config.model_fields)} == HALF_KEYS
    assert {
        "offload_param": set(DeepSpeedZeroOffloadParamConfig.model_fields),
        "offload_optimizer": set(DeepSpeedZeroOffloadOptimizerConfig.model_fields),
    } == OFFLOAD_KEYS


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
