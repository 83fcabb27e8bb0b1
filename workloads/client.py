"""Asks a running endpoint; the opposite of serve."""

from typing import Any

import httpx

from .config import UserError


def ask(url: str, texts: list[str], top_k: int | None = None) -> list[list[dict[str, Any]]]:
    """The labels with scores of each text, best first; raises UserError with the endpoint's own
    reason."""
    answers: list[list[dict[str, Any]]] = []
    # In pieces, so that a long file does not meet the endpoint's limits.
    with httpx.Client(timeout=60) as client:
        for start in range(0, len(texts), 32):
            body = {"inputs": texts[start : start + 32], "parameters": {"top_k": top_k}}
            answers += _post(client, f"{url.rstrip('/')}/predict", body)
    return answers


def _post(client: httpx.Client, url: str, body: dict[str, Any]) -> Any:
    try:
        response = client.post(url, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise UserError(
            f"{url} does not answer ({e}). Start an endpoint: workloads serve"
        ) from None
    if response.status_code != 200:
        try:
            reason = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            reason = response.text[:200]
        raise UserError(f"{url} refused with {response.status_code}: {reason}")
    return response.json()
