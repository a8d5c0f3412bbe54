"""A teacher's classes beside the data set's."""

from pipeline.classes import same_names
from stages.options import Context

OTHER_CLASSES = (
    "A teacher with classes of its own becomes one of yours by a map of classes (--class-map FILE; --correction map "
    "for equal names) or by a fit to the labelled images (--correction fit)"
)


def class_names(context: Context) -> tuple[str, ...]:
    """Of the data set."""
    return context.data_set.split("labelled").class_names


def others_are_expected(context: Context) -> bool:
    """Whether somebody said how other classes become the data set's."""
    settings = context.recipe.filter
    return settings.correction in ("map", "scaling", "fit") or settings.class_map is not None


def same_classes(stated: list[str] | tuple[str, ...] | None, outputs: int, ours: tuple[str, ...]) -> bool:
    """Whether a network's classes can be the data set's: by name, or where it names none by their number."""
    return outputs == len(ours) if stated is None else same_names(stated, ours)
