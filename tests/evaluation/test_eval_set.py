"""Test questions that were trained are found whatever a template writes before them; refused ones are told."""

import datetime
import json
import shutil

import pytest
from conftest import sharegpt_row, write_manifest

from minisft.chat import render_process
from minisft.data.conversations import clean
from minisft.data.ledger import Ledger
from minisft.data.splits import assign
from minisft.errors import UserError
from minisft.evaluation import evaluate_checkpoints
from minisft.evaluation.eval_set import EvalSettings, load_template, make_eval_set
from minisft.evaluation.evaluate_checkpoints import evaluate_runs
from minisft.files import read_json
from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig

QUICK = EvalSettings(rows=5, max_new_tokens=3, resamples=0)
ROLES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant>\n' }}{% endif %}"
)
HEADS = {
    "none": "",
    "number": "{{ messages|length }} messages. ",
    "long": "{% if messages|length > 3 %}A talk of many turns. {% endif %}",
    "inference": "{% if add_generation_prompt %}Answer now. {% endif %}",
    "date": "Today is {{ strftime_now('%d %B %Y') }}. ",
}
REFUSES = (
    "{% for m in messages %}{% if 'walls' in m['content'] %}{{ raise_exception('no walls') }}{% endif %}{% endfor %}"
)


def quiet(line):
    pass


@pytest.fixture
def model_with(tiny_model, tmp_path):
    def make(template):
        folder = shutil.copytree(tiny_model, tmp_path / "own-model")
        (folder / "chat_template.jinja").write_text(template)
        return folder

    yield make
    load_template.cache_clear()


@pytest.fixture
def tomorrow(monkeypatch):
    """Let templates print a later date from now on."""
    from transformers.utils import chat_template_utils

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 3)

    def rendered_here(renderer, template, request):  # another process would not see the later date
        return {"text": render_process._rendered(template, dict(request))}

    def change():
        monkeypatch.setattr(chat_template_utils, "datetime", Later)
        monkeypatch.setattr(render_process._Renderer, "reply", rendered_here)
        chat_template_utils._compile_jinja_template.cache_clear()

    yield change
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.fixture
def prepared(tmp_path):
    """A run with short questions, of which `Hi` is trained in a longer conversation and asked in a test."""

    def make(model, template, system=""):
        before = [("system", system)] if system else []
        rows = [[*before, *[("human", f"how far is star {i}"), ("gpt", "far")] * (1 + i % 3)] for i in range(30)]
        ids = [f"row{i}" for i in range(30)]
        as_rows = [sharegpt_row(name, *turns) for name, turns in zip(ids, rows, strict=True)]
        chosen = assign([clean(row, "", Ledger()) for row in as_rows], 0.1, 0).test_origins
        train, test = ([i for i in range(30) if (ids[i] in chosen) == side] for side in (False, True))
        rows[train[0]] = [*before, ("human", "Say Hi"), ("gpt", "Hi")]
        rows[train[1]] = [*before, *[("human", "Hi"), ("gpt", "Hello")] * 3]
        for i, question in zip(test, ["hi!", "Hi there", "say"], strict=True):
            rows[i] = [*before, ("human", question), ("gpt", "Hello")]
        file = tmp_path / "data.json"
        file.write_text(json.dumps([sharegpt_row(name, *turns) for name, turns in zip(ids, rows, strict=True)]))
        run = prepare(RunConfig.course("vanilla", model=str(model), data=str(file), template=template), say=quiet)
        return run, f"{ids[test[0]]}@1", ids[train[1]]

    return make


@pytest.mark.parametrize("system", ["", "be brief"])
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_a_short_question_that_begins_a_trained_conversation_is_exact(tiny_model, prepared, version, system):
    run, question, row = prepared(tiny_model, version, system)
    leaks = make_eval_set(run, QUICK).leaks
    assert {name: (leak.row, leak.exact) for name, leak in leaks.items()} == {question: (row, True)}


@pytest.mark.parametrize("head", HEADS)
def test_a_trained_question_is_exact_whatever_an_own_template_writes_first(model_with, prepared, tomorrow, head):
    run, question, row = prepared(model_with(HEADS[head] + ROLES), "own")
    tomorrow()
    leaks = make_eval_set(run, QUICK).leaks
    assert {name: (leak.row, leak.exact) for name, leak in leaks.items()} == {question: (row, True)}


def checkpoint_of(run):
    write_manifest(shutil.copytree(run.model_folder, run.folder / "checkpoint-9"))


def test_a_result_with_another_date_in_its_prompts_is_not_reused(model_with, prepared, tomorrow, monkeypatch):
    run, _, _ = prepared(model_with(HEADS["date"] + ROLES), "own")
    checkpoint_of(run)
    evaluated = []
    real = evaluate_checkpoints.evaluate_model
    monkeypatch.setattr(evaluate_checkpoints, "evaluate_model", lambda *a: evaluated.append(a[1].name) or real(*a))
    evaluate_runs([run], QUICK, say=quiet)
    first = list(evaluated)
    evaluate_runs([run], QUICK, say=quiet)
    assert evaluated == first, "the date is the same"
    tomorrow()
    evaluate_runs([run], QUICK, say=quiet)
    assert evaluated == 2 * first


def test_conversations_that_the_template_refuses_are_counted_and_named(model_with, small_data, own_outputs):
    config = RunConfig.course("vanilla", model=str(model_with(REFUSES + ROLES)), data=str(small_data), template="own")
    run = prepare(config, say=quiet)
    refused = read_json(run.folder / "ledger.json")["dropped"]["test loss: refused by the chat template"]
    assert refused["rows"] == sum("walls" in line for line in (run.folder / "data" / "test.jsonl").open())
    checkpoint_of(run)
    said = []
    everything = EvalSettings(rows=100, max_new_tokens=3, resamples=0)
    assert evaluate_runs([run], everything, say=said.append) == []
    (sentence,) = [line for line in said if "refuses" in line]
    assert f"refuses {refused['rows']} test conversations (first {refused['first'][0]}: " in sentence
    assert "no walls" in sentence
    results = own_outputs / "evaluation" / "vanilla"
    assert read_json(results / "summary.json")["refused"] in sentence
    assert f"refuses {refused['rows']} test conversations" in (results / "summary.md").read_text()


def test_a_template_that_refuses_every_test_conversation_is_named(model_with, prepared):
    picky = (
        "{% if 'hi' in messages[0]['content']|lower or messages[0]['content'] == 'say' %}{{ raise_exception('no') }}"
    )
    run, _, _ = prepared(model_with(picky + "{% endif %}" + ROLES), "own")
    with pytest.raises(UserError, match=r"refuses 3 test conversations .*, and no other fits in 128 tokens"):
        make_eval_set(run, QUICK)


def test_a_template_that_changed_since_the_run_was_prepared_is_the_reason_that_is_told(model_with, prepared):
    run, _, _ = prepared(model_with(ROLES), "own")
    checkpoint_of(run)
    (run.model_folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    load_template.cache_clear()
    broken = evaluate_runs([run], QUICK, say=quiet)
    assert len(broken) == 2
    assert all("chat_template.jinja has changed since the run was prepared" in line for line in broken)
