import fcntl
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from html import escape

import pytest
import torch
from conftest import minisft, save_checkpoint, sharegpt_row, write_manifest

from minisft import checksums
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.errors import UserError
from minisft.evaluation import answers, evaluate_checkpoints
from minisft.evaluation.answers import Answer, answer_loss, ask, generate
from minisft.evaluation.eval_set import LEAKS, EvalSettings, load_template, make_eval_set, prompt_ids
from minisft.evaluation.evaluate_checkpoints import evaluate_runs, results_folder, results_of, runs_to_evaluate
from minisft.evaluation.metrics import METRICS
from minisft.evaluation.report import side_by_side, through_training
from minisft.evaluation.result_cache import SavedAnswers
from minisft.files import read_json, write_json
from minisft.labels.encode_row import IGNORE_INDEX, encode
from minisft.launch.launch_run import launch, prepare
from minisft.run.config import RunConfig
from minisft.run.folder import Run, lock_file

QUICK = EvalSettings(rows=5, max_new_tokens=6, batch_size=2, resamples=20)


def quiet(line):
    pass


@pytest.fixture
def run(tiny_model, small_data):
    """A prepared run with two checkpoints; the second has other weights."""
    from transformers import AutoModelForCausalLM

    made = prepare(
        RunConfig.course("vanilla", model=str(tiny_model), data=str(small_data), max_characters=None), say=quiet
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for step in (10, 9):
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + step)
        save_checkpoint(model, tiny_model, made.folder / f"checkpoint-{step}")
    return made


@pytest.fixture
def calls(monkeypatch):
    """The names of the models that are evaluated and not looked up."""
    found = []
    real = evaluate_checkpoints.evaluate_model
    monkeypatch.setattr(evaluate_checkpoints, "evaluate_model", lambda *a: found.append(a[1].name) or real(*a))
    return found


@pytest.fixture
def results(own_outputs):
    return own_outputs / "evaluation" / "vanilla"


def test_every_checkpoint_is_scored_in_step_order(run, results):
    assert evaluate_runs([run], QUICK, say=quiet) == []
    summary = read_json(results / "summary.json")
    assert [c["step"] for c in summary["checkpoints"]] == [0, 9, 10]
    for step in (0, 9, 10):
        found = read_json(results / f"checkpoint-{step}.json")
        assert found["step"] == step
        assert len(found["examples"]) == 3
        assert found["rows"] == len(found["answers"]) == 5
        low, high = found["bleu_interval"]
        assert low <= high
    assert summary["checkpoints"][0]["loss"] != summary["checkpoints"][1]["loss"]
    assert [set(c["more"]) for c in summary["checkpoints"]] == [set(METRICS)] * 3
    assert [r["more"] for r in results_of(run)] == [c["more"] for c in summary["checkpoints"]]
    assert "Step 10" in (results / "summary.md").read_text()


def test_the_sacrebleu_command_gives_the_same_score(run, results):
    evaluate_runs([run], QUICK, say=quiet)
    for step in (0, 10):
        found = read_json(results / f"checkpoint-{step}.json")
        command = [
            sys.executable,
            "-m",
            "sacrebleu",
            results / "references.txt",
            "-i",
            results / f"checkpoint-{step}.txt",
        ]
        done = subprocess.run([*command, "-w", "6", "-m", "bleu", "chrf"], capture_output=True, text=True, check=True)
        bleu, chrf = json.loads(done.stdout)
        assert bleu["score"] == pytest.approx(found["bleu"], abs=1e-5)
        assert chrf["score"] == pytest.approx(found["chrf"], abs=1e-5)


@pytest.mark.attack("16")
def test_perfect_answers_in_chinese_score_100_with_one_tokenizer_for_all_checkpoints(
    tiny_model, tmp_path, monkeypatch, own_outputs
):
    from transformers import AutoModelForCausalLM

    answers = ["法国的首都是巴黎。", "天空是蓝色的。", "一年有十二个月。"]
    rows = [sharegpt_row(f"z{i:03}k", ("human", f"问题 {i}"), ("gpt", answers[i % 3])) for i in range(40)]
    (tmp_path / "zh.json").write_text(json.dumps(rows))
    about = {"model": str(tiny_model), "data": str(tmp_path / "zh.json"), "name": "zh", "max_characters": None}
    run = prepare(RunConfig.course("vanilla", **about), say=quiet)
    save_checkpoint(AutoModelForCausalLM.from_pretrained(tiny_model), tiny_model, run.folder / "checkpoint-3")

    def perfect(model, eval_set, *rest):
        return [Answer(question.messages[-1].content, True) for question in eval_set.questions]

    monkeypatch.setattr(evaluate_checkpoints, "_answers", perfect)
    said = []
    assert evaluate_runs([run], QUICK, say=said.append) == []
    found = results_of(run)
    assert [result["bleu"] for result in found] == [pytest.approx(100)] * len(found)
    assert all("tok:zh" in result["bleu_signature"] for result in found)
    assert "BLEU 100.00" in said[0]
    results = own_outputs / "evaluation" / "zh"
    assert "-tok zh" in (results / "summary.md").read_text()
    command = [sys.executable, "-m", "sacrebleu", results / "references.txt", "-tok", "zh", "-i"]
    done = subprocess.run([*command, results / "checkpoint-0.txt", "-b"], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 100


def test_what_is_scored_is_not_scored_again_unless_it_changed(run, calls):
    evaluate_runs([run], QUICK, say=quiet)
    assert len(calls) == 3
    calls.clear()
    (run.checkpoints[1] / "model.safetensors").touch()
    evaluate_runs([run], replace(QUICK, batch_size=5), say=quiet)
    assert calls == []
    for name in ("model.safetensors", "config.json"):
        (run.checkpoints[1] / name).write_bytes((run.checkpoints[0] / name).read_bytes())
    evaluate_runs([run], QUICK, say=quiet)
    assert calls == [], "the content is known from checkpoint-9"
    evaluate_runs([run], replace(QUICK, rows=4), say=quiet)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_result_belongs_to_all_files_that_it_depends_on(run, calls, name):
    evaluate_runs([run], QUICK, say=quiet)
    calls.clear()
    with (run.checkpoints[1] / name).open("a") as stream:
        stream.write(" \n")
    write_manifest(run.checkpoints[1])
    evaluate_runs([run], QUICK, say=quiet)
    assert calls == ["checkpoint-10"]


def test_a_checkpoint_that_breaks_later_is_named_and_its_results_go(run, results):
    evaluate_runs([run], QUICK, say=quiet)
    (run.checkpoints[0] / "tokenizer.json").unlink()
    (broken,) = evaluate_runs([run], QUICK, say=quiet)
    assert "checkpoint-9 cannot be used: tokenizer.json is missing" in broken
    assert [r["step"] for r in results_of(run)] == [0, 10]
    assert not list(results.glob("checkpoint-9.*"))


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", '{"key": 5, "a": [1]}', "\udcff"])
def test_damaged_results_are_made_again(run, results, calls, content):
    evaluate_runs([run], QUICK, say=quiet)
    whole = read_json(results / "checkpoint-9.json")
    calls.clear()
    leaks = checksums.memory_folder() / LEAKS
    assert leaks.is_file()
    for file in (results / "checkpoint-9.json", leaks.with_name(checksums.DIGESTS), leaks):
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert evaluate_runs([run], QUICK, say=quiet) == []
    assert calls == ["checkpoint-9"]
    assert read_json(results / "checkpoint-9.json") == whole


def test_a_line_that_was_being_written_is_cut_off(run, results, monkeypatch):
    evaluate_runs([run], QUICK, say=quiet)
    found = read_json(results / "checkpoint-10.json")
    (results / "checkpoint-10.json").unlink()
    kept = SavedAnswers(found["key"]).file
    kept.parent.mkdir(exist_ok=True)
    first = found["answers"][0]
    lines = [json.dumps([0, first["output"], first["stopped"]]), "[99, 1, 2]", "nonsense", '[1, "the ca']
    kept.write_text("\n".join(lines))
    evaluate_runs([run], QUICK, say=quiet)
    assert read_json(results / "checkpoint-10.json") == found
    assert not kept.exists()


def test_answers_that_cannot_be_saved_or_read_only_cost_time(run, results):
    """The cache may belong to another user. A folder in the file's place fails for root, too."""
    evaluate_runs([run], QUICK, say=quiet)
    found = read_json(results / "checkpoint-10.json")
    (results / "checkpoint-10.json").unlink()
    SavedAnswers(found["key"]).file.mkdir(parents=True)
    assert evaluate_runs([run], QUICK, say=quiet) == []
    assert read_json(results / "checkpoint-10.json") == found


def test_a_checkpoint_that_goes_away_meanwhile_is_named(run, monkeypatch):
    real = checksums.Digests.of

    def gone(digests, file):
        if "checkpoint-9" in str(file):
            (run.checkpoints[0] / "model.safetensors").unlink(missing_ok=True)
        return real(digests, file)

    monkeypatch.setattr(checksums.Digests, "of", gone)
    (broken,) = evaluate_runs([run], QUICK, say=quiet)
    assert "checkpoint-9 cannot be used" in broken
    assert [r["step"] for r in results_of(run)] == [0, 10]


def test_runs_of_one_name_are_refused_and_a_run_without_tests_stops_no_other(run, tiny_model, small_data):
    with pytest.raises(UserError, match="two of the runs are called vanilla"):
        evaluate_runs([run, run], QUICK, say=quiet)
    assert Run.load(run.folder / "data" / "..").name == "vanilla"
    other = RunConfig.course("ddp", model=str(tiny_model), data=str(small_data), max_characters=None)
    other = prepare(other, say=quiet)
    shutil.copytree(run.checkpoints[0], other.folder / "checkpoint-1")
    (run.folder / "data" / "test.jsonl").write_text("")
    (run.folder / "data" / "made_of.json").unlink()
    (broken,) = evaluate_runs([run, other], QUICK, say=quiet)
    assert "vanilla has no test conversations" in broken
    assert [r["step"] for r in results_of(other)] == [0, 1]


@pytest.mark.attack("5")
def test_two_evaluations_of_one_run_do_not_mix(run, results):
    with results_folder(run), pytest.raises(UserError, match="is being evaluated right now"):
        evaluate_runs([run], QUICK, say=quiet)
    assert not (results / "summary.json").exists()


@pytest.mark.attack("9")
def test_files_in_a_folder_of_results_are_neither_answers_nor_verdicts_on_leaks(run, results, calls):
    evaluate_runs([run], QUICK, say=quiet)
    (found,) = (result for result in results_of(run) if result["step"] == 10)
    (results / "checkpoint-10.json").unlink()
    forged = "".join(json.dumps([i, q["reference"], True]) + "\n" for i, q in enumerate(found["answers"]))
    (results / f".checkpoint-10-{found['key']}.jsonl").write_text(forged)
    for leaks in checksums.remembered(LEAKS):
        (results / f".leaks-{leaks}.json").write_text("{}")
    evaluate_runs([run], QUICK, say=quiet)
    assert read_json(results / "checkpoint-10.json") == found
    assert SavedAnswers(found["key"]).read(99) == {}, "its answers are in the result now"


@pytest.mark.attack("7")
def test_results_are_not_written_through_a_link(run, results, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "summary.md").write_text("mine")
    results.parent.mkdir(parents=True)
    results.symlink_to(mine)
    with pytest.raises(UserError, match="is a link, and results are not written through it"):
        evaluate_runs([run], QUICK, say=quiet)
    assert (mine / "summary.md").read_text() == "mine"


@pytest.mark.attack("4")
def test_results_of_a_run_that_was_moved_are_its_own(run, results, tmp_path):
    evaluate_runs([run], QUICK, say=quiet)
    foreign = read_json(results / "checkpoint-9.json") | {"step": 77}
    write_json(results / "checkpoint-77.json", foreign)
    (results / "checkpoint-77.txt").write_text("mine")
    evaluate_runs([run], QUICK, say=quiet)
    assert (results / "checkpoint-77.txt").exists(), "this machine did not write that result"
    other = shutil.copytree(run.folder, tmp_path / run.name)
    run.folder.rename(run.folder.with_name("moved"))
    evaluate_runs([Run(other)], QUICK, say=quiet)  # the same run, at another place
    write_json(other / "run.json", read_json(other / "run.json") | {"versions": {"python": "4"}})
    other.rename(tmp_path / "elsewhere")
    another = shutil.copytree(run.folder.with_name("moved"), tmp_path / "place" / run.name)
    write_json(another / "run.json", read_json(another / "run.json") | {"versions": {"python": "5"}})
    with pytest.raises(UserError, match="has the results of another run folder"):
        evaluate_runs([Run(another)], QUICK, say=quiet)


@pytest.mark.attack("4")
def test_another_run_of_the_same_name_replaces_no_results(run, results, tmp_path):
    evaluate_runs([run], QUICK, say=quiet)
    (results / "checkpoint-99.txt").write_text("mine")
    before = {file: file.read_bytes() for file in results.iterdir()}
    friend = tmp_path / run.name
    shutil.copytree(run.folder, friend)
    with pytest.raises(UserError, match="has the results of another run folder"):
        evaluate_runs([Run(friend)], QUICK, say=quiet)
    assert {file: file.read_bytes() for file in results.iterdir()} == before
    evaluate_runs([run], QUICK, say=quiet)
    assert (results / "checkpoint-99.txt").read_text() == "mine"
    shutil.rmtree(run.folder)
    evaluate_runs([Run(friend)], QUICK, say=quiet)


@pytest.mark.attack("9")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_checkpoint_whose_settings_differ_from_its_manifest_is_not_scored(run, results, name):
    checkpoint = run.folder / "checkpoint-9"
    write_manifest(checkpoint, step=9, run=run.identity)
    assert evaluate_runs([run], QUICK, say=quiet) == []
    file = checkpoint / name
    file.write_text(file.read_text().replace("0", "1", 1))
    (broken,) = evaluate_runs([run], QUICK, say=quiet)
    assert "checkpoint-9 cannot be used" in broken


@pytest.mark.attack("9")
def test_a_checkpoint_that_its_run_did_not_write_is_not_scored(run, results):
    first, second = run.checkpoints
    (first / "manifest.json").unlink()
    (second / "extra.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    broken = evaluate_runs([run], QUICK, say=quiet)
    assert [sentence.partition("cannot be used: ")[2] for sentence in broken] == [
        "it has no manifest.json",
        "manifest.json does not name extra.safetensors",
    ]
    assert [r["step"] for r in results_of(run)] == [0]


@pytest.mark.attack("9")
def test_a_known_result_does_not_make_another_checkpoint_sound(run, results):
    """Step 9, scored before, lies in the place of step 10; then the run is another one than its checkpoints are of."""
    for step in (9, 10):
        write_manifest(run.folder / f"checkpoint-{step}", step=step, run=run.identity)
    assert evaluate_runs([run], QUICK, say=quiet) == []
    shutil.rmtree(run.folder / "checkpoint-10")
    shutil.copytree(run.folder / "checkpoint-9", run.folder / "checkpoint-10")
    (broken,) = evaluate_runs([run], QUICK, say=quiet)
    assert "checkpoint-10 cannot be used: its manifest is that of step 9" in broken
    about = read_json(run.folder / "run.json")
    write_json(run.folder / "run.json", about | {"versions": {"python": "4"}})
    broken = evaluate_runs([run], QUICK, say=quiet)
    assert ["of another run" in sentence for sentence in broken] == [True, False]


@pytest.mark.attack("9")
@pytest.mark.parametrize(("about", "says"), [({"step": 8}, "of step 8"), ({"run": "0123456789ab"}, "of another run")])
def test_a_checkpoint_of_another_step_or_run_is_not_scored(run, results, about, says):
    write_json(run.folder / "checkpoint-9" / "manifest.json", {"step": 9} | about)
    (broken,) = evaluate_runs([run], QUICK, say=quiet)
    assert says in broken


@pytest.mark.attack("9")
def test_a_start_model_or_a_test_set_that_changed_is_not_scored(tiny_model, small_data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = RunConfig.course("vanilla", model=str(model), data=str(small_data), max_characters=None)
    run = prepare(config, say=quiet)
    write_manifest(shutil.copytree(tiny_model, run.folder / "checkpoint-9"))
    evaluate_runs([run], QUICK, say=quiet)
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"rms_norm_eps": 10.0}))
    assert "has changed since the run was prepared" in evaluate_runs([run], QUICK, say=quiet)[0]
    with pytest.raises(UserError, match=r"config\.json has changed since the run was prepared"):
        launch(run, say=quiet)
    (run.folder / "data" / "test.jsonl").write_text((run.folder / "data" / "test.jsonl").read_text() + "\n")
    with pytest.raises(UserError, match=r"test\.jsonl is not as it was prepared"):
        evaluate_runs([run], QUICK, say=quiet)


@pytest.mark.attack("5")
def test_a_run_that_is_replaced_during_its_evaluation_is_not_scored(run, results, monkeypatch):
    real = evaluate_checkpoints.evaluate_model

    def replaced_meanwhile(*arguments):
        found = real(*arguments)
        about = json.loads((run.folder / "run.json").read_text())
        write_json(run.folder / "run.json", about | {"versions": {"python": "4"}})
        return found

    monkeypatch.setattr(evaluate_checkpoints, "evaluate_model", replaced_meanwhile)
    with pytest.raises(UserError, match="was changed while it was evaluated"):
        evaluate_runs([run], QUICK, say=quiet)
    assert not list(results.glob("checkpoint-*.json"))
    assert not (results / "summary.json").exists()


def test_an_answer_that_is_not_to_be_learned_is_not_asked_for():
    from minisft.data.conversations import Conversation, Message
    from minisft.evaluation.eval_set import questions_of

    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    talk = Conversation("t", tuple(Message(role, text, text != "d") for role, text in said))
    for which in ("last", "all"):
        (question,) = questions_of(talk, which)
        assert question.messages[-1].content == "b"


def test_an_interrupted_evaluation_goes_on_after_its_last_answer(run, results, monkeypatch):
    real = evaluate_checkpoints.generate
    asked = []

    def interrupted(model, prompts, *rest):
        asked.append(len(prompts))
        for count, found in enumerate(real(model, prompts, *rest)):
            if len(asked) == 1 and count == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(evaluate_checkpoints, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_runs([run], QUICK, say=quiet)
    evaluate_runs([run], QUICK, say=quiet)
    assert asked == [5, 2, 5, 5]
    assert not list(results.glob(".checkpoint-*"))
    whole = read_json(results / "checkpoint-0.json")
    (results / "checkpoint-0.json").unlink()
    evaluate_runs([run], QUICK, say=quiet)
    assert read_json(results / "checkpoint-0.json") == whole


def test_batching_does_not_change_answers_or_loss(tiny_model, run, monkeypatch):
    from transformers import AutoModelForCausalLM

    tokenizer, template = load_template(tiny_model, "v1")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    conversations = make_eval_set(run, replace(QUICK, rows=7)).conversations
    prompts = [prompt_ids(c, template, tokenizer) for c in conversations]
    together = dict(generate(model, prompts, tokenizer, 8, 7))
    assert together == {i: found for i, p in enumerate(prompts) for _, found in generate(model, [p], tokenizer, 8, 1)}
    loss, tokens = answer_loss(model, conversations, template, tokenizer)
    monkeypatch.setattr(answers, "TOKENS_AT_ONCE", 1)
    assert (loss, tokens) == pytest.approx(answer_loss(model, conversations, template, tokenizer), rel=1e-5)
    monkeypatch.setattr("minisft.model.packed_attention.supports_padding_free", lambda model: False)
    assert (loss, tokens) == pytest.approx(answer_loss(model, conversations, template, tokenizer), rel=1e-5)


def test_a_reply_ends_at_eos_and_holds_no_prompt(tiny_model, monkeypatch):
    from minisft.evaluation.generate import Reply

    tokenizer = HuggingFaceTokenizer(tiny_model)
    said = Reply(0, tokenizer.encode(" the cat"), True)
    monkeypatch.setattr(answers, "generate_batched", lambda *a, **k: iter([said]))
    assert list(generate(None, [[1, 5]], tokenizer, 5, 2)) == [(0, Answer("the cat", True))]


# --- what is asked -----------------------------------------------------------------------------------------


def test_every_answer_is_asked_after_what_was_said_before_it(run, results):
    several = replace(QUICK, answers="all")
    exam = make_eval_set(run, several)
    assert sum(c.answers for c in exam.conversations) == len(exam.questions) > len(exam.conversations)
    tokenizer, template = load_template(run.model_folder, "v1")
    for question in exam.questions:
        ids = prompt_ids(question, template, tokenizer)
        row = encode(question, template, tokenizer, 512)
        answer = next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
        assert row.input_ids[:answer] == ids, "a prompt ends where training's answer begins"
        (whole,) = [c for c in exam.conversations if question.id.startswith(c.id)]
        said = [(m.role, m.content) for m in whole.messages]
        assert [(m.role, m.content) for m in question.messages] == said[: len(question.messages)]
    evaluate_runs([run], several, say=quiet)
    found = read_json(results / "checkpoint-0.json")
    rows = [encode(q, template, tokenizer, 512) for q in exam.questions]
    assert found["trained_tokens"] == sum(label != IGNORE_INDEX for row in rows for label in row.labels)
    evaluate_runs([run], QUICK, say=quiet)
    assert read_json(results / "checkpoint-0.json")["trained_tokens"] < found["trained_tokens"]
    evaluate_runs([run], several, say=quiet)
    assert found["rows"] == len(exam.questions)
    assert "every answer" in (results / "summary.md").read_text()


@pytest.fixture
def leaky(tiny_model, tmp_path):
    """Every question on the test side is on the train side too, a word longer."""
    from minisft.data.conversations import clean
    from minisft.data.ledger import Ledger
    from minisft.data.splits import assign

    question = "why did the old cat sit on the red mat while small birds sang new songs over walls"
    rows = [sharegpt_row(f"row{i}", ("human", f"{question} {i}"), ("gpt", "it was late")) for i in range(30)]
    chosen = assign([clean(row, "", Ledger()) for row in rows], 0.1, 0).test_origins
    for row in rows:
        if row["id"] in sorted(chosen)[1:]:
            row["conversations"][0]["value"] = f"what is {row['id']}"
    file = tmp_path / "leaky.json"
    file.write_text(json.dumps(rows))
    return prepare(RunConfig.course("vanilla", model=str(tiny_model), data=str(file)), say=quiet)


def test_questions_that_were_trained_are_counted_and_can_be_left_out(leaky):
    exam = make_eval_set(leaky, QUICK)
    assert len(exam.conversations) == 3
    assert len(exam.leaks) == 1
    about = exam.leakage(QUICK)
    assert (about["of"], about["exact"], about["near"], about["excluded"]) == (3, 0, 1, False)
    without = replace(QUICK, exclude_leaked=True)
    clean = make_eval_set(leaky, without)
    asked = {q.id for q in exam.questions}
    assert {q.id for q in clean.questions} == asked - exam.leaks.keys()
    one = make_eval_set(leaky, replace(without, rows=2))
    assert len(one.questions) == 2, "another takes the place of one that leaked"
    assert clean.leakage(without)["excluded"]


# --- what goes wrong ---------------------------------------------------------------------------------------


def test_nothing_to_evaluate_is_one_sentence(run, tiny_model, small_data):
    bare = prepare(RunConfig.course("ddp", model=str(tiny_model), data=str(small_data), max_characters=None), say=quiet)
    with pytest.raises(UserError, match="ddp has no checkpoint"):
        evaluate_runs([bare], QUICK)
    (run.folder / "data" / "test.jsonl").write_text("")
    (run.folder / "data" / "made_of.json").unlink()
    with pytest.raises(UserError, match="no test conversations"):
        evaluate_runs([run], QUICK)
    for wrong, said in (
        ({"max_new_tokens": 0}, "max new tokens is 0"),
        ({"answers": "none"}, "unknown answers 'none'"),
        ({"resamples": 1}, "0 for no intervals"),
    ):
        with pytest.raises(UserError, match=said):
            EvalSettings(**wrong)


def test_a_broken_checkpoint_is_named_the_others_are_evaluated_and_the_exit_code_is_1(run, results):
    (run.checkpoints[0] / "model.safetensors").write_bytes(b"junk")
    done = minisft("evaluate", "vanilla", "--rows", 3, "--max-new-tokens", 3)
    assert done.returncode == 1
    assert "checkpoint-9 cannot be used: model.safetensors cannot be read" in done.stderr
    summary = read_json(results / "summary.json")
    assert [c["step"] for c in summary["checkpoints"]] == [0, 10]
    assert "cannot be read" in summary["unusable"]["9"]
    assert "Checkpoint 9 cannot be used:\n\n    model.safetensors" in (results / "summary.md").read_text()


def test_names_from_a_checkpoint_are_harmless_in_a_terminal_and_a_summary(run, results):
    (run.checkpoints[0] / "model.safetensors").unlink()
    index = {"weight_map": {"a": "x\x1b[31m<img src=x>.safetensors"}}
    (run.checkpoints[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    said = []
    evaluate_runs([run], QUICK, say=said.append)
    assert "x\\x1b[31m<img" in "".join(said)
    assert "\x1b" not in "".join(said)
    assert "\n    x\\x1b[31m<img" in (results / "summary.md").read_text()


def test_without_names_all_runs_with_checkpoints_are_evaluated(run, tiny_model, small_data, own_outputs):
    prepare(RunConfig.course("ddp", model=str(tiny_model), data=str(small_data), max_characters=None), say=quiet)
    done = minisft("evaluate", "--rows", 2, "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "ddp is skipped: it has no checkpoint (status: prepared)" in done.stdout
    assert (own_outputs / "evaluation" / "vanilla" / "summary.json").exists()
    assert (own_outputs / "evaluation" / "scores.png").stat().st_size > 10_000


def test_a_run_that_is_being_trained_is_left_out_asked_about_or_waited_for(run):
    with lock_file(run.folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.live
        said = []
        assert runs_to_evaluate([run], False, None, said.append) == []
        assert "--wait waits for it" in said[0]
        assert runs_to_evaluate([run], False, lambda question: "2 checkpoints so far" in question, quiet) == [run]
        done = minisft("evaluate", "vanilla")
        assert (done.returncode, "give --wait" in done.stderr) == (2, True)
        threading.Timer(0.3, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        assert runs_to_evaluate([run], True, None, said.append) == [run]
        assert "waiting for vanilla" in said[-1]
    assert not run.live
    assert not Run(run.folder.with_name("nonesuch")).live


def test_a_question_that_is_left_unanswered_ends_quietly(run, monkeypatch):
    import typer

    def leave(question):
        raise typer.Abort

    monkeypatch.setattr(typer, "confirm", leave)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with lock_file(run.folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = minisft("evaluate", "vanilla")
    assert (done.returncode, done.stderr) == (130, "")


def test_answers_are_escaped_in_html(tiny_model, run):
    evil = Answer("<script>alert(1)</script>", False)
    html = side_by_side(["<b>?</b>"], [evil], [evil])
    assert "<script" not in html
    assert "<b>" not in html
    assert len(ask(tiny_model, ["the cat", "Hi"], max_new_tokens=3)) == 2
    evaluate_runs([run], QUICK, say=quiet)
    found = results_of(run)
    for result in found:
        result["examples"][0] |= {"prompt": "<b>?</b>", "reference": "<i>", "output": evil.text}
    html = through_training(found)
    assert "<script" not in html
    assert "<b>?" not in html
    assert "step 10" in html
    chosen = found[0]["answers"][4]
    assert escape(chosen["prompt"]) in through_training(found, [chosen["id"]])


@pytest.mark.attack("9")
def test_a_result_that_was_edited_is_computed_again(run, results):
    evaluate_runs([run], QUICK, say=quiet)
    file = (
        results / "checkpoint-3.json"
        if (results / "checkpoint-3.json").exists()
        else sorted(results.glob("checkpoint-*.json"))[-1]
    )
    honest = read_json(file)
    write_json(file, honest | {"bleu": 99.9, "loss": 0.01})
    evaluate_runs([run], QUICK, say=quiet)
    assert read_json(file)["bleu"] == honest["bleu"] and read_json(file)["loss"] == pytest.approx(honest["loss"])


@pytest.mark.attack("9")
def test_no_checkpoint_is_scored_with_another_tokenizer(run, results):
    evaluate_runs([run], QUICK, say=quiet)
    file = run.model_folder / "tokenizer_config.json"
    text = file.read_text()
    try:
        file.write_text(text + " ")
        broken = evaluate_runs([run], QUICK, say=quiet)
        assert len(broken) > 1 and all("has changed since the run was prepared" in line for line in broken)
    finally:
        file.write_text(text)
