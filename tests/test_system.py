"""A container's or a batch job's share, as its control groups tell it; a machine without limits is taken whole."""

import os

import psutil
import pytest

from minisft import system

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups in a folder of the test's own: `groups("cpu.max", "max 100000")` sets a limit for all of them."""
    monkeypatch.setattr(system, "CONTROL_GROUPS", tmp_path)
    read = system._read
    monkeypatch.setattr(system, "_read", lambda file: "0::/job/step" if file.name == "cgroup" else read(file))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    (tmp_path / "job" / "step").mkdir(parents=True)

    def write(name, text, group=""):
        (tmp_path / group / name).write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("400000 100000", 4),
        ("9900000 100000", 8),
        ("", 8),
    ],
)
def test_cores_are_what_the_quota_is_worth(groups, quota, expected):
    groups("cpu.max", quota)
    assert system.cores() == expected


def test_the_strictest_of_nested_groups_counts(groups):
    groups("cpu.max", "400000 100000")
    groups("cpu.max", "200000 100000", "job")
    groups("cpu.max", "max 100000", "job/step")
    assert system.cores() == 2


def test_memory_is_what_the_limit_leaves(groups):
    whole = psutil.virtual_memory()
    assert system.memory()[0] == whole.total
    groups("memory.max", "max")
    assert system.memory()[0] == whole.total
    groups("memory.max", str(2 * GIB), "job")
    assert system.memory()[0] == 2 * GIB >= system.memory()[1]
    groups("memory.current", str(2 * GIB), "job")
    assert system.memory() == (2 * GIB, 0)
    groups("memory.stat", f"anon 5\ninactive_file {GIB // 4}", "job")
    assert system.memory() == (2 * GIB, GIB // 4)


def test_this_machine_has_some_of_each():
    total, free = system.memory()
    assert 0 < free <= total <= psutil.virtual_memory().total
    assert 1 <= system.cores() <= os.cpu_count()


def test_of_a_group_outside_the_mounted_ones_the_outermost_counts(groups, monkeypatch):
    read = system._read
    monkeypatch.setattr(system, "_read", lambda file: "0::/../../else" if file.name == "cgroup" else read(file))
    assert list(system._control_groups()) == [system.CONTROL_GROUPS]
    groups("cpu.max", "300000 100000")
    assert system.cores() == 3


@pytest.mark.attack("15")
def test_what_a_control_group_says_may_be_any_bytes(groups, tmp_path):
    for name in ("cpu.max", "memory.max", "memory.stat"):
        (tmp_path / "job" / name).write_bytes(b"\xff\xfe\n")
    assert system.cores() == 8
    assert system.memory()[0] == psutil.virtual_memory().total
