"""Made sets of images that are alike without being copies: (images (n, S, S, 3), uint8; classes (n,))."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LabelledSet = tuple[NDArray[np.uint8], NDArray[np.int64]]


def digits(size: int) -> LabelledSet:
    """sklearn's 1,797 handwritten digits of 8 pixels, enlarged, shuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    small = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in data.images[order]]
    return _grey([np.asarray(i.resize((size, size), Image.Resampling.BICUBIC)) for i in small]), data.target[order]


def letters(count: int = 2600, side: int = 28) -> LabelledSet:
    """Capitals in the fonts of matplotlib, white on black, each bent by an affine map of its own."""
    import matplotlib

    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts/ttf").glob("DejaVu*.ttf"))
    random = np.random.default_rng(1)

    def letter(label: int) -> NDArray[np.uint8]:
        image = Image.new("L", (side, side), 0)
        font = ImageFont.truetype(str(fonts[random.integers(len(fonts))]), int(random.integers(16, 24)))
        ImageDraw.Draw(image).text((side / 2, side / 2), chr(65 + label), 255, font=font, anchor="mm")
        bend, middle = np.eye(2) + random.normal(0, 0.12, (2, 2)), np.full(2, side / 2)
        shift = middle - bend @ middle + random.normal(0, 1.2, 2)
        matrix = (bend[0, 0], bend[0, 1], shift[0], bend[1, 0], bend[1, 1], shift[1])
        return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))

    labels = random.integers(0, 26, count)
    return _grey([letter(int(label)) for label in labels]), labels


def textures(count: int = 2000) -> LabelledSet:
    """Grey noise of four grains, 32 pixels."""
    from scipy.ndimage import gaussian_filter

    random, grains = np.random.default_rng(2), ((0.6, 0.6), (2, 0.5), (0.5, 2), (1.5, 1.5))

    def texture(label: int) -> NDArray[np.uint8]:
        noise = gaussian_filter(random.normal(size=(48, 48)), grains[label])[8:40, 8:40]
        return (128 + 45 * noise / noise.std()).clip(0, 255).astype(np.uint8)

    labels = random.integers(0, 4, count)
    return _grey([texture(int(label)) for label in labels]), labels


def shapes(count: int = 2000) -> LabelledSet:
    """Discs, boxes and arcs of any colour on plain light grounds, 32 pixels, with a little noise."""
    random = np.random.default_rng(3)

    def shape(label: int) -> NDArray[np.uint8]:
        image = Image.new("RGB", (32, 32), tuple(random.integers(150, 255, 3).tolist()))
        (x, y), (wide, high) = random.integers(3, 10, 2).tolist(), random.integers(12, 18, 2).tolist()
        box, colour, end = (
            (x, y, x + wide, y + high),
            tuple(random.integers(0, 140, 3).tolist()),
            random.integers(180, 360),
        )
        draw: Any = ImageDraw.Draw(image)
        if label == 2:
            draw.arc(box, 0, int(end), colour, 2)
        else:
            (draw.ellipse, draw.rectangle)[label](box, fill=colour)
        return (np.asarray(image) + random.normal(0, 4, (32, 32, 3))).clip(0, 255).astype(np.uint8)

    labels = random.integers(0, 3, count)
    return np.stack([shape(int(label)) for label in labels]), labels


def _grey(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.repeat(np.stack(images)[..., None], 3, 3)


MADE: dict[str, Callable[[], LabelledSet]] = {
    "digits, 8 pixels": lambda: digits(8),
    "digits, enlarged to 28": lambda: digits(28),
    "letters, 28": letters,
    "grey textures, 32": textures,
    "shapes on plain grounds, 32": shapes,
}
