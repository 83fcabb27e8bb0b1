"""What /openapi.json tells of a deployment: requests, answers, and all that may be refused.

The answers' schemas are here for readers and tests; answers themselves are not validated.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from . import protocols
from .protocols import Model, Score


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Said):
    """Why a request was refused."""

    error: str


class OpenAIError(_Said):
    """What an OpenAI client looks for."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(_Said):
    """Why a request was refused, as OpenAI has it."""

    error: OpenAIError


class Health(_Said):
    """The process is alive."""

    status: Literal["ok"]


class Ready(_Said):
    """The model is loaded. What it is follows where the caller may ask it."""

    status: Literal["ready"]
    model: str = ""
    labels: list[str] = []
    max_tokens: int = 0
    dimensions: int = 0
    engine: str = ""


class Limits(_Said):
    """How much a request may hold."""

    max_inputs: int
    max_body_bytes: int
    max_request_tokens: int


class About(_Said):
    """What the page shows of the model."""

    model: str = ""
    labels: list[str] = []
    max_tokens: int = 0
    dimensions: int = 0
    engine: str = ""
    notes: dict[str, Any]
    card: str | None
    """The model's README.md."""
    limits: Limits


class Described(_Said):
    """What the model is and where it comes from."""

    name: str
    version: str = ""
    """The run, or the commit of the hub; - where neither is known."""
    digest: str = ""
    """SHA-256 of its weights."""
    labels: list[str] = []
    max_tokens: int = 0
    dimensions: int = 0
    engine: str = ""
    run: str | None = None
    pretrained: str | None = None
    """The model that it was trained from, with its commit."""
    license: str | None = None
    """As its README.md says."""
    notes: dict[str, Any]


class ModelCard(_Said):
    """A model, as OpenAI describes it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelCards(_Said):
    """The one model."""

    object: Literal["list"]
    data: list[ModelCard]


class Server(_Said):
    """The server (Open Inference Protocol)."""

    name: str
    version: str
    extensions: list[str]


class Live(_Said):
    """The process is alive (Open Inference Protocol)."""

    live: Literal[True]


class ServerReady(_Said):
    """The model is loaded (Open Inference Protocol)."""

    ready: Literal[True]


class ModelReady(_Said):
    """The model is loaded (Open Inference Protocol)."""

    name: str
    ready: Literal[True]


class TensorInfo(_Said):
    """A tensor of the model; -1 is any number."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]


class Metadata(_Said):
    """Inputs and outputs of the model (Open Inference Protocol)."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    parameters: dict[str, str]


class InferredTensor(_Said):
    """An output."""

    name: Literal["label", "scores", "embedding"]
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    data: list[str] | list[float]


class InferAnswer(_Said):
    """What was asked of the model (Open Inference Protocol)."""

    model_name: str
    model_version: str
    outputs: list[InferredTensor]
    id: str = ""
    """As in the request, if there was one."""


class OpenAIVector(_Said):
    """An embedding: numbers, or with encoding_format base64 their float32 bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(_Said):
    """Tokens that were read."""

    prompt_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class OpenAIVectors(_Said):
    """Embeddings, in the order of the inputs."""

    object: Literal["list"]
    data: list[OpenAIVector]
    model: str
    usage: Usage


class Gap(_Said):
    """How far the tokens' scores are from adding up to what the label's logit gains over the
    baseline's."""

    absolute: float
    relative: float | None
    """Of what it gains; null where that is nothing."""


class Token(_Said):
    """A token of the text; start and end count its characters (code points)."""

    token: str
    word: int
    """Pieces of one word have the same number."""
    start: int
    end: int
    score: float
    """What it adds to the label's logit; below 0 it speaks against the label."""


class Explanation(_Said):
    """Why a text has its label."""

    label: str
    score: float
    method: str
    baseline: str
    steps: int
    completeness_gap: Gap
    tokens: list[Token]
    truncated: bool
    """The text was cut to the model's limit: the rest has no tokens."""


EXPLAINED = {
    "label": "positive",
    "score": 0.98,
    "method": "integrated gradients of the label's logit by the word embeddings, captum 0.9.0",
    "baseline": "[PAD] in place of each token",
    "steps": 50,
    "completeness_gap": {"absolute": 0.00002, "relative": 0.00001},
    "tokens": [
        {"token": "warm", "word": 0, "start": 0, "end": 4, "score": 1.7},
        {"token": "film", "word": 1, "start": 5, "end": 9, "score": 0.2},
    ],
    "truncated": False,
}
ANSWERS: dict[Any, Any] = {
    protocols.predict: list[list[Score]],
    protocols.embed: list[list[float]],
    protocols.explain: Explanation,
    protocols.embeddings: OpenAIVectors,
    protocols.infer: InferAnswer,
}
BY_PATH = {
    "/healthz": Health,
    "/readyz": Ready,
    "/info": About,
    "/model": Described,
    "/v1/models": ModelCards,
    "/v1/models/{name}": ModelCard,
    "/v2": Server,
    "/v2/health/live": Live,
    "/v2/health/ready": ServerReady,
    "/v2/models/{name}": Metadata,
    "/v2/models/{name}/versions/{version}": Metadata,
    "/v2/models/{name}/ready": ModelReady,
    "/v2/models/{name}/versions/{version}/ready": ModelReady,
}
REFUSALS = {
    "400": "The body is not JSON, or the model cannot do this",
    "401": "No API key, or one that is not known",
    "404": "There is no such model",
    "408": "The body did not arrive in time",
    "413": "More inputs, tokens or bytes than the deployment takes",
    "415": "Not application/json, or compressed",
    "422": "Not what is expected",
    "429": "Too busy: again after Retry-After seconds",
    "431": "The headers are too large",
}
CUT = {
    "description": "Numbers of the inputs that were cut to the model's limit, if there are any",
    "schema": {"type": "string", "pattern": "^[0-9]+(,[0-9]+)*$"},
}
# Which model answered, for who may ask it: its weights, and its run or commit of the hub.
MARKS = {
    "X-Model-Digest": {"schema": {"type": "string", "pattern": "^sha256:[0-9a-f]{16}$"}},
    "X-Model-Version": {"schema": {"type": "string"}},
}
ID = {
    "description": "The request's own, if it had one of 128 ASCII characters at most, or a new one",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    "required": True,
}
AGAIN = {"description": "Seconds", "schema": {"type": "integer"}, "required": True}
BINARY = (
    " Texts may follow the JSON as bytes (the binary extension): then"
    " parameters.binary_data_size is their size, the header Inference-Header-Content-Length the"
    " JSON's, and Content-Type application/octet-stream."
)


def complete(
    page: dict[str, Any], kinds: list[Any], model: Model, open_paths: set[str] | None
) -> None:
    """Makes true what FastAPI tells of its own paths, and adds what is posted. All but
    `open_paths` need a key, where there are keys."""
    schemas = _schemas(page, kinds, model)
    for path, answer in BY_PATH.items():
        get = page["paths"][path]["get"]
        refusals = ["401", "404", "431"] if "{" in path else ["401", "431"]
        get["responses"] = _responses(path, schemas[answer], {}, refusals, schemas)
        own = {"name": model.id, "version": protocols.VERSION}
        for parameter in get.get("parameters", []):
            name = parameter["name"]
            parameter |= {"schema": {"const": own[name], "type": "string"}, "example": own[name]}
    headers = {"application/json": {"schema": schemas[Problem]}}
    page["paths"]["/"]["get"]["responses"]["431"] = {
        "description": REFUSALS["431"],
        "content": headers,
    }
    figures = page["paths"]["/metrics"]["get"]["responses"]
    figures |= {
        code: {"description": REFUSALS[code], "content": headers} for code in ("401", "431")
    }
    for kind in kinds:
        answer = schemas[ANSWERS[kind.answer]]
        refusals = [code for code in REFUSALS if code != "404" or kind.path.startswith("/v1/")]
        responses = _responses(kind.path, answer, {"example": kind.example}, refusals, schemas)
        responses["200"]["headers"] = {"X-Truncated-Inputs": CUT, **MARKS}
        if kind.answer is protocols.infer:
            octets = {"schema": {"type": "string", "format": "binary"}}
            responses["200"]["content"]["application/octet-stream"] = octets
        asked: dict[str, Any] = {"schema": schemas[kind.path]}
        if kind.answer is protocols.embeddings:
            asked["example"] = {"model": model.id, "input": "a warm film"}
        description = " ".join((kind.answer.__doc__ or "").split())
        page["paths"].setdefault(kind.path, {})["post"] = {
            "summary": kind.summary,
            "description": description + BINARY * (kind.answer is protocols.infer),
            "requestBody": {"required": True, "content": {"application/json": asked}},
            "responses": responses,
        }
    for operation in (one for methods in page["paths"].values() for one in methods.values()):
        for response in operation["responses"].values():
            response.setdefault("headers", {})["X-Request-Id"] = ID
    if open_paths is not None:
        page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in page["paths"].items():
            for method, operation in methods.items():
                if method != "get" or path not in open_paths:
                    operation["security"] = [{"key": []}]


def _schemas(page: dict[str, Any], kinds: list[Any], model: Model) -> dict[Any, Any]:
    """References to the schemas of requests by path, and of answers and refusals by type."""
    types = [Problem, OpenAIProblem, *BY_PATH.values(), *ANSWERS.values()]
    adapters: dict[Any, Any] = {one: TypeAdapter(one) for one in types}
    adapters |= {kind.path: kind.request for kind in kinds}
    references, shared = TypeAdapter.json_schemas(
        [(key, "validation", adapter) for key, adapter in adapters.items()],
        ref_template="#/components/schemas/{model}",
    )
    schemas = shared["$defs"]
    page.setdefault("components", {})["schemas"] = schemas
    _limit(schemas, model)
    return {key: references[key, "validation"] for key in adapters}


def _limit(schemas: dict[str, Any], model: Model) -> None:
    """What this deployment takes of what the protocols allow."""
    asked = schemas["EmbeddingsRequest"]["properties"]
    for union in (
        schemas["PredictRequest"]["properties"]["inputs"],
        schemas["EmbedRequest"]["properties"]["inputs"],
        asked["input"],
    ):
        for one in union["anyOf"]:
            if one["type"] == "array":
                integers = one["items"].get("type") == "integer"
                one["maxItems"] = model.max_tokens if integers else model.max_inputs
    for one in asked["input"]["anyOf"]:
        row = one.get("items", {})
        if row.get("type") == "array":
            row["maxItems"], one = model.max_tokens, row
        if one.get("items", {}).get("type") == "integer":
            one["items"]["maximum"] = model.vocabulary - 1
    label = schemas["ExplainParameters"]["properties"]["label"]["anyOf"][0]
    label |= {"enum": model.labels} if model.labels else {}
    asked["model"]["enum"] = sorted({model.id, model.name})
    for one in (asked, schemas["EmbedRequest"]["properties"]):
        one["dimensions"]["anyOf"][0]["const"] = model.dimensions


def _responses(
    path: str, answer: Any, example: dict[str, Any], refusals: list[str], schemas: dict[Any, Any]
) -> dict[str, Any]:
    problem = schemas[OpenAIProblem if path.startswith("/v1/") else Problem]
    found: dict[str, Any] = {
        "200": {
            "description": "The answer",
            "headers": MARKS,
            "content": {"application/json": {"schema": answer, **example}},
        }
    }
    for code in refusals:
        content = {"application/json": {"schema": problem}}
        found[code] = {"description": REFUSALS[code], "content": content}
    if "429" in found:
        found["429"]["headers"] = {"Retry-After": AGAIN}
    return found
