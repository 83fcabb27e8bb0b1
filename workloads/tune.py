"""Stage 1: many small trials, each alone on its CPU or share of a GPU; nothing crosses the network.

workloads tune --task docstrings --target laptop
"""

import logging
import math
import os
import re
import time
from typing import Any, ClassVar

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from rich.console import Console

from . import cluster, loop, model
from .artifacts import RunFolder
from .config import Between, Choice, Draw, Run, Target, Task, TaskTune, UserError, flat, nested
from .data import Tokens, stratified
from .live import SweepView, params_text, say
from .prepared import Prepared


def trial(
    config: dict[str, Any],
    task: Task,
    target: Target,
    base: model.Base,
    rows: Tokens,
    held_out: Tokens,
) -> None:
    """One combination: trains on the small rows and reports every evaluation."""
    loop.settle_in(target.tune.cpus_per_trial)
    task = trial_task(task, config)
    dtype, _ = model.precision(target.precision, target.device)
    told: list[str] = []
    limit = target.train.max_batch_per_worker
    place = loop.Place(target.device, dtype, max_batch=limit, tell=told.append)
    net = model.build(base, task.model, task.train.seed).to(target.device)
    # The trial's own arithmetic: imports and the building of the model count as overhead.
    began, evals = time.perf_counter(), 0
    try:
        for point in loop.train(net, rows, held_out, task.train, place):
            if point.evaluated:
                evals += 1
                told_now = {"told": told.pop()} if told else {}
                seconds = time.perf_counter() - began
                tune.report({**point.metrics, **told_now, "evals": evals, "seconds": seconds})
    except loop.DivergedError:
        # An answer, not an accident: this combination is no good, and trying again would not help.
        worst = {"eval_accuracy": 0.0, "eval_f1": 0.0, "eval_loss": 1e9, "loss": 1e9}
        tune.report(
            {**worst, "evals": evals, "seconds": time.perf_counter() - began, "diverged": 1}
        )


def trial_task(task: Task, params: dict[str, Any]) -> Task:
    """The task of one trial; what was drawn is validated as a Task again."""
    plan = {"train.epochs": task.tune.epochs, "train.evals_per_epoch": task.tune.evals_per_epoch}
    return task.patched({**params, **plan})


def sweep(run: Run, folder: RunFolder, ready: Prepared, console: Console) -> dict[str, Any]:
    """Runs or resumes the sweep of a run folder and returns its result, which is
    tune/result.json."""
    task, target = run.task, run.target
    slots = concurrency(target, task.tune)
    (ask,) = cluster.asks(target, ["tune"])
    small = stratified(ready.rows.labels, task.tune.train_rows, task.train.seed)
    say(
        console,
        f"tune: {task.tune.num_trials} trials of {task.tune.epochs} epoch(s) on {len(small):,} of "
        f"{len(ready.rows):,} rows, {slots} at once, {task.tune.search} search, "
        f"{task.tune.scheduler} scheduler",
    )
    trainable = tune.with_resources(
        tune.with_parameters(
            trial,
            task=task,
            target=target,
            base=ready.base,
            rows=ready.rows.take(small),
            held_out=ready.held_out,
        ),
        tune.PlacementGroupFactory(
            [ask.bundle],
            strategy=target.tune.placement,
            **({"bundle_label_selector": [ask.selector]} if ask.selector else {}),
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a lost trial is one line of ours
    began = time.perf_counter()
    with SweepView(console, task.tune.num_trials, task.tune.num_evals, task.tune.metric) as view:
        _Reporter.view = view
        grid = _tuner(run, folder, trainable, slots).fit()
    wall_s = time.perf_counter() - began
    results = [grid[i] for i in range(len(grid))]
    trials = [_trial_row(result, task) for result in results]
    if not any(t["evals"] for t in trials):
        error = next((r.error for r in results if r.error), None)
        if no_room := re.search(r"NoRoomError: (.+)", str(error)):
            raise UserError(f"tuning stopped: {no_room[1]}")
        raise RuntimeError(f"no trial finished an evaluation; the first failed with: {error}")
    result = _summary(trials, task.tune, slots, wall_s)
    _write(folder, result, trials, results)
    _print_summary(console, result)
    return result


def concurrency(target: Target, plan: TaskTune) -> int:
    """How many trials run at once: as many as fit on the cluster, or fewer if the target says
    so."""
    fits = cluster.capacity(cluster.asks(target, ["tune"])[0], cluster.nodes(target))
    return max(1, min(fits, plan.num_trials, target.tune.concurrent_trials or fits))


def _tuner(run: Run, folder: RunFolder, trainable: Any, slots: int) -> tune.Tuner:
    plan, limits = run.task.tune, run.target.tune
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "2"  # a killed sweep loses no finished trial
    storage, name = f"{folder.uri}/tune", "ray"
    run_config = tune.RunConfig(
        name=name,
        storage_path=storage,
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=limits.max_failures),
        callbacks=[_Reporter(), JsonLoggerCallback()],
    )
    if tune.Tuner.can_restore(f"{storage}/{name}"):
        return tune.Tuner.restore(
            f"{storage}/{name}",
            trainable=trainable,
            resume_unfinished=True,
            restart_errored=True,
        )
    mode = mode_of(plan.metric)
    return tune.Tuner(
        trainable,
        param_space={path: _domain(draw, plan.search) for path, draw in plan.space.items()},
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=mode,
            num_samples=plan.trials or 1,
            max_concurrent_trials=slots,
            time_budget_s=limits.time_budget_s,
            reuse_actors=True,
            search_alg=_search(plan, run.task.train.seed, mode),
            scheduler=_scheduler(plan),
            trial_dirname_creator=lambda t: t.trial_id,
        ),
        run_config=run_config,
    )


def mode_of(metric: str) -> str:
    """Whether more or less of a metric is better, in Ray's words."""
    return "min" if metric == "eval_loss" else "max"


def _domain(draw: Draw, search: str) -> Any:
    if isinstance(draw, Choice):
        return tune.grid_search(draw.values) if search == "grid" else tune.choice(draw.values)
    if isinstance(draw, Between):
        kind = tune.loguniform if draw.draw == "loguniform" else tune.uniform
        return kind(draw.low, draw.high)
    return tune.randint(draw.low, draw.high + 1)


def _search(plan: TaskTune, seed: int, mode: str) -> SearchAlgorithm | Searcher:
    if plan.search == "optuna" and plan.space:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(metric=plan.metric, mode=mode, seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _scheduler(plan: TaskTune) -> TrialScheduler:
    if plan.scheduler == "fifo" or plan.num_evals < 2:
        return FIFOScheduler()
    return ASHAScheduler(max_t=plan.num_evals, grace_period=1, reduction_factor=2)


class _Reporter(tune.Callback):
    """Hands what Tune tells to the view. Tune pickles its callbacks, and a restored sweep brings
    back the
    pickled one, so the view is the class's and not the object's."""

    view: ClassVar[SweepView]

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        if "told" in result:
            say(self.view.console, f"  trial {trial.trial_id}: {result['told']}")
        self.view.report(trial.trial_id, trial.config, result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        seen = trial.last_result or {}
        early = seen.get("evals", 0) < self.view.evals
        state = "diverged" if seen.get("diverged") else "stopped early" if early else "finished"
        self.view.end(trial.trial_id, state)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        say(self.view.console, f"  trial {trial.trial_id} was lost and runs again")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.view.end(trial.trial_id, "failed")


def _trial_row(result: Any, task: Task) -> dict[str, Any]:
    """One line of the leaderboard: the parameters and the trial's best evaluation."""
    history = _history(result)
    sign = -1 if task.tune.metric == "eval_loss" else 1
    best = max(history, key=lambda m: sign * m[task.tune.metric], default={})
    last = history[-1] if history else {}
    evals = int(last.get("evals", 0))
    state = (
        *(("failed",) if result.error else ()),
        *(("diverged",) if last.get("diverged") else ()),
        "finished" if evals >= task.tune.num_evals else "stopped early",
    )[0]
    # As the task reads them: a YAML choice of 1e-4 is a string until it has been validated.
    clean = flat(task.patched(result.config).model_dump(exclude={"tune"}))
    return {
        "trial": (result.metrics or {}).get("trial_id", ""),
        "params": {path: clean[path] for path in result.config},
        **{k: best.get(k) for k in ("eval_accuracy", "eval_f1", "eval_loss")},
        "evals": evals,
        "seconds": round(last.get("seconds", 0.0), 3),
        "state": state,
    }


def _history(result: Any) -> list[dict[str, Any]]:
    frame = result.metrics_dataframe
    return [] if frame is None or "evals" not in frame else frame.to_dict("records")


def _summary(
    trials: list[dict[str, Any]], plan: TaskTune, slots: int, wall_s: float
) -> dict[str, Any]:
    """Best parameters, leaderboard, what stopping early saved and what the sweep cost beyond its
    trials."""
    sign = -1 if plan.metric == "eval_loss" else 1
    scored = [t for t in trials if t["evals"] and t[plan.metric] is not None]
    board = sorted(scored, key=lambda t: -sign * t[plan.metric])
    busy_s = sum(t["seconds"] for t in trials)
    # At the pace that the stopped trial itself had.
    saved_s = sum(
        t["seconds"] / t["evals"] * (plan.num_evals - t["evals"])
        for t in scored
        if t["state"] == "stopped early"
    )
    ideal_s = max(busy_s / slots, max(t["seconds"] for t in trials))
    best = board[0]
    return {
        "stage": "tune",
        "metric": plan.metric,
        "best_trial": best["trial"],
        "best_params": best["params"],
        **{k: best[k] for k in ("eval_accuracy", "eval_f1", "eval_loss")},
        "trials": len(trials),
        "stopped_early": sum(t["state"] == "stopped early" for t in trials),
        "failed": sum(t["state"] == "failed" for t in trials),
        "concurrent_trials": slots,
        "wall_s": round(wall_s, 2),
        "trial_seconds": round(busy_s, 2),
        "saved_trial_seconds": round(saved_s, 2),
        "ideal_s": round(ideal_s, 2),
        "overhead_s_per_trial": round(max(0.0, wall_s - ideal_s) / len(trials), 3),
        "leaderboard": board,
    }


def _write(folder: RunFolder, result: dict[str, Any], trials: list, results: list) -> None:
    import pandas as pd

    curves = [
        {"trial": row["trial"], **{k: m.get(k) for k in ("evals", "epoch", "loss", "seconds")}}
        | {k: m.get(k) for k in ("eval_loss", "eval_accuracy", "eval_f1")}
        for row, r in zip(trials, results, strict=True)
        for m in _history(r)
    ]
    table = [{**{k: v for k, v in t.items() if k != "params"}, **t["params"]} for t in trials]
    folder.write_text("tune/trials.csv", pd.DataFrame(table).to_csv(index=False))
    folder.write_text("tune/curves.csv", pd.DataFrame(curves).to_csv(index=False))
    folder.write("tune/best.json", nested(result["best_params"]))
    folder.write("tune/result.json", result)  # last: it says that the sweep is whole


def _print_summary(console: Console, r: dict[str, Any]) -> None:
    full_s = r["trial_seconds"] + r["saved_trial_seconds"]
    share = 100 * r["saved_trial_seconds"] / full_s if full_s else 0
    extra = 100 * (r["wall_s"] / r["ideal_s"] - 1) if r["ideal_s"] else math.nan
    say(
        console,
        f"tune: best {r['metric']} {r[r['metric']]:.4f} with {params_text(r['best_params'])}\n"
        f"tune: stopping {r['stopped_early']} of {r['trials']} trials early saved "
        f"{r['saved_trial_seconds']:.1f} of {full_s:.1f} trial-seconds ({share:.0f}%); "
        f"{r['wall_s']:.1f} s against {r['ideal_s']:.1f} s of ideal packing "
        f"(+{extra:.0f}%, {r['overhead_s_per_trial']:.2f} s a trial)",
    )
