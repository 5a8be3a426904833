import json

import pytest
from conftest import sharegpt_row
from samples import size, texts_of

from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.course.figures.runs import before_and_after, comparison, loss_curves, memory_bars
from minisft.course.figures.tokens import token_flow, token_lanes
from minisft.data.conversations import clean
from minisft.data.ledger import Ledger
from minisft.drawing import Picture, drawable
from minisft.files import write_json
from minisft.labels.encode_row import encode
from minisft.labels.token_lens import Lens
from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig
from minisft.zero.measured_memory import OWNERS


@pytest.fixture
def make_run(tiny_model, small_data):
    def make(name, losses, held):
        config = RunConfig.course("vanilla", name=name, model=str(tiny_model), data=str(small_data))
        run = prepare(config)
        rest = {"tokens": 9, "trained_tokens": 4, "seconds": 1.0, "warm_up": False}
        lines = [json.dumps({"step": i, "loss": x} | rest) for i, x in enumerate(losses, 1)]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        write_json(run.folder / "memory.json", [{"rank": 0, "at rest": dict.fromkeys(OWNERS, held), "peak": held}])
        return run

    return make


def test_the_title_and_alt_text_follow_the_data(make_run, monkeypatch):
    import minisft.course.figures.runs as plots

    titles = []
    real = plots.picture_of
    monkeypatch.setattr(
        plots, "picture_of", lambda figure, alt: titles.append(figure.axes[0].get_title()) or real(figure, alt)
    )
    a, b, c = make_run("a", [2.0, 1.0], 100), make_run("b", [2.0, 1.0000001], 50), make_run("c", [2.0, 1.5], 50)
    same, other = loss_curves([a, b]), loss_curves([a, c])
    assert "lie on each other" in titles[0]
    assert "differ" in titles[1]
    assert "1.0e-07" in same.alt
    assert "5.0e-01" in other.alt
    memory_bars([a, b, c])
    assert titles[2].startswith("b and c hold")
    assert min(size(same)) > 300
    bundle, metadata = same._repr_mimebundle_()
    assert bundle["image/png"] == same.png
    assert metadata["image/png"]["alt"].startswith("Loss curves of a, b")


def test_before_and_after_says_what_happened():
    def summary(last_loss, last_stopped):
        points = [{"step": 0, "loss": 2.0, "stopped": 0.2}, {"step": 4, "loss": last_loss, "stopped": last_stopped}]
        return {"run": "r", "checkpoints": points}

    assert "from 20% to 90%" in before_and_after([summary(1.0, 0.9)]).alt
    assert size(before_and_after([summary(3.0, 0.1)]))[0] > 600


def test_a_lens_draws_dollar_signs_as_text(tiny_model):
    """Matplotlib would read `$…$` as a formula and fail on what is none."""
    tokenizer = HuggingFaceTokenizer(tiny_model)
    talk = clean(sharegpt_row("x", ("human", "$\\frac{ costs $5"), ("gpt", "ok $_{")), "here", Ledger())
    row = encode(talk, template_for(tokenizer), tokenizer, 99)
    assert f"{row.trained} of them" in Lens(row, tokenizer).figure().alt


def pirate():
    turns = ("system", "Talk like a pirate."), ("human", "Hi"), ("gpt", "Ahoy!"), ("human", "Bye"), ("gpt", "Bye!")
    return clean(sharegpt_row("pirate", *turns), "here", Ledger())


def test_lanes_say_where_each_version_puts_the_system_prompt(tiny_model):
    lanes = {}
    for version in ("v1", "v3", "v7"):
        tokenizer = HuggingFaceTokenizer(tiny_model, version)
        lanes[version] = (template_for(tokenizer).segments(pirate()), tokenizer)
    picture = token_lanes(lanes, "Talk like a pirate.", "The system prompt moves")
    title, *told = picture.alt.removesuffix(".").split("; ")
    assert title == "The system prompt moves. Colored tokens"
    assert [one.rpartition("in turn ")[2] for one in told] == ["1", "2", "1"]
    assert size(picture)[0] > 900


def test_lanes_mark_the_very_tokens_of_a_text(tiny_model):
    import minisft.course.figures.tokens as plots

    tokenizer = HuggingFaceTokenizer(tiny_model)
    ids = tokenizer.encode("one pirate two")
    marked = [i for i, flag in zip(ids, plots._tokens_of("pirate", ids, tokenizer), strict=True) if flag]
    assert "pirate" in tokenizer.decode(marked)
    assert len(marked) < len(ids)
    assert not any(plots._tokens_of("absent", ids, tokenizer))
    assert not any(plots._tokens_of("", ids, tokenizer))


def test_long_lanes_and_titles_wrap_and_formulas_stay_text(tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    row = sharegpt_row("x", ("human", "$\\frac{ costs $5 " * 12), ("gpt", "ok $_{"))
    segments = list(template_for(tokenizer).segments(clean(row, "here", Ledger())))
    short = token_lanes({"a": (segments[-2:], tokenizer)}, "", "t")
    long = token_lanes({"a": (segments, tokenizer)}, "", "a title $_{ " * 20)
    assert size(long)[0] == size(short)[0]
    assert size(long)[1] > size(short)[1]


def test_the_flow_of_tokens_tells_every_stage():
    ledger = Ledger()
    for stage, rows, tokens in (("raw", 10, 4_000_000), ("truncated", 9, 3_000_000), ("trained", 9, 1_000_000)):
        ledger.count(stage, rows, tokens)
    picture = token_flow(ledger)
    assert picture.alt.startswith("90% of the rows are trained on, but only 25% of the tokens")
    assert "truncated 9 rows, 3.0 million tokens" in picture.alt
    assert size(picture)[0] > 800


@pytest.mark.attack("13")
@pytest.mark.parametrize("name", ["$\\frac{", "_x", "$a$ $b$", "<img src=x>", "你好\x1b[31m", "a\nb", "W" * 255])
def test_figures_of_runs_draw_any_name_literally(make_run, name, monkeypatch):
    import warnings

    from minisft.text import one_line

    runs = [make_run("a", [2.0, 1.0], 100), make_run("b", [2.0, 0.0], 50)]
    monkeypatch.setattr(type(runs[0]), "name", property(lambda run: name if run.folder.name == "a" else "other"))
    drawn = texts_of(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (loss_curves, memory_bars, comparison):
            drawn.clear()
            picture = figure(runs)
            assert "\x1b" not in picture.alt
            expected = drawable(one_line(name), "DejaVu Sans:bold")[:20]
            assert any(expected in text for text in drawn), (figure.__name__, drawn)


@pytest.mark.attack("7")
def test_a_picture_is_saved_whole_and_not_through_a_link(tmp_path):
    target = tmp_path / "precious.txt"
    target.write_text("keep me")
    link = tmp_path / "scores.png"
    link.symlink_to(target)
    Picture(b"png", "alt").save(link)
    assert target.read_text() == "keep me"
    assert link.read_bytes() == b"png"
