"""Whether a long text may be cut before a space between two words, as in `the| cat`.

It may if the ids of both parts are the ids of the whole text. That needs three things: nothing in
the tokenizer looks across the cut, the space stays what it is, and no token contains both sides.
A component that is not listed here may do anything, so its tokenizer encodes texts as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from minisft.chat.pieces import SPACE_MARK

SPACES = (" ", SPACE_MARK)

# They change single characters, and neither ASCII letters (but for their case) nor spaces.
# `Prepend` acts at the start of a text, which `tokenizers` handles.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend"}
_LOCAL_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "Punctuation"}
_SPLIT_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}

# A regular expression may look anywhere. These alternatives of published ones (GPT-4, GPT-4o,
# Llama 3, Qwen, DeepSeek, Tekken) match no letter together with a space after it.
_ALTERNATIVES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"'(?i:[sdmt]|ll|ve|re)",
    r"'s|'t|'re|'ve|'m|'ll|'d",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r" ?\p{L}+",
    r"\s?\p{L}+",
    r" ?\p{N}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    r"\s?\p{P}+",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r"[\r\n]",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
_LISTED = re.compile(rf"(?:(?:{'|'.join(map(re.escape, _ALTERNATIVES))})(?:\|(?!\Z)|\Z))+")


def no_piece_crosses_a_space(pieces: Iterable[str], byte_level: bool) -> bool:
    """Whether no piece of a vocabulary has a space right after a letter, as in `of▁the`."""
    space = "Ġ" if byte_level else f"[ {SPACE_MARK}]"
    return not any(map(re.compile(f"[A-Za-z]{space}[A-Za-z]?").search, pieces))


def acts_on_each_side(serialized: dict[str, Any]) -> bool:
    """Whether a serialized tokenizer treats the two sides of a space between words independently.

    Its vocabulary and its added tokens are not examined.
    """
    pre_tokenizers = [*parts(serialized["pre_tokenizer"])]
    if not all(map(_normalizes_locally, parts(serialized["normalizer"]))):
        return False
    if not all(splits_at_spaces(part) or _splits_locally(part) for part in pre_tokenizers):
        return False
    # Only merges ignore what is not next to them. A stretch across the cut has them only if it is
    # neither looked up as a whole nor marked at its end, and if unknown characters stay apart.
    model = serialized["model"]
    names = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    by_merges = model["type"] == "BPE" and not any(model.get(name) for name in names)
    keeps_spaces = not model.get("fuse_unk") or not {*SPACES, "Ġ"}.isdisjoint(model["vocab"])
    return any(map(splits_at_spaces, pre_tokenizers)) or (by_merges and keeps_spaces)


def _normalizes_locally(part: dict[str, Any]) -> bool:
    if part["type"] != "Replace":
        return part["type"] in _LOCAL_NORMALIZERS
    pattern = part["pattern"].get("String")
    if pattern in SPACES:
        return part["content"] in SPACES
    return _has_no_letter(pattern)


def _splits_locally(part: dict[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return part["replacement"] == SPACE_MARK
    if part["type"] == "Split":
        return _has_no_letter(part["pattern"].get("String")) or _is_listed(part)
    return part["type"] in _LOCAL_PRE_TOKENIZERS


def splits_at_spaces(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer is local, and never keeps a word and the space after it together."""
    if part["type"] == "ByteLevel":
        return part.get("use_regex", True)
    if part["type"] == "Metaspace":
        return _splits_locally(part) and part.get("split", True)
    if part["type"] == "Split":
        return _is_listed(part) and part["pattern"]["Regex"].endswith(r"|\s+") and part["behavior"] == "Isolated"
    return part["type"] in _SPLIT_AT_SPACES


def _is_listed(part: dict[str, Any]) -> bool:
    return _LISTED.fullmatch(part["pattern"].get("Regex", "")) is not None


def _has_no_letter(literal: str | None) -> bool:
    """Whether a literal cannot begin before the cut and end behind it."""
    return bool(literal) and not re.search("[A-Za-z]", literal or "")


def parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder or, if it is a sequence, its parts."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in component.get(key, ()):
            yield from parts(part)
