"""What a run asks for and whether nodes have it, worked out without Ray."""

import socket
import subprocess
import sys
from typing import Any

import pytest

from workloads import cluster
from workloads.cluster import Ask, Node, Resources
from workloads.config import Target, UserError, flat

SMALL = Node({"CPU": 2, "GPU": 0})
LARGE = Node({"CPU": 16, "GPU": 4})
# Nodes also have memory, and marks of their own, that nobody asks for.
REAL = Node({"CPU": 4, "memory": 1e9, "node:10.0.0.1": 1})


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def target(**sections: Any) -> Target:
    return Target.model_validate(sections)


def asked(stage: str, **sections: Any) -> Ask:
    """What one stage of a target asks for."""
    (ask,) = cluster.asks(target(**sections), [stage])
    return ask


def problem(ask: Ask, *nodes: Node) -> str:
    """Why it does not fit; it has to be a problem."""
    said = cluster.misfit(ask, list(nodes))
    assert said is not None
    return said


# ---------------------------------------------------------------- what is asked for


def test_a_trial_a_worker_and_a_replica_ask_for_their_share():
    made = target(
        device="cuda",
        tune={"cpus_per_trial": 2, "gpus_per_trial": 0.25},
        train={"workers": 3, "cpus_per_worker": 4, "gpus_per_worker": 1},
        serve={"cpus_per_replica": 0.5},
    )
    tune, train, serve = cluster.asks(made, ["tune", "train", "serve"])
    assert (tune.count, tune.bundle) == (1, {"CPU": 2, "GPU": 0.25})
    assert (train.count, train.bundle) == (3, {"CPU": 4, "GPU": 1})
    assert train.total == {"CPU": 12, "GPU": 3}
    assert serve.bundle == {"CPU": 0.5}


def test_workers_share_all_cpus_of_this_machine_or_take_one_each_on_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda: 9)
    here = target(train={"workers": [1, 4], "cpus_per_worker": None})
    assert cluster.worker_cpus(here) == 2
    assert cluster.asks(here, ["train"])[0].bundle == {"CPU": 2}
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda: 1)
    assert cluster.worker_cpus(here) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda: 9)
    assert cluster.worker_cpus(here) == 1


def test_only_the_stages_that_are_run_ask():
    stages = [ask.stage for ask in cluster.asks(Target(), ["train", "serve", "something else"])]
    assert stages == ["train", "serve"]
    assert cluster.asks(Target(), []) == []


def test_an_elastic_training_asks_for_its_least_width():
    assert asked("train", train={"workers": [2, 8]}).count == 2


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_serving_asks_for_room_to_start_a_new_replica_before_an_old_one_stops(replicas: int):
    ask = asked("serve", serve={"replicas": {"min": replicas, "max": 8}})
    assert replicas < ask.count <= 2 * replicas


def test_every_ask_names_the_key_that_makes_it_smaller():
    keys = {f"target.{key}" for key in flat(Target().model_dump())}
    asks = cluster.asks(Target(), ["tune", "train", "serve"])
    assert [ask.stage for ask in asks if ask.key not in keys] == []


# ---------------------------------------------------------------- what there is


@pytest.mark.parametrize(
    ("bundle", "nodes", "expected"),
    [
        ({"CPU": 1}, [], 0),
        ({"CPU": 1}, [SMALL], 2),
        ({"CPU": 1}, [SMALL, LARGE, REAL], 22),
        ({"CPU": 3}, [SMALL, REAL], 1),  # a bundle lies on one node
        ({"CPU": 0.1}, [SMALL], 20),
        ({"CPU": 0.1}, [Node({"CPU": 0.3})], 3),  # 0.3 / 0.1 is 2.9999999999999996
        ({"CPU": 1, "GPU": 1}, [SMALL], 0),
        ({"CPU": 1, "GPU": 0.25}, [LARGE], 16),
        ({"CPU": 8, "GPU": 0.25}, [LARGE], 2),
        ({"CPU": 1, "GPU": 2}, [LARGE, LARGE], 4),
        ({"CPU": 1, "GPU": 1}, [REAL], 0),
    ],
)
def test_as_many_bundles_fit_as_nodes_hold(bundle: Resources, nodes: list[Node], expected: int):
    assert cluster.capacity(Ask("tune", 1, bundle, ""), nodes) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.6, 4), (0.4, 8), (0.3, 12), (0.51, 4)])
def test_a_share_of_a_gpu_lies_on_one_gpu(share: float, expected: int):
    # Four GPUs hold four shares of 0.6 (tried with Ray), though 6 x 0.6 is less than 4.
    assert cluster.capacity(Ask("tune", 1, {"CPU": 0.01, "GPU": share}, ""), [LARGE]) == expected


def test_what_fits_is_no_problem():
    ask = Ask("train", 2, {"CPU": 2}, "target.train.workers")
    for nodes in ([REAL], [SMALL, SMALL], [LARGE]):
        assert cluster.misfit(ask, nodes) is None


def test_more_bundles_than_fit_are_a_problem_that_names_the_way_out():
    ask = Ask("train", 3, {"CPU": 2}, "target.train.workers")
    assert problem(ask, SMALL, SMALL) == (
        "train asked for 3 x 2 CPU; 2 fit on the 2 node(s). Lower target.train.workers"
    )
    both = Ask("train", 5, {"CPU": 1, "GPU": 1}, "target.train.workers")
    assert "5 x 1 CPU and 1 GPU; 4 fit on the 2 node(s)" in problem(both, LARGE, SMALL)


def test_a_bundle_larger_than_every_node_is_a_problem_even_if_the_sum_is_there():
    ask = Ask("tune", 1, {"CPU": 3}, "target.tune.cpus_per_trial")
    said = problem(ask, SMALL, SMALL)
    assert "asked for 3 CPU on one node; the largest node has 2" in said
    assert "Lower target.tune.cpus_per_trial" in said


@pytest.mark.parametrize("node", [SMALL, REAL])
def test_a_gpu_where_there_is_none_is_a_problem_that_names_the_other_target(node: Node):
    ask = Ask("train", 1, {"CPU": 1, "GPU": 4}, "target.train.workers")
    assert problem(ask, node, node) == (
        "train asked for 4 GPU on one node; the largest node has 0. Try --target cpu-cluster"
    )


def test_a_cluster_without_nodes_has_room_for_nothing():
    assert "the largest node has 0" in problem(asked("tune"))


def test_replicas_that_may_not_share_a_node_need_as_many_nodes():
    serve = {"replicas": {"min": 3, "max": 3}, "max_replicas_per_node": 1}
    said = problem(asked("serve", serve=serve), LARGE, LARGE)
    assert "serve" in said
    assert cluster.misfit(asked("serve", serve=serve), [LARGE] * 4) is None


@pytest.mark.parametrize(
    ("placement", "nodes", "fits"),
    [
        ("STRICT_SPREAD", [LARGE, SMALL], False),
        ("STRICT_SPREAD", [SMALL, SMALL, SMALL], True),
        ("STRICT_PACK", [SMALL, SMALL], False),
        ("STRICT_PACK", [LARGE], True),
        ("SPREAD", [LARGE], True),
        ("PACK", [SMALL, SMALL], True),
    ],
)
def test_a_strict_placement_is_counted_in_nodes(placement: str, nodes: list[Node], fits: bool):
    ask = asked("train", train={"workers": 3, "placement": placement})
    assert (cluster.misfit(ask, nodes) is None) == fits


# ---------------------------------------------------------------- which nodes


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        ("spot", ["spot"]),
        ("!spot", ["on-demand", None]),  # what has no such label is not spot
        ("in(spot, on-demand)", ["spot", "on-demand"]),
        ("!in(spot,on-demand)", [None]),
    ],
)
def test_a_selector_takes_the_nodes_that_ray_would_take(wanted: str, kinds: list[str | None]):
    labels = {kind: {"market": kind} if kind else {} for kind in ("spot", "on-demand", None)}
    assert [k for k in labels if cluster.matches(labels[k], {"market": wanted})] == kinds


def test_training_and_serving_keep_off_spot_nodes_unless_asked():
    spot = Node(LARGE.resources, {"ray.io/market-type": "spot"})
    for stage in ("train", "serve"):
        assert "label_selector wants them" in problem(asked(stage), spot)
        assert cluster.misfit(asked(stage, **{stage: {"label_selector": {}}}), [spot]) is None
    assert cluster.misfit(asked("tune"), [spot]) is None


def test_workers_take_gpus_of_one_type_the_one_that_holds_most():
    gpu = {"device": "cuda", "tune": {"gpus_per_trial": 1}, "train": {"gpus_per_worker": 1}}
    nodes = [Node(LARGE.resources, {cluster.CHIP: kind}) for kind in ("L4", "A100", "L4")]
    assert cluster.one_chip(asked("train", **gpu), nodes).selector[cluster.CHIP] == "L4"
    assert cluster.CHIP not in cluster.one_chip(asked("train", **gpu), nodes[:1]).selector
    assert cluster.CHIP not in cluster.one_chip(asked("train"), nodes).selector


# ---------------------------------------------------------------- storage and addresses


def test_ray_is_started_here_unless_an_address_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    assert cluster.joins(Target()) is None
    assert cluster.joins(target(ray={"address": "auto"})) == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.joins(Target()) == "10.0.0.1:6379"
    assert cluster.joins(target(ray={"address": "here:1"})) == "here:1"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster.joins(Target()) is None


@pytest.mark.parametrize("storage", ["runs", "./runs", "../runs", "mnt/shared"])
def test_a_joined_cluster_refuses_a_relative_storage(storage: str):
    with pytest.raises(UserError) as e:
        cluster.check_storage(target(ray={"address": "auto", "storage": storage}))
    said = str(e.value)
    assert f"target.ray.storage is '{storage}', a relative path" in said
    assert "(auto)" in said
    assert "target.ray.storage=/mnt/shared/runs" in said


def test_a_submitted_job_refuses_a_relative_storage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"10\.0\.0\.1:6379"):
        cluster.check_storage(Target())


@pytest.mark.parametrize(
    ("address", "storage"),
    [
        (None, "runs"),
        ("auto", "/mnt/shared/runs"),
        ("auto", "~/runs"),
        ("auto", "s3://bucket/runs"),
        ("auto", "gs://bucket/runs"),
    ],
)
def test_a_storage_that_can_be_shared_or_need_not_be_is_taken(address: str | None, storage: str):
    cluster.check_storage(target(ray={"address": address, "storage": storage}))


# ---------------------------------------------------------------- ports


def test_a_port_that_is_taken_is_named_with_another():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as e:
            cluster.check_port("127.0.0.1", port)
    assert str(e.value).startswith(f"127.0.0.1:{port} cannot be used (Address already in use)")
    other = int(str(e.value).rpartition("target.serve.port=")[2])
    assert 1 <= other <= 65535
    assert other != port


def test_a_port_that_was_given_back_is_free_at_once():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # this side closes first and waits for stray packets
    cluster.check_port("127.0.0.1", port)
    cluster.check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_this_machine_is_refused(host: str):
    with pytest.raises(UserError) as e:
        cluster.check_port(host, 65535)
    assert str(e.value).startswith(f"{host}:65535 cannot be used (")
    assert str(e.value).endswith("target.serve.port=8000")


ONE_GPU = {
    "device": "cuda",
    "tune": {"gpus_per_trial": 1},
    "train": {"workers": 1, "gpus_per_worker": 1},
}


@pytest.mark.parametrize(
    ("sections", "streaming", "alone"),
    [
        ({"train": {"workers": 1}}, False, True),
        (ONE_GPU, False, True),
        ({"train": {"workers": 2}}, False, False),
        ({"train": {"workers": [1, 2]}}, False, False),
        ({"train": {"workers": 1}}, True, False),
        ({"train": {"workers": 1}, "ray": {"address": "10.0.0.1:6379"}}, False, False),
    ],
)
def test_a_single_worker_of_this_machine_is_the_command_itself(
    sections: dict[str, Any], streaming: bool, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.alone(target(**sections), streaming) is alone


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_does_not_start_in_time_is_started_once_more(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    started: list[subprocess.Popen[bytes]] = []

    def init(address: str, **_: Any) -> None:
        tries.append(address)
        if len(tries) <= failures:
            for path in ("/lib/ray/raylet", "/lib/other"):
                line = [sys.executable, "-c", "import time; time.sleep(60)", path]
                started.append(subprocess.Popen(line))
            raise Exception("The current node timed out during startup. This could happen ...")

    monkeypatch.setattr("ray.init", init)
    if failures == 1:
        cluster._start({})
    else:
        with pytest.raises(UserError, match="too busy"):
            cluster._start({})
    assert tries == ["local", "local"]
    for of_ray, other in zip(started[::2], started[1::2], strict=True):
        assert of_ray.wait(10) == -9  # of the Ray that did not start nothing is left
        assert other.poll() is None
        other.kill()
        other.wait()
