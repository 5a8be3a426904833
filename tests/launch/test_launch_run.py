"""Preparing a run: everything that can be wrong is said here, before a process starts."""

import errno
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import sharegpt_row, write_manifest

from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.errors import UserError
from minisft.launch import launch_run as launching
from minisft.launch import prepare_run as preparing
from minisft.launch.commands import commands, explain, first_words
from minisft.launch.hosts import Host, Place
from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig
from minisft.run.folder import Run, all_runs
from minisft.training import preflight
from minisft.training import worker as training
from minisft.training.heartbeat import read_heartbeats
from minisft.zero.strategies import STRATEGIES


@pytest.fixture
def config(tiny_model, small_data):
    def make(strategy="zero2", **changes):
        return RunConfig.course(strategy, **({"model": str(tiny_model), "data": str(small_data)} | changes))

    return make


def test_the_run_folder_holds_what_the_worker_and_the_evaluation_need(config):
    from minisft.training.dataset import load_rows

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
    real = preparing.write_data
    monkeypatch.setattr(preparing, "write_data", lambda *a: calls.append(1) or real(*a))
    first = prepare(config(max_characters=None))
    second = prepare(config("vanilla", max_characters=None))
    assert len(calls) == 1
    assert second.ledger == first.ledger
    names = sorted(p.name for p in (first.folder / "data").iterdir())
    for name in names:
        assert (second.folder / "data" / name).read_bytes() == (first.folder / "data" / name).read_bytes()

    changes = {"max_length": 64, "truncation": "drop", "train_on": "last", "seed": 1, "eval_rows": 3, "max_rows": 9}
    changes |= {"test_fraction": 0.2, "max_characters": 200, "template": "v3"}
    assert {"max_length", "template", *changes} == set(config().values_that_shape_rows())
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
    a, b = (commands(config(), preparing.outputs_root())[0].words for _ in range(2))
    port = a.index("--master_port") + 1
    assert a[port] != b[port]


def test_bad_data_leaves_an_existing_run_alone(config, tmp_path):
    run = prepare(config())
    (run.folder / "DONE").write_text('{"steps": 1}')
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
    code = "import sys, minisft, minisft.run.folder, minisft.cli; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_program_that_is_not_installed_is_named_before_anything_starts(config, monkeypatch):
    run = prepare(config())
    monkeypatch.setattr(launching.cpu_comm_op, "build_environment", lambda: {"PATH": "/nowhere"})
    with pytest.raises(UserError, match=r"there is no deepspeed in this environment: .*setup.sh"):
        launching.launch(run, say=lambda line: None)
    assert run.status == "prepared"


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_no_run_is_not_replaced_unless_asked(config, own_outputs, what):
    place = own_outputs / "model" / "mine"
    kept = place / "notes.txt" if what == "folder" else place
    kept.parent.mkdir(parents=True)
    kept.write_text("a year of work")
    with pytest.raises(UserError, match=r"outputs/model/mine exists but is not a run folder: .*--name.*--overwrite"):
        prepare(config(name="mine"))
    assert kept.read_text() == "a year of work"
    assert prepare(config(name="mine"), overwrite=True).status == "prepared"
    assert not list(place.parent.glob(".*.removed"))


def test_a_run_on_another_disk_behind_a_link_is_replaced_there(config, own_outputs, tmp_path):
    there, link = tmp_path / "big" / "zero2", own_outputs / "model" / "zero2"
    there.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    link.symlink_to(there)
    run = prepare(config())
    (there / "DONE").write_text('{"steps": 1}')
    again = prepare(config(), overwrite=True)
    assert link.is_symlink()
    assert run.folder == again.folder == link
    assert again.status == "prepared"
    with preparing.only_one(link):
        assert Run(link).live
        assert Run(there).live
        with pytest.raises(UserError, match="being trained right now"):
            prepare(config(), overwrite=True)


def test_a_folder_that_is_being_prepared_is_no_run_yet(config, own_outputs):
    run = prepare(config())
    shutil.copytree(run.folder, run.folder.with_name(".zero2.preparing"))
    assert [found.name for found in all_runs()] == ["zero2"]


def test_a_relative_path_means_the_file_that_was_there(config, small_data, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(small_data, tmp_path / name / "rows.json")
    monkeypatch.chdir(tmp_path / "a")
    run = prepare(config(data="rows.json"))
    (run.folder / "DONE").write_text('{"steps": 1}')
    assert run.config.data == str(tmp_path / "a" / "rows.json")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match=r"other settings \(data .*a/rows.json -> .*b/rows.json"):
        prepare(config(data="rows.json"))


def test_a_run_from_before_paths_became_absolute_goes_on(config, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(small_data.parent)
    run = prepare(config(data=small_data.name))
    about = json.loads((run.folder / "run.json").read_text())
    about["config"]["data"] = small_data.name
    (run.folder / "run.json").write_text(json.dumps(about))
    (run.folder / "DONE").write_text('{"steps": 1}')
    assert prepare(config(data=small_data.name)).status == "done"


def test_a_link_to_what_is_not_there_is_named(config, own_outputs):
    (own_outputs / "model").mkdir(parents=True)
    (own_outputs / "model" / "zero2").symlink_to("/gone/zero2")
    with pytest.raises(UserError, match=r"zero2 is a link to /gone/zero2, which does not exist"):
        prepare(config())


def test_a_reason_that_could_not_be_written_is_no_damaged_run(config):
    run = prepare(config())
    (run.folder / "FAILED").touch()
    assert "is the disk full?" in run.failure["reason"]


def test_a_file_system_without_locks_takes_runs_all_the_same(config, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert not prepare(config()).live


def test_a_command_is_explained_though_its_path_has_a_line_in_it(config, monkeypatch, tmp_path):
    monkeypatch.setenv("MINISFT_OUTPUTS", str(tmp_path / "o\nu 't"))
    run = prepare(config())
    words = first_words((run.folder / "command.txt").read_text())
    assert [word for part in explain(words) for word in part.words] == words
    assert words[-1] == str(run.folder)


# --- what the worker itself refuses -------------------------------------------------------------------------


def worker(*words):
    return subprocess.run(
        [sys.executable, "-m", "minisft.training.worker", *map(str, words)], capture_output=True, text=True
    )


def test_a_worker_without_a_run_says_so_and_leaves_nothing(tmp_path):
    done = worker(tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("there is no run in ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_second_worker_of_a_run_is_refused(config):
    run = prepare(config("vanilla"))
    with preparing.only_one(run.folder):
        done = worker(run.folder)
    assert (done.returncode, done.stderr) == (2, "vanilla is being trained right now: wait for it, or stop it\n")
    # A rank that holds no lock is known by its sign.
    rank = subprocess.Popen([sys.executable, "-c", "input()", str(run.folder)], stdin=subprocess.PIPE)
    sign = {"rank": 0, "host": "localhost", "pid": rank.pid, "phase": "training", "step": 1, "micro_batch": 0}
    (run.folder / "ranks").mkdir()
    file = run.folder / "ranks" / "rank0.json"
    file.write_text(json.dumps(sign | {"began": {"training": time.time()}}))
    done = worker(run.folder)
    assert (done.returncode, done.stderr) == (2, "vanilla is being trained right now: wait for it, or stop it\n")
    assert not (run.folder / "logs").exists()
    # A process that is younger than the sign has its number by chance.
    file.write_text(json.dumps(sign | {"began": {"training": time.time() - 3600}}))
    assert not training._is_training(read_heartbeats(run.folder)[0], run)
    rank.communicate()


@pytest.mark.parametrize(
    ("before", "ends"), [([], True), (["nohup"], False), (["setsid"], False)], ids=["as it is", "nohup", "setsid"]
)
def test_a_run_ends_with_its_parent_unless_it_was_told_to_stay(before, ends):
    """From a shell without a terminal, as a notebook's cell is."""
    if before and shutil.which(before[0]) is None:
        pytest.skip(f"there is no {before[0]} here")
    code = "from minisft.launch.launch_run import _ends_with_parent; print(_ends_with_parent())"
    line = shlex.join([*before, sys.executable, "-c", code]) + "; true"
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # whoever started these tests
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, start_new_session=True, **heed)
    assert done.stdout.strip() == str(ends)


def test_what_is_said_of_an_interrupted_run_is_what_will_happen(config):
    run = prepare(config("vanilla"))
    said = "the same command starts it from the beginning (--resumable lets a run resume)"
    assert launching._resume_advice(run) == said
    (run.folder / "checkpoint-4").mkdir()
    (run.folder / "checkpoint-4" / "manifest.json").write_text('{"resumable": true}')
    assert launching._resume_advice(run) == "the same command resumes from checkpoint-4"
    (run.folder / "checkpoint-8").mkdir()
    (run.folder / "checkpoint-8" / "manifest.json").write_text("")  # a damaged file is a reason to stop
    assert "checkpoint-8/manifest.json is not valid JSON" in launching._resume_advice(run)
    assert "move" in launching._resume_advice(run)
    assert run.test_losses == {}


def test_a_line_for_another_host_waits_for_no_supervisor_that_nobody_starts(config, tmp_path):
    place = Place((Host("10.0.0.7", 1), Host("10.0.0.8", 1)))
    for supervised in ("", "a-mark"):
        lines = map(str, commands(config(), tmp_path, place, supervised))
        assert all(("MINISFT_SUPERVISOR=:0" in line) == bool(supervised) for line in lines)


@pytest.mark.attack("9")
def test_another_vocabulary_or_a_hidden_folder_makes_the_rows_anew(
    config, tiny_model, small_data, tmp_path, monkeypatch
):
    calls = []
    real = preparing.write_data
    monkeypatch.setattr(preparing, "write_data", lambda *a: calls.append(1) or real(*a))
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "merges.txt").write_text("#version: 0.2\n")
    data = tmp_path / "data"
    for name in ("x", "y"):
        (data / name).mkdir(parents=True)
        rows = json.loads(small_data.read_text())
        (data / name / f"{name}.json").write_text(json.dumps([row | {"id": name + row["id"]} for row in rows]))
    prepare(config("vanilla", model=str(model), data=str(data)))
    prepare(config("vanilla", model=str(model), data=str(data), name="same"))
    assert len(calls) == 1
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    prepare(config("vanilla", model=str(model), data=str(data), name="vocabulary"))
    assert len(calls) == 2
    (data / "x").rename(data / ".x")
    prepare(config("vanilla", model=str(model), data=str(data), name="hidden"))
    assert len(calls) == 3


@pytest.mark.attack("9")
def test_a_split_behind_a_link_makes_the_rows_anew(config, small_data, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    calls = []
    real = preparing.write_data
    monkeypatch.setattr(preparing, "write_data", lambda *a: calls.append(1) or real(*a))
    rows = json.loads(small_data.read_text())
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    prepare(config("vanilla", data=str(tmp_path / "data")))
    Dataset.from_list(rows[:-3]).save_to_disk(tmp_path / "elsewhere")
    prepare(config("vanilla", data=str(tmp_path / "data"), name="again"))
    assert len(calls) == 2


@pytest.mark.attack("9")
@pytest.mark.parametrize("what", ["data", "model"])
def test_a_finished_run_of_inputs_that_changed_is_not_the_run_asked_for(config, tiny_model, small_data, tmp_path, what):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    data = shutil.copy(small_data, tmp_path / "rows.json")
    settings = config("vanilla", model=str(model), data=str(data))
    run = prepare(settings, say=lambda line: None)
    (run.folder / "DONE").write_text('{"steps": 3}')
    assert prepare(settings, say=lambda line: None).status == "done"
    changed = data if what == "data" else model / "generation_config.json"
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(UserError, match=f"holds a run of the same settings, but the {what} .* has changed since"):
        prepare(settings, say=lambda line: None)
    assert (run.folder / "DONE").exists()


@pytest.mark.attack("9")
@pytest.mark.parametrize("gone", ["data", "model"])
@pytest.mark.parametrize("relative", [False, True])
def test_of_a_finished_run_the_inputs_that_are_left_are_compared(
    config, tiny_model, small_data, tmp_path, monkeypatch, gone, relative
):
    """A run whose other input is gone is still the run asked for, by the same path as before."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    data = shutil.copy(small_data, tmp_path / "rows.json")
    monkeypatch.chdir(tmp_path)
    names = ("./model", "rows.json") if relative else (str(model), str(data))
    settings = config("vanilla", model=names[0], data=names[1])
    run = prepare(settings, say=lambda line: None)
    (run.folder / "DONE").write_text('{"steps": 3}')
    if gone == "model":
        shutil.rmtree(model)
    else:
        data.unlink()
    assert prepare(settings, say=lambda line: None).status == "done"
    left = data if gone == "model" else model / "generation_config.json"
    left.write_text(left.read_text() + "\n")
    what = "data" if gone == "model" else "model"
    with pytest.raises(UserError, match=f"holds a run of the same settings, but the {what} .* has changed since"):
        prepare(settings, say=lambda line: None)


@pytest.mark.attack("9")
@pytest.mark.parametrize("what", ["data", "model"])
@pytest.mark.parametrize("restart", [False, True])
def test_an_interrupted_run_of_inputs_that_changed_is_not_resumed(
    config, tiny_model, small_data, tmp_path, what, restart
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    data = shutil.copy(small_data, tmp_path / "rows.json")
    settings = config("vanilla", model=str(model), data=str(data), resumable=True)
    said = []
    run = prepare(settings, say=said.append)
    rows = (run.folder / "data" / "train.arrow").read_bytes()
    changed = data if what == "data" else model / "generation_config.json"
    before = changed.read_text()

    if not restart:  # a run without a checkpoint is prepared anew
        changed.write_text(before.replace("1", "2") + "\n")
        run = prepare(settings, say=said.append)
        assert ((run.folder / "data" / "train.arrow").read_bytes() == rows) == (what == "model")
        changed.write_text(before)
        run = prepare(settings, say=said.append)

    (run.folder / "checkpoint-2").mkdir()
    (run.folder / "checkpoint-2" / "manifest.json").write_text('{"resumable": true}')
    changed.write_text(before + "\n")
    sentence = (
        f"holds an interrupted run of the same settings, but the {what} .* has changed since: put the old one back"
    )
    with pytest.raises(UserError, match=sentence):
        prepare(settings, restart=restart, say=said.append)
    assert (run.folder / "checkpoint-2" / "manifest.json").exists()
    changed.write_text(before)
    prepare(settings, restart=restart, say=said.append)
    assert said.pop() == "vanilla was interrupted: it resumes from checkpoint-2"


@pytest.mark.attack("9")
@pytest.mark.parametrize("folder", ["", "a", "a/b"])
def test_an_interrupted_run_resumes_without_its_data(config, small_data, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(small_data.parent, tmp_path / folder / "rows") / small_data.name
    data = data.relative_to(tmp_path) if folder else data
    said = []
    run = prepare(config("vanilla", data=str(data), resumable=True), say=said.append)
    (run.folder / "checkpoint-2").mkdir()
    (run.folder / "checkpoint-2" / "manifest.json").write_text('{"resumable": true}')
    data.unlink()
    prepare(config("vanilla", data=str(data), resumable=True), say=said.append)
    assert said.pop() == "vanilla was interrupted: it resumes from checkpoint-2"


@pytest.mark.attack("9")
def test_a_damaged_checkpoint_is_no_model_to_start_from(config, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "checkpoint-4")
    write_manifest(model)
    prepare(config("vanilla", model=str(model), name="sound"), say=lambda line: None)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-8:-4] = bytes(4)
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"is a damaged checkpoint: model\.safetensors differs from its checksum"):
        prepare(config("vanilla", model=str(model), name="damaged"), say=lambda line: None)


@pytest.mark.attack("9")
@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors.index.json", "more.safetensors"])
def test_a_file_that_is_added_to_the_start_model_is_noticed(config, tiny_model, tmp_path, name):
    from minisft.training.dataset import changed_model

    model = shutil.copytree(tiny_model, tmp_path / "model")
    run = prepare(config("vanilla", model=str(model)), say=lambda line: None)
    assert changed_model(run) == ""
    (model / name).write_text("{}")
    assert f"{name} was added after the run was prepared" in changed_model(run)
    assert bool(changed_model(run, weights=False)) == (not name.endswith(".safetensors"))


@pytest.mark.attack("9")
def test_a_template_in_a_folder_of_its_own_is_a_part_of_the_model(config, tiny_model, tmp_path):
    from minisft.training.dataset import changed_model

    model = shutil.copytree(tiny_model, tmp_path / "model")
    template = model / "additional_chat_templates" / "default.jinja"
    template.parent.mkdir()
    write = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
    template.write_text(write)
    run = prepare(config("vanilla", model=str(model), template="own"), say=lambda line: None)
    before = (run.folder / "data" / "train.arrow").read_bytes()
    template.write_text(write.replace("eos_token", "'.' + eos_token"))
    assert "default.jinja has changed" in changed_model(run)
    again = prepare(config("vanilla", model=str(model), template="own", name="again"), say=lambda line: None)
    assert (again.folder / "data" / "train.arrow").read_bytes() != before


@pytest.mark.attack("4")
def test_an_earlier_run_beside_another_is_not_removed(config):
    run = prepare(config("vanilla"))
    earlier = run.folder.with_name(f".{run.name}.removed")
    (earlier / "checkpoint-9").mkdir(parents=True)
    for settings in ({}, {"learning_rate": 0.5}):
        with pytest.raises(UserError, match=r"\.vanilla\.removed holds an earlier run"):
            prepare(config("vanilla", **settings), overwrite=bool(settings))
    assert (earlier / "checkpoint-9").exists()


@pytest.mark.attack("4")
def test_an_earlier_run_comes_back_into_an_empty_folder(config):
    run = prepare(config("vanilla"))
    (run.folder / "checkpoint-9").mkdir()
    (run.folder / "checkpoint-9" / "model.safetensors").write_bytes(b"weights")
    run.folder.rename(run.folder.with_name(f".{run.name}.removed"))  # as a killed replacement leaves it
    run.folder.mkdir()
    with pytest.raises(UserError):  # it holds weights, so it is not prepared from the beginning
        prepare(config("vanilla"))
    assert (run.folder / "checkpoint-9" / "model.safetensors").exists()


@pytest.mark.attack("9")
def test_test_rows_are_the_texts_of_the_data(config, tmp_path):
    """A file is judged for HTML escaping as a whole; its test side alone may look escaped and is not judged again."""
    rows = [
        sharegpt_row(f"e{i}", ("human", f"q{i}"), ("gpt", "write &lt;b&gt; for it and a &amp;&amp; b"))
        for i in range(32)
    ]
    rows += [sharegpt_row(f"p{i}", ("human", f"q{i}"), ("gpt", "if a < b && c > d")) for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for seed in range(4):
        settings = {"data": str(tmp_path / "rows.json"), "max_characters": None, "seed": seed, "name": f"s{seed}"}
        run = prepare(config("vanilla", **settings))
        written = {
            json.loads(line)["id"]: line for line in (run.folder / "data" / "test.jsonl").read_text().splitlines()
        }
        read_back = list(read(run.folder / "data" / "test.jsonl", Ledger(), is_clean=True))
        assert [c.id for c in read_back] == list(written)
        for conversation in read_back:
            assert (
                conversation.messages[-1].content in json.loads(written[conversation.id])["conversations"][-1]["value"]
            )
            assert ("&lt;" in conversation.messages[-1].content) == conversation.id.startswith("e")


@pytest.mark.attack("4")
def test_rotation_keeps_the_checkpoints_of_another_run(config):
    from minisft.training.checkpoints import rotate

    run = prepare(config("vanilla"))
    for step, owner in ((2, "another run"), (4, run.identity), (6, run.identity)):
        folder = run.folder / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"step": step, "run": owner, "files": {}}))
    rotate(run, keep=1)
    assert [folder.name for folder in run.checkpoints] == ["checkpoint-2", "checkpoint-6"]
