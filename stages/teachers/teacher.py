"""What the pool stages need of a teacher, whoever it is."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import SplitName
from pipeline.data.readers.shard import Sample
from pipeline.pool.infer import Source
from pipeline.storage.workers import EngineSettings
from pipeline.targets.embedding import Embedder
from stages.copies import Compared
from stages.options import Context

Answered = tuple[NDArray[np.floating[Any]], NDArray[np.intp]]
"""Distributions (m, C_T) of some of n images, and their places among them, (m,)."""


class Teacher(Protocol):
    """What the pool stages need of a teacher.

    Attributes:
        digest: of all that its answers depend on but how images are shown to it.
        names: of its classes, C_T; the data set's, in their order, where they are the same.
        basis: what scores depend on, for a record.
        compared: how images are looked at for copies.
        told: for the record: where it is.
        saw_the_labelled_images: whether it was trained on them, so that what it says of them is no evidence.
    """

    @property
    def digest(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def basis(self) -> dict[str, Any]: ...
    @property
    def compared(self) -> Compared: ...
    @property
    def told(self) -> dict[str, Any]: ...
    @property
    def saw_the_labelled_images(self) -> bool: ...

    def at(self, context: Context) -> "Teacher":
        """The same in another context: of another precision."""
        ...

    def check(self) -> None:
        """Raise what would keep it from answering, before anything is removed."""
        ...

    def begin(self) -> None:
        """Whatever must be there before its answers are: it is loaded, or its predictions are imported."""
        ...

    def source(self, engine: EngineSettings | None = None, batch: int | None = None) -> Source:
        """Of its answers to the pool; here, or for an engine's workers."""
        ...

    def embedder(self, engine: EngineSettings | None = None) -> Embedder:
        """Gives embeddings of images, here or in an engine's workers.

        Raises:
            UsageError: it has none to give.
        """
        ...

    def answers(self, split: SplitName, samples: list[tuple[str, Sample]]) -> Answered:
        """Of its answers to labelled and evaluation images."""
        ...
