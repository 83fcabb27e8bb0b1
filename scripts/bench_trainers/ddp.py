"""DDP under torchrun as a careful person writes it: like lengths together, bf16, fused AdamW.

torchrun --nproc-per-node N ddp.py MODEL TRAIN VALIDATION EPOCHS LR SEED
"""

import os
import random
import sys
import time

import rows
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def batches(lengths: list[int], seed: int) -> list[list[int]]:
    """Row numbers of each global batch: sorted by length within shuffled pools."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    pool = 50 * rows.BATCH
    out = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lengths.__getitem__)
        out += [part[i : i + rows.BATCH] for i in range(0, len(part), rows.BATCH)]
    random.Random(seed + 1).shuffle(out)
    return out


def main() -> None:
    """Trains; rank 0 prints the line."""
    model, train, validation, epochs, lr, seed = sys.argv[1:]
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    on_gpu = rows.DEVICE == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    data = rows.read(train)
    labels = rows.labels_of(data)
    net, tokenizer = rows.load(model, len(labels), int(seed))
    net.to(rows.DEVICE)
    held = rows.encoded(data, labels, tokenizer, pad=False)
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
    lengths = [len(ids) for ids in held["input_ids"]]
    optimizer = torch.optim.AdamW(net.parameters(), lr=float(lr), weight_decay=0.01, fused=True)
    total = int(epochs) * -(-len(data) // rows.BATCH)
    warmup = round(0.1 * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warmup if s < warmup else (total - s) / max(1, total - warmup),
    )
    wrapped.train()
    began = time.perf_counter()
    for epoch in range(int(epochs)):
        for batch in batches(lengths, int(seed) * 1000 + epoch):
            mine = batch[rank::world] or batch[:1]
            inputs = tokenizer.pad(
                {"input_ids": [held["input_ids"][i] for i in mine]}, return_tensors="pt"
            ).to(rows.DEVICE)
            wanted = torch.tensor([held["labels"][i] for i in mine]).to(rows.DEVICE)
            with torch.autocast(rows.DEVICE, torch.bfloat16):
                loss = wrapped(**inputs, labels=wanted).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if rank == 0:
        score = rows.accuracy(net, tokenizer, rows.read(validation), labels)
        net.save_pretrained(os.environ["OUT"])
        tokenizer.save_pretrained(os.environ["OUT"])
        rows.tell(len(data) * int(epochs), seconds, score)
    if world > 1:
        dist.destroy_process_group()


main()
