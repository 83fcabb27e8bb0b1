"""What a survey's figures mean, sentence by sentence, without a cluster."""

from typing import Any

import pytest

from workloads import verdict
from workloads.cluster import Node
from workloads.config import Run, Target, Task

MIB = 2**20


def node(**changes: Any) -> dict[str, Any]:
    """The facts of a healthy node."""
    fine = {
        "address": "10.0.0.2",
        "head": False,
        "resources": {"CPU": 4.0},
        "versions": {"ray": "2.60.0", "python": "3.11.7", "torch": "2.13.0"},
        "storage": "ok",
        "free_gib": {"/tmp": 50.0},
        "torch_gpus": 0,
        "model": "ok",
        "clock_offset_ms": 1.0,
        "redis": False,
    }
    return {**fine, **changes}


def seen(bus_mbit: float | None, params_mib: float = 40, together: float = 0.1) -> dict[str, Any]:
    """A survey: 32 rows take 0.1 s, 64 rows 0.2 s, with a link of so many Mbit/s."""
    link = {"latency_s": 1e-3, "bus_bytes_per_s": (bus_mbit or 0) * 1e6 / 8}
    return {
        "nodes": [node(head=True), node()],
        "held_out_rows": 64,
        "train_rows": 640,
        "links": {**link, "nodes": 2, "backend": "gloo", "pairs": []} if bus_mbit else None,
        "pace": {
            "rows": [32, 64],
            "step_s": [0.1, 0.2],
            "trial_step_s": 0.2,
            "together_step_s": [0.1, together],
            "gradient_bytes": params_mib * MIB,
        },
    }


def run(**target: Any) -> Run:
    task = {"model": {}, "data": {"source": "builtin:docstrings"}, "train": {"global_batch": 64}}
    task["tune"] = {"trials": 8, "train_rows": 640, "epochs": 1, "evals_per_epoch": 1}
    made = {"train": {"workers": 2, "cpus_per_worker": 4}, **target}
    return Run("t", Task.model_validate(task), "x", Target.model_validate(made))


TWO = [Node({"CPU": 4}, head=True, id="a"), Node({"CPU": 4}, id="b")]


def test_a_healthy_cluster_has_no_problems():
    assert verdict.problems([node(head=True), node()]) == []
    assert verdict.remarks([node(head=True), node()]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"problem": "no answer in 90 s"}, "10.0.0.2: no answer in 90 s"),
        ({"versions": {"ray": "2.59.0", "python": "3.11.7", "torch": "2.13.0"}}, "ray 2.59.0, but"),
        ({"versions": {"ray": "2.60.0", "python": "3.12.1", "torch": "2.13.0"}}, "python 3.12.1"),
        ({"storage": "not shared: does not see"}, "target.ray.storage: not shared"),
        ({"free_gib": {"/runs": 0.2}}, "0.2 GiB free in /runs"),
        ({"resources": {"CPU": 4, "GPU": 2.0}, "torch_gpus": 0}, "2 GPU(s), torch sees 0"),
    ],
)
def test_what_is_wrong_with_a_node_is_named_with_its_address(changes: dict[str, Any], said: str):
    (problem,) = verdict.problems([node(head=True), node(**changes)])
    assert problem.startswith("10.0.0.2: ")
    assert said in problem


def test_a_wrong_clock_and_a_missing_model_are_remarks():
    notes = verdict.remarks([node(clock_offset_ms=-90_000.0), node(model="no such folder")])
    assert "-90.0 s off" in notes[0]
    assert "no such folder" in notes[1]


def test_trials_that_fit_at_once_give_the_time_of_the_sweep():
    said = verdict.tune(run(), TWO, seen(None))
    assert said["at_once"] == 8
    assert said["trial_s"] == pytest.approx(0.2 * (10 + 1 / 3))  # ten steps and one evaluation
    # The two best with two more seeds each, all four at once.
    assert said["wall_s"] == 2 * said["trial_s"]


def test_trials_are_as_slow_as_the_slowest_node_when_all_compute_at_once():
    alone, shared = (verdict.tune(run(), TWO, seen(1000, together=t)) for t in (0.1, 0.3))
    assert shared["trial_s"] == pytest.approx(3 * alone["trial_s"])


def test_a_fast_link_scales_and_a_slow_one_is_called_poor():
    fast, slow = (verdict.train(run(), TWO, seen(m)) for m in (100_000, 10))
    assert fast["widths"][1]["efficiency"] > 0.9
    assert "poor" not in fast["words"]
    assert slow["widths"][1]["efficiency"] < 0.1
    assert "the network is poor for training" in slow["words"]
    assert "1 worker(s) on 1 node(s) would be faster than 2 on 2" in slow["words"]


def test_the_predicted_step_is_its_share_of_the_rows_plus_the_all_reduce():
    wide = verdict.predict(2, 2, seen(800, params_mib=10))
    waits = 1e-3 + 10 * MIB / 100e6  # two ranks: each byte crosses the bus once
    assert wide.step_s == pytest.approx(0.1 + waits)
    assert wide.all_reduce_share == pytest.approx(waits / wide.step_s)


def test_workers_on_one_node_wait_for_no_link():
    assert verdict.predict(2, 1, seen(10)).all_reduce_share == 0


def test_large_models_hide_most_of_their_gradients_behind_the_backward_pass():
    assert verdict.exposed_s(1.0, 3.0, 4 * verdict.BUCKET_BYTES) == 0.25
    assert verdict.exposed_s(1.0, 3.0, verdict.BUCKET_BYTES / 4) == 1.0


def test_nodes_that_slow_each_other_down_are_told_from_a_poor_network():
    said = verdict.train(run(), TWO, seen(100_000, together=0.3))["words"]
    assert "the slowest takes 3.0 times as long" in said
    assert "poor" not in said


@pytest.mark.parametrize(("one_s", "advised"), [(0.1, True), (0.3, False)])
def test_one_process_that_is_faster_than_the_workers_of_a_node_is_advised(
    one_s: float, advised: bool
):
    host = {"workers": 2, "threads": 4, "split_step_s": 0.15, "one_step_s": one_s}
    found = {**seen(1000), "one_host": {**host, "latency_s": 1e-3, "bus_bytes_per_s": 1e9}}
    said = verdict.train(run(), TWO, found)["words"]
    assert f"one process with all 8 CPUs {int(one_s * 1000)} ms" in said
    assert ("target.train.workers=1 target.train.cpus_per_worker=8" in said) == advised


def test_a_line_through_two_sizes_gives_latency_and_bus_bandwidth():
    link = verdict.line({4: 0.001, 1000: 0.002, 4_000_000: 0.401}, ranks=4)
    assert link.latency_s == 0.001
    assert link.bus_bytes_per_s == pytest.approx(1.5 * 10e6)
    assert link.all_reduce_s(4_000_000, 4) == pytest.approx(0.401)
    assert link.all_reduce_s(4_000_000, 1) == 0


@pytest.mark.parametrize("times", [{4: 0.07}, {4: 0.0200, 65536: 0.0199}, {4: 0.02, 65536: 0.02}])
def test_a_link_of_which_only_the_latency_was_seen_is_not_called_fast(times: dict[int, float]):
    size = max(times)
    assert verdict.line(times, ranks=2).bus_bytes_per_s <= 20 * size / times[size]


@pytest.mark.parametrize(
    ("replicas", "per_node", "nodes", "survives"),
    [(1, None, 3, (False, False)), (2, None, 3, (True, False)), (2, 1, 3, (True, True))]
    + [(2, 1, 1, (True, False))],
)
def test_what_serving_survives(
    replicas: int, per_node: int | None, nodes: int, survives: tuple[bool, bool]
):
    limits = {"replicas": {"min": replicas, "max": replicas}, "max_replicas_per_node": per_node}
    there = [TWO[0], *(Node({"CPU": 4}, id=str(i)) for i in range(nodes))]
    said = verdict.serve(run(serve=limits), there, [node(head=True)])
    assert (said["replica"], said["node"]) == survives
    assert not said["head"]
    assert verdict.serve(run(serve=limits), there, [node(head=True, redis=True)])["head"]


@pytest.mark.parametrize(
    ("value", "said"), [(0.0123, "12.3 ms"), (3.21, "3.21 s"), (600, "10 min"), (7200, "2 h")]
)
def test_seconds_are_said_as_people_say_them(value: float, said: str):
    assert verdict.seconds(value) == said


@pytest.mark.parametrize(("value", "said"), [(1.2e6, "9.6 Mbit/s"), (125e6, "1 Gbit/s")])
def test_bandwidth_is_said_in_bits(value: float, said: str):
    assert verdict.mbit(value) == said
