"""What a training sees: which images, in which composition and views, with which targets; a function of (seed, step).

One class draws the batches of every method. What differs is the composition of a batch: `Mixture` (images whose
targets are known: Supervised, NoisyStudent, Reduced MPL), `MethodViews` (for a teacher network), `MethodAlone` (what
a method makes of those views, as a student's batch).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import AugmentSettings, TeacherKind, TrainMplSettings, TrainReducedSettings
from pipeline.correction import Correction
from pipeline.data.augment.augment import augment, normalize
from pipeline.data.augment.draws import Draws
from pipeline.data.order import batch_indices
from pipeline.data.sets import LabelledSet, Pool, hold_out, with_wrong_labels
from pipeline.distributed.placement import Placement
from pipeline.distributed.ranks import Ranks
from pipeline.errors import DataError
from pipeline.methods import Views
from pipeline.seeds import derive_seed


@dataclass(frozen=True)
class Batch:
    """What the student sees in one step.

    Attributes:
        images: augmented and normalised, (B, 3, S, S).
        weight: of each row in the student's loss, (B,), or None for 1.
    """

    images: Tensor
    weight: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class TargetBatch(Batch):
    """Images whose targets are stored or known.

    Attributes:
        distributions: q_large of each image, (B, C); of an image that stands with its true label, that label.
        calibrated: whether a calibrator may change the row's target, (B,), bool; False for true labels.
        stored: where the teacher has classes of its own, its distributions over them, of which `distributions` is what
            a correction makes, and the images' embeddings where there are any, (B, C_T + E); zero for true labels.
    """

    distributions: Tensor
    calibrated: Tensor
    stored: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ViewBatch(Batch):
    """Images whose targets a teacher network makes.

    Attributes:
        views: what its method works on; their `pool` is `images`.
    """

    views: Views


@dataclass(frozen=True)
class Labelled:
    """Labelled images for the teacher's turn.

    Attributes:
        images: normalised, (V, 3, S, S).
        labels: (V,), int64.
        distributions: q_large of each, (V, C), or None where none is stored.
        stored: as in `TargetBatch`, (V, C_T + E).
    """

    images: Tensor
    labels: Tensor
    distributions: Tensor | None = None
    stored: Tensor | None = None


@dataclass(frozen=True)
class ImageSets:
    """What batches are drawn from.

    Attributes:
        labelled: all labelled images.
        pool: or None where the composition takes none of it.
        mean, std: of the normalisation, per channel, for images in [0, 1].
        label_noise: share of wrong labels in what is learned from; those of the feedback are right.
        correction: makes the data set's classes of those of the stored distributions; None: they are the same.
        embedding: E; stored rows are distributions (n, C_T) followed by embeddings (n, E).
    """

    labelled: LabelledSet
    pool: Pool | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_noise: float = 0.0
    correction: Correction | None = None
    embedding: int = 0


@dataclass(frozen=True)
class FeedbackImages:
    """Labelled images of the teacher's turn.

    Attributes:
        batch: in a step; all of them where there are fewer.
        augment: how they are augmented.
        held_out: share of the labelled images that serve the feedback alone.
    """

    batch: int = 128
    augment: AugmentSettings = AugmentSettings()
    held_out: float = 0.0


class Composition(Protocol):
    """What a batch consists of."""

    def check(self, batches: "Batches") -> None:
        """Refuse sets from which it cannot be made, by a DataError."""
        ...

    def batch(self, batches: "Batches", step: int) -> Batch:
        """The batch of a step; of several processes this one's part."""
        ...


class Batches:
    """Batches of a training, and labelled images for its feedback.

    Args:
        sets: what they are drawn from.
        composition: of a batch.
        feedback: images of the teacher's turn.
        seed: of order and augmentation.
        placement: the device on which they are made, and the processes that share them.

    Raises:
        DataError: no labelled images, or the composition cannot be made of these sets by these processes.
    """

    def __init__(
        self,
        sets: ImageSets,
        composition: Composition,
        feedback: FeedbackImages = FeedbackImages(),
        *,
        seed: int = 0,
        placement: Placement = Placement(),
    ) -> None:
        if not len(sets.labelled):
            raise DataError("the labelled split is empty")
        self.sets, self.composition, self.feedback_images = sets, composition, feedback
        self.seed, self.device, self.ranks = seed, placement.device, placement.ranks
        own, self.feedback_labelled = hold_out(sets.labelled, feedback.held_out, seed)
        self.labelled = with_wrong_labels(own, sets.label_noise, seed)
        self.feedback_batch = feedback_share(feedback.batch, len(self.feedback_labelled), self.ranks)
        composition.check(self)

    def batch(self, step: int) -> Batch:
        """The student's batch of `step`."""
        return self.composition.batch(self, step)

    def feedback(self, step: int) -> Labelled:
        """Labelled images, with their true labels, for the teacher's turn of `step`."""
        total = self.feedback_batch
        chosen = self.draw(self.feedback_labelled, "feedback", step, total)
        images = self.prepare(chosen.pixels, self.feedback_images.augment, "feedback-augment", step, total)
        if chosen.distributions is None:
            return Labelled(images, chosen.labels.to(self.device))
        targets, stored = self.corrected(chosen.distributions)
        held = None if stored is None else stored.to(self.device)
        return Labelled(images, chosen.labels.to(self.device), targets.to(self.device), held)

    def close(self) -> None:
        """Let a streamed pool stop reading ahead."""
        if self.sets.pool is not None:
            self.sets.pool.close()

    def draw(self, labelled: LabelledSet, purpose: str, step: int, total: int) -> LabelledSet:
        """This process's rows of `total` labelled images."""
        index = batch_indices(len(labelled), total, self.seed, purpose, step)
        return labelled.rows(index[self.ranks.part(total)])

    def draw_pool(self, step: int, total: int) -> tuple[Tensor, Tensor | None]:
        """This process's rows of `total` pool images: pixels, uint8 (n, 3, S, S), and stored rows, (n, C_T + E)."""
        assert self.sets.pool is not None
        return self.sets.pool.draw(self.seed, step, total, self.ranks.part(total))

    def corrected(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """Distributions over the data set's classes, (n, C), of stored rows, (n, C_T + E); these, if they say more."""
        correction = self.sets.correction
        q = stored[:, : self.stored_classes] if self.sets.embedding else stored
        if correction is None or correction.kind == "identity":
            return q, stored if self.sets.embedding else None
        return torch.from_numpy(correction.targets(q.numpy())), stored

    def prepare(
        self,
        pixels: Tensor,
        settings: AugmentSettings,
        purpose: str,
        step: int,
        total: int,
        first: int | None = None,
    ) -> Tensor:
        """Augment and normalise rows of a global batch of `total`, which begin at `first`; (n, 3, S, S)."""
        pixels = pixels.to(self.device, non_blocking=True)
        first = self.ranks.part(total).start if first is None else first
        augmented = augment(pixels, settings, derive_seed(self.seed, purpose, step), first=first, total=total)
        return normalize(augmented, self.sets.mean, self.sets.std)

    @property
    def has_other_classes(self) -> bool:
        """Whether stored distributions are corrected before they are targets."""
        return self.sets.correction is not None and self.sets.correction.kind != "identity"

    @property
    def stored_classes(self) -> int:
        """Classes of the stored distributions."""
        return self.labelled.classes if self.sets.correction is None else len(self.sets.correction.teacher_names)

    def distributions_of(self, labels: Tensor, smoothing: float) -> Tensor:
        """Labels (n,) as distributions, (n, C)."""
        classes = self.labelled.classes
        return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


@dataclass(frozen=True)
class Mixture:
    """Labelled images first, then pool images, each with the target that it stands with.

    Attributes:
        labelled, pool: images of each kind in a batch.
        true_labels: labelled images stand with their true label; otherwise with q_large's distribution.
        augment: of all images.
        label_smoothing: of true labels.
    """

    labelled: int
    pool: int = 0
    true_labels: bool = True
    augment: AugmentSettings = AugmentSettings()
    label_smoothing: float = 0.0

    def check(self, batches: Batches) -> None:
        pool = batches.sets.pool
        if self.pool and (pool is None or not len(pool)):
            raise DataError("the selected pool is empty: nothing to train the student on; see mpl filter")
        for count, what in ((self.labelled, "labelled images"), (self.pool, "pool images")):
            batches.ranks.share(count, f"the number of {what} in a batch")

    def batch(self, batches: Batches, step: int) -> TargetBatch:
        pixels, targets, calibrated, firsts = [], [], [], []
        held: list[Tensor] = []
        if self.labelled:
            chosen = batches.draw(batches.labelled, "labelled", step, self.labelled)
            stored = None if self.true_labels else chosen.distributions
            pixels.append(chosen.pixels)
            if stored is None:
                targets.append(batches.distributions_of(chosen.labels, self.label_smoothing))
                held.append(torch.zeros(len(chosen), batches.stored_classes + batches.sets.embedding))
            else:
                _add(batches.corrected(stored), targets, held)
            calibrated += [stored is not None] * len(chosen)
            firsts.append(batches.ranks.part(self.labelled).start)
        if self.pool:
            drawn, distributions = batches.draw_pool(step, self.pool)
            assert distributions is not None, "a mixture takes pool images with stored distributions"
            pixels.append(drawn)
            _add(batches.corrected(distributions), targets, held)
            calibrated += [True] * len(drawn)
            firsts.append(self.labelled + batches.ranks.part(self.pool).start)
        if batches.ranks.world == 1:
            pixels, firsts = [torch.cat(pixels)], [0]
        total = self.labelled + self.pool
        images = [
            batches.prepare(rows, self.augment, "augment", step, total, first)
            for rows, first in zip(pixels, firsts, strict=True)
        ]
        flags = torch.tensor(calibrated, device=batches.device)
        more = batches.has_other_classes or batches.sets.embedding
        others = torch.cat(held).to(batches.device) if more else None
        return TargetBatch(torch.cat(images), torch.cat(targets).to(batches.device), flags, stored=others)


def _add(corrected: tuple[Tensor, Tensor | None], targets: list[Tensor], held: list[Tensor]) -> None:
    targets.append(corrected[0])
    if corrected[1] is not None:
        held.append(corrected[1])


def mixture(settings: TrainReducedSettings, teacher: TeacherKind) -> Mixture:
    """Resolve `student_data` and `labelled_target`; `auto` is what each method's paper does.

    none: labelled images and true labels. fixed (NoisyStudent): pool and labelled images with true labels.
    calibrator (Reduced MPL): the pool alone, "the student never directly learns from" the labelled images
    (v1 §3.2); docs/results/swapped-teacher.md shows why that matters.
    """

    def of(labelled: int, true_labels: bool = True) -> Mixture:
        return Mixture(labelled, settings.batch - labelled, true_labels, settings.augment, settings.label_smoothing)

    if teacher == "none":
        return of(settings.batch)
    data = settings.student_data
    if data == "auto":
        data = "pool+labelled" if teacher == "fixed" else "pool"
    if data == "pool":
        return of(0)
    labelled = min(max(1, round(settings.labelled_share * settings.batch)), settings.batch - 1)
    return of(labelled, settings.labelled_target != "teacher")


@dataclass(frozen=True)
class MethodViews:
    """Pool images for the student, with the views that its teacher's method works on.

    Attributes:
        settings: batch sizes, views, method.
    """

    settings: TrainMplSettings

    def check(self, batches: Batches) -> None:
        settings, pool = self.settings, batches.sets.pool
        labelled, ranks = len(batches.labelled), batches.ranks
        require_batch(settings.labelled_batch, labelled, "labelled_batch", "labelled images", ranks)
        if pool is not None:
            require_batch(settings.batch, len(pool), "batch", "pool images", ranks)

    def batch(self, batches: Batches, step: int) -> ViewBatch:
        views = self.views(batches, step)
        return ViewBatch(views.labelled if views.pool is None else views.pool, views)

    def views(self, batches: Batches, step: int) -> Views:
        """What the method needs in a step."""
        settings, needs = self.settings, self.settings.method.needs
        strong = settings.method.labelled_view == "strong"
        images, targets = self._labelled(batches, "labelled", step, settings.augment if strong else settings.weak)
        weak = pool = None
        if batches.sets.pool is not None:
            pixels, _ = batches.draw_pool(step, settings.batch)
            if "pool_weak" in needs:
                weak = batches.prepare(pixels, settings.weak, "weak", step, settings.batch)
            if not settings.alone or "pool" in needs:
                pool = batches.prepare(pixels, settings.augment, "augment", step, settings.batch)
        partner = self._labelled(batches, "partner", step, settings.weak) if "partner" in needs else None
        part = batches.ranks.part(settings.labelled_batch)
        draws = Draws(
            derive_seed(batches.seed, "method", step), settings.labelled_batch, part.start, part.stop - part.start
        )
        return Views(step, images, targets, partner, draws.uniform("chance").to(batches.device), pool, weak)

    def _labelled(
        self, batches: Batches, purpose: str, step: int, augmentation: AugmentSettings
    ) -> tuple[Tensor, Tensor]:
        """(images, targets) of one draw of labelled images."""
        total = self.settings.labelled_batch
        chosen = batches.draw(batches.labelled, purpose, step, total)
        images = batches.prepare(chosen.pixels, augmentation, f"{purpose}-augment", step, total)
        targets = batches.distributions_of(chosen.labels, self.settings.label_smoothing)
        return images, targets.float().to(batches.device)


@dataclass(frozen=True)
class MethodAlone:
    """The lessons of a method as a student's batches: the baseline, in the same loop.

    Attributes:
        views: what the method works on.
        predict: the network that learns the lessons, images → probabilities, without a gradient.
    """

    views: MethodViews
    predict: Callable[[Tensor], Tensor]

    def check(self, batches: Batches) -> None:
        self.views.check(batches)

    def batch(self, batches: Batches, step: int) -> TargetBatch:
        lesson = self.views.settings.method.lesson(self.views.views(batches, step), self.predict)
        targets, weight = lesson.rows()
        return TargetBatch(lesson.images(), targets, torch.zeros(len(targets), dtype=torch.bool), weight=weight)


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


def require_batch(batch: int, images: int, key: str, what: str, ranks: Ranks) -> None:
    """Refuse a batch that cannot be drawn without repeating an image, or not be shared evenly.

    Raises:
        DataError: with the setting and the two ways out.
    """
    if batch > images:
        raise DataError(
            f"train_mpl.{key} (={batch:,}) is more than the {images:,} {what} there are: "
            f"set train_mpl.{key} to at most {images:,}, or give more images"
        ).on_all()
    ranks.share(batch, f"train_mpl.{key}")
