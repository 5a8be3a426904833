"""What was computed before is used again only by the code that would compute it the same."""

import shutil
import sys
from pathlib import Path

import pytest

import minisft
from minisft import processes
from minisft.checksums import code_digest


def digest_with(package: Path, *parts: str) -> str:
    """`code_digest` of a copy of the package, in a process of its own."""
    code = f"from minisft.checksums import code_digest; print(code_digest(*{parts!r}))"
    done = processes.run([sys.executable, "-P", "-c", code], {"PYTHONPATH": str(package.parent)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_edited_template_changes_the_digest_of_rows_and_another_room_does_not(tmp_path):
    copy = tmp_path / "minisft"
    shutil.copytree(Path(minisft.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_with(copy, "data", "chat", "labels")
    assert before == code_digest("data", "chat", "labels")
    (copy / "launch" / "hosts.py").write_text("# edited\n")
    assert digest_with(copy, "data", "chat", "labels") == before
    template = copy / "chat" / "mistral.py"
    template.write_text(template.read_text().replace('"[INST]"', '"[QUESTION]"'))
    assert digest_with(copy, "data", "chat", "labels") != before


def test_rows_of_other_code_are_not_used_again_and_a_run_that_keeps_them_says_so(tiny_model, small_data, monkeypatch):
    from minisft.launch import prepare_run
    from minisft.run.config import RunConfig
    from minisft.training import dataset

    made = []
    real = prepare_run.write_data
    monkeypatch.setattr(prepare_run, "write_data", lambda *a: made.append(1) or real(*a))
    settings = {"model": str(tiny_model), "data": str(small_data)}
    prepare_run.prepare(RunConfig.course(**settings))
    prepare_run.prepare(RunConfig.course(name="again", **settings))
    assert len(made) == 1
    monkeypatch.setattr(dataset, "code_digest", lambda *parts: "other code")
    run = prepare_run.prepare(RunConfig.course(name="edited", **settings))
    assert len(made) == 2
    monkeypatch.undo()
    monkeypatch.setenv("MINISFT_OUTPUTS", str(run.folder.parents[1]))
    (run.folder / "DONE").write_text('{"steps": 6}')
    said = []
    prepare_run.prepare(RunConfig.course(name="edited", **settings), say=said.append)
    assert any("edited keeps the rows" in line for line in said)


def test_a_part_that_does_not_exist_is_an_error():
    with pytest.raises(FileNotFoundError):
        code_digest("no_such_room")
