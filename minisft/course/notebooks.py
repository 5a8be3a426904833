"""Run the course's notebooks, each in a fresh kernel, and write an HTML page of each.

    minisft notebooks [--in-place] [--timeout S] [NOTEBOOK...]

The Markdown pages beside the course's notebooks (glossary, notes for teachers) become HTML pages too.

However a notebook ends (last cell, error, time limit, Ctrl-C), every process that its cells started
is ended too: training runs are separate processes, and a leftover one holds memory or a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from minisft.course.classroom import STAND_INS
from minisft.course.html_page import NO_ALT, index_of, markdown_page, page_of, quiet, title_of
from minisft.course.notebook_cleanup import clean_notebook, neutral_text
from minisft.errors import UserError
from minisft.files import is_same_file, parse_json, read_text, user_path, written_whole
from minisft.processes import environment, lives, marked
from minisft.text import one_line, say

DEFAULT_TIMEOUT = 1800.0  # seconds per notebook
MOST_SECONDS = 1e9
HEARTBEAT = 30.0  # seconds between progress lines of a long cell
GRACE = 5.0  # seconds that an interrupted cell or a terminated process gets before it is killed
MARK = "MINISFT_NOTEBOOK_RUN"  # environment variable that a cell's processes inherit; finds orphans too


@dataclass(frozen=True)
class NotebookResult:
    """The result of running one notebook."""

    notebook: Path
    ok: bool
    seconds: float
    cell: int | None = None  # number of the cell that failed, as in `In [n]`; None if no cell failed
    error_tail: str = ""  # the first line of that cell, then the last lines of its error
    title: str = ""  # empty if the file is not a valid notebook, so has no page
    images_without_alt: int = 0


def execute(root: Path, paths: list[Path] | None, in_place: bool = False, timeout: float | None = None) -> int:
    """Run the notebooks and print a summary; returns the exit code: 0, 1 if one failed, 130 if
    interrupted.
    """
    out = user_path(os.environ.get("MINISFT_OUTPUTS") or root / "outputs").absolute() / "notebooks"
    try:
        results = run_notebooks(paths, root=root, out=out, in_place=in_place, timeout=timeout)
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("Interrupted: the kernel and every process that its cells started have been ended.")
        return 130
    failed = [result.notebook.name for result in results if not result.ok]
    verdict = f"{len(failed)} failed ({', '.join(failed)})" if failed else "all ran"
    say(f"{len(results)} notebook(s): {verdict}. Read them in {out / 'index.html'}")
    return 1 if failed else 0


def run_notebooks(
    paths: list[Path] | None, *, root: Path, out: Path, in_place: bool = False, timeout: float | None = None
) -> list[NotebookResult]:
    """Run `paths` (default: `notebooks/[0-9]*.ipynb` under `root`) one by one, continuing after
    failures.

    The time limit of a whole notebook is `metadata.minisft.timeout_seconds`, else `timeout`, else
    half an hour. Writes to `out` the executed copies, an HTML page of each, of each Markdown file in
    `notebooks/`, and `index.html`. With `in_place`, a notebook that succeeded also replaces its
    source. Raises `UserError` for a path that is not a notebook.
    """
    root = root.resolve()
    named = paths or sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    notebooks = [Path(os.path.realpath(user_path(path))) for path in named]
    if not notebooks:
        raise UserError(f"{root / 'notebooks'} contains no numbered notebook: name the ones to run")
    if timeout is not None and not timeout > 0:
        raise UserError(f"--timeout is {timeout:g}: give a positive number of seconds")
    if invalid := [path for path in notebooks if path.suffix != ".ipynb" or not path.is_file()]:
        raise UserError(f"{invalid[0]} is not a notebook: give the path of a file that ends in .ipynb")
    markdown = sorted((root / "notebooks").glob("*.md"))
    _require_distinct_outputs(notebooks, markdown, out, in_place)
    pages = [page for path in markdown if (page := _write_markdown_page(path, out))]
    results: list[NotebookResult] = []
    for number, path in enumerate(notebooks, 1):
        say(f"[{number}/{len(notebooks)}] {path.name}")
        result = _run(path, root, out, in_place, timeout)
        where = f", cell {result.cell}" if result.cell else ""
        tail = result.error_tail.replace("\n", "\n    ")
        say(f"  ok, {result.seconds:.1f} s" if result.ok else f"  FAILED {path.name}{where}:\n    {tail}")
        if result.images_without_alt:
            say(f'  warning: {result.images_without_alt} image(s) without alt text ("{NO_ALT}")')
        results.append(result)
        _write(out / "index.html", index_of([_row(result) for result in results], pages))
    return results


def _require_distinct_outputs(notebooks: list[Path], markdown: list[Path], out: Path, in_place: bool) -> None:
    """Raise `UserError` if an output would overwrite a source, the index or another output."""
    stems = Counter(["index", *(path.stem for path in notebooks + markdown)])
    if duplicates := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(f"two pages would have one name, {duplicates[0]}.html: rename a notebook")
    if not in_place and (overwritten := [path for path in notebooks if is_same_file(out / path.name, path)]):
        raise UserError(f"{overwritten[0]} would be replaced by its executed copy: move it, or give --in-place")


def _write_markdown_page(path: Path, out: Path) -> tuple[str, str] | None:
    """Write the HTML page of a Markdown file; returns its stem and title, or None if it cannot be read."""
    try:
        title, page = markdown_page(path)
    except UserError as error:  # the notebooks still run
        say(f"warning: no page of {path.name}: {error}")
        return None
    _write(out / f"{path.stem}.html", page)
    return path.stem, title


def _row(result: NotebookResult) -> tuple[str, str, str, float]:
    status = "ok" if result.ok else f"failed, cell {result.cell}" if result.cell else "failed"
    return result.notebook.stem, result.title, status, result.seconds


def _run(path: Path, root: Path, out: Path, in_place: bool, timeout: float | None) -> NotebookResult:
    """Run one notebook and write its executed copy and its page to `out`."""
    import nbformat

    try:
        source = read_text(path)
        nb = parsed(source or "", path)
        limit = _time_limit(nb, timeout)
    except UserError as error:  # the other notebooks still run
        return NotebookResult(path, False, 0.0, error_tail=f"not a valid notebook: {error}")
    started = time.monotonic()
    cell, tail = asyncio.run(_execute(nb, path.parent, limit))
    seconds = time.monotonic() - started
    clean_notebook(nb, root)
    text = nbformat.writes(nb).rstrip("\n") + "\n"
    if in_place and not tail and read_text(path) != source:
        tail = "the file changed while it ran, so it was not replaced"
    elif in_place and not tail:
        _write(path, text)
    title = title_of(nb, path.stem)
    page = page_of(nb, path.parent, title)
    _write(out / path.name, text)
    _write(out / f"{path.stem}.html", page)
    return NotebookResult(path, not tail, seconds, cell, neutral_text(tail, root), title, page.count(f'alt="{NO_ALT}"'))


def parsed(source: str, path: Path) -> Any:
    """Parse the notebook; a cell without an id gets one from its position, so reruns give small
    diffs.
    """
    import nbformat

    raw = parse_json(source, path, dict[str, Any])
    try:
        raw["nbformat_minor"] = max(5, raw["nbformat_minor"])
        for position, cell in enumerate(raw["cells"]):
            cell.setdefault("id", f"cell-{position:02d}")
        nbformat.validate(raw)  # before reads(), which assumes a valid shape
        return nbformat.reads(json.dumps(raw), as_version=4)
    except Exception as error:  # a file of another shape raises exceptions of many types
        raise UserError(f"{path} does not have the expected content ({one_line(error, 200)})") from error


def _time_limit(nb: Any, timeout: float | None) -> float:
    """Seconds that the whole notebook may take. Raises `UserError` for invalid metadata."""
    settings = nb.metadata.get("minisft") or {}
    if not isinstance(settings, dict):
        raise UserError(f"metadata.minisft is {one_line(repr(settings), 80)}: it must be an object")
    limit = settings.get("timeout_seconds", timeout or DEFAULT_TIMEOUT)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < MOST_SECONDS:
        raise UserError(f"metadata.minisft.timeout_seconds is {one_line(repr(limit), 80)}: give a positive number")
    return limit


async def _execute(nb: Any, folder: Path, limit: float) -> tuple[int | None, str]:
    """Run `nb` in a fresh kernel and end all its processes; returns (failed cell, error), or (None,
    "").
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    this_task = asyncio.current_task()
    assert this_task is not None  # a coroutine runs in a task
    for ending in (signal.SIGTERM, signal.SIGHUP):  # handle these like Ctrl-C, with cleanup
        if signal.getsignal(ending) != signal.SIG_IGN:
            with suppress(RuntimeError, ValueError):  # not in the main thread
                asyncio.get_running_loop().add_signal_handler(ending, this_task.cancel)
    asyncio.get_running_loop().set_exception_handler(
        lambda *_: None
    )  # silence the cell task of an interrupted notebook
    deadline, mark, children = time.monotonic() + limit, f"{os.getpid()}-{time.time_ns()}", set()
    # An inherited MPLBACKEND would disable inline figures.
    env = {key: value for key, value in environment().items() if key != "MPLBACKEND"}
    env |= {MARK: mark, STAND_INS: "1"}
    # With no kernelspec folders to search, the kernel is always this interpreter.
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), log=quiet)
    client = NotebookClient(nb, manager, record_timing=False, log=quiet, extra_arguments=["--log-level=ERROR"])
    cells = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]
    cells = [i for i in cells if client.skip_cells_with_tag not in nb.cells[i].metadata.get("tags", [])]
    for index in cells:  # clear old outputs, so none remain below a failed cell
        nb.cells[index].update(outputs=[], execution_count=None)
    number: int | None = None
    try:
        await client.async_start_new_kernel(cwd=str(folder), env=env)
        await client.async_start_new_kernel_client()
        for number, index in enumerate(cells, 1):
            prefix = f"  cell {number:>{len(str(len(cells)))}}/{len(cells)}"
            if problem := await _run_cell(client, index, deadline, limit, prefix):
                return number, f"{nb.cells[index].source.strip().splitlines()[0]}\n{problem}"
        return None, ""
    except Exception as error:  # any startup failure; the error names the cause
        return number, f"the kernel did not start: {error}"
    finally:
        provisioner: Any = manager.provisioner
        with suppress(psutil.Error, AttributeError):  # the kernel exited or never started
            children.update(psutil.Process(provisioner.pid).children(recursive=True))
        try:
            with suppress(Exception):  # the kernel may be dead already
                await manager.shutdown_kernel(now=sys.exc_info()[0] is not None)  # immediately if interrupted
                if client.kc is not None:
                    client.kc.stop_channels()
        finally:  # even if a second signal interrupts the shutdown
            _end_processes(mark, children)


async def _run_cell(client: Any, index: int, deadline: float, limit: float, prefix: str) -> str:
    """Run one cell; returns the last 15 lines of its error, or "" if it succeeded.

    `deadline` is a `time.monotonic()` value; `limit` is the notebook's time limit in seconds, for
    the message.
    """
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbformat.v4 import new_output

    cell, reason, started = client.nb.cells[index], "", time.monotonic()
    task = asyncio.ensure_future(client.async_execute_cell(cell, index))
    while not task.done() and (seconds_left := deadline - time.monotonic()) > 0:
        await asyncio.wait({task}, timeout=min(HEARTBEAT, seconds_left))
        if not task.done() and time.monotonic() < deadline:
            say(f"{prefix} still running, {time.monotonic() - started:.0f} s")
    if not task.done():
        reason = f"The time limit of this notebook, {limit:g} s, has expired."
        await client.km.interrupt_kernel()  # the traceback then shows where the cell was
        await asyncio.wait({task}, timeout=GRACE)
        task.cancel()
    error = (await asyncio.gather(task, return_exceptions=True))[0]
    above = client.nb.cells[max(0, index - 1)]
    headings = re.findall("(?m)^#{1,6} +(.+)", above.source) if above.cell_type == "markdown" else []
    first_line = next((line for line in cell.source.splitlines() if line.strip() and not line.startswith("%%")), "")
    say(f"{prefix} {time.monotonic() - started:6.1f} s  {(headings or [first_line])[0][:60]}")
    if isinstance(error, DeadKernelError) and not reason:
        code = client.km.provisioner.process.poll()
        reason = f"The kernel died: {f'exit code {code}' if code >= 0 else f'signal {-code}'}."
    elif isinstance(error, BaseException) and not isinstance(error, CellExecutionError):
        reason = reason or f"{type(error).__name__}: {error}"
    if reason:  # show it in the executed copy too
        cell.outputs.append(new_output("error", ename="Stopped", evalue=reason, traceback=[reason]))
    elif not isinstance(error, CellExecutionError):
        return ""
    lines = "\n".join(part for output in cell.outputs for part in output.get("traceback", [])).splitlines()
    return "\n".join(lines[-15:]) or str(error)


def _end_processes(mark: str, known: set[psutil.Process]) -> None:
    """End `known` and every process with `mark` in its environment.

    Both are needed: a child may clear its environment, and an orphan is no longer among the
    kernel's children.
    """

    def survivors() -> list[psutil.Process]:
        return [process for process in {*known, *marked(MARK, mark)} if lives(process.pid)]

    for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        for process in survivors():
            with suppress(psutil.Error):
                end(process)
        grace_end = time.monotonic() + GRACE
        while survivors() and time.monotonic() < grace_end:
            time.sleep(0.05)


def _write(path: Path, text: str) -> None:
    """Write the file atomically, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as stream:
        stream.write(text)
