"""What is chosen: BADGE against the gradients written out, spread, and the two factors."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, jensenshannon

from pipeline.labelling.informative import choose, disagreement, like_the_labelled, shortness


def test_disagreement_equals_scipys() -> None:
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(5), 20), random.dirichlet(np.ones(5), 20)
    expected = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(disagreement([p, q]), expected, atol=1e-12)
    np.testing.assert_allclose(disagreement([p, p]), 0, atol=1e-12)
    np.testing.assert_allclose(disagreement([np.eye(3), np.eye(3)[[1, 2, 0]]]), 1)
    np.testing.assert_allclose(disagreement([p]), 0, atol=1e-12)


def test_classes_short_of_labels_count_more() -> None:
    labels = np.repeat(np.arange(4), [10, 10, 0, 20])
    found = shortness(labels, 4)
    assert found.tolist() == pytest.approx([1, 1, 4, 11 / 21])


def written_out(p: np.ndarray, x: np.ndarray, importance: np.ndarray, count: int, seed: int) -> list[int]:
    """k-means++ on whole gradients, one image at a time."""
    gradients = []
    for row, features, factor in zip(p, x, importance, strict=True):
        a = row.copy()
        a[row.argmax()] -= 1
        gradients.append(factor * np.outer(a, features).ravel())
    g = np.stack(gradients)
    random = np.random.default_rng(seed)
    chosen = [int((g**2).sum(1).argmax())]
    while len(chosen) < count:
        apart = np.min([(g**2).sum(1), *(((g - g[i]) ** 2).sum(1) for i in chosen)], axis=0)
        apart[chosen] = 0
        chosen.append(int(random.choice(len(g), p=apart / apart.sum())))
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_whole_gradients(seed: int) -> None:
    random = np.random.default_rng(seed)
    p, x = random.dirichlet(np.full(4, 0.5), 60), random.normal(size=(60, 7))
    importance = random.uniform(0.5, 2, 60)
    found = choose(p, x, importance, 12, seed)
    assert found.tolist() == written_out(p, x, importance, 12, seed)
    assert len(set(found.tolist())) == 12


def test_unsure_and_unlike_images_are_chosen() -> None:
    """Two thirds are certain; of the unsure ones half are the same image."""
    random = np.random.default_rng(5)
    p = np.tile([0.999, 0.001], (90, 1))
    p[60:] = [0.55, 0.45]
    x = random.normal(size=(90, 16))
    x[60:75] = x[60]
    found = choose(p, x, np.ones(90), 12, 0)
    assert (found >= 60).all()
    assert ((found >= 60) & (found < 75)).sum() <= 1


def test_what_is_like_no_labelled_image_is_known() -> None:
    """Oracle: SciPy's cosine distances. Two labelled kinds, a pool of these and of a third."""
    random = np.random.default_rng(7)
    centres = np.eye(6)[:3]
    labelled = 3 * centres[[0] * 8 + [1] * 8] + random.normal(0, 0.3, (16, 6))
    pool = 5 * centres[np.arange(60) % 3] + random.normal(0, 0.3, (60, 6))
    among = cdist(labelled, labelled, "cosine") + np.diag(np.full(16, np.inf))
    expected = cdist(pool, labelled, "cosine").min(axis=1) <= among.min(axis=1).max()
    found = like_the_labelled(pool, labelled)
    assert found.tolist() == expected.tolist()
    assert not found[2::3].any()
    assert found[np.arange(60) % 3 < 2].mean() > 0.8
    assert like_the_labelled(pool, labelled[:1]).all()


def test_where_all_is_alike_any_will_do() -> None:
    found = choose(np.full((6, 3), 1 / 3), np.zeros((6, 2)), np.ones(6), 9, 0)
    assert sorted(found.tolist()) == list(range(6))
