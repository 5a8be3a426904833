"""Every regular expression of the package takes time linear in a hostile text, the way it is used."""

import importlib.util
import pkgutil
import re
import signal
from pathlib import Path

import pytest

import minisft

HANG = 5.0  # seconds for 200 kB; a quadratic pattern takes minutes
ATOMS = [
    "a", "a ", "0", " ", "\t", "\n", "\r\n", "\x1b]", "\x1b[", "://", "a.", "A", "&lt", "&#", '"', "\\", '"\\',
    "[", "{", "step 1", "_", "/", "/ipykernel_", "rgb(", "a@", "é", "漢", "#", "a:", "Error", "x=", "'", "`", "<",
    "$", "-", "1,", ",", "{{",
]  # fmt: skip


def patterns():
    """The patterns of all modules with the methods that are called on them."""
    found = {}
    for module in pkgutil.walk_packages(minisft.__path__, "minisft."):
        if module.ispkg:
            continue
        source = Path(importlib.util.find_spec(module.name).origin).read_text(encoding="utf-8")
        for name in re.findall(r"(?m)^(\w+) = re\.compile\(", source):
            pattern = getattr(importlib.import_module(module.name), name)
            used = set(re.findall(rf"\b{name}\.(search|match|fullmatch|sub|findall|finditer|split)\b", source))
            found[f"{module.name.removeprefix('minisft.')}.{name}"] = (pattern, sorted(used or {"search"}))
    return found


@pytest.fixture
def limit():
    """Ends a call that hangs: the matcher looks for signals."""

    def late(*_):
        raise TimeoutError(f"more than {HANG} s")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.attack("12")
@pytest.mark.parametrize("name", PATTERNS := patterns())
def test_no_text_makes_a_pattern_hang(name, limit):
    pattern, methods = PATTERNS[name]
    is_text = isinstance(pattern.pattern, str)
    words = re.findall("[A-Za-z]{3,}", pattern.pattern if is_text else pattern.pattern.decode())
    for atom in dict.fromkeys([*ATOMS, *words, *(f"{word} " for word in words)]):
        for end in ("", "\0!"):
            text = atom * (200_000 // len(atom)) + end
            for method in methods:
                given = text if is_text else text.encode()
                before = (given[:0],) if method == "sub" else ()  # its replacement
                limit(HANG)
                result = getattr(pattern, method)(*before, given)
                list(result) if method == "finditer" else None
                limit(0)
