"""The gate: how an engine's answers differ from those of torch in fp32, whether it may be used, and
how quick it is.

Letters: N rows, C classes.
"""

import itertools
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .engine import FP32, Engine, Head
from .samples import Rows, Samples

Figures = dict[str, Any]
MOST_DISAGREEMENT = 0.03  # share of rows
GAP_ROWS = 64
MADE_UP: Rows = [[5 + (7 * i + length) % 90 for i in range(length)] for length in range(8, 40)]
SLICE_S = 0.15  # of one engine's timing; an engine takes a second in all


def refusal(figures: Figures, max_drop: float) -> str | None:
    """Why an engine with these figures may not be used."""
    if "problem" in figures:
        return figures["problem"]
    if "difference" in figures and -figures["difference"] > max_drop:
        return f"its accuracy is {accuracy(figures)}, more than {max_drop:g} lower"
    if figures.get("disagreement", 0) > MOST_DISAGREEMENT:
        return f"it disagrees with torch on {figures['disagreement']:.1%} of the rows"
    return None


def embeds(figures: Figures, max_gap: float) -> bool:
    """Whether an engine's embeddings are near enough to torch's."""
    return "problem" not in figures and figures.get("gap", math.inf) <= max_gap


def gap(engine: Engine, reference: Engine, rows: Rows) -> float:
    """The largest difference of any value of the embeddings of some rows."""
    some = sorted(rows[:GAP_ROWS], key=len)
    batches = [some[i : i + 8] for i in range(0, len(some), 8)]
    both = [(engine.predict(b, "embedding"), reference.predict(b, "embedding")) for b in batches]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in both)


def check(engine: Engine, rows: Rows, reference: np.ndarray, known: Samples | None) -> Figures:
    """How an engine's answers differ from the reference's. On made-up rows only what does not
    round can be judged."""
    if known is None and engine.kind != FP32:
        return {"unchecked": True}
    given = logits(engine, rows[: len(reference)])
    return compare(given, reference, known.labels if known else None, engine.info.multi_label)


def compare(
    given: np.ndarray, reference: np.ndarray, labels: np.ndarray | None, multi_label: bool
) -> Figures:
    """Share of rows that are decided otherwise; with labels, the accuracy and the 95 % interval
    of the paired difference."""
    ours, theirs = (decisions(logits, multi_label) for logits in (given, reference))
    figures: Figures = {"disagreement": float((ours != theirs).any(1).mean())}
    if not np.isfinite(given).all():
        figures["problem"] = "its answers are not all finite"
    if labels is None or multi_label:
        return figures
    right, was_right = (decided[:, 0] == labels[: len(decided)] for decided in (ours, theirs))
    paired = right.astype(float) - was_right
    mean, error = paired.mean(), 1.96 * paired.std() / math.sqrt(len(paired))
    return figures | {
        "accuracy": float(right.mean()),
        "reference": float(was_right.mean()),
        "difference": float(mean),
        "interval": [float(mean - error), float(mean + error)],
    }


def decisions(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """The best class of each row (N, 1), or which labels apply (N, C)."""
    return logits > 0 if multi_label else logits.argmax(1)[:, None]


def logits(engine: Engine, rows: Rows, budget_s: float = math.inf) -> np.ndarray:
    """Logits (N, C) of the first N rows: all, or as many as the time allows."""
    end = time.perf_counter() + budget_s
    done: list[np.ndarray] = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        order = sorted(range(len(part)), key=lambda i: len(part[i]))
        found = np.empty((len(part), len(engine.info.labels)), np.float32)
        for batch in (order[i : i + 16] for i in range(0, len(order), 16)):
            found[batch] = engine.predict([part[i] for i in batch])
        done.append(found)
        if time.perf_counter() > end:
            break
    return np.concatenate(done) if done else np.empty((0, len(engine.info.labels)))


def timings(
    engines: dict[str, Engine], rows: Rows, num_streams: int
) -> dict[str, dict[str, float]]:
    """Rows a second of each engine by micro-batch size, in turn, median of three."""
    rows = rows[:256]
    rates: dict[tuple[str, str], list[float]] = {}
    for seconds in (SLICE_S / 4, SLICE_S, SLICE_S, SLICE_S):  # the first round warms up
        for size in (1, 8):
            batches = micro_batches(rows, size)
            for kind, engine in engines.items():
                found = rate(engine, batches, num_streams, seconds)
                rates.setdefault((kind, str(size)), []).append(found)
    medians = {key: round(statistics.median(found[1:]), 1) for key, found in rates.items()}
    return {kind: {size: medians[kind, size] for size in ("1", "8")} for kind in engines}


def micro_batches(rows: Rows, size: int) -> list[Rows]:
    """Rows of like length together, in random order."""
    ordered = sorted(rows, key=len)
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def rate(
    engine: Engine, batches: list[Rows], num_streams: int, seconds: float, head: Head | None = None
) -> float:
    """Rows a second while as many threads as the engine has streams take batch after batch."""
    threads = min(num_streams, engine.streams)
    began = time.perf_counter()

    def work(first: int) -> int:
        done = 0
        for i in itertools.count(first, threads):
            done += len(engine.predict(batches[i % len(batches)], head))
            if time.perf_counter() - began > seconds:
                return done
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(work, range(threads)))
    return total / (time.perf_counter() - began)


def accuracy(figures: Figures) -> str:
    """Both accuracies and the interval of their difference, for people."""
    low, high = figures["interval"]
    return f"{figures['accuracy']:.4f} against {figures['reference']:.4f}, {low:+.4f}..{high:+.4f}"
