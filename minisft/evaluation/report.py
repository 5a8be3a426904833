"""What an evaluation found, to be read: `summary.json`, `summary.md`, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minisft.files import write_json, written_whole
from minisft.run.folder import Run
from minisft.text import in_markdown, in_markdown_block, one_line

COLUMNS = ("step", "bleu", "bleu_interval", "chrf", "chrf_interval", "length_ratio", "stopped", "loss", "perplexity")


def write_summary(
    folder: Path,
    run: Run,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    unusable: Mapping[int, str],
    leakage: Mapping[str, Any],
) -> None:
    """Write `summary.json` and `summary.md` of one run from the `results` of its checkpoints, in step order."""
    if not results:
        for name in ("summary.json", "summary.md"):  # what they say holds no longer
            (folder / name).unlink(missing_ok=True)
        return
    write_json(
        folder / "summary.json",
        {
            "run": one_line(run.name),
            "strategy": run.config.strategy,
            "settings": dict(settings),
            "rows": results[0]["rows"],
            "bleu_signature": results[0]["bleu_signature"],
            "chrf_signature": results[0]["chrf_signature"],
            "leakage": dict(leakage),
            "unusable": {str(step): why for step, why in unusable.items()},
            "checkpoints": [{c: r[c] for c in COLUMNS} | {"examples": r["examples"]} for r in results],
        },
    )
    with written_whole(folder / "summary.md") as stream:
        stream.write("\n".join(_markdown(run, settings, results, unusable, leakage)) + "\n")


def _markdown(
    run: Run,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    unusable: Mapping[int, str],
    leakage: Mapping[str, Any],
) -> list[str]:
    which = "the last answer of each" if settings["answers"] == "last" else "every answer of each"
    lines = [
        f"# Evaluation of {in_markdown(run.name)}",
        "",
        f"{results[0]['rows']} answers to test conversations ({which}), greedy, of at most "
        f"{settings['max_new_tokens']} tokens. Step 0 is the model before training. Loss and perplexity are those of "
        "the reference answers' tokens.",
        "",
        _leaks_told(leakage),
        "",
        f"BLEU: {_code(results[0]['bleu_signature'])}  ",
        f"chrF: {_code(results[0]['chrf_signature'])}",
        "",
        *([in_markdown(results[0]["bleu_note"]), ""] if results[0].get("bleu_note") else []),
        "| step | BLEU (95%) | chrF (95%) | length ratio | stopped by itself | loss | perplexity |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['step']} | {r['bleu']:.2f}{interval_told(r, 'bleu')} "
        f"| {r['chrf']:.2f}{interval_told(r, 'chrf')} | {r['length_ratio']:.2f} "
        f"| {r['stopped']:.0%} | {r['loss']:.3f} | {r['perplexity']:.1f} |"
        for r in results
    ]
    for step, why in unusable.items():
        lines += ["", f"Checkpoint {step} cannot be used:", "", in_markdown_block(why)]
    tokenizer = results[0].get("bleu_tokenizer", "13a")
    lines += ["", f"To check a score: {_code(f'sacrebleu references.txt -tok {tokenizer} -i checkpoint-N.txt')}."]
    for i, example in enumerate(results[0]["examples"]):
        lines += ["", f"## Example {i + 1}", "", "Prompt", "", in_markdown_block(example["prompt"])]
        lines += ["", "Reference", "", in_markdown_block(example["reference"])]
        for result in results:
            lines += ["", f"Step {result['step']}", "", in_markdown_block(result["examples"][i]["output"])]
    return lines


def _code(text: str) -> str:
    return f"`{one_line(text).replace('`', '')}`"


def interval_told(result: Mapping[str, Any], name: str) -> str:
    """` (low-high)` of a score, or nothing where no interval was asked for."""
    low_high = "-".join(f"{edge:.1f}" for edge in result[f"{name}_interval"])
    return f" ({low_high})" if low_high else ""


def _leaks_told(leakage: Mapping[str, Any]) -> str:
    exact, near, of = leakage["exact"], leakage["near"], leakage["of"]
    if not exact + near:
        return f"None of the {of} questions that were looked at is among the trained ones."
    done = "those conversations were left out" if leakage["excluded"] else "they are in the scores"
    return f"Of {of} questions {exact} were trained word by word and {near} nearly so: {done}."


def side_by_side(questions: Sequence[str], before: Sequence[Any], after: Sequence[Any]) -> str:
    """An HTML table of `Answer`s before and after training. What a model says is untrusted text too: all is escaped."""
    rows = "".join(
        f"<tr><th scope='row' style='text-align:left'>{escape(q)}</th>{_cell(b.text, b.stopped)}"
        f"{_cell(a.text, a.stopped)}</tr>"
        for q, b, a in zip(questions, before, after, strict=True)
    )
    return f"<table><tr><th>question</th><th>before training</th><th>after training</th></tr>{rows}</table>"


def through_training(results: Sequence[Mapping[str, Any]], rows: Sequence[str] = ()) -> str:
    """An HTML table of answers through training: a question in each column, first the reference, then each step.

    `results` are those of one run's checkpoints (`evaluate.results_of`); `rows` the ids of questions, else the three
    examples. All text is escaped.
    """
    shown = [[a for a in r["answers"] if a["id"] in rows] if rows else r["examples"] for r in results]
    head = "".join(f"<th style='text-align:left'>{escape(example['prompt'])}</th>" for example in shown[0])
    lines = [("reference", [_cell(example["reference"], True) for example in shown[0]])]
    for result, examples in zip(results, shown, strict=True):
        lines.append((f"step {result['step']}", [_cell(e["output"], e["stopped"]) for e in examples]))
    body = "".join(f"<tr><th scope='row'>{name}</th>{''.join(cells)}</tr>" for name, cells in lines)
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _cell(text: str, stopped: bool) -> str:
    mark = "" if stopped else " <em>(cut: it did not stop)</em>"
    return (
        "<td style='text-align:left;vertical-align:top;white-space:pre-wrap'>"
        f"{escape(text) or '<em>(stopped at once)</em>'}{mark}</td>"
    )
