"""`workloads predict`: what it says of answers that are not the whole answer."""

import functools
import json

import httpx
import pytest

from workloads import client
from workloads.config import UserError


def answered_by(monkeypatch: pytest.MonkeyPatch, status: int, **more: object) -> None:
    """Each request is answered so, with the same scores for each of its texts; texts of more than
    ten letters are cut."""

    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["inputs"]
        cut = ",".join(str(i) for i, text in enumerate(texts) if len(text) > 10)
        scores = [[{"label": "good", "score": 1.0}] for _ in texts]
        headers = {"x-truncated-inputs": cut} if cut else {}
        return httpx.Response(status, **{"json": scores, "headers": headers} | more)  # type: ignore

    own = functools.partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(client.httpx, "Client", own)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["short"] * 40, ""),
        (["short", "a long text"], "text 2 was cut: the model takes only so much"),
        (["a long text", *["short"] * 38, "a long text"], "2 texts (1, 40) were cut: the"),
        (["a long text"] * 99, "99 texts (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...) were cut: the"),
    ],
)
def test_texts_that_were_cut_are_told_by_their_numbers(
    texts: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered_by(monkeypatch, 200)
    assert len(client.ask("http://x", texts)) == len(texts)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(said)
    assert bool(told.err) == bool(said)


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({}, None),
        ({"WORKLOADS_API_KEY": "mine"}, "Bearer mine"),
        ({"WORKLOADS_API_KEY": "mine", "WORKLOADS_API_KEYS": "one"}, "Bearer mine"),
        ({"WORKLOADS_API_KEYS": " one,two"}, "Bearer one"),
        ({"WORKLOADS_API_KEYS": "sha256:12\none\ntwo"}, "Bearer one"),
    ],
)
def test_the_first_key_of_the_environment_is_sent(
    keys: dict[str, str], sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORKLOADS_API_KEY", "WORKLOADS_API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json=[[]])

    own = functools.partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(client.httpx, "Client", own)
    client.ask("http://x", ["a"])
    assert seen == [sent]


def test_a_key_that_no_header_carries_is_told_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORKLOADS_API_KEY", "schl\u00fcssel")
    with pytest.raises(UserError, match="WORKLOADS_API_KEY: a key is all ASCII") as e:
        client.ask("http://x", ["a"])
    assert "schl" not in str(e.value)


@pytest.mark.parametrize("answer", [{"text": "<html>hello"}, {"json": {"status": "ok"}}])
def test_what_is_no_endpoint_of_ours_is_told(
    answer: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = httpx.Response(200, **answer)  # type: ignore[arg-type]
    own = functools.partial(httpx.Client, transport=httpx.MockTransport(lambda _: reply))
    monkeypatch.setattr(client.httpx, "Client", own)
    with pytest.raises(UserError, match="answers, but not with labels: .*Is it an endpoint of"):
        client.ask("http://x", ["a"])


def test_what_is_too_much_for_one_request_is_sent_in_halves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["inputs"]
        if len(texts) > 3 or "huge" in texts:
            return httpx.Response(413, json={"error": "too much"})
        cut = ",".join(str(i) for i, text in enumerate(texts) if text.endswith("7"))
        scores = [[{"label": text, "score": 1.0}] for text in texts]
        return httpx.Response(200, json=scores, headers={"x-truncated-inputs": cut} if cut else {})

    own = functools.partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(client.httpx, "Client", own)
    texts = [f"text {i}" for i in range(40)]
    assert [one[0]["label"] for one in client.ask("http://x", texts)] == texts
    assert "4 texts (8, 18, 28, 38) were cut" in capsys.readouterr().err
    with pytest.raises(UserError, match="refused with 413: too much"):
        client.ask("http://x", ["huge"])


def test_a_sentence_encoder_is_asked_for_embeddings_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = {"error": "m has no classes: it embeds (POST /embed, /v1/embeddings)"}
    answered_by(monkeypatch, 400, json=reason)
    with pytest.raises(UserError) as refused:
        client.ask("http://x/predict", ["a"])
    assert "refused with 400: m has no classes" in str(refused.value)
    assert "\ncurl -s http://x/embed -H 'content-type: application/json' -d '{" in str(
        refused.value
    )
