"""ray.init for a Target, what the cluster has, and whether a run fits it, asked before anything
waits for ever."""

import contextlib
import logging
import math
import os
import re
import shutil
import socket
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import ingress
from .config import Target, UserError
from .sources import is_remote

Resources = dict[str, float]
CHIP = "ray.io/accelerator-type"


class Node(NamedTuple):
    """One node: what it has in all, and its Ray labels."""

    resources: Resources
    labels: dict[str, str] = {}
    id: str = ""
    address: str = "here"
    head: bool = False


@dataclass(frozen=True)
class Ask:
    """So many equal bundles, each on one node."""

    stage: str
    count: int
    bundle: Resources
    key: str  # the config key that makes it smaller
    per_node: int | None = None  # at most so many on one node
    together: bool = False  # all on one node
    selector: dict[str, str] = field(default_factory=dict)  # labels of the nodes it may use

    @property
    def total(self) -> Resources:
        """The sum of all bundles."""
        return {name: amount * self.count for name, amount in self.bundle.items()}


def joins(target: Target) -> str | None:
    """The address of the cluster to join, or None where Ray is started here."""
    address, given = target.ray.address, os.environ.get("RAY_ADDRESS")
    # A submitted job is told its own cluster; auto could find another on the same machine.
    return given if given and address in (None, "auto") else address


def alone(target: Target, streaming: bool) -> bool:
    """Whether training is one worker on this machine: then the command itself is that worker,
    which spares the start of Ray and of two processes that import torch."""
    return target.train.width == (1, 1) and joins(target) is None and not streaming


def worker_cpus(target: Target) -> float:
    """CPUs of a training worker, and threads."""
    given = target.train.cpus_per_worker
    if given is not None:
        return given
    if joins(target):
        return 1
    from ray._private.utils import get_num_cpus  # those that Ray will count here

    return max(1, get_num_cpus() // target.train.width[1])


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
        # HAProxy has no TLS here.
        ingress.prepare("proxy" if target.serve.tls_certfile else target.serve.ingress)
        os.environ.setdefault("WORKLOADS_MAX_READ_S", f"{target.serve.max_read_s:g}")
    try:
        if address is None:
            _start(quiet)
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


def _start(quiet: dict[str, Any]) -> None:
    """Starts Ray here. It gives itself 30 s, which a busy machine needs for the first reading of
    its files: there is a second try. Raises UserError."""
    import psutil  # comes with Ray
    import ray

    before = psutil.Process().children()
    for last in (False, True):
        try:
            # "local", or Ray would join a cluster that happens to run on this machine.
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
            return
        except Exception as e:  # Ray raises no other kind here
            if "timed out during startup" not in str(e):
                raise
            for child in set(psutil.Process().children()).difference(before):
                with contextlib.suppress(psutil.Error):
                    if "/ray/" in " ".join(child.cmdline()):
                        child.kill()  # it would go on beside the next one
            if last:
                raise UserError(
                    "Ray did not start on this machine within 30 s, twice: it is too busy, or has "
                    "too little memory. End what else runs here, and give the same command again"
                ) from None


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


def nodes(target: Target) -> list[Node]:
    """The nodes with CPUs of the joined cluster, or this machine, starting nothing."""
    import ray

    if joins(target) or ray.is_initialized():
        connect(target)
        return live_nodes()
    from ray._private.accelerators import NvidiaGPUAcceleratorManager
    from ray._private.utils import get_num_cpus

    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    return [Node({"CPU": float(get_num_cpus()), "GPU": float(gpus)}, head=True)]


def live_nodes() -> list[Node]:
    """The nodes with CPUs of the cluster that this process has joined."""
    import ray

    return [
        Node(
            n["Resources"],
            n["Labels"],
            n["NodeID"],
            n["NodeManagerAddress"],
            "node:__internal_head__" in n["Resources"],
        )
        for n in ray.nodes()
        if n["Alive"] and n["Resources"].get("CPU", 0) > 0
    ]


def asks(target: Target, stages: list[str]) -> list[Ask]:
    """What each stage needs at least."""
    tune, train, serve = target.tune, target.train, target.serve
    needs = {
        "tune": Ask(
            "tune",
            1,
            _bundle(tune.cpus_per_trial, tune.gpus_per_trial),
            "target.tune.cpus_per_trial",
            selector=tune.label_selector,
        ),
        "train": Ask(
            "train",
            train.width[0],
            _bundle(worker_cpus(target), train.gpus_per_worker),
            "target.train.workers",
            1 if train.placement == "STRICT_SPREAD" else None,
            train.placement == "STRICT_PACK",
            train.label_selector,
        ),
        # A quarter more than the least: a rolling update starts new replicas before it stops old
        # ones.
        "serve": Ask(
            "serve",
            math.ceil(1.25 * max(1, serve.replicas.min)),
            _bundle(serve.cpus_per_replica, serve.gpus_per_replica),
            "target.serve.cpus_per_replica",
            serve.max_replicas_per_node,
            selector=serve.label_selector,
        ),
    }
    return [needs[stage] for stage in stages if stage in needs]


def _bundle(cpus: float, gpus: float) -> Resources:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def matches(labels: dict[str, str], selector: dict[str, str]) -> bool:
    """Whether Ray would take a node with such labels: VALUE, !VALUE, in(A, B) or !in(A, B); what
    is not there is not equal."""

    def one(key: str, wanted: str) -> bool:
        values = re.split(r"\s*,\s*", re.sub(r"^!?(in\(\s*)?|\s*\)$", "", wanted))
        return (labels.get(key) in values) != wanted.startswith("!")

    return all(one(key, wanted) for key, wanted in selector.items())


def one_chip(ask: Ask, cluster: list[Node]) -> Ask:
    """The same ask, on GPUs of one type: of those that its nodes have, the one that holds most.

    The slowest worker sets the pace of all of them.
    """
    fits = Counter[str]()
    for node in cluster:
        if ask.bundle.get("GPU") and matches(node.labels, ask.selector) and CHIP in node.labels:
            fits[node.labels[CHIP]] += _on_one(ask.bundle, node.resources)
    if len(fits) < 2:
        return ask
    return replace(ask, selector={**ask.selector, CHIP: fits.most_common(1)[0][0]})


def capacity(ask: Ask, cluster: list[Node]) -> int:
    """How many of its bundles fit on the nodes that it may use, when they are empty."""
    return sum(_on_one(ask.bundle, n.resources) for n in cluster if matches(n.labels, ask.selector))


def _on_one(bundle: Resources, node: Resources) -> int:
    def fit(name: str, amount: float) -> int:
        has = node.get(name, 0)
        if name == "GPU" and amount < 1:  # a share lies on one GPU: 4 GPUs hold 4 shares of 0.6
            return math.floor(has) * math.floor(1 / amount + 1e-9)
        return math.floor(has / amount + 1e-9)

    return min(fit(name, amount) for name, amount in bundle.items())


def misfit(ask: Ask, cluster: list[Node]) -> str | None:
    """Why what is asked for can never be placed, or None."""
    usable = [n.resources for n in cluster if matches(n.labels, ask.selector)]
    if cluster and not usable:
        return (
            f"{ask.stage}: none of the {len(cluster)} node(s) has labels as "
            f"target.{ask.stage}.label_selector wants them: {ask.selector}. Widen it, or label the "
            "nodes (ray start --labels)"
        )
    for name, amount in ask.bundle.items():
        largest = max((node.get(name, 0) for node in usable), default=0)
        if amount > largest:
            way_out = "Try --target cpu-cluster" if name == "GPU" else f"Lower {ask.key}"
            return (
                f"{ask.stage} asked for {amount:g} {name} on one node; the largest node has "
                f"{largest:g}. {way_out}"
            )
    nodes_fit = [min(_on_one(ask.bundle, n), ask.per_node or ask.count) for n in usable]
    fits = max(nodes_fit) if ask.together else sum(nodes_fit)
    if fits >= ask.count:
        return None
    each = " and ".join(f"{amount:g} {name}" for name, amount in ask.bundle.items())
    if ask.stage == "serve" and ask.per_node:
        return (
            f"serve needs room for {ask.count} x {each} (an update starts new replicas before it "
            f"stops old ones), {ask.per_node} to a node; {fits} fit on the {len(usable)} node(s). "
            "Add nodes, or lower target.serve.replicas.min, or raise "
            "target.serve.max_replicas_per_node"
        )
    return (
        f"{ask.stage} asked for {ask.count} x {each}; {fits} fit on the {len(usable)} node(s). "
        f"Lower {ask.key}"
    )


def preflight(target: Target, stages: list[str]) -> None:
    """Raises UserError when a stage asks for more than there is: Ray would wait for ever without a
    word."""
    cluster = nodes(target)
    if problems := [p for ask in asks(target, stages) if (p := misfit(ask, cluster))]:
        raise UserError("\n".join(problems))


def free_places() -> None:
    """Removes what this job has placed. Ray keeps the placement group of an actor that was killed
    as long as the job lives, and another one may find no room beside it."""
    import ray
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    job = ray.get_runtime_context().get_job_id()
    for name, about in ray.util.placement_group_table().items():
        if name.endswith(job) and about["state"] != "REMOVED":  # the id ends with its job's
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))


def probe_storage(target: Target) -> None:
    """Raises UserError naming the nodes that do not see the storage folder; for clusters of several
    nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage = target.ray.storage
    alive = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if is_remote(storage) or len(alive) < 2:
        return
    mark = Path(storage).expanduser().resolve() / f".probe-{uuid.uuid4().hex}"
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


def check_space(target: Target, checkpoint_bytes: int) -> None:
    """Raises UserError when the storage, a local folder, has no room for a training's
    checkpoints."""
    storage = Path(target.ray.storage).expanduser().resolve()
    if is_remote(target.ray.storage):
        return
    there = next(p for p in (storage, *storage.parents) if p.exists())
    # Beside those that stay: the latest two, the one that is being written, and the model.
    count = target.train.keep_checkpoints + 4
    free, needed = shutil.disk_usage(there).free, count * checkpoint_bytes
    if free < needed:
        raise UserError(
            f"target.ray.storage '{target.ray.storage}' has {free / 1e6:,.1f} MB free; {count} "
            f"checkpoints need {needed / 1e6:,.1f} MB. Make room, give another storage, or lower "
            "target.train.keep_checkpoints"
        )


def check_port(host: str, port: int, or_else: str = "") -> None:
    """Raises UserError when a port of this machine is taken; `or_else` is another way out."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as e:
            raise UserError(
                f"{host}:{port} cannot be used ({e.strerror}). Stop what listens there, or give "
                "another: "
                f"target.serve.port={port + 1 if port < 65535 else 8000}"
                + (f"; or {or_else}" if or_else else "")
            ) from None
