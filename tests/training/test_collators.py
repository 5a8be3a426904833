import torch
from samples import ROWS

from minisft.training.collators import PadRight, pad_left


def test_the_labels_reach_the_model_unchanged_even_if_padding_is_eos():
    batch = PadRight(pad_id=2)(ROWS)
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 7, 2, -100]]
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [1, 7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_does_not_move_the_loss(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    both = model(**PadRight(0)(ROWS), num_items_in_batch=1).loss
    each = sum(model(**PadRight(0)([row]), num_items_in_batch=1).loss for row in ROWS)
    torch.testing.assert_close(both, each)


def test_prompts_are_padded_on_the_left():
    batch = pad_left([[1, 2, 3], [4]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
