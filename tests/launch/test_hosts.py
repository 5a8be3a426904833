"""Hostfiles: what DeepSpeed can use is read as DeepSpeed reads it; all else is refused, with its line."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.launch.hosts import Host, Place, hostfile_text, read_hostfile, require_names, share_out, travelling

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        file = tmp_path / "hosts"
        file.write_text(text)
        return file

    return write


def test_comments_and_blank_lines_are_not_hosts(hostfile):
    file = hostfile("# the cluster\n\n  worker-1   slots=8  # the new one\n10.0.0.2 slots=4\n")
    assert read_hostfile(file) == [Host("worker-1", 8), Host("10.0.0.2", 4)]


@given(st.lists(st.tuples(NAMES, st.integers(1, 64)), min_size=1, max_size=8, unique_by=lambda pair: pair[0]))
def test_deepspeed_reads_the_same(tmp_path_factory, pairs):
    from deepspeed.launcher.runner import fetch_hostfile

    hosts = [Host(name, slots) for name, slots in pairs]
    file = tmp_path_factory.mktemp("hosts") / "hostfile"
    file.write_text(hostfile_text(hosts))
    assert read_hostfile(file) == hosts
    assert dict(fetch_hostfile(str(file))) == dict(pairs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=2\nb\n", "line 2: 'b' is not a host"),
        ("a slots=two\n", "line 1: 'a slots=two' is not a host"),
        ("a slots=2 slots=3\n", "line 1: .* is not a host"),
        ("# x\n-oProxyCommand=sh slots=2\n", "line 2: '-oProxyCommand=sh' cannot be a host's name"),
        ("a;reboot slots=2\n", "line 1: 'a;reboot' cannot be a host's name"),
        ("$(id) slots=2\n", "cannot be a host's name"),
        ("a slots=0\n", "line 1: a has no slots"),
        ("a slots=2\n\nb slots=1\na slots=1\n", "line 4: a is in line 1 already"),
        ("\n# nobody\n", "names no host"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(hostfile, text, says):
    with pytest.raises(UserError, match=says):
        read_hostfile(hostfile(text))


def test_a_missing_hostfile_is_an_error_and_no_local_run(tmp_path):
    with pytest.raises(UserError, match=r"there is no hostfile .*nowhere"):
        read_hostfile(tmp_path / "nowhere")


def test_a_folder_or_bytes_are_no_hostfile(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "pipe")
    reasons = {tmp_path: "not a regular file", tmp_path / "pipe": "not a regular file", tmp_path / "bytes": "not UTF-8"}
    reasons |= {Path("/dev/zero"): "not a regular file"}
    for file, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            read_hostfile(file)


def test_a_name_that_nobody_knows_is_refused(monkeypatch):
    def unknown(name, port):
        raise socket.gaierror(-2, "Name or service not known")

    require_names([Host("127.0.0.1", 1), Host("localhost", 1)])
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"host worker-9 cannot be found \(Name or service not known\)"):
        require_names([Host("worker-9", 1)])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_ranks_fill_one_host_after_the_other(slots, data):
    hosts = [Host(f"h{i}", n) for i, n in enumerate(slots)]
    ranks = data.draw(st.integers(1, sum(slots)))
    taken = share_out(hosts, ranks)
    assert sum(host.slots for host in taken) == ranks
    assert [h.name for h in taken] == [h.name for h in hosts[: len(taken)]]
    assert all(a.slots == b.slots for a, b in zip(taken[:-1], hosts, strict=False))
    with pytest.raises(UserError, match="lower --ranks"):
        share_out(hosts, sum(slots) + 1)


def test_this_machine_is_known_by_its_names():
    here = ("localhost", "127.0.0.1", "127.0.0.2", "::1", socket.gethostname())
    assert all(Host(name, 1).is_here for name in here)
    assert not any(Host(name, 1).is_here for name in ("10.0.0.1", "worker-1", "localhost.example.org"))


def test_settings_of_network_and_libraries_travel_and_devices_do_not():
    environment = {
        **{"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "HF_HUB_OFFLINE": "1", "MINISFT_CACHE": "/c"},
        **{
            "CUDA_VISIBLE_DEVICES": "0",
            "HOME": "/root",
            "PATH": "/bin",
            "MINISFT_SUPERVISOR": "a:1",
            "NCCL_BAD": "a\nb",
            "HF_TOKEN": "hf_secret",
            "MINISFT_API_KEY": "secret",
        },
    }
    assert list(travelling(environment)) == [
        "GLOO_SOCKET_IFNAME",
        "HF_HUB_OFFLINE",
        "MINISFT_CACHE",
        "NCCL_SOCKET_IFNAME",
    ]


@pytest.mark.parametrize("name", ["worker..1", "a" * 64])
def test_a_name_with_a_part_that_cannot_be_is_one_sentence(name):
    with pytest.raises(UserError, match=f"host {name} cannot be found"):
        require_names([Host(name, 1)])


def test_loopback_beside_other_machines_is_refused(hostfile):
    with pytest.raises(UserError, match="the other hosts cannot reach localhost: give this machine's own name"):
        Place.of_hostfile(hostfile("localhost slots=1\n10.0.0.7 slots=1\n"), 2)
    assert Place.of_hostfile(hostfile("10.0.0.7 slots=1\nlocalhost slots=1\n"), 2).master == "10.0.0.7"
    two = Place.of_hostfile(hostfile("127.0.0.1 slots=1\n127.0.0.2 slots=1\n"), 2)
    assert two.master == "127.0.0.1"
