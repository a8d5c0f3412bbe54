"""Supervised: cross-entropy with the labels of weakly augmented images."""

from typing import TYPE_CHECKING, Literal

from pipeline.methods.method import Lesson, Method, Rows, Views

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class Supervised(Method):
    """Labelled images alone."""

    name: Literal["supervised"] = "supervised"

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        return Lesson(Rows(views.labelled, views.targets))
