"""What the process of a replica does otherwise than uvicorn and the C library do by themselves."""

import asyncio
import ctypes
from typing import Any

LARGE = 50_000  # bytes of a body whose objects are worth giving back
GIVE_BACK_S = 1.0


class GiveBack:
    """Returns freed memory to the system, once a second at most.

    A megabyte of JSON is a hundred of Python's for a moment. What glibc keeps of it is scattered
    over its arenas: each such moment would leave a little more, for hours.
    """

    def __init__(self) -> None:
        # Other C libraries have none, and do not need it.
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self.waiting = False

    def soon(self) -> None:
        """Once the requests of this second are answered."""
        if self.trim is not None and not self.waiting:
            self.waiting = True
            asyncio.get_running_loop().call_later(GIVE_BACK_S, self._now)

    def _now(self) -> None:
        self.waiting = False
        assert self.trim is not None
        self.trim(0)


class Together:
    """A transport that keeps the head of a response until its body is written too.

    Whoever is killed between two writes leaves half an answer, which no ingress can ask again of
    another; and one write costs less than two.
    """

    def __init__(self, transport: Any) -> None:
        self.transport, self.head = transport, b""

    def write(self, data: bytes) -> None:
        """As of a transport."""
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):
            self.head = data
            return
        self.transport.write(self.head + data)
        self.head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


def write_at_once() -> None:
    """Makes uvicorn answer POST so in this process; it has no setting for it."""
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    cycle: Any = RequestResponseCycle
    plain = cycle.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        # Only answers that have a body.
        if self.scope["method"] == "POST" and not isinstance(self.transport, Together):
            self.transport = Together(self.transport)

    cycle.__init__ = init
