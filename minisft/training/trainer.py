"""transformers' Trainer, with one loss for every strategy, whole checkpoints, and a record of every step."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from minisft.errors import UserError
from minisft.files import write_json
from minisft.model.loss import LossHead, summed_loss, trained_positions
from minisft.run.folder import Run
from minisft.system import release_free_memory
from minisft.training import checkpoints
from minisft.training.batch_sampler import RankBatches
from minisft.training.heartbeat import Heartbeat
from minisft.training.metrics_log import MetricsLogger
from minisft.zero.activation_trace import ACTIVATIONS, BACKWARD, LOGITS
from minisft.zero.communication import Counter, ddp_traffic
from minisft.zero.measured_memory import OTHER, held_bytes, live_tensors, measure, owned_storages, peak_bytes
from minisft.zero.peak_memory import STEP_OWNER
from minisft.zero.strategies import offloads
from minisft.zero.tensor_tracker import TensorTracker

MADE_IN = {"forward": ACTIVATIONS, "backward": BACKWARD, "step": STEP_OWNER}  # the owner of what is made, by phase


class RunTrainer(Trainer):
    """Trainer whose loss is the mean over the trained tokens of the global batch, logits made for those alone.

    `batches` says which rows this rank takes when. `head` is None where the model's logits are more than its output
    layer's output. `start` is the step of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        run: Run,
        batches: RankBatches,
        head: LossHead | None,
        padding_free: bool,
        start: int,
        pulse: Heartbeat,
        **options: Any,
    ):
        super().__init__(**options)
        self.run, self.batches, self.head, self.padding_free = run, batches, head, padding_free
        self.start, self.pulse = start, pulse
        self.observer: MetricsLogger | None = None
        self.saving = False
        self.began = self.seconds = 0.0
        self.observed = 0.0  # seconds spent on observing alone
        self.held: dict[str, dict[str, int]] = {}  # bytes by owner, at each moment measured
        self.in_main_memory: dict[str, dict[str, int]] = {}  # the same of what a GPU's rank has offloaded
        self.allocations: TensorTracker | None = None  # while one step's tensors are followed
        self.base = 0  # bytes that were alive before that step
        self.adopted: set[int] = set()  # where they lie
        self.buckets: dict[int, int] = {}  # DDP's: where they lie, and their bytes
        self.counter: Counter | None = None  # while one step's communication is counted
        self.moved: dict[str, int] = {}  # bytes by operation of that step
        self.rows: list[list[tuple[str, int, int]]] = []  # of this step's micro-batches, on this rank
        self.losses: list[torch.Tensor] = []
        self.add_callback(_Clock(self))
        if ddp := getattr(self.accelerator, "ddp_handler", None):
            ddp.gradient_as_bucket_view = True  # else every gradient is held twice

    # --- the data and the loss -------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return _Loader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, *arguments: Any) -> Any:
        self.began = time.perf_counter()
        self.rows, self.losses = [], []
        self._release_free_memory()
        return super().get_batch_samples(*arguments)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.pulse.micro_batch()
        self.rows.append(inputs["rows"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._release_free_memory()
        self.losses.append(loss)
        return loss

    def _release_free_memory(self) -> None:
        if self.args.device.type == "cpu":
            release_free_memory()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        # `num_items_in_batch` counts the trained tokens of all ranks and micro-batches; data parallelism then
        # averages over ranks, so each rank's share is scaled back up.
        self.enter_phase("forward")
        loss = self.summed_loss(model, inputs) / num_items_in_batch * self.accelerator.num_processes
        self.enter_phase("backward")
        return loss

    def summed_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the loss over the trained tokens of one micro-batch, a scalar in fp32."""
        positions, targets = trained_positions(batch["labels"])
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "rows")}
        return summed_loss(model, inputs, positions, targets, self.head, self.padding_free)

    def test_loss(self) -> float | None:
        """The mean loss over the trained tokens of the test rows, or None without any; all ranks take part."""
        rows = self.eval_dataset
        if not rows:
            return None
        size, world, mine = self.args.per_device_train_batch_size, self.args.world_size, self.args.process_index
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        total, count = 0.0, 0
        self.model_wrapped.eval()
        # At stage 3 the ranks must call the model equally often: one without a batch repeats the first, uncounted.
        for turn in range(0, len(batches), world):
            chosen = batches[turn + mine] if turn + mine < len(batches) else None
            batch = self._prepare_inputs(self.data_collator(chosen or batches[0]))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.summed_loss(self.model_wrapped, batch).item()
            if chosen:
                total += loss
                count += sum(trained for _, _, trained in batch["rows"])
        self.model_wrapped.train()
        sums = self._gather((total, count))
        return sum(t for t, _ in sums) / sum(c for _, c in sums)

    # --- checkpoints -----------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.scratch_folder(self.run) if self.saving else self.run.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        self.pulse.says("testing")
        loss = self.test_loss()
        self.pulse.says("saving")
        first = self.is_world_process_zero()
        if first:
            checkpoints.discard_unfinished(self.run)
        self._barrier()
        self.saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._barrier()
            if first:
                config = self.run.config
                finite = loss if loss is not None and math.isfinite(loss) else None  # NaN is never the best
                about = {"step": step, "strategy": config.strategy, "ranks": config.ranks, "test_loss": finite}
                about |= {"run": self.run.identity}
                folder = checkpoints.scratch_folder(self.run) / f"checkpoint-{step}"
                checkpoints.seal(self.run, folder, about | {"resumable": not self.args.save_only_model})
                checkpoints.rotate(self.run, self.run.config.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            checkpoints.discard_unfinished(self.run)  # makes room for FAILED, too
            raise UserError(
                f"checkpoint-{step} could not be saved ({' '.join(str(error).split())[:200]}); is the disk full? "
                "Earlier checkpoints are whole: free some space and start the run again"
            ) from error
        finally:
            self.saving = False
        self._barrier()
        if first and loss is not None:
            self.observer.test_loss(step, loss)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a tied tensor once: DeepSpeed hands over a copy of it under each of its names."""
        for name in getattr(self.model, "all_tied_weights_keys", {}) if state_dict else ():
            state_dict.pop(name, None)
        super()._save(output_dir, state_dict)

    # --- observation -----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            began = time.perf_counter()
            self._record(logs)
            self.observed += time.perf_counter() - began
        super().log(logs, start_time)

    def _record(self, logs: dict[str, float]) -> None:
        step = self.state.global_step
        grad_norm = logs.get("grad_norm")
        rows = [row for batch in self.rows for row in batch]
        mine = {
            "tokens": sum(tokens for _, tokens, _ in rows),
            "trained_tokens": sum(trained for _, _, trained in rows),
            "bytes": held_bytes(self.args.device.type),
            "bad": [],
        }
        # With fp16 an infinite gradient norm is how the loss scale finds its size, and that step is skipped.
        overflow = grad_norm is not None and not math.isfinite(grad_norm) and not self.args.fp16
        if overflow or not math.isfinite(logs["loss"]):
            pairs = zip(self.rows, self.losses, strict=True)
            mine["bad"] = [[row[0] for row in batch] for batch, loss in pairs if not math.isfinite(loss.item())]
        ranks = self._gather(mine)
        if not math.isfinite(logs["loss"]):
            bad = [name for rank in ranks for batch in rank["bad"] for name in batch]
            raise FloatingPointError(f"the loss is {logs['loss']} at step {step}, in a batch of the rows {_some(bad)}")
        if overflow:
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at step {step}, in a batch of the rows {_some([r[0] for r in rows])}"
            )
        if self.observer is None:
            return
        self.observer.write(
            {
                "step": step,
                "epoch": round(self.state.epoch, 4),
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": grad_norm,
                "tokens": sum(r["tokens"] for r in ranks),
                "trained_tokens": sum(r["trained_tokens"] for r in ranks),
                "seconds": round(self.seconds, 4),
                "bytes": [r["bytes"] for r in ranks],
            }
        )

    def measure_memory(self, moment: str) -> None:
        """Measure what this rank holds now, by owner."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if self.run.config.strategy == "ddp" and moment == "after backward":
            # Gradients are views of DDP's buckets, which it keeps where Python cannot see them.
            storages = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
            self.buckets = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.held[moment] = measure(model, self.optimizer, self.args.device.type, self.buckets)
        if self.args.device.type != "cpu" and offloads(self.run.config.strategy):
            self.in_main_memory[moment] = measure(model, self.optimizer, "cpu")

    def write_memory(self) -> None:
        """All that was measured, of all ranks, into `memory.json`."""
        mine = {"rank": self.args.process_index, **self.held, "peak": peak_bytes(self.args.device.type)}
        mine["communication"] = self.moved
        if self.in_main_memory:
            mine["in main memory"] = self.in_main_memory
        if self.allocations is not None:
            batches = [{"lengths": [n for _, n, _ in b], "trained": sum(t for _, _, t in b)} for b in self.rows]
            about = {"micro-batches": batches}
            unseen = sum(size for pointer, size in self.buckets.items() if pointer not in self.adopted)
            mine["step"] = {"before": self.base, "unseen": unseen, **about, **self.allocations.summary()}
        ranks = self._gather(mine)
        if self.is_world_process_zero():
            write_json(self.run.folder / "memory.json", ranks)

    def follow_allocations(self) -> None:
        """From now on count every tensor that this rank makes, and see those go that are there already."""
        allocations = self.allocations = TensorTracker(ACTIVATIONS, "forward")
        owners = self._owners()
        for tensor in live_tensors():
            if tensor.device.type == self.args.device.type and (pointer := tensor.untyped_storage().data_ptr()):
                self.adopted.add(pointer)
                allocations.see(tensor, owners.get(pointer, (OTHER, 0))[0])
        self.base = allocations.peak.total
        if self.head is not None:
            self.head.around = lambda: allocations.owned_by(LOGITS)
        allocations.__enter__()

    def stop_following(self) -> None:
        if self.allocations is not None:
            self.allocations.__exit__(None, None, None)
            self._name_tensors()
            if self.head is not None:
                self.head.around = nullcontext

    def _owners(self) -> dict[int, tuple[str, int]]:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return owned_storages(model, self.optimizer, self.args.device.type, self.buckets)

    def _name_tensors(self) -> None:
        """Tell the tensors that have been followed apart: which are gradients, states, buckets."""
        owners = self._owners()
        for tensor in live_tensors():
            owner = owners.get(tensor.untyped_storage().data_ptr(), (OTHER, 0))[0]
            if owner != OTHER:
                self.allocations.name(tensor, owner)

    def count_traffic(self) -> None:
        """From now on count what the ranks tell each other."""
        if self.run.deepspeed and self.args.world_size > 1:
            self.counter = Counter()
            self.counter.start()

    def stop_counting(self) -> None:
        if self.counter is not None:
            self.moved = self.counter.stop()
            self.counter = None
        elif self.run.config.strategy == "ddp" and self.args.world_size > 1:
            self.moved = ddp_traffic(self.model_wrapped)

    def enter_phase(self, phase: str) -> None:
        if self.allocations is not None:
            if phase != self.allocations.phase:
                self._name_tensors()
            self.allocations.phase, self.allocations.owner = phase, MADE_IN[phase]

    def _gather(self, value: Any) -> list[Any]:
        if self.args.world_size == 1:
            return [value]
        values = [None] * self.args.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


class _Clock(TrainerCallback):
    """Times steps from fetching their rows to the end of the optimizer's step: not loading, saving, or measuring."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.observer = MetricsLogger(self.trainer.run.folder, self.trainer.start, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.pulse.says("training")
        if self._is_measured(state, state.global_step + 1):
            self.trainer.count_traffic()
            if self.trainer.run.config.memory_timeline:
                self.trainer.follow_allocations()
        # DeepSpeed steps where backward ends, before Trainer's own hooks for that moment.
        if self._is_measured(state, state.global_step + 1) and self.trainer.run.deepspeed:
            engine = self.trainer.model_wrapped
            step = engine.step

            def measured_step(*arguments: Any, **options: Any) -> Any:
                del engine.step
                self._measure("after backward")
                self.trainer.enter_phase("step")
                return step(*arguments, **options)

            engine.step = measured_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_measured(state, state.global_step + 1) and not self.trainer.run.deepspeed:
            self._measure("after backward")
            self.trainer.enter_phase("step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        trainer.seconds = time.perf_counter() - trainer.began
        trainer.pulse.step = state.global_step
        if self._is_measured(state, state.global_step):
            trainer.stop_counting()
            trainer.stop_following()
            self._measure("at rest")
            trainer.write_memory()
            trainer.allocations = None

    def _is_measured(self, state: Any, step: int) -> bool:
        # In the second step all states exist; DDP lays out its buckets anew there, and is itself in the third.
        after = 3 if self.trainer.run.config.strategy == "ddp" else 2
        return step == min(self.trainer.start + after, state.max_steps)

    def _measure(self, moment: str) -> None:
        began = time.perf_counter()
        self.trainer.measure_memory(moment)
        self.trainer.observed += time.perf_counter() - began


class _Loader(torch.utils.data.DataLoader):
    """Tells its batch sampler the epoch, as Trainer expects of a loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _some(names: list[str], most: int = 16) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
