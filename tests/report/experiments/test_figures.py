"""Labels of lines keep apart and stay near."""

import random

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from pipeline.report.experiments.figures import spread


@pytest.mark.parametrize("top", [np.inf, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_labels_move_as_little_as_they_can(seed: int, top: float) -> None:
    """Oracle: least squares under the distances, which is isotonic regression of what is left without them."""
    draw = random.Random(seed)
    heights = sorted(draw.random() for _ in range(draw.randint(1, 9)))
    steps = 0.075 * np.arange(len(heights))
    oracle = IsotonicRegression(y_max=top - steps[-1])
    expected = oracle.fit_transform(np.arange(len(heights)), np.subtract(heights, steps)) + steps
    np.testing.assert_allclose(spread(heights, 0.075, top), expected, atol=1e-12)


def test_labels_by_hand() -> None:
    assert spread([0.0, 0.01, 0.9, 1.0], 0.1, 1.0) == pytest.approx([-0.045, 0.055, 0.9, 1.0])
    assert spread([0.98, 1.0], 0.1, 1.0) == pytest.approx([0.9, 1.0])
