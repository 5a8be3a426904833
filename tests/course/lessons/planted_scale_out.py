"""Answers to the exercises of lesson 06, as learners write them."""

import itertools
import re

import numpy as np
import torch

# --- 06.hosts


def hosts_of(text, check=lambda name, slots, known: slots > 0 and name not in known, first=1):
    hosts, refused = [], []
    for i, line in enumerate(text.split("\n")):
        words = line.split("#")[0].split()
        if not words:
            continue
        name, number = words[0], words[1][len("slots=") :] if len(words) == 2 else ""
        is_good = len(words) == 2 and words[1].startswith("slots=") and number.isdigit()
        if is_good and check(name, int(number), [known for known, _ in hosts]):
            hosts.append((name, int(number)))
        else:
            refused.append(i + first)
    return hosts, refused


def hosts_with_regex(text):
    hosts, refused = {}, []
    for number, line in enumerate(text.splitlines(), start=1):
        found = re.match(r"^\s*([^#\s]+)\s+slots=(\d+)\s*(#.*)?$", line)
        if found and int(found[2]) and found[1] not in hosts:
            hosts[found[1]] = int(found[2])
        elif line.strip() and line.strip()[0] != "#":
            refused.append(number)
    return [[name, hosts[name]] for name in hosts], tuple(refused)


def hosts_with_try(text):
    hosts, refused, seen = [], [], set()
    for number, line in enumerate(text.splitlines()):
        content = line.partition("#")[0].strip()
        if content:
            try:
                name, slots = content.split()
                key, value = slots.split("=")
                if key != "slots" or int(value) < 1 or name in seen:
                    raise ValueError
                seen.add(name)
                hosts.append((name, int(value)))
            except ValueError:
                refused.append(number + 1)
    return [hosts, np.array(refused, dtype=int)]


def one_slot_by_default(text):
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return hosts_of("\n".join(f"{line} slots=1" if line and " " not in line else line for line in lines))


def without_skipped_lines(text):
    return hosts_of("\n".join(line for line in text.splitlines() if line.split("#")[0].strip()))


def comments_refused(text):
    lines = ["" if line.strip().startswith("#") else line for line in text.splitlines()]
    return hosts_of("\n".join(line.replace("#", "comment") for line in lines))


# --- 06.rank_of and 06.host_of


def rank_with_table(slots, host, local_rank):
    ranks = itertools.count()
    return [[next(ranks) for _ in range(n)] for n in slots][host][local_rank]


def rank_with_cumsum(slots, host, local_rank):
    return np.cumsum([0, *slots])[host] + local_rank


def rank_with_tensor(slots, host, local_rank):
    return torch.tensor(slots[:host], dtype=torch.long).sum() + local_rank


def host_with_table(slots, rank):
    return [(host, local) for host, n in enumerate(slots) for local in range(n)][rank]


def host_with_search(slots, rank):
    ends = np.cumsum(slots)
    host = np.searchsorted(ends, rank, side="right")
    return [host, rank - (ends[host] - slots[host])]


def host_with_accumulate(slots, rank):
    starts = [0, *itertools.accumulate(slots)]
    host = max(i for i, start in enumerate(starts[:-1]) if start <= rank)
    return torch.tensor([host, rank - starts[host]])


def past_the_end(slots, rank):
    for host, n in enumerate(slots):
        if rank <= n:
            return host, rank
        rank -= n
    return None


# --- 06.seconds_on_network


def seconds(moved, ranks, gigabits, twice=("all-reduce",), bits=8, own=1):
    total = sum(size * (2 if name in twice else 1) for name, size in moved.items())
    return total * (1 - own / ranks) * bits / (gigabits * 10**9)


def seconds_with_arrays(moved, ranks, gigabits):
    sizes = np.array(list(moved.values()))
    rounds = np.array([1 + (name == "all-reduce") for name in moved])
    return (sizes * rounds).sum() * (ranks - 1) / ranks / 1e9 / (gigabits / 8)


def seconds_with_tensor(moved, ranks, gigabits):
    chunks = torch.tensor([s / ranks for s in [*moved.values(), moved.get("all-reduce", 0)]], dtype=torch.float64)
    return 8 * (chunks * (ranks - 1)).sum() / (gigabits * 1e9)


WRONG = {
    "06.hosts": [
        (one_slot_by_default, "gets one rank"),
        (lambda text: hosts_of(text, lambda name, slots, known: slots > 0), "accepted twice"),
        (lambda text: hosts_of(text, lambda name, slots, known: name not in known), "slots=0"),
        (without_skipped_lines, "Skipped lines are not counted"),
        (lambda text: hosts_of(text, first=0), "counted from 0"),
        (comments_refused, "DeepSpeed accepts it"),
        (lambda text: ([(name, f"{slots}") for name, slots in hosts_of(text)[0]], hosts_of(text)[1]), "slots are text"),
        (lambda text: (hosts_of(text)[0], []), "not reported"),
        (lambda text: hosts_of(text)[0], "entry"),
    ],
    "06.rank_of": [
        (lambda slots, host, local: slots[0] * host + local, "as many slots"),
        (lambda slots, host, local: slots[host] * host + local, "as many slots"),
        (lambda slots, host, local: host + local * len(slots), "dealt out like cards"),
        (lambda slots, host, local: sum(n for i, n in enumerate(slots) if i <= host) + local, "own slots are added"),
        (lambda slots, host, local: rank_with_cumsum(slots, host, local) + 1, "counted from 1"),
        (lambda slots, host, local: local, "This is the local rank"),
    ],
    "06.host_of": [
        (lambda slots, rank: (rank // slots[0], rank % slots[0]), "as many slots"),
        (lambda slots, rank: divmod(rank, len(slots))[::-1], "dealt out like cards"),
        (past_the_end, "first rank of a host"),
        (lambda slots, rank: (host_with_table(slots, rank)[0], rank), "local rank is the global one"),
        (lambda slots, rank: (host_with_table(slots, rank)[0] + 1, host_with_table(slots, rank)[1]), "counted from 1"),
    ],
    "06.seconds_on_network": [
        (lambda moved, ranks, gigabits: seconds(moved, ranks, gigabits, bits=1), "taken for bytes"),
        (lambda moved, ranks, gigabits: seconds(moved, ranks, gigabits, own=0), "its own part to itself"),
        (lambda moved, ranks, gigabits: seconds(moved, ranks, gigabits, twice=()), "counted once"),
        (lambda moved, ranks, gigabits: seconds(moved, ranks, gigabits, twice=moved), "counted twice"),
        (lambda moved, ranks, gigabits: seconds(moved, ranks, gigabits * 1.073741824), "2**30"),
        (lambda moved, ranks, gigabits: ranks * seconds(moved, ranks, gigabits), "all ranks send together"),
    ],
}
RIGHT = {
    "06.hosts": [hosts_of, hosts_with_regex, hosts_with_try],
    "06.rank_of": [rank_with_table, rank_with_cumsum, rank_with_tensor],
    "06.host_of": [host_with_table, host_with_search, host_with_accumulate],
    "06.seconds_on_network": [seconds, seconds_with_arrays, seconds_with_tensor],
}
