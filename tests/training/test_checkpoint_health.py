"""Checkpoints broken in every way that transformers would load, or load half, without a word."""

import json
import re
import shutil

import pytest
import torch
from conftest import save_checkpoint, write_manifest
from safetensors.torch import load_file, save_file

from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig
from minisft.training.checkpoint_health import checkpoint_problem

EMBEDDING = "model.embed_tokens.weight"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def prepared(tiny_model, small_data, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    patch = pytest.MonkeyPatch()
    patch.setenv("MINISFT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    run = prepare(
        RunConfig.course(model=str(tiny_model), data=str(small_data), max_characters=None), say=lambda _: None
    )
    patch.undo()
    save_checkpoint(AutoModelForCausalLM.from_pretrained(tiny_model), tiny_model, run.folder / "checkpoint-3")
    return run


@pytest.fixture
def checkpoint(prepared, tmp_path):
    return shutil.copytree(prepared.checkpoints[0], tmp_path / "checkpoint-3")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def poison(weights):
    weights[NAME][3, 5] = float("nan")


def untie(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).clone()


def as_shards(folder):
    (folder / "model.safetensors").unlink()
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")


def flip_a_byte(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def weights(change):
    return lambda folder: edit_weights(folder, change)


def hidden_by_a_sound_index(folder):
    """A single file of NaN, which transformers reads first, beside shards that are sound."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    edit_weights(folder, poison)
    spoilt = (folder / "model.safetensors").read_bytes()
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").write_bytes(spoilt)


def index_of(value):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))

    return change


BREAK = {
    "the file that is read first is spoilt": (hidden_by_a_sound_index, "are not finite"),
    "half of the layers are ignored": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1),
        "and 8 more are not part of the model in config.json",
    ),
    "an index without files": (index_of({"weight_map": []}), "does not map each tensor to a file"),
    "an index with numbers": (index_of({"weight_map": {"a": 5}}), "does not map each tensor to a file"),
    "an unknown activation": (
        lambda folder: edit_json(folder / "config.json", hidden_act="nonesuch"),
        "cannot be examined .*nonesuch",
    ),
    "an impossible vocabulary": (
        lambda folder: edit_json(folder / "config.json", vocab_size=-1),
        "vocab_size to -1: give at least 1",
    ),
    "a manifest without files": (
        lambda folder: (folder / "manifest.json").write_text('{"step": 3}'),
        "manifest.json does not name",
    ),
    "an empty template": (lambda folder: (folder / "chat_template.jinja").write_text(""), "no chat template"),
    "an empty tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(""), "tokenizer"),
    "more tokens than embeddings": (
        lambda folder: (
            edit_json(folder / "config.json", vocab_size=300),
            edit_weights(folder, lambda w: w.update({EMBEDDING: w[EMBEDDING][:300].clone()})),
        ),
        "its tokenizer has 321 tokens, but its model has embeddings for 300",
    ),
    "a tensor is missing": (weights(lambda w: w.pop(NAME)), f"the tensor {NAME} is missing"),
    "the embedding is missing": (
        weights(lambda w: w.pop("model.embed_tokens.weight")),
        "the tensor lm_head.weight and 1 more are missing",
    ),
    "a tensor is empty": (weights(lambda w: w.update({NAME: torch.empty(0)})), f"{NAME} is empty, but its config.json"),
    "a shape differs": (
        lambda folder: edit_json(folder / "config.json", intermediate_size=48),
        r"has the shape \[32, 64\], but its config.json requires \[32, 48\]",
    ),
    "a value is not finite": (weights(poison), f"1 of the 2048 values of {NAME} are not finite"),
    "tied weights are lost": (weights(untie), "differs from .*, but its config.json ties the two"),
    "the output layer is not there": (
        lambda folder: edit_json(folder / "config.json", tie_word_embeddings=False),
        "the tensor lm_head.weight is missing",
    ),
    "weights are cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors cannot be read",
    ),
    "a byte is flipped": (flip_a_byte, "model.safetensors differs from its checksum"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors"),
    "stage 3 shards": (as_shards, "still split over the ranks"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "another architecture": (
        lambda folder: edit_json(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "another architecture: a gpt2 model, and the run's is llama",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "it has no tokenizer.json"),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
}


def test_a_sound_checkpoint_has_no_ailment(prepared, checkpoint):
    assert checkpoint_problem(prepared, checkpoint) == ""


@pytest.mark.parametrize("kind", BREAK)
def test_what_is_wrong_is_said_in_one_line(prepared, checkpoint, kind):
    spoil, said = BREAK[kind]
    spoil(checkpoint)
    if kind not in ("a byte is flipped", "a manifest without files"):
        write_manifest(checkpoint)
    found = checkpoint_problem(prepared, checkpoint)
    assert "\n" not in found
    assert re.search(said, found)


def test_several_files_are_read_and_a_missing_one_is_named(prepared, checkpoint, tiny_model):
    from transformers import AutoModelForCausalLM

    (checkpoint / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(checkpoint, max_shard_size="50KB")
    files = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(files) > 1
    write_manifest(checkpoint)
    assert checkpoint_problem(prepared, checkpoint) == ""
    files[1].unlink()
    assert checkpoint_problem(prepared, checkpoint) == f"{files[1].name} is missing"


def test_a_reloaded_checkpoint_has_the_logits_of_the_live_model(tiny_model, small_data):
    """Bit for bit: vanilla in fp32, saved at its last step, beside the model that is still in memory."""
    from minisft.model.loading import load_model
    from minisft.training.build_trainer import make_trainer
    from minisft.training.heartbeat import Heartbeat

    settings = {
        "max_steps": 2,
        "save_steps": 2,
        "max_characters": None,
        "learning_rate": 1e-2,
        "memory_timeline": False,
    }
    run = prepare(RunConfig.course(model=str(tiny_model), data=str(small_data), **settings), say=lambda _: None)
    trainer = make_trainer(run, 0, 1, on_gpu=False, checkpoint=None, heartbeat=Heartbeat(run.folder, 0))
    trainer.train()
    (checkpoint,) = run.checkpoints
    assert checkpoint_problem(run, checkpoint) == ""
    tokenizer = HuggingFaceTokenizer(tiny_model)
    live, loaded = trainer.model.eval(), load_model(checkpoint, tokenizer).eval()
    live.set_attn_implementation("sdpa")
    ids = torch.tensor([tokenizer.encode("the cat sat on a mat and saw red rain")])
    with torch.inference_mode():
        found = [
            model(input_ids=ids, use_cache=False).logits for model in (live, loaded, load_model(tiny_model, tokenizer))
        ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]), "training changed nothing"


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox", "float8"])
def test_models_that_are_saved_under_other_names_are_sound(tiny_model, small_data, tmp_path, kind, own_outputs):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**small, vocab_size=400))
    else:
        model = MixtralForCausalLM(MixtralConfig(**small, vocab_size=400, num_local_experts=4, num_key_value_heads=2))
    save_checkpoint(model, tiny_model, tmp_path / "model")
    run = prepare(
        RunConfig.course(model=str(tmp_path / "model"), data=str(small_data), max_characters=None), say=lambda _: None
    )
    folder = run.folder / "checkpoint-2"
    save_checkpoint(model, tiny_model, folder)
    if kind == "float8":
        edit_weights(folder, lambda w: w.update({name: t.to(torch.float8_e4m3fn) for name, t in w.items()}))
        write_manifest(folder)
    assert checkpoint_problem(run, folder) == ""
    assert checkpoint_problem(run, run.model_folder) == ""
