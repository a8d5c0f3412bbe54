"""Views of labelled and pool images for methods, and the lessons of a method trained alone.

As everything that a student sees, they are a pure function of (seed, step); a process among several gets its
slice of the same global batch.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import TrainMplSettings
from pipeline.data.augment.augment import augment, normalize
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.order import batch_indices
from pipeline.distributed import ALONE, Ranks
from pipeline.errors import DataError
from pipeline.methods import Method, Views
from pipeline.seeds import derive_seed, permutation
from pipeline.student_data import LabelledSet, Pool, feedback_share, hold_out
from pipeline.teacher_network import join, lesson_rows
from pipeline.teachers import Batch, Labelled


class ViewData:
    """Batches of pool images for a student, with the views that its teacher's method works on.

    Args:
        labelled: all labelled images.
        pool: the pool, or None where neither the method nor a student uses it.
        settings: batch sizes, views, feedback.
        classes: C.
        mean, std: of the normalisation.
        seed: of order and augmentation.
        device: where batches go.
        label_noise: share of wrong labels in the method's labelled rows; the feedback's are right.
        ranks: the processes that share the global batch.

    Raises:
        DataError: a batch is larger than the set that it is drawn from, or the ranks do not divide it.
    """

    def __init__(
        self,
        labelled: LabelledSet,
        pool: Pool | None,
        settings: TrainMplSettings,
        *,
        classes: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        device: torch.device,
        label_noise: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.settings, self.classes, self.mean, self.std = settings, classes, mean, std
        self.seed, self.device, self.ranks, self.pool = seed, device, ranks, pool
        options = settings.feedback_options
        share = options.held_out if settings.feedback != "none" and not settings.alone else 0.0
        own, self.feedback_labelled = hold_out(labelled, share, seed)
        self.labelled = LabelledSet(own.pixels, wrong_labels(own.labels, label_noise, classes, seed))
        require_batch(settings.labelled_batch, len(self.labelled.labels), "labelled_batch", "labelled images", ranks)
        if pool is not None:
            require_batch(settings.batch, len(pool), "batch", "pool images", ranks)
        self.feedback_batch = feedback_share(options.batch, len(self.feedback_labelled.labels), ranks)

    def batch(self, step: int) -> Batch:
        """The batch of `step`: the student's images, and everything that the method needs."""
        settings, needs = self.settings, self.settings.method.needs
        strong = settings.method.labelled_view == "strong"
        images, targets = self._labelled("labelled", step, settings.augment if strong else settings.weak)
        pixels, weak, pool = self._pool_pixels(step), None, None
        if pixels is not None and "pool_weak" in needs:
            weak = self._prepare(pixels, settings.weak, "weak", step, settings.batch)
        if pixels is not None and (not settings.alone or "pool" in needs):
            pool = self._prepare(pixels, settings.augment, "augment", step, settings.batch)
        views = Views(
            step,
            images,
            targets,
            self._labelled("partner", step, settings.weak) if "partner" in needs else None,
            self._draws("method", step, settings.labelled_batch).uniform("chance").to(self.device),
            pool,
            weak,
        )
        student = images if pool is None else pool
        nothing = torch.empty(len(student), 0, device=self.device)
        return Batch(student, nothing, torch.ones(len(student), dtype=torch.bool, device=self.device), None, views)

    def feedback(self, step: int) -> Labelled:
        """Labelled images, with their true labels, for the student's labelled loss at `step`."""
        options = self.settings.feedback_options
        chosen = self._rows(self.feedback_labelled, self.feedback_batch, "feedback", step)
        images = self._prepare(chosen.pixels, options.augment, "feedback-augment", step, self.feedback_batch)
        return Labelled(images, chosen.labels.to(self.device))

    def close(self) -> None:
        """Let go of the pool."""
        if self.pool is not None:
            self.pool.close()

    def _labelled(self, purpose: str, step: int, settings: AugmentSettings) -> tuple[Tensor, Tensor]:
        """(images, targets) of one draw of labelled images."""
        total = self.settings.labelled_batch
        chosen = self._rows(self.labelled, total, purpose, step)
        images = self._prepare(chosen.pixels, settings, f"{purpose}-augment", step, total)
        smoothing = self.settings.label_smoothing
        hot = F.one_hot(chosen.labels, self.classes).float()
        return images, (hot * (1 - smoothing) + smoothing / self.classes).to(self.device)

    def _rows(self, labelled: LabelledSet, total: int, purpose: str, step: int) -> LabelledSet:
        index = batch_indices(len(labelled.labels), total, self.seed, purpose, step)
        return labelled.rows(index[self._part(total)])

    def _pool_pixels(self, step: int) -> Tensor | None:
        if self.pool is None:
            return None
        total = self.settings.batch
        return self.pool.draw(self.seed, step, total, self._part(total))[0]

    def _prepare(self, pixels: Tensor, settings: AugmentSettings, purpose: str, step: int, total: int) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        first = self._part(total).start
        augmented = augment(pixels, settings, derive_seed(self.seed, purpose, step), first=first, total=total)
        return normalize(augmented, self.mean, self.std)

    def _draws(self, purpose: str, step: int, total: int) -> Draws:
        part = self._part(total)
        return Draws(derive_seed(self.seed, purpose, step), total, part.start, part.stop - part.start)

    def _part(self, total: int) -> slice:
        """This rank's rows of a global batch."""
        return self.ranks.part(total)


class Lessons:
    """The lessons of a method as a student's batches: the baseline, in the same loop.

    Args:
        data: views.
        method: makes the lessons.
        predict: the network that learns them, images → probabilities, without a gradient.
    """

    def __init__(self, data: ViewData, method: Method, predict: Callable[[Tensor], Tensor]) -> None:
        self.data, self.method, self.predict = data, method, predict

    def batch(self, step: int) -> Batch:
        """Images, targets and weights of the lesson of `step`."""
        views = self.data.batch(step).views
        assert views is not None
        lesson = self.method.lesson(views, self.predict)
        targets, weight = lesson_rows(lesson)
        return Batch(join(lesson), targets, torch.zeros(len(targets), dtype=torch.bool), weight)

    def feedback(self, step: int) -> Labelled:
        """As the views give it."""
        return self.data.feedback(step)

    def close(self) -> None:
        """Let go of the pool."""
        self.data.close()


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


def wrong_labels(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Asymmetric label noise: in each class, `share` of the labels say the next class instead, (N,)."""
    if not share:
        return labels
    noisy = labels.clone()
    for c in range(classes):
        members = np.flatnonzero(labels.numpy() == c)
        chosen = members[permutation(len(members), seed, "label noise", c)[: round(share * len(members))]]
        noisy[torch.from_numpy(chosen)] = (c + 1) % classes
    return noisy
