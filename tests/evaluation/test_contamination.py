import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.evaluation.contamination import NEAR, Beginning, Prompt, find_overlaps, words_of

QUESTION = "What is the best way to learn how to bake good bread at home without any special tools?"
SYSTEM = "You are a helpful assistant who always answers in one short and friendly sentence, whatever people may ask."


def rendered(question, system="", head=""):
    return f"{head}<s>[INST] {system} {question} [/INST]"


def asked(question, system="", heads=(0,)):
    return Prompt([Beginning(head, words_of(rendered(question, system))) for head in heads], [question])


def row(question, answer="So it is.", system="", head=""):
    return f"{rendered(question, system, head)} {answer}</s>"


def leak_of(prompt, *texts):
    return find_overlaps({"q": prompt}, ((str(i), text) for i, text in enumerate(texts))).get("q")


def test_a_question_that_begins_a_row_is_exact_whatever_its_case_and_marks():
    found = leak_of(asked(QUESTION), row("How far is the moon?"), row(QUESTION.upper().replace("?", " !")))
    assert (found.row, found.exact, found.share) == ("1", True, 1.0)


def test_a_question_with_a_word_changed_or_inside_a_row_is_near():
    changed = QUESTION.replace("tools", "oven")
    found = leak_of(asked(changed), row(QUESTION))
    assert not found.exact
    assert NEAR <= found.share < 1
    assert not leak_of(asked(QUESTION), row(f"Somebody asked: {QUESTION} Nobody knew.")).exact
    assert leak_of(asked(QUESTION), row("How far is the moon?")) is None


def test_a_system_prompt_that_all_share_is_no_leak():
    rows = [row(f"How far is star {i}, counted in steps?", system=SYSTEM) for i in range(3)]
    assert leak_of(asked(QUESTION, SYSTEM), *rows) is None
    assert leak_of(asked("How far is star 1, counted in steps?", SYSTEM), *rows).exact


@pytest.mark.parametrize("question", ["Hi", "how are you", "tell me a funny joke"])
def test_short_questions_are_only_compared_whole(question):
    assert leak_of(asked(question), row(f"{question}, and then some more about it")) is None
    assert leak_of(asked(question), row(f"{question}!")).exact


def test_a_short_question_is_exact_behind_any_text_of_the_template_but_only_where_the_conversation_begins():
    hi = asked("Hi", heads=(3, 6))
    assert leak_of(hi, row("Hi", head="On 3 May. ")).exact
    assert leak_of(hi, row("Hi", head="On 21 June, in 12 messages. ")).exact
    assert leak_of(hi, row("Please translate: Hi", head="On 3 May. "), row("Hi", head="Today. ")) is None


def test_what_has_no_words_is_compared_by_its_signs():
    assert leak_of(asked("???"), row("!"), row("How far?")) is None
    assert leak_of(asked("🙂🙂"), row("🙃")) is None
    assert leak_of(asked("🙂🙂"), row("🙂🙂")).exact


def test_scripts_without_blanks_are_compared_by_the_character():
    question = "今天天气怎么样我们要不要去公园散步"
    found = leak_of(asked(question + "呢"), row(question))
    assert not found.exact
    assert found.share >= NEAR
    assert leak_of(asked(question), row("明天的会议改到下午三点请大家准时参加谢谢")) is None


@given(st.lists(st.text(alphabet="abc ", min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, 2**32))
def test_all_prompts_that_begin_a_row_are_exact_and_no_others(texts, seed):
    chance = random.Random(seed)
    starts = [text[: chance.randint(1, len(text))] for text in texts]
    found = find_overlaps(
        {str(i): Prompt([Beginning(0, words_of(s))], [s]) for i, s in enumerate(starts)}, enumerate(texts)
    )
    for i, start in enumerate(starts):
        words = words_of(start)
        begins = bool(words) and any(words_of(text)[: len(words)] == words for text in texts)
        assert (str(i) in found and found[str(i)].exact) == begins
