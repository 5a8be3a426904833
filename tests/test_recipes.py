"""The recipes of CONTRIBUTING.md, each followed in a scratch copy of the package."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import minisft
from minisft import processes

PLAIN = '''
"""Questions and answers on lines of their own."""

from collections.abc import Iterator
from dataclasses import dataclass

from minisft.chat.template import Segment

START = Segment("template", 0, False, text="\\nA:\\n", after="text")


@dataclass(frozen=True)
class LinesTemplate:
    name: str = "lines"
    control_tokens: tuple[str, ...] = ()
    markers: str = "own"
    opening: tuple[Segment, ...] = (START,)
    difference: str = ""
    has_tools: bool = False
    text_arguments: bool = False

    def marks_and_stops(self, hf):
        return (), (hf.eos_token,)

    def leaves_out(self, conversation):
        return []

    def may_follow(self, before, control):
        return True

    def fitted_to(self, tokenizer):
        return self

    def normalized(self, messages):
        return [message for message in messages if message.role != "system"]

    def trained_text(self, answer):
        return answer

    def segments(self, conversation) -> Iterator[Segment]:
        yield Segment("template", 0, False, control="bos")
        turn = 0
        for message in self.normalized(conversation.messages):
            if message.role == "user":
                yield Segment("user", turn, False, text=f"Q: {message.content}")
                yield START
            else:
                yield Segment("assistant", turn, message.trained, text=message.content, after="text")
                yield Segment("assistant", turn, message.trained, control="eos")
                turn += 1

    def prompt_segments(self, conversation):
        segments = list(self.segments(conversation))
        return [s for s in segments if s.turn < segments[-1].turn or s.role != "assistant"]

    def same_at_every_turn(self, conversation):
        return True

    def jinja(self):
        return (
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\\nA:\\n' }}"
            "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
        )
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "scratch" / "minisft"
    shutil.copytree(Path(minisft.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new))


def run(package: Path, *words: object):
    """`minisft`, or Python code, with the scratch copy."""
    command = ["-m", "minisft.cli", *map(str, words)] if words[0] != "-c" else list(words)
    return processes.run([sys.executable, "-P", *command], {"PYTHONPATH": str(package.parent)})


def test_a_chat_template(package, tiny_model, small_data, tmp_path):
    (package / "chat" / "lines.py").write_text(PLAIN)
    registry = package / "chat" / "registry.py"
    edit(
        registry,
        "from minisft.chat.mistral import",
        "from minisft.chat.lines import LinesTemplate\nfrom minisft.chat.mistral import",
    )
    registry.write_text(registry.read_text() + '\nTEMPLATES["lines"] = LinesTemplate()\n')
    out = tmp_path / "rows.jsonl"
    done = run(package, "encode", small_data, "--tokenizer", tiny_model, "--template", "lines", "--out", out)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text().splitlines()[0])
    assert any(label != -100 for label in row["labels"]) and row["labels"][0] == -100
    for data in (small_data, out):
        done = run(package, "check", data, "--tokenizer", tiny_model, "--template", "lines")
        assert done.returncode == 0, done.stdout + done.stderr
    for verb in ("launch", "encode"):
        assert "lines" in run(package, verb, "--help").stdout
    code = (
        "import sys\nfrom minisft.chat import load_tokenizer, template_for\n"
        "from minisft.data.conversations import Conversation, Message\nfrom minisft.labels import encode\n"
        "tokenizer = load_tokenizer(sys.argv[1], 'lines')\ntemplate = template_for(tokenizer)\n"
        "turns = [('user', 'the cat'), ('assistant', 'sat on'), ('user', 'a mat'), ('assistant', 'and saw')]\n"
        "row = encode(Conversation('c', tuple(Message(*turn) for turn in turns)), template, tokenizer, 99)\n"
        "tokenizer.hf.chat_template = template.jinja()\n"
        "chat = [{'role': role, 'content': content} for role, content in turns]\n"
        "print(tokenizer.hf.apply_chat_template(chat)['input_ids'] == row.input_ids)\n"
    )
    done = run(package, "-c", code, str(tiny_model))
    assert done.stdout.strip() == "True", done.stderr


def test_a_strategy(package):
    strategies = package / "zero" / "strategies.py"
    new = 'Strategy("zero1-offload", "deepspeed", stage=1, offloads_optimizer=True),'
    edit(
        strategies,
        '        Strategy("zero2", "deepspeed", stage=2),\n',
        f'        {new}\n        Strategy("zero2", "deepspeed", stage=2),\n',
    )
    code = (
        "from minisft.run import RunConfig\nfrom minisft.zero.strategies import deepspeed_config\n"
        "config = RunConfig(strategy='zero1-offload', ranks=2)\n"
        "made = deepspeed_config('zero1-offload', micro_batch=1, accumulation=1, ranks=2, max_grad_norm=1.0, "
        "precision='bf16', largest_tensor=1000, on_gpu=True)\n"
        "print(made['zero_optimization']['stage'], made['zero_optimization']['offload_optimizer']['device'])\n"
    )
    done = run(package, "-c", code)
    assert done.stdout.split() == ["1", "cpu"], done.stderr
    assert "zero1-offload" in run(package, "prepare", "--help").stdout


def test_a_setting(package, tiny_model, small_data, tmp_path):
    edit(
        package / "run" / "config.py",
        "    warmup: float = setting(\n",
        '    label_smoothing: float = setting(0.0, "share of the target spread over all tokens", limit=FRACTION)\n'
        "    warmup: float = setting(\n",
    )
    assert "--label-smoothing" in run(package, "launch", "--help").stdout
    file = tmp_path / "own.yaml"
    file.write_text("label_smoothing: 0.1\nmax_steps: 1\n")
    code = f"from minisft.run import RunConfig; print(RunConfig.from_file({str(file)!r}, ranks=1).label_smoothing)"
    assert run(package, "-c", code).stdout.strip() == "0.1"
    refused = run(package, "launch", "-s", "vanilla", "--label-smoothing", "2", "-m", tiny_model, "-d", small_data)
    assert refused.returncode == 2 and "label smoothing is 2.0: give a fraction" in refused.stderr


def test_a_metric(package):
    metrics = package / "evaluation" / "metrics.py"
    metrics.write_text(
        metrics.read_text()
        + "\n\ndef mean_words(outputs, references):\n    return sum(len(o.split()) for o in outputs) / len(outputs)\n"
        + '\n\nMETRICS["mean words"] = mean_words\n'
    )
    code = (
        "from minisft.evaluation.metrics import corpus_scores\n"
        "print(corpus_scores(['a b', 'c'], ['a b', 'd'], resamples=0)['more']['mean words'])\n"
    )
    done = run(package, "-c", code)
    assert done.stdout.strip() == "1.5", done.stderr


EXERCISE = '''
from minisft.course.exercises import Case, Exercise, Mistake  # noqa: E402

def count_eos(ids):
    """Return the number of EOS tokens (id 2) in `ids`."""
    return ids.count(2)


def _eos_cases(draw):
    yield Case(([1, 5, 2],), 1, "one answer")
    yield Case(([1, 5, 6],), 0, "an answer that was cut off")
    yield Case(([draw.randint(3, 9) for _ in range(5)],), 0)


LESSON = Lesson(
    objectives=LESSON.objectives,
    minutes=LESSON.minutes,
    exercises=(
        Exercise(
            name="02.eos",
            answer=count_eos,
            cases=_eos_cases,
            mistakes=(Mistake("BOS is counted too.", lambda ids: sum(i < 3 for i in ids)),),
            hints=("Count.", "Count the id 2."),
            minutes=1,
            ask_next="And if padding is EOS?",
        ),
    ),
)
'''


def test_an_exercise(package):
    lesson = package / "course" / "lessons" / "label_masking.py"
    lesson.write_text(lesson.read_text() + EXERCISE)
    code = (
        "from minisft.course import exercise\n"
        "item = exercise('02.eos')\n"
        "print(item.check(None), item.check(lambda ids: ids.count(2)), item.check(lambda ids: len(ids) - 1))\n"
        "print(item.check(lambda ids: sum(i < 3 for i in ids)), item.stub())\n"
    )
    done = run(package, "-c", code)
    for says in ("Not attempted", "Right: 3 of 3", "Not yet: for one answer", "BOS is counted", "your turn"):
        assert says in done.stdout, done.stdout + done.stderr
