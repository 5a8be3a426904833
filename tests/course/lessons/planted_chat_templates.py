"""Answers to the exercises of lesson 01, as learners write them."""

import itertools
import re

from minisft.data.conversations import is_blank

# --- 01.turns ----------------------------------------------------------------------------------------------


def by_groups(turns):
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    usable = list(itertools.takewhile(lambda turn: not is_blank(turn[1]), turns[first:]))
    groups = itertools.groupby(usable, key=lambda turn: turn[0])
    cleaned = [(role, "\n\n".join(text for _, text in group)) for role, group in groups]
    while cleaned and cleaned[-1][0] == "user":
        cleaned.pop()
    return cleaned


def by_lists(turns):
    roles, texts = [], []
    for role, text in turns:
        if not roles and role != "user":
            continue
        if is_blank(text):
            break
        if roles and roles[-1] == role:
            texts[-1] += "\n\n" + text
        else:
            roles.append(role)
            texts.append(text)
    if roles[-1:] == ["user"]:
        del roles[-1], texts[-1]
    return [list(pair) for pair in zip(roles, texts, strict=True)]


def in_pairs(turns):
    pairs = []
    for role, text in turns:
        if role == "assistant" and not pairs:
            continue
        if is_blank(text):
            break
        if role == "user":
            if pairs and pairs[-1][1] is None:
                pairs[-1][0] += f"\n\n{text}"
            else:
                pairs.append([text, None])
        else:
            answer = pairs[-1][1]
            pairs[-1][1] = text if answer is None else f"{answer}\n\n{text}"
    whole = [pair for pair in pairs if pair[1] is not None]
    return tuple(turn for q, a in whole for turn in (("user", q), ("assistant", a)))


def keeps_the_beginning(turns):
    usable = list(itertools.takewhile(lambda turn: not is_blank(turn[1]), turns))
    groups = itertools.groupby(usable, key=lambda turn: turn[0])
    cleaned = [(role, "\n\n".join(text for _, text in group)) for role, group in groups]
    return cleaned[:-1] if cleaned and cleaned[-1][0] == "user" else cleaned


def blank_first(turns):
    blanks = [i for i, (_, text) in enumerate(turns) if is_blank(text)]
    return by_groups(turns[: blanks[0]] if blanks else turns)


def without_blank_turns(turns):
    return by_groups([(role, text) for role, text in turns if not is_blank(text)])


def never_joined(turns):
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    usable = list(itertools.takewhile(lambda turn: not is_blank(turn[1]), turns[first:]))
    return usable[:-1] if usable and usable[-1][0] == "user" else usable


def with_last_question(turns):
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    usable = list(itertools.takewhile(lambda turn: not is_blank(turn[1]), turns[first:]))
    groups = itertools.groupby(usable, key=lambda turn: turn[0])
    return [(role, "\n\n".join(text for _, text in group)) for role, group in groups]


def stripped(turns):
    return by_groups([(role, text.strip() if not is_blank(text) else text) for role, text in turns])


def none_or_all(turns):
    return turns if by_lists(turns) == [list(turn) for turn in turns] else []


# --- 01.v1 -------------------------------------------------------------------------------------------------


def written(question, answer, start=("bos",)):
    """A function that writes the parts of each question and answer; "bos" and "eos" are ids."""

    def ids_of(messages, encode, bos, eos):
        names = {"bos": bos, "eos": eos}
        parts = [*start]
        for role, text in messages:
            parts += [
                part if part in names else part.replace("TEXT", text) for part in (question, answer)[role != "user"]
            ]
        return [i for part in parts for i in ([names[part]] if part in names else encode(part))]

    return ids_of


def in_turns(messages, encode, bos, eos):
    ids = [bos]
    for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=True):
        ids.extend(encode("[INST] " + question + " [/INST]"))
        ids.extend(encode(answer))
        ids.append(eos)
    return tuple(ids)


def as_array(messages, encode, bos, eos):
    import numpy as np

    return np.array(in_turns(messages, encode, bos, eos))


def recursive(messages, encode, bos, eos):
    if not messages:
        return [bos]
    (role, text), before = messages[-1], recursive(messages[:-1], encode, bos, eos)
    return before + (encode(f"[INST] {text} [/INST]") if role == "user" else [*encode(text), eos])


def one_string(messages, encode, bos, eos):
    text = "<s>"
    for role, content in messages:
        text += f"[INST] {content} [/INST]" if role == "user" else content + "</s>"
    return encode(text)


def eos_at_the_end(messages, encode, bos, eos):
    return [i for i in in_turns(messages, encode, bos, eos) if i != eos] + [eos]


# --- 01.pieces ---------------------------------------------------------------------------------------------


def control(*names):
    return [("control", name) for name in names]


def arranged(place, mark=None, glue="\n\n", v7_has_place=True, empty=False):
    """A function that writes the system prompt where `place(version, number, count)` is true."""

    def pieces_of(version, system, turns):
        pieces, wanted = control("bos"), bool(system) or empty
        if version == "v7" and wanted and v7_has_place:
            pieces += [*control("[SYSTEM_PROMPT]"), ("text", system), *control("[/SYSTEM_PROMPT]")]
        for number, (question, answer) in enumerate(turns):
            if wanted and place(version, number, len(turns)):
                question = system + glue + question
            if version == "v1" or mark == "text":
                pieces.append(("text", "[INST] " + question + " [/INST]"))
            else:
                pad = " " if mark == "spaces" else ""
                pieces += [*control("[INST]"), ("text", pad + question + pad), *control("[/INST]")]
            pieces += [("text", answer), *control("eos")]
        return pieces

    return pieces_of


def right_place(version, number, count):
    return (version == "v1" and number == 0) or (version == "v3" and number == count - 1)


def by_changing_questions(version, system, turns):
    questions = [q for q, _ in turns]
    result = [["control", "bos"]]
    if system:
        if version == "v1":
            questions[0] = "\n\n".join([system, questions[0]])
        elif version == "v3":
            questions[-1] = "\n\n".join([system, questions[-1]])
        else:
            result += [["control", "[SYSTEM_PROMPT]"], ["text", system], ["control", "[/SYSTEM_PROMPT]"]]
    for question, (_, answer) in zip(questions, turns, strict=True):
        asked = [["control", "[INST]"], ["text", question], ["control", "[/INST]"]]
        result += [["text", f"[INST] {question} [/INST]"]] if version == "v1" else asked
        result += [["text", answer], ["control", "eos"]]
    return result


def from_the_package(version, system, turns):
    from minisft.chat import MistralTemplate
    from minisft.data import Conversation, Message

    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    for segment in MistralTemplate(version).segments(Conversation("", tuple(messages))):
        yield ("control", segment.control) if segment.control else ("text", segment.text)


# --- 01.spans ----------------------------------------------------------------------------------------------


def by_differences(render, messages, end):
    """Mark only the contents, and split the rendering at the marks."""
    marks = [f"<{i}!>" for i in range(len(messages))]
    around = re.split("|".join(marks), render([(role, mark) for (role, _), mark in zip(messages, marks, strict=True)]))
    spans, start = [], 0
    for (role, content), before, after in zip(messages, around, around[1:], strict=False):
        start += len(before)
        if role == "assistant":
            spans.append([start, start + len(content) + after.find(end) + len(end)])
        start += len(content)
    return spans


def by_lengths(render, messages, end):
    """A content replaced by nothing: the first difference is where it begins."""
    spans = []
    for i, (role, content) in enumerate(messages):
        if role == "assistant":
            probe = [(r, c if j < i else "\0" if j == i else "") for j, (r, c) in enumerate(messages)]
            start = render(probe).index("\0")
            spans.append((start, start + len(content) + len(end)))
    return tuple(spans)


def as_a_matrix(render, messages, end):
    import numpy as np

    return np.array(by_differences(render, messages, end))


def found(render, messages, end, whose=("assistant",)):
    text = render(messages)
    return [(text.find(c), text.find(c) + len(c) + len(end)) for role, c in messages if role in whose]


def found_in_order(render, messages, end):
    text, at, spans = render(messages), 0, []
    for role, content in messages:
        start = text.index(content, at)
        at = start + len(content)
        spans += [(start, at + len(end))] if role == "assistant" else []
    return spans


def without_end(render, messages, end):
    return [(start, stop - len(end)) for start, stop in by_differences(render, messages, end)]


def cut_at_end(render, messages, end):
    text = render(messages)
    return [(a, text.find(end, a) + len(end)) for a, _ in by_differences(render, messages, end)]


def of_the_marked(render, messages, end):
    marked = [(role, f"m4rk{i}kr4m") for i, (role, _) in enumerate(messages)]
    return by_differences(render, marked, end)


def of_all(render, messages, end):
    text, spans = render([(role, "\0" * len(content)) for role, content in messages]), []
    for run in re.finditer("\0+", text):
        spans.append((run.start(), run.end() + len(end)))
    return spans


def stripped_first(render, messages, end):
    return by_differences(render, [(role, content.strip()) for role, content in messages], end)


QUESTION, ANSWER = ("[INST] TEXT [/INST]",), ("TEXT", "eos")
WRONG = {
    "01.turns": [
        (keeps_the_beginning, "before the first question is kept"),
        (without_blank_turns, "skipped, and reading continues"),
        (blank_first, "Rule 1 comes before rule 2"),
        (never_joined, "stay separate"),
        (lambda turns: [(r, t.replace("\n\n", "\n")) for r, t in by_groups(turns)], "have one line end between them"),
        (with_last_question, "stays without an answer"),
        (stripped, "stripped"),
        (none_or_all, "dropped whole"),
        (lambda turns: turns, "Not yet"),
    ],
    "01.v1": [
        (written(("bos", *QUESTION), ANSWER, ()), "BOS comes before each question"),
        (written(QUESTION, ("TEXT",)), "No EOS follows the answers"),
        (written((*QUESTION, "eos"), ("TEXT",)), "EOS follows the question instead"),
        (written((*QUESTION, "eos"), ANSWER), "EOS follows each question as well"),
        (eos_at_the_end, "Only the last answer ends in EOS"),
        (written(QUESTION, (" TEXT", "eos")), "is doubled"),
        (written(("[INST]TEXT[/INST]",), ANSWER), "are lost"),
        (one_string, "written as text"),
        (lambda m, encode, bos, eos: [bos], "entries"),
    ],
    "01.pieces": [
        (arranged(lambda v, n, count: v != "v7" and n == 0), "In v3 the system prompt stands before the first"),
        (arranged(lambda v, n, count: v != "v7" and n == count - 1), "In v1 the system prompt stands before the last"),
        (arranged(lambda v, n, count: v != "v7"), "repeated before every question"),
        (
            arranged(lambda v, n, count: right_place(v, n, count) or (v == "v7" and not n), v7_has_place=False),
            "In v7 the system prompt is part of a question",
        ),
        (arranged(right_place, glue="\n"), "a blank line stands between"),
        (arranged(right_place, mark="text"), "written as text"),
        (arranged(right_place, mark="spaces"), "has spaces around it"),
        (arranged(right_place, empty=True), "Without a system prompt"),
        (lambda version, system, turns: [("control", "bos")], "entries"),
    ],
    "01.spans": [
        (found, "searched for from the start"),
        (found_in_order, "come first and may be found"),
        (without_end, "not part of the span"),
        (cut_at_end, "may spell it"),
        (of_the_marked, "positions are those of the rendering with marks"),
        (of_all, "The questions have spans, too"),
        (stripped_first, "stripped before they are measured"),
        (lambda render, messages, end: [], "entries"),
    ],
}
RIGHT = {
    "01.turns": [by_groups, by_lists, in_pairs],
    "01.v1": [in_turns, as_array, recursive],
    "01.pieces": [
        arranged(right_place),
        by_changing_questions,
        lambda version, system, turns: tuple(from_the_package(version, system, turns)),
    ],
    "01.spans": [by_differences, by_lengths, as_a_matrix],
}
