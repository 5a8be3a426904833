"""`minisft memory`: the states, activations, peak and traffic of every strategy, as JSON or as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from minisft.data.model_folder import MOST_BYTES
from minisft.errors import UserError
from minisft.files import read_json, user_path
from minisft.model.configs import model_config, positions_of, require_positions
from minisft.model.meta_model import MOST_PARAMETERS
from minisft.text import in_bytes, say
from minisft.zero.communication import bytes_sent, predict_traffic
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.peak_memory import at_peak
from minisft.zero.planner import RESERVED, Plan, plan
from minisft.zero.state_memory import (
    DEEPSPEED,
    FORMULAS,
    MOMENTS,
    PAPER,
    generated_config,
    owners_in_main_memory,
    paper_formula,
    predict_states,
    require,
    total_bytes,
)
from minisft.zero.strategies import STRATEGIES, strategy_named

if TYPE_CHECKING:
    from minisft.zero.activation_trace import ActivationTrace

LENGTH = 2048  # tokens
MOST_RANKS, MOST_ACCUMULATION = 100_000, 1_000_000
MOST_ROWS = 512  # of one rank's micro-batch: each row is traced, and real ones have fewer
MOST_TOKENS = 2**31 - 1  # PyTorch stores the offsets of the rows in 32 bits
SHOWN = 8  # up to this many ranks are all listed; of more, only the fullest
STAGE_FORMULAS = {None: "plain", 0: "stage 0", 1: "stage 1, 2", 2: "stage 1, 2", 3: "stage 3"}


def _formulas(strategy: str) -> dict[str, str]:
    """The formulas of a strategy's states, by owner."""
    chosen = strategy_named(strategy)
    return FORMULAS[STAGE_FORMULAS[chosen.stage] + (", offloaded" if chosen.offloads else "")]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of `rows` rows of `length` tokens, all of them trained.

    The default length is `LENGTH`, or the model's number of positions if that is smaller.
    """

    rows: int
    length: int | None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for what, value in (("batch size", self.rows), ("max length", self.length)):
            if value is not None and value < 1:
                raise UserError(f"{what} is {value}: give at least 1")
        if self.rows > MOST_ROWS:
            raise UserError(f"batch size is {self.rows}: give at most {MOST_ROWS}, and --accumulation for the rest")
        if self.rows * (self.length or 1) > MOST_TOKENS:
            raise UserError(
                f"max length is {self.length}: give at most {MOST_TOKENS // self.rows:,} for {self.rows} rows"
            )


@dataclass
class MemoryReport:
    """`strategies` maps each name to the bytes of its ranks by moment, or to the bytes of the paper's formula."""

    model: str
    parameters: float
    precision: str
    ranks: int
    basis: str
    strategies: dict[str, Any]
    shapes: Shapes | None = None
    activations: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    plan: Plan | None = None
    accumulation: int = 1

    def add_plan(self, gpu_bytes: float) -> None:
        activation_bytes = self.activations.get("bytes", 0)
        model = self.shapes or self.parameters
        self.plan = plan(
            model,
            self.ranks,
            gpu_bytes,
            precision=self.precision,
            activation_bytes=activation_bytes,
            accumulation=self.accumulation,
            peaks=self._peaks(),
        )

    def _peaks(self) -> dict[str, float]:
        """Peak bytes on the GPU of each strategy whose peak is known."""
        if self.shapes is None or not self.activations:
            return {}
        known = {name: entry for name, entry in self.strategies.items() if "peak" in entry["ranks"][0]}
        return {name: _fullest(entry, "peak") for name, entry in known.items()}

    def to_dict(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "model": self.model,
            "parameters": int(self.parameters),
            "precision": self.precision,
            "ranks": self.ranks,
            "basis": self.basis,
            "strategies": self.strategies,
            "partitioned": {name: list(strategy_named(name).partitions) for name in self.strategies},
            "note": self.note,
        }
        if self.activations:
            report["activations"] = self.activations
        if self.shapes is not None:
            report["communication"] = {
                name: predict_traffic(self.shapes, name, self.ranks, self.precision, self.accumulation)
                for name in self.strategies
            }
            report["formulas"] = {name: _formulas(name) for name in self.strategies}
        if self.plan is not None:
            best = self.plan.best and self.plan.best.strategy
            options = [vars(option) | {"fits": option.fits} for option in self.plan.options]
            report["plan"] = {"best": best, "reason": self.plan.reason, "options": options}
        return report

    def text(self) -> str:
        lines = [f"{self.model}: {self.parameters:,.0f} parameters, {self.precision}, {self.ranks} rank(s)", self.basis]
        lines.append("")
        if self.shapes is None:
            lines.append(f"{'':<10} {'states':>12}")
            lines += [f"{name:<10} {in_bytes(entry['states']):>12}" for name, entry in self.strategies.items()]
        else:
            lines.append(
                f"{'fullest rank':<14} {'at rest':>12} {'after backward':>15} {'at the peak':>13} {'sent per step':>13}"
            )
            for name, entry in self.strategies.items():
                sizes = [_fullest(entry, moment) for moment in (*MOMENTS, "peak") if moment in entry["ranks"][0]]
                cells = [in_bytes(size) for size in sizes] + ["-"] * (3 - len(sizes))
                traffic = predict_traffic(self.shapes, name, self.ranks, self.precision, self.accumulation)
                cells.append(in_bytes(bytes_sent(traffic, self.ranks)))
                lines.append(f"{name:<14} {cells[0]:>12} {cells[1]:>15} {cells[2]:>13} {cells[3]:>13}")
            if any("in main memory" in entry for entry in self.strategies.values()):
                lines += ["", "with offloading, only what is on the GPU is counted; --json lists all owners"]
        if self.note:
            lines += ["", self.note]
        if self.plan is not None:
            reserved = f"{RESERVED / 1e9:g} GB of each GPU are set aside for CUDA"
            if not self.activations:
                reserved += ", and activations are not counted"
            lines += ["", f"{self.plan.reason} ({reserved})"]
        return "\n".join(lines)


def _fullest(entry: dict[str, Any], moment: str) -> int:
    """Bytes on the GPU of the rank that holds the most there."""
    offloaded = entry.get("in main memory", ())
    return max(sum(size for owner, size in rank[moment].items() if owner not in offloaded) for rank in entry["ranks"])


def memory_of_parameters(parameters: float, ranks: int, precision: str = "bf16", accumulation: int = 1) -> MemoryReport:
    """The states of a bare number of parameters by the paper's formula, in half precision. Raises `UserError`."""
    if not 1 <= parameters <= MOST_PARAMETERS:
        raise UserError(f"{parameters:g} parameters: give a number from 1 to {MOST_PARAMETERS:g}, e.g. 7e9")
    _require(ranks, precision, accumulation)
    if precision == "fp32":
        raise UserError("a bare number uses the paper's formula, which is for half precision: give --model for fp32")
    chosen = [s for s in STRATEGIES.values() if (ranks == 1 or not s.is_one_process) and not s.offloads]
    states = {s.name: {"states": int(paper_formula(parameters, ranks, s.stage))} for s in chosen}
    basis = f"by the paper's formula alone ({PAPER}): no buckets, padding or activations; --model is exact"
    return MemoryReport(
        f"{parameters:g} parameters", parameters, precision, ranks, basis, states, accumulation=accumulation
    )


def _require(ranks: int, precision: str, accumulation: int) -> None:
    require(ranks, precision)
    if ranks > MOST_RANKS:
        raise UserError(f"ranks is {ranks}: give at most {MOST_RANKS:,}")
    if not 1 <= accumulation <= MOST_ACCUMULATION:
        what = "least 1" if accumulation < 1 else f"most {MOST_ACCUMULATION:,}"
        raise UserError(f"accumulation is {accumulation}: give at {what}")


def memory_of_model(
    name: str,
    ranks: int,
    precision: str,
    batch: Batch | None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = say,
    accumulation: int = 1,
    on_gpu: bool = False,
) -> MemoryReport:
    """Exact states of every rank, and the peak of a step with `batch`, from a model's config alone.

    A step has `accumulation` such micro-batches. `on_gpu` predicts for GPUs, on any machine. Raises `UserError`
    for an impossible model, batch or number of ranks.
    """
    _require(ranks, precision, accumulation)
    config = _config(name, trust_remote_code, say)
    shapes = Shapes.of_config(config, trust_remote_code)
    activations: dict[str, Any] = {}
    traces: dict[bool, ActivationTrace] = {}
    note = ""
    if batch is not None:
        length = min(LENGTH, positions_of(config) or LENGTH) if batch.length is None else batch.length
        require_positions(config, length)
        batch = replace(batch, length=length)
        traces, note = _traces(config, precision, batch, length, trust_remote_code, on_gpu, shapes)
        activations = _activations(traces, batch)
    strategies: dict[str, Any] = {}
    for strategy, chosen in STRATEGIES.items():
        if chosen.is_one_process and ranks > 1:
            continue
        settings = generated_config(shapes, strategy, ranks, precision, accumulation, on_gpu)
        predicted = predict_states(shapes, strategy, ranks, precision, settings)
        shown = list(range(ranks))
        if ranks > SHOWN:
            shown = [max(shown, key=lambda rank: total_bytes(predicted[rank]["after backward"]))]
        moments: list[dict[str, Any]] = [{"rank": rank, **predicted[rank]} for rank in shown]
        if trace := traces.get(precision != "fp32" and chosen.stage is not None):
            peaks = at_peak(shapes, strategy, ranks, precision, moments, trace, settings, accumulation)
            moments = [rank | {"peak": peak} for rank, peak in zip(moments, peaks, strict=True)]
        strategies[strategy] = {"ranks": moments}
        if offloaded_owners := owners_in_main_memory(settings):
            strategies[strategy]["in main memory"] = sorted(offloaded_owners)
    return MemoryReport(
        name,
        shapes.parameters,
        precision,
        ranks,
        f"states exact ({DEEPSPEED})",
        strategies,
        shapes,
        activations,
        note,
        accumulation=accumulation,
    )


def _config(name: str, trust_remote_code: bool, say: Callable[[str], None]) -> Any:
    """The transformers config of a model; a local folder or config file needs no weights."""
    from minisft.data import download

    path = user_path(name)
    if path.is_file():
        values = read_json(path, most=MOST_BYTES)
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            raise UserError(f"{name!r} is not a transformers config: give a config.json, a model folder or a hub id")
        return model_config(path, trust_remote_code)
    folder = path if (path / "config.json").is_file() else download.find_model(name, say).path
    return model_config(folder, trust_remote_code)


def _traces(
    config: Any,
    precision: str,
    batch: Batch,
    length: int,
    trust_remote_code: bool,
    on_gpu: bool,
    shapes: Shapes,
) -> tuple[dict[bool, ActivationTrace], str]:
    """Traces of a micro-batch, by whether the weights are in half precision, and a note on what cannot be traced."""
    from minisft.zero.activation_trace import trace_activations

    traces: dict[bool, ActivationTrace] = {}
    note = ""
    for half in sorted({False, precision != "fp32"}):
        try:
            traces[half] = trace_activations(
                config,
                [length] * batch.rows,
                precision=precision,
                half_weights=half,
                activation_checkpointing=batch.activation_checkpointing,
                on_gpu=on_gpu,
                trust_remote_code=trust_remote_code,
                layers=shapes.layers,
            )
        except UserError as error:
            note = str(error)
    if note and traces:
        failed = "ddp, which keeps fp32 weights" if True in traces else "ZeRO, which keeps weights in half precision"
        note = f"for {failed}: {note}"
    return traces, note


def _activations(traces: dict[bool, ActivationTrace], batch: Batch) -> dict[str, Any]:
    """What a micro-batch needs besides the states; with half-precision weights if those were traced."""
    if not traces:
        return {}
    trace = traces[max(traces)]
    return {
        "rows": batch.rows,
        "length": batch.length,
        "bytes": sum(trace.peak_freeing.values()),
        "retained": trace.retained,
        "peak": trace.peak,
        "peak_freeing": trace.peak_freeing,
    }
