"""The resume matrix: what becomes of a DeepSpeed checkpoint that another stage or another number of ranks takes up.

    python -m minisft.course.experiments.resharding [--markdown]

Nothing here is looked up. Two ranks train a tiny Llama for three steps at each stage, save, and train three more,
which is the truth to compare with. Then every stage on two ranks and on one takes up every one of those checkpoints,
as it is and converted to DeepSpeed's universal format, and trains the same three steps. As with transformers' Trainer
the optimizer has two param groups, with and without weight decay. Where loading gives both groups the same decay, or
all parameters one and the same step counter (each then counts the steps of the others, too), the attempt is made once
more, with both set right after loading.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minisft import processes
from minisft.text import note, say

STAGES = (0, 1, 2, 3)
SAVED_BY = 2  # ranks
ROWS = 6  # of a step, shared among the ranks
STEPS = 3  # before the checkpoint, and again after it
DECAYS = (0.5, 0.0)  # of the two param groups; strong, so that a parameter that is decayed by mistake shows at once
SAME = 1e-6  # of a weight: rounding, where ranks add gradients in another order
AS_IT_IS, UNIVERSAL, MENDED = WAYS = ("as it is", "universal", "universal, mended")


@dataclass(frozen=True)
class Resumed:
    """One attempt. `difference` is the largest of any weight after three more steps, None where loading was refused.

    `moved` is how far those steps moved the weight that they moved most, for comparison; `decays` the weight decay of
    each param group after loading; `one_counter` whether parameters share a step counter that each of them moves on;
    `refusal` DeepSpeed's own words.
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
        if self.difference is None:
            return "refused"
        return "exact" if self.difference <= SAME else "wrong"

    @property
    def why(self) -> str:
        """What is known of an attempt that is not exact, in a few words."""
        if self.difference is None:
            return self.refusal
        if self.difference <= SAME:
            return ""
        causes = [f"weight decay {self.decays[0]:g} for both param groups"] if len(set(self.decays)) == 1 else []
        causes += ["one step counter for all parameters, which each of them moves on"] if self.one_counter else []
        off = f"a weight is off by {self.difference:.1g}, where the steps move weights by up to {self.moved:.1g}"
        return "; ".join([*causes, off])


def resume_matrix(ranks: Sequence[int] = (SAVED_BY, 1), say: Callable[[str], None] = say) -> list[Resumed]:
    """Every attempt, by real processes on this machine; about a minute on two cores. Raises `RuntimeError`."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"saving at stages 0 to 3 on {SAVED_BY} ranks")
        _start(SAVED_BY, folder)
        found = []
        for count in ranks:
            say(f"taking them up on {count} rank{'s' if count > 1 else ''}")
            _start(count, folder, "--load")
            rows = json.loads((Path(folder) / f"loaded-{count}.json").read_text())
            found += [Resumed(**row | {"decays": tuple(row["decays"])}) for row in rows]
    return found


def as_table(attempts: Sequence[Resumed], markdown: bool = False) -> str:
    """One line per checkpoint and way, one column for those that took it up: "3 on 2" is stage 3 on two ranks.

    "wrong" is an attempt that runs without a word and computes something else.
    """
    targets = list(dict.fromkeys((a.ranks, a.stage) for a in attempts))
    head = ["saved at", "taken up", *(f"{stage} on {ranks}" for ranks, stage in targets)]
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
    command = processes.python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    command += ["--module", "minisft.course.experiments.resharding", "--worker", folder, *options]
    done = processes.run(command, {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


# --- on the ranks ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _engine(stage: int, ranks: int, universal: bool = False) -> Iterator[Any]:
    """A fresh DeepSpeed engine of the tiny model, the same each time."""
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
    import torch

    from minisft.zero.state_memory import decayed_names

    decayed = decayed_names(model)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in DECAYS]
    for name, parameter in model.named_parameters():
        groups[name not in decayed]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=1e-2)


def _train(engine: Any, first: int, rank: int, ranks: int) -> None:
    """Steps `first` to `first` + 2; the rows of a step depend on its number alone."""
    import torch

    for step in range(first, first + STEPS):
        rows = torch.randint(0, 47, (ROWS, 16), generator=torch.Generator().manual_seed(step))[rank::ranks]
        engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
        engine.step()


def _weights(engine: Any, stage: int) -> list[Any]:
    """Every weight, whole and in fp32, on each rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = engine.module.parameters()
    return [(safe_get_full_fp32_param(p) if stage else p.detach()).float().cpu().clone() for p in parameters]


def _adamw(engine: Any) -> Any:
    """PyTorch's optimizer, inside whatever ZeRO wraps around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _largest(a: Sequence[Any], b: Sequence[Any]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _save_all(folder: Path, rank: int, ranks: int) -> None:
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
            said = ""
            place = folder / f"stage{stage}"
            options = {"keep_temp_folder": False, "num_extract_workers": 1, "num_merge_workers": 1, "strict": True}
            about = {"input_folder": str(place / "saved"), "output_folder": str(place / "universal")}
            try:  # stages 1 and 2 lack an entry that the conversion wants, and it can be told to do without
                ds_to_universal.main(argparse.Namespace(**about, **options, inject_missing_state=stage < 3))
            except Exception as error:  # whatever it raises is the answer
                said = _first_line(error, folder)
            (place / "conversion.txt").write_text(said)
        torch.distributed.barrier()


def _load_all(folder: Path, rank: int, ranks: int) -> list[Resumed]:
    found = []
    for saved, stage in itertools.product(STAGES, STAGES):
        for way in (AS_IT_IS, UNIVERSAL):
            found.append(_load(folder, saved, stage, way, rank, ranks))
        if len(set(found[-1].decays)) == 1 or found[-1].one_counter:
            found.append(_load(folder, saved, stage, MENDED, rank, ranks))
    return found


def _load(folder: Path, saved: int, stage: int, way: str, rank: int, ranks: int) -> Resumed:
    import torch

    about, place = (saved, SAVED_BY, stage, ranks, way), folder / f"stage{saved}"
    tag = "saved" if way == AS_IT_IS else "universal"
    if tag == "universal" and (refusal := (place / "conversion.txt").read_text()):
        return Resumed(*about, refusal=f"not converted: {refusal}")
    with _engine(stage, ranks, tag == "universal") as engine:
        try:
            refusal = "" if engine.load_checkpoint(str(place), tag=tag)[0] else "nothing was loaded"
        except Exception as error:  # whatever it raises is the answer
            refusal = _first_line(error, folder)
        said: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(said, refusal)
        if any(said):
            return Resumed(*about, refusal=next(filter(None, said)))
        states = [state for state in _adamw(engine).state.values() if "step" in state]
        if way == MENDED:
            for group, decay in zip(engine.optimizer.param_groups, DECAYS, strict=True):
                group["weight_decay"] = decay
            for state in states:
                state["step"] = state["step"].clone()
        decays = tuple(group["weight_decay"] for group in engine.optimizer.param_groups)
        one_counter = len({id(state["step"]) for state in states}) < len(states)
        _train(engine, STEPS, rank, ranks)
        truth = torch.load(folder / f"truth{saved}.pt", weights_only=True)
        off = _largest(_weights(engine, stage), truth["after"])
        return Resumed(*about, off, truth["moved"], decays, one_counter)


def _first_line(error: Exception, folder: Path) -> str:
    """What it says, without the temporary folder's name and what follows its first sentence."""
    message = str(error).strip().replace(str(folder), "").split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {message}" if message else f"{type(error).__name__} without a word"


def _work(folder: Path, load: bool) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if load:
        found = _load_all(folder, rank, ranks)
        if rank == 0:
            (folder / f"loaded-{ranks}.json").write_text(json.dumps([asdict(row) for row in found]))
    else:
        _save_all(folder, rank, ranks)
    torch.distributed.barrier()
    os._exit(0)  # tearing down the threads of a process group now and then aborts the process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker, options.load)
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
