"""Several real hosts: work sent to them, and what is lost with a node, a cable, the head or a disk.

The hosts are those of netlab.py; they need root. Ray's settings are its defaults, but the head
looks after its nodes three times as often: one that is gone is missed after five looks.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import netlab
import pytest
import yaml
from conftest import changed, wait_for
from netlab import CHECKOUT, Host

from workloads import ingress

pytestmark = [
    pytest.mark.netlab,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(netlab.missing()), reason=f"a lab lacks {netlab.missing()}"),
]


# All of them part of what is tried, not waits for something.
GONE_S = 8  # how long a head or a cable is gone
REPLICA = "ray::(ServeReplica|SERVE_REPLICA)"  # what its process is called
HUNG_S = 25  # of requests after a node is lost: those that it had are asked again after 20


@dataclass
class Cluster:
    """A head and two workers, a CPU each."""

    hosts: list[Host]
    env: dict[str, str]
    folder: Path

    @property
    def storage(self) -> Path:
        """The folder that all hosts share."""
        return self.folder / "runs"

    def heal(self) -> None:
        """All hosts on, all cables in, all nodes there."""
        head = self.hosts[0]
        for host in self.hosts:
            netlab.restore(host)
            if not host.init:
                netlab.boot(host)
            elif len(host.ray) > 1 and host.ray[-1].poll() is None:
                continue
            if host is head:
                netlab.ray_head(host, self.env)
            else:
                netlab.ray_worker(host, head, self.env)
        netlab.all_there(self.hosts, self.env)

    def command(self, *args: str, on: int = 0) -> "Driver":
        """Starts `workloads ARGS` on a host."""
        line = [sys.executable, "-m", "workloads", *args, "--target", f"{self.folder}/lab.yaml"]
        return Driver(netlab.inside(self.hosts[on], *line), self.env, self.folder)


class Driver:
    """A command that runs on a host, with what it prints kept."""

    def __init__(self, line: list[str], env: dict[str, str], folder: Path) -> None:
        self.out, self.err = (folder / f"{time.monotonic_ns()}.{kind}" for kind in ("out", "err"))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(line, env=env, stdout=out, stderr=err)

    def says(self, text: str) -> bool:
        """Whether it has printed that; fails if it has ended without."""
        told = text in self.err.read_text() + self.out.read_text()
        assert told or self.process.poll() is None, self.err.read_text()
        return told

    def result(self, seconds: float = 300) -> dict[str, Any]:
        """What --json printed; fails with the command's own messages."""
        assert self.process.wait(seconds) == 0, self.err.read_text()
        return json.loads(self.out.read_text())


TARGET = {
    "precision": "fp32",
    "tune": {"max_failures": 4},
    "train": {"workers": 2, "checkpoint_every": 1, "keep_checkpoints": 1},
    "serve": {
        "replicas": {"min": 2, "max": 2},
        "max_replicas_per_node": 1,
        "cpus_per_replica": 0.5,
        "host": "0.0.0.0",  # of the lab: HAProxy of one host asks the replicas of others
    },
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts with Ray, and the target that means them."""
    folder = tmp_path_factory.mktemp("lab")
    target = TARGET | {"ray": {"address": "auto", "storage": f"{folder}/runs"}}
    (folder / "lab.yaml").write_text(yaml.safe_dump(target))
    (folder / "runs").mkdir()
    (folder / "small").mkdir()
    subprocess.run(f"mount -t tmpfs -o size=2m tmpfs {folder}/small".split(), check=True)
    try:
        with netlab.hosts(folder, 3) as hosts, redis(hosts[0].switch):
            env = netlab.environment(
                folder / "token",
                RAY_REDIS_ADDRESS=f"{hosts[0].switch}:6380",
                RAY_health_check_period_ms="1000",
                WORKLOADS_API_KEYS="a-key-of-the-lab-0123456789",
            )
            assert ingress.prepare("haproxy", env) == "HAProxy"
            yield Cluster(hosts, env, folder)
    finally:
        subprocess.run(f"umount --lazy {folder}/small".split(), check=True)


@contextlib.contextmanager
def redis(address: str) -> Iterator[None]:
    """Keeps what the head knows, outside of all hosts."""
    line = f"redis-server --bind {address} --port 6380 --protected-mode no --appendonly no"
    process = subprocess.Popen([*line.split(), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """The three hosts, all well."""
    started.heal()
    return started


@pytest.fixture
def task(tiny: Any, tmp_path: Path) -> Callable[..., str]:
    """Writes the tiny task with changes and gives its path: task(**{"train.epochs": 9})."""

    def write(**values: Any) -> str:
        path = tmp_path / "reviews.yaml"
        path.write_text(yaml.safe_dump(changed(tiny, **values).model_dump(mode="json")))
        return str(path)

    return write


def steps(result: dict[str, Any]) -> list[int]:
    return [m["step"] for m in result["history"]]


def launcher_file(folder: Path, head: Host, workers: list[Host]) -> Path:
    """clusters/on-prem.yaml for the lab's hosts. They have no network to install from: the
    environment of these tests stands for the one that setup_node makes."""
    config = yaml.safe_load((CHECKOUT / "clusters/on-prem.yaml").read_text())
    config["cluster_name"] = head.name
    config["provider"] |= {"head_ip": head.address, "worker_ips": [w.address for w in workers]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["file_mounts"]["~/.ray/auth_token"] = str(folder / "token")
    line = f"export PATH={netlab.BIN}:$PATH PYTHONPATH=~/workloads RAY_AUTH_MODE=token"
    config["setup_commands"] = [f"echo '{line}' >> ~/.bashrc"]
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    return folder / "cluster.yaml"


def test_the_launcher_brings_hosts_up_sends_work_and_takes_them_down(
    tmp_path: Path, task: Any
) -> None:
    env = netlab.environment(tmp_path / "token")

    def ray(*args: Any) -> subprocess.CompletedProcess[str]:
        line = [netlab.BIN / "ray", *args]
        return subprocess.run(
            line, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=300
        )

    with netlab.hosts(tmp_path, 2) as (head, worker):
        # Where Ray notes its cluster, whose address nobody gives here: other tests have theirs.
        notes = Path("/tmp/ray")
        notes.mkdir(exist_ok=True)
        for host in (head, worker):
            netlab.private(host, notes, "512m")
        file = launcher_file(tmp_path, head, [worker])
        up = ray("up", "-y", "--no-config-cache", file)
        if "timed out during startup" in up.stdout + up.stderr:  # Ray gives itself 30 s
            up = ray("up", "-y", "--no-config-cache", file)
        assert up.returncode == 0, up.stdout + up.stderr
        wait_for(lambda: netlab.run(worker, "pgrep", "-f", "raylet/raylet", env=env).stdout)
        joined = f"until ray list nodes | grep {worker.address}; do sleep 10; done"
        assert worker.address in ray("exec", file, joined).stdout
        flags = ["--task", task(), "--target", "cpu-cluster", f"target.ray.storage={tmp_path}/runs"]
        flags += ["target.train.workers=2", "target.train.cpus_per_worker=1"]
        good = ray("submit", file, "scripts/train.py", "--", *flags)
        assert good.returncode == 0
        assert "epoch 2" in good.stdout
        assert len(list(tmp_path.glob("runs/*/model/model.safetensors"))) == 1
        bad = ray("submit", file, "scripts/train.py", "--", *flags, "task.trian.lr=1")
        assert bad.returncode != 0
        assert "did you mean 'train'?" in bad.stdout + bad.stderr
        assert ray("down", "-y", file).returncode == 0
        # Ray stops on the head only; the workers' Ray ends by itself once it has missed the head
        # for a minute.
        assert "raylet" not in netlab.run(head, "ps", "ax", env=env).stdout


def test_a_node_lost_during_a_sweep_loses_no_trial(cluster: Cluster, task: Any) -> None:
    # Of the second three, too, one is on the node: they take seconds.
    plan = {"tune.trials": 6, "tune.epochs": 80, "tune.scheduler": "fifo"}
    space = {"train.lr": {"draw": "loguniform", "low": 1e-3, "high": 1e-2}}
    sweep = cluster.command("tune", "--json", "--task", task(**plan, **{"tune.space": space}))
    wait_for(lambda: sweep.says("trial 1/6"))
    netlab.kill(cluster.hosts[2])
    result = sweep.result()
    assert sweep.says("was lost and runs again")
    kept = cluster.storage.glob("*/tune/trials/*.json")
    errors = [e for file in kept if (e := json.loads(file.read_text()).get("error"))]
    assert (result["trials"], result["failed"]) == (6, 0), "\n".join(errors)
    assert {t["state"] for t in result["leaderboard"]} == {"finished"}


def test_a_short_cut_of_a_cable_stops_a_training_and_no_more(cluster: Cluster, task: Any) -> None:
    flags = ["--json", "--task", task(**{"train.epochs": 20}), "target.train.workers=3"]
    train = cluster.command("train", *flags)
    wait_for(lambda: train.says("train: epoch 3 "))
    netlab.cut(cluster.hosts[2])
    time.sleep(2)  # what was on its way arrives
    before = train.err.read_text()
    time.sleep(GONE_S)
    assert train.err.read_text() == before
    netlab.restore(cluster.hosts[2])
    assert steps(train.result()) == [7 * epoch for epoch in range(1, 21)]
    assert "from step" not in train.err.read_text()


def test_a_job_without_the_token_is_refused(cluster: Cluster) -> None:
    head = cluster.hosts[0].address
    line = [netlab.BIN / "ray", "job", "submit", "--address", f"http://{head}:8265", "--", "true"]
    with_token = subprocess.run(line, env=cluster.env, capture_output=True, text=True, timeout=90)
    assert with_token.returncode == 0, with_token.stderr
    without = {k: v for k, v in cluster.env.items() if k != "RAY_AUTH_TOKEN_PATH"}
    for env in (without | {"RAY_AUTH_MODE": "disabled"}, without | {"RAY_AUTH_TOKEN": "f" * 64}):
        refused = subprocess.run(line, env=env, capture_output=True, text=True, timeout=90)
        assert refused.returncode != 0
        assert "token" in refused.stderr
    assert httpx.get(f"http://{head}:8265/api/jobs/").status_code in (401, 403)


def test_storage_that_is_not_shared_is_refused_before_work_starts(
    cluster: Cluster, task: Any
) -> None:
    with own_disk(cluster.hosts[1], cluster.storage):
        train = cluster.command("train", "--run", "unshared", "--task", task())
        assert train.process.wait(120) == 2
    refusal = train.err.read_text()
    assert "is not shared" in refusal
    assert cluster.hosts[1].address in refusal
    assert cluster.hosts[2].address not in refusal
    assert not (cluster.storage / "unshared").exists()


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_work_starts(
    cluster: Cluster, task: Any
) -> None:
    small = cluster.folder / "small"
    flags = ["--run", "full", "--task", task(**{"model.hidden": 128})]
    train = cluster.command("train", *flags, f"target.ray.storage={small}")
    assert train.process.wait(180) == 2
    assert re.search(r"has \d\.\d MB free; 5 checkpoints need", train.err.read_text())
    assert not (small / "full").exists()


@contextlib.contextmanager
def own_disk(host: Host, path: Path) -> Iterator[None]:
    """The host sees an empty folder of its own there."""
    netlab.private(host, path)
    try:
        yield
    finally:
        netlab.public(host, path)


LOAD = """
import concurrent.futures, httpx, json, os, sys, time
url, enough = sys.argv[1:]
began = time.time()
def ask(client):
    at = time.time()
    try:
        status = client.post(url, json={"inputs": "a clever delight"}, timeout=90).status_code
    except httpx.HTTPError as e:
        status = repr(e)
    if status != 200:
        print(f"{at - began:.2f}: {status} {time.time() - at:.1f}", file=sys.stderr, flush=True)
    return at, status == 200
def caller(number):
    key = os.environ["WORKLOADS_API_KEYS"]
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}) as client:
        answers = []
        while not os.path.exists(enough):
            answers.append(ask(client))
            if len(answers) == 10:
                print("loaded", file=sys.stderr, flush=True)
            time.sleep(0.1)
        return answers
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(json.dumps(sorted(sum(pool.map(caller, range(4)), []))))
"""


@pytest.fixture(scope="module")
def deployed(started: Cluster, untrained: Path) -> Iterator[None]:
    """Two replicas, on the two workers; every node takes requests on its loopback. Untrained, the
    model answers all the same."""
    started.heal()
    up = started.command("serve", "--json", "--model", str(untrained))
    assert up.process.wait(300) == 0, up.err.read_text()
    yield
    started.heal()
    assert started.command("serve", "--down").process.wait(120) == 0


@pytest.fixture
def serving(cluster: Cluster, deployed: None) -> Cluster:
    """The three hosts, all well, and what is served on them."""
    wait_for(lambda: whole(cluster))
    return cluster


def whole(cluster: Cluster) -> bool:
    """Whether both workers have a replica, nobody counts on a node that is gone, and every node's
    proxy says that it is ready: a head that came back needs seconds to hear of the replicas."""
    head = cluster.hosts[0]
    nodes = netlab.alive(head, cluster.env)
    told = netlab.asked(head, cluster.env, "serve/applications/").get("applications", {})
    deployments = [d for app in told.values() for d in app["deployments"].values()]
    replicas = [r for d in deployments for r in d["replicas"] if r["state"] == "RUNNING"]
    there = {nodes.get(r["node_id"]) for r in replicas}
    if len(nodes) != 3 or there != {host.address for host in cluster.hosts[1:]}:
        return False
    # The head may not have noticed yet that what it counts went with its node.
    looked = [netlab.run(h, "pgrep", "-f", REPLICA, env=cluster.env) for h in cluster.hosts[1:]]
    return all(one.returncode == 0 for one in looked) and all(map(ready, cluster.hosts))


def ready(host: Host) -> bool:
    """What a load balancer asks a node's proxy."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://{host.address}:8000/-/healthz", timeout=5).status_code == 200
    return False


@contextlib.contextmanager
def load(cluster: Cluster, *on: int) -> Iterator[list[Driver]]:
    """Four callers on each of these hosts ask its own proxy; their results are to be read after."""
    enough = cluster.folder / f"enough-{time.monotonic_ns()}"
    line = [sys.executable, "-c", LOAD, "http://127.0.0.1:8000/predict", enough]
    callers = [
        Driver(netlab.inside(cluster.hosts[i], *line), cluster.env, cluster.folder) for i in on
    ]
    try:
        for caller in callers:
            wait_for(lambda c=caller: c.err.read_text().count("loaded") == 4)
        yield callers
    finally:
        enough.touch()


def answered(caller: Driver) -> list[float]:
    """When each request was sent; none has failed."""
    answers = caller.result(90)
    failed = [at for at, ok in answers if not ok]
    assert not failed, (len(failed), max(failed), caller.err.read_text())
    return [at for at, _ in answers]


def test_workers_answer_while_the_head_is_gone_and_join_it_again(serving: Cluster) -> None:
    head, *workers = serving.hosts
    with load(serving, 1) as (asked,):
        lost_at = time.time()
        netlab.kill(head)
        for signal in ("STOP", "CONT"):  # for seconds no replica answers a check, and nobody helps
            for host in workers:
                line = ["pkill", f"-{signal}", "-f", REPLICA]
                assert netlab.run(host, *line, env=serving.env).returncode == 0
            time.sleep(GONE_S / 2)
        serving.heal()
        back_at = time.time()
        print(f"the head was back, with its nodes, {back_at - lost_at:.1f} s after its loss")
        assert all(host.ray[-1].poll() is None for host in workers)  # the same Ray all the time
        time.sleep(3)
    sent = answered(asked)
    assert sum(lost_at < at < lost_at + GONE_S for at in sent) > 20
    assert sum(at > back_at for at in sent) > 20


# The last one: what replaces a replica may have come to the head, where it stays.
def test_no_request_fails_when_a_node_is_lost_under_load(serving: Cluster) -> None:
    with load(serving, 0, 1) as callers:
        lost_at = time.time()
        netlab.cut(serving.hosts[2])  # no goodbye: connections hang
        netlab.kill(serving.hosts[2])
        time.sleep(HUNG_S)
    for caller in callers:
        sent = answered(caller)
        assert sum(at < lost_at for at in sent) > 20
        assert sum(at > lost_at + HUNG_S - 3 for at in sent) > 20
