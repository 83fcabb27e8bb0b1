"""Runs on a real MLflow server, which is killed in between, and models from its registry."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import Command, changed, free_port, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from workloads import registry, tracking
from workloads.cli import main
from workloads.config import Target, Task, UserError
from workloads.engine import read_info
from workloads.replica import lineage


class Mlflow:
    """`mlflow server` on loopback, with sqlite."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
        line += ["--port", str(self.port), "--artifacts-destination", str(self.folder / "files")]
        line += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                line, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
            return True
        return False

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def client(self) -> Any:
        return tracking.connect(self.url)

    def runs(self, name: str) -> list[Any]:
        """Those of a run's name."""
        there = [one.experiment_id for one in self.client.search_experiments()]
        asked = f"tags.`mlflow.runName` = '{name}'"
        return list(self.client.search_runs(there, asked))

    def files(self, run_id: str, path: str = "") -> set[str]:
        """Names of all artifacts."""
        found: set[str] = set()
        for one in self.client.list_artifacts(run_id, path):
            found |= self.files(run_id, one.path) if one.is_dir else {one.path}
        return found


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    one = Mlflow(tmp_path_factory.mktemp("mlflow"))
    yield one
    one.kill()


def flags(mlflow: Mlflow | str) -> list[str]:
    url = mlflow if isinstance(mlflow, str) else mlflow.url
    told = [f"target.tracking.mlflow={url}", "target.train.cpus_per_worker=1"]
    return [*told, "target.precision=fp32"]


@pytest.fixture(scope="module")
def stages(
    mlflow: Mlflow, tiny: Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """A sweep of two rates, then training, told to the server: the runs' folder, the command's
    answer and its words."""
    here = tmp_path_factory.mktemp("stages")
    rates = {"train.lr": {"draw": "choice", "values": [5e-3, 1e-5]}}
    plan = {"search": "grid", "trials": None, "scheduler": "fifo", "space": rates}
    plan |= {"train_rows": 40, "epochs": 1, "evals_per_epoch": 2, "confirm_seeds": 1}
    task = Task.model_validate(tiny.model_dump() | {"tune": plan})
    (here / "reviews.yaml").write_text(yaml.safe_dump(task.model_dump(mode="json")))
    run = ["--stages", "tune,train", "--task", "reviews.yaml", "--run", "one", "--json"]
    one = Command(here, "run", *run, *flags(mlflow))
    try:
        return here / "runs", one.result(), one.err.read_text()
    finally:
        one.kill()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_its_trials_and_its_training_are_on_the_server(mlflow: Mlflow, stages: Any) -> None:
    storage, result, said = stages
    (run,) = mlflow.runs("one")
    assert f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in said
    assert run.info.status == "FINISHED"
    told = json.loads((storage / "one/run.json").read_text())
    assert told["mlflow"]["run_id"] == run.info.run_id
    assert run.data.tags["data_fingerprint"] == told["data"]["fingerprint"]
    assert run.data.tags["digest"] == result["digest"]
    assert (run.data.tags["task"], run.data.tags["target"]) == ("reviews", "laptop")
    assert run.data.tags.get("mlflow.source.git.commit") == told["git"]
    params = run.data.params
    assert params["train.epochs"] == "2"
    assert float(params["train.lr"]) == result["params"]["train.lr"]  # what it was trained with
    history = mlflow.client.get_metric_history(run.info.run_id, "eval_loss")
    assert {one.step: one.value for one in history} == pytest.approx(
        {one["step"]: one["eval_loss"] for one in result["history"]}
    )
    steps = {one.step for one in mlflow.client.get_metric_history(run.info.run_id, "loss")}
    assert len(steps) > len(result["history"])  # the lines between, too


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_is_a_run_below_it(mlflow: Mlflow, stages: Any) -> None:
    storage, result, _ = stages
    (run,) = mlflow.runs("one")
    asked = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    trials = mlflow.client.search_runs([run.info.experiment_id], asked)
    kept = [json.loads(path.read_text()) for path in storage.glob("one/tune/trials/*.json")]
    assert {one.data.tags["trial"] for one in trials} == {row["trial"] for row in kept}
    for row in kept:
        (one,) = [one for one in trials if one.data.tags["trial"] == row["trial"]]
        assert {key: float(value) for key, value in one.data.params.items()} == row["drawn"]
        assert one.data.tags["state"] == row["state"] == "finished"
        assert one.info.status == "FINISHED"
        history = mlflow.client.get_metric_history(one.info.run_id, "eval_loss")
        assert [(m.step, m.value) for m in history] == [
            (point["evals"], pytest.approx(point["eval_loss"])) for point in row["curve"]
        ]


@pytest.mark.ray
@pytest.mark.slow
def test_files_and_the_model_with_its_card_are_there(mlflow: Mlflow, stages: Any) -> None:
    storage, result, said = stages
    (run,) = mlflow.runs("one")
    files = mlflow.files(run.info.run_id)
    assert {"run.json", "report.html", "tune/best.json", "model/README.md"} <= files
    assert "models:/reviews/1 is registered" in said
    version = mlflow.client.get_model_version("reviews", "1")
    assert version.run_id == run.info.run_id
    assert version.tags == {"digest": result["digest"], "run": "one"}
    assert version.description.startswith("# one\n")
    model = mlflow.client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.status == "READY"
    assert {m.key: m.value for m in model.metrics} == pytest.approx(
        {key: result[key] for key in ("eval_accuracy", "eval_f1", "eval_loss")}
    )
    names = {one.path for one in mlflow.client.list_logged_model_artifacts(model.model_id)}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names


@pytest.mark.ray
@pytest.mark.slow
def test_tensorboard_reads_the_same(stages: Any) -> None:
    storage, result, _ = stages
    read = EventAccumulator(str(storage / "one/tensorboard/train"))
    read.Reload()
    assert {one.step: one.value for one in read.Scalars("eval_loss")} == pytest.approx(
        {one["step"]: one["eval_loss"] for one in result["history"]}
    )
    for row in (json.loads(path.read_text()) for path in storage.glob("one/tune/trials/*.json")):
        read = EventAccumulator(str(storage / f"one/tensorboard/tune/{row['trial']}"))
        read.Reload()
        shown = [(one.step, pytest.approx(one.value)) for one in read.Scalars("eval_accuracy")]
        assert shown == [(m["evals"], m["eval_accuracy"]) for m in row["curve"]]


# ---------------------------------------------------------------- the registry


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_is_served_by_its_alias_and_stays_when_that_moves(
    mlflow: Mlflow, stages: Any, trained: Path, tmp_path: Path
) -> None:
    storage, result, _ = stages
    mlflow.client.set_registered_model_alias("reviews", "live", "1")
    port = free_port()
    limits = [f"target.serve.port={port}", "target.serve.engine=torch", *flags(mlflow)]
    limits += [f"target.ray.storage={storage}"]
    one = Command(tmp_path, "serve", "--model", "models:/reviews@live", "--json", *limits)
    try:
        wait_for(lambda: one.process.poll() is not None or one.out.read_text())
        assert one.process.poll() is None, one.err.read_text()
        register(mlflow, "reviews", trained)
        mlflow.client.set_registered_model_alias("reviews", "live", "2")
        answer = httpx.post(f"http://127.0.0.1:{port}/predict", json={"inputs": "dull"}, timeout=60)
        assert answer.status_code == 200
        assert answer.headers["x-model-version"] == "reviews/1"
        assert result["digest"].startswith(answer.headers["x-model-digest"])
        served = json.loads(one.out.read_text())["model"]
        assert served.startswith(f"{storage}/.registry/reviews-1-")  # which no alias moves
    finally:
        one.process.send_signal(signal.SIGINT)
        one.wait(60)
        one.kill()


def test_a_version_is_named_in_the_headers_and_fetched_once(
    mlflow: Mlflow, trained: Path, tmp_path: Path
) -> None:
    register(mlflow, "once", trained)
    found = [registry.fetched("models:/once/1", str(tmp_path), mlflow.url) for _ in range(2)]
    assert found[0] == found[1]
    folder = Path(found[0])
    assert lineage(found[0], folder, read_info(folder, "once"))["version"] == "once/1"
    assert not list(tmp_path.rglob("*.pkl"))


def register(mlflow: Mlflow, name: str, folder: Path) -> None:
    client = mlflow.client
    made = client.create_run("0").info.run_id
    client.log_artifacts(made, str(folder), "here")
    with contextlib.suppress(Exception):
        client.create_registered_model(name)
    client.create_model_version(name, f"runs:/{made}/here", made)


def test_weights_that_can_run_code_are_not_taken(
    mlflow: Mlflow, trained: Path, tmp_path: Path
) -> None:
    pickled = shutil.copytree(trained, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    register(mlflow, "pickled", pickled)
    with pytest.raises(UserError, match="models:/pickled/1 has no config.json with safetensors"):
        registry.fetched("models:/pickled/1", str(tmp_path), mlflow.url)
    assert not (tmp_path / ".registry").exists()


def test_what_mlflow_saves_of_transformers_is_taken_without_its_code(
    mlflow: Mlflow, trained: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(trained, theirs / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    (theirs / "components/tokenizer").mkdir(parents=True)
    for file in trained.glob("tokenizer*"):
        shutil.copy(file, theirs / "components/tokenizer")
    (theirs / "python_model.pkl").write_text("code")
    register(mlflow, "theirs", theirs)
    folder = Path(registry.fetched("models:/theirs/1", str(tmp_path), mlflow.url))
    names = {path.name for path in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "python_model.pkl" not in names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "models:/known@nobody",
            r"of known there are: @best, /1; an alias is given on http.*known",
        ),
        ("models:/known/7", "of known there are: @best, /1$"),
        ("models:/unknown@best", "has no model 'unknown'; there are: .*known"),
        ("models:/known", "give models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_a_wrong_name_says_what_there_is(
    name: str, said: str, mlflow: Mlflow, trained: Path, tmp_path: Path
) -> None:
    if not any(one.name == "known" for one in mlflow.client.search_registered_models()):
        register(mlflow, "known", trained)
        mlflow.client.set_registered_model_alias("known", "best", "1")
    with pytest.raises(UserError, match=said):
        registry.fetched(name, str(tmp_path), mlflow.url)


def test_a_registry_that_nobody_named_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="target.tracking.mlflow=http://HOST:PORT, or MLFLOW_TRACK"):
        registry.fetched("models:/a@b", str(tmp_path), None)


# ---------------------------------------------------------------- a server that is not there


def refused(capsys: Any, tmp_path: Path, url: str) -> str:
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main(["train", "--task", "smoke", f"target.ray.storage={tmp_path}", *flags(url)])
    assert end.value.code == 2
    assert time.monotonic() - began < 20  # its own retries take minutes
    assert not list(tmp_path.iterdir())  # nothing was started
    return capsys.readouterr().err


def test_no_server_is_told_before_anything_starts(capsys: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    said = refused(capsys, tmp_path, url)
    assert f"target.tracking.mlflow: {url} does not answer (Connection refused)" in said
    assert "mlflow server --port 5000" in said
    assert "target.tracking.mlflow=null" in said


def test_a_server_that_never_answers_is_told_within_seconds(capsys: Any, tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        said = refused(capsys, tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}")
    assert "does not answer (timed out)" in said


def test_mlflow_that_is_not_installed_is_one_command_away(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=re.escape("pip install 'workloads[mlflow]'")):
        tracking.connect("http://127.0.0.1:1")


@pytest.mark.parametrize("url", ["sqlite:///mlflow.db", "127.0.0.1:5000", "http://me:secret@host"])
def test_an_address_is_that_of_a_server_and_has_no_password(url: str) -> None:
    with pytest.raises(ValueError, match="takes the address of a server, http://HOST:PORT") as e:
        Target.model_validate({"tracking": {"mlflow": url}})
    assert "secret" not in str(e.value).partition("[type=")[0]


@pytest.mark.slow
def test_without_the_key_mlflow_is_not_even_imported(tiny: Task, tmp_path: Path) -> None:
    task = changed(tiny, **{"train.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task.model_dump(mode="json")))
    code = (
        "import sys\nfrom workloads.cli import main\n"
        "try: main(['train', '--task', 'tiny.yaml', '--run', 'one'])\n"
        "except SystemExit: pass\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=200)
    assert list(tmp_path.glob("runs/one/tensorboard/train/events.*"))


# ---------------------------------------------------------------- last: it is killed


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_killed_server_gets_the_rest_later(
    mlflow: Mlflow, tiny: Task, tmp_path: Path
) -> None:
    task = changed(tiny, **{"train.epochs": 150, "train.lr": 1e-4})
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(task.model_dump(mode="json")))
    line = ["train", "--task", "long.yaml", "--run", "long", "--json", *flags(mlflow)]
    line += ["target.train.checkpoint_every=10"]

    def steps() -> set[int]:
        (run,) = mlflow.runs("long")  # one, whatever happens
        history = mlflow.client.get_metric_history(run.info.run_id, "eval_loss")
        return {one.step for one in history}

    first = Command(tmp_path, *line)
    try:
        wait_for(lambda: first.process.poll() is not None or mlflow.runs("long") and steps())
        assert first.process.poll() is None, first.err.read_text()
    finally:
        first.kill()
    before = len(steps())
    second = Command(tmp_path, *line)
    try:
        wait_for(lambda: second.process.poll() is not None or len(steps()) > before)
        assert second.process.poll() is None, second.err.read_text()
        mlflow.kill()
        result, said = second.result(), second.err.read_text()
    finally:
        second.kill()
    assert result["history"][-1]["epoch"] == 150
    assert said.count("does not answer") <= 2  # once in the middle, once at the end
    assert "has not got all of this run" in said
    mlflow.start()
    third = Command(tmp_path, *line)
    try:
        assert third.result()["digest"] == result["digest"]
    finally:
        third.kill()
    assert "models:/long/1 is registered" in third.err.read_text()
    assert steps() == {one["step"] for one in result["history"]}
    assert mlflow.runs("long")[0].info.status == "FINISHED"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RESOURCE_DOES_NOT_EXIST: Run '9f4035aa01' not found", "does not do what an MLflow"),
        ("API request failed with error code 403 != 200", "does not let us in"),
        ("401 Client Error: Unauthorized for url", "does not let us in"),
    ],
)
def test_what_a_server_refuses_is_told_apart(text: str, said: str) -> None:
    assert tracking.why(Exception(text)).startswith(said)
