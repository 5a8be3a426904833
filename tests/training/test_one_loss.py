"""The mean over the trained tokens of the global batch, however the batch is cut up: gradients in fp32."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_sharegpt
from gradients import first_gradients
from safetensors.torch import load_file

from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig
from minisft.training.batch_sampler import Packs
from minisft.training.dataset import load_rows, row_lengths

VARIANTS = {
    "8 x 1": {"batch_size": 8},
    "1 x 8": {"batch_size": 1, "accumulation": 8},
    "2 x 4": {"batch_size": 2, "accumulation": 4},
    "padded": {"batch_size": 8, "batching": "padded"},
    "padded 2 x 4": {"batch_size": 2, "accumulation": 4, "batching": "padded"},
    "activations again": {"batch_size": 8, "activation_checkpointing": True},
    "packed": {"batch_size": 1, "batching": "packed"},
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def eight(request, tiny_model, tmp_path_factory):
    """A model, and eight rows of unequal lengths and unequal shares of trained tokens."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("eight")
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    if request.param == "untied":
        loaded = AutoModelForCausalLM.from_pretrained(model)
        loaded.config.tie_word_embeddings = False
        loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().flip(0).clone())
        loaded.save_pretrained(model)
    rows = json.loads(write_sharegpt(folder / "rows.json", 12, seed=3).read_text())
    rows[2]["conversations"][1]["value"] = "yes"
    rows[5]["conversations"][1]["value"] = "one long answer about the cat and the mat " * 6
    (folder / "rows.json").write_text(json.dumps(rows))
    return model, folder / "rows.json"


def prepared(eight, name, strategy="vanilla", **changes):
    model, data = eight
    settings = {"test_fraction": 0.0, "eval_rows": 0, "max_characters": None, "max_length": 400}
    settings |= {"max_steps": 1, "max_rows": 8, "model": str(model), "data": str(data), "name": name}
    settings["memory_timeline"] = False  # a walk through all objects for each micro-batch, and a test process has many
    return prepare(RunConfig.course(strategy, **(settings | changes)), say=lambda line: None)


def packed_gradients(eight):
    """As many packs as the eight rows need, all in one step."""
    run = prepared(eight, "one", batch_size=8)
    rows = load_rows(run.folder / "data")
    packs = Packs(rows, row_lengths(rows), 400)
    assert 1 < len(packs) < 8
    return first_gradients(prepared(eight, "packed", batching="packed", batch_size=1, accumulation=len(packs)))


@pytest.fixture(scope="module")
def plain(eight, tmp_path_factory):
    """transformers alone: one row at a time, sums of losses, divided once by the number of trained tokens."""
    from transformers import AutoModelForCausalLM

    patch = pytest.MonkeyPatch()
    patch.setenv("MINISFT_OUTPUTS", str(tmp_path_factory.mktemp("plain")))
    rows = load_rows(prepared(eight, "rows").folder / "data")
    patch.undo()
    model = AutoModelForCausalLM.from_pretrained(eight[0])
    trained = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        (torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / trained).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_cut_up_the_batch_gives_the_same_gradients(eight, plain, variant):
    if variant == "packed":
        agree(packed_gradients(eight), plain)
    else:
        agree(first_gradients(prepared(eight, "one", **VARIANTS[variant])), plain)


@pytest.mark.distributed
def test_two_ranks_of_four_rows_give_the_same_gradients(eight, plain):
    runs = [
        prepared(eight, batching, "ddp", batch_size=4, batching=batching) for batching in ("padding-free", "padded")
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(Path(__file__).parents[1] / "gradients.py"), *(str(run.folder) for run in runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for run in runs:
        agree(load_file(run.folder / "gradients.safetensors"), plain)


def test_the_mean_of_means_would_be_another_number(eight, plain):
    """The test can fail: averaging the rows' own means, as is often done, is off by far more than 1e-5."""
    from transformers import AutoModelForCausalLM

    rows = load_rows(prepared(eight, "rows").folder / "data")
    model = AutoModelForCausalLM.from_pretrained(eight[0])
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:])) / len(rows)).backward()
    name = "model.embed_tokens.weight"
    assert (model.model.embed_tokens.weight.grad - plain[name]).norm() > 1e-2 * plain[name].norm()
