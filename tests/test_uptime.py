"""A deployment that faces users stays up: short versions of scripts/soak_serve.py; processes are
really killed."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, script

pytestmark = [pytest.mark.ray, pytest.mark.slow]
soak_serve = script("soak_serve")
soak_serve.CLOSE = 1e-4  # the engine here does not round, and a small model is sure of little

# As in the fixture: the engines need not be measured again.
FLAGS = ["target.serve.engine=openvino-fp32", "target.serve.streams=1"]
TEXTS = [text for text, _ in reviews(60)]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")


@pytest.fixture(scope="module")
def soak(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two replicas of a small model, and callers who know what it answers."""
    home = tmp_path_factory.mktemp("soak")
    model = shutil.copytree(served, home / "model")
    more = {"seconds": 2.0, "requests": 500, "pause_s": 0.3, "flags": FLAGS}
    with soak_serve.deployed(model, home, TEXTS, **more) as deployed:
        yield deployed


def holds(outcome: Any) -> None:
    """What was claimed, and that there were callers at all."""
    assert not outcome.problems
    assert outcome.load is not None
    assert len(outcome.load.answered) > 20


def test_a_model_is_replaced_and_comes_back_and_no_request_fails(soak: Any) -> None:
    holds(soak_serve.swap(soak))


def test_a_model_whose_golden_answers_differ_never_answers(soak: Any) -> None:
    holds(soak_serve.bad_update(soak))


def test_other_terminals_are_told_what_is_served(soak: Any) -> None:
    log = (soak.server.home / "serve.log").read_text()
    assert "now serving" in log
    port = soak.server.port
    done = soak.server.ask("--model", str(soak.server.model))
    assert done.returncode == 2
    assert f"{port} cannot be used" in done.stderr
    assert "--update" in done.stderr


def test_a_replica_that_is_killed_fails_no_request(soak: Any) -> None:
    holds(soak_serve.replica(soak))


def test_a_controller_that_is_killed_fails_no_request(soak: Any) -> None:
    holds(soak_serve.controller(soak))


@LINUX
def test_a_haproxy_that_is_killed_is_answered_for(soak: Any) -> None:
    holds(soak_serve.haproxy(soak))


@LINUX
def test_a_manager_of_haproxy_that_is_killed_fails_no_request(soak: Any) -> None:
    holds(soak_serve.manager(soak))


@LINUX
def test_clients_that_misbehave_fail_no_request_of_others(soak: Any) -> None:
    outcome = soak_serve.bad_clients(soak, idle=500)
    assert not outcome.load.failed
    assert len(outcome.load.answered) > 20


def test_what_was_accepted_is_answered_before_it_goes_down(soak: Any) -> None:
    holds(soak_serve.taken_down(soak))
    assert soak.server.process.wait(60) == 0
    (record,) = (soak.server.home / "runs/.serving").glob("*.json")
    assert json.loads(record.read_text())["ray"] is None
    done = soak.server.ask("--rollback")
    assert done.returncode == 2
    assert "nothing is served" in done.stderr


def test_without_callers_no_replica_is_left_and_the_next_one_is_answered(
    served: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(served, tmp_path / "model")
    flags = [*FLAGS, *soak_serve.FLAGS["from_zero"]]
    with soak_serve.deployed(model, tmp_path, TEXTS, flags=flags) as soak:
        outcome = soak_serve.from_zero(soak)
    assert not outcome.problems
