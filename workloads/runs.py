"""Reading, comparing, repeating and removing the runs of a storage.

workloads runs | runs show RUN | runs compare A B | runs rerun RUN | runs rm RUN
"""

import difflib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import artifacts, costs, manifest
from .artifacts import SCORES, RunFolder
from .config import Run, Target, Task, UserError, changed_keys, figure, flat

RESULTS = {"tune": "tune/result.json", "train": "train/metrics.json"}
REPEATED = ("tune", "train")


def find(storage: str, name: str) -> RunFolder:
    """The run of that name; raises UserError with those that are called alike."""
    # One folder's name: nothing that leads elsewhere, or that no filesystem takes.
    if name not in ("", ".", "..") and "/" not in name and len(os.fsencode(name)) < 256:
        folder = RunFolder(storage, name)
        if folder.has("run.json"):
            return folder
    known = sorted(folder.name for folder, _ in artifacts.all_runs(storage))
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        hint = f"did you mean {' or '.join(repr(one) for one in near)}?"
    else:
        hint = f"there are: {', '.join(known[:20]) or 'none'}{', ...' * (len(known) > 20)}"
    raise UserError(f"{name}: no such run in {storage}; {hint}")


def read(folder: RunFolder, told: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run's manifest, of its run.json; what an older version has left is read as today's."""
    told = folder.read("run.json") if told is None else told
    commit, plus, _ = str(told.get("git") or "").partition("+changes")
    told = {**told, "git": commit or None, "dirty": told.get("dirty", bool(plus))}
    stages = dict(told.get("stages", {}))
    for stage, file in RESULTS.items():
        old = stages.get(stage, {})
        if "ended" not in old and (result := folder.read(file)):
            scores = {key: result[key] for key in SCORES if key in result}
            whole = {"seconds": result.get("wall_s"), "scores": scores, "ended": None}
            stages[stage] = whole | {"digest": result.get("digest")} | old
    return {**told, "stages": stages}


def parents(params: str) -> dict[str, str]:
    """The run that a file of parameters is of, if it lies in one."""
    told = Path(params).resolve().parent.parent / "run.json"
    return {"params": json.loads(told.read_text("utf-8"))["run"]} if told.is_file() else {}


def done(told: dict[str, Any]) -> list[str]:
    """The stages that have come to their end."""
    return [name for name in (*REPEATED, "serve") if "ended" in told["stages"].get(name, {})]


def listed(storage: str, tell: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A line for each run, the newest first; `tell` hears of those that cannot be read."""
    found = artifacts.all_runs(storage, tell)
    told = [read(folder, own) | {"run": folder.name} for folder, own in found]
    told.sort(key=lambda one: str(one.get("created", "")), reverse=True)
    return [_line(one) for one in told]


def _line(told: dict[str, Any]) -> dict[str, Any]:
    stages, task = told["stages"], told.get("task", {})
    last = next((s for s in ("train", "tune") if stages.get(s, {}).get("scores")), "train")
    metric = task.get(last, {}).get("metric", SCORES[0])
    return {
        "run": told["run"],
        "created": told.get("created"),
        "task": told.get("task_name"),
        "stages": done(told),
        "metric": metric,
        "score": stages.get(last, {}).get("scores", {}).get(metric),
        "seconds": round(sum(one.get("seconds") or 0 for one in stages.values()), 2),
        "cost": costs.total([one.get("cost", {}) for one in stages.values()]),
        "currency": told.get("target", {}).get("cost", {}).get("currency"),
    }


def compare(a: RunFolder, b: RunFolder) -> dict[str, list[Any]]:
    """What differs between two runs: dotted path -> both values, None where there is none."""
    x, y = _facts(a), _facts(b)
    return {key: [x.get(key), y.get(key)] for key in changed_keys(x, y)}


def _facts(folder: RunFolder) -> dict[str, Any]:
    told = read(folder)
    keys = ("task", "target", "data", "pretrained", "pretrained_digest", "git", "dirty")
    params = folder.read("train/params.json").get("params", {})
    stages = {
        name: {key: one.get(key) for key in ("scores", "digest", "seconds", "cost")}
        for name, one in told["stages"].items()
    }
    facts = {key: told.get(key) for key in (*keys, "versions", "host", "parents")}
    return flat({**facts, "params": params, "stages": stages})


# ---------------------------------------------------------------- again


def again(folder: RunFolder, storage: str) -> tuple[Run, list[str], dict[str, Any], str]:
    """What repeats a run: its task and target, the stages it has done, the parameters that it was
    trained with, and a name that is free. Raises UserError where it cannot be repeated."""
    told = read(folder)
    stages = [stage for stage in done(told) if stage in REPEATED]
    if not stages:
        raise UserError(f"run '{folder.name}' has no stage that came to its end: nothing to repeat")
    try:
        task = Task.model_validate(told["task"])
        target = Target.model_validate(told["target"])
    except (KeyError, ValueError) as e:
        why = " ".join(str(e).split())[:300]
        raise UserError(
            f"run '{folder.name}': this version does not take its task: {why}"
        ) from None
    here = target.ray.model_copy(update={"storage": storage})
    run = Run(told["task_name"], task, told["target_name"], target.model_copy(update={"ray": here}))
    params = folder.read("train/params.json").get("params", {}) if "train" in stages else {}
    name, count = f"{folder.name}-rerun", 1
    while RunFolder(storage, name).has("run.json"):
        count += 1
        name = f"{folder.name}-rerun-{count}"
    return run, stages, params, name


def unlike(told: dict[str, Any]) -> list[str]:
    """What is not here as it was when a run was made, and may change its result."""
    now, lines = manifest.made(), []
    for package, version in told.get("versions", {}).items():
        here = now["versions"].get(package)
        if here != version:
            lines.append(f"{package} was {version}, here it is {here or 'not installed'}")
    if told.get("git") != now["git"]:
        lines.append(f"the commit was {told.get('git')}, here it is {now['git']}")
    if told.get("dirty"):
        lines.append("the run was made with changes that its commit does not have")
    for key in ("cpu", "cores", "accelerators"):
        before, here = told.get("host", {}).get(key), now["host"][key]
        if key in told.get("host", {}) and before != here:
            lines.append(f"the machine's {key}: {before}, here {here}")
    return lines


# ---------------------------------------------------------------- away


def remove(folder: RunFolder, storage: str) -> None:
    """Removes a run for good; raises UserError where it is being served."""
    records = RunFolder(storage, ".serving")
    for file in records.names(""):
        told = records.read(file)
        last = (told.get("deployed") or [{}])[-1]
        if str(last.get("model", "")).startswith(f"{folder.uri}/") and _is_up(told, file):
            address = file.removesuffix(".json")
            raise UserError(
                f"run '{folder.name}' is served at {address}; take that down first: workloads "
                f"serve --down target.serve.port={address.rpartition('-')[2]}"
            )
    folder.files.delete_dir(folder.path)


def _is_up(record: dict[str, Any], file: str) -> bool:
    """Whether what a record tells of may still answer: taken down, it has no Ray; where it was
    killed on this machine, its Ray does not answer."""
    ray = record.get("ray", "joined")
    if ray is None:
        return False
    host, _, port = str(ray).rpartition(":")
    if ray == "joined" or file.rpartition("-")[0] != socket.gethostname():
        return True
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- for people


def print_list(console: Console, storage: str, lines: list[dict[str, Any]]) -> None:
    """The runs as a table."""
    if not lines:
        console.print(f"no runs in {storage}", markup=False)
        return
    rows = []
    for one in lines:
        score = "" if one["score"] is None else f"{one['metric']} {one['score']:.4f}"
        when = str(one["created"])[:19].replace("T", " ")
        about = [
            one["run"],
            when,
            one["task"],
            " ".join(one["stages"]),
            score.removeprefix("eval_"),
        ]
        cost = "" if one["cost"] is None else f"{figure(one['cost'])} {one['currency']}"
        rows.append([*about, f"{one['seconds']:,.1f}", cost])
    _table(console, ["run", "created (UTC)", "task", "stages", "best", "seconds", "cost"], rows)


def print_differences(console: Console, names: list[str], differs: dict[str, list[Any]]) -> None:
    """Both values of all that differs, side by side."""
    if not differs:
        console.print("nothing differs")
        return
    shown = [["-" if v is None else v for v in values] for values in differs.values()]
    rows = [[key, *values] for key, values in zip(differs, shown, strict=True)]
    _table(console, ["", *names], rows)


def _table(console: Console, heads: list[str], rows: list[list[Any]]) -> None:
    if not console.is_terminal:  # what reads it has no width
        console.width = 1000
    table = Table(*heads, box=None)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))  # no markup: a name may have brackets
    console.print(table)
