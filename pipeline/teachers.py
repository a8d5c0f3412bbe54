"""Teachers: where the student's targets come from, and what a teacher learns from the student's step.

The four methods share one training loop and differ in the teacher alone. NoisyStudent is `FixedTargets`;
Reduced MPL is `Calibrator`, "the only difference" being that it adapts (arXiv:2003.10580v1, section 4.2);
full Meta Pseudo Labels is `pipeline.teacher_network.TeacherNetwork`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batches import Batch, Labelled, TargetBatch
from pipeline.checkpoints import Networks
from pipeline.config import CalibratorSettings, FeedbackSettings
from pipeline.correction.correction import FLOOR
from pipeline.distributed.placement import Placement
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.sharded import clip_gradients
from pipeline.optim import set_learning_rate
from pipeline.student import StudentStep

SPREAD = 4.0  # nats
Metrics = dict[str, Tensor]
Wish = Literal["nothing", "gradient", "losses"]  # what a teacher wants to know of the student's coming step


@dataclass(frozen=True)
class Proposal:
    """A teacher's answer to a batch, and whatever it will need again when it adapts.

    Attributes:
        targets: (B, C), rows are distributions, differentiable in the teacher.
    """

    targets: Tensor


@dataclass(frozen=True)
class BatchProposal(Proposal):
    """Targets with the batch that they are of."""

    batch: TargetBatch


B = TypeVar("B", bound=Batch, contravariant=True)
P = TypeVar("P", bound=Proposal)


class Teacher(Protocol[B, P]):
    """A source of targets. Nothing is kept in it between `propose` and `adapt`; what they share is the proposal."""

    def propose(self, batch: B) -> P:
        """Targets of the student's images."""
        ...

    def wish(self, step: int) -> Wish:
        """What `adapt` will ask of the student's step `step` (from 0): dR/dq, or R before and after it."""
        ...

    def adapt(self, proposal: P, step: StudentStep | None, labelled: Labelled | None) -> Metrics:
        """The teacher's turn to learn, after the student's step (None while the student waits).

        `labelled` is there when the teacher wished for something. What is returned, numbers by name, is logged;
        the names are the teacher's own.
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

    def propose(self, batch: TargetBatch) -> Proposal:
        return Proposal(batch.distributions)

    def wish(self, step: int) -> Wish:
        return "nothing"

    def adapt(self, proposal: Proposal, step: StudentStep | None, labelled: Labelled | None) -> Metrics:
        return {}

    def networks(self) -> Networks:
        return {}

    def values(self) -> dict[str, Any]:
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        pass


class CalibratorNetwork(nn.Module):
    """q_Ψ: distribution (B, C) → distribution (B, C), a perceptron with ReLU.

    Where the teacher has C_T classes of its own, the perceptron sees its distribution, as log-ratios, and q is what
    the correction makes of it. Where images have embeddings, (B, E), it sees those too: errors that depend on the
    image and do not show in q can then be corrected. With `image_weights` one output more gives each image a weight w
    in [0, 2], at first 1, and what comes out is w · q_Ψ: the student's loss is linear in its targets, so the feedback
    of a weight, dR/dw_i = Σ_c q_ic · dR/d(w_i q_ic), comes with that of the targets. An image of no class can be
    silenced.

    Kinds:
        residual: softmax(log((1 − floor)·q + floor/C) + MLP(q)). The output layer starts at zero, so it
            starts at (1 − floor)·q + floor/C: near the identity, and not saturated where q is confident.
            The floor is a share of the whole, so a one-hot keeps 1 − floor whatever C is.
        perceptron: softmax(MLP(q)) alone, five linear layers, no identity at the start.
        scaling: softmax(a · log((1 − floor)·q + floor/C) + b), 1 + C numbers, at first a = 1 and b = 0: a temperature
            and a shift of the classes' shares. It sees neither log-ratios nor embeddings, and wants a larger lr.
    """

    def __init__(
        self,
        classes: int,
        settings: CalibratorSettings,
        inputs: int | None = None,
        embedding: int = 0,
        *,
        ratios: bool = True,
    ) -> None:
        super().__init__()
        self.inputs, self.ratios = inputs or classes, ratios
        self.residual, self.floor, self.weighs = settings.kind != "perceptron", settings.floor, settings.image_weights
        self.layers: nn.Sequential | None = None
        if settings.kind == "scaling":
            self.exponent = nn.Parameter(torch.ones(()))
            self.shift = nn.Parameter(torch.zeros(classes))
            return
        widths = [self.inputs + embedding, *[settings.hidden] * (settings.layers - 1), classes + self.weighs]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if self.residual:
            nn.init.zeros_(linear.weight)

    def forward(self, q: Tensor, stored: Tensor | None = None) -> Tensor:
        calibrated, weight = self.parts(q, stored)
        return calibrated if weight is None else weight[:, None] * calibrated

    def parts(self, q: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """q_Ψ, rows sum to 1, (B, C), and the weight of each row, (B,), if there is one."""
        floored = torch.log((1 - self.floor) * q + self.floor / q.shape[1])
        if self.layers is None:
            return (self.exponent * floored + self.shift).softmax(dim=1), None
        logits, weight = self.layers(self._seen(q, stored)), None
        if self.weighs:
            logits, weight = logits[:, :-1], 2 * logits[:, -1].sigmoid()
        if self.residual:
            logits = logits + floored
        return logits.softmax(dim=1), weight

    def _seen(self, q: Tensor, stored: Tensor | None) -> Tensor:
        if stored is None:
            return q
        known, embedding = stored[:, : self.inputs], stored[:, self.inputs :]
        return torch.cat([log_ratios(known) if self.ratios else known, embedding], dim=1)


def log_ratios(q: Tensor) -> Tensor:
    """What the perceptron sees of distributions over foreign classes (B, C_T): (log q − its mean over classes) / 4.

    Most of a thousand probabilities are so small that as they stand they would move nothing, and what tells our
    classes apart are ratios between them. Bounded below as a fit's features are; 4 nats are about their spread in an
    ImageNet network.
    """
    x = q.clamp_min(FLOOR / q.shape[1]).log()
    return (x - x.mean(dim=1, keepdim=True)) / SPREAD


class Calibrator:
    """Reduced MPL's teacher: a small perceptron that learns from the student's labelled loss.

    Its gradient is weight · (dR/dq pulled back through q_Ψ) plus, optionally, the supervised term
    CE(y, q_Ψ(q_large(x_l))) (v1 §3.2). With `scale: per_image` dR/dq is multiplied by B/η: its size then
    does not depend on the batch or the student's learning rate, and the last, small steps count as much as the first.

    Args:
        classes: C.
        settings, feedback: of the recipe.
        placement: where it lies, and the processes that share the batch.
        student_lr: the student's learning rate before its schedule, for `schedule: student`.
        inputs: C_T, where the teacher has classes of its own.
        embedding: E, where images have embeddings.
        ratios: the perceptron sees the teacher's own distributions as log-ratios; for classes of its own.
    """

    def __init__(
        self,
        classes: int,
        settings: CalibratorSettings,
        feedback: FeedbackSettings,
        placement: Placement = Placement(),
        student_lr: float = 1.0,
        inputs: int | None = None,
        embedding: int = 0,
        *,
        ratios: bool = True,
    ) -> None:
        self.settings, self.feedback, self.ranks = settings, feedback, placement.ranks
        self.student_lr = student_lr
        self.network = CalibratorNetwork(classes, settings, inputs, embedding, ratios=ratios).to(placement.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def propose(self, batch: TargetBatch) -> BatchProposal:
        calibrated = self.network(batch.distributions, batch.stored)  # (B, C)
        return BatchProposal(torch.where(batch.calibrated[:, None], calibrated, batch.distributions), batch)

    def wish(self, step: int) -> Wish:
        return "gradient" if step % self.feedback.every == 0 else "nothing"

    def adapt(self, proposal: BatchProposal, step: StudentStep | None, labelled: Labelled | None) -> Metrics:
        """One Adam step on the feedback and the supervised term; returns what to log."""
        if step is None or labelled is None:
            return {}
        targets, batch = proposal.targets, proposal.batch
        gradient, labelled_loss = step.feedback(labelled.images, labelled.labels, engine=self.feedback.engine)
        objective = self.feedback.weight * (targets * fed_back(gradient, step, self.feedback, self.ranks)).sum()
        metrics = {"feedback_loss": labelled_loss, "feedback_norm": norm_over_ranks(gradient, self.ranks)}
        if self.settings.supervised_weight:
            assert labelled.distributions is not None, (
                "the supervised term needs stored distributions of the labelled images"
            )
            calibrated, _ = self.network.parts(labelled.distributions, labelled.stored)
            supervised = F.nll_loss(calibrated.clamp_min(1e-12).log(), labelled.labels)
            objective = objective + self.settings.supervised_weight * supervised
            metrics["supervised_loss"] = supervised.detach()
        self._learn(objective, step)
        changed = targets.argmax(1) != batch.distributions.argmax(1)
        metrics["labels_changed"] = changed[batch.calibrated].float().mean()
        if self.settings.image_weights:
            weights = targets.detach().sum(dim=1)[batch.calibrated]
            metrics |= {"image_weight": weights.mean(), "image_weight_least": weights.min()}
        return metrics

    def _learn(self, objective: Tensor, step: StudentStep) -> None:
        """One Adam step; the gradient is the mean of the ranks'."""
        self.ranks.finite(float(objective.detach()), "the calibrator's objective")
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.ranks.mean_([p.grad for p in self.network.parameters() if p.grad is not None])
        clip_gradients(self.network, self.settings.clip_norm, "the calibrator's gradient")
        if self.settings.schedule == "student":
            set_learning_rate(self.optimizer, self.settings.lr * step.learning_rate / self.student_lr)
        self.optimizer.step()

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
