"""Adjusted p-values against a published example and a brute-force definition."""

import itertools

import numpy as np
import pytest

from pipeline.report.statistics import PairedDifference, holm, p_value


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


def test_a_difference_without_spread_has_a_p_value() -> None:
    assert p_value(PairedDifference(3, 0.0, 0.0, 0.0, None)) == 1.0
    assert p_value(PairedDifference(3, 1.0, 1.0, 1.0, None)) == 0.0
    assert p_value(PairedDifference(1, 1.0, None, None, None)) == 1.0
    assert p_value(PairedDifference(3, 1.0, 0.5, 1.5, 0.02)) == 0.02
