import json
import subprocess
import sys

import pytest
import torch

from minisft import evaluate
from minisft.errors import UserError
from minisft.evaluate import Answer, Settings, answer_loss, ask, evaluate_runs, generate, side_by_side
from minisft.launch import prepare
from minisft.mistral import MistralTemplate
from minisft.runs import RunConfig, read_json
from minisft.tokens import HuggingFaceTokenizer


@pytest.fixture
def run(tiny_model, small_data):
    """A prepared run with two checkpoints; the second has other weights."""
    from transformers import AutoModelForCausalLM

    made = prepare(RunConfig.course("vanilla", model=str(tiny_model), data=str(small_data), max_characters=None))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for step in (10, 9):
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + step)
        model.save_pretrained(made.folder / f"checkpoint-{step}")
    return made


QUICK = Settings(rows=5, max_new_tokens=6, batch_size=2)


def test_every_checkpoint_is_scored_in_step_order(run, own_outputs):
    evaluate_runs([run], QUICK, say=lambda line: None)
    folder = own_outputs / "evaluation" / "vanilla"
    summary = read_json(folder / "summary.json")
    assert [c["step"] for c in summary["checkpoints"]] == [0, 9, 10]
    for step in (0, 9, 10):
        result = read_json(folder / f"checkpoint-{step}.json")
        assert result["step"] == step
        assert len(result["examples"]) == 3
        assert result["rows"] == len(result["answers"]) == 5
    assert summary["checkpoints"][0]["loss"] != summary["checkpoints"][1]["loss"]
    assert "Step 10" in (folder / "summary.md").read_text()


def test_the_sacrebleu_command_gives_the_same_score(run, own_outputs, tmp_path):
    evaluate_runs([run], QUICK, say=lambda line: None)
    result = read_json(own_outputs / "evaluation" / "vanilla" / "checkpoint-0.json")
    for name in ("reference", "output"):
        lines = [a[name].replace("\n", " ") for a in result["answers"]]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", tmp_path / "reference", "-i", tmp_path / "output", "-w", "6"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["score"] == pytest.approx(result["bleu"], abs=1e-5)


def test_what_is_scored_is_not_scored_again_unless_it_changed(run, monkeypatch):
    evaluate_runs([run], QUICK, say=lambda line: None)
    calls = []
    real = evaluate.evaluate_model
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *a: calls.append(a[1].name) or real(*a))
    evaluate_runs([run], QUICK, say=lambda line: None)
    assert calls == []
    (run.checkpoints[1] / "model.safetensors").touch()
    evaluate_runs([run], QUICK, say=lambda line: None)
    assert calls == ["checkpoint-10"]
    evaluate_runs([run], Settings(rows=4, max_new_tokens=6), say=lambda line: None)
    assert len(calls) == 4


def test_batching_does_not_change_answers_or_loss(tiny_model, run):
    from transformers import AutoModelForCausalLM

    tokenizer = HuggingFaceTokenizer(tiny_model)
    template = MistralTemplate.for_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    conversations = evaluate.test_rows(run, 7)
    prompts = [evaluate.prompt_ids(c, template, tokenizer) for c in conversations]
    together = generate(model, prompts, tokenizer, 8, 7)
    alone = [generate(model, [p], tokenizer, 8, 1)[0] for p in prompts]
    assert together == alone
    loss, tokens = answer_loss(model, conversations, template, tokenizer, 7)
    assert (loss, tokens) == pytest.approx(answer_loss(model, conversations, template, tokenizer, 1), rel=1e-5)


def test_a_reply_ends_at_eos_and_holds_no_prompt(tiny_model):
    class Parrot:
        """Says the same ids after any prompt, as a model that stops at once for one row would."""

        device = "cpu"

        def generate(self, input_ids, **options):
            said = torch.tensor([[*tokenizer.encode(" the cat"), tokenizer.eos_id, 7, 7]])
            return torch.cat([input_ids, said.expand(len(input_ids), -1)], dim=1)

    tokenizer = HuggingFaceTokenizer(tiny_model)
    answers = generate(Parrot(), [[1, 5], [1, 5, 6]], tokenizer, 5, 2)
    assert answers == [Answer("the cat", True)] * 2


def test_nothing_to_evaluate_is_one_sentence(run, tiny_model, small_data):
    bare = prepare(RunConfig.course("ddp", model=str(tiny_model), data=str(small_data), max_characters=None))
    with pytest.raises(UserError, match="ddp has no checkpoint"):
        evaluate_runs([bare], QUICK)
    (run.folder / "data" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="no test conversations"):
        evaluate_runs([run], QUICK)
    with pytest.raises(UserError, match="max new tokens is 0"):
        Settings(max_new_tokens=0)


def test_an_unloadable_checkpoint_is_named(run):
    (run.checkpoints[0] / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="checkpoint-9 is no checkpoint that transformers can load"):
        evaluate_runs([run], QUICK, say=lambda line: None)


def test_answers_are_escaped_in_html(tiny_model):
    evil = Answer("<script>alert(1)</script>", False)
    html = side_by_side(["<b>?</b>"], [evil], [evil])
    assert "<script" not in html
    assert "<b>" not in html
    assert len(ask(tiny_model, ["the cat", "Hi"], max_new_tokens=3)) == 2
