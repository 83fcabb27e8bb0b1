"""The arithmetic of the gate."""

import numpy as np
import pytest

from workloads.gate import compare, refusal


def some_logits(wrong: int, rows: int = 200) -> np.ndarray:
    """(rows, 2) logits for class 0, but for the first so many."""
    logits = np.tile([1.0, 0.0], (rows, 1))
    logits[:wrong] = [0.0, 1.0]
    return logits


def test_the_difference_comes_with_its_interval() -> None:
    zeros = np.zeros(200, np.int64)
    figures = compare(some_logits(4), some_logits(0), zeros, False)
    assert figures["difference"] == pytest.approx(-0.02)
    assert figures["disagreement"] == pytest.approx(0.02)
    low, high = figures["interval"]
    assert low < -0.02 < high < 0


@pytest.mark.parametrize(
    ("wrong", "labels", "reason"),
    [
        (1, "known", None),
        (2, "known", "its accuracy is 0.9900 against 1.0000"),
        (6, "unknown", None),
        (7, "unknown", "disagrees with torch on 3.5%"),
    ],
)
def test_the_gate(wrong: int, labels: str, reason: str | None) -> None:
    zeros = np.zeros(200, np.int64) if labels == "known" else None
    why = refusal(compare(some_logits(wrong), some_logits(0), zeros, False), max_drop=0.005)
    assert why is None if reason is None else reason in str(why)


def test_labels_that_apply_together_are_compared_one_by_one() -> None:
    given, reference = np.array([[1.0, 1.0], [1, -1]]), np.array([[1.0, -1.0], [1, -1]])
    assert compare(given, reference, None, multi_label=True)["disagreement"] == 0.5


def test_answers_that_are_not_numbers_are_refused() -> None:
    logits = some_logits(0)
    logits[7, 0] = np.nan
    assert "finite" in str(refusal(compare(logits, logits, None, False), 1.0))
