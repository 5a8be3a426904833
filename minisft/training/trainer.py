"""transformers' Trainer, with one loss for every strategy, whole checkpoints, and a record of every step."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer

from minisft.errors import UserError
from minisft.model.loss import LossHead, summed_loss, trained_positions
from minisft.run.folder import Run
from minisft.system import release_free_memory
from minisft.training import checkpoints
from minisft.training.batch_sampler import RankBatches
from minisft.training.heartbeat import Heartbeat
from minisft.training.memory_callback import MemoryCallback
from minisft.training.metrics_callback import MetricsCallback


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
        heartbeat: Heartbeat,
        **options: Any,
    ):
        super().__init__(**options)
        self.run, self.batches, self.head, self.padding_free = run, batches, head, padding_free
        self.start, self.heartbeat = start, heartbeat
        self.saving = False
        self.step_began = 0.0  # when the rows of this step were asked for, by `time.perf_counter`
        self.rows: list[list[tuple[str, int, int]]] = []  # (name, tokens, trained) of this step's micro-batches
        self.losses: list[torch.Tensor] = []
        self.metrics, self.memory = MetricsCallback(self), MemoryCallback(self)
        self.add_callback(self.metrics)  # first: its time of a step must not include measuring
        self.add_callback(self.memory)
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
        self.step_began = time.perf_counter()
        self.rows, self.losses = [], []
        self._release_free_memory()
        return super().get_batch_samples(*arguments)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.heartbeat.micro_batch()
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
        self.memory.enter_phase("forward")
        loss = self.summed_loss(model, inputs) / num_items_in_batch * self.accelerator.num_processes
        self.memory.enter_phase("backward")
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
        sums = self.gather((total, count))
        return sum(t for t, _ in sums) / sum(c for _, c in sums)

    # --- checkpoints -----------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.scratch_folder(self.run) if self.saving else self.run.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        self.heartbeat.says("testing")
        loss = self.test_loss()
        self.heartbeat.says("saving")
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
        if self.metrics.logger is not None and loss is not None:
            self.metrics.logger.test_loss(step, loss)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a tied tensor once: DeepSpeed hands over a copy of it under each of its names."""
        for name in getattr(self.model, "all_tied_weights_keys", {}) if state_dict else ():
            state_dict.pop(name, None)
        super()._save(output_dir, state_dict)

    # --- the other ranks -------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; every rank gets them."""
        if self.args.world_size == 1:
            return [value]
        values = [None] * self.args.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


class _Loader(torch.utils.data.DataLoader):
    """Tells its batch sampler the epoch, as Trainer expects of a loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
