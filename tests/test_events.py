"""Event files, read back by TensorBoard itself."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from workloads.artifacts import RunFolder
from workloads.events import Events


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of all that TensorBoard shows of a folder."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return [(one.step, round(one.value, 4)) for one in read.Scalars(tag)]


def told(storage: str, said: list[str] | None = None) -> Events:
    return Events(RunFolder(storage, "run"), (said if said is not None else []).append)


def point(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "steps": 9, "loss": loss, "eval_f1": None}


def test_what_training_does_again_takes_the_place_of_what_it_did_before(tmp_path: Path) -> None:
    first = told(str(tmp_path))
    for step in (1, 2, 3):
        first.training(point(step, step / 10))
    # No end: it was killed. It goes on from step 2, and once more within the same process.
    second = told(str(tmp_path))
    for step, loss in ((2, 0.7), (3, 0.8), (3, 0.9), (4, 1.0)):
        second.training(point(step, loss))
    second.close()
    shown = scalars(tmp_path / "run/tensorboard/train", "loss")
    assert shown == [(1, 0.1), (2, 0.7), (3, 0.9), (4, 1.0)]


def test_a_trial_has_its_evaluations_and_what_it_tries(tmp_path: Path) -> None:
    events = told(str(tmp_path))
    row = {"trial": "abc", "drawn": {"train.lr": 0.01, "model.layers": 2}, "state": "running"}
    events.trial(row)
    for evals, loss in ((1, 0.5), (2, 0.25)):
        events.trial(row, {"evals": evals, "loss": loss, "eval_loss": loss})
    events.trial({**row, "state": "finished"})
    events.close()
    folder = tmp_path / "run/tensorboard/tune/abc"
    assert scalars(folder, "eval_loss") == [(1, 0.5), (2, 0.25)]
    read = EventAccumulator(str(folder))
    read.Reload()
    raw = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(raw).session_start_info
    assert {key: value.number_value for key, value in start.hparams.items()} == row["drawn"]
    assert read.SummaryMetadata("_hparams_/session_end_info")


def test_a_remote_storage_has_them_at_the_end_of_a_stage(tmp_path: Path) -> None:
    events = told(f"file://{tmp_path}")
    events.training(point(1, 0.5))
    assert not list(tmp_path.rglob("events*"))
    events.keep()
    assert scalars(tmp_path / "run/tensorboard/train", "loss") == [(1, 0.5)]
    events.training(point(2, 0.25))
    events.close()
    assert scalars(tmp_path / "run/tensorboard/train", "loss") == [(1, 0.5), (2, 0.25)]
    assert events.aside is not None
    assert not Path(events.aside).exists()


def test_a_place_that_cannot_be_written_to_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    said: list[str] = []
    events = told(str(tmp_path), said)
    for step in (1, 2):
        events.training(point(step, 0.5))
    events.close()
    assert len(said) == 1
    assert said[0].startswith("warning: no more event files for TensorBoard: ")


@pytest.mark.parametrize("bad", [float("nan"), 1e300])
def test_any_number_may_be_told(bad: float, tmp_path: Path) -> None:
    said: list[str] = []
    events = told(str(tmp_path), said)
    events.training(point(1, bad))
    events.close()
    assert said == []
