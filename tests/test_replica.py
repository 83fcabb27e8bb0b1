"""A replica without Ray, before an engine that takes its time: whom it lets wait."""

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest

from workloads import replica
from workloads.config import Target
from workloads.engine import Encoded, Info

TOKEN_S = 5e-5


class Slow:
    """A token for each character, and the same time for each token."""

    kind, streams, limit = "slow", 1, 0
    info = Info(["a", "b"], 4096, False, {}, 0, 4, "mean", 1000, None)

    def encode(self, texts: list[str]) -> list[Encoded]:
        return [Encoded([1] * len(text), False) for text in texts]

    def predict(self, rows: list[list[int]], head: str | None = None) -> np.ndarray:
        time.sleep(TOKEN_S * sum(map(len, rows)))
        return np.ones((len(rows), 4 if head == "embedding" else 2), np.float32)

    def decode(self, *_: Any) -> list[dict[str, Any]]:
        return [{"label": "a", "score": 1.0}]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks one replica; its engine's pace is known."""
    engines = replica.Engines(Slow(), Slow, "/")  # type: ignore[arg-type]
    monkeypatch.setattr(replica, "open_engine", lambda *_: engines)
    monkeypatch.setattr(replica, "lineage", lambda *_: {})
    own: Any = replica.Classifier.func_or_class  # type: ignore[attr-defined]
    one = own.__mro__[1]("/m", Target(), [])  # what Serve has wrapped
    transport = httpx.ASGITransport(app=one.__serve_build_asgi_app__())
    return httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=60)


@pytest.mark.parametrize("path", ["/predict", "/embed"])
@pytest.mark.parametrize("texts", [["x" * 1000] * 2, ["x" * 1000] * 24])
def test_what_would_wait_too_long_is_refused(client: Any, path: str, texts: list[str]) -> None:
    async def codes() -> Counter[int]:
        await client.post(path, json={"inputs": "x" * 100})
        asked = [client.post(path, json={"inputs": texts}) for _ in range(30)]
        return Counter([answer.status_code for answer in await asyncio.gather(*asked)])

    found = asyncio.run(codes())
    # All of them would be 3 and 36 s of work.
    assert found.keys() == {200, 429}
    assert found[200] < 15
