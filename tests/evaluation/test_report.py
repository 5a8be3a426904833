"""What evaluations and conversations show: Markdown, HTML and figures take text from anywhere literally."""

import unicodedata
import warnings
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import mistune
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from samples import texts_of

from minisft import drawing
from minisft.course.figures import runs
from minisft.course.figures.evaluation import scores_over_steps
from minisft.evaluation import bleu_breakdown, chat_session
from minisft.evaluation.answers import Answer
from minisft.evaluation.eval_set import EvalSettings
from minisft.evaluation.report import side_by_side, through_training, write_summary
from minisft.files import read_json
from minisft.run.records import Summary
from minisft.text import harmless, in_markdown, in_markdown_block, one_line

pytestmark = pytest.mark.attack("13")

NASTY = [
    "<img src=x onerror=alert(1)>", "a|b", "$\\frac{", "_x", "`code`", "](javascript:alert(1))", "[a]: javascript:1",
    "![x](y)", "# head", "- item", "1. one", "> quote", "```", "~~~", "<!--", "</pre>", "<script>", "&lt;", "&#60;",
    "http://a.example", "<http://a.example>", "a@b.example", "\\", "\x1b[31m", "\u2028<b>", "\x0b<b>", "\x85<b>",
    "\r<b>", "\x1c<b>", "\n\n<b>", "\t", "\u202e", "\udcff", "| --- |", "===", "^[x]", "$$", "'\"", "***", "[ ]",
    "\u2029# x",
]  # fmt: skip
anything = st.lists(st.sampled_from(NASTY) | st.text(max_size=6), max_size=6).map("".join)
PLUGINS = [
    "table",
    "strikethrough",
    "footnotes",
    "url",
    "task_lists",
    "math",
    "def_list",
    "abbr",
    "mark",
    "superscript",
]
MARKDOWN = [mistune.create_markdown(escape=False), mistune.create_markdown(escape=False, plugins=PLUGINS)]


class Seen(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.others, self.text = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data

    def other(self, what):
        self.others.append(what)

    handle_comment = handle_decl = handle_pi = unknown_decl = other


@pytest.mark.parametrize("render", MARKDOWN, ids=["plain", "with all extensions"])
@given(anything)
@example("a|b")
def test_a_name_in_markdown_is_text(render, name):
    for before, tag in (("x ", "p"), ("# x ", "h1"), ("- x ", "li")):
        seen = Seen(render(before + in_markdown(name)))
        assert set(seen.tags) <= {tag, "ul", "p"}
        assert not seen.others
        assert " ".join(seen.text.split()) == " ".join(f"x {one_line(name)}".split())
    row = render(f"| a | b |\n| --- | --- |\n| {in_markdown(name)} | c |\n")
    if "<table>" in row:
        assert row.count("<td>") == 2


@pytest.mark.parametrize("render", MARKDOWN, ids=["plain", "with all extensions"])
@given(anything)
def test_a_block_in_markdown_is_text(render, text):
    block = f"Prompt\n\n{in_markdown_block(text)}\n\nReference\n"
    seen = Seen(render(block))
    assert seen.tags in (["p", "pre", "code", "p"], ["p", "p"])  # nothing but blanks is no block
    assert not seen.others
    shown = seen.text.removeprefix("Prompt").rstrip().removesuffix("Reference")
    assert shown.split() == harmless(text).split()


def result(step, text, run="r"):
    rows = [{"id": f"{text}{n}", "prompt": text, "reference": text, "output": text, "stopped": n > 0} for n in range(2)]
    scores = {"bleu": 1.0, "bleu_interval": [0.5, 2.0], "chrf": 3.0, "chrf_interval": [], "length_ratio": 1.0}
    about = {"rows": 2, "stopped": 0.5, "loss": 2.0, "perplexity": 7.4, "bleu_note": text, "bleu_tokenizer": text}
    signatures = {"bleu_signature": f"`{text}`", "chrf_signature": "chrF2"}
    return scores | about | signatures | {"step": step, "run": run, "examples": rows, "answers": rows}


@given(anything, st.text(min_size=1, max_size=9).filter(lambda name: "/" not in name and "\0" not in name))
@example("\u2028<b>", "<img src=x onerror=alert(1)>")
def test_a_summary_is_text_for_any_names_and_answers(tmp_path_factory, text, name):
    text = text.encode(errors="replace").decode()  # as conversations and answers are
    folder = tmp_path_factory.mktemp("evaluation")
    run = SimpleNamespace(name=name, config=SimpleNamespace(strategy="zero2"))
    leakage = {"exact": 1, "near": 0, "of": 3, "excluded": False, "rows": {}}
    write_summary(folder, run, asdict(EvalSettings()), [result(n, text) for n in (0, 3)], {5: text}, leakage)
    written = (folder / "summary.md").read_text(encoding="utf-8")
    assert not any(unicodedata.category(c)[0] == "C" and c != "\n" for c in written.replace("\t", ""))
    seen = Seen(MARKDOWN[1](written))
    assert set(seen.tags) <= {"h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert all(name == "style" for name, _ in seen.attributes)
    assert not seen.others
    assert read_json(folder / "summary.json", Summary)["run"] == one_line(name)


LEAKAGE = {"exact": 0, "near": 0, "of": 2, "excluded": False, "rows": {}}


def written_summary(folder, results):
    """The score table of `summary.md` as cells, and the checkpoints of `summary.json`."""
    run = SimpleNamespace(name="r", config=SimpleNamespace(strategy="zero2"))
    write_summary(folder, run, asdict(EvalSettings()), results, {}, LEAKAGE)
    lines = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table, read_json(folder / "summary.json", Summary)["checkpoints"]


def test_a_summary_has_a_column_per_further_metric_and_an_empty_cell_where_a_result_lacks_it(tmp_path):
    results = [
        result(0, "old"),
        result(3, "new") | {"more": {"exact match": 0.25}},
        result(6, "newer") | {"more": {"exact match": 1.0, "mean words": 7.5}},
    ]
    table, checkpoints = written_summary(tmp_path, results)
    assert table[0][-3:] == ["perplexity", "exact match", "mean words"]
    assert [row[-2:] for row in table[2:]] == [["", ""], ["0.250", ""], ["1.000", "7.500"]]
    assert {len(row) for row in table} == {9}
    assert ["more" in checkpoint for checkpoint in checkpoints] == [False, True, True]
    assert checkpoints[2]["more"] == {"exact match": 1.0, "mean words": 7.5}


def test_a_summary_of_results_without_further_metrics_has_no_more_columns(tmp_path):
    table, checkpoints = written_summary(tmp_path, [result(0, "old")])
    assert table[0][-1] == "perplexity" and {len(row) for row in table} == {7}
    assert "more" not in checkpoints[0]


@given(anything)
@example("a|b")
def test_the_name_of_a_metric_is_text(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("evaluation")
    name = name.encode(errors="replace").decode()
    run = SimpleNamespace(name="r", config=SimpleNamespace(strategy="zero2"))
    write_summary(folder, run, asdict(EvalSettings()), [result(0, "x") | {"more": {name: 1.0}}], {}, LEAKAGE)
    page = MARKDOWN[1]((folder / "summary.md").read_text(encoding="utf-8"))
    seen = Seen(page)
    assert set(seen.tags) <= {"h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert not seen.others
    assert page.count("<th") - page.count("<thead") == page.count("<td") == 8


@given(anything, anything)
def test_tables_hold_only_the_elements_that_are_written_here(text, other):
    answers = [Answer(text, True), Answer(other, False)]
    html = [
        side_by_side([text, other], answers, answers),
        through_training([result(0, text), result(3, other)]),
        through_training([result(0, text), result(3, other)], rows=[f"{text}1"]),
        chat_session.answers_as_html(text, {text: other, other: text}),
        bleu_breakdown.break_down_bleu(text, other).html(),
    ]
    allowed = {"table", "caption", "tr", "th", "td", "em", "p", "b", "span", "sub"}
    for page in html:
        seen = Seen(page)
        assert set(seen.tags) <= allowed
        assert {name for name, _ in seen.attributes} <= {"style", "scope"}
        assert not seen.others


def summary(name):
    checkpoints = [
        {"step": 3 * i, "bleu": 1.0 + i, "bleu_interval": [0.5, 3.0], "chrf": 20.0, "chrf_interval": [18.0, 22.0],
         "loss": 2.0 - i, "stopped": 0.5}
        for i in range(2)
    ]  # fmt: skip
    return {"run": name, "rows": 12, "checkpoints": checkpoints}


@pytest.mark.parametrize("name", [*NASTY, "你好", "𝒳😀", "x" * 255, "$a$", "$", r"\$", "\ue000", "שלום"])
def test_figures_draw_any_name_literally(name, monkeypatch):
    drawn = texts_of(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores_over_steps([summary(name), summary("other")])
        runs.before_and_after([summary(name)])
    expected = drawing.drawable(one_line(name), "DejaVu Sans:bold") or "∅"
    assert any(expected[:20] in text for text in drawn), (expected, drawn)


@given(st.text(st.characters(codec=None), max_size=30))
def test_a_name_in_a_figure_is_no_formula_and_never_hidden(name):
    from matplotlib.cbook import is_math_text
    from matplotlib.text import Text

    drawn = drawing.in_figure(name)
    shown, is_formula = Text(0, 0, "")._preprocess_math(drawn)
    assert not is_formula
    assert not is_math_text(drawn)
    assert not drawn.startswith("_")
    assert "\n" not in shown
    assert len(shown) <= drawing.LONGEST_NAME + 1
    line = drawing.drawable(one_line(name), "DejaVu Sans:bold") or "∅"
    assert len(line) > drawing.LONGEST_NAME or shown.removeprefix("\u200b") == line
