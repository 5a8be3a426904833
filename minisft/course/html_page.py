"""The HTML page of a notebook: it can be read offline, runs nothing and loads nothing.

What a cell shows may be data from anywhere, and a cell that is skipped keeps outputs that were made elsewhere. So all
of a page is treated alike, prose and outputs: only the elements, attributes and styles listed here reach it, and its
Content-Security-Policy forbids the browser to run a script or to load a file. Formulas appear as they are written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minisft.text import one_line

NO_ALT = "No description has been provided for this image"  # nbconvert's words where the author had none
# Of the forms that an output has, the first of these is shown. All others, such as scripts and widgets, are not.
SHOWN = ("text/html", "text/markdown", "text/latex", "image/png", "image/jpeg", "text/plain")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTS = _words(
    "a abbr b bdi blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 "
    "h6 hr i img ins kbd li line ol p polyline pre s samp small span strong sub summary sup svg table tbody td text "
    "tfoot th thead tr u ul var wbr"
)
EMPTY = _words("br col hr img wbr")  # without an end tag
UNREAD = _words("script style template title")  # their content is not for readers
# Attributes that may have any value, and those with numbers, words and colours.
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
DEEPEST, MOST = 100, 50_000  # elements in each other, and in one output; of further ones only the text stays

# nbconvert's own page loads scripts for formulas, diagrams and widgets, and has no place for alt text (7.17).
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
    """The page of a notebook in `folder`: images are inside, and links to notebooks lead to their pages."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": list(SHOWN)}}),
        raw_template=PAGE,
        extra_template_basedirs=[],  # else the current folder could replace a template, which is a program
        filters={"clean_html": safe_html},
        sanitize_html=True,
        embed_images=True,
        log=quiet,
    )
    page, _ = exporter.from_notebook_node(_plain(nb), {"metadata": {"name": title, "path": str(folder)}})
    return re.sub(r'href="([\w.%-]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', page)


def _plain(nb: Any) -> Any:
    """The notebook as a page needs it: metadata may have any shape, and of it only these are used."""
    from nbformat import from_dict

    nb = from_dict(nb)  # a copy
    nb.metadata = from_dict({"language_info": nb.metadata.get("language_info", {})})
    for cell in nb.cells:
        cell.metadata = from_dict({"tags": cell.metadata.get("tags", [])})
        for output in (output for output in cell.get("outputs", []) if "data" in output):
            about = {kind: d for kind, d in output.metadata.items() if kind in SHOWN and isinstance(d, Mapping)}
            output.metadata = from_dict({kind: {k: str(v) for k, v in d.items()} for kind, d in about.items()})
            if output.data and not output.data.keys() & set(SHOWN):
                output.data["text/plain"] = f"({one_line(', '.join(output.data), 200)}: not shown on this page)"
    return nb


def index_of(rows: list[tuple[str, str, str, float]]) -> str:
    """The page that lists notebooks, each by its file's stem, title (empty without a page), status and seconds."""
    lines = ""
    for stem, title, status, seconds in rows:
        name = escape(one_line(stem))
        link = (
            f'<a href="{quote(stem, errors="surrogateescape")}.html">{escape(one_line(title))}</a>' if title else name
        )
        lines += f"\n<tr><td>{link}<td>{name}.ipynb<td>{escape(status)}<td>{seconds:.0f} s</tr>"
    return INDEX.format(rows=lines)


def safe_html(text: str) -> str:
    """The HTML with nothing in it but what may be read: listed elements and attributes, and text.

    Parsed by libxml2, which takes time linear in the input, and written out by us, so that it can be read in one way.
    """
    from lxml import etree

    parser = etree.HTMLParser(target=_Reader())
    parser.feed(f"<body>{text}".encode(errors="replace").decode())
    return parser.close()


class _Reader:
    """What lxml calls for each part of a document, in order; each start has its end, however broken the text is."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.ends: list[str] = []  # of the open elements
        self.unread = 0  # how many of them have content that is not shown
        self.shown = 0  # elements

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.unread += tag in UNREAD
        is_shown = tag in ELEMENTS and not self.unread and len(self.ends) < DEEPEST and self.shown < MOST
        if is_shown:
            self.shown += 1
            self.parts.append(f"<{tag}")
            for name, value in attributes.items():
                if (kept := _value(tag, name, value or "")) is not None:
                    self.parts.append(f' {name}="{escape(kept)}"')
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
    """The value of an attribute as it may be written, or None."""
    if name == "style":
        return _style(value)
    if name in TEXTS:
        return value
    allowed = {("a", "href"): LINK, ("img", "src"): IMAGE}.get((tag, name), VALUE if name in VALUES else None)
    return value if allowed is not None and allowed.fullmatch(value) else None


def _style(text: str) -> str | None:
    pairs = (declaration.partition(":")[::2] for declaration in text.split(";"))
    kept = [f"{n.strip()}:{v.strip()}" for n, v in pairs if n.strip().lower() in STYLES and VALUE.fullmatch(v)]
    return ";".join(kept) or None
