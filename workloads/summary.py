"""What a person reads before a run (check) and after one: the derived numbers and the table of
stages."""

import math
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from . import artifacts, cluster
from .config import Run, Target, Task, UserError, figure
from .live import doing, say


def derived(task: Task, target: Target, nodes: list[cluster.Node]) -> dict[str, Any]:
    """All that follows from the two files and the cluster, and is never written in them."""
    low, high = target.train.width
    rows = {w: math.ceil(task.train.global_batch / w) for w in (low, high)}
    asks = {ask.stage: ask for ask in cluster.asks(target, ["tune", "train", "serve"])}
    fits = cluster.capacity(asks["tune"], nodes)
    concurrent = max(0, min(fits, task.tune.num_trials, target.tune.concurrent_trials or fits))
    return {
        "tune.trials": task.tune.num_trials,
        "tune.evaluations_per_trial": task.tune.num_evals,
        "tune.concurrent_trials": concurrent,
        "train.workers": low if low == high else [low, high],
        "train.rows_per_worker_per_step": rows[low] if low == high else [rows[low], rows[high]],
        "train.gradient_accumulation": math.ceil(rows[low] / target.train.max_batch_per_worker),
        "train.total": {k: v * high for k, v in asks["train"].bundle.items()},
        "serve.total_at_least": asks["serve"].total,
        "serve.total_at_most": {
            k: v * target.serve.replicas.max for k, v in asks["serve"].bundle.items()
        },
    }


def check_report(run: Run) -> tuple[dict[str, Any], list[str]]:
    """The resolved run with every derived number, as a tree and as text, and why it does not
    fit."""
    cluster.check_storage(run.target)
    nodes = cluster.nodes(run.target)
    asks = cluster.asks(run.target, ["tune", "train", "serve"])
    verdicts = {ask.stage: cluster.misfit(ask, nodes) for ask in asks}
    numbers = derived(run.task, run.target, nodes)
    resolved = {
        "task": run.task.model_dump(mode="json"),
        "target": run.target.model_dump(mode="json"),
    }
    where = cluster.joins(run.target) or "this machine (Ray would be started here)"
    text = [yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), "derived:"]
    text += [f"  {key}: {_words(value)}" for key, value in numbers.items()]
    text += ["", f"cluster: {where}"]
    text += [f"  node {n.address}: {_words(_shown(n.resources))}" for n in nodes]
    text += ["", "fits:"]
    for ask in asks:
        verdict = "no: " + v if (v := verdicts[ask.stage]) else "yes"
        text.append(f"  {ask.stage:<6} asks for {ask.count} x {_words(ask.bundle)}  {verdict}")
    report = {
        **resolved,
        "derived": numbers,
        "cluster": {"address": where, "nodes": [_shown(n.resources) for n in nodes]},
        "text": "\n".join(text),
    }
    problems = [v for v in verdicts.values() if v]
    if cluster.joins(run.target) is None:  # else every node of it is asked
        try:
            artifacts.check_writable(run.target.ray.storage)
        except UserError as e:
            problems.append(str(e))
    return report, problems


def live_report(run: Run, console: Console) -> tuple[dict[str, Any], list[str]]:
    """What a survey of the joined cluster found and means, and what keeps runs from working."""
    from . import verdict
    from .prepared import prepare
    from .survey import survey

    with doing(console, f"reading and tokenising {run.task.data.source}"):
        ready = prepare(run.task, f"{run.target.ray.storage.rstrip('/')}/.cache")
    seen = survey(run, ready, lambda text: say(console, text))
    stages = verdict.all_stages(run, cluster.nodes(run.target), seen)
    cost = _estimate(run, cluster.nodes(run.target), stages)
    text = ["", "nodes:", *(_node_lines(n) for n in seen["nodes"]), "", "verdict:"]
    for stage, found in stages.items():
        first, *more = found["words"].splitlines()
        text += [f"  {stage:<6} {first}", *(f"         {line}" for line in more)]
    notes = verdict.remarks(seen["nodes"])
    text += ["", "remarks:", *(f"  {note}" for note in notes)] if notes else []
    text += ["", *cost["lines"]]
    report = {"survey": seen, "verdict": stages, "remarks": notes, "text": "\n".join(text)}
    return report | {"estimate": cost["stages"]}, verdict.problems(seen["nodes"])


def priced_report(run: Run, console: Console) -> dict[str, Any]:
    """What tuning and training will cost here, at the pace of a few steps."""
    from . import model, verdict
    from .prepared import prepare
    from .survey import here

    model.check_device(run.target.device)
    with doing(console, f"reading and tokenising {run.task.data.source}"):
        ready = prepare(run.task, f"{run.target.ray.storage.rstrip('/')}/.cache")
    say(console, "check: timing training steps")
    nodes, seen = cluster.nodes(run.target), here(run, ready)
    paces = {"tune": verdict.tune(run, nodes, seen), "train": verdict.train(run, nodes, seen)}
    cost = _estimate(run, nodes, paces)
    return {"estimate": cost["stages"], "text": "\n".join(["", *cost["lines"]])}


def _estimate(run: Run, nodes: list[cluster.Node], paces: dict[str, Any]) -> dict[str, Any]:
    """Of each stage, kept for the run that comes next; and in words."""
    from . import costs

    found = costs.estimate(run, nodes, paces)
    costs.keep_estimate(run, found)
    lines = ["estimate, without the start of processes and what early stopping saves:"]
    lines += [
        f"  {costs.words(stage, one)}, {one['seconds']:,.0f} s" for stage, one in found.items()
    ]
    if not run.target.cost.priced:
        lines.append("  no prices: target.cost.cpu_hour, target.cost.gpu_hour")
    return {"stages": found, "lines": lines}


def _node_lines(node: dict[str, Any]) -> str:
    where = f"  {node['address']}{' (head)' if node['head'] else ''}: {_words(node['resources'])}"
    if "problem" in node:
        return f"{where}, {node['problem']}"
    versions = ", ".join(f"{name} {number}" for name, number in node["versions"].items())
    free = ", ".join(f"{gib:g} GiB free in {place}" for place, gib in node["free_gib"].items())
    return "\n".join(
        [
            f"{where}, {node['memory_gib']:g} GiB, host {node['host']}, {versions}",
            *(f"    GPU {gpu}" for gpu in node["gpus"]),
            f"    interface {node['interface']}, round trip {node['round_trip_ms']:g} ms, clock "
            f"{node['clock_offset_ms']:+g} ms, {free}",
            f"    storage {node['storage']} (sees {node['storage_sees']} nodes' files), model "
            f"{node['model']}",
        ]
    )


def _shown(node: cluster.Resources) -> cluster.Resources:
    return {name: node[name] for name in ("CPU", "GPU") if name in node}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount:g} {name}" for name, amount in value.items())
    return str(value)


def summary_table(job: Any, results: dict[str, Any]) -> Table:
    """Each stage: what it found, how fast, where, how long."""
    table = Table(title=f"run {job.folder.name}" if job.folder else None, title_justify="left")
    for heading in ("stage", "found", "accuracy", "F1", "speed", "took", "cost"):
        table.add_column(heading, overflow="fold")
    for stage, result in results.items():
        table.add_row(
            stage,
            _found(stage, result),
            _score(result.get("eval_accuracy")),
            _score(result.get("eval_f1")),
            _speed(stage, result),
            f"{result.get('total_s', result.get('wall_s', 0)):.1f} s",
            _cost(stage, result.get("cost")),
        )
    return table


def _found(stage: str, result: dict[str, Any]) -> str:
    if stage == "tune":
        from .live import params_text

        return f"best of {result['trials']} trials: {params_text(result['best_params'])}"
    if stage == "train":
        return f"model of epoch {result['epoch']:g}, {result['workers']} worker(s)"
    return f"{result['url']} ({len(result['labels'])} labels)"


def _speed(stage: str, result: dict[str, Any]) -> str:
    if stage == "tune":
        saved = f"{result['saved_trial_seconds']:.0f} s saved"
        return f"{result['concurrent_trials']} trials at once, {saved}"
    if stage == "train":
        return f"{result['samples_per_s']:,.0f} samples/s"
    return ""


def _cost(stage: str, cost: dict[str, Any] | None) -> str:
    if cost is None:
        return ""
    if stage == "serve":
        return "" if cost["hour"] is None else f"{figure(cost['hour'])} {cost['currency']} an hour"
    if cost["money"] is not None:
        return f"{figure(cost['money'])} {cost['currency']}"
    gpus = cost["gpu_hours"]["reserved"]
    return (
        f"{figure(gpus)} GPU-hours"
        if gpus
        else f"{figure(cost['core_hours']['reserved'])} core-hours"
    )


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
