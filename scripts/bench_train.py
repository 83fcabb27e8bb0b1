"""Compares `workloads train` with other ways to train the same classifier on the same rows.

    .venv/bin/python scripts/bench_train.py --model FOLDER --rows FOLDER [--workers 2] [--rounds 2]

FOLDER of the rows has train.csv and validation.csv with columns text and label. Each trainer runs
as a whole command, in turn, round after round with another seed; the table has medians. samples/s
is of the loop alone; `rest` is what the command takes beyond it: starting, reading, evaluating,
writing the model. MFU is the share of this machine's own bf16 matmul rate, the tokens of padding
not counted. The other trainers are scripts/bench_trainers/*. `--device cuda` gives each worker a
GPU. Not covered: several machines.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
OTHERS = HERE / "bench_trainers"
EXTRA = Path("~/.cache/workloads-bench/accelerate").expanduser()
ACCELERATE = "accelerate==1.15.0"  # the Trainer of transformers needs it
NAMES = {
    "ours": "`workloads train`",
    "ours1": "`workloads train`, one worker",
    "ddp": "torchrun, DDP, same recipe",
    "single": "one process, same recipe",
    "hf": "torchrun, HF Trainer",
    "ray": "Ray Train's guide",
}


def command(name: str, ask: argparse.Namespace, seed: int, out: Path) -> list[str]:
    """The whole command of a trainer."""
    files = [str(ask.rows / f"{split}.csv") for split in ("train", "validation")]
    rest = [ask.folder, *files, str(ask.epochs), str(ask.lr), str(seed)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "29571"]
    if name in ("ours", "ours1"):
        workers = 1 if name == "ours1" else ask.workers
        task = {
            "model.pretrained": ask.model,
            "data.source": "files",
            "data.train": files[0],
            "data.validation": files[1],
            "train.epochs": ask.epochs,
            "train.lr": ask.lr,
            "train.seed": seed,
            "train.global_batch": ask.batch,
        }
        target = {
            "ray.storage": out,
            "train.workers": workers,
            "train.cpus_per_worker": max(1, (os.cpu_count() or 1) // workers),
            "train.max_batch_per_worker": ask.batch,
        }
        if ask.device == "cuda":
            target["device"] = "cuda"
            target |= {
                f"{k}_per_{w}": 1
                for k, w in (
                    ("train.gpus", "worker"),
                    ("tune.gpus", "trial"),
                    ("serve.gpus", "replica"),
                )
            }
        keys = [f"task.{k}={v}" for k, v in task.items()]
        keys += [f"target.{k}={v}" for k, v in target.items()]
        return [
            sys.executable,
            "-m",
            "workloads",
            "train",
            "--task",
            "csv-example",
            "--json",
            *keys,
        ]
    if name == "ray":
        return [sys.executable, str(OTHERS / "ray_guide.py"), *rest, str(ask.workers)]
    ranks = 1 if name == "single" else ask.workers
    script = OTHERS / ("hf.py" if name == "hf" else "ddp.py")
    return [*torchrun, "--nproc-per-node", str(ranks), str(script), *rest]


def comm(ask: argparse.Namespace) -> list[str]:
    """Our loop with and without the all-reduces, in turn."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "29571"]
    ranks = ["--nproc-per-node", str(ask.workers), str(OTHERS / "comm.py")]
    return [*torchrun, *ranks, ask.model, str(ask.rows / "train.csv"), str(ask.batch)]


def measure(name: str, ask: argparse.Namespace, seed: int) -> dict[str, float]:
    """One whole command of a trainer: its own figures and the time it took."""
    with tempfile.TemporaryDirectory(prefix="bench-train-") as out:
        places = [
            str(OTHERS),
            *([str(EXTRA)] if name == "hf" else []),
            os.environ.get("PYTHONPATH", ""),
        ]
        env = {
            **os.environ,
            "OUT": out,
            "DEVICE": ask.device,
            "BATCH": str(ask.batch),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(places),
        }
        began = time.perf_counter()
        done = subprocess.run(
            command(name, ask, seed, Path(out)),
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{NAMES[name]} failed:\n{done.stderr[-3000:]}")
        told = json.loads(next(x for x in reversed(done.stdout.splitlines()) if x.startswith("{")))
    rows = sum(1 for _ in (ask.rows / "train.csv").open(encoding="utf-8")) - 1
    seconds = told.get("seconds") or rows * ask.epochs / told["samples_per_s"]
    return {
        "samples_per_s": told["samples_per_s"],
        "accuracy": told.get("accuracy", told.get("eval_accuracy")),
        "wall_s": wall,
        "rest_s": wall - seconds,
    }


def matmul_flops(device: str, seconds: float = 2.0) -> float:
    """The bf16 matmul rate of all cores or of a GPU, floating point operations a second."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        float((a @ a)[0, 0])  # a GPU is waited for
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def flops_per_sample(ask: argparse.Namespace) -> float:
    """Of a training step, forward and backward: 6 a parameter and token without the embeddings
    (Kaplan et al. 2020), and 12 x layers x width x tokens a token for attention."""
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = (
        AutoConfig.from_pretrained(ask.folder),
        AutoTokenizer.from_pretrained(ask.folder),
    )
    sys.path.insert(0, str(OTHERS))
    import rows

    texts = [row["text"] for row in rows.read(str(ask.rows / "train.csv"))]
    lengths = [len(x) for x in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
    width, layers = config.hidden_size, config.num_hidden_layers
    matrices = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    mean = statistics.mean(lengths)
    squares = statistics.mean(n * n for n in lengths)
    return 6 * matrices * mean + 12 * layers * width * squares


def arguments() -> argparse.Namespace:
    """What is compared, on what."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, or package:NAME/PATH")
    parser.add_argument("--rows", required=True, type=Path, help="train.csv, validation.csv")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="rows of an optimizer step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", default=",".join(NAMES), help="of %(default)s")
    parser.add_argument("--plot", type=Path, help="also a picture, PNG")
    ask = parser.parse_args()
    ask.rows = ask.rows.resolve()
    from workloads.sources import model_folder

    ask.folder = str(model_folder(ask.model))
    ask.names = ask.contenders.split(",")
    return ask


def plot(path: Path, found: dict[str, dict[str, float]]) -> None:
    """The loop's rate and the whole command of each trainer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    names = [NAMES[n].strip("`") for n in found]
    left.barh(names, [f["samples_per_s"] for f in found.values()])
    left.set_xlabel("samples/s in the loop")
    rest = [f["rest_s"] for f in found.values()]
    right.barh(names, [f["wall_s"] - f["rest_s"] for f in found.values()], label="training")
    right.barh(names, rest, left=[f["wall_s"] - f["rest_s"] for f in found.values()], label="rest")
    right.set_xlabel("whole command, s")
    right.legend()
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs all in turn and prints the table."""
    ask = arguments()
    console = Console()
    missing = importlib.util.find_spec("accelerate") is None and not EXTRA.is_dir()
    if "hf" in ask.names and missing:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(EXTRA)]
        subprocess.run([*pip, ACCELERATE], check=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ask.names}
    peaks = []
    for seed in range(ask.rounds):
        for name in ask.names:
            peaks.append(matmul_flops(ask.device))
            runs[name].append(measure(name, ask, seed))
            console.print(
                f"round {seed + 1}: {name}", {k: round(v, 3) for k, v in runs[name][-1].items()}
            )
    found: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(r[key] for r in all_) for key in all_[0]}
        for name, all_ in runs.items()
    }
    first, peak = found[ask.names[0]], max(peaks)
    work = flops_per_sample(ask)
    table = Table(
        title=f"{ask.model}, {ask.workers} workers, {ask.epochs} epochs, medians of {ask.rounds}"
    )
    for heading in ("trainer", "samples/s", "to the first", "MFU", "whole s", "rest s", "accuracy"):
        table.add_column(heading)
    for name, f in found.items():
        table.add_row(
            NAMES[name],
            f"{f['samples_per_s']:,.0f}",
            f"{f['samples_per_s'] / first['samples_per_s']:.2f}x",
            f"{100 * f['samples_per_s'] * work / peak:.0f}%",
            f"{f['wall_s']:.0f}",
            f"{f['rest_s']:.0f}",
            " ".join(f"{r['accuracy']:.3f}" for r in runs[name]),
        )
    console.print(table)
    console.print(f"bf16 matmul {peak / 1e9:,.0f} GFLOP/s, {work / 1e9:.3f} GFLOP a sample")
    if ask.workers > 1 and ask.device == "cpu":
        said = subprocess.run(comm(ask), capture_output=True, text=True, check=True).stdout
        console.print("steps with and without gradients that cross:", said.splitlines()[-1])
    if ask.plot:
        plot(ask.plot, found)


if __name__ == "__main__":
    main()
