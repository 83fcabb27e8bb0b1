"""The figures of a server, the ids of its requests and its access log; and that a real Prometheus
adds up what a real deployment tells."""

import asyncio
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import free_port, wait_for
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_api import JSON, KEY, LIMITS, MODEL, app
from test_secure import session, started

from workloads import api, protocols
from workloads.batcher import Batcher
from workloads.config import Target
from workloads.metrics import Metrics, asked, log_file, written

OBSERVABILITY = Path(__file__).parent.parent / "clusters/observability"
NAMES = re.compile(r"workloads_[a-z_]+")
SECRET = "Zanzibar-4711"


@pytest.fixture
def client() -> TestClient:
    return app()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Name and values of the labels -> value."""
    families = list(text_string_to_metric_families(text))
    assert len({one.name for one in families}) == len(families)
    found = {}
    for one in (sample for family in families for sample in family.samples):
        found[one.name, *(value for _, value in sorted(one.labels.items()))] = one.value
    return found


def told(client: TestClient, **headers: str) -> dict[tuple[str, ...], float]:
    return samples(client.get("/metrics", headers=headers).text)


def predict(client: TestClient, text: str, **headers: str) -> Any:
    return client.post("/predict", json={"inputs": text}, headers=headers)


def test_requests_are_counted_by_path_and_status(client: TestClient) -> None:
    for _ in range(3):
        predict(client, "a")
    client.post("/predict", content=b"{", headers=JSON)
    client.get("/healthz")
    found = told(client)
    assert found["workloads_requests_total", "200", "/predict", ""] == 3
    assert found["workloads_requests_total", "400", "/predict", ""] == 1
    assert found["workloads_requests_total", "200", "/healthz", ""] == 1
    assert found["workloads_refusals_total", "malformed", ""] == 1
    assert found["workloads_request_seconds_count", "/predict", ""] == 4
    assert found["workloads_request_seconds_bucket", "+Inf", "/predict", ""] == 4
    assert found["workloads_requests_in_flight", ""] == 1  # this one


def test_addresses_that_are_none_make_no_figures_of_their_own(client: TestClient) -> None:
    for i in range(20):
        client.get(f"/{SECRET}/{i}")
        client.get(f"/v2/models/{SECRET}{i}")
    found = told(client)
    assert found["workloads_requests_total", "404", "other", ""] == 40
    assert not [key for key in found if SECRET in " ".join(key)]


def test_models_paths_have_figures(client: TestClient) -> None:
    client.get("/v2/models/runs-fake/ready")
    key = "workloads_requests_total", "200", "/v2/models/runs-fake/ready", ""
    assert told(client)[key] == 1


def test_whoever_goes_before_the_answer_is_counted_and_so_is_a_failure() -> None:
    async def failing(*args: Any) -> Any:
        raise RuntimeError("broken")

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    front = api.make_app(MODEL._replace(classify=failing), {}, LIMITS)
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(front(scope, gone, gone))
    client = TestClient(front, raise_server_exceptions=False)
    predict(client, "a")
    found = told(client)
    assert found["workloads_requests_total", "499", "/predict", ""] == 1
    assert found["workloads_requests_total", "500", "/predict", ""] == 1
    assert found["workloads_refusals_total", "gone", ""] == 1


def test_forward_passes_tell_their_rows_tokens_and_padding() -> None:
    metrics = Metrics([])

    def predict(rows: list[list[int]]) -> Any:
        return rows

    async def run() -> None:
        batcher = Batcher(predict, 1, 4, 100, 9.0, lambda rows: metrics.batch(rows, max(rows)))
        await batcher([[1] * 3, [1] * 5, [1] * 5])

    asyncio.run(run())
    found = samples(written([metrics.collect()]).decode())
    assert found["workloads_texts_total", ""] == 3
    assert found["workloads_tokens_total", ""] == 13
    assert found["workloads_padding_tokens_total", ""] == 2
    assert found["workloads_batch_rows_sum", ""] == 3
    assert found["workloads_text_tokens_bucket", "4.0", ""] == 1
    assert found["workloads_text_tokens_bucket", "8.0", ""] == 3


def test_predictions_are_counted_for_the_models_classes_only() -> None:
    metrics = Metrics(["good", "bad"])
    metrics.predicted(["good", "good"])
    found = samples(written([metrics.collect()]).decode())
    assert found["workloads_predictions_total", "good", ""] == 2
    assert found["workloads_predictions_total", "bad", ""] == 0
    assert "predictions" not in written([Metrics([]).collect()]).decode()


def test_replicas_are_told_together_and_apart() -> None:
    both = [Metrics(["a"], replica=name) for name in ("one", "two")]
    both[0].predicted(["a"])
    both[1].predicted(["a", "a"])
    found = samples(written([metrics.collect() for metrics in both]).decode())
    assert found["workloads_predictions_total", "a", "one"] == 1
    assert found["workloads_predictions_total", "a", "two"] == 2


def test_the_figures_need_a_key_where_there_are_keys() -> None:
    mine = app(key=KEY)
    assert mine.get("/metrics").status_code == 401
    assert mine.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("given", ["7", "a b-c/d", "x" * 128])
def test_an_answer_has_the_id_of_its_request(client: TestClient, given: str) -> None:
    headers = {"x-request-id": given}
    for answer in (
        predict(client, "a", **headers),
        client.post("/predict", content=b"{", headers={**JSON, **headers}),
        client.get("/nothing", headers=headers),
        client.get("/metrics", headers=headers),
        predict(app(key=KEY), "a", **headers),
    ):
        assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, "é".encode(), b"a\tb"])
def test_without_a_good_id_a_request_gets_one(client: TestClient, given: bytes | None) -> None:
    headers: Any = {"x-request-id": given} if given is not None else {}
    ids = {client.get("/healthz", headers=headers).headers["x-request-id"] for _ in range(9)}
    assert len(ids) == 9
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)


# ---------------------------------------------------------------- the access log


async def classify(texts: list[str], parameters: protocols.Parameters) -> protocols.Scored:
    asked(len(texts), 7)
    return protocols.Scored([[{"label": "long", "score": 1.0}] for _ in texts], [])


def logged(file: Path, key: str | None = None) -> TestClient:
    """A client of a server that writes an access log."""
    import hashlib

    hashes = [hashlib.sha256(one.encode()).hexdigest() for one in ("o" * 20, key or "") if key]
    metrics = Metrics(MODEL.labels, log=log_file(file))
    model = MODEL._replace(classify=classify)
    return TestClient(api.make_app(model, {}, LIMITS, hashes, metrics=metrics))


def test_a_request_is_a_line_of_the_access_log(tmp_path: Path) -> None:
    mine = logged(tmp_path / "log", KEY)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "seven"}
    assert predict(mine, SECRET, **headers).status_code == 200
    assert predict(mine, SECRET).status_code == 401
    first, second = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert 0 < first.pop("ms") < 10_000
    assert first == {
        "id": "seven",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "texts": 1,
        "tokens": 7,
        "key": 2,
    }
    assert (second["status"], second["texts"], second["key"]) == (401, 0, None)


def test_nothing_of_a_request_is_in_the_access_log(tmp_path: Path) -> None:
    mine = logged(tmp_path / "log")
    for path in ("/predict", f"/{SECRET}", f"/predict?{SECRET}", f"/v2/models/{SECRET}"):
        mine.post(path, json={"inputs": SECRET, SECRET: 1})
        mine.post(path, json={"inputs": [SECRET] * 9}, headers={"authorization": SECRET})
        mine.get(path)
    said = (tmp_path / "log").read_text()
    assert SECRET not in said
    assert len(said.splitlines()) == 12


def test_no_request_is_logged_unless_it_is_asked_for(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        predict(client, SECRET)
    assert not [one for one in caplog.records if one.name.startswith("workloads")]


# ---------------------------------------------------------------- with a model, and Prometheus


def expressions() -> list[str]:
    """All that the dashboard asks Prometheus."""
    board = json.loads((OBSERVABILITY / "dashboard.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(found) > 12
    return [expression.replace("$__rate_interval", "1m") for expression in found]


@pytest.fixture(scope="module")
def own(served: Path, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """Of a replica with a real engine, without Ray."""
    from workloads import replica

    target = Target.model_validate({"serve": {"engine": "openvino-fp32", "streams": 1}})
    plain = replica.Classifier.func_or_class.__mro__[1]  # type: ignore[attr-defined]
    model = shutil.copytree(served, tmp_path_factory.mktemp("told") / "m")
    return TestClient(plain(str(model), target, []).__serve_build_asgi_app__())


def test_a_replica_counts_what_its_model_answers(own: TestClient) -> None:
    texts = ["a warm and clever delight", "dull", "long " * 100]
    first = own.post("/predict", json={"inputs": texts}).json()
    own.post("/embed", json={"inputs": "dull"})
    found = told(own)
    assert found["workloads_texts_total", ""] == 4
    assert found["workloads_text_tokens_count", ""] == 4
    assert found["workloads_truncated_texts_total", ""] == 1
    assert found["workloads_tokens_total", ""] == found["workloads_text_tokens_sum", ""]
    # 24 tokens are the model's limit, and the short ones are padded at least to 8.
    computed = found["workloads_tokens_total", ""] + found["workloads_padding_tokens_total", ""]
    assert computed % 8 == 0
    best = [one[0]["label"] for one in first]
    for label in ("good", "bad"):
        assert found["workloads_predictions_total", label, ""] == best.count(label)
    assert [key[1] for key in found if key[0] == "workloads_model_info"] == ["openvino-fp32"]


def test_the_dashboard_asks_only_for_what_there_is(own: TestClient) -> None:
    there = set(NAMES.findall(own.get("/metrics").text))
    assert {name for one in expressions() for name in NAMES.findall(one)} <= there


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("/predict", True),
        ("/v2/models/health-ready/infer", True),
        ("/v2/models/health-ready/ready", False),
        ("/v2/health/live", False),
        ("/readyz", False),
        ("/metrics", False),
    ],
)
def test_the_dashboard_leaves_out_who_only_asks_whether_it_is_there(
    path: str, counts: bool
) -> None:
    (left_out,) = {p for one in expressions() for p in re.findall(r'path!~"([^"]+)"', one)}
    assert (re.fullmatch(left_out, path) is None) == counts


class Prometheus:
    """A real one, on this machine."""

    def __init__(self, config: Path) -> None:
        address = f"127.0.0.1:{free_port()}"
        line = ["prometheus", f"--config.file={config}", f"--web.listen-address={address}"]
        line += [f"--storage.tsdb.path={config.parent / 'data'}", "--log.level=warn"]
        self.url = f"http://{address}/api/v1/query"
        self.process = subprocess.Popen(line)

    def ask(self, expression: str) -> list[float]:
        """The values of all series; fails for what is no expression."""
        try:
            answer = httpx.get(self.url, params={"query": expression}, timeout=30)
        except httpx.TransportError:  # it starts
            return []
        if answer.status_code == 503:
            return []
        assert answer.status_code == 200, answer.text
        return [float(one["value"][1]) for one in answer.json()["data"]["result"]]


@pytest.fixture
def scraped(served: Path, tmp_path: Path) -> Iterator[tuple[str, Prometheus]]:
    """Two replicas behind keys, and a Prometheus with the configuration that ships."""
    model = shutil.copytree(served, tmp_path / "model")
    (tmp_path / "key").write_text(KEY)
    flags = [f"target.serve.port={free_port()}", f"target.serve.api_keys_file={tmp_path / 'key'}"]
    flags += ["target.serve.replicas.min=2", "target.serve.replicas.max=2"]
    command, url = started(tmp_path, model, *flags, "target.serve.cpus_per_replica=0.25")
    # As the head writes it where there is a dashboard.
    (port,) = session(command).glob("metrics_export_port_*")
    nodes = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{port.read_text().strip()}"]}]
    (tmp_path / "nodes.json").write_text(json.dumps(nodes))
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = "1s"
    mine, rays = config["scrape_configs"]
    mine["authorization"]["credentials_file"] = str(tmp_path / "key")
    mine["static_configs"][0]["targets"] = [url.removeprefix("http://")]
    rays["file_sd_configs"][0]["files"] = [str(tmp_path / "nodes.json")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    prometheus = Prometheus(tmp_path / "prometheus.yml")
    try:
        yield url, prometheus
    finally:
        prometheus.process.kill()
        prometheus.process.wait()
        command.kill()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="there is no prometheus")
def test_prometheus_adds_up_what_all_replicas_tell(scraped: tuple[str, Prometheus]) -> None:
    url, prometheus = scraped
    key = {"authorization": f"Bearer {KEY}"}
    texts = {"inputs": ["a warm and clever delight", "dull"]}
    requests = 'workloads_requests_total{path="/predict",code="200"}'

    def send(count: int) -> None:
        for _ in range(count):  # a connection each: both replicas get some
            answer = httpx.post(f"{url}/predict", json=texts, headers=key, timeout=60)
            assert answer.status_code == 200
            assert len(answer.headers.get_list("x-request-id")) == 1

    send(20)
    assert httpx.post(f"{url}/predict", json=texts).status_code == 401
    wait_for(lambda: prometheus.ask(f"sum({requests})") == [20], 60)
    send(20)
    wait_for(lambda: prometheus.ask(f"sum({requests})") == [40], 60)
    assert len([count for count in prometheus.ask(requests) if count]) == 2
    assert prometheus.ask("sum(workloads_texts_total)") == [80]
    assert prometheus.ask("sum(workloads_predictions_total)") == [80]
    assert prometheus.ask("count(workloads_model_info)") == [2]
    assert prometheus.ask('sum(workloads_refusals_total{reason="no_key"})') == [1]
    wait_for(lambda: prometheus.ask('up{job="ray"}') == [1], 60)
    for expression in expressions():
        assert wait_for(lambda e=expression: prometheus.ask(e), 30), expression
