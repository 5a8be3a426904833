"""How long `minisft memory` takes for a model of 70 billion parameters on 512 ranks, and how much memory.

    python tests/benchmarks/memory_speed.py [--rounds 5] [--ranks 512] [--precision bf16]

The command in a process of its own, alternating with a process that imports what the command cannot do without (torch,
and the model's class from transformers). The answer's own time is what is left. Medians of the rounds, and their range;
the peak is that of the command's process. The config is that of a Llama with 80 layers; no weights exist.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

AIMED_AT, MEMORY_AIMED_AT = 5.0, 1e9  # seconds, bytes
LLAMA_70B = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 8192},
    **{"intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"max_position_embeddings": 8192, "tie_word_embeddings": False},
}
# The shape of DeepSeek-V3 (its config.json): three dense layers, then 58 of 256 experts, 671 billion parameters.
DEEPSEEK_V3 = {
    **{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129_280},
    **{"hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "num_hidden_layers": 61},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "first_k_dense_replace": 3, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"max_position_embeddings": 4096, "tie_word_embeddings": False},
}
EXPERTS_AIMED_AT = 60.0  # seconds
IMPORTS = "import torch; from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM"


def timed(words: list[str]) -> tuple[float, int]:
    """Seconds, and the most bytes that the process held. Raises `SystemExit` if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"memory_speed: {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(LLAMA_70B))
        question = ["--model", str(config), "--ranks", str(options.ranks), "--precision", options.precision, "--json"]
        whole, bare, own, peaks = [], [], [], []
        for _ in range(options.rounds):
            bare.append(timed(["-c", IMPORTS])[0])
            seconds, peak = timed(["-m", "minisft.cli", "memory", *question])
            whole.append(seconds)
            own.append(seconds - bare[-1])
            peaks.append(peak)
        config.write_text(json.dumps(DEEPSEEK_V3))
        experts = timed(["-m", "minisft.cli", "memory", *question])[0]
    for what, found in (("the command", whole), ("bare imports", bare), ("the answer itself", own)):
        print(f"{what:<18} {median(found):5.1f} s ({min(found):.1f}-{max(found):.1f})")
    print(f"{'peak memory':<18} {max(peaks) / 1e9:5.2f} GB")
    for what, found in (("the command", whole), ("the answer itself", own)):
        print(f"{what}: {'within' if median(found) <= AIMED_AT else 'more than'} the {AIMED_AT:g} s aimed at")
    within = "within" if experts <= EXPERTS_AIMED_AT else "more than"
    print(f"the shape of DeepSeek-V3: {experts:.1f} s, {within} the {EXPERTS_AIMED_AT:g} s aimed at")
    within = max(peaks) <= MEMORY_AIMED_AT
    print(f"memory: {'within' if within else 'more than'} the {MEMORY_AIMED_AT / 1e9:g} GB aimed at")


if __name__ == "__main__":
    main()
