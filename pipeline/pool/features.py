"""What a classifier's last layer sees of images: the teacher's own embedding of them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError
from pipeline.pool.infer import Decoded, Inferred, Scorer, infer_batches


@dataclass(frozen=True, eq=False)
class NetworkFeatures:
    """An `Embedder`: inputs of a network's last linear layer.

    Attributes:
        scorer: the network.
    """

    scorer: Scorer

    def embed(self, split: str, shard: str, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """Of images, (n, D).

        Raises:
            DataError: one does not decode or gives numbers that are not finite; or the network ends otherwise.
        """
        with last_layer_watched(self.scorer) as source:
            parts: list[NDArray[np.float32]] = []
            batch: Inferred[None]
            for batch in infer_batches(samples, source):
                if len(batch.decoded.good) < len(batch.decoded.samples):
                    place = next(place for place, said in enumerate(batch.decoded.status) if said != "ok")
                    lost = batch.decoded.samples[place]
                    raise DataError(f"shard {shard} row {lost.row} ({lost.key}) does not decode, and has no embedding")
                parts.append(batch.log_odds)
        found = np.concatenate(parts)
        if len(broken := np.flatnonzero(~np.isfinite(found).all(axis=1))):
            bad = samples[int(broken[0])]
            raise DataError(f"shard {shard} row {bad.row} ({bad.key}): the network's features are not finite")
        return found

    def placed(self, worker: int, threads: int) -> "NetworkFeatures":
        """For one of several workers."""
        return NetworkFeatures(self.scorer.placed(worker, threads))

    def without_weights(self) -> "NetworkFeatures":
        """The same without its network."""
        return NetworkFeatures(self.scorer.without_weights())


@dataclass(frozen=True, eq=False)
class _Watched(Scorer):
    """A scorer whose answers are what its last layer sees; `seen.input` is this thread's."""

    seen: Any = None

    def answer(self, decoded: Decoded) -> NDArray[np.float32]:
        self.logits(decoded.pixels)
        found: Tensor = self.seen.input
        return found.flatten(1).float().cpu().numpy()


@contextmanager
def last_layer_watched(scorer: Scorer) -> Iterator[_Watched]:
    """The scorer, answering what its last linear layer sees.

    Raises:
        DataError: it has none, or its output is not the network's.
    """
    linear = [module for module in scorer.model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features < len(scorer.class_names):
        raise DataError("precompute.embedding takes what a network's last linear layer sees, and the teacher has none")
    seen = threading.local()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.input = inputs[0]

    handle = linear[-1].register_forward_pre_hook(note)
    try:
        yield _Watched(**{field.name: getattr(scorer, field.name) for field in fields(scorer)}, seen=seen)
    finally:
        handle.remove()
