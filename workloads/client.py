"""Asks a running endpoint; the opposite of serve."""

import os
import re
import sys
from typing import Any

import httpx

from .config import UserError


def ask(url: str, texts: list[str], top_k: int | None = None) -> list[list[dict[str, Any]]]:
    """The labels with scores of each text, best first; with the API key in WORKLOADS_API_KEY, or
    the first of WORKLOADS_API_KEYS, if there is one. Says on standard error which texts were cut.
    Raises UserError with the endpoint's own reason."""
    key = _key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answers: list[list[dict[str, Any]]] = []
    cut: list[str] = []
    # In pieces, so that a long file does not meet the endpoint's limits.
    with httpx.Client(timeout=60, headers=headers) as client:
        for start in range(0, len(texts), 32):
            base = url.rstrip("/").removesuffix("/predict")
            found, short = _ask(client, base, texts[start : start + 32], top_k)
            answers += found
            cut += [f"{start + number + 1}" for number in short]
    if cut:
        numbers = ", ".join(cut[:10]) + (", ..." if len(cut) > 10 else "")
        what = f"text {numbers} was" if len(cut) == 1 else f"{len(cut)} texts ({numbers}) were"
        print(f"{what} cut: the model takes only so much, the beginning was read", file=sys.stderr)
    return answers


def read_lines() -> list[str]:
    """The texts on standard input, one a line, empty ones left out; raises UserError."""
    if sys.stdin.isatty():
        print("one text a line; Ctrl-D ends", file=sys.stderr)
    try:
        lines = sys.stdin.buffer.read().decode("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not UTF-8 at byte {e.start}") from None
    if not (texts := [line for line in lines if line.strip()]):
        raise UserError("no texts: give some as arguments, or one a line on standard input")
    return texts


def _key() -> str:
    """The API key of the environment, empty where there is none; raises UserError."""
    for name in ("WORKLOADS_API_KEY", "WORKLOADS_API_KEYS"):
        for key in re.split(r"[,\s]+", os.environ.get(name, "")):
            if key and not re.fullmatch(r"[!-~]+", key):
                raise UserError(f"{name}: a key is all ASCII; no other could be sent")
            if key and not key.startswith("sha256:"):  # that is what a server may have of a key
                return key
    return ""


class TooLargeError(UserError):
    """More than the endpoint takes in one request."""


def _ask(
    client: httpx.Client, base: str, texts: list[str], top_k: int | None
) -> tuple[list[Any], list[int]]:
    """The answers, and the numbers of the texts that were cut; in halves where all are too much."""
    try:
        found, response = _post(client, base, {"inputs": texts, "parameters": {"top_k": top_k}})
    except TooLargeError:
        if len(texts) == 1:
            raise
        half = len(texts) // 2
        first, cut = _ask(client, base, texts[:half], top_k)
        second, more = _ask(client, base, texts[half:], top_k)
        return first + second, cut + [half + number for number in more]
    short = response.headers.get("x-truncated-inputs")
    return found, [int(number) for number in short.split(",")] if short else []


def _post(
    client: httpx.Client, base: str, body: dict[str, Any]
) -> tuple[list[Any], httpx.Response]:
    """The answer, as it is and read."""
    url = f"{base}/predict"
    try:
        response = client.post(url, json=body)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as e:
        raise UserError(f"--url {url}: {e}; as in http://127.0.0.1:8000") from None
    except UnicodeEncodeError:
        raise UserError("a text is not valid UTF-8") from None
    except httpx.HTTPError as e:
        raise UserError(
            f"{url} does not answer ({e}). Start an endpoint: workloads serve"
        ) from None
    if response.status_code != 200:
        try:
            reason = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            reason = response.text[:200]
        way_out = " (the key goes into WORKLOADS_API_KEY)" if response.status_code == 401 else ""
        if response.status_code == 400 and "it embeds" in str(reason):
            way_out = (
                "; `workloads predict` asks for labels. For embeddings:\n"
                f"curl -s {base}/embed -H 'content-type: application/json' "
                """-d '{"inputs": ["TEXT", "ANOTHER"]}'"""
            )
        kind = TooLargeError if response.status_code == 413 else UserError
        raise kind(f"{url} refused with {response.status_code}: {reason}{way_out}")
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise UserError(
            f"{url} answers, but not with labels: {response.text[:100]!r}. Is it an endpoint of "
            "`workloads serve`?"
        )
    return found, response
