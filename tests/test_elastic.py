"""Nodes leave an elastic training and join it: two nodes of a core each, and a head without."""

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import changed, wait_for

from workloads import checkpoint, loop, model
from workloads.artifacts import RunFolder
from workloads.config import Task

pytestmark = pytest.mark.ray


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of its own, whatever this process has set for its other one."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node()
    yield cluster
    cluster.shutdown()


def drain(cluster: Any, node: Any, seconds: int) -> None:
    """What a cloud's notice becomes: the node will be taken away."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    gone_at_ms = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", gone_at_ms
    )
    assert accepted, why


def unbroken(task: Task, prepared: Any, last: int) -> dict[int, tuple[float, float]]:
    """The losses of one rank, by step, up to the last one that is wanted."""
    net = model.build(prepared.base, task.model, task.train.seed)
    points = loop.train(net, prepared.rows, prepared.held_out, task.train, loop.Place())
    every = ((int(p.metrics["step"]), p.metrics) for p in points)
    found = itertools.takewhile(lambda one: one[0] <= last, every)
    return {step: (m["loss"], m["eval_loss"]) for step, m in found}


def test_a_node_with_notice_is_outlived_and_another_one_is_taken(
    command: Callable[..., Any], nodes: Any, tiny: Task, prepared: Any, tmp_path: Path
) -> None:
    plan = {"model.dropout": 0.0, "train.epochs": 500, "train.global_batch": 6, "train.lr": 3e-4}
    task = changed(tiny, **plan)
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(task.model_dump(mode="json")))
    flags = ["--json", "--run", "spot", "--task", "reviews.yaml", "target.train.workers=[1,2]"]
    flags += ["target.train.grow_check_s=3", "target.train.checkpoint_every=20"]
    flags += [f"target.ray.address={nodes.address}", f"target.ray.storage={tmp_path}/runs"]
    train = command("train", *flags, "target.precision=fp32")

    def told(pattern: str, times: int = 1) -> str:
        def enough() -> str | None:
            found = re.findall(pattern, train.err.read_text())
            assert found or train.process.poll() is None, train.err.read_text()
            return found[times - 1] if len(found) >= times else None

        return wait_for(enough, 400)

    told("epoch 3 ")
    victim = sorted(nodes.worker_nodes, key=lambda node: node.node_id)[0]
    drain(nodes, victim, 20)
    saved = int(told(r"1 node\(s\) will be taken away in \d+ s: a checkpoint at step (\d+)"))
    made = tmp_path / "runs/spot" / checkpoint.FOLDER / checkpoint.name_of(saved)
    wait_for((made / "SHA256SUMS").exists)
    nodes.remove_node(victim, allow_graceful=False)
    assert int(told(r"1 worker\(s\).* from step (\d+)")) >= saved
    nodes.add_node()
    grown = int(told(r"2 worker\(s\).* from step (\d+)"))
    folder = RunFolder(f"{tmp_path}/runs", "spot")
    # Two that go on, by four epochs and more; its end would tell no more.
    late = checkpoint.name_of(grown + 40)
    wait_for(lambda: max(checkpoint.names(folder), default="") >= late, 200)
    os.kill(train.process.pid, signal.SIGINT)
    assert train.wait(120) == 130
    history = (checkpoint.latest(folder, checkpoint.notes, print) or {})["history"]
    expected = unbroken(task, prepared, history[-1]["step"])
    assert [m["step"] for m in history] == list(expected)
    for m in history:
        assert (m["loss"], m["eval_loss"]) == pytest.approx(expected[m["step"]], rel=1e-4)
    # One, as was told above, may not have come to the end of an epoch.
    assert history[-1]["world"] == 2
    assert {m["world"] for m in history} <= {1, 2}
