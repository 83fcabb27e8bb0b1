"""Does a training lose anything? Kills its parts with SIGKILL and compares the losses.

    .venv/bin/python scripts/soak_train.py --task NAME|FILE [--rounds 2] [--seed 0] [KEY=VALUE ...]

First an unbroken `workloads train` for every number of workers, in fp32. Then in each round, at
random moments, in an epoch or while a checkpoint is written: a worker, Ray Train's controller (one
worker alone is the command itself), the command with all of its Ray, and all of a Ray that the
command has joined. What does not go on by itself is started again by the same command. Also a
checkpoint is cut short while nothing runs. One table tells what was killed, at which step, from
which it went on, how many steps were done twice and how far the losses are from the unbroken run;
exit code 1 if further than 1e-5, if an evaluation is missing or comes twice, or if more than one
checkpoint's interval was redone. The last step that was seen is that of the last line or
checkpoint, so it may lie a little before the kill. Not covered: GPUs, nodes
(tests/test_netlab.py).
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from ports import free_port

CLOSE = 1e-5  # relative
BIN = Path(sys.executable).parent
ENV = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
ENV |= {"RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}


class Training:
    """`workloads train` in a process group of its own."""

    def __init__(self, home: Path, run: str, flags: list[str]) -> None:
        self.run = home / "runs" / run
        self.log = home / f"{run}-{time.monotonic_ns()}.err"
        line = [sys.executable, "-m", "workloads", "train", "--json", "--run", run, *flags]
        with self.log.open("w") as err, self.log.with_suffix(".out").open("w") as out:
            self.process = subprocess.Popen(
                line, cwd=home, env=ENV, stdout=out, stderr=err, start_new_session=True
            )

    def result(self) -> dict[str, Any]:
        """What it printed at its end."""
        if self.process.wait() != 0:
            sys.exit(f"the command has failed:\n{self.log.read_text()}")
        return json.loads(self.log.with_suffix(".out").read_text())

    def checkpoints(self) -> list[int]:
        """Steps, the latest last; the last may not be whole yet."""
        found = (self.run / "train/checkpoints").glob("checkpoint_*/")
        steps = [path.name.partition("_")[2] for path in found]
        return sorted(int(step) for step in steps if step.isdigit())  # others are on their way

    def seen(self) -> int:
        """The last step that anybody can know of."""
        told = [int(n) for n in re.findall(r" step (\d+)/", self.log.read_text())]
        return max([0, *told, *self.checkpoints()])

    def resumed(self) -> int:
        """The step that it went on from the last time; 0 is the beginning."""
        return int(([0, *re.findall(r"from step (\d+)", self.log.read_text())])[-1])

    def kill(self) -> int:
        """All of it: Ray's workers are in process groups of their own, and would train on."""
        for process in self.processes(""):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        return self.process.wait()

    def processes(self, title: str) -> list[psutil.Process]:
        """Its own by their title."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found


@dataclass
class Soak:
    """What all rounds share."""

    home: Path
    flags: list[str]
    dice: random.Random
    workers: int
    whole: dict[str, Any]  # the unbroken run
    interval: int  # most steps between two checkpoints

    def wait(self, training: Training, where: str) -> None:
        """Until a moment in the first three quarters of the training."""
        last = self.whole["history"][-1]["steps"]
        step = self.dice.randint(1, max(1, last * 3 // 4))
        while training.seen() < step:
            if training.process.poll() is not None:
                training.result()
                sys.exit("the training was over before anything was killed: give it more epochs")
            time.sleep(0.01)
        before = training.checkpoints()
        if where == "epoch":
            time.sleep(self.dice.random() * 0.5)
        while where == "checkpoint" and training.checkpoints() in (before, []):
            time.sleep(0.0005)

    def row(self, what: str, where: str, step: int, training: Training) -> dict[str, Any]:
        """A line of the table, once the training is over."""
        history, wanted = training.result()["history"], self.whole["history"]
        keys = ("loss", "eval_loss")
        apart = [
            abs(a[key] - b[key]) / abs(b[key])
            for a, b in zip(history, wanted, strict=False)
            for key in keys
        ]
        same = [m["step"] for m in history] == [m["step"] for m in wanted]
        redone = step - training.resumed()
        good = same and max(apart) <= CLOSE and redone <= self.interval
        return {
            "workers": self.workers,
            "killed": what,
            "in": where,
            "seen at step": step,
            "went on from": training.resumed(),
            "redone": redone,
            "evaluations": "same" if same else "OTHERS",
            "largest difference": f"{max(apart):.1e}",
            "": "ok" if good else "FAILED",
        }


def part(soak: Soak, name: str, title: str, where: str) -> dict[str, Any]:
    """A process that the command has to do without."""
    training = Training(soak.home, name, soak.flags)
    soak.wait(training, where)
    victim = soak.dice.choice(training.processes(title))
    step = training.seen()
    victim.kill()
    return soak.row(title.removeprefix("ray::"), where, step, training)


def command(soak: Soak, name: str, where: str) -> dict[str, Any]:
    """The command with its Ray."""
    training = Training(soak.home, name, soak.flags)
    soak.wait(training, where)
    step = training.seen()
    training.kill()
    return soak.row("the command", where, step, Training(soak.home, name, soak.flags))


def cut(soak: Soak, name: str, where: str) -> dict[str, Any]:
    """The command, and then a file of its latest checkpoint is cut short."""
    training = Training(soak.home, name, soak.flags)
    soak.wait(training, where)
    training.kill()
    step = training.checkpoints()[-1]
    latest = training.run / f"train/checkpoints/checkpoint_{step:08d}"
    what = "the command"
    if files := [p for p in latest.rglob("*") if p.is_file() and p.stat().st_size]:
        file = soak.dice.choice(files)
        os.truncate(file, soak.dice.randrange(file.stat().st_size))
        what += f"; {file.name} cut"
    return soak.row(what, where, step, Training(soak.home, name, soak.flags))


def joined(soak: Soak, name: str, where: str) -> dict[str, Any]:
    """A Ray that the command has joined."""
    with ray(soak.workers) as (address, processes):
        flags = [*soak.flags, f"target.ray.address={address}"]
        flags.append(f"target.ray.storage={soak.home}/runs")
        training = Training(soak.home, name, flags)
        soak.wait(training, where)
        step = training.seen()
        for process in processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        try:
            code = training.process.wait(120)
        except subprocess.TimeoutExpired:
            code = training.kill()
        print(f"  the command ended with {code}", file=sys.stderr)
    with ray(soak.workers) as (address, _):
        flags[-2] = f"target.ray.address={address}"
        return soak.row("all of a joined Ray", where, step, Training(soak.home, name, flags))


@contextlib.contextmanager
def ray(workers: int) -> Iterator[tuple[str, Any]]:
    """A Ray of its own on this machine: its address, and what gives its processes."""
    address = f"127.0.0.1:{free_port()}"
    line = f"ray start --head --block --node-ip-address=127.0.0.1 --num-cpus={workers}"
    line += f" --port={address.partition(':')[2]} --include-dashboard=false --disable-usage-stats"
    line += f" --ray-client-server-port={free_port()} --dashboard-agent-listen-port={free_port()}"
    with open(os.devnull, "w") as nothing:
        head = subprocess.Popen(
            [BIN / "ray", *line.split()[1:]], env=ENV, stdout=nothing, stderr=nothing
        )

    def processes() -> list[psutil.Process]:
        return [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]

    try:
        while not _answers(address):
            time.sleep(0.2)
        yield address, processes
    finally:
        with contextlib.suppress(psutil.Error):
            for process in processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        head.wait()


def _answers(address: str) -> bool:
    line = [BIN / "ray", "health-check", "--address", address]
    return subprocess.run(line, env=ENV, capture_output=True).returncode == 0


def one_round(soak: Soak, number: int, only: list[str]) -> Iterator[dict[str, Any]]:
    """Every kind of loss once."""
    kinds = {
        "worker": lambda name, where: part(soak, name, "ray::RayTrainWorker", where),
        "controller": lambda name, where: part(soak, name, "ray::TrainController", where),
        "command": lambda name, where: command(soak, name, where),
        "cut": lambda name, where: cut(soak, name, where),
        "ray": lambda name, where: joined(soak, name, where),
    }
    for kind, lose in kinds.items():
        if soak.workers == 1 and kind in ("worker", "controller"):
            continue  # both are the command itself
        for where in ("epoch", "checkpoint"):
            if not only or kind in only:
                print(f"round {number}: {kind}, in {where} ...", file=sys.stderr, flush=True)
                yield lose(f"{kind}-{where}-{soak.workers}-{number}", where)


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows."""
    made = Table(title="Losses of a training")
    for key in rows[0]:
        made.add_column(key)
    for row in rows:
        made.add_row(*map(str, row.values()))
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", required=True, help="a task's name, or its file")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", default="1,2", help="with commas")
    parser.add_argument("--only", default="", help="of worker,controller,command,cut,ray")
    parser.add_argument("flags", nargs="*", metavar="KEY=VALUE", help="for `workloads train`")
    args = parser.parse_args()
    task = str(Path(args.task).resolve()) if Path(args.task).is_file() else args.task
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for workers in map(int, args.workers.split(",")):
            flags = ["--task", task, *args.flags, "target.precision=fp32"]
            flags.append(f"target.train.workers={workers}")
            unbroken = Training(Path(scratch), f"unbroken-{workers}", flags)
            steps: set[int] = {0}
            while unbroken.process.poll() is None:
                steps |= set(unbroken.checkpoints())
                time.sleep(0.005)
            whole = unbroken.result()
            ordered = sorted(steps)
            interval = max(b - a for a, b in zip(ordered, ordered[1:], strict=False))
            dice = random.Random(f"{args.seed}-{workers}")
            soak = Soak(Path(scratch), flags, dice, workers, whole, interval)
            for number in range(args.rounds):
                for row in one_round(soak, number, args.only.split(",") if args.only else []):
                    rows.append(row)
                    print(f"  {row}", file=sys.stderr, flush=True)
    Console(width=200 if not sys.stdout.isatty() else None).print(table(rows))
    sys.exit(any(row[""] != "ok" for row in rows))


if __name__ == "__main__":
    main()
