"""Run the course's notebooks, each in a fresh kernel, and make an HTML book of them.

    minisft notebooks [--in-place] [--timeout S] [NOTEBOOK...]

Whatever ends a notebook (the last cell, an error, its time limit, Ctrl-C), nothing that its cells started keeps
running: training runs are processes of their own, and one that stays behind holds memory or a GPU.
"""

from __future__ import annotations

import asyncio
import html
import json
import logging
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from minisft.errors import UserError

DEFAULT_TIMEOUT = 1800.0  # seconds per notebook
HEARTBEAT = 30.0  # seconds between two signs of life of a long cell
GRACE = 5.0  # seconds that an interrupted cell, or a terminated process, has to end by itself
MARK = "MINISFT_NOTEBOOK_RUN"  # inherited by what a cell starts, so a process is found without its parent
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)")
NO_ALT = "No description has been provided for this image"  # nbconvert's words where the author had none
# nbconvert's own page has no place for alt text (7.17), and loads a script that only live widgets need.
PAGE = """{% extends 'index.html.j2' %}{% block html_head_js_requirejs %}{% endblock %}
{% block data_png %}<div class="jp-RenderedImage jp-OutputArea-output {{ extra_class }}">
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}"
{%- for key in ('alt', 'width', 'height') if output | get_metadata(key, 'image/png') %}
 {{ key }}="{{ output | get_metadata(key, 'image/png') | escape_html }}"{% endfor %}></div>{% endblock %}"""
INDEX = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>minisft: the notebooks</title>
<h1>The notebooks</h1><table cellpadding="6"><tr><th>Notebook<th>File<th>Status<th>Time</tr>{rows}</table></html>"""

say = partial(print, flush=True)
quiet = logging.Logger("minisft.book", level=100)  # a failure is reported once, by run_notebooks


@dataclass(frozen=True)
class Result:
    """How one notebook went."""

    notebook: Path
    ok: bool
    seconds: float
    cell: int | None = None  # the n of the `In [n]` that failed, if a cell is to blame
    error_tail: str = ""  # the first line of that cell, then the last lines of its error
    title: str = ""  # empty, as there is no page, where the file cannot be read
    images_without_alt: int = 0


def execute(root: Path, paths: list[Path] | None, in_place: bool = False, timeout: float | None = None) -> int:
    """Runs and reports; returns the exit code: 0, 1 if a notebook failed, 130 if interrupted."""
    out = Path(os.environ.get("MINISFT_OUTPUTS") or root / "outputs").absolute() / "notebooks"
    try:
        results = run_notebooks(paths, root=root, out=out, in_place=in_place, timeout=timeout)
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("Interrupted: the kernel and all that its cells started were ended.")
        return 130
    failed = [result.notebook.name for result in results if not result.ok]
    verdict = f"{len(failed)} failed ({', '.join(failed)})" if failed else "all ran"
    say(f"{len(results)} notebook(s): {verdict}. Read them in {out / 'index.html'}")
    return 1 if failed else 0


def run_notebooks(
    paths: list[Path] | None, *, root: Path, out: Path, in_place: bool = False, timeout: float | None = None
) -> list[Result]:
    """Runs `paths` (default: `notebooks/[0-9]*.ipynb` under `root`) one after the other, past failures too.

    Each has `metadata.minisft.timeout_seconds`, else `timeout`, else half an hour, as a whole. Writes to `out` the
    executed copies, an HTML page of each, and `index.html`. With `in_place`, a notebook that ran without failure
    also replaces its source. Raises UserError for a path that is no notebook.
    """
    root = root.resolve()
    notebooks = [Path(p).resolve() for p in paths or sorted((root / "notebooks").glob("[0-9]*.ipynb"))]
    if not notebooks:
        raise UserError(f"{root / 'notebooks'} holds no numbered notebook: name the ones to run")
    if timeout is not None and not timeout > 0:
        raise UserError(f"--timeout is {timeout:g}: give a positive number of seconds")
    if wrong := [path for path in notebooks if path.suffix != ".ipynb" or not path.is_file()]:
        raise UserError(f"{wrong[0]} is no notebook: give the path of a file that ends in .ipynb")
    results: list[Result] = []
    for number, path in enumerate(notebooks, 1):
        say(f"[{number}/{len(notebooks)}] {path.name}")
        result = _run(path, root, out, in_place, timeout)
        where = f", cell {result.cell}" if result.cell else ""
        tail = result.error_tail.replace("\n", "\n    ")
        say(f"  ok, {result.seconds:.1f} s" if result.ok else f"  FAILED {path.name}{where}:\n    {tail}")
        if result.images_without_alt:
            say(f'  warning: {result.images_without_alt} image(s) without alt text ("{NO_ALT}")')
        results.append(result)
        _index(out, results)
    return results


def _run(path: Path, root: Path, out: Path, in_place: bool, timeout: float | None) -> Result:
    """One notebook, from its source to its page."""
    import nbformat

    try:
        nb = _read(source := path.read_bytes())
        limit = (nb.metadata.get("minisft") or {}).get("timeout_seconds", timeout or DEFAULT_TIMEOUT)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
            raise ValueError(f"metadata.minisft.timeout_seconds is {limit!r}: give a positive number")
    except Exception as error:  # whatever is wrong with this file, the other notebooks still run
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Result(path, False, 0.0, error_tail=f"not a valid notebook: {reason}")
    started = time.monotonic()
    cell, tail = asyncio.run(_execute(nb, path.parent, limit))
    seconds = time.monotonic() - started
    _clean(nb, root)
    text = nbformat.writes(nb).rstrip("\n") + "\n"
    if in_place and not tail and path.read_bytes() != source:
        tail = "the file changed while it ran, so it was not replaced"
    elif in_place and not tail:
        _write(path, text)
    headings = (re.match("# +(.+)", cell.source) for cell in nb.cells if cell.cell_type == "markdown")
    title = next((heading[1].strip() for heading in headings if heading), path.stem)
    page = _page(nb, path.parent, title)
    _write(out / path.name, text)
    _write(out / f"{path.stem}.html", page)
    return Result(path, not tail, seconds, cell, _neutral(tail, root), title, page.count(f'alt="{NO_ALT}"'))


def _read(source: bytes) -> Any:
    """The notebook; a cell without an id gets one from its place, the same on every run, for small diffs."""
    import nbformat

    raw = json.loads(source)
    raw["nbformat_minor"] = max(5, raw["nbformat_minor"])
    for place, cell in enumerate(raw["cells"]):
        cell.setdefault("id", f"cell-{place:02d}")
    nb = nbformat.reads(json.dumps(raw), as_version=4)
    nbformat.validate(nb)
    return nb


async def _execute(nb: Any, folder: Path, limit: float) -> tuple[int | None, str]:
    """Runs `nb` in a fresh kernel, of which nothing is left; the number of the failed cell and its error, or ""."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    for number in (signal.SIGTERM, signal.SIGHUP):  # clean up after these as after Ctrl-C
        if signal.getsignal(number) != signal.SIG_IGN:
            with suppress(RuntimeError, ValueError):  # not in the main thread
                asyncio.get_running_loop().add_signal_handler(number, asyncio.current_task().cancel)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the cell of an interrupted notebook
    deadline, mark, children = time.monotonic() + limit, f"{os.getpid()}-{time.time_ns()}", set()
    # A shell's MPLBACKEND would keep the figures out of the notebook; in JupyterLab they are drawn inline.
    env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | {MARK: mark}
    # With no folder to search for kernelspecs, what is left is this very interpreter.
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), log=quiet)
    client = NotebookClient(nb, manager, record_timing=False, log=quiet, extra_arguments=["--log-level=ERROR"])
    cells = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]
    cells = [i for i in cells if client.skip_cells_with_tag not in nb.cells[i].metadata.get("tags", [])]
    for index in cells:  # below a failure, outputs of an earlier run would mislead
        nb.cells[index].update(outputs=[], execution_count=None)
    number = None
    try:
        await client.async_start_new_kernel(cwd=str(folder), env=env)
        await client.async_start_new_kernel_client()
        for number, index in enumerate(cells, 1):
            at = f"  cell {number:>{len(str(len(cells)))}}/{len(cells)}"
            if problem := await _run_cell(client, index, deadline, limit, at):
                return number, f"{nb.cells[index].source.strip().splitlines()[0]}\n{problem}"
        return None, ""
    except Exception as error:  # the kernel's own messages name the cause
        return number, f"the kernel did not start: {error}"
    finally:
        with suppress(psutil.Error, AttributeError):  # the kernel is gone, or never was
            children.update(psutil.Process(manager.provisioner.pid).children(recursive=True))
        try:
            with suppress(Exception):  # the kernel is dead already
                await manager.shutdown_kernel(now=sys.exc_info()[0] is not None)  # at once if interrupted
                client.kc.stop_channels()
        finally:  # also where a second signal cuts the shutdown short
            _end_processes(mark, children)


async def _run_cell(client: Any, index: int, deadline: float, limit: float, at: str) -> str:
    """Runs one cell; returns the last lines of what went wrong, or ""."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbformat.v4 import new_output

    cell, why, started = client.nb.cells[index], "", time.monotonic()
    task = asyncio.ensure_future(client.async_execute_cell(cell, index))
    while not task.done() and (left := deadline - time.monotonic()) > 0:
        await asyncio.wait({task}, timeout=min(HEARTBEAT, left))
        if not task.done() and time.monotonic() < deadline:
            say(f"{at} still running, {time.monotonic() - started:.0f} s")
    if not task.done():
        why = f"The time limit of this notebook, {limit:g} s, is used up."
        await client.km.interrupt_kernel()  # the traceback then shows where the cell was
        await asyncio.wait({task}, timeout=GRACE)
        task.cancel()
    error = (await asyncio.gather(task, return_exceptions=True))[0]
    above = client.nb.cells[max(0, index - 1)]
    headings = re.findall("(?m)^#{1,6} +(.+)", above.source) if above.cell_type == "markdown" else []
    first = next((line for line in cell.source.splitlines() if line.strip() and not line.startswith("%%")), "")
    say(f"{at} {time.monotonic() - started:6.1f} s  {(headings or [first])[0][:60]}")
    if isinstance(error, DeadKernelError) and not why:
        code = client.km.provisioner.process.poll()
        why = f"The kernel died: {f'exit code {code}' if code >= 0 else f'signal {-code}'}."
    elif isinstance(error, BaseException) and not isinstance(error, CellExecutionError):
        why = why or f"{type(error).__name__}: {error}"
    if why:  # readers of the executed copy should see it too
        cell.outputs.append(new_output("error", ename="Stopped", evalue=why, traceback=[why]))
    elif not isinstance(error, CellExecutionError):
        return ""
    lines = "\n".join(part for output in cell.outputs for part in output.get("traceback", [])).splitlines()
    return "\n".join(lines[-15:]) or str(error)


def _end_processes(mark: str, known: set[psutil.Process]) -> None:
    """Ends `known` and all that carry `mark`: some clear their environment, others have lost their parent."""

    def left() -> list[psutil.Process]:
        living = (p for p in psutil.process_iter(["environ", "status"]) if p.info["status"] != "zombie")
        return [p for p in living if p in known or (p.info["environ"] or {}).get(MARK) == mark]

    for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        for process in left():
            with suppress(psutil.Error):
                end(process)
        patience = time.monotonic() + GRACE
        while left() and time.monotonic() < patience:
            time.sleep(0.05)


def _neutral(text: str, root: Path) -> str:
    """`text` without colour codes and without what differs from one machine, or one run, to the next."""
    text = ANSI.sub("", text)
    places = {str(root): ".", str(Path.home()): "~", sys.prefix: "~/env"}
    for place in sorted(places.keys() - {"/"}, key=len, reverse=True):  # the environment may lie in the project
        text = re.sub(rf"(?<![\w.~-]){re.escape(place)}(?![\w-])", places[place], text)
    text = re.sub(r"[^\s\"'<>()]*/ipykernel_\d+/\d+\.py", "cell.py", text)
    return re.sub(r" at 0x[0-9a-f]{6,}", " at 0x…", text)


def _clean(nb: Any, root: Path) -> None:
    """Takes out of `nb` what a second run, or another machine, would change."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    nb.metadata.pop("widgets", None)  # random ids, and nothing to show without a live kernel
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"}
    for cell in (cell for cell in nb.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        # How stdout and stderr interleave is chance: between two figures, all of stdout comes first.
        groups = groupby(cell.outputs, lambda output: output.output_type == "stream")
        cell.outputs = [o for _, run in groups for o in sorted(run, key=lambda o: o.get("name") != "stdout")]
        CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, 0)  # of a progress bar, the last state stays
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            for part in (output, output.get("data", {})):
                for key in [key for key in part if key in ("text", "evalue") or key.startswith("text/")]:
                    part[key] = _neutral(part[key], root).replace("\r", "")
            if "traceback" in output:
                output.traceback = [_neutral(part, root) for part in output.traceback]


def _page(nb: Any, folder: Path, title: str) -> str:
    """`nb` as one HTML file that can be read offline: images are inside, links lead from page to page."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(raw_template=PAGE, embed_images=True, log=quiet)
    page, _ = exporter.from_notebook_node(nb, {"metadata": {"name": title, "path": str(folder)}})
    page = re.sub(r'href="([\w.-]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', page)
    return page.replace('<script src="http', '<script async src="http')  # the text does not wait for it


def _index(out: Path, results: list[Result]) -> None:
    rows = ""
    for result in results:
        file = html.escape(result.notebook.stem)
        link = f'<a href="{file}.html">{html.escape(result.title)}</a>' if result.title else file
        status = "ok" if result.ok else f"failed, cell {result.cell}" if result.cell else "failed"
        rows += f"\n<tr><td>{link}<td>{file}.ipynb<td>{status}<td>{result.seconds:.0f} s</tr>"
    _write(out / "index.html", INDEX.format(rows=rows))


def _write(path: Path, text: str) -> None:
    """All or nothing: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
