"""Flips, crops, turns and holes; slices of a batch; what augmentation must not do."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image
from torch import Tensor

from pipeline.data.augment.augment import AugmentSettings, augment, normalize
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.geometry import affine
from tests.data.made_images import noise

EVERYTHING = AugmentSettings(
    flip=True,
    crop_padding=2,
    random_resized_crop=0.3,
    rotate=20,
    translate=0.1,
    randaugment_layers=2,
    cutout=3,
)


def batch(count: int, size: int = 8) -> Tensor:
    return torch.stack([torch.from_numpy(noise(size, i)).permute(2, 0, 1) for i in range(count)])


def pixels(images: Tensor) -> np.ndarray:
    """Back to 8 bits, (B, S, S, 3)."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_the_defaults_do_nothing() -> None:
    images = batch(5)
    result = augment(images, AugmentSettings(), 0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, images.double().div(255).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [8, 31, 32])
def test_shape_range_input_and_repetition(size: int) -> None:
    images = batch(40, size)
    before = images.clone()
    first, second = augment(images, EVERYTHING, 7), augment(images, EVERYTHING, 7)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, second)
    assert torch.equal(images, before)
    assert (augment(images, EVERYTHING, 8) != first).flatten(1).any(1).float().mean() > 0.9


def test_a_slice_of_a_batch_is_that_slice_of_the_whole() -> None:
    """So any number of processes sees the same images."""
    images = batch(24, 16)
    whole = augment(images, EVERYTHING, 3)
    for parts in (1, 2, 3, 24):
        size = 24 // parts
        slices = [augment(images[i : i + size], EVERYTHING, 3, first=i, total=24) for i in range(0, 24, size)]
        assert torch.equal(torch.cat(slices), whole), parts


def test_switching_one_thing_on_leaves_the_others_alone() -> None:
    """Each has a stream of random numbers of its own."""
    images = batch(50)
    flipped = augment(images, AugmentSettings(flip=True), 0)
    both = augment(images, AugmentSettings(flip=True, cutout=4), 0)
    kept = (both != 128 / 255).all(1, keepdim=True).expand_as(both)
    assert torch.equal(both[kept], flipped[kept])
    assert kept.float().mean() > 0.7


def test_flips_mirror_half_of_the_images() -> None:
    images = batch(2000)
    result = augment(images, AugmentSettings(flip=True), 0)
    plain = images.float() / 255
    same = (result == plain).flatten(1).all(1)
    mirrored = (result == plain.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 1000) < 5 * 500**0.5


@pytest.mark.parametrize(("border", "mode"), [("reflect", "reflect"), ("zero", "constant")])
@pytest.mark.parametrize(("size", "padding"), [(8, 1), (8, 3), (32, 4)])
def test_crops_are_crops_of_numpys_padding(border: str, mode: str, size: int, padding: int) -> None:
    """Oracle: all windows of np.pad; each shift occurs about equally often."""
    images = batch(400, size)
    result = pixels(augment(images, AugmentSettings(crop_padding=padding, border=border), 1))  # type: ignore[arg-type]
    shifts: Counter[tuple[int, int]] = Counter()
    side = 2 * padding + 1
    for image, cropped in zip(images.permute(0, 2, 3, 1).numpy(), result, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)  # type: ignore[call-overload]
        windows = [
            (y, x)
            for y in range(side)
            for x in range(side)
            if np.array_equal(padded[y : y + size, x : x + size], cropped)
        ]
        assert len(windows) == 1
        shifts[windows[0]] += 1
    assert len(shifts) > 0.95 * side**2
    assert max(shifts.values()) < 400 / side**2 + 6 * (400 / side**2) ** 0.5


def test_flip_and_crop_together() -> None:
    """Oracle: flip first or crop first is the same family: windows of the padded mirror image."""
    images = batch(60)
    result = pixels(augment(images, AugmentSettings(flip=True, crop_padding=2), 0))
    for image, cropped in zip(images.permute(0, 2, 3, 1).numpy(), result, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        windows = [p[y : y + 8, x : x + 8] for p in (padded, padded[:, ::-1]) for y in range(5) for x in range(5)]
        assert any(np.array_equal(window, cropped) for window in windows)


def test_padding_beyond_the_image_still_reflects() -> None:
    images = batch(20)
    result = pixels(augment(images, AugmentSettings(crop_padding=20), 0))
    for image, cropped in zip(images.permute(0, 2, 3, 1).numpy(), result, strict=True):
        padded = np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), (0, 1)).transpose(0, 1, 3, 4, 2)
        assert (windows == cropped).all((2, 3, 4)).any()


@pytest.mark.parametrize("side", [1, 3, 4, 20])
def test_cutout_is_one_grey_square(side: int) -> None:
    """Oracle: the square, clipped to the image, that covers exactly the grey pixels."""
    images = batch(300, 16)
    images[images == 128] = 127
    result = pixels(augment(images, AugmentSettings(cutout=side), 0))
    centres = []
    for image, holed in zip(images.permute(0, 2, 3, 1).numpy(), result, strict=True):
        grey = (holed == 128).all(2)
        np.testing.assert_array_equal(holed[~grey], image[~grey])
        rows, columns = np.flatnonzero(grey.any(1)), np.flatnonzero(grey.any(0))
        assert grey.sum() == len(rows) * len(columns) > 0
        assert max(len(rows), len(columns)) <= side
        assert len(rows) == side or rows[0] == 0 or rows[-1] == 15
        centres.append((rows[0] + rows[-1]) / 2)
    if side <= 4:  # uniform centres, over the edge included
        assert 6 < np.mean(centres) < 9
        assert min(centres) <= 1
        assert max(centres) >= 14


def test_resized_crops_show_a_window_of_the_stated_area() -> None:
    """On a ramp, the slope of what is seen is the window's width, and its middle the window's centre."""
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(1, 3, 64, 64)
    images = torch.cat([ramp, ramp.transpose(2, 3)]).repeat(1, 1, 1, 1)
    widths, heights = [], []
    for seed in range(300):
        across, down = (augment(images[i : i + 1], AugmentSettings(random_resized_crop=0.25), seed) for i in (0, 1))
        x, y = across[0, 0, 32].numpy(), down[0, 0, :, 32].numpy()
        assert np.all(np.diff(x) >= 0)
        assert np.all(np.diff(y) >= 0)
        widths.append((x[48] - x[16]) / (32 / 63))
        heights.append((y[48] - y[16]) / (32 / 63))
    area = np.array(widths) * np.array(heights)
    aspect = np.array(widths) / np.array(heights)
    assert 0.22 < area.min() < 0.32
    assert 0.8 < area.max() < 1.05
    assert 0.7 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.45


def test_rotations_stay_within_their_limit_and_go_both_ways() -> None:
    """The angle is read off a line through the centre."""
    image = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    image[..., 32, :] = 255
    angles = []
    for seed in range(200):
        turned = augment(image, AugmentSettings(rotate=30, border="zero"), seed)[0, 0].numpy()
        y, x = np.mgrid[:65, :65] - 32.0
        weight = turned * (np.hypot(x, y) < 25)
        angles.append(0.5 * np.degrees(np.arctan2(2 * (weight * x * y).sum(), (weight * (x**2 - y**2)).sum())))
    assert 25 < max(angles) < 31
    assert -31 < min(angles) < -25
    assert abs(np.mean(angles)) < 4


def test_a_rotation_is_pillows() -> None:
    """Away from the frame, by the angle that was drawn, on a picture without symmetry."""
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((96, 96))
    images = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None]
    y, x = np.mgrid[:96, :96] - 47.5
    inside = np.hypot(x, y) < 44
    for seed in range(8):
        angle = 40 * float(Draws(seed, 1, 0, 1).signed("rotate"))
        expected = np.asarray(photo.rotate(angle, Image.Resampling.BILINEAR), int)
        result = pixels(augment(images, AugmentSettings(rotate=40), seed))[0]
        assert np.abs(expected - result)[inside].max() <= 1


def test_translations_stay_within_their_limit() -> None:
    image = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    image[..., 16, 16] = 255
    shifts = []
    for seed in range(300):
        moved = augment(image, AugmentSettings(translate=0.2, border="zero"), seed)[0, 0].numpy()
        shifts.append([(moved.sum(axis) * (np.arange(33) - 16)).sum() / moved.sum() for axis in (0, 1)])
    limit = 0.2 * 33
    found = np.array(shifts)
    assert np.abs(found).max() < limit + 0.05
    assert (found.max(0) > 0.9 * limit).all()
    assert (found.min(0) < -0.9 * limit).all()


def test_affine_moves_whole_pixels_exactly() -> None:
    images = batch(2).float()
    theta = torch.tensor([[1.0, 0, 2 * 3 / 8], [0, 1, -2 * 2 / 8]]).expand(2, 2, 3)
    expected = torch.zeros_like(images)
    expected[:, :, 2:, :5] = images[:, :, :6, 3:]
    torch.testing.assert_close(affine(images, theta), expected, rtol=0, atol=1e-3)


def test_grey_images_stay_grey() -> None:
    grey = batch(64, 16)[:, :1].expand(-1, 3, -1, -1)
    result = augment(grey, EVERYTHING, 0)
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])


def test_normalize() -> None:
    """Oracle: torchvision's."""
    from torchvision.transforms.v2.functional import normalize as reference

    images = torch.rand(4, 3, 8, 8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    result = normalize(images, mean, std)
    torch.testing.assert_close(result, reference(images, list(mean), list(std)))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "wrong",
    [{"flipp": True}, {"rotate": -1}, {"cutout": -1}, {"random_resized_crop": 0},
     {"randaugment_magnitude": 11}, {"randaugment_probability": 1.5},
     {"randaugment_operations": ["blur"]}, {"randaugment_operations": []}],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentSettings.model_validate(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_images() -> None:
    images = batch(256, 32)
    host = pixels(augment(images, EVERYTHING, 0)).astype(int)
    device = pixels(augment(images.cuda(), EVERYTHING, 0).cpu()).astype(int)
    assert (np.abs(host - device) > 1).mean() < 1e-3  # a rare pixel is rounded the other way
