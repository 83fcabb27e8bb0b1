"""Ray Train as its PyTorch guide has it: prepare_model, prepare_data_loader, rows padded to 64.

python ray_guide.py MODEL TRAIN VALIDATION EPOCHS LR SEED WORKERS
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import ray.train
import ray.train.torch
import rows
import torch
from torch.utils.data import DataLoader, TensorDataset


def train_func(config: dict) -> None:
    """One worker; rank 0 reports the seconds of its loop and the model."""
    data = rows.read(config["train"])
    labels = rows.labels_of(data)
    net, tokenizer = rows.load(config["model"], len(labels), config["seed"])
    held = rows.encoded(data, labels, tokenizer, pad="max_length")
    columns = ("input_ids", "attention_mask", "labels")
    tensors = TensorDataset(*(torch.tensor(held[c]) for c in columns))
    world = ray.train.get_context().get_world_size()
    loader = DataLoader(tensors, batch_size=rows.BATCH // world, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    net = ray.train.torch.prepare_model(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config["lr"])
    net.train()
    began = time.perf_counter()
    for epoch in range(config["epochs"]):
        if world > 1:
            loader.sampler.set_epoch(epoch)
        for ids, mask, wanted in loader:
            loss = net(input_ids=ids, attention_mask=mask, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        bare = getattr(net, "module", net)
        if ray.train.get_context().get_world_rank() == 0:
            bare.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"seconds": seconds}, checkpoint=checkpoint)
        else:
            ray.train.report({"seconds": seconds})


def main() -> None:
    """Trains and prints the line."""
    model, train, validation, epochs, lr, seed, workers = sys.argv[1:]
    ray.init("local", include_dashboard=False, log_to_driver=False)
    config = {"model": model, "train": train, "epochs": int(epochs), "lr": float(lr)}
    result = ray.train.torch.TorchTrainer(
        train_func,
        train_loop_config={**config, "seed": int(seed)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=int(workers), use_gpu=rows.DEVICE == "cuda"
        ),
        run_config=ray.train.RunConfig(storage_path=str(Path(os.environ["OUT"]).resolve())),
    ).fit()
    data = rows.read(train)
    labels = rows.labels_of(data)
    with result.checkpoint.as_directory() as folder:
        net, tokenizer = rows.load(folder, len(labels), 0)
    score = rows.accuracy(net, tokenizer, rows.read(validation), labels)
    rows.tell(len(data) * int(epochs), result.metrics["seconds"], score)


main()
