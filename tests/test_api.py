"""The HTTP side without Ray: what is answered, and every refusal with its reason."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from workloads import api


async def fake_predict(texts: list[str], parameters: api.Parameters) -> api.Answer:
    """Scores by length; texts over 20 characters count as cut."""
    scores = [
        [{"label": "long", "score": len(t) / 100}, {"label": "short", "score": 1 - len(t) / 100}]
        for t in texts
    ]
    return [row[: parameters.top_k] for row in scores], [
        i for i, t in enumerate(texts) if len(t) > 20
    ]


@pytest.fixture(scope="module")
def client() -> TestClient:
    about = {"model": "fake", "labels": ["long", "short"], "max_tokens": 8}
    return TestClient(api.make_app(fake_predict, about, max_inputs=3, max_body_bytes=2000))


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
        (b'"a"', JSON, 422, "body: "),
        (b"[]", JSON, 422, "body: "),
        (b'{"inputs": 3}', JSON, 422, "inputs"),
        (b'{"inputs": NaN}', JSON, 422, "inputs"),
        (b'{"inputs": []}', JSON, 422, "at least 1 item"),
        (b'{"inputs": ["a", 3]}', JSON, 422, "inputs"),
        (b'{"inputs": "\\ud800"}', JSON, 400, "hex escape"),
        (b'{"input": "a"}', JSON, 422, "inputs: Field required"),
        (b'{"inputs": "a", "parameters": {"top_k": 0}}', JSON, 422, "parameters.top_k"),
        (b'{"inputs": "a", "parameters": {"top_k": "2"}}', JSON, 422, "parameters.top_k"),
        (b'{"inputs": "a", "parameters": {"topk": 2}}', JSON, 422, "parameters.topk"),
        (
            b'{"inputs": "a", "parameters": {"function_to_apply": "max"}}',
            *(JSON, 422, "'softmax', 'sigmoid' or 'none'"),
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


def test_a_body_without_a_length_is_limited_too(client: TestClient) -> None:
    chunks = (b"x" * 100 for _ in range(100))
    assert client.post("/predict", content=chunks, headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "code"), [("GET", "/predict", 405), ("POST", "/predct", 404)]
)
def test_a_wrong_address_says_what_there_is(
    client: TestClient, method: str, path: str, code: int
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, "POST /predict" in answer.json()["error"]) == (code, True)


def test_a_refusal_does_not_repeat_a_long_input(client: TestClient) -> None:
    body: dict[str, Any] = {"inputs": {"secret": "s" * 500}}
    assert "sss" not in client.post("/predict", content=json.dumps(body), headers=JSON).text


class Transport:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def test_head_and_body_of_an_answer_are_one_write() -> None:
    kept = Transport()
    joined = api.Together(kept)
    for data in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"[", b"]"):
        joined.write(data)
    assert kept.written == [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n[", b"]"]


def test_uvicorn_answers_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as Cycle

    monkeypatch.setattr(Cycle, "__init__", Cycle.__init__)  # put back afterwards
    api.write_at_once()
    api.write_at_once()
    others: list[Any] = [None] * 9
    post, get = (Cycle({"method": m}, Transport(), *others) for m in ("POST", "GET"))
    assert isinstance(post.transport, api.Together)
    assert isinstance(post.transport.transport, Transport)
    assert isinstance(get.transport, Transport)
