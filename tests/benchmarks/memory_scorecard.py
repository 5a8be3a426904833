"""What ZeRO holds, as five methods predict it, against real runs: the paper, DeepSpeed, accelerate, and minisft.

    python tests/benchmarks/memory_scorecard.py [--models smollm2 path/to/another] [--precisions fp32 bf16]
        [--strategies ddp zero0 zero1 zero2 zero3]

Each strategy trains three steps on two ranks with the course's preset, and measures the states (parameters, gradients,
masters, optimizer states, buckets) of its fullest rank after backward. The methods are asked about the same model:

paper        16 P, (4 + 12/N) P, (2 + 14/N) P, 16 P / N bytes (Rajbhandari et al. 2020)
deepspeed    its estimators for stages 2 and 3, without offload, as its documentation calls them
accelerate   `accelerate estimate-memory`'s sum for training with Adam, which knows no data parallelism
minisft      `minisft.zero.state_memory`

Errors are relative to what was measured; a dash is a method that has no answer for that strategy. Then the peak of a
step: `minisft.zero.peak_memory` against every tensor of a real step, followed one by one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from typing import Any

from minisft.data.download import find_model
from minisft.errors import UserError
from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.model.configs import model_config
from minisft.run.config import RunConfig
from minisft.run.folder import Run
from minisft.zero.activation_trace import trace_activations
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.peak_memory import at_peak
from minisft.zero.state_memory import OWNERS, most_bytes, paper_formula, predict_states, total_bytes
from minisft.zero.strategies import STRATEGIES

RANKS = 2
METHODS = ("paper", "deepspeed", "accelerate", "minisft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES)[1:6], default=list(list(STRATEGIES)[1:6]))
    options = parser.parse_args()
    worst: dict[str, float] = defaultdict(float)
    peaks = []
    print(f"{'states after backward':<24} {'measured GB':>12} " + " ".join(f"{m:>11}" for m in METHODS))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINISFT_OUTPUTS"] = scratch
        for model in options.models:
            for precision in options.precisions:
                for strategy in options.strategies:
                    try:
                        run = train(model, precision, strategy)
                    except (UserError, RunFailed) as error:
                        print(f"memory_scorecard: {error}", file=sys.stderr)
                        sys.exit(2)
                    measured = max(sum(rank["after backward"][owner] for owner in OWNERS) for rank in run.memory)
                    cells = []
                    for method, held in ask(run, model, strategy, precision).items():
                        error = None if held is None else held / measured - 1
                        worst[method] = max(worst[method], abs(error or 0))
                        cells.append(f"{'-' if error is None else f'{error:+.2%}':>11}")
                    print(f"{f'{strategy} {precision}':<24} {measured / 1e9:>12.4f} {' '.join(cells)}", flush=True)
                    peaks.append((f"{strategy} {precision}", *peak(run, model)))
    print(f"{'largest error':<24} {'':>12} " + " ".join(f"{worst[m]:>11.2%}" for m in METHODS))
    print(f"\n{'peak of a step':<24} {'measured GB':>12} {'minisft':>11}")
    for name, measured, predicted in peaks:
        print(f"{name:<24} {measured / 1e9:>12.4f} {predicted / measured - 1:>+11.2%}")
    print(f"{'largest error':<24} {'':>12} {max(abs(b / a - 1) for _, a, b in peaks):>11.2%}")


def train(model: str, precision: str, strategy: str) -> Run:
    config = RunConfig.course(strategy, model=model, precision=precision, max_steps=3, save_steps=3, eval_rows=0)
    return launch(prepare(config, overwrite=True, say=lambda _: None), say=lambda _: None)


def ask(run: Run, model: str, strategy: str, precision: str) -> dict[str, float | None]:
    """Bytes on one rank by each method."""
    config = model_config(find_model(model).path, trust_remote_code=False)
    shapes = Shapes.of_config(config)
    return {
        "paper": paper_formula(shapes.parameters, RANKS, STRATEGIES[strategy].stage),
        "deepspeed": deepspeed_says(config, shapes.parameters, strategy),
        "accelerate": accelerate_says(config, precision),
        "minisft": most_bytes(predict_states(shapes, strategy, RANKS, precision, run.deepspeed), "after backward"),
    }


def peak(run: Run, model: str) -> tuple[int, int]:
    """Bytes at the worst moment of the followed step, on the rank that holds the most: measured and predicted."""
    config = model_config(find_model(model).path, trust_remote_code=False)
    strategy, ranks, precision = run.config.strategy, run.config.ranks, run.precision
    shapes = Shapes.of_config(config)
    predicted = predict_states(shapes, strategy, ranks, precision, run.deepspeed)
    half = precision != "fp32" and STRATEGIES[strategy].stage is not None
    found = []
    for rank in run.memory:
        step = rank["step"]
        (batch,) = step["micro-batches"]
        dry = trace_activations(
            config, batch["lengths"], trained=batch["trained"], precision=precision, half_weights=half
        )
        expected = at_peak(shapes, strategy, ranks, precision, predicted, dry, run.deepspeed)[rank["rank"]]
        found.append((step["peak"]["total"] + step["unseen"], total_bytes(expected)))
    return max(found)


def deepspeed_says(config: Any, parameters: int, strategy: str) -> float | None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if strategy == "zero2":
        return estimate_zero2_model_states_mem_needs(parameters, RANKS, 1, cpu_offload=False)[1]
    if strategy == "zero3":
        largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in on_meta(config).modules())
        return estimate_zero3_model_states_mem_needs(
            parameters, largest, RANKS, 1, cpu_offload=False, cpu_offload_params=False
        )[1]
    return None


def accelerate_says(config: Any, precision: str) -> float:
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(on_meta(config))
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    parts = estimate_training_usage(size, name)
    return parts["model"] + parts["gradients"] + parts["optimizer"]


def on_meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    main()
