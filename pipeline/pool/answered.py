"""Stored answers in the place of a network: the pool is decoded and compared as ever, and nothing is inferred."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.answers.store import embeddings_of_rows, stream_answers
from pipeline.data.decode import WHOLE, Framing
from pipeline.data.readers.shard import Sample, Shard
from pipeline.log_odds import log_odds_of_shares
from pipeline.pool.infer import Decoded, Encoded
from pipeline.pool.select.scan import cores
from pipeline.storage.files import Location

POOL = "unlabelled"


class AnsweredSample(NamedTuple):
    """A sample with its answer: a distribution (C_T,), or None."""

    row: int
    key: str
    data: bytes
    answer: NDArray[np.float32] | None


@dataclass(frozen=True)
class StoredAnswers:
    """A `Source` of the answers in answers/.

    Attributes:
        folder: answers/.
        class_names: of the answers, C_T.
        size: pixels that images are decoded to, for what is found out about them.
        batch: images that a thread decodes at a time.
        threads: at work; None: one for each core.
    """

    folder: Location
    class_names: tuple[str, ...]
    size: int
    batch: int = 256
    threads: int | None = None
    framing: Framing = WHOLE
    missing: ClassVar[tuple[str, str]] = ("no_prediction", "the predictions have no answer for it")

    @property
    def lanes(self) -> int:
        """All threads at once: there is nothing to wait for."""
        return self.thread_count

    @property
    def thread_count(self) -> int:
        """Threads at work on batches."""
        return self.threads or cores()

    def prepare(self) -> None:
        """Nothing is loaded."""

    def samples(self, shard: Shard) -> Iterator[Encoded]:
        """The samples of a shard of the pool, in order, each with its answer."""
        answers = stream_answers(self.folder, POOL, shard.name, len(self.class_names))
        row, answer = next(answers, (-1, None))
        for sample in shard.read():
            while answer is not None and row < sample.row:
                row, answer = next(answers, (-1, None))
            yield AnsweredSample(sample.row, sample.key, sample.data, answer if row == sample.row else None)

    def answer(self, decoded: Decoded) -> NDArray[np.float32]:
        """Log-odds of the m images that decoded, (m, C_T), nats; NaN rows where there is no answer."""
        result = np.full((len(decoded.good), len(self.class_names)), np.nan, np.float32)
        answers = [getattr(decoded.samples[place], "answer", None) for place in decoded.good.tolist()]
        given = [place for place, answer in enumerate(answers) if answer is not None]
        if given:
            result[given] = log_odds_of_shares(np.stack([answer for answer in answers if answer is not None]))
        return result

    def placed(self, worker: int, threads: int) -> Self:
        """For one of several workers."""
        return replace(self, threads=threads)

    def without_weights(self) -> Self:
        """There are none."""
        return self


@dataclass(frozen=True)
class StoredEmbeddings:
    """An `Embedder`: those that stand beside the answers in answers/."""

    folder: Location

    def embed(self, split: str, shard: str, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """Of images of one shard, (n, D).

        Raises:
            DataError: the predictions have none.
        """
        return embeddings_of_rows(self.folder, split, shard, [sample.row for sample in samples])

    def placed(self, worker: int, threads: int) -> Self:
        """For one of several workers."""
        return self

    def without_weights(self) -> Self:
        """There are none."""
        return self
