"""Adjusted p-values against a published example and a brute-force definition."""

import itertools

import numpy as np
import pytest

from pipeline.report.experiments.markdown import difference_cells
from pipeline.report.experiments.statistics import PairedDifference, holm, holm_adjusted, paired_difference


def test_holm_adjusts_as_defined() -> None:
    """4 · 0.005, then 3 · 0.01, then 2 · 0.03, then 0.04 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Oracle: a hypothesis falls when every set of hypotheses that holds it falls by Bonferroni."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        p = (draw.random(5) ** 3).tolist()
        subsets = [s for n in range(1, 6) for s in itertools.combinations(range(5), n)]
        closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(5)]
        assert holm(p) == pytest.approx(closed)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([100 * 471 / 500, 100 * 478 / 500, 100 * 312 / 500], [100 * 470 / 500, 100 * 477 / 500, 100 * 311 / 500]),
        ([94.0, 95.0], [94.0, 95.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([94.2], [94.0]),
    ],
)
def test_a_difference_without_spread_is_not_judged(a: list[float], b: list[float]) -> None:
    """One test image more for every seed, up to rounding: no interval, nothing bold, p = 1 among others."""
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(a[0] - b[0])
    assert (found.low, found.high, found.p) == (None, None, None)
    other = PairedDifference(3, 1.0, 0.5, 1.5, 0.001)
    adjusted = holm_adjusted({"this": found, "other": other})
    assert adjusted == {"this": 1.0, "other": 0.002}
    assert difference_cells(found, adjusted["this"]) == [f"{found.mean:+.2f}", "–", "–", "–"]
    assert "no interval" in str(found)


def test_a_difference_with_little_spread_is_judged() -> None:
    p = paired_difference([94.2, 95.2, 96.2], [94.0, 95.0, 96.001]).p
    assert p is not None
    assert p < 0.001
