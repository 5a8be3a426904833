"""Real kernels run these notebooks; the cells are tiny, so that each test takes a second or two."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minisft.course import notebooks
from minisft.errors import UserError

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def write(folder: Path, name: str, *cells, **metadata) -> Path:
    """A notebook of code cells (strings; those that start with # and a space are markdown)."""
    made = [new_markdown_cell(c) if c.startswith("# ") else new_code_cell(c) for c in cells]
    path = folder / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=made, metadata=metadata), path)
    return path


def run_one(root: Path, path: Path, **options) -> tuple[notebooks.NotebookResult, nbformat.NotebookNode, str]:
    """The result of one notebook, its executed copy and its page."""
    out = root / "outputs" / "notebooks"
    (result,) = notebooks.run_notebooks([path], root=root, out=out, **options)
    page = (out / f"{path.stem}.html").read_text(encoding="utf-8")
    return result, nbformat.read(out / path.name, as_version=4), page


def sleeper(pid_file: Path, options: str = "start_new_session=True") -> str:
    """Source of a cell that starts a process meant to outlive its kernel, and notes its pid."""
    return (
        "import pathlib, subprocess\n"
        f"child = subprocess.Popen(['sleep', '300'], {options})\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
    )


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_success_writes_the_copy_the_page_and_the_index(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    write(tmp_path, "00_one", "# <script>alert(1)</script> & co", "import os, sys\nprint(os.getcwd(), sys.executable)")
    write(tmp_path, "01_two", "# Two", "import os\nos.environ.get('MPLBACKEND')", "6 * 7")
    write(tmp_path, "draft", "raise SystemError('only numbered notebooks belong to the course')")

    assert notebooks.execute(tmp_path, None) == 0

    out = tmp_path / "outputs" / "notebooks"
    assert {p.name for p in out.iterdir()} == {
        "00_one.ipynb",
        "00_one.html",
        "01_two.ipynb",
        "01_two.html",
        "index.html",
    }
    first = nbformat.read(out / "00_one.ipynb", as_version=4)
    # The kernel is this interpreter, in the notebook's folder; neither path is left in the outputs.
    assert first.cells[1].outputs[0].text == f"./notebooks ~/env/bin/{Path(sys.executable).name}\n"
    second = nbformat.read(out / "01_two.ipynb", as_version=4)
    assert "agg" not in second.cells[1].outputs[0].data["text/plain"]
    assert second.cells[2].outputs[0].data["text/plain"] == "42"
    assert "42" in (out / "01_two.html").read_text(encoding="utf-8")
    index = (out / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in index
    assert '<a href="00_one.html">&lt;script&gt;alert(1)&lt;/script&gt; &amp; co</a>' in index
    assert '<a href="01_two.html">Two</a>' in index
    printed = capsys.readouterr().out
    assert "[2/2] 01_two.ipynb" in printed
    assert "  cell 2/2 " in printed


def test_markdown_pages_beside_the_notebooks_are_in_the_book(tmp_path, capsys):
    write(tmp_path, "00_one", "# One\n[terms](terms.md#rank)")
    folder = tmp_path / "notebooks"
    (folder / "dot.png").write_bytes(base64.b64decode(PIXEL))
    text = "# Terms & <b>more</b>\n- **rank**: a process. ([00](00_one.ipynb))\n\n![a dot](dot.png)"
    (folder / "terms.md").write_text(f"{text}\n\n<script>alert('active')</script>")
    (folder / "damaged.md").write_bytes(b"\xff")

    assert notebooks.execute(tmp_path, None) == 0

    out = tmp_path / "outputs" / "notebooks"
    assert 'href="terms.html#rank"' in (out / "00_one.html").read_text()
    page = (out / "terms.html").read_text()
    assert 'href="00_one.html"' in page and "<strong>rank</strong>" in page and PIXEL in page
    assert "<script" not in page
    index = (out / "index.html").read_text()
    assert '<a href="terms.html">Terms &amp; &lt;b&gt;more&lt;/b&gt;</a><td>terms.md' in index
    assert "warning: no page of damaged.md" in capsys.readouterr().out and "damaged" not in index


def test_an_exception_names_its_cell_spares_the_source_and_the_next_notebook_still_runs(tmp_path, capsys):
    bad = write(
        tmp_path, "00_bad", "x = 1", "", "def f():\n    raise ValueError('\\x1b[31mred\\x1b[0m herring')\nf()", "x = 2"
    )
    good = write(tmp_path, "01_good", "print('ran')")

    before = bad.read_bytes()

    assert notebooks.execute(tmp_path, [bad, good], in_place=True) == 1

    assert bad.read_bytes() == before
    assert nbformat.read(good, as_version=4).cells[0].execution_count == 1

    out = tmp_path / "outputs" / "notebooks"
    copy = nbformat.read(out / "00_bad.ipynb", as_version=4)
    assert copy.cells[2].outputs[0].ename == "ValueError"
    assert copy.cells[3].execution_count is None
    assert "red herring" in (out / "00_bad.html").read_text(encoding="utf-8")
    assert "ran" in nbformat.read(out / "01_good.ipynb", as_version=4).cells[0].outputs[0].text
    index = (out / "index.html").read_text(encoding="utf-8")
    assert "failed, cell 2" in index
    assert "01_good.html" in index
    printed = capsys.readouterr().out
    assert "FAILED 00_bad.ipynb, cell 2:\n    def f():\n" in printed
    assert "ValueError: red herring" in printed
    assert "\x1b" not in printed
    assert "1 failed (00_bad.ipynb)" in printed


def test_the_time_limit_ends_the_notebook_and_all_that_it_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "HEARTBEAT", 0.5)
    marked, bare = tmp_path / "marked.pid", tmp_path / "bare.pid"
    cells = sleeper(marked), sleeper(bare, "start_new_session=True, env={}"), "import time\ntime.sleep(60)"
    path = write(tmp_path, "slow", *cells, minisft={"timeout_seconds": 3})

    started = time.monotonic()
    result, copy, _ = run_one(tmp_path, path, timeout=1000)

    assert time.monotonic() - started < 15
    assert (result.ok, result.cell) == (False, 3)
    assert result.error_tail.startswith("import time\n")
    assert "time limit of this notebook, 3 s" in result.error_tail
    assert [output.ename for output in copy.cells[2].outputs] == ["KeyboardInterrupt", "Stopped"]
    assert "cell 3/3 still running" in capsys.readouterr().out
    assert not is_running(int(marked.read_text()))
    assert not is_running(int(bare.read_text()))


@pytest.mark.parametrize(
    ("death", "why"), [("import os; os._exit(1)", "exit code 1"), ("import os; os.kill(os.getpid(), 9)", "signal 9")]
)
def test_a_dead_kernel_is_reported_and_leaves_nothing(tmp_path, death, why):
    pid = tmp_path / "child.pid"
    result, copy, _ = run_one(tmp_path, write(tmp_path, "dead", sleeper(pid), death, "print('never')"))

    assert (result.ok, result.cell) == (False, 2)
    assert why in result.error_tail
    assert why in copy.cells[1].outputs[0].evalue
    assert not is_running(int(pid.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_runner_leaves_nothing(tmp_path, number):
    pid = tmp_path / "child.pid"
    write(tmp_path, "00_long", sleeper(pid) + "import time\ntime.sleep(60)")
    # Tests that run in the background of a shell inherit a SIGINT that is ignored.
    code = "import sys, pathlib, signal; from minisft.course.notebooks import execute; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "sys.exit(execute(pathlib.Path(sys.argv[1]), None))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 20
    while not (pid.exists() and pid.read_text()) and time.monotonic() < patience:
        time.sleep(0.1)
    kernels = psutil.Process(runner.pid).children()

    runner.send_signal(number)
    printed, noise = runner.communicate(timeout=20)

    assert runner.returncode == 130
    assert "Interrupted" in printed
    assert noise == ""
    assert kernels
    assert not any(is_running(kernel.pid) for kernel in kernels)
    assert not is_running(int(pid.read_text()))


def test_in_place_gives_the_same_bytes_twice_and_no_trace_of_the_machine(tmp_path):
    noisy = f"""import os, sys, warnings
print("begin", flush=True)
print("to stderr", file=sys.stderr, flush=True)
print("\\x1b[32mgreen\\x1b[0m", object())
for step in range(3):
    print(f"\\rstep {{step}}", end="", flush=True)
print()
warnings.warn("careful")
print(os.getpid() > 0, {str(tmp_path)!r} + "/data", {str(tmp_path)!r} + "-else", os.path.expanduser("~/x"), sys.prefix)
"""
    path = write(tmp_path, "noisy", "# Noise", noisy, "from IPython.display import HTML\nHTML('<b>bold</b>')")
    raw = json.loads(path.read_text())
    for cell in raw["cells"]:
        del cell["id"]
    raw["nbformat_minor"] = 4
    raw["metadata"]["language_info"] = {"name": "python", "version": "3.11.4"}
    raw["cells"][1]["metadata"]["execution"] = {"iopub.status.busy": "2024-01-01T00:00:00Z"}
    path.write_text(json.dumps(raw))

    written = []
    for _ in range(2):
        result, _, _ = run_one(tmp_path, path, in_place=True)
        assert result.ok
        written.append(path.read_bytes())

    assert written[0] == written[1]
    nb = nbformat.read(path, as_version=4)
    assert [cell.id for cell in nb.cells] == ["cell-00", "cell-01", "cell-02"]
    assert nb.metadata.kernelspec.name == "python3"
    assert "version" not in nb.metadata.language_info
    assert "execution" not in nb.cells[1].metadata
    out, err = nb.cells[1].outputs
    assert out.text == (f"begin\ngreen <object object at 0x…>\nstep 2\nTrue ./data {tmp_path}-else ~/x ~/env\n")
    assert err.text.startswith("to stderr\ncell.py:8: UserWarning: careful\n")


def test_a_notebook_that_changed_while_it_ran_is_not_overwritten(tmp_path):
    path = write(tmp_path, "edited", "open('edited.ipynb', 'a').write(' ')")
    before = path.read_bytes()

    result, _, _ = run_one(tmp_path, path, in_place=True)

    assert not result.ok
    assert "changed while it ran" in result.error_tail
    assert path.read_bytes() == before + b" "


def test_images_carry_their_alt_text_into_the_copy_and_the_page(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "dot.png").write_bytes(base64.b64decode(PIXEL))
    show = (
        "from base64 import b64decode\nfrom IPython.display import Image, display\n"
        f"data = b64decode('{PIXEL}')\n"
        "display(Image(data, alt='Loss <falls> to \"2\"'))"
    )
    bare = "display(Image(data))"
    links = "# Links\n[next](01_next.ipynb#top) ![a dot](dot.png)"
    result, copy, page = run_one(tmp_path, write(tmp_path, "images", links, show, bare))

    assert result.images_without_alt == 1
    assert copy.cells[1].outputs[0].metadata["image/png"]["alt"] == 'Loss <falls> to "2"'
    assert "alt='Loss &lt;falls&gt; to \"2\"'" in page
    assert page.count(f'src="data:image/png;base64,{PIXEL}"') == 3
    assert 'href="01_next.html#top"' in page


def test_tags_are_respected_and_nothing_is_left_at_the_normal_end(tmp_path):
    pid = tmp_path / "child.pid"
    path = write(tmp_path, "tags", "1 / 0", "2 / 0", sleeper(pid))
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].metadata["tags"] = ["skip-execution"]
    nb.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="from a GPU\n")]
    nb.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(nb, path)

    result, copy, _ = run_one(tmp_path, path)

    assert result.ok
    assert copy.cells[0].outputs[0].text == "from a GPU\n"
    assert copy.cells[1].outputs[0].ename == "ZeroDivisionError"
    assert not is_running(int(pid.read_text()))


@pytest.mark.parametrize(
    "text", ["{not json", "[]", '{"nbformat": 4}', '{"nbformat": 4, "nbformat_minor": 5, "cells": [{}]}']
)
def test_a_broken_file_is_reported(tmp_path, capsys, text):
    path = write(tmp_path, "00_broken")
    path.write_text(text)

    assert notebooks.execute(tmp_path, None) == 1
    assert "FAILED 00_broken.ipynb:\n    not a valid notebook: " in capsys.readouterr().out
    index = (tmp_path / "outputs" / "notebooks" / "index.html").read_text(encoding="utf-8")
    assert "00_broken.ipynb<td>failed" in index


def test_a_limit_that_is_no_number_is_reported(tmp_path):
    path = write(tmp_path, "odd", "1", minisft={"timeout_seconds": "soon"})
    (result,) = notebooks.run_notebooks([path], root=tmp_path, out=tmp_path / "out")
    assert "timeout_seconds is 'soon'" in result.error_tail


HEAD = '"nbformat": 4, "nbformat_minor": 5'
WRONG = [
    '{"nbformat": 3, "nbformat_minor": 0, "worksheets": [], "metadata": {}}',
    '{"nbformat": 4, "nbformat_minor": "5", "cells": [], "metadata": {}}',
    '{HEAD, "cells": {}, "metadata": {}}',
    '{HEAD, "cells": [5], "metadata": {}}',
    '{HEAD, "cells": [], "metadata": []}',
    '{HEAD, "cells": [], "metadata": {"minisft": "x"}}',
    '{HEAD, "cells": [], "metadata": {"minisft": {"timeout_seconds": 1e400}}}',
    '{HEAD, "cells": [], "metadata": {"minisft": {"timeout_seconds": NaN}}}',
    '{HEAD, "cells": [], "metadata": {"minisft": {"timeout_seconds": true}}}',
    '{HEAD, "cells": [], "metadata": {"minisft": {"timeout_seconds": 1' + "0" * 400 + "}}}",
    '{HEAD, "cells": [{"cell_type": "markdown", "metadata": {}, "source": "\\ud800"}]}',
    '{HEAD, "cells": [{"cell_type": "code", "metadata": 3, "source": 5}], "metadata": {}}',
    "[" * 100_000,
    "\udcff",
]


@pytest.mark.attack("15")
@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_notebook_of_another_shape_is_one_sentence(tmp_path, text):
    path = write(tmp_path, "00_odd")
    path.write_bytes(text.replace("HEAD", HEAD).encode(errors="surrogateescape"))
    (result,) = notebooks.run_notebooks([path], root=tmp_path, out=tmp_path / "out")
    assert result.error_tail.startswith("not a valid notebook: ")
    assert len(result.error_tail.splitlines()) == 1
    assert len(result.error_tail) < 700


@pytest.mark.attack("15")
def test_names_and_metadata_of_any_kind(tmp_path, capsys):
    """A name that is not UTF-8, a title and metadata that give orders: the page is there, and linked."""
    path = write(tmp_path, "00_\udce9\x1b[31m<b>", "print('ran')", kernelspec={"name": "x", "display_name": "\x1b[31m"})
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].metadata |= {"transient": 5, "jupyter": {"outputs_hidden": True}, "tags": ["<b>"]}
    nbformat.write(nb, path)
    assert notebooks.execute(tmp_path, [path]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"00_\xe9\x1b[31m<b>.ipynb" in printed
    index = (tmp_path / "outputs" / "notebooks" / "index.html").read_text()
    assert 'href="00_%E9%1B%5B31m%3Cb%3E.html"' in index
    assert "ran" in (tmp_path / "outputs" / "notebooks" / f"{path.stem}.html").read_text()


@pytest.mark.attack("12")
@pytest.mark.attack("13")
def test_outputs_that_were_made_elsewhere_are_not_trusted(tmp_path):
    """A cell that is skipped keeps its outputs: they are shown, without what is active in them, and in linear time."""
    path = write(tmp_path, "kept", "1", "print('\x1b]' * 60_000)")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].metadata["tags"] = ["skip-execution"]
    hostile = "<b>kept</b><script>alert('active')</script><a href='javascript:alert(1)' onclick='alert(2)'>x</a>"
    data = {"text/html": hostile, "application/javascript": "alert('active')"}
    nb.cells[0].outputs = [
        nbformat.v4.new_output("display_data", data=data),
        nbformat.v4.new_output("stream", name="stdout", text="\x1b]" * 60_000),
    ]
    nbformat.write(nb, path)

    started = time.monotonic()
    result, _, page = run_one(tmp_path, path)

    assert result.ok
    assert time.monotonic() - started < 25
    assert "<b>kept</b>" in page
    assert "<script" not in page and "javascript:" not in page and "onclick" not in page


@pytest.mark.attack("2")
def test_a_kernel_is_started_without_the_modules_of_the_folder(tmp_path):
    path = write(tmp_path, "safe", "print('ran')")
    for module in ("psutil", "ipykernel", "zmq"):
        (path.parent / f"{module}.py").write_text("raise SystemExit('a module of the folder')\n")
    result, _, page = run_one(tmp_path, path)
    assert result.ok, result.error_tail
    assert "ran" in page


@pytest.mark.attack("7")
def test_a_link_in_the_place_of_a_page_is_replaced(tmp_path):
    target = tmp_path / "precious.txt"
    target.write_text("keep me")
    out = tmp_path / "outputs" / "notebooks"
    out.mkdir(parents=True)
    for name in ("page.html", "page.ipynb", "index.html"):
        (out / name).symlink_to(target)
    run_one(tmp_path, write(tmp_path, "page", "1"))
    assert target.read_text() == "keep me"


def test_mistakes_in_the_call(tmp_path):
    with pytest.raises(UserError, match=r"missing\.ipynb"):
        notebooks.execute(tmp_path, [tmp_path / "missing.ipynb"])
    with pytest.raises(UserError, match="no numbered notebook"):
        notebooks.execute(tmp_path, None)
    with pytest.raises(UserError, match="--timeout"):
        notebooks.execute(tmp_path, [write(tmp_path, "fine", "1")], timeout=0)


LAUNCHER = Path(__file__).parents[2] / "launchers" / "run_notebooks.sh"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--wrong"], "--wrong"),
        (["--timeout", "x"], "--timeout"),
        (["--timeout"], "--timeout"),
        (["no.ipynb"], "no.ipynb"),
    ],
)
def test_the_launcher_refuses_in_one_sentence(tmp_path, arguments, sentence):
    done = subprocess.run([LAUNCHER, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_launcher_takes_paths_from_where_it_is_called(tmp_path):
    write(tmp_path, "here", "print('from the launcher')")
    tools = tmp_path / "environment" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").symlink_to(sys.executable)
    (tools / "minisft").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    (tools / "minisft").chmod(0o755)
    environment = os.environ | {"VIRTUAL_ENV": str(tools.parent), "MINISFT_SKIP_SETUP": "1"}
    command = [LAUNCHER, "--in-place", "notebooks/here.ipynb", "--timeout=9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
    here = tmp_path / "notebooks" / "here.ipynb"
    assert done.stdout.split() == [
        str(LAUNCHER.parents[1]),
        "notebooks",
        "--in-place",
        "--timeout",
        "9",
        "--",
        str(here),
    ]
    usage = subprocess.run([LAUNCHER, "--help"], capture_output=True, text=True, check=True).stdout
    assert usage.startswith("Usage: launchers/run_notebooks.sh")


@pytest.mark.attack("6")
def test_no_copy_replaces_its_source_and_no_page_another(tmp_path):
    out = tmp_path / "out"
    for folder, stem in [(tmp_path / "a", "x"), (tmp_path / "b", "x"), (tmp_path / "a", "index"), (out, "mine")]:
        folder.mkdir(exist_ok=True)
        (folder / f"{stem}.ipynb").write_bytes(write(tmp_path, stem, "# Mine", "1 + 1").read_bytes())
    source = (out / "mine.ipynb").read_text()
    (tmp_path / "notebooks" / "x.md").write_text("# A page of the same name")
    for paths in (["out/mine"], ["a/x", "b/x"], ["a/x"], ["a/index"]):
        with pytest.raises(UserError, match=r"replaced by its executed copy|would have one name"):
            notebooks.run_notebooks([tmp_path / f"{path}.ipynb" for path in paths], root=tmp_path, out=out)
    assert (out / "mine.ipynb").read_text() == source
