"""From a teacher's classes to the data set's: maps, fits against scikit-learn, files."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.correction import (
    Correction,
    class_map_of,
    equal_names,
    fit_correction,
    fit_scaling,
    load_correction,
    read_class_map,
)
from pipeline.correction import fit as module
from pipeline.correction.correction import features
from pipeline.correction.fit import deal_to_folds
from pipeline.correction.judge import movements
from pipeline.errors import DataError
from pipeline.log_odds import distributions, log_odds, log_odds_of_shares
from pipeline.networks.packaged import imagenet_names

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OURS = ("cat", "dog", "owl")
THEIRS = ("tabby", "lynx", "beagle", "barn owl", "car")
STATED = "cat: [tabby, lynx]\ndog: beagle\nowl: [barn owl]\n"


def teacher(n: int, classes: int, seed: int = 0, sharp: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Distributions (n, classes) of images of three classes, and their labels."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    z = draw.normal(size=(n, classes))
    z[np.arange(n), labels] += sharp
    e = np.exp(z)
    return e / e.sum(axis=1, keepdims=True), labels


@pytest.fixture
def mapped(tmp_path: Path) -> Correction:
    (tmp_path / "map.yaml").write_text(STATED)
    return Correction.mapped(THEIRS, OURS, read_class_map(tmp_path / "map.yaml", THEIRS, OURS))


def test_a_map_sums_and_spreads_what_it_does_not_map(mapped: Correction) -> None:
    q = np.array([[0.1, 0.2, 0.3, 0.1, 0.3], [0.0, 0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(mapped.targets(q)[0], [0.4, 0.4, 0.2], atol=1e-6)
    np.testing.assert_allclose(mapped.targets(q)[1], 1 / 3, atol=1e-6)
    odds = mapped.log_odds(log_odds_of_shares(q))
    p = 1 / (1 + np.exp(-odds.astype(float)))
    np.testing.assert_allclose(p[0], [0.3, 0.3, 0.1], atol=1e-6)  # a car is evidence against all of ours
    assert p[1].max() < 1e-6


def test_log_odds_of_shares_are_those_of_logits() -> None:
    logits = np.random.default_rng(0).normal(scale=8, size=(50, 7))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    found = log_odds_of_shares(p / p.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, log_odds(torch.from_numpy(logits)).numpy(), rtol=1e-5, atol=1e-5)
    certain = log_odds_of_shares(np.array([[0.0, 1.0, 0.0]], np.float32))
    assert certain.tolist() == [[-104.0, 104.0, -104.0]]
    np.testing.assert_allclose(distributions(certain), [[0, 1, 0]], atol=1e-12)


def test_the_identity_changes_no_bit() -> None:
    q = np.random.default_rng(0).dirichlet(np.ones(3), 5).astype(np.float32)
    same = Correction.identity(OURS)
    assert same.targets(q) is q
    odds = log_odds_of_shares(q)
    assert same.log_odds(odds) is odds
    assert same.fingerprint() is None


@pytest.mark.parametrize("strength", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(("n", "classes"), [(30, 8), (300, 5), (12, 40)])
def test_a_fit_without_a_start_is_scikit_learns(strength: float, n: int, classes: int, monkeypatch) -> None:
    """More images than classes, and fewer: the turned features give the same minimum."""
    monkeypatch.setattr(module, "PRIOR", 0.0)  # of the bias: theirs has none
    q, labels = teacher(n, classes)
    names = tuple(f"t{c}" for c in range(classes))
    found = fit_correction(q, labels, names, OURS, strengths=[strength])
    theirs = LogisticRegression(C=1 / (strength * n), tol=1e-10, max_iter=5000).fit(features(q), labels)
    test = teacher(50, classes, seed=1)[0]
    np.testing.assert_allclose(found.correction.targets(test), theirs.predict_proba(features(test)), atol=2e-4)


def test_a_strong_fit_is_its_start_and_a_weak_one_is_not(mapped: Correction) -> None:
    q, labels = teacher(60, 5)
    strong, weak = (
        fit_correction(q, labels, THEIRS, OURS, mapped.class_map, strengths=[strength]).correction
        for strength in (1e6, 1e-4)
    )
    assert np.abs(strong.weight).max() < 1e-5
    assert np.abs(weak.weight).max() > 0.1
    order = strong.targets(q).argmax(axis=1) == mapped.targets(q).argmax(axis=1)
    assert order.mean() > 0.7  # a scale and a bias change few orders


def test_a_scaling_is_a_fit_without_weights(tmp_path: Path, mapped: Correction) -> None:
    """The same minimum as a fit whose weights are held at zero; kept in a file."""
    q, labels = teacher(60, 5)
    scaled = fit_scaling(q, labels, THEIRS, OURS, mapped.class_map)
    held = fit_correction(q, labels, THEIRS, OURS, mapped.class_map, strengths=[1e9]).correction
    test = teacher(50, 5, seed=1)[0]
    np.testing.assert_allclose(scaled.targets(test), held.targets(test), atol=1e-5)
    assert scaled.scale == pytest.approx(held.scale, rel=1e-4)
    scaled.save(tmp_path / "c")
    assert load_correction(tmp_path / "c").fingerprint() == scaled.fingerprint()
    with pytest.raises(DataError, match="there are 1"):
        fit_scaling(q[:1], labels[:1], THEIRS, OURS, mapped.class_map)


def test_the_strength_is_chosen_by_what_is_left_out(monkeypatch) -> None:
    """The same folds, the same losses, with scikit-learn's fits."""
    monkeypatch.setattr(module, "PRIOR", 0.0)
    q, labels = teacher(60, 6)
    strengths = (1.0, 0.1, 0.01)
    found = fit_correction(q, labels, tuple("abcdef"), OURS, strengths=strengths, seed=3)
    order = module.permutation(len(labels), 3, "fit")
    x, y = features(q)[order], labels[order]
    fold = deal_to_folds(y, 5, 3)
    expected = []
    for strength in strengths:
        total = 0.0
        for number in range(5):
            inside = fold != number
            fit = LogisticRegression(C=1 / (strength * inside.sum()), tol=1e-10, max_iter=5000).fit(
                x[inside], y[inside]
            )
            p = fit.predict_proba(x[~inside])
            total -= np.log(p[np.arange(len(p)), y[~inside]]).sum()
        expected.append(total / len(y))
    np.testing.assert_allclose(found.nll, expected, rtol=1e-4)
    assert found.strength == strengths[int(np.argmin(expected))]


def test_folds_have_every_class_and_one_size() -> None:
    labels = np.repeat(np.arange(7), [9, 1, 5, 2, 30, 3, 4])
    fold = deal_to_folds(labels, 5, 0)
    sizes = np.bincount(fold, minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for label in range(7):
        counts = np.bincount(fold[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_a_class_without_a_labelled_image_keeps_its_place(mapped: Correction) -> None:
    q, labels = teacher(40, 5)
    seen = labels < 2
    found = fit_correction(q[seen], labels[seen], THEIRS, OURS, mapped.class_map)
    assert found.absent == ("owl",)
    owl = np.array([[0.01, 0.01, 0.01, 0.96, 0.01]])
    assert found.correction.targets(owl).argmax() == 2  # from the map alone
    with pytest.raises(DataError, match="there are 1"):
        fit_correction(q[:1], labels[:1], THEIRS, OURS)


def test_files_are_read_as_written_and_damage_is_a_sentence(tmp_path: Path, mapped: Correction) -> None:
    q, labels = teacher(30, 5)
    path = tmp_path / "c.safetensors"
    for correction in (mapped, fit_correction(q, labels, THEIRS, OURS, mapped.class_map).correction):
        correction.save(path)
        again = load_correction(path)
        assert again.fingerprint() == correction.fingerprint()
        np.testing.assert_array_equal(again.targets(q), correction.targets(q))
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(200):
        place = int(draw.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(draw.integers(8)))]) + whole[place + 1 :])
        with suppress(DataError):
            assert load_correction(path).fingerprint() is not None
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError):
            load_correction(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STATED + "fox: lynx\n", "'fox' is none of your classes"),
        (STATED.replace("beagle", "poodle"), "'poodle' is none of the teacher's classes"),
        (STATED.replace("beagle", "lynx"), "'lynx' stands under 'cat' and under 'dog'"),
        (STATED.replace("dog: beagle\n", ""), "names none of the teacher's classes for dog"),
        ("- a\n- b\n", "must have a line for each of your classes"),
        ("cat: [", "cannot be read"),
    ],
)
def test_what_a_class_map_cannot_say(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        read_class_map(tmp_path / "map.yaml", THEIRS, OURS)


def test_places_stand_for_the_classes_there(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("cat: [0-1]\ndog: 2\nowl: barn owl\n")
    assert read_class_map(tmp_path / "map.yaml", THEIRS, OURS).tolist() == [0, 0, 1, 2, -1]
    (tmp_path / "map.yaml").write_text("cat: [0-9]\ndog: 2\nowl: barn owl\n")
    with pytest.raises(DataError, match="'0-9' is none of the teacher's classes"):
        read_class_map(tmp_path / "map.yaml", THEIRS, OURS)
    (tmp_path / "map.yaml").write_text("'0': '1'\n'1': '0'\n")  # where classes are called by numbers, these are names
    assert read_class_map(tmp_path / "map.yaml", ("0", "1"), ("0", "1")).tolist() == [1, 0]


def test_the_embedded_map_of_imagenet() -> None:
    names = imagenet_names()
    assert len(set(names)) == 1000
    found = read_class_map(Path("imagenet-cifar10"), names, CIFAR)
    kinds = {name: [names[t].split(",")[0] for t in np.flatnonzero(found == c)] for c, name in enumerate(CIFAR)}
    assert kinds["airplane"] == ["airliner", "warplane"]
    assert kinds["cat"] == ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"]
    assert kinds["frog"] == ["bullfrog", "tree frog", "tailed frog"]
    assert (len(kinds["dog"]), len(kinds["bird"])) == (118, 59)
    assert "fire engine" in kinds["truck"]


def test_equal_names_are_a_map_where_they_are_enough() -> None:
    assert equal_names(("dog", "car", " cat", "owl"), OURS).tolist() == [1, -1, 0, 2]
    assert class_map_of(None, ("dog", "car"), OURS, complete=False) is None
    with pytest.raises(DataError, match="is called cat, owl"):
        class_map_of(None, ("dog", "car"), OURS, complete=True)


def test_names_in_a_class_map_are_as_they_are_written(tmp_path: Path) -> None:
    """`010` is no octal number, `no` no truth; and a class stands once."""
    theirs = tuple(f"{c:03d}" for c in range(20))
    path = tmp_path / "map.yaml"
    path.write_text("no: [010]\nyes: [011, 012]\n")
    assert np.flatnonzero(read_class_map(path, theirs, ("no", "yes")) >= 0).tolist() == [10, 11, 12]
    path.write_text("no: [010]\nyes: 011\nno: 012\n")
    with pytest.raises(DataError, match="'no' stands twice"):
        read_class_map(path, theirs, ("no", "yes"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="no plain file"):
        read_class_map(path, theirs, ("no", "yes"))


def test_movements_are_counted_by_the_first_answer(mapped: Correction) -> None:
    """Oracle: a plain account, image by image."""
    q = np.random.default_rng(0).dirichlet(np.full(len(mapped.teacher_names), 0.3), 200)
    n, classes = len(mapped.teacher_names), len(mapped.class_names)
    other = replace(mapped, kind="scaling", bias=np.arange(classes, dtype=float), scale=0.5)
    moved = movements(q, mapped, other, most=2)
    first = q.argmax(axis=1)
    assert moved.images.tolist() == sorted(np.bincount(first, minlength=n).tolist(), reverse=True)[:2]
    for row, answer in enumerate(moved.answers.tolist()):
        mine = [place for place in range(200) if first[place] == answer]
        np.testing.assert_allclose(moved.after[row], np.mean([other.targets(q)[at] for at in mine], axis=0), rtol=1e-5)
        np.testing.assert_allclose(
            moved.before[row], np.mean([mapped.targets(q)[at] for at in mine], axis=0), rtol=1e-5
        )
    largest = moved.largest(mapped.teacher_names, mapped.class_names)
    shares = [one["share"] for one in largest]
    assert shares == sorted(shares, reverse=True)
    gain = (moved.after - moved.before) * moved.images[:, None] / 200
    assert shares[0] == pytest.approx(gain.max(), abs=1e-4)
    assert movements(q, mapped, mapped, 2).largest(mapped.teacher_names, mapped.class_names) == []
