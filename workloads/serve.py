"""Stage 3: the model behind HTTP on Ray Serve; users face it, so it stays up while replicas come
and go.

workloads serve --target laptop            # the newest trained run
workloads serve --model RUN|PATH|HUB_ID    # labels come from the model
"""

# No `from __future__ import annotations` here: Serve reads the annotations at run time.
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel
from ray import serve
from ray.serve.config import BackpressureConfig

from . import cluster, engines, keys, registry
from .artifacts import RunFolder
from .config import Target, TargetServe, UserError
from .engine import Info, read_info
from .replica import BATCH, Classifier, fetch, open_engine
from .sources import pinned

APP = "workloads"
ONGOING, QUEUED = 512, 64  # requests of a replica: beyond both it refuses at once, unread


def _log(line: str) -> None:
    logging.getLogger("ray.serve").info(line)


def locate(model: str, storage: str, mlflow: str | None = None) -> tuple[str, Info]:
    """A run's name, a path, a package, a hub id or models:/NAME@ALIAS of an MLflow registry -> what
    `fetch` takes, with the hub's commit or of the registry's version, and what the model is.

    Raises UserError when there is none or it neither classifies nor embeds texts.
    """
    if registry.is_registered(model):
        model = registry.fetched(model, storage, mlflow)
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
    told["serve"]["api_keys_file"] = None  # is on the machine of this command
    application: dict[str, Any] = {
        "name": APP,
        "route_prefix": "/",
        "import_path": "workloads.serve:build",
        "args": {"model": model, "target": told, **({"texts": texts} if texts else {})},
    }
    if access.hashes:
        application["args"]["keys"] = access.hashes
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
    try:
        serve.start(proxy_location="EveryNode", http_options=http_options(limits))
    except ray.exceptions.RayError as e:
        kind, why = ingress_kind(), str(e).strip().splitlines()[-1]
        if not serve.status().applications:
            serve.shutdown()  # or the next one would find it half started
        hint = "; target.serve.ingress=proxy does without it" if kind == "HAProxy" else ""
        raise UserError(f"{kind} did not start: {why[:500]}{hint}") from None
    _check_reach(limits)
    try:
        args = AppArgs(model=model, target=target, texts=texts or [], keys=access.hashes)
        serve.run(application(args), name=APP, route_prefix="/")
    except RuntimeError as e:
        raise UserError(f"the deployment failed: {_reason(str(e))[-1500:]}") from None
    host = "127.0.0.1" if limits.host == "0.0.0.0" else limits.host
    return f"http{'s' if limits.tls_certfile else ''}://{host}:{limits.port}"


def _reason(otherwise: str) -> str:
    """What Serve says of the application, and of what the replicas died."""
    app = serve.status().applications.get(APP)
    said = [app.message, *(one.message for one in app.deployments.values())] if app else []
    return "\n".join(line for line in said if line) or otherwise


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
