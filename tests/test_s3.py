"""All of a run on S3: a real server on loopback, asked as any other would be."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from conftest import Command, changed, free_port, reviews, wait_for
from pyarrow import fs

from workloads import artifacts, cli, runs
from workloads.config import Data, Task, UserError, load

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fs.FileSystem]:
    """A server of S3, a process of its own with one bucket, and the environment that leads to
    it."""
    url = f"http://127.0.0.1:{free_port()}"
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    server = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
    with pytest.MonkeyPatch.context() as patch:
        known = {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull}
        known |= dict.fromkeys(KEYS, "mine") | {"AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        for name, value in (known | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
            patch.setenv(name, value)
        put = urllib.request.Request(f"{url}/bucket", method="PUT")
        wait_for(lambda: _answers(put))
        yield fs.FileSystem.from_uri("s3://bucket")[0]
    server.kill()
    server.wait()


def _answers(request: Any) -> bool:
    try:
        urllib.request.urlopen(request).close()
    except OSError:
        return False
    return True


def put(s3: fs.FileSystem, path: str, text: str) -> str:
    with s3.open_output_stream(path) as file:
        file.write(text.encode())
    return f"s3://{path}"


@pytest.fixture(scope="module")
def stages(
    s3: fs.FileSystem, tiny: Task, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Tuned and trained on S3, killed after a checkpoint, and gone on with: the second command's
    answer and words."""
    here = tmp_path_factory.mktemp("stages")
    lines = [json.dumps({"text": text, "label": label}) for text, label in reviews(60)]
    rows = put(s3, "bucket/rows/1.jsonl", "\n".join(lines))
    task = changed(tiny, **{"data.train": rows, "train.epochs": 20})
    (here / "tiny.yaml").write_text(yaml.safe_dump(task.model_dump(mode="json")))
    flags = ["--stages", "tune,train", "--run", "one", "--json", "target.train.cpus_per_worker=0.5"]
    flags += ["target.ray.storage=s3://bucket/runs"]
    # By workers, to whom Ray Train writes, and then by the command itself.
    first = Command(here, "run", "--task", "tiny.yaml", *flags, "target.train.workers=2")
    try:
        known = "bucket/runs/one/train/checkpoints/checkpoint_manager_snapshot.json"
        wait_for(lambda: first.process.poll() is not None or s3.get_file_info(known).is_file, 300)
        assert first.process.poll() is None, first.err.read_text()
    finally:
        first.kill()
    second = Command(here, "run", *flags, "target.train.workers=1")
    try:
        yield second.result(), second.err.read_text()
    finally:
        second.kill()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_s3_is_tuned_trained_killed_and_gone_on_with(stages: Any) -> None:
    result, said = stages
    assert "tune: one has a finished sweep already" in said
    assert "from step" in said
    assert result["epoch"] <= 20
    assert result["folder"] == "s3://bucket/runs/one"
    assert result["stages"]["train"]["history"][-1]["epoch"] == 20


@pytest.mark.ray
def test_a_run_on_s3_is_found_whole_and_its_model_answers(stages: Any) -> None:
    from workloads import samples
    from workloads.engine import TorchEngine

    found = artifacts.newest("s3://bucket/runs", "tiny", artifacts.RunFolder.has_model)
    assert found is not None
    assert all(found.has(f) for f in ("run.json", "tune/trials.csv", "report.html"))
    local = artifacts.local_copy(f"{found.uri}/model")
    assert samples.golden_problem(TorchEngine(local, "one"), local) is None


def test_files_are_read_from_s3(s3: fs.FileSystem) -> None:
    from workloads import data

    text = "text,label\n" + "\n".join(f'"{text}",{label}' for text, label in reviews(20))
    rows = put(s3, "bucket/rows.csv", text)
    assert len(data.load(Data(source="files", train=rows), 0, "unused").train.texts) == 18
    with pytest.raises(UserError, match="s3://bucket/none.csv: no such file"):
        data.load(Data(source="files", train="s3://bucket/none.csv"), 0, "unused")


def test_files_are_streamed_from_s3(s3: fs.FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    from workloads import stream

    lines = [json.dumps({"text": text, "label": label}) for text, label in reviews(60)]
    for i in range(2):
        put(s3, f"bucket/many/{i}.jsonl", "\n".join(lines[30 * i :][:30]))
    data = {"source": "files", "train": "s3://bucket/many", "streaming": True}
    alone = "_on_all_cpus", lambda look, pieces, tell: [look(p) for p in pieces]
    monkeypatch.setattr(stream, *alone)  # on a Ray: test_stream
    task = Task.model_validate({"data": {**data, "validation": "s3://bucket/many/1.jsonl"}})
    for _ in range(2):
        dataset, plan = stream.survey(task, "s3://bucket/runs/.cache", lambda _: None)
    assert len(plan) == dataset.duplicates == 30


@pytest.mark.usefixtures("s3")
def test_runs_on_s3_are_listed_and_removed_unless_they_are_served() -> None:
    storage = "s3://bucket/listed"
    made = [artifacts.create(storage, load("smoke", "laptop"), name) for name in ("one", "two")]
    with artifacts.stage(made[0], "train"):
        made[0].write("model/config.json", {})
    assert {one["run"] for one in runs.listed(storage)} == {"one", "two"}
    record = artifacts.RunFolder(storage, ".serving")
    record.write("head-8000.json", {"deployed": [{"model": f"{made[0].uri}/model"}]})
    with pytest.raises(UserError, match="is served at head-8000"):
        runs.remove(made[0], storage)
    runs.remove(made[1], storage)
    assert [one["run"] for one in runs.listed(storage)] == ["one"]
    with pytest.raises(UserError, match="two: no such run in s3://bucket/listed; there are: one"):
        runs.find(storage, "two")


def refusal(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*line, "--task", "smoke"])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_named_before_anything_starts(capsys: Any) -> None:
    said = refusal(capsys, "train", "target.ray.storage=s3://nobodys/runs")
    assert "error: target.ray.storage 's3://nobodys/runs' cannot be written to" in said
    assert "Check the bucket" in said


@pytest.mark.usefixtures("s3")
def test_missing_credentials_are_told_before_anything_starts(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in KEYS:
        monkeypatch.delenv(key)
    said = refusal(capsys, "train", "target.ray.storage=s3://bucket/runs")
    assert "AWS Error ACCESS_DENIED" in said


@pytest.mark.usefixtures("s3")
def test_a_server_that_is_gone_is_told_by_any_command(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    said = refusal(capsys, "serve", "target.ray.storage=s3://bucket/runs")
    assert "error: the storage does not answer" in said
    assert "Could not connect to server" in said
