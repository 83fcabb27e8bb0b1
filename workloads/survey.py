"""Looks at a live cluster before work is sent to it: every node, the links between them, the pace
of their arithmetic. All nodes at once, and nothing waits longer than its limit.

workloads check --target cpu-cluster
"""

import contextlib
import math
import os
import platform
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import cluster, measure, model, verdict
from .artifacts import RunFolder
from .config import Run, Target, Task, UserError
from .prepared import Prepared
from .sources import model_folder

START_S = 90  # for a node to start a process and import torch
PAIRS = 28  # of eight nodes; beyond that each node is paired with the next one only


@ray.remote(num_cpus=0)
class Probe:
    """One process on one node that looks, listens and computes."""

    interface: str | None = None  # to listen on; None: whichever the host's name stands for

    def facts(
        self, target: Target, task: Task, mark: tuple[str, str], address: str
    ) -> dict[str, Any]:
        """What this node has and runs, and whether it can write to the storage."""
        import psutil  # comes with Ray

        storage, scratch = target.ray.storage, "/tmp"
        names = [n for n, a in psutil.net_if_addrs().items() if address in [x.address for x in a]]
        self.interface = names[0] if names else None
        return {
            "host": socket.gethostname(),
            "cpus": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": _gpus(),
            "torch_gpus": torch.cuda.device_count(),
            "versions": {
                "ray": ray.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__.partition("+")[0],
            },
            "interface": self.interface,
            "redis": bool(os.environ.get("RAY_REDIS_ADDRESS")),
            "free_gib": {
                place: round(shutil.disk_usage(place).free / 2**30, 1)
                for place in (scratch, storage)
                if os.path.isdir(place)
            },
            "storage": _attempt(lambda: RunFolder(storage, mark[0]).write_text(mark[1], "")),
            "model": _attempt(
                lambda: task.model.pretrained and model_folder(task.model.pretrained)
            ),
        }

    def clock(self) -> float:
        """This node's time."""
        return time.time()

    def sees(self, storage: str, marks: list[tuple[str, str]]) -> int:
        """How many marks of all nodes are in the storage as this node sees it."""
        return sum(RunFolder(storage, folder).has(name) for folder, name in marks)

    def remove(self, storage: str, folder: str) -> None:
        """Removes the marks of this check."""
        marks = RunFolder(storage, folder)
        with contextlib.suppress(OSError):  # another node was faster
            marks.files.delete_dir(marks.path)

    def free_port(self) -> int:
        """A port of this node for the others to meet."""
        with socket.socket() as sock:
            sock.bind(("", 0))
            return int(sock.getsockname()[1])

    def join(self, device: str, meet: str, rank: int, world: int) -> None:
        """Joins the process group of all probes."""
        if self.interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", self.interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", self.interface)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=meet,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=30),
        )

    def all_reduce(self, device: str, ranks: list[int], budget_s: float) -> dict[int, float]:
        """Times of all-reduces among some of the probes; called on all of them."""
        group = dist.new_group(ranks)
        return measure.all_reduces(device, budget_s, group) if dist.get_rank() in ranks else {}

    def leave(self) -> None:
        """Leaves the process group: one that dies must not take the others along."""
        dist.destroy_process_group()

    def pace(
        self, task: Task, target: Target, shared: list[Any], threads: int, rows: int, seconds: float
    ) -> float:
        """Seconds that a training step of so many rows takes here, without any network."""
        base, tokens = ray.get(shared[0])
        torch.set_num_threads(threads)
        return measure.step_s(task, target, base, tokens, rows, seconds)


def _gpus() -> list[str]:
    """Name and driver of each GPU, as the driver's own tool tells."""
    line = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else done.stdout.strip().splitlines()


def _attempt(what: Callable[[], Any]) -> str:
    """'ok', or why not."""
    try:
        what()
    except (UserError, OSError, ValueError) as e:
        return " ".join(str(e).split())[:300]
    return "ok"


# ---------------------------------------------------------------- the driver's side


def survey(run: Run, ready: Prepared, say: Callable[[str], None]) -> dict[str, Any]:
    """The facts of each node, the links between those that training may use, and their pace.

    A node that does not answer in time is in the answer, with what is known of it.
    """
    found = cluster.nodes(run.target)
    say(f"check: asking {len(found)} node(s)")
    probes = {node.id: _probe(node) for node in found}
    facts = _facts(run, found, probes)
    usable = [
        node
        for node in found
        if "problem" not in facts[node.id]
        and cluster.matches(node.labels, run.target.train.label_selector)
    ]
    seen: dict[str, Any] = {"nodes": list(facts.values()), "links": None, "pace": None}
    seen |= _counts(ready)
    if len(usable) > 1:
        say(f"check: timing all-reduces between {len(usable)} nodes")
        seen["links"] = _links(run.target, usable, probes)
    if usable:
        say("check: timing training steps")
        seen["pace"] = _pace(run, ready, usable, probes)
        seen["one_host"] = _one_host(run, ready, usable[0], probes[usable[0].id])
    for probe in probes.values():
        ray.kill(probe)
    return seen


def _counts(ready: Prepared) -> dict[str, int]:
    train = len(ready.stream) if ready.stream else len(ready.rows)
    return {"train_rows": train, "held_out_rows": len(ready.held_out)}


def here(run: Run, ready: Prepared) -> dict[str, Any]:
    """The same of this machine, in this process, as far as costs take it: the pace."""
    task, target = run.task, run.target
    rows = ready.rows.take(np.arange(min(len(ready.rows), 4096)))
    whole = min(task.train.global_batch, len(rows))
    share = max(1, whole // max(2, target.train.width[1]))

    def step_s(cores: float, count: int) -> float:
        torch.set_num_threads(max(1, int(cores)))
        return measure.step_s(task, target, ready.base, rows, count, 1.5)

    threads = cluster.worker_cpus(target)
    pace = {
        "rows": [share, whole],
        "step_s": [step_s(threads, share), step_s(threads, whole)],
        "trial_step_s": step_s(target.tune.cpus_per_trial, whole),
        "together_step_s": [],
    }
    return {"nodes": [], "links": None, "pace": pace, **_counts(ready)}


def _probe(node: cluster.Node) -> Any:
    there = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return Probe.options(scheduling_strategy=there).remote()  # type: ignore[attr-defined]


def _facts(
    run: Run, found: list[cluster.Node], probes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    folder, storage = f".probe-{uuid.uuid4().hex[:8]}", run.target.ray.storage
    marks = {node.id: (folder, str(i)) for i, node in enumerate(found)}
    asked = {
        n.id: probes[n.id].facts.remote(run.target, run.task, marks[n.id], n.address) for n in found
    }
    told = _answers(asked, START_S)
    answering = [n.id for n in found if isinstance(told[n.id], dict)]
    written = [marks[i] for i in answering if told[i]["storage"] == "ok"]
    seen = _answers({i: probes[i].sees.remote(storage, written) for i in answering}, 30)
    facts: dict[str, dict[str, Any]] = {}
    for node in found:
        resources = {k: v for k, v in node.resources.items() if k in ("CPU", "GPU")}
        known = {"address": node.address, "head": node.head, "labels": node.labels}
        facts[node.id] = {**known, "resources": resources}
        if node.id not in answering:
            facts[node.id]["problem"] = str(told[node.id])
            continue
        facts[node.id] |= {**told[node.id], **_clock(probes[node.id])}
        facts[node.id]["storage_sees"] = f"{seen[node.id]} of {len(written)}"
        if told[node.id]["storage"] == "ok" and seen[node.id] != len(written):
            facts[node.id]["storage"] = "not shared: does not see what other nodes wrote"
    _remove(storage, folder, probes, answering)
    return facts


def _remove(storage: str, folder: str, probes: dict[str, Any], answering: list[str]) -> None:
    """Every node removes the marks: where the storage is not shared each has its own."""
    ray.wait(
        [probes[i].remove.remote(storage, folder) for i in answering],
        num_returns=len(answering),
        timeout=30,
    )


def _answers(asked: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What each node answered within so many seconds, or why it did not."""
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    told: dict[str, Any] = {}
    for key, answer in asked.items():
        try:
            told[key] = ray.get(answer, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            told[key] = f"no answer in {seconds} s"
        except Exception as e:  # whatever is wrong there is the answer
            told[key] = " ".join(str(e).split())[-300:]
    return told


def _clock(probe: Any) -> dict[str, float]:
    """How far the clock there is ahead of this one, and the round trip, in milliseconds."""
    best = (9e9, 0.0)
    for _ in range(5):
        began = time.time()
        there = ray.get(probe.clock.remote(), timeout=30)
        trip = time.time() - began
        best = min(best, (trip, there - began - trip / 2))
    return {"clock_offset_ms": round(best[1] * 1e3, 1), "round_trip_ms": round(best[0] * 1e3, 2)}


def _links(target: Target, usable: list[cluster.Node], probes: dict[str, Any]) -> dict[str, Any]:
    """The link of all nodes together and of each pair, or why there is none."""
    there = [probes[node.id] for node in usable]
    n = len(there)
    port = ray.get(there[0].free_port.remote(), timeout=30)
    meet = f"tcp://{usable[0].address}:{port}"
    joined = {str(i): p.join.remote(target.device, meet, i, n) for i, p in enumerate(there)}
    wrong = [t for t in _answers(joined, 60).values() if t is not None]
    if wrong:
        return {"problem": wrong[0]}
    every = _timed(target, there, list(range(n)), 6)
    if every is None:
        return {"problem": "the all-reduce of all nodes did not end"}
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if len(pairs) > PAIRS:
        pairs = [(i, (i + 1) % n) for i in range(n)]
    named = []
    for i, j in pairs if n > 2 else []:
        times = _timed(target, there, [i, j], 2)
        if times is not None:
            both = verdict.line(times, 2)
            named.append({"nodes": [usable[i].address, usable[j].address], **both._asdict()})
    _answers({str(i): p.leave.remote() for i, p in enumerate(there)}, 30)
    return {
        "backend": "nccl" if target.device == "cuda" else "gloo",
        "nodes": n,
        "times_s": {str(size): seconds for size, seconds in every.items()},
        **verdict.line(every, n)._asdict(),
        "pairs": named,
    }


def _timed(
    target: Target, there: list[Any], ranks: list[int], budget_s: float
) -> dict[int, float] | None:
    asked = {
        str(i): p.all_reduce.remote(target.device, ranks, budget_s) for i, p in enumerate(there)
    }
    times = _answers(asked, 60 + 10 * budget_s)[str(ranks[0])]
    return times if isinstance(times, dict) else None


def _one_host(run: Run, ready: Prepared, node: cluster.Node, first: Any) -> dict[str, float] | None:
    """A step of the workers that fit on one node, and of one process with all of their CPUs; None
    where there is nothing to choose."""
    task, target = run.task, run.target
    (ask,) = cluster.asks(target, ["train"])
    workers = min(target.train.width[1], cluster.capacity(ask, [node]))
    if workers < 2 or target.device == "cuda":
        return None
    there = [_probe(node) for _ in range(workers)]
    threads = max(1, int(cluster.worker_cpus(target)))
    rows = ready.rows.take(np.arange(min(len(ready.rows), 4096)))
    whole = min(task.train.global_batch, len(rows))
    shared = [ray.put((ready.base, rows))]

    def steps(probes: list[Any], cores: int) -> list[Any]:
        share = math.ceil(whole / len(probes))
        asked = {
            str(i): p.pace.remote(task, target, shared, cores, share, 1.5)
            for i, p in enumerate(probes)
        }
        return list(_answers(asked, 120).values())

    meet = f"tcp://{node.address}:{ray.get(first.free_port.remote(), timeout=30)}"
    joined = {str(i): p.join.remote(target.device, meet, i, workers) for i, p in enumerate(there)}
    wrong = [t for t in _answers(joined, 60).values() if t is not None]
    times = None if wrong else _timed(target, there, list(range(workers)), 1)
    _answers({str(i): p.leave.remote() for i, p in enumerate(there)}, 30)
    many, one = steps(there, threads), steps([first], workers * threads)
    for probe in there:
        ray.kill(probe)
    if times is None or not all(isinstance(t, float) for t in many + one):
        return None
    return {
        "workers": workers,
        "threads": threads,
        "split_step_s": max(many),
        "one_step_s": one[0],
        **verdict.line(times, workers)._asdict(),
    }


def _pace(
    run: Run, ready: Prepared, usable: list[cluster.Node], probes: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of a step: of all rows and of a share, on one node alone and on all at once."""
    task, target = run.task, run.target
    rows = ready.rows.take(np.arange(min(len(ready.rows), 4096)))
    shared = [ray.put((ready.base, rows))]
    threads = max(1, int(cluster.worker_cpus(target)))
    whole = min(task.train.global_batch, len(rows))
    share = max(1, whole // max(2, min(len(usable), target.train.width[1])))
    first = probes[usable[0].id]

    def ask(probe: Any, cores: int, count: int) -> Any:
        return probe.pace.remote(task, target, shared, cores, count, 1.5)

    def alone(cores: int, count: int) -> float:
        told = _answers({"first": ask(first, cores, count)}, 120)["first"]
        if not isinstance(told, float):
            raise UserError(f"a training step on {usable[0].address} failed: {told}")
        return told

    together = _answers({n.id: ask(probes[n.id], threads, share) for n in usable}, 120)
    return {
        "rows": [share, whole],
        "step_s": [alone(threads, share), alone(threads, whole)],
        "trial_step_s": alone(max(1, int(target.tune.cpus_per_trial)), whole),
        "together_step_s": [t for t in together.values() if isinstance(t, float)],
        "gradient_bytes": measure.gradient_bytes(
            model.build(ready.base, task.model, 0), ready.rows, task.train.global_batch
        ),
    }
