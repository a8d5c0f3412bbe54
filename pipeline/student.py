"""The student: one optimiser step on given targets, and the gradient of the labelled loss in those targets.

Nothing here knows where targets come from. A calibrator (Reduced MPL), a teacher network (MPL) or a person's
own object gets its gradient by ordinary backward through its own targets:

    step = student.learn(images, targets.detach())
    (targets * step.target_gradient(labelled_images, labels)).sum().backward()

Source: arXiv:2003.10580v1, equations 1, 2 and 8; the derivation is docs/meta-gradient.md.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.errors import FeedbackError, NonFiniteError
from pipeline.feedback import (
    Engine,
    Replay,
    Tensors,
    directional_derivative,
    labelled_loss_gradient,
    log_probabilities,
    record,
)
from pipeline.optim import check_rule, update_derivative


class Student:
    """A classifier and its optimiser.

    Args:
        model: any classifier, images (B, 3, H, W) → logits (B, C), in the mode it shall train in.
        optimizer: SGD (momentum, Nesterov), RMSprop, timm's RMSpropTF, Adam or AdamW over its parameters.
            Another one works while no feedback is asked for.
        clip_norm: clip the gradient to this global norm, as torch does.
        autocast: dtype of mixed precision (torch.bfloat16), or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.autocast = autocast
        self.steps_taken = 0

    @property
    def module(self) -> nn.Module:
        """The bare eager network: without torch.compile's wrapper."""
        return getattr(self.model, "_orig_mod", self.model)

    def learn(
        self, images: Tensor, targets: Tensor, weight: Tensor | None = None, *, replay: bool = True
    ) -> "StudentStep":
        """One optimiser step on −mean over the batch of weight · Σ_c targets_c log p_c.

        Args:
            images: (B, 3, H, W), as the network expects them.
            targets: (B, C), rows are distributions; never differentiated here.
            weight: optional, (B,), a weight per row.
            replay: keep what `target_gradient` needs (one copy of the weights and one of the update's
                derivative); False for a step that gets no feedback.

        Raises:
            NonFiniteError: the loss or the gradient is NaN or infinite; weights and optimiser state are
                untouched.
        """
        targets = targets.detach()
        kept = None
        if replay:
            check_rule(self.optimizer)
            kept = record(self.module, images, self.autocast)
        log_p = log_probabilities(self.model, images, self.autocast)  # (B, C)
        row_loss = -(targets.to(log_p.dtype) * log_p).sum(dim=1)  # (B,) nats
        loss = (row_loss if weight is None else weight * row_loss).mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the student's loss is {float(loss.detach())} at its step {self.steps_taken + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = self._clip()
        derivative = self._update_derivative() if replay else {}
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.steps_taken += 1
        return StudentStep(self, loss.detach(), norm, lr, log_p.detach(), weight, kept, derivative)

    def _clip(self) -> Tensor:
        """Clip the gradients in place; returns their norm n before clipping."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the student's gradient is {float(norm)} at its step {self.steps_taken + 1}")
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip_norm, norm)
        return norm

    def _update_derivative(self) -> dict[str, Tensor | float]:
        """D = ∂θ'/∂g of the coming step, by parameter name."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        return {
            name: update_derivative(self.optimizer, groups[id(p)], p, p.grad)
            for name, p in self.module.named_parameters()
            if p.grad is not None and id(p) in groups
        }


@dataclass
class StudentStep:
    """One step that a student has taken.

    Attributes:
        loss: the training loss, nats, ().
        gradient_norm: before clipping, ().
        learning_rate: η of the step (of the optimiser's first group).
        log_probabilities: log p of the batch before the step, (B, C).
        labelled_loss: R after the step, nats, (); set by `target_gradient`.
    """

    student: Student
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    log_probabilities: Tensor
    weight: Tensor | None = None
    _replay: Replay | None = field(default=None, repr=False)
    _derivative: dict[str, Tensor | float] = field(default_factory=dict, repr=False)
    labelled_loss: Tensor | None = None

    def __post_init__(self) -> None:
        self._taken = self.student.steps_taken
        clipped = self._derivative if self.student.clip_norm is not None else ()
        parameters = dict(self.student.module.named_parameters())
        self._clipped = {name: parameters[name].grad for name in clipped}  # outlive a zero_grad() of the caller

    def target_gradient(self, images: Tensor, labels: Tensor, *, engine: Engine = "exact") -> Tensor:
        """Gradient of the labelled loss after this step with respect to this step's targets.

        R is the mean cross-entropy of the labelled images at the weights after the step, with the batch
        statistics of those images and without dropout or drop path. Running statistics, gradients and
        random state are left as they are.

        Args:
            images: labelled images, (V, 3, H, W), on the student's device.
            labels: class indices, (V,), int64.
            engine: "exact" (forward mode), or finite differences: "central", "one_sided".

        Returns:
            dR/dq, (B, C), nats per unit of probability; detached.

        Raises:
            FeedbackError: the step kept no replay, the student has moved on since, an operation has no
                derivative, or the replayed forward differs from the recorded one.

        Source: arXiv:2003.10580v1, equations 2 and 8; one forward-mode derivative, docs/meta-gradient.md.
        """
        if self._replay is None:
            raise FeedbackError("this step was taken with replay=False; feedback needs learn(..., replay=True)")
        if self.student.steps_taken != self._taken:
            raise FeedbackError(
                f"the student has taken {self.student.steps_taken - self._taken} more step(s) since this one; "
                "ask for the gradient before the next learn()"
            )
        self.labelled_loss, gradient = labelled_loss_gradient(
            self.student.module, images, labels, self.student.autocast
        )
        direction = self._through_the_update(gradient)
        tangent = directional_derivative(self._replay, direction, engine, self.log_probabilities)  # (B, C)
        result = -tangent / len(tangent)
        return result if self.weight is None else result * self.weight[:, None]

    def _through_the_update(self, gradient: Tensors) -> Tensors:
        """v = (∂θ'/∂g₀)ᵀ ∇R, with g₀ the gradient before clipping. Overwrites `gradient`."""
        v = {name: gradient[name].mul_(d) for name, d in self._derivative.items() if name in gradient}
        clip, n = self.student.clip_norm, self.gradient_norm
        if clip is None or clip / (n + 1e-6) >= 1:
            return v
        scale = clip / (n + 1e-6)
        raw = {name: g / scale for name, g in self._clipped.items() if g is not None}
        along = sum(((v[name] * raw[name]).sum() for name in v), torch.zeros_like(n))
        clipped_away = along / (n * (n + 1e-6))
        return {name: scale * (v.get(name, 0.0) - g * clipped_away) for name, g in raw.items()}
