import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from minisft.course.figures.evaluation import interval_widths
from minisft.errors import UserError
from minisft.evaluation.bleu_breakdown import break_down_bleu
from minisft.evaluation.metrics import (
    MECAB,
    METRICS,
    _metrics,
    corpus_scores,
    paired_bootstrap,
    tokenizer_for,
    two_sided_p,
)

WORDS = ("the", "cat", "sat", "on", "a", "mat", ",", ".", "&", "<", "red")
words = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)


@given(words, words)
def test_the_score_and_its_parts_are_sacrebleus(output, reference):
    expected = BLEU().corpus_score([output], [[reference]])
    found = break_down_bleu(output, reference)
    assert found.score == pytest.approx(expected.score)
    assert list(found.matched) == expected.counts
    assert list(found.total) == expected.totals
    if any(found.matched):
        assert found.precisions == pytest.approx(expected.precisions)
    assert len(found.output) == expected.sys_len
    assert len(found.reference) == expected.ref_len


@given(words, words)
def test_marked_tokens_are_in_both_and_as_deep_as_the_longest_match(output, reference):
    found = break_down_bleu(output, reference)
    longest = max((n for n, count in enumerate(found.matched, 1) if count), default=0)
    for depth, here, there in (
        (found.depth, found.output, found.reference),
        (found.reference_depth, found.reference, found.output),
    ):
        assert max(depth, default=0) == longest
        assert sum(n > 0 for n in depth) >= found.matched[0]
        assert all(word in there for word, n in zip(here, depth, strict=True) if n)


def test_a_word_counts_as_often_as_the_reference_has_it():
    found = break_down_bleu("the the the the the the the", "the cat is on the mat")  # the example of Papineni et al.
    assert (found.matched[0], found.total[0]) == (2, 7)
    assert found.depth == (1, 1, 0, 0, 0, 0, 0)


def test_what_a_model_says_is_escaped():
    html = break_down_bleu("<b> the cat", "the <cat").html()  # 13a takes marks apart: the bare sign is what to look for
    assert html.count("<span>&lt;</span>") + html.count("&lt;<sub>") == 2
    assert "<span><</span>" not in html


def test_scores_come_with_signature_and_interval():
    outputs = ["the cat sat on the mat", "a\nred  dog ran off quickly today", "birds sing"]
    references = ["the cat sat on a mat", "a red dog ran away today", "small birds sing songs"]
    found = corpus_scores(outputs, references, resamples=1000)
    plain = BLEU().corpus_score([" ".join(o.split()) for o in outputs], [references])
    assert found["bleu"] == plain.score
    low, high = found["bleu_interval"]
    assert low < found["bleu"] < high
    assert json.loads(json.dumps(found)) == found
    assert "bs:1000" in found["bleu_signature"]
    assert corpus_scores(outputs, references, resamples=0)["bleu"] == plain.score


def test_lines_are_joined_as_in_the_files():
    output, reference = "state-\nof the art thing here", "state- of the art thing here"
    assert break_down_bleu(output, reference).score == pytest.approx(corpus_scores([output], [reference], 0)["bleu"])


def test_intervals_stay_within_the_scale():
    said = ["the cat sat on the mat today", "no", "none", "nothing"]
    low, high = corpus_scores(said, ["the cat sat on the mat today", "yes it is", "all", "some"])["bleu_interval"]
    assert 0 <= low < high <= 100


def test_a_draw_without_any_match_has_an_interval_too():
    found = corpus_scores(
        ["the cat sat on the mat today", "no", "none"], ["the cat sat on the mat", "yes it is", "all of it"]
    )
    assert found["bleu_interval"][1] > 0


def test_a_paired_bootstrap_tells_a_difference_from_chance():
    references = [f"the {word} cat sat on the mat number {i}" for i, word in enumerate(WORDS)]
    wrong = ["a dog ran off"] * len(references)
    alternating = [[(wrong, references)[(i + k) % 2][i] for i in range(len(references))] for k in (0, 1)]
    found = paired_bootstrap(wrong, references, references)
    assert found.p < 0.01 and 99 < found.interval[0] < found.difference < found.interval[1]
    found = paired_bootstrap(*alternating, references)
    assert found.p > 0.1 and found.interval[0] < 0 < found.interval[1]
    assert paired_bootstrap(references, references, references).p == 1
    chairs, tables = (["the cat sat on a " + end] * 12 for end in ("chair", "table"))  # as good as each other
    assert paired_bootstrap(chairs, tables, ["the cat sat on the mat today"] * 12).p == 1
    with pytest.raises(UserError, match="no answer to compare"):
        paired_bootstrap([], [], [])


def test_a_paired_bootstrap_is_that_of_sacrebleu_but_two_sided():
    """sacreBLEU counts the samples above the mean difference only; where all have one sign, that is one tail."""
    from sacrebleu.significance import PairedTest

    chance = random.Random(3)
    references = [" ".join(chance.choices(WORDS, k=12)) for _ in range(12)]
    outputs = [[" ".join(r.split()[: chance.randint(*kept)]) for r in references] for kept in ((5, 10), (6, 12))]
    found = paired_bootstrap(*outputs, references)
    systems = [("before", outputs[0]), ("after", outputs[1])]
    theirs = PairedTest(systems, {"BLEU": _metrics()[0]()}, [references], test_type="bs")()[1]["BLEU"]
    assert found.difference == pytest.approx(theirs[1].score - theirs[0].score, abs=1e-4)
    assert theirs[1].p_value <= found.p <= 3 * theirs[1].p_value


def test_a_p_value_counts_both_directions():
    assert two_sided_p([1, 3, 5, 7], 3) == 3 / 5  # less their mean, 4, two of four are as far off as 3
    assert two_sided_p([1, 3, 5, 7], -3) == 3 / 5
    assert two_sided_p([1, 3, 5, 7], 4) == 1 / 5


# --- scripts without blanks between words --------------------------------------------------------------------------

TEXTS = {  # harmless sentences: the first is the question's right answer, the second shares some of it
    "zh": ("法国的首都是巴黎。", "法国的首都是里昂。"),
    "ja": ("フランスの首都はパリです。", "フランスの首都はリヨンです。"),
    "ko": ("프랑스의 수도는 파리입니다.", "프랑스의 수도는 리옹입니다."),
    "th": ("เมืองหลวงของฝรั่งเศสคือปารีส", "เมืองหลวงของฝรั่งเศสคือลียง"),
    "en": ("The capital of France is Paris.", "The capital of France is Lyon."),
    "ru": ("Столица Франции это город Париж.", "Столица Франции это город Лион."),
}


def expected_tokenizer(language):
    from importlib.util import find_spec

    if mecab := {"ja": "ja-mecab", "ko": "ko-mecab"}.get(language):
        return mecab if all(map(find_spec, MECAB[mecab])) else "char"
    return {"zh": "zh", "th": "char"}.get(language, "13a")


@pytest.mark.attack("16")
@pytest.mark.parametrize("language", TEXTS)
def test_perfect_answers_score_100_in_any_script_as_sacrebleu_computes_it(language):
    right, near = TEXTS[language]
    tokenize = expected_tokenizer(language)
    assert tokenizer_for([right]) == tokenizer_for([right, near] * 20) == tokenize
    found = corpus_scores([right] * 3, [right] * 3, 20)
    assert found["bleu"] == pytest.approx(100)
    assert found["length_ratio"] == 1
    assert f"tok:{tokenize}" in found["bleu_signature"]
    assert found["bleu_tokenizer"] == tokenize
    oracle = BLEU(tokenize=tokenize).corpus_score([near, right], [[right, right]])
    found = corpus_scores([near, right], [right, right], 0)
    assert found["bleu"] == pytest.approx(oracle.score)
    assert 0 < found["bleu"] < 100
    assert break_down_bleu(near, right).score == pytest.approx(
        BLEU(tokenize=tokenize).corpus_score([near], [[right]]).score
    )
    assert paired_bootstrap([near] * 8, [right] * 8, [right] * 8, 50).p < 0.1


@given(
    st.sampled_from([text for pair in TEXTS.values() for text in pair]), st.sampled_from(["zh", "char", "13a"]), words
)
def test_taken_apart_with_any_tokenizer_it_is_sacrebleus(reference, tokenize, more):
    output = reference[:4] + more
    oracle = BLEU(tokenize=tokenize).corpus_score([output], [[reference]])
    found = break_down_bleu(output, reference, tokenize)
    assert found.score == pytest.approx(oracle.score)
    assert list(found.matched) == oracle.counts


@pytest.mark.parametrize(
    ("references", "tokenize"),
    [
        (["4", "", "?!"], "13a"),
        (["In Chinese it is 你好, a short word for a greeting that everybody knows."], "13a"),
        (["用 Python 的 print 函数输出文本。", "好的。"], "zh"),
        (["東京は日本の首都です。", "東京都"], expected_tokenizer("ja")),
    ],
)
def test_the_script_of_most_references_decides(references, tokenize):
    assert tokenizer_for(references) == tokenize


def test_one_tokenizer_for_all_of_a_data_set():
    """Also where a part of it is in another script: draws of a part are scored as the whole."""
    right = [TEXTS["zh"][0]] * 6 + [TEXTS["en"][0]] * 2
    answers = [{"output": text, "reference": text} for text in right]
    assert "differ by 0 points on every sample of these 8 answers" in interval_widths(answers, answers, draws=4).alt
    assert corpus_scores(right[-1:], right[-1:], 0, "zh")["bleu_tokenizer"] == "zh"


def test_where_no_run_of_four_can_match_it_is_said():
    found = corpus_scores(["yes it is", "no"], ["yes it is", "no"], 0)
    assert found["bleu"] == 0
    assert found["bleu_note"].startswith("BLEU is not meaningful here")
    assert "longest reference has 3" in found["bleu_note"]
    assert corpus_scores(["a b c d"], ["a b c d"], 0)["bleu_note"] == ""


# --- further metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "references", "share"),
    [
        (["yes", "a\n b ", "no", ""], ["yes", "a b", "No", "x"], 0.5),
        (["", "x"], [" \n", "x"], 1.0),
        (["x"], ["y"], 0.0),
    ],
)
def test_exact_match_is_the_share_of_equal_lines(outputs, references, share):
    more = corpus_scores(outputs, references, resamples=0)["more"]
    assert more["exact match"] == share
    assert set(more) == set(METRICS)


def test_a_metric_of_the_registry_is_in_the_scores_with_the_texts_as_they_are(monkeypatch):
    calls = []
    monkeypatch.setitem(METRICS, "lines", lambda outputs, references: calls.append((outputs, references)) or 2.5)
    scores = corpus_scores(["a\nb"], ["c  d"], resamples=0)
    assert list(scores["more"]) == list(METRICS) and scores["more"]["lines"] == 2.5
    assert calls == [(["a\nb"], ["c  d"])]


def test_a_metric_needs_a_reference_for_each_output():
    with pytest.raises(ValueError, match="shorter"):
        METRICS["exact match"](["a", "b"], ["a"])
