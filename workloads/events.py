"""TensorBoard's event files of a run, as training and trials go: `tensorboard --logdir runs` shows
them beside those of all runs.

<run>/tensorboard/ train/ tune/<trial>/
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .artifacts import RunFolder
from .sources import is_remote

_FOLDER = "tensorboard"


class Events:
    """Writes what is told. A remote storage, where nothing can be added to a file, gets the files
    whenever they are `kept`. Files that cannot be written are given up: no run ends for them."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.folder, self.say, self.given_up = folder, say, False
        self.aside = tempfile.mkdtemp(prefix="workloads-events-") if is_remote(folder.uri) else None
        self.root = Path(self.aside or f"{folder.path}/{_FOLDER}")
        self.files: dict[str, _File] = {}

    def training(self, metrics: dict[str, Any]) -> None:
        """Where training stands."""
        self._try(lambda: self._file("train").add(metrics, metrics["step"]))

    def trial(self, row: dict[str, Any], point: dict[str, Any] | None = None) -> None:
        """A trial has begun, has been evaluated, or is over."""
        self._try(lambda: self._trial(f"tune/{row['trial']}", row, point))

    def keep(self) -> None:
        """Brings all that was written to the run's storage."""
        if self.aside:
            self._try(self._upload)

    def _trial(self, name: str, row: dict[str, Any], point: dict[str, Any] | None) -> None:
        if point is not None:
            file = self._file(name)
            if file.last is None:
                file.begin(row["drawn"], point)
            file.add(point, point["evals"])
        elif row["state"] != "running" and name in self.files:
            self.files.pop(name).end(row["state"] != "failed")

    def _upload(self) -> None:
        from pyarrow import fs

        files, path = self.folder.files, f"{self.folder.path}/{_FOLDER}"
        fs.copy_files(self.aside, path, destination_filesystem=files)

    def close(self) -> None:
        """Nothing is written any more."""
        self.keep()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.writer.close()
        self.files.clear()
        if self.aside:
            shutil.rmtree(self.aside, ignore_errors=True)

    def _file(self, name: str) -> "_File":
        if name not in self.files:
            self.files[name] = _File(self.root / name)
        return self.files[name]

    def _try(self, what: Callable[[], None]) -> None:
        if self.given_up:
            return
        try:
            what()
        except OSError as e:
            self.given_up = True
            self.say(f"warning: no more event files for TensorBoard: {e}")


class _File:
    """One event file, each event on the disk at once: its own writer is a thread that, when the
    disk is full, dies, and then whoever writes waits for ever."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        # Its names are of the second: what is of the same one is kept, and read in its order.
        self.writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self.last: int | None = None

    def add(self, metrics: dict[str, Any], step: int) -> None:
        """Numbers at a step. Where steps are done again, those of before are taken back."""
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if self.last is None or step <= self.last:
            self._write(step, session_log=SessionLog(status=SessionLog.START))
        self.last = step
        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and key not in ("step", "steps", "evals")
        ]
        self._write(step, summary=Summary(value=values))
        self.writer.flush()

    def begin(self, drawn: dict[str, Any], point: dict[str, Any]) -> None:
        """What a trial tries, for the table of hyperparameters."""
        from tensorboardX.summary import hparams

        scores = {key: 0 for key in point if key.startswith("eval_")}
        about, start, self.over = hparams(drawn, scores)
        self._write(0, summary=about)
        self._write(0, summary=start)

    def end(self, well: bool) -> None:
        """A trial is over."""
        if well:
            self._write(self.last or 0, summary=self.over)
        self.writer.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(wall_time=time.time(), step=step, **what))
