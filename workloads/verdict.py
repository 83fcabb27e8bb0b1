"""What the figures of a survey mean for each stage, in the words of the three-stage table.
Arithmetic only, so that every sentence can be tested.

The bus bandwidth is defined as in NCCL's tests: what each link carries, for any number of ranks.
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import math
from typing import Any, NamedTuple

from . import cluster
from .config import Run, Target

GIB_FREE = 1.0
CLOCK_MS = 1000.0
POOR = 0.3  # of a step waiting for gradients: beyond this the network is called poor
CLEARLY = 1.05  # times faster, to be worth a word
SLOW = 1.25  # times longer than alone, when all nodes compute at once
BUCKET_BYTES = 25 * 2**20  # DDP sends gradients in buckets of this size while it goes backward


class Link(NamedTuple):
    """What an all-reduce costs: a start, and then so many bytes a second on the bus."""

    latency_s: float
    bus_bytes_per_s: float

    def all_reduce_s(self, size: float, ranks: int) -> float:
        """Seconds to sum `size` bytes over so many ranks, as a ring does it."""
        if ranks < 2:
            return 0.0
        return self.latency_s + 2 * (ranks - 1) / ranks * size / self.bus_bytes_per_s


class Width(NamedTuple):
    """A training of so many workers, as predicted."""

    workers: int
    nodes: int
    step_s: float
    efficiency: float  # of perfect scaling from one worker
    all_reduce_share: float  # of the step


def line(times: dict[int, float], ranks: int) -> Link:
    """The line through the smallest and the largest all-reduce. What differs by less than a
    twentieth is noise: the rate is what that would be, and may be more."""
    latency, largest = times[min(times)], max(times)
    seconds = max(times[largest] - latency, times[largest] / 20)
    return Link(latency, 2 * (ranks - 1) / ranks * largest / seconds)


def exposed_s(all_reduce_s: float, compute_s: float, gradient_bytes: float) -> float:
    """The part of an all-reduce that a step waits for.

    DDP hides all buckets but the last behind the backward pass, two thirds of the arithmetic.
    """
    buckets = max(1.0, gradient_bytes / BUCKET_BYTES)
    hidden = (1 - 1 / buckets) * compute_s * 2 / 3
    return max(all_reduce_s / buckets, all_reduce_s - hidden)


def mbit(bytes_per_s: float) -> str:
    """Bytes a second in the words of those who build networks."""
    bits = bytes_per_s * 8 / 1e6
    return f"{bits / 1000:.3g} Gbit/s" if bits >= 1000 else f"{bits:.3g} Mbit/s"


def problems(nodes: list[dict[str, Any]]) -> list[str]:
    """What keeps a run from working on these nodes, one line each, with the way out."""
    head = next((n for n in nodes if n["head"] and "versions" in n), None)
    found = []
    for node in nodes:
        where = node["address"]
        if "problem" in node:
            found.append(
                f"{where}: {node['problem']}. Is the package installed there, with the head's "
                "versions, and is the node up?"
            )
            continue
        for name in ("ray", "python", "torch"):
            theirs, ours = (n["versions"][name] for n in (node, head or node))
            if theirs != ours:
                found.append(f"{where}: {name} {theirs}, but {ours} on the head; install the same")
        if node["storage"] != "ok":
            found.append(
                f"{where}: target.ray.storage: {node['storage']}. Mount one folder on all nodes, "
                "or give a URI (s3://, gs://)"
            )
        for place, gib in node["free_gib"].items():
            if gib < GIB_FREE:
                found.append(f"{where}: {gib} GiB free in {place}; make room")
        if node["resources"].get("GPU") and node["torch_gpus"] < node["resources"]["GPU"]:
            found.append(
                f"{where}: Ray counts {node['resources']['GPU']:g} GPU(s), torch sees "
                f"{node['torch_gpus']}; install a CUDA build of torch that fits the driver"
            )
    return found


def remarks(nodes: list[dict[str, Any]]) -> list[str]:
    """What is odd but keeps nothing from running."""
    return [
        f"{n['address']}: its clock is {n['clock_offset_ms'] / 1000:+.1f} s off"
        for n in nodes
        if abs(n.get("clock_offset_ms", 0)) > CLOCK_MS
    ] + [
        f"{n['address']}: the task's model cannot be had there ({n['model']})"
        for n in nodes
        if n.get("model", "ok") != "ok"
    ]


# ---------------------------------------------------------------- tune


def tune(run: Run, nodes: list[cluster.Node], seen: dict[str, Any]) -> dict[str, Any]:
    """Trials at once and the expected wall time of the sweep, without early stopping."""
    (ask,) = cluster.asks(run.target, ["tune"])
    plan, pace = run.task.tune, seen["pace"]
    fits = cluster.capacity(ask, nodes)
    at_once = min(fits, plan.num_trials, run.target.tune.concurrent_trials or fits)
    if not at_once or not pace:
        return {"at_once": at_once, "words": "no trial fits"}
    rows = min(plan.train_rows, seen["train_rows"])
    steps = plan.epochs * math.ceil(rows / run.task.train.global_batch)
    # Every evaluation reads the held-out rows forward only, a third of the arithmetic.
    evaluated = plan.num_evals * seen["held_out_rows"] / 3
    trial_s = pace["trial_step_s"] * (steps + evaluated / run.task.train.global_batch)
    trial_s *= slowest(pace) if at_once > 1 else 1
    # The best run again with other seeds, once all others are over.
    again = plan.num_candidates * (plan.confirm_seeds - 1)
    wall_s = (math.ceil(plan.num_trials / at_once) + math.ceil(again / at_once)) * trial_s
    words = (
        f"{at_once} of {plan.num_trials} trials at once, some {seconds(trial_s)} each"
        f"{', and the best again with other seeds' if again else ''}: about {seconds(wall_s)} in "
        "all, less what early stopping saves. Trials do not talk to each "
        "other: any network will do, and a lost node costs its trials a new start"
    )
    return {"at_once": at_once, "trial_s": trial_s, "wall_s": wall_s, "words": words}


# ---------------------------------------------------------------- train


def widths(target: Target, nodes: list[cluster.Node], seen: dict[str, Any]) -> list[Width]:
    """The predicted step of 1, 2, ... workers, packed on as few nodes as hold them."""
    ask = cluster.one_chip(cluster.asks(target, ["train"])[0], nodes)
    usable = [n for n in nodes if cluster.matches(n.labels, ask.selector)]
    holds = sorted((cluster.capacity(ask, [n]) for n in usable), reverse=True)
    if target.train.placement in ("SPREAD", "STRICT_SPREAD"):
        holds = [1] * len(holds)
    most = min(sum(holds), target.train.width[1])
    return [predict(n, nodes_for(n, holds), seen) for n in range(1, most + 1)]


def nodes_for(workers: int, holds: list[int]) -> int:
    """How many nodes so many workers take when the fullest are filled first."""
    for count in range(1, len(holds) + 1):
        if sum(holds[:count]) >= workers:
            return count
    return len(holds)


def predict(workers: int, nodes: int, seen: dict[str, Any]) -> Width:
    """A step's arithmetic for its share of the rows, and what it waits for its gradients."""
    pace, line = seen["pace"], seen["links"] or {}
    whole = pace["rows"][1]
    one = compute_s(pace, whole)
    share = compute_s(pace, math.ceil(whole / workers))
    if workers > 1:
        share *= slowest(pace)
    waits = 0.0
    if nodes > 1 and "latency_s" in line:
        link = Link(line["latency_s"], line["bus_bytes_per_s"])
        waits = exposed_s(
            link.all_reduce_s(pace["gradient_bytes"], nodes), share, pace["gradient_bytes"]
        )
    step = share + waits
    return Width(workers, nodes, step, one / (workers * step), waits / step)


def compute_s(pace: dict[str, Any], rows: int) -> float:
    """Seconds of a step of so many rows on one worker: on the line through the two measured."""
    (few, many), (short, long) = pace["rows"], pace["step_s"]
    if few == many:
        return long * rows / many
    each = max(0.0, (long - short) / (many - few))
    return max(short + each * (rows - few), long * rows / many * 0.1)


def slowest(pace: dict[str, Any]) -> float:
    """How much longer the slowest node takes, all computing at once, than one alone."""
    times = pace["together_step_s"]
    return max(1.0, max(times) / pace["step_s"][0]) if times else 1.0


def train(run: Run, nodes: list[cluster.Node], seen: dict[str, Any]) -> dict[str, Any]:
    """Scaling for 1..N workers, the bottleneck, and whether fewer nodes would be faster."""
    if not seen["pace"]:
        return {"widths": [], "words": "no node that training may use answers"}
    found = widths(run.target, nodes, seen)
    if not found:
        return {"widths": [], "words": "no worker fits"}
    most, best = found[-1], min(found, key=lambda w: w.step_s)
    line = seen["links"] or {}
    lines = [
        f"{w.workers} worker(s) on {w.nodes} node(s): {seconds(w.step_s)} a step, "
        f"{100 * w.efficiency:.0f}% of perfect scaling, {100 * w.all_reduce_share:.0f}% of it "
        "waiting for gradients"
        for w in found
    ]
    if "problem" in line:
        lines.append(f"the links could not be measured: {line['problem']}")
    elif line:
        lines.append(_link_words(line))
    if host := seen.get("one_host"):
        lines.append(_one_host_words(host, seen["pace"]["gradient_bytes"]))
    if best.workers < most.workers:
        lines.append(
            f"{best.workers} worker(s) on {best.nodes} node(s) would be faster than "
            f"{most.workers} on {most.nodes}: target.train.workers={best.workers}"
        )
    if slowest(seen["pace"]) > SLOW:
        lines.append(
            f"all nodes computing at once, the slowest takes {slowest(seen['pace']):.1f} times as "
            "long as one alone: the nodes differ, or share a machine or its cores"
        )
    if most.all_reduce_share > POOR:
        lines.append(poor(most.all_reduce_share))
    plan, held_out = run.task.train, seen["held_out_rows"]
    steps = plan.epochs * math.ceil(seen["train_rows"] / plan.global_batch)
    steps += plan.epochs * plan.evals_per_epoch * held_out / plan.global_batch / 3  # forward only
    wall_s = steps * most.step_s
    lines.append(f"{seconds(wall_s)} in all with {most.workers}")
    widths_found = [w._asdict() for w in found]
    return {"widths": widths_found, "wall_s": wall_s, "words": "\n".join(lines)}


def _link_words(line: dict[str, Any]) -> str:
    words = (
        f"all-reduce over {line['nodes']} nodes ({line['backend']}): "
        f"{mbit(line['bus_bytes_per_s'])} on the bus, {line['latency_s'] * 1e3:.2f} ms to start"
    )
    if line["pairs"]:
        worst = min(line["pairs"], key=lambda p: p["bus_bytes_per_s"])
        words += (
            f"; the slowest pair is {' - '.join(worst['nodes'])} with "
            f"{mbit(worst['bus_bytes_per_s'])}"
        )
    return words


def _one_host_words(host: dict[str, Any], gradient_bytes: float) -> str:
    """Which is faster on one node: its workers, or one process with all of their CPUs."""
    workers, cpus = host["workers"], host["workers"] * host["threads"]
    link = Link(host["latency_s"], host["bus_bytes_per_s"])
    compute_s = host["split_step_s"]
    waits_s = exposed_s(link.all_reduce_s(gradient_bytes, workers), compute_s, gradient_bytes)
    split_s, one_s = compute_s + waits_s, host["one_step_s"]
    words = (
        f"on one node {workers} workers take {seconds(split_s)} a step, one process with all "
        f"{cpus} CPUs {seconds(one_s)}"
    )
    if one_s * CLEARLY < split_s:
        return f"{words}: it is faster: target.train.workers=1 target.train.cpus_per_worker={cpus}"
    return words


def poor(share: float) -> str:
    """The advice for a link that training waits for."""
    return (
        f"the network is poor for training: {100 * share:.0f}% of a step is waiting for "
        "gradients, which cross it every step. Put the workers nearer (placement PACK, fewer and "
        "larger nodes), take fewer, or give the network more bandwidth"
    )


# ---------------------------------------------------------------- serve


def serve(run: Run, nodes: list[cluster.Node], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the deployment survives: any replica, any node, the head; and what would change it."""
    limits = run.target.serve
    (ask,) = cluster.asks(run.target, ["serve"])
    least = limits.replicas.min
    replica = least > 1
    spread = limits.max_replicas_per_node is not None and limits.max_replicas_per_node < least
    usable = [n for n in nodes if cluster.matches(n.labels, ask.selector) and not n.head]
    rest = [cluster.capacity(ask, [n for n in usable if n is not lost]) for lost in usable]
    refit = bool(rest) and min(rest) >= 1
    node = replica and spread and refit
    redis = any(f.get("redis") for f in facts if f["head"])
    head = redis and bool(usable)
    lines = [
        "loss of a replica: "
        + ("survived" if replica else "an outage; target.serve.replicas.min=2 or more"),
        "loss of a node: " + ("survived" if node else "an outage; " + _node_advice(spread, refit)),
        "loss of the head: "
        + (
            "the replicas on other nodes go on answering"
            if head
            else "an outage; put Redis behind the GCS (RAY_REDIS_ADDRESS on the head) and have "
            "nodes beside the head"
        ),
    ]
    return {"replica": replica, "node": node, "head": head, "words": "\n".join(lines)}


def _node_advice(spread: bool, refit: bool) -> str:
    advice = [
        *(() if spread else ("target.serve.replicas.min=2 target.serve.max_replicas_per_node=1",)),
        *(() if refit else ("a second node, beside the head, that holds a replica",)),
    ]
    return " and ".join(advice)


def seconds(value: float) -> str:
    """Seconds as a person says them."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def all_stages(run: Run, nodes: list[cluster.Node], seen: dict[str, Any]) -> dict[str, Any]:
    """The verdict on each stage."""
    return {
        "tune": tune(run, nodes, seen),
        "train": train(run, nodes, seen),
        "serve": serve(run, nodes, seen["nodes"]),
    }
