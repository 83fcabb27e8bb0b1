"""Which run a command works on, and the three stages one after the other."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

from rich.console import Console

from . import artifacts, cluster, costs, keys, model, tracking
from .artifacts import RunFolder
from .config import Interrupted, Run, UserError, changed_keys, flat
from .events import Events
from .live import Follower, doing, say
from .lost import Watch, is_loss
from .prepared import Prepared, prepare

STAGES = ("tune", "train", "serve")
HEAD_START_S = 1.0  # of reading the rows, before Ray is started


@dataclass
class Job:
    """One command's work: what is asked for, where people are told, and what has been made
    ready."""

    run: Run
    console: Console
    name: str | None = None  # --run
    params: dict[str, Any] = field(default_factory=dict)  # --params
    parents: dict[str, str] = field(default_factory=dict)  # runs that it comes from
    origin: dict[str, Any] = field(default_factory=dict)  # manifest of the run that is repeated
    access: keys.Access = keys.EVERYBODY  # who may ask what is served
    flags: str = ""  # of the command that comes next
    ready: Prepared | None = None
    started_ray: bool = False
    found_ray: bool = False  # another command of this machine has started it
    folder: RunFolder | None = None
    watch: Watch | None = None  # over Ray
    followers: list[Follower] = field(default_factory=list)  # told how it all goes
    out: TextIO = field(default_factory=lambda: sys.stdout)  # where --json prints its one object

    def say(self, text: str) -> None:
        """One line for people."""
        say(self.console, text)

    def doing(self, text: str) -> Any:
        """Around what may take long: says so."""
        return doing(self.console, text)

    def way_on(self) -> str:
        """What to do after Ray was lost."""
        goes_on = f"with --run {self.folder.name} goes on from here" if self.folder else "does it"
        return f"Once there is a Ray again, the same command {goes_on}"

    @property
    def storage(self) -> str:
        """Where the runs are."""
        return self.run.target.ray.storage


def run_stages(job: Job, stages: list[str]) -> dict[str, Any]:
    """Tune and train, as asked; returns each stage's result. The run folder exists from the first
    stage on.

    Everything that can be wrong with the command is found before the folder is made: bad rows, a
    model that cannot be had, a cluster that is too small.
    """
    model.check_device(job.run.target.device)
    cluster.check_storage(job.run.target)
    artifacts.check_writable(job.storage)
    cluster.preflight(job.run.target, stages)
    if "serve" in stages:
        # Minutes of tuning and training should not end at a key that is missing, or a port.
        keys.check(job.run.target.serve.host, job.access)
        if cluster.joins(job.run.target) is None:
            cluster.check_port(job.run.target.serve.host, job.run.target.serve.port)
    mlflow = tracking.server(job.run)
    job.folder = _existing_run(job, stages)
    began = time.perf_counter()
    results: dict[str, Any] = {}
    work = [stage for stage in stages if stage != "serve" and not _is_done(job.folder, stage)]
    if work:
        ready = _make_ready(job, work)
        if "train" in work:
            cluster.check_space(job.run.target, ready.checkpoint_bytes(job.run.task))
    if job.folder is None:
        job.folder = artifacts.create(job.storage, job.run, job.name, job.parents)
        if estimate := costs.kept_estimate(job.run):
            job.folder.update("run.json", estimate=estimate)
        job.say(f"run: {job.folder.uri}")
    if job.ready is not None:
        _record_data(job.folder, job.ready)
    with _followed(job, job.folder, mlflow) as events:
        for stage in stages:
            if stage != "serve":
                results[stage] = _told(job, job.folder, stage)
                events.keep()
                results[stage].setdefault("total_s", round(time.perf_counter() - began, 2))
                began = time.perf_counter()
        if results:
            from .report import write_report

            write_report(job.folder)
    return results


def _told(job: Job, folder: RunFolder, stage: str) -> dict[str, Any]:
    """A stage's result; says how to go on where it was stopped or lost."""
    try:
        return _stage(job, folder, stage)
    except KeyboardInterrupt:
        same = f"workloads {stage}" if job.origin else "the same command with"
        job.say(f"\nstopped; {same} --run {folder.name} goes on from here")
        raise Interrupted from None
    except Exception as e:
        if not is_loss(e):
            raise
        what = str(e).splitlines()[0]
        raise UserError(f"{stage}: Ray lost a part of it: {what} {job.way_on()}") from None


@contextlib.contextmanager
def _followed(job: Job, folder: RunFolder, mlflow: tracking.Server | None) -> Iterator[Events]:
    """Event files, and a server if there is one, have all that the stages tell, to their end."""
    events, status = Events(folder, job.say), "FAILED"
    tracker = tracking.Tracker(mlflow, job.run, folder, job.say) if mlflow else None
    job.followers = [events, *([tracker] if tracker else [])]
    try:
        yield events
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        events.close()
        if tracker:
            tracker.finish(status)


def _existing_run(job: Job, stages: list[str]) -> RunFolder | None:
    """The run that was named, or for train alone the newest sweep of this task that waits to be
    trained."""
    if job.name is not None:
        folder = artifacts.open_existing(job.storage, job.run, job.name)
        if folder is not None:
            job.say(f"run: resuming {folder.uri}")
        return folder
    if stages[:1] != ["train"] or job.params:
        return None
    task = job.run.task.model_dump(mode="json")

    def waits(folder: RunFolder) -> bool:
        if not folder.has("tune/result.json") or folder.has("train/params.json"):
            return False
        return not changed_keys(folder.read("run.json")["task"], task)

    folder = artifacts.newest(job.storage, job.run.task_name, waits)
    if folder is None:
        job.say(
            "train: there is no untrained sweep of this task; with the task's own values",
        )
    else:
        job.say(f"train: using the sweep of {folder.name}, the newest of this task")
    return folder


def _is_done(folder: RunFolder | None, stage: str) -> bool:
    if folder is None:
        return False
    if stage == "tune":
        return folder.has("tune/result.json")
    return folder.has("train/metrics.json") and folder.has_model()


def _make_ready(job: Job, work: list[str]) -> Prepared:
    task, target = job.run.task, job.run.target
    begun = (job.folder.read("run.json") if job.folder else job.origin).get("pretrained")
    if begun:  # what it is on the hub now may be another one
        task = task.patched({"model.pretrained": begun})
    began = time.perf_counter()
    make = partial(prepare, task, f"{job.storage.rstrip('/')}/.cache", job.say)
    # Meanwhile Ray starts, in the main thread: what it starts ends with the thread that did. Rows
    # that are streamed need it.
    rows = None if task.data.streaming else _Aside(make)
    if rows and wait([rows.done], timeout=HEAD_START_S).done:
        rows.result()  # most of what can be wrong with rows is seen at once
    with_ray = work != ["train"] or not cluster.alone(target, task.data.streaming)
    if with_ray:
        start_ray(job)
    with job.doing(f"reading and tokenising {task.data.source}"):
        job.ready = rows.result() if rows else make()
    data = job.ready.dataset
    dropped = f", {data.duplicates} duplicates dropped from train" if data.duplicates else ""
    job.say(
        f"data: {data.train_rows:,} rows to train on, {len(data.validation.texts):,} to "
        "validate, "
        f"{len(data.labels)} classes{dropped} ({time.perf_counter() - began:.1f} s)",
    )
    if job.origin:
        _check_same(job.origin, job.ready)
    if with_ray:
        cluster.probe_storage(target)
    return job.ready


def _check_same(origin: dict[str, Any], ready: Prepared) -> None:
    """Raises UserError where rows or weights are not those that the repeated run began with."""
    before, now = origin.get("data", {}).get("fingerprint"), ready.dataset.fingerprint
    if before != now:
        raise UserError(
            f"run '{origin['run']}' had other rows (fingerprint {before}, now {now}): it cannot be "
            "repeated without them"
        )
    digest = origin.get("pretrained_digest")
    if digest and digest != ready.base.digest:
        raise UserError(
            f"run '{origin['run']}' began with other weights or another tokenizer of "
            f"{origin['pretrained']} ({digest}, now {ready.base.digest}): it cannot be repeated"
        )


class _Aside(threading.Thread):
    """Does something while this thread does something else. Ctrl-C does not wait for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.done = work, Future[Any]()
        self.start()

    def run(self) -> None:
        try:
            self.done.set_result(self.work())
        except BaseException as e:
            self.done.set_exception(e)

    def result(self) -> Any:
        """What came of it; raises what it raised."""
        return self.done.result()


def start_ray(job: Job) -> None:
    """Starts or joins Ray, once."""
    where = cluster.joins(job.run.target)
    with job.doing(f"joining Ray at {where}" if where else "starting Ray"):
        job.started_ray = cluster.connect(job.run.target)
    if job.watch is None:
        job.watch = Watch(job.console, job.way_on)
        job.watch.start()


def _record_data(folder: RunFolder, ready: Prepared) -> None:
    old = folder.read("run.json").get("data")
    new = ready.dataset.summary()
    if old is not None and old["fingerprint"] != new["fingerprint"]:
        raise UserError(
            f"--run {folder.name} began with other rows (fingerprint {old['fingerprint']}, now "
            f"{new['fingerprint']}); restore them, or give another --run name"
        )
    base = {"pretrained": ready.base.pretrained, "pretrained_digest": ready.base.digest}
    folder.update("run.json", data=new, **base)


def _stage(job: Job, folder: RunFolder, stage: str) -> dict[str, Any]:
    if _is_done(folder, stage):
        done = "has a finished sweep" if stage == "tune" else "is trained"
        job.say(f"{stage}: {folder.name} {done} already")
        return folder.read("tune/result.json" if stage == "tune" else "train/metrics.json")
    with artifacts.stage(folder, stage) as entry:
        if cluster.joins(job.run.target):
            chips = [node.labels.get(cluster.CHIP) for node in cluster.live_nodes()]
            entry["nodes"] = {"count": len(chips), "accelerators": sorted(filter(None, chips))}
        result = _work(job, folder, stage, job.ready)
        entry["scores"] = {key: result[key] for key in artifacts.SCORES if key in result}
        if "digest" in result:
            entry["digest"] = result["digest"]
    _say_costs(job, folder, stage, result)
    return result


def _say_costs(job: Job, folder: RunFolder, stage: str, result: dict[str, Any]) -> None:
    """Keeps what a stage cost in run.json, and tells it beside what `check` had estimated."""
    told, target = folder.read("run.json"), job.run.target
    seconds = told["stages"][stage]["seconds"]
    if stage == "train":
        cost = costs.training(target, seconds, result["history"])
    else:
        held = result["concurrent_trials"], costs.Used(**result["used"])
        cost = costs.spent(target, stage, seconds, *held, cluster.nodes(target))
    told["stages"][stage]["cost"] = result["cost"] = cost
    folder.write("run.json", told)
    job.say(costs.words(stage, cost, told.get("estimate", {}).get(stage)))


def _work(job: Job, folder: RunFolder, stage: str, ready: Prepared | None) -> dict[str, Any]:
    assert ready is not None
    if stage == "tune":
        from .tune import sweep

        return sweep(job.run, folder, ready, job.console, followers=job.followers)
    from .train import fit

    params = job.params or flat(folder.read("tune/best.json"))
    if params and not job.params:
        job.say(f"train: the best parameters of {folder.name}'s sweep")
    elif not params and folder.names("tune/trials"):
        job.say(
            f"warning: {folder.name}'s sweep is not over, so its best parameters are not known; "
            "the task's own are used. To have them, first: workloads tune --run "
            f"{folder.name}{job.flags}"
        )
    elif params and job.origin:
        job.say(f"train: the parameters that {job.origin['run']} was trained with")
    return fit(job.run, folder, ready, params, job.console, job.followers)


def trained_run(job: Job) -> str:
    """The run to serve: this job's, that of --run, or the newest; raises UserError."""
    if job.folder is not None:
        return job.folder.name
    if job.name is not None:
        if not RunFolder(job.storage, job.name).has("run.json"):
            known = ", ".join(sorted(f.name for f, _ in artifacts.all_runs(job.storage))) or "none"
            raise UserError(f"--run {job.name}: no such run in {job.storage}; there are: {known}")
        return job.name
    folder = artifacts.newest(job.storage, job.run.task_name, RunFolder.has_model)
    if folder is None:
        raise UserError(
            f"no trained run of task '{job.run.task_name}' in {job.storage}. Train one (workloads "
            "train "
            f"--task {job.run.task_name}), or serve another model: workloads serve --model "
            "PATH|HUB_ID"
        )
    job.say(f"serve: {folder.name}, the newest trained run of this task")
    return folder.name
