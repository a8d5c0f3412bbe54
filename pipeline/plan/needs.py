"""What a plan must know of a recipe: what is trained, and how many images of which kind a step takes."""

from dataclasses import dataclass

import torch

from pipeline.config import FeedbackSettings, Recipe, TrainMplSettings
from pipeline.errors import UsageError
from pipeline.plan.footprint import Images
from pipeline.plan.step import PlannedMethod, StepSettings, TeacherSettings

METHODS: tuple[PlannedMethod, ...] = ("reduced", "mpl-soft", "mpl-hard")


@dataclass(frozen=True)
class Needs:
    """One training: what it is made of, the images of a step of the whole cluster, and how many steps it has."""

    settings: StepSettings
    images: Images
    steps: int


def needs_of(
    recipe: Recipe, method: PlannedMethod, classes: int, precision: str, labelled: int | None = None, processes: int = 1
) -> Needs:
    """What a recipe's training by `method` needs.

    Args:
        recipe: the recipe.
        method: which training.
        classes: C.
        precision: float32 or bf16.
        labelled: images of the labelled split; None: not known before it is read.
        processes: that share a batch.
    """
    dtype, size = torch.bfloat16 if precision == "bf16" else None, recipe.data.image_size
    if method == "reduced":
        reduced, feedback = recipe.train_reduced, recipe.train_reduced.feedback
        if reduced.teacher != "calibrator":
            raise UsageError(f"train_reduced.teacher is {reduced.teacher!r}; Reduced MPL is planned with 'calibrator'")
        settings = StepSettings(
            method, reduced.model, reduced.optimizer, size, classes, dtype, reduced.calibrator, feedback.engine,
            feedback.every,
        )  # fmt: skip
        return Needs(settings, Images(reduced.batch, feedback_images(feedback, labelled, processes)), reduced.steps)
    mpl = _full(recipe)
    feedback = mpl.feedback_options
    teacher = TeacherSettings(mpl.teacher.model or mpl.model, mpl.teacher.optimizer or mpl.optimizer, mpl.method)
    settings = StepSettings(
        method, mpl.model, mpl.optimizer, size, classes, dtype, teacher, feedback.engine, feedback.every
    )
    images = feedback_images(feedback, labelled, processes)
    return Needs(settings, Images(mpl.batch, images, mpl.labelled_batch, settings.lesson_pool), mpl.steps)


def feedback_images(settings: FeedbackSettings, labelled: int | None, processes: int) -> int:
    """Labelled images of a feedback, as training takes them: those there are, a multiple of the processes' number."""
    images = settings.batch
    if labelled is not None:
        images = min(images, round(settings.held_out * labelled) or labelled)
    return images - images % processes or images  # fewer than processes: refused when it is planned


def _full(recipe: Recipe) -> TrainMplSettings:
    """The recipe's section of full MPL."""
    if recipe.train_mpl is None:
        raise UsageError(f"recipe {recipe.name} has no section train_mpl; plan it with --method reduced")
    return recipe.train_mpl
