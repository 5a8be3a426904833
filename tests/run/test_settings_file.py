"""Settings from a YAML file or a run.json: each value as it is written, or one sentence that says what is wrong."""

import json

import pytest

from minisft.errors import UserError
from minisft.run.config import SETTINGS, RunConfig
from minisft.run.settings_file import read_values


@pytest.fixture
def file(tmp_path):
    return tmp_path / "own.yaml"


def test_values_have_the_types_of_their_settings(file):
    file.write_text(
        "# mine\nlearning_rate: 8e-6\nmax_steps: 3\nresumable: false\nmax_rows: null\nname: 'seven'\nepochs: 2\n"
    )
    config = RunConfig.from_file(file, strategy="zero2")
    assert (config.learning_rate, config.max_steps, config.resumable) == (8e-6, 3, False)
    assert (config.max_rows, config.name, config.epochs, config.strategy) == (None, "seven", 2, "zero2")


def test_any_run_json_is_a_settings_file(file):
    config = RunConfig(strategy="zero1", ranks=3, seed=7)
    file.write_text(json.dumps({"config": config.to_dict(), "model_folder": "/elsewhere"}))
    assert RunConfig.from_file(file) == config
    assert RunConfig.from_file(file, seed=8).seed == 8


def test_the_values_given_take_precedence_and_every_setting_can_be_given(file):
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in RunConfig().to_dict().items()))
    assert set(read_values(file)) == set(SETTINGS)
    assert RunConfig.from_file(file) == RunConfig()


@pytest.mark.attack("1")
def test_a_file_gives_no_consent(file, capsys):
    file.write_text("trust_remote_code: true\n")
    assert not RunConfig.from_file(file, strategy="vanilla").trust_remote_code
    assert "--trust-remote-code" in capsys.readouterr().err
    assert RunConfig.from_file(file, strategy="vanilla", trust_remote_code=True).trust_remote_code


@pytest.mark.attack("9")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("global_batch: 8\nbatch_size: 2\n", "both global_batch and batch_size"),
        ("seed: 1\nseed: 2\n", "seed is there twice"),
        ("config: {strategy: zero2}\nlearning_rate: 1e-3\n", "config is not a single value"),
        ('{"seed": 1, "seed": 2}', "seed is there twice"),
        ('{"config": {"seed": 5}, "learning_rate": 0.5}', "config is not a single value"),
        ("lerning_rate: 1\n", "lerning_rate"),
        ("strategy: vanilla\nranks: 4\n", "runs in one process, but ranks is 4"),
        ("epochs: 1:30\n", "epochs"),
        ("seed: 010\n", "seed"),
        ("global_batch: true\n", "global_batch is True"),
        ("batch_size: [8]\n", "batch_size is not a single value"),
        ("- 1\n", "does not hold settings"),
        ("a: b: c\n", "is not valid YAML"),
    ],
)
def test_nothing_is_dropped_or_reinterpreted_in_silence(file, text, says):
    file.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        RunConfig.from_file(file)
    assert "\n" not in str(error.value)


@pytest.mark.attack("15")
@pytest.mark.parametrize("value", ["!!int ''", "!!bool maybe", "!!timestamp x", "0x" + "F" * 5000, "9" * 5000, ".nan"])
def test_no_value_is_a_traceback(file, value):
    file.write_text(f"learning_rate: {value}\n")
    with pytest.raises(UserError):
        RunConfig.from_file(file)


@pytest.mark.attack("12")
def test_merged_mappings_do_not_multiply(file):
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="a0 is not a single value"):
        RunConfig.from_file(file)
    file.write_text("ranks: " + ":".join(["1"] * 400_000))
    with pytest.raises(UserError):
        RunConfig.from_file(file)


def test_a_global_batch_that_ranks_do_not_divide_is_told(file, capsys):
    file.write_text("global_batch: 8\n")
    assert RunConfig.from_file(file, strategy="zero2", ranks=3).global_batch == 6
    assert "The global batch is 6 rows, not 8" in capsys.readouterr().err
