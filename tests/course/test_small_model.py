from minisft.course.small_model import small_model


def test_the_small_model_speaks_the_large_ones_tokens(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = small_model(tmp_path / "small", like=tiny_model)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.num_hidden_layers == 1
    ids, expected = (AutoTokenizer.from_pretrained(p, local_files_only=True)("the cat") for p in (folder, tiny_model))
    assert ids == expected
