"""Measures one early step: bytes by owner, communication and, optionally, single tensors."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from minisft.files import write_json
from minisft.zero.activation_trace import ACTIVATIONS, BACKWARD, LOGITS
from minisft.zero.communication import Counter, ddp_traffic
from minisft.zero.measured_memory import OTHER, live_tensors, measure, owned_storages, peak_bytes
from minisft.zero.peak_memory import STEP_OWNER
from minisft.zero.strategies import STRATEGIES
from minisft.zero.tensor_tracker import TensorTracker

if TYPE_CHECKING:
    from minisft.training.trainer import RunTrainer

OWNER_IN_PHASE = {
    "forward": ACTIVATIONS,
    "backward": BACKWARD,
    "step": STEP_OWNER,
}  # owner of the tensors made in a phase


class MemoryCallback(TrainerCallback):
    """Measures the second step after a start, when all states exist, and writes `memory.json`.

    DDP rebuilds its buckets in the second step, so there it is the third. Single tensors are
    tracked only with `memory_timeline`, because that slows the step down.
    """

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer
        self.strategy = STRATEGIES[trainer.run.config.strategy]
        self.device = trainer.args.device.type
        self.seconds = 0.0  # time spent on measuring
        self.held: dict[str, dict[str, int]] = {}  # bytes by owner, for each measured moment
        self.in_main_memory: dict[str, dict[str, int]] = {}  # the same for main memory, on a GPU with offloading
        self.moved: dict[str, int] = {}  # bytes that the step communicated, by operation
        self.tracker: TensorTracker | None = None  # set while single tensors are tracked
        self.bytes_before = 0  # of the tensors that exist before the tracked step
        self.pointers_before: set[int] = set()
        self.ddp_buckets: dict[int, int] = {}  # bytes by data pointer
        self.counter: Counter | None = None  # set while communication is counted

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_measured(state, state.global_step + 1):
            return
        if self.strategy.stage is not None and args.world_size > 1:
            self.counter = Counter()
            self.counter.start()
        if self.trainer.run.config.memory_timeline:
            self._track_tensors()
        if self.strategy.stage is not None:
            self._measure_before_the_engine_steps()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_measured(state, state.global_step + 1) and self.strategy.stage is None:
            self._measure("after backward")
            self.enter_phase("step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_measured(state, state.global_step):
            return
        self._stop_counting(args.world_size)
        if self.tracker is not None:
            self._stop_tracking(self.tracker)
        self._measure("at rest")
        self._write(args.process_index)
        self.tracker = None

    def enter_phase(self, phase: str) -> None:
        """Attribute the tensors made from now on to `forward`, `backward` or `step`."""
        if self.tracker is not None:
            if phase != self.tracker.phase:
                self._name_tensors(self.tracker)
            self.tracker.phase, self.tracker.owner = phase, OWNER_IN_PHASE[phase]

    def _is_measured(self, state: Any, step: int) -> bool:
        after = 3 if self.strategy.is_ddp else 2
        return step == min(self.trainer.start + after, state.max_steps)

    def _measure_before_the_engine_steps(self) -> None:
        """Measure when DeepSpeed's step begins: within backward, before Trainer's own hook."""
        engine: Any = self.trainer.model_wrapped
        step = engine.step

        def measured_step(*arguments: Any, **options: Any) -> Any:
            del engine.step  # the instance attribute: the class's own method is used again
            self._measure("after backward")
            self.enter_phase("step")
            return step(*arguments, **options)

        engine.step = measured_step

    def _measure(self, moment: str) -> None:
        """Measure the bytes that this rank holds now, by owner."""
        began = time.perf_counter()
        model, optimizer = self._model(), self.trainer.optimizer
        if self.strategy.is_ddp and moment == "after backward":
            # Gradients are views of DDP's buckets, and DDP keeps the buckets in C++, invisible to
            # Python.
            storages = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
            self.ddp_buckets = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.held[moment] = measure(model, optimizer, self.device, self.ddp_buckets)
        if self.device != "cpu" and self.strategy.offloads:
            self.in_main_memory[moment] = measure(model, optimizer, "cpu")
        self.seconds += time.perf_counter() - began

    def _write(self, rank: int) -> None:
        """Gather the measurements of all ranks and write them to `memory.json`."""
        measured = {"rank": rank, **self.held, "peak": peak_bytes(self.device), "communication": self.moved}
        if self.in_main_memory:
            measured["in main memory"] = self.in_main_memory
        if self.tracker is not None:
            unseen = (size for pointer, size in self.ddp_buckets.items() if pointer not in self.pointers_before)
            measured["step"] = {
                "before": self.bytes_before,
                "unseen": sum(unseen),
                "micro-batches": [
                    {"lengths": [tokens for _, tokens, _ in batch], "trained": sum(n for _, _, n in batch)}
                    for batch in self.trainer.rows
                ],
                **self.tracker.summary(),
            }
        ranks = gather_object([measured])
        if self.trainer.is_world_process_zero():
            write_json(self.trainer.run.folder / "memory.json", ranks)

    def _track_tensors(self) -> None:
        """Start to track every tensor that this rank makes, and when existing ones are freed."""
        tracker = self.tracker = TensorTracker(ACTIVATIONS, "forward")
        owners = self._owners()
        for tensor in live_tensors():
            if tensor.device.type == self.device and (pointer := tensor.untyped_storage().data_ptr()):
                self.pointers_before.add(pointer)
                tracker.see(tensor, owners.get(pointer, (OTHER, 0))[0])
        self.bytes_before = tracker.peak.total
        if self.trainer.head is not None:
            self.trainer.head.around = lambda: tracker.owned_by(LOGITS)
        tracker.__enter__()

    def _stop_tracking(self, tracker: TensorTracker) -> None:
        tracker.__exit__(None, None, None)
        self._name_tensors(tracker)
        if self.trainer.head is not None:
            self.trainer.head.around = nullcontext

    def _stop_counting(self, world_size: int) -> None:
        if self.counter is not None:
            self.moved = self.counter.stop()
            self.counter = None
        elif self.strategy.is_ddp and world_size > 1:
            self.moved = ddp_traffic(self.trainer.model_wrapped)

    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)

    def _owners(self) -> dict[int, tuple[str, int]]:
        return owned_storages(self._model(), self.trainer.optimizer, self.device, self.ddp_buckets)

    def _name_tensors(self, tracker: TensorTracker) -> None:
        """Correct the owners of tracked tensors that have become gradients, states or buckets."""
        owners = self._owners()
        for tensor in live_tensors():
            owner = owners.get(tensor.untyped_storage().data_ptr(), (OTHER, 0))[0]
            if owner != OTHER:
                tracker.name(tensor, owner)
