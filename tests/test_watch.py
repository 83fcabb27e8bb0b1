"""A command whose Ray is gone while its main thread waits for what does not come."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

WAITS = """
import threading
import psutil, ray
from rich.console import Console
from workloads.lost import Watch
ray.init("local", include_dashboard=False, num_cpus=1, _node_ip_address="127.0.0.1")
Watch(Console(), lambda: "The way on.").start()
for process in psutil.Process().children():
    if process.name() == "{process}":
        process.kill()
threading.Event().wait()  # as for an answer of Ray
"""


@pytest.mark.parametrize(
    ("process", "said"), [("raylet", "Ray has lost this node"), ("gcs_server", "the head of Ray")]
)
def test_a_lost_process_of_ray_ends_the_command(
    process: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "25")
    done = subprocess.run(
        [sys.executable, "-c", WAITS.format(process=process)],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr
    assert "The way on." in done.stderr
