"""One face for every tokenizer: text becomes text tokens only, control tokens come by name only.

A conversation is untrusted text. If it contains `</s>` or `<|im_end|>`, those characters must stay characters:
a tokenizer that parses them would let the data forge the end of a turn. So `encode` never yields a control id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from minisft.errors import UserError


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    `marks_start` says whether a text encoded alone already carries its own leading space (SentencePiece's `▁`).
    """

    name: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    marks_start: bool

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no BOS, no EOS, and no control token whatever it contains."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens written out."""

    def piece(self, token_id: int) -> str:
        """What one token looks like, for showing it: `␣` for a space, `⏎` for a line end."""


class HuggingFaceTokenizer:
    """A fast tokenizer of transformers, from a model folder."""

    def __init__(self, folder: Path | str):
        from tokenizers import Tokenizer as RustTokenizer
        from transformers import AutoTokenizer

        self.name = Path(folder).name
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # each kind of missing or damaged file raises an error of its own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the tokenizer in {folder} cannot be loaded ({reason}): save one there") from error
        if not self.hf.is_fast:
            raise UserError(f"the tokenizer in {folder} has no tokenizer.json: save a fast tokenizer there")
        if self.hf.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no EOS token: set eos_token in its tokenizer_config.json")
        self.bos_id, self.eos_id = self.hf.bos_token_id, self.hf.eos_token_id
        self.pad_id = self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id
        # The same tokenizer without its added tokens: it cannot recognise what it does not know.
        plain = json.loads(self.hf.backend_tokenizer.to_str())
        # The unknown token is no forgery: it is what some tokenizers make of text that they lack.
        special = {token["id"] for token in plain["added_tokens"] if token["special"]}
        self._control = special - {self.hf.unk_token_id} | {self.eos_id, self.bos_id}
        plain |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._byte_level = (plain["decoder"] or {}).get("type") == "ByteLevel"
        self._plain = RustTokenizer.from_str(json.dumps(plain))
        self.marks_start = self.hf.convert_ids_to_tokens(self.encode("x")[0])[0] in "▁Ġ"

    def encode(self, text: str) -> list[int]:
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if forged := self._control.intersection(ids):
            raise UserError(
                f"the tokenizer {self.name} makes control ids {sorted(forged)} from the text {text[:40]!r}: use "
                "another tokenizer, whose control tokens cannot be written as text"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token_id: int) -> str:
        # A byte-level vocabulary spells bytes in an alphabet of its own; only decoding makes them readable.
        byte_level = self._byte_level and token_id not in self._control
        return _visible(self._plain.decode([token_id]) if byte_level else self.hf.convert_ids_to_tokens(token_id))


class MistralCommonTokenizer:
    """Mistral's own tokenizer, from the files that mistral-common ships. Only v1 so far."""

    def __init__(self, version: str):
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        if version != "v1":
            raise UserError(f"tokenizer mistral:{version} is not known: use mistral:v1")
        self.name = f"mistral:{version}"
        self._inner: Any = MistralTokenizer.v1().instruct_tokenizer.tokenizer
        self.bos_id, self.eos_id = self._inner.bos_id, self._inner.eos_id
        self.pad_id = self.eos_id  # v1 has no padding token; masks never rest on the pad id here
        self.marks_start = True

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, bos=False, eos=False)

    def decode(self, ids: list[int]) -> str:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        return self._inner.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)

    def piece(self, token_id: int) -> str:
        return _visible(self._inner.id_to_piece(token_id))


def _visible(piece: str) -> str:
    return piece.replace("▁", "␣").replace(" ", "␣").replace("\n", "⏎").replace("<0x0A>", "⏎")


def load_tokenizer(source: str = "smollm2") -> Tokenizer:
    """The tokenizer of `smollm2`, of a model folder or hub id, or `mistral:v1`. Raises `UserError`."""
    if source.startswith("mistral:"):
        return MistralCommonTokenizer(source.removeprefix("mistral:"))
    from minisft.assets import find_model

    return HuggingFaceTokenizer(find_model(source).path)
