"""Mixup (arXiv:1710.09412): convex combinations of two labelled images and of their labels."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from pipeline.methods.method import Lesson, Method, Rows, Views

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class Mixup(Method):
    """Each labelled image with a partner from a second draw, λ ~ Beta(α, α) for each pair."""

    needs: ClassVar[frozenset[str]] = frozenset({"partner"})

    name: Literal["mixup"] = "mixup"
    alpha: PositiveFloat = 1.0

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        import torch
        from scipy.special import betaincinv

        assert views.partner is not None
        images, targets = views.partner
        drawn = betaincinv(self.alpha, self.alpha, views.uniform.tolist())
        share = torch.from_numpy(drawn).to(views.targets)  # λ, (L,)
        mixed = torch.lerp(images, views.labelled, share.to(images.dtype)[:, None, None, None])
        return Lesson(Rows(mixed, torch.lerp(targets, views.targets, share[:, None])))
