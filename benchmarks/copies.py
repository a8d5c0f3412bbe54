"""How many planted copies the filter finds, and how many honest images it takes for copies.

    python -m benchmarks.copies --data DATA     (cifar10/ and tinyimagenet32/, as data_manifests/cifar10.yaml says)

Copies of 2,000 CIFAR-10 test images are made in every way below, and searched among all validation and test
images. Honest images: the pool (which itself holds copies, so its share is an upper bound), less exact repeats.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from benchmarks.record import write_table
from pipeline.data.batches import load_images
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.pool.copies import CopyIndex

Pixels = NDArray[np.uint8]
BATCH = 256


def encoded(image: Image.Image, kind: str, **options: int) -> Image.Image:
    """Through a file format and back."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


def moved(image: Image.Image, by: int) -> Image.Image:
    """Shifted right and down; edges repeat."""
    pixels = np.pad(np.asarray(image), ((by, 0), (by, 0), (0, 0)), mode="edge")
    return Image.fromarray(pixels[: image.height, : image.width])


COPIES = {
    "JPEG quality 75": lambda im: encoded(im, "JPEG", quality=75),
    "JPEG quality 40": lambda im: encoded(im, "JPEG", quality=40),
    "PNG": lambda im: encoded(im, "PNG"),
    "WebP quality 70": lambda im: encoded(im, "WEBP", quality=70),
    "mirrored": lambda im: encoded(im.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=85),
    "shifted by 1": lambda im: encoded(moved(im, 1), "JPEG", quality=85),
    "shifted by 2": lambda im: encoded(moved(im, 2), "JPEG", quality=85),
    "brightened by 20%": lambda im: encoded(ImageEnhance.Brightness(im).enhance(1.2), "JPEG", quality=85),
    "darkened by 20%": lambda im: encoded(ImageEnhance.Brightness(im).enhance(0.8), "JPEG", quality=85),
    "desaturated": lambda im: encoded(ImageEnhance.Color(im).enhance(0.0), "JPEG", quality=85),
    "cropped by 2, scaled back": lambda im: encoded(
        im.crop((2, 2, im.width - 2, im.height - 2)).resize(im.size, Image.Resampling.BICUBIC),
        "JPEG",
        quality=85,
    ),
}


def similarities(index: CopyIndex, images: Pixels) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Best similarity and match of each image."""
    found = [index.find(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.concatenate([f.similarity for f in found]), np.concatenate([f.index for f in found])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=2000)
    parser.add_argument("--honest", type=int, default=20000)
    arguments = parser.parse_args()
    manifest = load_manifest("cifar10", arguments.data)
    evaluation = [load_images(open_split(manifest, s, arguments.data).read(), 32) for s in ("test", "validation")]
    pixels = np.concatenate([e.images.permute(0, 2, 3, 1).numpy() for e in evaluation])
    index = CopyIndex(pixels, [str(i) for i in range(len(pixels))])
    thresholds = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
    rows = []
    for name, make in COPIES.items():
        copies = np.stack([np.asarray(make(Image.fromarray(p))) for p in pixels[: arguments.copies]])
        similarity, match = similarities(index, copies)
        right = match == np.arange(len(copies))
        rows.append([name, *(f"{100 * np.mean(right & (similarity >= t)):.2f}" for t in thresholds)])
    pool = open_split(manifest, "unlabelled", arguments.data)
    samples = (entry for i, entry in zip(range(arguments.honest), pool.read(), strict=False))
    honest = np.unique(load_images(samples, 32).images.permute(0, 2, 3, 1).numpy(), axis=0)
    similarity, _ = similarities(index, honest)
    rows.append(
        [
            f"pool ({len(honest):,} images), taken",
            *(f"{100 * np.mean(similarity >= t):.2f}" for t in thresholds),
        ]
    )
    write_table(
        "copies",
        ["% found at similarity ≥", *map(str, thresholds)],
        rows,
        f"python -m benchmarks.copies --data DATA --copies {arguments.copies} --honest {arguments.honest}",
    )


if __name__ == "__main__":
    main()
