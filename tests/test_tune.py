"""Stage 1 on a real Ray: what a sweep leaves, and that losing a trial or the whole sweep loses no
result."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from conftest import Command, changed, processes, wait_for
from rich.console import Console

from workloads import artifacts
from workloads.config import Run, Target, Task, load_patch, nested

pytestmark = pytest.mark.ray
EVALS = 80  # of a slow trial, some seconds long


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
    plan |= {"confirm_seeds": 2, "max_predict_ms": 1e4}
    task = Task.model_validate(
        tiny.model_dump() | {"tune": plan | {"train_rows": 40, "epochs": 2, "evals_per_epoch": 2}}
    )
    return sweep(task, laptop, prepared, "grid")


def test_a_grid_runs_every_combination_and_keeps_the_best(grid: Any) -> None:
    _, result = grid
    rates = [row["params"]["train.lr"] for row in result["leaderboard"]]
    assert sorted(rates) == [1e-7, 1e-6, 5e-3, 1e-2]
    assert result["best_params"]["train.lr"] == rates[0] in (1e-2, 5e-3)


def test_the_best_are_run_again_with_other_seeds_and_reported_by_mean_and_spread(grid: Any) -> None:
    folder, result = grid
    best = result["confirmed"][0]
    assert best["eval_loss"] == result["eval_loss"]
    table = pd.read_csv(f"{folder.path}/tune/trials.csv", dtype={"trial": str})
    trials = table.set_index("trial")
    runs = trials[trials["train.lr"] == trials["train.lr"][best["trial"]]]
    assert runs["train.seed"].isna().tolist() == [True, False]
    assert trials["mean"][best["trial"]] == pytest.approx(runs["eval_loss"].mean())
    assert trials["spread"][best["trial"]] == pytest.approx(runs["eval_loss"].std()) != 0
    assert (trials["predict_ms"][trials["train.seed"].isna()] > 0).all()


def test_asha_stops_poor_trials_early_and_says_what_that_saved(grid: Any) -> None:
    _, result = grid
    stopped = [row for row in result["leaderboard"] if row["state"] == "stopped early"]
    assert stopped
    assert all(row["evals"] < 4 for row in stopped)
    assert result["saved_trial_seconds"] > 0


def test_a_sweep_counts_what_its_trials_used(grid: Any) -> None:
    _, result = grid
    assert 0.02 < result["used"]["cpu_s"] / result["trial_seconds"] < 3
    assert result["used"]["gpu_s"] == 0
    assert result["saved_money"] is None  # there are no prices


def test_a_sweep_leaves_a_table_its_curves_and_a_patch_that_loads(grid: Any) -> None:
    folder, result = grid
    trials = pd.read_csv(f"{folder.path}/tune/trials.csv")
    curves = pd.read_csv(f"{folder.path}/tune/curves.csv")
    assert trials["train.seed"].isna().sum() == 4
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
    plan = {"tune.trials": 3, "tune.space": space, "tune.confirm_seeds": 1}
    task = changed(tiny, **plan, **{"tune.search": search})
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
    plan |= {"confirm_seeds": 1}
    length = {"epochs": evals, "evals_per_epoch": 1}
    return Task.model_validate(tiny.model_dump() | {"tune": plan | length})


def records(tune: Path) -> dict[str, dict[str, Any]]:
    """What is kept of each trial, by the value that it tries."""
    rows = [json.loads(path.read_text()) for path in tune.glob("trials/*.json")]
    return {row["drawn"]["train.lr"]: row for row in rows}


def test_a_sweep_whose_ray_is_killed_goes_on_without_repeating_what_is_over(
    tmp_path: Path, tiny: Task, command: Any
) -> None:
    tune = tmp_path / "runs/killed/tune"
    first = start_sweep(command, tmp_path, slow_task(tiny), "killed")
    wait_for(lambda: "finished" in [r["state"] for r in records(tune).values()], 300)
    (raylet,) = [p for p in psutil.Process(first.process.pid).children() if p.name() == "raylet"]
    for process in [raylet, *raylet.children(recursive=True)]:  # actors outlive it for a while
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert first.wait() != 0  # it does not wait for ever
    before = records(tune)
    result = start_sweep(command, tmp_path, slow_task(tiny), "killed").result()
    assert [row["evals"] for row in result["leaderboard"]] == [EVALS] * 4
    after = records(tune)
    assert all(after[lr] == row for lr, row in before.items() if row["state"] == "finished")
    assert result["wall_s"] > max(row["at_s"] for row in before.values())


def test_no_more_trials_run_at_once_than_the_target_allows(
    laptop: Target, tiny: Task, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workloads.search import Book

    at_once: list[int] = []
    report = Book.on_trial_result

    def count(book: Any, *args: Any, **more: Any) -> None:
        at_once.append(sum(row["state"] == "running" for row in book.rows.values()))
        report(book, *args, **more)

    monkeypatch.setattr(Book, "on_trial_result", count)
    one = changed(laptop, **{"tune.concurrent_trials": 1})
    sweep(slow_task(tiny, evals=2), one, prepared, "narrow")
    assert set(at_once) == {1}


def test_a_population_takes_over_weights_and_changes_what_was_drawn(
    laptop: Target, tiny: Task, prepared: Any
) -> None:
    space = {"train.lr": {"draw": "loguniform", "low": 1e-5, "high": 1e-2}}
    plan = {"search": "random", "scheduler": "pbt", "trials": 4, "space": space, "epochs": 6}
    plan |= {"train_rows": 40, "confirm_seeds": 1, "metric": "eval_loss"}
    task = Task.model_validate(tiny.model_dump() | {"tune": plan})
    folder, result = sweep(task, laptop, prepared, "population")
    rows = records(Path(folder.path) / "tune").values()
    assert [row["evals"] for row in rows] == [12] * 4
    assert any(row["drawn"] != row["params"] for row in rows)
    assert all(1e-5 <= row["params"]["train.lr"] <= 1e-2 for row in result["leaderboard"])


def test_a_trial_whose_process_dies_is_tried_again(
    laptop: Target, tiny: Task, prepared: Any
) -> None:
    victims: list[int] = []

    def kill_one() -> None:
        victims.append(wait_for(lambda: processes("ray::ResourceTrainable.train"))[0])
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
