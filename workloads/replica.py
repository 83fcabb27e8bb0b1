"""What runs in a replica of stage 3: a model's engine behind the app, and batches that all callers
share."""

# No `from __future__ import annotations` here: Serve reads the annotations at run time.
import asyncio
import logging
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ray import serve
from ray.serve.exceptions import RayServeException

from . import __version__, api, engines, explain, manifest, protocols, samples, wire
from .artifacts import local_copy
from .batcher import Batcher, OverloadedError
from .config import Target, UserError
from .engine import Encoded, Engine, Info, load, padded
from .metrics import Metric, Metrics, asked, log_file
from .sources import is_remote, model_folder, pinned, public_name, short_name

BATCH = {"cpu": 8, "cuda": 64}  # most rows in one forward pass
BATCH_TOKENS = 16_384
SHORT = 20_000  # characters that are encoded between two other requests without being noticed
FIGURES_S = 2.0  # for the other replicas to tell theirs


@serve.deployment(name="classifier")
@serve.ingress()
class Classifier:
    """One replica: requests of all callers share batches, and the model runs beside the event
    loop."""

    def __init__(
        self, model: str, target: Target, texts: list[str], hashes: list[str] | None = None
    ) -> None:
        self.target, self.hashes = target, hashes
        # On a machine of another kind than the others this measures first, which takes a minute.
        self.engines = open_engine(model, target, texts, logging.getLogger("ray.serve").warning)
        self.engine = self.engines.main
        run = self.engine.info.notes.get("run")
        self.name = target.serve.name or run or short_name(model)
        self.batchers: list[Batcher] = []
        self.metrics = self._metrics()
        self.batch = self._batcher(self.engine.predict)
        self.lineage = lineage(model, self.engines.folder, self.engine.info)
        self.embeds: asyncio.Future[Batcher] | None = None
        self.explanations = explain.Line(self._explainer)
        self.all: Any = None  # a handle of all replicas

    def _batcher(self, predict: Callable[..., Any]) -> Batcher:
        limits = self.target.serve
        rows = limits.max_batch or BATCH[self.target.device]
        streams, wait_s = self.engine.streams, limits.max_wait_s

        def answered(lengths: list[int]) -> None:
            self.metrics.batch(lengths, padded(max(lengths), self.engine.limit))

        batcher = Batcher(predict, streams, rows, BATCH_TOKENS, wait_s, answered)
        self.batchers.append(batcher)
        return batcher

    def _metrics(self) -> Metrics:
        about = {"model": self.name, "engine": self.engine.kind, "version": __version__}
        context, log = _context(), None
        if context and self.target.serve.access_log:
            from ray.serve._private.logging_utils import get_serve_logs_dir

            log = log_file(Path(get_serve_logs_dir()) / f"access_{context.replica_tag}.log")

        def waiting() -> int:
            return sum(len(batcher.lengths) for batcher in self.batchers)

        tag = context.replica_tag if context else ""
        return Metrics(self.engine.info.labels, about, waiting, tag, log, context is None)

    async def figures(self) -> list[Metric]:
        """Of this replica, for the one that is asked for those of all."""
        return self.metrics.collect()

    async def all_figures(self) -> list[list[Metric]]:
        """Of all replicas: whoever asks their common address reaches any one. Those of this one
        alone when another does not tell its own in time."""
        context = _context()
        if context is None:
            return [await self.figures()]
        if self.all is None:
            self.all = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            told = self.all.broadcast("figures")
            found = await told.results_async(timeout_s=FIGURES_S, return_exceptions=True)
        except (TimeoutError, RayServeException):
            return [await self.figures()]
        return [one for one in found if isinstance(one, list)]

    def __serve_build_asgi_app__(self) -> Any:
        info, limits = self.engine.info, self.target.serve
        about = {"model": self.name, "labels": info.labels, "max_tokens": info.max_tokens}
        about |= {"dimensions": info.dimensions, "engine": self.engine.kind}
        about |= {"notes": plain(info.notes), "card": info.card, "lineage": self.lineage}
        own = limits.max_inputs, self.classify, self.embed, info.max_tokens, info.vocabulary
        model = protocols.Model(self.name, info.labels, info.dimensions, *own, self.explained)
        wire.write_at_once()
        own_metrics = self.metrics, self.all_figures
        return api.make_app(model, about, limits, self.hashes, self.admit, *own_metrics)

    async def admit(self) -> None:
        """Raises BusyError for a request that would wait too long, before it costs anything."""
        try:
            for batcher in self.batchers:  # labels and embeddings wait for the same cores
                await batcher.room()
        except OverloadedError as e:
            raise api.BusyError(str(e)) from None

    async def classify(
        self, texts: list[str], parameters: protocols.Parameters
    ) -> protocols.Scored:
        """Scores of each text."""
        rows = self._few(await self._encoded(texts))
        logits = await self.batch([row.ids for row in rows])
        function, top_k = parameters.function_to_apply, parameters.top_k
        scores = [self.engine.decode(row, function, top_k) for row in logits]
        self.metrics.predicted([one[0]["label"] for one in scores])
        return protocols.Scored(scores, self._cut(rows))

    async def embed(self, given: list[str] | list[list[int]]) -> protocols.Embedded:
        """The embedding of each text, or row of token ids."""
        made = isinstance(given[0], list)
        rows = self._few(self._checked(given) if made else await self._encoded(given))
        batch = await self._embedder()
        vectors = await batch([row.ids for row in rows])
        return protocols.Embedded(vectors, self._cut(rows), sum(len(row.ids) for row in rows))

    async def explained(
        self, text: str, parameters: protocols.ExplainParameters
    ) -> protocols.Explained:
        """Why a text has the label that the engine gives it, or would have another."""
        rows = self._few(await self._encoded([text]))
        logits = await self.batch([rows[0].ids])
        scores = {one["label"]: one["score"] for one in self.engine.decode(logits[0])}
        label = next(iter(scores)) if parameters.label is None else parameters.label
        if label not in scores:
            known = ", ".join(self.engine.info.labels[:20])[:300]
            raise protocols.Refusal(422, f"parameters.label: no such label; there are {known}")
        try:
            found = await self.explanations(text, label, parameters.steps)
        except explain.BusyError as e:
            raise protocols.Refusal(429, f"busy: {e}; try again", {"Retry-After": "2"}) from None
        except explain.TooLongError as e:
            raise protocols.Refusal(413, str(e)) from None
        except explain.CannotError as e:
            raise protocols.Refusal(400, str(e)) from None
        return protocols.Explained({**found, "score": scores[label]}, self._cut(rows))

    def _explainer(self) -> explain.Explainer:
        """Of any engine's model: loaded when it is first asked for, which takes seconds."""
        # More threads than one wait for each other where predictions take the cores.
        limits, is_torch = self.target.serve, self.engine.kind == "torch"
        threads = engines.streams(limits) if is_torch else 1
        device = "cuda" if limits.gpus_per_replica else "cpu"
        return explain.Explainer(self.engines.folder, self.name, device, threads)

    def _cut(self, rows: list[Encoded]) -> list[int]:
        """The numbers of the texts that are longer than the model takes."""
        cut = [i for i, row in enumerate(rows) if row.truncated]
        if cut:
            self.metrics.truncated.inc(len(cut))
        return cut

    async def _encoded(self, texts: Any) -> list[Encoded]:
        if sum(map(len, texts)) < SHORT:
            return self.engine.encode(texts)
        rows = await asyncio.to_thread(self.engine.encode, texts)
        await self.admit()  # others have come meanwhile
        return rows

    def _few(self, rows: list[Encoded]) -> list[Encoded]:
        most, total = self.target.serve.max_request_tokens, sum(len(row.ids) for row in rows)
        if total > most:
            raise protocols.Refusal(413, f"{total:,} tokens; at most {most:,} in one request")
        asked(len(rows), total)
        return rows

    def _checked(self, rows: Any) -> list[Encoded]:
        """Token ids that a client has made itself; raises Refusal."""
        info = self.engine.info
        for i, row in enumerate(rows):
            if len(row) > info.max_tokens:
                reason = f"input {i} has {len(row)} tokens; at most {info.max_tokens}"
                raise protocols.Refusal(413, reason)
            if max(row) >= info.vocabulary:
                reason = f"input {i}: a token over {info.vocabulary - 1}, the vocabulary's last"
                raise protocols.Refusal(422, reason)
        return [Encoded(row, False) for row in rows]

    async def _embedder(self) -> Batcher:
        """Of a classifier, set up when it is first asked for an embedding: takes a second."""
        if not self.engine.info.labels:
            return self.batch
        if self.embeds is None:
            self.embeds = asyncio.ensure_future(self._load_embedder())
        return await asyncio.shield(self.embeds)

    async def _load_embedder(self) -> Batcher:
        try:
            engine = await asyncio.to_thread(self.engines.embedding)
        except BaseException:
            self.embeds = None  # the next request tries again
            raise
        return self._batcher(partial(engine.predict, head="embedding"))


def _context() -> Any:
    """The replica that this is; None where Serve did not start it."""
    try:
        return serve.get_replica_context()
    except RayServeException:
        return None


class Engines(NamedTuple):
    """What a replica answers with."""

    main: Engine
    embedding: Callable[[], Engine]  # loads it
    folder: Path  # of the model


def open_engine(
    model: str, target: Target, texts: list[str] | None, say: Callable[[str], None]
) -> Engines:
    """The engines that this machine's figures choose; raises UserError unless the main one gives
    the model's golden answers."""
    limits, folder = target.serve, fetch(model)
    choice = engines.ready(folder, model, limits, texts, say)
    device = "cuda" if limits.gpus_per_replica else "cpu"
    count = engines.streams(limits)
    how: Any = {"exported": choice.exported, "streams": count, "device": device}
    how["precision"] = target.precision
    engine = load(folder, model, choice.kind, **how)
    problem = samples.golden_problem(engine, folder)
    if problem and choice.spare:
        say(f"{choice.kind} is not used on this machine: {problem}; {choice.spare} instead")
        engine = load(folder, model, choice.spare, **how)
        problem = samples.golden_problem(engine, folder)
    if problem:
        raise UserError(f"{model} is not served with {engine.kind}: {problem}")

    def embedding() -> Engine:
        if choice.embeds == engine.kind:
            return engine  # the same weights
        return load(folder, model, choice.embeds, **how, head="embedding")

    return Engines(engine, embedding, folder)


def lineage(model: str, folder: Path, info: Info) -> dict[str, Any]:
    """Where a model comes from: what /model and the headers of all answers say of it."""
    notes = info.notes
    run = str(notes["run"]) if notes.get("run") else None
    version = str(notes.get("registered", "")).removeprefix("models:/")
    from_hub = pinned(model, folder).endswith(f"@{folder.name}")
    begun = notes.get("pretrained") or notes.get("task", {}).get("model", {}).get("pretrained")
    front = re.match(r"---\s*\n(.*?)\n---", info.card or "", re.DOTALL)
    said = re.search(r"^license:\s*(?:-\s*)?[\"']?([\w.+-]+)", front[1], re.M) if front else None
    return {
        "version": version or run or (folder.name if from_hub else "-"),
        "digest": manifest.model_digest(folder, notes.get("digest")),
        "run": run,
        "pretrained": public_name(begun),
        "license": said and said[1],
    }


def plain(notes: dict[str, Any]) -> dict[str, Any]:
    """Those notes that fit on a page: numbers, words, and short lists of them. JSON as others read
    it has neither NaN nor infinity."""

    def fits(value: Any) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        return value is None or isinstance(value, (str, int))

    def short(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= 20 and all(map(fits, value))

    return {key: value for key, value in notes.items() if fits(value) or short(value)}


def fetch(model: str) -> Path:
    """The local folder of what `locate` found, on the machine of the replica."""
    return local_copy(model) if is_remote(model) else model_folder(model)
