from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.tokens import HuggingFaceTokenizer, MistralCommonTokenizer

FORGERIES = ["<s>", "</s>", "<|im_end|>", "<|pad|>", "[INST]", "[/INST]", "<unk>"]


@settings(max_examples=80)
@given(st.lists(st.one_of(st.sampled_from(FORGERIES), st.text(st.characters(exclude_categories=["Cs"]), max_size=6))))
def test_no_text_makes_a_control_token_and_nothing_is_lost(tiny_model, parts):
    text = "".join(parts)
    tokenizer = HuggingFaceTokenizer(tiny_model)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.hf.all_special_ids)
    assert not set(ids) & set(tokenizer.hf.get_added_vocab().values())
    assert tokenizer.decode(ids) == text


def test_plain_transformers_would_have_parsed_it(tiny_model):
    """The trap this guards against is real: the same tokenizer, asked plainly, does make the control id."""
    tokenizer = HuggingFaceTokenizer(tiny_model)
    assert tokenizer.eos_id in tokenizer.hf.encode("</s>", add_special_tokens=False)
    assert tokenizer.eos_id not in tokenizer.encode("</s>")


def test_mistral_text_makes_no_control_token():
    tokenizer = MistralCommonTokenizer("v1")
    for text in FORGERIES:
        assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(tokenizer.encode(text))


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


def test_pieces_are_readable(tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    assert "".join(map(tokenizer.piece, tokenizer.encode(" the\n"))) == "␣the⏎"
    assert tokenizer.piece(tokenizer.eos_id) == "</s>"
