"""Remove what differs between runs or machines from an executed notebook."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

# Terminal escape sequences: CSI (colors), OSC (titles, links), and any other ESC.
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)|\x1b")
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_FILE = re.compile(
    r"(?<![^\s\"'<>()])[^\s\"'<>()]*/ipykernel_\d+/\d+\.py"
)  # anchored at the path's start, so linear time


def neutral_text(text: str, root: Path) -> str:
    """Remove escape sequences, and replace paths and addresses that differ between machines or
    runs.
    """
    text = ANSI.sub("", text)
    replacements = {str(root): ".", str(Path.home()): "~", sys.prefix: "~/env"}
    # Longest path first: the environment may be inside the project.
    for path in sorted(replacements.keys() - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-])", replacements[path], text)
    text = CELL_FILE.sub("cell.py", text)
    return re.sub(r" at 0x[0-9a-f]{6,}", " at 0x…", text)


def clean_notebook(nb: Any, root: Path) -> None:
    """Remove from `nb` whatever would change on a second run or another machine."""
    nb.metadata.pop("widgets", None)  # random ids, and useless without a live kernel
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"}
    for cell in (cell for cell in nb.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        # Without a live kernel a widget is an unreadable line of text.
        cell.outputs = in_order([output for output in cell.outputs if WIDGET not in output.get("data", {})])
        for output in cell.outputs:
            for part in (output, output.get("data", {})):
                for key in [key for key in part if key in ("text", "evalue") or key.startswith("text/")]:
                    part[key] = neutral_text(str(part[key]), root).replace("\r", "")
            if "traceback" in output:
                output.traceback = [neutral_text(part, root) for part in output.traceback]


def in_order(outputs: list[Any]) -> list[Any]:
    """Merge consecutive streams, stdout first, because stdout and stderr interleave differently on
    every run.
    """
    from nbformat.v4 import new_output

    ordered: list[Any] = []
    for is_stream, run in groupby(outputs, lambda output: output.output_type == "stream"):
        if not is_stream:
            ordered += run
            continue
        texts: dict[str, list[str]] = {}
        for output in run:
            texts.setdefault(output.name, []).append(output.text)
        for name in sorted(texts, key=lambda name: (name != "stdout", name)):
            ordered.append(new_output("stream", name=name, text=overwritten("".join(texts[name]))))
    return ordered


def overwritten(text: str) -> str:
    """Apply carriage returns line by line, so only a progress bar's last state remains."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
