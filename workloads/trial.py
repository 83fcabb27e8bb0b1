"""One trial of a sweep, as the actor that Ray Tune gives trial after trial: the imports, the rows
and the base weights are there once."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from . import costs, loop, model
from .config import Target, Task
from .data import Tokens

# An answer, not an accident: this combination is no good, and trying again would not help.
_WORST = {"eval_accuracy": 0.0, "eval_f1": 0.0, "eval_loss": 1e9, "loss": 1e9, "diverged": 1}


def trial_task(task: Task, params: dict[str, Any]) -> Task:
    """The task of one trial; what was drawn is validated as a Task again."""
    plan = {"train.epochs": task.tune.epochs, "train.evals_per_epoch": task.tune.evals_per_epoch}
    return task.patched({**params, **plan})


def confirms(task: Task, params: dict[str, Any]) -> bool:
    """Whether these are a candidate's parameters with another seed."""
    return task.tune.num_candidates > 0 and "train.seed" in params


def ranked(metrics: dict[str, Any], metric: str) -> float:
    """What schedulers compare: more is better, and what has the same accuracy or F1 goes by its
    loss. Trials that have learned nothing yet all predict one class, and a scheduler stops none
    of those that tie."""
    loss = min(metrics["eval_loss"], 1e3)
    return -loss if metric == "eval_loss" else metrics[metric] - 1e-8 * loss


class Trial(tune.Trainable):
    """Trains on the small rows; a step ends at the next evaluation."""

    def setup(  # type: ignore[override]  # Tune adds the parameters
        self,
        config: dict[str, Any],
        task: Task,
        target: Target,
        base: model.Base,
        rows: Tokens,
        held_out: Tokens,
    ) -> None:
        """Once an actor."""
        loop.settle_in(target.tune.cpus_per_trial)
        self.whole, self.base, self.rows, self.held_out = task, base, rows, held_out
        dtype, _ = model.precision(target.precision, target.device)
        self.told: list[str] = []
        self.meter = costs.Meter(target.tune.gpus_per_trial)
        limit = target.train.max_batch_per_worker
        self.place = loop.Place(target.device, dtype, max_batch=limit, tell=self.told.append)
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Once a trial; True: this actor can take it."""
        self.task = trial_task(self.whole, config)
        net = model.build(self.base, self.task.model, self.task.train.seed)
        self.net = net.to(self.place.device)
        self.report: dict[str, Any] = {"evals": 0, "seconds": 0.0, **costs.Used()._asdict()}
        self._train(None)
        return True

    def _train(self, start: dict[str, Any] | None) -> None:
        plan = self.task.train
        self.points = loop.train(self.net, self.rows, self.held_out, plan, self.place, start)

    def step(self) -> dict[str, Any]:
        """Trains until the next evaluation, whose metrics it returns."""
        # The trial's own arithmetic: imports and the building of the model count as overhead.
        began, seen = time.perf_counter(), self.report
        self.meter.take()
        confirming = confirms(self.whole, self.config)
        most_ms = None if confirming else self.whole.tune.max_predict_ms
        try:
            self.point = next(point for point in self.points if point.evaluated)
            metrics = dict(self.point.metrics)
            whole = metrics["step"] == metrics["steps"]
        except loop.DivergedError:
            metrics, whole = _WORST, True
        self.report = {
            **metrics,
            "evals": seen["evals"] + ("diverged" not in metrics),
            "seconds": seen["seconds"] + time.perf_counter() - began,
            **{key: seen[key] + more for key, more in self.meter.take()._asdict().items()},
        }
        if most_ms:
            self.report["predict_ms"] = seen.get("predict_ms") or self._predict_ms()
        slow = bool(most_ms) and self.report["predict_ms"] > most_ms
        # Schedulers go by the rung: on the lowest, nothing is stopped or compared.
        rung = 0 if confirming else self.report["evals"]
        told = {"told": self.told.pop()} if self.told else {}
        ends = {"slow": slow, "whole": whole, "done": whole or slow}
        score = ranked(metrics, self.whole.tune.metric)
        return {**self.report, **told, "rung": rung, "ranked": score, **ends}

    def _predict_ms(self) -> float:
        """Median milliseconds of the prediction of one text, of all lengths that there are."""
        times = []
        order = np.argsort(self.held_out.lengths)
        for row in order[np.linspace(0, len(order) - 1, 21).astype(int)]:
            one = self.held_out.take(np.array([row]))
            began = time.perf_counter()
            loop.evaluate(self.net, one, self.place)
            times.append(time.perf_counter() - began)
        return round(1000 * statistics.median(times), 3)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """All that going on takes; only population based training asks for it."""
        torch.save({**self.point.state(), "report": self.report}, f"{checkpoint_dir}/state.pt")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Goes on from there, with this trial's own parameters."""
        path = Path(checkpoint) / "state.pt"
        state = torch.load(path, map_location=self.place.device, weights_only=True)
        self.report = state.pop("report")
        # The optimizer brings its decay with it, and the loop sets the rate only.
        state["optimizer"]["param_groups"][0]["weight_decay"] = self.task.train.weight_decay
        self._train(state)
