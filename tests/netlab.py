"""Real hosts on one Linux machine, as root: each has its own network, processes, home, /tmp/ray and
name, and an sshd that takes one throw-away key. All hang on one bridge; this machine reaches them
too. Files outside a host's home and /tmp/ray are shared, like a folder that all hosts mount.

    with hosts(folder, 3) as (head, *workers):
        ray_head(head, folder / "token")
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

CHECKOUT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NEEDS = ("ip", "tc", "unshare", "nsenter", "setpriv", "sshd", "ssh-keygen", "rsync", "redis-server")
INSTALL = "apt-get install -y iproute2 openssh-server redis-server rsync"
# The first process of a host. Nodes of one machine that share /tmp/ray take each other's uploads
# away, and `ray stop` ends all of Ray's processes that it sees: a host sees only its own.
_BOOT = """
mount -t tmpfs tmpfs {own}
mkdir -p {own}/ray {own}/new {own}/work /tmp/ray /run/sshd
mount --bind {own}/ray /tmp/ray
mount -t overlay -o lowerdir=$HOME,upperdir={own}/new,workdir={own}/work overlay $HOME
touch {own}/none
mount --bind {own}/none /etc/resolv.conf  # nobody answers there, and Ray would wait for it
hostname {name}
exec $(command -v sshd) -D -e -f {config}
"""
_SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
StrictModes no
PermitRootLogin prohibit-password
PidFile none
"""


@dataclass
class Host:
    """A machine: its namespace and its end of the cable are both called `name`."""

    name: str
    address: str
    folder: Path
    switch: str  # this machine's address on the bridge
    init: int = 0  # the process id of its first process, seen from this machine
    ray: list[subprocess.Popen] = field(default_factory=list)


def missing() -> str:
    """What this machine lacks for a lab; empty if nothing."""
    lacks = [tool for tool in NEEDS if not shutil.which(tool)]
    if lacks or os.geteuid():
        return ", ".join(lacks) or "root"
    # Root of a container may lack the right to any of this.
    tried = subprocess.run([*shlex.split("unshare --net --mount --uts --pid --fork"), "true"])
    return "the right to make namespaces" if tried.returncode else ""


@contextlib.contextmanager
def hosts(folder: Path, count: int) -> Iterator[list[Host]]:
    """So many hosts that are up; whatever happens, nothing of them is left."""
    _sweep()
    net = os.getpid() % 250  # two runs at once have networks, bridges and names of their own
    bridge = f"lab{os.getpid()}"
    switch = f"10.77.{net}.254"
    lab = [Host(f"{bridge}h{i}", f"10.77.{net}.{i + 1}", folder, switch) for i in range(count)]
    for key in ("key", "host_key"):
        _sh(f"ssh-keygen -q -t ed25519 -N '' -f {folder}/{key}")
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    try:
        _sh(f"ip link add {bridge} type bridge")
        _sh(f"ip addr add {switch}/24 dev {bridge}")
        _sh(f"ip link set {bridge} up")
        for host in lab:
            _sh(f"ip netns add {host.name}")
            _sh(f"ip link add {host.name} type veth peer name eth0 netns {host.name}")
            _sh(f"ip link set {host.name} master {bridge} up")
            _sh(f"ip -n {host.name} addr add {host.address}/24 dev eth0")
            _sh(f"ip -n {host.name} link set eth0 up")
            _sh(f"ip -n {host.name} link set lo up")
            # To nowhere; without one Ray takes loopback for the host's own address. It looks for a
            # cloud's metadata too, and would wait for the answer.
            _sh(f"ip -n {host.name} route add default via {switch}")
            _sh(f"ip -n {host.name} route add unreachable 169.254.0.0/16")
            boot(host)
        yield lab
    finally:
        for host in lab:
            kill(host)
            # The cable by itself: a namespace may stay for minutes, until its last connection to
            # a lost host has timed out, and would keep it.
            _sh(f"ip link del {host.name}", check=False)
            _sh(f"ip netns del {host.name}", check=False)
        _sh(f"ip link del {bridge}", check=False)


def _sweep() -> None:
    """Removes the bridges, cables and names that a killed run has left; its processes have died
    with it."""
    for path in Path("/sys/class/net").glob("lab*"):
        found = re.fullmatch(r"lab(\d+)(h\d+)?", path.name)
        if found and not psutil.pid_exists(int(found[1])):
            _sh(f"ip link del {path.name}", check=False)
            _sh(f"ip netns del {path.name}", check=False)


def boot(host: Host) -> None:
    """Switches a host on; returns when ssh answers."""
    own = host.folder / host.name
    own.mkdir(exist_ok=True)
    script = _BOOT.format(own=own, name=host.name, config=host.folder / "sshd_config")
    # setpriv: should this process be killed, its hosts die with it.
    line = f"setpriv --pdeathsig KILL ip netns exec {host.name} unshare --mount --uts --pid --fork"
    with (host.folder / f"{host.name}.log").open("a") as log:
        unshare = subprocess.Popen(
            [*shlex.split(line), "--kill-child", "--mount-proc", "bash", "-ec", script],
            stdout=log,
            stderr=log,
        )
    host.ray = [unshare]
    children = psutil.Process(unshare.pid).children
    _until(lambda: _listens(host.address, 22), 90)
    host.init = children()[0].pid


def kill(host: Host) -> None:
    """All processes of a host end at once, as with the power; `boot` switches it on again."""
    if host.init:
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.init, signal.SIGKILL)  # with the first process all others go
    for process in host.ray:
        process.kill()
        process.wait()
    host.init, host.ray = 0, []


def cut(host: Host) -> None:
    """Pulls the cable: packets vanish, nobody is told."""
    _sh(f"ip link set {host.name} down")


def restore(host: Host) -> None:
    """Puts the cable back."""
    _sh(f"ip link set {host.name} up")


def throttle(host: Host, mbit: float) -> None:
    """Limits what a host sends and what it receives, each to so many Mbit/s."""
    unthrottle(host)
    bucket = f"root tbf rate {mbit}mbit burst 256kbit latency 400ms"
    _sh(f"tc qdisc add dev {host.name} {bucket}")
    _sh(f"tc -n {host.name} qdisc add dev eth0 {bucket}")


def unthrottle(host: Host) -> None:
    """The cable's own speed."""
    _sh(f"tc qdisc del dev {host.name} root", check=False)
    _sh(f"tc -n {host.name} qdisc del dev eth0 root", check=False)


def inside(host: Host, *command: Any) -> list[str]:
    """The command line that runs a command on a host; it starts in /."""
    line = f"nsenter --target {host.init} --mount --uts --net --pid --"
    return [*line.split(), *map(str, command)]


def run(
    host: Host, *command: Any, env: dict[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a command on a host to its end."""
    line = inside(host, *command)
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=timeout_s)


def private(host: Host, path: Path, size: str = "64m") -> None:
    """From now on the host has a small empty disk of its own where others see a shared folder."""
    line = inside(host, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
    subprocess.run(line, check=True)


def public(host: Host, path: Path) -> None:
    """Undoes `private`."""
    subprocess.run(inside(host, "umount", "--lazy", path), check=True)


def environment(token: Path, **more: str) -> dict[str, str]:
    """What Ray's processes and commands get: this checkout, and a token, which is made if need
    be."""
    if not token.exists():
        token.write_text("0123456789abcdef" * 4)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return clean | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def ray_head(host: Host, env: dict[str, str], cpus: float = 1, **labels: str) -> None:
    """Starts Ray's head; returns when jobs can be submitted."""
    dashboard = "--include-dashboard=true --dashboard-host=0.0.0.0"

    def there() -> bool:
        if len(host.ray) == 1 or host.ray[-1].poll() is not None:  # it gives up after half a minute
            _ray_start(host, env, f"--head --port=6379 {dashboard}", cpus, labels)
        return _listens(host.address, 8265)

    _until(there, 240)


def ray_worker(host: Host, head: Host, env: dict[str, str], cpus: float = 1, **labels: str) -> None:
    """Starts a node that joins the head; it is there a few seconds later."""
    _ray_start(host, env, f"--address={head.address}:6379", cpus, labels)


def asked(head: Host, env: dict[str, str], path: str) -> Any:
    """What the head's dashboard answers; nothing while it does not."""
    token = Path(env["RAY_AUTH_TOKEN_PATH"]).read_text()
    try:
        answer = httpx.get(
            f"http://{head.address}:8265/api/{path}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
        )
    except httpx.HTTPError:
        return {}
    return answer.json() if answer.is_success else {}


def alive(head: Host, env: dict[str, str]) -> dict[str, str]:
    """Node id -> address of the nodes that the head counts as alive."""
    told = asked(head, env, "v0/nodes")
    nodes = told["data"]["result"]["result"] if told else []
    return {n["node_id"]: n["node_ip"] for n in nodes if n["state"] == "ALIVE"}


def all_there(hosts: list[Host], env: dict[str, str]) -> None:
    """Returns when the head, the first of them, counts all as alive."""
    _until(lambda: len(set(alive(hosts[0], env).values())) == len(hosts), 240)


def _ray_start(
    host: Host, env: dict[str, str], how: str, cpus: float, labels: dict[str, str]
) -> None:
    line = f"ray start --block {how} --node-ip-address={host.address} --num-cpus={cpus}"
    # Ray would take a third of the machine's memory for each host.
    line += " --object-store-memory=200000000 --disable-usage-stats"
    if labels:
        line += " --labels=" + ",".join(f"{k}={v}" for k, v in labels.items())
    with (host.folder / f"{host.name}.log").open("a") as log:
        host.ray.append(
            subprocess.Popen(inside(host, *line.split()), env=env, stdout=log, stderr=log)
        )


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _until(what: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain")
        time.sleep(0.1)


def _sh(line: str, check: bool = True) -> None:
    subprocess.run(shlex.split(line), check=check, capture_output=True, text=True)
