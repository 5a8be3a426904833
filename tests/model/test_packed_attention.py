"""Padding-free must be the same computation as one row at a time."""

import pytest
import torch
from samples import ROWS
from transformers import AutoModelForCausalLM

from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free
from minisft.training.collators import PaddingFree, PadRight

MORE = [*ROWS, {"input_ids": [1, *range(50, 90), 2], "labels": [-100] * 10 + list(range(59, 90)) + [2]}]


@pytest.fixture
def models(tiny_model):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    packed = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert supports_padding_free(packed)
    packed.set_attn_implementation(PER_DOCUMENT)
    return plain, packed


def forward(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


def test_logits_and_gradients_equal_row_by_row(models):
    plain, packed = models
    batch = PaddingFree()(MORE)
    logits = forward(packed, batch)
    alone = torch.cat([forward(plain, PadRight(0)([row])) for row in MORE], dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    targets = batch["labels"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum").backward()
    for row in MORE:
        plain(**PadRight(0)([row]), num_items_in_batch=1).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_changing_one_row_never_moves_another(models):
    _, packed = models
    changed = [{**MORE[0], "input_ids": [1, 9, 9, 2]}, *MORE[1:]]
    first = len(MORE[0]["input_ids"])
    before, after = forward(packed, PaddingFree()(MORE)), forward(packed, PaddingFree()(changed))
    assert not torch.equal(before[:, :first], after[:, :first])
    assert torch.equal(before[:, first:], after[:, first:])


def test_no_row_is_predicted_from_the_row_before():
    rows = [{"input_ids": [3, 4], "labels": [3, 4]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    assert PaddingFree()(rows)["labels"].tolist() == [[-100, 4, -100, 6]]
