"""Every exhibit: the right way passes, the wrong way is caught by the invariant that it names."""

import pytest
import torch

from minisft.chat.tokenizers import HuggingFaceTokenizer, load_tokenizer
from minisft.course.bug_museum import BUGS, language_modelling, logits_moved
from minisft.course.buggy_rows import SHORT, right_row, talk
from minisft.labels.encode_row import IGNORE_INDEX, Row
from minisft.model.packed_attention import PER_DOCUMENT

NAMES = sorted(BUGS)
# As in ShareGPT: an answer that the question quotes, marks written as text, a long first question.
REAL = talk(
    "Say only yes or no: is 'yes' an English word? Answer with yes if it is one, please.<|im_end|></s>",
    "yes",
    "And <b>'oui'</b>?",
    "no\n\n(It is French.)",
    name="QWJhYvA_0",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return HuggingFaceTokenizer(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def caught(name, kind, tokenizer, conversations, model):
    exhibit = BUGS[name]
    made = getattr(exhibit, kind)(tokenizer, *conversations)
    more = {"model": model} if name == "packing" else {}
    return made, exhibit.caught(made, tokenizer, *conversations, **more)


@pytest.mark.parametrize("name", NAMES)
def test_the_wrong_way_is_caught_and_the_right_way_passes(name, tokenizer, model):
    example = BUGS[name].example
    assert caught(name, "right", tokenizer, example, model)[1] == []
    assert BUGS[name].invariant in {v.invariant for v in caught(name, "wrong", tokenizer, example, model)[1]}


@pytest.mark.parametrize("name", NAMES)
def test_it_happens_to_conversations_like_the_real_ones(name, tokenizer, model):
    few = {"packing": (REAL, talk("Hello", "Hi")), "split": BUGS["split"].example}.get(name, (REAL,))
    right, nothing = caught(name, "right", tokenizer, few, model)
    wrong, evidence = caught(name, "wrong", tokenizer, few, model)
    assert not nothing and evidence
    assert str(wrong) != str(right)


@pytest.mark.model
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"packing"}))
def test_it_happens_with_the_real_tokenizer(name):
    tokenizer, example = load_tokenizer(), BUGS[name].example
    assert caught(name, "right", tokenizer, example, None)[1] == []
    assert BUGS[name].invariant in {v.invariant for v in caught(name, "wrong", tokenizer, example, None)[1]}


def test_each_exhibit_explains_itself():
    for name, exhibit in BUGS.items():
        assert exhibit.name == name
        assert exhibit.title and exhibit.what_happens.endswith(".") and exhibit.how_caught.endswith(".")


def test_the_collator_changes_the_loss_of_a_model(tokenizer, model):
    exhibit = BUGS["collator"]
    losses = [model(**make(tokenizer, REAL)).loss.item() for make in (exhibit.wrong, exhibit.right)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_collator_hides_every_eos_where_padding_is_eos(tiny_model):
    tokenizer = HuggingFaceTokenizer(tiny_model)
    tokenizer.hf.pad_token = tokenizer.hf.eos_token
    batch = language_modelling(tokenizer, REAL)
    assert tokenizer.eos_id in batch["input_ids"]
    assert tokenizer.eos_id not in batch["labels"]


def test_a_row_without_targets_has_no_loss(tokenizer, model):
    exhibit = BUGS["cut_blindly"]
    row = exhibit.wrong(tokenizer, *exhibit.example)
    assert len(row.input_ids) == SHORT and set(row.labels) == {IGNORE_INDEX}
    inputs = {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])}
    assert model(**inputs).loss.isnan()
    assert model(**inputs, num_items_in_batch=1).loss == 0  # where the division is guarded
    assert exhibit.right(tokenizer, *exhibit.example) is None


def test_a_row_that_keeps_a_target_is_cut_alike(tokenizer):
    exhibit = BUGS["cut_blindly"]
    short = talk("the cat", "sat on a mat " * 20)
    assert exhibit.wrong(tokenizer, short) == exhibit.right(tokenizer, short)
    assert exhibit.caught(exhibit.wrong(tokenizer, short), tokenizer, short) == []


def test_searching_for_the_answer_is_right_where_nothing_repeats(tokenizer):
    clean = talk("the cat", "sat on a mat", "and then", "saw red rain")
    found = BUGS["find_first"].wrong(tokenizer, clean)
    assert found == right_row(tokenizer, clean)


def test_packing_leaves_the_model_as_it_was(tokenizer, model):
    exhibit = BUGS["packing"]
    bound = len(right_row(tokenizer, exhibit.example[0]).input_ids)
    usual = model.config._attn_implementation
    assert logits_moved(exhibit.right(tokenizer, *exhibit.example), bound, model) == 0
    assert logits_moved(exhibit.wrong(tokenizer, *exhibit.example), bound, model) > 0.01
    assert model.config._attn_implementation == usual != PER_DOCUMENT


def test_the_packed_batches_hold_the_same_tokens(tokenizer):
    exhibit = BUGS["packing"]
    wrong, right = exhibit.wrong(tokenizer, *exhibit.example), exhibit.right(tokenizer, *exhibit.example)
    assert wrong["input_ids"].equal(right["input_ids"])
    assert "position_ids" in right and "position_ids" not in wrong


def test_both_splits_keep_every_part(tokenizer):
    exhibit = BUGS["split"]
    for sides in (exhibit.wrong(tokenizer, *exhibit.example), exhibit.right(tokenizer, *exhibit.example)):
        assert sorted(c.id for side in sides for c in side) == sorted(c.id for c in exhibit.example)


def test_eos_masked_changes_no_id(tokenizer):
    wrong = BUGS["eos_masked"].wrong(tokenizer, REAL)
    right = right_row(tokenizer, REAL)
    assert isinstance(wrong, Row) and wrong.input_ids == right.input_ids
    assert sum(a != b for a, b in zip(wrong.labels, right.labels, strict=True)) == REAL.answers
