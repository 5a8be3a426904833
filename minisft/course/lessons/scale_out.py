"""Lesson 06: what changes when the ranks of a run are on several machines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.lessons.scale_out_hosts import HOSTS
from minisft.course.predictions import Choice, Number, Order, Several
from minisft.launch.hosts import Host, share_out
from minisft.zero.communication import OPERATIONS, bytes_sent

# --- 06.rank_of and 06.host_of ---------------------------------------------------------------------------------------


def rank_of(slots: list[int], host: int, local_rank: int) -> int:
    """Return the global rank of the process with `local_rank` on host number `host`.

    `slots` are the ranks of each host. Hosts, local and global ranks count from 0.
    """
    return sum(slots[:host]) + local_rank


def host_of(slots: list[int], rank: int) -> tuple[int, int]:
    """Return (host, local_rank) of the process with global rank `rank`.

    `slots` are the ranks of each host. Hosts, local and global ranks count from 0.
    """
    host = 0
    while rank >= slots[host]:
        rank -= slots[host]
        host += 1
    return host, rank


def _places(draw: random.Random) -> Iterator[tuple[list[int], int, int, int]]:
    """Random (slots, rank, host, local rank): the package places rank + 1 ranks, and the last is the one."""
    for _ in range(15):
        slots = [draw.randint(1, 8) for _ in range(draw.randint(2, 5))]
        rank = draw.randrange(sum(slots))
        used = share_out([Host(f"gpu-{i}", n) for i, n in enumerate(slots)], rank + 1)
        yield slots, rank, len(used) - 1, used[-1].slots - 1


def _rank_cases(draw: random.Random) -> Iterator[Case]:
    yield Case(([8, 8], 1, 3), 11, "the fourth GPU of the second of two equal hosts")
    yield Case(([8, 4, 8], 2, 0), 12, "the first GPU of the third host, after one of 4")
    yield Case(([4, 4], 0, 0), 0, "the very first GPU")
    for slots, rank, host, local_rank in _places(draw):
        yield Case((slots, host, local_rank), rank)


def _host_of_cases(draw: random.Random) -> Iterator[Case]:
    yield Case(([8, 8], 11), (1, 3), "rank 11 on two hosts of 8")
    yield Case(([8, 8], 8), (1, 0), "rank 8, just past the first host")
    yield Case(([8, 4, 8], 12), (2, 0), "rank 12, with a host of 4 in the middle")
    for slots, rank, host, local_rank in _places(draw):
        yield Case((slots, rank), (host, local_rank))


def _last_of_each(slots: list[int], rank: int) -> tuple[int, int]:
    host = 0
    while rank > slots[host]:
        rank, host = rank - slots[host], host + 1
    return host, rank


EQUAL = (
    "This assumes that all hosts have as many slots. A hostfile may name hosts of different sizes: add up the slots."
)
ROUND_ROBIN = (
    "The ranks are dealt out like cards, one to each host in turn. DeepSpeed fills one host before the next, so that "
    "neighboring ranks share a machine."
)

RANK_OF = Exercise(
    name="06.rank_of",
    answer=rank_of,
    cases=_rank_cases,
    mistakes=(
        Mistake(EQUAL, lambda slots, host, local_rank: host * slots[0] + local_rank),
        Mistake(EQUAL, lambda slots, host, local_rank: host * slots[host] + local_rank),
        Mistake(ROUND_ROBIN, lambda slots, host, local_rank: local_rank * len(slots) + host),
        Mistake(
            "The host's own slots are added as well. Only the hosts before it hold lower ranks.",
            lambda slots, host, local_rank: sum(slots[: host + 1]) + local_rank,
        ),
        Mistake(
            "The ranks are counted from 1. Rank 0 is the first.", lambda slots, host, n: rank_of(slots, host, n) + 1
        ),
        Mistake("This is the local rank. Two hosts would have the same ranks.", lambda slots, host, n: n),
    ),
    hints=("How many ranks are on the hosts before this one?", "Add the local rank to `sum(slots[:host])`."),
    minutes=5,
    ask_next="Which rank reads the data that all others wait for, and on which host should it be?",
)

HOST_OF = Exercise(
    name="06.host_of",
    answer=host_of,
    cases=_host_of_cases,
    mistakes=(
        Mistake(EQUAL, lambda slots, rank: divmod(rank, slots[0])),
        Mistake(ROUND_ROBIN, lambda slots, rank: (rank % len(slots), rank // len(slots))),
        Mistake(
            "The first rank of a host is put on the host before it. A host with 8 slots holds the local ranks 0 to 7.",
            _last_of_each,
        ),
        Mistake(
            "The local rank is the global one. It selects the GPU of its machine, and a machine of 8 has no GPU 11.",
            lambda slots, rank: (host_of(slots, rank)[0], rank),
        ),
        Mistake(
            "The hosts are counted from 1. The first is host 0, as in `--node_rank 0`.",
            lambda slots, rank: (host_of(slots, rank)[0] + 1, host_of(slots, rank)[1]),
        ),
    ),
    hints=(
        "Subtract the slots of one host after another while the rank is not below them.",
        "While `rank >= slots[host]`: subtract `slots[host]` from rank, and go to the next host.",
    ),
    minutes=8,
    ask_next="A heartbeat names a slow rank. Which ranks share its network card?",
)

# --- 06.seconds_on_network -------------------------------------------------------------------------------------------


def seconds_to_send(moved: dict[str, float], ranks: int, gigabits: float) -> float:
    """Return the seconds that one rank sends per step on a ring of `ranks` ranks.

    `moved` holds the bytes of each operation: "all-reduce", "reduce", "reduce-scatter"
    and "all-gather". On a ring, a rank sends (ranks - 1) / ranks of these bytes, and
    twice as much of an all-reduce. A gigabit is 1e9 bits.
    """
    sent = sum(moved.values()) + moved.get("all-reduce", 0)
    return sent * (ranks - 1) / ranks / (gigabits * 1e9 / 8)


def _network_cases(draw: random.Random) -> Iterator[Case]:
    yield Case(({"all-gather": 1e9}, 2, 8), 0.5, "an all-gather of 1 GB by 2 ranks at 8 Gb/s")
    yield Case(({"all-reduce": 1e9, "all-gather": 1e9}, 4, 8), 2.25, "an all-reduce and an all-gather by 4 ranks")
    yield Case(({"all-reduce": 1e9}, 1, 8), 0.0, "one rank, which has nobody to send to")
    for _ in range(10):
        moved = {name: draw.choice((0, 1, 2, 5)) * draw.uniform(1e9, 9e9) for name in OPERATIONS}
        ranks, gigabits = draw.randint(2, 64), draw.choice((1, 10, 100, 400))
        yield Case((moved, ranks, gigabits), bytes_sent(moved, ranks) / (gigabits / 8 * 1e9))


def _sent_once(moved: Mapping[str, float], ranks: int, gigabits: float) -> float:
    return sum(moved.values()) * (ranks - 1) / ranks / (gigabits * 1e9 / 8)


def _scaled(factor: float) -> Callable[[dict[str, float], int, float], float]:
    return lambda moved, ranks, gigabits: factor * seconds_to_send(moved, ranks, gigabits)


SECONDS = Exercise(
    name="06.seconds_on_network",
    answer=seconds_to_send,
    cases=_network_cases,
    mistakes=(
        Mistake(
            "The network's bits are taken for bytes. A byte has 8 bits, so it takes 8 times as long.", _scaled(1 / 8)
        ),
        Mistake(
            "The factor (ranks - 1) / ranks is missing: no rank sends its own part to itself.",
            lambda moved, ranks, gigabits: (sum(moved.values()) + moved.get("all-reduce", 0)) / (gigabits * 1e9 / 8),
        ),
        Mistake(
            "An all-reduce is counted once. On a ring it is a reduce-scatter and an all-gather, so it sends twice.",
            _sent_once,
        ),
        Mistake(
            "Every operation is counted twice. Only an all-reduce sends its bytes in two rounds.",
            lambda moved, ranks, gigabits: 2 * _sent_once(moved, ranks, gigabits),
        ),
        Mistake("A gigabit is taken as 2**30 bits. Networks are rated in powers of ten.", _scaled(1e9 / 2**30)),
        Mistake(
            "This is what all ranks send together. They send at the same time, each over its own link.",
            lambda moved, ranks, gigabits: ranks * seconds_to_send(moved, ranks, gigabits),
        ),
    ),
    hints=(
        "Compute the bytes that one rank sends first, and turn the network's bits per second into bytes per second.",
        "Add the all-reduce once more to the sum of all; times (ranks - 1) / ranks; over gigabits * 1e9 / 8.",
    ),
    minutes=8,
    ask_next="Eight GPUs of one machine share one network card. What changes?",
    tolerance=1e-6,
)

# --- predictions -----------------------------------------------------------------------------------------------------

HOSTFILES = ("no slots", "a host twice", "an unknown name", "a comment", "a blank line")
NETWORKS = ("1 Gb/s", "10 Gb/s", "100 Gb/s", "400 Gb/s", "NVLink 4")

LESSON = Lesson(
    objectives=(
        "write a hostfile, and say which rank runs on which GPU of which machine",
        "read the commands and the SLURM script that start a run on several machines",
        "say which changes of stage or ranks a checkpoint survives, and how to test another one",
        "compute the seconds that a network needs per step, and the fewest GPUs that a model needs",
    ),
    minutes=75,
    predictions={
        "refused": Several(
            asks="which hostfiles are refused",
            stand_in=["no slots", "an unknown name"],
            options=HOSTFILES,
            lesson="What would use other machines than were meant is an error; comments and blank lines are not.",
        ),
        "losses": Choice(
            asks="how far apart the losses on one host and on two are",
            stand_in="1e-5 to 1e-2",
            options=("below 1e-5", "1e-5 to 1e-2", "above 1e-2"),
            lesson="The same numbers are added, at most in another order, wherever the ranks run.",
        ),
        "resumed": Choice(
            asks="how a universal checkpoint of stage 3 resumes at stage 3",
            stand_in="exact",
            options=("exact", "refused", "wrong without an error"),
            lesson="A conversion that raises no error may still lose settings: compare weights before you trust it.",
        ),
        "waiting": Several(
            asks="which networks make the GPUs wait",
            stand_in=list(NETWORKS[:2]),
            options=NETWORKS,
            lesson="Networks are rated in bits per second, and stage 3 sends all parameters three times per step.",
        ),
        "main_memory": Number(
            asks="bytes of main memory per parameter with zero3-offload, over all ranks",
            stand_in=16,
            unit="bytes",
            within=0.03,
            lesson="Offloaded gradients are kept in fp32 as well, which is 4 bytes more than the 16 of the paper.",
        ),
        "least": Order(
            asks="the strategies from the least to the most GPU memory, for 7B on 8 GPUs",
            stand_in=["zero3-offload", "zero2-offload", "zero3", "zero2"],
            options=("zero2", "zero2-offload", "zero3", "zero3-offload"),
            lesson="Stage 2 keeps whole parameters on each GPU; offloading the rest saves less than splitting them.",
        ),
        "gpus": Number(
            asks="the fewest GPUs of 80 GB for 70B without offloading, as a power of two",
            stand_in=16,
            lesson="States alone would fit on 16 GPUs, but activations, buckets and gathered layers need room too.",
        ),
    },
    exercises=(HOSTS, RANK_OF, HOST_OF, SECONDS),
    misconceptions=(
        "That training on several machines needs other code. Only the start of the processes differs.",
        "That a missing hostfile stops DeepSpeed. It warns and trains on one machine.",
        "That 100 Gb/s is 100 gigabytes per second. It is 12.5.",
        "That a checkpoint which loads without an error continues the same training.",
    ),
)
