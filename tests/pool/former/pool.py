"""The pool whose files lie beside this one: scores/, selection.parquet, rejected/ and two stores, as commit 6b9f758
wrote them, the last one in which rejected/ was of version 1 (the numbers of a rejection in a sentence, not in columns).
"""

from pathlib import Path

import numpy as np

from pipeline.data.readers.shard import Sample
from tests.conftest import MemoryShard

HERE = Path(__file__).parent
RULES = {"k": 3, "min_probability": 0.45, "copy_threshold": 0.95, "upsample": True}
SETTINGS = {"teacher": "t", "labelled": "l", "shard_rows": 5, "seed": 2}
MARK = "f"  # of the scores


def images(count: int, seed: int) -> np.ndarray:
    """Noise, uint8 (count, 16, 16, 3)."""
    return np.random.RandomState(seed).randint(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def ppm(pixels: np.ndarray) -> bytes:
    """An image file whose bytes are the same with any version of any library."""
    return b"P6 16 16 255\n" + pixels.tobytes()


def shards() -> list[MemoryShard]:
    """Three shards with files that are empty or no images, a repeat and a mirrored copy; the second is one image."""
    first, last = ([ppm(pixels) for pixels in images(count, seed)] for count, seed in ((14, 1), (12, 3)))
    first[3], first[9], last[0] = b"", b"rubbish", last[0][:70]
    last[5], last[7] = first[4], ppm(evaluation()[1][:, ::-1])
    return [
        MemoryShard("pool a/1", tuple(first)),
        MemoryShard("pool b", (ppm(images(1, 2)[0]),)),
        MemoryShard("pool c", tuple(last), first=100, keys=tuple(f"k{row % 5}" for row in range(12))),
    ]


def evaluation() -> np.ndarray:
    """Two evaluation images; the first is in the pool as it is, the second mirrored."""
    return np.concatenate([images(14, 1)[6:7], images(1, 4)])


def labelled() -> list[tuple[str, Sample]]:
    """Labelled images with one that does not decode."""
    files = [ppm(pixels) for pixels in images(6, 5)]
    files[4] = b"broken"
    return [("train", sample) for sample in MemoryShard("train", tuple(files)).read()]
