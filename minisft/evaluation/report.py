"""Report an evaluation: `summary.json`, `summary.md`, and HTML tables of answers side by side."""

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
    refused: str = "",
) -> None:
    """Write `summary.json` and `summary.md` of one run; without results, remove outdated ones.

    `results` are those of its checkpoints, in step order; `unusable` is {step: reason}; `leakage`
    comes from `EvalSet.leakage`; `refused` says which conversations could not be used.
    """
    if not results:
        for name in ("summary.json", "summary.md"):
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
            "refused": refused,
            "unusable": {str(step): reason for step, reason in unusable.items()},
            "checkpoints": [_scores(result) for result in results],
        },
    )
    with written_whole(folder / "summary.md") as stream:
        stream.write("\n".join(_markdown(run, settings, results, unusable, leakage, refused)) + "\n")


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a result for `summary.json`; results of earlier versions have no `more`."""
    names = (*COLUMNS, "examples", "more") if "more" in result else (*COLUMNS, "examples")
    return {name: result[name] for name in names}


def _markdown(
    run: Run,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    unusable: Mapping[int, str],
    leakage: Mapping[str, Any],
    refused: str,
) -> list[str]:
    which = "the last answer of each" if settings["answers"] == "last" else "every answer of each"
    lines = [
        f"# Evaluation of {in_markdown(run.name)}",
        "",
        f"{results[0]['rows']} answers to test conversations ({which}), greedy, at most "
        f"{settings['max_new_tokens']} tokens each. Step 0 is the model before training. Loss and perplexity are over "
        "the tokens of the reference answers.",
        "",
        _leakage_sentence(leakage),
        "",
        f"BLEU: {_code(results[0]['bleu_signature'])}  ",
        f"chrF: {_code(results[0]['chrf_signature'])}",
        "",
    ]
    for note in filter(None, (refused, results[0].get("bleu_note"))):
        lines += [in_markdown(note), ""]
    lines += _score_table(results)
    for step, reason in unusable.items():
        lines += ["", f"Checkpoint {step} cannot be used:", "", in_markdown_block(reason)]
    tokenizer = results[0].get("bleu_tokenizer", "13a")
    lines += ["", f"To check a score: {_code(f'sacrebleu references.txt -tok {tokenizer} -i checkpoint-N.txt')}."]
    for i, example in enumerate(results[0]["examples"]):
        lines += ["", f"## Example {i + 1}", "", "Prompt", "", in_markdown_block(example["prompt"])]
        lines += ["", "Reference", "", in_markdown_block(example["reference"])]
        for result in results:
            lines += ["", f"Step {result['step']}", "", in_markdown_block(result["examples"][i]["output"])]
    return lines


def _score_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table, one row per result; a metric that a result lacks is an empty cell."""
    metrics = list(dict.fromkeys(name for result in results for name in result.get("more", {})))
    header = ["step", "BLEU (95%)", "chrF (95%)", "length ratio", "stopped by itself", "loss", "perplexity"]
    header += map(in_markdown, metrics)
    rows = [header, ["---:"] * len(header)]
    for r in results:
        more = r.get("more", {})
        cells = [
            f"{r['step']}",
            f"{r['bleu']:.2f}{interval_told(r, 'bleu')}",
            f"{r['chrf']:.2f}{interval_told(r, 'chrf')}",
            f"{r['length_ratio']:.2f}",
            f"{r['stopped']:.0%}",
            f"{r['loss']:.3f}",
            f"{r['perplexity']:.1f}",
        ]
        rows.append(cells + [f"{more[name]:.3f}" if name in more else "" for name in metrics])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def _code(text: str) -> str:
    return f"`{one_line(text).replace('`', '')}`"


def interval_told(result: Mapping[str, Any], name: str) -> str:
    """Return ` (low-high)` of a score, or "" if the result has no intervals."""
    low_high = "-".join(f"{edge:.1f}" for edge in result[f"{name}_interval"])
    return f" ({low_high})" if low_high else ""


def _leakage_sentence(leakage: Mapping[str, Any]) -> str:
    exact, near, total = leakage["exact"], leakage["near"], leakage["of"]
    if not exact + near:
        return f"None of {total} questions is in the training data."
    consequence = "these conversations are excluded" if leakage["excluded"] else "they are included in the scores"
    return f"Of {total} questions, {exact} are in the training data exactly and {near} nearly: {consequence}."


def side_by_side(questions: Sequence[str], before: Sequence[Any], after: Sequence[Any]) -> str:
    """Return an HTML table of `Answer`s before and after training, one row per question.

    All text is escaped: a model's output is as untrusted as its input.
    """
    rows = "".join(
        f"<tr><th scope='row' style='text-align:left'>{escape(q)}</th>{_cell(b.text, b.stopped)}"
        f"{_cell(a.text, a.stopped)}</tr>"
        for q, b, a in zip(questions, before, after, strict=True)
    )
    return f"<table><tr><th>question</th><th>before training</th><th>after training</th></tr>{rows}</table>"


def through_training(results: Sequence[Mapping[str, Any]], rows: Sequence[str] = ()) -> str:
    """Return an HTML table of answers over training.

    One column per question; one row for the references and one per step.

    `results` are those of one run (`evaluate_checkpoints.results_of`). `rows` are question ids; by
    default the three examples are shown. All text is escaped.
    """
    shown = [[a for a in r["answers"] if a["id"] in rows] if rows else r["examples"] for r in results]
    head = "".join(f"<th style='text-align:left'>{escape(example['prompt'])}</th>" for example in shown[0])
    lines = [("reference", [_cell(example["reference"], True) for example in shown[0]])]
    for result, examples in zip(results, shown, strict=True):
        lines.append((f"step {result['step']}", [_cell(e["output"], e["stopped"]) for e in examples]))
    body = "".join(f"<tr><th scope='row'>{name}</th>{''.join(cells)}</tr>" for name, cells in lines)
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _cell(text: str, stopped: bool) -> str:
    mark = "" if stopped else " <em>(cut off: it did not stop)</em>"
    return (
        "<td style='text-align:left;vertical-align:top;white-space:pre-wrap'>"
        f"{escape(text) or '<em>(stopped at once)</em>'}{mark}</td>"
    )
