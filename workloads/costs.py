"""What a stage costs: core- and GPU-hours reserved and used, money, energy; before it is run and
after.

Paid for is what is reserved, whether it computes or waits; energy goes by what is used. A core's
energy is its CPU seconds times a power that is assumed (target.cost.watts_per_core); a GPU's is the
board's own measurement, or its utilisation times target.cost.watts_per_gpu.
"""

import hashlib
import json
import subprocess
import threading
import time
from typing import Any, NamedTuple

from . import cluster
from .artifacts import RunFolder
from .config import Cost, Run, Target, TargetServe, figure

SAMPLE_S = 2.0  # between two looks at the GPUs
SPOT = ("ray.io/market-type", "spot")
MILLION = 1e6
ESTIMATES = ".estimates"


class Used(NamedTuple):
    """What processes have used: CPU seconds, GPU seconds (utilisation x time), and the watt-hours
    of the GPUs where their driver tells them."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    gpu_wh: float = 0.0

    def __add__(self, other: Any) -> "Used":
        return Used(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Used":
        """As much by so many processes."""
        return Used(*(factor * value for value in self))


class Meter:
    """What this process uses, from take to take. `gpus` is its share of the GPUs that it sees."""

    def __init__(self, gpus: float = 0.0) -> None:
        self.gpus, self.cpu_s, self.gpu = gpus, time.process_time(), Used()
        self.lock, self.over = threading.Lock(), threading.Event()
        if gpus:
            threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> Used:
        """Since the last take, or the beginning."""
        now = time.process_time()
        with self.lock:
            found, self.gpu = self.gpu._replace(cpu_s=now - self.cpu_s), Used()
        self.cpu_s = now
        return found

    def stop(self) -> None:
        """Looks at no GPU any more."""
        self.over.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.over.is_set() and (seen := look()) is not None:
            self.over.wait(SAMPLE_S)
            now = time.monotonic()
            share = (now - before) * self.gpus
            before = now
            with self.lock:
                self.gpu += Used(0.0, share * seen[0], share * seen[1] / 3600)


def look() -> tuple[float, float] | None:
    """Mean utilisation (0..1) and mean power (W; 0 where it is not told) of the GPUs that this
    process may use; None where there is no driver that tells."""
    import os

    ask = ["nvidia-smi", "--query-gpu=utilization.gpu,power.draw", "--format=csv,noheader,nounits"]
    # Where nobody has given this process its GPUs, it trains on the first.
    ask.append(f"--id={os.environ.get('CUDA_VISIBLE_DEVICES') or '0'}")
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else mean(done.stdout)


def mean(table: str) -> tuple[float, float] | None:
    """The same, of what nvidia-smi prints: a line for each GPU, `97, 412.30`."""
    rows = [[_number(cell) for cell in line.split(",")] for line in table.strip().splitlines()]
    if not rows or any(len(row) != 2 for row in rows):
        return None
    return sum(row[0] for row in rows) / len(rows) / 100, sum(row[1] for row in rows) / len(rows)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:  # [N/A]
        return 0.0


# ---------------------------------------------------------------- what a stage cost


def spent(
    target: Target, stage: str, seconds: float, bundles: float, used: Used | None, nodes: list[Any]
) -> dict[str, Any]:
    """The costs of a stage that held so many bundles for so long; `used` is None where nobody
    knows yet. Money is None where a price is missing, energy where nothing was measured."""
    (ask,) = cluster.asks(target, [stage])
    hours = seconds * bundles / 3600
    cores, gpus = hours * ask.bundle["CPU"], hours * ask.bundle.get("GPU", 0.0)
    told: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "core_hours": {"reserved": _short(cores)},
        "gpu_hours": {"reserved": _short(gpus)},
        "money": money(target.cost, cores, gpus, spot_share(ask, nodes)),
        "currency": target.cost.currency,
    }
    if used is not None:
        told["core_hours"]["used"] = _short(used.cpu_s / 3600)
        told["gpu_hours"]["used"] = _short(used.gpu_s / 3600)
        told["energy_wh"], told["energy_from"] = energy(target.cost, used)
    return told


def money(cost: Cost, core_hours: float, gpu_hours: float, spot: float = 0.0) -> float | None:
    """What is paid for hours; `spot` is the share of them on spot nodes."""
    missing = cost.gpu_hour is None if gpu_hours else cost.cpu_hour is None
    if not cost.priced or missing:
        return None
    full = core_hours * (cost.cpu_hour or 0.0) + gpu_hours * (cost.gpu_hour or 0.0)
    return _short(full * (1 - spot * cost.spot_discount))


def energy(cost: Cost, used: Used) -> tuple[float, str]:
    """Watt-hours, and what they are made of in words."""
    cores_wh = used.cpu_s / 3600 * cost.watts_per_core
    words = f"{cost.watts_per_core:g} W for each core that computes (assumed)"
    gpus_wh = used.gpu_wh or used.gpu_s / 3600 * cost.watts_per_gpu
    if used.gpu_wh:
        words += "; GPUs as their driver measures them"
    elif used.gpu_s:
        words += f"; {cost.watts_per_gpu:g} W x utilisation for each GPU (assumed)"
    return _short(cores_wh + gpus_wh), words


def spot_share(ask: cluster.Ask, nodes: list[Any]) -> float:
    """The share of a stage's bundles that lies on spot nodes, were all of its nodes full."""
    there = cluster.capacity(ask, nodes)
    key, value = SPOT
    spot = [node for node in nodes if node.labels.get(key) == value]
    return cluster.capacity(ask, spot) / there if there else 0.0


def saved(target: Target, trial_seconds: float, nodes: list[Any]) -> float | None:
    """What trials would have cost that early stopping cut off."""
    return spent(target, "tune", trial_seconds, 1, None, nodes)["money"]


def serving(
    cost: Cost, limits: TargetServe, cores: float, rows_per_s: float | None
) -> dict[str, Any]:
    """What one replica costs: an hour of it, and a million predictions where its rate is known.
    `cores` is what it computes on, which may be more than it asks Ray for."""
    reserved = max(limits.cpus_per_replica, cores)
    hour = money(cost, reserved, limits.gpus_per_replica)
    million = None
    if hour is not None and rows_per_s:
        million = _short(hour * MILLION / rows_per_s / 3600)
    return {
        "cores": reserved,
        "gpus": limits.gpus_per_replica,
        "rows_per_s": rows_per_s,
        "hour": hour,
        "million": million,
        "currency": cost.currency,
    }


def total(stages: list[dict[str, Any]]) -> float | None:
    """The money of some stages; None where none has a price."""
    known = [one["money"] for one in stages if one.get("money") is not None]
    return _short(sum(known)) if known else None


def _short(value: float) -> float:
    """Six digits: prices of seconds are small."""
    return float(f"{value:.6g}")


def of_workers(history: list[dict[str, Any]]) -> tuple[float, Used]:
    """How many workers a training had on average, and what all of them used: so many times what
    rank 0 noted at each evaluation. What was lost with a worker that was killed is not in it."""
    worlds = [point["world"] for point in history]
    used = [Used(**point.get("used", {})).times(point["world"]) for point in history]
    return sum(worlds) / len(worlds), sum(used, Used())


def training(target: Target, seconds: float, history: list[dict[str, Any]]) -> dict[str, Any]:
    """`spent` of a training that has taken so long."""
    width, used = of_workers(history)
    return spent(target, "train", seconds, width, used, cluster.nodes(target))


# ---------------------------------------------------------------- before


def estimate(run: Run, nodes: list[Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """What tuning and training will cost at the pace that was measured."""
    found = {}
    tune, train = verdict["tune"], verdict["train"]
    if "wall_s" in tune:
        found["tune"] = spent(run.target, "tune", tune["wall_s"], tune["at_once"], None, nodes)
    if train["widths"]:
        width = train["widths"][-1]["workers"]
        found["train"] = spent(run.target, "train", train["wall_s"], width, None, nodes)
    return found


def keep_estimate(run: Run, found: dict[str, Any]) -> None:
    """Leaves it in the storage for the run that comes next."""
    RunFolder(run.target.ray.storage, ESTIMATES).write(f"{_key(run)}.json", found)


def kept_estimate(run: Run) -> dict[str, Any]:
    """What `check` found for the same task and target, by stage; {} where it was not asked."""
    return RunFolder(run.target.ray.storage, ESTIMATES).read(f"{_key(run)}.json")


def _key(run: Run) -> str:
    told = [run.task.model_dump(mode="json"), run.target.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- in words


def words(stage: str, told: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """One line for people."""
    cores, gpus = told["core_hours"], told["gpu_hours"]
    parts = [_hours("core", cores)] + ([_hours("GPU", gpus)] if gpus["reserved"] else [])
    if told.get("energy_wh"):
        parts.append(f"{figure(told['energy_wh'])} Wh at {told['energy_from']}")
    if told["money"] is not None:
        parts.append(f"{figure(told['money'])} {told['currency']}")
    line = f"{stage}: cost: {', '.join(parts)}"
    if before:
        line += f"; estimated: {_hours('core', before['core_hours'])}"
        if before["money"] is not None:
            line += f", {figure(before['money'])} {before['currency']}"
    return line


def _hours(of: str, hours: dict[str, float]) -> str:
    used = f" ({figure(hours['used'])} used)" if "used" in hours else ""
    return f"{figure(hours['reserved'])} {of}-hours{used}"


def serving_words(told: dict[str, Any]) -> str:
    """The same of a replica."""
    line = f"serve: cost: {figure(told['hour'])} {told['currency']} an hour a replica"
    if told["million"] is None:
        return line
    return (
        f"{line}, {figure(told['million'])} {told['currency']} per million predictions at the "
        f"{told['rows_per_s']:,.0f} rows/s that were measured"
    )
