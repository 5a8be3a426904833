"""What the checkpoints of a run are asked, and what of it they were trained on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minisft.chat.registry import template_for
from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.checksums import Digests, code_digest
from minisft.data.conversations import Conversation, one_per_answer
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.errors import UserError
from minisft.evaluation.contamination import Overlap, Prompt, find_overlaps, trained_texts
from minisft.files import read_json, write_json
from minisft.labels.encode_row import encode, encode_segments
from minisft.run.folder import Run
from minisft.training.dataset import TEST, TRAIN, load_rows

ANSWERS = ("last", "all")


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate. Raises `UserError` for what cannot be.

    `rows` test conversations, the first that fit; of each the `last` answer or `all`; greedy answers of at most
    `max_new_tokens` tokens, `batch_size` at once, which changes no answer; intervals from `resamples` bootstrap
    samples, 0 for none. `exclude_leaked` takes other conversations for those that have a trained question.
    """

    rows: int = 12
    max_new_tokens: int = 48
    batch_size: int = 32
    answers: str = "last"
    resamples: int = 1000
    exclude_leaked: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("max_new_tokens", 1), ("batch_size", 1), ("resamples", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name.replace('_', ' ')} is {value}: give at least {least}")
        if self.resamples == 1:
            raise UserError("resamples is 1: give 0 for no intervals, or many")
        if self.answers not in ANSWERS:
            raise UserError(f"unknown answers {self.answers!r}: use one of {', '.join(ANSWERS)}")


@dataclass(frozen=True)
class EvalSet:
    """What a run's checkpoints are asked: conversations, and of them one question for each answer that is scored.

    `leaks` are those questions, by id, that were trained; `seen` is how many were looked at for that.
    """

    conversations: list[Conversation]
    questions: list[Conversation]
    leaks: Mapping[str, Overlap]
    seen: int

    def leakage(self, settings: EvalSettings) -> dict[str, Any]:
        """How many questions leaked, and what was done about it, for a report."""
        exact = sum(leak.exact for leak in self.leaks.values())
        about = {"of": self.seen, "exact": exact, "near": len(self.leaks) - exact, "excluded": settings.exclude_leaked}
        return about | {"rows": {name: asdict(leak) for name, leak in self.leaks.items()}}


def make_eval_set(run: Run, settings: EvalSettings, folder: Path, digests: Digests | None = None) -> EvalSet:
    """The first test conversations whose prompt and answer fit in the run's maximum length, and what of them leaked."""
    file = run.folder / "data" / TEST
    if not file.exists() or file.stat().st_size == 0:
        raise UserError(f"{run.name} has no test conversations: train it on data with at least two conversations")
    candidates = _fitting(run, file)
    chosen: list[Conversation] = []
    leaks: dict[str, Overlap] = {}
    seen = 0
    while more := [c for _, c in zip(range(settings.rows - len(chosen)), candidates, strict=False)]:
        asked = {c.id: questions_of(c, settings.answers) for c in more}
        seen += sum(map(len, asked.values()))
        found = _leaks(run, {q.id: q for questions in asked.values() for q in questions}, folder, digests or Digests())
        leaks |= found
        clean = [c for c in more if not settings.exclude_leaked or not found.keys() & {q.id for q in asked[c.id]}]
        chosen += clean
    if not chosen:
        what = "is left without those that leaked" if seen else f"fits in {run.config.max_length} tokens"
        raise UserError(f"no test conversation of {run.name} {what}: give it more data, or allow more")
    return EvalSet(chosen, [q for c in chosen for q in questions_of(c, settings.answers)], leaks, seen)


def _fitting(run: Run, file: Path) -> Iterator[Conversation]:
    tokenizer, template = load_template(run.model_folder, run.config.template)
    for conversation in read(file, Ledger()):
        row = encode(conversation, template, tokenizer, run.config.max_length)
        if not row.truncated and questions_of(conversation, "all"):
            yield conversation


def questions_of(conversation: Conversation, answers: str) -> list[Conversation]:
    """One conversation per answer that is scored, which ends with it; an answer of weight 0 is not to be learned."""
    found = list(one_per_answer(conversation))
    return found[-1:] if answers == "last" else found


def prompt_ids(conversation: Conversation, template: ChatTemplate, tokenizer: HuggingFaceTokenizer) -> list[int]:
    """The ids before the last answer: the very ids that training put in front of it."""
    return encode_segments(template.prompt_segments(conversation), tokenizer)


def _leaks(run: Run, questions: Mapping[str, Conversation], folder: Path, digests: Digests) -> dict[str, Overlap]:
    """Which of the questions are in what the run trained on; looked for once."""
    tokenizer, template = load_template(run.model_folder, run.config.template)
    prompts = {
        name: Prompt(
            tokenizer.decode(prompt_ids(question, template, tokenizer)),
            [m.content for m in question.messages if m.role == "user"],
        )
        for name, question in questions.items()
    }
    data = run.folder / "data"
    if not (data / TRAIN).is_file():
        raise UserError(f"{run.name} has no training rows ({data / TRAIN}): prepare it again with --overwrite")
    code = code_digest("data", "chat", "labels", "evaluation")
    looked_for = fingerprint([code, list(map(asdict, prompts.values())), digests.of(data / TRAIN)])
    file = folder / f".leaks-{looked_for}.json"
    if (known := read_cache(file, dict[str, Overlap])) is not None:
        return known
    found = find_overlaps(prompts, trained_texts(load_rows(data), tokenizer))
    write_json(file, {name: asdict(leak) for name, leak in found.items()})
    return found


def read_cache(file: Path, shape: Any) -> Any:
    """The JSON of a file that can be made again, as `shape`; None where there is none that can be used."""
    try:
        return read_json(file, shape)
    except UserError:
        return None


@functools.lru_cache(maxsize=2)  # loading takes a second, and every checkpoint of a run asks
def load_template(folder: Path, version: str) -> tuple[HuggingFaceTokenizer, ChatTemplate]:
    """The tokenizer in a model folder, and the template of that version for it."""
    tokenizer = HuggingFaceTokenizer(folder, version)
    return tokenizer, template_for(tokenizer, version)


def fingerprint(value: Any) -> str:
    """16 characters that change whenever the JSON of `value` does."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
