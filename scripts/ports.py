"""Free ports for servers that scripts and tests start."""

import contextlib
import random
import socket


def free_port() -> int:
    """A port of this machine that nobody uses; below those that the system itself gives away, to
    callers too, before whoever was told of it listens there."""
    for port in random.sample(range(30_000, 32_700), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports are taken")
