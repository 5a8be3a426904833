"""Greedy answers to many prompts: minisft's batches, transformers' own, and one prompt at a time, side by side.

    python tests/benchmarks/generation_speed.py [--prompts 64] [--new-tokens 64] [--rounds 3] [--batch-size 64] [--stop]

SmolLM2-135M in fp32 answers the last questions of ShareGPT conversations, in the training template:

one by one   `model.generate` for each prompt alone, as the work that this course follows does
generate     `model.generate` for batches of like length, padded on the left
minisft      `minisft.evaluation.generate.generate_batched`

All give every prompt exactly so many new tokens, which is the same work; with `--stop` answers end where the model ends
them. Each runs in a process of its own, in every round once, in changing order; loading the model is not timed. The
answers are compared id by id. Peak memory is that of the process. Runs on CUDA unchanged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

AIMED_AT = 6.0
WAYS = ("one by one", "generate", "minisft")
LONGEST = 400  # tokens of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(answer(options)))
        return
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in range(options.rounds):
        for way in WAYS[:: -1 if turn % 2 else 1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"generation_speed: {way} failed with exit code {done.returncode}", file=sys.stderr)
                sys.exit(1)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  round {turn + 1}: {way:<10} {_line([found[way][-1]])}", flush=True)
    print(f"\n{options.prompts} prompts, {options.new_tokens} new tokens each, batches of {options.batch_size}")
    for way in WAYS:
        print(f"{way:<10} {_line(found[way])}")
    for way in WAYS[:2]:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[way], found["minisft"], strict=True)]
        aim = f", {AIMED_AT:.0f} aimed at" if way == "one by one" else ""
        print(f"minisft is {median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) times as fast as {way}{aim}")
    one, ours = (found[way][0]["answers"] for way in ("one by one", "minisft"))
    print(f"{sum(a == b for a, b in zip(one, ours, strict=True))} of {len(one)} answers are the same, id by id")


def answer(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from minisft.data.download import find_data, find_model
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.evaluation.answers import load_to_answer
    from minisft.evaluation.eval_set import load_template, prompt_ids
    from minisft.evaluation.generate import generate_batched
    from minisft.training.collators import pad_left

    folder = find_model("smollm2", lambda _: None).path
    tokenizer, template = load_template(folder, "v1")
    conversations = read(find_data("sharegpt", lambda _: None).path, Ledger())
    asked = (prompt_ids(c, template, tokenizer) for c in conversations)
    prompts = list(itertools.islice((ids for ids in asked if len(ids) <= LONGEST), options.prompts))
    model = load_to_answer(folder, tokenizer)
    eos = tokenizer.eos_id if options.stop else -1
    model.generation_config.eos_token_id = eos if options.stop else None
    most = options.new_tokens

    def generate(order: list[int], size: int) -> dict[int, list[int]]:
        found = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = {k: v.to(model.device) for k, v in pad_left([prompts[i] for i in chosen], tokenizer.pad_id).items()}
            with torch.inference_mode():
                out = model.generate(**batch, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_id)
            for i, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                found[i] = ids[: ids.index(eos)] if eos in ids else ids
        return found

    def run() -> dict[int, list[int]]:
        if options.way == "one by one":
            return generate(list(range(len(prompts))), 1)
        if options.way == "generate":
            return generate(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), options.batch_size)
        ids = {"stop_ids": [eos], "pad_id": tokenizer.pad_id}
        found = generate_batched(model, prompts, **ids, max_new_tokens=most, batch_size=options.batch_size)
        return {reply.index: reply.ids for reply in found}

    began = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - began
    answers = [found[i] for i in range(len(prompts))]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "peak": peak, "answers": answers}


def _line(runs: list[dict[str, Any]]) -> str:
    seconds = [r["seconds"] for r in runs]
    rate = median(r["tokens"] / r["seconds"] for r in runs)
    peak = max(r["peak"] for r in runs) / 1e9
    spread = f"({min(seconds):.1f}-{max(seconds):.1f})"
    return f"{median(seconds):6.1f} s {spread:<15} {rate:6.1f} tokens/s, {peak:.2f} GB at its peak"


if __name__ == "__main__":
    main()
