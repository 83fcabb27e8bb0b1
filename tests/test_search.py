"""What a sweep tries, goes on from and calls the best, without a Ray: trials are played by hand."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import changed
from rich.console import Console

from workloads import search, tune
from workloads.artifacts import RunFolder
from workloads.config import Task, UserError
from workloads.live import SweepView
from workloads.trial import ranked

LR = {"train.lr": {"draw": "loguniform", "low": 1e-4, "high": 1e-2}}
LAYERS = {"model.layers": {"draw": "choice", "values": [1, 2, 3]}}


def planned(tiny: Task, **plan: Any) -> Task:
    plan = {"confirm_seeds": 3, **plan}
    return changed(tiny, **{f"tune.{key}": value for key, value in plan.items()})


class Played:
    """A sweep whose trials are over as soon as they have begun."""

    def __init__(self, folder: Path, task: Task) -> None:
        view = SweepView(Console(quiet=True), 0, task.tune.num_evals, task.tune.metric)
        self.task = task
        self.book = search.Book(RunFolder(str(folder), "run"), task, view)
        self.plan = search.Plan(task, self.book)
        self.ids = (f"{len(self.book.rows)}-{i}" for i in itertools.count())

    def begin(self) -> Any:
        params = self.plan.suggest(name := next(self.ids))
        if not isinstance(params, dict):
            return None
        kept = SimpleNamespace(metric_analysis={}, metric_n_steps={})
        trial = SimpleNamespace(trial_id=name, config=params, last_result=None, run_metadata=kept)
        self.book.on_trial_start(0, [], trial)
        return trial

    def end(self, trial: Any, score: float = 0.5, **more: Any) -> None:
        scores = {"eval_accuracy": score, "eval_f1": score, "eval_loss": 1 - score}
        seen = {"evals": 1, "seconds": 1.0, "epoch": 1, "loss": 1.0, "whole": True, **scores}
        trial.last_result = {**seen, **more}
        self.book.on_trial_result(0, [], trial, trial.last_result)
        self.plan.on_trial_complete(trial.trial_id, trial.last_result)
        self.book.on_trial_complete(0, [], trial)

    def rest(self, score: Any = lambda params: 0.5) -> list[dict[str, Any]]:
        tried = []
        while trial := self.begin():
            tried.append(trial.config)
            self.end(trial, score(trial.config))
        return tried


@pytest.mark.parametrize("plan", [{"search": "grid", "trials": None}, {"search": "random"}])
def test_a_kill_at_any_moment_loses_no_trial_and_repeats_none(
    plan: dict[str, Any], tmp_path: Path, tiny: Task
) -> None:
    space = LAYERS if plan["search"] == "grid" else LR
    task = planned(tiny, **{"trials": 3, "space": space, "confirm_seeds": 1, **plan})
    whole = Played(tmp_path / "whole", task).rest()
    assert len(whole) == 3
    for over, running in itertools.product(range(4), range(2)):
        killed = Played(folder := tmp_path / f"{over}{running}", task)
        for _ in range(over):
            killed.end(killed.begin())
        for _ in range(running):
            killed.begin()
        assert Played(folder, task).rest() == whole[over:]


def test_a_record_that_a_kill_left_half_written_is_not_read(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None, confirm_seeds=1)
    Played(tmp_path, task).begin()
    (tmp_path / "run/tune/trials/x.json.1a2b3c4d").touch()
    assert len(Played(tmp_path, task).rest()) == 3


def test_optuna_still_knows_what_it_learned_and_starts_over_what_was_lost(
    tmp_path: Path, tiny: Task
) -> None:
    task = planned(tiny, space=LR, search="optuna", trials=4, confirm_seeds=1)
    first = Played(tmp_path, task)
    first.end(first.begin(), 0.75)
    lost = first.begin().config
    again = Played(tmp_path, task)
    (known,) = again.plan.optuna._ot_study.trials
    assert known.value == 0.75
    assert again.rest()[0] == lost
    assert len({str(row["drawn"]) for row in again.book.rows.values()}) == 4


def test_what_a_sweep_took_before_it_was_killed_counts(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LR, search="random", trials=3)
    first = Played(tmp_path, task)
    first.book.began -= 100
    first.end(first.begin())
    assert Played(tmp_path, task).book.spent_s >= 100


@pytest.mark.parametrize("search_", ["random", "optuna"])
def test_points_are_tried_first_and_count_as_trials(
    search_: str, tmp_path: Path, tiny: Task
) -> None:
    points = [{"train.lr": 5e-3}, {}]
    task = planned(tiny, space=LR, search=search_, trials=4, points=points, confirm_seeds=1)
    tried = Played(tmp_path, task).rest()
    assert [p["train.lr"] for p in tried[:2]] == [5e-3, tiny.train.lr]
    assert len(tried) == 4


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_knows_the_trials_of_before_a_kill(
    scheduler: str, tmp_path: Path, tiny: Task
) -> None:
    plan = {"search": "random", "trials": 4, "scheduler": scheduler, "epochs": 4}
    task = planned(tiny, space=LR, confirm_seeds=1, **plan)
    Played(tmp_path, task).rest()
    rule = search.scheduler(
        task, search.Book(RunFolder(str(tmp_path), "run"), task, None).explored()
    )
    new: Any = search._Past("new")
    nobody: Any = None
    rule.on_trial_add(nobody, new)
    rule.on_trial_add(nobody, seed := search._Past("seed"))
    poor = {"ranked": 0.1, "rung": 1}
    assert rule.on_trial_result(nobody, new, poor) == "STOP"
    assert rule.on_trial_result(nobody, seed, {**poor, "rung": 0}) == "CONTINUE"


def test_of_trials_that_tie_those_with_the_higher_loss_stop(tiny: Task) -> None:
    rule = search.scheduler(planned(tiny, space=LR, scheduler="asha", epochs=4), [])
    nobody: Any = None
    answers = []
    for loss in (0.6, 0.7, 0.5, 0.8, 0.68):
        trial: Any = search._Past(f"loss {loss}")
        rule.on_trial_add(nobody, trial)
        same = {"eval_accuracy": 0.5, "eval_loss": loss}
        seen = {**same, "rung": 1, "ranked": ranked(same, "eval_accuracy")}
        answers.append(rule.on_trial_result(nobody, trial, seen))
    assert answers == ["CONTINUE", "STOP", "CONTINUE", "STOP", "STOP"]


def test_a_better_score_counts_for_more_than_any_loss() -> None:
    better, worse = {"eval_f1": 0.50001, "eval_loss": 1e9}, {"eval_f1": 0.5, "eval_loss": 0.1}
    assert ranked(better, "eval_f1") > ranked(worse, "eval_f1")
    assert ranked(better, "eval_loss") < ranked(worse, "eval_loss")


def lucky(params: dict[str, Any]) -> float:
    """One layer is the best with the first seed only."""
    if params["model.layers"] == 1:
        return 0.5 if params.get("train.seed") else 0.9
    return 0.8 if params["model.layers"] == 2 else 0.1


def test_the_best_mean_wins_and_not_the_luckiest_draw(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None, metric="eval_accuracy")
    played = Played(tmp_path, task)
    tried = played.rest(lucky)
    assert len(tried) == 3 + 2 * 2
    result = tune._summary(played.book, task, 2, 1.0)
    assert result["best_params"] == {"model.layers": 2}
    assert (result["eval_accuracy"], result["spread"]["eval_accuracy"]) == (pytest.approx(0.8), 0)
    assert [row["trial"] for row in result["leaderboard"]][:2] == [
        row["trial"] for row in result["confirmed"]
    ]
    assert result["trials"] == 3


def test_a_kill_while_the_best_are_confirmed_loses_nothing(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None)
    whole = Played(tmp_path / "whole", task).rest(lucky)
    killed = Played(tmp_path / "killed", task)
    for _ in range(5):
        killed.end(trial := killed.begin(), lucky(trial.config))
    again = Played(tmp_path / "killed", task)
    assert again.rest(lucky) == whole[5:]
    assert Played(tmp_path / "killed", task).plan.over


def test_a_free_cpu_confirms_while_others_still_explore(tmp_path: Path, tiny: Task) -> None:
    played = Played(tmp_path, planned(tiny, space=LAYERS, search="grid", trials=None))
    played.end(played.begin(), 0.9)
    played.begin(), played.begin()
    assert played.begin().config == {"model.layers": 1, "train.seed": 1}


def test_what_is_too_slow_is_never_the_best(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None, max_predict_ms=5)
    played = Played(tmp_path, task)
    for score, ms in ((0.9, 8.0), (0.6, 4.0), (0.5, 3.0)):
        played.end(played.begin(), score, slow=ms > 5, predict_ms=ms)
    result = tune._summary(played.book, task, 2, 1.0)
    assert result["best_params"] == {"model.layers": 2}
    assert [row["state"] for row in result["leaderboard"]].count("too slow") == 1


def test_what_diverged_is_never_the_best(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None, confirm_seeds=1)
    played = Played(tmp_path, task)
    for score, more in ((0.9, {"diverged": 1}), (0.6, {}), (0.5, {})):
        played.end(played.begin(), score, **more)
    result = tune._summary(played.book, task, 2, 1.0)
    assert result["best_params"] == {"model.layers": 2}
    assert result["leaderboard"][-1]["state"] == "diverged"


def test_where_all_diverged_it_is_said(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None, confirm_seeds=1)
    played = Played(tmp_path, task)
    for score in (0.9, 0.6, 0.5):
        played.end(played.begin(), score, diverged=1)
    with pytest.raises(UserError, match="every trial diverged; let tune.space draw lower rates"):
        tune._summary(played.book, task, 2, 1.0)


def test_where_all_are_too_slow_the_fastest_is_named(tmp_path: Path, tiny: Task) -> None:
    task = planned(tiny, space=LAYERS, search="grid", trials=None, max_predict_ms=1)
    played = Played(tmp_path, task)
    for ms in (8.0, 4.0, 6.0):
        played.end(played.begin(), 0.9, slow=True, predict_ms=ms)
    with pytest.raises(UserError, match=r"max_predict_ms \(1\).*model.layers=2.* takes 4 ms"):
        tune._summary(played.book, task, 2, 1.0)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            {"scheduler": "pbt", "search": "random", "space": LAYERS},
            "'pbt'.*'model.layers'.*train.lr",
        ),
        ({"scheduler": "pbt", "search": "optuna", "space": LR}, "'pbt'.*'optuna'.*'random'"),
        ({"scheduler": "pbt", "search": "random"}, "tune.space is empty"),
        ({"search": "grid", "trials": None, "space": LAYERS, "points": [{}]}, "points.*'grid'"),
        ({"space": LR, "points": [{}] * 3}, "3 points but tune.trials is 2"),
        ({"space": LR, "points": [{"train.epochs": 3}]}, r"points\[0\].*'train.epochs'.*space"),
        (
            {"space": LR, "points": [{"train.lr": -1}]},
            r"points\[0\]: task.train.lr.*greater than 0",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_at_load(
    plan: dict[str, Any], words: str, tiny: Task
) -> None:
    with pytest.raises(ValueError, match=words):
        planned(tiny, **plan)
