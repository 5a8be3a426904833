"""The pages of the notebook book: whatever a notebook holds, they run nothing, load nothing and take linear time."""

import os
import re
import time
from html import escape
from html.parser import HTMLParser
from urllib.parse import unquote, unquote_to_bytes

import pytest
from browser import HOSTILE, listener, needs_browser, shown, title  # noqa: F401 (a fixture)
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minisft.course.html_page import (
    DEEPEST,
    ELEMENTS,
    STYLES,
    TEXTS,
    VALUES,
    index_of,
    markdown_page,
    page_of,
    safe_html,
)
from minisft.course.notebook_cleanup import in_order, neutral_text, overwritten
from minisft.drawing import Picture
from minisft.launch.notebook_view import curve

ADDRESS = "http://192.0.2.1"  # reserved for documentation: nobody is there
FRAGMENTS = [text.format(url=ADDRESS) for text in HOSTILE] + [
    "<b>",
    "</b>",
    "<div class=x style='color:red;position:fixed;background:url(x)'>",
    "</div>",
    "<table><tr><td>",
    "<a href='java\nscript:alert(1)'>",
    "<a href=' \x01data:text/html,<script>alert(1)</script>'>",
    "<a href='//evil.example/x'>",
    "<img src='data:image/svg+xml;base64,PHN2Zz4='>",
    "<svg><style><a id='</style><img src=1 onerror=alert(1)>'>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<textarea></textarea><xmp></xmp><plaintext>",
    "<p style=\"color:\\75rl(x);width:expression(alert(1));margin:1px/**/\">",
    "<form action=javascript:alert(1)><input type=submit formaction=javascript:alert(1)>",
    "<base href='http://192.0.2.1/'>",
    "<![CDATA[", "<!--", "--!>", "<?php", "&#x3c;script&#x3e;", "\0", "\udc80", "\u2028",
]  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=12).map("".join)


class Seen(HTMLParser):
    """Every element with its attributes, and whatever is neither an element nor text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.others, self.texts = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def other(self, what):
        self.others.append(what)

    handle_comment = handle_decl = handle_pi = unknown_decl = other


def require_harmless(html):
    seen = Seen(html)
    assert not seen.others
    for tag, attributes in seen.elements:
        assert tag in ELEMENTS
        assert attributes.keys() <= TEXTS | VALUES | {"style", "href", "src"}
        if "href" in attributes:
            target = unquote(attributes["href"])
            assert tag == "a" and re.match("https?://|mailto:|#|(?!//)[^:#?]*(#|$)", target), target
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/")
            assert "svg" not in attributes["src"]
        for name in VALUES & attributes.keys():
            assert "url" not in (attributes[name] or "") or "(" not in attributes[name]
        for declaration in filter(None, (attributes.get("style") or "").split(";")):
            name, _, value = declaration.partition(":")
            assert name.lower() in STYLES
            assert "url(" not in value.lower() and "\\" not in value and "expression(" not in value.lower()


@pytest.mark.attack("13")
@given(hostile)
def test_of_any_html_only_what_is_listed_is_left(text):
    html = safe_html(text)
    require_harmless(html)
    require_harmless(safe_html(html))


@pytest.mark.attack("13")
@given(st.text(max_size=60))
def test_escaped_text_stays_the_text(text):
    kept = "".join(Seen(safe_html(escape(text))).texts)
    assert kept == re.sub("\r\n?", "\n", text).replace("\0", "\ufffd")  # as every HTML parser does


def test_what_the_package_shows_stays_as_it_is():
    line = curve([(1, 3.0), (2, 2.5), (3, 2.0)])
    kept = safe_html(line)
    assert Seen(kept).elements == [(tag, {k: v.strip() for k, v in a.items()}) for tag, a in Seen(line).elements]
    for html in (
        '<div dir="ltr" class="mathjax_ignore" style="text-align:left"><strong>x</strong></div>',
        '<details open=""><summary style="cursor:pointer">more</summary><p>text</p></details>',
        '<bdi title="id 1" style="padding:0 4px;background:rgba(128,128,128,.15);border:3px double #2b87c8">x</bdi>',
        '<table cellpadding="3"><tr><td colspan="2">x</td></tr></table>',
        '<a href="01_next.html#top">next</a>',
        '<a href="https://example.org/a?b=c&amp;d=e#f">far</a>',
    ):
        assert safe_html(html) == html


def outputs(data, **metadata):
    return [new_output("display_data", data=data, metadata=metadata)]


def notebook(*cells, **metadata):
    return new_notebook(cells=list(cells), metadata={"language_info": {"name": "python"}} | metadata)


ACTIVE = {
    "application/javascript": "alert('active')",
    "text/html": "<script>alert('active')</script><b onclick='alert(1)'>bold</b>",
    "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'><script>alert('active')</script></svg>",
    "text/vnd.mermaid": "</pre><script>alert('active')</script>",
    "application/vnd.jupyter.widget-view+json": {"model_id": "</script><script>alert('active')</script>"},
    "text/markdown": "[x](javascript:alert('active')) <script>alert('active')</script>",
    "text/latex": "$</div><script>alert('active')</script>$",
    "text/plain": "<script>alert('active')</script>",
}


def test_the_text_of_a_picture_is_the_same_on_its_page(tmp_path):
    picture = Picture(b"png", 'BLEU\'s interval: <b> & "quotes"')
    data, metadata = picture._repr_mimebundle_()
    data["image/png"] = "AAAA"
    page = page_of(notebook(new_code_cell("1", outputs=outputs(data, **metadata))), tmp_path, "Alt")
    assert [a["alt"] for tag, a in Seen(page).elements if tag == "img"] == [picture.alt]


def hostile_notebook():
    markdown = "\n\n".join(["# <script>alert('active')</script>", *FRAGMENTS[:12], "[x](javascript:alert('active'))"])
    cells = [new_markdown_cell(markdown), new_code_cell("1 < 2", outputs=outputs(ACTIVE))]
    for kind, value in ACTIVE.items():
        cells.append(new_code_cell("", outputs=outputs({kind: value})))
    size = {"width": "1 onerror=alert('active')", "height": '1" onload="alert(1)', "alt": "<script>"}
    for kind in ("image/png", "image/jpeg"):
        cells.append(
            new_code_cell("", outputs=outputs({kind: "AAAA\"><script>alert('active')</script>"}, **{kind: size}))
        )
    for text in FRAGMENTS:
        cells.append(new_code_cell(text, outputs=outputs({"text/html": text})))
        cells.append(new_code_cell("", outputs=[new_output("stream", name="stdout", text=text)]))
        cells.append(new_code_cell("", outputs=[new_output("error", ename=text, evalue=text, traceback=[text])]))
    odd = notebook(
        *cells, title="</title><script>alert('active')</script>", widgets={"x": "</script>"}, celltoolbar="x"
    )
    odd.cells[0].metadata["transient"] = 5
    odd.cells[1].metadata["tags"] = ['"><script>']
    odd.cells[1].outputs[0].metadata |= {"image/png": "text", "alt": ["list"], "text/html": {"isolated": True}}
    return odd


@pytest.mark.attack("13")
def test_no_notebook_makes_an_active_page(tmp_path):
    page = page_of(hostile_notebook(), tmp_path, "<script>alert('active')</script>")
    elements = [(tag, attributes) for tag, attributes in Seen(page).elements]
    assert not {tag for tag, _ in elements} & {"script", "iframe", "object", "embed", "base", "form", "link", "video"}
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src"):
            assert re.match(r"#|data:image/(png|jpeg)|https?://|[\w.%-]+(#|$)", attributes.get(name) or "#")
    metas = [a for tag, a in elements if tag == "meta" and "content" in a and a.get("http-equiv")]
    assert [meta["http-equiv"] for meta in metas] == ["Content-Security-Policy"]
    assert metas[0]["content"].startswith("default-src 'none'")
    assert "bold" in page


@pytest.mark.attack("13")
def test_a_page_loads_nothing(tmp_path):
    markdown = f"![x]({ADDRESS}/x.png) <img src='{ADDRESS}/y.png'> $\\frac{{1}}{{2}}$ and `$x$`"
    cells = [new_markdown_cell(markdown), new_code_cell("1", outputs=outputs({"text/html": f"<img src={ADDRESS}>"}))]
    page = page_of(notebook(*cells), tmp_path, "Title")
    for tag, attributes in Seen(page).elements:
        assert tag not in ("script", "link", "iframe")
        assert not (attributes.get("src") or "data:").startswith(("http", "//"))
    styles = "".join(re.findall("(?s)<style.*?</style>", page))
    assert not re.findall(r"url\(\s*['\"]?(?!data:)[^)]{1,60}", styles)
    assert "@import" not in styles
    assert r"$\frac{1}{2}$" in page, "a formula can be read as it is written"


@pytest.mark.attack("2")
def test_templates_come_from_the_installed_package_alone(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    for name in ("index.html.j2", "base.html.j2"):
        (tmp_path / "lab" / name).write_text("a program of the current folder")
    (tmp_path / "lab" / "conf.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "a program of" not in page_of(notebook(new_markdown_cell("# Here")), tmp_path, "Here")


@pytest.mark.attack("13")
@given(st.text(min_size=1, max_size=20) | st.binary(min_size=1, max_size=9).map(os.fsdecode))
def test_the_index_links_to_files_of_any_name(name):
    seen = Seen(index_of([(name, "A title", "ok", 1.0), (name, "", "failed", 1.0)]))
    (link,) = [attributes["href"] for tag, attributes in seen.elements if tag == "a"]
    assert re.fullmatch(r"[\w.~%/-]+\.html", link, re.ASCII)
    assert unquote_to_bytes(link) == os.fsencode(f"{name}.html")
    assert {tag for tag, _ in seen.elements} <= {"html", "meta", "title", "h1", "table", "tr", "th", "td", "a"}


def test_links_to_notebooks_and_markdown_pages_lead_to_their_pages(tmp_path):
    (tmp_path / "terms.md").write_text("# Terms\n[a](01_next.ipynb#top) [b](teaching.md) [c](https://example.org/x.md)")
    title, page = markdown_page(tmp_path / "terms.md")
    links = [attributes["href"] for tag, attributes in Seen(page).elements if tag == "a" and "class" not in attributes]
    assert title == "Terms"
    assert links == ["01_next.html#top", "teaching.html", "https://example.org/x.md"]


def test_the_index_lists_markdown_pages_after_the_notebooks():
    index = index_of([("00_one", "One", "ok", 1.0)], [("terms", "Terms <of> it")])
    assert index.index("00_one.html") < index.index('<a href="terms.html">Terms &lt;of&gt; it</a><td>terms.md')


@pytest.mark.attack("13")
def test_no_markdown_file_makes_an_active_page(tmp_path):
    (tmp_path / "page.md").write_text("\n\n".join(["# Page", *HOSTILE, *FRAGMENTS]), errors="replace")
    elements = Seen(markdown_page(tmp_path / "page.md")[1]).elements
    assert not {tag for tag, _ in elements} & {"script", "iframe", "object", "embed", "base", "form", "link", "video"}
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]


def test_a_link_that_would_be_a_script_is_a_file():
    assert 'href="javascript%3Aalert%281%29.html"' in index_of([("javascript:alert(1)", "t", "ok", 1.0)])


@pytest.mark.attack("13")
@needs_browser
def test_a_browser_runs_and_loads_nothing(listener, tmp_path):  # noqa: F811
    url, calls = listener
    texts = [text.format(url=url) for text in HOSTILE] + [text.replace(ADDRESS, url) for text in FRAGMENTS]
    texts = [text.encode(errors="replace").decode() for text in texts]
    cells = [new_markdown_cell("# Page")]
    for text in texts:
        cells.append(new_markdown_cell(text))
        cells.append(new_code_cell("", outputs=outputs({"text/html": text})))
        cells.append(new_code_cell("", outputs=outputs({"text/markdown": text})))
    page = page_of(notebook(*cells), tmp_path, "unchanged").replace("<details", "<details open")
    dom = shown(page, tmp_path)
    assert title(dom) == "unchanged"
    assert calls == []
    elements = Seen(dom.partition("<main>")[2]).elements
    assert {tag for tag, _ in elements} <= ELEMENTS, "nothing else, as the browser reads it"
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]


LINEAR = {
    "ESC ]": "\x1b]", "ESC [": "\x1b[", "ESC [ m": "\x1b[m", "colours": "\x1b[é31m", "letters": "a",
    "files": "/ipykernel_", "returns": "a\r", "div": "<div>", "bold": "<b id=1>", "bold and p": "<p><b>",
    "comments": "<!--", "quotes": "<a b='", "links": "[", "ends": "</x>", "declarations": "a:b;", "entities": "&a",
    "colour": "rgb(",
}  # fmt: skip


@pytest.mark.attack("12")
@pytest.mark.parametrize("part", LINEAR.values(), ids=LINEAR.keys())
def test_a_megabyte_of_anything_takes_seconds(part, tmp_path):
    text = part * (1_000_000 // len(part))
    begin = time.monotonic()
    clean = neutral_text(text, tmp_path)
    assert "\x1b" not in clean
    assert overwritten("\r" + text).count("\r") <= 1
    safe_html(text)
    safe_html(f'<p style="{text}" title="{text}">')
    short = clean[:100_000]
    cells = [new_code_cell("", outputs=outputs({kind: short})) for kind in ("text/html", "text/markdown", "text/plain")]
    cells.append(new_code_cell("", outputs=[new_output("stream", name="stdout", text=short)]))
    page_of(notebook(*cells), tmp_path, "Long")
    assert time.monotonic() - begin < 30


@pytest.mark.attack("12")
def test_depth_is_bounded():
    html = safe_html("<div>" * 5000 + "deep")
    assert html.count("<div>") == html.count("</div>") <= DEEPEST
    assert "deep" in html


def test_of_a_progress_bar_the_last_state_stays():
    def stream(name, text):
        return new_output("stream", name=name, text=text)

    parts = [stream("stdout", "1\r"), stream("stderr", "w"), stream("stdout", "2\r"), stream("stdout", "3\r\nx\r")]
    figure = new_output("display_data", data={"text/plain": "p"})
    ordered = in_order([*parts, figure, stream("stderr", "z")])
    assert [(o.name, o.text) if "text" in o else o.data["text/plain"] for o in ordered] == [
        ("stdout", "3\nx"), ("stderr", "w"), "p", ("stderr", "z"),
    ]  # fmt: skip
