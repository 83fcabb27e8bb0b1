"""The HTTP side of a deployment: a FastAPI app over any function that answers texts. No Ray here.

POST /predict and POST / speak Hugging Face's text-classification convention. Every refusal is a 4xx
with
{"error": reason}.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from . import __version__


class Parameters(BaseModel):
    """How the answer should look."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    """Only the best N labels; all when left out."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What makes scores of logits; the model's own when left out."""


class PredictRequest(BaseModel):
    """One text or a list of texts."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"inputs": "a gripping , beautifully acted film"},
                {"inputs": ["so good", "so bad"], "parameters": {"top_k": 1}},
            ]
        },
    )

    inputs: StrictStr | Annotated[list[StrictStr], Field(min_length=1)]
    parameters: Parameters | None = None
    options: dict[str, Any] | None = None
    """Accepted because clients of the Hub send it, and not used."""


class Score(BaseModel):
    """A label and its score."""

    label: str
    score: float


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


Answer = tuple[list[list[dict[str, Any]]], list[int]]
Predict = Callable[[list[str], Parameters], Awaitable[Answer]]
PATHS = ("/predict", "/")
_REQUEST, _ANSWER = TypeAdapter(PredictRequest), TypeAdapter(list[list[Score]])


class Refusal(Exception):
    """Why a request is not answered, with its status code."""

    def __init__(self, code: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.code, self.headers = code, headers


class BusyError(Refusal):
    """For `admit` to raise when a request would wait too long."""

    def __init__(self, reason: str) -> None:
        super().__init__(429, f"busy: {reason}; try again", {"Retry-After": "1"})


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


class Front:
    """Hands POST /predict and / to Classify, and all else to FastAPI: its middleware alone costs a
    tenth of a request."""

    def __init__(self, app: FastAPI, classify: "Classify") -> None:
        self.app, self.classify = app, classify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in PATHS:
            await self.classify(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Classify:
    """POST /predict as a bare ASGI app: FastAPI's own way to a handler takes several times as long
    as all that this does."""

    def __init__(
        self,
        predict: Predict,
        max_inputs: int,
        max_body_bytes: int,
        admit: Callable[[], Awaitable[None]],
    ) -> None:
        self.predict, self.admit = predict, admit
        self.max_inputs, self.max_body_bytes = max_inputs, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            body = await self._body(receive)
            if body is None:
                return
            await self.admit()  # to make tokens of the texts costs many times as much
            asked = parse(body, dict(scope["headers"]).get(b"content-type", b"").decode("latin-1"))
            scores, truncated = await self._answer(asked)
        except Refusal as refusal:
            problem = JSONResponse({"error": str(refusal)}, refusal.code, refusal.headers)
            await problem(scope, receive, send)
            return
        content = json.dumps(scores, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        if truncated:
            headers.append((b"x-truncated-inputs", ",".join(map(str, truncated)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

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

    async def _answer(self, asked: PredictRequest) -> Answer:
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        if len(texts) > self.max_inputs:
            reason = f"{len(texts)} inputs; at most {self.max_inputs} in one request"
            raise Refusal(413, reason)
        return await self.predict(texts, asked.parameters or Parameters())


def parse(body: bytes, content_type: str) -> PredictRequest:
    """The request in a body; raises Refusal, which never repeats the input: it may be huge."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        found = f"'{kind}'" if kind else "none"
        raise Refusal(415, f"content-type is {found}; send -H 'content-type: application/json'")
    try:
        return _REQUEST.validate_json(body)
    except ValidationError as error:
        problems = []
        for e in error.errors(include_input=False, include_url=False)[:5]:
            if e["type"] == "json_invalid":
                reason = f"the body is not JSON: {e.get('ctx', {}).get('error', e['msg'])}"
                raise Refusal(400, reason) from None
            # The members of a union are pydantic's names, not the request's.
            keys = [str(p) for p in e["loc"] if p != "str" and not str(p).startswith("list[")]
            problems.append(f"{'.'.join(keys) or 'body'}: {e['msg']}")
        raise Refusal(422, "; ".join(problems)) from None


async def _everybody() -> None:
    """Admits."""


def make_app(
    predict: Predict,
    about: dict[str, Any],
    max_inputs: int,
    max_body_bytes: int,
    admit: Callable[[], Awaitable[None]] = _everybody,
) -> Front:
    """The app. `predict` returns the scores of each text and the numbers of the texts it cut;
    `admit` is asked before a body is looked at, and may raise BusyError."""
    app = FastAPI(
        title="workloads",
        version=__version__,
        description=f"Text classification with {about['model']} "
        f"into {', '.join(about['labels'][:20])}.",
    )
    app.add_exception_handler(HTTPException, _refuse_http)
    classify = Classify(predict, max_inputs, max_body_bytes, admit)
    for path in PATHS:  # for what else is asked there: 405
        app.router.routes.insert(0, Route(path, classify, methods=["POST"]))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """The model is loaded; what it is."""
        return {"status": "ready", **about}

    _document(app)
    return Front(app, classify)


def _document(app: FastAPI) -> None:
    """Adds POST /predict to what /docs shows."""
    page = app.openapi()  # FastAPI keeps and shows this object
    kinds: list[tuple[str, TypeAdapter[Any]]] = [
        ("Request", _REQUEST),
        ("Answer", _ANSWER),
        ("Problem", TypeAdapter(Problem)),
    ]
    references, shared = TypeAdapter.json_schemas(
        [(name, "validation", adapter) for name, adapter in kinds],
        ref_template="#/components/schemas/{model}",
    )
    page.setdefault("components", {}).setdefault("schemas", {}).update(shared.get("$defs", {}))

    def content(name: Any) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": references[name, "validation"]}}}

    codes = {
        400: "The body is not JSON",
        413: "More inputs or bytes than the deployment takes",
        415: "Not application/json",
        422: "Not what is expected",
        429: "Too busy: again after Retry-After seconds",
    }
    page["paths"]["/predict"] = {
        "post": {
            "summary": "Classify",
            "description": "Labels with scores, best first: one list for each input, for a single "
            "text too.",
            "requestBody": {"required": True, **content("Request")},
            "responses": {
                "200": {"description": "Scores", **content("Answer")},
                **{
                    str(code): {"description": text, **content("Problem")}
                    for code, text in codes.items()
                },
            },
        }
    }


async def _refuse_http(request: Request, error: Any) -> JSONResponse:
    text = str(error.detail)
    if error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path}"
        text += f": {asked}; there are POST /predict and /, GET /healthz, /readyz, /docs"
    return JSONResponse({"error": text}, error.status_code, headers=error.headers)
