"""A tokenizer is cut at spaces only where both parts have the ids of the whole text, whatever its components do."""

import json
import shutil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import talk
from tokenizer_kinds import KINDS, folder_of, tokenizer_of

from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.labels.encode_row import Draft, cut_point, encode

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
TEKKEN = rf"{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT_2 = BYTES | {"use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def replaced(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(behavior="Isolated", invert=False, **pattern):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def in_turn(key, *components):
    return {"type": "Sequence", key: list(components)}


def strip(left, right):
    return {"type": "Strip", "strip_left": left, "strip_right": right}


DIGITS = {"type": "Digits", "individual_digits": True}

LOCAL = {
    "GPT-2": ("byte level", {"pre_tokenizer": GPT_2}),
    "SmolLM": ("byte level", {"pre_tokenizer": in_turn("pretokenizers", DIGITS, GPT_2)}),
    "Llama 3": ("byte level", {"pre_tokenizer": in_turn("pretokenizers", split(Regex=LLAMA_3), BYTES)}),
    "Qwen": (
        "byte level",
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": in_turn("pretokenizers", split(Regex=QWEN), BYTES)},
    ),
    "Tekken": ("byte level", {"pre_tokenizer": in_turn("pretokenizers", split(Regex=TEKKEN), BYTES)}),
    "Llama 2": ("legacy llama", {}),
    "Mistral": ("metaspace first", {"pre_tokenizer": METASPACE}),
    "Gemma": ("metaspace never", {"normalizer": replaced("▁", String=" "), "pre_tokenizer": split(String=" ")}),
    "quotes": (
        "metaspace always",
        {"normalizer": in_turn("normalizers", {"type": "NFKC"}, replaced('"', String="``"))},
    ),
    "lowercase": ("metaspace always", {"normalizer": {"type": "Lowercase"}}),
}
LOOKS_ACROSS = {
    "strip": ("byte level", {"normalizer": strip(True, True)}),
    "strip the left": ("metaspace never", {"normalizer": in_turn("normalizers", {"type": "NFC"}, strip(True, False))}),
    "a regular expression": ("byte level", {"normalizer": replaced("x", Regex="t(?= on)")}),
    "two words": ("byte level", {"normalizer": replaced("!", String="cat sat")}),
    "no spaces": ("byte level", {"normalizer": replaced("", String=" ")}),
    "a letter": ("byte level", {"normalizer": replaced("é", String="t")}),
    "another space": ("metaspace never", {"pre_tokenizer": METASPACE | {"replacement": "_"}}),
    "pairs of words": ("byte level", {"pre_tokenizer": in_turn("pretokenizers", split(Regex=r"\w+ \w+"), BYTES)}),
    "the end": ("byte level", {"pre_tokenizer": in_turn("pretokenizers", split(Regex=r"\w+$"), BYTES)}),
    "word pieces of texts": ("word piece", {"pre_tokenizer": {"type": "Digits", "individual_digits": False}}),
    "whole texts first": ("byte level", {"pre_tokenizer": BYTES, "model": {"ignore_merges": True}}),
    "a mark at the end": ("byte level", {"pre_tokenizer": BYTES, "model": {"end_of_word_suffix": "n"}}),
}


def tokenizer_with(kind, changes, folder):
    shutil.copytree(folder_of(kind), folder)
    file = folder / "tokenizer.json"
    serialized = json.loads(file.read_text())
    changes = changes | {"model": serialized["model"] | changes.get("model", {})}
    file.write_text(json.dumps(serialized | changes))
    return HuggingFaceTokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    made = {name: tokenizer_with(*about, folder / name) for name, about in (LOCAL | LOOKS_ACROSS).items()}
    return made | {kind: tokenizer_of(kind) for kind in KINDS}


words = st.sampled_from(
    ["the", "cat", "sat", "on", "Old", "RED", "rain", "I", "é", "12", "345", "it's", "``", "...", "\n", " ", "▁", "漢"]
)
texts = st.lists(words, min_size=60, max_size=90).map(" ".join)  # fmt: skip


def test_usual_tokenizers_are_cut_and_those_that_may_look_across_the_cut_are_not(tokenizers):
    assert {name for name, tokenizer in tokenizers.items() if tokenizer.cuts_at_spaces} == {*LOCAL, *KINDS}


@settings(max_examples=60)
@given(text=texts, characters=st.integers(0, 60))
def test_both_parts_of_a_cut_text_have_the_ids_of_the_whole(tokenizers, text, characters):
    end = cut_point(text, characters)
    assume(end < len(text))
    for name, tokenizer in tokenizers.items():
        for after in ("nothing", "control", "text") if tokenizer.cuts_at_spaces else ():
            parts = tokenizer.encode(text[:end], after) + tokenizer.encode(text[end:], "text")
            assert parts == tokenizer.encode(text, after), name


@pytest.mark.parametrize("name", ["GPT-2", "strip", "strip the left", "two words", "pairs of words"])
def test_a_long_answer_gets_the_ids_of_the_whole_however_early_it_was_cut(tokenizers, name):
    tokenizer = tokenizers[name]
    template = template_for(tokenizer)
    conversation = talk(("user", "why"), ("assistant", "the cat sat on red rain " * 40))
    draft = Draft(conversation, template, tokenizer, 100, characters_per_token=0.1)
    while wanted := draft.wanted():
        draft.add([tokenizer.encode(text, after) for after, text in wanted])
    assert draft.row("token").input_ids == encode(conversation, template, tokenizer, 10**6).input_ids[:100]


@pytest.mark.parametrize(("kind", "is_cut"), [("byte level", True), ("metaspace first", True), ("legacy llama", False)])
def test_a_text_with_added_words_is_cut_unless_each_stretch_behind_one_gets_a_mark(tmp_path, kind, is_cut):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(folder_of(kind))
    hf.add_tokens([AddedToken("<think>", normalized=False)])
    hf.save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.cuts_at_spaces == is_cut
    parts = tokenizer.encode("the cat") + tokenizer.encode(" sat <think>on a mat", "text")
    assert (parts == tokenizer.encode("the cat sat <think>on a mat")) == is_cut
