"""Files: compared by what they are, never opened through a link, and read into a shape that was checked."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import minisft, sharegpt_row
from hypothesis import given
from hypothesis import strategies as st

from minisft import checksums, files, locks
from minisft.errors import UserError

attack = pytest.mark.attack
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def data(tmp_path):
    """A file of conversations in a folder with a sub-folder and with links."""
    place = tmp_path / "chats"
    (place / "sub").mkdir(parents=True)
    file = place / "data.json"
    file.write_text(json.dumps([sharegpt_row("a", ("human", "Hi"), ("gpt", "Hello there"))]))
    (tmp_path / "link").symlink_to(place)
    (place / "alias.json").symlink_to(file)
    os.link(file, place / "twin.jsonl")
    return file


@attack("6")
@pytest.mark.parametrize("option", ["--out", "--ledger"])
@pytest.mark.parametrize(
    "spelling", ["data.json", "./data.json", "sub/../data.json", "alias.json", "../link/data.json", "twin.jsonl", "~"]
)
def test_no_output_is_the_data_however_it_is_spelt(data, tiny_model, monkeypatch, option, spelling):
    before = data.read_bytes()
    monkeypatch.chdir(data.parent)
    monkeypatch.setenv("HOME", str(data.parent))
    place = "~/data.json" if spelling == "~" else spelling
    words = {"--out": "rows.jsonl", "--ledger": "ledger.json"} | {option: place}
    outputs = [word for pair in words.items() for word in pair]
    done = minisft("encode", "~/data.json" if spelling == "~" else "data.json", "--tokenizer", tiny_model, *outputs)
    assert done.returncode == 2, done.stderr
    assert "different files" in done.stderr
    assert data.read_bytes() == before


@attack("6")
@pytest.mark.parametrize("option", ["--out", "--ledger"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "m.PT", "q4.gguf", "link.jsonl"])
def test_no_output_replaces_weights(data, tiny_model, tmp_path, option, name):
    """A copy of a model in any folder, by a name of its own or through a link."""
    weights = tmp_path / ("model.safetensors" if name == "link.jsonl" else name)
    weights.write_bytes(b"weights")
    if name == "link.jsonl":
        (tmp_path / name).symlink_to(weights)
    words = {"--out": tmp_path / "rows.jsonl"} | {option: tmp_path / name}
    outputs = [str(word) for pair in words.items() for word in pair]
    done = minisft("encode", data, "--tokenizer", tiny_model, *outputs)
    assert done.returncode == 2 and "may be a model's weights" in done.stderr and len(done.stderr.splitlines()) == 1
    assert weights.read_bytes() == b"weights" and not (tmp_path / "rows.jsonl").exists()


@attack("6")
@pytest.mark.parametrize("out", ["data.json", "new.jsonl", "sub/new.jsonl", "../link/new.jsonl"])
def test_no_output_is_put_among_the_data(data, tiny_model, out):
    folder = data.parent
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = minisft("encode", folder, "--tokenizer", tiny_model, "--out", folder / out)
    assert done.returncode == 2, done.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@attack("6")
def test_no_output_is_a_file_of_the_tokenizer(data, tiny_model):
    before = (tiny_model / "tokenizer.json").read_bytes()
    done = minisft("encode", data, "--tokenizer", tiny_model, "--out", tiny_model / "tokenizer.json")
    assert done.returncode == 2, done.stderr
    assert (tiny_model / "tokenizer.json").read_bytes() == before


@attack("6")
def test_a_pipe_and_a_device_are_written_into_and_stay(data, tiny_model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert minisft("encode", data, "--tokenizer", tiny_model, "--out", pipe).returncode == 0
    reader.join(timeout=10)
    assert [json.loads(line)["id"] for line in read[0].splitlines()] == ["a"]
    assert pipe.is_fifo()
    (tmp_path / "null").symlink_to("/dev/null")
    assert minisft("encode", data, "--tokenizer", tiny_model, "--out", tmp_path / "null").returncode == 0
    assert (tmp_path / "null").is_symlink()
    assert Path("/dev/null").is_char_device()


@attack("6")
def test_standard_output_is_an_output(tmp_path):
    code = "from pathlib import Path\nfrom minisft.files import user_output\n"
    code += "with user_output(Path('/dev/stdout')) as s: s.write('rows\\n')\nprint('and more')\n"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-P", "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "rows\nand more\n"


@attack("6")
def test_a_persons_own_link_leads_to_the_file_that_is_written(tmp_path):
    target, link = tmp_path / "rows.jsonl", tmp_path / "latest"
    target.write_text("old")
    link.symlink_to(target)
    with files.user_output(link) as stream:
        stream.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with pytest.raises(UserError, match="is a folder"), files.user_output(tmp_path):
        pass


@attack("7")
def test_a_file_of_a_run_replaces_a_link_and_never_follows_it(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "command.txt"
    precious.write_text("keep me")
    link.symlink_to(precious)
    with files.written_whole(link) as stream:
        stream.write("deepspeed …")
    assert (precious.read_text(), link.read_text(), link.is_symlink()) == ("keep me", "deepspeed …", False)
    link.unlink()
    link.symlink_to(precious)
    for flags in (os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR):
        with pytest.raises(UserError, match="is a link or a pipe"):
            files.open_own(link, flags)
    with pytest.raises(UserError, match="is a link or a pipe"):
        locks.open_lock(link)
    assert precious.read_text() == "keep me"


def test_what_was_there_stays_until_all_is_written(tmp_path):
    file = tmp_path / "f.json"
    file.write_text("old")
    with pytest.raises(RuntimeError), files.written_whole(file) as stream:
        stream.write("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


@attack("14")
def test_private_files_are_read_by_their_owner_alone(tmp_path):
    files.write_json(tmp_path / "secret.json", {}, private=True)
    assert (tmp_path / "secret.json").stat().st_mode & 0o777 == 0o600


@dataclass(frozen=True)
class Shape:
    step: int
    loss: float
    names: dict[str, int]
    why: str | None = None


@attack("15")
@given(JSON)
def test_any_json_has_the_shape_or_is_named_as_damaged(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("json") / "f.json"
    files.write_json(file, value)
    try:
        found = files.read_json(file, Shape)
    except UserError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
    else:
        assert isinstance(found, Shape)


@attack("15")
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'{"step": 1e999, "loss": 1, "names": {}}', b"NaN"],
)
def test_damaged_json_is_one_sentence(tmp_path, content):
    file = tmp_path / "f.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"f\.json"):
        files.read_json(file, Shape)


@attack("12")
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(UserError, match="not a regular file"):
        files.read_text(tmp_path / "run.json")
    with pytest.raises(UserError, match=r"cannot be read|not a regular file"):
        files.read_text(tmp_path)


@attack("15")
@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser"])
def test_a_home_folder_that_nobody_has_is_one_sentence(path):
    with pytest.raises(UserError, match="home folder that cannot be found"):
        files.user_path(path)


@attack("15")
def test_names_that_are_not_utf8_are_written_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write_json(tmp_path / "run.json", {"model": name})
    assert files.read_json(tmp_path / "run.json") == {"model": name}
    with files.written_whole(tmp_path / "command.txt") as stream:
        stream.write(name)
    assert files.read_text(tmp_path / "command.txt", errors="surrogateescape") == name


@attack("9")
def test_a_checksum_is_not_remembered_for_a_file_that_was_changed_in_secret(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"good" * 100)
    digests = checksums.Digests()
    good = digests.of(file)
    assert (digests.of(file), digests.read, digests.remembered) == (good, 2, 0)  # it was written just now
    time.sleep(0.15)
    assert (digests.of(file), digests.of(file), digests.read, digests.remembered) == (good, good, 3, 1)
    before = file.stat()
    file.write_bytes(b"evil" * 100)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert checksums.Digests().of(file) != good
    checked = checksums.Digests(verify=True)
    checked.of(file)
    assert (checked.read, checked.remembered, checked.how) == (1, 0, "1 file read and hashed")


@attack("7")
def test_what_is_appended_does_not_reach_a_backup_made_of_hard_links(tmp_path):
    log, backup = tmp_path / "rank0.log", tmp_path / "backup.log"
    log.write_bytes(b"the first try \xff\n")
    os.link(log, backup)
    for line in (b"the second\n", b"the third\n"):
        with os.fdopen(files.open_own(log, os.O_WRONLY | os.O_APPEND, private=True), "ab") as stream:
            stream.write(line)
    assert backup.read_bytes() == b"the first try \xff\n"
    assert log.read_bytes() == b"the first try \xff\nthe second\nthe third\n"
    assert sorted(tmp_path.iterdir()) == [backup, log]


@attack("14")
def test_a_replaced_output_can_be_read_by_those_who_could_before(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("old")
    file.chmod(0o600)
    with files.user_output(file) as stream:
        stream.write("new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o600)
