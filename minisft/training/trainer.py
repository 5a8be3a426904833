"""Extends transformers' Trainer: one loss for all strategies, atomic checkpoints, metrics."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate.utils import gather_object
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
    """A Trainer whose loss is the mean over the trained tokens of the global batch.

    Logits are computed for the trained tokens only. `batches` yields the rows of this rank's
    micro-batches. `head` is None if the model changes its output layer's output to get the logits.
    `start` is the step of the checkpoint from which the run resumes, else 0. `options` are those of
    Trainer.
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
        self.step_began = 0.0  # `time.perf_counter` when fetching this step's rows began
        self.rows: list[list[tuple[str, int, int]]] = []  # (id, tokens, trained tokens), by micro-batch of this step
        self.losses: list[torch.Tensor] = []  # one per micro-batch of this step
        self.metrics, self.memory = MetricsCallback(self), MemoryCallback(self)
        self.add_callback(self.metrics)  # first, so that the time of a step does not include measuring
        self.add_callback(self.memory)
        if ddp := getattr(self.accelerator, "ddp_handler", None):
            ddp.gradient_as_bucket_view = True  # otherwise every gradient is held twice

    # --- the data and the loss -------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        rows: Any = self.train_dataset
        return _Loader(
            rows,
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
        # `num_items_in_batch` counts the trained tokens of all ranks and micro-batches of the step.
        # Data parallelism averages gradients over the ranks, so each rank's loss is multiplied by
        # their number.
        self.memory.enter_phase("forward")
        loss = self.summed_loss(model, inputs) / num_items_in_batch * self.accelerator.num_processes
        self.memory.enter_phase("backward")
        return loss

    def summed_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss summed over the trained tokens of one micro-batch, a scalar in fp32."""
        positions, targets = trained_positions(batch["labels"])
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "rows")}
        return summed_loss(model, inputs, positions, targets, self.head, self.padding_free)

    def test_loss(self) -> float | None:
        """Return the mean loss over the trained tokens of the test rows, or None if there are none.

        All ranks must call it.
        """
        rows: Any = self.eval_dataset
        if not rows:
            return None
        size, world, rank = self.args.per_device_train_batch_size, self.args.world_size, self.args.process_index
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        total, count = 0.0, 0
        self.model_wrapped.eval()
        # At stage 3 all ranks must call the model equally often: a rank without a batch computes
        # the first one, which is not counted.
        for first in range(0, len(batches), world):
            own_rows = batches[first + rank] if first + rank < len(batches) else None
            batch = self._prepare_inputs(self.data_collator(own_rows or batches[0]))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.summed_loss(self.model_wrapped, batch).item()
            if own_rows:
                total += loss
                count += sum(trained for _, _, trained in batch["rows"])
        self.model_wrapped.train()
        sums = gather_object([(total, count)])
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
        self.accelerator.wait_for_everyone()
        self.saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if first:
                config = self.run.config
                manifest = {
                    "step": step,
                    "strategy": config.strategy,
                    "ranks": config.ranks,
                    "test_loss": loss if loss is not None and math.isfinite(loss) else None,  # NaN is never the best
                    "run": self.run.identity,
                    "resumable": not self.args.save_only_model,
                }
                checkpoints.seal(self.run, checkpoints.scratch_folder(self.run) / f"checkpoint-{step}", manifest)
                checkpoints.rotate(self.run, config.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            checkpoints.discard_unfinished(self.run)  # which also makes room for FAILED
            raise UserError(
                f"checkpoint-{step} could not be saved ({' '.join(str(error).split())[:200]}); is the disk full? "
                "Earlier checkpoints are whole: free some space and start the run again"
            ) from error
        finally:
            self.saving = False
        self.accelerator.wait_for_everyone()
        if self.metrics.logger is not None and loss is not None:
            self.metrics.logger.test_loss(step, loss)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a tied tensor only once: DeepSpeed passes a copy under each of its names."""
        if state_dict is not None:
            for name in getattr(self.model, "all_tied_weights_keys", {}):
                state_dict.pop(name, None)
        super()._save(output_dir, state_dict)


class _Loader(torch.utils.data.DataLoader):
    """A loader that passes the epoch on to its batch sampler, as Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, RankBatches)
        self.batch_sampler.set_epoch(epoch)
