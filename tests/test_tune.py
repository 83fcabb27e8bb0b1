"""Stage 1 on a real Ray: what a sweep leaves, and that losing a trial or the whole sweep loses no
result."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import Command, changed, processes, wait_for
from rich.console import Console

from workloads import artifacts
from workloads.config import Run, Target, Task, load_patch, nested

pytestmark = pytest.mark.ray
EVALS = 120  # of a slow trial, some seconds long


def sweep(task: Task, target: Target, prepared: Any, name: str) -> tuple[Any, dict[str, Any]]:
    from workloads import tune

    run = Run("tiny", task, "laptop", target)
    folder = artifacts.create(target.ray.storage, run, name)
    return folder, tune.sweep(run, folder, prepared, Console(quiet=True))


@pytest.fixture(scope="module")
def grid(laptop: Target, tiny: Task, prepared: Any) -> tuple[Any, dict[str, Any]]:
    """Four learning rates, the useful ones first, each evaluated four times."""
    space = {"train.lr": {"draw": "choice", "values": ["1e-2", "5e-3", "1e-6", "1e-7"]}}
    plan = {"search": "grid", "trials": None, "space": space, "metric": "eval_loss"}
    task = Task.model_validate(
        tiny.model_dump() | {"tune": plan | {"train_rows": 40, "epochs": 2, "evals_per_epoch": 2}}
    )
    return sweep(task, laptop, prepared, "grid")


def test_a_grid_runs_every_combination_and_keeps_the_best(grid: Any) -> None:
    _, result = grid
    rates = [row["params"]["train.lr"] for row in result["leaderboard"]]
    assert sorted(rates) == [1e-7, 1e-6, 5e-3, 1e-2]
    losses = [row["eval_loss"] for row in result["leaderboard"]]
    assert losses == sorted(losses)
    assert result["best_params"]["train.lr"] == rates[0] in (1e-2, 5e-3)


def test_asha_stops_poor_trials_early_and_says_what_that_saved(grid: Any) -> None:
    _, result = grid
    stopped = [row for row in result["leaderboard"] if row["state"] == "stopped early"]
    assert stopped
    assert all(row["evals"] < 4 for row in stopped)
    assert result["saved_trial_seconds"] > 0


def test_a_sweep_leaves_a_table_its_curves_and_a_patch_that_loads(grid: Any) -> None:
    folder, result = grid
    trials = pd.read_csv(f"{folder.path}/tune/trials.csv")
    curves = pd.read_csv(f"{folder.path}/tune/curves.csv")
    assert len(trials) == 4
    assert len(curves) == trials["evals"].sum()
    assert load_patch(f"{folder.path}/tune/best.json") == result["best_params"]


def test_a_number_that_yaml_reads_as_text_is_a_number_in_the_patch(grid: Any) -> None:
    folder, _ = grid
    assert isinstance(folder.read("tune/best.json")["train"]["lr"], float)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_draws_as_many_trials_as_asked(
    search: str, laptop: Target, tiny: Task, prepared: Any
) -> None:
    space = {
        "train.lr": {"draw": "loguniform", "low": 1e-4, "high": 1e-2},
        "model.layers": {"draw": "int", "low": 1, "high": 2},
    }
    task = changed(tiny, **{"tune.search": search, "tune.trials": 3, "tune.space": space})
    _, result = sweep(task, laptop, prepared, search)
    drawn = [row["params"] for row in result["leaderboard"]]
    assert len(drawn) == 3
    assert all(1e-4 <= p["train.lr"] <= 1e-2 and p["model.layers"] in (1, 2) for p in drawn)


def start_sweep(command: Any, folder: Path, task: Task, name: str) -> Command:
    path = folder / "slow.yaml"
    path.write_text(yaml.safe_dump(task.model_dump(mode="json")))
    over = [f"target.ray.storage={folder}/runs", "target.precision=fp32"]
    return command("tune", "--task", str(path), "--run", name, "--json", *over)


def slow_task(tiny: Task, evals: int = EVALS) -> Task:
    rates = {"draw": "choice", "values": [1e-2, 3e-3, 1e-3, 1e-4]}
    plan = {"search": "grid", "trials": None, "scheduler": "fifo", "space": {"train.lr": rates}}
    length = {"epochs": evals, "evals_per_epoch": 1}
    return Task.model_validate(tiny.model_dump() | {"tune": plan | length})


def finished_trials(ray: Path) -> set[str]:
    """Trials that have reported their last evaluation."""
    files = ray.glob("*/result.json")
    return {f.parent.name for f in files if len(f.read_text().splitlines()) >= EVALS}


def test_a_killed_sweep_goes_on_without_repeating_finished_trials(
    tmp_path: Path, tiny: Task, command: Any
) -> None:
    ray = tmp_path / "runs/killed/tune/ray"
    first = start_sweep(command, tmp_path, slow_task(tiny), "killed")
    done = wait_for(lambda: finished_trials(ray))
    time.sleep(2.5)  # Tune notes the state of the sweep every 2 s
    assert first.process.poll() is None
    before = {t: (ray / t / "result.json").stat().st_mtime for t in done}
    first.kill()
    result = start_sweep(command, tmp_path, slow_task(tiny), "killed").result()
    assert [row["evals"] for row in result["leaderboard"]] == [EVALS] * 4
    assert {t: (ray / t / "result.json").stat().st_mtime for t in done} == before


def test_a_trial_whose_process_dies_is_tried_again(
    laptop: Target, tiny: Task, prepared: Any
) -> None:
    victims: list[int] = []

    def kill_one() -> None:
        victims.append(wait_for(lambda: processes("ray::ImplicitFunc.train"))[0])
        os.kill(victims[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    _, result = sweep(slow_task(tiny, evals=30), laptop, prepared, "retried")
    killer.join()
    assert victims
    assert result["failed"] == 0
    assert [row["evals"] for row in result["leaderboard"]] == [30] * 4


def test_the_best_of_a_sweep_is_a_task(grid: Any, tiny: Task) -> None:
    _, result = grid
    assert nested(result["best_params"])["train"]["lr"] == result["best_params"]["train.lr"]
    assert tiny.patched(result["best_params"]).train.lr == result["best_params"]["train.lr"]
