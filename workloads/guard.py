"""What Ray's own proxy lacks where it, not HAProxy, faces users. Ray asks `middlewares` for it
(RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# Ray reads them as UTF-8, under either spelling, and makes a 500 of what is not.
READ_BY_RAY = {b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id"}
READ_BY_RAY |= {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}


class Guard:
    """Drops those headers where they are no ASCII, and ids of requests that are too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        scope["headers"] = [
            (name, value)
            for name, value in scope.get("headers", [])
            if (value.isascii() or name.replace(b"_", b"-") not in READ_BY_RAY)
            and (name != b"x-request-id" or 1 <= len(value) <= 128)
        ]
        await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """As Ray wants them."""
    return [Middleware(Guard)]
