"""Figures against scikit-learn and by hand; statistics against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from pipeline.errors import DataError
from pipeline.evaluate import evaluate_logits, interval
from pipeline.report.experiments.statistics import paired_difference, summarise


def test_figures_equal_scikit_learns() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(400, 7) * 3, torch.randint(0, 7, (400,))
    p = logits.double().softmax(1).numpy()
    found = evaluate_logits(logits, labels)
    assert found.images == 400
    assert found.top1 == pytest.approx(100 * accuracy_score(labels, p.argmax(1)))
    assert found.top5 == pytest.approx(100 * top_k_accuracy_score(labels, p, k=5))
    assert found.nll == pytest.approx(log_loss(labels, p))
    assert found.per_class == pytest.approx(list(100 * recall_score(labels, p.argmax(1), average=None)))


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.6 sure and right half the time, 0.9 sure and always right."""
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    found = evaluate_logits(p.log(), torch.tensor([0, 1, 0, 0]), bins=10)
    assert found.ece == pytest.approx(100 * (0.5 * 0.1 + 0.5 * 0.1), rel=1e-5)


def test_a_class_without_images_has_no_accuracy() -> None:
    assert evaluate_logits(torch.eye(3)[:2], torch.tensor([0, 1])).per_class == [100.0, 100.0, None]


def test_paired_difference_equals_scipys() -> None:
    a, b = np.array([95.0, 96.5, 94.0, 97.0, 96.0]), np.array([94.0, 96.0, 94.5, 95.0, 95.5])
    test = stats.ttest_rel(a, b)
    found = paired_difference(list(a), list(b))
    interval = test.confidence_interval(0.95)
    assert (found.mean, found.p) == (pytest.approx(0.7), pytest.approx(test.pvalue))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert "no significant difference" in str(found)


def test_one_seed_has_no_interval() -> None:
    assert summarise([3.0]).std is None
    assert paired_difference([3.0], [2.0]).p is None
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([1.0, 2.0], [1.0])


def test_intervals_majority_and_confusion() -> None:
    """Oracles: Wilson's formula, and counting one by one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 30 + [1] * 12 + [2] * 8)
    logits = torch.randn(50, 4, generator=generator) + 2 * torch.eye(4)[labels]
    found = evaluate_logits(logits, labels)
    result = found.whole_json(["a", "b", "c", "d"])
    predicted = logits.argmax(1)
    for i, true in enumerate("abcd"):
        for j, other in enumerate("abcd"):
            count = sum(1 for y, p in zip(labels.tolist(), predicted.tolist(), strict=True) if (y, p) == (i, j))
            assert result["confusion"][true].get(other, 0) == count
    assert result["images_per_class"] == {"a": 30, "b": 12, "c": 8, "d": 0}
    assert result["majority"] == 60.0
    assert result["per_class"]["d"] is result["per_class_interval"]["d"] is None
    for name, n in (("a", 30), ("b", 12), ("c", 8)):
        k, z = result["confusion"][name][name], 1.959963985
        middle, half = (k + z * z / 2) / (n + z * z), z * (k * (n - k) / n + z * z / 4) ** 0.5 / (n + z * z)
        expected = [100 * (middle - half), 100 * (middle + half)]
        assert result["per_class_interval"][name] == pytest.approx(expected, abs=0.006)
        assert result["per_class"][name] == pytest.approx(100 * k / n, abs=1e-4)
    assert interval(0, 10)[0] == 0.0
    assert interval(10, 10)[1] == 100.0


def test_logits_that_are_not_finite_are_one_clear_error() -> None:
    logits = torch.zeros(5, 3)
    logits[2, 1], logits[4, 0] = float("nan"), float("inf")
    with pytest.raises(DataError, match="logits are not finite for 2 of 5 images"):
        evaluate_logits(logits, torch.zeros(5, dtype=torch.long))
