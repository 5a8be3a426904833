"""Exercise 02.test: the learner writes the test, and the bugs of the museum try it."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from minisft.chat.tokenizers import HuggingFaceTokenizer, Tokenizer
from minisft.course.bug_museum import BUGS
from minisft.course.buggy_rows import broken_in_row, right_row, talk
from minisft.course.exercises import Case, Exercise
from minisft.data.conversations import Conversation, only_last_answer
from minisft.data.download import find_tokenizer
from minisft.labels.encode_row import IGNORE_INDEX, Row
from minisft.labels.token_lens_html import count_of

WORDS = ("red", "blue", "cat", "dog", "tree", "house", "ten", "two", "yes", "no", "why", "how", "sun", "moon")


def is_sound(row: "Row", conversation: "Conversation", tokenizer: "Tokenizer") -> bool:
    """Return whether `row` has the ids and labels that `conversation` should give.

    Use `row.input_ids` and `row.labels`; `conversation.answers`, the number of
    answers, and `role`, `content` and `trained` of each of `conversation.messages`;
    and `bos_id`, `eos_id`, `control_ids` and `decode(ids)` of the tokenizer.
    """
    controls = [token for token in row.input_ids if token in tokenizer.control_ids]
    ends = [tokenizer.eos_id] * conversation.answers
    if controls != [tokenizer.bos_id, *ends] or row.input_ids[0] != tokenizer.bos_id:
        return False
    answers: list[str] = []
    answer: list[int] = []  # the trained ids since the last EOS
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label not in (-100, token) or (label == -100 and answer):
            return False  # another label than its id, or a trained run without an EOS
        if label == tokenizer.eos_id:
            answers.append(tokenizer.decode(answer).strip())
            answer = []
        elif label != -100:
            answer.append(label)
    trained = [m for m in conversation.messages if m.role == "assistant" and m.trained]
    return not answer and answers == [m.content.strip() for m in trained]


class _SharedTokenizer(HuggingFaceTokenizer):
    """A tokenizer that the copies of a case share, because copying it takes long."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedTokenizer":
        return self


@functools.cache
def shared_tokenizer() -> HuggingFaceTokenizer:
    """The tokenizer of the course's model, loaded once."""
    return _SharedTokenizer(find_tokenizer("smollm2"))


Maker = Callable[[HuggingFaceTokenizer, Conversation], Row]


def _shifted(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    row = right_row(tokenizer, conversation)
    return replace(row, labels=[*row.labels[1:], IGNORE_INDEX])


def _collated(tokenizer: HuggingFaceTokenizer, conversation: Conversation) -> Row:
    batch = BUGS["collator"].wrong(tokenizer, conversation)
    return Row(conversation.id, batch["input_ids"][0].tolist(), batch["labels"][0].tolist())


_SHIFTED = "Labels shifted by one"
_MAKERS: dict[str, Maker] = {  # a bug's title -> the wrong way
    **{bug.title: bug.wrong for bug in BUGS.values() if bug.caught is broken_in_row},
    BUGS["collator"].title: _collated,
    _SHIFTED: _shifted,
}
_MUST_HOLD = {bug.title: bug.how_caught for bug in BUGS.values()} | {
    BUGS["find_first"].title: "Trained tokens come in runs, each with its EOS at the end, and the question has none.",
    _SHIFTED: "Each label is -100 or the id at the same position.",
}
_RIGHT = {
    "a right row of two questions": talk("What is 2+2?", "4", "And 3+3?", "6"),
    "a right row whose question has the answer in it": talk("Say 4.", "4"),
    "a right row whose user spells EOS as text": talk("Bye<|im_end|></s>", "See you."),
    "a right row with an answer that is only read": only_last_answer(talk("Name a color.", "Blue.", "Why?", "Sky.")),
}


def _test_cases(draw: random.Random) -> Iterator[Case]:
    """Yield rows with a bug and right ones; the id of the conversation is what a row is called."""
    tokenizer = shared_tokenizer()
    for name, conversation in _RIGHT.items():
        named = replace(conversation, id=name)
        yield Case((right_row(tokenizer, named), named, tokenizer), True, name)
    examples = {bug.title: bug.example[0] for bug in BUGS.values()}
    for title, make in _MAKERS.items():
        named = replace(examples.get(title, talk("What is 2+2?", "4", "And 3+3?", "6")), id=title)
        yield Case((make(tokenizer, named), named, tokenizer), False, f"the bug {title!r}")
    for n in range(30):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(2 * draw.randint(1, 3))]
        title = draw.choice(list(_MAKERS))
        named = talk(*texts, name="a random right row" if n % 3 == 0 else title)
        row = right_row(tokenizer, named) if n % 3 == 0 else _MAKERS[title](tokenizer, named)
        is_right = not broken_in_row(row, tokenizer, named)
        if is_right == (n % 3 == 0):  # a bug may leave a row as it was
            yield Case((row, named, tokenizer), is_right)


def _survivors(failed: list[tuple[Case, Any]]) -> str:
    """Name the bugs that a test lets live, and the right rows that it rejects."""
    if any(not isinstance(given, bool) for _, given in failed):
        return "return True or False, and nothing else."
    lives, rejected = (_names(failed, expected) for expected in (False, True))
    parts = []
    if lives:
        parts.append(f"your test lets {count_of(len(lives), 'bug')} live: {'; '.join(lives)}.")
        parts.append(f"Against the first: {_MUST_HOLD[lives[0]]}")
    if rejected:
        parts.append(f"{'It also' if lives else 'your test'} rejects {'; '.join(rejected)}.")
    return " ".join(parts)


def _names(failed: list[tuple[Case, Any]], expected: bool) -> list[str]:
    return list(dict.fromkeys(case.arguments[1].id for case, _ in failed if case.expected is expected))


TEST = Exercise(
    name="02.test",
    answer=is_sound,
    cases=_test_cases,
    mistakes=(),
    explain=_survivors,
    hints=(
        "Start with what must be equal: the control ids of the row are one BOS, then one EOS for each answer. Then "
        "look at the labels from left to right.",
        "Collect the trained ids up to each trained EOS; decoded, they are the answers that are trained. A run of "
        "trained ids that does not end in EOS is a bug, and so is a label that is neither -100 nor its own id.",
    ),
    minutes=20,
    ask_next="Which bug could you add to the museum that your own test lets live?",
)
