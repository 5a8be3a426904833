import random

from hypothesis import given
from hypothesis import strategies as st

from minisft.leakage import NEAR, find_leaks, words_of

QUESTION = "What is the best way to learn how to bake good bread at home without any special tools?"
ROWS = [
    ("other", "How far is the moon? The moon is about 384,000 km away from us, on average, as it happens."),
    ("same", QUESTION.upper().replace("?", " !") + " Start with flour."),
    ("inside", f"Tell me a story. Once somebody asked: {QUESTION} Nobody knew."),
]


def test_a_question_that_begins_a_row_is_exact_whatever_its_case_and_marks():
    (leak,) = find_leaks({"q": QUESTION}, ROWS).values()
    assert (leak.row, leak.exact, leak.share) == ("same", True, 1.0)


def test_a_question_with_a_word_changed_or_inside_a_row_is_near():
    changed = QUESTION.replace("tools", "oven")
    found = find_leaks({"changed": changed}, ROWS[:2])["changed"]
    assert not found.exact
    assert NEAR <= found.share < 1
    assert not find_leaks({"q": QUESTION}, ROWS[2:])["q"].exact
    assert not find_leaks({"q": QUESTION}, ROWS[:1])


def test_short_questions_are_only_compared_whole():
    rows = [("hi", "Hello there, how are you?"), ("no", "Well, hello!")]
    assert find_leaks({"q": "hello"}, rows)["q"].row == "hi"
    assert not find_leaks({"q": "how are you"}, rows)


@given(st.lists(st.text(alphabet="abc ", min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, 2**32))
def test_all_prompts_of_the_training_rows_and_no_others_leak(texts, seed):
    chance = random.Random(seed)
    prompts = {str(i): text[: chance.randint(1, len(text))] for i, text in enumerate(texts)}
    rows = [(str(i), text) for i, text in enumerate(texts)]
    found = find_leaks(prompts, rows)
    for name, prompt in prompts.items():
        begins = any(words_of(text)[: len(words_of(prompt))] == words_of(prompt) for text in texts)
        assert (name in found and found[name].exact) == begins
