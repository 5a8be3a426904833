"""Answers to the exercises of lesson 04, as learners write them."""

import shlex

import numpy as np

WORKER = "minisft.training.worker"


def words(folder, ranks, port, hostfile=("--hostfile", "")):
    return [
        *("deepspeed", *hostfile, "--num_accelerators", ranks),
        *("--master_port", port, "--module", WORKER, folder),
    ]


def in_text(folder, ranks, port):
    return " ".join(w or '""' for w in words(folder, str(ranks), str(port)))


def cut_again(folder, ranks, port):
    before, after = in_text(folder, ranks, port).split('""')
    return [*before.split(), "", *after.split()]


def as_text_of_numbers(folder, ranks, port):
    return tuple(f"{word}" for word in words(folder, ranks, port))


def by_appending(folder, ranks, port):
    result = ["deepspeed", "--hostfile", ""]
    result += f"--num_accelerators {ranks} --master_port {port} --module {WORKER}".split()
    result.append(folder)
    return result


def cut_by_shlex(folder, ranks, port):
    launcher = shlex.split(f"deepspeed --hostfile '' --num_accelerators {ranks} --master_port {port}")
    return [*launcher, "--module", WORKER, folder]


def success_by_sets(code, has_done, phases, ranks):
    return not code and has_done and set(phases) == {"done"} and len(phases) == ranks


def success_by_steps(code, has_done, phases, ranks):
    if code != 0 or not has_done:
        return False
    return len([phase for phase in phases if phase == "done"]) == ranks


def success_by_numpy(code, has_done, phases, ranks):
    return bool(np.sum(np.array(phases) == "done") == ranks and has_done and code == 0)


def first_by_sorting(ranks):
    rest = sorted((when, rank) for rank, (phase, when) in ranks.items() if phase != "done")
    return rest[0][1] if rest else None


def first_by_loop(ranks):
    found = None
    for rank in ranks:
        if ranks[rank][0] != "done" and (found is None or ranks[rank][1] < ranks[found][1]):
            found = rank
    return found


def first_by_numpy(ranks):
    numbers = [rank for rank, (phase, _) in ranks.items() if phase != "done"]
    return np.array(numbers)[np.argmin([ranks[rank][1] for rank in numbers])] if numbers else None


def only_failed(ranks):
    rest = sorted((when, rank) for rank, (phase, when) in ranks.items() if phase == "failed")
    return rest[0][1] if rest else None


def first_of_all(ranks):
    return sorted(ranks, key=lambda rank: ranks[rank][1])[0]


def last_of_all(ranks):
    rest = [rank for rank in ranks if ranks[rank][0] != "done"]
    return sorted(rest, key=lambda rank: ranks[rank][1])[-1] if rest else None


def lowest_rank(ranks):
    rest = [rank for rank in sorted(ranks) if ranks[rank][0] != "done"]
    return rest[0] if rest else None


def complete(names):
    return [n for n in names if n.startswith("checkpoint-") and n.removeprefix("checkpoint-").isdigit()]


def newest_by_sorting(names):
    found = sorted(complete(names), key=lambda n: int(n.split("-")[1]))
    return found[-1] if found else None


def newest_by_steps(names):
    steps = [int(n[11:]) for n in complete(names)]
    return f"checkpoint-{max(steps)}" if steps else None


def newest_by_length(names):
    return max(complete(names), key=lambda n: (len(n), n), default=None)


def digits(name):
    return int("".join(c for c in name if c.isdigit()) or -1)


def newest_in_text_order(names):
    return sorted(complete(names))[-1] if complete(names) else None


def newest_of_anything(names):
    found = [n for n in names if "checkpoint" in n]
    return sorted(found, key=digits)[-1] if found else None


def newest_beginning(names):
    found = [n for n in names if n[:11] == "checkpoint-"]
    return sorted(found, key=digits)[-1] if found else None


WRONG = {
    "04.command": [
        (in_text, "This is one string"),
        (cut_again, "becomes two words"),
        (lambda f, r, p: words(f"{shlex.quote(f)}", str(r), str(p)), "The folder is quoted"),
        (words, "Numbers are among the words"),
        (lambda f, r, p: words(f, str(r), str(p), hostfile=()), "The empty hostfile is missing"),
        (lambda f, r, p: words(f, "2", str(p)), "entry 4 is '2', and '4' is expected"),
    ],
    "04.success": [
        (lambda code, has_done, phases, ranks: not code, "Only the exit code"),
        (lambda code, has_done, phases, ranks: has_done, "Only DONE"),
        (lambda code, has_done, phases, ranks: not code and has_done, "each rank has to report"),
        (lambda code, has_done, phases, ranks: not code and has_done and set(phases) <= {"done"}, "all(...) sees only"),
        (lambda code, has_done, phases, ranks: any(p == "done" for p in phases) and not code and has_done, "One rank"),
    ],
    "04.failure": [
        (only_failed, "A rank that is killed never says"),
        (first_of_all, "no further sign of life, and that is no failure"),
        (last_of_all, "the last rank that ended"),
        (lowest_rank, "The order in time counts"),
        (lambda ranks: 0, "for a killed rank 1"),
    ],
    "04.resume": [
        (newest_in_text_order, "compared as text"),
        (newest_of_anything, "An incomplete checkpoint was chosen"),
        (newest_beginning, "only begins like a checkpoint"),
        (lambda names: next(reversed(complete(names)), None), "no particular order"),
        (lambda names: next(iter(complete(names)), None), "for two checkpoints"),
    ],
}
RIGHT = {
    "04.command": [as_text_of_numbers, by_appending, cut_by_shlex],
    "04.success": [success_by_sets, success_by_steps, success_by_numpy],
    "04.failure": [first_by_sorting, first_by_loop, first_by_numpy],
    "04.resume": [newest_by_sorting, newest_by_steps, newest_by_length],
}
