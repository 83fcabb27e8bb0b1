"""The run folder, on a local disk, behind a URI and on a filesystem that is no disk at all."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from workloads import artifacts, config, sources
from workloads.artifacts import RunFolder
from workloads.config import Run, UserError


@pytest.fixture
def run() -> Run:
    """What is to be run."""
    return config.load("smoke", "laptop")


@pytest.fixture(params=["path", "uri", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage of each kind; the one in memory has no local path."""
    if request.param == "path":
        return str(tmp_path / "runs")
    if request.param == "uri":
        return f"file://{tmp_path}/runs"
    memory, _ = fs.FileSystem.from_uri("mock:///")
    monkeypatch.setattr(artifacts, "filesystem", lambda uri: (memory, uri.removeprefix("mock:///")))
    return "mock:///runs"


@pytest.fixture
def object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder on what cannot rename and needs no folder before a file."""
    monkeypatch.setattr(artifacts, "_NO_RENAME", ("local",))
    (tmp_path / "bucket/run/model").mkdir(parents=True)
    return RunFolder(str(tmp_path / "bucket"), "run")


def contents(folder: RunFolder) -> list[str]:
    """All files of a run folder."""
    infos = folder.files.get_file_info(fs.FileSelector(folder.path, recursive=True))
    return sorted(i.path.removeprefix(f"{folder.path}/") for i in infos if i.is_file)


def model(path: Path, name: str, *more: str) -> Path:
    """A saved model in which every file says whose it is."""
    path.mkdir()
    for file in ("config.json", "model.safetensors", *more):
        (path / file).write_text(f"{name}'s")
    return path


# ---------------------------------------------------------------- files


def test_what_is_written_is_read(storage: str):
    folder = RunFolder(storage, "run")
    tree = {"a": [1, 2.5, None], "name": "Füße", "nested": {"x": True}}
    folder.write("tune/deep/best.json", tree)
    assert folder.has("tune/deep/best.json")
    assert folder.read("tune/deep/best.json") == tree
    assert "Füße" in folder.read_text("tune/deep/best.json")


def test_what_is_not_there_is_empty(storage: str):
    folder = RunFolder(storage, "run")
    assert not folder.has("run.json")
    assert folder.read("run.json") == {}
    assert not folder.has_model()
    assert artifacts.all_runs(storage) == []


def test_an_update_keeps_the_other_keys(storage: str):
    folder = RunFolder(storage, "run")
    for more in ({"a": 1}, {"b": 2}, {"a": 3}):
        folder.update("run.json", **more)
    assert folder.read("run.json") == {"a": 3, "b": 2}


def test_a_file_that_is_written_again_is_the_only_one(storage: str):
    folder = RunFolder(storage, "run")
    for i in range(3):
        folder.write("run.json", {"i": i})
    assert contents(folder) == ["run.json"]
    assert folder.read("run.json") == {"i": 2}


def test_numbers_of_a_list_stand_side_by_side(storage: str):
    folder = RunFolder(storage, "run")
    tree = {"matrix": [[1, 2], [3, 4.5]], "text": "[\n 1\n]", "words": ["a"], "none": [None, True]}
    folder.write("a.json", tree | {"empty": [], "trees": [{"a": [1]}]})
    assert folder.read("a.json") == tree | {"empty": [], "trees": [{"a": [1]}]}
    assert "    [1, 2],\n    [3, 4.5]\n" in folder.read_text("a.json")


@pytest.mark.parametrize("value", [{1, 2}, "a lone surrogate: \ud800"])
def test_a_write_that_fails_changes_nothing(storage: str, value: Any):
    folder = RunFolder(storage, "run")
    folder.write("run.json", {"old": True})
    with pytest.raises((TypeError, UnicodeEncodeError)):
        folder.write("run.json", {"old": False, "value": value})
    assert contents(folder) == ["run.json"]
    assert folder.read("run.json") == {"old": True}


def test_a_run_folder_knows_its_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    assert RunFolder("runs", "a").uri == f"{tmp_path}/runs/a"
    assert RunFolder("~/runs/", "a").uri == "/somebody/runs/a"
    assert RunFolder("file:///runs/", "a").uri == "file:///runs/a"


# ---------------------------------------------------------------- models


def test_a_model_replaces_an_older_one_wholly(storage: str, tmp_path: Path):
    folder = RunFolder(storage, "run")
    folder.put_model(model(tmp_path / "old", "old", "vocab.txt"))
    assert folder.has_model()
    folder.put_model(model(tmp_path / "new", "new", "tokenizer.json"))
    assert contents(folder) == [
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    ]
    assert {folder.read_text(name) for name in contents(folder)} == {"new's"}
    beside = folder.files.get_file_info(fs.FileSelector(folder.path))
    assert [i.base_name for i in beside] == ["model"]


def test_a_model_that_cannot_be_copied_leaves_the_older_one(storage: str, tmp_path: Path):
    folder = RunFolder(storage, "run")
    folder.put_model(model(tmp_path / "old", "old"))
    with pytest.raises(OSError, match="nowhere"):
        folder.put_model(tmp_path / "nowhere")
    assert folder.has_model()
    assert folder.read_text("model/model.safetensors") == "old's"


def test_a_folder_is_put_whole_or_not_at_all(storage: str, tmp_path: Path):
    folder = RunFolder(storage, "run")
    folder.put(model(tmp_path / "one", "one"), "deep/one")
    assert contents(folder) == ["deep/one/config.json", "deep/one/model.safetensors"]
    with pytest.raises(OSError, match="nowhere"):
        folder.put(tmp_path / "nowhere", "deep/two")
    beside = folder.files.get_file_info(fs.FileSelector(f"{folder.path}/deep"))
    assert [i.base_name for i in beside] == ["one"]


def test_a_folder_without_its_mark_is_no_model(storage: str):
    folder = RunFolder(storage, "run")
    folder.write_text("model/model.safetensors", "half")
    assert not folder.has_model()


def test_a_model_replaces_an_older_one_wholly_on_an_object_store(
    object_store: RunFolder, tmp_path: Path
):
    object_store.put_model(model(tmp_path / "old", "old", "vocab.txt"))
    object_store.put_model(model(tmp_path / "new", "new"))
    assert contents(object_store) == ["model/config.json", "model/model.safetensors"]
    assert {object_store.read_text(name) for name in contents(object_store)} == {"new's"}


def test_half_a_model_is_no_model_on_an_object_store(
    object_store: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks_off(source: str, to: str, **_: Any) -> None:
        Path(to).mkdir(exist_ok=True)
        Path(to, "model.safetensors").write_text("new's, half")
        raise OSError("the network is gone")

    object_store.put_model(model(tmp_path / "old", "old"))
    monkeypatch.setattr(fs, "copy_files", breaks_off)
    with pytest.raises(OSError, match="gone"):
        object_store.put_model(model(tmp_path / "new", "new"))
    assert not object_store.has_model()


def test_putting_a_model_leaves_the_folder_it_came_from_alone(
    object_store: RunFolder, tmp_path: Path
):
    mine = model(tmp_path / "mine", "mine")
    object_store.put_model(mine)
    assert sorted(p.name for p in mine.iterdir()) == ["config.json", "model.safetensors"]


def test_a_local_model_is_used_where_it_is_and_a_remote_one_is_fetched_once(tmp_path: Path):
    mine = model(tmp_path / "mine", "mine")
    assert artifacts.local_copy(str(mine)) == mine
    fetched = artifacts.local_copy(f"file://{mine}")
    assert fetched != mine
    assert (fetched / "config.json").read_text() == "mine's"
    assert artifacts.local_copy(f"file://{mine}") == fetched


# ---------------------------------------------------------------- runs


def test_a_new_run_says_what_it_was_made_of(storage: str, run: Run):
    folder = artifacts.create(storage, run, "mine")
    said = folder.read("run.json")
    assert config.Task.model_validate(said["task"]) == run.task
    assert config.Target.model_validate(said["target"]) == run.target
    assert (said["run"], said["task_name"], said["target_name"]) == ("mine", "smoke", "laptop")
    assert said["seed"] == run.task.train.seed
    assert {"python", "workloads", "ray", "torch"} <= said["versions"].keys()
    assert said["created"].endswith("+00:00")


def test_a_run_without_a_name_has_its_own(storage: str, run: Run):
    made = [artifacts.create(storage, run).name for _ in range(3)]
    assert len(set(made)) == 3
    assert all(name.startswith("smoke-20") for name in made)
    assert sorted(made) == sorted(f.name for f, _ in artifacts.all_runs(storage))


def test_a_run_of_that_name_resumes(storage: str, run: Run):
    assert artifacts.open_existing(storage, run, "mine") is None
    made = artifacts.create(storage, run, "mine")
    found = artifacts.open_existing(storage, run, "mine")
    assert found is not None
    assert found.uri == made.uri


def test_a_run_of_that_name_with_another_target_resumes(storage: str, run: Run):
    artifacts.create(storage, run, "mine")
    elsewhere = config.load("smoke", "cpu-cluster")
    assert artifacts.open_existing(storage, elsewhere, "mine") is not None


def test_a_run_made_before_a_key_existed_resumes(storage: str, run: Run):
    made = artifacts.create(storage, run, "mine")
    told = made.read("run.json")
    del told["task"]["tune"]["confirm_seeds"]  # 1 in this task, which is not the default
    made.write("run.json", told)
    with pytest.raises(UserError, match="these keys differ: tune.confirm_seeds"):
        artifacts.open_existing(storage, run, "mine")
    del told["task"]["data"]["streaming"]
    told["task"]["tune"]["confirm_seeds"] = 1
    made.write("run.json", told)
    assert artifacts.open_existing(storage, run, "mine") is not None


def test_a_run_of_that_name_with_another_task_is_refused_by_its_keys(storage: str, run: Run):
    artifacts.create(storage, run, "mine")
    other = config.load("smoke", "laptop", ["task.train.lr=1e-5", "task.model.layers=2"])
    with pytest.raises(UserError) as e:
        artifacts.open_existing(storage, other, "mine")
    said = str(e.value)
    assert said.startswith("--run mine was made with another task; these keys differ: ")
    assert "differ: model.layers, train.lr. " in said
    assert "another --run name" in said


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", "a b", "ä", ".hidden", "a\n"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, run: Run, name: str):
    with pytest.raises(UserError) as e:
        artifacts.open_existing(str(tmp_path), run, name)
    assert str(e.value).startswith(f"--run {name}: a run's name has letters")


def test_a_run_that_is_spoiled_keeps_nobody_from_the_others(storage: str, run: Run):
    whole = artifacts.create(storage, run, "whole")
    for name, text in (("cut", '{"run": "cu'), ("list", "[]")):
        RunFolder(storage, name).write_text("run.json", text)
        with pytest.raises(UserError, match=f"{name}/run.json is not what a run has"):
            RunFolder(storage, name).read("run.json")
    said: list[str] = []
    assert [f.name for f, _ in artifacts.all_runs(storage, said.append)] == ["whole"]
    assert sorted(line.split(" is left out")[0] for line in said) == [
        "warning: cut",
        "warning: list",
    ]
    newest = artifacts.newest(storage, run.task_name, lambda _: True)
    assert newest is not None
    assert newest.name == whole.name


@pytest.mark.parametrize("name", ["my task", "größe", "..", "-x", "ok.v2"])
def test_a_run_is_called_so_that_it_can_be_gone_on_with(storage: str, run: Run, name: str):
    made = artifacts.create(storage, run._replace(task_name=name))
    again = artifacts.open_existing(storage, run, made.name)
    assert again is not None
    assert again.name == made.name


def test_the_newest_run_is_the_one_created_last(storage: str, run: Run):
    for name, created in (("b", "2026-03-01"), ("a", "2026-03-02"), ("c", "2026-02-03")):
        artifacts.create(storage, run, name).update("run.json", created=created)
    found = artifacts.newest(storage, "smoke", lambda _: True)
    assert found is not None
    assert found.name == "a"


def test_the_newest_run_is_of_this_task_and_has_what_is_wanted(storage: str, run: Run):
    for name, created in (("a", "2026-03-01"), ("b", "2026-03-02"), ("c", "2026-03-03")):
        artifacts.create(storage, run, name).update("run.json", created=created)
    RunFolder(storage, "a").write("tune/best.json", {})
    RunFolder(storage, "c").update("run.json", task_name="sst2")
    RunFolder(storage, "no-run").write("tune/best.json", {})

    def newest(task: str, wanted: Any = lambda _: True) -> str | None:
        found = artifacts.newest(storage, task, wanted)
        return found and found.name

    assert newest("smoke") == "b"
    assert newest("smoke", lambda f: f.has("tune/best.json")) == "a"
    assert newest("sst2") == "c"
    assert newest("docstrings") is None
    assert newest("smoke", RunFolder.has_model) is None


def test_a_run_is_recorded_where_the_package_was_not_installed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    # As in a job that was submitted with --working-dir: the code is there, its metadata is not.
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "workloads":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    folder = artifacts.create(str(tmp_path), run, "mine")
    assert "ray" in folder.read("run.json")["versions"]


def test_run_json_is_for_people_too(tmp_path: Path, run: Run):
    artifacts.create(str(tmp_path), run, "mine")
    text = (tmp_path / "mine/run.json").read_text()
    assert text.startswith('{\n  "run": "mine",\n')
    assert text.endswith("}\n")
    assert json.loads(text)["git"] is None or len(json.loads(text)["git"]) >= 40


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    artifacts.check_writable(str(tmp_path / "runs/that/are/not/there"))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to \(.*/file\)"):
        artifacts.check_writable(str(tmp_path / "file/runs"))
    # As others than root are told.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(UserError, match=r"target.ray.storage=FOLDER"):
        artifacts.check_writable(str(tmp_path / "runs"))


def test_a_storage_that_cannot_be_reached_is_named():
    with pytest.raises(UserError, match=r"nonsense://a/run: cannot be reached"):
        RunFolder("nonsense://a", "run")
    assert sources.is_remote("nonsense://a")
