"""Who is suspected: against brute force, and where errors were planted."""

import numpy as np
import pytest

from pipeline.labelling.suspects import FAR, distances, label_margins, rank, twins_across_classes


def test_margins_equal_a_loop() -> None:
    """Oracle: each image by itself; opinions that are not there do not count."""
    random = np.random.default_rng(0)
    opinions = [random.dirichlet(np.ones(4), 30) for _ in range(3)]
    opinions[0][5:9], opinions[1][8], opinions[2][8] = np.nan, np.nan, np.nan  # nobody knows the eighth
    labels = random.integers(0, 4, 30)
    found = label_margins(labels, opinions)
    for i, label in enumerate(labels):
        known = [opinion[i] for opinion in opinions if not np.isnan(opinion[i]).any()]
        if not known:
            assert np.isnan(found.margin[i])
            assert found.suggested[i] == label
            continue
        p = np.mean(known, axis=0)
        assert found.margin[i] == pytest.approx(p[label] - max(p[c] for c in range(4) if c != label))
        assert found.suggested[i] == p.argmax()
        assert (found.margin[i] < 0) == (found.suggested[i] != label)


def test_twins_are_found_in_other_classes_alone() -> None:
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (24, 32, 32, 3), np.uint8)
    labels = np.arange(24) % 3
    images[10] = images[3]  # labels 1 and 0
    images[9] = images[6]  # both 0: no contradiction
    images[23] = np.clip(images[4].astype(int) + 8, 0, 255)  # a little brighter; labels 2 and 1
    found = twins_across_classes(images, labels)
    assert {frozenset((pair.first, pair.second)) for pair in found} == {frozenset((3, 10)), frozenset((4, 23))}
    assert all(labels[pair.first] != labels[pair.second] for pair in found)


def test_what_lies_far_off_is_found() -> None:
    random = np.random.default_rng(2)
    centres = np.eye(8)[:3] * 5
    features = centres[random.integers(0, 3, 90)] + random.normal(0, 0.4, (90, 8))
    features[17] = np.eye(8)[7] * 5
    far = distances(features)
    assert far.argmax() == 17
    assert far[17] > FAR
    assert np.isfinite(distances(np.ones((4, 2)))).all()  # all alike


def test_the_order_is_twins_contradictions_outliers() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]])
    images = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), np.uint8)
    images[3] = images[0]
    found = rank(
        label_margins(labels, [p]), twins_across_classes(images, labels), np.array([0, 0, 0, 0, 9.0]), list("abcde")
    )
    assert [suspect.place for suspect in found] == [3, 0, 1, 2, 4] or [s.place for s in found] == [0, 3, 1, 2, 4]
    assert found[2].reasons == ("opinions contradict the label",)
    assert found[2].margin == pytest.approx(-0.6)
    assert found[2].suggested == 1
    assert found[-1].reasons == ("unlike all other labelled images",)
    assert "a copy of" in found[0].reasons[0]
