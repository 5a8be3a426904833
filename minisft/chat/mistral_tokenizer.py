"""Mistral's own tokenizers, from the files that mistral-common ships."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from minisft import system
from minisft.chat.pieces import bytes_of_piece
from minisft.chat.space_cuts import no_piece_crosses_a_space
from minisft.errors import UserError
from minisft.text import visible


class MistralCommonTokenizer:
    """Mistral's own tokenizer of one template version, from the files that mistral-common ships.

    Its ids are the reference. For speed, batches go directly to the underlying library:
    SentencePiece, or tiktoken through mistral-common's `Tekkenizer`. Raises `UserError` for an
    unknown version.
    """

    continues_text = False

    def __init__(self, version: str):
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        make = {
            "v1": MistralTokenizer.v1,
            "v2": MistralTokenizer.v2,
            "v3": MistralTokenizer.v3,
            "v3-tekken": lambda: MistralTokenizer.v3(is_tekken=True),
            "v7": MistralTokenizer.v7,
        }
        if version not in make:
            raise UserError(f"tokenizer mistral:{version} is not known: use mistral: and one of {', '.join(make)}")
        self.name, self.template_name = f"mistral:{version}", version
        self._inner: Any = make[version]().instruct_tokenizer.tokenizer
        self._tekken = hasattr(self._inner, "id_to_byte_piece") and version == "v3-tekken"
        self.bos_id: int | None = self._inner.bos_id
        self.unk_id: int | None = None  # unknown characters are encoded as bytes
        self.eos_id: int = self._inner.eos_id
        self.stop_ids = [self.eos_id]
        # The SentencePiece versions have no padding token. Masks never depend on the pad id here.
        self.pad_id = self._inner.pad_id if self._tekken else self.eos_id
        self.vocab_size = self._inner.n_words
        self.control_ids = frozenset(self._inner.special_ids)
        self.added_words: dict[int, str] = {}
        pieces: Iterable[str]
        if self._tekken:
            text_ids = range(self._inner.num_special_tokens, self._inner.n_words)
            pieces = (self.token_bytes(i).decode("latin-1") for i in text_ids)
        else:
            from sentencepiece import SentencePieceProcessor

            self._sentencepiece = SentencePieceProcessor(model_file=str(self._inner.file_path))
            pieces = self._inner.vocab()
        self.cuts_at_spaces = no_piece_crosses_a_space(pieces, byte_level=False)

    def encode(self, text: str, after: str = "control") -> list[int]:
        return self._inner.encode(text, bos=False, eos=False)

    def encode_batch(self, texts: Sequence[str], after: str = "control") -> list[list[int]]:
        if not self._tekken:
            return self._sentencepiece.encode(list(texts), out_type=int, num_threads=system.cores())
        with ThreadPoolExecutor(system.cores()) as pool:  # tiktoken releases the GIL while it works
            return list(pool.map(self.encode, texts))

    def control_id(self, name: str) -> int | None:
        if name in ("bos", "eos"):
            return self.bos_id if name == "bos" else self.eos_id
        return self._inner.get_special_token(name)

    def decode(self, ids: list[int]) -> str:
        # mistral-common's own decoder drops the control tokens, or keeps SentencePiece's spelling.
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        return visible(self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        if self._tekken:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

            return self._inner.id_to_byte_piece(token_id, SpecialTokenPolicy.KEEP)
        return bytes_of_piece(self._inner.id_to_piece(token_id))
