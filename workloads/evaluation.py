"""What the validation rows say of a trained model, beyond one number: scores per class, whether
its confidence can be believed, and how it does on short and long texts.

Training leaves it as train/evaluation.json. Letters: N rows, C classes. The rows also chose the
best checkpoint, so all of it is on the bright side of what new texts will give.
"""

import math
from typing import Any

import numpy as np

Tree = dict[str, Any]

BINS = 15
# More classes than this do not fit a readable matrix.
MATRIX_CLASSES = 20
Z = 1.959964  # a normal distribution has 95 % within so many standard deviations


def evaluate(
    labels: np.ndarray, lengths: np.ndarray, answers: np.ndarray, names: list[str]
) -> Tree:
    """All there is to say, as JSON has it, of labels (N,), lengths (N,) in tokens and answers
    (N, 2): the predicted class and its probability."""
    predicted, confidence = answers[:, 0].astype(np.int64), answers[:, 1].astype(np.float64)
    right = predicted == labels
    cells = np.bincount(labels * len(names) + predicted, minlength=len(names) ** 2)
    confusion = cells.reshape(len(names), -1).tolist()
    classes = class_scores(names, confusion)
    f1 = [one["f1"] for one in classes if one["f1"] is not None]
    return {
        "rows": len(labels),
        "accuracy": float(right.mean()),
        "interval": wilson(int(right.sum()), len(right)),
        "f1": float(np.mean(f1)),
        "classes": classes,
        "confusion": confusion,
        "calibration": calibration(confidence, right),
        "lengths": by_length(lengths, right),
    }


def scalars(found: Tree) -> Tree:
    """What goes with a model as its notes, beside accuracy and F1."""
    if not found:
        return {}
    ece, interval = found["calibration"]["ece"], [round(end, 4) for end in found["interval"]]
    return {"eval_calibration_error": round(ece, 4), "eval_accuracy_interval": interval}


def class_scores(names: list[str], confusion: list[list[int]]) -> list[Tree]:
    """Precision, recall with its interval, and F1 of each class of a confusion (C, C), true x
    predicted; None where it would be 0 / 0. Recall is the accuracy on the class's own rows."""
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    return [
        {
            "label": name,
            "precision": row[i] / predicted[i] if predicted[i] else None,
            "recall": row[i] / sum(row) if sum(row) else None,
            "interval": wilson(row[i], sum(row)) if sum(row) else None,
            "f1": 2 * row[i] / (predicted[i] + sum(row)) if predicted[i] + sum(row) else None,
            "rows": sum(row),
        }
        for i, (name, row) in enumerate(zip(names, confusion, strict=True))
    ]


def confused_pairs(names: list[str], confusion: list[list[int]]) -> list[tuple[Any, ...]]:
    """(rows, share of the true class, true, predicted) of what is confused at all, most first."""
    pairs = [
        (n, n / sum(row), names[i], names[j])
        for i, row in enumerate(confusion)
        for j, n in enumerate(row)
        if n and i != j
    ]
    return sorted(pairs, reverse=True)


def calibration(confidence: np.ndarray, right: np.ndarray) -> Tree:
    """The expected calibration error over 15 bins of equal width, and the bins that hold rows.

    Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599,
    equation 3; bin m holds ((m - 1) / 15, m / 15].
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = [
        {
            "low": m / BINS,
            "high": (m + 1) / BINS,
            "rows": int((number == m).sum()),
            "confidence": float(confidence[number == m].mean()),
            "accuracy": float(right[number == m].mean()),
        }
        for m in np.unique(number).tolist()
    ]
    gaps = [one["rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
    return {"ece": sum(gaps) / len(right), "bins": bins}


def by_length(lengths: np.ndarray, right: np.ndarray) -> list[Tree]:
    """Quarters of the rows, by tokens; fewer where many are of one length."""
    edges = np.unique(np.quantile(lengths, (0.25, 0.5, 0.75), method="inverted_cdf"))
    part = np.searchsorted(edges, lengths)
    return [
        _slice(f"{lengths[part == i].min()} to {lengths[part == i].max()} tokens", right[part == i])
        for i in np.unique(part)
    ]


def _slice(name: str, right: np.ndarray) -> Tree:
    hits, rows = int(right.sum()), len(right)
    return {"name": name, "rows": rows, "accuracy": hits / rows, "interval": wilson(hits, rows)}


def wilson(hits: int, rows: int) -> list[float]:
    """The 95 % interval of a share, which holds for few rows and at 0 and 1 too.

    Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22.
    """
    share, z2 = hits / rows, Z * Z / rows
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / rows + z2 / rows / 4) / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]
