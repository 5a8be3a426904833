"""The loss without full logits against the plain computation, and which models it may be used for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from minisft.labels.encode_row import IGNORE_INDEX
from minisft.model.loss import LossHead, linear_cross_entropy, supports_loss_head, trained_positions


@given(
    n=st.integers(1, 30),
    vocabulary=st.integers(2, 40),
    chunk=st.sampled_from([1, 100, 1 << 20]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_the_plain_computation(n, vocabulary, chunk, bias, seed):
    chance = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=chance, dtype=torch.float64).requires_grad_()

    tensors = [leaf(n, 7), leaf(vocabulary, 7)] + ([leaf(vocabulary)] if bias else [])
    targets = torch.randint(vocabulary, (n,), generator=chance)
    hidden, weight, *rest = tensors
    expected = cross_entropy(hidden @ weight.T + (rest[0] if rest else 0), targets, reduction="sum")
    found = linear_cross_entropy(hidden, weight, targets, *rest, chunk_bytes=chunk)
    torch.testing.assert_close(found, expected)
    scale = 0.37
    for a, b in zip(
        torch.autograd.grad(found * scale, tensors), torch.autograd.grad(expected * scale, tensors), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_second_backward_fails_and_is_not_wrong():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises((TypeError, RuntimeError)):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_ever_as_large_as_the_full_logits(dtype):
    n, vocabulary = 256, 2048
    hidden = torch.randn(n, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 16, dtype=dtype, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            out = function(*arguments, **(options or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        linear_cross_entropy(
            hidden, weight, torch.randint(vocabulary, (n,)), chunk_bytes=16 * vocabulary * 4
        ).backward()
    assert largest == max(16 * vocabulary, weight.numel()) < n * vocabulary


def test_positions_are_those_that_predict_a_trained_token():
    labels = torch.tensor([[7, IGNORE_INDEX, 5, 2], [IGNORE_INDEX, 4, IGNORE_INDEX, IGNORE_INDEX]])
    positions, targets = trained_positions(labels)
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [5, 2, 4]


def small(config_class, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return config_class(vocab_size=30, **(sizes | changes))


def test_models_that_scale_or_cap_their_logits_are_told_apart():
    import transformers as t

    plain = [small(t.LlamaConfig), small(t.MistralConfig, num_key_value_heads=2), small(t.GPTNeoXConfig)]
    assert all(supports_loss_head(config) for config in plain)
    other = [small(t.CohereConfig), small(t.GraniteConfig, logits_scaling=3.0), small(t.Gemma2Config, head_dim=8)]
    assert not any(supports_loss_head(config) for config in other)


def test_asking_changes_nothing_about_the_config(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    before = (model.config._attn_implementation, model.config.to_dict())
    assert supports_loss_head(model.config)
    assert (model.config._attn_implementation, model.config.to_dict()) == before


def test_the_layer_makes_logits_as_before_when_nobody_asks_for_a_loss(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(5, 15)[None]
    before = model(ids).logits
    head = LossHead(model.get_output_embeddings())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 4:] = ids[0, 4:]
    loss = head.loss(model, {"input_ids": ids}, *trained_positions(labels))
    torch.testing.assert_close(loss, cross_entropy(before[0, 3:-1], ids[0, 4:], reduction="sum"))
