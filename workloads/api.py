"""The HTTP side of a deployment: a FastAPI app over any function that answers texts. No Ray here.

POST /predict and POST / speak Hugging Face's text-classification convention. Every refusal is a 4xx
with
{"error": reason}.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import __version__


class Parameters(BaseModel):
    """How the answer should look."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    """Only the best N labels; all when left out."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What makes scores of logits; the model's own when left out."""


def _encodable(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("has a lone surrogate, which is not valid unicode text")
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]


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

    inputs: Text | Annotated[list[Text], Field(min_length=1)]
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


def make_app(
    predict: Predict, about: dict[str, Any], max_inputs: int, max_body_bytes: int
) -> FastAPI:
    """The app. `predict` returns the scores of each text and the numbers of the texts it cut."""
    app = FastAPI(
        title="workloads",
        version=__version__,
        description=f"Text classification with {about['model']} "
        f"into {', '.join(about['labels'][:20])}.",
    )
    app.add_middleware(LimitBody, limit=max_body_bytes)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse_http)
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem} for code in (400, 413, 415, 422)
    }

    @app.post("/predict", response_model=list[list[Score]], responses=refusals)
    @app.post("/", response_model=list[list[Score]], responses=refusals, include_in_schema=False)
    async def classify(body: PredictRequest, response: Response) -> list[list[dict[str, Any]]]:
        """Labels with scores, best first: one list for each input, for a single text too."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        if len(texts) > max_inputs:
            raise HTTPException(413, f"{len(texts)} inputs; at most {max_inputs} in one request")
        scores, truncated = await predict(texts, body.parameters or Parameters())
        if truncated:
            response.headers["X-Truncated-Inputs"] = ",".join(map(str, truncated))
        return scores

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """The model is loaded; what it is."""
        return {"status": "ready", **about}

    return app


async def _refuse_invalid(request: Request, error: Any) -> JSONResponse:
    """Says what is wrong without echoing the input, which may be huge or not JSON at all."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        found = f"'{kind}'" if kind else "none"
        return _problem(415, f"content-type is {found}; send -H 'content-type: application/json'")
    problems = []
    for e in error.errors()[:5]:
        if e["type"] == "json_invalid":
            return _problem(400, f"the body is not JSON: {e.get('ctx', {}).get('error', e['msg'])}")
        # The members of a union are pydantic's names, not the request's.
        keys = [str(p) for p in e["loc"][1:] if not re.match(r"function-|list\[", str(p))]
        where = ".".join(keys) or "body"
        problems.append(f"{where}: {e['msg']}")
    return _problem(422, "; ".join(problems))


async def _refuse_http(request: Request, error: Any) -> JSONResponse:
    text = str(error.detail)
    if error.status_code == 400 and text == "There was an error parsing the body":
        text = "the body is not JSON: not UTF-8, or nested too deeply"
    if error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path}"
        text += f": {asked}; there are POST /predict and /, GET /healthz, /readyz, /docs"
    return JSONResponse({"error": text}, error.status_code, headers=error.headers)


def _problem(code: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, code)


class LimitBody:
    """Reads a request's body up to a limit and refuses a larger one with 413 before it is
    parsed."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                refusal = _problem(413, f"the body is over {self.limit:,} bytes")
                await refusal(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)
