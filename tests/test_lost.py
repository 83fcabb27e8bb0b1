"""A training loses nothing, whatever dies: no row is repeated or skipped, and the losses are those
of an unbroken run."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import changed, processes, wait_for
from test_train import fit, losses

from workloads import checkpoint
from workloads.config import Target, Task, UserError

pytestmark = pytest.mark.ray

EVERY = {"train.checkpoint_every": "4 steps"}


@pytest.fixture(scope="module")
def long(tiny: Task) -> Task:
    """Long enough to be broken in the middle: 9 steps an epoch, 108 in all."""
    return changed(tiny, **{"train.epochs": 12, "train.global_batch": 6})


@pytest.fixture(scope="module")
def whole(long: Task, laptop: Target, prepared: Any) -> dict[str, Any]:
    """The unbroken run."""
    return fit(long, changed(laptop, **EVERY), prepared, "unbroken")


def same(broken: dict[str, Any], whole: dict[str, Any]) -> None:
    """Every evaluation is there once and has the loss of the unbroken run."""
    assert [m["step"] for m in broken["history"]] == [m["step"] for m in whole["history"]]
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5, abs=1e-7)


def checkpoints(folder: Path) -> list[Path]:
    """The latest first."""
    return sorted(folder.glob("train/checkpoints/checkpoint_0*"), reverse=True)


def break_once(harm: Callable[[], None], folder: Path, at: int = 3) -> threading.Thread:
    """Does harm when a training has written so many checkpoints."""

    def strike() -> None:
        name = checkpoint.name_of(4 * at)
        wait_for(lambda: (folder / checkpoint.FOLDER / name / "SHA256SUMS").exists())
        harm()

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    return thread


def kill(title: str) -> Callable[[], None]:
    return lambda: os.kill(wait_for(lambda: processes(title))[-1], signal.SIGKILL)


def test_a_killed_worker_a_damaged_checkpoint_and_a_killed_controller_cost_no_row(
    long: Task, laptop: Target, prepared: Any, whole: dict[str, Any], capsys: Any
) -> None:
    folder = Path(laptop.ray.storage) / "broken"

    def damage_and_kill() -> None:
        workers = wait_for(lambda: processes("ray::RayTrainWorker"))
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            (checkpoints(folder)[0] / "state.pt").write_bytes(b"half")
            for worker in workers:
                os.kill(worker, signum)

    killers = [
        break_once(damage_and_kill, folder),
        break_once(kill("ray::TrainController"), folder, at=8),
    ]
    # What the first controller had placed leaves no room for what the second one places.
    all_cpus = {"train.cpus_per_worker": ray.cluster_resources()["CPU"] / 2}
    target = changed(laptop, **EVERY, **all_cpus)
    broken = fit(long, target, prepared, "broken", shown=True)
    for killer in killers:
        killer.join()
    same(broken, whole)
    told = capsys.readouterr().out
    assert re.search(r"damaged \(.*state.pt.*\); it is removed, the one before it is used", told)
    assert "from step" in told
    assert "controller was lost; another one goes on" in told


def test_the_best_that_is_damaged_is_not_exported(
    long: Task, laptop: Target, prepared: Any, whole: dict[str, Any], capsys: Any
) -> None:
    """And Ray's own list, cut short by a kill, stops nobody."""
    folder = Path(laptop.ray.storage) / "unbroken"
    best = checkpoint.name_of(whole["step"])
    (folder / checkpoint.FOLDER / best / "model/model.safetensors").write_bytes(b"")
    (folder / checkpoint.FOLDER / "checkpoint_manager_snapshot.json").write_text('{"ray_')
    (folder / "train/metrics.json").unlink()
    again = fit(long, changed(laptop, **EVERY), prepared, "unbroken", shown=True)
    assert f"{best} is damaged (model/model.safetensors)" in capsys.readouterr().out
    assert again["step"] != whole["step"]
    same(again, whole)


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """A disk with room for a few checkpoints."""
    subprocess.run(f"mount -t tmpfs -o size=2m tmpfs {tmp_path}".split(), check=True)
    yield tmp_path
    subprocess.run(f"umount --lazy {tmp_path}".split(), check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a disk")
def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on_when_there_is_room(
    long: Task, laptop: Target, prepared: Any, whole: dict[str, Any], small: Path
) -> None:
    target = changed(laptop, **EVERY, **{"ray.storage": str(small), "train.max_failures": 0})

    def fill() -> None:
        with (small / "somebody").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    filler = break_once(lambda: pytest.raises(OSError, fill), small / "filled")  # noqa: PT011
    with pytest.raises(UserError, match="no space left on device.* goes on from the one before"):
        fit(long, target, prepared, "filled")
    filler.join()
    assert len(checkpoints(small / "filled")) >= 1
    (small / "somebody").unlink()
    same(fit(long, target, prepared, "filled"), whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_command_goes_on_where_it_was(
    command: Any,
    long: Task,
    laptop: Target,
    prepared: Any,
    tmp_path: Path,
    whole: dict[str, Any],
    workers: int,
) -> None:
    """The driver with all of its Ray, in the middle of a checkpoint."""
    if workers == 1:  # it is so fast that it would be over before anybody looks
        long = changed(long, **{"train.epochs": 24})
        whole = fit(long, changed(laptop, **EVERY, **{"train.workers": 1}), prepared, "lone-24")
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(long.model_dump(mode="json")))
    flags = ["--json", "--run", "killed", "target.train.checkpoint_every=4 steps"]
    flags += ["target.train.cpus_per_worker=0.5", "target.precision=fp32"]
    flags.append(f"target.train.workers={workers}")
    first = command("train", "--task", "reviews.yaml", *flags)
    # The third, or a later one: it may be gone before anybody looks.
    wait_for(
        lambda: any(f.name >= checkpoint.name_of(12) for f in checkpoints(tmp_path / "runs/killed"))
    )
    first.kill()
    second = command("train", *flags)  # the run knows its task
    same(second.result(), whole)
    assert "from step" in second.err.read_text()
