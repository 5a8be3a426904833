"""A model's own template: answers stop, are scored and are continued as they were trained."""

import json
import shutil

import pytest
import torch
from conftest import write_manifest

from minisft.evaluation.answers import Answer, ask
from minisft.evaluation.eval_set import load_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def model_with(tiny_model, tmp_path):
    """Makes a model folder with a chat template of its own, and control tokens for it."""
    from transformers import AutoTokenizer

    def make(template, tokens=("<|im_start|>",), eos="<|im_end|>"):
        folder = shutil.copytree(tiny_model, tmp_path / "own-model")
        fast = AutoTokenizer.from_pretrained(folder)
        fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *tokens]})
        fast.add_special_tokens({"eos_token": eos})
        fast.chat_template = template
        fast.save_pretrained(folder)
        return folder

    yield make
    load_template.cache_clear()


def make_it_say(folder, ids):
    """Give the model weights that choose the first of `ids` after any other token, and then the next ones."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.fill_(1.0 if "norm" in name else 0.0)
        embeddings[:, 0] = 1
        for i, token in enumerate(ids):
            head[token, i] = 1
            embeddings[token] = 0
            embeddings[token, i + 1] = 1
    model.save_pretrained(folder)
    write_manifest(folder)


def test_generation_stops_at_every_stop_token_of_the_model(model_with):
    folder = model_with(CHATML)
    tokenizer, _ = load_template(folder, "own")
    stop = tokenizer.control_id("</s>")
    make_it_say(folder, [*tokenizer.encode(" the cat"), stop])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, stop]}))
    load_template.cache_clear()
    assert ask(folder, ["red"], 9, "own") == [Answer("the cat", True)]
