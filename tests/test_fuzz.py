"""Hostile input gets a reason, never a 5xx, and nobody else notices: the short version of
scripts/soak_fuzz.py."""

import asyncio
import hashlib
import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, reviews, script, wait_for

from workloads.config import Target

pytestmark = pytest.mark.slow
soak_fuzz = script("soak_fuzz")
soak_fuzz.soak_serve.CLOSE = 1e-4  # a small model is sure of little
FLAGS = ["target.serve.engine=openvino-fp32", "target.serve.streams=1"]
MODEL = "fuzzed"
# uvicorn leaves it to its websockets, which wait for more. HAProxy takes the upgrade away.
HANGS = {"a websocket by POST": {None}}


@pytest.fixture(scope="module")
def replica(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A replica with a real engine, without Ray."""
    from workloads import replica

    target = Target.model_validate({"serve": {"engine": "openvino-fp32", "streams": 1}})
    plain = replica.Classifier.func_or_class.__mro__[1]  # type: ignore[attr-defined]
    model = shutil.copytree(served, tmp_path_factory.mktemp("fuzz") / MODEL)
    return plain(str(model), target, [])


@pytest.fixture(scope="module")
def front(replica: Any) -> Any:
    """Its app."""
    return replica.__serve_build_asgi_app__()


@pytest.fixture(scope="module")
def port(front: Any) -> Iterator[int]:
    """Where uvicorn serves it as in a replica."""
    import uvicorn

    number = free_port()
    how: dict[str, Any] = {"http": "httptools", "lifespan": "off", "log_level": "critical"}
    server = uvicorn.Server(uvicorn.Config(front, "127.0.0.1", number, **how))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    yield number
    server.should_exit = True
    thread.join()


def ask(port: int, post: Any) -> tuple[int, Any, float]:
    """The status, the answer and how long it took."""
    began = time.monotonic()
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", post.path, post.body, post.headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer, time.monotonic() - began


def test_what_the_openapi_document_says_is_true(front: Any) -> None:
    statuses: Counter[str] = Counter()
    assert soak_fuzz.generated(soak_fuzz.load_schema("", 1, 8, front), statuses) == []
    assert statuses.total() > 500
    assert {"200", "400", "404", "405", "413", "415", "422"} >= set(statuses) >= {"200", "422"}


def test_the_openapi_document_lies_where_the_app_is_changed(front: Any) -> None:
    schema = soak_fuzz.load_schema("", 1, 5, front).include(path="/healthz")
    schema.raw_schema["components"]["schemas"]["Health"]["properties"]["status"]["const"] = "well"
    wrong = soak_fuzz.generated(schema, Counter())
    assert any("GET /healthz: response_schema_conformance" in line for line in wrong)


def test_where_a_key_is_needed_the_document_says_so(replica: Any) -> None:
    key = "first-of-the-keys-0001"
    replica.hashes = [hashlib.sha256(key.encode()).hexdigest()]
    app = replica.__serve_build_asgi_app__()
    schema = soak_fuzz.load_schema("", 1, 3, app, key)
    statuses: Counter[str] = Counter()
    # Among its checks: who has no key, or a wrong one, gets 401 where the document says so.
    assert soak_fuzz.generated(schema, statuses) == []
    assert statuses["401"] > 20


POSTS = soak_fuzz.posts(MODEL)


@pytest.mark.parametrize("post", POSTS, ids=[f"{post.path} {post.name}" for post in POSTS])
def test_a_hostile_body_gets_what_it_should_soon(port: int, post: Any) -> None:
    status, answer, seconds = ask(port, post)
    assert status in post.codes, answer
    if status != 200:
        error = answer["error"]
        assert (error["message"] if post.path.startswith("/v1/") else error).strip()
        assert len(json.dumps(answer)) < 2000  # the input may be huge: it is not repeated
    assert seconds < 9  # a megabyte of mistakes once took ten, and all others waited


RAWS = soak_fuzz.raws()


@pytest.fixture(scope="module")
def said(port: int) -> dict[str, list[int | None]]:
    """What comes back for each of RAWS; they wait for each other's silence together."""
    found = asyncio.run(soak_fuzz.answers("127.0.0.1", port, RAWS))
    assert ask(port, POSTS[0])[0] == 200
    return dict(zip([raw.name for raw in RAWS], found, strict=True))


@pytest.mark.parametrize("raw", RAWS, ids=[raw.name for raw in RAWS])
def test_broken_http_gets_what_it_should(said: dict[str, list[int | None]], raw: Any) -> None:
    assert set(said[raw.name]) <= HANGS.get(raw.name, raw.codes)


def test_mutated_requests_get_no_5xx_and_others_their_answers(port: int) -> None:
    right = ask(port, POSTS[0])[1]
    for seed in range(5):
        many = soak_fuzz.storm(seed, 80)
        found = asyncio.run(soak_fuzz.exchanges("127.0.0.1", port, many, at_once=32))
        bad = [d for d, codes in zip(many, found, strict=True) for c in codes if c and c >= 500]
        assert not bad
        assert ask(port, POSTS[0])[1] == right


def test_bytes_that_come_by_and_by_hold_nobody_up(port: int) -> None:
    async def both() -> tuple[Counter[str], list[float]]:
        slow = asyncio.create_task(soak_fuzz.slowly("127.0.0.1", port, 100, seconds=3))
        took = []
        while not slow.done():
            status, _, seconds = await asyncio.to_thread(ask, port, POSTS[0])
            assert status == 200
            took.append(seconds)
            await asyncio.sleep(0.05)
        return await slow, took

    seen, took = asyncio.run(both())
    assert seen.total() == 100
    assert sorted(took)[len(took) // 2] < 1


TEXTS = [text for text, _ in reviews(20)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "haproxy",
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="HAProxy comes with Ray on Linux only"
            ),
        ),
        "proxy",
    ],
)
def deployed(
    request: pytest.FixtureRequest, served: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Two replicas behind each ingress."""
    home = tmp_path_factory.mktemp("fuzz")
    model = shutil.copytree(served, home / "model")
    flags = [*FLAGS, f"target.serve.ingress={request.param}"]
    with soak_fuzz.soak_serve.deployed(model, home, TEXTS, flags=flags) as soak:
        url = soak.server.url
        target = soak_fuzz.Target(url, TEXTS, soak.known["old"], soak.server)
        target.model = soak_fuzz.identity(url)
        target.settle()
        yield target


def missing(part: Any, target: Any) -> list[str]:
    """What does not hold, but for what Ray's own proxy cannot help."""
    own = not target.server.pids("/haproxy -db")
    return [p for p in part.problems if not (own and p.partition(":")[0] in HANGS)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_deployment_bears_broken_http(deployed: Any) -> None:
    part = soak_fuzz.broken(deployed, 400)
    assert not missing(part, deployed)
    assert part.statuses.total() >= 400


@pytest.mark.ray
@pytest.mark.slow
def test_a_deployment_bears_hostile_bodies(deployed: Any) -> None:
    part = soak_fuzz.Part("hostile bodies")
    with soak_fuzz.watched(deployed, part):
        part.problems += asyncio.run(soak_fuzz.mixture(deployed, 600, part.statuses, 3, []))
    assert not part.problems
    assert part.of("2") > 300


@pytest.mark.ray
@pytest.mark.slow
def test_a_deployment_bears_bytes_that_come_by_and_by(deployed: Any) -> None:
    part = soak_fuzz.slow(deployed, 200, seconds=5)
    assert not part.problems
    assert part.statuses.total() == 200
