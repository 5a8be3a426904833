import pytest

from minisft.course.exercises import check, small_model


@pytest.mark.parametrize(
    ("answer", "says"),
    [(None, "Not attempted"), ([1], "1 entries, and 2"), ([1, 3], "position 1, where you have 3"), ([1, 2], "Right")],
)
def test_check_tells_the_cases_apart(answer, says):
    assert says in check(answer, [1, 2])


def test_the_small_model_speaks_the_large_ones_tokens(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = small_model(tmp_path / "small", like=tiny_model)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.num_hidden_layers == 1
    ids, expected = (AutoTokenizer.from_pretrained(p, local_files_only=True)("the cat") for p in (folder, tiny_model))
    assert ids == expected
