"""What a sweep costs beyond its trials, against what one would write without this package.

    .venv/bin/python scripts/bench_tune.py ROWS.csv [--model FOLDER] [--plot out.png] [--only NAMES]

Contenders, each a process of its own, in turn, --rounds times; the figures are medians: `workloads
tune` with fifo; two processes on one Optuna study, as its documentation writes it, with a plain
loop padded to 64 tokens, and with this package's loop; and Ray Tune's function trainable with its
defaults and the plain loop. Then asha against fifo, 1,000 trials that do nothing, and 64 trials of
a second on a cluster of 8 nodes. The csv has the columns text and label.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CPUS = 2
CONTENDERS = ("ours", "optuna", "optuna-loop", "ray")
SPACE = {"train.lr": {"draw": "loguniform", "low": 1e-4, "high": 3e-3}}
MAX_TOKENS = 64
BATCH = 32


def task_of(args: Any, **plan: Any) -> Any:
    """The task that all contenders learn."""
    from workloads.config import Task

    model = {"pretrained": args.model} if args.model else {"layers": 2, "hidden": 128, "heads": 2}
    sweep = {"trials": args.trials, "train_rows": args.rows, "epochs": 1, "evals_per_epoch": 1}
    choices = {"search": "random", "scheduler": "fifo", "space": SPACE, "confirm_seeds": 1}
    return Task.model_validate(
        {
            "model": model,
            "data": {"source": "files", "train": str(args.csv), "max_tokens": MAX_TOKENS},
            "train": {"epochs": 1, "global_batch": BATCH, "lr": 1e-3},
            "tune": sweep | choices | plan,
        }
    )


def target_of(folder: str, address: str | None = None) -> Any:
    """This machine."""
    from workloads.config import Target

    ray = {"storage": folder, "address": address}
    return Target.model_validate({"ray": ray})


def ready_of(task: Any) -> Any:
    """Base model and rows."""
    from workloads.prepared import prepare

    return prepare(task, "unused")


def rows_of(task: Any) -> tuple[Any, Any, Any]:
    """The base model, the training rows of a trial and the validation rows."""
    from workloads.data import stratified

    ready = ready_of(task)
    small = stratified(ready.rows.labels, task.tune.train_rows, task.train.seed)
    return ready.base, ready.rows.take(small), ready.held_out


def padded(tokens: Any) -> Any:
    """All rows at full length: ids and mask (N, 64), labels (N,)."""
    import numpy as np
    import torch

    from workloads.data import collate

    ids, mask, labels = collate(tokens, np.arange(len(tokens)))
    wide = [np.pad(a, ((0, 0), (0, MAX_TOKENS - a.shape[1]))) for a in (ids, mask)]
    return torch.utils.data.TensorDataset(*(torch.from_numpy(a) for a in (*wide, labels)))


def plain(task: Any, base: Any, rows: Any, held_out: Any, lr: float) -> dict[str, float]:
    """One trial, as a tutorial writes it."""
    import torch

    from workloads import model

    net = model.build(base, task.model, task.train.seed)
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for ids, mask, labels in torch.utils.data.DataLoader(padded(rows), BATCH, shuffle=True):
        optimizer.zero_grad()
        net(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    net.eval()
    hits = 0
    with torch.no_grad():
        for ids, mask, labels in torch.utils.data.DataLoader(padded(held_out), BATCH):
            hits += int((net(input_ids=ids, attention_mask=mask).logits.argmax(-1) == labels).sum())
    return {"score": hits / len(held_out), "seconds": time.perf_counter() - began}


def looped(task: Any, base: Any, rows: Any, held_out: Any, lr: float) -> dict[str, float]:
    """One trial with this package's loop."""
    from workloads import loop, model

    task = task.patched({"train.lr": lr})
    net = model.build(base, task.model, task.train.seed)
    began = time.perf_counter()
    place = loop.Place(dtype=model.precision("auto", "cpu")[0])
    *_, last = loop.train(net, rows, held_out, task.train, place)
    return {"score": last.metrics["eval_accuracy"], "seconds": time.perf_counter() - began}


# ---------------------------------------------------------------- contenders


def ours(args: Any, folder: str) -> list[dict[str, float]]:
    """The command, as people type it."""
    task = Path(folder) / "task.yaml"
    task.write_text(task_of(args).model_dump_json())  # JSON is YAML
    over = f"target.ray.storage={folder}/runs"
    command = [sys.executable, "-m", "workloads", "tune", "--task", str(task), "--json", over]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    board = json.loads(done.stdout)["leaderboard"]
    return [{"score": row["eval_accuracy"], "seconds": row["seconds"]} for row in board]


def optuna(args: Any, folder: str) -> list[dict[str, float]]:
    """Two processes on one study; each is this script again."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", folder]
    workers = [subprocess.Popen(command) for _ in range(CPUS)]
    assert [worker.wait() for worker in workers] == [0] * CPUS
    return [trial.user_attrs for trial in _study(folder).trials]


def _study(folder: str) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(f"{folder}/study.log"))
    return optuna.create_study(
        study_name="bench", storage=storage, direction="maximize", load_if_exists=True
    )


def optuna_worker(args: Any, folder: str) -> None:
    """One of the two processes."""
    from workloads.loop import settle_in

    settle_in(1)
    task = task_of(args)
    base, rows, held_out = rows_of(task)
    one = looped if args.contender == "optuna-loop" else plain

    def objective(trial: Any) -> float:
        lr = trial.suggest_float("lr", 1e-4, 3e-3, log=True)
        found = one(task, base, rows, held_out, lr)
        for key, value in found.items():
            trial.set_user_attr(key, value)
        return found["score"]

    _study(folder).optimize(objective, n_trials=args.trials // CPUS)


def ray_defaults(args: Any, folder: str) -> list[dict[str, float]]:
    """A function trainable, a Tuner, and nothing set that need not be."""
    import ray
    from ray import tune

    ray.init("local")  # not a cluster that was here before
    task = task_of(args)
    base, rows, held_out = rows_of(task)

    def trainable(config: dict[str, Any], base: Any, rows: Any, held_out: Any) -> None:
        tune.report(plain(task, base, rows, held_out, config["lr"]))

    tuner = tune.Tuner(
        tune.with_parameters(trainable, base=base, rows=rows, held_out=held_out),
        param_space={"lr": tune.loguniform(1e-4, 3e-3)},
        tune_config=tune.TuneConfig(metric="score", mode="max", num_samples=args.trials),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    )
    return [{k: r.metrics[k] for k in ("score", "seconds")} for r in tuner.fit()]


RUNS: dict[str, Any] = {"ours": ours, "optuna": optuna, "optuna-loop": optuna, "ray": ray_defaults}


def timed(args: Any, name: str) -> dict[str, float]:
    """A contender's process: seconds in all, seconds of its trials, and the best score."""
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile("r") as out:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*command, "--out", out.name], check=True, **quiet)
        wall_s = time.perf_counter() - began
        trials = json.loads(out.read())
    busy_s = sum(t["seconds"] for t in trials)
    over_s = (wall_s - busy_s / CPUS) / len(trials)
    best = max(t["score"] for t in trials)
    return {"wall_s": wall_s, "trial_s": busy_s / len(trials), "over_s": over_s, "best": best}


def compare(args: Any) -> dict[str, dict[str, float]]:
    """The table of contenders; returns the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name in args.only:
            found[name].append(timed(args, name))
            print(f"  {name}: {found[name][-1]['wall_s']:.1f} s", file=sys.stderr)
    medians = {
        name: {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        for name, runs in found.items()
    }
    first = medians[args.only[0]]["wall_s"]
    print(f"{args.trials} trials of {args.rows} rows, {CPUS} at once")
    print(f"{'':<14}{'wall s':>9}{'x first':>9}{'s a trial':>11}{'over ideal':>12}{'best':>8}")
    for name, m in medians.items():
        cells = f"{m['wall_s']:>9.1f}{m['wall_s'] / first:>9.2f}{m['trial_s']:>11.2f}"
        print(f"{name:<14}{cells}{m['over_s']:>10.2f} s{m['best']:>8.4f}", flush=True)
    return medians


# ---------------------------------------------------------------- of our own


def _sweep(target: Any, task: Any, ready: Any, name: str, trainable: Any = None) -> Any:
    from rich.console import Console

    from workloads import artifacts, cluster, tune
    from workloads.config import Run

    cluster.connect(target)
    run = Run(name, task, "laptop", target)
    more = {"trainable": trainable} if trainable else {}
    folder = artifacts.create(target.ray.storage, run)
    return tune.sweep(run, folder, ready, Console(quiet=True), **more)


def asha_against_fifo(args: Any, folder: str) -> None:
    """Twice the trials, of four epochs with two evaluations each, on three seeds."""
    target = target_of(folder)
    scores: dict[str, list[Any]] = {"fifo": [], "asha": []}
    for seed in range(3):
        plan: dict[str, Any] = {"trials": 2 * args.trials, "epochs": 4, "evals_per_epoch": 2}
        task = task_of(args, **plan).patched({"train.seed": seed})
        ready = ready_of(task)
        for scheduler, found in scores.items():
            kind = task.tune.model_copy(update={"scheduler": scheduler})
            task = task.model_copy(update={"tune": kind})
            found.append(_sweep(target, task, ready, scheduler))
    print(f"\n{2 * args.trials} trials on 3 seeds: best accuracy, trial-seconds")
    for scheduler, found in scores.items():
        best = " ".join(f"{r['eval_accuracy']:.4f}" for r in found)
        busy = statistics.mean(r["trial_seconds"] for r in found)
        print(f"{scheduler:<14}{best}{busy:>9.1f} s", flush=True)


def idle(sleep_s: float) -> Any:
    """A trial that does nothing, or sleeps."""
    from ray import tune

    class Idle(tune.Trainable):
        def setup(self, config: dict[str, Any], **_: Any) -> None:
            return

        def reset_config(self, config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(sleep_s)
            scores = {"eval_accuracy": self.config["train.lr"], "eval_f1": 0, "eval_loss": 1}
            scores["ranked"] = scores["eval_accuracy"]
            return {**scores, "evals": 1, "seconds": sleep_s, "whole": True, "done": True}

    return Idle


def many(args: Any, folder: str) -> None:
    """A thousand trials that do nothing, and the driver's memory."""
    import psutil

    task, target = task_of(args, trials=1000), target_of(folder)
    ready, me = ready_of(task), psutil.Process()
    _sweep(target, task_of(args, trials=4), ready, "warm", idle(0))
    before = me.memory_info().rss
    each_ms = _sweep(target, task, ready, "many", idle(0))["wall_s"]  # s in all: ms each
    grown = (me.memory_info().rss - before) / 2**20
    print(f"\n1000 trials that do nothing: {each_ms:.1f} ms each, driver +{grown:.0f} MiB")


def on_nodes(args: Any, folder: str) -> None:
    """64 trials of a second on 8 nodes of one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(7):
        nodes.add_node(num_cpus=1)
    task, target = task_of(args, trials=64), target_of(folder, nodes.address)
    found = _sweep(target, task, ready_of(task), "nodes", idle(1))
    print(f"\n64 trials of 1 s on 8 nodes: {found['wall_s']:.1f} s, ideal {found['ideal_s']:.1f} s")
    ray.shutdown()  # before the node that it is connected to
    nodes.shutdown()


def plot(medians: dict[str, dict[str, float]], path: str) -> None:
    """Wall seconds of each contender, its trials' share below its overhead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    over = [m["over_s"] * ARGS.trials for m in medians.values()]
    ideal = [m["wall_s"] - more for m, more in zip(medians.values(), over, strict=True)]
    axes.barh(list(medians), ideal, label="trials, packed ideally")
    axes.barh(list(medians), over, left=ideal, label="the rest")
    axes.set(xlabel="seconds")
    axes.legend()
    figure.savefig(path, dpi=150)


PARTS: dict[str, Any] = {"asha": asha_against_fifo, "many": many, "nodes": on_nodes}


def main() -> None:
    """Prints the tables that were asked for."""
    if ARGS.worker:
        optuna_worker(ARGS, ARGS.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        if ARGS.contender:
            Path(ARGS.out).write_text(json.dumps(RUNS[ARGS.contender](ARGS, folder)))
            return
        if "compare" in ARGS.parts:
            medians = compare(ARGS)
            if ARGS.plot:
                plot(medians, ARGS.plot)
        for name in [part for part in ARGS.parts if part in PARTS]:
            import ray

            PARTS[name](ARGS, folder)
            ray.shutdown()


def _parsed() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("csv", type=lambda p: Path(p).resolve())
    parser.add_argument("--model", help="a pretrained model; a 2-layer BERT from scratch without")
    parser.add_argument("--rows", type=int, default=6000, help="training rows of a trial")
    for name, default in (("--trials", 16), ("--rounds", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parts = ("compare", "asha", "many", "nodes")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--plot", help="where to draw the first table, as PNG")
    for hidden in ("--contender", "--out", "--worker"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGS = _parsed()
    main()
