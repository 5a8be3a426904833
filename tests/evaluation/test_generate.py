"""Many at once as one at a time, and one at a time as transformers' own `generate`."""

import random

import pytest
import torch

from minisft.evaluation import generate as generate_module
from minisft.evaluation.generate import generate_batched, generate_stream

EOS, PAD = 2, 0


def model_of(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 60}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**(size | heads | changes), eos_token_id=EOS, pad_token_id=PAD)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 8
        model.lm_head.weight[EOS] *= 1.5  # so that rows end, each at its own time
    return model


@pytest.fixture(
    scope="module", params=[{}, {"num_key_value_heads": 6}, {"attn": "eager"}], ids=["grouped", "all", "eager"]
)
def model(request):
    changes = dict(request.param)
    attention = changes.pop("attn", "sdpa")
    made = model_of(**changes)
    made.set_attn_implementation(attention)
    return made


def prompts_of(count, seed=0):
    chance = random.Random(seed)
    return [[1, *(chance.randrange(3, 60) for _ in range(chance.randint(1, 40)))] for _ in range(count)]


def one_at_a_time(model, prompt, most):
    """transformers' own greedy decoding."""
    given = torch.tensor([prompt])
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[0, len(prompt) :].tolist()
    return (found[: found.index(EOS)], True) if EOS in found else (found, False)


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_batches_answer_as_generate_does_one_by_one(model, batch_size):
    prompts = prompts_of(24)
    found = {
        r.index: (r.ids, r.stopped)
        for r in generate_batched(model, prompts, stop_ids=[EOS], pad_id=PAD, max_new_tokens=50, batch_size=batch_size)
    }
    assert [found[i] for i in range(24)] == [one_at_a_time(model, p, 50) for p in prompts]
    assert {stopped for _, stopped in found.values()} == {True, False}, "both kinds are tried"


@pytest.mark.parametrize("batched", [True, False])
def test_a_reply_ends_at_each_of_several_stop_tokens_as_in_transformers(model, monkeypatch, batched):
    monkeypatch.setattr(generate_module, "_supports_batches", lambda _: batched)
    prompts = prompts_of(8)
    alone = {i: one_at_a_time(model, p, 30)[0] for i, p in enumerate(prompts)}
    other = next(ids for ids in alone.values() if len(ids) > 3)[2]  # a token that some reply has inside
    found = {
        r.index: r
        for r in generate_batched(model, prompts, stop_ids=[EOS, other], pad_id=PAD, max_new_tokens=30, batch_size=8)
    }
    for i, ids in alone.items():
        kept = ids[: ids.index(other)] if other in ids else ids
        assert found[i].ids == kept
        assert found[i].stopped == (other in ids or one_at_a_time(model, prompts[i], 30)[1])
        assert list(generate_stream(model, prompts[i], stop_ids=[EOS, other], max_new_tokens=30)) == kept


def test_what_begins_another_prompt_is_read_with_it(model):
    """The questions of a conversation, and one that is asked twice."""
    long = prompts_of(1, seed=9)[0] + prompts_of(3, seed=8)[2]
    prompts = [long[:4], long, long[:9], [1, 7, 8], long[:4], [1, 7]]
    tokens = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    found = {
        r.index: r.ids
        for r in generate_batched(model, prompts, stop_ids=[-1], pad_id=PAD, max_new_tokens=12, batch_size=6)
    }
    handle.remove()
    assert tokens[0] == len(long) + 3
    alone = [
        next(generate_batched(model, [p], stop_ids=[-1], pad_id=PAD, max_new_tokens=12, batch_size=1)).ids
        for p in prompts
    ]
    assert [found[i] for i in range(6)] == alone


@pytest.mark.parametrize("name", ["READ_AT_ONCE", "HELD_AT_ONCE"])
def test_in_small_portions_the_answers_are_the_same(model, monkeypatch, name):
    def found():
        return sorted(
            (r.index, r.ids)
            for r in generate_batched(
                model, prompts_of(20), stop_ids=[EOS], pad_id=PAD, max_new_tokens=10, batch_size=20
            )
        )

    whole = found()
    monkeypatch.setattr(generate_module, name, 60)
    assert found() == whole


def test_the_attention_of_the_model_is_as_before(model):
    before = model.config._attn_implementation
    list(generate_batched(model, prompts_of(2), stop_ids=[EOS], pad_id=PAD, max_new_tokens=2, batch_size=2))
    assert model.config._attn_implementation == before


def test_a_stream_says_what_a_batch_says(model):
    for prompt in prompts_of(4):
        said = list(generate_stream(model, prompt, stop_ids=[EOS], max_new_tokens=20))
        assert said == one_at_a_time(model, prompt, 20)[0]


def test_a_row_that_ended_is_computed_no_longer(model):
    sizes = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    found = list(generate_batched(model, prompts_of(24), stop_ids=[EOS], pad_id=PAD, max_new_tokens=50, batch_size=24))
    handle.remove()
    assert sizes[0] == 1, "all prompts are read as one row, and give a token each"
    assert sum(sizes[1:]) == sum(len(r.ids) + r.stopped for r in found) - 24


def tiny(kind):
    import transformers as hf

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 60}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(1)
    if kind == "sliding window":
        return hf.MistralForCausalLM(hf.MistralConfig(**small, **heads, sliding_window=8))
    if kind == "learned positions":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60))
    if kind == "a state and no keys":
        return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=60))
    if kind == "positions by the longest row":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(**(small | heads | {"max_position_embeddings": 70}), rope_parameters=rope)
        )
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4}
    heads |= {"num_key_value_heads": 4, "first_k_dense_replace": 2}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**small, **heads, **ranks))


KINDS = [
    "sliding window",
    "learned positions",
    "a state and no keys",
    "positions by the longest row",
    "values of another size",
]


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_past_and_position(kind):
    made = tiny(kind).eval()
    prompts = prompts_of(7, seed=4)
    found = {
        r.index: r.ids
        for r in generate_batched(made, prompts, stop_ids=[EOS], pad_id=PAD, max_new_tokens=20, batch_size=4)
    }
    assert [found[i] for i in range(7)] == [one_at_a_time(made, p, 20)[0] for p in prompts]
    assert list(generate_stream(made, prompts[0], stop_ids=[EOS], max_new_tokens=20)) == found[0]


def test_an_answer_ends_where_the_positions_end():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    made = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=32)).eval()
    prompts = [[1] + [5] * n for n in (9, 24, 31, 40)]
    found = {
        r.index: r for r in generate_batched(made, prompts, stop_ids=[-1], pad_id=PAD, max_new_tokens=20, batch_size=4)
    }
    assert [len(found[i].ids) for i in range(4)] == [20, 7, 0, 0]
    assert not any(r.stopped for r in found.values())
    assert len(list(generate_stream(made, prompts[1], stop_ids=[-1], max_new_tokens=20))) == 7
