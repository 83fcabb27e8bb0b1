"""The page at GET /, for people: page.html and the headers that it is answered with.

One file with its script and style inside, because a page that fetches nothing works in networks
that reach nothing, and needs no build.
"""

import base64
import hashlib
import re
from pathlib import Path


def load() -> tuple[bytes, dict[str, str]]:
    """The page and its headers.

    The policy names the one script and the one style by their hashes, so a browser runs nothing
    that a model's labels or card, or a text, may smuggle in; and it asks no other server.
    """
    page = Path(__file__).with_name("page.html").read_bytes()
    policy = (
        f"default-src 'none'; script-src {_hash(page, 'script')}; style-src {_hash(page, 'style')};"
        " connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none';"
        " frame-ancestors 'none'"
    )
    return page, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "cache-control": "no-cache",  # another version of the server has another page
    }


def _hash(page: bytes, tag: str) -> str:
    """Of what is inside the page's one <script> or <style>, as a policy wants it."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
