"""The student's edition in a real JupyterLab, opened by a real browser, as a learner has it.

Needs a Chromium (Debian: `apt install chromium`); it takes as long as the course. With
MINISFT_AT_LENGTH=1, or by name: `launchers/run_tests.sh tests/notebooks/test_jupyterlab.py`.
Screenshots of every notebook, light and dark, go to `outputs/screenshots/`.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from browser import BROWSER, needs_browser
from conftest import at_length
from jupyter_core.paths import jupyter_runtime_dir

from minisft.course.editions import write_edition
from minisft.processes import marked

ROOT = Path(__file__).parents[2]
NAMES = [path.name for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
SCREENSHOTS = ROOT / "outputs" / "screenshots"
MARK = "MINISFT_TEST_LAB"  # every process that a kernel starts has it in its environment
TOKEN = "only-for-this-test"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # draw cells outside the window, too
}
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
pytestmark = [pytest.mark.notebook, pytest.mark.distributed, pytest.mark.model, needs_browser, at_length]

RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
IS_READY = """path => {
    const context = window.jupyterapp?.shell.currentWidget?.context;
    return context?.path === path && context.sessionContext?.session?.kernel?.status === 'idle';
}"""
CELLS = """() => [...window.jupyterapp.shell.currentWidget.content.widgets]
    .filter(cell => cell.model.type === 'code')
    .map(cell => ({
        source: cell.model.sharedModel.source,
        count: cell.model.executionCount,
        outputs: cell.model.outputs.toJSON(),
    }))"""
BROKEN_IMAGES = """() => [...document.querySelectorAll('.jp-Notebook img')]
    .filter(image => !image.complete || !image.naturalWidth)
    .map(image => image.outerHTML.slice(0, 200))"""
# The lowest contrast (WCAG 2.1) of a token of the lens with what is behind it.
CONTRAST = """() => {
    const parse = color => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const behind = element => {
        const colors = [];
        for (let e = element; e; e = e.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
            if (a > 0) colors.push([r, g, b, a]);
            if (a === 1) break;
        }
        return colors.reverse().reduce(
            (under, [r, g, b, a]) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a)), [255, 255, 255]);
    };
    const light = color => {
        const [r, g, b] = color.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratios = [...document.querySelectorAll('.jp-OutputArea-output bdi')].slice(0, 2000).map(token => {
        const [one, two] = [light(parse(getComputedStyle(token).color).slice(0, 3)), light(behind(token))];
        return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    });
    return ratios.length ? Math.min(...ratios) : 21;
}"""


def set_theme(settings, theme):
    entries = SETTINGS | {"apputils-extension/themes": {"theme": THEMES[theme]}}
    for name, values in entries.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with the student's edition: its address, and the folder of its settings."""
    folder = tmp_path_factory.mktemp("lab")
    write_edition(ROOT, "student", folder / "course")
    set_theme(folder / "settings", "light")
    env = os.environ | {
        **{"MINISFT_OUTPUTS": str(folder / "outputs"), "MINISFT_COURSE_STEPS": "2", "MINISFT_STAND_INS": "1"},
        "MINISFT_SKIP_SETUP": "1",
        **{"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), MARK: folder.name},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    env.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", f"--ServerApp.root_dir={folder}"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True", "--allow-root"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            yield wait_for(lambda: address(folder, server), 60), folder
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            for process in marked(MARK, folder.name):
                process.kill()


def address(folder, server):
    """The server's address, as soon as it answers."""
    assert server.poll() is None, (folder / "log").read_text()[-2000:]
    url = json.loads(Path(jupyter_runtime_dir(), f"jpserver-{server.pid}.json").read_text())["url"]
    with urllib.request.urlopen(f"{url}api?token={TOKEN}", timeout=5):
        return url


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if result := condition():
                return result
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that remembers every address outside this machine that it asks for."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.outside = []
    inside = ("http://127.0.0.1:", "http://localhost:", "ws://127.0.0.1:", "ws://localhost:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(inside) else page.outside.append(request.url))
    yield page
    context.close()


def open_notebook(page, lab, name):
    url, _ = lab
    page.goto(f"{url}lab/tree/course/{name}?reset&token={TOKEN}")  # without the notebooks of the test before
    page.wait_for_function(IS_READY, arg=f"course/{name}", timeout=60_000)


def picture(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_is_whole(lab, page, name):
    open_notebook(page, lab, name)
    page.set_default_timeout(1_500_000)
    page.evaluate(RUN_ALL)
    cells = page.evaluate(CELLS)
    errors = [o["evalue"] for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert not errors, errors
    assert all(cell["count"] for cell in cells if cell["source"].strip())
    wait_for(lambda: not page.evaluate(BROKEN_IMAGES), 10)
    texts = [str(output) for cell in cells for output in cell["outputs"] if ".check(" in cell["source"]]
    assert texts and all("Not attempted yet" in text for text in texts)
    assert page.evaluate(CONTRAST) >= 4.5, "the lens in the light theme"
    for slider in page.query_selector_all(".jupyter-widgets .noUi-handle")[:1]:
        box = slider.evaluate_handle("e => e.closest('.jp-OutputArea')")
        before = box.evaluate("e => e.innerText")
        slider.focus()
        page.keyboard.press("ArrowRight")
        wait_for(lambda box=box, before=before: box.evaluate("e => e.innerText") != before, 20)
    picture(page, f"{name[:2]}-light")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{THEMES['dark']}'}})")
    wait_for(lambda: page.evaluate("document.body.dataset.jpThemeLight") == "false", 20)
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=20_000)
    assert page.evaluate(CONTRAST) >= 4.5, "the lens in the dark theme"
    picture(page, f"{name[:2]}-dark")
    assert page.outside == []


def test_the_stop_button_leaves_no_process(lab, page):
    _, folder = lab
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    cell["source"] = f"%%bash\n{ROOT}/launchers/run_zero.sh 2 --name stopped --restart --max-steps 40 --save-steps 40"
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}  # else JupyterLab asks for one
    nb = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "course" / "stop.ipynb").write_text(json.dumps(nb))
    open_notebook(page, lab, "stop.ipynb")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

    def ranks():
        found = marked(MARK, folder.name)
        return [p for p in found if p.is_running() and "minisft.training.worker" in p.cmdline()]

    wait_for(lambda: len(ranks()) >= 2 and (folder / "outputs/model/stopped/metrics.jsonl").exists(), 240)
    page.get_by_role("button", name="Interrupt the kernel").click()
    started = ["deepspeed", "minisft.launch.supervisor", "minisft.training.worker"]

    def left():
        lines = []
        for process in marked(MARK, folder.name):
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:
                continue
            lines += [words] if any(word in words for word in started) else []
        return lines

    wait_for(lambda: not left(), 30)
    assert "stopped by SIGINT" in (folder / "outputs/model/stopped/FAILED").read_text()
