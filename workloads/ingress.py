"""How requests reach the replicas: through HAProxy, which Ray brings on Linux and which costs a
thirtieth of the CPU of Ray's own proxy, and straight into the replicas' processes.

Ray reads these settings when its processes start, so they are set before ray.init; before `ray
start` on each node of a cluster: eval "$(python -m workloads.ingress)"
"""

import contextlib
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from .config import UserError

FILES = Path("/tmp")  # not TMPDIR: with Ray's folder for each node a socket's path must stay short
GUARD = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # of Ray's own proxy
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # The replica answers in the thread that reads the request.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A replica that is killed has its requests asked again of another one: asking twice does no
    # harm here.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    # A request is kept for that: all that fit into so many bytes.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
    # A line to the collector for each request costs as much as the request itself.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "1",
    # A node that is gone without a word does not even end its connections.
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "20",
    # HAProxy is missed after three of these, on a busy machine too; until then a stand-in answers.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "5",
    # Ray kills what is not ready after so long: 5 s are too few where many processes start at once.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # A replica that stops takes no new requests and answers those it has; Ray adds 30 s to that.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


def prepare(wanted: str, environment: MutableMapping[str, str] = os.environ) -> str:
    """Sets what a Ray that starts here shall do; returns what it will be, in words.

    `wanted` is target.serve.ingress. Raises UserError when it cannot be had.
    """
    if "RAY_SERVE_HAPROXY_BINARY_PATH" in environment:
        return "HAProxy"  # set before: by us, or by who runs this
    # Else each thread keeps what a megabyte of JSON took for a moment: a fourth more after 100,000
    # requests.
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    script, why = _script()
    if wanted == "haproxy" and not script:
        raise UserError(f"target.serve.ingress is 'haproxy', but {why}; leave it at auto")
    if wanted == "proxy" or not script:
        environment.setdefault(GUARD, "workloads.guard.middlewares")
        return "Ray's own proxy" + (f" ({why})" if wanted == "auto" else "")
    for key, value in HAPROXY.items():
        environment.setdefault(key, value)
    import resource  # where HAProxy is

    # It will not start with more connections than it may open files: two each, and some.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = min(16_384, files // 3) if files != resource.RLIM_INFINITY else 16_384
    environment.setdefault("RAY_SERVE_HAPROXY_MAXCONN", str(most))
    environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = script
    for key, value in {**_ports(), **_files()}.items():
        environment.setdefault(key, value)
    return "HAProxy"


def _script() -> tuple[str, str]:
    """What starts HAProxy as it comes with ray[serve], or why it does not."""
    if sys.platform != "linux":
        return "", "HAProxy comes with Ray on Linux only"
    script = Path(sys.executable).parent / "workloads-haproxy"
    try:
        subprocess.run([script, "-v"], capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as e:
        return "", f"HAProxy does not run here: {e}"
    return str(script), ""


def _ports() -> dict[str, str]:
    """Ports that no other Ray of this machine uses: Ray's own choice is the same for all, they are
    shared without a word, and one Ray's replicas then answer for another's."""
    # Below those that are given to callers: hours may pass before these are used.
    block = next(b for _ in range(1000) if _are_free(b := random.randrange(10_000, 30_000, 50)))
    found = {
        "RAY_SERVE_HAPROXY_STATS_PORT": block,
        "RAY_SERVE_HAPROXY_METRICS_PORT": block + 1,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": block + 2,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": block + 3,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": block + 49,
    }
    return {key: str(port) for key, port in found.items()}


def _files() -> dict[str, str]:
    """Files in a folder of this user's own: Ray's choice is one for all users of a machine, in
    which only the first of them may write."""
    home = FILES / f"haproxy-serve-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        home.mkdir(mode=0o700)
    if home.lstat().st_uid != os.getuid():  # somebody else's, or their link to one of ours
        home = Path(tempfile.mkdtemp(prefix="haproxy-serve-", dir=FILES))
    found = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": home / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": home / "admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": home / "metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": home,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": home / "server-state",
    }
    return {key: str(file) for key, file in found.items()}


def _are_free(block: int) -> bool:
    for port in range(block, block + 4):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


if __name__ == "__main__":
    _environment: dict[str, str] = {}
    print(f"# ingress: {prepare('auto', _environment)}")
    for _name, _value in _environment.items():
        print(f"export {_name}={shlex.quote(_value)}")
