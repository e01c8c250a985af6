"""The page for browsers that ask for /: page.html, beside this file. There is no data in it, so it needs no token."""

import base64
import hashlib
import re
from contextlib import suppress
from pathlib import Path

import falcon

from service import JSON, Problem, extra, preferred


def middleware() -> list["Page"]:
    """Return what serves the page; without page.html, or reading.py, / is JSON for everybody."""
    try:
        return [Page(Path(__file__).with_name("page.html").read_bytes())] if extra("reading") else []
    except OSError:
        return []


class Page:
    """Falcon middleware. Its headers let the browser run only what stands in the page, and connect only to here."""

    def __init__(self, content: bytes):
        parts = re.findall(rb"<(?:style|script)>(.*?)</(?:style|script)>", content, re.DOTALL)
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)
        only_here = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._content, self._etag = content, f'"{hashlib.sha256(content).hexdigest()}"'
        self._headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": f"default-src 'none'; script-src {hashes}; style-src {hashes}; {only_here}",
            "Cross-Origin-Opener-Policy": "same-origin",  # who opens this tab cannot steer it
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
            "ETag": self._etag,
            "Vary": "Accept",
        }

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        is_asked = "inlet.refusal" not in req.env and req.path == "/" and req.method in ("GET", "HEAD") and not req.auth
        if is_asked and self._is_preferred(req, resp):
            resp.complete, resp.data = True, self._content
            resp.set_headers(self._headers)
            known = req.get_header("If-None-Match", default="")
            if self._etag in known or known == "*":
                resp.status = 304

    @staticmethod
    def _is_preferred(req: falcon.Request, resp: falcon.Response) -> bool:
        with suppress(Problem):  # the app says so, to who has a token
            return preferred(req, resp, JSON, "text/html") == "text/html"
        return False
