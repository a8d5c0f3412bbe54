"""What a student sees: which images, in which mixture, with which targets; a pure function of (seed, step)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import TeacherKind, TrainReducedSettings, TrainSettings
from pipeline.data.augment.augment import augment, normalize
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.order import batch_indices
from pipeline.distributed import ALONE, Ranks
from pipeline.errors import DataError
from pipeline.seeds import derive_seed
from pipeline.teachers import Batch, Labelled


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images: pixels uint8 (N, 3, S, S), labels (N,), q_large (N, C) where it is stored."""

    pixels: Tensor
    labels: Tensor
    distributions: Tensor | None = None

    def rows(self, index: np.ndarray) -> "LabelledSet":
        """The rows of `index`."""
        chosen = torch.from_numpy(index)
        stored = None if self.distributions is None else self.distributions[chosen]
        return LabelledSet(self.pixels[chosen], self.labels[chosen], stored)


class Pool(Protocol):
    """The selected pool images with q_large; each is used `repeat` times in an epoch."""

    def __len__(self) -> int:
        """Images, each counted once."""
        ...

    def draw(self, seed: int, step: int, batch: int, part: slice = ...) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 (n, 3, S, S), and q_large, (n, C), of `part` of the batch of a step."""
        ...

    def close(self) -> None:
        """Stop whatever works ahead."""
        ...


@dataclass(frozen=True)
class PoolSet:
    """A pool in memory: pixels uint8 (N, 3, S, S), q_large (N, C), how often each counts (N,).

    The other kind is `pipeline.targets.stream.StreamedPool`.
    """

    pixels: Tensor
    distributions: Tensor
    repeat: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, seed: int, step: int, batch: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """As `Pool` says; the order is one permutation of all uses after another."""
        index = batch_indices(len(self._uses), batch, seed, "pool", step)
        rows = self._uses[torch.from_numpy(index[part])]
        return self.pixels[rows], self.distributions[rows]

    def close(self) -> None:
        """Nothing works ahead."""

    @cached_property
    def _uses(self) -> Tensor:
        """Row numbers, each as often as it counts."""
        return torch.repeat_interleave(torch.arange(len(self.repeat)), self.repeat)


@dataclass(frozen=True)
class Mixture:
    """Composition of a student's batch.

    Attributes:
        labelled, pool: images of each kind in a batch.
        true_labels: labelled images stand with their true label; otherwise with q_large's distribution.
    """

    labelled: int
    pool: int
    true_labels: bool


def mixture(settings: TrainReducedSettings, teacher: TeacherKind) -> Mixture:
    """Resolve `student_data` and `labelled_target`; `auto` is what each method's paper does.

    none: labelled images and true labels. fixed (NoisyStudent): pool and labelled images with true labels.
    calibrator (Reduced MPL): the pool alone, "the student never directly learns from" the labelled images
    (v1 §3.2); docs/results/swapped-teacher.md shows why that matters.
    """
    if teacher == "none":
        return Mixture(settings.batch, 0, true_labels=True)
    data = settings.student_data
    if data == "auto":
        data = "pool+labelled" if teacher == "fixed" else "pool"
    if data == "pool":
        return Mixture(0, settings.batch, true_labels=True)
    labelled = min(max(1, round(settings.labelled_share * settings.batch)), settings.batch - 1)
    return Mixture(labelled, settings.batch - labelled, settings.labelled_target != "teacher")


class StudentData:
    """Batches for the student and labelled images for the teacher's turn.

    Args:
        labelled: all labelled images.
        pool: the selected pool, or None where the mixture has no pool images.
        mixture: composition of a batch.
        settings: augmentation and label smoothing.
        classes: C.
        mean, std: of the normalisation.
        seed: of order and augmentation.
        device: where batches go.
        feedback_batch: labelled images per feedback; all of them where there are fewer.
        feedback_augment: how those are augmented.
        held_out: share of the labelled images that serve the feedback alone.
        ranks: the processes that share the global batch; each gets its part of labelled and of pool images.
    """

    def __init__(
        self,
        labelled: LabelledSet,
        pool: Pool | None,
        mixture: Mixture,
        settings: TrainSettings,
        *,
        classes: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        device: torch.device,
        feedback_batch: int = 128,
        feedback_augment: AugmentSettings | None = None,
        held_out: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        if mixture.pool and (pool is None or not len(pool)):
            raise DataError("the selected pool is empty: nothing to train the student on; see mpl filter")
        if not len(labelled.pixels):
            raise DataError("the labelled split is empty")
        self.mixture, self.settings, self.classes = mixture, settings, classes
        self.mean, self.std, self.seed, self.device = mean, std, seed, device
        self.feedback_augment = feedback_augment or AugmentSettings()
        self.student_labelled, self.feedback_labelled = hold_out(labelled, held_out, seed)
        self.feedback_batch = feedback_share(feedback_batch, len(self.feedback_labelled.labels), ranks)
        self.pool, self.ranks = pool, ranks
        for count, what in ((mixture.labelled, "labelled images"), (mixture.pool, "pool images")):
            ranks.share(count, f"the number of {what} in a batch")

    def batch(self, step: int) -> Batch:
        """The student's batch of `step`: labelled images first, then pool images."""
        pixels, targets, calibrated, firsts = [], [], [], []
        total = self.mixture.labelled + self.mixture.pool
        if self.mixture.labelled:
            part = self.ranks.part(self.mixture.labelled)
            chosen = self._draw(self.student_labelled, self.mixture.labelled, "labelled", step, part)
            stored = None if self.mixture.true_labels else chosen.distributions
            pixels.append(chosen.pixels)
            targets.append(self._true_targets(chosen.labels) if stored is None else stored)
            calibrated += [stored is not None] * len(chosen.labels)
            firsts.append(part.start)
        if self.mixture.pool:
            assert self.pool is not None
            part = self.ranks.part(self.mixture.pool)
            drawn, distributions = self.pool.draw(self.seed, step, self.mixture.pool, part)
            pixels.append(drawn)
            targets.append(distributions)
            calibrated += [True] * len(drawn)
            firsts.append(self.mixture.labelled + part.start)
        if self.ranks.world == 1:
            pixels, firsts = [torch.cat(pixels)], [0]
        images = torch.cat(
            [
                self._prepare(part, self.settings.augment, "augment", step, first, total)
                for part, first in zip(pixels, firsts, strict=True)
            ]
        )
        flags = torch.tensor(calibrated, device=self.device)
        return Batch(images, torch.cat(targets).to(self.device), flags)

    def close(self) -> None:
        """Let go of the pool: one that is streamed stops reading ahead."""
        if self.pool is not None:
            self.pool.close()

    def feedback(self, step: int) -> Labelled:
        """Labelled images for the teacher's turn of `step`."""
        total = self.feedback_batch
        part = self.ranks.part(total)
        chosen = self._draw(self.feedback_labelled, total, "feedback", step, part)
        images = self._prepare(chosen.pixels, self.feedback_augment, "feedback-augment", step, part.start, total)
        stored = None if chosen.distributions is None else chosen.distributions.to(self.device)
        return Labelled(images, chosen.labels.to(self.device), stored)

    def _draw(self, labelled: LabelledSet, count: int, purpose: str, step: int, part: slice) -> LabelledSet:
        return labelled.rows(batch_indices(len(labelled.labels), count, self.seed, purpose, step)[part])

    def _prepare(
        self, pixels: Tensor, settings: AugmentSettings, purpose: str, step: int, first: int, total: int
    ) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        augmented = augment(pixels, settings, derive_seed(self.seed, purpose, step), first=first, total=total)
        return normalize(augmented, self.mean, self.std)

    def _true_targets(self, labels: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        return F.one_hot(labels, self.classes) * (1 - smoothing) + smoothing / self.classes


def feedback_share(batch: int, images: int, ranks: Ranks) -> int:
    """Labelled images of a feedback batch over all ranks: at most `batch` and at most all, and a multiple of the ranks.

    It is "all there are" more often than not, so that a number which the ranks do not divide is made smaller.

    Raises:
        DataError: there are fewer images than ranks.
    """
    if images < ranks.world:
        raise DataError(f"{images} labelled images cannot be shared by {ranks.world} processes; start fewer").on_all()
    wanted = min(batch, images)
    return wanted - wanted % ranks.world


def hold_out(labelled: LabelledSet, share: float, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """(for the student, for the feedback); without a share both are all labelled images."""
    n = len(labelled.labels)
    count = round(share * n)
    if not count:
        return labelled, labelled
    if count == n:
        raise DataError(f"feedback.held_out = {share} leaves none of the {n} labelled images to the student")
    order = batch_indices(n, n, seed, "held-out", 0)
    return labelled.rows(np.sort(order[count:])), labelled.rows(np.sort(order[:count]))
