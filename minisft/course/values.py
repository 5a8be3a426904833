"""Compare a learner's value with the expected one, whatever container it came in."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def normalized(value: Any) -> Any:
    """Return `value` with tensors, arrays and tuples as lists, and NumPy scalars as numbers."""
    if hasattr(value, "tolist"):
        return value.detach().tolist() if hasattr(value, "detach") else value.tolist()
    if isinstance(value, list | tuple):
        return [normalized(item) for item in value]
    if isinstance(value, set | frozenset):
        return {_hashable(normalized(item)) for item in value}
    if isinstance(value, dict):
        return {key: normalized(item) for key, item in value.items()}
    return value


def equal(given: Any, expected: Any, tolerance: float = 0.0, ordered: bool = True) -> bool:
    """Compare two normalized values; numbers may differ by `tolerance` (relative; absolute near 0).

    With `ordered` false, lists and sets are compared as collections without an order.
    """
    if isinstance(expected, bool) or isinstance(given, bool):
        return given is expected
    if isinstance(expected, Real) and isinstance(given, Real):
        return math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance) or given == expected
    if not ordered and isinstance(expected, list | set) and isinstance(given, list | set):
        key = repr
        return equal(sorted(given, key=key), sorted(expected, key=key), tolerance)
    if isinstance(expected, list) and isinstance(given, list):
        pairs = zip(given, expected, strict=False)
        return len(given) == len(expected) and all(equal(a, b, tolerance, ordered) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(given, dict):
        return given.keys() == expected.keys() and all(
            equal(given[k], expected[k], tolerance, ordered) for k in expected
        )
    return type(given) is type(expected) and bool(given == expected)


def first_difference(given: Any, expected: Any, tolerance: float = 0.0) -> str:
    """Say where `given` first differs from `expected`: a length, an entry of a list, or the whole."""
    if isinstance(given, list) and isinstance(expected, list):
        if len(given) != len(expected):
            return f"it has {len(given)} entries, and {len(expected)} are expected"
        for i, (a, b) in enumerate(zip(given, expected, strict=True)):
            if not equal(a, b, tolerance):
                return f"entry {i} is {short(a)}, and {short(b)} is expected"
    if isinstance(given, dict) and isinstance(expected, dict) and given.keys() == expected.keys():
        key = next(k for k in expected if not equal(given[k], expected[k], tolerance))
        return f"entry {key!r} is {short(given[key])}, and {short(expected[key])} is expected"
    return f"it is {short(given)}, and {short(expected)} is expected"


def short(value: Any, most: int = 90) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
