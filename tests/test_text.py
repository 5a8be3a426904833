"""What may be shown: no text gives orders to a terminal, whichever stream and encoding it goes to."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.text import harmless, one_line, say

pytestmark = pytest.mark.attack("13")
ANY = st.text(alphabet=st.characters(codec=None), max_size=40)


@given(ANY)
def test_nothing_that_is_printed_moves_a_cursor(text):
    stream = io.StringIO()
    say(text, to=stream)
    assert all(c in "\n\t" or unicodedata.category(c)[0] != "C" for c in stream.getvalue())
    assert "\n" not in one_line(text)
    assert harmless(harmless(text)) == harmless(text)


@given(ANY, st.sampled_from(["ascii", "latin-1", "utf-8", "utf-16", "cp437"]))
def test_every_text_can_be_printed_in_every_encoding(text, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    say(text, to=stream)


def test_plain_text_is_printed_as_it_is(capsys):
    say("≈ 3 tokens, café\n\tindented")
    assert capsys.readouterr().out == "≈ 3 tokens, café\n\tindented\n"
    say("a\x1b[31mb\u202e", end="")
    assert capsys.readouterr().out == "a\\x1b[31mb\\u202e"


class Gone(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_a_reader_that_is_gone_stops_nothing_and_a_full_disk_is_said():
    say("x", to=Gone(BrokenPipeError(32, "Broken pipe")))
    closed = io.StringIO()
    closed.close()
    say("x", to=closed)
    with pytest.raises(OSError, match="No space"):
        say("x", to=Gone(OSError(28, "No space left on device")))


def test_there_is_one_printer():
    """Every other module prints through it; the linter's rule T20 says so for each new line as well."""
    import ast
    from pathlib import Path

    import minisft

    for file in Path(minisft.__file__).parent.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"], file.name
