"""What is in front of the replicas, and what it listens on."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import free_port, wait_for

from workloads import ingress
from workloads.config import UserError
from workloads.haproxy import mend

CONFIG = """defaults
    mode http
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
backend default_backend
    http-request return status 404
backend http-workloads
    default-server fastinter 250ms inter 1s fall 2 rise 2 check
listen stats
  bind *:8404
"""


def prepared(wanted: str = "auto") -> tuple[str, dict[str, str]]:
    environment: dict[str, str] = {}
    return ingress.prepare(wanted, environment), environment


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_ray_is_told_to_start_haproxy_as_this_machine_allows() -> None:
    told, environment = prepared()
    assert told == "HAProxy"
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert 1000 < int(environment["RAY_SERVE_HAPROXY_MAXCONN"]) <= 16_384


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_each_user_of_a_machine_has_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "FILES", tmp_path)

    def homes() -> set[Path]:
        _, environment = prepared()
        files = [key for key in environment if key.endswith(("_LOC", "_PATH", "_STATE_FILE"))]
        of_ray = [Path(environment[key]) for key in files if "BINARY" not in key]
        assert len(of_ray) == 4
        return {file.parent for file in of_ray}

    (mine,) = homes()
    assert mine.stat().st_uid == os.getuid()
    assert mine.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(os, "getuid", lambda: 4242)  # whose folder somebody else has made
    theirs = tmp_path / "haproxy-serve-4242"
    theirs.mkdir()
    (another,) = homes()
    assert another not in (mine, theirs)
    assert another.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_haproxys_own_pages_stay_on_loopback_and_it_takes_the_settings(
    tmp_path: Path,
) -> None:
    _, environment = prepared()
    file = tmp_path / "haproxy.cfg"
    file.write_text(CONFIG)
    for _ in range(2):  # Ray starts it anew at every change
        line = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-c", "-f", str(file)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    binds = [words.split()[1] for words in file.read_text().splitlines() if " bind " in words]
    assert [address.partition(":")[0] for address in binds] == ["127.0.0.1", "*", "127.0.0.1"]
    assert file.read_text().count("http-buffer-request") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_a_configuration_that_ray_did_not_write_is_haproxys_own_affair(tmp_path: Path) -> None:
    script = prepared()[1]["RAY_SERVE_HAPROXY_BINARY_PATH"]
    port = free_port()
    own = (
        "defaults\n    mode http\n    timeout client 5s\nfrontend mine\n"
        f"    bind 127.0.0.1:{port}\n    http-request return status 204\n"
    )
    (tmp_path / "own.cfg").write_text(own)
    with subprocess.Popen([script, "-db", "-f", "own.cfg"], cwd=tmp_path) as haproxy:
        try:
            wait_for(lambda: answered(port) == 204, 30)
            assert Path(psutil.Process(haproxy.pid).exe()).name == "haproxy"  # in its place
        finally:
            haproxy.kill()
    assert [file.name for file in tmp_path.iterdir()] == ["own.cfg"]
    assert (tmp_path / "own.cfg").read_text() == own


class Busy(http.server.BaseHTTPRequestHandler):
    """A replica that answers what it is asked, but no check."""

    def do_GET(self) -> None:
        if self.path == "/-/healthz":
            time.sleep(3)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_replicas_that_are_too_busy_for_checks_are_asked_all_the_same(tmp_path: Path) -> None:
    script = prepared()[1]["RAY_SERVE_HAPROXY_BINARY_PATH"]
    replica = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=replica.serve_forever, daemon=True).start()
    port, stats = free_port(), free_port()
    log = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    log.bind(("127.0.0.1", 0))
    log.setblocking(False)
    (tmp_path / "haproxy.cfg").write_text(f"""global
    log 127.0.0.1:{log.getsockname()[1]} local0 info
defaults
    mode http
    log global
    option httplog
    timeout connect 1s
    timeout client 20s
    timeout server 20s
    retries 3
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 599 if {{ path /up }} {{ nbsrv(http-workloads) ge 1 }}
    http-request return status 598 if {{ path /up }}
    acl is_http-workloads path /
    use_backend http-workloads if is_http-workloads
    default_backend default_backend
backend default_backend
    http-request return status 404
backend http-workloads
    option httpchk GET /-/healthz
    default-server fastinter 100ms inter 300ms fall 2 rise 2 check
    server one 127.0.0.1:{replica.server_port} check
    server stand-in 127.0.0.1:1 check backup
listen stats
    bind :{stats}
    stats enable""")
    environment = os.environ | {"WORKLOADS_MAX_READ_S": "5"}
    line = [script, "-db", "-f", "haproxy.cfg"]
    with subprocess.Popen(line, cwd=tmp_path, env=environment) as haproxy:
        try:
            wait_for(lambda: answered(port, "up") == 598, 30)
            assert [answered(port) for _ in range(5)] == [200] * 5
            nobody = httpx.get(f"http://127.0.0.1:{port}/elsewhere")
            assert (nobody.status_code, nobody.headers["retry-after"]) == (503, "1")
            assert nobody.json() == {"error": "no model is served here now"}
            with pytest.raises(BlockingIOError):  # what was asked is nobody's business
                log.recv(1)
            replica.shutdown()
            replica.server_close()
            gone = httpx.get(f"http://127.0.0.1:{port}/", timeout=30)
            assert (gone.status_code, gone.headers["retry-after"]) == (503, "1")
            assert gone.json() == {"error": "no replica answers"}
        finally:
            haproxy.kill()


def answered(port: int, path: str = "") -> int:
    """A status; 0 where nobody listens."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/{path}").status_code
    return 0


def test_without_haproxy_rays_own_proxy_is_taken_and_the_reason_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert prepared()[0] == "Ray's own proxy (HAProxy comes with Ray on Linux only)"
    with pytest.raises(UserError, match="serve.ingress is 'haproxy', but HAProxy comes with"):
        prepared("haproxy")


def test_rays_own_proxy_is_taken_where_it_is_asked_for() -> None:
    told, environment = prepared("proxy")
    assert told == "Ray's own proxy"
    assert ingress.GUARD in environment
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment


def test_two_rays_of_one_machine_share_no_port() -> None:
    each = [
        {value for key, value in prepared()[1].items() if key.endswith("_PORT")} for _ in range(6)
    ]
    assert {len(ports) for ports in each} == {5}
    # By chance, of 400 blocks: two may be alike, three hardly.
    assert len(set.union(*each)) >= 4 * 5


def test_a_config_that_is_mended_twice_is_mended_once() -> None:
    once = mend(CONFIG, Path("busy"))
    assert mend(once, Path("busy")) == once != CONFIG
