"""A model grows for the tokens that a template adds, and each new row starts from the text it stands for."""

import pytest
import torch
from samples import A

from minisft.chat.mistral import VERSIONS
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.errors import UserError
from minisft.labels.encode_row import encode
from minisft.model.loading import load_model


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = request.param
    if not request.param:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_new_rows_start_as_the_mean_of_their_text(folder, version):
    tokenizer = HuggingFaceTokenizer(folder, version)
    before = load_model(folder, HuggingFaceTokenizer(folder))
    model = load_model(folder, tokenizer)
    names = VERSIONS[version].control_tokens
    had = before.config.vocab_size
    assert len(tokenizer.hf) - had == len(names)
    assert model.config.vocab_size == len(tokenizer.hf) == had + len(names)
    tied = before.lm_head.weight is before.model.embed_tokens.weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    for old, new in (
        (before.model.embed_tokens.weight, model.model.embed_tokens.weight),
        (before.lm_head.weight, model.lm_head.weight),
    ):
        assert torch.equal(new[:had], old)
        for name in names:
            spelt = tokenizer.encode(name, after="text")
            assert len(spelt) > 1
            torch.testing.assert_close(new[tokenizer.control_id(name)], old[spelt].mean(dim=0))


def test_the_grown_model_computes_with_the_new_rows_and_is_loaded_as_it_was_saved(folder, tmp_path):
    tokenizer = HuggingFaceTokenizer(folder, "v3")
    model = load_model(folder, tokenizer).eval()
    row = encode(A, template_for(tokenizer), tokenizer, 99)
    ids = torch.tensor([row.input_ids])
    assert ids.max() == len(tokenizer.hf) - 1
    logits = model(ids).logits
    assert logits.shape[-1] == len(tokenizer.hf)
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] += 1  # training: what is saved must come back, not start again
    model.save_pretrained(tmp_path / "checkpoint")
    again = load_model(tmp_path / "checkpoint", tokenizer)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_model_with_room_for_the_tokens_does_not_grow(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path, "v7")
    assert len(tokenizer.hf) <= model.config.vocab_size
    assert torch.equal(load_model(tmp_path, tokenizer).model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_folder_without_a_model_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="not a checkpoint that transformers can load"):
        load_model(tmp_path, HuggingFaceTokenizer(tiny_model))
