"""A classifier's log-odds for encoded images: batches are decoded and classified by a few threads, in order.

On a CPU every thread takes a batch from bytes to log-odds with one core, so the result does not depend on how many
there are (a matrix product split over cores may round otherwise), and no core waits for another. On an accelerator
the threads decode, and take turns at the network.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.decode import WHOLE, Framing, decode
from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError, UsageError
from pipeline.log_odds import distributions, log_odds
from pipeline.networks.network import Network

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
HASH_BYTES = 16  # of BLAKE2b, of an image's pixels
More = TypeVar("More")


class Source(Protocol):
    """What gives an answer to decoded images: a network, or predictions that are stored.

    Attributes:
        class_names: of the answers, C.
        size: S, pixels, that images are decoded to.
        framing: how an image of another shape is shown.
        batch: images of one question.
        missing: status, and detail, of an image that decodes and has no answer.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def framing(self) -> Framing: ...
    @property
    def batch(self) -> int: ...
    @property
    def missing(self) -> tuple[str, str]: ...
    @property
    def lanes(self) -> int: ...
    @property
    def thread_count(self) -> int: ...

    def prepare(self) -> None:
        """Before the first question."""
        ...

    def samples(self, shard: Shard) -> Iterator["Encoded"]:
        """The samples of a shard of the pool, in order."""
        ...

    def answer(self, decoded: "Decoded") -> NDArray[np.float32]:
        """Log-odds of the m images that decoded, (m, C), nats; NaN rows where there is none."""
        ...

    def placed(self, worker: int, threads: int) -> Self:
        """For one of several workers."""
        ...

    def without_weights(self) -> Self:
        """The same, for workers that do not ask it."""
        ...


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
        good: places of those that decoded, (m,), increasing.
        pixels: their pixels, (m, S, S, 3), uint8.
        hashes: BLAKE2b of their pixels, (m, 16), uint8.
    """

    samples: Sequence[Encoded]
    status: list[str]
    detail: list[str | None]
    good: NDArray[np.intp]
    pixels: NDArray[np.uint8]
    hashes: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Inferred(Generic[More]):
    """A batch of samples after the network.

    Attributes:
        decoded: the batch.
        log_odds: of those that decoded, (m, C), float32, nats; NaN rows where a logit is not finite.
        more: what `also` made of the pixels; None where nothing decoded.
        seconds: spent in the network.
    """

    decoded: Decoded
    log_odds: NDArray[np.float32]
    more: More | None
    seconds: float


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
        threads: at work on batches; None: one for each core that this process may use.
        framing: how it is shown images of another shape.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch: int = 256
    device: str = "cpu"
    precision: str = "float32"
    threads: int | None = None
    framing: Framing = WHOLE
    missing: ClassVar[tuple[str, str]] = ("nonfinite", "the teacher's logits are not finite")

    @classmethod
    def of(cls, network: Network, **options: Any) -> "Scorer":
        """Of a saved or built network, in evaluation mode; `options` are further fields."""
        network.model.eval()
        size, names, framing = network.image_size, tuple(network.class_names), network.framing
        return cls(network.model, names, size, network.mean, network.std, framing=framing, **options)

    @property
    def lanes(self) -> int:
        """Batches that can be in the network at a time: one on an accelerator, else one for each thread."""
        return 1 if torch.device(self.device).type != "cpu" else self.thread_count

    @property
    def thread_count(self) -> int:
        """Threads at work on batches."""
        return self.threads or len(os.sched_getaffinity(0))

    def placed(self, worker: int, threads: int) -> Self:
        """For one of several workers: its share of the accelerators and of the cores."""
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:
            count = torch.cuda.device_count()
            if not count:
                raise UsageError("a worker was to use an accelerator, and sees none; is CUDA installed there?")
            device = torch.device("cuda", worker % count)
        return replace(self, device=str(device), threads=threads)

    def without_weights(self) -> Self:
        """The same without its network, for workers that do not ask it."""
        return replace(self, model=nn.Identity())

    def prepare(self) -> None:
        """Before the first question: evaluation mode, on the device."""
        self.model.eval().to(self.device)

    def samples(self, shard: Shard) -> Iterator[Encoded]:
        """The samples of a shard of the pool, in order."""
        return shard.read()

    def answer(self, decoded: Decoded) -> NDArray[np.float32]:
        """Log-odds of the m images that decoded, (m, C)."""
        return self.log_odds(decoded.pixels)

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
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)  # (B, 3, S, S), channels last
            mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
            std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
            normal = images.float().div_(255).sub_(mean).div_(std)
            logits: Tensor = self.model(normal.contiguous(memory_format=torch.channels_last))  # (B, C)
        if logits.shape != (len(pixels), len(self.class_names)):
            raise DataError(
                f"the teacher gives outputs of shape {tuple(logits.shape)} for {len(pixels)} images, "
                f"but the data set has {len(self.class_names)} classes; choose a teacher with these classes"
            )
        return logits.float()

    def log_odds(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Log-odds of decoded images, (B, C), nats; NaN rows where a logit is not finite."""
        return log_odds(self.logits(pixels)).cpu().numpy()


def infer_batches(
    samples: Iterable[Encoded], scorer: Source, also: Callable[[NDArray[np.uint8]], More] | None = None
) -> Iterator[Inferred[More]]:
    """Decode and classify a stream, `scorer.batch` samples at a time, in order; a few batches are under way.

    Args:
        samples: encoded images; read in the caller's thread.
        scorer: the network.
        also: computed from each batch's pixels (m, S, S, 3), m ≥ 1, in the thread that has them.
    """
    scorer.prepare()
    turn = threading.Semaphore(scorer.lanes)

    def work(group: Sequence[Encoded]) -> Inferred[More]:
        decoded = decode_batch(group, scorer.size, scorer.framing)
        if not decoded.good.size:
            return Inferred(decoded, np.empty((0, len(scorer.class_names)), np.float32), None, 0.0)
        with turn:
            began = time.perf_counter()
            values = scorer.answer(decoded)
            seconds = time.perf_counter() - began
        return Inferred(decoded, values, also(decoded.pixels) if also else None, seconds)

    stream = iter(samples)
    with ThreadPoolExecutor(scorer.thread_count, "score", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        under_way: deque[Future[Inferred[More]]] = deque()
        try:
            while True:
                while len(under_way) <= scorer.thread_count and (group := list(islice(stream, scorer.batch))):
                    under_way.append(pool.submit(work, group))
                if not under_way:
                    return
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def infer_distributions(samples: Iterable[Encoded], scorer: Source) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distributions (m, C) of those samples that decode and have finite logits, and their places (m,)."""
    inferred, good, begin = [np.empty((0, len(scorer.class_names)))], [np.empty(0, np.intp)], 0
    batch: Inferred[None]
    for batch in infer_batches(samples, scorer):
        finite = ~np.isnan(batch.log_odds[:, 0])
        inferred.append(distributions(batch.log_odds[finite]))
        good.append(batch.decoded.good[finite] + begin)
        begin += len(batch.decoded.samples)
    return np.concatenate(inferred), np.concatenate(good)


def decode_batch(samples: Sequence[Encoded], size: int, framing: Framing = WHOLE) -> Decoded:
    """Decode samples to `size` × `size` pixels; what does not decode has a status."""
    pixels = np.empty((len(samples), size, size, 3), np.uint8)
    hashes = np.empty((len(samples), HASH_BYTES), np.uint8)
    status: list[str] = []
    detail: list[str | None] = []
    good: list[int] = []
    for place, sample in enumerate(samples):
        image, outcome, why = decode(sample.data, size, framing)
        status.append(str(outcome))
        detail.append(why or None)
        if image is not None:
            digest = hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest()
            pixels[len(good)], hashes[len(good)] = image, np.frombuffer(digest, np.uint8)
            good.append(place)
    return Decoded(samples, status, detail, np.array(good, np.intp), pixels[: len(good)], hashes[: len(good)])
