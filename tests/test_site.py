"""The documentation site builds without a warning, holds together, loads nothing from elsewhere, and is complete."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import lrt_deploy
from lrt_deploy.cli.app import app

ROOT = Path(__file__).parents[1]
# Attributes by which a page makes a browser load something.
LOADED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "use": "href",
}


class Page(HTMLParser):
    """Links, anchors and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if (target := values.get(LOADED.get(tag, ""))) and values.get("rel") != "canonical":
            self.loaded.append(target)


def from_elsewhere(pages, styles):
    """(name, address) of what pages and style sheets load from another host."""
    found = [(name, url) for name, page in pages.items() for url in page.loaded if re.match(r"(https?:)?//", url)]
    for name, text in styles.items():
        urls = re.findall(r"url\(\s*[\"']?([^\"')]+)", text) + re.findall(r"@import\s+[\"']([^\"']+)", text)
        found += [(name, url) for url in urls if re.match(r"(https?:)?//", url)]
    return found


def broken_links(pages, exists):
    """(page, link) of relative links whose file or anchor is not there."""
    found = []
    for name, page in pages.items():
        for link in page.links if name != "404.html" else ():  # a server gives it for any path
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = os.path.normpath(Path(name).parent / unquote(parts.path)) if parts.path else name
            target = pages.get(path)
            anchor = unquote(parts.fragment)
            if not exists(path) or (anchor and target is not None and anchor not in target.anchors):
                found.append((name, link))
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    found = {path.relative_to(site).as_posix(): path for path in site.rglob("*.html")}
    return {name: Page(path.read_text(encoding="utf-8")) for name, path in found.items()}


def test_the_site_loads_nothing_from_elsewhere(site, pages):
    styles = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.css")}
    assert len(pages) > 20
    assert styles
    assert from_elsewhere(pages, styles) == []


def test_internal_links_of_the_site_hold(site, pages):
    assert broken_links(pages, lambda path: (site / path).exists()) == []


def test_the_programs_of_the_guide_are_on_its_page_whole(site):
    text = re.sub(r"<[^>]+>", "", (site / "custom-runtime.html").read_text(encoding="utf-8"))
    shown = "".join(html.unescape(text).split())
    for program in ("own_runtime.py", "own_runtime.mjs"):
        assert "".join((ROOT / "docs" / "snippets" / program).read_text(encoding="utf-8").split()) in shown


def test_the_checks_of_the_site_can_fail():
    page = Page('<script src="https://cdn.example/x.js"></script><a href="b.html#gone">b</a><a href="c.html">c</a>')
    pages = {"a.html": page, "b.html": Page('<h1 id="here"></h1>')}
    style = {"s.css": "@import 'https://fonts.example/f.css'; a { background: url(//cdn.example/x.png) }"}
    assert len(from_elsewhere(pages, style)) == 3
    assert broken_links(pages, pages.__contains__) == [("a.html", "b.html#gone"), ("a.html", "c.html")]


def test_every_public_name_has_its_entry_in_the_reference(site, pages):
    anchors = pages["python-api.html"].anchors
    named = {anchor.rpartition(".")[2] for anchor in anchors if anchor.startswith("lrt_deploy.")}
    assert sorted(set(lrt_deploy.__all__) - named - {"__version__"}) == []
    assert "lrt_deploy.__version__" in (site / "python-api.html").read_text(encoding="utf-8")


def test_every_verb_and_option_is_in_the_reference(site):
    text = (site / "cli.html").read_text(encoding="utf-8")
    for name, verb in typer.main.get_command(app).commands.items():
        assert f'<h2 id="{name}">' in text
        for param in verb.params:
            assert all(option in text for option in param.opts if option.startswith("--")), param.opts


def test_pages_that_are_made_from_elsewhere_are_there(pages):
    assert {"index.html", "measurements.html", "changelog.html", "security.html", "contributing.html"} <= set(pages)


def test_measured_pictures_are_shown_by_the_theme_of_the_page(site, pages):
    shown = pages["measurements.html"].loaded
    for name in ("convergence", "quality-speed", "roofline"):
        files = [f"measurements/{name}.svg#only-light", f"measurements/{name}-dark.svg#only-dark"]
        assert set(files) <= set(shown)
        assert all((site / file.partition("#")[0]).exists() for file in files)


def test_every_picture_of_the_documents_has_a_text():
    documents = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
    bare = [path.name for path in documents if re.search(r"!\[\s*\]\(", path.read_text(encoding="utf-8"))]
    assert bare == []
