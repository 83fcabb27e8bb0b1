"""Trains on more text than it lets memory hold, and watches every process while it does.

    .venv/bin/python scripts/soak_data.py FOLDER                # 2 GB of text, 1 GB of memory
    .venv/bin/python scripts/soak_data.py FOLDER --gb 0.1 1     # does memory grow with the rows?

Writes the rows as parquet to FOLDER (kept for the next time), trains a small model on them with
data.streaming, and prints one line for each size: peak memory of each kind of process, rows a
second, and the share of a step that waits for data. Memory is that of a process alone: what it
shares, as the object store and libraries, is left out, and the store's limit is a column of its
own. Exit code 1 when what streams (readers, Ray Data's actors, object store) took more than
--memory-gb.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

FILE_BYTES = 50_000_000
KINDS = {
    "ray::RayTrainWorker": "trainers",
    "ray::MapBatches": "readers",
    "ray::Map(": "readers",
    "ray::SplitCoordinator": "Ray Data",
    "ray::DatasetManager": "Ray Data",
}
STREAMS = ("readers", "Ray Data")


def write_rows(folder: Path, size: float, words: int = 200) -> Path:
    """So many bytes of text of two classes, rows of about `words` words, as parquet files of 50
    MB."""
    done = folder / "done"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lexicon = np.array(["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(5000)])
    number = written = 0
    while written < size:
        part = list(
            _rows(rng, lexicon, words, 1 + int(min(FILE_BYTES, size - written) / 7 / words))
        )
        table = {"text": [t for t, _ in part], "label": [label for _, label in part]}
        pq.write_table(pa.table(table), folder / f"{number:05}.parquet", row_group_size=10_000)
        written += sum(len(text) for text, _ in part)
        number += 1
    done.touch()
    return folder


def _rows(
    rng: np.random.Generator, lexicon: np.ndarray, words: int, count: int
) -> Iterator[tuple[str, str]]:
    for good, length in zip(
        rng.integers(0, 2, count), rng.integers(3, 2 * words, count), strict=True
    ):
        # The classes have half of their words in common.
        chosen = rng.integers(0, 3500, length) + good * 1500
        yield " ".join(lexicon[chosen]), ("bad", "good")[good]


class Watch(threading.Thread):
    """Peak memory in bytes of each kind of process that this one started, every half second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.kinds: dict[int, str] = {}  # a reader is called ray::IDLE in between
        self.peaks: dict[str, int] = {}

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(0.5):
            now: dict[str, int] = {}
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    kind = self._kind(process)
                    used = process.memory_info()
                    now[kind] = now.get(kind, 0) + used.rss - used.shared
            own = psutil.Process().memory_info()
            now["command"] = own.rss - own.shared
            now["all"] = sum(now.values())
            for kind, size in now.items():
                self.peaks[kind] = max(size, self.peaks.get(kind, 0))

    def _kind(self, process: psutil.Process) -> str:
        title = " ".join(process.cmdline())
        kind = next((name for start, name in KINDS.items() if title.startswith(start)), None)
        if kind is not None:
            self.kinds[process.pid] = kind
        return self.kinds.get(process.pid, "rest of Ray")


def train(folder: Path, size: float, options: argparse.Namespace) -> tuple[dict, Watch]:
    """One training, with a Ray of its own."""
    import ray

    from workloads.config import Run, Target, Task
    from workloads.pipeline import Job, run_stages

    rows = write_rows(folder / f"rows-{size:g}gb", size * 1e9, options.words)
    task = Task.model_validate(
        {
            "model": {"hidden": 32, "layers": 1, "vocab_size": 6000},
            "data": {"source": "files", "train": f"{rows}/*.parquet", "streaming": True},
            "train": {"epochs": options.epochs, "global_batch": 64, "lr": 1e-3},
        }
    )
    storage = tempfile.mkdtemp(prefix="soak-data-")
    target = {"ray": {"storage": storage}, "train": {"workers": options.workers}}
    store = int(options.memory_gb * 1e9 / 10)
    ray.init("local", include_dashboard=False, object_store_memory=store, log_to_driver=False)
    console = Console(stderr=True)
    job = Job(Run("soak", task, "soak", Target.model_validate(target)), console)
    with Watch() as watch:
        result = run_stages(job, ["train"])["train"]
    ray.shutdown()
    data = job.folder.read("run.json")["data"] if job.folder else {}
    return {**result, "rows": data["train_rows"]}, watch


def line(size: float, result: dict[str, Any], peaks: dict[str, int], memory_gb: float) -> list:
    """A size's line of the table, in MB."""
    last = result["history"][-1]
    worked_s = result["rows"] * last["epoch"] / result["samples_per_s"]
    wait = last["data_wait_s"] / (last["data_wait_s"] + worked_s)
    kinds = ("command", "trainers", *STREAMS, "rest of Ray", "all")
    memory = [f"{peaks.get(kind, 0) / 1e6:,.0f}" for kind in kinds]
    rate = f"{result['rows'] * last['epoch'] / (worked_s + last['data_wait_s']):,.0f}"
    store = f"{100 * memory_gb:,.0f}"
    return [f"{size:g}", f"{result['rows']:,}", *memory, store, rate, f"{100 * wait:.1f}%"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the rows are written, and found again")
    parser.add_argument("--gb", type=float, nargs="+", default=[2.0], help="of text, one or more")
    parser.add_argument("--memory-gb", type=float, default=1.0, help="a tenth: object store")
    parser.add_argument("--workers", type=int, default=1, help="of the training, a CPU each")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--words", type=int, default=200, help="in a row, on average")
    options = parser.parse_args()
    head = ["GB", "rows", "command", "trainers", *STREAMS, "rest of Ray", "all", "store"]
    lines, most = [[*head, "rows/s", "waits"]], 0.0
    for size in options.gb:
        result, watch = train(options.folder.resolve(), size, options)
        lines.append(line(size, result, watch.peaks, options.memory_gb))
        streams = sum(watch.peaks.get(kind, 0) for kind in STREAMS)
        most = max(most, streams / 1e9 + options.memory_gb / 10)
    for cells in lines:
        print("".join(f"{cell:>12}" for cell in cells))
    print(f"what streams took {most:.2f} GB at most, of {options.memory_gb:g} (memory in MB)")
    sys.exit(most > options.memory_gb)


if __name__ == "__main__":
    main()
