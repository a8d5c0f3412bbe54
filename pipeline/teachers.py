"""Teachers: where the student's targets come from, and what a teacher learns from the student's step.

The four methods share one training loop and differ in the teacher alone. NoisyStudent is `FixedTargets`;
Reduced MPL is `Calibrator`, "the only difference" being that it adapts (arXiv:2003.10580v1, section 4.2).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import CalibratorSettings, FeedbackSettings
from pipeline.errors import NonFiniteError
from pipeline.student import StudentStep

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What the student sees in one step.

    Attributes:
        images: augmented and normalised, (B, 3, S, S).
        distributions: q_large of each image, (B, C); for a labelled image that stands with its true
            label, that label as a distribution.
        calibrated: whether the row's target may be changed by a calibrator, (B,), bool; False for rows
            that stand with their true label.
    """

    images: Tensor
    distributions: Tensor
    calibrated: Tensor


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

    def wants_feedback(self, step: int) -> bool:
        """Whether `adapt` will ask the student's step `step` (from 0) for a gradient."""
        ...

    def adapt(self, step: StudentStep, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        """The teacher's turn to learn, after the student's step."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedTargets:
    """The stored distributions as they are: NoisyStudent, and with labelled images alone, Supervised."""

    def __call__(self, batch: Batch) -> Tensor:
        return batch.distributions

    def wants_feedback(self, step: int) -> bool:
        return False

    def adapt(self, step: StudentStep, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
    """

    def __init__(
        self, classes: int, settings: CalibratorSettings, feedback: FeedbackSettings, device: torch.device
    ) -> None:
        self.settings, self.feedback = settings, feedback
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

    def wants_feedback(self, step: int) -> bool:
        return step % self.feedback.every == 0

    def adapt(self, step: StudentStep, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        """One Adam step on the feedback and the supervised term; returns what to log."""
        assert labelled is not None
        gradient = step.target_gradient(labelled.images, labelled.labels, engine=self.feedback.engine)
        objective = self.feedback.weight * (targets * self._scaled(gradient, step)).sum()
        assert step.labelled_loss is not None
        metrics = {"feedback_loss": step.labelled_loss, "feedback_norm": torch.linalg.vector_norm(gradient)}
        if self.settings.supervised_weight:
            calibrated = self.network(labelled.distributions)
            supervised = F.nll_loss(calibrated.clamp_min(1e-12).log(), labelled.labels)
            objective = objective + self.settings.supervised_weight * supervised
            metrics["supervised_loss"] = supervised.detach()
        if not torch.isfinite(objective):
            raise NonFiniteError(f"the calibrator's objective is {float(objective.detach())}")
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.optimizer.step()
        changed = targets.argmax(1) != batch.distributions.argmax(1)
        metrics["labels_changed"] = changed[batch.calibrated].float().mean()
        return metrics

    def _scaled(self, gradient: Tensor, step: StudentStep) -> Tensor:
        """dR/dq in the scale that is fed back, with the ablation's control applied."""
        if self.feedback.control == "flipped":
            gradient = -gradient
        elif self.feedback.control == "shuffled":
            gradient = gradient[torch.randperm(len(gradient), device="cpu").to(gradient.device)]
        if self.feedback.scale == "raw":
            return gradient
        lr = step.learning_rate
        return gradient * (len(gradient) / lr) if lr > 0 else torch.zeros_like(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
