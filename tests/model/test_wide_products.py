"""bf16 products by way of fp32: the numbers that a processor with bf16 would give."""

import torch
from torch.nn.functional import linear

from minisft.model.wide_products import _WideLinear, widen_linear_layers


def inputs(dtype):
    torch.manual_seed(0)
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, 5, 33), (17, 33), (17,))]


def test_values_and_gradients_are_those_of_bf16_up_to_one_rounding():
    for dtype in (torch.float32, torch.bfloat16):  # fp32 masters under autocast, or bf16 weights of an engine
        found = _WideLinear.apply(*(wide := inputs(dtype)))
        assert found.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            expected = linear(*(plain := inputs(dtype)))
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
        slope = torch.randn(found.shape).to(torch.bfloat16)
        found.backward(slope)
        expected.backward(slope)
        for a, b in zip(wide, plain, strict=True):
            assert a.grad.dtype == dtype
            torch.testing.assert_close(a.grad, b.grad, rtol=2**-6, atol=2**-5)


def test_the_error_against_exact_arithmetic_is_no_larger_than_native_bf16(tiny_model):
    """Widening may only be nearer to the truth: the sums are the same or better."""
    x, w, _ = (t.detach() for t in inputs(torch.float32))
    exact = x.bfloat16().double() @ w.bfloat16().double().T
    wide = (_WideLinear.apply(x, w, None).double() - exact).abs().max()
    native = (linear(x.bfloat16(), w.bfloat16()).double() - exact).abs().max()
    assert wide <= native * 1.01


def test_a_model_keeps_its_parameters_and_names(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    names = list(model.state_dict())
    ids = torch.arange(4, 20)[None]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids).logits
        widen_linear_layers(model)
        after = model(ids).logits
    assert list(model.state_dict()) == names
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
