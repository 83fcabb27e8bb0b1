"""The HTTP side of a deployment: a FastAPI app over a model's functions. No Ray here.

What is posted is read and answered by bare ASGI apps, the rest by FastAPI. Every refusal is a 4xx
with a reason, as the protocol of its path has it.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from functools import cache, partial
from typing import Any, NamedTuple
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from . import __version__, keys, openapi, page, protocols, wire
from .config import TargetServe
from .metrics import Figures, Metrics
from .protocols import Model, Refusal

# What needs no key: the page, which asks for one, and what tells a load balancer where to send.
OPEN = {"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
SECURITY = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
HSTS = (b"strict-transport-security", b"max-age=31536000")
# FastAPI's page of the API gets its script from there.
_DOCS = (
    b"default-src 'self'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src "
    b"'unsafe-inline' https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com; "
    b"frame-ancestors 'none'"
)
Headers = list[tuple[bytes, bytes]]
MANY = 1000  # problems of one request


class BusyError(Refusal):
    """For `admit` to raise when a request would wait too long."""

    def __init__(self, reason: str) -> None:
        super().__init__(429, f"busy: {reason}; try again", {"Retry-After": "1"})


class Front:
    """Asks for a key, hands what is posted to a path to its Post, and all else to FastAPI: its
    middleware alone costs a tenth of a request."""

    def __init__(
        self,
        app: FastAPI,
        posts: dict[str, "Post"],
        limits: TargetServe,
        hashes: list[str],
        marks: Headers,
        metrics: Metrics,
    ) -> None:
        self.app, self.posts, self.marks, self.metrics = app, posts, marks, metrics
        self.max_header_bytes = limits.max_header_bytes
        self.hashes = [one.encode() for one in hashes]
        self.security = security(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self.metrics.watch(self._answer, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope["admitted"] = self._admitted(scope)
        except Refusal as refusal:
            secured = self._secured(scope["path"], send, not self.hashes)
            await refused(scope["path"], refusal)(scope, receive, secured)
            return
        if scope["method"] == "HEAD":  # whoever sends the answer leaves its body out
            scope = {**scope, "method": "GET"}
        post = self.posts.get(scope["path"]) if scope["method"] == "POST" else None
        if post:
            await post(scope, receive, send)
        else:
            await self.app(scope, receive, self._secured(scope["path"], send, scope["admitted"]))

    def _admitted(self, scope: Scope) -> bool:
        """Whether a caller has a key, where one is needed; raises Refusal for what no other may
        ask."""
        headers = scope["headers"]
        if sum(len(key) + len(value) for key, value in headers) > self.max_header_bytes:
            raise Refusal(431, f"the headers are over {self.max_header_bytes:,} bytes")
        if not self.hashes:
            return True
        given = [value for key, value in headers if key == b"authorization"]
        if given and (number := keys.admits(self.hashes, given[0])):
            scope["key"] = number
            return True
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return False
        what = "this API key is not known" if given else "an API key is needed"
        reason = f"{what}; send -H 'Authorization: Bearer KEY'"
        raise Refusal(401, reason, {"WWW-Authenticate": "Bearer"})

    def _secured(self, path: str, send: Send, admitted: bool) -> Send:
        """Adds the headers that tell browsers what not to do, and who may ask it which model this
        is."""
        most = [*self.security, *(self.marks if admitted else [])]
        if path == "/docs":
            most = [(b"content-security-policy", _DOCS), *most[1:]]

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", [])
                there = {key for key, _ in own}
                message["headers"] = [*own, *(one for one in most if one[0] not in there)]
            await send(message)

        return with_headers


def security(limits: TargetServe) -> list[tuple[bytes, bytes]]:
    """The headers of all answers."""
    return [*SECURITY, HSTS] if limits.tls_certfile else SECURITY


def marks(lineage: dict[str, Any]) -> Headers:
    """The headers that say which model answered."""
    if not lineage:
        return []
    digest = lineage["digest"][: len("sha256:") + 16].encode()
    version = quote(lineage["version"]).encode()  # which may have letters that no header carries
    return [(b"x-model-digest", digest), (b"x-model-version", version)]


def refused(path: str, refusal: Refusal) -> JSONResponse:
    """The answer to what is refused, as the protocol of that path has it."""
    content: Any = {"error": str(refusal)}
    if path.startswith("/v1/"):
        kind = {401: "authentication_error", 429: "rate_limit_exceeded"}.get(refusal.code)
        kind = kind or "invalid_request_error"
        content = {"error": {"message": str(refusal), "type": kind, "param": None, "code": None}}
    return JSONResponse(content, refusal.code, refusal.headers)


class Kind(NamedTuple):
    """A kind of request: where it is posted, what it holds, and how it is answered."""

    path: str
    summary: str
    request: TypeAdapter[Any]
    answer: Callable[..., Awaitable[tuple[Any, list[int]]]]  # and the numbers of cut texts
    example: Any  # of an answer


def kinds(model: Model) -> list[Kind]:
    """All that may be posted."""
    scores = [[{"label": "positive", "score": 0.98}, {"label": "negative", "score": 0.02}]]
    predict = TypeAdapter(protocols.PredictRequest), protocols.predict, scores
    infer = TypeAdapter(protocols.InferRequest), protocols.infer
    label = {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["positive"]}
    inferred = {"model_name": model.id, "model_version": protocols.VERSION, "outputs": [label]}
    vector = {"object": "embedding", "index": 0, "embedding": [0.01, -0.02]}
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    listed = {"object": "list", "data": [vector], "model": model.id, "usage": usage}
    embed = TypeAdapter(protocols.EmbedRequest), protocols.embed, [[0.01, -0.02]]
    explain = TypeAdapter(protocols.ExplainRequest), protocols.explain, openapi.EXPLAINED
    openai = TypeAdapter(protocols.EmbeddingsRequest), protocols.embeddings, listed
    named = f"/v2/models/{model.id}"
    return [
        Kind("/predict", "Classify (Hugging Face)", *predict),
        Kind("/", "Classify (Hugging Face)", *predict),
        Kind("/embed", "Embed (Hugging Face)", *embed),
        Kind("/explain", "Explain a label", *explain),
        Kind("/v1/embeddings", "Embed (OpenAI)", *openai),
        Kind(f"{named}/infer", "Infer (Open Inference Protocol)", *infer, inferred),
        Kind(f"{named}/versions/{protocols.VERSION}/infer", "Infer, by version", *infer, inferred),
    ]


class Post:
    """One kind of request as a bare ASGI app: FastAPI's own way to a handler takes several times
    as long as all that this does."""

    def __init__(
        self,
        kind: Kind,
        model: Model,
        limits: TargetServe,
        admit: Callable[[], Awaitable[None]],
        marks: Headers,
    ) -> None:
        self.kind, self.model, self.admit = kind, model, admit
        self.max_body_bytes, self.max_read_s = limits.max_body_bytes, limits.max_read_s
        self.headers = [(b"content-type", b"application/json"), *security(limits), *marks]
        self.give_back = wire.GiveBack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            asked = dict(scope["headers"])
            check_encoding(asked.get(b"content-encoding", b"").decode("latin-1"))
            body = await self._arrived(receive)
            if body is None:
                return
            await self.admit()  # to make tokens of the texts costs many times as much
            if len(body) > wire.LARGE:
                self.give_back.soon()
            found, truncated = await self._answer(body, asked)
        except Refusal as refusal:
            problem = refused(self.kind.path, refusal)
            problem.raw_headers += self.headers[1:]
            await problem(scope, receive, send)
            return
        headers, after = self.headers, b""
        if isinstance(found, protocols.Binary):
            found, after = found
            headers = [(b"content-type", b"application/octet-stream"), *headers[1:]]
        content = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
        if after:
            headers.append((b"inference-header-content-length", str(len(content)).encode()))
            content += after
        headers = [*headers, (b"content-length", str(len(content)).encode())]
        if truncated:
            headers.append((b"x-truncated-inputs", ",".join(map(str, truncated)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, body: bytes, headers: dict[bytes, bytes]) -> tuple[Any, list[int]]:
        binary: tuple[bytes, ...] = ()
        if self.kind.answer is protocols.infer:
            length = headers.get(b"inference-header-content-length")
            body, rest = protocols.split(body, length)
            binary = (rest,)
        else:
            check_type(headers.get(b"content-type", b"").decode("latin-1"))
        return await self.kind.answer(self.model, parse(self.kind.request, body), *binary)

    async def _arrived(self, receive: Receive) -> bytes | None:
        try:
            async with asyncio.timeout(self.max_read_s):
                return await self._body(receive)
        except TimeoutError:
            reason = f"the body did not arrive within {self.max_read_s:g} s"
            raise Refusal(408, reason, {"Connection": "close"}) from None

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, read up to the limit and not parsed before; None if the client goes."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body_bytes:
                raise Refusal(413, f"the body is over {self.max_body_bytes:,} bytes")
        return bytes(body)


def check_encoding(encoding: str) -> None:
    """Raises Refusal for what is compressed: a small body may hold a huge one."""
    if encoding.strip().lower() not in ("", "identity"):
        raise Refusal(415, f"content-encoding is {encoding[:40]!r}; send the body as it is")


def check_type(content_type: str) -> None:
    """Raises Refusal for what says that it is no JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        found = f"'{kind[:80]}'" if kind else "none"
        raise Refusal(415, f"content-type is {found}; send -H 'content-type: application/json'")


def parse(request: TypeAdapter[Any], body: bytes) -> Any:
    """The request in a body; raises Refusal, which never repeats the input: it may be huge."""
    try:
        return request.validate_json(body)
    except ValidationError as error:
        if error.error_count() > MANY:  # to write them down would take a second
            raise Refusal(422, f"{error.error_count()} problems; /docs shows requests") from None
        (first, *_) = error.errors(include_input=False, include_url=False)
        if first["type"] == "json_invalid":
            reason = f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
            raise Refusal(400, reason) from None
        said = [*protocols.problems(error)[:5], f"as in {_example(request)}"]
        raise Refusal(422, "; ".join(said)) from None


@cache
def _example(request: TypeAdapter[Any]) -> str:
    return json.dumps(request.json_schema()["examples"][-1])


async def _everybody() -> None:
    """Admits."""


def make_app(
    model: Model,
    about: dict[str, Any],
    limits: TargetServe,
    hashes: list[str] | None = None,
    admit: Callable[[], Awaitable[None]] = _everybody,
    metrics: Metrics | None = None,
    figures: Figures | None = None,
) -> Front:
    """The app, for callers who have a key with one of these hashes, or for everybody. `admit` is
    asked before a body is looked at, and may raise BusyError. `figures` are those of all replicas,
    this one's `metrics` among them."""
    metrics = metrics or Metrics(model.labels)
    what = f"into {', '.join(model.labels[:20])}" if model.labels else "as embeddings"
    app = FastAPI(
        title="workloads",
        version=__version__,
        description=f"Texts {what}, by {model.name}.",
        redoc_url=None,
        redirect_slashes=False,  # to wherever the Host header says
    )
    app.add_exception_handler(HTTPException, partial(_refuse_http, model))
    all_kinds = kinds(model)
    own = marks(about.get("lineage", {}))
    posts = {kind.path: Post(kind, model, limits, admit, own) for kind in all_kinds}
    for path, post in posts.items():  # for what else is asked there: 405
        app.router.routes.insert(0, Route(path, post, methods=["POST"]))
    shown = {key: value for key, value in about.items() if key not in ("notes", "card", "lineage")}
    _add_gets(app, model, shown)
    _add_page(app, model, about, limits)
    metrics.add_to(app, figures)
    named = ("{name}", model.id), ("{version}", protocols.VERSION)
    for path in (route.path for route in app.routes if isinstance(route, Route)):
        for what, value in named:
            path = path.replace(what, value)
        metrics.paths.add(path)
    # FastAPI keeps and shows this object.
    openapi.complete(app.openapi(), all_kinds, model, OPEN if hashes else None)
    return Front(app, posts, limits, hashes or [], own, metrics)


def _add_gets(app: FastAPI, model: Model, about: dict[str, Any]) -> None:
    created = int(time.time())

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(request: Request) -> dict[str, Any]:
        """The model is loaded; what it is, for who may ask it."""
        return {"status": "ready", **(about if request.scope["admitted"] else {})}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, as OpenAI lists them."""
        return protocols.models(model, created)

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model, as OpenAI describes it."""
        _is_here(name, model)
        return protocols.models(model, created)["data"][0]

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        """The server (Open Inference Protocol)."""
        return {"name": "workloads", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """The process is alive (Open Inference Protocol)."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        """The model is loaded (Open Inference Protocol)."""
        return {"ready": True}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str = protocols.VERSION) -> dict[str, Any]:
        """Inputs and outputs of the model (Open Inference Protocol)."""
        _is_here(name, model, version)
        return protocols.metadata(model)

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = protocols.VERSION) -> dict[str, Any]:
        """The model is loaded (Open Inference Protocol)."""
        _is_here(name, model, version)
        return {"name": model.id, "ready": True}


def _add_page(app: FastAPI, model: Model, about: dict[str, Any], limits: TargetServe) -> None:
    content, headers = page.load()
    most: Any = {"max_body_bytes", "max_request_tokens"}
    takes = {"max_inputs": model.max_inputs, **limits.model_dump(include=most)}
    told = {key: value for key, value in about.items() if key != "lineage"}
    known = {"notes": {}, "card": None, **told, "limits": takes}
    described = {"name": model.name, **known, **about.get("lineage", {})}
    for key in ("model", "card", "limits"):
        described.pop(key, None)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        """A page to try the model on."""
        return Response(content, headers=headers)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What the page shows of the model, and how much a request may hold."""
        return known

    @app.get("/model")
    async def described_model() -> dict[str, Any]:
        """What the model is and where it comes from."""
        return described


def _is_here(name: str, model: Model, version: str = protocols.VERSION) -> None:
    if name != model.id or version != protocols.VERSION:
        raise HTTPException(404, f"no such model or version (there is {protocols.VERSION})")


async def _refuse_http(model: Model, request: Request, error: Any) -> JSONResponse:
    text, path = str(error.detail), request.scope["path"]
    if error.status_code in (404, 405):
        way = f"/v2/models/{model.id}/infer" if path.startswith("/v2/models/") else "/predict"
        way = way if model.labels or way != "/predict" else "/embed"
        asked = f"{request.method} {path[:100]}"  # the Host may make no URL
        text += f": {asked}; the model is {model.id}: POST {way}; /docs shows what else there is"
    headers = error.headers
    if error.status_code == 405:  # Starlette names the methods of one route; "/" has two
        there = [r for r in request.app.routes if isinstance(r, Route)]
        own = [r.methods or () for r in there if r.path_regex.match(path)]
        headers = {"Allow": ", ".join(sorted({method for methods in own for method in methods}))}
    return refused(path, Refusal(error.status_code, text, headers))
