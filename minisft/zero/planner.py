"""Chooses a strategy for a model on given GPUs: which ones fit, with how much to spare, and which sends least.

States come from `minisft.zero.state_memory`: exact for a model whose shapes are known, by the paper's formula for a
bare number of parameters. Of those that fit, the one with the least traffic between the ranks is chosen: the less is
split, the less is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from minisft.errors import UserError
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.state_memory import (
    ELEMENT,
    bytes_on_gpu,
    distinct,
    generated_config,
    paper_formula,
    predict_states,
    total_bytes,
)
from minisft.zero.strategies import STRATEGIES, strategy_named

# At equal traffic the simplest comes first. Offloading comes last: main memory is an order of magnitude slower to reach
# than another GPU. DeepSpeed's stage 0 is left out, because it does the same as ddp.
CANDIDATES = tuple(name for name, s in STRATEGIES.items() if not s.is_one_process and s.stage != 0)
MOST_GPU = 1e15  # bytes
RESERVED = 1.5e9  # bytes of a GPU that no run can use: the CUDA context, the libraries' workspaces, fragmentation


@dataclass(frozen=True)
class Option:
    """One strategy on one GPU, in bytes: its states, the total, what is left over, and what each rank sends per step.

    `left` is negative if it does not fit. `sent` is by the multiples of `traffic`, on a ring.
    """

    strategy: str
    states: float
    total: float
    left: float
    sent: float

    @property
    def fits(self) -> bool:
        return self.left >= 0


@dataclass(frozen=True)
class Plan:
    options: tuple[Option, ...]
    best: Option | None
    reason: str


def traffic(strategy: str, accumulation: int = 1, precision: str = "bf16") -> int:
    """What a rank sends per optimizer step, in multiples of the parameters' bytes at `precision`, for many ranks.

    Rajbhandari et al. 2020, section 7: 2 for data parallelism and stages 1 and 2, 3 for stage 3. With accumulation,
    stage 2 reduces every micro-batch's gradients and stage 3 gathers for each; ddp and stage 1 reduce once. In half
    precision ddp's gradients are still fp32 (autocast), twice as much. `minisft.zero.communication` gives bytes.
    """
    stage = strategy_named(strategy).stage
    if strategy_named(strategy).is_one_process:
        return 0
    if stage is None and precision != "fp32":
        return 4
    if stage is None or stage <= 1:
        return 2
    return accumulation + 1 if stage == 2 else 3 * accumulation


def plan(
    model: Shapes | float,
    ranks: int,
    gpu_bytes: float,
    *,
    precision: str = "bf16",
    activation_bytes: float = 0,
    accumulation: int = 1,
    peaks: Mapping[str, float] | None = None,
) -> Plan:
    """What each strategy needs on one of `ranks` GPUs of `gpu_bytes` each, and which of those that fit sends the least.

    `peaks` holds the peak bytes on the GPU of each strategy for which they are known; for the others the states after
    backward and the micro-batch's `activation_bytes` are added up. Raises `UserError` for impossible numbers.
    """
    if not RESERVED < gpu_bytes <= MOST_GPU:
        raise UserError(
            f"the GPU memory is {gpu_bytes / 1e9:.4g} GB, of which {RESERVED / 1e9:g} GB are set aside for CUDA: "
            f"give more than that, and at most {MOST_GPU / 1e9:g} GB, e.g. 80"
        )
    parameters = model.parameters if isinstance(model, Shapes) else model
    options = []
    for strategy in candidates(model, ranks):
        states = state_bytes(model, strategy, ranks, precision)
        needed = (peaks or {}).get(strategy, states + activation_bytes)
        sent = traffic(strategy, accumulation, precision) * parameters * ELEMENT[precision] * (ranks - 1) / ranks
        options.append(Option(strategy, states, needed, gpu_bytes - RESERVED - needed, sent))
    fitting = [option for option in options if option.fits]
    if not fitting:
        leanest = min(options, key=lambda option: option.total)
        return Plan(
            tuple(options),
            None,
            f"nothing fits: even {leanest.strategy} needs {leanest.total / 1e9:,.1f} GB of each GPU, "
            f"{-leanest.left / 1e9:,.1f} GB more than there is; take more GPUs, larger ones, or a smaller micro-batch",
        )

    def price(option: Option) -> tuple[bool, int]:
        return strategy_named(option.strategy).offloads, traffic(option.strategy, accumulation, precision)

    best = min(fitting, key=lambda option: (price(option), options.index(option)))
    reason = f"{best.strategy} fits with {best.left / 1e9:,.1f} GB to spare"
    too_large = [o for o in options if not o.fits and price(o)[1] <= price(best)[1]]
    if too_large:
        does = "do" if len(too_large) > 1 else "does"
        reason += f"; {', '.join(o.strategy for o in too_large)} would send no more, but {does} not fit"
    else:
        reason += ", and nothing that fits sends less"
    if strategy_named(best.strategy).offloads and isinstance(model, Shapes):
        gigabytes = main_memory_bytes(model, best.strategy, ranks, precision) / 1e9
        reason += f"; it needs {gigabytes:,.1f} GB of main memory for each GPU as well"
    return Plan(tuple(options), best, reason)


def candidates(model: Shapes | float, ranks: int) -> tuple[str, ...]:
    """The strategies to consider. A bare number does not determine what ZeRO-3 gathers with offloading."""
    is_exact = isinstance(model, Shapes)
    names = tuple(name for name in CANDIDATES if is_exact or not STRATEGIES[name].offloads_parameters)
    return names if ranks > 1 else ("vanilla", *names[1:])


def state_bytes(model: Shapes | float, strategy: str, ranks: int, precision: str = "bf16") -> float:
    """Bytes of states on the GPU of the fullest rank, after backward; for a bare number, by the paper's formula."""
    if isinstance(model, Shapes):
        return max(on_gpu for on_gpu, _ in _states_by_device(model, strategy, ranks, precision))
    if ranks < 1 or not model > 0:
        raise UserError(f"{model:g} parameters on {ranks} ranks: give at least one of each")
    chosen = strategy_named(strategy)
    # With offloading (Ren et al. 2021, arXiv:2101.06840) only the half-precision parameters stay on the GPU.
    return 2.0 * model if chosen.offloads else paper_formula(model, ranks, chosen.stage)


def main_memory_bytes(model: Shapes, strategy: str, ranks: int, precision: str = "bf16") -> int:
    """Bytes of offloaded states in main memory, after backward, for the rank that holds the most there."""
    return max(in_main_memory for _, in_main_memory in _states_by_device(model, strategy, ranks, precision))


def _states_by_device(model: Shapes, strategy: str, ranks: int, precision: str) -> Iterator[tuple[int, int]]:
    """Bytes of states after backward, on the GPU and in main memory, of each distinct rank."""
    config = generated_config(model, strategy, ranks, precision)
    for rank in distinct(predict_states(model, strategy, ranks, precision, config)):
        held = rank["after backward"]
        on_gpu = total_bytes(bytes_on_gpu(held, config))
        yield on_gpu, total_bytes(held) - on_gpu
