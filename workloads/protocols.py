"""The requests and answers of the protocols that clients speak, over any functions that classify
and embed. No Ray and no engine here.

Hugging Face's Inference API (/, /predict, /embed; /explain is in its manner), OpenAI's embeddings
(/v1), and the Open Inference Protocol v2 over REST (/v2, github.com/kserve/open-inference-protocol)
with its binary extension.
"""

import base64
import json
import re
import struct
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

VERSION = "1"  # of a model, where a protocol wants one: a deployment has one at a time

# To tell all that is wrong with a megabyte of wrong items would take ten seconds.
Texts = StrictStr | Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)]
Ids = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class Unused(BaseModel):
    """Any object: accepted because clients send it, and not even made into Python's objects."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})


class Parameters(BaseModel):
    """How the answer should look."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    """Only the best N labels; all when left out."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What makes scores of logits; the model's own when left out."""


class PredictRequest(BaseModel):
    """One text or a list of texts to classify."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"inputs": "a gripping , beautifully acted film"},
                {"inputs": ["so good", "so bad"], "parameters": {"top_k": 1}},
            ]
        },
    )

    inputs: Texts
    parameters: Parameters | None = None
    options: Unused | None = None
    """Accepted because clients of the Hub send it, and not used."""


class Score(BaseModel):
    """A label and its score."""

    label: str
    score: float


class Refusal(Exception):
    """Why a request is not answered, with its status code."""

    def __init__(self, code: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.code, self.headers = code, headers


class Embedded(NamedTuple):
    """The answer to some texts."""

    vectors: list[np.ndarray]  # (D,) float32 each, of length 1
    truncated: list[int]  # numbers of the texts that were cut
    tokens: int


class Scored(NamedTuple):
    """Labels with scores, best first, of each text."""

    scores: list[list[dict[str, Any]]]
    truncated: list[int]


class Binary(NamedTuple):
    """An answer whose tensors, or some of them, follow its JSON."""

    answer: dict[str, Any]
    tensors: bytes


class ExplainParameters(BaseModel):
    """What is explained, and how well."""

    model_config = ConfigDict(extra="forbid")

    label: StrictStr | None = None
    """One of the model's; the one that it gives the text when left out."""
    steps: Annotated[StrictInt, Field(ge=8, le=300)] | None = None
    """More of them close the completeness gap, and take longer; when left out 50, or as many as can
    be made in time."""


class ExplainRequest(BaseModel):
    """One text whose label is explained."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"inputs": "a warm film"},
                {"inputs": "so bad", "parameters": {"steps": 20}},
            ]
        },
    )

    inputs: StrictStr
    parameters: ExplainParameters | None = None


class Explained(NamedTuple):
    """Why a text has its label, as /explain answers it."""

    explanation: dict[str, Any]
    truncated: list[int]


class Model(NamedTuple):
    """What the protocols tell of a model, and the functions that ask it."""

    name: str
    labels: list[str]  # none: it only embeds
    dimensions: int
    max_inputs: int
    classify: Callable[[list[str], Parameters], Awaitable[Scored]]
    embed: Callable[[list[str] | list[list[int]]], Awaitable[Embedded]]
    max_tokens: int = 512  # of a row of token ids
    vocabulary: int = 1 << 31
    explain: Callable[[str, ExplainParameters], Awaitable[Explained]] | None = None

    @property
    def id(self) -> str:
        """Its name as a part of a path."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-") or "model"


def few(model: Model, count: int) -> None:
    """Raises Refusal for more than a request may have."""
    if count > model.max_inputs:
        raise Refusal(413, f"{count} inputs; at most {model.max_inputs} in one request")


def classifies(model: Model) -> None:
    """Raises Refusal for a model without classes."""
    if not model.labels:
        raise Refusal(400, f"{model.id} has no classes: it embeds (POST /embed, /v1/embeddings)")


# What pydantic finds wrong, in words.
_WRONG = {
    "missing": "is missing",
    "extra_forbidden": "is no key here",
    "too_short": "is an empty list",
    "too_long": "has {actual_length} items, more than {max_length}",
    "greater_than_equal": "is below {ge}",
    "literal_error": "is not {expected}",
    "string_type": "is {given}, not a string",
    "list_type": "is {given}, not a list",
    "int_type": "is {given}, not a whole number",
    "bool_type": "is {given}, not true or false",
    "model_type": "is {given}, not an object",
    "none_required": "is {given}, not null",
}
_GIVEN = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
# What may be one of several things.
_TAKES = {
    "inputs": "a string or a list of strings",
    "input": "a string, a list of strings, a list of token ids, or a list of such lists",
    "data": "a list of strings",
}


def problems(error: ValidationError) -> list[str]:
    """What is wrong with a request, where, and what would be right; nothing of what it holds but
    its keys."""
    nearest: dict[Any, tuple[Any, str]] = {}  # of a union's members, which are no keys
    for e in error.errors(include_url=False):
        loc = e["loc"]
        pairs = enumerate(pairwise(loc), 1)
        at = next((i for i, (a, b) in pairs if a in _TAKES and isinstance(b, str)), len(loc))
        field, inside = loc[:at], [p for p in loc[at:] if isinstance(p, int)]
        words = {**e.get("ctx", {}), "given": _GIVEN.get(type(e["input"]), "a number")}
        known = _WRONG.get(e["type"])
        said = known.format_map(words).replace("True", "true") if known else e["msg"]
        if at < len(loc):
            said = f"{said.partition(',')[0]}; {field[-1]} takes {_TAKES[str(field[-1])]}"
        where = ".".join(map(str, [*field, *inside]))[:100] or "the body"
        found = (inside, not e["type"].endswith("_type")), f"{where} {said}"
        nearest[field] = max(nearest.get(field, found), found)
    return [said for _, said in nearest.values()]


# ---------------------------------------------------------------- Hugging Face


async def predict(model: Model, asked: PredictRequest) -> tuple[Any, list[int]]:
    """POST /predict: labels with scores, best first: one list for each text, for a single one
    too."""
    classifies(model)
    texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
    few(model, len(texts))
    return await model.classify(texts, asked.parameters or Parameters())


class EmbedRequest(BaseModel):
    """One text or a list of texts to embed."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"inputs": ["a warm film", "a dull one"]}]},
    )

    inputs: Texts
    normalize: Literal[True] | None = None
    """Vectors have length 1."""
    truncate: StrictBool | None = None
    """false refuses a text that is too long, which otherwise is cut."""
    truncation_direction: Literal["Right", "right"] | None = None
    prompt_name: None = None
    """No model here has prompts."""
    dimensions: StrictInt | None = None
    """Only the model's own."""
    encoding_format: Literal["float"] | None = None
    options: Unused | None = None
    """Accepted because clients of the Hub send it, and not used."""


async def embed(model: Model, asked: EmbedRequest) -> tuple[Any, list[int]]:
    """POST /embed: a vector for each text, for a single text too."""
    own_width(model, asked.dimensions)
    texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
    few(model, len(texts))
    found = await model.embed(texts)
    if asked.truncate is False and found.truncated:
        raise Refusal(413, f"text {found.truncated[0]} is too long, and truncate is false")
    return [vector.tolist() for vector in found.vectors], found.truncated


def own_width(model: Model, dimensions: int | None) -> None:
    """Raises Refusal for vectors of another length than the model's."""
    if dimensions not in (None, model.dimensions):
        raise Refusal(400, f"dimensions: {model.id} has {model.dimensions}, no others")


async def explain(model: Model, asked: ExplainRequest) -> tuple[Any, list[int]]:
    """POST /explain: what each token of a text adds to the logit of its label, or takes from it, by
    integrated gradients (arxiv.org/abs/1703.01365)."""
    if not model.labels:
        raise Refusal(400, f"{model.id} has no classes, so it gives no label to explain: it embeds")
    if model.explain is None:
        raise Refusal(400, f"{model.id} cannot be explained here")
    return await model.explain(asked.inputs, asked.parameters or ExplainParameters())


# ---------------------------------------------------------------- OpenAI


class EmbeddingsRequest(BaseModel):
    """Texts, or token ids as the model's own tokenizer makes them, to embed."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"model": "MODEL", "input": "a warm film"}]},
    )

    model: StrictStr
    input: Texts | Ids | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    """Only the model's own."""
    user: StrictStr | None = None
    """Accepted, and not used."""


async def embeddings(model: Model, asked: EmbeddingsRequest) -> tuple[Any, list[int]]:
    """POST /v1/embeddings: a vector for each text. `input` is a text, a list of texts, the token
    ids of one text, such as [101, 7592, 102], or a list of such lists. Ids are read as they are:
    those of the model's own tokenizer, special tokens included; too many are refused, not cut."""
    if asked.model not in (model.id, model.name):
        raise Refusal(404, f"there is no model {asked.model[:100]!r}; there is {model.id!r}")
    own_width(model, asked.dimensions)
    given: Any = asked.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    few(model, len(given))
    found = await model.embed(given)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, asked.encoding_format)}
        for i, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    answer = {"object": "list", "data": data, "model": model.id, "usage": usage}
    return answer, found.truncated


def _written(vector: np.ndarray, encoding: str) -> Any:
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def models(model: Model, created: int) -> dict[str, Any]:
    """GET /v1/models."""
    one = {"id": model.id, "object": "model", "created": created, "owned_by": "workloads"}
    return {"object": "list", "data": [one]}


# ---------------------------------------------------------------- Open Inference Protocol


class TensorParameters(BaseModel):
    """How a tensor is sent; what else is there is not used."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    binary_data_size: StrictInt | None = None
    """Bytes of this tensor after the JSON."""


class Tensor(BaseModel):
    """An input: texts as BYTES, in the JSON or after it."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["text"]
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES"]
    parameters: TensorParameters | None = None
    data: (
        Annotated[list[StrictStr], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[StrictStr], Field(fail_fast=True)]], Field(fail_fast=True)]
        | None
    ) = None


class OutputParameters(BaseModel):
    """How an output is sent; what else is there is not used."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    binary_data: StrictBool | None = None
    """After the JSON, not in it."""


class Output(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["label", "scores", "embedding"]
    parameters: OutputParameters | None = None


class InferParameters(BaseModel):
    """How all outputs are sent; what else is there is not used."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    binary_data_output: StrictBool | None = None
    """After the JSON, where an output does not say otherwise."""


class InferRequest(BaseModel):
    """Texts as the tensor `text`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a warm film"]}
                    ]
                }
            ]
        },
    )

    id: StrictStr | None = None
    model_name: StrictStr | None = None
    """KServe's client repeats the path's here. Not used, as the version."""
    model_version: StrictStr | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[Output], Field(max_length=3, fail_fast=True)] | None = None


async def infer(model: Model, asked: InferRequest, binary: bytes = b"") -> tuple[Any, list[int]]:
    """POST /v2/models/NAME/infer. `binary` is what follows the JSON."""
    (tensor,) = asked.inputs
    texts = _texts(tensor, binary)
    few(model, len(texts))
    own = ["label", "scores"] if model.labels else ["embedding"]
    names = [output.name for output in asked.outputs] if asked.outputs else own
    outputs: list[dict[str, Any]] = []
    truncated: list[int] = []
    if {"label", "scores"} & set(names):
        classifies(model)
        scored = await model.classify(texts, Parameters())
        truncated, found = scored.truncated, scored.scores
        outputs.append(_output("label", "BYTES", [len(texts)], [one[0]["label"] for one in found]))
        by_label = [{s["label"]: s["score"] for s in one} for one in found]
        flat = [scores[label] for scores in by_label for label in model.labels]
        outputs.append(_output("scores", "FP32", [len(texts), len(model.labels)], flat))
    if "embedding" in names:
        embedded = await model.embed(texts)
        truncated = embedded.truncated
        flat = np.concatenate(embedded.vectors).tolist()
        outputs.append(_output("embedding", "FP32", [len(texts), model.dimensions], flat))
    chosen = [output for output in outputs if output["name"] in names]
    answer = {"model_name": model.id, "model_version": VERSION, "outputs": chosen}
    answer |= {"id": asked.id} if asked.id is not None else {}
    after = [output for output in chosen if _is_binary(asked, output["name"])]
    packed = b"".join(_packed(output) for output in after)
    return (Binary(answer, packed) if after else answer), truncated


def _is_binary(asked: InferRequest, name: str) -> bool:
    own = next((o.parameters for o in asked.outputs or [] if o.name == name and o.parameters), None)
    if own and own.binary_data is not None:
        return own.binary_data
    return bool(asked.parameters and asked.parameters.binary_data_output)


def _packed(output: dict[str, Any]) -> bytes:
    """Takes an output's values out of the JSON: floats as 4 bytes, texts after their lengths."""
    values = output.pop("data")
    if output["datatype"] == "FP32":
        packed = np.asarray(values, "<f4").tobytes()
    else:
        written = [text.encode() for text in values]
        packed = b"".join(struct.pack("<I", len(one)) + one for one in written)
    output["parameters"] = {"binary_data_size": len(packed)}
    return packed


def _output(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def _texts(tensor: Tensor, binary: bytes) -> list[str]:
    """The texts of the one input; [N] and [N, 1] are N texts."""
    if tensor.data is None:
        texts = _unpacked(tensor, binary)
    else:
        texts = [t for row in tensor.data for t in ([row] if isinstance(row, str) else row)]
    if not texts or tensor.shape not in ([len(texts)], [len(texts), 1]):
        shape = str(tensor.shape)[:60]  # its numbers may have thousands of digits
        raise Refusal(422, f"inputs.0: {len(texts)} texts in the shape {shape}; give [N]")
    return texts


def _unpacked(tensor: Tensor, binary: bytes) -> list[str]:
    """Of the binary extension: before each text its length in bytes, as 4 bytes, the lowest
    first."""
    if not tensor.parameters or tensor.parameters.binary_data_size != len(binary):
        raise Refusal(422, "inputs.0: neither data nor binary_data_size bytes after the JSON")
    texts, at = [], 0
    while at < len(binary):
        end = at + 4 + (struct.unpack_from("<I", binary, at)[0] if at + 4 <= len(binary) else 0)
        if end > len(binary) or end < at + 4:
            raise Refusal(422, "inputs.0: the lengths in the binary data go beyond its end")
        try:
            texts.append(binary[at + 4 : end].decode("utf-8"))
        except UnicodeDecodeError:
            raise Refusal(422, f"inputs.0: text {len(texts)} is not UTF-8") from None
        at = end
    return texts


def split(body: bytes, json_bytes: bytes | None) -> tuple[bytes, bytes]:
    """The JSON and the binary part of a body, by the header inference-header-content-length."""
    if json_bytes is None:
        return body, b""
    if not json_bytes.isdigit() or len(json_bytes) > 12 or int(json_bytes) > len(body):
        raise Refusal(400, "inference-header-content-length is not a length within the body")
    return body[: int(json_bytes)], body[int(json_bytes) :]


def metadata(model: Model) -> dict[str, Any]:
    """GET /v2/models/NAME."""
    classes = [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "scores", "datatype": "FP32", "shape": [-1, len(model.labels)]},
    ]
    vector = {"name": "embedding", "datatype": "FP32", "shape": [-1, model.dimensions]}
    return {
        "name": model.id,
        "versions": [VERSION],
        "platform": "workloads",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [*(classes if model.labels else []), vector],
        "parameters": {"labels": json.dumps(model.labels)},
    }
