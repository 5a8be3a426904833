"""One face for every tokenizer: text becomes text tokens only, control tokens come by name only.

A conversation is untrusted text. If it contains `</s>` or `<|im_end|>`, those characters must stay characters:
a tokenizer that parses them would let the data forge the end of a turn. So `encode` never yields a control id.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from minisft import system
from minisft.chat.registry import DEFAULT, template_named
from minisft.data.model_folder import clean_logs, require_tokenizer_class
from minisft.errors import UserError
from minisft.text import visible

SPACE_MARK = "▁"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    `template_name` is the template that it is set up for. `continues_text`: a text may follow a text and is encoded
    as its continuation; Mistral's own tokenizers encode every text alone. `cuts_at_spaces`: no token reaches across a
    space between two words, so the ids of a text cut before such a space are the first ids of the whole text.
    `added_words` are words that were added to the vocabulary and are no control tokens (`<think>` of many models): a
    text may hold them, and each is one id.
    """

    name: str
    template_name: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    control_ids: frozenset[int]
    continues_text: bool
    cuts_at_spaces: bool
    added_words: dict[int, str]

    def encode(self, text: str, after: str = "control") -> list[int]:
        """The ids of `text` alone: no BOS, no EOS, and no control token whatever it contains.

        `after` says what comes before it in the row: `nothing`, `control` or `text`.
        """

    def encode_batch(self, texts: Sequence[str], after: str = "control") -> list[list[int]]:
        """`encode` for many texts, on all cores."""

    def control_id(self, name: str) -> int | None:
        """The id of `bos`, `eos`, `[INST]`, …; None for a BOS that the tokenizer does not have."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens written out."""

    def piece(self, token_id: int) -> str:
        """What one token looks like, for showing it: all of it is seen, as by `text.visible`."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; several tokens may be needed for one character."""


# --- tokenizers of transformers ----------------------------------------------------------------------------


class HuggingFaceTokenizer:
    """A fast tokenizer of transformers, from a model folder, set up for one chat template.

    The template's control tokens are added to the vocabulary where they are missing (v1 has none); `hf` then has more
    tokens than the model, and `model.loading` grows the model's embeddings.
    """

    continues_text = True

    def __init__(self, folder: Path | str, template: str = DEFAULT):
        self.name, self.template_name = Path(folder).name, template
        control_tokens = template_named(template).control_tokens
        self.hf = _load(folder)
        self._add_control_tokens(control_tokens)
        self.bos_id, self.eos_id = self.hf.bos_token_id, self.hf.eos_token_id
        self.pad_id = self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id
        self.vocab_size = max(self.hf.get_vocab().values()) + 1

        whole = json.loads(self.hf.backend_tokenizer.to_str())
        marks = {*self.hf.all_special_tokens, *control_tokens}
        added = [token for token in whole["added_tokens"] if not _only_spaces(token["content"])]
        control = {token["id"] for token in added if token["special"] or token["content"] in marks}
        # The unknown token is no forgery: it is what some tokenizers make of text that they lack.
        self.control_ids = frozenset(control - {self.hf.unk_token_id} | {self.eos_id, self.bos_id} - {None})
        words = [token for token in added if token["id"] not in control | self.control_ids]
        self.added_words = {token["id"]: token["content"] for token in words}
        self._forgeable = _hide_control_tokens(whole, self.control_ids, self.added_words)
        self._byte_level = any(part.get("type") == "ByteLevel" for part in _parts(whole["decoder"]))
        self._at = _tokenizers_by_place(whole)
        by_words = bool(whole["pre_tokenizer"]) or whole["model"]["type"] in ("BPE", "Unigram")
        cuts = by_words and _no_piece_crosses_a_space(self.hf.get_vocab(), self._byte_level)
        self.cuts_at_spaces = cuts and not any(
            token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in words
        )

    def _add_control_tokens(self, names: Sequence[str]) -> None:
        from tokenizers import AddedToken

        known = self.hf.get_added_vocab()
        missing = [name for name in names if name not in known]
        if missing:
            self.hf.add_tokens([AddedToken(name, special=True, normalized=False) for name in missing], True)

    def encode(self, text: str, after: str = "control") -> list[int]:
        return self.encode_batch([text], after)[0]

    def encode_batch(self, texts: Sequence[str], after: str = "control") -> list[list[int]]:
        found = [e.ids for e in self._at[after].encode_batch_fast(texts, add_special_tokens=False)]
        if self._forgeable:
            self._refuse_forged(texts, found)
        return found

    def _refuse_forged(self, texts: Sequence[str], found: list[list[int]]) -> None:
        for text, ids in zip(texts, found, strict=True):
            if forged := self.control_ids.intersection(ids):
                raise UserError(
                    f"the tokenizer {self.name} makes control ids {sorted(forged)} from the text {text[:40]!r}: use "
                    "another tokenizer, whose control tokens cannot be written as text"
                )

    def control_id(self, name: str) -> int | None:
        if name in ("bos", "eos"):
            return self.bos_id if name == "bos" else self.eos_id
        return self.hf.convert_tokens_to_ids(name)

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token_id: int) -> str:
        return visible(self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.hf.convert_ids_to_tokens(token_id)
        if piece is None:  # a vocabulary may have holes, and a model more embeddings than tokens
            return b""
        if token_id in self.control_ids:
            return piece.encode()
        if token_id in self.added_words:  # transformers may spell it as its normalizer would
            return self.added_words[token_id].encode()
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[c] for c in piece)
            except KeyError:  # an added token of spaces is spelt as it is
                return piece.encode()
        return _bytes_of_piece(piece.removeprefix("##"))


def _load(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    require_tokenizer_class(Path(folder))
    clean_logs()
    try:
        hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # each kind of damage raises an error of its own; a panic in Rust is no Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {folder} cannot be loaded ({reason}): save one there") from error
    if not hf.is_fast:
        raise UserError(f"the tokenizer in {folder} has no tokenizer.json: save a fast tokenizer there")
    if hf.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no EOS token: set eos_token in its tokenizer_config.json")
    return hf


def _only_spaces(text: str) -> bool:
    """Some vocabularies add runs of spaces as tokens (GPT-NeoX, Gemma): text, and no control tokens."""
    return text.replace(SPACE_MARK, " ").isspace()


def _hide_control_tokens(whole: dict[str, Any], control_ids: frozenset[int], words: dict[int, str]) -> bool:
    """Take from a serialized tokenizer what would recognize control tokens in a text; True if some remain possible.

    It cannot recognize what it does not know: added tokens go, but for `words` and runs of spaces, and control tokens
    in the model's own vocabulary get names that no text has.
    """
    kept = [token for token in whole["added_tokens"] if token["id"] in words or _only_spaces(token["content"])]
    whole["added_tokens"] = kept
    whole |= {"post_processor": None, "truncation": None, "padding": None}
    model = whole["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score], the index is the id
        for token_id in control_ids & set(range(len(vocabulary))):
            vocabulary[token_id][0] = _unwritable(token_id)
        # Added tokens that a vocabulary lacks get the next free ids, unless it knows them.
        lowest = min(score for _, score in vocabulary)
        for token_id in range(len(vocabulary), max(words, default=-1) + 1):
            vocabulary.append([words.get(token_id, _unwritable(token_id)), lowest])
        return True
    names = {name for name, token_id in vocabulary.items() if token_id in control_ids}
    merged = {"".join(pair if isinstance(pair, list) else pair.split(" ", 1)) for pair in model.get("merges", ())}
    for name in names - merged:
        token_id = vocabulary.pop(name)
        vocabulary[_unwritable(token_id)] = token_id
    for token in kept:
        vocabulary.setdefault(token["content"], token["id"])  # else they would get the next free ids
    return model["type"] != "BPE" or bool(names & merged)


def _unwritable(token_id: int) -> str:
    return f"\ufdd0\ufdd1{token_id}\ufdd1\ufdd0"  # noncharacters; what a forger still manages is refused


def _tokenizers_by_place(whole: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer for a text after nothing, after a control token, and after a text.

    Many tokenizers put a space or `▁` before a text: some before every stretch between control tokens, some only
    at the very start of the row; none does so in the middle of a text.
    """
    from tokenizers import Tokenizer as RustTokenizer

    bare = whole | {part: copy.deepcopy(whole[part]) for part in ("normalizer", "pre_tokenizer")}
    marks = only_first = False
    for part in _parts(bare["normalizer"]):
        if part["type"] == "Prepend":
            marks, part["prepend"] = True, ""
    for part in _parts(bare["pre_tokenizer"]):
        if part is not bare["pre_tokenizer"] and part.get("prepend_scheme") != "first":
            continue  # behind another one it marks every stretch that was split off, wherever that stands
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            marks, only_first = True, part.get("prepend_scheme") == "first"
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            marks, part["add_prefix_space"] = True, False
    marked = RustTokenizer.from_str(json.dumps(whole))
    if not marks:
        return dict.fromkeys(("nothing", "control", "text"), marked)
    unmarked = RustTokenizer.from_str(json.dumps(bare))
    return {"nothing": marked, "control": unmarked if only_first else marked, "text": unmarked}


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder and, if it is a sequence, what it is made of."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in component.get(key, ()):
            yield from _parts(part)


def _no_piece_crosses_a_space(pieces: Any, byte_level: bool) -> bool:
    space = "Ġ" if byte_level else f"[ {SPACE_MARK}]"
    return not any(map(re.compile(f"[A-Za-z]{space}[A-Za-z]?").search, pieces))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelt = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return spelt | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


# --- Mistral's own -----------------------------------------------------------------------------------------


class MistralCommonTokenizer:
    """Mistral's own tokenizer of one template version, from the files that mistral-common ships.

    Its ids are the reference. Batches go to the underlying library directly, for speed: SentencePiece, or
    tiktoken through mistral-common's `Tekkenizer`.
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
        self.bos_id, self.eos_id = self._inner.bos_id, self._inner.eos_id
        # SentencePiece's versions have no padding token; masks never rest on the pad id here.
        self.pad_id = self._inner.pad_id if self._tekken else self.eos_id
        self.vocab_size = self._inner.n_words
        self.control_ids = frozenset(self._inner.special_ids)
        self.added_words: dict[int, str] = {}
        if self._tekken:
            count = range(self._inner.num_special_tokens, self._inner.n_words)
            pieces = (self.token_bytes(i).decode("latin-1") for i in count)
        else:
            from sentencepiece import SentencePieceProcessor

            self._sentencepiece = SentencePieceProcessor(model_file=str(self._inner.file_path))
            pieces = self._inner.vocab()
        self.cuts_at_spaces = _no_piece_crosses_a_space(pieces, byte_level=False)

    def encode(self, text: str, after: str = "control") -> list[int]:
        return self._inner.encode(text, bos=False, eos=False)

    def encode_batch(self, texts: Sequence[str], after: str = "control") -> list[list[int]]:
        if not self._tekken:
            return self._sentencepiece.encode(list(texts), out_type=int, num_threads=system.cores())
        with ThreadPoolExecutor(system.cores()) as pool:  # tiktoken lets go of the interpreter while it works
            return list(pool.map(self.encode, texts))

    def control_id(self, name: str) -> int | None:
        if name in ("bos", "eos"):
            return self.bos_id if name == "bos" else self.eos_id
        return self._inner.get_special_token(name)

    def decode(self, ids: list[int]) -> str:
        # mistral-common's own decoding leaves out the control tokens, or leaves SentencePiece's spelling in.
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        return visible(self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        if self._tekken:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

            return self._inner.id_to_byte_piece(token_id, SpecialTokenPolicy.KEEP)
        return _bytes_of_piece(self._inner.id_to_piece(token_id))


def _bytes_of_piece(piece: str) -> bytes:
    """A piece in SentencePiece's spelling: `▁` is a space, `<0x0A>` a byte."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def load_tokenizer(source: str = "smollm2", template: str | None = None) -> Tokenizer:
    """The tokenizer of `smollm2`, of a model folder or hub id, or `mistral:v1` to `mistral:v7`.

    Mistral's own tokenizers know their `template`; for all others it is v1 unless given. Raises
    `UserError`.
    """
    if source.startswith("mistral:"):
        own = source.removeprefix("mistral:")
        if template not in (None, own):
            raise UserError(f"tokenizer {source} goes with template {own}, not {template}: leave --template out")
        return MistralCommonTokenizer(own)
    from minisft.data.download import find_tokenizer

    return HuggingFaceTokenizer(find_tokenizer(source), template or DEFAULT)
