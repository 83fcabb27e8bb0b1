"""Rows a second of each engine, for labels and for embeddings, by streams and micro-batch size,
without a server; and what encoding a text and decoding its answer cost.

    .venv/bin/python scripts/bench_engines.py RUN/model [ROUNDS]

The model is one that training left, with its validation rows. Contenders run in turn, ROUNDS (5)
times; the figures are medians. What they need is exported first where `serve` has not done so.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from workloads import engines, gate, samples
from workloads.config import TargetServe
from workloads.engine import Engine, Head, load

SIZES = (1, 4, 8, 16, 32)
HEADS: tuple[Head, ...] = ("logits", "embedding")
Contender = tuple[str, int, Head]  # kind, streams


def loaded(model: Path) -> dict[Contender, Engine]:
    """Every engine of this machine, with one stream and with one a core."""
    exported = engines.ready(model, str(model), TargetServe()).exported
    kinds = ("torch", engines.FP32, *([engines.BF16] if engines.has_bf16() else []), engines.INT8)
    return {
        (kind, streams, head): load(model, str(model), kind, exported, streams, head=head)
        for head in HEADS
        for kind in kinds
        for streams in sorted({1, os.cpu_count() or 1})
    }


def measured(
    contenders: dict[Contender, Engine], rows: samples.Rows, rounds: int
) -> dict[tuple[Contender, int], float]:
    """Median rows a second of each contender and size."""
    rates: dict[tuple[Contender, int], list[float]] = {}
    for turn, size in itertools.product(range(rounds + 1), SIZES):
        batches = gate.micro_batches(rows, size)
        for contender, engine in contenders.items():
            if contender[0] == "torch":
                import torch

                torch.set_num_threads(contender[1])
            seconds = 0.1 if turn == 0 else 0.3
            rate = gate.rate(engine, batches, contender[1], seconds, contender[2])
            rates.setdefault((contender, size), []).append(rate)
    return {key: statistics.median(found[1:]) for key, found in rates.items()}  # the first warms up


def cost_us(call: Callable[[], object]) -> float:
    """Microseconds of a call, the best of several hundred-fold repetitions."""
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(100):
            call()
        best = min(best, time.perf_counter() - began)
    return best / 100 * 1e6


def main() -> None:
    """Prints both tables."""
    model = Path(sys.argv[1]).resolve()
    known = samples.read(model)
    assert known is not None, f"{model} has no serving/rows.npz: train it"
    contenders = loaded(model)
    rows = known.validation[:512]
    rates = measured(contenders, rows, int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    tokens = statistics.mean(map(len, rows))
    print(f"{engines.machine()[0]}; {len(rows)} rows of {tokens:.1f} tokens; rows/s")
    print(
        f"{'engine':<16}{'head':<10}{'streams':>8}"
        + "".join(f"{size:>9}" for size in SIZES)
        + "   x torch"
    )
    for kind, streams, head in contenders:
        mine = [rates[(kind, streams, head), size] for size in SIZES]
        base = max(rates[("torch", streams, head), size] for size in SIZES)
        cells = "".join(f"{rate:>9,.0f}" for rate in mine)
        print(f"{kind:<16}{head:<10}{streams:>8}{cells}{max(mine) / base:>10.2f}")
    golden = json.loads((model / "serving" / "golden.json").read_text(encoding="utf-8"))
    texts = [one["text"] for one in golden["requests"]]
    middle = sorted(texts, key=len)[len(texts) // 2]
    engine = contenders[engines.INT8, 1, "logits"]
    logits = engine.predict([engine.encode([middle])[0].ids])[0]
    encode, decode = (
        cost_us(lambda: engine.encode([middle])),
        cost_us(lambda: engine.decode(logits)),
    )
    print(f"a text of {len(middle)} characters: encode {encode:.1f} us, decode {decode:.1f} us")


if __name__ == "__main__":
    main()
