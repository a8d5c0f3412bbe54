"""A classifier's logits and log-odds for encoded images: decode in threads, forward in batches."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.decode import decode
from pipeline.errors import DataError, UsageError

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
AHEAD = 3  # batches being decoded while one is in the network


class Encoded(Protocol):
    """An encoded image with its place: `pipeline.data.sources.Sample`, or its like."""

    @property
    def row(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def data(self) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Decoded:
    """A batch of samples after decoding.

    Attributes:
        samples: all of them, in order; n.
        status, detail: per sample; "ok" or what is wrong with it.
        good: places of those that decoded, (m,).
        pixels: their pixels, (m, S, S, 3), uint8.
        hashes: 16 bytes of BLAKE2b of their pixels.
    """

    samples: Sequence[Encoded]
    status: list[str]
    detail: list[str | None]
    good: NDArray[np.intp]
    pixels: NDArray[np.uint8]
    hashes: list[bytes]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A classifier and how it wants its images.

    Attributes:
        model: normalised float (B, 3, S, S) to logits (B, C); put into eval mode and moved by the caller.
        class_names: its C classes, in order.
        size: S, pixels.
        mean, std: per channel, in units of [0, 1].
        batch: images of one forward pass.
        device: a torch device.
        precision: float32, bfloat16 or float16 (the latter two by autocast).
        workers: decoding threads.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch: int = 256
    device: str = "cpu"
    precision: str = "float32"
    workers: int = 2

    def logits(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Logits of decoded images (B, S, S, 3): float32 (B, C) on the scorer's device.

        Raises:
            DataError: the model's classes are not as many as the data set's.
        """
        if self.precision not in AUTOCAST:
            raise UsageError(f"precision (={self.precision!r}) must be one of {', '.join(AUTOCAST)}")
        dtype = AUTOCAST[self.precision]
        kind = torch.device(self.device).type
        with torch.inference_mode(), nullcontext() if dtype is None else torch.autocast(kind, dtype):
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)  # (B, 3, S, S)
            mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
            std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
            images = (images.float() / 255 - mean) / std
            logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))  # (B, C)
        if logits.shape != (len(pixels), len(self.class_names)):
            raise DataError(
                f"the teacher gives outputs of shape {tuple(logits.shape)} for {len(pixels)} images, "
                f"but the data set has {len(self.class_names)} classes; choose a teacher with these classes"
            )
        return logits.float()

    def log_odds(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Log-odds of decoded images, (B, C), nats; NaN rows where a logit is not finite."""
        return log_odds(self.logits(pixels)).cpu().numpy()


def log_odds(logits: Tensor) -> Tensor:
    """z_c - logsumexp of the other logits, nats: float32 (B, C), computed in float64.

    Of the highest logit the others are summed by themselves: 1 - p would cancel. A row with a NaN or an
    infinite logit becomes NaN as a whole.
    """
    if logits.shape[1] < 2:
        raise DataError(f"log-odds need at least 2 classes, found {logits.shape[1]}")
    logits = logits.detach()
    z = (logits.cpu() if logits.device.type == "mps" else logits).double()  # (B, C)
    finite = torch.isfinite(z).all(dim=1, keepdim=True)
    z = torch.where(finite, z, 0.0)
    top, at = z.max(dim=1, keepdim=True)  # (B, 1)
    weights = torch.exp(z - top)
    others = top + torch.log(weights.sum(dim=1, keepdim=True) - weights)  # right except for the highest
    rest = z.scatter(1, at, -torch.inf).logsumexp(dim=1, keepdim=True)
    result = z - others.scatter(1, at, rest)
    return torch.where(finite, result, torch.nan).float()


def distributions(values: NDArray[Any]) -> NDArray[np.float64]:
    """Distributions (n, C) whose rows sum to 1, from log-odds (n, C) in nats."""
    x = values.astype(np.float64)
    small = np.exp(-np.abs(x))
    p = np.where(x >= 0, 1.0, small) / (1.0 + small)  # a sigmoid that never overflows
    result: NDArray[np.float64] = p / p.sum(axis=1, keepdims=True)
    return result


def decoded_batches(samples: Iterable[Encoded], size: int, batch: int, workers: int) -> Iterator[Decoded]:
    """Decode `samples` in order, `batch` at a time, some batches ahead of the reader."""
    stream = iter(samples)
    with ThreadPoolExecutor(max(1, workers), "decode") as pool:
        waiting: deque[tuple[list[Encoded], list[Any]]] = deque()
        try:
            while True:
                while len(waiting) < AHEAD and (group := list(islice(stream, batch))):
                    waiting.append((group, [pool.submit(_decode, sample.data, size) for sample in group]))
                if not waiting:
                    return
                group, futures = waiting.popleft()
                yield _collect(group, [future.result() for future in futures], size)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _decode(data: bytes, size: int) -> tuple[NDArray[np.uint8] | None, str, str, bytes | None]:
    pixels, status, detail = decode(data, size)
    if pixels is None:
        return None, str(status), detail, None
    return pixels, str(status), detail, hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()


def _collect(samples: Sequence[Encoded], results: list[Any], size: int) -> Decoded:
    good = [i for i, result in enumerate(results) if result[0] is not None]
    pixels = [results[i][0] for i in good]
    return Decoded(
        samples=samples,
        status=[status for _, status, _, _ in results],
        detail=[detail or None for _, _, detail, _ in results],
        good=np.array(good, np.intp),
        pixels=np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8),
        hashes=[results[i][3] for i in good],
    )
