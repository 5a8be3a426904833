"""TRL's side of `encoding_speed`, run by TRL's own environment: the time of `SFTTrainer._prepare_dataset` alone.

The trainer is a real one, made by its own constructor around a model of a few thousand parameters, so the data goes
through what a user of TRL runs: `assistant_only_loss=True` on messages, no packing, labels built, rows truncated,
rows without a label dropped. `way` is `streamed` (an `IterableDataset`, which is read to its end) or a number of
processes (`dataset_num_proc`, over an Arrow file mapped into memory, which is what `load_dataset` gives).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from worker import Prepare, messages_in, serve

# minisft's v1 template in as few steps as Jinja allows; what it trains stands between the generation marks.
TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for m in messages if m['role'] == 'system' -%}
{%- set ns.system = ns.system + m['content'] + '\\n\\n' -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- '[INST] ' + ns.system + m['content'] + ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- elif m['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + m['content'] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""


class TimedTrainer(SFTTrainer):
    def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        dataset = super()._prepare_dataset(*arguments, **options)
        self.seconds = time.perf_counter() - start
        return dataset


def load(settings: dict[str, Any]) -> Prepare:
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    rows = messages_in(settings["data"])
    streamed = settings["way"] == "streamed"
    processes = None if streamed or settings["way"] == 1 else settings["way"]

    def trainer(dataset: Any, scratch: str) -> TimedTrainer:
        arguments = SFTConfig(
            output_dir=scratch,
            assistant_only_loss=True,
            max_length=settings["max_length"],
            packing=False,
            dataset_num_proc=processes,
            max_steps=1,  # a stream has no length; nothing is ever trained
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        return TimedTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)

    def prepare_stream(data: list[dict[str, Any]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            made = trainer(datasets.Dataset.from_list(data).to_iterable_dataset(), scratch)
            lengths = []
            start = time.perf_counter()
            for row in made.train_dataset:
                lengths.append(len(row["input_ids"]))
            seconds = made.seconds + time.perf_counter() - start
        return {"seconds": seconds, "rows": len(lengths), "tokens": sum(lengths)}

    def prepare_mapped(data: list[dict[str, Any]], keep: Path | None) -> dict[str, Any]:
        # A folder of its own for each time, or `datasets` would find its earlier results there and do nothing.
        with tempfile.TemporaryDirectory() as scratch:
            datasets.Dataset.from_list(data).save_to_disk(f"{scratch}/data")
            made = trainer(datasets.load_from_disk(f"{scratch}/data"), scratch)
            kept = made.train_dataset.select_columns(["id", "input_ids", "labels"])
            tokens = sum(len(row["input_ids"]) for row in kept)
            if keep:
                kept.to_parquet(keep)
            return {"seconds": made.seconds, "rows": len(kept), "tokens": tokens}

    def prepare(keep: Path | None = None, data: list[dict[str, Any]] = rows) -> dict[str, Any]:
        return prepare_stream(data) if streamed else prepare_mapped(data, keep)

    prepare(data=rows[: settings["warm_up"]])
    return prepare


if __name__ == "__main__":
    serve(load)
