"""The command line as a user types it: exit codes, one sentence for a mistake, nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import minisft, sharegpt_row

from minisft.system import cores


def in_a_process_of_its_own(*arguments):
    return subprocess.run([sys.executable, "-m", "minisft.cli", *arguments], capture_output=True, text=True)


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last


@pytest.mark.parametrize(
    "verb", ["doctor", "fetch", "encode", "show", "prepare", "launch", "train", "evaluate", "compare", "notebooks"]
)
def test_every_verb_has_help(verb):
    done = minisft(verb, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launch", "--strategy", "zero9"], ["unknown strategy 'zero9'"]),
        (["launch", "--strategy", "zero2", "--ranks", "0"], ["ranks is 0"]),
        (["launch", "--strategy", "zero2", "--ranks", "two"], ["--ranks", "valid integer"]),
        (["launch"], ["--strategy"]),
        (["launch", "-s", "vanilla", "--preset", "huge"], ["unknown preset 'huge'"]),
        (["launch", "-s", "vanilla", "--data", "nowhere.json"], ["nowhere.json", "does not exist"]),
        (["launch", "-s", "vanilla", "--model", "./nowhere"], ["nowhere", "does not exist"]),
        (["train", "nothing"], ["no run 'nothing'"]),
        (["evaluate"], ["no run in outputs/model has a checkpoint"]),
        (["evaluate", "--rows", "0"], ["rows is 0"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_2(arguments, words):
    refused(minisft(*arguments), *words)


def test_a_process_of_its_own_says_and_returns_the_same():
    done = in_a_process_of_its_own("launch", "--strategy", "zero9")
    refused(done, "unknown strategy 'zero9'")
    assert done.stdout == ""
    assert in_a_process_of_its_own("--help").returncode == 0


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "is empty"),
        ("no json", "not JSON"),
        (json.dumps([{"messages": []}]), "empty conversation (1)"),
        (json.dumps([sharegpt_row("a", ("evil\x1b[31m\nrole", "Hi"))]), "unknown role"),
        ('{"id": 1, "conversations": ' + "[" * 100_000, "nested too deeply"),
        (json.dumps([sharegpt_row("a", ("human", "only a question"))]), "no usable conversation"),
    ],
)
def test_bad_data_is_one_sentence_and_exit_2(tmp_path, tiny_model, content, word):
    file = tmp_path / "data.json"
    file.write_text(content)
    arguments = ["encode", file, "--tokenizer", tiny_model, "--out", tmp_path / "rows.jsonl"]
    refused(minisft(*arguments), "data.json", word)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, tiny_model, small_data):
    """A limit on file size stands in for the full disk: writing fails in the middle."""
    out = tmp_path / "rows.jsonl"
    out.write_text("old\n")
    code = (
        "import errno, sys; from pathlib import Path; from minisft import cli\n"
        "def full(self, *a, **k): raise OSError(errno.ENOSPC, 'No space left on device', str(self))\n"
        "Path.replace = full\n"
        f"sys.argv = ['minisft', 'encode', {str(small_data)!r}, '--tokenizer', {str(tiny_model)!r}, "
        f"'--out', {str(out)!r}]\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    refused(done, "no space left on device", "free some")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    assert out.read_text() == "old\n"


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path, tiny_model, small_data):
    done = minisft("encode", small_data, "--tokenizer", tiny_model, "--out", tmp_path / "none" / "rows.jsonl")
    refused(done, "no such file or directory", "none")
    (tmp_path / "file").write_text("")
    arguments = ["launch", "-s", "vanilla", "--model", tiny_model, "--data", small_data]
    refused(minisft(*arguments, MINISFT_OUTPUTS=str(tmp_path / "file")), "file")


def test_encode_never_overwrites_its_input(tmp_path, tiny_model):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([sharegpt_row("a", ("human", "Hi"), ("gpt", "ok"))]))
    before = file.read_text()
    refused(minisft("encode", file, "--tokenizer", tiny_model, "--out", file), "different files")
    assert file.read_text() == before


def test_encode_takes_the_template_and_what_to_train(tmp_path, tiny_model, small_data):
    def encoded(*options):
        out = tmp_path / "rows.jsonl"
        done = minisft("encode", small_data, "--tokenizer", tiny_model, "--out", out, *options)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    each = encoded("--template", "v3", "--train-on", "each", "--truncation", "drop", "--max-length", 60)
    assert len(each) > 120
    assert all(len(row["input_ids"]) <= 60 and row["labels"][-1] == row["input_ids"][-1] for row in each)
    command = ["encode", small_data, "--out", tmp_path / "x"]
    refused(minisft(*command, "--tokenizer", "mistral:v3", "--template", "v7"), "mistral:v3", "leave --template out")
    refused(minisft(*command, "--tokenizer", "mistral:v3", "--truncation", "word"), "truncation 'word'")


def test_encode_writes_rows_and_ledger(tmp_path, tiny_model, small_data):
    out, ledger = tmp_path / "rows.jsonl", tmp_path / "ledger.json"
    done = minisft(
        "encode", small_data, "--tokenizer", tiny_model, "--max-length", 64, "--out", out, "--ledger", ledger
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    counted = json.loads(ledger.read_text())
    assert set(rows[0]) == {"id", "input_ids", "labels"}
    stages = counted["stages"]
    assert list(stages) == ["raw", "cleaned", "templated", "truncated", "trained"]
    assert len(rows) == stages["truncated"]["rows"] == stages["trained"]["rows"]
    assert sum(len(row["input_ids"]) for row in rows) == stages["truncated"]["tokens"]
    assert sum(label != -100 for row in rows for label in row["labels"]) == stages["trained"]["tokens"]
    assert "trained" in done.stderr
    assert max(len(row["input_ids"]) for row in rows) <= 64


def test_show_prints_the_lens_and_no_escape_codes(tmp_path, tiny_model):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([sharegpt_row("a", ("human", "\x1b[31mred"), ("gpt", "ok"))]))
    done = minisft("show", file, "--tokenizer", tiny_model)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    assert "\x1b" not in done.stdout
    refused(minisft("show", file, "--tokenizer", tiny_model, "--row", 7), "--row 7 is outside")
    refused(minisft("show", file, "--tokenizer", tiny_model, "--row", 2**70), f"--row {2**70} is outside")


def test_command_prints_only_the_command(tiny_model, small_data, own_outputs):
    arguments = ["prepare", "-s", "zero3", "--ranks", 4, "--model", tiny_model, "--data", small_data, "--name", "big"]
    done = minisft(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "--num_accelerators 4" in done.stdout
    port = done.stdout.split("--master_port ")[1].split()[0]
    assert f"--master_port {port} " in done.stderr, "what is explained is what is printed"
    assert (own_outputs / "model" / "big" / "deepspeed.json").exists()
    listed = json.loads(minisft("compare", "--json").stdout)
    assert [(row["run"], row["status"]) for row in listed] == [("big", "prepared")]


def test_doctor_json_is_json():
    done = minisft("doctor", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)


def test_more_ranks_than_cores_and_seconds_below_zero(tiny_model, small_data):
    data = ["--model", tiny_model, "--data", small_data]
    done = minisft("prepare", "-s", "zero2", "--ranks", 9, "--batch-size", 1, "--accumulation", 1, *data)
    assert done.returncode == 0
    usable = cores()
    assert (f"Warning: 9 ranks share {usable} core" in done.stderr) == (usable < 9)
    refused(
        minisft("launch", "-s", "vanilla", "--heartbeat-timeout", -1, *data),
        "--heartbeat-timeout is -1",
        "seconds above 0",
    )


def test_a_mistake_in_the_call_spares_the_run_that_it_would_replace(tiny_model, small_data, tmp_path, own_outputs):
    options = ["-s", "zero2", "--model", tiny_model, "--data", small_data]
    assert minisft("prepare", *options).returncode == 0
    done = own_outputs / "model" / "zero2" / "DONE"
    done.write_text("{}")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    for verb, more, says in (
        ("launch", ["--heartbeat-timeout", 0], "--heartbeat-timeout is 0"),
        (
            "launch",
            ["--hostfile", hosts, "--launcher", "none"],
            "use minisft prepare, which prints one command per host",
        ),
        ("launch", ["--launcher", "pdsh"], "--launcher pdsh is for other machines"),
        ("prepare", ["--slurm-nodes", 3], "2 ranks cannot be divided evenly over 3 nodes"),
    ):
        refused(minisft(verb, *options, "--overwrite", *more), says)
        assert done.exists(), more


def test_a_folder_that_has_been_removed_is_one_sentence(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"mkdir x; cd x; rmdir ../x; {sys.executable} -m minisft.cli compare"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    refused(done, "the current folder has been removed")


def test_a_command_says_where_it_is_to_be_run(tiny_model, small_data, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    done = minisft("prepare", "-s", "vanilla", "--model", tiny_model, "--data", small_data)
    assert f"Run this in the folder {Path(__file__).parents[1]}:" in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_check_tells_of_damage_in_the_conversations_to_compare_with(tiny_model, tmp_path, options):
    """Rows that were made from a damaged file match what is left of it."""
    damaged, rows = tmp_path / "cut.json", tmp_path / "rows.jsonl"
    talk = (("human", "the cat"), ("gpt", "sat on"))
    text = json.dumps([sharegpt_row(name, *talk) for name in "abc"])
    damaged.write_text(text[:-20])
    tokenizer = ["--tokenizer", str(tiny_model), "--template", "v2"]
    minisft("encode", str(damaged), "--out", str(rows), *tokenizer)
    done = minisft("check", str(rows), "--against", str(damaged), *tokenizer, *options)
    assert done.returncode == 1
    assert "lost: cut.json is cut off or damaged after 2 whole rows" in done.stderr
    if options:
        assert json.loads(done.stdout)["lost"] == [
            "cut.json is cut off or damaged after 2 whole rows; what follows could not be read"
        ]
