"""RandAugment (arXiv:1909.13719): cross-entropy with the labels of strongly augmented images."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.methods.method import Lesson, Method, Rows, Views

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class RandAugment(Method):
    """Labelled images alone, in the strong view: the recipe's `augment`, which is RandAugment in ours."""

    labelled_view: ClassVar[Literal["weak", "strong"]] = "strong"

    name: Literal["randaugment"] = "randaugment"

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        return Lesson(Rows(views.labelled, views.targets))
