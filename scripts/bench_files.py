"""What a user's own files give with the shipped csv-example settings: accuracy over three seeds, a
model from scratch on the same files, and two answers of the first model.

    .venv/bin/python scripts/bench_files.py FOLDER   # train.csv, validation.csv: text,label

The README's figures are from the Stanford Sentiment Treebank's sentences in this form.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ASKED = ("a gripping , beautifully acted film", "a tedious , lifeless mess")
SCRATCH = ["task.model.pretrained=null", "task.model.layers=2", "task.train.lr=1e-3"]


def train(folder: Path, storage: str, run: str, *more: str) -> dict[str, Any]:
    """One `workloads train`; its own progress goes to stderr."""
    files = [f"task.data.{split}={folder / split}.csv" for split in ("train", "validation")]
    line = [
        "train",
        "--task",
        "csv-example",
        "--run",
        run,
        "--json",
        f"target.ray.storage={storage}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "workloads", *line, *files, *more],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def row(name: str, r: dict[str, Any]) -> str:
    """A line of the table."""
    return (
        f"{name:<22}{r['eval_accuracy']:>9.4f}{r['eval_f1']:>9.4f}{r['epoch']:>7g}"
        f"{r['samples_per_s']:>11.0f}{r['total_s']:>9.0f}"
    )


def main() -> None:
    """Prints the table and the two answers."""
    folder = Path(sys.argv[1]).resolve()
    storage = tempfile.mkdtemp(prefix="bench-files-")
    seeds = [train(folder, storage, f"seed-{s}", f"task.train.seed={s}") for s in range(3)]
    scratch = train(folder, storage, "scratch", *SCRATCH)
    rows = sum(map(sum, seeds[0]["confusion"]))
    accuracies = [r["eval_accuracy"] for r in seeds]
    mean = statistics.mean(accuracies)
    error = math.sqrt(mean * (1 - mean) / rows)
    print(f"{'model':<22}{'accuracy':>9}{'F1':>9}{'epoch':>7}{'samples/s':>11}{'total s':>9}")
    for seed, result in enumerate(seeds):
        print(row(f"6-layer, seed {seed}", result))
    print(row("2-layer, from scratch", scratch))
    print(f"6-layer mean {mean:.4f}; {rows} rows, standard error {error:.4f}")
    from workloads.engine import TorchEngine

    engine = TorchEngine(Path(storage) / "seed-0/model", "seed-0", threads=os.cpu_count() or 1)
    for text, encoded in zip(ASKED, engine.encode(list(ASKED)), strict=True):
        print(engine.decode(engine.predict([encoded.ids])[0], top_k=1)[0], text)


if __name__ == "__main__":
    main()
