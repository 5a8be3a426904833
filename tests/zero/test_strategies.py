import pytest

from minisft.zero.strategies import REASONS, STRATEGIES, deepspeed_config


def config(strategy, **changes):
    settings = {
        "micro_batch": 4,
        "accumulation": 2,
        "ranks": 3,
        "max_grad_norm": 2.0,
        "precision": "bf16",
        "largest_tensor": 28_311_552,
        "on_gpu": False,
    }
    return deepspeed_config(strategy, **(settings | changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_generated_key_has_a_reason(strategy):
    made = config(strategy)
    if made is None:
        assert strategy in ("vanilla", "ddp")
        return
    keys = {k for k in made if k != "zero_optimization"}
    keys |= {f"zero_optimization.{k}" for k in made["zero_optimization"]}
    assert keys <= set(REASONS)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.startswith("zero")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_itself_accepts_it(strategy, precision):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    made = config(strategy, precision=precision)
    parsed = DeepSpeedZeroConfig(**made["zero_optimization"])
    assert parsed.stage == STRATEGIES[strategy].stage
    assert (parsed.offload_optimizer is not None) == STRATEGIES[strategy].offloads
    assert (parsed.offload_param is not None) == (strategy == "zero3-offload")
    assert made["train_batch_size"] == 4 * 2 * 3
    assert (made["fp16"]["enabled"], made["bf16"]["enabled"]) == (precision == "fp16", precision == "bf16")
    if parsed.stage == 3:
        assert parsed.gather_16bit_weights_on_model_save


def test_buckets_hold_the_largest_tensor_and_no_more_than_needed():
    zero = config("zero2")["zero_optimization"]
    assert 28_311_552 <= zero["reduce_bucket_size"] < 30_000_000
    assert config("zero2", largest_tensor=301)["zero_optimization"]["reduce_bucket_size"] == 310
    assert config("zero3", largest_tensor=7)["zero_optimization"]["reduce_bucket_size"] == 7
