"""The share of a training step of `workloads` that waits for gradients of the other ranks.

torchrun --nproc-per-node N comm.py MODEL TRAIN GLOBAL_BATCH

The same steps with and without the all-reduces, in turn; rank 0 prints the medians.
"""

import contextlib
import os
import statistics
import sys
import time

import numpy as np
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from workloads import loop, model, prepared
from workloads.config import Task
from workloads.words import Words, set_aside

STEPS, ROUNDS = 24, 5


def main() -> None:
    """Times rounds of steps."""
    source, train, batch = sys.argv[1:]
    task = Task.model_validate(
        {
            "model": {"pretrained": source},
            "data": {"source": "files", "train": train, "max_tokens": 64},
            "train": {"global_batch": int(batch), "epochs": 1000},
        }
    )
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    loop.settle_in(len(os.sched_getaffinity(0)) / world)
    dist.init_process_group("gloo")
    ready = prepared.prepare(task, "unused")
    dtype, _ = model.precision("auto", "cpu")
    place = loop.Place("cpu", dtype, rank, world, max_batch=int(batch), log_steps=STEPS)
    net = model.build(ready.base, task.model, 0)
    set_aside(net)
    wrapped = DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True)
    one = ready.held_out.take(np.array([0]))  # nobody waits for evaluations
    points = loop.train(wrapped, ready.rows, one, task.train, place)
    point = next(points)
    share = Words.share_gradient
    found: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * ROUNDS):
        crosses = turn % 2 == 0
        Words.share_gradient = share if crosses else lambda self, world: None
        step, began = point.metrics["step"], time.perf_counter()
        with contextlib.nullcontext() if crosses else wrapped.no_sync():
            point = next(points)
        steps = point.metrics["step"] - step
        found[crosses].append((time.perf_counter() - began) / steps)
    if rank == 0:
        real, alone = (statistics.median(found[key]) for key in (True, False))
        print(f"{1e3 * real:.1f} ms, {1e3 * alone:.1f} ms: {100 * (1 - alone / real):.0f}% of it")
    dist.destroy_process_group()


main()
