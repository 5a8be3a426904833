"""The worker: what every process of a run executes. Started by the command in the run folder, never by hand.

    deepspeed --num_accelerators 2 --module minisft.train outputs/model/zero2

It reads the run folder, trains with transformers' Trainer, and writes metrics, memory, checkpoints and, last of
all, `DONE` or `FAILED`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.launch import SAY
from minisft.runs import Run, write_json


def main() -> None:
    """Train the run whose folder is the last argument (launchers put their own options before it)."""
    rank = int(os.environ.get("RANK", "0"))
    run = Run(Path(sys.argv[-1]).absolute())
    if run.status == "done":
        print(f"{run.name} is trained already: minisft launch --overwrite trains it again", file=sys.stderr)
        sys.exit(2)
    finish_log = _log_to(run.folder / "logs" / f"rank{rank}.log", and_terminal=rank == 0)
    _end_with(os.environ.get("MINISFT_SUPERVISOR"))
    position = {"step": 0}
    try:
        _train(run, rank, position)
    except BaseException as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:500]
        write_once(run.folder / "FAILED", {"rank": rank, **position, "reason": f"{type(error).__name__}: {reason}"})
        finish_log()
        # Not sys.exit: other ranks may be waiting inside a collective, and teardown would wait for them.
        os._exit(1)
    finish_log()
    # Nor here: all is written, and tearing down the threads of a process group now and then aborts the process.
    os._exit(0)


def _end_with(supervisor: str | None) -> None:
    """End this process soon after the one that supervises the run is gone, however it went."""
    if supervisor is None:  # started by hand: there is none
        return

    def watch() -> None:
        import psutil

        while psutil.pid_exists(int(supervisor)):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_once(file: Path, value: Any) -> None:
    """Write `value` unless somebody was first: the first failure is the one to read."""
    try:
        with file.open("x") as stream:
            stream.write(json.dumps(value, indent=2) + "\n")
    except FileExistsError:
        pass


def _train(run: Run, rank: int, position: dict[str, int]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a local folder by now
    import torch

    config = run.config
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != config.ranks:
        raise UserError(f"{run.name} was prepared for {config.ranks} ranks, but {world} started: prepare it again")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # skips DeepSpeed's probing for accelerators
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if run.deepspeed:
        import deepspeed

        # Before the model is built: stage 3 partitions it while loading and must know the ranks by then.
        deepspeed.init_distributed()
        _unlink_shared_memory(rank)

    from minisft.attention import PER_DOCUMENT, supports_padding_free
    from minisft.batches import PaddingFree, PadRight
    from minisft.mistral import MistralTemplate
    from minisft.models import load_model
    from minisft.tokens import HuggingFaceTokenizer
    from minisft.training_data import load_rows

    tokenizer = HuggingFaceTokenizer(run.model_folder, config.template)
    tokenizer.hf.chat_template = MistralTemplate.for_tokenizer(tokenizer, config.template).jinja()
    arguments = _arguments(run, on_gpu)
    model = load_model(run.model_folder, tokenizer)
    model.config.use_cache = False
    model.generation_config.eos_token_id = tokenizer.eos_id
    model.generation_config.pad_token_id = tokenizer.pad_id
    padding_free = supports_padding_free(model)
    if padding_free:
        model.set_attn_implementation(PER_DOCUMENT)
    trainer = _trainer_class()(
        run=run,
        position=position,
        padding_free=padding_free,
        model=model,
        args=arguments,
        train_dataset=load_rows(run.folder / "data").remove_columns("id"),
        data_collator=PaddingFree() if padding_free else PadRight(tokenizer.pad_id),
        processing_class=tokenizer.hf,
    )
    trainer.train()
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        write_json(run.folder / "DONE", {"steps": trainer.state.global_step})
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _unlink_shared_memory(rank: int) -> None:
    """Take away the name of the buffer through which DeepSpeed's CPU ranks talk; its memory goes with its users.

    DeepSpeed 0.19 never removes it: every run would leave 69 MB of main memory per rank taken until the next boot.
    """
    import torch

    torch.distributed.barrier()  # every rank has opened the buffers of all others by now
    place = "_".join((str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(rank)))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}").unlink(missing_ok=True)  # noqa: S108


def _arguments(run: Run, on_gpu: bool) -> Any:
    from transformers import TrainingArguments

    config = run.config
    return TrainingArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=not on_gpu,
        deepspeed=run.deepspeed,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=config.keep_checkpoints,
        save_only_model=not config.resumable,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def _trainer_class() -> type:
    """The Trainer, with one line of metrics per step. A function, because importing transformers takes seconds."""
    import torch
    from transformers import Trainer, TrainerCallback

    from minisft.labels import IGNORE_INDEX
    from minisft.zero_measure import held_bytes, measure

    class Clock(TrainerCallback):
        """Times optimizer steps alone: not loading, saving, or measuring."""

        def __init__(self, trainer: RunTrainer):
            self.trainer = trainer

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.seconds = time.perf_counter() - self.trainer.began
            self.trainer.position["step"] = state.global_step
            if state.global_step == min(2, state.max_steps):  # the second step: all states exist by then
                self.trainer.write_memory()

    class RunTrainer(Trainer):
        """Trainer whose loss is the mean over the trained tokens of the global batch, logits made for those alone."""

        def __init__(self, run: Run, position: dict[str, int], padding_free: bool, **options: Any):
            super().__init__(**options)
            self.run, self.position, self.padding_free = run, position, padding_free
            self.began = self.seconds = 0.0
            self.counts = [0, 0]  # tokens and trained tokens of this rank since the last log
            self.add_callback(Clock(self))

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            self.counts[0] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            self.counts[1] += int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not self.padding_free:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs = dict(inputs)
            targets = inputs.pop("labels")[0, 1:]
            trained = (targets != IGNORE_INDEX).nonzero()[:, 0]
            logits = model(**inputs, logits_to_keep=trained).logits[0]
            total = torch.nn.functional.cross_entropy(logits.float(), targets[trained], reduction="sum")
            # `num_items_in_batch` counts the trained tokens of all ranks and micro-batches; data parallelism then
            # averages over ranks, so each rank's share is scaled back up.
            return total / num_items_in_batch * self.accelerator.num_processes

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            """Write a tied tensor once: DeepSpeed hands over a copy of it under each of its names."""
            for name in getattr(self.model, "all_tied_weights_keys", {}) if state_dict else ():
                state_dict.pop(name, None)
            super()._save(output_dir, state_dict)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                self._write_metrics(logs)
            super().log(logs, start_time)

        def _write_metrics(self, logs: dict[str, float]) -> None:
            if logs["loss"] != logs["loss"]:
                raise FloatingPointError(f"the loss is NaN at step {self.state.global_step}")
            device_type = self.args.device.type
            mine = {
                "tokens": self.counts[0],
                "trained_tokens": self.counts[1],
                "bytes": held_bytes(device_type),
            }
            self.counts = [0, 0]
            ranks = _gather(mine)
            if not self.is_world_process_zero():
                return
            line = {
                "step": self.state.global_step,
                "epoch": round(self.state.epoch, 4),
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": sum(r["tokens"] for r in ranks),
                "trained_tokens": sum(r["trained_tokens"] for r in ranks),
                "seconds": round(self.seconds, 4),
                "bytes": [r["bytes"] for r in ranks],
            }
            with (self.run.folder / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            left = (self.state.max_steps - line["step"]) * self.seconds
            print(
                f"{SAY}step {line['step']:>3}/{self.state.max_steps}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  "
                f"{line['tokens'] / max(self.seconds, 1e-9):,.0f} tokens/s  about {left:.0f} s left",
                flush=True,
            )

        def write_memory(self) -> None:
            """Measure what each rank holds between two steps, by owner, into `memory.json`."""
            model = self.accelerator.unwrap_model(self.model_wrapped)
            mine = {"rank": self.args.process_index} | measure(model, self.optimizer, self.args.device.type)
            ranks = _gather(mine)
            if self.is_world_process_zero():
                write_json(self.run.folder / "memory.json", ranks)

    def _gather(value: Any) -> list[Any]:
        if not torch.distributed.is_initialized():
            return [value]
        values = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values

    return RunTrainer


def _log_to(file: Path, and_terminal: bool) -> Callable[[], None]:
    """Send this process's output, C++ included, to `file`; rank 0 keeps the terminal as well.

    Returns what must be called before the process ends, so that no line is lost.
    """

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

    file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if not and_terminal:
        os.dup2(log, 1)
        os.dup2(log, 2)
        return flush
    terminal = os.dup(1)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)

    def copy() -> None:
        while data := os.read(reading, 1 << 16):
            for place in (log, terminal):
                with suppress(OSError):  # a full disk or a closed terminal must not block the training
                    os.write(place, data)

    copier = threading.Thread(target=copy, daemon=True)
    copier.start()

    def finish() -> None:
        flush()
        os.dup2(log, 1)  # the last writers of the pipe go, and the copier comes to its end
        os.dup2(log, 2)
        copier.join(timeout=2)  # a child that inherited the pipe may hold it open

    return finish


if __name__ == "__main__":
    main()
