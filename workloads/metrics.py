"""What a replica tells of itself: figures for Prometheus, an id for each request, and a line about
it for a log. Nothing that a request holds is in any of them. No Ray here.

Each figure has the name of its replica, so those of all replicas can be told, and added up,
together. What is refused before it reaches a replica is in none of them.
"""

import json
import logging
import random
import re
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
GONE = 499  # the client, before it had an answer: as in nginx's logs
OTHER = "other"  # a path that is none of the server's: there is no end to them
REASONS = {
    400: "malformed",
    401: "no_key",
    404: "not_found",
    405: "method",
    408: "slow",
    413: "too_large",
    415: "wrong_type",
    422: "invalid",
    429: "busy",
    431: "large_headers",
    GONE: "gone",
}
LOG_BYTES, LOGS = 100_000_000, 5
Figures = Callable[[], Awaitable[list[list[Metric]]]]  # of each replica
_GIVEN = re.compile(rb"[ -~]{1,128}")
_ASKED: ContextVar[dict[str, int] | None] = ContextVar("asked", default=None)


class Metrics:
    """The figures of one replica. Any thread may tell it something.

    `waiting` says how many rows wait for a forward pass, `about` is what the model is. With
    `tells_id` answers get their request's id; in Ray Serve they have it already.
    """

    def __init__(
        self,
        labels: list[str],
        about: dict[str, str] | None = None,
        waiting: Callable[[], float] = lambda: 0,
        replica: str = "",
        log: logging.Logger | None = None,
        tells_id: bool = True,
    ) -> None:
        self.replica, self.log, self.tells_id = replica, log, tells_id
        self.paths: set[str] = set()  # of the server
        self.known: dict[tuple[str, int], tuple[Any, Any]] = {}  # to look them up takes longer
        self.registry = CollectorRegistry()
        own: Any = {"namespace": "workloads", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by status", ["path", "code"], **own)
        self.refusals = Counter("refusals", "Requests refused", ["reason"], **own)
        took = "From a request's head to its answer"
        self.seconds = Histogram("request_seconds", took, ["path"], buckets=SECONDS, **own)
        self.in_flight = Gauge("requests_in_flight", "Requests that have no answer yet", **own)
        Gauge("waiting_rows", "Rows that wait for a forward pass", **own).set_function(waiting)
        self.batches = Histogram("batch_rows", "Forward passes, by rows", buckets=ROWS, **own)
        self.lengths = Histogram("text_tokens", "Texts, by tokens", buckets=TOKENS, **own)
        self.texts = Counter("texts", "Texts answered", **own)
        self.tokens = Counter("tokens", "Tokens of these texts", **own)
        self.padding = Counter("padding_tokens", "Computed beside them, to pad batches", **own)
        self.truncated = Counter("truncated_texts", "Texts cut to the model's limit", **own)
        Info("model", "What is served", **own).info(about or {})
        self.predictions: dict[str, Any] = {}  # by class
        if labels:
            classes = Counter("predictions", "Texts, by their best class", ["label"], **own)
            self.predictions = {label: classes.labels(label) for label in labels}

    def batch(self, lengths: list[int], padded: int) -> None:
        """A forward pass over rows of so many tokens, each padded to `padded`."""
        tokens = sum(lengths)
        self.batches.observe(len(lengths))
        self.texts.inc(len(lengths))
        self.tokens.inc(tokens)
        self.padding.inc(len(lengths) * padded - tokens)
        for length in lengths:
            self.lengths.observe(length)

    def predicted(self, labels: list[str]) -> None:
        """The best class of each text of a request."""
        for label, count in Tally(labels).items():
            self.predictions[label].inc(count)

    def collect(self) -> list[Metric]:
        """All figures, each with the replica's name."""
        found = list(self.registry.collect())
        for metric in found:
            metric.samples = [
                one._replace(labels={"replica": self.replica, **one.labels})
                for one in metric.samples
                if not one.name.endswith("_created")
            ]
        return found

    def add_to(self, app: FastAPI, figures: "Figures | None") -> None:
        """GET /metrics."""

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> Response:
            """Figures of all replicas, for Prometheus."""
            content = written(await figures() if figures else [self.collect()])
            return Response(content, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def watch(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Has an app answer a request."""
        answer = Answer(scope, send, self.tells_id)
        if self.log:
            _ASKED.set({"texts": 0, "tokens": 0})
        began = time.perf_counter()
        self.in_flight.inc()
        try:
            await app(scope, receive, answer)
        except Exception:
            answer.status = 500
            raise
        finally:
            self.in_flight.dec()
            self._answered(scope, answer, time.perf_counter() - began)

    def _answered(self, scope: Scope, answer: "Answer", seconds: float) -> None:
        status = answer.status or GONE
        path = scope["path"] if scope["path"] in self.paths else OTHER
        if (path, status) not in self.known:
            own = self.requests.labels(path, status), self.seconds.labels(path)
            self.known[path, status] = own
        count, histogram = self.known[path, status]
        count.inc()
        histogram.observe(seconds)
        if status in REASONS:
            self.refusals.labels(REASONS[status]).inc()
        if self.log:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": answer.id.decode(),
                "method": scope["method"],
                "path": path,  # another one may hold anything
                "status": status,
                "ms": round(1000 * seconds, 2),
                **(_ASKED.get() or {}),
                "key": scope.get("key"),
            }
            self.log.info(json.dumps(line))


class Answer:
    """Sends an answer with the request's id: the client's own, or a new one."""

    def __init__(self, scope: Scope, send: Send, tells_id: bool) -> None:
        self.send, self.tells_id, self.status, self.id = send, tells_id, 0, b""
        for key, value in scope["headers"]:
            if key == b"x-request-id" and _GIVEN.fullmatch(value):
                self.id = value
        self.id = self.id or b"%016x" % random.getrandbits(64)

    def __call__(self, message: Message) -> Awaitable[None]:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.tells_id:
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id)]
        return self.send(message)


def asked(texts: int, tokens: int) -> None:
    """Notes for the log what the request that is being answered holds."""
    found = _ASKED.get()
    if found is not None:
        found["texts"] += texts
        found["tokens"] += tokens


def written(replicas: list[list[Metric]]) -> bytes:
    """The figures of all replicas in Prometheus' text format."""
    merged: dict[str, Metric] = {}
    for metric in (metric for figures in replicas for metric in figures):
        if metric.name in merged:
            merged[metric.name].samples += metric.samples
        else:
            merged[metric.name] = metric
    every: Any = SimpleNamespace(collect=merged.values)
    return generate_latest(every)


def log_file(file: Path) -> logging.Logger:
    """What writes lines to a file, and begins another when it is large."""
    handler = RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=LOGS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.Logger(__name__, logging.INFO)
    log.addHandler(handler)
    return log
