"""Prior shift: shares against a brute-force maximum and exact solutions, and what comes of simulated teachers."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from pipeline.correction import Correction, fit_prior, load_correction
from pipeline.correction.prior_shift import mean_answers, shares_by_confusion, shares_by_em, stationary
from pipeline.errors import DataError

NAMES = ("cat", "dog", "owl", "emu")
SOURCE = np.array([0.6, 0.25, 0.1, 0.05])
POOL = np.array([0.1, 0.2, 0.3, 0.4])


def answers(n: int, shares: np.ndarray, source: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A teacher that is Bayes' rule with the prior `source`: q (n, 4) of images of `shares`, and their labels."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(4, n, p=shares)
    x = 1.5 * np.eye(4)[labels] + draw.normal(size=(n, 4))  # log p(x | y) = 1.5 x_y + what is the same for all y
    z = 1.5 * x + np.log(source)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), labels


def test_em_is_the_maximum_of_the_likelihood() -> None:
    """Oracle: SciPy on log-shares; and with many images these are the pool's."""
    q, labels = answers(2000, POOL, SOURCE, 0)

    def loss(z: np.ndarray) -> float:
        shares = np.exp(z) / np.exp(z).sum()
        return -float(np.log((q / SOURCE) @ shares).mean())

    found = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    best = np.exp(found.x) / np.exp(found.x).sum()
    shares = shares_by_em(q, SOURCE)
    np.testing.assert_allclose(shares, best, atol=1e-5)
    assert loss(np.log(shares)) <= found.fun + 1e-12
    np.testing.assert_allclose(shares, np.bincount(labels) / len(labels), atol=0.04)


def test_em_without_shift_is_the_source() -> None:
    """Answers whose mean is the source's shares are at the maximum already."""
    q = answers(500, SOURCE, SOURCE, 1)[0]
    mean = q.mean(axis=0)
    np.testing.assert_allclose(shares_by_em(q, mean), mean, atol=1e-6)


def test_shares_of_a_known_confusion_are_exact() -> None:
    draw = np.random.default_rng(0)
    confusion = draw.dirichlet(np.ones(4), 4).T + 2 * np.eye(4)
    confusion /= confusion.sum(axis=0)
    held = np.full(4, 0.25)
    np.testing.assert_allclose(shares_by_confusion(confusion, confusion @ POOL, held, 0.0), POOL, atol=1e-6)
    assert shares_by_confusion(confusion, confusion @ np.array([0, 0, 0.5, 0.5]), held, 0.0).min() >= 0
    useless = np.full((4, 4), 0.25)  # a teacher that says the same of all: its confusion has no inverse
    np.testing.assert_allclose(shares_by_confusion(useless, np.full(4, 0.25), POOL, 0.01), POOL, atol=1e-6)


def test_the_stationary_distribution_is_an_eigenvector() -> None:
    confusion = np.random.default_rng(0).dirichlet(np.ones(4), 4).T
    values, vectors = np.linalg.eig(confusion)
    leading = np.real(vectors[:, np.argmax(values.real)])
    np.testing.assert_allclose(stationary(confusion), leading / leading.sum(), atol=1e-10)


@pytest.mark.parametrize("kind", ["prior-em", "prior-bbse"])
def test_the_shift_of_a_simulated_teacher_is_undone(kind, tmp_path: Path) -> None:
    """The bias is the logarithm of the ratio of priors, whatever shares the labelled images have."""
    pool, truth = answers(20_000, POOL, SOURCE, 0)
    q, labels = answers(20_000, np.full(4, 0.25), SOURCE, 1)
    fitted = fit_prior(kind, q, labels, pool, Correction.identity(NAMES))
    ratio = np.log(POOL / SOURCE)
    np.testing.assert_allclose(fitted.bias, ratio - ratio.mean(), atol=0.2)
    right = (fitted.targets(pool).argmax(axis=1) == truth).mean()
    assert right > (pool.argmax(axis=1) == truth).mean() + 0.1
    e = pool * POOL / SOURCE  # Bayes' rule with the true shares
    assert right == pytest.approx((e.argmax(axis=1) == truth).mean(), abs=0.01)
    fitted.save(tmp_path / "c")
    assert load_correction(tmp_path / "c").fingerprint() == fitted.fingerprint()
    odds = fitted.log_odds(np.log(pool / (1 - pool)).astype(np.float32))
    np.testing.assert_array_equal(odds.argmax(axis=1)[:100], fitted.targets(pool).argmax(axis=1)[:100])


@pytest.mark.parametrize("kind", ["prior-em", "prior-bbse"])
def test_nothing_shifted_changes_little_and_no_bias_nothing(kind) -> None:
    pool, _ = answers(20_000, SOURCE, SOURCE, 0)
    q, labels = answers(20_000, SOURCE, SOURCE, 1)
    fitted = fit_prior(kind, q, labels, pool, Correction.identity(NAMES))
    np.testing.assert_allclose(fitted.bias, 0, atol=0.2)
    same = Correction(kind, NAMES, NAMES, bias=np.zeros(4))
    np.testing.assert_allclose(same.targets(pool), pool, atol=1e-6)


def test_a_class_without_a_label_is_left_to_the_teacher() -> None:
    """Its column is the pool's own; and columns are distributions."""
    pool, _ = answers(1000, POOL, SOURCE, 0)
    q, labels = answers(200, POOL, SOURCE, 1)
    q, labels = q[labels != 3], labels[labels != 3]
    found = mean_answers(q, labels, pool)
    np.testing.assert_allclose(found.sum(axis=0), 1)
    np.testing.assert_allclose(found[:, 3], (pool * pool[:, 3:]).sum(axis=0) / pool[:, 3].sum())
    with pytest.raises(DataError, match="answered 0 and"):
        fit_prior("prior-em", q, np.zeros(200, int), pool[:0], Correction.identity(NAMES))
