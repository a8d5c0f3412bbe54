"""The teacher of full Meta Pseudo Labels: a network with a method's own loss and the student's feedback.

Source: arXiv:2003.10580v4, sections 2 and 3, equations 3 to 5; docs/meta-gradient.md.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.config import FeedbackKind, MplFeedbackSettings, ScheduleSettings
from pipeline.data.augment.draws import Draws
from pipeline.distributed import ALONE, Ranks
from pipeline.distributed.layouts import average_gradients, bare, running_statistics, unsynchronised
from pipeline.distributed.sharded import clip_gradients
from pipeline.feedback import log_probabilities, random_state, replayed_random_numbers, row_parts
from pipeline.methods import Lesson, Method, Rows
from pipeline.named_tensors import Networks
from pipeline.optim import learning_rate, set_learning_rate
from pipeline.seeds import derive_seed
from pipeline.student import StudentStep
from pipeline.teachers import Batch, Labelled, Metrics, Wish, fed_back, feedback_scale, norm_over_ranks


class TeacherNetwork:
    """Gives the student its targets, and learns from a lesson of its own and from the student's labelled loss.

    Feedback, added to the loss of the lesson:
        soft: targets are T(x), and Σ T(x) · dR/dq is the exact equation 3.
        hard: targets are sampled, ŷ ~ T(x), and (h − b) · Σ CE(ŷ, T(x)) with h = R(θ) − R(θ'), the labelled
            loss before the student's step minus the one after. Its mean over ŷ is ∇_Ψ E[R(θ'(ŷ))]; by default,
            `scale: paper`, the cross-entropy is the mean over the batch instead of the sum.
            b is a moving average of *earlier* h, where one is asked for.
        none: targets are T(x), and the teacher learns from its lesson alone.

    Args:
        model: the network, on its device, in training mode.
        optimizer: of its parameters.
        method: makes the lesson.
        feedback: kind.
        options: of the feedback.
        schedule, base_lr, steps: of its learning rate.
        seed: of the sampled labels.
        clip_norm: of its gradient, or None.
        autocast: dtype of mixed precision, or None.
        ranks: the processes that share the batch.
        micro_batches: parts in which the network takes its images, for memory; from 2 on each part goes forward
            twice, and batch statistics are each part's own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        feedback: FeedbackKind,
        options: MplFeedbackSettings,
        *,
        schedule: ScheduleSettings,
        base_lr: float,
        steps: int,
        seed: int,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        ranks: Ranks = ALONE,
        micro_batches: int = 1,
    ) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.feedback, self.options = feedback, options
        self.schedule, self.base_lr, self.steps, self.seed = schedule, base_lr, steps, seed
        self.clip_norm, self.autocast, self.ranks, self.micro_batches = clip_norm, autocast, ranks, micro_batches
        self.moving: float | None = None  # average of earlier h

    def __call__(self, batch: Batch) -> Tensor:
        """Targets of the student's images, (U, C): T(x), differentiable, or sampled one-hot rows."""
        assert batch.views is not None
        lesson = self.method.lesson(batch.views, self.predict)
        self._lesson, images = lesson, join(lesson)
        appended = lesson.pool is None or lesson.pool.images is not batch.images
        log_p = self._forward(torch.cat([images, batch.images]) if appended else images)  # (N, C), or
        # (N + U, C) where the lesson does not hold the student's images
        self._lesson_log_p, self._pool_log_p = log_p[: len(images)], log_p[-len(batch.images) :]
        q = self._pool_log_p.exp()
        return self._sample(q.detach(), batch.views.step) if self.feedback == "hard" else q

    def _forward(self, images: Tensor) -> Tensor:
        """log T(x), differentiable; of several micro-batches only their images and random state are kept."""
        if self.micro_batches == 1:
            return log_probabilities(self.model, images, self.autocast)
        self._parts, found = [], []
        for rows in row_parts(len(images), self.micro_batches):
            self._parts.append((rows, images[rows], random_state(images.device)))
            with torch.no_grad():
                found.append(log_probabilities(self.model, images[rows], self.autocast))
        self._log_p = torch.cat(found).requires_grad_()
        return self._log_p

    def _backward(self, objective: Tensor) -> None:
        """Into `.grad` of the network: through log T(x) of each micro-batch, computed again, to the same masks."""
        objective.backward()
        if self.micro_batches == 1:
            return
        assert self._log_p.grad is not None
        network = bare(self.model)
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        for number, (rows, images, rng) in enumerate(self._parts):
            last = number == len(self._parts) - 1
            with nullcontext() if last else unsynchronised(self.model), replayed_random_numbers(rng, images.device):
                log_probabilities(self.model, images, self.autocast).backward(self._log_p.grad[rows])
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])  # running statistics have moved in the first pass
        del self._parts, self._log_p

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """T(x), (B, C), without a gradient, in training mode."""
        network, parts = bare(self.model), row_parts(len(images), self.micro_batches)
        return torch.cat([log_probabilities(network, images[rows], self.autocast).exp() for rows in parts])

    def wish(self, step: int) -> Wish:
        if self.feedback == "none" or not self.options.weight or step % self.options.every:
            return "nothing"
        return "gradient" if self.feedback == "soft" else "losses"

    def adapt(self, step: StudentStep | None, targets: Tensor, batch: Batch, labelled: Labelled | None) -> Metrics:
        """One optimiser step on the lesson's loss plus the feedback; returns what to log."""
        assert batch.views is not None
        lesson = self._lesson
        objective = lesson_loss(lesson, self._lesson_log_p)
        metrics = {"teacher_loss": objective.detach()}
        if lesson.pool is not None and lesson.pool.weight is not None:
            metrics["teacher_pool_share"] = (lesson.pool.weight > 0).float().mean()
        if step is not None and labelled is not None:
            term, found = self._feedback(step, targets, labelled)
            objective, metrics = objective + term, metrics | found
        self.ranks.finite(float(objective.detach()), "the teacher's objective")
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(objective)
        average_gradients(self.model, self.ranks)
        clip_gradients(bare(self.model), self.clip_norm, "the teacher's gradient")
        set_learning_rate(self.optimizer, learning_rate(self.schedule, self.base_lr, batch.views.step, self.steps))
        self.optimizer.step()
        self.ranks.mean_(running_statistics(bare(self.model)))
        del self._lesson, self._lesson_log_p, self._pool_log_p  # with the graph
        return metrics

    def _feedback(self, step: StudentStep, targets: Tensor, labelled: Labelled) -> tuple[Tensor, Metrics]:
        """The feedback's term of the objective."""
        options, ranks = self.options, self.ranks
        if self.feedback == "soft":
            gradient = step.target_gradient(labelled.images, labelled.labels, engine=options.engine)
            assert step.labelled_loss is not None
            term = (targets * fed_back(gradient, step, options, ranks)).sum()
            metrics = {"feedback_loss": step.labelled_loss, "feedback_norm": norm_over_ranks(gradient, ranks)}
            return options.weight * term, metrics
        assert step.labelled_losses is not None
        before, after = step.labelled_losses
        h = float(before - after)
        advantage = h - (self.moving or 0.0) if options.baseline else h
        if options.baseline:  # only now: the baseline must not contain the h that it is taken off
            self.moving = h if self.moving is None else options.baseline * self.moving + (1 - options.baseline) * h
        labels = targets
        if options.control == "flipped":
            advantage = -advantage
        elif options.control == "shuffled":
            labels = targets[torch.randperm(len(targets), device="cpu").to(targets.device)]
        batch = len(targets) * ranks.world
        scale = feedback_scale(step, options, batch) * ranks.world / (batch if options.scale == "paper" else 1)
        cross_entropy = -(labels * self._pool_log_p).sum()  # summed over the batch, nats
        return options.weight * scale * advantage * cross_entropy, {"feedback_loss": after, "h": before - after}

    def _sample(self, q: Tensor, step: int) -> Tensor:
        """ŷ ~ Cat(q) as one-hot rows, (U, C); the draw of a row depends on its place in the global batch."""
        u = len(q)
        draws = Draws(derive_seed(self.seed, "pseudo labels", step), u * self.ranks.world, u * self.ranks.rank, u)
        chance = draws.uniform("label")[:, None].to(q)
        labels = (q.cumsum(dim=1) < chance * q.sum(dim=1, keepdim=True)).sum(dim=1).clamp(max=q.shape[1] - 1)
        return torch.nn.functional.one_hot(labels, q.shape[1]).to(q.dtype)

    def networks(self) -> Networks:
        return {"teacher": (self.model, self.optimizer)}

    def values(self) -> dict[str, Any]:
        return {"moving": self.moving}

    def load_values(self, values: dict[str, Any]) -> None:
        self.moving = values["moving"]


def join(lesson: Lesson) -> Tensor:
    """All images of a lesson, labelled ones first, (N, 3, S, S)."""
    if lesson.pool is None:
        return lesson.labelled.images
    return torch.cat([lesson.labelled.images, lesson.pool.images])


def lesson_rows(lesson: Lesson) -> tuple[Tensor, Tensor]:
    """(targets (N, C), weights (N,)) with which the mean over the N rows is the lesson's loss."""
    parts = [lesson.labelled] if lesson.pool is None else [lesson.labelled, lesson.pool]
    n = sum(len(part.targets) for part in parts)
    return torch.cat([part.targets for part in parts]), torch.cat([row_weights(part, n) for part in parts])


def row_weights(rows: Rows, n: int) -> Tensor:
    """Weights that turn a mean over n rows into the mean over these."""
    weight = torch.ones(len(rows.targets), device=rows.targets.device) if rows.weight is None else rows.weight
    return weight * (n / len(rows.targets))


def lesson_loss(lesson: Lesson, log_p: Tensor) -> Tensor:
    """Mean of weighted cross-entropy over the labelled rows plus the same over the pool's, nats, ()."""
    targets, weight = lesson_rows(lesson)
    return -(weight.to(log_p.dtype) * (targets.to(log_p.dtype) * log_p).sum(dim=1)).mean()
