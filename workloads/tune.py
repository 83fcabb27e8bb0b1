"""Stage 1: many small trials, each alone on its CPU or share of a GPU; nothing crosses the network.

workloads tune --task docstrings --target laptop
"""

import contextlib
import logging
import math
import os
import re
import statistics
from collections.abc import Sequence
from typing import Any

from ray import tune
from rich.console import Console

from . import cluster, costs, search
from .artifacts import RunFolder
from .config import Run, Target, Task, TaskTune, UserError, figure, flat, nested
from .data import stratified
from .live import Follower, SweepView, params_text, say
from .model import check_layers
from .prepared import Prepared
from .search import Book, Plan, Row
from .trial import Trial, confirms

_SCORES = ("eval_accuracy", "eval_f1", "eval_loss")
DIVERGED = "tuning stopped: every trial diverged; let tune.space draw lower rates (train.lr)"


def sweep(
    run: Run,
    folder: RunFolder,
    ready: Prepared,
    console: Console,
    trainable: Any = Trial,
    followers: Sequence[Follower] = (),
) -> dict[str, Any]:
    """Runs or resumes the sweep of a run folder and returns its result, which is
    tune/result.json."""
    task, plan = run.task, run.task.tune
    check_layers(plan.deepest, ready.base)
    slots = concurrency(run.target, plan)
    small = stratified(ready.rows.labels, plan.train_rows, task.train.seed)
    say(
        console,
        f"tune: {plan.num_trials} trials of {plan.epochs} epoch(s) on {len(small):,} of "
        f"{len(ready.rows):,} rows, {slots} at once, {plan.search} search, "
        f"{plan.scheduler} scheduler",
    )
    given = {"task": task, "target": run.target, "base": ready.base, "held_out": ready.held_out}
    trainable = tune.with_parameters(trainable, **given, rows=ready.rows.take(small))
    again = plan.num_candidates * (plan.confirm_seeds - (plan.scheduler != "pbt"))
    with SweepView(console, plan.num_trials + again, plan.num_evals, plan.metric) as view:
        book = Book(folder, task, view, followers)
        view.over = len(book.rows)
        if book.rows or book.lost:
            lost = f"; {len(book.lost)} that did not start over" if book.lost else ""
            say(console, f"tune: {len(book.rows)} trials are over already{lost}")
        todo = Plan(task, book)
        if not todo.over:
            _fit(run, folder, trainable, slots, book, todo)
    with contextlib.suppress(OSError):
        folder.files.delete_dir(f"{folder.path}/tune/ray")  # Ray's own notes, and checkpoints
    wall_s = book.spent_s
    rows = [row for row in book.rows.values() if row["evals"]]
    for row in rows:
        if row["state"] == "running":  # the time was up
            row["state"] = "stopped early"
    if not rows:
        error = next((r["error"] for r in book.rows.values() if "error" in r), None)
        if no_room := re.search(r"NoRoomError: (.+)", str(error)):
            raise UserError(f"tuning stopped: {no_room[1]}")
        if any(row["state"] == "diverged" for row in book.rows.values()):
            raise UserError(DIVERGED)
        if error is None:
            raise UserError(
                f"tuning stopped: the time budget ({run.target.tune.time_budget_s} s) was over "
                "before the first evaluation; raise target.tune.time_budget_s, or lower "
                "task.tune.train_rows"
            )
        raise RuntimeError(f"no trial finished an evaluation; the first failed with: {error}")
    _write_tables(folder, book, task)
    result = _summary(book, task, slots, wall_s)
    saved_s = result["saved_trial_seconds"]
    result["saved_money"] = costs.saved(run.target, saved_s, cluster.nodes(run.target))
    folder.write("tune/best.json", nested(result["best_params"]))
    folder.write("tune/result.json", result)  # last: it says that the sweep is whole
    _print_summary(console, result, run.target.cost.currency)
    return result


def concurrency(target: Target, plan: TaskTune) -> int:
    """How many trials run at once: as many as fit on the cluster, or fewer if the target says
    so."""
    fits = cluster.capacity(cluster.asks(target, ["tune"])[0], cluster.nodes(target))
    return max(1, min(fits, plan.num_trials, target.tune.concurrent_trials or fits))


def _fit(run: Run, folder: RunFolder, trainable: Any, slots: int, book: Book, todo: Plan) -> None:
    """Runs what is not over yet."""
    task, limits = run.task, run.target.tune
    (ask,) = cluster.asks(run.target, ["tune"])
    selector = {"bundle_label_selector": [ask.selector]} if ask.selector else {}
    place = tune.PlacementGroupFactory([ask.bundle], strategy=limits.placement, **selector)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a lost trial is one line of ours
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"  # the book is what a sweep goes on from
    budget_s = limits.time_budget_s and max(1, limits.time_budget_s - book.spent_s)
    tune.Tuner(
        tune.with_resources(trainable, place),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until nothing is left to do
            # A population lives side by side and takes turns.
            max_concurrent_trials=task.tune.num_trials if task.tune.scheduler == "pbt" else slots,
            time_budget_s=budget_s,
            reuse_actors=True,
            search_alg=todo,
            scheduler=search.scheduler(task, book.explored()),
            trial_dirname_creator=lambda t: t.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=f"{folder.uri}/tune",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=limits.max_failures),
            # Those that a population takes over are not the newest ones.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False),
            callbacks=[book],
        ),
    ).fit()


# ---------------------------------------------------------------- what was found


def _clean(row: Row, task: Task) -> dict[str, Any]:
    """One line of the leaderboard: the parameters and the trial's best evaluation."""
    # As the task reads them: a YAML choice of 1e-4 is a string until it has been validated.
    clean = flat(task.patched(row["params"]).model_dump(exclude={"tune"}))
    return {
        "trial": row["trial"],
        "params": {path: clean[path] for path in row["params"]},
        **{k: row.get(k) for k in _SCORES},
        "evals": row["evals"],
        "seconds": round(row["seconds"], 3),
        **({"predict_ms": row["predict_ms"]} if "predict_ms" in row else {}),
        "state": row["state"],
    }


def _confirmed(book: Book, task: Task) -> list[dict[str, Any]]:
    """The candidates that have all their seeds: mean and spread (standard deviation) of each
    score, the best mean first."""
    found = []
    for row in book.candidates():
        runs = book.seeds_of(row).values()
        blew_up = any(run["state"] == "diverged" for run in runs)
        if len(runs) == task.tune.confirm_seeds and not blew_up:
            scores = {k: [run[k] for run in runs] for k in _SCORES}
            means = {k: statistics.mean(v) for k, v in scores.items()}
            spread = {k: statistics.stdev(v) for k, v in scores.items()}
            found.append({"trial": row["trial"], **means, "spread": spread})
    return search.better_first(found, task.tune.metric)


def _summary(book: Book, task: Task, slots: int, wall_s: float) -> dict[str, Any]:
    """Best parameters, leaderboard, what stopping early saved and what the sweep cost beyond its
    trials."""
    plan, rows = task.tune, list(book.rows.values())
    trials = [_clean(row, task) for row in rows if not confirms(task, row["drawn"])]
    confirmed = _confirmed(book, task)
    places = {mean["trial"]: i for i, mean in enumerate(confirmed)}
    board = search.better_first([t for t in trials if t["evals"]], plan.metric)
    # By the means, then by single scores; what diverged, or is too slow, comes last.
    last = {"too slow": 1, "diverged": 2}
    board.sort(key=lambda t: (last.get(t["state"], 0), places.get(t["trial"], len(places))))
    best = board[0]
    if best["state"] == "diverged":
        raise UserError(DIVERGED)
    if best["state"] == "too slow":
        fastest = min((t for t in board if "predict_ms" in t), key=lambda t: t["predict_ms"])
        raise UserError(
            f"no trial predicts within tune.max_predict_ms ({plan.max_predict_ms:g}); the fastest, "
            f"{fastest['trial']} ({params_text(fastest['params'])}), takes "
            f"{fastest['predict_ms']:g} ms. Raise it, or let tune.space draw smaller models"
        )
    busy_s = sum(row["seconds"] for row in rows)
    # At the pace that the stopped trial itself had.
    saved_s = sum(
        t["seconds"] / t["evals"] * (plan.num_evals - t["evals"])
        for t in trials
        if t["state"] == "stopped early" and t["evals"]
    )
    ideal_s = max(busy_s / slots, max(row["seconds"] for row in rows))
    return {
        "stage": "tune",
        "metric": plan.metric,
        "best_trial": best["trial"],
        "best_params": best["params"],
        **{k: (confirmed or board)[0][k] for k in _SCORES},
        **({"spread": confirmed[0]["spread"], "seeds": plan.confirm_seeds} if confirmed else {}),
        "trials": len(trials),
        "stopped_early": sum(t["state"] == "stopped early" for t in trials),
        "failed": sum(t["state"] == "failed" for t in trials),
        "too_slow": sum(t["state"] == "too slow" for t in trials),
        "concurrent_trials": slots,
        "wall_s": round(wall_s, 2),
        "trial_seconds": round(busy_s, 2),
        "used": {k: round(sum(r.get(k, 0.0) for r in rows), 3) for k in costs.Used._fields},
        "saved_trial_seconds": round(saved_s, 2),
        "ideal_s": round(ideal_s, 2),
        "overhead_s_per_trial": round(max(0.0, wall_s - ideal_s) / len(rows), 3),
        "confirmed": confirmed,
        "leaderboard": board,
    }


def _write_tables(folder: RunFolder, book: Book, task: Task) -> None:
    import pandas as pd

    means = {row["trial"]: row for row in _confirmed(book, task)}
    table = [
        {**{k: v for k, v in t.items() if k != "params"}, **t["params"]}
        | _mean_columns(means.get(t["trial"]), task.tune.metric)
        for t in (_clean(row, task) for row in book.rows.values())
    ]
    curves = [{"trial": r["trial"], **m} for r in book.rows.values() for m in r["curve"]]
    folder.write_text("tune/trials.csv", pd.DataFrame(table).to_csv(index=False))
    folder.write_text("tune/curves.csv", pd.DataFrame(curves).to_csv(index=False))


def _mean_columns(mean: Row | None, metric: str) -> dict[str, Any]:
    return {"mean": mean[metric], "spread": mean["spread"][metric]} if mean else {}


def _print_summary(console: Console, r: dict[str, Any], currency: str) -> None:
    full_s = r["trial_seconds"] + r["saved_trial_seconds"]
    share = 100 * r["saved_trial_seconds"] / full_s if full_s else 0
    extra = 100 * (r["wall_s"] / r["ideal_s"] - 1) if r["ideal_s"] else math.nan
    spread = f" +- {r['spread'][r['metric']]:.4f} over {r['seeds']} seeds" if "seeds" in r else ""
    money = "" if r["saved_money"] is None else f", {figure(r['saved_money'])} {currency}"
    say(
        console,
        f"tune: best {r['metric']} {r[r['metric']]:.4f}{spread} with "
        f"{params_text(r['best_params'])}\n"
        f"tune: stopping {r['stopped_early']} of {r['trials']} trials early saved "
        f"{r['saved_trial_seconds']:.1f} of {full_s:.1f} trial-seconds ({share:.0f}%{money}); "
        f"{r['wall_s']:.1f} s against {r['ideal_s']:.1f} s of ideal packing "
        f"(+{extra:.0f}%, {r['overhead_s_per_trial']:.2f} s a trial)",
    )
