"""Read, write and compare files safely: atomic writes, comparison by identity, validated JSON.

Files in a run folder or a cache may come from somebody else, or be damaged. So links are not
followed when this package writes its own files, JSON is validated against a declared shape in one
place, and a file that cannot be read is never treated as missing.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO, TypeVar

from minisft.errors import UserError
from minisft.text import one_line

T = TypeVar("T")
PRIVATE = 0o600
_WEIGHTS_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
)
_STREAM = re.compile(r"/(?:dev/fd|proc/self/fd)/(\d+)")
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


# --- paths -------------------------------------------------------------------------------------------------


def user_path(text: str | Path) -> Path:
    """A path given by the user, with `~` expanded.

    Raises `UserError` if the home folder cannot be found.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{str(text)!r} names a home folder that cannot be found: give a full path") from None


def cache_dir() -> Path:
    """The cache folder: `MINISFT_CACHE`, else `minisft` in the user's cache folder.

    Raises `UserError` if there is no home folder.
    """
    if chosen := os.environ.get("MINISFT_CACHE"):
        return user_path(chosen)
    try:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minisft"
    except UserError:
        raise UserError("there is no home folder for the cache: set MINISFT_CACHE to a folder") from None


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths mean the same file, however they are spelled.

    Neither needs to exist yet.
    """
    with suppress(OSError):
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def is_inside(file: Path, folder: Path) -> bool:
    """Whether `file` is `folder` or is below it, however both are spelled.

    `file` need not exist yet.
    """
    real = Path(os.path.realpath(file))
    return any(is_same_file(path, folder) for path in (real, *real.parents))


def require_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise `UserError` if an output is weights, is an input or in an input folder, or is another output."""
    outputs, inputs = list(outputs), list(inputs)
    for i, output in enumerate(outputs):
        if _is_special(output):
            continue
        _refuse_weights(output)
        for source in inputs:
            if is_inside(output, source):
                where = "is inside the folder" if source.is_dir() else "is the file"
                raise UserError(f"inputs and outputs must be different files: the output {output} {where} {source}")
        if any(is_same_file(output, other) for other in outputs[:i]):
            raise UserError(f"outputs must be different files: two of them are {output}")


# --- writing -----------------------------------------------------------------------------------------------


@contextmanager
def written_whole(file: Path, private: bool = False) -> Iterator[TextIO]:
    """Write a text file atomically: it replaces an earlier `file` only when the block succeeds.

    A link at `file` is replaced, never followed. With `private` only the owner may read the file.
    """
    scratch = file.with_name(f".minisft-{secrets.token_hex(6)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = os.open(scratch, flags, PRIVATE if private else 0o666)
    try:
        # Paths may contain bytes that are not UTF-8; they are written unchanged.
        with open(handle, "w", encoding="utf-8", errors="surrogateescape") as stream:  # noqa: PTH123
            yield stream
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def user_output(file: Path) -> Iterator[TextIO]:
    """Open an output file that the user named.

    A regular file is written atomically, through the user's link; a device or pipe is written
    directly. Raises `UserError` for a folder and for weights.
    """
    if file.is_dir():
        raise UserError(f"the output {file} is a folder: give the name of a file")
    _refuse_weights(file)
    number = _stream_number(file)
    if number is not None:
        with open(os.dup(number), "w", encoding="utf-8") as stream:  # noqa: PTH123
            yield stream
    elif _is_special(file):
        with file.open("w", encoding="utf-8") as stream:
            yield stream
    else:
        real = Path(os.path.realpath(file))
        with written_whole(real) as stream:
            with suppress(FileNotFoundError):  # an existing file keeps its permissions
                os.fchmod(stream.fileno(), stat.S_IMODE(real.stat().st_mode))
            yield stream


def _refuse_weights(output: Path) -> None:
    """Raise `UserError` if an output exists and has the name of weights, which are hard to make again."""
    suffixes = {Path(path).suffix.lower() for path in (output, os.path.realpath(output))}
    if not _WEIGHTS_SUFFIXES.isdisjoint(suffixes) and output.is_file():
        raise UserError(f"the output {output} exists and may be a model's weights: give the name of another file")


def _stream_number(file: Path) -> int | None:
    """The descriptor of the open stream that a path such as `/dev/stdout` means, or None."""
    path = os.path.normpath(file.absolute())
    match = _STREAM.fullmatch(path)
    return int(match[1]) if match else _STREAMS.get(path)


def _is_special(file: Path) -> bool:
    """Whether `file` is neither a regular file nor a folder: a device, a pipe, a socket."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return _stream_number(file) is not None
    return _stream_number(file) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def remove_all(path: Path) -> None:
    """Remove a folder with its contents, or a file, a link or a pipe itself.

    Errors are ignored. (`shutil.rmtree` alone would open a pipe, and block forever.)
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def write_json(file: Path, value: Any, private: bool = False) -> None:
    """Write `value` as JSON, atomically."""
    with written_whole(file, private) as stream:
        stream.write(as_json(value) + "\n")


def as_json(value: Any) -> str:
    """Indented JSON with unescaped Unicode.

    All is escaped if a text in it (a file name, for example) has bytes that are not UTF-8.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=2)
    return text


def open_own(file: Path, flags: int, private: bool = False) -> int:
    """Open a file in one of this package's folders, creating it if missing; returns the descriptor.

    Before an append to a file with several hard links (in a backup, for example), a copy replaces
    the file. Raises `UserError` for links, pipes and devices.
    """
    try:
        flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # never block on a pipe
        handle = os.open(file, flags, PRIVATE if private else 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise UserError(f"{file} is a link or a pipe, but must be a regular file: remove it") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{file} is not a regular file, but must be one: remove it")
    if flags & os.O_APPEND and os.fstat(handle).st_nlink > 1:
        os.close(handle)
        with file.open("rb") as before, written_whole(file, private) as copy:
            shutil.copyfileobj(before, copy.buffer)
        return open_own(file, flags, private)
    return handle


# --- reading -----------------------------------------------------------------------------------------------


def read_text(file: Path, errors: str = "strict", most: int | None = None) -> str | None:
    """The text of a regular file, or None if it does not exist.

    `errors` handles bytes that are not UTF-8, as in `bytes.decode`. Raises `UserError` if the file
    cannot be read or is larger than `most` bytes.
    """
    try:
        stream = open_regular(file)
    except FileNotFoundError:
        return None
    with stream:
        try:
            content = stream.read() if most is None else stream.read(most + 1)
            if most is not None and len(content) > most:
                raise UserError(f"{file} is larger than {most / 1e6:g} MB, far larger than a valid one: check the path")
            return content.decode(errors=errors)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason}): it is damaged") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): repair or remove it") from error


def open_regular(file: Path) -> io.BufferedReader:
    """Open a regular file for reading bytes.

    Raises `FileNotFoundError`, or `UserError` if it cannot be read or is not a regular file.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never block on a pipe
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError for a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{one_line(file)} cannot be read ({reason}): repair or remove it") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{file} is not a regular file: remove it")
    return os.fdopen(handle, "rb")


def last_lines(file: Path) -> list[str]:
    """The lines in the last 64 KiB of a log; empty if it cannot be read."""
    with suppress(OSError, UserError), open_regular(file) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 16)))
        return stream.read(1 << 16).decode(errors="replace").splitlines()
    return []


class Tail:
    """The complete lines that were added to a log since the last look; none while it cannot be read."""

    def __init__(self, file: Path):
        self.file, self._offset = file, 0  # in bytes

    def new_lines(self) -> list[str]:
        data = b""
        with suppress(OSError, UserError), open_regular(self.file) as stream:
            if stream.seek(0, os.SEEK_END) < self._offset:  # truncated, as metrics are when a run resumes
                self._offset = 0
            stream.seek(self._offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


def read_json(file: Path, shape: type[T] | Any = None, most: int | None = None) -> T | Any:
    """The JSON value in a file, or None if the file does not exist.

    `shape` is the type that the value must have (a dataclass, a `TypedDict`, `dict[str, int]`, …);
    without it any JSON is accepted. Raises `UserError` if the file is damaged, has another shape,
    or is larger than `most` bytes.
    """
    text = read_text(file, most=most)
    return None if text is None else parse_json(text, file, shape)


def parse_json(
    text: str,
    file: Path,
    shape: type[T] | Any = None,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> T | Any:
    """`read_json` for text that has been read already; the `UserError` names `file`.

    Without a shape, `pairs` makes a value of each object's names and values, as in `json.loads`.
    """
    if shape is not None:
        return _validated(text, shape, file)
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({str(error)[:200]}): it is damaged") from error


def checked(value: Any, shape: type[T] | Any, file: Path) -> T | Any:
    """Validate a part of a file's JSON as `shape`.

    Raises `UserError`, which names `file` and the first key that differs.
    """
    return _validated(json.dumps(value), shape, file)


def _validated(text: str, shape: Any, file: Path) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise UserError(f"{file} is not valid JSON ({first['msg'][:200]}): it is damaged") from error
        keys = ".".join(map(str, first["loc"]))[:100]
        what = f"{keys}: {first['msg']}" if keys else first["msg"]
        raise UserError(f"{file} does not have the expected content ({what[:300]}): it is damaged") from error


@cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)
