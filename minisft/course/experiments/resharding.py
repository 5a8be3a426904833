"""Resume DeepSpeed checkpoints at other ZeRO stages and numbers of ranks: the resume matrix.

    python -m minisft.course.experiments.resharding [--markdown]

Every result is measured. Two ranks train a tiny Llama for three steps at each stage, save, and
train three more steps, which are the reference. Then every stage, on two ranks and on one, loads
each of those checkpoints, as it is and converted to DeepSpeed's universal format, and trains the
same three steps. As in transformers' Trainer, the optimizer has two param groups, with and without
weight decay. If loading gives both groups the same decay, or all parameters one shared step counter
(which every parameter then increments), the attempt is repeated with both repaired after loading.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minisft import processes
from minisft.files import read_json, write_json
from minisft.text import note, say

STAGES = (0, 1, 2, 3)
SAVED_BY = 2  # ranks
ROWS = 6  # per step, divided among the ranks
STEPS = 3  # before the checkpoint, and again after it
DECAYS = (0.5, 0.0)  # of the two param groups; large, so decaying the wrong parameter shows at once
SAME = 1e-6  # largest weight difference that rounding explains (gradients summed in another order)
AS_IT_IS, UNIVERSAL, REPAIRED = WAYS = ("as it is", "universal", "universal, repaired")


@dataclass(frozen=True)
class Resumed:
    """One attempt to resume a checkpoint, and how it compares with the uninterrupted run.

    `difference` is the largest difference of any weight after three more steps, or None if loading
    failed; `moved` is the largest change of any weight in those steps, for comparison; `decays` is
    the weight decay of each param group after loading; `one_counter` is True if parameters share a
    step counter that each of them increments; `refusal` is DeepSpeed's error message.
    """

    saved_stage: int
    saved_ranks: int
    stage: int
    ranks: int
    way: str
    difference: float | None = None
    moved: float = 0.0
    decays: tuple[float, ...] = ()
    one_counter: bool = False
    refusal: str = ""

    @property
    def verdict(self) -> str:
        """Either "exact", "wrong" (no error, but other weights) or "refused"."""
        if self.difference is None:
            return "refused"
        return "exact" if self.difference <= SAME else "wrong"

    @property
    def why(self) -> str:
        """The known causes of a verdict that is not "exact"; empty otherwise."""
        if self.difference is None:
            return self.refusal
        if self.difference <= SAME:
            return ""
        causes = [f"weight decay {self.decays[0]:g} for both param groups"] if len(set(self.decays)) == 1 else []
        causes += ["one shared step counter that every parameter increments"] if self.one_counter else []
        off = f"a weight is off by {self.difference:.1g}; the steps change weights by up to {self.moved:.1g}"
        return "; ".join([*causes, off])


def resume_matrix(ranks: Sequence[int] = (SAVED_BY, 1), say: Callable[[str], None] = say) -> list[Resumed]:
    """Run every attempt in real processes on this machine, in about a minute on two cores.

    `ranks` are the numbers of ranks that resume. Raises `RuntimeError` if a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        say(f"saving at stages 0 to 3 on {SAVED_BY} ranks")
        _start(SAVED_BY, folder)
        attempts: list[Resumed] = []
        for count in ranks:
            say(f"resuming on {count} rank{'s' if count > 1 else ''}")
            _start(count, folder, "--load")
            attempts += read_json(Path(folder) / f"loaded-{count}.json", list[Resumed])
    return attempts


def as_table(attempts: Sequence[Resumed], markdown: bool = False) -> str:
    """Format one line per checkpoint and way, one column per resuming setup: "3 on 2" is stage 3 on
    two ranks.

    "wrong" means that the attempt raises no error but computes different weights.
    """
    targets = list(dict.fromkeys((a.ranks, a.stage) for a in attempts))
    head = ["saved at", "loaded", *(f"{stage} on {ranks}" for ranks, stage in targets)]
    rows = []
    for saved in dict.fromkeys(a.saved_stage for a in attempts):
        for way in WAYS:
            cells = {(a.ranks, a.stage): a.verdict for a in attempts if (a.saved_stage, a.way) == (saved, way)}
            if cells:
                rows.append([f"{saved} on {SAVED_BY}", way, *(cells.get(target, "") for target in targets)])
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *rows)
    )


def _start(ranks: int, folder: str, *options: str) -> None:
    """Run this module as a worker on `ranks` ranks. Raises `RuntimeError` if it fails."""
    command = processes.python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    command += ["--module", "minisft.course.experiments.resharding", "--worker", folder, *options]
    done = processes.run(command, {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


# --- on the ranks ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _engine(stage: int, ranks: int, universal: bool = False) -> Iterator[Any]:
    """Build a DeepSpeed engine of the tiny model, with the same initial weights every time."""
    import torch

    from minisft.course.experiments.shards import live_engine

    torch.manual_seed(0)
    settings = {"checkpoint": {"load_universal": True}} if universal else {}
    engine = live_engine(stage, ranks, optimizer_of=_two_groups, **settings)
    try:
        yield engine
    finally:
        engine.destroy()


def _two_groups(model: Any) -> Any:
    """AdamW with one param group per entry of `DECAYS`, divided as transformers' Trainer does."""
    import torch

    from minisft.zero.parameter_shapes import decayed_names

    decayed = decayed_names(model)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in DECAYS]
    for name, parameter in model.named_parameters():
        groups[name not in decayed]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=1e-2)


def _train(engine: Any, first: int, rank: int, ranks: int) -> None:
    """Train steps `first` to `first` + 2; a step's rows depend only on its number."""
    import torch

    for step in range(first, first + STEPS):
        rows = torch.randint(0, 47, (ROWS, 16), generator=torch.Generator().manual_seed(step))[rank::ranks]
        engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
        engine.step()


def _weights(engine: Any, stage: int) -> list[Any]:
    """Return every full weight in fp32, on each rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = engine.module.parameters()
    return [(safe_get_full_fp32_param(p) if stage else p.detach()).float().cpu().clone() for p in parameters]


def _adamw(engine: Any) -> Any:
    """Return the PyTorch optimizer inside ZeRO's wrapper, if there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _largest(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Return the largest absolute difference between two lists of tensors."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _save_all(folder: Path, rank: int, ranks: int) -> None:
    """Save a checkpoint, its universal conversion and the reference weights for each stage."""
    import torch
    from deepspeed.checkpoint import ds_to_universal

    for stage in STAGES:
        with _engine(stage, ranks) as engine:
            _train(engine, 0, rank, ranks)
            before = _weights(engine, stage)
            engine.save_checkpoint(str(folder / f"stage{stage}"), tag="saved")
            _train(engine, STEPS, rank, ranks)
            after = _weights(engine, stage)
        if rank == 0:
            torch.save({"after": after, "moved": _largest(before, after)}, folder / f"truth{stage}.pt")
            failure = ""
            checkpoint = folder / f"stage{stage}"
            options = {"keep_temp_folder": False, "num_extract_workers": 1, "num_merge_workers": 1, "strict": True}
            paths = {"input_folder": str(checkpoint / "saved"), "output_folder": str(checkpoint / "universal")}
            try:  # stages 1 and 2 lack an entry that the conversion expects; it can inject it
                ds_to_universal.main(argparse.Namespace(**paths, **options, inject_missing_state=stage < 3))
            except Exception as error:  # any exception is a result
                failure = _first_line(error, folder)
            (checkpoint / "conversion.txt").write_text(failure)
        torch.distributed.barrier()


def _load_all(folder: Path, rank: int, ranks: int) -> None:
    """Resume every checkpoint at every stage on these ranks, and write what happened."""
    attempts = []
    for saved, stage in itertools.product(STAGES, STAGES):
        for way in (AS_IT_IS, UNIVERSAL):
            attempts.append(_load(folder, saved, stage, way, rank, ranks))
        if len(set(attempts[-1].decays)) == 1 or attempts[-1].one_counter:
            attempts.append(_load(folder, saved, stage, REPAIRED, rank, ranks))
    if rank == 0:
        write_json(folder / f"loaded-{ranks}.json", [asdict(attempt) for attempt in attempts])


def _load(folder: Path, saved: int, stage: int, way: str, rank: int, ranks: int) -> Resumed:
    """Resume one checkpoint, train the same steps as the reference, and compare the weights."""
    import torch

    attempt = Resumed(saved, SAVED_BY, stage, ranks, way)
    checkpoint = folder / f"stage{saved}"
    tag = "saved" if way == AS_IT_IS else "universal"
    if tag == "universal" and (refusal := (checkpoint / "conversion.txt").read_text()):
        return replace(attempt, refusal=f"not converted: {refusal}")
    with _engine(stage, ranks, tag == "universal") as engine:
        try:
            refusal = "" if engine.load_checkpoint(str(checkpoint), tag=tag)[0] else "nothing was loaded"
        except Exception as error:  # any exception is a result
            refusal = _first_line(error, folder)
        refusals: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(refusals, refusal)
        if any(refusals):  # every rank must return, or the others would wait for it in training
            return replace(attempt, refusal=next(filter(None, refusals)))
        states = [state for state in _adamw(engine).state.values() if "step" in state]
        if way == REPAIRED:
            for group, decay in zip(engine.optimizer.param_groups, DECAYS, strict=True):
                group["weight_decay"] = decay
            for state in states:
                state["step"] = state["step"].clone()  # one counter per parameter again
        decays = tuple(group["weight_decay"] for group in engine.optimizer.param_groups)
        one_counter = len({id(state["step"]) for state in states}) < len(states)
        _train(engine, STEPS, rank, ranks)
        truth = torch.load(folder / f"truth{saved}.pt", weights_only=True)
        difference = _largest(_weights(engine, stage), truth["after"])
        return replace(attempt, difference=difference, moved=truth["moved"], decays=decays, one_counter=one_counter)


def _first_line(error: Exception, folder: Path) -> str:
    """Return the error's type and first sentence, without the temporary folder's path."""
    message = str(error).strip().replace(str(folder), "").split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {message}" if message else f"{type(error).__name__} without a message"


def main() -> None:
    """Print the table, and below it each reason with the cases it applies to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from minisft.course.experiments.shards import work_on_ranks

        work_on_ranks(functools.partial(_load_all if options.load else _save_all, options.worker))
    attempts = resume_matrix(say=note)
    say(f"{as_table(attempts, options.markdown)}\n")
    reasons: dict[str, list[str]] = {}
    for a in attempts:
        if a.why:
            reasons.setdefault(f"{a.verdict}: {a.why}", []).append(f"{a.saved_stage} to {a.stage}")
    for why, cases in reasons.items():
        say(f"{why} ({', '.join(dict.fromkeys(cases))})")


if __name__ == "__main__":
    main()
