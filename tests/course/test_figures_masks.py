"""The figures' titles and alt texts follow the data, and text from a data set is drawn as it is."""

import pytest
from PIL import Image

import minisft.course.figures.masks as mask_plots
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.course.buggy_rows import right_row, talk
from minisft.course.figures.masks import batch_layouts, bugs_on_rows, losses_before_and_after, truncation_bars
from minisft.labels.encode_row import IGNORE_INDEX, TRUNCATIONS, Row, encode
from minisft.training.collators import PadRight


@pytest.fixture
def titles(monkeypatch):
    """The title of each figure drawn; none may reach beyond the edge."""
    seen = []
    real = mask_plots.picture_of

    def draw(figure, alt):
        picture = real(figure, alt)
        title = figure.axes[0]._left_title
        assert title.get_window_extent().x1 <= figure.bbox.x1
        seen.append(title.get_text())
        return picture

    monkeypatch.setattr(mask_plots, "picture_of", draw)
    return seen


def test_truncation_counts_whole_and_cut_answers(titles, tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    template = template_for(tokenizer)
    talks = [talk("the cat", "sat on a mat", "and", "saw red rain")] * 3
    whole = [right_row(tokenizer, c) for c in talks]
    limit = len(whole[0].input_ids) - 2
    kept = {way: [encode(c, template, tokenizer, limit, way) for c in talks] for way in TRUNCATIONS}
    kept["drop"] = []
    picture = truncation_bars(kept, whole, tokenizer.eos_id)
    trained, first = whole[0].trained, kept["turn"][0].trained
    cut = kept["token"][0].trained - first
    assert f"{100 * cut / (first + cut):.0f} % of that without its end" in titles[0]
    assert f"turn leaves 3 rows, with {100 * first / trained:.0f} % in whole answers and 0 %" in picture.alt
    assert "drop leaves 0 rows, with 0 % in whole answers" in picture.alt


def test_rare_bugs_are_told_apart(titles):
    picture = bugs_on_rows({"rare": 2, "common": 100, "never": 0}, 100)
    assert titles[0].startswith("1 bugs in 3 strike most rows, 2 hide")
    assert "common in 100, rare in 2, never in 0" in picture.alt


def test_losses_are_drawn_for_the_trained_tokens_alone(titles, tiny_model, tmp_path):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    row = right_row(tokenizer, talk("the cat $x$", "$\\frac{1}{$ <b> sat"))  # no math, no markup
    before = [None if i == 0 else 2.0 for i in range(len(row.input_ids))]
    after = [None if i == 0 else 1.0 for i in range(len(row.input_ids))]
    picture = losses_before_and_after(row, tokenizer, before, after)
    assert "an EOS 1.00 instead of 2.00" in titles[0]
    assert picture.alt.count("2.00 and 1.00") == row.trained
    picture.save(tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").width > 500


def test_an_answer_without_an_end_has_no_stripe(titles, tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    losses_before_and_after(Row("r", [5, 6, 7], [-100, 6, 7]), tokenizer, [None, 1.0, 2.0], [None, 1.0, 1.0])
    assert titles == ["A trained token costs 1.00 nats instead of 1.50"]


def test_a_batch_in_three_layouts_wastes_what_the_collator_pads(titles):
    lengths = (3, 9, 5, 4)
    rows = [Row(str(n), [1] * n, [IGNORE_INDEX] * (n - 2) + [1, 1]) for n in lengths]
    picture = batch_layouts(rows, 12)
    batch = PadRight(0)([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    padding = 100 * (1 - batch["attention_mask"].float().mean())
    assert f"padded: 4 rows of 9 positions, {padding:.0f} % of them padding" in picture.alt
    assert "packed: 2 rows of 12 positions, 12 % of them padding" in picture.alt  # 21 of 24: 9 + 3 and 5 + 4
    assert "padding-free: 1 row of 21 positions, 0 % of them padding" in picture.alt
    assert titles == [f"Positions wasted on padding: padded {padding:.0f} %, packed 12 %, padding-free 0 %"]
