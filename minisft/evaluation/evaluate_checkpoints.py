"""BLEU, loss and answers of every checkpoint of a run, and of the model before training.

    minisft evaluate zero2

A prompt ends exactly where an answer began in training, and is made by the same code; what is scored is the reply
alone. Results go to `outputs/evaluation/<run>/`: one JSON per checkpoint, the answers and references as lines of text,
and a summary. Step 0 is the model before training. What is scored already is not scored again: a result belongs to
the content of the weights, the questions and the settings, and answers are kept one by one, as they come.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisft.checksums import Digests, code_digest
from minisft.data.conversations import Conversation
from minisft.errors import UserError
from minisft.evaluation.answers import Answer, answer_loss, generate, load_to_answer
from minisft.evaluation.eval_set import (
    EvalSet,
    EvalSettings,
    fingerprint,
    load_template,
    make_eval_set,
    prompt_ids,
    read_cache,
)
from minisft.evaluation.metrics import as_line, corpus_scores, tokenizer_for
from minisft.evaluation.report import interval_told, write_summary
from minisft.files import is_same_file, open_own, read_json, read_text, write_json, written_whole
from minisft.locks import open_lock, try_lock
from minisft.run.folder import Run, checkpoint_step, lock_file, outputs_root
from minisft.run.records import CheckpointResult, ResultsOwner, Summary
from minisft.text import one_line, say
from minisft.training.checkpoint_health import checkpoint_problem, weight_files
from minisft.training.dataset import MADE_OF, require_as_made

Say = Callable[[str], None]
EXAMPLES = 3
OWNER = "run.json"  # of a results folder: whose results they are
BESIDE = (  # the weights, what a result or its soundness depends on
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "manifest.json",
    "model.safetensors.index.json",
)


def evaluate_runs(runs: Sequence[Run], settings: EvalSettings, say: Say = say, verify: bool = False) -> list[str]:
    """Evaluate every checkpoint of every run; returns a sentence for each that cannot be used.

    A result belongs to the content of the files that it was computed from. Checksums are remembered for files that
    were not touched since; with `verify` every file is read again. A run without test rows counts as one that cannot be
    used beside others; alone it raises `UserError`, as do runs without checkpoints and two runs of one name.
    """
    _require_evaluable(runs)
    known: dict[str, CheckpointResult] = {}
    broken: list[str] = []
    digests = Digests(verify)

    def is_broken(what: str) -> None:
        broken.append(one_line(what))
        say(broken[-1])

    def evaluate_one(run: Run, folder: Path) -> None:
        before = run.identity
        if (run.folder / "data" / MADE_OF).exists():  # runs of earlier versions have no checksums
            require_as_made(run.folder)
        exam = make_eval_set(run, settings, folder, digests)
        results, unusable = [], {}
        for step, model in steps_of(run):
            try:
                key = _key(run, model, exam, settings, digests)
                found = known.get(key) or _looked_up(folder, step, key)
                if found is None:
                    found = _evaluated(run, model, exam, settings, folder / f".checkpoint-{step}-{key}.jsonl")
                # With digests of its own: those of the report count each file once, and `verify` reads each once.
                is_same = run.identity == before and _key(run, model, exam, settings, Digests()) == key
            except (UserError, FileNotFoundError, PermissionError) as error:
                unusable[step] = str(error) if isinstance(error, UserError) else _lost(error)
                is_broken(f"{run.name} {model.name} cannot be used: {unusable[step]}")
                continue
            if not is_same:
                raise UserError(f"{run.name} was changed while it was evaluated: evaluate it again")
            known[key] = found
            results.append(found | {"run": one_line(run.name), "step": step, "model": one_line(model.name), "key": key})
            write_json(folder / f"checkpoint-{step}.json", results[-1])
            _write_lines(folder / f"checkpoint-{step}.txt", (a["output"] for a in found["answers"]))
            for kept in folder.glob(f".checkpoint-{step}-*.jsonl"):
                kept.unlink(missing_ok=True)
            say(_line(results[-1]))
        _remove_others(folder, {result["step"] for result in results})
        _write_lines(folder / "references.txt", (q.messages[-1].content for q in exam.questions))
        if results and results[0].get("bleu_note"):
            say(f"{run.name}: {results[0]['bleu_note']}")
        write_summary(folder, run, asdict(settings), results, unusable, exam.leakage(settings))

    for run in runs:
        try:
            with results_folder(run) as folder:
                evaluate_one(run, folder)
        except UserError as error:
            if len(runs) == 1:
                raise
            is_broken(str(error))
    say(f"results belong to the content of the files: {digests.how}")
    return broken


def _require_evaluable(runs: Sequence[Run]) -> None:
    """Raises `UserError` if a run has no checkpoint, or if two runs have the same name."""
    for run in runs:
        if not run.checkpoints:
            raise UserError(f"{run.name} has no checkpoint to evaluate (it is {run.status}): train it to its end first")
    if twice := [name for name, count in Counter(run.name for run in runs).items() if count > 1]:
        raise UserError(f"two of the runs are called {twice[0]}, and their results have one place: give one at a time")


def _lost(error: OSError) -> str:
    how = "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return f"{Path(error.filename).name} {how}"


@contextmanager
def results_folder(run: Run) -> Iterator[Path]:
    """The folder for a run's results, held by this process. Raises `UserError` if another evaluation holds it, or if
    it has the results of another run folder with the same name.
    """
    folder = outputs_root() / "evaluation" / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # conversations are personal
    with open_lock(lock_file(folder)) as lock:
        if not try_lock(lock):
            raise UserError(f"{run.name} is being evaluated right now: wait for it")
        owner = Path((read_cache(folder / OWNER, ResultsOwner) or {"run_folder": run.folder})["run_folder"])
        if owner.is_dir() and not is_same_file(owner, run.folder):
            raise UserError(
                f"{folder} has the results of another run folder, {owner}: give one of the two another name, or move "
                "the results away"
            )
        write_json(folder / OWNER, {"run_folder": str(run.folder.absolute())}, private=True)
        yield folder


def steps_of(run: Run) -> Iterator[tuple[int, Path]]:
    """What there is to evaluate, in step order: the model before training, as step 0, and the checkpoints."""
    yield 0, run.model_folder
    for checkpoint in run.checkpoints:
        yield checkpoint_step(checkpoint), checkpoint


def results_of(run: Run) -> list[CheckpointResult]:
    """What `evaluate_runs` found for the model before training and each checkpoint that it could use, in step order."""
    folder = outputs_root() / "evaluation" / run.name
    summary = read_cache(folder / "summary.json", Summary)
    steps = [c["step"] for c in summary["checkpoints"]] if summary else []
    found = (read_json(folder / f"checkpoint-{step}.json", CheckpointResult) for step in steps)
    return [result for result in found if result is not None]


# --- one checkpoint ----------------------------------------------------------------------------------------


def _looked_up(folder: Path, step: int, key: str) -> CheckpointResult | None:
    found = read_cache(folder / f"checkpoint-{step}.json", CheckpointResult)
    return found if found is not None and found["key"] == key else None


def _evaluated(run: Run, folder: Path, exam: EvalSet, settings: EvalSettings, kept: Path) -> CheckpointResult:
    """`evaluate_model` for a checkpoint that was found sound; an interrupted one resumes after its last answer."""
    if wrong := checkpoint_problem(run, folder):
        raise UserError(wrong)
    return evaluate_model(run, folder, exam, settings, kept)


def _remove_others(folder: Path, steps: set[int]) -> None:
    """Take away earlier results of checkpoints that are gone or can no longer be used."""
    for file in folder.glob("checkpoint-*.json"):
        step = file.stem.partition("-")[2]
        if step.isdecimal() and int(step) not in steps and read_cache(file, CheckpointResult) is not None:
            file.unlink(missing_ok=True)
            file.with_suffix(".txt").unlink(missing_ok=True)


def evaluate_model(
    run: Run, folder: Path, exam: EvalSet, settings: EvalSettings, kept: Path | None = None
) -> dict[str, Any]:
    """Load one checkpoint with plain transformers and score its answers. Those in the file `kept` are not made again.

    Returns the scores of `corpus_scores`, the share of answers that `stopped` by themselves, the teacher-forced `loss`
    in nats per token of the answers, their `perplexity`, and every answer beside its prompt and reference.
    """
    tokenizer, template = load_template(run.model_folder, run.config.template)
    model = load_to_answer(folder, tokenizer, run.precision, run.trust_remote_code)
    answers = _answers(
        model, exam.questions, template, tokenizer, settings, kept, one_line(f"{run.name} {folder.name}")
    )
    loss, trained_tokens = answer_loss(model, exam.questions, template, tokenizer)
    references = [q.messages[-1].content.strip() for q in exam.questions]
    rows = [
        {"id": q.id, "prompt": _asked_last(q), "reference": r, "output": a.text, "stopped": a.stopped}
        for q, r, a in zip(exam.questions, references, answers, strict=True)
    ]
    return {
        "rows": len(rows),
        **corpus_scores([a.text for a in answers], references, settings.resamples),
        "stopped": sum(a.stopped for a in answers) / len(answers),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "trained_tokens": trained_tokens,
        "settings": asdict(settings),
        "examples": rows[:EXAMPLES],
        "answers": rows,
    }


def _asked_last(question: Conversation) -> str:
    return next(m.content for m in reversed(question.messages) if m.role == "user")


def _answers(
    model: Any,
    questions: Sequence[Any],
    template: Any,
    tokenizer: Any,
    settings: EvalSettings,
    kept: Path | None,
    what: str,
) -> list[Answer]:
    from tqdm import tqdm

    done = {} if kept is None else _kept_answers(kept, len(questions))
    left = [i for i in range(len(questions)) if i not in done]
    prompts = [prompt_ids(questions[i], template, tokenizer) for i in left]
    with tqdm(total=len(questions), initial=len(done), desc=what, unit="answer", leave=False, disable=None) as bar:
        for i, answer in generate(model, prompts, tokenizer, settings.max_new_tokens, settings.batch_size):
            done[left[i]] = answer
            if kept is not None:
                handle = open_own(kept, os.O_WRONLY | os.O_APPEND, private=True)
                with os.fdopen(handle, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps([left[i], answer.text, answer.stopped]) + "\n")
            bar.update()
    return [done[i] for i in range(len(questions))]


def _kept_answers(file: Path, questions: int) -> dict[int, Answer]:
    """The answers that an interrupted evaluation left, by number; a line that was being written is cut off."""
    whole, _, _ = (read_text(file, errors="replace") or "").rpartition("\n")
    if not whole:
        return {}
    with written_whole(file, private=True) as stream:
        stream.write(whole + "\n")
    found = {}
    for line in whole.split("\n"):
        with suppress(ValueError, TypeError):
            index, text, stopped = json.loads(line)
            if 0 <= index < questions:
                found[index] = Answer(str(text), bool(stopped))
    return found


def _key(run: Run, model: Path, exam: EvalSet, settings: EvalSettings, digests: Digests) -> str:
    """Changes whenever the result could: other weights, tokenizer, questions, settings, precision or device."""
    import torch

    asked = [asdict(question) for question in exam.questions]
    matters = {name: value for name, value in asdict(settings).items() if name not in ("batch_size", "exclude_leaked")}
    sums = [[str(file.name), digests.of(file)] for file in weight_files(model)]
    for folder in (model, run.model_folder):
        sums += [[name, digests.of(folder / name)] for name in BESIDE if (folder / name).exists()]
    device = [run.precision, torch.cuda.get_device_name()] if torch.cuda.is_available() else ["fp32", "cpu"]
    matters["tokenizer"] = tokenizer_for([question.messages[-1].content for question in exam.questions])
    code = code_digest("data", "chat", "labels", "model", "evaluation")
    return fingerprint([code, sums, asked, matters, device, run.config.template, run.config.max_length])


def _line(result: dict[str, Any]) -> str:
    return (
        f"{one_line(result['run'])} step {result['step']:>3}: "
        f"BLEU {result['bleu']:5.2f}{interval_told(result, 'bleu')}, "
        f"chrF {result['chrf']:5.2f}, loss {result['loss']:.3f}, {result['stopped']:.0%} of {result['rows']} answers "
        "stopped by themselves"
    )


def _write_lines(file: Path, texts: Iterable[str]) -> None:
    """Texts a line each, as sacreBLEU's command reads them."""
    with written_whole(file) as stream:
        stream.writelines(as_line(text) + "\n" for text in texts)


# --- runs that are still being trained ----------------------------------------------------------------------


def runs_to_evaluate(runs: Sequence[Run], wait: bool, ask: Callable[[str], bool] | None, say: Say) -> list[Run]:
    """Those of `runs` to evaluate now: with `wait` all, once no process trains them; else `ask` says, run by run.

    Without anybody to `ask`, runs that are being trained are left out.
    """
    chosen = []
    for run in runs:
        if wait and run.live:
            say(f"waiting for {run.name}, which is being trained")
            while run.live:
                time.sleep(1)
        if run.live:
            name = one_line(run.name)
            question = f"{name} is being trained: evaluate its {len(run.checkpoints)} checkpoints so far?"
            if ask is None or not ask(question):
                say(f"{run.name} is being trained, and left out: --wait waits for it")
                continue
        chosen.append(run)
    return chosen
