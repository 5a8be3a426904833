"""The worker: the program of every rank of a run, started by the command in the run folder.

    deepspeed --num_accelerators 2 --module minisft.training.worker outputs/model/zero2

It reads the run folder, trains with transformers' Trainer, and writes metrics, memory, checkpoints
and, last, `DONE` or `FAILED`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from minisft import processes, system
from minisft.errors import UserError
from minisft.files import open_own, write_json
from minisft.locks import open_lock, try_lock
from minisft.run.folder import Run, checkpoint_step, lock_file, require_harmless_deepspeed, require_own_files
from minisft.run.records import FailureRecord
from minisft.system import is_here
from minisft.text import note, say
from minisft.training import checkpoints
from minisft.training.heartbeat import (
    SUPERVISOR,
    Heartbeat,
    RankStatus,
    end_with_supervisor,
    read_heartbeats,
    write_failure,
)
from minisft.training.progress import log_progress, progress


def main() -> None:
    """Train the run whose folder is the last argument; launchers insert their options before it."""
    processes.open_standard_streams()
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = _run_of_command(sys.argv[1:])
        lock = _lock_unsupervised(run, rank)  # noqa: F841 (held until the process ends)
        terminal = _log_to(run, rank)
    except UserError as error:
        note(error)
        sys.exit(2)
    heartbeat = Heartbeat(run.folder, rank)
    end_with_supervisor(run.folder, heartbeat)
    try:
        _train(run, rank, heartbeat)
    except BaseException as error:
        note(traceback.format_exc())
        with suppress(OSError):
            checkpoints.discard_unfinished(run)
        reason = " ".join(str(error).split())[:500]
        failure: FailureRecord = {
            "rank": rank,
            "step": heartbeat.step,
            "reason": f"{type(error).__name__}: {reason}",
        }
        write_failure(run.folder, failure)
        heartbeat.stop("failed")
        if terminal is not None:
            say(failure["reason"], to=terminal)
        _exit(1)
    heartbeat.stop("done")
    _exit(0)


def _run_of_command(words: list[str]) -> Run:
    """Return the run on the command line. Raises `UserError` if the command does not fit it."""
    parser = argparse.ArgumentParser(prog="minisft.training.worker", allow_abbrev=False)
    parser.add_argument("--prepared", default="")
    parser.add_argument("--trust-remote-code", action="store_true")
    options, _ = parser.parse_known_args(words[:-1])
    run = Run(Path(words[-1] if words else "").absolute(), options.trust_remote_code)
    if not (run.folder / "run.json").exists():
        raise UserError(f"there is no run in {run.folder}: start the command in the project's folder")
    if options.prepared not in ("", run.identity):
        raise UserError(
            f"{run.name} was prepared again since this command was written, with other settings or rows: use the "
            "command in its command.txt, or prepare it once more"
        )
    if run.status == "done":
        raise UserError(f"{run.name} is trained already: minisft launch --overwrite trains it again")
    require_own_files(run)
    require_harmless_deepspeed(run)
    return run


def _lock_unsupervised(run: Run, rank: int) -> TextIO | None:
    """On rank 0, lock a run without a supervisor. Raises `UserError` if it is being trained."""
    if SUPERVISOR in os.environ:
        return None
    last_status = next((status for status in read_heartbeats(run.folder) if status.rank == rank), None)
    lock = open_lock(lock_file(run.folder)) if rank == 0 else None
    if (lock is not None and not try_lock(lock)) or (last_status is not None and _is_training(last_status, run)):
        raise UserError(f"{run.name} is being trained right now: wait for it, or stop it")
    return lock


def _is_training(status: RankStatus, run: Run) -> bool:
    """Return whether the process of a heartbeat still runs on this machine and trains this run.

    A process that is younger than the heartbeat has only been given the same pid: a restarted
    container uses the same pids again.
    """
    import psutil

    if status.ended or not is_here(status.host):
        return False
    with suppress(psutil.Error):
        process = psutil.Process(status.pid)
        words, first_beat = process.cmdline(), min(status.began.values(), default=math.inf)
        return bool(words) and Path(words[-1]).name == run.name and process.create_time() < first_beat + 2
    return False


def _train(run: Run, rank: int, heartbeat: Heartbeat) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a local folder
    # DeepSpeed loads its checkpoints as pickles: allow only tensors and plain values in them.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    config = run.config
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != config.ranks:
        raise UserError(f"{run.name} was prepared for {config.ranks} ranks, but {world} started: prepare it again")
    import torch

    on_gpu = torch.cuda.is_available()
    system.skip_accelerator_search()
    if run.deepspeed:
        import deepspeed
    from minisft.training.build_trainer import make_trainer
    from minisft.training.metrics_log import speed

    if not on_gpu:
        # LOCAL_WORLD_SIZE is set by torchrun, LOCAL_SIZE by DeepSpeed. More threads than cores only
        # wait.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, system.cores() // local_ranks))
    if run.deepspeed:
        _allow_deepspeed_states()
        # Before the model is built: stage 3 partitions it while it loads, and needs the ranks for
        # that.
        deepspeed.init_distributed()
        _unlink_shared_memory(rank)

    heartbeat.says("loading")
    checkpoint = _start_from(run, rank)
    trainer = make_trainer(run, rank, world, on_gpu, checkpoint, heartbeat)
    if checkpoint is not None and checkpoints.is_trained(checkpoint):
        trainer.state.global_step = checkpoint_step(checkpoint)  # the run was killed after its last checkpoint
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()
    if rank == 0:
        logger = trainer.metrics.logger
        speeds = logger.finish() if logger else speed([])
        done = {"steps": trainer.state.global_step, "run": run.identity, **speeds}
        done |= {"observing_seconds": round(trainer.metrics.seconds + trainer.memory.seconds, 3)}
        write_json(run.folder / "DONE", done)
        (run.folder / "FAILED").unlink(missing_ok=True)  # from an earlier try
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _start_from(run: Run, rank: int) -> Path | None:
    """Return the checkpoint to resume from, verified by rank 0; None for the beginning."""
    from minisft.training.dataset import require_as_made, require_same_model

    checkpoint = checkpoints.resume_point(run)
    if rank == 0:
        require_as_made(run.folder)
        require_same_model(run)
        checkpoints.discard_unfinished(run)
        if checkpoint is not None:
            checkpoints.verify(run, checkpoint)
            progress.info(f"resuming from {checkpoint.name}")
    return checkpoint


def _allow_deepspeed_states() -> None:
    """Allow the few plain classes in DeepSpeed's checkpoints; any other class is refused."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Python 3.11.0 to 3.11.3 pickle an enum as a call of getattr, which a restricted reader must
    # not allow; other versions pickle it like this.
    ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (ZeroStageEnum, (stage.value,))
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def _unlink_shared_memory(rank: int) -> None:
    """Unlink the shared memory of DeepSpeed's CPU ranks; it is freed with its last user.

    DeepSpeed 0.19 never removes it: every run would occupy 69 MB of main memory per rank until the
    next boot.
    """
    import torch

    torch.distributed.barrier()  # every rank has opened the buffers of all others by now
    suffix = "_".join((str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(rank)))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{suffix}").unlink(missing_ok=True)  # noqa: S108


def _log_to(run: Run, rank: int) -> TextIO | None:
    """Send this process's output, that of C++ included, to its log; return the terminal of a run started by hand.

    Only rank 0 has a terminal, for the run's progress.
    """
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    terminal = None
    if rank == 0:
        terminal = None if SUPERVISOR in os.environ else os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        log_progress(run.folder, terminal)
    log = open_own(logs / f"rank{rank}.log", os.O_WRONLY | os.O_APPEND, private=True)  # a resumed run continues it
    os.dup2(log, 1)
    os.dup2(log, 2)
    return terminal


def _exit(code: int) -> NoReturn:
    """End this process without teardown, which would wait for ranks that are stuck, and sometimes aborts."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
