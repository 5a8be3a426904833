import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from minisft.errors import UserError
from minisft.scores import corpus_scores, paired_bootstrap
from minisft.xray import xray

WORDS = ("the", "cat", "sat", "on", "a", "mat", ",", ".", "&", "<", "red")
words = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)


@given(words, words)
def test_the_score_and_its_parts_are_sacrebleus(output, reference):
    expected = BLEU().corpus_score([output], [[reference]])
    found = xray(output, reference)
    assert found.score == pytest.approx(expected.score)
    assert list(found.matched) == expected.counts
    assert list(found.total) == expected.totals
    if any(found.matched):
        assert found.precisions == pytest.approx(expected.precisions)
    assert len(found.output) == expected.sys_len
    assert len(found.reference) == expected.ref_len


@given(words, words)
def test_marked_tokens_are_in_both_and_as_deep_as_the_longest_match(output, reference):
    found = xray(output, reference)
    longest = max((n for n, count in enumerate(found.matched, 1) if count), default=0)
    for depth, here, there in (
        (found.depth, found.output, found.reference),
        (found.reference_depth, found.reference, found.output),
    ):
        assert max(depth, default=0) == longest
        assert sum(n > 0 for n in depth) >= found.matched[0]
        assert all(word in there for word, n in zip(here, depth, strict=True) if n)


def test_a_word_counts_as_often_as_the_reference_has_it():
    found = xray("the the the the the the the", "the cat is on the mat")  # the example of Papineni et al.
    assert (found.matched[0], found.total[0]) == (2, 7)
    assert found.depth == (1, 1, 0, 0, 0, 0, 0)


def test_what_a_model_says_is_escaped():
    html = xray("<b> the cat", "the <cat").html()  # 13a takes marks apart: the bare sign is what to look for
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
    assert xray(output, reference).score == pytest.approx(corpus_scores([output], [reference], 0)["bleu"])


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
    assert paired_bootstrap(wrong, references, references) < 0.01
    assert paired_bootstrap(*alternating, references) > 0.1
    assert paired_bootstrap(references, references, references) == 1
    chairs, tables = (["the cat sat on a " + end] * 12 for end in ("chair", "table"))  # as good as each other
    assert paired_bootstrap(chairs, tables, ["the cat sat on the mat today"] * 12) == 1
    with pytest.raises(UserError, match="no answer to compare"):
        paired_bootstrap([], [], [])
