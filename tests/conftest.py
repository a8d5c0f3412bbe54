"""Small pools in memory, and a network whose logits are known. Tests get them as fixtures."""

import io
import multiprocessing.forkserver
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.readers.shard import Sample, Shard
from pipeline.pool.infer import Scorer
from pipeline.storage.files import fingerprint

SIZE = 16
FIRST = ("tests/stages", "tests/distributed", "tests/storage")  # what takes longest begins
FORKED = ["tests.distributed.training", "pipeline.pool.score", "pipeline.targets.build", "pipeline.training"]
NAMES = ("ant", "bee", "cat", "dog")


@dataclass(frozen=True)
class MemoryShard(Shard):
    """A shard whose files are in memory; `first` is the row of the first one."""

    name: str
    files: tuple[bytes, ...]
    first: int = 0
    keys: tuple[str, ...] = ()
    reads: list[int] = field(default_factory=list)

    def rows(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        return fingerprint([self.first, [data.hex() for data in self.files], list(self.keys)])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        self.reads.append(1)
        for at in range(len(self.files))[start:stop]:
            key = self.keys[at] if self.keys else f"{self.name}-{at}"
            yield Sample(self.first + at, key, self.files[at], label=at % len(NAMES))


class Linear(nn.Module):
    """Logits are a fixed random projection of the pixels."""

    def __init__(self, classes: int, size: int = SIZE, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(classes, 3 * size * size, generator=generator) / size
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1) @ self.weight.T


def to_png(pixels: np.ndarray) -> bytes:
    """An image file of uint8 pixels (S, S, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_images(count: int, seed: int, size: int = SIZE) -> np.ndarray:
    """Smooth random images, uint8 (count, size, size, 3)."""
    small = np.random.RandomState(seed).randint(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in small])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a module run in one worker, one after another: they share what is dear."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def _one_server_for_all_forks() -> Iterator[None]:
    """The process that others are forked from starts once, with what the first of them asks for: let it be enough."""
    ask = multiprocessing.forkserver.set_forkserver_preload
    with pytest.MonkeyPatch.context() as patch:
        name = "set_forkserver_preload"
        patch.setattr(multiprocessing.forkserver, name, lambda names: ask([*names, *FORKED]))
        yield


@pytest.fixture
def shard_of() -> type[MemoryShard]:
    """The class of shards in memory."""
    return MemoryShard


@pytest.fixture
def images_of() -> Callable[..., np.ndarray]:
    """Smooth random images."""
    return random_images


@pytest.fixture
def png() -> Callable[[np.ndarray], bytes]:
    """Pixels to a file."""
    return to_png


@pytest.fixture
def make_shards() -> Callable[..., list[MemoryShard]]:
    """Shards of random PNG files."""

    def make(rows: Sequence[int] = (30, 20, 25), seed: int = 0) -> list[MemoryShard]:
        return [
            MemoryShard(f"pool-{at:05d}", tuple(to_png(image) for image in random_images(count, 100 * seed + at)))
            for at, count in enumerate(rows)
        ]

    return make


@pytest.fixture
def scorer() -> Scorer:
    """Four classes, 16-pixel images."""
    half, quarter = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return Scorer(Linear(4), NAMES, SIZE, half, quarter, batch=8)


@pytest.fixture
def other_scorer(scorer: Scorer) -> Scorer:
    """Another teacher of the same classes."""
    return replace(scorer, model=Linear(4, seed=1))
