import io
import math
import unicodedata
import warnings
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import BOS, EOS, Bytes

from minisft.chat.registry import template_for
from minisft.labels.encode_row import IGNORE_INDEX, Row
from minisft.labels.token_lens import Lens, lens
from minisft.labels.token_lens_html import FOLD, KEPT, KINDS, LONGEST
from minisft.text import visible


def make_row(*parts, truncated=False):
    """A row of parts: text is a prompt, a list is trained; `BOS` and `EOS` stand for themselves."""
    ids, labels = [], []
    for part in parts:
        for piece in part if isinstance(part, list) else [part]:
            new = [piece] if isinstance(piece, int) else list(piece.encode())
            ids += new
            labels += new if isinstance(part, list) else [IGNORE_INDEX] * len(new)
    return Row("r", ids, labels, truncated)


def look(*parts, truncated=False, losses=None, attention_mask=None):
    return Lens(make_row(*parts, truncated=truncated), Bytes(), losses, attention_mask)


class Page(HTMLParser):
    """The elements and the text of a page, by the rules that browsers read it by."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.cells, self.boxes = [], "", [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "bdi":
            self.boxes.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "bdi" in self.open and not {"small", "sup"} & set(self.open):
            self.boxes[-1] += data.replace("\xa0", "")
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


TAGS = {"div", "strong", "bdi", "small", "sup", "span", "i", "details", "summary"}
TAGS |= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"dir", "class", "title", "style", "aria-hidden", "scope", "colspan", "cellpadding"}
HOSTILE = [
    b"<script>alert(1)</script>", b"<img src=x onerror=alert(1)>", b"</style></div></table>", b"<!--", b"-->", b"]]>",
    b"\" onmouseover='alert(1)", b"&lt;&#60;", b"\x1b[31m", b"\xc2\x9b2J", b"\r", b"\0", b"\x7f",
    "\u202e\u2066".encode(),
    "\u200b\ufeff\u2028\u00ad".encode(), "\u0301".encode(), "\ufe0f".encode(), "\u3164\u2800".encode(), b"\xf0\x9f",
    b"\xa4\x94", b"\xed\xa0\x80", b"", "שלום".encode(), "你".encode(), b" $x$ ", b"\t\n", "\U000e0041".encode(),
]  # fmt: skip


utf8 = st.text(max_size=8).map(lambda text: text.encode(errors="ignore"))


@st.composite
def views(draw):
    pieces = st.sampled_from(HOSTILE) | st.binary(max_size=5) | utf8
    tokenizer = Bytes(*draw(st.lists(pieces, max_size=8)), *HOSTILE)
    ids = draw(st.lists(st.integers(0, len(tokenizer.vocabulary) - 1), max_size=24))
    tokenizer.added_words = dict.fromkeys(draw(st.sets(st.integers(0, len(tokenizer.vocabulary) - 1))), "")
    each = {"min_size": len(ids), "max_size": len(ids)}
    trained = draw(st.lists(st.booleans(), **each))
    labels = [i if t else IGNORE_INDEX for i, t in zip(ids, trained, strict=True)]
    losses = draw(st.none() | st.lists(st.none() | st.floats(0, 20) | st.sampled_from([math.nan, math.inf]), **each))
    mask = draw(st.none() | st.lists(st.integers(0, 1), **each))
    return Lens(Row("r", ids, labels, draw(st.booleans())), tokenizer, losses, mask)


# --- whatever the text is ----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(views())
def test_nothing_of_the_text_becomes_markup(view):
    page = Page(view._repr_html_())
    assert {tag for tag, _ in page.elements} <= TAGS
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    assert "url(" not in " ".join(attributes.get("style", "") for _, attributes in page.elements)
    boxes = [text for text in page.boxes if text != "cut off: the row did not fit"]
    assert boxes[: len(view.boxes)] == [box.text for box in view.boxes]
    shown = page.text + "".join(attributes.get("title", "") for _, attributes in page.elements)
    assert all(c.isprintable() for c in shown.replace("\n", "").replace("\xa0", ""))


@settings(max_examples=150)
@given(views())
def test_nothing_of_the_text_acts_in_a_terminal(view):
    text = view.to_text(full=True)
    assert all(c.isprintable() for c in text.replace("\n", ""))
    lines = text.splitlines()
    assert lines[0] == view.verdict == repr(view)
    assert len(text.split("\n")) == len(lines)
    cut = bool(view.cut_at)
    assert len(lines) == 2 + bool(view.loss_line) + len(view.row.input_ids) + cut


@settings(max_examples=150)
@given(views())
def test_every_token_is_shown_with_its_position_wherever_it_is_shown(view):
    every = [str(i) for i in range(len(view.row.input_ids))]
    rows = view.to_text(full=True).splitlines()[2 + bool(view.loss_line) :]
    assert [row.split()[0] for row in rows if "✂" not in row.split()[:1]] == every
    page = Page(view._repr_html_())
    titles = [line for _, a in page.elements for line in a.get("title", "").split("\n") if line.startswith("position ")]
    assert [title.split(",")[0].split()[1] for title in titles] == every
    columns = 6 + (view.losses is not None)
    cells = [cell for cell in page.cells[columns:] if not cell.startswith("✂ cut off")]
    assert cells[::columns] == every


@settings(max_examples=150)
@given(views())
@example(Lens(make_row("a", ["é🤔"]), Bytes()))
def test_boxes_hold_every_byte_once_and_only_what_belongs_together(view):
    tokenizer, ids = view.tokenizer, view.row.input_ids
    assert [i for box in view.boxes for i in range(box.start, box.stop)] == list(range(len(ids)))
    for box in view.boxes:
        parts = [tokenizer.token_bytes(i) for i in ids[box.start : box.stop]]
        assert box.text == visible(b"".join(parts))
        assert {view.kinds(i) for i in range(box.start, box.stop)} == {box.kinds}
        if len(parts) > 1:
            b"".join(parts).decode()
            assert "control" not in box.kinds
            with pytest.raises(UnicodeDecodeError):
                b"".join(parts[:-1]).decode()


@settings(max_examples=200)
@given(st.binary(max_size=12) | utf8)
def test_visible_text_is_printable_and_leaves_nothing_out(data):
    shown = visible(data)
    assert shown.isprintable()
    assert not unicodedata.category(shown[0]).startswith("M")
    for c in "<>&aé你🤔":
        assert shown.count(c) >= data.decode(errors="ignore").count(c)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (" a\n\tb", "␣a⏎⇥b"),
        ("\u202e", "\\u202e"),
        ("\u200b\ufeff", "\\u200b\\ufeff"),
        ("\x1b[0m", "\\x1b[0m"),
        ("\x9b", "\\u009b"),
        (b"\xf0\x9f", "\\xf0\\x9f"),
        (b"ok\xff", "ok\\xff"),
        ("\u0301", "◌\u0301"),
        (" \u0301", "␣◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\U000e0041", "\\U000e0041"),
        ("❤\ufe0f", "❤\\ufe0f"),
        ("\u3164\u2800", "\\u3164\\u2800"),
        (b"", "∅"),
    ],
)
def test_how_bytes_are_made_visible(data, shown):
    assert visible(data if isinstance(data, bytes) else data.encode()) == shown


# --- what it says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "truncated", "verdict"),
    [
        ([BOS, "q", ["a", EOS]], False, "2 of 4 tokens trained; the answer ends in EOS"),
        ([BOS, "q", ["a", EOS], "q", ["b", EOS]], False, "4 of 7 tokens trained; both answers end in EOS"),
        ([BOS, ["a", EOS, "b", EOS, "c", EOS]], False, "6 of 7 tokens trained; all 3 answers end in EOS"),
        ([BOS, "q", ["ab"]], True, "2 of 4 tokens trained; the answer was cut off"),
        ([BOS, "q", ["ab"]], False, "2 of 4 tokens trained; the answer does not end in EOS"),
        ([BOS, ["a"], EOS, ["b", EOS]], False,
         "3 of 5 tokens trained; 1 of 2 answers ends in EOS: answer 1 does not end in EOS"),
        ([BOS, ["a", EOS, "b", EOS], "q", ["c"]], True,
         "5 of 7 tokens trained; 2 of 3 answers end in EOS: answer 3 was cut off"),
        ([BOS, ["a"], EOS, ["b", EOS], "q", ["c"]], True,
         "4 of 7 tokens trained; 1 of 3 answers ends in EOS: answer 1 does not end in EOS, answer 3 was cut off"),
        ([BOS, ["a"], "q", ["b"], "q"], True,
         "2 of 5 tokens trained; none of 2 answers ends in EOS: "
         "answer 1 does not end in EOS, answer 2 does not end in EOS; the row was cut off"),
        ([BOS, ["a", EOS], "q"], True, "2 of 4 tokens trained; the answer ends in EOS; the row was cut off"),
        ([BOS, "q"], False, "no token is trained"),
        ([["a"], "q"], False, "no token is trained"),
        ([], False, "no token is trained"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_is_trained_and_how_the_answers_end(parts, truncated, verdict):
    view = look(*parts, truncated=truncated)
    assert view.verdict == verdict
    if view.row.trained:
        assert verdict.startswith(f"{view.row.trained} of {len(view.row.input_ids)} tokens")


def test_many_unfinished_answers_are_counted_not_listed():
    view = look(BOS, *[part for _ in range(9) for part in (["a"], "q")])
    assert "none of 9 answers ends in EOS" in view.verdict
    assert "nor do 6 more" in view.verdict
    assert len(view.verdict) < 200


def test_mistakes_in_labels_are_named():
    row = make_row(BOS, "q", ["ab", EOS])
    shifted = Row("r", row.input_ids, [*row.labels[1:], IGNORE_INDEX])
    assert "labels that are not their token's id: 3" in Lens(shifted, Bytes()).verdict
    padded = Lens(row, Bytes(), None, [1, 1, 1, 0, 0])
    assert padded.verdict.endswith("2 tokens of padding; padding trained by mistake: 2 tokens")
    assert padded.kinds(4) == ("padding", "target")


def test_a_position_predicts_the_label_that_follows():
    view = look(BOS, "q", ["a", EOS])
    assert [view.facts(i)["predicts"] for i in range(4)] == ["-", str(ord("a")), str(EOS), "-"]
    first = Lens(Row("r", [97, 98], [97, 98]), Bytes())
    assert first.kinds(0) == ("prompt",)  # nothing predicts it
    assert first.facts(0)["predicts"] == "98"


def test_a_control_token_may_be_a_target_as_well():
    view = look(BOS, "q", ["a", EOS])
    assert [view.kinds(i) for i in range(4)] == [("control",), ("prompt",), ("target",), ("control", "target")]
    assert view.facts(3)["kind"] == "◆● control, target"
    assert "◆●" in view._repr_html_()


def test_kinds_differ_in_more_than_colour():
    view = look(BOS, "q", ["a", EOS], "  ", truncated=True, attention_mask=[1, 1, 1, 1, 0, 0])
    elements = Page(view._repr_html_()).elements
    styles = [a["style"] for tag, a in elements if tag == "bdi" and "title" in a]
    borders = [tuple(sorted(d for d in style.split(";") if d.startswith("border"))) for style in styles[:5]]
    assert len(set(borders[:3] + borders[4:])) == 4
    assert [line.split()[4:-1] for line in view.to_text().splitlines()[2:6]] == [
        ["◆", "control"], ["prompt"], ["●", "target"], ["◆●", "control,", "target"],
    ]  # fmt: skip
    assert view.to_text().splitlines()[6].strip() == "✂ cut off: the row did not fit"  # before the padding
    assert view.to_text().splitlines()[7].split()[4:] == ["×", "padding", "␣"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("token", ["a", BOS, 258])
def test_every_kind_is_shown_as_text_html_and_figure(token, masked, trained):
    """A letter, a control token and an added word, as a target or not, and hidden by the attention mask or not."""
    tokenizer = Bytes(b"<think>")
    tokenizer.added_words = {258: "<think>"}
    view = Lens(make_row(BOS, [token] if trained else token, truncated=True), tokenizer, attention_mask=[1, 1 - masked])
    role = "padding" if masked else {"a": "", BOS: "control", 258: "added word"}[token]
    kinds = [role] * bool(role) + (["target"] if trained else [] if role in ("padding", "control") else ["prompt"])
    assert view.kinds(1) == tuple(kinds)
    mark = "".join(KINDS[kind].mark for kind in kinds)
    assert f"{mark} {', '.join(kinds)}".strip() in view.to_text()
    legend = view._legend()
    assert all(KINDS[kind].meaning in legend for kind in kinds) and Page(view._repr_html_()).boxes
    assert len(view.figure().png) > 100


def test_tokens_of_one_character_are_one_box_that_lists_them():
    view = look("x", ["🤔"])
    assert [(box.start, box.stop, box.text) for box in view.boxes] == [(0, 1, "x"), (1, 5, "🤔")]
    assert "\\xf0 (1 of 4 tokens of 🤔)" in view.to_text()
    title = next(a["title"] for tag, a in Page(view._repr_html_()).elements if "target" in a.get("title", ""))
    assert [line.split(",")[:2] for line in title.split("\n")[1:]] == [
        [f"position {i}", f" id {byte}"] for i, byte in enumerate("🤔".encode(), 1)
    ]


def test_a_character_is_not_joined_across_the_edge_of_an_answer():
    raw = list("é".encode())
    view = Lens(Row("r", [97, *raw], [IGNORE_INDEX, IGNORE_INDEX, raw[1]]), Bytes())
    assert [box.text for box in view.boxes] == ["a", "\\xc3", "\\xa9"]


def test_values_that_do_not_fit_the_row_are_refused():
    for name in ("losses", "attention_mask"):
        with pytest.raises(ValueError, match=f"{name} has 1 values for the row's 2 tokens"):
            look("ab", **{name: [1]})


# --- long rows ---------------------------------------------------------------------------------------------


def test_a_long_row_folds_and_says_what_the_fold_holds():
    view = look("q" * 1000, ["a" * 604])
    summary = "1,204 more tokens (800 prompt, 404 trained)"
    page = Page(view._repr_html_())
    assert summary in page.text
    assert page.elements.count(("details", {})) == 2  # closed: the fold and the table
    assert len(page.boxes) >= 1604
    lines = str(view).splitlines()
    assert len(lines) == 2 + 2 * KEPT + 1
    assert f"{summary}; to_text(full=True) shows them" in lines[2 + KEPT]
    assert len(view.to_text(full=True).splitlines()) == 2 + 1604
    assert len(str(look("q" * FOLD)).splitlines()) == 2 + FOLD


def test_a_very_long_row_makes_a_page_of_modest_size():
    view = look("q" * 20_000, ["a" * 20_000])
    html = view._repr_html_()
    assert len(html) < 400 * LONGEST
    page = Page(html)
    assert len(page.cells) == 6 + 1 + 6 * 2 * KEPT
    assert "39,600 more tokens (19,800 prompt, 19,800 trained) left out" in page.text


def test_the_table_is_one_that_a_screen_reader_can_use():
    view = look(BOS, "q", ["a", EOS], losses=[None, 1, 2, 3])
    html = view._repr_html_()
    page = Page(html)
    assert html.index(view.verdict) < html.index("<bdi")
    assert ("th", {"scope": "col"}) in page.elements
    assert page.cells[:7] == ["position", "id", "token", "kind", "label", "predicts", "loss"]
    assert page.cells[14:21] == ["1", "113", "q", "prompt", "-100", "97", "1.00"]
    assert sum(a.get("aria-hidden") == "true" for _, a in page.elements) == 1
    assert f"{view.verdict}</caption>" in html


# --- losses and figure -------------------------------------------------------------------------------------


def test_losses_are_shown_and_averaged_over_the_trained_tokens():
    view = look(BOS, "q", ["ab"], losses=[9.0, 5.0, 1.0, 2.0])
    assert view.loss_line == "mean loss over the 2 trained tokens: 1.500 nats"
    assert [view.facts(i)["loss"] for i in range(4)] == ["-", "5.00", "1.00", "2.00"]
    assert view.loss_line in view.to_text()
    assert view.loss_line in view._repr_html_()
    assert "loss 5.00" in view._repr_html_()
    assert "loss" not in look(BOS, "q", ["ab"]).to_text()


def test_the_losses_are_the_models_own(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    model.lm_head.eval()
    row = make_row("ab", ["cde"])
    view = lens(row, Bytes(), model)
    with torch.no_grad():
        expected = model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        third = model(torch.tensor([row.input_ids[:2]])).logits[0, -1].log_softmax(-1)[row.input_ids[2]].item()
    assert view.losses[0] is None
    assert view.losses[2] == pytest.approx(-third, rel=1e-4)
    assert f"{expected:.3f}" in view.loss_line
    assert model.training
    assert not model.lm_head.training
    assert all(p.grad is None for p in model.parameters())
    assert lens(make_row("a"), Bytes(), model).losses == [None]
    assert lens(row, Bytes()).losses is None


def test_a_model_gets_its_mode_back_even_if_it_fails():
    import torch

    class Broken(torch.nn.Module):
        device = "cpu"

        def forward(self, **_):
            raise RuntimeError("no")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="no"):
        lens(make_row("ab"), Bytes(), model)
    assert model.training


@pytest.mark.parametrize("losses", [False, True])
def test_the_figure_says_what_it_shows_and_draws_anything(losses):
    ids = [BOS, *range(258, 258 + len(HOSTILE)), EOS]
    labels = [i if i > 270 else IGNORE_INDEX for i in ids]
    view = Lens(Row("r", ids, labels, True), Bytes(*HOSTILE), [1.0] * len(ids) if losses else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that the font lacks, for one
        picture = view.figure()
    assert view.verdict in picture.alt
    assert f"{view.row.trained} of them are trained" in picture.alt
    assert min(Image.open(io.BytesIO(picture.png)).size) > 100
    assert (view.loss_line in picture.alt) and (bool(view.loss_line) == losses)


def test_the_figure_of_a_long_row_is_folded_too():
    short, long = look("q" * 300).figure(), look("q" * 9000).figure()
    assert Image.open(io.BytesIO(long.png)).size[1] < 3 * Image.open(io.BytesIO(short.png)).size[1]


def test_it_reads_what_the_package_encodes(tiny_model):
    from minisft.chat.tokenizers import HuggingFaceTokenizer
    from minisft.data.conversations import Conversation, Message
    from minisft.labels.encode_row import encode

    tokenizer = HuggingFaceTokenizer(tiny_model)
    talk = Conversation("c", (Message("user", "the cat 🤔?"), Message("assistant", "sat </s> é")))
    row = encode(talk, template_for(tokenizer), tokenizer, 999)
    view = Lens(row, tokenizer)
    assert view.verdict == f"{row.trained} of {len(row.input_ids)} tokens trained; the answer ends in EOS"
    assert any("🤔" in box.text and box.stop - box.start > 1 for box in view.boxes)
    assert view.kinds(len(row.input_ids) - 1) == ("control", "target")
    assert sum("control" in view.kinds(i) for i in range(len(row.input_ids))) == 2
