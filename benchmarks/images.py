"""Real image files to measure on: JPEG crops of the two photographs that scikit-learn ships."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def jpegs(count: int, size: int, seed: int = 0) -> Iterator[bytes]:
    """Random square crops of 64 pixels or more, scaled to `size`, as JPEG of quality 90."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    draw = np.random.default_rng(seed)
    for _ in range(count):
        photograph = photographs[draw.integers(2)]
        side = int(draw.integers(64, 400))
        left, top = draw.integers(photograph.width - side), draw.integers(photograph.height - side)
        buffer = io.BytesIO()
        crop = photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        crop.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def write_tar(path: Path, count: int, size: int, seed: int = 0) -> Path:
    """A WebDataset tar of such images."""
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(jpegs(count, size, seed)):
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
