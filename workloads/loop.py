"""The training loop: a generator that yields at every evaluation and checkpoint, plain torch, no
Ray.

A trial, a DDP worker and a test drive the same loop. Letters: B rows of a micro-batch, T tokens, C
classes.

Width never changes the maths: a batch is formed globally, then split over the ranks; a rank's loss
is the sum over
its rows x world size / rows of the global batch, so that DDP's average is the gradient of the
global mean.
"""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .config import Train, UserError
from .data import Tokens, collate, epoch_batches, eval_batches


class DivergedError(UserError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Point:
    """Where training stands when the loop yields."""

    metrics: dict[str, float]  # one flat line; the eval_* keys only after an evaluation
    evaluated: bool
    checkpoint_due: bool
    confusion: list[list[int]]  # (C, C) true x predicted of the latest evaluation
    state: Callable[[], dict[str, Any]]  # all that `start` needs to go on from here


@dataclass(frozen=True)
class Place:
    """The machine side: nothing here changes what is learned."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    max_batch: int = 32  # rows in memory at once
    checkpoint_steps: int = 0  # 0: never due
    log_steps: int = 0  # yield this often for people to see; 0: never


@dataclass(frozen=True)
class Share:
    """What one rank has of a global batch."""

    tokens: Tokens  # where the rows are; at least one
    mine: np.ndarray  # row numbers in `tokens`; none where ranks are more than rows
    size: int  # rows of the whole global batch


class Stream(Protocol):
    """Rows that come as they are needed, already dealt to the ranks."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def shares(self, plan: Train, place: Place, epoch: int, done: int) -> Iterator[Share]:
        """This rank's part of each global batch of an epoch, without the first `done`."""


def steps_per_epoch(rows: int, plan: Train) -> int:
    """Optimizer steps in an epoch; the last batch may be short."""
    return math.ceil(rows / plan.global_batch)


def accumulation(global_batch: int, world: int, max_batch: int) -> int:
    """Micro-batches that a rank runs for one optimizer step."""
    return math.ceil(math.ceil(global_batch / world) / max_batch)


def train(
    net: torch.nn.Module,
    rows: Tokens | Stream,
    held_out: Tokens,
    plan: Train,
    place: Place,
    start: dict[str, Any] | None = None,
) -> Iterator[Point]:
    """Trains `net` in place and yields a Point at every evaluation, due checkpoint and log step.

    All ranks yield at the same steps. `start` is a Point's state: the loop goes on after its step,
    without
    repeating or skipping a row. Raises DivergedError when the loss is not finite.
    """
    per_epoch = steps_per_epoch(len(rows), plan)
    total = per_epoch * plan.epochs
    evals = _eval_steps(per_epoch, plan)
    optimizer = _adamw(net, plan)
    meter, step, confusion = Meter(), 0, []
    if start is not None:
        _bare(net).load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
        step, confusion = start["step"], start["confusion"]
        if place.rank == 0:
            meter = Meter(*start["meter"])
    net.train()
    while step < total:
        epoch, done = divmod(step, per_epoch)
        for share in _shares(rows, plan, place, epoch, done):
            began = time.perf_counter()
            # Dropout depends on the step and the rank only, so a resumed run draws the same.
            torch.manual_seed(hash((plan.seed, step, place.rank)) % 2**63)
            rate = _rate(step, total, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            _backward(net, share, place, meter)
            torch.nn.utils.clip_grad_norm_(net.parameters(), plan.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            meter.seconds += time.perf_counter() - began
            evaluated = step in evals
            due = bool(place.checkpoint_steps) and step % place.checkpoint_steps == 0
            seen = bool(place.log_steps) and step % place.log_steps == 0
            if not (evaluated or due or seen or step == total):
                continue
            meter = meter.summed(place)
            metrics = {
                "epoch": round(step / per_epoch, 4),
                "step": step,
                "steps": total,
                "lr": rate,
                **meter.metrics(),
                "memory_mb": _peak_memory_mb(place.device),
            }
            _check_finite(metrics["loss"], metrics, plan)
            if evaluated:
                scores, confusion = evaluate(net, held_out, place)
                _check_finite(scores["eval_loss"], metrics, plan)
                metrics.update(scores)
                meter = Meter()
            yield Point(
                metrics,
                evaluated,
                due or step == total,
                confusion,
                _state(net, optimizer, step, confusion, meter),
            )
            if place.rank != 0:
                meter = Meter()  # rank 0 carries the sum on
            net.train()


def _check_finite(loss: float, at: dict[str, Any], plan: Train) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {at['step']} of {at['steps']}: lower train.lr "
            f"({plan.lr:g}) or train.grad_clip ({plan.grad_clip:g})"
        )


def _state(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    confusion: Any,
    meter: "Meter",
) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "model": _bare(net).state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "confusion": confusion,
        "meter": [meter.loss, meter.rows, meter.tokens, meter.padded, meter.seconds],
    }


def _shares(
    rows: Tokens | Stream, plan: Train, place: Place, epoch: int, done: int
) -> Iterator[Share]:
    """This rank's part of each global batch of an epoch, without the first `done`."""
    if not isinstance(rows, Tokens):
        yield from rows.shares(plan, place, epoch, done)
        return
    for batch in epoch_batches(rows, plan.global_batch, plan.seed, epoch)[done:]:
        yield Share(rows, batch[place.rank :: place.world], len(batch))


def _backward(net: torch.nn.Module, share: Share, place: Place, meter: "Meter") -> None:
    """Adds this rank's share of the gradient of the mean loss over the global batch."""
    rows, mine = share.tokens, share.mine
    scale = place.world / share.size
    if len(mine) == 0:  # a rank without a row still has to take part in the all-reduce
        mine, scale = np.array([0]), 0.0
    micros = [mine[i : i + place.max_batch] for i in range(0, len(mine), place.max_batch)]
    for i, micro in enumerate(micros):
        # One all-reduce a step: gradients are exchanged with the last micro-batch only.
        hold = i < len(micros) - 1 and hasattr(net, "no_sync")
        with net.no_sync() if hold else contextlib.nullcontext():  # type: ignore[operator]
            logits, labels, size = _forward(net, rows, micro, place)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (loss * scale).backward()
        if scale:
            meter.loss += loss.item()
            meter.rows += len(micro)
            meter.tokens += int(rows.lengths[micro].sum())
            meter.padded += size


def _forward(
    net: torch.nn.Module, rows: Tokens, micro: np.ndarray, place: Place
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits (B, C) float32 and labels (B,) int64 of some rows, and how many tokens were
    computed."""
    ids, mask, labels = (torch.from_numpy(a).to(place.device) for a in collate(rows, micro))
    low = place.dtype != torch.float32
    with torch.autocast(place.device, place.dtype, enabled=low):
        logits = net(input_ids=ids, attention_mask=mask).logits
    return logits.float(), labels, ids.numel()


@torch.inference_mode()
def evaluate(
    net: torch.nn.Module, rows: Tokens, place: Place
) -> tuple[dict[str, float], list[list[int]]]:
    """Loss, accuracy and macro F1 over all rows, and the confusion matrix (C, C).

    Counts are summed over the ranks, so the result does not depend on how rows fall into batches.
    """
    net.eval()
    bare = _bare(net)  # DDP would exchange buffers
    classes = int(bare.config.num_labels)  # type: ignore[union-attr, arg-type]
    counts = torch.zeros(classes * classes + 1, dtype=torch.float64, device=place.device)
    for i, batch in enumerate(eval_batches(rows, place.max_batch)):
        if i % place.world != place.rank:
            continue
        logits, labels, _ = _forward(bare, rows, batch, place)
        counts[-1] += F.cross_entropy(logits, labels, reduction="sum").double()
        cells = labels * classes + logits.argmax(-1)
        counts[:-1] += torch.bincount(cells, minlength=classes * classes)
    if place.world > 1:
        dist.all_reduce(counts)
    confusion = counts[:-1].reshape(classes, classes).cpu()
    scores = {
        "eval_loss": float(counts[-1]) / len(rows),
        **classification_scores(confusion.numpy()),
    }
    return scores, confusion.long().tolist()


def classification_scores(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1 of a confusion matrix (C, C), true x predicted.

    As scikit-learn's f1_score(average="macro"): a class without rows and predictions is left out.
    """
    hits = np.diag(confusion)
    rows_and_predictions = confusion.sum(0) + confusion.sum(1)
    seen = rows_and_predictions > 0
    f1 = 2 * hits[seen] / rows_and_predictions[seen]
    return {"eval_accuracy": float(hits.sum() / confusion.sum()), "eval_f1": float(f1.mean())}


@dataclass
class Meter:
    """Sums since the last evaluation."""

    loss: float = 0.0  # summed over rows
    rows: float = 0.0
    tokens: float = 0.0
    padded: float = 0.0
    seconds: float = 0.0  # of this rank; evaluation and checkpoints left out

    def summed(self, place: Place) -> "Meter":
        """Over all ranks; the seconds stay this rank's."""
        if place.world == 1:
            return self
        sums = torch.tensor(
            [self.loss, self.rows, self.tokens, self.padded],
            dtype=torch.float64,
            device=place.device,
        )
        dist.all_reduce(sums)
        loss, rows, tokens, padded = sums.tolist()
        return Meter(loss, rows, tokens, padded, self.seconds)

    def metrics(self) -> dict[str, float]:
        """Mean loss, rates per second over all ranks, and the share of tokens that is padding."""
        seconds = max(self.seconds, 1e-9)
        return {
            "loss": self.loss / self.rows,
            "samples_per_s": round(self.rows / seconds, 1),
            "tokens_per_s": round(self.tokens / seconds, 1),
            "padding_pct": round(100 * (1 - self.tokens / self.padded), 2),
        }


def _eval_steps(per_epoch: int, plan: Train) -> set[int]:
    times = min(plan.evals_per_epoch, per_epoch)
    return {
        epoch * per_epoch + round(per_epoch * i / times)
        for epoch in range(plan.epochs)
        for i in range(1, times + 1)
    }


def _rate(step: int, total: int, plan: Train) -> float:
    """Linear warm-up, then linear decay to 0."""
    warmup = round(total * plan.warmup)
    if step < warmup:
        return plan.lr * (step + 1) / warmup
    return plan.lr * (total - step) / max(1, total - warmup)


def _adamw(net: torch.nn.Module, plan: Train) -> torch.optim.AdamW:
    """Decay on matrices only (Loshchilov & Hutter 2019, as in BERT's own training)."""
    params = [p for p in net.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.lr, fused=True)


def _bare(net: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP, or the model."""
    return net.module if hasattr(net, "no_sync") else net  # type: ignore[return-value]


def _peak_memory_mb(device: str) -> float:
    """Peak memory of this process: of the GPU if it has one, else resident."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
