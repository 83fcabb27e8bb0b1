"""The README's commands in one folder, with the smoke task, as a newcomer would."""

import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, free_port, wait_for

README = Path(__file__).parent.parent / "README.md"
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def lines(section: str) -> list[list[str]]:
    """The `workloads ...` lines in the bash blocks of a section, without their comments."""
    text = README.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    found = [line for line in "".join(blocks).splitlines() if line.startswith("workloads ")]
    return [shlex.split(line, comments=True)[1:] for line in found]


COMMANDS = {line[0]: line for line in reversed(lines("The commands"))}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture
def typed(here: Path) -> Iterator[Any]:
    """Types a command in the newcomer's folder; what still runs is killed at the end."""
    started: list[Command] = []

    def start(*args: str) -> Command:
        started.append(Command(here, *args))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def stop(server: Command) -> None:
    """Ctrl-C, after which nothing of the command is left."""
    os.kill(server.process.pid, signal.SIGINT)
    assert server.wait(120) == 130
    assert "Traceback" not in server.err.read_text()
    wait_for(lambda: _gone(server.process.pid), 90)


def _gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def wait_ready(server: Command) -> None:
    wait_for(lambda: server.process.poll() or "\nready: " in server.out.read_text(), 300)
    assert server.process.poll() is None, server.err.read_text()


def test_every_stage_and_helper_is_shown() -> None:
    assert set(COMMANDS) == {"run", "tune", "train", "serve", "predict", "check", "config"}


def test_run_tunes_trains_and_serves_and_predict_asks_it(typed: Any, here: Path) -> None:
    port = free_port()
    server = typed(*COMMANDS["run"], f"target.serve.port={port}")
    wait_ready(server)
    (run,) = (here / "runs").glob("smoke-*")
    assert {"run.json", "tune", "train", "model", "report.html"} <= {p.name for p in run.iterdir()}
    asked = typed(*COMMANDS["predict"], "--url", f"http://127.0.0.1:{port}")
    assert asked.wait() == 0
    assert asked.out.read_text().endswith("\tCompute the inverse of a matrix.\n")
    assert f"curl -s http://127.0.0.1:{port}/predict" in server.out.read_text()
    stop(server)


def test_serve_takes_the_newest_trained_run(typed: Any) -> None:
    server = typed(*COMMANDS["serve"], f"target.serve.port={free_port()}")
    wait_ready(server)
    said = server.out.read_text()
    assert "the newest trained run of this task" in said
    assert "engines: " not in said  # measured when `run` served it
    stop(server)


def test_stages_one_at_a_time_find_each_others_work(typed: Any) -> None:
    tuned = typed(*COMMANDS["tune"], "--json").result()
    train = typed(*COMMANDS["train"], "--json")
    trained = train.result()
    assert "the newest of this task" in train.err.read_text()
    assert (trained["run"], trained["params"]) == (tuned["run"], tuned["best_params"])
    again = typed(*COMMANDS["train"], "--run", tuned["run"], "--json")
    assert again.result()["eval_accuracy"] == trained["eval_accuracy"]
    assert "is trained already" in again.err.read_text()
    other = typed(*COMMANDS["train"], "--run", tuned["run"], "task.train.lr=0.001")
    assert other.wait() == 2
    assert "these keys differ: train.lr" in other.err.read_text()


def test_check_and_config_start_nothing(typed: Any, here: Path) -> None:
    before = sorted(here.glob("runs/*"))
    assert typed(*COMMANDS["check"], "--json", "target.train.workers=1").result()["derived"]
    config = typed(*COMMANDS["config"])
    assert config.wait() == 0
    assert "--task smoke" in config.out.read_text()
    assert sorted(here.glob("runs/*")) == before


@pytest.mark.parametrize("line", lines("The commands") + lines("Your own data and model"))
def test_every_key_that_the_readme_overrides_is_there(line: list[str]) -> None:
    from workloads.config import load

    overrides = [arg for arg in line if arg.startswith(("task.", "target."))]
    # One by one but for those that need each other.
    run = load("csv-example" if "mine.yaml" in line else "smoke", "laptop", overrides)
    assert json.dumps(run.task.model_dump(mode="json"))
