"""Choose a run's test questions, and find those that were in its training data."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minisft.chat.registry import template_for
from minisft.chat.template import ChatTemplate, RefusedConversation, Segment
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.checksums import Digests, code_digest, remember, remembered
from minisft.data.conversations import Conversation, Message, one_per_answer
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.errors import UserError
from minisft.evaluation.contamination import Beginning, Overlap, Prompt, Words, find_overlaps, trained_texts, words_of
from minisft.evaluation.generate import before_stop
from minisft.files import read_json
from minisft.labels.encode_row import IGNORE_INDEX, Row, encode, encode_segments
from minisft.run.folder import Run
from minisft.text import one_line
from minisft.training.dataset import TEST, TRAIN, load_rows

ANSWERS = ("last", "all")
LEAKS = "leaks.json"  # in the cache folder: which questions leaked, by question set and rows
MOST_LEAKS = 50
UNLIMITED = 1 << 30  # tokens: no truncation
MARK = "m4rk"  # stands for every message where only the template's own text is wanted
NOTHING_TRAINED = "the template leaves nothing of this answer to train"
LONGER = 3  # exchanges by which a trained conversation may be longer; some templates write other text then


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate. Raises `UserError` for invalid values.

    `rows` is the number of test conversations: the first that fit. Of each, the `last` answer or
    `all` are scored. Answers are greedy and have at most `max_new_tokens` tokens; `batch_size`
    prompts are decoded together, which does not change the answers. `resamples` is the number of
    bootstrap samples for intervals, 0 for no intervals. `exclude_leaked` replaces conversations
    that contain a trained question.
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
    """What checkpoints answer: conversations, and one question for each scored answer in them.

    `prompts` are the ids before the answers, and `rows` the questions with their answers; they are
    made once, because a template may print the date. `references` are the texts that the replies are
    compared with. `leaks` are the questions, by id, that were in the training data, out of the
    `seen` questions that were compared with it (more than `questions`, if leaked conversations were
    replaced). `refused` are the test conversations, and the questions in other ones, that the chat
    template refused, with the reason, by id.
    """

    conversations: list[Conversation]
    questions: list[Conversation]
    prompts: list[list[int]]
    rows: list[Row]
    references: list[str]
    leaks: Mapping[str, Overlap]
    seen: int
    refused: Mapping[str, str]

    def leakage(self, settings: EvalSettings) -> dict[str, Any]:
        """Return how many questions leaked, which, and whether they were excluded, as JSON."""
        exact = sum(leak.exact for leak in self.leaks.values())
        return {
            "of": self.seen,
            "exact": exact,
            "near": len(self.leaks) - exact,
            "excluded": settings.exclude_leaked,
            "rows": {question_id: asdict(leak) for question_id, leak in self.leaks.items()},
        }


def make_eval_set(run: Run, settings: EvalSettings, digests: Digests | None = None) -> EvalSet:
    """Choose the first test conversations whose prompt and answer fit in the run's maximum length.

    Raises `UserError` if no test conversation can be used.
    """
    file = run.folder / "data" / TEST
    if not file.exists() or file.stat().st_size == 0:
        raise UserError(f"{run.name} has no test conversations: train it on data with at least two conversations")
    refused: dict[str, str] = {}
    candidates = _candidates(run, file, settings.answers, refused)
    chosen: list[tuple[Conversation, list[_Question]]] = []
    leaks: dict[str, Overlap] = {}
    seen = 0
    while more := list(itertools.islice(candidates, settings.rows - len(chosen))):
        by_id = {q.asked.id: q.asked for _, questions in more for q in questions}
        seen += len(by_id)
        new_leaks = _leaks(run, by_id, digests or Digests())
        leaks |= new_leaks
        chosen += [
            (conversation, questions)
            for conversation, questions in more
            if not settings.exclude_leaked or not new_leaks.keys() & {q.asked.id for q in questions}
        ]
    if not chosen and seen:
        raise UserError(f"every test conversation of {run.name} leaked: use more data, or do not exclude leaked ones")
    if not chosen:
        raise UserError(_none_fits(run, refused, settings.answers))
    scored = [question for _, questions in chosen for question in questions]
    return EvalSet(
        conversations=[conversation for conversation, _ in chosen],
        questions=[q.asked for q in scored],
        prompts=[q.prompt for q in scored],
        rows=[q.row for q in scored],
        references=[q.reference for q in scored],
        leaks=leaks,
        seen=seen,
        refused=refused,
    )


def _none_fits(run: Run, refused: Mapping[str, str], answers: str) -> str:
    limit = run.config.max_length
    if refused:
        how = "prepare it again with another --template, or use more data"
        return f"{run.name}: {refusals(refused, answers)}, and no other fits in {limit} tokens: {how}"
    return f"no test conversation of {run.name} fits in {limit} tokens: use more data or a larger maximum"


def refusals(refused: Mapping[str, str], answers: str) -> str:
    """Say how many conversations or questions, by id, a chat template refused, and why; "" if none.

    `answers` is that of `EvalSettings`: with `all`, single answers may be refused.
    """
    if not refused:
        return ""
    first, reason = next(iter(refused.items()))
    what = "test conversations" if answers == "last" else "test conversations or answers in them"
    return f"the chat template refuses {len(refused)} {what} (first {one_line(first)}: {reason})"


@dataclass(frozen=True)
class _Question:
    """A conversation that ends with the answer to score; its prompt and row, and the text to compare with."""

    asked: Conversation
    prompt: list[int]
    row: Row
    reference: str


def _candidates(
    run: Run, file: Path, answers: str, refused: dict[str, str]
) -> Iterator[tuple[Conversation, list[_Question]]]:
    """Yield the test conversations that fit in a row, each with its questions.

    Add the conversations and the questions that the template refuses to `refused`.
    """
    tokenizer, template = load_template(run.model_folder, run.config.template)
    for conversation in read(file, Ledger(), is_clean=True, reads_tools=template.has_tools):
        try:
            row = encode(conversation, template, tokenizer, run.config.max_length)
        except RefusedConversation as reason:
            refused[conversation.id] = str(reason)
            continue
        if row.truncated:
            continue
        questions = []
        for asked in questions_of(conversation, answers):
            try:
                questions.append(_question(asked, template, tokenizer))
            except RefusedConversation as reason:
                refused[conversation.id if answers == "last" else asked.id] = str(reason)
        if questions:
            yield conversation, questions


def _question(asked: Conversation, template: ChatTemplate, tokenizer: HuggingFaceTokenizer) -> _Question:
    """Encode a question. Raises `RefusedConversation`, also if no token of its answer is trained."""
    row = encode(asked, template, tokenizer, UNLIMITED)
    if not row.trained:
        raise RefusedConversation(NOTHING_TRAINED)
    return _Question(asked, prompt_ids(asked, template, tokenizer), row, _reference(asked, row, template, tokenizer))


def _reference(asked: Conversation, row: Row, template: ChatTemplate, tokenizer: HuggingFaceTokenizer) -> str:
    """Return the text that a perfect reply has.

    A model's own template may write more than the content, such as a thought: the reference is then
    all that is trained before the end of the answer, decoded as a reply is.
    """
    if template.markers != "own":
        return asked.messages[-1].content.strip()
    trained = [label for label in row.labels if label != IGNORE_INDEX]
    return tokenizer.decode(before_stop(trained, tokenizer.stop_ids)).strip()


def questions_of(conversation: Conversation, answers: str) -> list[Conversation]:
    """Return one conversation per scored answer, ending with it.

    Answers of weight 0 are not scored, nor are answers that call tools: BLEU compares texts.
    """
    questions = [one for one in one_per_answer(conversation) if not one.messages[-1].tool]
    return questions[-1:] if answers == "last" else questions


def prompt_ids(conversation: Conversation, template: ChatTemplate, tokenizer: HuggingFaceTokenizer) -> list[int]:
    """Return the ids before the last answer: exactly the ids that precede it in training."""
    return encode_segments(template.prompt_segments(conversation), tokenizer)


def _prompt(question: Conversation, template: ChatTemplate, tokenizer: HuggingFaceTokenizer) -> Prompt:
    """Return what the training row of a conversation that begins like `question` begins with."""
    more = (Message("user", MARK), Message("assistant", MARK, trained=False))
    beginnings = []
    for exchanges in range(LONGER + 1):
        longer = replace(question, messages=question.messages + more * exchanges)
        marked = replace(longer, messages=tuple(replace(m, content=MARK, reasoning="") for m in longer.messages))
        with suppress(RefusedConversation):
            head = len(_words(_before_mark(template.segments(marked)), tokenizer))
            prompt = itertools.takewhile(lambda segment: not segment.trained, template.segments(longer))
            beginnings.append(Beginning(head, _words(prompt, tokenizer)[head:]))
    return Prompt(beginnings, [m.content for m in question.messages if m.role == "user"])


def _before_mark(segments: Iterable[Segment]) -> Iterator[Segment]:
    for segment in segments:
        text, mark, _ = (segment.text or "").partition(MARK)
        yield replace(segment, text=text) if mark else segment
        if mark:
            return


def _words(segments: Iterable[Segment], tokenizer: HuggingFaceTokenizer) -> Words:
    return words_of(tokenizer.decode(encode_segments(segments, tokenizer)))


def _leaks(run: Run, questions: Mapping[str, Conversation], digests: Digests) -> dict[str, Overlap]:
    """Return which questions are in the run's training rows; remembered in the cache folder."""
    tokenizer, template = load_template(run.model_folder, run.config.template)
    prompts = {question_id: _prompt(question, template, tokenizer) for question_id, question in questions.items()}
    data = run.folder / "data"
    if not (data / TRAIN).is_file():
        raise UserError(f"{run.name} has no training rows ({data / TRAIN}): prepare it again with --overwrite")
    code = code_digest("data", "chat", "labels", "evaluation")
    key = fingerprint([code, [[name, asdict(p)] for name, p in prompts.items()], digests.of(data / TRAIN)])
    if (known := remembered(LEAKS, dict[str, dict[str, Overlap]]).get(key)) is not None:
        return known
    overlaps = find_overlaps(prompts, trained_texts(load_rows(data), tokenizer))
    remember(LEAKS, key, {question_id: asdict(overlap) for question_id, overlap in overlaps.items()}, MOST_LEAKS)
    return overlaps


def read_cache(file: Path, shape: Any) -> Any:
    """Return the JSON of a cache file as `shape`, or None if the file is missing or damaged."""
    try:
        return read_json(file, shape)
    except UserError:
        return None


@functools.lru_cache(maxsize=2)  # loading takes a second, and every checkpoint of a run needs it
def load_template(folder: Path, version: str) -> tuple[HuggingFaceTokenizer, ChatTemplate]:
    """Load the tokenizer in a model folder, and the template of this version for it."""
    tokenizer = HuggingFaceTokenizer(folder, version)
    return tokenizer, template_for(tokenizer, version)


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal characters that depend on the JSON of `value`."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
