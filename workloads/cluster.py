"""ray.init for a Target, what the cluster has, and whether a run fits it, asked before anything
waits for ever."""

import logging
import math
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Target, UserError
from .sources import is_remote

Resources = dict[str, float]


@dataclass(frozen=True)
class Ask:
    """So many equal bundles, each on one node."""

    stage: str
    count: int
    bundle: Resources
    key: str  # the config key that makes it smaller
    per_node: int | None = None  # at most so many on one node
    together: bool = False  # all on one node

    @property
    def total(self) -> Resources:
        """The sum of all bundles."""
        return {name: amount * self.count for name, amount in self.bundle.items()}


def joins(target: Target) -> str | None:
    """The address of the cluster to join, or None where Ray is started here."""
    address, given = target.ray.address, os.environ.get("RAY_ADDRESS")
    # A submitted job is told its own cluster; auto could find another on the same machine.
    return given if given and address in (None, "auto") else address


def check_storage(target: Target) -> None:
    """Raises UserError for a storage path that a joined cluster could not share."""
    storage, address = target.ray.storage, joins(target)
    if address and not is_remote(storage) and not Path(storage).expanduser().is_absolute():
        raise UserError(
            f"target.ray.storage is '{storage}', a relative path, but the run joins a cluster "
            f"({address}): "
            "it would land in a throw-away folder. Give an absolute path or a URI that all nodes "
            "reach, "
            "as in target.ray.storage=/mnt/shared/runs"
        )


def connect(target: Target) -> bool:
    """Starts Ray or joins a cluster; True if it was started here. Raises UserError when it cannot
    be joined."""
    check_storage(target)
    address = joins(target)
    # Read once, when Ray's processes start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our own table instead
    # Ctrl-C ends the command; Tune's own handler would end the sweep as if it were whole.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    import ray

    if ray.is_initialized():
        return address is None
    if address is not None:
        _check_answers(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # One machine is not taken away in parts: spares an actor at every start of a training.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        if address is None:
            # "local", or Ray would join a cluster that happens to run on this machine.
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        if address is None:
            raise
        raise UserError(
            f"no Ray cluster answers at {address} ({' '.join(str(e).split())[:200]}). "
            "Start one (ray start --head), or run here with --target laptop. A cluster with a "
            "token needs "
            "RAY_AUTH_MODE=token and the token on this side too"
        ) from None
    return address is None


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes; raises UserError after seconds."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return  # auto, or a scheme that Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as e:
        raise UserError(
            f"no Ray cluster answers at {address} ({e}). Start one (ray start --head), or run here "
            "with --target laptop"
        ) from None


def nodes(target: Target) -> list[Resources]:
    """What each node has in all (CPU, GPU): of the joined cluster, or of this machine, starting
    nothing."""
    import ray

    if joins(target) or ray.is_initialized():
        connect(target)
        return [
            n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0
        ]
    from ray._private.accelerators import NvidiaGPUAcceleratorManager
    from ray._private.utils import get_num_cpus

    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    return [{"CPU": float(get_num_cpus()), "GPU": float(gpus)}]


def asks(target: Target, stages: list[str]) -> list[Ask]:
    """What each stage needs at least."""
    tune, train, serve = target.tune, target.train, target.serve
    needs = {
        "tune": Ask(
            "tune",
            1,
            _bundle(tune.cpus_per_trial, tune.gpus_per_trial),
            "target.tune.cpus_per_trial",
        ),
        "train": Ask(
            "train",
            train.width[0],
            _bundle(train.cpus_per_worker, train.gpus_per_worker),
            "target.train.workers",
            1 if train.placement == "STRICT_SPREAD" else None,
            train.placement == "STRICT_PACK",
        ),
        # A quarter more than the least: a rolling update starts new replicas before it stops old
        # ones.
        "serve": Ask(
            "serve",
            math.ceil(1.25 * serve.replicas.min),
            _bundle(serve.cpus_per_replica, serve.gpus_per_replica),
            "target.serve.cpus_per_replica",
            serve.max_replicas_per_node,
        ),
    }
    return [needs[stage] for stage in stages if stage in needs]


def _bundle(cpus: float, gpus: float) -> Resources:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def capacity(bundle: Resources, cluster: list[Resources]) -> int:
    """How many such bundles fit on the nodes when they are empty."""
    return sum(_on_one(bundle, node) for node in cluster)


def _on_one(bundle: Resources, node: Resources) -> int:
    def fit(name: str, amount: float) -> int:
        has = node.get(name, 0)
        if name == "GPU" and amount < 1:  # a share lies on one GPU: 4 GPUs hold 4 shares of 0.6
            return math.floor(has) * math.floor(1 / amount + 1e-9)
        return math.floor(has / amount + 1e-9)

    return min(fit(name, amount) for name, amount in bundle.items())


def misfit(ask: Ask, cluster: list[Resources]) -> str | None:
    """Why what is asked for can never be placed, or None."""
    for name, amount in ask.bundle.items():
        largest = max((node.get(name, 0) for node in cluster), default=0)
        if amount > largest:
            way_out = "Try --target cpu-cluster" if name == "GPU" else f"Lower {ask.key}"
            return (
                f"{ask.stage} asked for {amount:g} {name} on one node; the largest node has "
                f"{largest:g}. {way_out}"
            )
    nodes_fit = [min(_on_one(ask.bundle, n), ask.per_node or ask.count) for n in cluster]
    fits = max(nodes_fit) if ask.together else sum(nodes_fit)
    if fits >= ask.count:
        return None
    each = " and ".join(f"{amount:g} {name}" for name, amount in ask.bundle.items())
    return (
        f"{ask.stage} asked for {ask.count} x {each}; {fits} fit on the {len(cluster)} node(s). "
        f"Lower {ask.key}"
    )


def preflight(target: Target, stages: list[str]) -> None:
    """Raises UserError when a stage asks for more than there is: Ray would wait for ever without a
    word."""
    cluster = nodes(target)
    if problems := [p for ask in asks(target, stages) if (p := misfit(ask, cluster))]:
        raise UserError("\n".join(problems))


def probe_storage(target: Target) -> None:
    """Raises UserError naming the nodes that do not see the storage folder; for clusters of several
    nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage = target.ray.storage
    alive = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if is_remote(storage) or len(alive) < 2:
        return
    mark = Path(storage) / f".probe-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        sees = ray.remote(num_cpus=0)(os.path.exists)
        asked = {
            n["NodeManagerAddress"]: sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
            ).remote(str(mark))
            for n in alive
        }
        blind = [name for name, answer in asked.items() if not ray.get(answer, timeout=60)]
    finally:
        mark.unlink()
    if blind:
        raise UserError(
            f"target.ray.storage '{storage}' is not shared: {', '.join(blind)} do not see what "
            "this node "
            "writes there. Mount one folder on all nodes, or give a URI (s3://, gs://)"
        )


def check_port(host: str, port: int) -> None:
    """Raises UserError when a port of this machine is taken."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as e:
            raise UserError(
                f"{host}:{port} cannot be used ({e.strerror}). Stop what listens there, or give "
                "another: "
                f"target.serve.port={port + 1 if port < 65535 else 8000}"
            ) from None
