"""A headless browser that shows what a page does, texts that would like to run, and a socket that hears of it."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser found: none of {', '.join(BROWSERS)} is installed"
)

HOSTILE = [
    "<script>document.title='changed'</script>",
    "<script src=\"{url}/script\"></script>",
    "<img src=\"{url}/img\" onerror=\"document.title='changed'\">",
    "<svg onload=\"document.title='changed'\"><image href=\"{url}/svg\"/></svg>",
    "</style><style>@import '{url}/style'; body {{ background: url({url}/background) }}</style>",
    "</bdi></div></td></table></details><iframe src=\"{url}/frame\"></iframe>",
    "\" onmouseover=\"document.title='changed'\" style=\"background:url({url}/attribute)",
    "' autofocus tabindex=0 onfocus='document.title=`changed`",
    "--><link rel=stylesheet href=\"{url}/link\"><meta http-equiv=refresh content=\"0;url={url}/refresh\"><!--",
    "<video poster={url}/poster><source src={url}/video></video><object data={url}/object></object>",
    "<details open ontoggle=\"document.title='changed'\"><a href=\"javascript:document.title='changed'\">x</a>",
    "\u202e<b>\x1b]0;changed\x07\x9b31m\u2028\u200b\ufeff</b>\0",
]  # fmt: skip


@pytest.fixture
def listener():
    """A socket that answers nothing and remembers who called."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:  # closed: the test is over
                    return
                with caller:
                    caller.settimeout(5)
                    try:
                        calls.append(caller.recv(200).decode(errors="replace").partition("\r")[0])
                    except OSError:
                        calls.append("a connection")

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def opened(body, folder):
    """The document as it is after the browser has loaded a page with this body and run what runs."""
    return shown(f"<!doctype html><meta charset=utf-8><title>unchanged</title><body>{body}</body>", folder)


def shown(html, folder):
    """The document as it is after the browser has loaded this one and run what runs."""
    page = folder / "page.html"
    page.write_text(html)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            dom, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children too: they are in the session it began
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert "<title>" in dom, (folder / "log").read_text()[-2000:]
    return dom


def title(dom):
    return re.search("<title>(.*?)</title>", dom)[1]
