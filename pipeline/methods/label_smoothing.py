"""Label smoothing (Szegedy et al., arXiv:1512.00567): (1 − ε)·label + ε/C."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.methods.method import Lesson, Method, Rows, Views

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class LabelSmoothing(Method):
    """Labelled images alone, with smoothed labels. The recipe's own `label_smoothing` is a part of any method."""

    name: Literal["label_smoothing"] = "label_smoothing"
    smoothing: float = Field(default=0.15, ge=0.0, lt=1.0)  # Google's CIFAR-10-4K setting

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        smooth = views.targets * (1 - self.smoothing) + self.smoothing / views.targets.shape[1]
        return Lesson(Rows(views.labelled, smooth))
