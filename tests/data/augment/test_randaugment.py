"""RandAugment's operations against Pillow's and torchvision's, and their choice per image."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from pipeline.config import OPERATIONS, AugmentSettings
from pipeline.data.augment.augment import augment
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.randaugment import apply, randaugment
from tests.data.made_images import noise

SIZES = (8, 32, 33, 96, 224)
STRENGTHS = (-1.0, -0.7, -0.2, 0.0, 0.35, 0.9, 1.0)


def pictures(size: int) -> np.ndarray:
    """Photographs, noise, and images with little or nothing in them, uint8 (N, S, S, 3)."""
    photos = [Image.fromarray(load_sample_image(name)).resize((size, size)) for name in ("china.jpg", "flower.jpg")]
    dark = np.asarray(photos[0]) // 9
    grey = np.repeat(np.asarray(photos[1].convert("L"))[..., None], 3, axis=2)
    flat = np.full((size, size, 3), 77, np.uint8)
    halves = np.zeros((size, size, 3), np.uint8)
    halves[:, size // 2 :] = (255, 1, 128)
    return np.stack([*map(np.asarray, photos), noise(size), dark, grey, flat, halves])


def tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def ours(name: str, images: np.ndarray, strength: float) -> np.ndarray:
    result = apply(tensor(images), name, torch.full((len(images),), strength))
    assert result.dtype == torch.uint8
    assert result.shape == (len(images), 3, *images.shape[1:3])
    return result.numpy().transpose(0, 2, 3, 1)


def enhance(
    kind: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


PILLOW: dict[str, tuple[Callable[[Image.Image, float], Image.Image], int]] = {  # and the largest difference
    "identity": (lambda image, strength: image, 0),
    "invert": (lambda image, strength: ImageOps.invert(image), 0),
    "equalize": (lambda image, strength: ImageOps.equalize(image), 0),
    "posterize": (lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))), 0),
    "solarize": (lambda image, strength: ImageOps.solarize(image, math.ceil(256 * (1 - abs(strength)))), 0),
    "autocontrast": (lambda image, strength: ImageOps.autocontrast(image), 1),  # it truncates floats
    "brightness": (enhance(ImageEnhance.Brightness), 1),  # it truncates, we round
    "color": (enhance(ImageEnhance.Color), 1),
    "contrast": (enhance(ImageEnhance.Contrast), 1),
    "sharpness": (enhance(ImageEnhance.Sharpness), 2),  # it rounds the blurred picture as well
}


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("size", SIZES)
def test_pixel_operations_equal_pillows(name: str, size: int) -> None:
    reference, tolerance = PILLOW[name]
    images = pictures(size)
    for strength in STRENGTHS:
        expected = np.stack([np.asarray(reference(Image.fromarray(image), strength)) for image in images])
        difference = np.abs(expected.astype(int) - ours(name, images, strength))
        assert difference.max() <= tolerance, (strength, difference.max())


def matrix(name: str, strength: float, size: int) -> tuple[float, ...]:
    """Pillow's transform: pixel coordinates in the result to those in the image."""
    if name == "rotate":
        angle, centre = math.radians(30 * strength), size / 2
        cos, sin = math.cos(angle), math.sin(angle)
        return (cos, -sin, centre * (1 - cos + sin), sin, cos, centre * (1 - cos - sin))
    values = {"shear": 0.3 * strength, "translate": 150 / 331 * size * strength}
    kind, axis = name.split("_")
    place = {"shear": {"x": 1, "y": 3}, "translate": {"x": 2, "y": 5}}[kind][axis]
    result = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    result[place] = values[kind]
    return tuple(result)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("size", SIZES)
def test_geometric_operations_equal_pillows(name: str, size: int) -> None:
    """Pillow fills what lies outside without blending: pixels within two of the frame are not compared."""
    images = pictures(size)
    for strength in STRENGTHS:
        data = matrix(name, strength, size)
        expected = []
        for image in images:
            picture = Image.fromarray(image)
            options = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}
            expected.append(np.asarray(picture.transform(picture.size, Image.Transform.AFFINE, data, **options)))
        y, x = np.mgrid[:size, :size] + 0.5
        source_x = data[0] * x + data[1] * y + data[2]
        source_y = data[3] * x + data[4] * y + data[5]
        low, high = np.minimum(source_x, source_y), np.maximum(source_x, source_y)
        result = ours(name, images, strength)
        inside = (low > 2) & (high < size - 2)
        assert np.abs(np.stack(expected).astype(int) - result)[:, inside].max(initial=0) <= 1, strength
        outside = (low < -1) | (high > size + 1)
        assert (result[:, outside] == 128).all(), strength


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("size", [8, 33])
def test_geometric_operations_equal_a_plain_bilinear_sampler(name: str, size: int) -> None:
    """Every pixel is compared, the frame included. Oracle: float64, on an image laid on a field of grey."""
    images = pictures(size)
    field = np.pad(images, ((0, 0), (size, size), (size, size), (0, 0)), constant_values=128).astype(float)
    for strength in STRENGTHS:
        a, b, c, d, e, f = matrix(name, strength, size)
        y, x = np.mgrid[:size, :size] + 0.5
        source_x, source_y = a * x + b * y + c - 0.5 + size, d * x + e * y + f - 0.5 + size
        left, top = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
        u, v = (source_x - left)[..., None], (source_y - top)[..., None]
        above = field[:, top, left] * (1 - u) + field[:, top, left + 1] * u
        below = field[:, top + 1, left] * (1 - u) + field[:, top + 1, left + 1] * u
        difference = np.abs(above * (1 - v) + below * v - ours(name, images, strength))
        assert difference.max() < 0.5 + 0.01, strength  # nothing but the rounding to 8 bits


@pytest.mark.parametrize("name", ["rotate", "translate_x", "translate_y"])
def test_directions_equal_torchvisions(name: str) -> None:
    """Away from the frame, where torchvision darkens the blend."""
    images = tensor(pictures(96))
    options = {"interpolation": InterpolationMode.BILINEAR, "fill": [128.0] * 3}
    for strength in STRENGTHS:
        shift = 150 / 331 * 96 * strength
        angle = 30 * strength if name == "rotate" else 0.0
        translate = [-shift * (name == "translate_x"), -shift * (name == "translate_y")]
        expected = functional.affine(images, -angle, translate, 1.0, [0.0, 0.0], **options)  # type: ignore[arg-type]
        result = apply(images, name, torch.full((len(images),), strength))
        difference = (result.int() - expected.int()).abs()[..., 47:49, 47:49]
        assert difference.max() <= 1, strength


def test_equalize_leaves_fewer_than_256_pixels_alone() -> None:
    """Pillow's rule, and so that of every RandAugment: noted in the docstring."""
    images = pictures(8)
    np.testing.assert_array_equal(ours("equalize", images, 1.0), images)


def test_every_image_has_its_own_operations() -> None:
    """Oracle: one image at a time, each with the operation and sign that were drawn for it."""
    images = tensor(np.concatenate([pictures(32)] * 12))
    settings = AugmentSettings(randaugment_layers=3, randaugment_magnitude=7, randaugment_probability=0.8)
    count = len(images)
    draw = Draws(5, count, 0, count)
    expected = images.clone()
    for layer in range(3):
        chosen = draw.integer(f"operation {layer}", len(OPERATIONS))
        acts, sign = draw.coin(f"acts {layer}", 0.8), draw.coin(f"sign {layer}")
        for row in range(count):
            if acts[row]:
                strength = torch.tensor([0.7 if sign[row] else -0.7])
                expected[row] = apply(expected[row : row + 1], OPERATIONS[chosen[row]], strength)[0]
    torch.testing.assert_close(randaugment(images, settings, draw), expected, rtol=0, atol=0)


def test_operations_are_drawn_evenly() -> None:
    draw = Draws(0, 30_000, 0, 30_000)
    counts = torch.bincount(draw.integer("operation 0", 15))
    assert len(counts) == 15
    assert (counts - 2_000).abs().max() < 5 * 2_000**0.5


def test_only_the_operations_asked_for() -> None:
    images = tensor(pictures(16))
    settings = AugmentSettings(randaugment_layers=1, randaugment_operations=("invert",))
    torch.testing.assert_close(augment(images, settings, 0), (255 - images).float() / 255)
    twice = AugmentSettings(randaugment_layers=2, randaugment_operations=("invert",))
    torch.testing.assert_close(augment(images, twice, 0), images.float() / 255)


def test_probability_of_a_layer() -> None:
    images = tensor(pictures(8))[:1].repeat(4000, 1, 1, 1)
    settings = AugmentSettings(randaugment_layers=1, randaugment_operations=("invert",), randaugment_probability=0.3)
    changed = (augment(images, settings, 0) != images.float() / 255).flatten(1).any(1).sum().item()
    assert abs(changed - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5


def test_magnitude_zero_moves_nothing() -> None:
    """But equalise, autocontrast and invert, which have no magnitude."""
    images = tensor(pictures(32))
    names = tuple(set(OPERATIONS) - {"equalize", "autocontrast", "invert"})
    settings = AugmentSettings(randaugment_layers=8, randaugment_magnitude=0, randaugment_operations=names)
    torch.testing.assert_close(augment(images, settings, 0), images.float() / 255)


def test_more_magnitude_is_a_stronger_effect() -> None:
    """For each operation that has one; solarize and posterize too."""
    images = pictures(32)[:2]
    for name in set(OPERATIONS) - {"identity", "equalize", "autocontrast", "invert"}:
        changes = [np.abs(ours(name, images, m / 10).astype(int) - images).mean() for m in (0, 2, 5, 8, 10)]
        assert changes[0] == 0, name
        assert changes[-1] > changes[1] + 1, (name, changes)
        assert min(np.diff(changes)) > -3, (name, changes)
