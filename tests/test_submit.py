"""Sending work to a running head: `ray job submit`, and the entry files, with exit codes passed
on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from conftest import Command, free_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHECKOUT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head of its own with a token, as `ray start --head` makes it; yields the environment."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text("0" * 64)
    gcs, dashboard = free_port(), free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = clean | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_OFFLINE": "1",
    }
    line = f"start --head --block --node-ip-address=127.0.0.1 --port={gcs} --num-cpus=2"
    ports = f"--dashboard-port={dashboard} --dashboard-agent-listen-port={free_port()}"
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [BIN / "ray", *line.split(), *ports.split(), "--include-dashboard=true"],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    env["GCS"] = f"127.0.0.1:{gcs}"
    wait_for(lambda: _answers(f"{env['RAY_API_SERVER_ADDRESS']}/api/jobs/"))
    yield env
    _kill(process)


def _kill(process: subprocess.Popen) -> None:
    # Ray's own end takes half a minute; these clusters have nothing to save.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def labelled(head: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The head with a spot and an on-demand node beside it. For drivers of this machine only: the
    nodes of one machine share a folder for jobs' uploads and take it from each other."""
    folder = tmp_path_factory.mktemp("nodes")
    workers = []
    for market in ("spot", "on-demand"):
        workers.append(_worker(head, market, folder))
        wait_for(lambda: len(_listed(head, "nodes")) == len(workers) + 1)  # no race for ports
    yield head
    for worker in workers:
        _kill(worker)


def _worker(env: dict[str, str], market: str, folder: Path) -> subprocess.Popen:
    """A second and a third node, on the same machine, with a label."""
    line = f"start --block --address={env['GCS']} --node-ip-address=127.0.0.1 --num-cpus=2"
    with (folder / f"{market}.log").open("w") as log:
        return subprocess.Popen(
            [BIN / "ray", *line.split(), f"--labels=ray.io/market-type={market}"],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


TOKEN = {"Authorization": f"Bearer {'0' * 64}"}


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, headers=TOKEN, timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def _listed(head: dict[str, str], what: str) -> list[dict[str, Any]]:
    url = f"{head['RAY_API_SERVER_ADDRESS']}/api/v0/{what}?detail=1&limit=1000"
    return httpx.get(url, headers=TOKEN, timeout=30).json()["data"]["result"]["result"]


def landed(head: dict[str, str], kind: str) -> set[str]:
    """Where all actors of a kind are or were: head, spot or on-demand."""
    nodes = {
        n["node_id"]: "head" if n["is_head_node"] else n["labels"]["ray.io/market-type"]
        for n in _listed(head, "nodes")
    }
    actors = [a for a in _listed(head, "actors") if kind in a["class_name"]]
    return {nodes[a["node_id"]] for a in actors}


@pytest.fixture
def task_file(tmp_path: Path, tiny: Any) -> str:
    path = tmp_path / "reviews.yaml"
    path.write_text(yaml.safe_dump(tiny.model_dump(mode="json")))
    return str(path)


def submit(head: dict[str, str], *entry: str) -> subprocess.CompletedProcess:
    line = [BIN / "ray", "job", "submit", "--working-dir", str(CHECKOUT), "--", *entry]
    return subprocess.run(line, env=head, capture_output=True, text=True, timeout=400)


def test_a_submitted_job_trains_on_the_head_and_its_logs_come_back(
    head: dict[str, str], task_file: str, tmp_path: Path
) -> None:
    over = ["target.ray.address=auto", f"target.ray.storage={tmp_path}/runs"]
    flags = ["--task", task_file, "--target", "laptop", "target.train.workers=1"]
    done = submit(head, "python", "scripts/train.py", *flags, *over)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: best eval_accuracy" in done.stdout
    (model,) = (tmp_path / "runs").glob("reviews-*/model/model.safetensors")
    assert model.stat().st_size > 0


def test_a_submitted_job_that_fails_passes_its_reason_and_exit_code(head: dict[str, str]) -> None:
    done = submit(head, "python", "-m", "workloads", "train", "target.ray.address=auto")
    assert done.returncode != 0
    assert "a relative path, but the run joins a cluster" in done.stdout
    assert "exit code 2" in done.stdout


def test_an_entry_file_alone_in_a_folder_is_the_command(
    labelled: dict[str, str], task_file: str, tmp_path: Path
) -> None:
    # As `ray submit` does: one file in a home folder, run on the head.
    (tmp_path / "tune.py").write_bytes((CHECKOUT / "scripts/tune.py").read_bytes())
    over = [f"target.ray.address={labelled['GCS']}", f"target.ray.storage={tmp_path}/runs"]
    line = ["tune.py", "--task", task_file, *over]
    line += ["target.tune.label_selector={ray.io/market-type: spot}"]
    done = subprocess.run(
        [sys.executable, *line],
        cwd=tmp_path,
        env=labelled,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "tune: best eval_accuracy" in done.stdout
    assert landed(labelled, "ResourceTrainable") == {"spot"}


def test_check_looks_at_every_node_and_says_what_each_stage_will_be_like(
    labelled: dict[str, str], task_file: str, tmp_path: Path
) -> None:
    over = [f"target.ray.address={labelled['GCS']}", f"target.ray.storage={tmp_path}/runs"]
    line = ["-m", "workloads", "check", "--task", task_file, "--json", *over]
    done = subprocess.run(
        [sys.executable, *line], env=labelled, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    nodes, links = report["survey"]["nodes"], report["survey"]["links"]
    assert [n["storage"] for n in nodes] == ["ok"] * 3
    assert {n["storage_sees"] for n in nodes} == {"3 of 3"}
    assert links["nodes"] == 2  # training keeps off the spot node
    assert links["bus_bytes_per_s"] > links["latency_s"] > 0
    assert report["verdict"]["train"]["widths"][0]["efficiency"] == pytest.approx(1)
    assert list((tmp_path / "runs").glob(".probe*")) == []


def test_a_deployment_on_a_joined_cluster_stays_until_it_is_taken_down(
    labelled: dict[str, str], task_file: str, tmp_path: Path, tiny: Any, prepared: Any
) -> None:
    from workloads import model

    net = model.build(prepared.base, tiny.model, seed=0)
    model.save(net, prepared.tokenizer, tmp_path / "model")
    port = free_port()
    flags = [f"target.ray.address={labelled['GCS']}", f"target.ray.storage={tmp_path}/runs"]
    serve = run_file("serve.py", labelled, tmp_path)
    done = serve("--model", f"{tmp_path}/model", f"target.serve.port={port}", *flags)
    assert done.returncode == 0, done.stderr
    assert "it stays up; remove it with: workloads serve --down" in done.stdout
    body = {"inputs": "a clever delight"}
    url = f"http://127.0.0.1:{port}"
    assert httpx.post(f"{url}/predict", json=body, timeout=60).status_code == 200
    assert landed(labelled, "ServeReplica") == {"on-demand"}
    assert "is removed" in serve("--down", *flags).stdout
    wait_for(lambda: not _answers(f"{url}/readyz"), 60)


def test_a_printed_config_file_deploys_the_same_model(
    labelled: dict[str, str], tmp_path: Path, tiny: Any, prepared: Any
) -> None:
    from workloads import model

    net = model.build(prepared.base, tiny.model, seed=0)
    model.save(net, prepared.tokenizer, tmp_path / "model")
    port = free_port()
    serve = run_file("serve.py", labelled, tmp_path)
    printed = serve("--print-config", "--model", f"{tmp_path}/model", f"target.serve.port={port}")
    (tmp_path / "serve.yaml").write_text(printed.stdout)
    line = [BIN / "serve", "deploy", "-a", labelled["RAY_API_SERVER_ADDRESS"], "serve.yaml"]
    done = subprocess.run(line, cwd=tmp_path, env=labelled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: _answers(f"http://127.0.0.1:{port}/readyz"))
    flags = [f"target.ray.address={labelled['GCS']}", f"target.ray.storage={tmp_path}/runs"]
    assert "is removed" in serve("--down", *flags).stdout


def run_file(name: str, env: dict[str, str], cwd: Path) -> Callable[..., Any]:
    """Runs an entry file of scripts/ with arguments."""
    return lambda *args: subprocess.run(
        [sys.executable, CHECKOUT / "scripts" / name, *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )


# The last one: nothing goes on with this head.
def test_a_head_that_is_gone_ends_a_command_with_a_way_to_go_on(
    head: dict[str, str], task_file: str, tmp_path: Path, command: Callable[..., Command]
) -> None:
    flags = [f"target.ray.address={head['GCS']}", f"target.ray.storage={tmp_path}/runs"]
    args = ["--task", task_file, "--run", "long", "task.train.epochs=5000", *flags]
    training = command("train", *args, **head | {"RAY_gcs_rpc_server_reconnect_timeout_s": "25"})
    wait_for(lambda: "train: epoch" in training.out.read_text(), 120)
    (gcs,) = [p for p in psutil.process_iter() if _is_gcs(p, head["GCS"].partition(":")[2])]
    gcs.kill()
    assert training.wait(60) == 2
    # Ray's actors or the watch over its head, whichever is the first to notice.
    assert "--run long goes on from here" in training.err.read_text()


def _is_gcs(process: psutil.Process, port: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return f"--gcs_server_port={port}" in process.cmdline()
    return False
