"""Teachers: where the student's targets come from, and what a teacher learns from the student's step.

The four methods share one training loop and differ in the teacher alone. NoisyStudent is `FixedTargets`;
Reduced MPL is `Calibrator`, "the only difference" being that it adapts (arXiv:2003.10580v1, section 4.2);
full Meta Pseudo Labels is `pipeline.teacher_network.TeacherNetwork`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import CalibratorSettings, FeedbackSettings
from pipeline.distributed import ALONE, Ranks
from pipeline.distributed.sharded import clip_gradients
from pipeline.methods import Views
from pipeline.named_tensors import Networks
from pipeline.optim import set_learning_rate
from pipeline.student import StudentStep

Metrics = dict[str, Tensor]
Wish = Literal["nothing", "gradient", "losses"]  # what a teacher wants to know of the student's coming step


@dataclass(frozen=True)
class Batch:
    """What the student sees in one step.

    Attributes:
        images: augmented and normalised, (B, 3, S, S).
        distributions: q_large of each image, (B, C); for a labelled image that stands with its true
            label, that label as a distribution.
            An empty (B, 0) where none is stored: a teacher network makes its own.
        calibrated: whether the row's target may be changed by a calibrator, (B,), bool; False for rows
            that stand with their true label.
        weight: of each row in the student's loss, (B,), or None for 1.
        views: what a teacher network's method works on; its `pool` is `images`.
    """

    images: Tensor
    distributions: Tensor
    calibrated: Tensor
    weight: Tensor | None = None
    views: Views | None = None


@dataclass(frozen=True)
class Labelled:
    """Labelled images for the teacher's turn.

    Attributes:
        images: normalised, (V, 3, S, S).
        labels: (V,), int64.
        distributions: q_large of each, (V, C), or None where none is stored.
    """

    images: Tensor
    labels: Tensor
    distributions: Tensor | None = None


class Teacher(Protocol):
    """A source of targets."""

    def __call__(self, batch: Batch) -> Tensor:
        """Targets (B, C), differentiable in the teacher."""
        ...

    def wish(self, step: int) -> Wish:
        """What `adapt` will ask of the student's step `step` (from 0): dR/dq, or R before and after it."""
        ...

    def adapt(self, step: StudentStep | None, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        """The teacher's turn to learn, after the student's step (None while the student waits).

        `labelled` is there when the teacher wished for something.
        """
        ...

    def networks(self) -> Networks:
        """What a checkpoint keeps of it: label → (network, its optimiser)."""
        ...

    def values(self) -> dict[str, Any]:
        """What else a checkpoint keeps, as JSON."""
        ...

    def load_values(self, values: dict[str, Any]) -> None: ...


class FixedTargets:
    """The stored distributions as they are: NoisyStudent, and with labelled images alone, Supervised."""

    def __call__(self, batch: Batch) -> Tensor:
        return batch.distributions

    def wish(self, step: int) -> Wish:
        return "nothing"

    def adapt(self, step: StudentStep | None, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        return {}

    def networks(self) -> Networks:
        return {}

    def values(self) -> dict[str, Any]:
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        pass


class CalibratorNetwork(nn.Module):
    """q_Ψ: distribution (B, C) → distribution (B, C), a perceptron with ReLU.

    Kinds:
        residual: softmax(log((1 − floor)·q + floor/C) + MLP(q)). The output layer starts at zero, so it
            starts at (1 − floor)·q + floor/C: near the identity, and not saturated where q is confident.
            The floor is a share of the whole, so a one-hot keeps 1 − floor whatever C is.
        perceptron: softmax(MLP(q)) alone, five linear layers, no identity at the start.
    """

    def __init__(self, classes: int, settings: CalibratorSettings) -> None:
        super().__init__()
        self.residual, self.floor = settings.kind == "residual", settings.floor
        widths = [classes, *[settings.hidden] * (settings.layers - 1), classes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if self.residual:
            nn.init.zeros_(linear.weight)

    def forward(self, q: Tensor) -> Tensor:
        logits = self.layers(q)  # (B, C)
        if self.residual:
            logits = logits + torch.log((1 - self.floor) * q + self.floor / q.shape[1])
        return logits.softmax(dim=1)


class Calibrator:
    """Reduced MPL's teacher: a small perceptron that learns from the student's labelled loss.

    Its gradient is weight · (dR/dq pulled back through q_Ψ) plus, optionally, the supervised term
    CE(y, q_Ψ(q_large(x_l))) (v1 §3.2). With `scale: per_image` dR/dq is multiplied by B/η: its size then
    does not depend on the batch or the student's learning rate, and does not vanish under Adam's ε.

    Args:
        classes: C.
        settings, feedback: of the recipe.
        device: where it lies.
        ranks: the processes that share the batch.
        student_lr: the student's learning rate before its schedule, for `schedule: student`.
    """

    def __init__(
        self,
        classes: int,
        settings: CalibratorSettings,
        feedback: FeedbackSettings,
        device: torch.device,
        ranks: Ranks = ALONE,
        student_lr: float = 1.0,
    ) -> None:
        self.settings, self.feedback, self.ranks, self.student_lr = settings, feedback, ranks, student_lr
        self.network = CalibratorNetwork(classes, settings).to(device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def __call__(self, batch: Batch) -> Tensor:
        return torch.where(batch.calibrated[:, None], self.network(batch.distributions), batch.distributions)

    def wish(self, step: int) -> Wish:
        return "gradient" if step % self.feedback.every == 0 else "nothing"

    def adapt(self, step: StudentStep | None, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        """One Adam step on the feedback and the supervised term; returns what to log."""
        if step is None or labelled is None:
            return {}
        gradient = step.target_gradient(labelled.images, labelled.labels, engine=self.feedback.engine)
        objective = self.feedback.weight * (targets * fed_back(gradient, step, self.feedback, self.ranks)).sum()
        assert step.labelled_loss is not None
        metrics = {"feedback_loss": step.labelled_loss, "feedback_norm": norm_over_ranks(gradient, self.ranks)}
        if self.settings.supervised_weight:
            calibrated = self.network(labelled.distributions)
            supervised = F.nll_loss(calibrated.clamp_min(1e-12).log(), labelled.labels)
            objective = objective + self.settings.supervised_weight * supervised
            metrics["supervised_loss"] = supervised.detach()
        self.ranks.finite(float(objective.detach()), "the calibrator's objective")
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.ranks.mean_([p.grad for p in self.network.parameters() if p.grad is not None])
        clip_gradients(self.network, None, "the calibrator's gradient")
        if self.settings.schedule == "student":
            set_learning_rate(self.optimizer, self.settings.lr * step.learning_rate / self.student_lr)
        self.optimizer.step()
        changed = targets.argmax(1) != batch.distributions.argmax(1)
        metrics["labels_changed"] = changed[batch.calibrated].float().mean()
        return metrics

    def networks(self) -> Networks:
        return {"calibrator": (self.network, self.optimizer)}

    def values(self) -> dict[str, Any]:
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        pass


def norm_over_ranks(gradient: Tensor, ranks: Ranks) -> Tensor:
    """L2 norm of the rows of all ranks, ()."""
    return (ranks.mean(gradient.square().sum()) * ranks.world).sqrt()


def fed_back(gradient: Tensor, step: StudentStep, settings: FeedbackSettings, ranks: Ranks) -> Tensor:
    """dR/dq, (B, C), as it enters a teacher's objective Σ q · dR/dq: scaled, with the ablation's control.

    The objective is a sum over all ranks' rows, but their gradients are averaged: hence the factor.
    """
    if settings.control == "flipped":
        gradient = -gradient
    elif settings.control == "shuffled":
        gradient = gradient[torch.randperm(len(gradient), device="cpu").to(gradient.device)]
    return gradient * feedback_scale(step, settings, len(gradient) * ranks.world) * ranks.world


def feedback_scale(step: StudentStep, settings: FeedbackSettings, batch: int) -> float:
    """1, or B/η of the student's step with `per_image`; 0 where the student did not move."""
    lr = step.learning_rate
    if settings.scale != "per_image" or lr == 0:
        return float(lr > 0)
    return batch / lr
