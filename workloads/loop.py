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
import ctypes
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .config import Train, UserError
from .data import Share, Tokens, collate, epoch_batches, eval_batches, steps_per_epoch
from .passes import STEP, Passes, forward, moved
from .words import InUse, Words, load_moments, moments, set_aside, table_of


class DivergedError(UserError):
    """The loss is no longer a number."""


class NoRoomError(UserError):
    """A micro-batch does not fit into memory."""


@dataclass(frozen=True)
class Point:
    """Where training stands when the loop yields."""

    metrics: dict[str, float]  # one flat line; the eval_* keys only after an evaluation
    evaluated: bool
    checkpoint_due: bool
    confusion: list[list[int]]  # (C, C) true x predicted of the latest evaluation
    state: Callable[[], dict[str, Any]]  # all that `start` needs to go on from here
    answers: np.ndarray | None = None  # those of `evaluate`, only after an evaluation


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
    log_s: float = 0  # and at least about this often; 0: any time
    tell: Callable[[str], None] = print  # one line for people
    may_halve: bool = True  # max_batch, when it does not fit


def settle_in(cpus: float) -> None:
    """Makes this process one that trains: a thread a CPU, and memory that is kept.

    glibc would give the arrays of each step back and fault them in again at the next: 7 % of the
    time of a 6-layer BERT. cuDNN would plan its attention anew for each length of text: an eighth
    of the rate in the first epoch (H100).
    """
    torch.set_num_threads(max(1, int(cpus)))
    torch.backends.cuda.enable_cudnn_sdp(False)
    if keep := getattr(ctypes.CDLL(None), "mallopt", None):
        for trim_or_mmap_threshold in (-1, -3):
            keep(trim_or_mmap_threshold, 2**30)


class Stream(Protocol):
    """Rows that come as they are needed, already dealt to the ranks."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def shares(self, plan: Train, place: Place, epoch: int, done: int) -> Iterator[Share]:
        """This rank's part of each global batch of an epoch, without the first `done`."""


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
    words = _words(net, plan, place)
    optimizer = _adamw(net, plan)
    # What fp16 cannot hold is scaled up in the loss and down again before it is used.
    scaler = torch.amp.GradScaler(place.device, enabled=place.dtype == torch.float16)
    passes = Passes(net, place.device, place.dtype, scaler, place.tell)
    meter, step, confusion = Meter(), 0, []
    if start is not None:
        _bare(net).load_state_dict(start["model"])
        load_moments(optimizer, words, start)
        scaler.load_state_dict(start["scaler"])
        step, confusion = start["step"], start["confusion"]
        if place.rank == 0:
            meter = Meter(*start["meter"])
    net.train()
    look, looked, looked_at = step + 1, step, time.perf_counter()
    while step < total:
        epoch, done = divmod(step, per_epoch)
        began = time.perf_counter()
        for share in _shares(rows, plan, place, epoch, done, bool(words)):
            # Dropout depends on the step and the rank only, so a resumed run draws the same.
            torch.manual_seed(hash((plan.seed, step, place.rank)) % 2**63)
            rate = _rate(step, total, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            used = words.use(_all_words(share, place, len(words.table))) if words else None
            place = _backward_that_fits(passes, share, place, meter, used)
            if words:
                words.share_gradient(place.world)
                scaler.unscale_(torch.optim.SGD([words.rows], lr=0.0))  # it knows optimizers only
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(_trained(net, used), plan.grad_clip)
            scaler.step(optimizer)
            # The scaler leaves out a step of which a gradient is not finite; so do the words.
            if words and (not scaler.is_enabled() or math.isfinite(norm)):
                words.step(rate)
            scaler.update()
            step += 1
            meter.seconds += time.perf_counter() - began
            evaluated = step in evals
            due = bool(place.checkpoint_steps) and step % place.checkpoint_steps == 0
            seen = bool(place.log_steps) and step % place.log_steps == 0
            seen |= bool(place.log_s) and step >= look
            if not (evaluated or due or seen or step == total):
                began = time.perf_counter()
                continue
            if words and (evaluated or due or step == total):
                words.settle()
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
            answers = None
            if evaluated:
                scores, confusion, answers = evaluate(net, held_out, place)
                _check_finite(scores["eval_loss"], metrics, plan)
                metrics.update(scores)
                meter = Meter()
            yield Point(
                metrics,
                evaluated,
                due or step == total,
                confusion,
                _state(net, optimizer, words, scaler, step, confusion, meter),
                answers,
            )
            if place.rank != 0:
                meter = Meter()  # rank 0 carries the sum on
            if place.log_s:
                pace_s = (time.perf_counter() - looked_at) / (step - looked)
                look = step + _slowest(max(1, round(place.log_s / pace_s)), place)
                looked, looked_at = step, time.perf_counter()
            net.train()
            began = time.perf_counter()


def _slowest(steps: int, place: Place) -> int:
    """The fewest steps that any rank says."""
    least = torch.tensor(steps, device=place.device)
    if place.world > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def _check_finite(loss: float, at: dict[str, Any], plan: Train) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {at['step']} of {at['steps']}: lower train.lr "
            f"({plan.lr:g}) or train.grad_clip ({plan.grad_clip:g})"
        )


def _state(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    words: Words | None,
    scaler: torch.amp.GradScaler,
    step: int,
    confusion: Any,
    meter: "Meter",
) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "model": _bare(net).state_dict(),
        **moments(optimizer, words, table_of(_bare(net))),
        "scaler": scaler.state_dict(),
        "step": step,
        "confusion": confusion,
        "meter": [meter.loss, meter.rows, meter.tokens, meter.padded, meter.seconds],
    }


def _shares(
    rows: Tokens | Stream, plan: Train, place: Place, epoch: int, done: int, by_words: bool
) -> Iterator[Share]:
    """This rank's part of each global batch of an epoch, without the first `done`."""
    if not isinstance(rows, Tokens):
        yield from rows.shares(plan, place, epoch, done)
        return
    for batch in epoch_batches(rows, plan.global_batch, plan.seed, epoch)[done:]:
        words = np.unique(collate(rows, batch)[0]) if by_words else None
        yield Share(rows, batch[place.rank :: place.world], len(batch), words)


def _words(net: torch.nn.Module, plan: Train, place: Place) -> Words | None:
    """None where the table is trained as a whole: a single GPU has that done before it has been
    told which rows are in use."""
    if place.device == "cuda" and place.world == 1:
        return None
    table = set_aside(_bare(net))
    return None if table is None else Words(table, plan.weight_decay)


def _all_words(share: Share, place: Place, vocabulary: int) -> np.ndarray:
    """The ids of a global batch; where they are not known, each rank says its own."""
    if share.words is not None:
        return share.words
    held = torch.zeros(vocabulary, dtype=torch.uint8, device=place.device)
    mine = share.mine if len(share.mine) else np.array([0])
    held[torch.from_numpy(collate(share.tokens, mine)[0]).flatten()] = 1
    if place.world > 1:
        dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.nonzero().flatten().cpu().numpy()


def _trained(net: torch.nn.Module, used: InUse | None) -> list[torch.Tensor]:
    return [*net.parameters(), *([used.rows] if used else [])]


def _backward_that_fits(
    passes: Passes, share: Share, place: Place, meter: "Meter", used: InUse | None
) -> Place:
    """The gradient of a step; halves max_batch once, and takes the step again, when that does not
    fit into memory. Not among ranks: the others are in an all-reduce by then, so all have to begin
    again. Raises NoRoomError."""
    before = replace(meter)
    try:
        _backward(passes, share, place, meter, used)
        return place
    except RuntimeError as e:
        if not _is_out_of_memory(e):
            raise
    most = min(place.max_batch, len(share.mine))
    if place.world > 1 or not place.may_halve or most < 2:
        raise NoRoomError(
            f"{most} rows do not fit into memory at once: lower "
            f"target.train.max_batch_per_worker ({place.max_batch}) or task.data.max_tokens"
        )
    meter.__dict__.update(before.__dict__)
    half = replace(place, max_batch=math.ceil(most / 2), may_halve=False)
    place.tell(halved_text(most, half.max_batch))
    return _backward_that_fits(passes, share, half, meter, used)


def halved_text(rows: int, max_batch: int) -> str:
    """What people are told."""
    return (
        f"warning: {rows} rows do not fit into memory at once; going on with {max_batch} and more "
        "accumulation, which changes no result. Lower target.train.max_batch_per_worker"
    )


def _is_out_of_memory(e: RuntimeError) -> bool:
    # Only CUDA has a type for it.
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(e, torch.OutOfMemoryError) or any(text in str(e) for text in texts)


def _backward(
    passes: Passes, share: Share, place: Place, meter: "Meter", used: InUse | None
) -> None:
    """This rank's share of the gradient of the mean loss over the global batch.

    `used` stands for the net's own embeddings, if these are set aside.
    """
    passes.forget_gradients()
    if used:
        used.rows.grad = None
    rows, mine, net = share.tokens, share.mine, passes.net
    scale = place.world / share.size
    if len(mine) == 0:  # a rank without a row still has to take part in the all-reduce
        mine, scale = np.array([0]), 0.0
    micros = [mine[i : i + place.max_batch] for i in range(0, len(mine), place.max_batch)]
    for i, micro in enumerate(micros):
        # One all-reduce a step: gradients are exchanged with the last micro-batch only.
        hold = i < len(micros) - 1 and hasattr(net, "no_sync")
        ids, mask, labels = _padded(rows, micro, place)
        if used:
            # A rank without rows takes one that counts for nothing: any word will do.
            ids = np.searchsorted(used.ids, ids).clip(max=len(used.ids) - 1)
        with net.no_sync() if hold else contextlib.nullcontext():  # type: ignore[operator]
            batch = moved((ids, mask, labels), place.device)
            loss = passes.backward(batch, scale, used.rows if used else None)
        if scale:
            meter.loss = meter.loss + loss.double()  # a GPU is not waited for
            meter.rows += len(micro)
            meter.tokens += int(rows.lengths[micro].sum())
            meter.padded += ids.size


def _padded(
    rows: Tokens, micro: np.ndarray, place: Place
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and mask (B, T), labels (B,) of some rows; a GPU sees few different T."""
    return collate(rows, micro, STEP if place.device == "cuda" else 1)


@torch.inference_mode()
def evaluate(
    net: torch.nn.Module, rows: Tokens, place: Place
) -> tuple[dict[str, float], list[list[int]], np.ndarray]:
    """Loss, accuracy and macro F1 over all rows, the confusion matrix (C, C), and the answer to
    each row, (N, 2) float32: the predicted class and its probability.

    Counts are summed over the ranks, so the result does not depend on how rows fall into batches.
    """
    net.eval()
    bare = _bare(net)  # DDP would exchange buffers
    classes = int(bare.config.num_labels)  # type: ignore[union-attr, arg-type]
    counts = torch.zeros(classes * classes + 1, dtype=torch.float64, device=place.device)
    answers = torch.zeros(len(rows), 2, device=place.device)
    for i, batch in enumerate(eval_batches(rows, place.max_batch)):
        if i % place.world != place.rank:
            continue
        inputs = moved(_padded(rows, batch, place), place.device)
        logits, labels = forward(bare, inputs, place.dtype), inputs.labels
        counts[-1] += F.cross_entropy(logits, labels, reduction="sum").double()
        predicted = logits.argmax(-1)
        surest = logits.float().softmax(-1).amax(-1)
        numbers = torch.from_numpy(batch).to(place.device)
        answers[numbers] = torch.stack([predicted.float(), surest], -1)
        cells = labels * classes + predicted
        counts[:-1] += torch.bincount(cells, minlength=classes * classes)
    if place.world > 1:
        dist.all_reduce(counts)
        dist.all_reduce(answers)  # each row is 0 but on one rank
    confusion = counts[:-1].reshape(classes, classes).cpu()
    scores = {
        "eval_loss": float(counts[-1]) / len(rows),
        **classification_scores(confusion.numpy()),
    }
    return scores, confusion.long().tolist(), answers.cpu().numpy()


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

    loss: float | torch.Tensor = 0.0  # summed over rows
    rows: float = 0.0
    tokens: float = 0.0
    padded: float = 0.0
    seconds: float = 0.0  # of this rank; evaluation and checkpoints left out

    def summed(self, place: Place) -> "Meter":
        """Over all ranks; the seconds stay this rank's."""
        began = time.perf_counter()
        self.loss = float(self.loss)
        self.seconds += time.perf_counter() - began  # what a GPU still had to do
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
            "loss": float(self.loss) / self.rows,
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
    """Decay on matrices only (Loshchilov & Hutter 2019, as in BERT's own training). The table of
    words comes last, if it is not set aside."""
    table = table_of(_bare(net))
    params = [p for p in net.parameters() if p.requires_grad]
    rest = [p for p in params if p is not table]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in params if p is table], "weight_decay": plan.weight_decay},
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
