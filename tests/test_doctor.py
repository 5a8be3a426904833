"""minisft.doctor: what is missing is found, and said with what it costs."""

import dataclasses
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from minisft import doctor
from minisft.data.pinned_wheels import SHAREGPT, SMOLLM2
from minisft.doctor import CHECKS, REQUIRED, Check, MachineReport, examine


@pytest.fixture(scope="module")
def report() -> MachineReport:
    return examine()


def check(report: MachineReport, name: str) -> Check:
    return next(c for c in report.checks if c.name == name)


def test_importing_the_module_is_light():
    heavy = "{'torch', 'deepspeed', 'transformers', 'psutil'}"
    code = f"import sys, minisft.doctor; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_examining_does_not_import_deepspeed():
    code = "import sys; from minisft.doctor import examine; examine(); sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_check_has_its_text():
    assert CHECKS.keys() >= REQUIRED
    assert all(consequence and remedy for _, consequence, remedy in CHECKS.values())


def test_text_and_dict_carry_the_same_checks(report):
    listed = json.loads(json.dumps(report.to_dict()))["checks"]
    assert [c["name"] for c in listed] == list(CHECKS)
    assert listed == [dataclasses.asdict(c) for c in report.checks]
    lines = report.text().splitlines()
    for c in report.checks:
        mark = "✓" if c.ok else "✗"
        assert any(line.startswith(f"{mark} {c.name} ") and line.endswith(c.detail) for line in lines), c


def test_only_what_failed_has_a_consequence_and_a_remedy(report):
    for c in report.checks:
        assert bool(c.consequence) == bool(c.remedy) == (not c.ok), c


def test_this_environment_has_what_is_required(report):
    assert report.ok and report.exit_code == 0
    import torch

    assert check(report, "PyTorch").detail.startswith(torch.__version__)
    assert check(report, "GPUs").ok == torch.cuda.is_available()


def test_without_a_compiler_the_consequence_is_said_and_the_exit_code_stays_0(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    report = examine()
    missing = check(report, "C++ compiler")
    assert not missing.ok and "c++" in missing.detail
    assert "zero0 to zero3 do not run" in missing.consequence
    assert "still work" in missing.consequence and "Vanilla" in missing.consequence
    assert "g++" in missing.remedy
    assert report.exit_code == 0
    brief = report.text(brief=True)
    assert "✗ C++ compiler" in brief and "Python headers" not in brief


def test_a_compiler_is_found_by_running_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-cxx")
    program = tmp_path / "my-cxx"
    program.write_text("#!/bin/sh\necho my compiler 1.2\necho more\n")
    program.chmod(0o755)
    assert doctor._compiler() == (True, f"my compiler 1.2 ({program})")
    program.write_text("#!/bin/sh\nexit 1\n")
    assert doctor._compiler()[0] is False


def test_ninja_beside_the_interpreter_needs_no_activation(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert doctor._ninja() == (False, "no ninja on PATH")
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\necho 1.13\n")
    ninja.chmod(0o755)
    assert doctor._ninja() == (True, f"1.13 ({ninja})")


def test_a_space_in_the_environments_path_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/home/me/my course/.venv")
    assert doctor._environment_path() == (False, "/home/me/my course/.venv")


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert doctor._python_headers() == (False, f"no {tmp_path / 'Python.h'}")


def test_a_required_failure_decides_the_exit_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` then raises ImportError
    report = examine()
    broken = check(report, "PyTorch")
    assert not broken.ok and "cannot be imported" in broken.detail and "setup.sh" in broken.remedy
    assert not check(report, "GPUs").ok
    assert report.exit_code == 1 and not report.to_dict()["ok"]
    assert "cannot run yet" in report.text()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["typer", "no-such-package>=1", 'other; extra == "dev"'])
    assert doctor._packages() == (False, "missing: no-such-package")


def test_gpus_are_counted_with_memory_and_bf16(monkeypatch):
    import torch

    cards = [
        SimpleNamespace(name="Card A", total_memory=80 << 30, major=9),
        SimpleNamespace(name="Card B", total_memory=16 << 30, major=7),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    ok, detail = doctor._gpus()
    assert ok and detail == "2: Card A, 80.0 GiB, bf16; Card B, 16.0 GiB, fp16, no bf16"


def test_a_full_disk_and_a_read_only_one_are_told_apart(monkeypatch, tmp_path):
    place = tmp_path / "not" / "yet"
    assert doctor._disk(place, 1)[0]
    assert not doctor._disk(place, 1 << 60)[0]
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor._disk(place, 1) == (False, f"{place} cannot be written to")


def test_fetched_assets_need_no_more_space(monkeypatch, tmp_path):
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    ok, detail = doctor._cache_disk()
    assert not ok and "not fetched yet" in detail
    for wheel in (SMOLLM2, SHAREGPT):
        file = tmp_path / wheel.folder / wheel.kept
        file.parent.mkdir()
        file.write_text("{}")
        record = {"sha256": wheel.sha256, "files": {wheel.kept: {"bytes": 2, "sha256": "0" * 64}}}
        (file.parent / "asset.json").write_text(json.dumps(record))
    ok, detail = doctor._cache_disk()
    assert ok and "are cached" in detail
    file.unlink()  # a record alone is not the data
    ok, detail = doctor._cache_disk()
    assert not ok and detail.endswith(f"{SHAREGPT.name} not fetched yet")


@pytest.mark.attack("15")
@pytest.mark.parametrize("place", ["~nosuch/x", "/dev/null", "/dev/null/x"])
def test_a_folder_that_cannot_be_used_is_a_finding(monkeypatch, place):
    for name in ("MINISFT_CACHE", "MINISFT_OUTPUTS"):
        monkeypatch.setenv(name, place)
    report = examine()
    for name in ("disk, cache", "disk, outputs"):
        assert not check(report, name).ok
        assert "home folder that cannot be found" in check(report, name).detail or place in check(report, name).detail


def test_a_containers_limits_count(monkeypatch):
    monkeypatch.setattr(doctor.system, "memory", lambda: (2 << 30, 1 << 30))
    monkeypatch.setattr(doctor.system, "cores", lambda: 1)
    ok, detail = doctor._memory()
    assert not ok and detail.startswith("2.0 GiB")
    ok, detail = doctor._cores()
    assert not ok and detail.startswith("1 usable")


def test_small_shared_memory_is_reported(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    assert not doctor._shared_memory()[0]


def test_a_closed_loopback_is_reported(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not allowed here")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert doctor._loopback() == (False, "not allowed here")
