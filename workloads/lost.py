"""Notices that the Ray of a command is gone, and ends the command with a sentence."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from .live import say

_EVERY_S = 5.0
# Ray ends a process whose head has not answered for so long, from C++ and without a way on.
_RAYS_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60))  # noqa: SIM112


def is_loss(error: Exception) -> bool:
    """Whether Ray says that processes, nodes or their network were lost, for longer than it and
    our retries could make up for; no fault of any code."""
    if "ray" not in sys.modules:
        return False
    from ray import exceptions as ray

    actors = (ray.ActorDiedError, ray.ActorUnavailableError)
    others = (ray.NodeDiedError, ray.RpcError, ray.LocalRayletDiedError, ray.OwnerDiedError)
    return isinstance(error, (*actors, *others)) and not getattr(error, "actor_init_failed", False)


class Watch(threading.Thread):
    """Asks the head, as long as this process is connected to Ray.

    Without it, a lost head ends the command with Ray's own words, and a lost raylet of this node
    (the kernel ends it where memory is short) lets it wait for ever.
    """

    def __init__(self, console: Console, way_on: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self.console, self.way_on = console, way_on

    def run(self) -> None:
        import ray

        context = ray.get_runtime_context()
        address, node = context.gcs_address, context.get_node_id()
        silent_since = None
        while True:
            time.sleep(_EVERY_S)
            if not ray.is_initialized():
                return
            if not _answers(address):
                if silent_since is None:
                    silent_since = time.monotonic()
                    say(self.console, f"warning: the head of Ray ({address}) does not answer")
                elif time.monotonic() - silent_since > _RAYS_S - 4 * _EVERY_S:
                    self._end(f"the head of Ray ({address}) has not answered for too long")
                continue
            if silent_since is not None:
                silent_since = None
                say(self.console, "the head of Ray answers again")
            if not any(n["NodeID"] == node and n["Alive"] for n in ray.nodes()):
                time.sleep(_EVERY_S)  # for the command to find out by itself
                self._end("Ray has lost this node: its raylet has ended, killed from outside")

    def _end(self, what: str) -> NoReturn:
        self.console.show_cursor()
        print(f"error: {what}. {self.way_on()}", file=sys.stderr, flush=True)
        os._exit(2)  # the main thread waits in Ray's code for what does not come


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_EVERY_S).close()
    except OSError:
        return False
    return True
