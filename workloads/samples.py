"""What training leaves with a model for those who serve it, in model/serving/.

rows.npz     token ids: rows of the training set to calibrate on, and the validation rows with
             their classes
golden.json  texts with the labels that torch gives them in fp32: a later deployment must give
             the same
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .data import Tokens
from .engine import Engine, TorchEngine

CALIBRATION = 300
VALIDATION = 5000
GOLDEN = 64
GOLDEN_BUDGET_S = 5.0
CLEAR = 0.5  # of the median margin

Rows = list[list[int]]


class Samples(NamedTuple):
    """Token ids of rows to calibrate and to check a quicker engine on."""

    calibration: Rows
    validation: Rows
    labels: np.ndarray | None  # (validation rows,) int64; None where only the texts are known


def leave(model: Path, name: str, rows: Tokens, held_out: Tokens, texts: list[str]) -> None:
    """Writes both files into a saved model's folder; `texts` are those of the held-out rows."""
    rng = np.random.default_rng(0)
    folder = model / "serving"
    folder.mkdir(exist_ok=True)
    some = rows.take(rng.permutation(len(rows))[:CALIBRATION])
    order = rng.permutation(len(held_out))
    checked = held_out.take(order[:VALIDATION])
    arrays = {
        "calibration_ids": some.ids,
        "calibration_offsets": some.offsets,
        "validation_ids": checked.ids,
        "validation_offsets": checked.offsets,
        "labels": checked.labels,
    }
    compact: dict[str, Any] = {name: _compact(array) for name, array in arrays.items()}
    np.savez_compressed(folder / "rows.npz", **compact)
    some_texts = [texts[i] for i in order[: 2 * GOLDEN]]
    write_golden(TorchEngine(model, name, threads=0), some_texts, folder)


def write_golden(engine: Engine, texts: list[str], folder: Path) -> None:
    """What an engine answers to the first texts, into golden.json of a folder."""
    golden = _golden(engine, texts[: 2 * GOLDEN])
    text = json.dumps({"requests": golden}, indent=1, ensure_ascii=False)
    (folder / "golden.json").write_text(text + "\n", encoding="utf-8")


def read(model: Path) -> Samples | None:
    """What `leave` wrote of rows, or None for a model from elsewhere."""
    file = model / "serving" / "rows.npz"
    if not file.is_file():
        return None
    with np.load(file) as arrays:
        parts = [
            np.split(arrays[f"{name}_ids"], arrays[f"{name}_offsets"][1:-1])
            for name in ("calibration", "validation")
        ]
        first, second = ([row.tolist() for row in part] for part in parts)
        return Samples(first, second, arrays["labels"].astype(np.int64))


def of_texts(engine: Engine, texts: list[str]) -> Samples:
    """A user's texts, to calibrate and to check agreement on."""
    rows = [row.ids for row in engine.encode(texts)]
    return Samples(rows[:CALIBRATION], rows, None)


def golden_problem(engine: Engine, model: Path) -> str | None:
    """How an engine's answers differ from the golden ones of a model's folder, if they do."""
    file = model / "serving" / "golden.json"
    if not file.is_file():
        return None
    wanted = json.loads(file.read_text(encoding="utf-8"))["requests"]
    # One by one, as most requests come.
    given = [engine.decode(_logits(engine, [w["text"]])[0])[0]["label"] for w in wanted]
    wrong = [(w, label) for w, label in zip(wanted, given, strict=True) if w["label"] != label]
    if not wrong:
        return None
    first, label = wrong[0]
    return (
        f"{len(wrong)} of {len(wanted)} golden requests are answered otherwise; the first: "
        f"{first['text'][:80]!r} is {first['label']}, not {label}"
    )


def _golden(engine: Engine, texts: list[str]) -> list[dict[str, str]]:
    """Of the texts of each label, the half that the model is surest of, if it is sure at all: a
    quicker engine's rounding does not change these."""
    by_label: dict[str, list[tuple[float, str]]] = {}
    end = time.perf_counter() + GOLDEN_BUDGET_S
    for start in range(0, len(texts), 8):
        part = texts[start : start + 8]
        for text, logits in zip(part, _logits(engine, part), strict=True):
            two = np.sort(logits)[-2:]  # of one class alone: the same twice
            label = engine.decode(logits)[0]["label"]
            by_label.setdefault(label, []).append((float(two[-1] - two[0]), text))
        if time.perf_counter() > end:
            break
    # A model that has hardly learned gives a label here and there by a hair.
    margins = [margin for found in by_label.values() for margin, _ in found]
    clear = CLEAR * statistics.median(margins) if margins else 0.0
    return [
        {"text": text, "label": label}
        for label, found in by_label.items()
        for margin, text in sorted(found, reverse=True)[: -(-len(found) // 2)]
        if margin >= clear
    ]


def _logits(engine: Engine, texts: list[str]) -> np.ndarray:
    return engine.predict([row.ids for row in engine.encode(texts)])  # (B, C)


def _compact(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
