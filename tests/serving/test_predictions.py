import numpy as np
import pytest

from serving.predictions import softmax, top_predictions

LABELS = ["a", "b", "c"]


def test_probabilities_sum_to_one_for_any_logits() -> None:
    logits = np.array([[1e4, -1e4, 0], [0, 0, 0], [-1e30, 1e30, 1e30], [0, 0.6, 0.9]], np.float32)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(probabilities[1], 1 / 3)


def test_sorted_with_label_and_index() -> None:
    predictions = top_predictions(np.log(np.array([0.2, 0.7, 0.1], np.float32)), LABELS, 2)
    assert [(p["label"], p["index"]) for p in predictions] == [("b", 1), ("a", 0)]
    assert predictions[0]["probability"] == pytest.approx(0.7)


def test_ties_keep_the_order_of_indices() -> None:
    predictions = top_predictions(np.zeros(3, np.float32), LABELS, 3)
    assert [p["index"] for p in predictions] == [0, 1, 2]
