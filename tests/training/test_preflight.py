"""What does not fit is said before anything starts."""

import pytest
from transformers import LlamaConfig

from minisft import system
from minisft.errors import UserError
from minisft.launch.launch_run import prepare
from minisft.model.configs import model_config
from minisft.run.config import RunConfig
from minisft.training.preflight import activation_bytes, require_fit, run_state_bytes, warn_of_memory

MODEL = LlamaConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=512)


@pytest.mark.parametrize(
    ("changes", "rows", "says"),
    [
        ({"max_length": 513}, 100, "max length is 513, and the model has 512 positions"),
        ({"max_length": 512, "accumulation": 2}, 15, "15 training rows do not fill one global batch of 16"),
        ({"max_length": 512}, 0, "no training row is left"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_sentence(changes, rows, says):
    with pytest.raises(UserError, match=says) as error:
        require_fit(RunConfig(**changes), MODEL, rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2-offload", "zero3-offload"])
def test_offloaded_states_are_not_on_the_gpu(strategy):
    config = RunConfig(strategy=strategy, ranks=2)
    everywhere, there = (run_state_bytes(config, MODEL, "bf16", on_gpu) for on_gpu in (False, True))
    assert (there < everywhere / 2) == strategy.endswith("offload")


def test_too_little_memory_is_a_warning_with_both_numbers(monkeypatch):
    config, said = RunConfig(max_length=512), []
    need = run_state_bytes(config, MODEL, "fp32", False) + activation_bytes(config, MODEL, "fp32")
    for free in (need - 1, need + 1):
        monkeypatch.setattr(system, "memory", lambda free=free: (2 * need, free))
        warn_of_memory(config, MODEL, "fp32", False, said.append)
    assert len(said) == 1
    assert f"about {need / 1e9:.1f} GB of memory" in said[0]
    assert "are free" in said[0]


def test_activation_checkpointing_and_half_precision_need_less():
    sizes = [
        activation_bytes(RunConfig(activation_checkpointing=again), MODEL, precision)
        for again in (False, True)
        for precision in ("fp32", "bf16")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tiny_model, small_data, tmp_path, own_outputs):
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="code of its own: read it, and give --trust-remote-code"):
        model_config(folder, trust_remote_code=False)
    with pytest.raises(UserError):
        prepare(RunConfig.course(model=str(folder), data=str(small_data)), say=lambda line: None)
    assert not (tmp_path / "ran").exists()
