"""The run folder: what each stage leaves for the next, on any filesystem that pyarrow reaches.

<storage>/<run>/ run.json tune/ train/ model/ report.html. Everything is written aside and then
renamed; object
stores, which have no rename, get the file that marks a folder complete last.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import manifest
from .config import Run, UserError, changed_keys
from .sources import filesystem, is_remote, unreachable

# A model folder is complete when this is there.
_MODEL_MARK = "config.json"
_NO_RENAME = ("s3", "gcs", "abfs")
SCORES = ("eval_accuracy", "eval_f1", "eval_loss")


class RunFolder:
    """One run on its storage: reads and writes by relative path, never half."""

    def __init__(self, storage: str, name: str) -> None:
        self.name = name
        root = (
            storage.rstrip("/") if is_remote(storage) else str(Path(storage).expanduser().resolve())
        )
        self.uri = f"{root}/{name}"
        self.files, self.path = filesystem(self.uri)

    def has(self, inner: str) -> bool:
        """Whether a file is there."""
        return bool(self.files.get_file_info(f"{self.path}/{inner}").is_file)

    def names(self, inner: str) -> list[str]:
        """The JSON files of a folder."""
        from pyarrow import fs

        found = fs.FileSelector(f"{self.path}/{inner}", allow_not_found=True)
        names = [info.base_name for info in self.files.get_file_info(found)]
        return [name for name in names if name.endswith(".json")]

    def read_text(self, inner: str) -> str:
        """A file's text."""
        with self.files.open_input_stream(f"{self.path}/{inner}") as file:
            return file.read().decode()

    def read(self, inner: str) -> dict[str, Any]:
        """A JSON file; {} when it is not there. Raises UserError where it is spoiled."""
        if not self.has(inner):
            return {}
        try:
            found = json.loads(self.read_text(inner))
        except ValueError as e:
            found = str(e)
        if not isinstance(found, dict):
            raise UserError(f"{self.uri}/{inner} is not what a run has there: {str(found)[:100]}")
        return found

    def write_text(self, inner: str, text: str) -> None:
        """Writes aside, then renames."""
        path, raw = f"{self.path}/{inner}", text.encode()
        aside = path if self.files.type_name in _NO_RENAME else f"{path}.{uuid.uuid4().hex[:8]}"
        self.files.create_dir(path.rpartition("/")[0], recursive=True)
        with self.files.open_output_stream(aside) as file:
            file.write(raw)
        if aside != path:
            self.files.move(aside, path)

    def write(self, inner: str, tree: dict[str, Any]) -> None:
        """A JSON file, whole or not at all."""
        text = json.dumps(tree, indent=2, ensure_ascii=False)
        # Numbers side by side: a confusion matrix would have a line for each.
        text = re.sub(r"\[\n\s+([^\[\]{}\"]*?)\n\s+\]", lambda m: f"[{_flat(m[1])}]", text)
        self.write_text(inner, text + "\n")

    def update(self, inner: str, **more: Any) -> None:
        """Adds keys to a JSON file."""
        self.write(inner, {**self.read(inner), **more})

    def put(self, local: Path, inner: str) -> None:
        """Copies a folder to one that is not there yet; aside first, where that can be renamed."""
        from pyarrow import fs

        final = f"{self.path}/{inner}"
        renames = self.files.type_name not in _NO_RENAME
        aside = f"{final}.{uuid.uuid4().hex[:8]}" if renames else final
        self.files.create_dir(aside, recursive=True)
        try:
            fs.copy_files(str(local), aside, destination_filesystem=self.files)
        except OSError:
            self.files.delete_dir(aside)
            raise
        if renames:
            self.files.move(aside, final)

    def put_model(self, local: Path) -> None:
        """Copies a saved model to model/, replacing an older one only when the new one is whole."""
        from pyarrow import fs

        final = f"{self.path}/model"
        if self.files.type_name in _NO_RENAME:
            if self.has_model():
                self.files.delete_file(f"{final}/{_MODEL_MARK}")
            if self.files.get_file_info(final).type != fs.FileType.NotFound:
                self.files.delete_dir_contents(final)
            with tempfile.TemporaryDirectory() as unmarked:
                unmark = shutil.ignore_patterns(_MODEL_MARK)
                shutil.copytree(local, unmarked, dirs_exist_ok=True, ignore=unmark)
                fs.copy_files(unmarked, final, destination_filesystem=self.files)
            self.write_text(f"model/{_MODEL_MARK}", (local / _MODEL_MARK).read_text())
            return
        old = f"{final}.{uuid.uuid4().hex[:8]}.old"
        new = old.replace(".old", ".new")
        self.put(local, new.removeprefix(f"{self.path}/"))
        if self.files.get_file_info(final).type != fs.FileType.NotFound:
            self.files.move(final, old)
        self.files.move(new, final)
        if self.files.get_file_info(old).type != fs.FileType.NotFound:
            self.files.delete_dir(old)

    def has_model(self) -> bool:
        """Whether there is a whole model."""
        return self.has(f"model/{_MODEL_MARK}")


def check_writable(storage: str) -> None:
    """Raises UserError where nothing can be written to a folder or URI; before anything long
    begins."""
    if not is_remote(storage):
        local = Path(storage).expanduser().absolute()
        there = next(one for one in (local, *local.parents) if os.path.exists(one))
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UserError(
                f"target.ray.storage '{storage}' cannot be written to ({there}). Give a folder "
                "of yours: target.ray.storage=FOLDER"
            )
        return
    folder, name = RunFolder(storage, ".cache"), f"probe-{uuid.uuid4().hex}"
    try:
        folder.write_text(name, "")
        folder.files.delete_file(f"{folder.path}/{name}")
    except OSError as e:
        raise unreachable(f"target.ray.storage '{storage}' cannot be written to", e) from None


def local_copy(uri: str) -> Path:
    """A folder as a local path: itself, or downloaded once for this process."""
    return _download(uri) if is_remote(uri) else Path(uri)


@functools.cache
def _download(uri: str) -> Path:
    from pyarrow import fs

    files, path = filesystem(uri)
    local = tempfile.mkdtemp(prefix="workloads-model-")
    fs.copy_files(path, local, source_filesystem=files)
    return Path(local)


def _flat(numbers: str) -> str:
    return " ".join(numbers.split())


def create(
    storage: str, run: Run, name: str | None = None, parents: dict[str, str] | None = None
) -> RunFolder:
    """A new run with its run.json; without a name it is called after the task and the time (UTC).
    `parents` are the runs that it comes from, by what it has of them."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    # Of letters that --run takes: a task's file may have others in its name.
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", run.task_name).strip("._-") or "run"
    folder = RunFolder(storage, name or f"{called}-{stamp}")
    while name is None and folder.has("run.json"):  # two runs in one second
        folder = RunFolder(storage, f"{called}-{stamp}-{uuid.uuid4().hex[:4]}")
    folder.write(
        "run.json",
        {
            "run": folder.name,
            "created": manifest.now(),
            "task_name": run.task_name,
            "target_name": run.target_name,
            "seed": run.task.train.seed,
            "task": run.task.model_dump(mode="json"),
            "target": run.target.model_dump(mode="json"),
            "parents": parents or {},
            **manifest.made(),
        },
    )
    return folder


def open_existing(storage: str, run: Run, name: str) -> RunFolder | None:
    """The run of that name, which resumes, or None; raises UserError when its Task is another
    one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--run {name}: a run's name has letters, digits, '.', '_' and '-' only")
    folder = RunFolder(storage, name)
    if not folder.has("run.json"):
        return None
    old, new = folder.read("run.json")["task"], run.task.model_dump(mode="json")
    with contextlib.suppress(ValueError):  # keys that came later had their defaults then
        old = type(run.task).model_validate(old).model_dump(mode="json")
    if keys := changed_keys(old, new):
        raise UserError(
            f"--run {name} was made with another task; these keys differ: {', '.join(keys)}. "
            "Leave --task and the task.* overrides out to resume it, or give another --run name"
        )
    return folder


@contextlib.contextmanager
def stage(folder: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """Writes into run.json when a stage began and ended, its seconds, and what was not as when the
    run was made. What is put into the yielded entry is kept too."""
    told = folder.read("run.json")
    old = told.get("stages", {}).get(name, {})
    other = {key: value for key, value in manifest.made().items() if told.get(key) != value}
    entry = {"started": old.get("started", manifest.now()), **other}
    before_s, began = old.get("seconds", 0.0), time.perf_counter()

    def write() -> None:
        entry["seconds"] = round(before_s + time.perf_counter() - began, 2)
        stages = folder.read("run.json").get("stages", {})
        folder.update("run.json", stages={**stages, name: entry})

    write()
    try:
        yield entry
    except BaseException:
        with contextlib.suppress(OSError):  # the storage's, which is why
            write()
        raise
    entry["ended"] = manifest.now()
    write()


def newest(storage: str, task_name: str, wanted: Callable[[RunFolder], bool]) -> RunFolder | None:
    """The run of a task that was created last among those that are `wanted`."""
    found = [one for one in all_runs(storage) if one[1].get("task_name") == task_name]
    found.sort(key=lambda one: str(one[1].get("created", "")), reverse=True)
    return next((folder for folder, _ in found if wanted(folder)), None)


def all_runs(
    storage: str, tell: Callable[[str], None] = lambda _: None
) -> list[tuple[RunFolder, dict[str, Any]]]:
    """Every run in a storage, with its run.json. One that cannot be read, as another user's or one
    that a disk has spoiled, is told and left out: it keeps nobody from the others."""
    from pyarrow import fs

    files, path = filesystem(storage)
    if files.get_file_info(path).type != fs.FileType.Directory:
        return []
    infos = files.get_file_info(fs.FileSelector(path))
    found = []
    for name in (info.base_name for info in infos if info.type == fs.FileType.Directory):
        folder = RunFolder(storage, name)
        try:
            if folder.has("run.json"):
                found.append((folder, folder.read("run.json")))
        except (OSError, UserError) as e:
            tell(f"warning: {name} is left out: {e}")
    return found
