"""Stage 3: the model behind HTTP on Ray Serve; users face it, so it stays up while replicas come
and go.

workloads serve --target laptop            # the newest trained run
workloads serve --model RUN|PATH|HUB_ID    # labels come from the model
"""

# No `from __future__ import annotations` here: Serve reads the annotations at run time.
import asyncio
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
from pydantic import BaseModel
from ray import serve
from ray.serve.config import BackpressureConfig

from . import api, cluster, engines, keys, protocols, samples
from .artifacts import RunFolder, local_copy
from .batcher import Batcher, OverloadedError
from .config import Target, TargetServe, UserError
from .engine import Encoded, Engine, Info, load, read_info
from .sources import is_remote, model_folder, pinned, short_name

APP = "workloads"
ONGOING, QUEUED = 512, 64  # requests of a replica: beyond both it refuses at once, unread
BATCH = {"cpu": 8, "cuda": 64}  # most rows in one forward pass
BATCH_TOKENS = 16_384
SHORT = 20_000  # characters that are encoded between two other requests without being noticed


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
        self.name = self.engine.info.notes.get("run") or short_name(model)
        self.batch = self._batcher(self.engine.predict)
        self.embeds: asyncio.Future[Batcher] | None = None

    def _batcher(self, predict: Callable[..., Any]) -> Batcher:
        limits = self.target.serve
        rows = limits.max_batch or BATCH[self.target.device]
        streams, wait_s = self.engine.streams, limits.max_wait_s
        return Batcher(predict, streams, rows, BATCH_TOKENS, max_wait_s=wait_s)

    def __serve_build_asgi_app__(self) -> Any:
        info, limits = self.engine.info, self.target.serve
        about = {"model": self.name, "labels": info.labels, "max_tokens": info.max_tokens}
        about |= {"dimensions": info.dimensions, "engine": self.engine.kind}
        about |= {"notes": plain(info.notes), "card": info.card}
        own = limits.max_inputs, self.classify, self.embed, info.max_tokens, info.vocabulary
        model = protocols.Model(self.name, info.labels, info.dimensions, *own)
        api.write_at_once()
        return api.make_app(model, about, limits, self.hashes, self.admit)

    async def admit(self) -> None:
        """Raises BusyError for a request that would wait too long, before it costs anything."""
        try:
            await self.batch.room()
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
        return protocols.Scored(scores, [i for i, row in enumerate(rows) if row.truncated])

    async def embed(self, given: list[str] | list[list[int]]) -> protocols.Embedded:
        """The embedding of each text, or row of token ids."""
        made = isinstance(given[0], list)
        rows = self._few(self._checked(given) if made else await self._encoded(given))
        batch = await self._embedder()
        vectors = await batch([row.ids for row in rows])
        cut = [i for i, row in enumerate(rows) if row.truncated]
        return protocols.Embedded(vectors, cut, sum(len(row.ids) for row in rows))

    async def _encoded(self, texts: Any) -> list[Encoded]:
        if sum(map(len, texts)) < SHORT:
            return self.engine.encode(texts)
        return await asyncio.to_thread(self.engine.encode, texts)

    def _few(self, rows: list[Encoded]) -> list[Encoded]:
        most, total = self.target.serve.max_request_tokens, sum(len(row.ids) for row in rows)
        if total > most:
            raise protocols.Refusal(413, f"{total:,} tokens; at most {most:,} in one request")
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


class Engines(NamedTuple):
    """What a replica answers with."""

    main: Engine
    embedding: Callable[[], Engine]  # loads it


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

    return Engines(engine, embedding)


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


def _log(line: str) -> None:
    logging.getLogger("ray.serve").info(line)


def fetch(model: str) -> Path:
    """The local folder of what `locate` found, on the machine of the replica."""
    return local_copy(model) if is_remote(model) else model_folder(model)


def locate(model: str, storage: str) -> tuple[str, Info]:
    """A run's name, a path, a package or a hub id -> what `fetch` takes, with the hub's commit, and
    what the model is.

    Raises UserError when there is none or it neither classifies nor embeds texts.
    """
    if "/" not in model and ":" not in model and not Path(model).is_dir():
        run = RunFolder(storage, model)
        if run.has_model():
            model = f"{run.uri}/model"
        elif run.has("run.json"):
            raise UserError(
                f"run '{model}' has no model yet; train it: workloads train --run {model}"
            )
    elif Path(model).is_dir():
        path = Path(model).resolve()
        model = str(path / "model" if (path / "model" / "config.json").is_file() else path)
    folder = fetch(model)
    return pinned(model, folder), read_info(folder, model)


class AppArgs(BaseModel, extra="forbid"):
    """`args` of the application in a Serve config file."""

    model: str
    """What --model takes, but for a run's name: a folder, a URI, package:NAME/PATH or a hub id."""
    target: Target = Target()
    texts: list[str] = []
    """Some of what it will be asked, for a model without validation rows: lets it be served by
    engines that round, if these agree with the exact one."""
    keys: list[str] = []
    """SHA-256 hashes of the API keys, beside those that keys.read finds on the cluster."""
    insecure: bool = False
    """Nobody needs a key, though everybody can reach it."""


def choose(args: AppArgs, say: Callable[[str], None], golden: bool = False) -> engines.Choice:
    """The engine that the replicas will use; what it needs is made and measured now, on a machine
    that a replica may get. With `golden`, its answers are compared there before any replica starts.

    Raises UserError where an engine was asked for that may not be used, or answers otherwise.
    """
    here = [ray.get_runtime_context().get_node_id()]
    if [node.id for node in cluster.live_nodes()] == here and not golden:
        return engines.ready(fetch(args.model), args.model, args.target.serve, args.texts, say)
    there: Any = _ready_there
    for said in there.options(**_actor_options(args.target)).remote(args, golden):
        one = ray.get(said)
        if isinstance(one, UserError):
            raise one
        if isinstance(one, engines.Choice):
            return one
        say(one)
    raise AssertionError


@ray.remote(num_returns="streaming", max_calls=1)
def _ready_there(args: AppArgs, golden: bool) -> Iterator[Any]:
    """What it says, line by line, then the choice or what is wrong."""
    limits, folder = args.target.serve, fetch(args.model)
    try:
        yield from engines.missing(folder, args.model, limits, args.texts)
        choice = engines.ready(folder, args.model, limits, args.texts)
        if golden:
            open_engine(args.model, args.target, args.texts, print)
        yield choice
    except UserError as e:
        yield e


def build(args: AppArgs) -> serve.Application:
    """The application: import_path of a Serve config file, on a cluster that runs. What it raises
    leaves in place what was served before."""
    hashes = list(dict.fromkeys([*args.keys, *keys.read(args.target.serve)]))
    listens = _client()
    host = listens.http_config.host if listens else args.target.serve.host
    keys.check(host, keys.Access(hashes, args.insecure))
    _log(choose(args, _log, golden=True).reason)
    return application(args.model_copy(update={"keys": hashes}))


def application(args: AppArgs) -> serve.Application:
    """The deployment with its limits."""
    limits = args.target.serve
    width: dict[str, Any] = {"num_replicas": limits.replicas.max}
    if limits.replicas.min < limits.replicas.max:
        width = {
            "autoscaling_config": {
                "min_replicas": limits.replicas.min,
                "initial_replicas": max(1, limits.replicas.min),  # a broken model is told at once
                "max_replicas": limits.replicas.max,
                "target_ongoing_requests": 2 * (limits.max_batch or BATCH[args.target.device]),
                "upscale_delay_s": 5,
                "downscale_delay_s": limits.replicas.idle_s,
                "downscale_to_zero_delay_s": limits.replicas.idle_s,
            }
        }
    return Classifier.options(  # type: ignore[attr-defined]
        **width,
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_replicas_per_node=limits.max_replicas_per_node,
        max_surge_percent=25,  # rounded up: the new replicas answer before the old ones stop
        ray_actor_options=_actor_options(args.target),
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ).bind(args.model, args.target, args.texts, args.keys)


def config_file(
    model: str, target: Target, texts: list[str], access: keys.Access = keys.EVERYBODY
) -> dict[str, Any]:
    """What `serve deploy` takes: the same application with the same limits, for the same
    callers."""
    told = target.model_dump(mode="json", include={"device", "precision", "serve"})
    application: dict[str, Any] = {
        "name": APP,
        "route_prefix": "/",
        "import_path": "workloads.serve:build",
        "args": {"model": model, "target": told, **({"texts": texts} if texts else {})},
    }
    if access.hashes:
        application["args"]["keys"] = access.hashes
        told["serve"]["api_keys_file"] = None  # is on the machine of this command
    if access.insecure:
        application["args"]["insecure"] = True
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(target.serve),
        "applications": [application],
    }


def http_options(limits: TargetServe) -> dict[str, Any]:
    """Where Serve listens, and how."""
    options: dict[str, Any] = {"host": limits.host, "port": limits.port}
    if limits.tls_certfile:
        options |= {"ssl_certfile": limits.tls_certfile, "ssl_keyfile": limits.tls_keyfile}
    return options


def deploy(
    model: str,
    target: Target,
    texts: list[str] | None = None,
    access: keys.Access = keys.EVERYBODY,
) -> str:
    """Deploys or replaces the app and returns its address once it answers.

    Raises UserError when the port is taken or Serve already listens elsewhere.
    """
    limits = target.serve
    keys.check(limits.host, access)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _check_proxy(limits)
    serve.start(proxy_location="EveryNode", http_options=http_options(limits))
    _check_reach(limits)
    try:
        args = AppArgs(model=model, target=target, texts=texts or [], keys=access.hashes)
        serve.run(application(args), name=APP, route_prefix="/")
    except RuntimeError as e:
        reason = serve.status().applications[APP].message or str(e)
        raise UserError(f"the deployment failed: {reason[-1500:]}") from None
    host = "127.0.0.1" if limits.host in ("0.0.0.0", "::") else limits.host
    return f"http{'s' if limits.tls_certfile else ''}://{host}:{limits.port}"


def _actor_options(target: Target) -> dict[str, Any]:
    (ask,) = cluster.asks(target, ["serve"])
    options: dict[str, Any] = {"num_cpus": ask.bundle["CPU"], "num_gpus": ask.bundle.get("GPU", 0)}
    there = cluster.live_nodes()
    heads = [node.id for node in there if node.head]
    if not heads or len(there) == 1:
        return {**options, "label_selector": ask.selector}
    # The head runs the cluster itself: replicas go there only when no other node has room.
    avoid = {**ask.selector, "ray.io/node-id": f"!{heads[0]}"}
    fallback = [{"label_selector": ask.selector}]
    return {**options, "label_selector": avoid, "fallback_strategy": fallback}


def _client() -> Any:
    """Of the Serve that runs here; None without one."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _check_proxy(limits: TargetServe) -> None:
    """Serve's address cannot change while it runs; without Serve, the port must be free."""
    client = _client()
    if client is None:
        for key in ("tls_certfile", "tls_keyfile"):
            file = getattr(limits, key)
            if file is not None and not Path(file).is_file():
                raise UserError(f"target.serve.{key} {file}: no such file")
        cluster.check_port(limits.host, limits.port)
        return
    now = client.http_config
    if (now.host, now.port) != (limits.host, limits.port):
        raise UserError(
            f"Serve already listens on {now.host}:{now.port} on this cluster, not on "
            f"{limits.host}:{limits.port}. Use "
            f"target.serve.host={now.host} target.serve.port={now.port}, or first: workloads "
            "serve --down"
        )
    if now.ssl_certfile != limits.tls_certfile:
        has = f"with {now.ssl_certfile}" if now.ssl_certfile else "without TLS"
        raise UserError(
            f"Serve already listens {has} on this cluster, which cannot change while it runs. Give "
            "the same target.serve.tls_certfile and tls_keyfile, or first: workloads serve --down"
        )


def _check_reach(limits: TargetServe) -> None:
    """A replica listens where the ingress does: HAProxy of one node must reach those of others;
    and it has no TLS."""
    if ingress_kind() != "HAProxy":
        return
    if keys.is_loopback(limits.host) and len(cluster.live_nodes()) > 1:
        problem = (
            f"target.serve.host is {limits.host}, which HAProxy of the other nodes cannot reach. "
            "Use target.serve.host=0.0.0.0, with API keys, or start the cluster without HAProxy"
        )
    elif limits.tls_certfile:
        problem = (
            "target.serve.tls_certfile is given, but this cluster's nodes were started with "
            "HAProxy, which has no TLS here. Start them without it (no `python -m "
            "workloads.ingress`), or put a terminator before it (clusters/README.md)"
        )
    else:
        return
    if not serve.status().applications:
        serve.shutdown()  # its address cannot change
    raise UserError(problem)


def is_deployed() -> bool:
    """Whether this cluster serves a model."""
    return APP in serve.status().applications


def ingress_kind() -> str:
    """What takes the requests of the Serve that runs."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    # Beside HAProxy there is a proxy for deployments without a replica.
    found = any("SERVE_PROXY_ACTOR-fallback" in actor["name"] for actor in actors)
    return "HAProxy" if found else "Ray's own proxy"


def down(keep_serve: bool = False) -> bool:
    """Removes the deployment, and Serve with it when nothing else runs there; False if there was
    none. Replicas answer first what they have accepted."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    found = is_deployed()
    if found:
        serve.delete(APP)
    if not keep_serve and not serve.status().applications:
        serve.shutdown()
    return found
