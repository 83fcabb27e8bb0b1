"""Checkpoints are used whole or not at all, and the one before the latest is always there."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from workloads import checkpoint, loop, model
from workloads.artifacts import RunFolder
from workloads.config import Task

HISTORY = [{"step": 3, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny: Task, prepared: Any) -> Path:
    """A checkpoint, as a training writes it."""
    net = model.build(prepared.base, tiny.model, seed=1)
    point = next(loop.train(net, prepared.rows, prepared.held_out, tiny.train, loop.Place()))
    local = tmp_path_factory.mktemp("written")
    checkpoint.write(local, net, point, HISTORY)
    return local


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> RunFolder:
    """A run with checkpoints after 3 and 4 steps."""
    for step in (3, 4):
        shutil.copytree(written, tmp_path / "run" / checkpoint.FOLDER / checkpoint.name_of(step))
    return RunFolder(str(tmp_path), "run")


def latest(folder: RunFolder, told: list[str]) -> dict[str, Any] | None:
    return checkpoint.latest(folder, partial(checkpoint.load, device="cpu"), told.append)


def test_a_whole_checkpoint_is_used_without_a_word(folder: RunFolder):
    told: list[str] = []
    state = latest(folder, told)
    assert state is not None
    assert state["history"] == HISTORY
    assert {"model", "optimizer", "step", "meter"} <= state.keys()
    assert (told, checkpoint.names(folder)) == ([], ["checkpoint_00000004", "checkpoint_00000003"])


def test_what_a_kill_left_of_a_copy_is_no_checkpoint_and_goes(folder: RunFolder):
    kept = checkpoint.names(folder)
    half = Path(folder.path) / checkpoint.FOLDER / "checkpoint_00000005.0badcafe"
    half.mkdir()
    assert checkpoint.names(folder) == kept
    checkpoint.forget_halves(folder)
    assert not half.exists()
    assert checkpoint.names(folder) == kept


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


FILES = ("model/model.safetensors", "model/config.json", "state.pt", "notes.json", "SHA256SUMS")
HARMS = [(name, harm) for name in FILES for harm in (cut, flip, Path.unlink)]


@pytest.mark.parametrize(("name", "harm"), [*HARMS, ("SHA256SUMS", cut_last_line)])
def test_a_damaged_checkpoint_is_told_and_removed_and_the_one_before_is_used(
    folder: RunFolder, name: str, harm: Callable[[Path], Any]
):
    path = Path(folder.path) / checkpoint.FOLDER / "checkpoint_00000004" / name
    if (name, harm) == ("SHA256SUMS", cut):  # its last line's end is not worth a checkpoint
        harm = partial(Path.write_text, data="")
    harm(path)
    told: list[str] = []
    assert latest(folder, told) is not None
    assert checkpoint.names(folder) == ["checkpoint_00000003"]
    assert len(told) == 1
    assert told[0].startswith("warning: checkpoint_00000004 is damaged (")
    assert name in told[0] or name == "SHA256SUMS"


def test_without_a_whole_checkpoint_there_is_none(folder: RunFolder):
    for name in checkpoint.names(folder):
        shutil.rmtree(Path(folder.path) / checkpoint.FOLDER / name / "model")
    told: list[str] = []
    assert latest(folder, told) is None
    assert len(told) == 2
    assert checkpoint.names(folder) == []


@pytest.mark.parametrize(("keep", "left"), [(1, [9, 8, 2]), (2, [9, 8, 4, 2])])
def test_the_best_and_the_latest_two_stay(tmp_path: Path, keep: int, left: list[int]):
    folder = RunFolder(str(tmp_path), "run")
    for step in (2, 4, 6, 8, 9):
        (tmp_path / "run" / checkpoint.FOLDER / checkpoint.name_of(step)).mkdir(parents=True)
    checkpoint.prune(folder, keep, {2: 0.9, 4: 0.9, 6: 0.1, 7: 1.0, 8: 0.5})
    assert checkpoint.names(folder) == [checkpoint.name_of(step) for step in left]
    assert checkpoint.best_first(folder, {2: 0.9, 8: 0.95, 7: 1.0}) == [
        checkpoint.name_of(8),
        checkpoint.name_of(2),
    ]
