"""The lens of a hostile conversation in a real browser: no script runs, and nothing is asked of any server."""

import pytest
from browser import HOSTILE, listener, needs_browser, opened, title  # noqa: F401 (a fixture)
from samples import BOS, EOS, Bytes

from minisft.labels.encode_row import IGNORE_INDEX, Row
from minisft.labels.token_lens import Lens

pytestmark = needs_browser


def lens_of(texts):
    """Each text as one token, split in two, and as single bytes; as a prompt and trained; with losses and padding."""
    pieces = [text.encode() for text in texts]
    pieces += [half for piece in pieces for half in (piece[: len(piece) // 2], piece[len(piece) // 2 :])]
    ids = [BOS, *range(258, 258 + len(pieces)), *b"".join(pieces), EOS]
    ids += ids[1:]
    labels = [i if n > len(ids) // 2 else IGNORE_INDEX for n, i in enumerate(ids)]
    mask = [n < len(ids) - 9 for n in range(len(ids))]
    return Lens(
        Row("<script>document.title='changed'</script>", ids, labels, True), Bytes(*pieces), [1.0] * len(ids), mask
    )


def test_a_hostile_conversation_runs_nothing_and_asks_for_nothing(listener, tmp_path):  # noqa: F811
    url, calls = listener
    html = lens_of([text.format(url=url) for text in HOSTILE])._repr_html_()
    dom = opened(html.replace("<details>", "<details open>"), tmp_path)
    assert title(dom) == "unchanged"
    assert calls == []
    assert "document.title" in dom  # the text is there to be read
    for tag in ("script", "img", "svg", "iframe", "style", "link", "video", "object", "a ", "b>"):
        assert f"<{tag}" not in dom


@pytest.mark.parametrize("text", HOSTILE[:6])
def test_unescaped_the_same_text_would_be_noticed(text, listener, tmp_path):  # noqa: F811
    """Else the test above would pass whatever the lens did."""
    url, calls = listener
    dom = opened(f"<div>{text.format(url=url)}</div>", tmp_path)
    assert title(dom) == "changed" or calls
