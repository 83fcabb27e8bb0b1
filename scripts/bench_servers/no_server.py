"""Sentences a second of an engine in one process, with no server around it.

python no_server.py ours|int8 MODEL TEXTS.json SECONDS [FILE.onnx]     # prints JSON
"""

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORES = os.cpu_count() or 1
Rows = list[list[int]]
# Token ids of the texts, the function from a batch of them to logits, and how many call it at once.
Engine = tuple[Rows, Callable[[Rows], object], int]


def ours(folder: str, texts: list[str]) -> Engine:
    """The engine that `workloads serve` chooses."""
    from workloads import engines
    from workloads.config import TargetServe
    from workloads.engine import load

    limits, model = TargetServe(), Path(folder)
    choice = engines.ready(model, folder, limits, say=lambda line: None)
    engine = load(model, folder, choice.kind, choice.exported, engines.streams(limits))
    return [row.ids for row in engine.encode(texts)], engine.predict, engine.streams


def int8(folder: str, texts: list[str]) -> Engine:
    """The same of onnxruntime."""
    from int8_model import Int8Model

    model = Int8Model(folder, sys.argv[5], threads=1)
    return [model.encode(text) for text in texts], model.predict, CORES


def rate(engine: Engine, size: int, seconds: float) -> float:
    """Sentences a second in batches of like length."""
    rows, predict, callers = engine
    alike = sorted(rows, key=len)
    batches = [alike[i : i + size] for i in range(0, len(alike), size)]
    random.Random(0).shuffle(batches)
    end = time.perf_counter() + seconds

    def work(first: int) -> int:
        done = 0
        for i in itertools.count(first, callers):
            predict(batches[i % len(batches)])
            done += len(batches[i % len(batches)])
            if time.perf_counter() > end:
                break
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        done = sum(pool.map(work, range(callers)))
    return done / (time.perf_counter() - began)


def main() -> None:
    """By size of batch."""
    kind, folder, texts, seconds = sys.argv[1:5]
    made = {"ours": ours, "int8": int8}[kind](folder, json.loads(Path(texts).read_text()))
    rate(made, 8, 1)  # warms up
    print(json.dumps({size: rate(made, size, float(seconds)) for size in (1, 8, 32)}))


if __name__ == "__main__":
    main()
