"""Convert a notebook to an HTML page that works offline, runs no script and loads no file.

Outputs may contain untrusted data, and a skipped cell keeps outputs that were made elsewhere. Prose
and outputs are therefore sanitized alike: only the elements, attributes and styles listed here
reach the page, and its Content-Security-Policy forbids scripts and external files. Formulas appear
as their source text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minisft.files import read_text
from minisft.text import one_line

NO_ALT = "No description has been provided for this image"  # nbconvert's placeholder for missing alt text
# The first of these formats that an output has is shown. Others, such as scripts and widgets, are not.
SHOWN = ("text/html", "text/markdown", "text/latex", "image/png", "image/jpeg", "text/plain")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTS = _words(
    "a abbr b bdi blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 "
    "h6 hr i img ins kbd li line ol p polyline pre s samp small span strong sub summary sup svg table tbody td text "
    "tfoot th thead tr u ul var wbr"
)
EMPTY = _words("br col hr img wbr")  # void elements, which have no end tag
UNREAD = _words("script style template title")  # their content is dropped too
# Attributes that may have any value, and attributes whose value must match VALUE.
TEXTS = _words(
    "alt aria-hidden aria-label aria-valuemax aria-valuemin aria-valuenow class dir id lang open role scope title"
)
VALUES = _words(
    "align border cellpadding cellspacing colspan fill height points rowspan start stroke stroke-opacity stroke-width "
    "text-anchor valign width x x1 x2 y y1 y2"
)
STYLES = _words(
    "background background-color border border-bottom border-radius color cursor display font font-family font-size "
    "font-style font-weight height line-height margin margin-right max-width opacity padding padding-top text-align "
    "vertical-align white-space width word-break"
)
VALUE = re.compile(r"[\w#.,:%\s-]*(?:rgba?\([\d.,%\s]*\)[\w#.,%\s-]*)*")  # no other function: url() would load a file
LINK = re.compile(r"(?:https?://|mailto:)[^\s\x00-\x1f]*|(?!//)[\w./%-]*(?:#[^\s\x00-\x1f]*)?")
IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*")
DEEPEST, MOST = 100, 50_000  # nesting depth, and elements per output; beyond either, only the text is kept

# nbconvert's own template loads scripts for formulas, diagrams and widgets, and drops alt text (7.17).
PAGE = """{% extends 'index.html.j2' %}
{% block html_head_js %}<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block extra_css %}<style>.dataframe th { vertical-align: top }</style>{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% macro image(output, kind) %}<div class="jp-RenderedImage jp-OutputArea-output">
<img src="data:{{ kind }};base64,{{ output.data[kind] | escape_html }}"
{%- for key in ('alt', 'width', 'height') if output | get_metadata(key, kind) %}
 {{ key }}="{{ output | get_metadata(key, kind) | escape_html }}"{% endfor %}></div>{% endmacro %}
{% block data_png %}{{ image(output, 'image/png') }}{% endblock %}
{% block data_jpg %}{{ image(output, 'image/jpeg') }}{% endblock %}
{% block data_markdown %}<div class="jp-RenderedText jp-OutputArea-output"><pre>
{{- output.data['text/markdown'] | escape_html -}}</pre></div>{% endblock %}"""
INDEX = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>minisft: the notebooks</title>
<h1>The notebooks</h1><table cellpadding="6"><tr><th>Notebook<th>File<th>Status<th>Time</tr>{rows}</table></html>"""

quiet = logging.Logger("minisft.course.html_page", level=100)


def page_of(nb: Any, folder: Path, title: str) -> str:
    """Return the HTML page of notebook `nb`, a file in `folder`.

    Images are embedded, and links to notebooks and Markdown files become links to their pages.
    """
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": list(SHOWN)}}),
        raw_template=PAGE,
        extra_template_basedirs=[],  # else the current folder could override a template, and templates run code
        filters={"clean_html": safe_html},
        sanitize_html=True,
        embed_images=True,
        log=quiet,
    )
    page, _ = exporter.from_notebook_node(_plain(nb), {"metadata": {"name": title, "path": str(folder)}})
    return re.sub(r'href="([\w.%-]+)\.(?:ipynb|md)(#[^"]*)?"', r'href="\1.html\2"', page)


def markdown_page(path: Path) -> tuple[str, str]:
    """Return the title and the HTML page of the Markdown file `path`, made as that of a notebook with one cell.

    Raises `UserError` if the file cannot be read.
    """
    from nbformat.v4 import new_markdown_cell, new_notebook

    nb = new_notebook(cells=[new_markdown_cell(read_text(path) or "")])
    title = title_of(nb, path.stem)
    return title, page_of(nb, path.parent, title)


def title_of(nb: Any, stem: str) -> str:
    """The first heading that begins a Markdown cell, else the file's stem."""
    headings = (re.match("# +(.+)", cell.source) for cell in nb.cells if cell.cell_type == "markdown")
    return one_line(next((heading[1].strip() for heading in headings if heading), stem))


def _plain(nb: Any) -> Any:
    """Return a copy with only the metadata that a page uses, since metadata may have any shape."""
    from nbformat import from_dict

    nb = from_dict(nb)  # a copy
    nb.metadata = from_dict({"language_info": nb.metadata.get("language_info", {"name": "python"})})
    for cell in nb.cells:
        cell.metadata = from_dict({"tags": cell.metadata.get("tags", [])})
        for output in (output for output in cell.get("outputs", []) if "data" in output):
            by_format = {kind: d for kind, d in output.metadata.items() if kind in SHOWN and isinstance(d, Mapping)}
            output.metadata = from_dict({kind: {k: str(v) for k, v in d.items()} for kind, d in by_format.items()})
            if output.data and not output.data.keys() & set(SHOWN):
                output.data["text/plain"] = f"({one_line(', '.join(output.data), 200)}: not shown on this page)"
    return nb


def index_of(rows: list[tuple[str, str, str, float]], pages: Sequence[tuple[str, str]] = ()) -> str:
    """Return the index page.

    A row is (file stem, title or "" if there is no page, status, seconds) of a notebook. `pages` are
    the Markdown pages beside them, as (file stem, title).
    """
    lines = ""
    for stem, title, status, seconds in rows:
        name = escape(one_line(stem))
        link = _link(stem, title) if title else name
        lines += f"\n<tr><td>{link}<td>{name}.ipynb<td>{escape(status)}<td>{seconds:.0f} s</tr>"
    for stem, title in pages:
        lines += f"\n<tr><td>{_link(stem, title)}<td>{escape(one_line(stem))}.md<td><td></tr>"
    return INDEX.format(rows=lines)


def _link(stem: str, title: str) -> str:
    return f'<a href="{quote(stem, errors="surrogateescape")}.html">{escape(one_line(title))}</a>'


def safe_html(text: str) -> str:
    """Sanitize HTML: keep only text and the listed elements and attributes.

    libxml2 parses it, in time linear in the input, and it is serialized here, so browsers can parse
    it in one way only.
    """
    from lxml import etree

    parser = etree.HTMLParser(target=_Reader())
    parser.feed(f"<body>{text}".encode(errors="replace").decode())
    return parser.close()


class _Reader:
    """The parser target that lxml calls for each part of a document; starts and ends always match
    up.
    """

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.ends: list[str] = []  # end tags of the open elements
        self.unread = 0  # number of open elements whose content is dropped
        self.shown = 0  # number of elements written

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.unread += tag in UNREAD
        is_shown = tag in ELEMENTS and not self.unread and len(self.ends) < DEEPEST and self.shown < MOST
        if is_shown:
            self.shown += 1
            self.parts.append(f"<{tag}")
            for name, value in attributes.items():
                if (safe := _value(tag, name, value or "")) is not None:
                    self.parts.append(f' {name}="{escape(safe)}"')
            self.parts.append(">")
        self.ends.append(f"</{tag}>" if is_shown and tag not in EMPTY else "")

    def end(self, tag: str) -> None:
        self.unread -= tag in UNREAD
        self.parts.append(self.ends.pop())

    def data(self, text: str) -> None:
        if not self.unread:
            self.parts.append(escape(text))

    def close(self) -> str:
        return "".join(self.parts)


def _value(tag: str, name: str, value: str) -> str | None:
    """Return the attribute value that may be written, or None to drop the attribute."""
    if name == "style":
        return _style(value)
    if name in TEXTS:
        return value
    allowed = {("a", "href"): LINK, ("img", "src"): IMAGE}.get((tag, name), VALUE if name in VALUES else None)
    return value if allowed is not None and allowed.fullmatch(value) else None


def _style(text: str) -> str | None:
    pairs = (declaration.partition(":")[::2] for declaration in text.split(";"))
    safe = [f"{n.strip()}:{v.strip()}" for n, v in pairs if n.strip().lower() in STYLES and VALUE.fullmatch(v)]
    return ";".join(safe) or None
