"""The evaluation against numbers made by hand."""

from typing import Any

import numpy as np
import pytest

from workloads import evaluation

NAMES = ["a", "b", "c"]


def found(
    labels: list[int], predicted: list[int], confidence: list[float] | None = None
) -> dict[str, Any]:
    sure = confidence or [1.0] * len(labels)
    answers = np.array([predicted, sure], dtype=np.float32).T
    lengths = np.arange(3, 3 + len(labels))
    return evaluation.evaluate(np.array(labels), lengths, answers, NAMES)


def test_scores_are_those_made_by_hand():
    seen = found([0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0])
    assert seen["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert seen["accuracy"] == pytest.approx(4 / 6)
    a, b, c = seen["classes"]
    assert (a["precision"], a["recall"], a["f1"], a["rows"]) == (3 / 4, 3 / 4, 3 / 4, 4)
    assert (b["precision"], b["recall"], b["f1"], b["rows"]) == (1 / 2, 1 / 2, 1 / 2, 2)
    assert (c["precision"], c["recall"], c["f1"], c["rows"]) == (None, None, None, 0)
    assert seen["f1"] == pytest.approx((3 / 4 + 1 / 2) / 2)  # a class nobody saw is left out


def test_scores_are_those_of_scikit_learn():
    from sklearn import metrics  # comes with nncf

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(3, size=(2, 200))
    seen = found(labels.tolist(), predicted.tolist())
    whole = metrics.precision_recall_fscore_support(labels, predicted)
    for kind, scores in zip(("precision", "recall", "f1", "rows"), whole, strict=True):
        assert [one[kind] for one in seen["classes"]] == pytest.approx(scores.tolist())
    assert seen["f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_confidence_that_can_be_believed_has_no_calibration_error():
    right = np.array([True] * 3 + [False] + [True] * 2 + [False] * 2)
    seen = evaluation.calibration(np.array([0.75] * 4 + [0.5] * 4), right)
    assert seen["ece"] == 0
    assert [one["rows"] for one in seen["bins"]] == [4, 4]


def test_the_calibration_error_is_the_gap_weighted_by_rows():
    right = np.array([True, False, True, True])
    seen = evaluation.calibration(np.array([0.9, 0.9, 0.62, 0.66]), right)
    # |1/2 - 0.9| of two rows, |1 - 0.64| of two.
    assert seen["ece"] == pytest.approx((2 * 0.4 + 2 * 0.36) / 4)


def test_a_bin_has_its_upper_end_and_one_of_15_is_the_last():
    seen = evaluation.calibration(np.array([0.2, 0.2001, 1.0, 0.0]), np.ones(4, dtype=bool))
    assert [round(one["high"] * 15) for one in seen["bins"]] == [1, 3, 4, 15]


def test_the_interval_is_wilsons():
    assert evaluation.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = evaluation.wilson(10, 10)
    assert (low, high) == pytest.approx((0.7225, 1), abs=1e-4)
    assert high <= 1
    assert evaluation.wilson(0, 10)[0] == 0


def test_slices_by_length_are_quarters_that_hold_every_row_once():
    right = np.array([True, True, False, False, True, True, True, False])
    seen = evaluation.by_length(np.arange(1, 9), right)
    assert [one["name"] for one in seen] == [f"{n} to {n + 1} tokens" for n in (1, 3, 5, 7)]
    assert [one["accuracy"] for one in seen] == [1, 0, 1, 0.5]
    assert [one["rows"] for one in seen] == [2] * 4


def test_texts_of_one_length_are_one_slice():
    assert len(evaluation.by_length(np.full(9, 5), np.ones(9, dtype=bool))) == 1


def test_a_class_has_the_interval_of_its_recall():
    a, b, c = found([0, 0, 1, 1], [0, 1, 1, 1])["classes"]
    assert (a["interval"], b["interval"]) == (evaluation.wilson(1, 2), evaluation.wilson(2, 2))
    assert c["interval"] is None


def test_pairs_are_sorted_by_how_often_they_are_confused():
    pairs = evaluation.confused_pairs(NAMES, [[5, 1, 0], [3, 1, 0], [0, 0, 0]])
    assert pairs == [(3, 3 / 4, "b", "a"), (1, 1 / 6, "a", "b")]


def test_what_was_not_evaluated_has_no_notes():
    assert evaluation.scalars({}) == {}
    noted = evaluation.scalars(found([0, 1], [0, 1], [0.5, 0.5]))
    assert noted["eval_calibration_error"] == 0.5
    assert noted["eval_accuracy_interval"] == [0.3424, 1.0]
