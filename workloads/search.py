"""What a sweep tries, in which order, and what it has found so far: Ray Tune's searcher, schedulers
and callback. All of it comes back from the records of the trials."""

import contextlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from .artifacts import RunFolder
from .config import Choice, Draw, Task, Whole, flat
from .live import Follower, SweepView, say
from .trial import confirms, ranked

Row = dict[str, Any]
OVER = ("finished", "stopped early", "diverged", "too slow")
_COUNTS = ("evals", "seconds", "predict_ms", "cpu_s", "gpu_s", "gpu_wh")
_CURVE = ("evals", "epoch", "loss", "seconds", "eval_loss", "eval_accuracy", "eval_f1")


def mode_of(metric: str) -> str:
    """Whether more or less of a metric is better, in Ray's words."""
    return "min" if metric == "eval_loss" else "max"


def better_first(rows: list[Row], metric: str) -> list[Row]:
    """Rows with a score, the best first."""
    scored = [row for row in rows if row.get(metric) is not None]
    return sorted(scored, key=lambda row: row[metric], reverse=mode_of(metric) == "max")


class Book(tune.Callback):
    """The trials of a sweep, as rows; each is kept in tune/trials, whole or not at all.

    A killed sweep goes on from these. Ray's own state of a sweep is several files, written every
    few seconds and copied one by one: a kill leaves them empty, old or apart from each other.
    """

    def __init__(
        self, folder: RunFolder, task: Task, view: SweepView, followers: Sequence[Follower] = ()
    ) -> None:
        self.folder, self.task, self.view, self.followers = folder, task, view, followers
        kept = [folder.read(f"tune/trials/{name}") for name in folder.names("tune/trials")]
        kept.sort(key=lambda row: row["at_s"])
        self.rows: dict[str, Row] = {row["trial"]: row for row in kept if row["state"] in OVER}
        self.lost = [row for row in kept if row["state"] not in OVER]
        self.began = time.monotonic() - max((row["at_s"] for row in kept), default=0.0)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, for a way of going on that is not used

    @property
    def spent_s(self) -> float:
        """Seconds of sweeping, those before a kill included, up to the last that was heard."""
        return time.monotonic() - self.began

    def explored(self) -> list[Row]:
        """The trials that are over, without those that only confirm."""
        rows = self.rows.values()
        return [r for r in rows if r["state"] in OVER and not confirms(self.task, r["drawn"])]

    def candidates(self) -> list[Row]:
        """The best so far of those that ran to their end, or else of all."""
        plan = self.task.tune
        rows = [row for row in self.explored() if row["state"] in ("finished", "stopped early")]
        whole = [row for row in rows if row["state"] == "finished"]
        return better_first(whole or rows, plan.metric)[: plan.num_candidates]

    def seeds_of(self, row: Row) -> dict[int, Row]:
        """The runs of a candidate by their seed."""
        first = self.task.train.seed
        # What took over another's weights, or was cut short, is no run of its parameters.
        own = row["state"] == "finished" and self.task.tune.scheduler != "pbt"
        found = {first: row} if own else {}
        for other in self.rows.values():
            seed = other["drawn"].get("train.seed")
            if other["drawn"] == {**row["params"], "train.seed": seed} and other["state"] in OVER:
                found[seed] = other
        return found

    def _keep(self, row: Row, state: str) -> None:
        row.update(state=state, at_s=round(self.spent_s, 3))
        self.folder.write(f"tune/trials/{row['trial']}.json", row)
        self._tell(row)

    def _tell(self, row: Row, point: Row | None = None) -> None:
        for follower in self.followers:
            follower.trial(row, point)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self.rows.setdefault(trial.trial_id, _new(trial))
        self._keep(row, "running")
        for old in [old for old in self.lost if old["drawn"] == row["drawn"]][:1]:
            self.lost.remove(old)  # it has been started over
            self.folder.files.delete_file(f"{self.folder.path}/tune/trials/{old['trial']}.json")

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        if "told" in result:
            say(self.view.console, f"  trial {trial.trial_id}: {result['told']}")
        row, metric = self.rows[trial.trial_id], self.task.tune.metric
        point = {k: result.get(k) for k in _CURVE}
        # A trial that was lost, or took over another's weights, has been here before.
        row["curve"] = [m for m in row["curve"] if m["evals"] < point["evals"]] + [point]
        row.update({k: result[k] for k in _COUNTS if k in result})
        if better_first([row, point], metric)[0] is point:
            row.update({k: point[k] for k in ("eval_accuracy", "eval_f1", "eval_loss")})
            row["params"] = dict(trial.config)
        self._tell(row, point)
        self.view.report(trial.trial_id, trial.config, result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        seen, row = trial.last_result or {}, self.rows.get(trial.trial_id)
        if row is None:
            return
        state = (
            "diverged"
            if seen.get("diverged")
            else "too slow"
            if seen.get("slow")
            else "finished"
            if seen.get("whole")
            else "stopped early"
        )
        self._keep(row, state)
        self.view.end(trial.trial_id, state)
        # Running averages that nobody asks for: three quarters of the memory that a trial keeps.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        say(self.view.console, f"  trial {trial.trial_id} was lost and runs again")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self.rows.setdefault(trial.trial_id, _new(trial))
        row["error"] = str(trial.get_error())
        self._keep(row, "failed")
        self.view.end(trial.trial_id, "failed")


def _new(trial: Any) -> Row:
    drawn = dict(trial.config)
    counts = {"evals": 0, "seconds": 0.0, "curve": []}
    return {"trial": trial.trial_id, "drawn": drawn, "params": drawn, **counts}


class Plan(Searcher):
    """Proposes what is still to be tried, then the best few with other seeds."""

    def __init__(self, task: Task, book: Book) -> None:
        plan, past = task.tune, book.explored()
        super().__init__(plan.metric, mode_of(plan.metric))
        self.task, self.book = task, book
        self.left = plan.num_trials - len(past)
        self.exploring: dict[str, Row] = {}
        self.asked: set[str] = set()  # of Optuna
        self.confirming = {_key(row["drawn"]) for row in book.rows.values()}
        self.given = _without(_given(task, book), [row["drawn"] for row in past])
        self.optuna: Any = None
        if plan.search == "optuna" and plan.space:
            self.optuna = _optuna(task, len(past) + len(book.lost))
            for row in past:
                self._tell(row["drawn"], row["curve"][-1][plan.metric], row["state"] == "too slow")

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The next parameters, None while there is something to wait for, or FINISHED."""
        if self.left > 0:
            self.left -= 1
            params = next(self.given, None)
            if params is None:
                params = self.optuna.suggest(trial_id)
                self.asked.add(trial_id)
            self.exploring[trial_id] = params
            return params
        params = self._confirmation()
        if params is None:
            return None if self.exploring else self.FINISHED
        self.confirming.add(_key(params))
        return params

    @property
    def over(self) -> bool:
        """Whether nothing is left to propose."""
        return self.left <= 0 and self._confirmation() is None

    def _confirmation(self) -> Row | None:
        """A candidate with a seed that it has not had. While trials still run, the best so far are
        confirmed: a CPU would be idle otherwise."""
        first, count = self.task.train.seed, self.task.tune.confirm_seeds
        for row in self.book.candidates():
            had = self.book.seeds_of(row)
            for seed in range(first, first + count):
                params = {**row["params"], "train.seed": seed}
                if seed not in had and _key(params) not in self.confirming:
                    return params
        return None

    def on_trial_complete(
        self, trial_id: str, result: Row | None = None, error: bool = False
    ) -> None:
        """Tells Optuna, if it was asked or could learn from it."""
        params, result = self.exploring.pop(trial_id, None), result or {}
        if self.optuna is None or params is None:
            return
        score, slow = result.get(self.task.tune.metric), bool(result.get("slow"))
        if trial_id in self.asked:
            told = None if slow else {self.task.tune.metric: score}
            self.optuna.on_trial_complete(trial_id, told, error)
        elif score is not None:
            self._tell(params, score, slow)

    def _tell(self, params: Row, score: float, slow: bool) -> None:
        # A point outside of the space, which Optuna refuses, is tried all the same.
        with contextlib.suppress(ValueError):
            self.optuna.add_evaluated_point(params, score, pruned=slow)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records of the trials are enough."""
        Path(checkpoint_path).touch()


def _key(params: Row) -> str:
    return json.dumps(params, sort_keys=True)


def _without(params: Iterator[Row], done: list[Row]) -> Iterator[Row]:
    """What has not been done, as often as it is to be."""
    counts = Counter(map(_key, done))
    for one in params:
        counts[_key(one)] -= 1
        if counts[_key(one)] < 0:
            yield one


def _given(task: Task, book: Book) -> Iterator[Row]:
    """What is known before anything is tried; the same at every start of a sweep."""
    plan = task.tune
    if plan.search == "grid":
        for values in itertools.product(*(draw.corners for draw in plan.space.values())):
            yield dict(zip(plan.space, values, strict=True))
        return
    own = flat(task.model_dump(exclude={"tune"}))
    points = [{path: own[path] for path in plan.space} | point for point in plan.points]
    yield from points
    if plan.search == "optuna" and plan.space:
        lost = [r["drawn"] for r in book.lost if not confirms(task, r["drawn"])]
        yield from (params for params in lost if params not in points)
        return
    for i in range(len(points), plan.num_trials):
        rng = np.random.default_rng((task.train.seed, i))
        yield {path: _drawn(draw, rng) for path, draw in plan.space.items()}


def _drawn(draw: Draw, rng: np.random.Generator) -> Any:
    if isinstance(draw, Choice):
        return draw.values[int(rng.integers(len(draw.values)))]
    if isinstance(draw, Whole):
        return int(rng.integers(draw.low, draw.high + 1))
    if draw.draw == "loguniform":
        return math.exp(rng.uniform(math.log(draw.low), math.log(draw.high)))
    return float(rng.uniform(draw.low, draw.high))


def _optuna(task: Task, drawn: int) -> Any:
    """Optuna, which starts another sequence of draws after each restart."""
    import optuna
    from optuna import distributions as d
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, d.BaseDistribution] = {
        path: d.CategoricalDistribution(draw.values)
        if isinstance(draw, Choice)
        else d.IntDistribution(draw.low, draw.high)
        if isinstance(draw, Whole)
        else d.FloatDistribution(draw.low, draw.high, log=draw.draw == "loguniform")
        for path, draw in task.tune.space.items()
    }
    metric = task.tune.metric
    return OptunaSearch(space, metric, mode_of(metric), seed=task.train.seed + drawn)


# ---------------------------------------------------------------- schedulers


class _Past(NamedTuple):
    """A trial of an earlier part of the sweep, as schedulers know trials."""

    trial_id: str


class _Median(MedianStoppingRule):
    def _on_insufficient_samples(self, *_: Any) -> str:
        return TrialScheduler.CONTINUE  # Ray's own would pause, with a checkpoint, for the others


class _Population(PopulationBasedTraining):
    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # It refuses searchers, for they might learn from what it has changed; ours do not.
        without: Any = SimpleNamespace(search_alg=None)
        super().on_trial_add(without, trial)


def _nobody(tune_controller: Any) -> None:
    return None


def scheduler(task: Task, past: list[Row]) -> TrialScheduler:
    """What stops or changes trials; it knows how those went that are over."""
    plan = task.tune
    by: Any = {"metric": "ranked", "mode": "max", "time_attr": "rung"}
    if plan.scheduler == "pbt" and plan.num_evals > 1:
        return _population(task, by)
    rule: Any = FIFOScheduler()
    if plan.scheduler == "asha" and plan.num_evals > 1:
        rule = ASHAScheduler(max_t=plan.num_evals, grace_period=1, reduction_factor=2, **by)
    elif plan.scheduler == "median":
        rule = _Median(grace_period=1, **by)
    # A trial that has an actor on its way waits for it. By the rule that it replaces, it takes the
    # next one that is free, its own is thrown away and another is started for the next trial: where
    # trials are shorter than an actor's start, only one of them ever runs.
    rule.choose_trial_to_run = _nobody
    nobody: Any = None
    for row in past:
        trial: Any = _Past(row["trial"])
        rule.on_trial_add(nobody, trial)
        for point in row["curve"]:
            seen = {"rung": point["evals"], "ranked": ranked(point, plan.metric)}
            rule.on_trial_result(nobody, trial, {**point, **seen})
    return rule


def _population(task: Task, by: Any) -> TrialScheduler:
    rng = np.random.default_rng(task.train.seed)
    space = task.tune.space

    def inside(config: Row) -> Row:
        kept = {
            path: min(max(config[path], draw.low), draw.high)
            for path, draw in space.items()
            if not isinstance(draw, Choice)
        }
        return {**config, **kept}

    changes: dict[str, Any] = {
        path: draw.values if isinstance(draw, Choice) else partial(_drawn, draw, rng)
        for path, draw in space.items()
    }
    return _Population(
        perturbation_interval=1,
        hyperparam_mutations=changes,
        custom_explore_fn=inside,
        log_config=False,
        **by,
    )
