from hypothesis import given, settings
from hypothesis import strategies as st
from test_mistral import talk

from minisft.labels import encode
from minisft.lens import Lens
from minisft.mistral import MistralTemplate
from minisft.tokens import HuggingFaceTokenizer


def lens(tiny_model, question, answer):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    conversation = talk(("user", question), ("assistant", answer))
    return Lens(encode(conversation, MistralTemplate.for_tokenizer(tokenizer), tokenizer, 999), tokenizer)


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_nothing_in_the_text_is_markup_or_a_terminal_escape(tiny_model, text):
    view = lens(tiny_model, "<script>alert(1)</script><img src=x onerror=alert(1)>" + text, "\x1b[31mred" + text)
    html = view._repr_html_()
    assert html.count("<span") == len(view.row.input_ids) + 2  # and two in the legend: no other tag got in
    assert html.count("<") == 2 * html.count("<span") + 4
    assert "\x1b" not in str(view)


def test_each_token_is_shown_once_with_its_label(tiny_model):
    view = lens(tiny_model, "the cat", "sat")
    lines = str(view).splitlines()[1:]
    assert len(lines) == len(view.row.input_ids)
    assert sum("trained" in line for line in lines) == view.row.trained
    assert f"{len(lines)} tokens, {view.row.trained} of them trained" in view._repr_html_()
