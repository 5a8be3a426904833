"""What tests of several rooms start from: conversations, rows, a tokenizer of bytes, and what a figure shows."""

import io

from minisft.data.conversations import Conversation, Message
from minisft.labels.encode_row import IGNORE_INDEX


def talk(*turns):
    return Conversation("c", tuple(Message(role, content) for role, content in turns))


A = talk(("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?"), ("assistant", "4"))

ROWS = [
    {"input_ids": [1, 5, 6, 2], "labels": [IGNORE_INDEX, IGNORE_INDEX, 6, 2]},
    {"input_ids": [1, 7, 2], "labels": [IGNORE_INDEX, 7, 2]},
]

BOS, EOS = 256, 257


class Bytes:
    """Ids below 256 are bytes, then come BOS and EOS, and after these the `pieces`."""

    eos_id, stop_ids, control_ids, added_words = EOS, [EOS], frozenset({BOS, EOS}), {}

    def __init__(self, *pieces):
        self.vocabulary = [*(bytes([i]) for i in range(256)), b"<s>", b"</s>", *pieces]

    def token_bytes(self, token_id):
        return self.vocabulary[token_id]


def size(picture):
    """Width and height of a `Picture`, in pixels."""
    from PIL import Image

    return Image.open(io.BytesIO(picture.png)).size


def texts_of(monkeypatch):
    """Collects what a figure shows: titles, legends and labels, as they are drawn."""
    from matplotlib.text import Text

    drawn = []
    real = Text._preprocess_math

    def preprocess(self, text):
        shown, is_formula = real(self, text)
        drawn.append("a formula" if is_formula else shown)
        return shown, is_formula

    monkeypatch.setattr(Text, "_preprocess_math", preprocess)
    return drawn
