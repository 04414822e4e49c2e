"""The chat page at `/`: static files, read once, and the headers that bind a browser to them.

The page talks to the API of its own server and to nothing else; the content security policy allows no inline code and
no insertion of HTML by scripts. The files are in this folder; there is no build step. Knows no HTTP server.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class PageFile(NamedTuple):
    """A file of the page."""

    content: bytes
    media_type: str


def _files() -> dict[str, PageFile]:
    """Return the page's files by their paths on the server."""
    found = {
        f"/page/{path.name}": PageFile(path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8")
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    }
    return {"/": found.pop("/page/index.html"), **found}


FILES = _files()
