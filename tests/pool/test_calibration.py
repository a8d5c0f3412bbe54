"""From which similarity on an image is a copy: photographs, drawings, digits, few images, duplicates in the set."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from pipeline.pool.copies.calibration import MARGIN, Calibration, calibrate
from pipeline.pool.copies.index import CopyIndex, default_threshold

HONEST = 0.001


def tiles() -> np.ndarray:
    """520 squares of two photographs, side by side, (520, 32, 32, 3)."""
    pictures = [image[:416] for image in load_sample_images().images]
    squares = np.stack(
        [p[y : y + 32, x : x + 32] for p in pictures for y in range(0, 416, 32) for x in range(0, 640, 32)]
    )
    return squares[np.random.RandomState(0).permutation(len(squares))]


def drawings(count: int) -> np.ndarray:
    """Strokes, all much alike: ones and sevens that nobody wrote twice, (count, 28, 28, 3)."""
    draw = np.random.RandomState(1)
    made = []
    for _ in range(count):
        picture = Image.new("L", (112, 112))
        x, lean, top, foot = (
            56 + draw.randint(-8, 9),
            draw.randint(-20, 21),
            draw.randint(12, 24),
            draw.randint(88, 100),
        )
        ImageDraw.Draw(picture).line([(x - lean, foot), (x + lean, top)], fill=255, width=int(draw.randint(8, 15)))
        if draw.rand() < 0.5:
            ImageDraw.Draw(picture).line([(x + lean - draw.randint(20, 40), top), (x + lean, top)], fill=255, width=10)
        made.append(np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC)))
    return np.repeat(np.stack(made)[..., None], 3, 3)


def jpeg(images: np.ndarray, quality: int = 75) -> np.ndarray:
    made = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        made.append(np.asarray(Image.open(file)))
    return np.stack(made)


def calibrated(evaluation: np.ndarray, labelled: np.ndarray, honest: float = HONEST) -> tuple[CopyIndex, Calibration]:
    index = CopyIndex(evaluation, [f"e{i}" for i in range(len(evaluation))])
    return index, calibrate(index, evaluation, labelled, default_threshold(evaluation.shape[1]), honest)


def copies(index: CopyIndex, calibration: Calibration, images: np.ndarray) -> np.ndarray:
    matches = index.find(images)
    return calibration.are_copies(matches.similarity, [index.names[i] for i in matches.index])


def test_photographs_keep_the_default_threshold() -> None:
    squares = tiles()
    index, calibration = calibrated(squares[:160], squares[160:320])
    assert (calibration.threshold, calibration.self_similar) == (0.7, False)
    assert 318 <= calibration.images <= 320
    assert copies(index, calibration, squares[320:]).sum() == 0
    textured = squares[:160][np.abs(np.diff(squares[:160].mean(3), axis=2)).mean((1, 2)) > 6]  # sky has no detail
    assert copies(index, calibration, jpeg(textured)).mean() > 0.97
    assert copies(index, calibration, np.ascontiguousarray(textured[:, :, ::-1])).mean() > 0.97


def test_drawings_lose_no_honest_image() -> None:
    lines = drawings(1500)
    index, calibration = calibrated(lines[:300], lines[300:500])
    matches = index.find(lines[500:])
    assert (matches.similarity >= default_threshold(28)).mean() > 0.5  # what the default would throw away
    assert copies(index, calibration, lines[500:]).mean() <= 0.003
    assert calibration.self_similar
    assert calibration.above > 0.5
    assert copies(index, calibration, lines[:300]).all()  # identical ones are copies everywhere
    assert calibrated(lines[:300], lines[300:500], honest=0.05)[1].threshold < calibration.threshold


def test_digits_of_eight_pixels_lose_none() -> None:
    digits = np.repeat((load_digits().images * 15.9).astype(np.uint8)[..., None], 3, axis=3)
    index, calibration = calibrated(digits[:400], digits[400:800])
    assert copies(index, calibration, digits[800:]).mean() <= 0.003
    assert copies(index, calibration, digits[:400]).all()


def test_true_duplicates_in_the_set_do_not_move_the_threshold() -> None:
    """CIFAR-10's training and test sets have 2.5% in common: these are what is looked for."""
    squares = tiles()
    textured = np.abs(np.diff(squares.mean(3), axis=2)).mean((1, 2)) > 6
    squares = np.concatenate([squares[textured][:10], squares[~textured], squares[textured][10:]])
    evaluation, labelled = squares[:160], squares[160:].copy()
    labelled[:5] = jpeg(evaluation[:5])
    twice = np.concatenate([evaluation, jpeg(evaluation[5:10], 90)])
    index, calibration = calibrated(twice, labelled)
    assert calibration.images <= 525 - 15  # the copies, and the originals in the evaluation set that have one there
    assert calibration.threshold == calibrated(evaluation, squares[160:])[1].threshold == 0.7
    assert copies(index, calibration, jpeg(evaluation[:10], 60)).mean() >= 0.9  # each has its copy in the set


def test_with_few_images_the_threshold_is_cautious() -> None:
    squares = tiles()
    _, few = calibrated(squares[:20], squares[20:40])
    assert (few.self_similar, few.threshold) == (True, 0.95)
    index, calibration = calibrated(squares[:3], squares[:0])
    assert copies(index, calibration, squares[:3]).all()


def test_a_match_among_many_that_are_alike_needs_more() -> None:
    """Oracle: the ratio test by hand."""
    squares, lines = tiles(), drawings(40)
    lines = np.stack([np.asarray(Image.fromarray(x).resize((32, 32))) for x in lines])
    evaluation = np.concatenate([squares[:200], lines[:4]])
    index, calibration = calibrated(evaluation, np.zeros((200, 32, 32, 3), np.uint8))
    assert not calibration.self_similar
    nearest, similarity = index.ranked(evaluation, 7)
    for i in range(200, 204):
        assert nearest[i, 0] == i
        first, second = np.arctanh(similarity[i, 1:3])
        is_copy = first - second >= MARGIN and similarity[i, 1] >= 0.7
        expected = np.tanh((second if is_copy else first) + MARGIN)
        assert calibration.higher.get(f"e{i}", 0.7) == pytest.approx(max(0.7, min(expected, 0.999)), abs=1e-4)
    by_default = index.find(lines[4:]).similarity >= 0.7
    assert copies(index, calibration, lines[4:]).sum() <= by_default.sum() / 2
    assert calibration.are_copies(np.float32([0.7, 0.69, 0.8]), ["?", "?", None]).tolist() == [True, False, True]


def test_ranked_agrees_with_find() -> None:
    for images in (
        tiles()[:200],
        np.repeat((load_digits().images[:200] * 15.9).astype(np.uint8)[..., None], 3, axis=3),
    ):
        index = CopyIndex(images[:100], [str(i) for i in range(100)])
        matches = index.find(images[100:])
        nearest, similarity = index.ranked(images[100:], 6)
        np.testing.assert_allclose(similarity[:, 0].clip(0), matches.similarity.clip(0), atol=6e-5)
        assert (np.diff(similarity, axis=1) <= 0).all()
        found = similarity[:, 0] > 0
        assert (nearest[found, 0] == matches.index[found]).mean() > 0.97  # equal ones may change places
        real = [set(row[value > 0]) for row, value in zip(nearest, similarity, strict=True)]
        assert [len(row) for row in real] == (similarity > 0).sum(1).tolist()  # no image twice
