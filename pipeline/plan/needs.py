"""What a plan must know of a recipe: the networks, and how many images of which kind a step takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from pipeline.config import FeedbackSettings, ModelSettings, OptimizerSettings, Recipe, TrainMplSettings
from pipeline.errors import UsageError
from pipeline.plan.network import Costs

PlannedMethod = Literal["reduced", "mpl-soft", "mpl-hard"]
METHODS: tuple[PlannedMethod, ...] = ("reduced", "mpl-soft", "mpl-hard")


@dataclass(frozen=True)
class TeacherNeeds:
    """A teacher network.

    Attributes:
        costs, optimizer: of the network.
        predicted: images that it predicts without a gradient, per step (the method's weak view).
        learned: images that it learns from and makes the student's targets of, per step, in one pass.
    """

    costs: Costs
    optimizer: OptimizerSettings
    predicted: int
    learned: int


@dataclass(frozen=True)
class Needs:
    """One training.

    Attributes:
        method: which.
        student, optimizer: the student's network.
        batch: pool images per step of the whole cluster.
        feedback_batch: labelled images per feedback; no more than there are.
        every: student's steps between feedbacks.
        exact: feedback by forward mode; otherwise by this many further forward passes.
        steps: of the training.
        calibrator: weights of the calibrator, number; 0 without one.
        teacher: a teacher network, or None.
    """

    method: PlannedMethod
    student: Costs
    optimizer: OptimizerSettings
    batch: int
    feedback_batch: int
    every: int
    engine: Literal["exact", "central", "one_sided"]
    steps: int
    calibrator: int = 0
    teacher: TeacherNeeds | None = None

    @property
    def soft(self) -> bool:
        """Whether the gradient of the labelled loss in the targets is fed back."""
        return self.method != "mpl-hard"

    @property
    def batches(self) -> dict[str, int]:
        """Images of a step by the recipe's key."""
        found = {"pool images": self.batch, "labelled images for feedback": self.feedback_batch}
        if self.teacher is not None:
            found["images that the teacher learns from"] = self.teacher.learned
        return found


def needs_of(
    recipe: Recipe, method: PlannedMethod, student: Costs, teacher: Costs, labelled: int | None, processes: int
) -> Needs:
    """What a recipe's training by `method` needs.

    Args:
        recipe: the recipe.
        method: which training.
        student, teacher: costs of its networks.
        labelled, processes: as of `all_needs`.
    """
    if method == "reduced":
        settings = recipe.train_reduced
        if settings.teacher != "calibrator":
            raise UsageError(f"train_reduced.teacher is {settings.teacher!r}; Reduced MPL is planned with 'calibrator'")
        inner = settings.calibrator
        widths = [student.classes, *[inner.hidden] * (inner.layers - 1), student.classes]
        weights = sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairwise(widths))
        feedback = settings.feedback
        return Needs(
            method, student, settings.optimizer, settings.batch, feedback_images(feedback, labelled, processes),
            feedback.every, feedback.engine, settings.steps, calibrator=weights,
        )  # fmt: skip
    mpl = _full(recipe)
    method_needs = mpl.method.needs
    pool = mpl.batch
    weak = "pool_weak" in method_needs
    own_pool = pool if weak or "pool" in method_needs else 0
    # The student's images are a part of the lesson where the method learns from their strong view; else they are
    # appended to it (`TeacherNetwork.__call__`).
    shared = "pool" in method_needs
    learned = mpl.labelled_batch + own_pool + (0 if shared else pool)
    return Needs(
        method,
        student,
        mpl.optimizer,
        pool,
        feedback_images(mpl.feedback_options, labelled, processes),
        mpl.feedback_options.every,
        mpl.feedback_options.engine,
        mpl.steps,
        teacher=TeacherNeeds(teacher, mpl.teacher.optimizer or mpl.optimizer, pool if weak else 0, learned),
    )


def feedback_images(settings: FeedbackSettings, labelled: int | None, processes: int) -> int:
    """Labelled images of a feedback, as training takes them: those there are, a multiple of the processes' number."""
    found = settings.batch
    if labelled is not None:
        found = min(found, round(settings.held_out * labelled) or labelled)
    return found - found % processes or found  # fewer than processes: refused when it is planned


def all_needs(
    recipe: Recipe, methods: Sequence[PlannedMethod], classes: int, precision: str,
    labelled: int | None = None, processes: int = 1,
) -> list[Needs]:  # fmt: skip
    """What each method needs. A network that occurs more than once is followed once.

    Args:
        recipe: the recipe.
        methods: which trainings.
        classes: C.
        precision: float32 or bf16.
        labelled: images of the labelled split; None: not known before it is read.
        processes: that share a batch.
    """
    dtype = torch.bfloat16 if precision == "bf16" else None
    known: dict[str, Costs] = {}

    def costs(model: ModelSettings) -> Costs:
        new = Costs(model, recipe.data.image_size, classes, dtype)
        return known.setdefault(model.model_dump_json(), new)

    found = []
    for method in methods:
        if method == "reduced":
            student = teacher = costs(recipe.train_reduced.model)
        else:
            mpl = _full(recipe)
            student, teacher = costs(mpl.model), costs(mpl.teacher.model or mpl.model)
        found.append(needs_of(recipe, method, student, teacher, labelled, processes))
    return found


def _full(recipe: Recipe) -> TrainMplSettings:
    """The recipe's section of full MPL."""
    if recipe.train_mpl is None:
        raise UsageError(f"recipe {recipe.name} has no section train_mpl; plan it with --method reduced")
    return recipe.train_mpl
