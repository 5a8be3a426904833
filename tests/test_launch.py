"""Preparing a run: everything that can be wrong is said here, before a process starts."""

import json
import shlex
import shutil

import pytest
from conftest import sharegpt_row

from minisft import launch as launching
from minisft import preflight, training_data
from minisft.commands import commands, explain
from minisft.errors import UserError
from minisft.launch import prepare
from minisft.runs import RunConfig
from minisft.zero_config import STRATEGIES


@pytest.fixture
def config(tiny_model, small_data):
    def make(strategy="zero2", **changes):
        return RunConfig.course(strategy, **({"model": str(tiny_model), "data": str(small_data)} | changes))

    return make


def test_the_run_folder_holds_what_the_worker_and_the_evaluation_need(config):
    from minisft.training_data import load_rows

    run = prepare(config(max_characters=None))
    assert run.status == "prepared"
    assert run.config == config(max_characters=None)
    train = load_rows(run.folder / "data")
    test = (run.folder / "data" / "test.jsonl").read_text().splitlines()
    assert len(train) + len(test) == 120
    assert len(test) == 12
    assert {json.loads(line)["id"] for line in test}.isdisjoint(train["id"])
    assert run.ledger["stages"]["raw"]["rows"] == 120
    assert run.ledger["stages"]["truncated"] == {
        "rows": len(train),
        "tokens": sum(map(len, train["input_ids"])),
        "estimated": False,
    }
    assert run.versions["torch"]
    zero = run.deepspeed["zero_optimization"]
    assert zero["stage"] == 2
    assert run.deepspeed["train_batch_size"] == 8


def test_a_second_run_that_wants_the_same_rows_takes_a_copy(config, monkeypatch, small_data, tmp_path):
    calls = []
    real = launching.write_data
    monkeypatch.setattr(launching, "write_data", lambda *a: calls.append(1) or real(*a))
    first = prepare(config(max_characters=None))
    second = prepare(config("vanilla", max_characters=None))
    assert len(calls) == 1
    assert second.ledger == first.ledger
    names = sorted(p.name for p in (first.folder / "data").iterdir())
    for name in names:
        assert (second.folder / "data" / name).read_bytes() == (first.folder / "data" / name).read_bytes()

    changes = {"max_length": 64, "truncation": "drop", "train_on": "last", "seed": 1, "eval_rows": 3, "max_rows": 9}
    changes |= {"test_fraction": 0.2, "max_characters": 200, "template": "v3"}
    assert {"max_length", "template", *changes} == set(training_data.MATTERS)
    for number, (name, value) in enumerate(changes.items(), 2):
        prepare(config("vanilla", **({"max_characters": None} | {name: value})), overwrite=True)
        assert len(calls) == number, name

    (first.folder / "data" / "test.jsonl").write_text("{}\n")
    prepare(config("ddp", max_characters=None))
    assert len(calls) == len(changes) + 2, "what is no longer as it was written is not taken"
    other = tmp_path / "other.json"
    other.write_text(small_data.read_text())
    prepare(config("zero0", max_characters=None, data=str(other)))
    assert len(calls) == len(changes) + 3


@pytest.mark.parametrize("strategy", ["vanilla", "ddp", "zero0", "zero1", "zero2", "zero3"])
def test_the_command_in_the_folder_is_the_strategys(config, strategy):
    run = prepare(config(strategy))
    words = shlex.split(run.command)
    assert words[-1] == str(run.folder)
    assert ("deepspeed" in words) == (run.deepspeed is not None) == strategy.startswith("zero")
    assert commands(run.config, run.folder)[0].words[-1] == words[-1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_word_of_a_command_is_explained(config, strategy, tmp_path):
    command = commands(config(strategy), tmp_path / "a b; rm 'c'")[0].words
    parts = explain(command)
    assert [word for part in parts for word in part.words] == command
    assert shlex.split(shlex.join(command)) == command
    assert all(part.meaning for part in parts)


def test_two_commands_have_two_ports(config):
    a, b = (commands(config(), launching.outputs_root())[0].words for _ in range(2))
    port = a.index("--master_port") + 1
    assert a[port] != b[port]


def test_bad_data_leaves_an_existing_run_alone(config, tmp_path):
    run = prepare(config())
    (run.folder / "DONE").write_text("{}")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"text": "Add", "label": "3"}]))
    with pytest.raises(UserError, match="row of an unknown shape"):
        prepare(config(data=str(bad)), overwrite=True)
    assert run.status == "done"
    assert not list(run.folder.parent.glob(".*.preparing"))


def test_conversations_that_all_are_too_long_are_refused(config, tmp_path):
    file = tmp_path / "long.json"
    rows = [sharegpt_row(f"r{i}", ("human", "word " * 500), ("gpt", "ok")) for i in range(3)]
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="no training row is left"):
        prepare(config(data=str(file)))


def test_too_little_disk_for_the_checkpoints_is_said_at_once(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="no space left for 2 checkpoints"):
        prepare(config())


def test_fp16_without_a_gpu_is_refused(config):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        prepare(config(precision="fp16"))


def test_an_edited_deepspeed_configuration_is_linted_before_anything_starts(config):
    run = prepare(config())
    file = run.folder / "deepspeed.json"
    edited = json.loads(file.read_text())
    edited["zero_optimization"]["reduce_buckett_size"] = 1
    file.write_text(json.dumps(edited))
    with pytest.raises(
        UserError, match=r"deepspeed.json cannot .*reduce_buckett_size.*did you mean reduce_bucket_size"
    ):
        launching.launch(run)
    assert not (run.folder / "logs").exists()


def test_importing_minisft_loads_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = "import sys, minisft, minisft.runs, minisft.cli; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_program_that_is_not_installed_is_named_before_anything_starts(config, monkeypatch):
    run = prepare(config())
    monkeypatch.setattr(launching.operators, "build_environment", lambda: {"PATH": "/nowhere"})
    with pytest.raises(UserError, match=r"there is no deepspeed in this environment: .*setup.sh"):
        launching.launch(run, say=lambda line: None)
    assert run.status == "prepared"
