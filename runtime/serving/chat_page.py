"""The chat page at `/`: static files, read once, and the headers that bind a browser to them.

The page talks to the API of its own server and to nothing else; the content security policy allows no inline code and
no insertion of HTML by scripts. The files are in `page/`; there is no build step.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _files() -> dict[str, Path]:
    """Return the page's files by their paths on the server."""
    found = {f"/page/{file.name}": file for file in sorted(_FOLDER.iterdir()) if file.suffix in _TYPES}
    return {"/": found.pop("/page/index.html"), **found}


FILES = _files()


def routes() -> list[Route]:
    """Return a route for each file."""
    return [_route(path, file) for path, file in FILES.items()]


def _route(path: str, file: Path) -> Route:
    response = Response(file.read_bytes(), 200, _HEADERS, f"{_TYPES[file.suffix]}; charset=utf-8")

    async def respond(request: Request) -> Response:
        return response

    return Route(path, respond)
