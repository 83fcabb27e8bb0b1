"""The HTTP side without Ray: what is answered, and every refusal with its reason."""

import asyncio
import base64
import hashlib
import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from workloads import api, protocols, wire
from workloads.config import TargetServe


async def classify(texts: list[str], parameters: protocols.Parameters) -> protocols.Scored:
    """Scores by length; texts over 20 characters count as cut."""
    scores = [
        [{"label": "long", "score": len(t) / 100}, {"label": "short", "score": 1 - len(t) / 100}]
        for t in texts
    ]
    cut = [i for i, t in enumerate(texts) if len(t) > 20]
    return protocols.Scored([row[: parameters.top_k] for row in scores], cut)


async def embed(given: list[str] | list[list[int]]) -> protocols.Embedded:
    """Two values, of length 1, and a token for each character."""
    cut = [i for i, one in enumerate(given) if len(one) > 20]
    vectors = [np.array([0.6, 0.8], np.float32)] * len(given)
    return protocols.Embedded(vectors, cut, sum(map(len, given)))


MODEL = protocols.Model("runs/fake", ["long", "short"], 2, 3, classify, embed)
LIMITS = TargetServe(max_body_bytes=2000, max_header_bytes=1024, max_read_s=0.2)
KEY = "k" * 32
LINEAGE = {"version": "füße\r\n1", "digest": "sha256:" + "0123456789abcdef" * 4, "run": "füße"}


def app(
    model: protocols.Model = MODEL, key: str | None = None, limits: TargetServe = LIMITS
) -> TestClient:
    about = {"model": model.name, "labels": model.labels, "max_tokens": 8, "lineage": LINEAGE}
    hashes = [hashlib.sha256(key.encode()).hexdigest()] if key else []
    return TestClient(api.make_app(model, about, limits, hashes))


@pytest.fixture(scope="module")
def client() -> TestClient:
    return app()


def test_one_text_is_answered_with_a_list_of_one_list(client: TestClient) -> None:
    answer = client.post("/predict", json={"inputs": "abc"})
    assert answer.status_code == 200
    assert [s["label"] for s in answer.json()[0]] == ["long", "short"]
    assert len(answer.json()) == 1


def test_the_root_answers_as_predict_does(client: TestClient) -> None:
    body = {"inputs": ["a", "bb"], "parameters": {"top_k": 1}}
    assert client.post("/", json=body).json() == client.post("/predict", json=body).json()


def test_a_text_that_was_cut_is_named_in_a_header(client: TestClient) -> None:
    answer = client.post("/predict", json={"inputs": ["x" * 30, "y", "z" * 30]})
    assert answer.headers["x-truncated-inputs"] == "0,2"
    assert "x-truncated-inputs" not in client.post("/predict", json={"inputs": "y"}).headers


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
def test_what_is_there_to_look_at_answers(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


def test_readyz_says_what_the_model_is(client: TestClient) -> None:
    assert client.get("/readyz").json()["labels"] == ["long", "short"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "code", "reason"),
    [
        (b"{", JSON, 400, "not JSON"),
        (b"", JSON, 400, "not JSON"),
        (b"\xff\xfe", JSON, 400, "not JSON"),
        (b"[" * 1900, JSON, 400, ""),
        (b'{"inputs": "a"}', {"content-type": "text/plain"}, 415, "application/json"),
        (b"inputs=a", {"content-type": "application/x-www-form-urlencoded"}, 415, "send -H"),
        (b'"a"', JSON, 422, "the body is a string, not an object; as in {"),
        (b"[]", JSON, 422, "the body is a list, not an object"),
        (b'{"inputs": 3}', JSON, 422, "inputs is a number; inputs takes a string or a list of s"),
        (b'{"inputs": NaN}', JSON, 422, "inputs is a number; inputs takes"),
        (b'{"inputs": null}', JSON, 422, "inputs is null; inputs takes"),
        (b'{"inputs": {"a": 1}}', JSON, 422, "inputs is an object; inputs takes"),
        (b'{"inputs": []}', JSON, 422, "inputs is an empty list; inputs takes"),
        (b'{"inputs": ["a", 3]}', JSON, 422, "inputs.1 is a number; inputs takes"),
        (b'{"inputs": [["a"]]}', JSON, 422, "inputs.0 is a list; inputs takes"),
        (b'{"inputs": "\\ud800"}', JSON, 400, "hex escape"),
        (b'{"input": "a"}', JSON, 422, "inputs is missing; input is no key here; as in {"),
        (b'{"inputs": "a", "str": 3, "list[": 1}', JSON, 422, "str is no key here; list[ is no"),
        (b'{"inputs": "a", "parameters": {"str": 1}}', JSON, 422, "parameters.str is no key here"),
        (b'{"inputs": "a", "parameters": {"inputs": 1}}', JSON, 422, "parameters.inputs is no key"),
        (b'{"inputs": "a", "parameters": 3}', JSON, 422, "parameters is a number, not an object"),
        (b'{"inputs": "a", "parameters": {"top_k": 0}}', JSON, 422, "parameters.top_k is below 1"),
        (
            b'{"inputs": "a", "parameters": {"top_k": "2"}}',
            *(JSON, 422, "parameters.top_k is a string, not a whole number"),
        ),
        (
            b'{"inputs": "a", "parameters": {"topk": 2}}',
            *(JSON, 422, "parameters.topk is no key here"),
        ),
        (
            b'{"inputs": "a", "parameters": {"function_to_apply": "max"}}',
            *(JSON, 422, "parameters.function_to_apply is not 'softmax', 'sigmoid' or 'none'"),
        ),
        (b'{"inputs": ["a", "b", "c", "d"]}', JSON, 413, "4 inputs; at most 3"),
        (b'{"inputs": "' + b"a" * 2000 + b'"}', JSON, 413, "over 2,000 bytes"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(
    client: TestClient, body: bytes, headers: dict[str, str], code: int, reason: str
) -> None:
    answer = client.post("/predict", content=body, headers=headers)
    assert answer.status_code == code, answer.text
    assert reason in answer.json()["error"]
    assert "nput should" not in answer.text  # pydantic's words


def test_a_body_without_a_length_is_limited_too(client: TestClient) -> None:
    chunks = (b"x" * 100 for _ in range(100))
    assert client.post("/predict", content=chunks, headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "code", "way"),
    [
        ("GET", "/predict", 405, "POST /predict;"),
        ("POST", "/predct", 404, "POST /predict;"),
        ("POST", "/v2/models/WRONG/infer", 404, "POST /v2/models/runs-fake/infer;"),
        ("POST", "/v2/models/runs-fake/versions/2/infer", 404, "POST /v2/models/runs-fake/infer;"),
        ("GET", "/v2/models/WRONG", 404, "no such model or version (there is 1): GET"),
    ],
)
def test_a_wrong_address_says_what_there_is(
    client: TestClient, method: str, path: str, code: int, way: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == code
    assert f"{method} {path}; the model is runs-fake: POST /" in answer.json()["error"]
    assert way in answer.json()["error"]


def test_a_refusal_does_not_repeat_a_long_input(client: TestClient) -> None:
    body: dict[str, Any] = {"inputs": {"secret": "s" * 500}}
    assert "sss" not in client.post("/predict", content=json.dumps(body), headers=JSON).text


def embeddings(client: TestClient, **asked: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": "runs-fake", **asked})


def test_embeddings_come_as_openai_has_them(client: TestClient) -> None:
    answer = embeddings(client, input=["ab", "c"]).json()
    assert [d["index"] for d in answer["data"]] == [0, 1]
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    packed = embeddings(client, input="ab", encoding_format="base64").json()["data"][0]
    vector = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    np.testing.assert_allclose(vector, [0.6, 0.8])


@pytest.mark.parametrize(("given", "count"), [("ab", 1), ([5, 6], 1), ([[5], [6, 7]], 2)])
def test_a_text_or_token_ids_or_lists_of_them_are_embedded(
    client: TestClient, given: Any, count: int
) -> None:
    assert len(embeddings(client, input=given).json()["data"]) == count


def test_the_document_says_how_token_ids_are_given(client: TestClient) -> None:
    told = client.get("/openapi.json").json()["paths"]["/v1/embeddings"]["post"]["description"]
    assert "[101, 7592, 102], or a list of such lists" in told


@pytest.mark.parametrize(
    ("asked", "code", "reason"),
    [
        ({"input": "a", "model": "gpt-4"}, 404, "there is 'runs-fake'"),
        ({"input": "a", "dimensions": 5}, 400, "runs-fake has 2"),
        ({"input": []}, 422, "input is an empty list; input takes a string, a list of strings, a"),
        ({"input": 3}, 422, "input is a number; input takes"),
        ({"input": [-1]}, 422, "input.0 is below 0; input takes"),
        ({"input": [True]}, 422, "input.0 is a boolean; input takes"),
        ({"input": ["a", 1]}, 422, "input.1 is a number; input takes"),
        ({"input": [["a"]]}, 422, "input.0.0 is a string; input takes"),
        ({"input": "a", "user": 3}, 422, "user is a number, not a string; as in {"),
        ({"input": ["a"] * 4}, 413, "4 inputs; at most 3"),
        ({"input": "a", "encoding_format": "int8"}, 422, "_format is not 'float' or 'base64'"),
    ],
)
def test_openais_clients_get_refusals_as_openai_has_them(
    client: TestClient, asked: dict[str, Any], code: int, reason: str
) -> None:
    answer = embeddings(client, **asked)
    assert answer.status_code == code, answer.text
    assert reason in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def infer(client: TestClient, tensor: dict[str, Any], **more: Any) -> Any:
    body = {"inputs": [{"name": "text", "datatype": "BYTES", **tensor}], **more}
    return client.post("/v2/models/runs-fake/infer", json=body)


def test_the_open_inference_protocol_gives_labels_and_scores(client: TestClient) -> None:
    answer = infer(client, {"shape": [2, 1], "data": [["a"], ["bb"]]}, id="7").json()
    assert answer["id"] == "7"
    outputs = {o["name"]: o for o in answer["outputs"]}
    assert (outputs["label"]["shape"], outputs["label"]["data"]) == ([2], ["long", "long"])
    assert outputs["scores"]["shape"] == [2, 2]
    assert outputs["scores"]["data"] == pytest.approx([0.01, 0.99, 0.02, 0.98])


def test_kserves_client_repeats_the_models_name_in_the_body(client: TestClient) -> None:
    answer = infer(client, {"shape": [1], "data": ["a"]}, id="7", model_name="runs-fake")
    assert answer.status_code == 200


def test_the_open_inference_protocol_takes_binary_texts(client: TestClient) -> None:
    binary = b"\x01\0\0\0a" + b"\x04\0\0\0" + "\U0001f3ac".encode()
    parameters = {"binary_data_size": len(binary)}
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "embedding"}]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    url = "/v2/models/runs-fake/versions/1/infer"
    (output,) = client.post(url, content=head + binary, headers=headers).json()["outputs"]
    assert output["shape"] == [2, 2]
    assert output["data"] == pytest.approx([0.6, 0.8, 0.6, 0.8])


def test_the_open_inference_protocol_gives_binary_tensors_where_they_are_asked_for(
    client: TestClient,
) -> None:
    asked = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "scores"}]
    answer = infer(client, {"shape": [2], "data": ["a", "bb"]}, outputs=asked)
    length = int(answer.headers["inference-header-content-length"])
    outputs = {o["name"]: o for o in json.loads(answer.content[:length])["outputs"]}
    assert answer.content[length:] == b"\x04\0\0\0long" * 2
    assert outputs["label"]["parameters"] == {"binary_data_size": 16}
    assert "data" not in outputs["label"]
    assert outputs["scores"]["data"] == pytest.approx([0.01, 0.99, 0.02, 0.98])
    both = infer(client, {"shape": [1], "data": ["a"]}, parameters={"binary_data_output": True})
    assert both.content.endswith(np.array([0.01, 0.99], "<f4").tobytes())


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ({"shape": [3], "data": ["a"]}, "1 texts in the shape"),
        ({"shape": [1, 2], "data": ["a", "b"]}, "give [N]"),
        ({"shape": [0], "data": []}, "0 texts"),
        ({"shape": [-1], "data": ["a"]}, "inputs.0.shape.0 is below 0"),
        ({"shape": [1, 1, 1], "data": ["a"]}, "inputs.0.shape has 3 items, more than 2"),
        ({"shape": [1], "data": ["a"], "str": 1}, "inputs.0.str is no key here"),
        ({"shape": [1], "data": [[1]]}, "inputs.0.data.0.0 is a number; data takes a list of"),
        ({"shape": [2**62, 4], "data": ["a"]}, "give [N]"),
        ({"shape": [1]}, "binary_data_size"),
        ({"shape": [1], "parameters": {"binary_data_size": "1"}}, "binary_data_size"),
        ({"shape": [1], "data": ["a"], "datatype": "FP32"}, "inputs.0.datatype is not 'BYTES'"),
    ],
)
def test_tensors_that_hold_no_texts_are_refused(
    client: TestClient, tensor: dict[str, Any], reason: str
) -> None:
    answer = infer(client, tensor)
    assert answer.status_code == 422, answer.text
    assert reason in answer.json()["error"]


def test_models_are_told_in_each_protocol(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "runs-fake"
    assert client.get("/v1/models/runs-fake").json()["object"] == "model"
    assert client.get("/v2/models/runs-fake").json()["outputs"][1]["shape"] == [-1, 2]
    assert client.get("/v2/models/runs-fake/versions/1/ready").json()["ready"] is True
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v1/models/gpt-4").status_code == 404
    assert client.get("/v2/models/runs-fake/versions/2").status_code == 404


def test_the_hubs_extraction_gives_a_vector_a_text(client: TestClient) -> None:
    asked = {"inputs": ["a", "b"], "normalize": True, "truncate": True}
    assert client.post("/embed", json=asked).json() == [pytest.approx([0.6, 0.8])] * 2
    long = {"inputs": "x" * 30, "truncate": False}
    assert "text 0 is too long" in client.post("/embed", json=long).json()["error"]
    own = {"inputs": "a", "dimensions": 2, "encoding_format": "float"}
    assert client.post("/embed", json=own).status_code == 200
    other = client.post("/embed", json={"inputs": "a", "dimensions": 3})
    assert (other.status_code, other.json()["error"]) == (
        400,
        "dimensions: runs-fake has 2, no others",
    )


def test_a_model_that_only_embeds_says_so() -> None:
    only = app(MODEL._replace(labels=[]))
    answer = only.post("/predict", json={"inputs": "a"})
    assert (answer.status_code, "POST /embed" in answer.json()["error"]) == (400, True)
    assert ": POST /embed;" in only.post("/predct").json()["error"]
    assert only.post("/embed", json={"inputs": "a"}).status_code == 200
    (output,) = infer(only, {"shape": [1], "data": ["a"]}).json()["outputs"]
    assert output["name"] == "embedding"


# ---------------------------------------------------------------- who may ask


ASKED: list[tuple[str, str]] = [
    ("POST", "/predict"),
    ("POST", "/"),
    ("POST", "/embed"),
    ("POST", "/explain"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v2/models/runs-fake/infer"),
    ("GET", "/v1/models"),
    ("GET", "/v2/models/runs-fake"),
    ("GET", "/v2"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("OPTIONS", "/predict"),
    ("DELETE", "/"),
]


@pytest.mark.parametrize(("method", "path"), ASKED)
@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "\xff"]
)
def test_nobody_gets_in_without_a_key(method: str, path: str, authorization: str | None) -> None:
    headers = {"authorization": authorization.encode("latin-1")} if authorization else {}
    answer = app(key=KEY).request(method, path, headers=headers, json={"inputs": "a"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer KEY" in answer.text


def test_who_has_a_key_gets_in() -> None:
    headers = {"authorization": f"bearer  {KEY}"}
    mine = app(key=KEY)
    assert mine.post("/predict", json={"inputs": "a"}, headers=headers).status_code == 200
    assert mine.get("/readyz", headers=headers).json()["labels"] == ["long", "short"]


@pytest.mark.parametrize("path", sorted(api.OPEN - {"/"}))
def test_a_load_balancer_needs_no_key_and_learns_nothing(path: str) -> None:
    answer = app(key=KEY).get(path)
    assert answer.status_code == 200
    assert "fake" not in answer.text


@pytest.mark.parametrize("path", ["/", "/healthz", "/v2/health/ready", "/model"])
def test_whoever_only_looks_whether_it_is_there_is_answered(path: str) -> None:
    asked, seen = app(key=KEY), {"authorization": f"Bearer {KEY}"}
    assert asked.head(path, headers=seen).status_code == 200
    assert asked.head(path).status_code == (200 if path in api.OPEN else 401)
    assert asked.head("/predict", headers=seen).status_code == 405


MARKED = {"x-model-digest": "sha256:0123456789abcdef", "x-model-version": "f%C3%BC%C3%9Fe%0D%0A1"}


def marks(answer: Any) -> dict[str, str]:
    return {key: value for key, value in answer.headers.items() if key.startswith("x-model-")}


def test_every_answer_says_which_model_gave_it(client: TestClient) -> None:
    for answer in (
        client.post("/predict", json={"inputs": "a"}),
        client.post("/predict", content=b"{"),
        client.post("/nothing"),
        *(client.get(path) for path in ("/", "/healthz", "/readyz", "/docs", "/predict", "/v2")),
        client.get("/healthz", headers={"x-large": "x" * 2000}),
        client.options("/predict"),
    ):
        assert marks(answer) == MARKED, answer.url
    binary = [{"name": "label", "parameters": {"binary_data": True}}]
    assert marks(infer(client, {"shape": [1], "data": ["a"]}, outputs=binary)) == MARKED


def test_who_has_no_key_does_not_learn_which_model_it_is() -> None:
    mine = app(key=KEY)
    for path in (*sorted(api.OPEN), "/model", "/nothing", "/predict"):
        assert marks(mine.get(path)) == {}
        assert marks(mine.post(path, json={"inputs": "a"})) == {}
    assert marks(mine.get("/healthz", headers={"x-large": "x" * 2000})) == {}
    headers = {"authorization": f"Bearer {KEY}"}
    assert marks(mine.get("/healthz", headers=headers)) == MARKED
    assert marks(mine.post("/predict", json={"inputs": "a"}, headers=headers)) == MARKED


def test_the_model_is_described_for_who_may_ask(client: TestClient) -> None:
    told = client.get("/model").json()
    known = {"name": "runs/fake", "labels": ["long", "short"], "max_tokens": 8, "notes": {}}
    assert told == LINEAGE | known
    for path in ("/info", "/readyz"):
        assert "lineage" not in client.get(path).json()
    assert app(key=KEY).get("/model").status_code == 401


def test_browsers_are_told_what_not_to_do(client: TestClient) -> None:
    for answer in (
        client.post("/predict", json={"inputs": "a"}, headers={"origin": "http://evil.example"}),
        client.post("/predict", content=b"{"),
        client.get("/healthz"),
        client.get("/nothing"),
        app(key=KEY).get("/v1/models"),
    ):
        assert (
            dict(api.SECURITY).items()
            <= {key.encode(): value.encode() for key, value in answer.headers.items()}.items()
        )
        assert not [key for key in answer.headers if key.startswith("access-control-")]


def test_with_a_certificate_browsers_stay_with_https() -> None:
    tls = LIMITS.model_copy(update={"tls_certfile": "cert.pem"})
    assert "strict-transport-security" in app(limits=tls).get("/healthz").headers
    assert "strict-transport-security" not in app().get("/healthz").headers


def test_large_headers_are_refused(client: TestClient) -> None:
    answer = client.get("/healthz", headers={"x-large": "x" * 2000})
    assert (answer.status_code, "1,024" in answer.json()["error"]) == (431, True)


def test_a_body_that_never_comes_is_given_up() -> None:
    async def never() -> Any:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(api.make_app(MODEL, {}, LIMITS)(scope, never, send))
    assert sent[0]["status"] == 408
    assert "within 0.2 s" in sent[1]["body"].decode()


# ---------------------------------------------------------------- how it is written


class Transport:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def test_head_and_body_of_an_answer_are_one_write() -> None:
    kept = Transport()
    joined = wire.Together(kept)
    for data in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"[", b"]"):
        joined.write(data)
    assert kept.written == [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n[", b"]"]


def test_uvicorn_answers_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as Cycle

    monkeypatch.setattr(Cycle, "__init__", Cycle.__init__)  # put back afterwards
    wire.write_at_once()
    wire.write_at_once()
    others: list[Any] = [None] * 9
    post, get = (Cycle({"method": m}, Transport(), *others) for m in ("POST", "GET"))
    assert isinstance(post.transport, wire.Together)
    assert isinstance(post.transport.transport, Transport)
    assert isinstance(get.transport, Transport)
