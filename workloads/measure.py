"""How fast gradients cross the network, timed with the collectives that training uses, and how long
a training step takes without them. Plain torch: a training worker and `check` share it."""

import time

import numpy as np
import torch
import torch.distributed as dist

from . import loop, model
from .config import Target, Task
from .data import Tokens, collate, epoch_batches
from .words import table_of

SIZES = (4, 64 * 2**10, 2**20, 4 * 2**20, 16 * 2**20, 64 * 2**20)


def all_reduces(
    device: str, budget_s: float = 3, group: dist.ProcessGroup | None = None
) -> dict[int, float]:
    """Bytes -> seconds of one all-reduce among the ranks of a group, of growing sizes until the
    budget is spent. Called by all of them; all get the slowest rank's times."""
    times: dict[int, float] = {}
    left = budget_s
    for size in SIZES:
        data = torch.zeros(size // 4, device=device)
        _once(data, group)  # connections are made at the first use
        # All ranks go on with the slowest one's times, so that all repeat and stop alike.
        spent = _slowest(_once(data, group), device, group)
        repeats = max(1, min(10, int(0.2 / spent)))
        best = min(_once(data, group) for _ in range(repeats))
        times[size] = _slowest(best, device, group)
        left -= (repeats + 2) * spent
        if (
            len(times) > 1 and 12 * times[size] > left
        ):  # the next size: four times as long, three times at least
            break
    return times


def _slowest(seconds: float, device: str, group: dist.ProcessGroup | None) -> float:
    value = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return float(value)


def _once(data: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    began = time.perf_counter()
    dist.all_reduce(data, group=group)
    if data.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def step_s(
    task: Task, target: Target, base: model.Base, tokens: Tokens, rows: int, seconds: float
) -> float:
    """Mean seconds of an optimizer step of so many rows on one worker, the first ones left out."""
    dtype, _ = model.precision(target.precision, target.device)
    place = loop.Place(
        target.device, dtype, max_batch=target.train.max_batch_per_worker, log_steps=1
    )
    net = model.build(base, task.model, task.train.seed).to(target.device)
    plan = task.train.model_copy(update={"global_batch": rows, "epochs": 1000})
    began, steps, warm = time.perf_counter(), 0, 0.0
    for point in loop.train(net, tokens, tokens.take(np.array([0])), plan, place):
        now = time.perf_counter()
        if point.metrics["step"] == 2:
            warm = now
        steps = int(point.metrics["step"])
        if steps > 3 and now - began > seconds:
            break
    return (time.perf_counter() - warm) / (steps - 2)


def gradient_bytes(net: torch.nn.Module, rows: Tokens, global_batch: int) -> int:
    """What the all-reduces of a step carry: 4 bytes a parameter, and of the word embeddings only
    the rows of one batch, here the first."""
    table = table_of(net)
    words = np.unique(collate(rows, epoch_batches(rows, global_batch, 0, 0)[0])[0])
    rest = sum(p.numel() for p in net.parameters() if p is not table)
    return 4 * (rest + (0 if table is None else len(words) * table.shape[1]))
