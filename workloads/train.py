"""Stage 2: one DDP job over many workers; gradients cross the network every step, so the workers
sit together.

workloads train --task docstrings --target laptop
"""

import json
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import PreemptionInfo
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from . import (
    card,
    checkpoint,
    cluster,
    costs,
    evaluation,
    explain,
    loop,
    manifest,
    measure,
    model,
    samples,
    verdict,
)
from .artifacts import RunFolder
from .config import Run, Target, Task, UserError, nested
from .data import Tokens
from .live import Follower, Shown, params_text, say
from .prepared import Prepared
from .sources import public_name, published, unreachable
from .trainer import Torch, Trainer
from .words import set_aside

_MEMORY = "train/memory.json"


def worker(config: dict[str, Any]) -> str | None:
    """One rank of the job; returns why training had to stop, if it had to."""
    task, target, progress = config["task"], config["target"], config["progress"]
    folder: RunFolder = config["folder"]
    alone = isinstance(config["shared"], tuple)
    base, rows, held_out = config["shared"] if alone else ray.get(config["shared"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    loop.settle_in(config["cpus"])
    dtype, why = model.precision(target.precision, target.device)
    stream = None
    if config["streamed"]:
        from .ingest import Reader

        shard = ray.train.get_dataset_shard("rows")
        stream = Reader(shard, config["streamed"], rows.pad_id)
    per_epoch = loop.steps_per_epoch(config["streamed"] or len(rows), task.train)
    # Less, where that did not fit into memory before the workers began again.
    limit = target.train.max_batch_per_worker
    max_batch = min(limit, folder.read(_MEMORY).get("max_batch", limit))
    place = loop.Place(
        target.device,
        dtype,
        rank,
        world,
        max_batch=max_batch,
        checkpoint_steps=target.train.checkpoint_steps(per_epoch),
        log_steps=max(1, min(200, per_epoch // 20)),
        log_s=5 if config["joined"] else 0,
        tell=lambda text: _tell(progress, {"note": text}),
        may_halve=max_batch == limit,
    )
    net = _wrap(model.build(base, task.model, task.train.seed), place)
    start = checkpoint.start(folder, target.device, place.tell)
    if context.get_local_world_size() < world:
        warning = _network_warning(task, target, base, rows, world)
        if rank == 0 and warning:
            place.tell(f"warning: {warning}")
    if rank == 0:
        micro = loop.accumulation(task.train.global_batch, world, place.max_batch)
        text = f"{world} worker(s), {micro} micro-batch(es) a step, precision {why}"
        place.tell(text + (f", from step {start['step']}" if start else ""))
    history = start["history"] if start else []
    meter = costs.Meter(target.train.gpus_per_worker)
    best = max((_score(m, task) for m in history), default=float("-inf"))
    leaving: set[str] = set()
    try:
        for point in loop.train(net, stream or rows, held_out, task.train, place, start):
            if stream:
                point.metrics["data_wait_s"] = round(stream.waited_s, 3)
            better = point.evaluated and _score(point.metrics, task) > best
            if point.evaluated:
                best = max(best, _score(point.metrics, task))
                # Of this rank: all ranks do the same.
                used = meter.take()._asdict()
                history = [*history, {**point.metrics, "world": world, "used": used}]
            if rank == 0:
                _tell(progress, point.metrics)
            # Asked by all ranks at once, and the answer is the same for all.
            notice = ray.train.get_preemption_info() if config["joined"] else None
            warned = bool(notice and not leaving.issuperset(notice.preempted_node_ids))
            if notice and warned:
                leaving.update(notice.preempted_node_ids)
                if rank == 0:
                    place.tell(_notice_text(notice, point))
            if better or point.checkpoint_due or warned:
                keep, scores = target.train.keep_checkpoints, _scores(history, task)
                checkpoint.report(folder, net, point, history, keep, scores, alone)
            elif point.evaluated:
                ray.train.report(point.metrics)
    except loop.DivergedError as e:
        return str(e)
    except loop.NoRoomError as e:
        if world == 1:
            return str(e)
        if place.may_halve and place.max_batch > 1:
            half = math.ceil(place.max_batch / 2)
            folder.write(_MEMORY, {"max_batch": half})
            place.tell(loop.halved_text(place.max_batch, half))
        raise  # Ray has all ranks begin again from the last checkpoint
    finally:
        meter.stop()
    return None


def _notice_text(notice: PreemptionInfo, point: loop.Point) -> str:
    count, step = len(notice.preempted_node_ids), point.metrics["step"]
    left_s = f" in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else ""
    return f"warning: {count} node(s) will be taken away{left_s}: a checkpoint at step {step}"


def _network_warning(
    task: Task, target: Target, base: model.Base, rows: Tokens, world: int
) -> str | None:
    """What to do about links that this training would wait for; asked by all ranks at once."""
    share = math.ceil(task.train.global_batch / world)
    step_s = measure.step_s(task, target, base, rows, share, seconds=0.5)
    line = verdict.line(measure.all_reduces(target.device, budget_s=1), world)
    size = measure.gradient_bytes(
        model.build(base, task.model, task.train.seed), rows, task.train.global_batch
    )
    waits = verdict.exposed_s(line.all_reduce_s(size, world), step_s, size)
    part = waits / (waits + step_s)
    return (
        f"{verdict.poor(part)} ({verdict.mbit(line.bus_bytes_per_s)})"
        if part > verdict.POOR
        else None
    )


def _wrap(net: torch.nn.Module, place: loop.Place) -> torch.nn.Module:
    device = ray.train.torch.get_device() if place.device == "cuda" else torch.device("cpu")
    if place.device == "cuda":
        torch.cuda.set_device(device)  # the workers of a node see all of its GPUs
    net = net.to(device)
    if place.world == 1:
        return net
    set_aside(net)  # DDP takes what needs a gradient when it wraps
    # No static_graph: with accumulation (no_sync) it gives other gradients.
    return DistributedDataParallel(
        net,
        device_ids=[device] if place.device == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def _tell(progress: Queue, message: dict[str, Any]) -> None:
    # The driver may be gone (a closed laptop): training does not depend on anybody listening.
    try:
        progress.put_nowait(message)
    except (ray.exceptions.RayError, OSError):
        return


def _score(metrics: dict[str, Any], task: Task) -> float:
    """More is better."""
    sign = -1 if task.train.metric == "eval_loss" else 1
    return sign * metrics[task.train.metric]


def _scores(history: list[dict[str, Any]], task: Task) -> dict[int, float]:
    """Those of all evaluated steps."""
    return {m["step"]: _score(m, task) for m in history}


# ---------------------------------------------------------------- the driver's side


def fit(
    run: Run,
    folder: RunFolder,
    ready: Prepared,
    params: dict[str, Any],
    console: Console,
    followers: Sequence[Follower] = (),
) -> dict[str, Any]:
    """Trains, or resumes the training of a run folder, and exports model/.

    `params` are dotted Task paths, as a sweep found them. Returns what train/metrics.json holds.
    Raises UserError when the loss diverges.
    """
    params = _fixed_params(folder, params, console)
    task, target = run.task.patched(params), run.target
    began, shown = time.perf_counter(), Shown(console, followers)
    if cluster.alone(target, task.data.streaming):
        last = _here(task, target, folder, ready, shown)
    else:
        last = _on_workers(task, target, folder, ready, shown)
    fit_s = time.perf_counter() - began
    before_s = folder.read("run.json").get("stages", {}).get("train", {}).get("seconds", 0.0)
    cost = costs.training(target, before_s + fit_s, last["history"])
    metrics = _export({**last, "fit_s": fit_s, "cost": cost}, task, folder, ready, console)
    summary = {
        "stage": "train",
        **metrics,
        "params": params,
        "fit_s": round(fit_s, 2),
        "wall_s": round(time.perf_counter() - began, 2),
    }
    folder.write("train/metrics.json", summary)  # last: it says that the training is whole
    say(
        console,
        f"train: best {task.train.metric} {metrics[task.train.metric]:.4f} "
        f"(epoch {metrics['epoch']:g}), model in {folder.uri}/model",
    )
    return summary


def _here(
    task: Task, target: Target, folder: RunFolder, ready: Prepared, shown: Shown
) -> dict[str, Any]:
    """Trains in Ray Train's local mode: this process is the only worker."""
    console = shown.console
    say(console, "train: one worker, this process")
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would repeat our own lines
    checkpoint.forget_halves(folder)
    shared = (ready.base, ready.rows, ready.held_out)
    trainer = TorchTrainer(
        worker,  # type: ignore[arg-type]
        train_loop_config=_config(task, target, folder, ready, shown, shared),
        scaling_config=ray.train.ScalingConfig(num_workers=0),
    )
    result = _fit(trainer, folder)
    if result.return_value:
        raise UserError(f"training stopped: {result.return_value}")
    torch.cuda.empty_cache()  # of a GPU that trained: what is served next may share it
    last = checkpoint.latest(folder, checkpoint.notes, partial(say, console))
    if last is None or last["metrics"]["step"] < last["metrics"]["steps"]:
        raise UserError(
            f"the last checkpoint was damaged as soon as it was written; the same command with "
            f"--run {folder.name} goes on from the one before"
        )
    return last


def _on_workers(
    task: Task, target: Target, folder: RunFolder, ready: Prepared, shown: Shown
) -> dict[str, Any]:
    # Here, not on a node that may be lost: people would see nothing of the rest.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    with _Listener(progress, shown):
        last = _last(task, target, folder, ready, progress, shown.console)
    progress.shutdown()
    return last


def _last(
    task: Task,
    target: Target,
    folder: RunFolder,
    ready: Prepared,
    progress: Queue,
    console: Console,
) -> dict[str, Any]:
    """Trains until the checkpoint of the last step is there and whole; returns its notes."""
    for _ in range(1 + target.train.max_failures):
        checkpoint.forget_rays_list(folder)
        try:
            # Any: the declared type is that of Train V1.
            result: Any = _fit(_trainer(task, target, folder, ready, progress), folder)
        except ray.exceptions.ActorDiedError as e:
            if e.actor_init_failed:
                raise
            say(console, "train: Ray Train's controller was lost; another one goes on")
            cluster.free_places()
            continue
        if result.return_value:
            raise UserError(f"training stopped: {result.return_value}")
        last = checkpoint.latest(folder, checkpoint.notes, partial(say, console))
        if last and last["metrics"]["step"] == last["metrics"]["steps"]:
            return last
    raise UserError(
        f"training was lost {1 + target.train.max_failures} times (target.train.max_failures is "
        f"{target.train.max_failures}); the same command with --run {folder.name} goes on"
    )


def _fit(trainer: TorchTrainer, folder: RunFolder) -> Any:
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except (ray.train.TrainingFailedError, OSError) as e:  # OSError: of this process
        if no_room := re.search(r"NoRoomError: (.+)", str(e)):
            raise UserError(f"training stopped: {no_room[1]}") from None
        if found := re.search(r"AWS Error .*|(?<=config\.UserError: ).*", str(e)):
            stopped = f"training stopped; --run {folder.name} goes on from its last checkpoint"
            if found[0].startswith("AWS"):
                raise unreachable(f"{stopped} in {folder.uri}", OSError(found[0])) from None
            raise UserError(f"{stopped}: {found[0]}") from None
        if "No space left on device" not in str(e):
            raise
        checkpoint.latest(folder, checkpoint.notes, lambda _: None)  # what is half-written goes
        raise UserError(
            f"no space left on device: the last checkpoint does not fit into {folder.uri}. Make "
            f"room; the same command with --run {folder.name} goes on from the one before"
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)
        for timer in getattr(trainer, "insisting", []):
            timer.cancel()


def _fixed_params(folder: RunFolder, params: dict[str, Any], console: Console) -> dict[str, Any]:
    """Training that began with some parameters goes on with them, whatever a later sweep says."""
    if folder.has("train/params.json"):
        params = folder.read("train/params.json")["params"]
    else:
        folder.write("train/params.json", {"params": params, "patch": nested(params)})
    if params:
        say(console, f"train: with {params_text(params)}")
    return params


def _trainer(
    task: Task, target: Target, folder: RunFolder, ready: Prepared, progress: Queue
) -> Trainer:
    limits = target.train
    low, high = limits.width
    ask = cluster.one_chip(cluster.asks(target, ["train"])[0], cluster.nodes(target))
    # The controller takes a worker's next report, and sees its end or its loss, only this often;
    # Ray's 2 s would make every checkpoint cost up to 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    # A notice is looked for this often; some give half a minute of it.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    if low < high:
        # A lost node is counted for 15 s more, and an elastic job waits this long for a place on
        # it before it counts again; Ray's 60 s would be spent idle.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    return Trainer(
        worker,  # type: ignore[arg-type]  # a return value is allowed since V2
        torch_config=Torch(),
        # One reference to three objects: the arrays stay in the object store, nobody copies them.
        train_loop_config=_config(
            task,
            target,
            folder,
            ready,
            progress,
            ray.put((ready.base, ready.rows, ready.held_out)),
        ),
        **_streamed(task, folder, ready),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
            use_gpu=limits.gpus_per_worker > 0,
            resources_per_worker=ask.bundle,
            label_selector=ask.selector or None,  # type: ignore[call-arg]
            placement_strategy=limits.placement,
            elastic_resize_monitor_interval_s=limits.grow_check_s,
        ),
        run_config=ray.train.RunConfig(
            storage_path=f"{folder.uri}/train",
            name="checkpoints",  # Ray keeps them all: which go is said in checkpoint.prune
            failure_config=ray.train.FailureConfig(max_failures=limits.max_failures),
        ),
    )


def _config(
    task: Task, target: Target, folder: RunFolder, ready: Prepared, progress: Any, shared: Any
) -> dict[str, Any]:
    """What a worker is told."""
    return {
        "task": task,
        "target": target,
        "progress": progress,
        "folder": folder,
        "joined": cluster.joins(target) is not None,
        "cpus": cluster.worker_cpus(target),
        "shared": shared,
        "streamed": ready.stream and len(ready.stream),
    }


def _streamed(task: Task, folder: RunFolder, ready: Prepared) -> dict[str, Any]:
    """What Ray Data brings to the workers, if anything."""
    if ready.stream is None:
        return {}
    from .ingest import Ingest

    tokenizer = ready.tokenizer.backend_tokenizer.to_str()
    ingest = Ingest(ready.stream, task.train, tokenizer, folder)
    return {"datasets": {"rows": lambda: None}, "dataset_config": ingest}


class _Listener(threading.Thread):
    """Prints what comes over a queue while `fit` blocks the driver's main thread."""

    def __init__(self, progress: Queue, shown: Shown) -> None:
        super().__init__(daemon=True)
        self.progress, self.shown, self.over = progress, shown, threading.Event()

    def __enter__(self) -> "_Listener":
        say(self.shown.console, "train: starting the workers")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(timeout=10)

    def run(self) -> None:
        while True:
            # What was told before the end is still printed.
            last = self.over.is_set()
            try:
                for message in self.progress.get_nowait_batch(self.progress.qsize()):
                    self.shown.put_nowait(message)
            except (Empty, ray.exceptions.RayError):
                pass
            if last:
                return
            self.over.wait(0.3)


def _export(
    last: dict[str, Any], task: Task, folder: RunFolder, ready: Prepared, console: Console
) -> dict[str, Any]:
    """Copies the best checkpoint's model to model/ and returns its metrics with the whole
    history."""
    for name in checkpoint.best_first(folder, _scores(last["history"], task)):
        try:
            return _put(name, last, task, folder, ready, partial(say, console))
        except checkpoint.DamagedError as e:
            say(console, f"train: warning: {e}; the next best is taken")
    raise AssertionError("the last step's checkpoint is whole and evaluated")


def _put(
    name: str,
    last: dict[str, Any],
    task: Task,
    folder: RunFolder,
    ready: Prepared,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    history, held_out = last["history"], ready.held_out
    with tempfile.TemporaryDirectory() as local, checkpoint.opened(folder, name) as best:
        noted = json.loads((best / "notes.json").read_text())
        metrics, found, answers = noted["metrics"], {}, None
        if (best / checkpoint.ANSWERS).is_file():
            answers, rows = np.load(best / checkpoint.ANSWERS), (held_out.labels, held_out.lengths)
            found = evaluation.evaluate(*rows, answers, ready.dataset.labels)
        path = Path(local) / "model"
        shutil.copytree(best / "model", path)
        ready.tokenizer.save_pretrained(path)
        notes = {
            "max_tokens": task.data.max_tokens,
            "run": folder.name,
            "task": published(task.model_dump(mode="json")),
            "data": ready.dataset.summary(),
            "pretrained": public_name(ready.base.pretrained),
            **{k: metrics[k] for k in ("eval_accuracy", "eval_f1", "eval_loss")},
            **evaluation.scalars(found),
        }
        (path / "workloads.json").write_text(json.dumps(notes, indent=2, ensure_ascii=False))
        texts = ready.dataset.validation.texts
        samples.leave(path, folder.name, ready.rows, held_out, texts)
        took = {"seconds": last["fit_s"], "cost": last["cost"]}
        trained = {**metrics, **took, "workers": history[-1]["world"]}
        card.write(path, folder, notes, {**trained, "base": ready.base.pretrained}, found)
        folder.write("train/evaluation.json", found)
        validation, labels = ready.dataset.validation, ready.dataset.labels
        why = explain.of_rows(path, validation.texts, validation.labels, labels, answers, tell)
        folder.write("train/explanations.json", why)
        folder.put_model(path)
        digest = manifest.model_digest(path)
    kept = ("epoch", "step", "steps", "eval_accuracy", "eval_f1", "eval_loss")
    return {
        **{key: metrics[key] for key in kept},
        "samples_per_s": _mean_rate(history),
        "workers": history[-1]["world"],
        "confusion": noted["confusion"],
        "labels": ready.dataset.labels,
        "digest": digest,
        "history": history,
    }


def _mean_rate(history: list[dict[str, Any]]) -> float:
    """Rows a second over the whole training, evaluations and checkpoints left out."""
    steps = [m["step"] for m in history]
    lengths = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    seconds = sum(n / m["samples_per_s"] for n, m in zip(lengths, history, strict=True))
    return round(sum(lengths) / seconds, 1)
