"""Model folders from others: no code runs, no tensor is guessed, and every error is one sentence."""

import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import minisft
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minisft import processes
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data import model_folder
from minisft.data.model_folder import INDEX, WEIGHTS, not_finite_reason, weight_files
from minisft.errors import UserError
from minisft.evaluation.answers import ask
from minisft.launch.launch_run import prepare
from minisft.model.configs import model_config
from minisft.model.loading import load_model
from minisft.run.config import RunConfig
from minisft.training.checkpoint_health import checkpoint_problem, model_problem

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
}


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_json(file, **changes):
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    changed = change(weights)
    save_file(weights if changed is None else changed, folder / WEIGHTS, metadata={"format": "pt"})


# --- one check at every entrance -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_run(tiny_model, small_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISFT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        config = RunConfig.course(model=str(tiny_model), data=str(small_data), max_characters=None)
        return prepare(config, say=lambda _: None)


def by_preparing(folder, small_data, a_run):
    with pytest.raises(UserError) as error:
        prepare(RunConfig.course(model=str(folder), data=str(small_data)), say=lambda _: None)
    return str(error.value)


def by_command(folder, small_data, a_run):
    done = minisft("launch", "-s", "vanilla", "-m", folder, "-d", small_data, "--max-steps", 2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    return done.stderr


def by_loading(folder, small_data, a_run):
    with pytest.raises(UserError) as error:
        load_model(folder, HuggingFaceTokenizer(folder))
    return str(error.value)


def by_asking(folder, small_data, a_run):
    with pytest.raises(UserError) as error:
        ask(folder, ["who is there?"])
    return str(error.value)


ENTRANCES = {
    "preparing a run": by_preparing,
    "minisft launch": by_command,
    "loading": by_loading,
    "a question": by_asking,
    "the examination": lambda folder, *_: model_problem(folder),
    "the check of a run's checkpoint": lambda folder, _, run: checkpoint_problem(run, folder),
}


@pytest.mark.attack("8")
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_model_that_lacks_a_layer_is_refused_at_every_entrance(folder, small_data, a_run, own_outputs, entrance):
    edit_weights(folder, lambda w: {name: t for name, t in w.items() if ".layers.1." not in name})
    said = ENTRANCES[entrance](folder, small_data, a_run)
    assert "the tensor model.layers.1.input_layernorm.weight and 8 more are missing" in said
    assert "\n" not in said.strip()
    assert not any((own_outputs / "model").glob("[!.]*")), "refused, and yet something was prepared"


@pytest.mark.attack("8")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_model_with_a_value_that_is_not_finite_is_refused(folder, small_data, a_run, own_outputs, entrance, value):
    edit_weights(folder, lambda w: w["model.norm.weight"].__setitem__(3, value))
    said = ENTRANCES[entrance](folder, small_data, a_run)
    assert "1 of the 32 values of model.norm.weight are not finite" in said


@pytest.mark.attack("8")
@settings(max_examples=25)
@given(data=st.data())
def test_a_model_is_sound_only_with_all_of_its_tensors(tiny_model, tmp_path_factory, data):
    """Oracle: tensors that transformers would fill with random numbers, or would ignore."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "model")
    names = sorted(load_file(folder / WEIGHTS))
    gone = data.draw(st.sets(st.sampled_from(names), max_size=3))
    more = data.draw(st.sets(st.sampled_from(["model.layers.2.mlp.up_proj.weight", "value_head.weight"])))
    edit_weights(
        folder,
        lambda w: {n: t for n, t in w.items() if n not in gone} | {n: torch.zeros(2, 2) for n in more},
    )
    found = model_problem(folder)
    assert bool(found) == bool(gone or more)
    assert re.search("(is|are) missing", found) if gone else "not part of" in found if more else found == ""
    with pytest.raises(UserError) if found else pytest.MonkeyPatch.context():
        load_model(folder, HuggingFaceTokenizer(folder))


@pytest.mark.attack("8")
@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
    values=st.lists(st.sampled_from([0.0, 1.5, -3.0, math.nan, math.inf, -math.inf]), min_size=1, max_size=12),
)
def test_every_value_is_looked_at(tmp_path_factory, dtype, values):
    file = tmp_path_factory.mktemp("w") / "x.safetensors"
    tensor = torch.tensor(values).to(dtype)
    save_file({"x": tensor, "count": torch.tensor([1]), "none": torch.empty(0)}, file)
    bad = int((~torch.isfinite(tensor.float())).sum())
    assert not_finite_reason([file]) == (f"{bad} of the {len(values)} values of x are not finite" if bad else "")


@pytest.mark.attack("9")
def test_values_are_looked_at_once_for_each_content(folder, tmp_path, monkeypatch):
    assert model_problem(folder) == ""
    copy = shutil.copytree(folder, tmp_path / "copy")
    looked, look = [], model_folder._bad_values
    monkeypatch.setattr(model_folder, "_bad_values", lambda file: looked.append(file) or "")
    assert model_problem(folder) == model_problem(copy) == "" and looked == []
    monkeypatch.setattr(model_folder, "_bad_values", look)
    before = (folder / WEIGHTS).stat()
    edit_weights(folder, lambda w: w["model.norm.weight"].__setitem__(0, math.nan))
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / WEIGHTS).stat().st_size == before.st_size
    assert "not finite" in model_problem(folder)


def test_values_are_looked_at_without_a_cache(folder, monkeypatch):
    def nowhere():
        raise UserError("there is no home folder for the cache")

    for memory in (nowhere, lambda: Path("/dev/null")):
        monkeypatch.setattr("minisft.checksums.memory_folder", memory)
        assert model_problem(folder) == ""


# --- models as they really come ---------------------------------------------------------------------------------


def as_on_the_hub(weights):
    """GPT-2's weights: without the prefix of the base model, and with buffers that no model reads."""
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    for layer in range(2):
        weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64), f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    return weights


def with_inv_freq(weights):
    return weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}


def with_head_stored_too(weights):
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def with_head_stored_alone(weights):
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


LLAMA = ("LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 2})
TIED = (*LLAMA[:2], LLAMA[2] | {"tie_word_embeddings": True})
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400, "n_positions": 64}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
GENUINE = {
    "untied head": (*LLAMA, None, {}),
    "several files": (*LLAMA, None, {"max_shard_size": "30KB"}),
    "rotary buffers of an older version": (*LLAMA, with_inv_freq, {}),
    "tied": (*TIED, None, {}),
    "tied, the head stored too": (*TIED, with_head_stored_too, {}),
    "tied, the head stored alone": (*TIED, with_head_stored_alone, {}),
    "GPT-2 as on the hub": ("GPT2LMHeadModel", "GPT2Config", GPT2, as_on_the_hub, {}),
    "GPT-2 without its head": ("GPT2Model", "GPT2Config", GPT2, None, {}),
    "experts, saved one by one": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SMALL | MOE, None, {}),
    "half precision": (*LLAMA, lambda w: {name: t.to(torch.bfloat16) for name, t in w.items()}, {}),
}


@pytest.mark.parametrize("kind", GENUINE)
def test_genuine_models_are_sound(tmp_path, kind):
    import transformers

    model, config, settings_, change, how = GENUINE[kind]
    made = getattr(transformers, model)(getattr(transformers, config)(**settings_))
    made.save_pretrained(tmp_path / "model", **how)
    if change is not None:
        edit_weights(tmp_path / "model", change)
    assert model_problem(tmp_path / "model") == ""


def test_links_to_files_elsewhere_are_read(folder, tmp_path):
    """As in the hub's own cache."""
    for file in list(folder.iterdir()):
        blob = file.rename(tmp_path / f"blob-{file.name}")
        file.symlink_to(blob)
    assert model_problem(folder) == ""
    load_model(folder, HuggingFaceTokenizer(folder))


# --- code that comes with a model --------------------------------------------------------------------------------


def their_code(folder, mark):
    (folder / "theirs.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): model_type = 'theirs'\nclass M(LlamaForCausalLM): config_class = C\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )


class Payload:
    """A pickle that runs code when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def pickles(folder, mark):
    names = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
        torch.save(Payload(mark), folder / f"zip-{name}")


def weights_as_pickle(folder, mark):
    pickles(folder, mark)
    (folder / WEIGHTS).unlink()


def index_of_a_pickle(folder, mark):
    pickles(folder, mark)
    names = sorted(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}))


def auto_map(**more):
    def change(folder, mark):
        their_code(folder, mark)
        edit_json(
            folder / "config.json",
            auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M", "AutoModel": "theirs.M"},
            **more,
        )

    return change


def tokenizer(**values):
    def change(folder, mark):
        their_code(folder, mark)
        edit_json(folder / "tokenizer_config.json", **values)

    return change


def model_as_tokenizer(folder, mark):
    """transformers would ask on standard input whether to run the code of the model that it takes for a tokenizer."""
    auto_map(model_type="theirs")(folder, mark)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="AutoModel")


def custom_generate(folder, mark):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\ndef generate(*a, **k): pass\n")
    edit_json(folder / "generation_config.json", custom_generate="custom_generate", penalty_alpha=0.6, top_k=4)


def template(folder, mark):
    escape = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    (folder / "chat_template.jinja").write_text(escape)
    edit_json(folder / "tokenizer_config.json", chat_template=escape)


def modules(folder, mark):
    for name in ("json", "torch", "transformers", "tokenizers", "safetensors"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")


def config(**values):
    return lambda folder, mark: edit_json(folder / "config.json", **values)


WAYS = {
    "a model of its own": auto_map(model_type="theirs"),
    "a model of its own under a known name": auto_map(),
    "a model of another repository": config(
        model_type="theirs", auto_map={"AutoConfig": "someone/else--m.C", "AutoModelForCausalLM": "someone/else--m.M"}
    ),
    "a tokenizer of its own": tokenizer(auto_map={"AutoTokenizer": ["theirs.T", "theirs.T"]}, tokenizer_class="T"),
    "a tokenizer of its own under a known name": tokenizer(auto_map={"AutoTokenizer": [None, "theirs.T"]}),
    "a model in the place of the tokenizer": model_as_tokenizer,
    "the same, by config.json": config(tokenizer_class="AutoModelForCausalLM"),
    "a tokenizer that looks for another": tokenizer(tokenizer_class="AutoTokenizer"),
    "a way of generating": custom_generate,
    "attention from a hub": config(attn_implementation="someone/kernel"),
    "attention from a hub, in private": config(_attn_implementation="someone/kernel@main:forward"),
    "attention from a hub for a part": config(attn_implementation={"": "someone/kernel"}),
    "attention of a package": config(attn_implementation="flash_attention_3"),
    "experts from a hub": config(experts_implementation="deepgemm"),
    "quantization, whose kernels come from a hub": config(quantization_config={"quant_method": "mxfp4"}),
    "an adapter": lambda folder, mark: (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/else", "peft_type": "LORA"})
    ),
    "weights as a pickle": weights_as_pickle,
    "an index that names a pickle": index_of_a_pickle,
    "pickles beside the weights": pickles,
    "a chat template": template,
    "modules beside the weights": modules,
}
HARMLESS = {
    "a model of its own under a known name",
    "a tokenizer of its own under a known name",
    "a way of generating",
    "pickles beside the weights",
    "a chat template",
    "modules beside the weights",
}


@pytest.mark.attack("1")
@pytest.mark.parametrize("way", WAYS)
def test_no_code_of_a_model_folder_runs_without_consent(folder, small_data, tmp_path, monkeypatch, way):
    """Whatever its files contain, and even if a library asks for consent and the answer is yes."""
    import socket

    mark = tmp_path / "ran"
    WAYS[way](folder, mark)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *name, **_: asked.append(name) or [])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    monkeypatch.chdir(tmp_path)
    refused = []
    for attempt in (
        lambda: model_problem(folder) and refused.append("flaw"),
        lambda: model_config(folder, trust_remote_code=False),
        lambda: HuggingFaceTokenizer(folder),
        lambda: load_model(folder, HuggingFaceTokenizer(tmp_path / "sound")),
        lambda: ask(folder, ["who is there?"], max_new_tokens=2),
        lambda: prepare(RunConfig.course(model=str(folder), data=str(small_data)), say=lambda _: None),
    ):
        try:
            attempt()
        except UserError as error:
            refused.append(str(error))
            assert "\n" not in str(error)
    assert not mark.exists(), "it ran"
    assert asked == [], "the network was asked"
    assert sys.stdin.read(2) == "y\n", "somebody was asked for consent"
    if way not in HARMLESS:
        assert refused


@pytest.fixture(autouse=True)
def a_sound_tokenizer(tiny_model, tmp_path):
    (tmp_path / "sound").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "sound")


def test_code_runs_with_consent(folder, tmp_path):
    auto_map(model_type="theirs")(folder, tmp_path / "ran")
    (tmp_path / "ran").unlink(missing_ok=True)
    load_model(folder, HuggingFaceTokenizer(tmp_path / "sound"), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


# --- what reaches the terminal ------------------------------------------------------------------------------------


@pytest.mark.attack("13")
def test_no_escape_of_a_model_folder_reaches_the_terminal(tiny_model, small_data, tmp_path, capfd):
    """Covers the folder's name, the JSON keys and the tensor names."""
    folder = shutil.copytree(tiny_model, tmp_path / "m\x1b[31m\x9b2J")
    edit_weights(folder, lambda w: w | {"evil\x1b[31m": torch.zeros(1)})
    edit_json(folder / "config.json", **{"\x1b]0;k\x07": 1, "rope_parameters": {"\x1b[5m": 1, "rope_type": "default"}})
    HuggingFaceTokenizer(folder)
    done = minisft("launch", "-s", "vanilla", "-m", folder, "-d", small_data)
    assert done.returncode == 2 and r"evil\x1b[31m is not part of the model" in done.stderr
    with pytest.raises(UserError):
        load_model(folder, HuggingFaceTokenizer(folder))
    shown = "".join(capfd.readouterr()) + done.stdout + done.stderr
    assert not set(shown) & {"\x1b", "\x9b", "\x07"}, shown


@pytest.mark.attack("13")
def test_what_transformers_logs_of_a_folder_is_harmless():
    """transformers warns about some tokenizers and quotes the name of their folder."""
    code = (
        "from minisft.data.model_folder import clean_logs\nclean_logs()\nfrom transformers.utils import logging\n"
        "logging.get_logger('transformers.x').warning('a \\x1b[31m %s', '\\x9b')"
    )
    done = processes.run(processes.python("-c", code))
    assert done.stderr.endswith("a \\x1b[31m \\u009b\n") and not set(done.stderr) & {"\x1b", "\x9b"}


# --- files that are not what they should be -----------------------------------------------------------------------


def header(length, text=b"", data=b""):
    return struct.pack("<Q", length) + text + data


def one_tensor(**changes):
    about = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    text = json.dumps({"x": about}).encode()
    return header(len(text), text, b"\0" * 8)


HEADERS = {
    "nothing": b"",
    "four bytes": b"1234",
    "a length without end": header(2**63),
    "a length beyond the file": header(10**6, b"{}"),
    "no JSON": header(3, b"abc"),
    "a list": header(2, b"[]"),
    "deep JSON": header(200_000, b"[" * 200_000),
    "an unknown type": one_tensor(dtype="F33"),
    "a negative size": one_tensor(shape=[-2]),
    "a size without end": one_tensor(shape=[2**62, 2**62]),
    "offsets outside": one_tensor(data_offsets=[0, 2**60]),
    "offsets backwards": one_tensor(data_offsets=[8, 0]),
    "bytes between": one_tensor(shape=[1], data_offsets=[4, 8]),
}


@pytest.mark.attack("15")
@pytest.mark.parametrize("kind", HEADERS)
def test_an_absurd_header_is_one_sentence(folder, kind):
    (folder / WEIGHTS).write_bytes(HEADERS[kind])
    said = model_problem(folder)
    assert said.startswith("model.safetensors cannot be read (") and "\n" not in said
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_model(folder, HuggingFaceTokenizer(folder))


OUTSIDE = ["../else.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", "", "a\x1b[31m.safetensors/", "."]


@pytest.mark.attack("7")
@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_safetensors_of_its_own_folder(folder, tmp_path, name):
    (folder / "sub").mkdir()
    for place in (tmp_path / "else.safetensors", folder / "sub" / "x.safetensors", folder / "x.bin"):
        shutil.copy(folder / WEIGHTS, place)
    names = sorted(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    assert "which is not a safetensors file of this folder" in model_problem(folder)
    with pytest.raises(UserError, match="not a safetensors file of this folder"):
        weight_files(folder)


def two_files_with_one_tensor(folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"] + 1}, folder / "b.safetensors")
    where = dict.fromkeys(weights, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def other_weights(folder):
    edit_weights(folder, lambda w: {name: tensor * 0 for name, tensor in w.items()})
    (folder / WEIGHTS).rename(folder / "other.safetensors")


ELSEWHERE = {
    "one tensor in two files": (two_files_with_one_tensor, r"model\.norm\.weight is in a\.safetensors and in b\.s"),
    "other files by config.json": (
        lambda folder: edit_json(folder / "config.json", transformers_weights="other.safetensors"),
        "names other weight files",
    ),
    "files of several ranks": (
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "shard-00001-model-00001-of-00001.safetensors"),
        "split over ranks",
    ),
    "quantized in a part": (
        lambda folder: edit_json(folder / "config.json", text_config={"quantization_config": {"quant_method": "fp8"}}),
        "its weights are quantized",
    ),
}


@pytest.mark.attack("8")
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_is_examined_is_what_is_loaded(folder, kind):
    """transformers would read other files than the usual ones, or two tensors of one name."""
    change, said = ELSEWHERE[kind]
    change(folder)
    assert re.search(said, model_problem(folder))
    with pytest.raises(UserError, match=said):
        load_model(folder, HuggingFaceTokenizer(folder))


@pytest.mark.attack("12")
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "n_layer", "head_dim", "n_positions", "num_local_experts", "vocab_size"]
)
@pytest.mark.parametrize("count", [10**8, 10**12, 10**30])
@pytest.mark.parametrize("part", [False, True])
def test_numbers_without_end_are_refused_at_once(folder, key, count, part):
    """transformers would allocate lists and tables of that size before it reads a tensor."""
    edit_json(folder / "config.json", **({"text_config": {key: count}} if part else {key: count}))
    assert f"asks for {count} ({key})" in model_problem(folder)
    for attempt in (lambda: model_config(folder, False), lambda: HuggingFaceTokenizer(folder)):
        with pytest.raises(UserError, match=f"asks for {count} "):
            attempt()


@pytest.mark.attack("12")
def test_more_layers_than_tensors_are_not_built(folder):
    edit_json(folder / "config.json", num_hidden_layers=999)
    assert model_problem(folder) == "config.json asks for 999 layers, but there are only 20 tensors"


JSONS = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]
JSONS += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
CONTENTS = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "a text": b'"x"',
    "no JSON": b"{ damaged",
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "lists where texts belong": json.dumps(
        {key: [{}] for key in ("model_type", "hidden_size", "auto_map", "tokenizer_class", "eos_token", "dtype")}
    ).encode(),
    "objects where numbers belong": json.dumps(
        {key: {} for key in ("vocab_size", "eos_token_id", "num_hidden_layers", "added_tokens", "model", "weight_map")}
    ).encode(),
}


@pytest.mark.attack("15")
@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_json_of_any_shape_is_read_or_refused_in_one_sentence(folder, name, kind):
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(CONTENTS[kind])
    assert "\n" not in model_problem(folder)
    for attempt in (
        lambda: HuggingFaceTokenizer(folder),
        lambda: model_config(folder, False),
        lambda: load_model(folder, HuggingFaceTokenizer(folder)),
    ):
        try:
            attempt()
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.attack("15")
@pytest.mark.parametrize("name", [*JSONS, WEIGHTS, "README.md", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "broken link", "endless link"])
def test_what_is_not_a_file_is_not_waited_for(folder, small_data, name, kind):
    if name == "model-00001-of-00002.safetensors":
        names = sorted(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    file = folder / name
    file.unlink(missing_ok=True)
    {
        "pipe": os.mkfifo,
        "folder": lambda file: file.mkdir(),
        "broken link": lambda file: file.symlink_to("nowhere"),
        "endless link": lambda file: file.symlink_to(file.name),
    }[kind](file)
    assert "\n" not in model_problem(folder)
    for attempt in (
        lambda: load_model(folder, HuggingFaceTokenizer(folder)),
        lambda: prepare(RunConfig.course(model=str(folder), data=str(small_data)), say=lambda _: None),
    ):
        try:
            attempt()
        except UserError as error:
            assert "\n" not in str(error)
