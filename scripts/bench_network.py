"""The three-stage table, measured: the same sweep, the same training and the same requests on three
hosts whose links get slower and slower, beside what `workloads check` predicts there.

    sudo .venv/bin/python scripts/bench_network.py --plot network.png

The hosts are network namespaces of this machine (Linux, root; what else they need is said), so
they share its cores and its disk: the run folder is no network storage. Training takes fewer steps
on a slow link; the time of all its steps is then extrapolated, and marked with a star.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]
import netlab  # noqa: E402

from workloads import corpus, data  # noqa: E402

STEPS = 60  # of the training job that the table is about
ROWS, HELD_OUT, BATCH = 960, 96, 96  # ten steps an epoch
EPOCHS = {None: 6, 1000: 6, 100: 4, 10: 1}  # Mbit/s -> what is really trained; None: no limit
TASK = {
    "model": {"layers": 2, "hidden": 128, "heads": 2, "vocab_size": 4000},
    "data": {"source": "files", "max_tokens": 64},
    "train": {"global_batch": BATCH, "lr": 1e-3},
    "tune": {
        "trials": 9,
        "train_rows": ROWS,
        "epochs": 2,
        "search": "random",
        "scheduler": "fifo",
        "space": {"train.lr": {"draw": "loguniform", "low": 1e-4, "high": 1e-2}},
    },
}
TARGET = {
    "ray": {"address": "auto"},
    "precision": "fp32",
    "train": {"workers": 3},
    "serve": {"replicas": {"min": 2, "max": 2}, "max_replicas_per_node": 1},
}
SENTENCE = "Compute the inverse of a matrix."
LOADS = {"one sentence": SENTENCE, "48 kB": [f"{SENTENCE} " * 45] * 32}  # inputs of a request
# Four callers, one request after the other each, through the proxy of a host without a replica.
CALLERS = """
import concurrent.futures, json, sys, time
import httpx
inputs, seconds = json.loads(sys.argv[1]), float(sys.argv[2])
def caller(number):
    took, over = [], time.monotonic() + seconds
    with httpx.Client(timeout=60) as client:
        while (began := time.monotonic()) < over:
            client.post("http://127.0.0.1:8000/predict", json={"inputs": inputs}).raise_for_status()
            took.append(time.monotonic() - began)
    return took
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(json.dumps(sum(pool.map(caller, range(4)), [])))
"""


class Lab:
    """Three hosts that run Ray, a CPU each, and commands on the first of them."""

    def __init__(self, folder: Path, hosts: list[netlab.Host]) -> None:
        self.folder, self.hosts = folder, hosts
        self.env = netlab.environment(folder / "token")
        netlab.ray_head(hosts[0], self.env)
        for host in hosts[1:]:
            netlab.ray_worker(host, hosts[0], self.env)
        netlab.all_there(hosts, self.env)

    def limit(self, mbit: int | None) -> None:
        """Every host sends and receives at most so much."""
        for host in self.hosts:
            netlab.throttle(host, mbit) if mbit else netlab.unthrottle(host)

    def workloads(self, *args: str) -> Any:
        """Runs a command on the first host; what it says goes to stderr, what --json printed comes
        back."""
        files = ["--task", f"{self.folder}/task.yaml", "--target", f"{self.folder}/target.yaml"]
        return self.python("-m", "workloads", *args, *files)

    def python(self, *args: str) -> Any:
        """The JSON that a Python process on the first host prints."""
        line = netlab.inside(self.hosts[0], sys.executable, *args)
        done = subprocess.run(line, env=self.env, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout or "null")


def write_inputs(folder: Path) -> None:
    """A part of the builtin corpus as files, the task and the target."""
    texts, labels = corpus.docstrings(str(folder / "cache"))
    chosen = data.stratified(labels, ROWS + HELD_OUT, seed=0)
    held_out = chosen[:: len(chosen) // HELD_OUT]  # they are in the order of their classes
    splits = {"train": sorted(set(chosen) - set(held_out)), "validation": held_out}
    for split, rows in splits.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            lines = [(texts[i], labels[i]) for i in rows]
            csv.writer(file).writerows([("text", "label"), *lines])
    files = {split: f"{folder}/{split}.csv" for split in splits}
    task = TASK | {"data": TASK["data"] | files}
    target = TARGET | {"ray": TARGET["ray"] | {"storage": f"{folder}/runs"}}
    (folder / "runs").mkdir()
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    (folder / "target.yaml").write_text(yaml.safe_dump(target))


def name(mbit: int | None) -> str:
    """A rate as the table calls it."""
    return f"{mbit} Mbit/s" if mbit else "no limit"


def measure(lab: Lab, mbit: int | None) -> dict[str, Any]:
    """What check says, the sweep and the training at one rate; seconds."""
    say(f"{name(mbit)}: check")
    lab.limit(mbit)
    told = lab.workloads("check", "--json")
    say(f"{name(mbit)}: sweep")
    sweep = lab.workloads("tune", "--json")
    say(f"{name(mbit)}: training")
    epochs = EPOCHS[mbit]
    job = lab.workloads("train", "--json", "--run", f"at-{mbit}", f"task.train.epochs={epochs}")
    steps = [BATCH / m["samples_per_s"] for m in job["history"]]  # of each epoch; 1 is slower
    widest = told["verdict"]["train"]["widths"][-1]
    return {
        "mbit": mbit,
        "bus_mbit": told["survey"]["links"]["bus_bytes_per_s"] * 8 / 1e6,
        "trial_s": statistics.median(t["seconds"] for t in sweep["leaderboard"]),
        "trial_predicted_s": told["verdict"]["tune"]["trial_s"],
        "sweep_s": sweep["wall_s"],
        "step_s": statistics.median(steps[1:] or steps),
        "step_predicted_s": widest["step_s"],
        "waiting": widest["all_reduce_share"],
        "extrapolated": epochs * ROWS // BATCH < STEPS,
    }


def load(lab: Lab, mbit: int | None, seconds: float) -> dict[str, Any]:
    """The request loads at one rate: requests/s, and median and 99th percentile in ms."""
    lab.limit(mbit)
    found = {}
    for kind, inputs in LOADS.items():
        say(f"{name(mbit)}: requests of {kind}")
        took = sorted(lab.python("-c", CALLERS, json.dumps(inputs), str(seconds)))
        found[kind] = {
            "per_s": len(took) / seconds,
            "p50_ms": 1e3 * took[len(took) // 2],
            "p99_ms": 1e3 * took[int(len(took) * 0.99)],
        }
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """One row a rate."""
    rows = Table(title=f"three hosts on {os.cpu_count()} cores of {chip()}, {date.today()}")
    rows.add_column("links")
    for column in (
        "tune: a trial",
        "predicted",
        "sweep",
        "train: a step",
        "predicted",
        "off by",
        f"{STEPS} steps",
        "waiting for gradients",
        *(f"serve: {kind}" for kind in LOADS),
    ):
        rows.add_column(column, justify="right")
    for r in found:
        rows.add_row(
            name(r["mbit"]),
            f"{r['trial_s']:.1f} s",
            f"{r['trial_predicted_s']:.1f} s",
            f"{r['sweep_s']:.0f} s",
            f"{r['step_s'] * 1e3:,.0f} ms",
            f"{r['step_predicted_s'] * 1e3:,.0f} ms",
            f"{100 * (r['step_predicted_s'] / r['step_s'] - 1):+.0f}%",
            f"{r['step_s'] * STEPS:,.0f} s" + ("*" if r["extrapolated"] else ""),
            f"{100 * r['waiting']:.0f}%",
            *(f"{r['serve'][kind]['per_s']:,.0f}/s" for kind in LOADS),
        )
    return rows


def chip() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def plot(found: list[dict[str, Any]], path: str) -> None:
    """Time of each stage's work, as a multiple of that without a limit, against the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base = found[0]
    rates = [r["mbit"] or 10_000 for r in found]

    def times(value: Any) -> list[float]:
        return [value(r) / value(base) for r in found]

    def request(kind: str) -> Any:
        return lambda r: r["serve"][kind]["p50_ms"]

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.plot(rates, times(lambda r: r["trial_s"]), "o-", label="tune: a trial")
    (line,) = axes.plot(rates, times(lambda r: r["step_s"]), "s-", label="train: a step")
    predicted = [r["step_predicted_s"] / base["step_s"] for r in found]
    axes.plot(rates, predicted, "s:", color=line.get_color(), mfc="none", label="as check predicts")
    for kind, mark in zip(LOADS, "^v", strict=True):
        axes.plot(rates, times(request(kind)), f"{mark}-", label=f"serve: request of {kind}")
    axes.set(xscale="log", yscale="log", ylabel="time, 1 = without a limit", xlabel="links")
    axes.set_xticks(rates, [name(r["mbit"]) for r in found])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def say(text: str) -> None:
    """Progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """All of it; a quarter of an hour."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--plot", help="a PNG file")
    parser.add_argument("--json", help="a file for all figures")
    parser.add_argument("--seconds", type=float, default=10, help="of each request load")
    asked = parser.parse_args()
    if lacks := netlab.missing():
        sys.exit(f"error: the hosts need {lacks}; on Debian and Ubuntu: {netlab.INSTALL}")
    folder = Path(tempfile.mkdtemp(prefix="bench-network-"))
    write_inputs(folder)
    with netlab.hosts(folder, 3) as hosts:
        say("starting Ray on three hosts")
        lab = Lab(folder, hosts)
        found = [measure(lab, mbit) for mbit in EPOCHS]
        say("deploying")
        lab.limit(None)
        lab.workloads("serve", "--json", "--run", "at-None")
        for r in found:
            r["serve"] = load(lab, r["mbit"], asked.seconds)
    Console(width=160).print(table(found))
    print("* fewer steps were taken; times of all of them extrapolated")
    if asked.json:
        Path(asked.json).write_text(json.dumps(found, indent=2) + "\n")
    if asked.plot:
        plot(found, asked.plot)


if __name__ == "__main__":
    main()
