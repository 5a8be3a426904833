"""Refuse chat templates with an operation that no time limit can interrupt.

A template comes with a model, perhaps from somebody else. A signal stops a loop, but not a single
operation in C, such as the power of two large numbers; transformers computes those of constants
while it compiles the template. So they are refused in the source, before it is compiled.

Not covered: texts that grow until memory is full (`s ~ s` in a loop, a width of `center`), a filter
whose name is computed, and outside the main thread, where no signal arrives, endless loops.
"""

from __future__ import annotations

import functools
from typing import Any

MOST_TIMES = 10_000  # largest number that a template may repeat or multiply by
MOST_DIGITS = 20  # largest precision of `round`, which computes 10 ** precision


@functools.lru_cache(maxsize=8)
def endless_operation(source: str) -> str:
    """Name an operation of a template that may not end, or ""; an invalid template has none."""
    from jinja2 import TemplateError, nodes

    try:
        tree = syntax_tree(source)
    except TemplateError:  # transformers refuses it with its own words
        return ""
    except RecursionError:
        return "it is nested too deeply"
    if tree.find(nodes.Pow):
        return "it uses **, whose result may be too large to compute"
    for product in tree.find_all(nodes.Mul):
        # Squaring a variable in a loop makes numbers as large as ** does.
        if not any(_is_constant(factor, MOST_TIMES) for factor in (product.left, product.right)):
            return f"it multiplies, but neither by a text nor by a number of at most {MOST_TIMES:,}"
    for called in tree.find_all(nodes.Filter):
        values = [*called.args, *(pair.value for pair in called.kwargs)]
        values += [value for value in (called.dyn_args, called.dyn_kwargs) if value is not None]
        is_mapped = any(isinstance(value, nodes.Const) and value.value == "round" for value in values)
        if (called.name == "round" or is_mapped) and not all(_is_constant(value, MOST_DIGITS) for value in values):
            return f"it rounds to a precision other than a number of at most {MOST_DIGITS}"
    return ""


def _is_constant(node: Any, most: int) -> bool:
    """Whether an expression is a text, or a number of at most `most`."""
    from jinja2 import nodes

    return isinstance(node, nodes.Const) and (isinstance(node.value, str) or abs(node.value or 0) <= most)


def syntax_tree(source: str) -> Any:
    """The syntax tree of a template with the tags that transformers knows."""
    from jinja2 import Environment
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}`, which marks what an assistant says."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(extensions=["jinja2.ext.loopcontrols", Generation], autoescape=True).parse(source)
