"""Figures against scikit-learn and by hand; statistics against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from pipeline.evaluate import evaluate_logits
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
