"""What every timed process of `encoding_speed` has in common; it runs in both environments, so it needs neither.

A worker loads its data, replies that it is ready, then prepares the data once for each line on its standard input.
Requests and replies are JSON, one a line.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prepare = Callable[[Path | None], dict[str, Any]]


def serve(load: Callable[[dict[str, Any]], Prepare]) -> None:
    """Answer requests until standard input ends. What `load` returns is called with the file to keep rows in."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between the replies

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        prepare = load(json.loads(sys.stdin.readline()))
        reply({"loaded": memory("VmRSS")})
        for line in sys.stdin:
            keep = json.loads(line)["keep"]
            found = prepare(Path(keep) if keep else None)
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            reply(found | {"peak": max(memory("VmHWM"), children)})
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its largest (`ru_maxrss` would begin with the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def messages_in(file: str) -> list[dict[str, Any]]:
    """The conversations that `encoding_speed` wrote: `{"id", "messages": [{"role", "content"}, …]}`."""
    with Path(file).open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]
