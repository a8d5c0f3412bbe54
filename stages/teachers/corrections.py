"""How a teacher's classes become the data set's: by a map, or by what labelled images say."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.correction import ClassMap, Correction, Fit, class_map_of, fit_correction, fit_scaling
from pipeline.data.manifest import SplitName
from pipeline.errors import RunError, UsageError
from stages.options import Context
from stages.teachers.classes import OTHER_CLASSES, class_names
from stages.teachers.network import NetworkTeacher
from stages.teachers.teacher import Teacher


def correction_of(context: Context, teacher: Teacher) -> Correction | Fit:
    """What makes the data set's classes of the teacher's, as the recipe says.

    Raises:
        DataError: a map that leaves one of the data set's classes without any, or no labelled image has an answer.
        UsageError: `identity` for a teacher with classes of its own.
    """
    settings, ours, theirs = context.recipe.filter, class_names(context), teacher.names
    kind = settings.correction
    if kind == "auto":
        kind = "map" if settings.class_map is not None else "identity"
    if kind == "identity":
        if ours != theirs:
            raise UsageError(f"--correction identity is for a teacher with the data set's classes. {OTHER_CLASSES}")
        return Correction.identity(ours)
    mapped = class_map(context, teacher)
    if kind == "map":
        assert mapped is not None
        return Correction.mapped(theirs, ours, mapped)
    q, labels = labelled_answers(context, teacher, "labelled")
    if kind == "scaling":
        return fit_scaling(q, labels, theirs, ours, mapped)
    return fit_correction(q, labels, theirs, ours, mapped, seed=context.seed)


def require_evidence(teacher: Teacher) -> None:
    """Refuse a fit to what a teacher says of images that it knows by heart.

    Raises:
        UsageError: it was trained on them: says so, or is the run's own without held-out answers.
    """
    if not teacher.saw_the_labelled_images:
        return
    if isinstance(teacher, NetworkTeacher) and teacher.is_own:
        raise UsageError(
            "the run's own teacher was trained on the labelled images: certain and right on them, it gives a fit "
            "nothing to correct. Train it with held-out answers: mpl pretrain --force --set pretrain.folds=5"
        )
    raise UsageError(
        "the teacher was trained on the labelled images (--seen-labels): certain and right on them, it gives a fit "
        "nothing to correct. Use a map of classes, or answers of a teacher that has not seen them (--held-out-labels)"
    )


def class_map(context: Context, teacher: Teacher) -> ClassMap | None:
    """The map of the teacher's classes that the recipe names, or of equal names; see `class_map_of`."""
    settings = context.recipe.filter
    path = None if settings.class_map is None else Path(settings.class_map)
    if settings.correction in ("scaling", "fit") and path is None and teacher.names == class_names(context):
        return None  # it starts at the identity
    return class_map_of(path, teacher.names, class_names(context), complete=settings.correction != "fit")


def labelled_answers(
    context: Context, teacher: Teacher, split: SplitName
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
    """The teacher's distributions of the images of a split that have one, (m, C_T), and their labels, (m,).

    Raises:
        RunError: none has.
    """
    samples = list(context.data_set.split(split).read())
    q, places = teacher.answers(split, samples)
    if not len(places):
        raise RunError(f"the teacher has no answer about any of the {len(samples):,} {split} images")
    return q, np.array([samples[place][1].label for place in places.tolist()], np.int64)


def tell_fit(context: Context, fit: Fit) -> None:
    """How a correction was fitted, for a person."""
    text = f"the correction was fitted to {fit.images:,} labelled images, strength {fit.strength:.3g}"
    if len(fit.nll) > 1:
        text += f" (NLL of those left out {min(fit.nll):.3f}, where it is strongest {fit.nll[0]:.3f})"
    context.console.note(text)
    if fit.absent:
        context.console.note(f"no labelled image is of {', '.join(fit.absent[:10])}: there the fit knows nothing")
