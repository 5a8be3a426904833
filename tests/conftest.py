"""A tiny model and a small data set, made on the spot, so that most tests need no download."""

import io
import json
import os
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from minisft.chat.registry import template_for

# On a busy machine any example may take seconds; that says nothing about the code.
settings.register_profile("minisft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("minisft")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Combinations beyond one of each kind, which would take the whole suite over its twenty minutes.
AT_LENGTH = bool({"MINISFT_AT_LENGTH", "MINISFT_CHAOS"} & os.environ.keys())
at_length = pytest.mark.skipif(not AT_LENGTH, reason="one more of its kind: MINISFT_AT_LENGTH=1 runs it")

RHYME = "the cat sat on a mat and saw red rain over old stone walls while small birds sang new songs"
WORDS = RHYME.split()


def sharegpt_row(row_id: str, *turns: tuple[str, str]) -> dict:
    return {"id": row_id, "conversations": [{"from": role, "value": value} for role, value in turns]}


def write_sharegpt(path: Path, rows: int, seed: int = 0) -> Path:
    """Conversations of unequal lengths, one to three exchanges each."""
    chance = random.Random(seed)

    def say() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))

    made = []
    for i in range(rows):
        turns = [turn for _ in range(chance.randint(1, 3)) for turn in (("human", say()), ("gpt", say()))]
        made.append(sharegpt_row(f"row{i:04d}", *turns))
    path.write_text(json.dumps(made))
    return path


def minisft(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line, called within this process: what a process of its own would load takes seconds each time."""
    from minisft import cli

    words = ["minisft", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    patches = mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", words)
    with patches[0], patches[1], redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main()
    return subprocess.CompletedProcess(words, ended.value.code or 0, out.getvalue(), err.getvalue())


def save_checkpoint(model: object, tokenizer_folder: Path, folder: Path) -> None:
    """A checkpoint as a run leaves it: weights, config, tokenizer with its chat template, and manifest."""
    from minisft.chat.tokenizers import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(tokenizer_folder)
    tokenizer.hf.chat_template = template_for(tokenizer).jinja()
    model.save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    write_manifest(folder)


def write_manifest(folder: Path, **about: object) -> None:
    """The manifest of a checkpoint as it is now."""
    from minisft.checksums import digest

    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    sums = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    (folder / "manifest.json").write_text(json.dumps({"files": sums} | about))


@pytest.fixture(autouse=True)
def own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test writes its runs into its own folder, and remembers checksums there."""
    monkeypatch.setenv("MINISFT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr("minisft.checksums.memory_folder", lambda: tmp_path / ".cache")
    return tmp_path / "outputs"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 40,000 random parameters with a byte-level tokenizer, as a model folder."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True) for name in ("<|pad|>", "<s>", "</s>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + " [INST] [/INST]"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharegpt(tmp_path_factory.mktemp("data") / "sharegpt.json", rows=120)
