"""What one step needs, as linear forms in its numbers of images: from one run at numbers that sizes betray.

The step is run (`pipeline.plan.step`) with as many images of each kind as no layer has channels or pixels, and with
numbers that share no large factor. A size in bytes is therefore divisible by the number of the images that it is in
proportion to, and by no other; what is divisible by none is the same whatever the images.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

import numpy as np
import torch

from pipeline.errors import UsageError
from pipeline.plan.tally import Piece, Tally, trace

# What is in proportion to what. A `part` is one micro-batch; the lesson is all that a teacher network learns from.
COLUMNS = ("fixed", "labelled", "pool", "feedback", "pool part", "feedback part", "lesson part")
COPIES = ("replay", True)  # θ, D, v and whatever else has the shape of weights while a step is taken
KINDS = (
    "parameters", "gradients", "optimiser", "EMA", "replay", "activations", "calibrator", "batch", "gathered blocks"
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Images of one step.

    Attributes:
        pool: that the student learns from.
        feedback: labelled images of a feedback; no more than there are.
        labelled: that the teacher's method takes, 0 without one.
        lesson_pool: how many times the pool's images are among those that the teacher learns from.
    """

    pool: int
    feedback: int
    labelled: int = 0
    lesson_pool: int = 0

    @property
    def lesson(self) -> int:
        """Images that a teacher network learns from."""
        return self.labelled + self.lesson_pool * self.pool

    @property
    def by_name(self) -> dict[str, int]:
        """Those that accelerators must divide."""
        numbers = {"pool images": self.pool, "labelled images for feedback": self.feedback}
        return numbers | ({"images that the teacher learns from": self.lesson} if self.lesson else {})

    def share(self, world: int) -> "Images":
        """Of one accelerator among so many.

        Raises:
            UsageError: they do not divide a batch.
        """
        for name, number in self.by_name.items():
            if number % world:
                near = number // world * world
                raise UsageError(
                    f"--accelerators (={world:,}) must divide every batch, and {number:,} {name} are not divided. "
                    f"Nearest: {' or '.join(f'{n:,}' for n in (near, near + world) if n)}"
                )
        return replace(self, pool=self.pool // world, feedback=self.feedback // world, labelled=self.labelled // world)

    def columns(self, parts: int = 1) -> np.ndarray:
        """How many there are of each of COLUMNS in so many micro-batches, of which the largest counts."""
        cut = [ceil(number / parts) for number in (self.pool, self.feedback, self.lesson)]
        return np.array([1, self.labelled, self.pool, self.feedback, *cut], dtype=np.float64)

    def units(self) -> dict[int, np.ndarray]:
        """Number of images that a size may be divisible by → how many of each of COLUMNS that is.

        Micro-batches are two, of which the second has one image more. Methods join labelled and pool images.
        """
        unit = np.eye(len(COLUMNS))
        labelled, pool = unit[1], unit[2]
        joined = {(a, b): a * self.labelled + b * self.pool for a, b in ((1, 0), (0, 1), (1, 1), (1, 2), (2, 1))}
        result = {number: a * labelled + b * pool for (a, b), number in joined.items() if number}
        result[self.feedback] = unit[3]
        for column, whole in enumerate((self.pool, self.feedback, self.lesson), 4):
            for part in (whole // 2, whole - whole // 2):
                if part:
                    result[part] = unit[column]
        return result


# Each of their `units()` has a prime factor above 300 that divides no other (tests/plan/test_footprint.py).
PLAIN = Images(pool=3369, feedback=3463)
TAUGHT = {1: Images(3369, 3463, labelled=2234, lesson_pool=1), 2: Images(3369, 3463, labelled=617, lesson_pool=2)}


def measuring_images(lesson_pool: int) -> Images:
    """The numbers of images with which a step is run that has a lesson of this form (0: none)."""
    return TAUGHT[lesson_pool] if lesson_pool else PLAIN


Moments = dict[tuple[str, bool], np.ndarray]
Phases = list[tuple[str, int, int]]


class Forms:
    """Sizes as linear forms in COLUMNS, told by what divides them.

    Args:
        images: with which the step was run.
    """

    def __init__(self, images: Images) -> None:
        self.images, self.units = images, images.units()
        self._known: dict[int, np.ndarray] = {}

    def of(self, size: int) -> np.ndarray:
        """Coefficients of one size, (7,)."""
        if size not in self._known:
            fixed = np.eye(len(COLUMNS))[0] * size
            forms = (form * (size // number) for number, form in self.units.items() if size and size % number == 0)
            self._known[size] = next(forms, fixed)
        return self._known[size]

    def total(self, sizes: Counter[int]) -> np.ndarray:
        """Of all sizes together, however many micro-batches there are, (7,)."""
        total = sum((self.of(size) * times for size, times in sizes.items()), np.zeros(len(COLUMNS)))
        pool, feedback, lesson = total[4:] / 2  # each image is in one of the two micro-batches
        whole = [lesson, pool + self.images.lesson_pool * lesson, feedback]
        return np.array([total[0], *(total[1:4] + whole), 0, 0, 0])


@dataclass(frozen=True)
class Footprint:
    """One step of a training, for any numbers of images; all forms are in COLUMNS.

    Attributes:
        moments: (kind, whether shards divide it) → bytes at each allocation, (E, 7), or (1, 7) where they never change.
        phases: name, first event, and the one after its last.
        flops, flops_without: floating-point operations of a step with feedback and of one without, (7,).
    """

    moments: Moments
    phases: Phases
    flops: np.ndarray
    flops_without: np.ndarray


def read(tally: Tally, forms: Forms, start: int, weights: set[torch.Size]) -> tuple[Moments, Phases]:
    """Memory and phases of a step.

    Args:
        tally: of the step, and of what was there before it. What stands is labelled; the rest is told by its size.
        forms: of its numbers of images.
        start: event at which it began.
        weights: shapes of weights; memory of such a shape is a copy of some.
    """
    groups: dict[tuple[str, bool], list[Piece]] = {}
    for piece in tally.pieces:
        if piece.last is None or piece.last > start:
            is_copy = piece.shape in weights and piece.dtype == torch.float32
            groups.setdefault(piece.kind or (COPIES if is_copy else ("activations", False)), []).append(piece)
    moments = {}
    for kind, pieces in groups.items():
        sizes = np.array([forms.of(piece.size) for piece in pieces])
        whole = trace(pieces, sizes, tally.events)[start:]
        moments[kind] = whole if (whole != whole[0]).any() else whole[:1]
    names, firsts = [name for _, name in tally.marks], [event - start for event, _ in tally.marks]
    ends = [0, *firsts[1:], tally.events - start]  # what comes before the first mark belongs to its phase
    phases = [(name, first, last) for name, (first, last) in zip(names, pairwise(ends), strict=True) if last > first]
    return moments, phases
