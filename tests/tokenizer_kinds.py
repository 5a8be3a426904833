"""Tokenizers of every kind, trained on the spot: how each writes a text after nothing, a control token, or a text."""

import functools
import json
import tempfile
from pathlib import Path

from conftest import WORDS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minisft.chat.tokenizers import HuggingFaceTokenizer

CORPUS = [" ".join(WORDS) + " Hi there! [INST] [/INST] é ü 12 a  b   c\n\nnew line\n", " ".join(reversed(WORDS))] * 4
LETTERS = sorted(
    {c for text in CORPUS for c in text} | set("<>/|_[]ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(prefix):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    return made, trainers.BpeTrainer, {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}


def metaspace(scheme):
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return made, trainers.BpeTrainer, {"initial_alphabet": [*LETTERS, "▁"], "more": BYTES}


def legacy_llama():
    made, trainer, options = metaspace("never")
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Without a pre-tokenizer a trainer would learn pieces across spaces; SentencePiece does not.
    return made, trainer, options | {"train_split": True}


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.UnigramTrainer, {"unk_token": "<unk>", "initial_alphabet": [*LETTERS, "▁"]}


def behind_another(first, second):
    """The pre-tokenizer that marks a word's start comes after one that splits."""
    made, trainer, options = unigram() if "Metaspace" in str(second) else byte_level(True)
    made.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    return made, trainer, options


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer, {"initial_alphabet": LETTERS}


def neox():
    return byte_level(False)


KINDS = {
    "byte level": lambda: byte_level(False),
    "byte level, prefix space": lambda: byte_level(True),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "legacy llama": legacy_llama,
    "unigram": unigram,
    "word piece": word_piece,
    "words, metaspace": lambda: behind_another(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()),
    "digits, byte level": lambda: behind_another(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel()),
    "neox": neox,
}
LOSSLESS = ["byte level", "neox"]
# But for a leading space, and for `▁`, which they use themselves.
NEARLY_LOSSLESS = ["byte level, prefix space", "metaspace always", "metaspace first", "metaspace never", "legacy llama"]


@functools.cache
def folder_of(kind: str, bos: bool = True) -> Path:
    """A folder with a saved tokenizer; it has `<s>`, `</s>`, and one more control token, `<|im_end|>`."""
    made, trainer, options = KINDS[kind]()
    more = options.pop("more", [])
    split = options.pop("train_split", False)
    specials = ["<unk>", *(["<s>"] if bos else []), "</s>", "<|im_end|>", *more]
    if split:
        whole, made.normalizer, made.pre_tokenizer = made.normalizer, None, pre_tokenizers.Metaspace()
    made.train_from_iterator(CORPUS, trainer(vocab_size=600, special_tokens=specials, **options))
    if split:
        made.normalizer, made.pre_tokenizer = whole, None
    if more:  # byte pieces are no added tokens
        made = _without_added(made, more)
    if kind == "neox":
        made.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    names = {"bos_token": "<s>"} if bos else {}
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>", **names).save_pretrained(folder)
    return folder


def _without_added(made, names):
    whole = json.loads(made.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(whole))


@functools.cache
def tokenizer_of(kind: str, version: str = "v1", bos: bool = True) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(folder_of(kind, bos), version)
