"""Text becomes text tokens only, whatever the tokenizer; control tokens come by name only."""

import json
import shutil
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, LOSSLESS, NEARLY_LOSSLESS, folder_of, tokenizer_of

from minisft.chat.mistral import VERSIONS
from minisft.chat.tokenizers import HuggingFaceTokenizer, MistralCommonTokenizer, load_tokenizer
from minisft.errors import UserError

PLACES = ["nothing", "control", "text"]
FORGERIES = [
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|pad|>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<0x0A>",
]
plain_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
texts = st.lists(st.sampled_from([*FORGERIES, "<unk>", " ", "  ", "\n", "▁", "the cat"]) | plain_texts, max_size=6).map(
    "".join
)


@settings(max_examples=80)
@given(text=texts)
def test_no_text_makes_a_control_token_and_nothing_is_lost(tiny_model, text):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.hf.all_special_ids)
    assert not set(ids) & set(tokenizer.hf.get_added_vocab().values())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("version", ["v1", "v7"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(text=texts, after=st.sampled_from(PLACES))
def test_no_text_makes_a_control_token_of_any_kind_of_tokenizer(kind, version, text, after):
    tokenizer = tokenizer_of(kind, version)
    added = {name for name in tokenizer.hf.get_added_vocab() if not name.isspace()}
    assert set(VERSIONS[version].control_tokens) < added
    for content in (text, "".join(added), f"a{text} ".join(added)):
        ids = tokenizer.encode(content, after)
        assert not tokenizer.control_ids.intersection(ids)
        control = {tokenizer.control_id(name) for name in ("bos", "eos", *VERSIONS[version].control_tokens)}
        assert control <= tokenizer.control_ids
        if kind in LOSSLESS:
            assert tokenizer.decode(ids) == content
        elif kind in NEARLY_LOSSLESS and "▁" not in content:
            assert tokenizer.decode(ids).lstrip(" ") == content.lstrip(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_would_have_parsed_it(kind):
    """The trap this guards against is real: the same tokenizer, asked plainly, does make the control id."""
    tokenizer = tokenizer_of(kind, "v3")
    for name, token_id in (("</s>", tokenizer.eos_id), ("[INST]", tokenizer.control_id("[INST]"))):
        assert token_id in tokenizer.hf.encode(name, add_special_tokens=False)
        assert token_id not in tokenizer.encode(name)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=30)
@given(text=texts)
def test_no_text_makes_a_control_token_of_mistrals_tokenizers(version, text):
    tokenizer = mistral(version)
    every = "".join(map(tokenizer.piece, sorted(tokenizer.control_ids)))
    for content in (text, every, f"a{text} {every}"):
        ids = tokenizer.encode(content)
        assert not tokenizer.control_ids.intersection(ids)
        assert tokenizer.encode_batch([content, content]) == [ids, ids]
        if "▁" not in content:
            assert tokenizer.decode(ids).removeprefix(" " * (version != "v3-tekken")) == content


def mistral(version, known={}):  # noqa: B006 -- loading takes a second
    if version not in known:
        known[version] = MistralCommonTokenizer(version)
    return known[version]


def test_runs_of_spaces_that_are_added_tokens_are_text():
    """GPT-NeoX has them: hiding its added tokens with the control tokens would spell a run out, space by space."""
    tokenizer = tokenizer_of("neox")
    run = tokenizer.encode("a" + " " * 12 + "b")
    assert run == tokenizer.hf.encode("a" + " " * 12 + "b", add_special_tokens=False)
    assert len(run) == 3
    assert not tokenizer.control_ids.intersection(run)
    assert tokenizer.token_bytes(run[1]) == b" " * 12
    assert len(tokenizer_of("byte level").encode("a" + " " * 12 + "b")) > 3


def test_runs_spelt_with_the_space_mark_are_text_too(tmp_path):
    """Gemma has those."""
    tokenizer = added_to("metaspace never", tmp_path, ["▁▁", "▁▁▁"], normalized=False)
    assert tokenizer.encode("▁▁▁") == tokenizer.hf.encode("▁▁▁", add_special_tokens=False)
    assert tokenizer.encode("a   b") == tokenizer.hf.encode("a   b", add_special_tokens=False)


def added_to(kind, folder, names, **flags):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(folder_of(kind))
    hf.add_tokens([AddedToken(name, **flags) for name in names])
    hf.save_pretrained(folder)
    return HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_added_words_that_are_not_special_are_words(kind, tmp_path):
    """`<think>` with `special: false`: a word of the vocabulary, one id as every other tool has it (llama.cpp 3538)."""
    words = ["<think>", "</think>", "thé"]
    tokenizer = added_to(kind, tmp_path, words)
    ids = tokenizer.hf.convert_tokens_to_ids(words)
    assert tokenizer.added_words == dict(zip(ids, words, strict=True))
    assert not tokenizer.control_ids.intersection(ids)
    text = "<think>a cat</think> thé the <think> end"
    found = tokenizer.encode(text, "nothing")
    assert found == tokenizer.hf.encode(text, add_special_tokens=False)
    if kind != "legacy llama":  # whose normalizer hides some words from transformers, too
        assert [token for token in found if token in ids[:2]] == [ids[0], ids[1], ids[0]]
    assert [tokenizer.token_bytes(token).decode() for token in ids] == words


def test_words_that_are_special_or_that_the_template_has_for_marks_are_control_tokens(tmp_path):
    tokenizer = added_to("byte level", tmp_path / "a", ["<think>"], special=True)
    assert not tokenizer.added_words
    assert not set(tokenizer.encode("<think>")) & set(tokenizer.hf.get_added_vocab().values())
    added_to("byte level", tmp_path / "b", ["[INST]"])
    assert HuggingFaceTokenizer(tmp_path / "b", "v1").added_words  # where it is plain text
    marked = HuggingFaceTokenizer(tmp_path / "b", "v3")
    assert not marked.added_words
    assert marked.control_id("[INST]") not in marked.encode("[INST] [INST]")


def test_a_text_is_not_cut_inside_an_added_word(tmp_path):
    tokenizer = added_to("byte level", tmp_path, ["the cat sat"])
    assert not tokenizer.cuts_at_spaces
    assert tokenizer.encode("the cat sat") == list(tokenizer.added_words)


def test_a_control_token_that_is_an_ordinary_word_is_refused_not_forged(tmp_path):
    """EOS as a result of merges cannot be hidden: the pieces before it and after it need the merge."""
    whole = json.loads((folder_of("byte level") / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    config = json.loads((folder_of("byte level") / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "Ġcat"}))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.encode("a dog")
    with pytest.raises(UserError, match="makes control ids"):
        tokenizer.encode("the cat")


def test_an_unknown_token_is_no_forgery(tmp_path):
    """A word-level vocabulary makes its unknown token of most texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.encode("the unseen") == [2, 0]
    assert tokenizer.eos_id not in tokenizer.encode("the </s>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_texts_one_by_one(kind):
    tokenizer = tokenizer_of(kind)
    for after in PLACES:
        assert tokenizer.encode_batch(["the cat", "", " a\n"], after) == [
            tokenizer.encode(text, after) for text in ("the cat", "", " a\n")
        ]
        assert tokenizer.encode("", after) == []


def test_control_tokens_are_added_once_and_only_where_they_lack(tmp_path):
    tokenizer = tokenizer_of("byte level", "v7")
    size = len(tokenizer.hf)
    assert len(tokenizer_of("byte level", "v3").hf) == size - 2
    assert len(tokenizer_of("byte level", "v1").hf) == size - 4
    tokenizer.hf.save_pretrained(tmp_path)
    again = HuggingFaceTokenizer(tmp_path, "v7")
    assert len(again.hf) == size
    names = VERSIONS["v7"].control_tokens
    assert [again.control_id(name) for name in names] == [tokenizer.control_id(name) for name in names]
    assert len({again.control_id(name) for name in ("bos", "eos", *names)}) == 6


def test_a_tokenizer_without_bos():
    tokenizer = tokenizer_of("byte level", bos=False)
    assert tokenizer.bos_id is None
    assert tokenizer.control_id("bos") is None
    assert None not in tokenizer.control_ids
    assert tokenizer.pad_id == tokenizer.eos_id


def test_pieces_are_readable(tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    assert "".join(map(tokenizer.piece, tokenizer.encode(" the\n"))) == "␣the⏎"
    assert tokenizer.piece(tokenizer.eos_id) == "</s>"


@pytest.mark.parametrize("kind", [*LOSSLESS, *NEARLY_LOSSLESS])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind):
    tokenizer = tokenizer_of(kind)
    text = "the cat é🙂\n  12 x"
    found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert found.removeprefix(b" ") == text.encode()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bytes_of_mistrals_tokens_are_the_bytes_of_the_text(version):
    tokenizer = mistral(version)
    text = "the cat é🙂\n  12 x"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).removeprefix(b" ") == text.encode()
    assert tokenizer.piece(tokenizer.eos_id) == "</s>"


def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path):
    from transformers import AutoTokenizer

    with pytest.raises(UserError, match="cannot be loaded"):
        HuggingFaceTokenizer(tmp_path)
    with pytest.raises(UserError, match="template 'v9' is not known"):
        HuggingFaceTokenizer(folder_of("byte level"), "v9")
    with pytest.raises(UserError, match="mistral:v9 is not known"):
        load_tokenizer("mistral:v9")
    with pytest.raises(UserError, match="goes with template v3, not v7"):
        load_tokenizer("mistral:v3", "v7")
    hf = AutoTokenizer.from_pretrained(folder_of("byte level"))
    hf.eos_token = None
    hf.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.attack("6")
@pytest.mark.parametrize("names", [["../tokenizer.4.0.0.json"], ["tokenizer.4.0.0.json"], "tokenizer.4.json", [3]])
def test_a_tokenizer_is_read_from_its_own_folder(tiny_model, tmp_path, names):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    file = folder / "tokenizer_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"fast_tokenizer_files": names}))
    with pytest.raises(UserError, match=r"names files elsewhere \(fast_tokenizer_files\)"):
        HuggingFaceTokenizer(folder)
    file.write_text(json.dumps(about | {"fast_tokenizer_files": ["tokenizer.json"]}))
    HuggingFaceTokenizer(folder)


@pytest.mark.attack("1")
@pytest.mark.parametrize("space", ["\n", "  "])
def test_white_space_is_no_eos(tiny_model, tmp_path, space):
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny_model)
    hf.add_special_tokens({"eos_token": space})
    hf.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has white space as BOS or EOS"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.attack("12")
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_text_does_not_grow_without_end(tiny_model, tmp_path, part):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    about = json.loads((folder / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    key = "normalizers" if part == "normalizer" else "decoders"
    for times, refused in ((2, False), (40, True)):
        parts = [double] * times + ([about["decoder"]] if part == "decoder" else [])
        (folder / "tokenizer.json").write_text(json.dumps(about | {part: {"type": "Sequence", key: parts}}))
        with pytest.raises(UserError, match="characters of one") if refused else nullcontext():
            HuggingFaceTokenizer(folder)


@pytest.mark.attack("15")
def test_a_vocabulary_with_holes_shows_nothing_there(tiny_model, tmp_path):
    """As where a model has more embeddings than its tokenizer has tokens, and generates one of those ids."""
    tokenizer = HuggingFaceTokenizer(tiny_model)
    beyond = len(tokenizer.hf) + 7
    assert tokenizer.token_bytes(beyond) == b""
    assert tokenizer.decode([beyond]) == ""


@pytest.mark.attack("15")
def test_a_tokenizer_that_makes_the_library_panic_is_one_sentence(tiny_model, tmp_path):
    """A panic in Rust reaches Python as an error that is no `Exception`."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["continuing_subword_prefix"] = "a/b"
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        HuggingFaceTokenizer(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.attack("15")
@settings(max_examples=80)
@given(data=st.data())
def test_a_tokenizer_altered_anywhere_is_loaded_or_refused_in_one_sentence(tiny_model, tmp_path_factory, data):
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "model")
    file = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "config.json"]))
    whole = node = json.loads(file.read_text())
    keys = sorted(node)
    while True:
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        node, keys = inner, sorted(inner)[:40] if isinstance(inner, dict) else list(range(min(3, len(inner))))
    node[key] = data.draw(JSON)
    file.write_text(json.dumps(whole))
    try:
        tokenizer = HuggingFaceTokenizer(folder)
        tokenizer.decode(tokenizer.encode("the cat <s> sat"))
    except UserError as error:
        assert "\n" not in str(error)


def damaged(tiny_model, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.attack("9")
def test_dropout_of_merges_does_not_change_the_ids(tiny_model, tmp_path):
    folder = damaged(tiny_model, tmp_path, lambda tokenizer: tokenizer["model"].update(dropout=0.5))
    text = "the cat sat on a mat and saw red rain " * 5
    assert {tuple(HuggingFaceTokenizer(folder).encode(text)) for _ in range(5)} == {
        tuple(HuggingFaceTokenizer(tiny_model).encode(text))
    }


@pytest.mark.attack("15")
def test_a_tokenizer_that_fails_later_is_one_sentence(tiny_model, tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated", "invert": False}
    folder = damaged(tiny_model, tmp_path, lambda tokenizer: tokenizer.update(pre_tokenizer=pattern))
    with pytest.raises(UserError, match="cannot be loaded"):
        HuggingFaceTokenizer(folder).encode("a" * 60 + "!")


@pytest.mark.attack("12")
def test_an_id_beyond_any_vocabulary_is_refused(tiny_model, tmp_path):
    def grow(tokenizer):
        tokenizer["model"]["vocab"]["zzz"] = 4_000_000_000

    with pytest.raises(UserError, match="the id 4000000000"):
        HuggingFaceTokenizer(damaged(tiny_model, tmp_path, grow))
