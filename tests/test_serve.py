"""Stage 3 on a real Ray Serve, through its real clients."""

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import changed, wait_for

from workloads.config import Target, UserError

pytestmark = pytest.mark.ray
PATIENT_S = 90  # other tests run beside these, and Ray's workers are niced
ask = functools.partial(httpx.post, timeout=PATIENT_S)
TEXTS = [
    "a warm and clever delight",
    "dull",
    "",
    "two hours of wasted time, flat and noisy, and nobody in the cinema laughed even once",
    "日本語 and emoji 🎬, right-to-left שלום, a NUL \0 too",
]


@pytest.fixture(scope="module")
def folder(untrained: Path) -> Path:
    """What is served: untrained, its answers still differ from text to text."""
    return untrained


@pytest.fixture(scope="module")
def url(folder: Path, laptop: Target) -> Iterator[str]:
    from workloads import serve

    located, info = serve.locate(str(folder), laptop.ray.storage)
    yield serve.deploy(located, laptop)
    assert serve.down()
    assert not serve.down()


def test_answers_equal_those_of_plain_transformers(url: str, folder: Path) -> None:
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder), device=-1, top_k=None)
    answers = ask(f"{url}/predict", json={"inputs": TEXTS}).json()
    for mine, theirs in zip(answers, classify(TEXTS), strict=True):
        assert {a["label"]: a["score"] for a in mine} == pytest.approx(
            {a["label"]: a["score"] for a in theirs}, abs=1e-5
        )


def not_busy(answer: httpx.Response) -> httpx.Response | None:
    return None if answer.status_code == 429 else answer


def test_an_answer_is_explained(url: str) -> None:
    (best, *_), *_ = ask(f"{url}/predict", json={"inputs": TEXTS[0]}).json()
    asked = {"inputs": TEXTS[0], "parameters": {"steps": 8}}
    # The first one loads torch, after all else that this machine does: "try again" until then.
    answer = wait_for(lambda: not_busy(ask(f"{url}/explain", json=asked)))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert {"label": found["label"], "score": found["score"]} == best
    assert found["tokens"]


def test_callers_that_share_a_batch_get_what_they_would_get_alone(url: str) -> None:
    alone = [ask(f"{url}/predict", json={"inputs": t}).json()[0] for t in TEXTS]

    async def together() -> list[Any]:
        async with httpx.AsyncClient(timeout=PATIENT_S) as client:
            posts = [client.post(f"{url}/predict", json={"inputs": t}) for t in TEXTS * 8]
            return [r.json()[0] for r in await asyncio.gather(*posts)]

    for mine, reference in zip(asyncio.run(together()), alone * 8, strict=True):
        scores = {a["label"]: a["score"] for a in reference}
        assert {a["label"]: a["score"] for a in mine} == pytest.approx(scores, abs=1e-5)


def test_more_inputs_than_a_batch_holds_come_back_in_order(url: str) -> None:
    texts = [f"{word} film" for word in TEXTS] * 20
    answers = ask(f"{url}/predict", json={"inputs": texts}).json()
    assert len(answers) == 100
    for mine, first in zip(answers, answers[:5] * 20, strict=True):
        assert mine[0]["score"] == pytest.approx(first[0]["score"], abs=1e-5)


def test_a_text_over_the_models_limit_is_cut_and_said_so(url: str) -> None:
    answer = ask(f"{url}/predict", json={"inputs": ["short", "long " * 600]})
    assert answer.status_code == 200
    assert answer.headers["x-truncated-inputs"] == "1"


def test_limits_of_the_target_hold_over_the_wire(url: str, laptop: Target) -> None:
    many = {"inputs": ["a"] * (laptop.serve.max_inputs + 1)}
    assert ask(f"{url}/predict", json=many).status_code == 413
    large = {"inputs": "a" * laptop.serve.max_body_bytes}
    assert ask(f"{url}/predict", json=large).status_code == 413


def test_function_to_apply_gives_logits_or_sigmoids(url: str) -> None:
    def scores(function: str) -> dict[str, float]:
        body = {"inputs": "dull", "parameters": {"function_to_apply": function}}
        return {a["label"]: a["score"] for a in ask(f"{url}/", json=body).json()[0]}

    none, sigmoid, softmax = scores("none"), scores("sigmoid"), scores("softmax")
    gap = none["good"] - none["bad"]
    assert softmax["good"] == pytest.approx(1 / (1 + 2.718281828459045**-gap), abs=1e-6)
    assert sigmoid["bad"] == pytest.approx(1 / (1 + 2.718281828459045 ** -none["bad"]), abs=1e-6)


def test_readyz_names_the_engine(url: str) -> None:
    # The model has no validation rows: nothing that rounds is used.
    assert httpx.get(f"{url}/readyz").json()["engine"] in ("openvino-fp32", "torch")


def test_the_engine_is_chosen_on_a_node_that_a_replica_may_get(
    url: str, folder: Path, laptop: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workloads import cluster, serve

    monkeypatch.setattr(cluster, "live_nodes", list)  # as if this process were on none of them
    monkeypatch.setattr(serve.engines, "ready", None)
    (folder / "engines.json").unlink()
    said: list[str] = []
    choice = serve.choose(serve.AppArgs(model=str(folder), target=laptop), said.append)
    assert choice.reason.startswith("engine: ")
    assert said[-1] == "engines: timing"
    rounding = changed(laptop, **{"serve.engine": "openvino-int8"})
    with pytest.raises(UserError, match="--texts FILE"):
        serve.choose(serve.AppArgs(model=str(folder), target=rounding), said.append)


def test_a_config_file_carries_the_texts() -> None:
    from workloads.serve import AppArgs, config_file

    (application,) = config_file("./model", Target(), ["one", "two"])["applications"]
    assert AppArgs.model_validate(application["args"]).texts == ["one", "two"]


def test_a_new_deployment_replaces_the_old_one(url: str, folder: Path, laptop: Target) -> None:
    from workloads import serve

    located, info = serve.locate(str(folder), laptop.ray.storage)
    again = serve.deploy(located, changed(laptop, **{"serve.max_inputs": 2}))
    assert again == url
    assert ask(f"{url}/predict", json={"inputs": ["a"] * 3}).status_code == 413
    serve.deploy(located, laptop)


def test_what_a_replica_died_of_is_said(
    url: str, folder: Path, laptop: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workloads import serve

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Deploying app 'workloads' failed.")

    died = SimpleNamespace(message="it failed to start 3 times in a row: no such disk")
    app = SimpleNamespace(message="Failed to update ['classifier'].", deployments={"one": died})
    monkeypatch.setattr(serve.serve, "run", fails)
    monkeypatch.setattr(
        serve.serve, "status", lambda: SimpleNamespace(applications={serve.APP: app})
    )
    with pytest.raises(UserError, match=r"Failed to update.*\n.*no such disk"):
        serve.deploy(serve.locate(str(folder), laptop.ray.storage)[0], laptop)


def test_another_port_than_serve_listens_on_is_refused(
    url: str, folder: Path, laptop: Target
) -> None:
    from workloads import serve

    located, info = serve.locate(str(folder), laptop.ray.storage)
    other = changed(laptop, **{"serve.port": laptop.serve.port - 1})
    with pytest.raises(UserError, match="already listens on"):
        serve.deploy(located, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-folder", "no such model folder"),
        ("package:not_installed/model", "is not installed"),
        ("some-owner/some-model", "hub cannot be asked"),
    ],
)
def test_a_model_that_cannot_be_served_says_why(name: str, message: str, tmp_path: Path) -> None:
    from workloads import serve

    with pytest.raises(UserError, match=message):
        serve.locate(name, str(tmp_path))
