"""`minisft memory` and `minisft lint`, as they are typed."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
from conftest import minisft

from minisft.errors import UserError
from minisft.launch.prepare_run import prepare
from minisft.run.config import RunConfig
from minisft.zero.memory_report import Batch, memory_of_model, memory_of_parameters
from minisft.zero.state_memory import OWNERS, total_bytes
from minisft.zero.strategies import STRATEGIES

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def test_a_folder_gives_every_stage_rank_owner_and_moment(tiny_model):
    done = minisft("memory", "--model", str(tiny_model), "--ranks", "2", "--max-length", "64", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["strategies"]) == set(STRATEGIES) - {"vanilla"}
    for found in report["strategies"].values():
        assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
        for rank in found["ranks"]:
            assert set(OWNERS) <= set(rank["at rest"])
            assert total_bytes(rank["at rest"]) <= total_bytes(rank["after backward"]) < total_bytes(rank["peak"])
    assert report["activations"]["bytes"] > 0
    assert report["formulas"]["zero3"]["buckets"]
    assert report["communication"]["zero2"]["reduce"] > 0


def test_seventy_billion_parameters_on_512_ranks(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B))
    report = memory_of_model(
        str(file), 512, "bf16", Batch(1, 2048, activation_checkpointing=True), say=lambda line: None
    )
    assert 68e9 < report.parameters < 70e9
    (rank,) = report.strategies["zero3"]["ranks"]
    assert 16 * report.parameters / 512 < total_bytes(rank["at rest"]) < 16 * report.parameters / 512 + 4e9
    report.add_plan(80e9)
    assert report.plan.best.strategy == "zero3"
    assert "zero3" in report.text()


def test_a_bare_number_is_the_papers_formula_and_says_so():
    report = memory_of_parameters(7.5e9, 64)
    assert report.strategies["zero3"]["states"] == 1_875_000_000
    assert "paper's formula alone" in report.text()


def test_a_model_that_cannot_be_traced_has_states_and_a_note(tmp_path):
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    about = {"model_type": "mixtral", "vocab_size": 300, "num_hidden_layers": 1, "num_local_experts": 4}
    file.write_text(json.dumps(about | sizes))
    report = memory_of_model(str(file), 2, "fp32", Batch(1, 8), say=lambda line: None)
    assert "only its states can be predicted" in report.note
    assert total_bytes(report.strategies["zero2"]["ranks"][0]["at rest"]) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--params", "0"], "give a number from 1"),
        (["--params", "7e9", "--ranks", "0"], "ranks is 0"),
        (["--model", "smollm2", "--accumulation", "0"], "accumulation is 0"),
        (["--params", "7e9", "--model", "smollm2"], "either --model or --params"),
        ([], "either --model or --params"),
        (["--params", "7e9", "--gpu-memory", "1"], "the GPU memory is"),
        (["--params", "7e9", "--gpu-memory", "inf"], "--gpu-memory is inf"),
        (["--params", "1e300"], "give a number from 1 to 1e+15"),
        (["--params", "7e9", "--precision", "int8"], "unknown precision 'int8'"),
        (["--params", "7e9", "--accumulation", "-4"], "accumulation is -4"),
        (["--model", "smollm2", "--batch-size", "100000"], "give at most 512"),
        (["--params", "nan"], "give a number from 1"),
        (["--params", "-1e308"], "give a number from 1"),
        (["--params", "7e9", "--ranks", "1000000000"], "give at most 100,000"),
        (["--params", "7e9", "--ranks", "-1"], "ranks is -1"),
        (["--params", "7e9", "--ranks", "1" + "0" * 400], "give at most 100,000"),
        (["--params", "7e9", "--ranks", "2.5"], "valid integer"),
        (["--params", "7e9", "--accumulation", "1" + "0" * 400], "give at most 1,000,000"),
        (["--params", "7e9", "--gpu-memory", "1e308"], "the GPU memory is"),
        (["--params", "7e9", "--gpu-memory", "-80"], "the GPU memory is"),
        (["--params", "7e9", "--gpu-memory", "nan"], "--gpu-memory is nan"),
        (["--model", "smollm2", "--batch-size", "0"], "batch size is 0"),
        (["--model", "smollm2", "--batch-size", "-8"], "batch size is -8"),
        (["--model", "smollm2", "--max-length", "0"], "max length is 0"),
        (["--model", "smollm2", "--max-length", "1" + "0" * 30], "give at most 268,435,455 for 8 rows"),
    ],
)
@pytest.mark.attack("12")
def test_bad_input_is_one_sentence(arguments, said):
    done = minisft("memory", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "4096"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 33},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"dtype": "float17"},
        {"hidden_act": "nope"},
        {"pad_token_id": 10**6},
        {"vocab_size": -5},
        {"model_type": ["llama"]},
    ],
)
def test_a_config_of_nonsense_is_one_sentence(tmp_path, change):
    """Given as a file or by its folder; what transformers makes sense of all the same is no traceback either."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 2} | change))
    for name in (file, tmp_path):
        done = minisft("memory", "--model", name, "--states-only")
        assert done.returncode in (0, 2)
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == (done.returncode == 2)


def test_a_config_may_be_a_file_as_transformers_writes_it(tmp_path):
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "vocab_size": 100, "num_heads": 4, "head_dim": 32}
    AutoConfig.for_model("mamba2", **sizes).save_pretrained(tmp_path)
    by_file, by_folder = (memory_of_model(str(p), 2, "bf16", None) for p in (tmp_path / "config.json", tmp_path))
    assert by_file.strategies == by_folder.strategies


def test_of_a_model_that_only_one_way_can_trace_that_one_is_known(tmp_path):
    """Mixtral's experts multiply in half precision alone on a CPU: so under ZeRO, and not under autocast."""
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    about = {"model_type": "mixtral", "vocab_size": 300, "num_hidden_layers": 1, "num_local_experts": 4}
    file.write_text(json.dumps(about | sizes))
    report = memory_of_model(str(file), 2, "bf16", Batch(1, 8), on_gpu=True)
    assert "peak" in report.strategies["zero2"]["ranks"][0]
    assert "peak" not in report.strategies["ddp"]["ranks"][0]
    assert report.note.startswith("for ddp, which keeps fp32 weights: ")
    report.add_plan(80e9)
    assert "activations are not counted" not in report.text()


def test_a_plan_without_activations_says_so(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B))
    report = memory_of_model(str(file), 64, "bf16", None)
    report.add_plan(80e9)
    assert report.text().endswith("(1.5 GB of each GPU are set aside for CUDA, and activations are not counted)")


def test_rows_are_no_longer_than_the_model_has_positions(tmp_path):
    file = tmp_path / "config.json"
    about = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 64}
    file.write_text(json.dumps(about))
    assert memory_of_model(str(file), 2, "bf16", Batch(1, None)).activations["length"] == 64
    with pytest.raises(UserError, match="max length is 65, and the model has 64 positions"):
        memory_of_model(str(file), 2, "bf16", Batch(1, 65))


def test_what_is_no_model_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[]")
    with pytest.raises(UserError, match="not a transformers config"):
        memory_of_model(str(file), 2, "bf16", None, say=lambda line: None)
    file.write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="transformers does not know"):
        memory_of_model(str(file), 2, "bf16", None, say=lambda line: None)
    file.write_text('{"model_type": "t5"}')
    for name in (str(file), str(tmp_path)):
        with pytest.raises(UserError, match="t5 model, which does not predict the next token"):
            memory_of_model(name, 2, "bf16", None, say=lambda line: None)
    with pytest.raises(UserError, match="ranks is 0"):
        file.write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 1}))
        memory_of_model(str(file), 0, "bf16", None, say=lambda line: None)


def test_lint_says_what_is_wrong_and_exits_1(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}})
    )
    done = minisft("lint", str(file))
    assert done.returncode == 0
    assert "does nothing at stage 2" in done.stdout
    done = minisft("lint", str(file), "--ranks", "3")
    assert done.returncode == 1
    assert "not a multiple of 3 ranks" in done.stdout
    assert minisft("lint", str(tmp_path / "none.json")).returncode == 2


# --- configs of anybody --------------------------------------------------------------------------------------

SMALL = LLAMA_70B | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
EXTREMES = [-(10**9), -1, 0, 1.5, 1e9, 10**6, 10**9, 10**18, 10**30, float("nan"), "4096", None, True, [64], {"a": 1}]


@pytest.mark.attack("12")
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", EXTREMES, ids=repr)
def test_a_size_of_any_kind_is_answered_in_seconds(tmp_path, key, value):
    """With an answer or a sentence; and what is answered has states of more than nothing."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL | {key: value}))
    began = time.perf_counter()
    done = minisft("memory", "--model", file, "--states-only", "--json")
    assert time.perf_counter() - began < 30
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    if key != "head_dim" and isinstance(value, int) and value < 1:
        assert done.returncode == 2
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1
        return
    report = json.loads(done.stdout)
    assert 0 < report["parameters"] <= 1e15
    assert all(total_bytes(found["ranks"][0]["at rest"]) > 0 for found in report["strategies"].values())


@pytest.mark.attack("12")
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SMALL | {"layer_types": ["full_attention"] * 10**6, "num_hidden_layers": 10**6}),
        json.dumps(SMALL | {"layer_types": ["full_attention"] * 10**5, "num_hidden_layers": 10**5}),
        json.dumps({"model_type": "gpt_neo", "num_layers": 10**9, "attention_types": [[["global"], 10**9]]}),
        json.dumps({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}),
        json.dumps({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}),
        json.dumps(SMALL | {"num_labels": 10**9}),
        '{"model_type": "llama", "a": ' + "[" * 10**6,
        '{"model_type": "llama", "a": ' + '{"a": ' * 10**5 + "1" + "}" * 10**5 + "}",
        '{"model_type": "llama", "num_hidden_layers": ' + "9" * 4000 + "}",
        '{"model_type": "llama", "num_hidden_layers": ' + "9" * 10**6 + "}",
        '{"model_type": "llama", "a": "' + "x" * 10**7 + '"}',
    ],
    ids=["types", "fewer types", "neo", "neo types", "inside", "labels", "no end", "deep", "digits", "more", "text"],
)
def test_a_config_without_end_is_one_sentence_in_seconds(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    began = time.perf_counter()
    for name in (file, tmp_path):
        done = minisft("memory", "--model", name)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert len(done.stderr) < 600
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(
            ({"quantization_config": {"quant_method": method, "bits": 4}}, "is of quantized weights")
            for method in ("gptq", "awq", "fp8", "bitsandbytes")
        ),
        *(
            ({"model_type": kind, f"{sense}_config": {"hidden_size": 8}}, f"takes more than text \\({sense}_config\\)")
            for kind, sense in [
                *((kind, "vision") for kind in ("qwen2_vl", "gemma3", "mistral3", "llama4", "idefics3", "qwen3_5")),
                ("qwen2_audio", "audio"),
                ("gemma3n", "audio"),
            ]
        ),
    ],
)
def test_quantized_and_multimodal_models_are_refused_for_what_they_are(tmp_path, tiny_model, small_data, change, says):
    """At both entrances, of memory and of training, in one sentence."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=says):
        memory_of_model(str(folder), 2, "bf16", None, say=lambda line: None)
    config = RunConfig.course("vanilla", model=str(folder), data=str(small_data), max_characters=None)
    with pytest.raises(UserError, match="quantiz" if "quant" in says else says):
        prepare(config, say=lambda line: None)


@pytest.mark.attack("15")
@pytest.mark.parametrize(
    "change",
    [
        {"text_config": 3},
        {"text_config": {"a": 1}},
        {"get_text_config": 3},
        {"to_dict": {}},
        {"__class__": "x"},
        {"attribute_map": {"hidden_size": "x"}},
        {"sub_configs": {}},
        {"architectures": 3, "model_type": "mixtral", "num_local_experts": 2},
        {"auto_map": 3},
        {"auto_map": {"AutoModelForCausalLM": 3}},
        {"rope_parameters": [1]},
        {"rope_theta": 0},
        {"dtype": {"a": 1}},
        {"quantization_config": 3},
        {"layer_types": {"a": 1}},
        {"pad_token_id": 10**30},
        {"eos_token_id": "x"},
        {"num_attention_heads": -1},
        {"max_position_embeddings": 0},
        {"\x1b[31m": 1, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "\x1b[31m": 1}},
        {"model_type": "\x1b[31m"},
        {"hidden_act": "\x1b[31m"},
    ],
    ids=repr,
)
def test_a_config_of_another_shape_is_no_traceback_and_gives_no_orders(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | change))
    done = minisft("memory", "--model", tmp_path / "config.json", "--max-length", "8")
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (done.returncode == 2)


@pytest.mark.attack("15")
@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"NaN", b"{,}", b"\xff\xfe", b"\0", b"{}", b'"x"'])
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for name in (tmp_path / "config.json", tmp_path):
        done = minisft("memory", "--model", name)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.attack("15")
def test_what_is_no_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder/config.json")
    for name in ("/dev/zero", tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "folder", "x" * 300):
        done = minisft("memory", "--model", name)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


# --- layers that differ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [0, 3])
def test_dense_first_layers_are_counted_as_such(tmp_path, monkeypatch, dense):
    """The whole report against that of every layer traced."""
    about = {
        **{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 1000},
        **{"hidden_size": 128, "intermediate_size": 512, "moe_intermediate_size": 64, "num_hidden_layers": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 32},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": dense},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(about))
    found = memory_of_model(str(file), 2, "bf16", Batch(1, 200), on_gpu=True).to_dict()
    monkeypatch.setattr("minisft.zero.activation_trace.DEEP", 10**6)
    assert found == memory_of_model(str(file), 2, "bf16", Batch(1, 200), on_gpu=True).to_dict()
    assert "peak" in found["strategies"]["zero3"]["ranks"][0]


@pytest.mark.attack("12")
def test_a_hundred_thousand_ranks_are_as_many_as_a_thousand(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B))
    reports = [memory_of_model(str(file), ranks, "bf16", None) for ranks in (100_000, 99_991)]
    for report in reports:
        report.add_plan(80e9)
        (rank,) = report.strategies["zero3"]["ranks"]
        assert 16 * report.parameters / report.ranks < total_bytes(rank["at rest"])
