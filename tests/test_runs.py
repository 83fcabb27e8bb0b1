"""What a run's manifest holds, and the commands that list, compare, repeat and remove runs."""

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import changed, free_port
from pyarrow import fs

from workloads import artifacts, config, manifest, runs
from workloads.artifacts import RunFolder
from workloads.cli import main
from workloads.config import Run, Task, UserError


@pytest.fixture(autouse=True)
def _ray_is_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command's own process, whatever other tests have started in this one."""
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)


@pytest.fixture(params=["path", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a disk, and on what has no local path."""
    if request.param == "path":
        return str(tmp_path / "runs")
    memory, _ = fs.FileSystem.from_uri("mock:///")
    monkeypatch.setattr(artifacts, "filesystem", lambda uri: (memory, uri.removeprefix("mock:///")))
    return "mock:///runs"


def make(storage: str, name: str, *overrides: str, created: str = "2026-03-01T00:00:00") -> Any:
    """A run that nobody has worked on."""
    folder = artifacts.create(storage, config.load("smoke", "laptop", list(overrides)), name)
    folder.update("run.json", created=created)
    return folder


def trained(storage: str, name: str, accuracy: float, *overrides: str, **more: str) -> RunFolder:
    """A run that says that it was trained."""
    folder = make(storage, name, *overrides, **more)
    with artifacts.stage(folder, "train") as entry:
        entry |= {"scores": {"eval_accuracy": accuracy}, "digest": f"sha256:{name}"}
    folder.update("run.json", data={"fingerprint": "f", "train_rows": 60})
    return folder


def workloads(*args: str) -> int:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as done:
        main([*args])
    return int(done.value.code or 0)


def served(storage: str, folder: RunFolder, host: str = "", **about: Any) -> None:
    """The record of a deployment of a run's model."""
    deployed = [{"model": "elsewhere"}, {"model": f"{folder.uri}/model", "run": folder.name}]
    record = {**about, "deployed": deployed}
    RunFolder(storage, ".serving").write(f"{host or socket.gethostname()}-8000.json", record)


# ---------------------------------------------------------------- the manifest


def test_a_manifest_says_with_what_and_by_what_command_the_run_was_made(storage: str) -> None:
    told = make(storage, "one").read("run.json")
    assert told["argv"] == sys.orig_argv
    assert told["host"]["name"] == socket.gethostname()
    assert told["host"]["cpu"]
    mine = psutil.Process().cpu_affinity() if sys.platform == "linux" else range(psutil.cpu_count())
    assert told["host"]["cores"] == len(mine)
    assert told["host"]["memory_bytes"] > 2**28
    assert isinstance(told["host"]["accelerators"], list)
    assert told["versions"]["python"] == sys.version.split()[0]
    assert told["parents"] == {}
    assert (told["git"] is None) == (told["dirty"] is None)


def test_a_stage_has_its_times_and_what_was_not_as_at_first(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(storage, "one")
    with pytest.raises(KeyError), artifacts.stage(folder, "train"):
        _ = folder.read("run.json")["stages"]["train"]["ended"]  # not yet
    first = folder.read("run.json")["stages"]["train"]
    assert first.keys() == {"started", "seconds"}  # it did not come to its end
    monkeypatch.setattr(sys, "orig_argv", ["another", "command"])
    with artifacts.stage(folder, "train") as entry:
        entry["digest"] = "d"
    last = folder.read("run.json")["stages"]["train"]
    assert (last["argv"], last["digest"]) == (["another", "command"], "d")
    assert "versions" not in last
    assert last["started"] == first["started"] <= last["ended"]
    assert last["seconds"] >= first["seconds"]


def test_a_models_digest_is_what_sha256sum_says_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    without = manifest.model_digest(tmp_path)
    assert without == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    assert manifest.model_digest(tmp_path, "sha256:noted") == "sha256:noted"
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = manifest.model_digest(tmp_path, "sha256:noted")
    assert digest == f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    (tmp_path / "model-2.safetensors").write_bytes(b"more")
    assert manifest.model_digest(tmp_path) != digest


def test_a_base_models_digest_changes_with_any_name_or_content_that_matters(tmp_path: Path) -> None:
    def written(files: dict[str, str]) -> str:
        for old in tmp_path.iterdir():
            old.unlink()
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return manifest.base_digest(tmp_path)

    files = {"config.json": "{}", "model.safetensors": "w", "vocab.txt": "a"}
    same = written(files)
    assert written({**dict(reversed(files.items())), "README.md": "a card"}) == same
    others = [{**files, name: "other"} for name in files] + [{**files, "tokenizer.json": ""}]
    assert len({same, *map(written, others)}) == 5


def test_what_an_older_version_left_is_read(storage: str) -> None:
    folder = RunFolder(storage, "old")
    task = config.load("smoke", "laptop").task.model_dump(mode="json")
    created = "2026-01-01T00:00:00+00:00"
    told = {"run": "old", "created": created, "task_name": "smoke", "task": task}
    folder.write("run.json", {**told, "git": "abc+changes", "versions": {"ray": "1"}})
    folder.write("tune/result.json", {"eval_accuracy": 0.5, "wall_s": 3.0})
    folder.write("train/metrics.json", {"eval_accuracy": 0.75, "wall_s": 4.0})
    read = runs.read(folder)
    assert (read["git"], read["dirty"]) == ("abc", True)
    (line,) = runs.listed(storage)
    assert (line["stages"], line["score"], line["seconds"]) == (["tune", "train"], 0.75, 7.0)
    folder.write("run.json", {})  # not even a task
    assert runs.listed(storage)[0]["run"] == "old"


# ---------------------------------------------------------------- ls, show, compare


def test_runs_are_listed_the_newest_first(storage: str, capsys: Any) -> None:
    trained(storage, "b", 0.5, created="2026-03-01T00:00:00")
    trained(storage, "a", 0.7512, created="2026-03-02T00:00:00")
    make(storage, "c", created="2026-02-02T00:00:00")
    RunFolder(storage, ".cache").write("no-run.json", {})
    for command in (["runs"], ["runs", "ls"]):
        assert workloads(*command, "--storage", storage, "--json") == 0
        found = json.loads(capsys.readouterr().out)["runs"]
        assert [one["run"] for one in found] == ["a", "b", "c"]
        assert (found[0]["stages"], found[0]["score"]) == (["train"], 0.7512)
        assert (found[2]["stages"], found[2]["score"]) == ([], None)
    assert workloads("runs", "--storage", storage) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == ["a", "2026-03-02", "00:00:00", "smoke", "train", "accuracy"]
    assert len(lines) == 4


def test_a_storage_without_runs_says_so(tmp_path: Path, capsys: Any) -> None:
    assert workloads("runs", "--storage", str(tmp_path / "none")) == 0
    assert "no runs in" in capsys.readouterr().out
    assert workloads("runs", "--storage", str(tmp_path), "show", "x") == 2
    assert "come after 'show'" in capsys.readouterr().err


def test_a_manifest_is_shown_to_people_and_to_programs(storage: str, capsys: Any) -> None:
    folder = trained(storage, "one", 0.5)
    assert workloads("runs", "show", "one", "--storage", storage) == 0
    assert yaml.safe_load(capsys.readouterr().out) == runs.read(folder)
    assert workloads("runs", "show", "one", "--storage", storage, "--json") == 0
    assert json.loads(capsys.readouterr().out) == runs.read(folder)


def test_two_runs_are_compared_by_all_that_differs(storage: str, capsys: Any) -> None:
    trained(storage, "a", 0.5).update("run.json", git="abc", dirty=False)
    b = trained(storage, "b", 0.75, "task.train.lr=0.5", "target.train.workers=3")
    told = b.read("run.json")
    b.update("run.json", versions={**told["versions"], "torch": "0.1"}, git="def", dirty=False)
    b.update("run.json", data={"fingerprint": "g", "train_rows": 60})
    assert workloads("runs", "compare", "a", "b", "--storage", storage, "--json") == 0
    differs = json.loads(capsys.readouterr().out)["differs"]
    differs.pop("stages.train.seconds", None)  # which may be equal
    assert differs.keys() == {
        *("task.train.lr", "target.train.workers", "versions.torch", "git", "data.fingerprint"),
        *("stages.train.scores.eval_accuracy", "stages.train.digest"),
    }
    assert differs["task.train.lr"][1] == 0.5
    assert differs["git"] == ["abc", "def"]
    assert workloads("runs", "compare", "a", "b", "--storage", storage) == 0
    assert "data.fingerprint" in capsys.readouterr().out
    assert workloads("runs", "compare", "a", "a", "--storage", storage) == 0
    assert capsys.readouterr().out == "nothing differs\n"


@pytest.mark.parametrize("command", ["show", "rerun", "rm", "compare"])
def test_an_unknown_run_is_answered_with_those_called_alike(
    storage: str, command: str, capsys: Any
) -> None:
    for name in ("smoke-20260301-101010", "sst2-20260301"):
        make(storage, name)
    args = ["smoke-20260301-101011", *(["sst2-20260301"] if command == "compare" else [])]
    assert workloads("runs", command, *args, "--storage", storage) == 2
    said = capsys.readouterr().err
    assert "smoke-20260301-101011: no such run in" in said
    assert "did you mean 'smoke-20260301-101010'?" in said


@pytest.mark.parametrize(
    "name", ["..", ".", "", ".serving", "../runs/one", "one/model", "a" * 255, "ä" * 200]
)
def test_what_is_not_a_run_is_not_removed(storage: str, name: str) -> None:
    folder = trained(storage, "one", 0.5)
    folder.write("model/run.json", {})
    RunFolder(storage, ".serving").write("host-8000.json", {})
    with pytest.raises(UserError, match="no such run in"):
        runs.find(storage, name)
    assert workloads("runs", "rm", "--yes", "--storage", storage, "--", name) == 2
    assert folder.has("run.json")


# ---------------------------------------------------------------- rm


def test_a_run_is_removed_whole_and_alone(storage: str, capsys: Any) -> None:
    folder, other = trained(storage, "one", 0.5), make(storage, "one-more")
    folder.write("train/checkpoints/deep/notes.json", {})
    assert workloads("runs", "rm", "one", "--storage", storage) == 2  # nobody to ask
    assert "give --yes" in capsys.readouterr().err
    assert folder.has("run.json")
    assert workloads("runs", "rm", "one", "--storage", storage, "--yes") == 0
    assert folder.files.get_file_info(folder.path).type == fs.FileType.NotFound
    assert other.has("run.json")


@pytest.mark.parametrize(("answer", "stays"), [("n\n", True), ("y\n", False)])
def test_on_a_terminal_it_is_asked_first(
    tmp_path: Path, command_on_a_terminal: Callable[..., int], answer: str, stays: bool
) -> None:
    folder = make(str(tmp_path), "one")
    command_on_a_terminal(answer, "runs", "rm", "one", "--storage", str(tmp_path))
    assert folder.has("run.json") == stays


@pytest.fixture
def command_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command whose standard input is a terminal on which somebody types."""

    def run(typed: str, *args: str) -> int:
        ours, its = os.openpty()
        os.write(ours, typed.encode())
        with os.fdopen(its) as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            code = workloads(*args)
        os.close(ours)
        return code

    return run


def test_what_is_served_is_not_removed_until_it_is_taken_down(storage: str) -> None:
    folder = trained(storage, "one", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as ray:  # what answers as a Ray would
        address = f"127.0.0.1:{ray.getsockname()[1]}"
        served(storage, folder, ray=address)
        with pytest.raises(UserError, match=r"is served at .*-8000; take that down first: "):
            runs.remove(folder, storage)
    served(storage, folder)  # on a cluster that was joined
    with pytest.raises(UserError, match="serve --down target.serve.port=8000"):
        runs.remove(folder, storage)
    served(storage, folder, ray=None)
    served(storage, folder, host="another", ray=address)  # which cannot be known from here
    with pytest.raises(UserError, match="another-8000"):
        runs.remove(folder, storage)
    served(storage, folder, host="another", ray=None)
    runs.remove(folder, storage)
    assert not folder.has("run.json")


def test_a_record_whose_ray_was_killed_keeps_nothing(storage: str) -> None:
    folder = trained(storage, "one", 0.5)
    served(storage, folder, ray=f"127.0.0.1:{free_port()}")
    runs.remove(folder, storage)
    assert not folder.has("run.json")


# ---------------------------------------------------------------- rerun


def train(task: Task, tmp_path: Path, *args: str) -> None:
    path = tmp_path / "reviews.yaml"
    path.write_text(yaml.safe_dump(task.model_dump(mode="json")))
    storage = f"target.ray.storage={tmp_path / 'runs'}"
    flags = ["target.train.workers=1", "target.train.cpus_per_worker=1", storage]
    assert workloads("train", "--task", str(path), "--run", "one", *args, *flags) == 0


def losses(folder: RunFolder) -> list[float]:
    history = folder.read("train/metrics.json")["history"]
    return [one[key] for one in history for key in ("loss", "eval_loss")]


def test_a_run_is_repeated_from_its_manifest_with_equal_losses(
    tiny: Task, tmp_path: Path, capsys: Any
) -> None:
    best = tmp_path / "runs/sweep/tune/best.json"
    best.parent.mkdir(parents=True)
    best.write_text('{"train": {"lr": 0.002}}')
    (tmp_path / "runs/sweep/run.json").write_text('{"run": "sweep"}')
    train(tiny, tmp_path, "--params", str(best))
    storage = str(tmp_path / "runs")
    assert workloads("runs", "rerun", "one", "--storage", storage, "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out[said.out.rindex('{"stage"') :])
    assert (result["run"], result["rerun_of"]) == ("one-rerun", "one")
    assert "the weights are those of one" in said.err
    one, again = runs.find(storage, "one"), runs.find(storage, "one-rerun")
    assert losses(again) == losses(one)
    told, copied = runs.read(one), runs.read(again)
    assert told["parents"] == {"params": "sweep"}
    assert copied["parents"] == {"params": "sweep", "rerun_of": "one"}
    weights = (tmp_path / "runs/one/model/model.safetensors").read_bytes()
    assert told["stages"]["train"]["digest"] == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert again.read("train/params.json")["params"] == {"train.lr": 0.002}
    assert {key.partition(".")[0] for key in runs.compare(one, again)} <= {"stages", "parents"}


def test_a_run_whose_rows_have_changed_is_not_repeated(
    tiny: Task, rows_csv: Any, tmp_path: Path, capsys: Any
) -> None:
    rows = rows_csv(40)
    train(changed(tiny, **{"data.train": str(rows), "train.epochs": 1}), tmp_path)
    rows.write_text(rows.read_text().replace("warm", "cold"))
    assert workloads("runs", "rerun", "one", "--storage", str(tmp_path / "runs")) == 2
    assert "run 'one' had other rows (fingerprint" in capsys.readouterr().err
    assert [f.name for f, _ in artifacts.all_runs(str(tmp_path / "runs"))] == ["one"]


def test_what_is_not_the_same_here_is_said() -> None:
    now = manifest.made()
    assert runs.unlike({**now, "dirty": False}) == []
    was = {"versions": {**now["versions"], "torch": "0.1"}, "git": "abc", "dirty": True}
    said = "\n".join(runs.unlike({**was, "host": {**now["host"], "cpu": "a Z80"}}))
    assert "torch was 0.1, here it is" in said
    assert "the commit was abc" in said
    assert "changes that its commit does not have" in said
    assert "the machine's cpu: a Z80, here" in said


def test_a_run_that_has_done_nothing_or_that_this_version_cannot_read_is_not_repeated(
    storage: str,
) -> None:
    with pytest.raises(UserError, match="nothing to repeat"):
        runs.again(make(storage, "one"), storage)
    strange = trained(storage, "two", 0.5)
    task = strange.read("run.json")["task"]
    strange.update("run.json", task={**task, "model": {"depth": 3}})
    with pytest.raises(UserError, match="does not take its task"):
        runs.again(strange, storage)


def test_what_is_repeated_is_named_anew_each_time(storage: str) -> None:
    folder = trained(storage, "one", 0.5)
    names = []
    for _ in range(2):
        run, stages, _, name = runs.again(folder, storage)
        assert isinstance(run, Run)
        assert (stages, run.target.ray.storage) == (["train"], storage)
        names.append(make(storage, name).name)
    assert names == ["one-rerun", "one-rerun-2"]


# ---------------------------------------------------------------- what a replica tells


def test_a_served_run_is_told_by_its_name_and_its_weights(served: Path, tmp_path: Path) -> None:
    from workloads.engine import read_info
    from workloads.replica import lineage

    folder = shutil.copytree(served, tmp_path / "model")
    notes = {"run": "mine", "pretrained": "owner/name@abc", "max_tokens": 8}
    (folder / "workloads.json").write_text(json.dumps(notes))
    told = lineage(str(folder), folder, read_info(folder, "mine"))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert told["digest"] == f"sha256:{digest}"
    assert (told["version"], told["run"]) == ("mine", "mine")
    assert (told["pretrained"], told["license"]) == ("owner/name@abc", None)


CARDS = {
    "---\nlanguage: en\nlicense: apache-2.0  # free\n---\n# A model\n": "apache-2.0",
    '---\r\nlicense: "mit"\r\n---\r\n': "mit",
    "---\nlicense:\n- cc-by-4.0\n---\n": "cc-by-4.0",
    "---\nlanguage: en\n---\nlicense: none of the front matter\n": None,
    "license: mit\n": None,
}


@pytest.mark.parametrize("card", CARDS)
def test_a_model_of_the_hub_is_told_by_its_commit_and_its_license(
    served: Path, tmp_path: Path, card: str
) -> None:
    from workloads.engine import read_info
    from workloads.replica import lineage

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = shutil.copytree(served, tmp_path / "snapshots" / commit)
    (folder / "README.md").write_text(card, newline="")
    told = lineage(f"owner/name@{commit}", folder, read_info(folder, "name"))
    assert (told["version"], told["run"], told["license"]) == (commit, None, CARDS[card])
    assert lineage(str(folder), folder, read_info(folder, "name"))["version"] == "-"


def test_no_path_of_this_machine_is_told() -> None:
    from workloads.sources import public_name

    assert public_name("/home/somebody/secret/base/model") == "base"
    assert public_name("~/base") == "base"
    for name in ("owner/name@abc", "package:name/model", None):
        assert public_name(name) == name
