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
