"""Evaluate every checkpoint of a run, and the model before training: BLEU, chrF, loss and answers.

    minisft evaluate zero2

A prompt is built by the code that built the training rows, and ends exactly where an answer began
in training; the reply is compared with the text that was trained there. Results go to
`outputs/evaluation/<run>/`: one JSON per checkpoint, the answers and references as lines of text,
and a summary. Step 0 is the model before training. Results are reused while the contents of the
weights, the questions and the settings are unchanged; each answer is saved as soon as it is
complete, so an interrupted evaluation resumes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minisft.checksums import Digests, code_digest
from minisft.data.conversations import Conversation
from minisft.data.model_folder import small_model_files
from minisft.errors import UserError
from minisft.evaluation.answers import Answer, generate, load_to_answer, loss_of_rows
from minisft.evaluation.eval_set import (
    EvalSet,
    EvalSettings,
    fingerprint,
    load_template,
    make_eval_set,
    read_cache,
    refusals,
)
from minisft.evaluation.metrics import as_line, corpus_scores, tokenizer_for
from minisft.evaluation.report import interval_told, write_summary
from minisft.evaluation.result_cache import SavedAnswers, cached_result, is_remembered, remember_result
from minisft.files import is_same_file, read_json, write_json, written_whole
from minisft.locks import open_lock, try_lock
from minisft.run.folder import Run, checkpoint_step, lock_file, outputs_root
from minisft.run.records import CheckpointResult, ResultsOwner, Summary
from minisft.text import one_line, say
from minisft.training.checkpoint_health import content_problem, origin_problem, weight_files
from minisft.training.dataset import MADE_OF, require_as_made

Say = Callable[[str], None]
EXAMPLES = 3
OWNER = "run.json"  # in a results folder: which run folder the results belong to


def evaluate_runs(runs: Sequence[Run], settings: EvalSettings, say: Say = say, verify: bool = False) -> list[str]:
    """Evaluate every checkpoint of every run; returns a sentence for each that cannot be used.

    Results are reused if the contents of all files they depend on are unchanged. Checksums of
    unmodified files are cached; with `verify` every file is read again. Raises `UserError` if a run
    has no checkpoint, if two runs have the same name, or if the only run cannot be evaluated.
    """
    _require_evaluable(runs)
    evaluation = _Evaluation(settings, say, Digests(verify))
    for run in runs:
        try:
            with results_folder(run) as folder:
                evaluation.add(run, folder)
        except UserError as error:
            if len(runs) == 1:
                raise
            evaluation.report_broken(str(error))
    say(f"results depend on the contents of the files: {evaluation.digests.how}")
    return evaluation.broken


@dataclass
class _Evaluation:
    """The evaluation of several runs: results by key, because checkpoints may have equal weights; what is unusable."""

    settings: EvalSettings
    say: Say
    digests: Digests
    known: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def report_broken(self, sentence: str) -> None:
        self.broken.append(one_line(sentence))
        self.say(self.broken[-1])

    def add(self, run: Run, folder: Path) -> None:
        """Evaluate every checkpoint of a run, and write its results to `folder`."""
        before = run.identity
        if (run.folder / "data" / MADE_OF).exists():  # runs of earlier versions have no checksums
            require_as_made(run.folder)
        models = dict(steps_of(run))
        # First of all: with another tokenizer or template than it had, perhaps nothing fits. And a result
        # of equal weights may be known from another run.
        unusable = {step: problem for step, model in models.items() if (problem := origin_problem(run, model))}
        for step, problem in unusable.items():
            self.report_broken(f"{run.name} {models[step].name} cannot be used: {problem}")
        if unusable.keys() == models.keys():
            _remove_others(folder, set())
            write_summary(folder, run, asdict(self.settings), [], unusable, {})
            return
        eval_set = make_eval_set(run, self.settings, self.digests)
        results: list[dict[str, Any]] = []
        for step, model in models.items():
            if step in unusable:
                continue
            try:
                key = _key(run, model, eval_set, self.settings, self.digests)
                scores = self._scores(run, folder, step, model, eval_set, key)
                # With new digests: `digests` counts, and with `verify` reads, each file once only.
                is_same = run.identity == before and _key(run, model, eval_set, self.settings, Digests()) == key
            except (UserError, FileNotFoundError, PermissionError) as error:
                unusable[step] = str(error) if isinstance(error, UserError) else _file_problem(error)
                self.report_broken(f"{run.name} {model.name} cannot be used: {unusable[step]}")
                continue
            if not is_same:
                raise UserError(f"{run.name} was changed while it was evaluated: evaluate it again")
            self.known[key] = scores
            origin = {"run": one_line(run.name), "step": step, "model": one_line(model.name), "key": key}
            results.append(dict(scores) | origin)
            _save(folder, results[-1])
            self.say(_line(results[-1]))
        _remove_others(folder, {result["step"] for result in results})
        _write_lines(folder / "references.txt", eval_set.references)
        refused = refusals(eval_set.refused, self.settings.answers)
        for note in filter(None, (refused, results[0].get("bleu_note") if results else "")):
            self.say(f"{run.name}: {note}")
        write_summary(folder, run, asdict(self.settings), results, unusable, eval_set.leakage(self.settings), refused)

    def _scores(self, run: Run, folder: Path, step: int, model: Path, eval_set: EvalSet, key: str) -> Mapping[str, Any]:
        """The scores of one checkpoint, computed if they are not known."""
        known = self.known.get(key) or cached_result(folder, step, key)
        return known or _evaluated(run, model, eval_set, self.settings, SavedAnswers(key))


def _require_evaluable(runs: Sequence[Run]) -> None:
    """Raise `UserError` if a run has no checkpoint, or if two runs have the same name."""
    for run in runs:
        if not run.checkpoints:
            raise UserError(f"{run.name} has no checkpoint to evaluate (it is {run.status}): train it first")
    if twice := [name for name, count in Counter(run.name for run in runs).items() if count > 1]:
        raise UserError(
            f"two of the runs are called {twice[0]}, and their results would be in the same folder: give one at a time"
        )


def _file_problem(error: OSError) -> str:
    problem = "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return f"{Path(error.filename).name} {problem}"


@contextmanager
def results_folder(run: Run) -> Iterator[Path]:
    """Yield the folder for a run's results, locked by this process.

    Raises `UserError` if another evaluation holds the lock, if the folder is a link, or if it
    contains the results of another run with the same name.
    """
    folder = outputs_root() / "evaluation" / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and results are not written through it: remove it")
    folder.mkdir(mode=0o700, exist_ok=True)  # conversations may be personal
    with open_lock(lock_file(folder)) as lock:
        if not try_lock(lock):
            raise UserError(f"{run.name} is being evaluated right now: wait until that has finished")
        owner = read_cache(folder / OWNER, ResultsOwner) or {"run_folder": str(run.folder)}
        owner_folder = Path(owner["run_folder"])
        is_moved = not owner_folder.is_dir() and owner.get("run") == run.identity
        if not is_moved and not is_same_file(owner_folder, run.folder):
            raise UserError(
                f"{folder} has the results of another run folder, {one_line(owner_folder)}: give one of the two "
                "another name, or move the results away"
            )
        write_json(folder / OWNER, {"run_folder": str(run.folder.absolute()), "run": run.identity}, private=True)
        yield folder


def steps_of(run: Run) -> Iterator[tuple[int, Path]]:
    """Yield (step, folder) in step order; step 0 is the model before training."""
    yield 0, run.model_folder
    for checkpoint in run.checkpoints:
        yield checkpoint_step(checkpoint), checkpoint


def results_of(run: Run) -> list[CheckpointResult]:
    """Return the run's results that `evaluate_runs` wrote, in step order; empty if there are none.

    Raises `UserError` if a result is damaged.
    """
    folder = outputs_root() / "evaluation" / run.name
    summary = read_cache(folder / "summary.json", Summary)
    steps = [c["step"] for c in summary["checkpoints"]] if summary else []
    results = (read_json(folder / f"checkpoint-{step}.json", CheckpointResult) for step in steps)
    return [result for result in results if result is not None]


# --- one checkpoint -----------------------------------------------------------------------------


def _evaluated(
    run: Run, folder: Path, eval_set: EvalSet, settings: EvalSettings, saved_answers: SavedAnswers
) -> dict[str, Any]:
    """Run `evaluate_model` if the checkpoint is sound; raises `UserError` if it is not."""
    if problem := content_problem(run, folder):
        raise UserError(problem)
    return evaluate_model(run, folder, eval_set, settings, saved_answers)


def _save(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a checkpoint's result and answers; remove the answers saved meanwhile."""
    file = folder / f"checkpoint-{result['step']}.json"
    write_json(file, result)
    remember_result(result["key"], file)
    _write_lines(folder / f"checkpoint-{result['step']}.txt", (a["output"] for a in result["answers"]))
    SavedAnswers(result["key"]).remove()


def _remove_others(folder: Path, steps: set[int]) -> None:
    """Remove earlier results of this machine, of checkpoints that are gone or cannot be used."""
    for file in folder.glob("checkpoint-*.json"):
        step = file.stem.partition("-")[2]
        if step.isdecimal() and int(step) not in steps and is_remembered(file):
            file.unlink(missing_ok=True)
            file.with_suffix(".txt").unlink(missing_ok=True)


def evaluate_model(
    run: Run, folder: Path, eval_set: EvalSet, settings: EvalSettings, saved_answers: SavedAnswers | None = None
) -> dict[str, Any]:
    """Load one checkpoint with plain transformers, answer the questions, and score the answers.

    Every answer is added to `saved_answers`, and those in it are reused. Returns the scores of
    `corpus_scores`, the share of answers that `stopped` by themselves, the teacher-forced `loss` in
    nats per token of the reference answers, their `perplexity`, and every answer with its prompt
    and reference.
    """
    tokenizer, _ = load_template(run.model_folder, run.config.template)
    model = load_to_answer(folder, tokenizer, run.precision, run.trust_remote_code)
    questions, label = eval_set.questions, one_line(f"{run.name} {folder.name}")
    answers = _answers(model, eval_set, tokenizer, settings, saved_answers, label)
    loss, trained_tokens = loss_of_rows(model, eval_set.rows, tokenizer.pad_id)
    references = eval_set.references
    rows = [
        {"id": q.id, "prompt": _last_user_message(q), "reference": r, "output": a.text, "stopped": a.stopped}
        for q, r, a in zip(questions, references, answers, strict=True)
    ]
    return {
        "rows": len(rows),
        **corpus_scores([a.text for a in answers], references, settings.resamples),
        "stopped": sum(a.stopped for a in answers) / len(answers),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # larger losses would overflow
        "trained_tokens": trained_tokens,
        "settings": asdict(settings),
        "examples": rows[:EXAMPLES],
        "answers": rows,
    }


def _last_user_message(question: Conversation) -> str:
    return next(m.content for m in reversed(question.messages) if m.role == "user")


def _answers(
    model: Any,
    eval_set: EvalSet,
    tokenizer: Any,
    settings: EvalSettings,
    saved_answers: SavedAnswers | None,
    label: str,
) -> list[Answer]:
    """Answer all questions, with a progress bar; answers already in `saved_answers` are reused."""
    from tqdm import tqdm

    prompts = eval_set.prompts
    answers = {} if saved_answers is None else saved_answers.read(len(prompts))
    missing = [i for i in range(len(prompts)) if i not in answers]
    asked = [prompts[i] for i in missing]
    with tqdm(total=len(prompts), initial=len(answers), desc=label, unit="answer", leave=False, disable=None) as bar:
        for i, answer in generate(model, asked, tokenizer, settings.max_new_tokens, settings.batch_size):
            answers[missing[i]] = answer
            if saved_answers is not None:
                saved_answers.add(missing[i], answer)
            bar.update()
    return [answers[i] for i in range(len(prompts))]


def _key(run: Run, model: Path, eval_set: EvalSet, settings: EvalSettings, digests: Digests) -> str:
    """Return a key of all that a result depends on: files, questions, settings, code and device."""
    import torch

    questions = [asdict(question) for question in eval_set.questions]
    # A template may print the date: the same questions are other ids tomorrow.
    rendered = [eval_set.prompts, [[row.input_ids, row.labels] for row in eval_set.rows]]
    # The batch size does not change answers, and exclusion changes the questions themselves.
    relevant = {name: value for name, value in asdict(settings).items() if name not in ("batch_size", "exclude_leaked")}
    sums = [[str(file.name), digests.of(file)] for file in weight_files(model)]
    for folder in (model, run.model_folder):
        sums += [[file.name, digests.of(file)] for file in small_model_files(folder)]
    device = [run.precision, torch.cuda.get_device_name()] if torch.cuda.is_available() else ["fp32", "cpu"]
    relevant["tokenizer"] = tokenizer_for(eval_set.references)
    code = code_digest("data", "chat", "labels", "model", "evaluation")
    return fingerprint([code, sums, questions, rendered, relevant, device])


def _line(result: Mapping[str, Any]) -> str:
    return (
        f"{one_line(result['run'])} step {result['step']:>3}: "
        f"BLEU {result['bleu']:5.2f}{interval_told(result, 'bleu')}, "
        f"chrF {result['chrf']:5.2f}, loss {result['loss']:.3f}, {result['stopped']:.0%} of {result['rows']} answers "
        "stopped by themselves"
    )


def _write_lines(file: Path, texts: Iterable[str]) -> None:
    """Write one text per line, as sacreBLEU's command reads them."""
    with written_whole(file) as stream:
        stream.writelines(as_line(text) + "\n" for text in texts)


# --- runs that are still being trained ----------------------------------------------------------


def runs_to_evaluate(runs: Sequence[Run], wait: bool, ask: Callable[[str], bool] | None, say: Say) -> list[Run]:
    """Return the `runs` to evaluate now, handling those that are being trained.

    With `wait`, wait until their training has ended. Otherwise `ask` decides for each, given a
    question; if `ask` is None they are skipped. `say` prints progress.
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
                say(f"{run.name} is being trained, and is skipped: --wait waits for it")
                continue
        chosen.append(run)
    return chosen
