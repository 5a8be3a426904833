"""A model's own template: answers stop, are scored and are continued as they were trained."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import write_manifest

from minisft.data.conversations import Conversation, Message, one_per_answer
from minisft.errors import UserError
from minisft.evaluation import answers, chat_session
from minisft.evaluation.answers import Answer, ask, loss_of_rows
from minisft.evaluation.chat_session import open_sessions
from minisft.evaluation.eval_set import NOTHING_TRAINED, EvalSettings, load_template, make_eval_set, prompt_ids
from minisft.evaluation.evaluate_checkpoints import evaluate_runs
from minisft.evaluation.generate import Reply
from minisft.files import read_json
from minisft.labels.encode_row import IGNORE_INDEX, Row, encode
from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig

QUICK = EvalSettings(rows=4, max_new_tokens=3, resamples=0)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (  # as Qwen 3: a thought, even an empty one, before the last answer only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and (loop.last or m['reasoning_content']) %}"
    "{{ '<think>\n' + (m['reasoning_content'] or '').strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = QWEN.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")  # as its thinking models
GPT_OSS = (  # another token ends the last answer, and control tokens are inside an answer
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
DEEPSEEK = (  # as DeepSeek R1: what a content has before `</think>` is left out
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|A|>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}{{ '<|U|>' + m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, ("<|im_start|>",), "<|im_end|>"),
    "qwen": (QWEN, ("<|im_start|>",), "<|im_end|>"),
    "opened": (OPENED, ("<|im_start|>",), "<|im_end|>"),
    "gpt-oss": (GPT_OSS, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>"),
    "deepseek": (DEEPSEEK, ("<|U|>", "<|A|>"), "</s>"),
}
THOUGHT = "small birds sang new songs"


def quiet(line):
    pass


@pytest.fixture
def model_with(tiny_model, tmp_path):
    """Makes a model folder with a chat template of its own, and control tokens for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(kind):
        template, tokens, eos = TEMPLATES[kind]
        folder = shutil.copytree(tiny_model, tmp_path / "own-model")
        fast = AutoTokenizer.from_pretrained(folder)
        fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *tokens]})
        fast.add_special_tokens({"eos_token": eos})
        fast.chat_template = template
        fast.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(fast))
        model.save_pretrained(folder)
        return folder

    yield make
    load_template.cache_clear()


def make_it_say(folder, ids):
    """Give the model weights that choose the first of `ids` after any other token, and then the next ones."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.fill_(1.0 if "norm" in name else 0.0)
        embeddings[:, 0] = 1
        for i, token in enumerate(ids):
            head[token, i] = 1
            embeddings[token] = 0
            embeddings[token, i + 1] = 1
    model.save_pretrained(folder)
    write_manifest(folder)


def test_generation_stops_at_every_stop_token_of_the_model(model_with):
    folder = model_with("chatml")
    tokenizer, _ = load_template(folder, "own")
    stop = tokenizer.control_id("</s>")
    make_it_say(folder, [*tokenizer.encode(" the cat"), stop])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, stop]}))
    load_template.cache_clear()
    assert ask(folder, ["red"], 9, "own") == [Answer("the cat", True)]


# --- scores --------------------------------------------------------------------------------------


@pytest.fixture
def prepared(model_with, tmp_path):
    """Makes a run on conversations, given as lists of (question, answer, reasoning), with one checkpoint."""

    def make(kind, talks):
        rows = [
            {
                "id": f"r{i}",
                "messages": [
                    message
                    for question, answer, reasoning in talk
                    for message in (
                        {"role": "user", "content": f"{question} {i}"},
                        {"role": "assistant", "content": answer}
                        | ({"reasoning_content": reasoning} if reasoning else {}),
                    )
                ],
            }
            for i, talk in enumerate(talks)
        ]
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        config = RunConfig.course("vanilla", model=str(model_with(kind)), data=str(file), template="own")
        run = prepare(config, say=quiet)
        write_manifest(shutil.copytree(run.model_folder, run.folder / "checkpoint-9"))
        return run

    return make


@pytest.fixture
def perfect(monkeypatch):
    """Let the model reproduce the trained tokens of each question of an evaluation."""

    def make(run, settings):
        eval_set = make_eval_set(run, settings)
        tokenizer, _ = load_template(run.model_folder, "own")
        trained = [[label for label in row.labels if label != IGNORE_INDEX] for row in eval_set.rows]
        assert all(ids[-1] in tokenizer.stop_ids for ids in trained)
        for prompt, row, ids in zip(eval_set.prompts, eval_set.rows, trained, strict=True):
            assert row.input_ids[: len(prompt) + len(ids)] == prompt + ids

        def replies(model, prompts, **settings):
            for i, prompt in enumerate(prompts):
                yield Reply(i, trained[eval_set.prompts.index(prompt)][:-1], True)

        monkeypatch.setattr(answers, "generate_batched", replies)
        return eval_set

    return make


@pytest.mark.parametrize(
    ("kind", "reasoning"),
    [("chatml", ""), ("gpt-oss", ""), ("qwen", ""), ("qwen", THOUGHT), ("opened", ""), ("opened", THOUGHT)],
)
def test_a_model_that_reproduces_training_scores_100(prepared, perfect, own_outputs, kind, reasoning):
    run = prepared(kind, [[(f"rain {i}", f"the cat sat on {i} mats", reasoning)] for i in range(40)])
    eval_set = perfect(run, QUICK)
    assert evaluate_runs([run], QUICK, say=quiet) == []
    folder = own_outputs / "evaluation" / "vanilla"
    result = read_json(folder / "checkpoint-9.json")
    assert (result["bleu"], result["more"]["exact match"]) == (pytest.approx(100), 1)
    assert (folder / "references.txt").read_text() == (folder / "checkpoint-9.txt").read_text()
    assert all(example["reference"] == example["output"] for example in result["examples"])
    before, _, _ = eval_set.references[0].partition(eval_set.questions[0].messages[-1].content)
    empty, full = "<think>\n\n</think>\n\n", f"<think>\n{THOUGHT}\n</think>\n\n"
    written = {"qwen": full if reasoning else empty, "gpt-oss": "<|channel|>final<|message|>", "chatml": ""}
    written["opened"] = written["qwen"].removeprefix("<think>").strip("\n") + "\n\n"
    assert before == written[kind]


def test_an_answer_of_which_nothing_is_trained_is_counted_and_has_no_loss(prepared, own_outputs):
    thoughtful = [("the cat", "sat on", ""), ("the rain", "<think>\nred\n</think>\n\nold stone", "")]
    plain = [("the cat", "sat on", "")]
    run = prepared("deepseek", [thoughtful if i % 2 else plain for i in range(60)])
    everything = replace(QUICK, rows=100)
    eval_set = make_eval_set(run, everything)
    assert eval_set.refused and set(eval_set.refused.values()) == {NOTHING_TRAINED}
    assert all(row.trained for row in eval_set.rows)
    assert {question.messages[-1].content for question in eval_set.questions} == {"sat on"}
    said = []
    evaluate_runs([run], everything, say=said.append)
    told = f"the chat template refuses {len(eval_set.refused)} test conversations"
    assert told in read_json(own_outputs / "evaluation" / "vanilla" / "summary.json")["refused"]
    assert any(told in line for line in said)


def test_only_answers_of_which_nothing_is_trained_are_one_sentence(prepared):
    talk = [("the cat", "sat on", ""), ("the rain", "<think>\nred\n</think>\n\nold stone", "")]
    run = prepared("deepseek", [talk] * 60)
    with pytest.raises(UserError, match=rf"refuses \d+ test conversations .*{NOTHING_TRAINED}"):
        make_eval_set(run, QUICK)


def test_a_loss_of_no_token_is_refused(tiny_model):
    with pytest.raises(UserError, match="no token of these answers is trained"):
        loss_of_rows(None, [Row("r0", [1, 5, 2], [IGNORE_INDEX] * 3)], 0)


def test_of_all_answers_those_that_the_template_refuses_are_left_out(prepared, own_outputs):
    talk = [("the cat", "<think>\nred\n</think>\n\nsat on", ""), ("the rain", "old stone", "")]
    run = prepared("deepseek", [talk] * 60)
    every = replace(QUICK, answers="all")
    eval_set = make_eval_set(run, every)
    assert {question.messages[-1].content for question in eval_set.questions} == {"old stone"}
    assert all(name.endswith("@1") for name in eval_set.refused)
    assert evaluate_runs([run], every, say=quiet) == []
    told = read_json(own_outputs / "evaluation" / "vanilla" / "summary.json")["refused"]
    assert f"refuses {len(eval_set.refused)} test conversations or answers in them" in told


# --- chat ----------------------------------------------------------------------------------------


@pytest.fixture
def talking(prepared, monkeypatch):
    """Makes a chat whose model gives the replies that are in a list, as ids."""

    def make(kind):
        run = prepared(kind, [[("rain", "sat on", "")]] * 12)
        (session,) = open_sessions(run).values()
        replies = []
        monkeypatch.setattr(chat_session, "generate_stream", lambda *a, **k: iter(replies.pop(0)))
        return session, replies

    return make


EXCHANGES = [
    ("chatml", "", "the cat sat"),
    ("chatml", "", " the cat\n"),
    ("gpt-oss", "", "the cat sat"),
    ("gpt-oss", "", ""),
    ("qwen", "", "the cat sat"),
    ("qwen", THOUGHT, "the cat sat"),
    ("qwen", "red\n\nold <think> stone", "the </think> cat"),
    ("opened", "", "the cat sat"),
    ("opened", THOUGHT, "the cat sat"),
    ("deepseek", "", "the cat sat"),
]


@pytest.mark.parametrize(("kind", "reasoning", "content"), EXCHANGES)
def test_a_reply_as_in_training_gives_the_next_prompt_of_training(talking, kind, reasoning, content):
    session, replies = talking(kind)
    for question in ("c0ntent th0ught <|im_end|>", "and the rain"):  # what stands for a content may be in a question
        asked = (*session.messages, Message("user", question), Message("assistant", content, reasoning=reasoning))
        (*_, trained) = one_per_answer(Conversation("talk", asked))
        row = encode(trained, session.template, session.tokenizer, 999)
        ids = [label for label in row.labels if label != IGNORE_INDEX]
        assert ids[-1] in session.tokenizer.stop_ids
        replies.append(ids[:-1])
        shown = "".join(session.say(question))
        assert shown == session.tokenizer.decode(ids[:-1]).lstrip(), "all that the model wrote is seen"
        assert session.messages == list(asked)
    session.messages.append(Message("user", "old"))
    whole = Conversation("talk", (*asked, Message("user", "old"), Message("assistant", "")))
    assert session.prompt() == prompt_ids(whole, session.template, session.tokenizer)


@pytest.mark.parametrize(
    ("kind", "reply", "content", "reasoning"),
    [
        ("qwen", "<think>red rain</think> the cat", "the cat", "red rain"),  # other white space
        ("qwen", "\n<think>\n</think>\nthe cat\n", "the cat", ""),
        ("opened", "red rain </think>the cat", "the cat", "red rain"),
        ("qwen", "<think>\nred rain", "<think>\nred rain", ""),  # cut off
        ("qwen", " the cat", "the cat", ""),  # not as the template writes
        ("deepseek", "red\n</think>\n\nthe cat", "red\n</think>\n\nthe cat", ""),  # the template removes it itself
        ("chatml", "<think>\nred\n</think>\n\nthe cat", "<think>\nred\n</think>\n\nthe cat", ""),
        ("gpt-oss", "final the cat ", "final the cat", ""),
    ],
)
def test_other_replies_are_split_where_the_template_gives_them_back_and_else_kept(
    talking, kind, reply, content, reasoning
):
    session, replies = talking(kind)
    replies.append(session.tokenizer.encode(reply))
    list(session.say("rain"))
    assert session.messages[1] == Message("assistant", content, reasoning=reasoning)
