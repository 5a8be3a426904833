"""Activations from fake tensors: the same bytes as a real step allocates, whatever the batch and the precision."""

from __future__ import annotations

import gc
from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from minisft.errors import UserError
from minisft.model.loss import LossHead, summed_loss
from minisft.model.packed_attention import PER_DOCUMENT
from minisft.zero.activation_trace import ACTIVATIONS, GRADIENTS, LOGITS, _all_layers, _trace, trace_activations
from minisft.zero.measured_memory import peak_bytes
from minisft.zero.tensor_tracker import TensorTracker

LLAMA = LlamaConfig(
    vocab_size=301,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(vocab_size=301, n_positions=128, n_embd=32, n_layer=2, n_head=4)
PLAIN = {
    **{"lengths": [40, 30], "trained": 33, "precision": "fp32", "half_weights": False},
    **{"activation_checkpointing": False, "on_gpu": False, "trust_remote_code": False},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lengths": [100]},
        {"trained": None},
        {"precision": "bf16"},
        {"precision": "bf16", "half_weights": True},
        {"activation_checkpointing": True},
    ],
)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["padding-free", "padded"])
def test_fake_tensors_count_what_real_ones_take(config, changes):
    settings = PLAIN | changes
    gc.collect()
    assert _trace(config, **settings) == _trace(config, **settings, real=True)


@pytest.mark.parametrize("layers", [15])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "half_weights"), [("fp32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("length", [10, 2000], ids=["gradients weigh more", "activations weigh more"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["padding-free", "padded"])
def test_a_deep_model_is_traced_by_way_of_shallow_ones(config, length, precision, half_weights, checkpointing, layers):
    """The worst moment may be elsewhere in a deep model than in those that it is extended from."""
    config = deepcopy(config)
    config.num_hidden_layers = layers
    changes = {"activation_checkpointing": checkpointing, "precision": precision, "half_weights": half_weights}
    settings = PLAIN | changes | {"lengths": [length, length // 2], "trained": None}
    found, whole = _all_layers(config, **settings), _trace(config, **settings)
    assert found.retained == whole.retained
    for which in ("peak", "peak_freeing", "reducing"):
        assert sum(getattr(found, which).values()) == sum(getattr(whole, which).values()), which
    for kept in (10**4, 10**7):
        parameters = whole.stretches[-1].arrived
        most = [max(sum(s.held.values()) + kept * s.arrived // parameters for s in d.stretches) for d in (found, whole)]
        assert most[0] == most[1]
    assert min(min(s.held.values(), default=0) for s in found.stretches) >= 0


def test_gradients_that_stay_are_added_to_what_is_alive():
    """Against a backward pass that keeps them, on tensors that have values."""
    model = LlamaForCausalLM(deepcopy(LLAMA)).train()
    model.set_attn_implementation(PER_DOCUMENT)
    head, count, tokens, trained = LossHead(model.get_output_embeddings()), TensorTracker(ACTIVATIONS), 7, 5
    for tensor in (*model.parameters(), *model.buffers()):
        count.ignore(tensor)
    inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "position_ids": torch.arange(tokens)[None]}
    inputs |= {"cu_seq_lens_q": torch.tensor([0, 4, 7], dtype=torch.int32), "max_length_q": 4}
    positions, targets = (torch.zeros(trained, dtype=torch.int64) for _ in range(2))
    with count:
        summed_loss(model, inputs, positions, targets, head, padding_free=True).backward()
    expected = trace_activations(LLAMA, [4, 3], trained=trained)
    assert sum(expected.peak.values()) == count.peak.total
    assert 0 < expected.peak[GRADIENTS] <= sum(p.grad.nbytes for p in model.parameters())


def test_what_is_known_of_activations():
    base = trace_activations(LLAMA, [40, 40])
    assert set(base.retained) == {ACTIVATIONS, LOGITS}
    double = trace_activations(LLAMA, [40] * 4)
    assert double.retained[ACTIVATIONS] == pytest.approx(2 * base.retained[ACTIVATIONS], rel=0.02)
    lean = trace_activations(LLAMA, [40, 40], activation_checkpointing=True)
    assert lean.retained[ACTIVATIONS] < base.retained[ACTIVATIONS] / 3
    assert sum(base.peak_freeing.values()) <= sum(base.peak.values())
    assert GRADIENTS in lean.peak
    assert GRADIENTS not in lean.peak_freeing


def test_a_large_model_is_traced_without_allocating_it():
    """Seven billion parameters in fp32 are 27 GB; the trace itself needs next to nothing."""
    large = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    before = peak_bytes("cpu")
    found = trace_activations(large, [2048], precision="bf16", half_weights=True, on_gpu=False)
    assert sum(found.retained.values()) > 5e9
    assert peak_bytes("cpu") - before < 500_000_000


def test_a_model_that_cannot_be_traced_is_said_to_be():
    """Its experts' products have no fp32 form on a CPU that could be traced."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("mixtral", vocab_size=300, num_hidden_layers=1, num_local_experts=4, **sizes)
    with pytest.raises(UserError, match=r"MixtralConfig cannot be traced .* only its states can be predicted"):
        trace_activations(config, [8])


def test_allocations_count_storages_once_and_see_them_go():
    with TensorTracker() as count:
        a = torch.zeros(1000)
        view = a[10:].view(-1, 10)
        assert count.held == {"activations": 4000}
        with count.owned_by("logits and loss"):
            b = a * 2
        count.phase = "backward"
        assert count.held == {"activations": 4000, "logits and loss": 4000}
        del a
        assert count.held["activations"] == 4000, "the view keeps it alive"
        del view
        assert count.held["activations"] == 0
        del b
    assert count.peak.total == 8000
    assert count.peak.phase == "forward"
    assert count.timeline == [("forward", 4000), ("forward", 8000), ("backward", 4000), ("backward", 0)]


def test_an_owner_found_out_later_holds_from_the_beginning():
    with TensorTracker() as count:
        a = torch.zeros(1000)
        gone = torch.zeros(500)
        del gone
        count.name(a, "gradients")
    count.name(torch.zeros(1), "unknown to it")
    assert count.held["gradients"] == 4000
    assert count.summary()["peak"] == {
        "phase": "forward",
        "total": 6000,
        "held": {"gradients": 4000, "activations": 2000},
    }


# --- models whose layers differ ------------------------------------------------------------------------------

DEEPSEEK = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 32},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
}
QWEN = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
}
# Their experts' products are traced in half precision only.
DIFFERENT = [
    *[("deepseek_v3", DEEPSEEK | {"num_hidden_layers": 12, "first_k_dense_replace": n}) for n in (0, 1, 2, 3, 4, 6)],
    ("deepseek_v3", DEEPSEEK | {"num_hidden_layers": 20, "first_k_dense_replace": 3}),
    ("qwen3_moe", QWEN | {"num_hidden_layers": 12, "decoder_sparse_step": 2}),
    ("qwen3_moe", QWEN | {"num_hidden_layers": 15, "decoder_sparse_step": 2}),
    ("qwen3_moe", QWEN | {"num_hidden_layers": 12, "decoder_sparse_step": 3}),
    ("qwen3_moe", QWEN | {"num_hidden_layers": 12, "mlp_only_layers": [2, 7]}),
]


def same_bytes(found, whole):
    assert sum(found.retained.values()) == sum(whole.retained.values())
    for which in ("peak", "peak_freeing", "reducing"):
        assert sum(getattr(found, which).values()) == sum(getattr(whole, which).values()), which
    parameters = whole.stretches[-1].arrived
    for kept in (10**4, 10**7):
        most = [max(sum(s.held.values()) + kept * s.arrived // parameters for s in d.stretches) for d in (found, whole)]
        assert most[0] == most[1]


@pytest.mark.parametrize(
    ("lengths", "checkpointing"),
    [([8, 4], True), ([150, 100], False)],
    ids=["gradients weigh more", "activations weigh more"],
)
@pytest.mark.parametrize(("kind", "sizes"), DIFFERENT, ids=[f"{k} {i}" for i, (k, _) in enumerate(DIFFERENT)])
def test_layers_that_differ_are_extended_in_their_order_or_traced_whole(kind, sizes, lengths, checkpointing):
    config = AutoConfig.for_model(kind, **sizes)
    settings = PLAIN | {"precision": "bf16", "half_weights": True, "activation_checkpointing": checkpointing}
    settings |= {"lengths": lengths, "trained": None}
    same_bytes(_all_layers(config, **settings), _trace(config, **settings))


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("gemma2", **(QWEN | {"num_hidden_layers": 17})),
        AutoConfig.for_model("qwen2", **(QWEN | {"num_hidden_layers": 14, "use_sliding_window": True})),
        AutoConfig.for_model("smollm3", **(QWEN | {"num_hidden_layers": 21, "pad_token_id": 0})),
        GPT2Config(vocab_size=301, n_embd=32, n_layer=13, n_head=4, scale_attn_by_inverse_layer_idx=True),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_of_equal_shapes_that_compute_differently(config):
    settings = PLAIN | {"trained": None}
    same_bytes(_all_layers(config, **settings), _trace(config, **settings))


def test_the_shape_of_deepseek_v3_is_traced_in_few_layers(monkeypatch):
    """61 layers, the first three dense: six and seven of them stand for all."""
    config = AutoConfig.for_model("deepseek_v3", **(DEEPSEEK | {"num_hidden_layers": 61, "first_k_dense_replace": 3}))
    traced = []
    monkeypatch.setattr(
        "minisft.zero.activation_trace._trace",
        lambda c, **options: traced.append(c.num_hidden_layers) or _trace(c, **options),
    )
    trace_activations(config, [8], precision="bf16", half_weights=True)
    assert traced == [6, 7]


@pytest.mark.attack("12")
def test_a_loop_over_tokens_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("minisft.zero.activation_trace.MOST_CALLS", 2000)
    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=12)
    assert trace_activations(config, [4]).retained
    with pytest.raises(UserError, match="more than 2,000 calls of PyTorch: ask about fewer or shorter rows"):
        trace_activations(config, [100_000_000])
