"""Models without weights: which of their layers are alike, and how large they may be."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, GPT2Config

from minisft.errors import UserError
from minisft.model.configs import with_layers
from minisft.model.meta_model import layer_kinds, meta_model, repetition, shallow

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 300, "num_hidden_layers": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def config_of(kind, **more):
    return AutoConfig.for_model(kind, **(SIZES | more))


def letters(config):
    """Its layers as letters, equal ones alike."""
    kinds = layer_kinds(meta_model(config))
    known = list(dict.fromkeys(kinds))
    return "".join("abcdefghijklm"[known.index(kind)] for kind in kinds)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of("llama"), "a" * 12),
        (config_of("qwen2"), "a" * 12),
        (GPT2Config(n_embd=32, n_head=4, n_layer=12, vocab_size=300), "a" * 12),
        (config_of("qwen3_moe", **EXPERTS, decoder_sparse_step=1), "a" * 12),
        (config_of("qwen3_moe", **EXPERTS, decoder_sparse_step=2), "ab" * 6),
        (config_of("qwen3_moe", **EXPERTS, mlp_only_layers=[3]), "aaabaaaaaaaa"),
        # alike by their shapes, not by what they do
        (config_of("gemma2", head_dim=8), "ab" * 6),
        (config_of("smollm3", pad_token_id=0, no_rope_layer_interval=4), "aaab" * 3),
        (config_of("qwen2", use_sliding_window=True, max_window_layers=5), "aaaaa" + "b" * 7),
    ],
)
def test_layers_are_alike_if_they_compute_the_same(config, expected):
    found = letters(config)
    assert found == expected
    few = letters(with_layers(config, 8))
    assert few == expected[:8]


def test_a_model_without_a_list_of_layers_has_none():
    model = meta_model(config_of("llama"))
    model.config.num_hidden_layers = 7
    assert layer_kinds(model) == []
    assert repetition([]) == (0, 1)


@given(
    st.lists(st.integers(0, 2), max_size=4),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.integers(2, 8),
    st.integers(0, 3),
)
def test_what_repeats_does_so_up_to_the_last(prefix, period, times, more):
    """Against its definition; and with what is traced of it, nothing is left out but whole periods."""
    known = [("kind", i) for i in range(3)]
    kinds = [known[i] for i in [*prefix, *period * times, *period[:more]]]
    start, length = repetition(kinds)
    assert all(kinds[i] == kinds[i + length] for i in range(start, len(kinds) - length))
    few = shallow(len(kinds), start, length)
    assert few + length <= shallow(len(kinds), len(prefix), len(period)) + len(period)
    assert (len(kinds) - few) % length == 0
    assert few - start >= 2 * length
    if few < len(kinds):
        assert kinds[:few] + kinds[few - length : few] * ((len(kinds) - few) // length) == kinds


def test_with_layers_cuts_all_that_is_listed_by_layer():
    config = config_of("smollm3", pad_token_id=0, no_rope_layer_interval=4)
    few = with_layers(config, 5)
    assert few.no_rope_layers == [1, 1, 1, 0, 1]
    assert len(few.layer_types) == few.num_hidden_layers == 5
    assert len(config.layer_types) == config.num_hidden_layers == 12


@pytest.mark.attack("12")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_of("llama", num_hidden_layers=10**7), "more than 1,000 modules"),
        (config_of("llama", hidden_size=2**24, intermediate_size=2**24), r"has \d\.\de\+16 parameters"),
        (config_of("llama", hidden_size=2**40), "Storage size calculation overflowed"),
        (config_of("llama", vocab_size=-5), "negative dimension"),
        (config_of("llama", hidden_act="nope"), "KeyError"),
    ],
    ids=["layers", "sizes", "tensors", "negative", "nonsense"],
)
def test_what_no_model_can_have_is_one_sentence_in_seconds(config, said, monkeypatch):
    monkeypatch.setattr("minisft.model.meta_model.MOST_MODULES", 1000)
    began = time.perf_counter()
    with pytest.raises(UserError, match=said) as error:
        meta_model(config)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - began < 10


def test_a_meta_model_is_the_model_without_values():
    config = config_of("llama", tie_word_embeddings=True)
    from transformers import AutoModelForCausalLM

    real, without = AutoModelForCausalLM.from_config(config), meta_model(config)
    pairs = zip(real.named_parameters(), without.named_parameters(), strict=True)
    assert all((a, p.shape) == (b, q.shape) for (a, p), (b, q) in pairs)
    assert {p.device for p in without.parameters()} == {torch.device("meta")}
    assert without.get_output_embeddings().weight is without.get_input_embeddings().weight
    assert all(a is b for a, b in pairwise(layer_kinds(without)))
