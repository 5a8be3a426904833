"""Everything in the package has a caller: the package, a notebook, or a library."""

import json
from pathlib import Path

import vulture

import minisft

PACKAGE = Path(minisft.__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
CALLED_BY_LIBRARIES = [
    *("on_*", "compute_loss", "training_step", "get_train_dataloader", "get_batch_samples"),  # transformers' Trainer
    *("_get_output_dir", "_save_checkpoint", "_save", "return_outputs", "gradient_as_bucket_view", "use_cache"),
    *("_repr_html_", "_repr_mimebundle_", "_render_traceback_", "showwarning"),  # IPython, warnings
    *("readable", "__reduce_ex__", "protocol", "memo"),  # io, pickle, copy
    *("hf_quantizer", "_name_or_path", "use_muon"),  # attributes that transformers and DeepSpeed read
    "_compute_score_from_stats",  # sacreBLEU
    *("hint", "solution"),  # learners
    *("kernelspec", "language_info", "nbformat_minor"),  # a notebook's metadata
    *("__signature__", "__annotations__", "list_commands"),  # typer makes the command line of them
    "_gguf_to_safetensors",  # `convert_gguf` calls it in a process of its own
]


def unused(package: Path, extra: str = "") -> list[str]:
    """What nothing calls: `file: name` of each. `extra` is code that uses the package."""
    finder = vulture.Vulture(ignore_names=CALLED_BY_LIBRARIES, ignore_decorators=["@app.command"])
    finder.scavenge([str(package)])
    finder.scan(extra, filename="notebooks")
    found = finder.get_unused_code(min_confidence=60)
    # Fields of records are read by their names in a file; an interface's are there for whoever implements it.
    return [
        f"{item.filename}: {item.name}" for item in found if item.typ != "variable" and item.filename != "notebooks"
    ]


def code_of_notebooks() -> str:
    cells = [cell for file in sorted(NOTEBOOKS.glob("*.ipynb")) for cell in json.loads(file.read_text())["cells"]]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line for source in sources if not source.startswith("%%") for line in source.splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def test_everything_is_used():
    assert unused(PACKAGE, code_of_notebooks()) == []


def test_a_function_without_a_caller_is_found(tmp_path):
    (tmp_path / "module.py").write_text("def forgotten():\n    return 1\n")
    assert [line.rpartition(" ")[2] for line in unused(tmp_path)] == ["forgotten"]
    assert unused(tmp_path, "forgotten()") == []
