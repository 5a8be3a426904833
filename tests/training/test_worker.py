"""Real runs of a tiny model under every strategy, through the launchers that users start."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import at_length
from transformers import AutoConfig

from minisft.errors import UserError
from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.run.config import RunConfig
from minisft.training.dataset import TEST_ROWS, load_rows
from minisft.zero.activation_trace import trace_activations
from minisft.zero.communication import predict_traffic
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.peak_memory import at_peak
from minisft.zero.state_memory import OWNERS, predict_states, total_bytes
from minisft.zero.strategies import STRATEGIES

pytestmark = pytest.mark.distributed
STEPS = 20


def tiny_run(strategy, tiny_model, data, **changes):
    settings = {"max_steps": STEPS, "save_steps": 12, "max_characters": None, "learning_rate": 1e-3}
    return RunConfig.course(strategy, model=str(tiny_model), data=str(data), **(settings | changes))


@pytest.fixture(scope="module")
def runs(tiny_model, small_data, tmp_path_factory):
    """One finished run per strategy: the same 8 rows of unequal lengths per step, fp32, two ranks but for vanilla."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MINISFT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    made = {}
    for strategy in STRATEGIES:
        made[strategy] = launch(prepare(tiny_run(strategy, tiny_model, small_data)), say=lambda line: None)
    yield made
    patch.undo()


def weights(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True).state_dict()


@pytest.mark.parametrize("strategy", list(STRATEGIES)[1:])
def test_loss_curves_agree_with_vanilla(runs, strategy):
    expected = [m["loss"] for m in runs["vanilla"].metrics]
    found = [m["loss"] for m in runs[strategy].metrics]
    assert len(found) == STEPS
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_run_folder_is_complete(runs, strategy):
    run = runs[strategy]
    assert run.status == "done"
    assert [p.name for p in run.checkpoints] == ["checkpoint-12", "checkpoint-20"]
    assert [m["step"] for m in run.metrics] == list(range(1, STEPS + 1))
    assert {m["tokens"] for m in run.metrics} == {m["tokens"] for m in runs["vanilla"].metrics}
    assert all(m["tokens"] > m["trained_tokens"] > 0 and m["seconds"] > 0 for m in run.metrics)
    assert len(run.memory) == len(run.metrics[0]["bytes"]) == run.config.ranks
    assert (run.deepspeed is not None) == strategy.startswith("zero")
    assert all((run.folder / "logs" / f"rank{r}.log").exists() for r in range(run.config.ranks))
    words = run.command.removeprefix("env PYTHONSAFEPATH=1 ").split()
    assert words[0] == {"vanilla": "python", "ddp": "torchrun"}.get(strategy, "deepspeed")


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.startswith("zero")])
def test_no_shared_memory_stays_behind(runs, strategy):
    words = runs[strategy].command.split()
    port = words[words.index("--master_port") + 1]
    assert not [f.name for f in Path("/dev/shm").iterdir() if f"_{port}_" in f.name]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_checkpoint_loads_with_plain_transformers(runs, strategy):
    from transformers import AutoTokenizer

    expected = weights(runs["vanilla"].checkpoints[-1])
    start = weights(runs["vanilla"].model_folder)
    found = weights(runs[strategy].checkpoints[-1])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    assert any(not torch.equal(found[name], start[name]) for name in found), "training changed nothing"
    for checkpoint in runs[strategy].checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "<s>[INST] Hi [/INST]"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reloaded_checkpoint_has_the_loss_that_the_live_engine_had(runs, strategy):
    from transformers import AutoModelForCausalLM

    run = runs[strategy]
    rows = load_rows(run.folder / "data", TEST_ROWS)
    for checkpoint, expected in zip(run.checkpoints, run.test_losses.values(), strict=True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
        total_bytes, trained = 0.0, 0
        for row in rows:
            labels = torch.tensor(row["labels"][1:])
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            total_bytes += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            trained += int((labels != -100).sum())
        assert total_bytes / trained == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_measured_memory_is_predicted_to_the_byte(runs, strategy):
    run = runs[strategy]
    shapes = Shapes.of_config(AutoConfig.from_pretrained(run.model_folder, local_files_only=True))
    predicted = predict_states(shapes, strategy, run.config.ranks, run.precision, run.deepspeed)
    for rank, expected in zip(run.memory, predicted, strict=True):
        for moment in ("at rest", "after backward"):
            assert {owner: rank[moment][owner] for owner in OWNERS} == expected[moment]
        assert rank["peak"] > sum(expected["after backward"].values())


@pytest.mark.parametrize("strategy", list(STRATEGIES)[1:])
def test_what_the_ranks_sent_was_predicted(runs, strategy):
    run = runs[strategy]
    shapes = Shapes.of_config(AutoConfig.from_pretrained(run.model_folder, local_files_only=True))
    expected = predict_traffic(shapes, strategy, 2, run.precision, 1, run.deepspeed)
    for operation, size in run.memory[0]["communication"].items():
        if operation == "all-gather" and strategy.startswith("zero3"):  # some tensors need not be gathered again
            assert 0 < size <= expected[operation]
        else:
            assert size == pytest.approx(expected[operation], abs=64), operation  # norms and flags


def peaks_by_owner(run, **options):
    """Of each rank the bytes by owner at the worst moment of the step that was followed, and as predicted."""
    config = AutoConfig.from_pretrained(run.model_folder, local_files_only=True)
    shapes = Shapes.of_config(config)
    about = (shapes, run.config.strategy, run.config.ranks, run.precision)
    predicted = predict_states(*about, run.deepspeed)
    for rank in run.memory:
        step = rank["step"]
        expected = []
        for turn, batch in enumerate(step["micro-batches"]):  # gradients wait beside all but the first
            dry = trace_activations(config, batch["lengths"], trained=batch["trained"], **options)
            held = at_peak(*about, predicted, dry, run.deepspeed, accumulation=1 + turn)
            expected.append(held[rank["rank"]])
        measured = dict(step["peak"]["held"])
        assert sum(measured.values()) == step["peak"]["total"]
        measured["buckets"] = measured.get("buckets", 0) + step["unseen"]
        yield measured, max(expected, key=total_bytes)


def peaks(run, **options):
    return [(total_bytes(measured), total_bytes(expected)) for measured, expected in peaks_by_owner(run, **options)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_peak_names_who_holds_it(runs, strategy):
    """What lies there all the time, exactly; of the rest the largest: two moments of a step may hold nearly as much."""
    for measured, expected in peaks_by_owner(runs[strategy]):
        for owner in ("parameters", "fp32 masters", "optimizer states"):
            assert measured.get(owner, 0) == expected[owner]
        assert max(measured, key=measured.__getitem__) == max(expected, key=expected.__getitem__) == "activations"
        assert measured.get("other tensors", 0) < 0.02 * total_bytes(expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_peak_of_a_step_is_predicted_within_5_percent(runs, strategy):
    for measured, predicted in peaks(runs[strategy]):
        assert predicted == pytest.approx(measured, rel=0.05)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(runs, tiny_model, small_data, monkeypatch):
    run = runs["vanilla"]
    monkeypatch.setenv("MINISFT_OUTPUTS", str(run.folder.parents[1]))
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    launch(prepare(tiny_run("vanilla", tiny_model, small_data)), say=lambda line: None)
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"max steps 20 -> 7.*--overwrite"):
        prepare(tiny_run("vanilla", tiny_model, small_data, max_steps=7))
    assert run.status == "done"


@pytest.mark.parametrize("strategy", [pytest.param("zero1", marks=at_length), "zero3"])
def test_accumulation_and_activation_checkpointing_change_the_memory_alone(runs, tiny_model, small_data, strategy):
    again = {"activation_checkpointing": True}
    config = tiny_run(strategy, tiny_model, small_data, accumulation=2, batch_size=2, **again)
    run = launch(prepare(config), say=lambda line: None)
    expected = [m["loss"] for m in runs["vanilla"].metrics]
    assert [m["loss"] for m in run.metrics] == pytest.approx(expected, rel=1e-5)
    # With so little in flight it counts how many parameters stage 3 has gathered at once: up to its limit.
    for measured, predicted in peaks(run, **again):
        assert predicted == pytest.approx(measured, rel=0.05 if strategy == "zero1" else 0.1)


@pytest.mark.parametrize("strategy", ["vanilla", "zero2"])
def test_bf16_stays_close_to_fp32(runs, tiny_model, small_data, strategy):
    """Autocast over fp32 weights, and bf16 weights with fp32 masters: both train, near each other and near fp32."""
    run = launch(prepare(tiny_run(strategy, tiny_model, small_data, precision="bf16")), say=lambda line: None)
    expected = [m["loss"] for m in runs["vanilla"].metrics]
    assert [m["loss"] for m in run.metrics] == pytest.approx(expected, rel=5e-3)
    assert run.precision == "bf16"


# --- failing honestly --------------------------------------------------------------------------------------


def test_an_unfinished_run_starts_afresh_and_a_finished_one_is_left_alone(tiny_model, small_data):
    run = prepare(tiny_run("vanilla", tiny_model, small_data, max_steps=2))
    (run.folder / "logs").mkdir()
    (run.folder / "checkpoint-1").mkdir()
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n')
    (run.folder / "FAILED").write_text("{}")
    launch(run, say=lambda line: None)
    assert (run.status, run.failure) == ("done", None)
    assert [m["step"] for m in run.metrics] == [1, 2]
    assert [p.name for p in run.checkpoints] == ["checkpoint-2"]
    before = sorted((p, p.stat().st_mtime_ns) for p in run.folder.rglob("*"))
    pasted = subprocess.run([sys.executable, *run.command.split()[1:]], capture_output=True, text=True)
    assert pasted.returncode == 2
    assert "trained already" in pasted.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in run.folder.rglob("*")) == before


def test_an_error_in_a_rank_is_reported_with_rank_step_and_reason(tiny_model, small_data):
    run = prepare(tiny_run("vanilla", tiny_model, small_data, learning_rate=1e30, max_grad_norm=1e30))
    reason = r"vanilla failed on rank 0, step \d+: FloatingPointError: the (loss|gradient norm) is"
    with pytest.raises(RunFailed, match=reason):
        launch(run, say=lambda line: None)
    assert run.status == "failed"
    assert not (run.folder / "DONE").exists()
