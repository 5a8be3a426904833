"""Runs that are killed, starved and damaged for real, and what becomes of them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from conftest import at_length, write_sharegpt
from safetensors.torch import load_file

from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.run.config import RunConfig
from minisft.run.folder import Run, checkpoint_step

pytestmark = pytest.mark.distributed
STEPS, EVERY = 16, 4
SMALL = {"max_characters": 100_000, "learning_rate": 1e-3, "resumable": True, "eval_rows": 8}


def config_of(strategy, model, data, **changes):
    settings = SMALL | {"max_steps": STEPS, "save_steps": EVERY, "model": str(model), "data": str(data)}
    return RunConfig.course(strategy, **(settings | changes))


def quiet(line):
    pass


def start(config):
    """The same command as a user's, in a process of its own."""
    command = [sys.executable, "-m", "minisft.cli", "launch", "--strategy", config.strategy, "--name", config.name]
    command += ["--model", config.model, "--data", config.data, "--max-steps", str(config.max_steps)]
    command += [
        "--save-steps",
        str(config.save_steps),
        "--lr",
        "1e-3",
        "--max-characters",
        "100000",
        "--resumable",
        "--eval-rows",
        "8",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_all(process):
    """SIGKILL to the supervisor and everything below it, as a power cut would."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.communicate()
    psutil.wait_procs([p for p in family if isinstance(p, psutil.Process)], timeout=20)


def wait_for(process, run, step):
    deadline = time.monotonic() + 120
    while not any(m["step"] >= step for m in run.metrics):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def same_course(run, reference):
    """Every step once, in order, with the losses of a run that nothing happened to; and the same weights."""
    assert run.status == "done"
    assert [m["step"] for m in run.metrics] == list(range(1, len(reference.metrics) + 1))
    for key in ("loss", "lr", "grad_norm"):
        assert [m[key] for m in run.metrics] == pytest.approx([m[key] for m in reference.metrics], abs=1e-6), key
    for key in ("tokens", "trained_tokens", "epoch"):
        assert [m[key] for m in run.metrics] == [m[key] for m in reference.metrics], key
    assert run.test_losses == pytest.approx(reference.test_losses, abs=1e-6)
    found, expected = (load_file(r.checkpoints[-1] / "model.safetensors") for r in (run, reference))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory):
    return tiny_model, write_sharegpt(tmp_path_factory.mktemp("data") / "rows.json", 200)


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    """One undisturbed run per strategy, made when first asked for."""
    made = {}
    outputs = tmp_path_factory.mktemp("reference")

    def undisturbed(strategy):
        if strategy not in made:
            patch = pytest.MonkeyPatch()
            patch.setenv("MINISFT_OUTPUTS", str(outputs))
            made[strategy] = launch(prepare(config_of(strategy, *small), say=quiet), say=quiet)
            patch.undo()
        return made[strategy]

    return undisturbed


# zero2 below; zero1 has the same optimizer class, and ddp the optimizer of vanilla
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=at_length), "zero3"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(small, reference, own_outputs, strategy):
    config = config_of(strategy, *small)
    process, run = start(config), Run(own_outputs / "model" / strategy)
    wait_for(process, run, EVERY + 2)
    kill_all(process)
    assert run.status in ("failed", "unfinished")
    assert run.checkpoints
    said = []
    launch(prepare(config, say=said.append), say=said.append)
    assert any("resuming from checkpoint-" in line for line in said)
    same_course(run, reference(strategy))


def test_killed_at_random_again_and_again(small, reference, own_outputs):
    """Whatever the run is doing when it dies: loading, training, testing, saving, removing."""
    config = config_of("vanilla", *small)
    run = Run(own_outputs / "model" / "vanilla")
    chance = random.Random(20)
    for _ in range(3):
        process = start(config)
        deadline = time.monotonic() + 60
        while process.poll() is None and not (run.folder / "logs").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(chance.uniform(2, 8))
        kill_all(process)
    process = start(config)
    assert process.wait(timeout=120) == 0
    same_course(run, reference("vanilla"))


def test_a_dead_rank_fails_the_run_and_it_can_go_on(small, reference, own_outputs):
    config = config_of("zero2", *small)
    process, run = start(config), Run(own_outputs / "model" / "zero2")
    wait_for(process, run, EVERY + 2)
    below = psutil.Process(process.pid).children(recursive=True)
    next(p for p in below if "--local_rank=1" in p.cmdline()).kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "zero2 failed" in said.splitlines()[-1]
    assert run.status == "failed"
    assert run.failure["reason"]
    assert not psutil.wait_procs(below, timeout=10)[1]
    launch(prepare(config, say=quiet), say=quiet)
    same_course(run, reference("zero2"))


# --- what goes wrong is said, and what was saved stays whole ------------------------------------------------


@pytest.fixture
def interrupted(small, reference, own_outputs):
    """A run that was killed after its second checkpoint, made from an undisturbed one."""

    def of(strategy):
        whole = reference(strategy)
        run = Run(own_outputs / "model" / strategy)
        shutil.copytree(whole.folder, run.folder)
        (run.folder / "DONE").unlink()
        for checkpoint in run.checkpoints[2:]:
            shutil.rmtree(checkpoint)
        return run

    return of


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_half_a_checkpoint_is_never_taken_for_a_whole_one(small, reference, interrupted):
    run = interrupted("vanilla")
    shutil.copytree(run.checkpoints[-1], run.folder / ".saving" / f"checkpoint-{3 * EVERY}")
    (run.folder / ".saving" / f"checkpoint-{3 * EVERY}" / "model.safetensors").write_bytes(b"half")
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9')
    launch(prepare(config_of("vanilla", *small), say=quiet), say=quiet)
    assert not list(run.folder.glob(".saving*"))
    same_course(run, reference("vanilla"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_flipped_byte_is_found_and_named(small, interrupted, name):
    run = interrupted("vanilla")
    first, last = run.checkpoints
    before = files_of(first)
    content = bytearray((last / name).read_bytes())
    content[len(content) // 2] ^= 1
    (last / name).write_bytes(content)
    with pytest.raises(RunFailed, match=rf"{last.name} is damaged: {name} differs.*resumes from {first.name}"):
        launch(prepare(config_of("vanilla", *small), say=quiet), say=quiet)
    assert run.status == "failed"
    assert files_of(first) == before
    if name == "model.safetensors":  # once is enough: what follows does not depend on which file it was
        shutil.rmtree(last)
        launch(prepare(config_of("vanilla", *small), say=quiet), say=quiet)
        assert run.status == "done"


def test_another_strategy_or_number_of_ranks_is_refused_with_the_reason(small, interrupted):
    from minisft.errors import UserError

    run = interrupted("vanilla")
    before = files_of(run.folder)
    for strategy in ("ddp", "zero2"):
        with pytest.raises(UserError, match="optimizer states as vanilla lays them out over 1 rank"):
            prepare(config_of(strategy, *small, name="vanilla"), say=quiet)
    assert files_of(run.folder) == before


# The ranks of one test take weights that are not finite, as if they had become so on the way.
BLIND = """
import sys
class Blind:
    def find_spec(self, name, path=None, target=None):
        if name == "minisft.model.loading":
            sys.meta_path.remove(self)
            import minisft.data.model_folder
            minisft.data.model_folder.not_finite_reason = lambda files: ""
sys.meta_path.insert(0, Blind())
"""


def test_a_nan_loss_names_the_step_and_the_rows(small, tmp_path, own_outputs, monkeypatch):
    from minisft.chat.tokenizers import HuggingFaceTokenizer
    from minisft.model.loading import load_model

    model, _ = small
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    tokenizer = HuggingFaceTokenizer(broken)
    poison = tokenizer.encode("Q")[0]  # a token that the rows do not have, but for one
    loaded = load_model(broken, tokenizer)
    loaded.lm_head.weight = torch.nn.Parameter(torch.randn_like(loaded.lm_head.weight))
    loaded.config.tie_word_embeddings = False
    loaded.save_pretrained(broken)
    rows = json.loads(write_sharegpt(tmp_path / "rows.json", 40).read_text())
    rows[20]["conversations"][0]["value"] += " Q"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = config_of("ddp", broken, tmp_path / "rows.json", max_steps=9, test_fraction=0.0, eval_rows=0)
    run = prepare(config, say=quiet)
    loaded.model.embed_tokens.weight.data[poison] = float("nan")  # after preparing, which would refuse it
    loaded.save_pretrained(broken)
    about = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(about | {"model_files": {}}))  # or training would refuse it, too
    run = run.as_it_is()
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "sitecustomize.py").write_text(BLIND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blind"))
    with pytest.raises(RunFailed, match=r"the loss is nan at step \d, in a batch of the rows .*row0020") as error:
        launch(run, say=quiet)
    named = str(error.value).partition("rows ")[2].partition(" (see")[0].split(", ")
    assert len(named) == config.batch_size, "the rows of the micro-batch whose loss it is, and no others"


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a checkpoint or two."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(place)], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_the_run_and_spares_the_earlier_checkpoints(small, small_disk, monkeypatch):
    from minisft.training import preflight

    monkeypatch.setenv("MINISFT_OUTPUTS", str(small_disk))
    monkeypatch.setattr(preflight, "require_space", lambda *arguments: None)  # which would have refused at once
    run = prepare(config_of("vanilla", *small), say=quiet)
    with pytest.raises(RunFailed, match=r"checkpoint-\d+ could not be saved .*disk full"):
        launch(run, say=quiet)
    assert run.status == "failed"
    assert run.checkpoints
    for checkpoint in run.checkpoints:
        for name, expected in json.loads((checkpoint / "manifest.json").read_text())["files"].items():
            assert (checkpoint / name).stat().st_size == expected["bytes"]
        load_file(checkpoint / "model.safetensors")
    assert checkpoint_step(run.checkpoints[-1]) < run.failure["step"] + EVERY


def test_the_last_ones_and_the_best_are_kept(small, own_outputs):
    """A learning rate that spoils the model later on: the best checkpoint is an early one."""
    config = config_of("vanilla", *small, max_steps=24, save_steps=4, keep_checkpoints=2, learning_rate=3, warmup=0.9)
    run = launch(prepare(config, say=quiet), say=quiet)
    losses = run.test_losses
    best = checkpoint_step(run.best_checkpoint)
    assert losses[best] == min(losses.values())
    assert {checkpoint_step(c) for c in run.checkpoints} == {best, 20, 24}
    assert best < 20
