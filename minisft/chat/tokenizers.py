"""One interface to all tokenizers: text yields text tokens only, control tokens come by name only.

A conversation is untrusted text. If it contains `</s>` or `<|im_end|>`, those characters must stay
characters: a tokenizer that parsed them would let the data forge the end of a turn. So `encode`
never returns a control id.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from minisft.chat.mistral_tokenizer import MistralCommonTokenizer
from minisft.chat.pieces import BYTE_OF, SPACE_MARK, bytes_of_piece
from minisft.chat.registry import DEFAULT, template_named
from minisft.chat.space_cuts import acts_on_each_side, no_piece_crosses_a_space, parts
from minisft.data.model_folder import clean_logs, require_own_tokenizer
from minisft.errors import UserError
from minisft.files import read_json
from minisft.text import one_line, visible

MOST_TOKENS = 10_000_000  # of a vocabulary; the largest published ones have 260,000
MOST_GROWTH = 1_000  # characters that a normalizer or decoder may make of one; more would fill the memory


class Tokenizer(Protocol):
    """The interface of a tokenizer that the rest of the package uses.

    `template_name` is the chat template that the tokenizer is set up for. `continues_text`: a text
    that follows a text is encoded as its continuation; Mistral's own tokenizers encode every text
    alone. `cuts_at_spaces`: the ids of a text that is cut before a space between two words are the
    first ids of the whole text, and its continuation has the others (`space_cuts`). `unk_id` stands
    for text that has no token. `added_words` maps ids to words that were added to the vocabulary but
    are not control tokens (`<think>` in many models): a text may contain them, and each is one id.
    """

    name: str
    template_name: str
    bos_id: int | None
    unk_id: int | None
    eos_id: int
    stop_ids: list[int]
    pad_id: int
    vocab_size: int
    control_ids: frozenset[int]
    continues_text: bool
    cuts_at_spaces: bool
    added_words: dict[int, str]

    def encode(self, text: str, after: str = "control") -> list[int]:
        """The ids of `text` alone: no BOS, EOS or other control token, whatever the text contains.

        `after` is what precedes the text in its row: `nothing`, `control` or `text`.
        """

    def encode_batch(self, texts: Sequence[str], after: str = "control") -> list[list[int]]:
        """`encode` for many texts, on all cores."""

    def control_id(self, name: str) -> int | None:
        """The id of `bos`, `eos`, `[INST]`, …; None for `bos` if the tokenizer has no BOS."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens written out."""

    def piece(self, token_id: int) -> str:
        """What one token looks like, for showing it: all of it is seen, as by `text.visible`."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; several tokens may be needed for one character."""


# --- tokenizers of transformers ----------------------------------------------------------------------------


class HuggingFaceTokenizer:
    """A fast tokenizer of transformers, from a model folder, set up for one chat template.

    Control tokens of the template that the vocabulary lacks are added (v1 has none). `hf` then has
    more tokens than the model, and `model.loading` grows the model's embeddings. `eos_id` is the
    token that ends an answer in the template; `stop_ids` are all at which generation stops, this one
    first. Raises `UserError` if the folder has no fast tokenizer with an EOS token.
    """

    continues_text = True

    def __init__(self, folder: Path | str, template: str = DEFAULT):
        self.name, self.template_name = Path(folder).name, template
        named = template_named(template)
        self.hf = _load(folder)
        with _damage_named(folder):
            self._add_control_tokens(named.control_tokens)
            marks, stops = named.marks_and_stops(self.hf)
            self.stop_ids: list[int] = self.hf.convert_tokens_to_ids(list(stops))
            self._examine({*marks, *stops})

    def _examine(self, control_tokens: Collection[str]) -> None:
        """Find the control tokens, and make the tokenizers that cannot recognize them in a text."""
        self.bos_id, self.eos_id, self.unk_id = self.hf.bos_token_id, self.stop_ids[0], self.hf.unk_token_id
        for token_id in (self.eos_id, self.bos_id):
            token = "" if token_id is None else self.hf.convert_ids_to_tokens(token_id)
            if token and _only_spaces(token):
                raise UserError(
                    f"the tokenizer {self.name} has white space as BOS or EOS, which any text may have: set another"
                )
        self.pad_id = self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id
        self.vocab_size = max(self.hf.get_vocab().values()) + 1
        if self.vocab_size > MOST_TOKENS:
            raise UserError(
                f"the tokenizer {self.name} has the id {self.vocab_size - 1}, and at most {MOST_TOKENS} is allowed: "
                "save another one"
            )

        serialized = json.loads(self.hf.backend_tokenizer.to_str())
        marks = {*self.hf.all_special_tokens, *control_tokens}
        added = [token for token in serialized["added_tokens"] if not _only_spaces(token["content"])]
        control = {token["id"] for token in added if token["special"] or token["content"] in marks}
        # The unknown token is not a forgery: tokenizers emit it for text that they cannot encode.
        self.control_ids = frozenset(control - {self.unk_id} | {self.eos_id, self.bos_id} - {None})
        words = [token for token in added if token["id"] not in control | self.control_ids]
        self.added_words = {token["id"]: token["content"] for token in words}
        self._forgeable = _hide_control_tokens(serialized, self.control_ids, self.added_words)
        self._byte_level = any(part.get("type") == "ByteLevel" for part in parts(serialized["decoder"]))
        self._at = _tokenizers_by_position(serialized)
        with_spaces = re.compile(rf"[\s{SPACE_MARK}]")
        # A text may get a mark behind each added token; as the continuation of a text it gets none.
        same_marks = self._at["control"] is self._at["text"] or not serialized["added_tokens"]
        self.cuts_at_spaces = (
            acts_on_each_side(serialized)
            and no_piece_crosses_a_space(self.hf.get_vocab(), self._byte_level)
            and same_marks
            and not any(token["lstrip"] or token["rstrip"] or with_spaces.search(token["content"]) for token in words)
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
        with _damage_named(self.name):
            encodings = self._at[after].encode_batch_fast(texts, add_special_tokens=False)
        batch_ids = [encoding.ids for encoding in encodings]
        if self._forgeable:
            self._refuse_forged(texts, batch_ids)
        return batch_ids

    def _refuse_forged(self, texts: Sequence[str], batch_ids: list[list[int]]) -> None:
        for text, ids in zip(texts, batch_ids, strict=True):
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
        if piece is None:  # a vocabulary may have gaps, and a model may have more embeddings than tokens
            return b""
        if token_id in self.control_ids:
            return piece.encode()
        if token_id in self.added_words:  # transformers may return the normalized spelling
            return self.added_words[token_id].encode()
        if self._byte_level:
            try:
                return bytes(BYTE_OF[c] for c in piece)
            except KeyError:  # an added token made of spaces is stored unencoded
                return piece.encode()
        return bytes_of_piece(piece.removeprefix("##"))


@contextmanager
def _damage_named(source: Path | str) -> Iterator[None]:
    """Turn what a damaged tokenizer raises into a `UserError`; a panic in Rust is not even an `Exception`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = one_line(error, 200)
        raise UserError(f"the tokenizer in {source} cannot be loaded ({reason}): save one there") from error


def _load(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    require_own_tokenizer(Path(folder))
    clean_logs()
    with _damage_named(folder):
        serialized = read_json(Path(folder) / "tokenizer.json", dict[str, Any]) or {}
        if max(_growth(serialized.get(part)) for part in ("normalizer", "decoder")) > MOST_GROWTH:
            raise UserError(
                f"the tokenizer in {folder} makes more than {MOST_GROWTH} characters of one: save another one"
            )
        hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hf.is_fast:
        raise UserError(f"the tokenizer in {folder} has no tokenizer.json: save a fast tokenizer there")
    if hf.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no EOS token: set eos_token in its tokenizer_config.json")
    return hf


def _growth(component: dict[str, Any] | None) -> float:
    """How many characters the replacements of a normalizer or decoder make, at most, of one character."""
    growth = 1.0
    for part in parts(component):
        if part["type"] == "Replace":  # a regular expression may match a single character, or none
            replaced = len(part["pattern"].get("String", "")) or 1
            growth *= max(1, len(part["content"]) / replaced)
    return growth


def _only_spaces(text: str) -> bool:
    """Some vocabularies add runs of spaces as tokens (GPT-NeoX, Gemma).

    They are text, not control tokens.
    """
    return text.replace(SPACE_MARK, " ").isspace()


def _hide_control_tokens(serialized: dict[str, Any], control_ids: frozenset[int], words: dict[int, str]) -> bool:
    """Edit a serialized tokenizer so that it no longer recognizes control tokens in a text.

    Added tokens are removed, except `words` and runs of spaces, and control tokens in the model's
    own vocabulary get names that no text has. Returns True if a text may still yield a control id.
    """
    added = serialized["added_tokens"]
    remaining = [token for token in added if token["id"] in words or _only_spaces(token["content"])]
    serialized["added_tokens"] = remaining
    serialized |= {"post_processor": None, "truncation": None, "padding": None}
    model = serialized["model"]
    if "dropout" in model:
        model["dropout"] = None  # it would encode a text differently each time
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score], the index is the id
        for token_id in control_ids & set(range(len(vocabulary))):
            vocabulary[token_id][0] = _unwritable(token_id)
        # Added tokens missing from the vocabulary would get the next free ids, so enter them here.
        lowest = min(score for _, score in vocabulary)
        for token_id in range(len(vocabulary), max(words, default=-1) + 1):
            vocabulary.append([words.get(token_id, _unwritable(token_id)), lowest])
        return True
    names = {name for name, token_id in vocabulary.items() if token_id in control_ids}
    merged = {"".join(pair if isinstance(pair, list) else pair.split(" ", 1)) for pair in model.get("merges", ())}
    for name in names - merged:
        token_id = vocabulary.pop(name)
        vocabulary[_unwritable(token_id)] = token_id
    for token in remaining:
        vocabulary.setdefault(token["content"], token["id"])  # otherwise it would get the next free id
    return model["type"] != "BPE" or bool(names & merged)


def _unwritable(token_id: int) -> str:
    """A name of Unicode noncharacters; `encode_batch` refuses a text that contains it anyway."""
    return f"\ufdd0\ufdd1{token_id}\ufdd1\ufdd0"


def _tokenizers_by_position(serialized: dict[str, Any]) -> dict[str, Any]:
    """The tokenizers for a text after nothing, after a control token, and after a text.

    Many tokenizers put a space or `▁` before a text: some before every stretch between control
    tokens, some only at the start of the row. None does so in the middle of a text.
    """
    from tokenizers import Tokenizer as RustTokenizer

    bare = serialized | {part: copy.deepcopy(serialized[part]) for part in ("normalizer", "pre_tokenizer")}
    marks = only_first = False
    for part in parts(bare["normalizer"]):
        if part["type"] == "Prepend":
            marks, part["prepend"] = True, ""
    for part in parts(bare["pre_tokenizer"]):
        if part is not bare["pre_tokenizer"] and part.get("prepend_scheme") != "first":
            continue  # after another pre-tokenizer it marks every split-off stretch, at any position
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            marks, only_first = True, part.get("prepend_scheme") == "first"
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            marks, part["add_prefix_space"] = True, False
    marked = RustTokenizer.from_str(json.dumps(serialized))
    if not marks:
        return dict.fromkeys(("nothing", "control", "text"), marked)
    unmarked = RustTokenizer.from_str(json.dumps(bare))
    return {"nothing": marked, "control": unmarked if only_first else marked, "text": unmarked}


def load_tokenizer(source: str = "smollm2", template: str | None = None) -> Tokenizer:
    """The tokenizer of `smollm2`, of a model folder or hub id, or `mistral:v1` to `mistral:v7`.

    Mistral's own tokenizers have a fixed `template`; for all others the default is v1. Raises
    `UserError` if the source cannot be found or loaded, or if the template does not fit it.
    """
    if source.startswith("mistral:"):
        version = source.removeprefix("mistral:")
        if template not in (None, version):
            raise UserError(f"tokenizer {source} goes with template {version}, not {template}: leave --template out")
        return MistralCommonTokenizer(version)
    from minisft.data.download import find_tokenizer

    return HuggingFaceTokenizer(find_tokenizer(source), template or DEFAULT)
