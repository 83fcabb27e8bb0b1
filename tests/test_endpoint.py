"""What is said of going back to what was served before; the deployment itself is not made here."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workloads import artifacts, endpoint
from workloads.config import Run, Target, Task, UserError
from workloads.pipeline import Job


def test_each_rollback_says_where_it_went_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target.model_validate({"ray": {"storage": str(tmp_path)}})
    job = Job(Run("t", Task(), "laptop", target), Console(file=io.StringIO(), width=1000))
    record = endpoint.Record(str(tmp_path), 8000)
    args: dict[str, Any] = {"target": {}, "texts": [], "at": "2026-01-02T03:04:05+00:00"}
    record.write([{"model": f"/m/{name}", "run": name, **args} for name in "abc"])
    deployed: list[str] = []

    def deploy(job: Job, located: str, target: Target, texts: list[str], record: Any) -> Any:
        deployed.append(located)
        record.write([*record.deployed, {"model": located, "run": None, **args}])
        return {"model": located}

    monkeypatch.setattr(endpoint, "_find", lambda job: record)
    monkeypatch.setattr(endpoint, "_locate", lambda job, model: model)
    monkeypatch.setattr(endpoint, "_deploy", deploy)
    endpoint.roll_back(job)
    endpoint.roll_back(job)
    assert deployed == ["/m/b", "/m/a"]
    first, second = job.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first == (
        "rolled back from c to b, as it was deployed at 2026-01-02T03:04:05+00:00; --rollback "
        "again: to a; forward again: workloads serve --update --model /m/c"
    )
    assert "from b to a" in second
    assert "; none is before it; forward again: workloads serve --update --model /m/b" in second
    with pytest.raises(UserError, match=r"--rollback: a is the oldest that is known on port 8000"):
        endpoint.roll_back(job)


def test_a_report_that_cannot_be_written_anew_ends_no_deployment(tmp_path: Path) -> None:
    target = Target.model_validate({"ray": {"storage": str(tmp_path)}})
    job = Job(Run("t", Task(), "laptop", target), Console(file=io.StringIO(), width=1000))
    folder = artifacts.create(str(tmp_path), job.run, "one")
    folder.write_text("report.html", "as it was")
    folder.write_text("tune/result.json", '{"cut sho')
    entry = {"model": f"{folder.uri}/model", "run": "one", "digest": "d", "engine": "torch"}
    endpoint._note_in_run(job, entry, {"seconds": 1.0})
    assert folder.read("run.json")["stages"]["serve"]["engine"] == "torch"
    assert folder.read_text("report.html") == "as it was"
    assert "report.html stays as it was" in job.console.file.getvalue()  # type: ignore[attr-defined]
