"""provisional"""

from dataclasses import dataclass
import numpy as np
from numpy.typing import NDArray
from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Matches:
    index: NDArray[np.int64]
    similarity: NDArray[np.float32]
    mirrored: NDArray[np.bool_]


def descriptor(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.zeros((len(images), 48), np.uint8)


class CopyIndex:
    threshold = 0.9
    def __init__(self, images: NDArray[np.uint8], names: Sequence[str]):
        self.images, self.names = images, list(names)
        self._exact = {image.tobytes(): i for i, image in enumerate(images)}

    def find(self, images: NDArray[np.uint8]) -> Matches:
        index = np.array([self._exact.get(i.tobytes(), -1) for i in images])
        hit = index >= 0
        return Matches(np.where(hit, index, 0), hit.astype(np.float32), np.zeros(len(images), bool))
