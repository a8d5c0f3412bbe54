"""The teacher of full Meta Pseudo Labels: a network with a method's own loss and the student's feedback.

Source: arXiv:2003.10580v4, sections 2 and 3, equations 3 to 5; docs/meta-gradient.md.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.batches import Labelled, ViewBatch
from pipeline.checkpoints import Networks
from pipeline.config import FeedbackKind, MplFeedbackSettings
from pipeline.data.augment.draws import Draws
from pipeline.distributed.layouts import average_gradients, bare, running_statistics, unsynchronised
from pipeline.distributed.placement import Placement
from pipeline.distributed.sharded import clip_gradients
from pipeline.gradient.micro_batches import micro_batches
from pipeline.gradient.replay import log_probabilities, random_state, replayed_random_numbers
from pipeline.methods import Lesson, Method
from pipeline.optim import set_learning_rate
from pipeline.seeds import derive_seed
from pipeline.student import StudentStep
from pipeline.teachers import Metrics, Proposal, Wish, fed_back, feedback_scale, norm_over_ranks


@dataclass(frozen=True)
class TeacherRule:
    """How a teacher network learns.

    Attributes:
        method: makes the lesson.
        feedback: kind.
        options: of the feedback.
        learning_rate: of a step, counted from 0.
        clip_norm: of its gradient, or None.
        seed: of the sampled labels.
    """

    method: Method
    feedback: FeedbackKind
    options: MplFeedbackSettings
    learning_rate: Callable[[int], float]
    clip_norm: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class NetworkProposal(Proposal):
    """Targets of a teacher network.

    Attributes:
        step: from 0.
        lesson: what the teacher is to learn in it.
        forward: log T(x) of the lesson's images and of the student's.
        lesson_log_p: log T(x) of the lesson's images, (N, C), differentiable.
        log_p: log T(x) of the student's images, (U, C), differentiable.
    """

    step: int
    lesson: Lesson
    forward: "Forward"
    lesson_log_p: Tensor
    log_p: Tensor


class TeacherNetwork:
    """Gives the student its targets, and learns from a lesson of its own and from the student's labelled loss.

    Feedback, added to the loss of the lesson:
        soft: targets are T(x), and Σ T(x) · dR/dq is the exact equation 3.
        hard: targets are sampled, ŷ ~ T(x), and (h − b) · Σ CE(ŷ, T(x)) with h = R(θ) − R(θ'), the labelled
            loss before the student's step minus the one after. Its mean over ŷ is ∇_Ψ E[R(θ'(ŷ))]; by default,
            `scale: paper`, the cross-entropy is the mean over the batch instead of the sum.
            b is a moving average of *earlier* h, where one is asked for. With `credit: row` each label gets its own
            part of h, by the exact gradient G = dR/dq at the sampled labels: −Σ_c (ŷ_ic − T_ic) · G_ic in the place
            of h − b. Its mean differs from that of h by terms that vanish with the student's learning rate, since R is
            taken as linear in a row; its noise does not grow with the rows of a batch, which h lays on every one.
        none: targets are T(x), and the teacher learns from its lesson alone.

    Args:
        model: the network, on its device, in training mode.
        optimizer: of its parameters.
        rule: how it learns.
        placement: precision, the processes that share the batch, and micro-batches: with several, each goes forward
            twice, and batch statistics are each one's own.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, rule: TeacherRule, placement: Placement = Placement()
    ) -> None:
        self.model, self.optimizer, self.rule = model, optimizer, rule
        self.autocast, self.ranks = placement.autocast, placement.ranks
        self.micro_batches = placement.micro_batches
        self.moving: float | None = None  # average of earlier h

    def propose(self, batch: ViewBatch) -> NetworkProposal:
        """Targets of the student's images, (U, C): T(x), differentiable, or sampled one-hot rows."""
        lesson = self.rule.method.lesson(batch.views, self.predict)
        images = lesson.images()
        appended = lesson.pool is None or lesson.pool.images is not batch.images
        forward = self._forward(torch.cat([images, batch.images]) if appended else images)  # (N, C), or
        # (N + U, C) where the lesson does not hold the student's images
        log_p = forward.log_p[-len(batch.images) :]
        q = log_p.exp()
        targets = self._sample(q.detach(), batch.views.step) if self.rule.feedback == "hard" else q
        return NetworkProposal(targets, batch.views.step, lesson, forward, forward.log_p[: len(images)], log_p)

    def wish(self, step: int) -> Wish:
        options = self.rule.options
        if self.rule.feedback == "none" or not options.weight or step % options.every:
            return "nothing"
        return "gradient" if self.rule.feedback == "soft" or options.credit == "row" else "losses"

    def adapt(self, proposal: NetworkProposal, step: StudentStep | None, labelled: Labelled | None) -> Metrics:
        """One optimiser step on the lesson's loss plus the feedback; returns what to log."""
        lesson = proposal.lesson
        objective = lesson.loss(proposal.lesson_log_p)
        metrics = {"teacher_loss": objective.detach()}
        if lesson.pool is not None and lesson.pool.weight is not None:
            metrics["teacher_pool_share"] = (lesson.pool.weight > 0).float().mean()
        if step is not None and labelled is not None:
            by_rows = self._row_feedback if self.rule.options.credit == "row" else self._hard_feedback
            feedback = self._soft_feedback if self.rule.feedback == "soft" else by_rows
            term, figures = feedback(proposal, step, labelled)
            objective, metrics = objective + term, metrics | figures
        self.ranks.finite(float(objective.detach()), "the teacher's objective")
        self.optimizer.zero_grad(set_to_none=True)
        proposal.forward.backward(objective)
        average_gradients(self.model, self.ranks)
        clip_gradients(bare(self.model), self.rule.clip_norm, "the teacher's gradient")
        set_learning_rate(self.optimizer, self.rule.learning_rate(proposal.step))
        self.optimizer.step()
        self.ranks.mean_(running_statistics(bare(self.model)))
        return metrics

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """T(x), (B, C), without a gradient, in training mode."""
        network, parts = bare(self.model), micro_batches(len(images), self.micro_batches)
        return torch.cat([log_probabilities(network, images[rows], self.autocast).exp() for rows, _ in parts])

    def _forward(self, images: Tensor) -> "Forward":
        if self.micro_batches == 1:
            return Forward(log_probabilities(self.model, images, self.autocast))
        return ForwardInParts(self.model, images, self.autocast, self.micro_batches)

    def _soft_feedback(
        self, proposal: NetworkProposal, step: StudentStep, labelled: Labelled
    ) -> tuple[Tensor, Metrics]:
        """Equation 3 as a term of the objective: weight · Σ T(x) · dR/dq."""
        options, ranks = self.rule.options, self.ranks
        gradient, labelled_loss = step.feedback(labelled.images, labelled.labels, engine=options.engine)
        term = (proposal.targets * fed_back(gradient, step, options, ranks)).sum()
        metrics = {"feedback_loss": labelled_loss, "feedback_norm": norm_over_ranks(gradient, ranks)}
        return options.weight * term, metrics

    def _hard_feedback(
        self, proposal: NetworkProposal, step: StudentStep, labelled: Labelled
    ) -> tuple[Tensor, Metrics]:
        """Weight · (h − b) · Σ CE(ŷ, T(x)), scaled."""
        options, ranks, labels = self.rule.options, self.ranks, proposal.targets
        assert step.labelled_losses is not None
        before, after = step.labelled_losses
        advantage = self._advantage(float(before - after))
        if options.control == "flipped":
            advantage = -advantage
        elif options.control == "shuffled":
            labels = labels[torch.randperm(len(labels), device="cpu").to(labels.device)]
        batch = len(labels) * ranks.world
        scale = feedback_scale(step, options, batch) * ranks.world / (batch if options.scale == "paper" else 1)
        cross_entropy = -(labels * proposal.log_p).sum()  # summed over the batch, nats
        return options.weight * scale * advantage * cross_entropy, {"feedback_loss": after, "h": before - after}

    def _row_feedback(self, proposal: NetworkProposal, step: StudentStep, labelled: Labelled) -> tuple[Tensor, Metrics]:
        """Weight · Σ_i A_i · CE(ŷ_i, T(x_i)) with A_i = −Σ_c (ŷ_ic − T_ic) · dR/dq_ic, scaled."""
        options, ranks, labels = self.rule.options, self.ranks, proposal.targets
        gradient, labelled_loss = step.feedback(labelled.images, labelled.labels, engine=options.engine)
        credit = -((labels - proposal.log_p.detach().exp()) * fed_back(gradient, step, options, ranks)).sum(
            dim=1
        )  # (U,)
        share = 1 / (len(labels) * ranks.world) if options.scale == "paper" else 1.0
        cross_entropy = -(labels * proposal.log_p).sum(dim=1)  # (U,), nats
        metrics = {"feedback_loss": labelled_loss, "feedback_norm": norm_over_ranks(gradient, ranks)}
        return options.weight * share * (credit * cross_entropy).sum(), metrics

    def _advantage(self, h: float) -> float:
        """h − b; only then b takes in h: the baseline must not contain the h that it is taken off."""
        decay = self.rule.options.baseline
        if not decay:
            return h
        advantage = h - (self.moving or 0.0)
        self.moving = h if self.moving is None else decay * self.moving + (1 - decay) * h
        return advantage

    def _sample(self, q: Tensor, step: int) -> Tensor:
        """ŷ ~ Cat(q) as one-hot rows, (U, C); the draw of a row depends on its place in the global batch."""
        u = len(q)
        seed = derive_seed(self.rule.seed, "pseudo labels", step)
        draws = Draws(seed, u * self.ranks.world, u * self.ranks.rank, u)
        chance = draws.uniform("label")[:, None].to(q)
        labels = (q.cumsum(dim=1) < chance * q.sum(dim=1, keepdim=True)).sum(dim=1).clamp(max=q.shape[1] - 1)
        return torch.nn.functional.one_hot(labels, q.shape[1]).to(q.dtype)

    def networks(self) -> Networks:
        return {"teacher": (self.model, self.optimizer)}

    def values(self) -> dict[str, Any]:
        return {"moving": self.moving}

    def load_values(self, values: dict[str, Any]) -> None:
        self.moving = values["moving"]


class Forward:
    """log p of a batch, (N, C), with its graph."""

    def __init__(self, log_p: Tensor) -> None:
        self.log_p = log_p

    def backward(self, objective: Tensor) -> None:
        """Gradients of an objective of `log_p`, into `.grad` of the network."""
        objective.backward()


class ForwardInParts(Forward):
    """The same of several micro-batches, of which only images and random state are kept.

    The backward pass computes each again, to the same masks.
    """

    def __init__(self, model: nn.Module, images: Tensor, autocast: torch.dtype | None, parts: int) -> None:
        self.model, self.autocast = model, autocast
        self._parts, log_ps = [], []
        for rows, _ in micro_batches(len(images), parts):
            self._parts.append((rows, images[rows], random_state(images.device)))
            with torch.no_grad():
                log_ps.append(log_probabilities(model, images[rows], autocast))
        super().__init__(torch.cat(log_ps).requires_grad_())

    def backward(self, objective: Tensor) -> None:
        objective.backward()
        assert self.log_p.grad is not None
        network = bare(self.model)
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        for number, (rows, images, rng) in enumerate(self._parts):
            last = number == len(self._parts) - 1
            with nullcontext() if last else unsynchronised(self.model), replayed_random_numbers(rng, images.device):
                log_probabilities(self.model, images, self.autocast).backward(self.log_p.grad[rows])
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])  # running statistics have moved in the first pass
