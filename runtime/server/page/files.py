"""Serves the page's files, read once, with headers that let them load nothing from anywhere else."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
          ".js": "text/javascript; charset=utf-8"}
_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
           "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-cache"}  # kept by the browser, but asked for again with its ETag


class File:
    """One file of the page."""

    def __init__(self, path: Path) -> None:
        self._data, self._type = path.read_bytes(), _TYPES[path.suffix]
        self._tag = f'"{hashlib.sha256(self._data).hexdigest()[:32]}"'

    async def __call__(self, request: Request) -> Response:
        headers = _HEADERS | {"etag": self._tag}
        if self._tag in (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")):
            return Response(None, 304, headers)
        return Response(self._data, 200, headers | {"content-type": self._type})


def _paths() -> dict[str, Path]:
    here = Path(__file__).parent
    found = {f"/page/{path.name}": path for path in sorted(here.iterdir()) if path.suffix in _TYPES}
    return {"/" if path == "/page/index.html" else path: file for path, file in found.items()}


#: The files by the paths at which they are served.
PATHS = _paths()
