"""BLEU and example answers for every checkpoint of a run, and for the model before training.

    minisft evaluate zero2

The prompt is everything before the last answer, made by the same template code as in training; the hypothesis is
the reply alone. Results go to `outputs/evaluation/<run>/`, one JSON per checkpoint, a summary, and the texts.
Step 0 is the model before training; runs that started from the same model share its evaluation.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minisft.batches import PadRight, pad_left
from minisft.conversations import Conversation
from minisft.errors import UserError
from minisft.labels import IGNORE_INDEX, encode, encode_segments
from minisft.ledger import Ledger
from minisft.mistral import MistralTemplate
from minisft.models import load_model
from minisft.reading import read
from minisft.runs import Run, checkpoint_step, outputs_root, read_json, write_json
from minisft.tokens import HuggingFaceTokenizer

Say = Callable[[str], None]
EXAMPLES = 3


@dataclass(frozen=True)
class Settings:
    """How to evaluate: `rows` test conversations, greedy answers of at most `max_new_tokens` tokens."""

    rows: int = 12
    max_new_tokens: int = 48
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name.replace('_', ' ')} is {value}: give at least 1")


@dataclass(frozen=True)
class Answer:
    """One generated reply; `stopped` if the model ended it by itself, with EOS."""

    text: str
    stopped: bool


def evaluate_runs(runs: Sequence[Run], settings: Settings, say: Say = print) -> None:
    """Evaluate every checkpoint of every run. Raises `UserError` for a run without checkpoints or test rows."""
    for run in runs:
        if not run.checkpoints:
            raise UserError(f"{run.name} has no checkpoint to evaluate (it is {run.status}): train it to its end first")
    before: dict[str, dict[str, Any]] = {}
    for run in runs:
        folder = outputs_root() / "evaluation" / run.name
        folder.mkdir(parents=True, exist_ok=True)
        conversations = test_rows(run, settings.rows)
        results = []
        for model in (run.model_folder, *run.checkpoints):
            step = checkpoint_step(model) if model.name.startswith("checkpoint-") and model != run.model_folder else 0
            file = folder / f"checkpoint-{step}.json"
            key = _key(run, model, conversations, settings)
            result = read_json(file)
            if result is None or result["key"] != key:
                result = before.get(key) or evaluate_model(run, model, conversations, settings)
                result |= {"run": run.name, "step": step, "key": key}
                write_json(file, result)
            if step == 0:
                before[key] = dict(result)
            results.append(result)
            say(_line(result))
        _write_summary(folder, run, settings, results)


def test_rows(run: Run, rows: int) -> list[Conversation]:
    """The first `rows` test conversations whose prompt leaves room for an answer in the run's maximum length."""
    file = run.folder / "data" / "test.jsonl"
    if not file.exists() or file.stat().st_size == 0:
        raise UserError(f"{run.name} has no test conversations: train it on data with at least two conversations")
    tokenizer, template = _tools(run.model_folder, run.config.template)
    fitting = []
    for conversation in read(file, Ledger()):
        row = encode(conversation, template, tokenizer, run.config.max_length)
        if not row.truncated:
            fitting.append(conversation)
        if len(fitting) == rows:
            break
    if not fitting:
        raise UserError(f"no test conversation of {run.name} fits in {run.config.max_length} tokens: allow more")
    return fitting


def evaluate_model(run: Run, folder: Path, conversations: list[Conversation], settings: Settings) -> dict[str, Any]:
    """Load one checkpoint with plain transformers and score its answers to the conversations' last questions."""
    from sacrebleu.metrics import BLEU, CHRF

    tokenizer, template = _tools(run.model_folder, run.config.template)
    model = _load(folder, tokenizer)
    prompts = [prompt_ids(c, template, tokenizer) for c in conversations]
    answers = generate(model, prompts, tokenizer, settings.max_new_tokens, settings.batch_size)
    loss, trained_tokens = answer_loss(model, conversations, template, tokenizer, settings.batch_size)
    hypotheses = [a.text for a in answers]
    references = [c.messages[-1].content.strip() for c in conversations]
    bleu, chrf = BLEU(), CHRF()
    score = bleu.corpus_score(hypotheses, [references])
    rows = [
        {"id": c.id, "prompt": c.messages[-2].content, "reference": r, "output": a.text, "stopped": a.stopped}
        for c, r, a in zip(conversations, references, answers, strict=True)
    ]
    return {
        "model": folder.name,
        "rows": len(rows),
        "bleu": score.score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "chrf_signature": str(chrf.get_signature()),
        "length_ratio": score.sys_len / max(1, score.ref_len),
        "stopped": sum(a.stopped for a in answers) / len(answers),
        "loss": loss,
        "perplexity": math.exp(loss),
        "trained_tokens": trained_tokens,
        "settings": asdict(settings),
        "examples": rows[:EXAMPLES],
        "answers": rows,
    }


def prompt_ids(conversation: Conversation, template: MistralTemplate, tokenizer: HuggingFaceTokenizer) -> list[int]:
    """The ids before the last answer: the very ids that training put in front of it."""
    return encode_segments(template.prompt_segments(conversation), tokenizer)


def generate(
    model: Any,
    prompts: list[list[int]],
    tokenizer: HuggingFaceTokenizer,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Greedy answers to `prompts` (token ids), batched by length so that little is padded; in the order given."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in pad_left([prompts[i] for i in chosen], tokenizer.pad_id).items()}
        with torch.inference_mode():
            out = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.pad_id,
            )
        for i, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            stopped = tokenizer.eos_id in ids
            reply = ids[: ids.index(tokenizer.eos_id)] if stopped else ids
            answers[i] = Answer(tokenizer.decode(reply).strip(), stopped)
    return [answers[i] for i in range(len(prompts))]


def answer_loss(
    model: Any,
    conversations: list[Conversation],
    template: MistralTemplate,
    tokenizer: HuggingFaceTokenizer,
    batch_size: int,
) -> tuple[float, int]:
    """Teacher-forced loss in nats: the mean over all answer tokens of all rows; and how many those are."""
    import torch

    collate = PadRight(tokenizer.pad_id)
    rows = sorted((encode(c, template, tokenizer, 1 << 30) for c in conversations), key=lambda row: len(row.input_ids))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate([{"input_ids": r.input_ids, "labels": r.labels} for r in rows[start : start + batch_size]])
        batch = {k: v.to(model.device) for k, v in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**batch, use_cache=False).logits[:, :-1]
            kept = labels != IGNORE_INDEX
            total += torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum").item()
        count += int(kept.sum())
    return total / count, count


def ask(folder: Path, questions: Sequence[str], max_new_tokens: int = 40, template: str = "v1") -> list[Answer]:
    """Greedy answers of the model in `folder` to questions, each asked alone, in the template of training."""
    from minisft.conversations import Message

    tokenizer, form = _tools(folder, template)
    asked = [Conversation("asked", (Message("user", q), Message("assistant", ""))) for q in questions]
    return generate(
        _load(folder, tokenizer), [prompt_ids(c, form, tokenizer) for c in asked], tokenizer, max_new_tokens, len(asked)
    )


def side_by_side(questions: Sequence[str], before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """An HTML table of answers before and after training. What a model says is untrusted text too: all is escaped."""
    from html import escape

    def cell(answer: Answer) -> str:
        mark = "" if answer.stopped else " <em>(cut: it did not stop)</em>"
        return f"<td style='text-align:left'>{escape(answer.text) or '<em>(stopped at once)</em>'}{mark}</td>"

    rows = "".join(
        f"<tr><th scope='row' style='text-align:left'>{escape(q)}</th>{cell(b)}{cell(a)}</tr>"
        for q, b, a in zip(questions, before, after, strict=True)
    )
    return f"<table><tr><th>question</th><th>before training</th><th>after training</th></tr>{rows}</table>"


def _load(folder: Path, tokenizer: HuggingFaceTokenizer) -> Any:
    """A model for inference, on the GPU if there is one."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights, which takes a second
    return load_model(folder, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu").eval()


@functools.lru_cache(maxsize=2)  # loading takes a second, and every checkpoint of a run asks
def _tools(folder: Path, version: str) -> tuple[HuggingFaceTokenizer, MistralTemplate]:
    tokenizer = HuggingFaceTokenizer(folder, version)
    return tokenizer, MistralTemplate.for_tokenizer(tokenizer, version)


def _key(run: Run, model: Path, conversations: list[Conversation], settings: Settings) -> str:
    """Changes whenever the result could: other weights, other conversations, other settings."""
    import hashlib

    weights = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in model.glob("*.safetensors"))
    rows = [asdict(c) for c in conversations]
    parts = [str(model), weights, rows, asdict(settings), run.config.template, run.config.max_length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['run']} step {result['step']:>3}: BLEU {result['bleu']:5.2f}, chrF {result['chrf']:5.2f}, "
        f"loss {result['loss']:.3f}, {result['stopped']:.0%} of {result['rows']} answers stopped by themselves"
    )


def _write_summary(folder: Path, run: Run, settings: Settings, results: list[dict[str, Any]]) -> None:
    columns = ("step", "bleu", "chrf", "length_ratio", "stopped", "loss", "perplexity")
    write_json(
        folder / "summary.json",
        {
            "run": run.name,
            "settings": asdict(settings),
            "bleu_signature": results[0]["bleu_signature"],
            "checkpoints": [{c: r[c] for c in columns} for r in results],
        },
    )
    lines = [
        f"# Evaluation of {run.name}",
        "",
        f"{results[0]['rows']} test conversations, greedy answers of at most {settings.max_new_tokens} tokens. "
        "Step 0 is the model before training.",
        "",
        f"BLEU: `{results[0]['bleu_signature']}`",
        "",
        "| step | BLEU | chrF | length ratio | stopped by itself | loss | perplexity |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['step']} | {r['bleu']:.2f} | {r['chrf']:.2f} | {r['length_ratio']:.2f} | {r['stopped']:.0%} "
        f"| {r['loss']:.3f} | {r['perplexity']:.1f} |"
        for r in results
    ]
    for i in range(len(results[0]["examples"])):
        example = results[0]["examples"][i]
        lines += ["", f"## Example {i + 1}", "", "Prompt", *_quoted(example["prompt"])]
        lines += ["", "Reference", *_quoted(example["reference"])]
        for result in results:
            lines += ["", f"Step {result['step']}", *_quoted(result["examples"][i]["output"])]
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quoted(text: str) -> list[str]:
    """Untrusted text as an indented block, in which Markdown and HTML mean nothing."""
    return ["", *("    " + line for line in text.splitlines() or [""])]
