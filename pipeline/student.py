"""The student: one optimiser step on given targets, and the gradient of the labelled loss in those targets.

Nothing here knows where targets come from. A calibrator (Reduced MPL), a teacher network (MPL) or a person's
own object gets its gradient by ordinary backward through its own targets:

    step = student.learn(images, targets.detach())
    (targets * step.target_gradient(labelled_images, labels)).sum().backward()

Source: arXiv:2003.10580v1, equations 1, 2 and 8; the derivation is docs/meta-gradient.md.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.distributed.layouts import average_gradients, bare, running_statistics, unsynchronised
from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.distributed.sharded import clip_gradients, is_sharded
from pipeline.errors import FeedbackError, NonFiniteError, UsageError
from pipeline.gradient.derivative import Engine, check_engine, directional_derivative
from pipeline.gradient.labelled_loss import LabelledLoss
from pipeline.gradient.micro_batches import micro_batches
from pipeline.gradient.repeatable import CHECKS, check_repeatable
from pipeline.gradient.replay import Replay, log_probabilities, record
from pipeline.gradient.update_rules import Update, check_hooks, check_rule


class Student:
    """A classifier and its optimiser.

    Args:
        model: any classifier, images (B, 3, H, W) → logits (B, C), in the mode it shall train in; bare,
            compiled, or laid over processes by `pipeline.distributed.layouts`.
        optimizer: SGD (momentum, Nesterov), RMSprop, timm's RMSpropTF, Adam or AdamW over its parameters.
            Another one works while no feedback is asked for.
        clip_norm: clip the gradient to this global norm, as torch does.
        autocast: dtype of mixed precision (torch.bfloat16), or None.
        ranks: the processes that train it together, each on its own rows of the global batch, equally many;
            gradients are those of the global batch.
        micro_batches: parts in which a batch is taken, for memory; the step and its feedback are those of
            the whole batch, but for batch statistics, which are each part's own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        ranks: Ranks = ALONE,
        micro_batches: int = 1,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.autocast = autocast
        self.ranks = ranks
        self.micro_batches = micro_batches
        self.steps_taken = 0
        self._checks_left = CHECKS

    @property
    def module(self) -> nn.Module:
        """The bare eager network: without the wrappers of torch.compile and DistributedDataParallel."""
        return bare(self.model)

    @property
    def labelled_loss(self) -> LabelledLoss:
        """R at the present weights."""
        return LabelledLoss(self.module, self.autocast, self.ranks, self.micro_batches)

    def learn(
        self,
        images: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        *,
        replay: bool = True,
        probe: tuple[Tensor, Tensor] | None = None,
    ) -> "StudentStep":
        """One optimiser step on −mean over the batch of weight · Σ_c targets_c log p_c.

        With several ranks the arguments are this rank's rows, and the batch is that of all ranks.

        Args:
            images: (B, 3, H, W), as the network expects them.
            targets: (B, C), rows are distributions; never differentiated here.
            weight: optional, (B,), a weight per row.
            replay: keep what `target_gradient` needs (one copy of the weights and one of the update's
                derivative); False for a step that gets no feedback.
            probe: labelled images (V, 3, H, W) and labels (V,), int64: take R before and after the step.

        Raises:
            UsageError: the arguments are not of these shapes, or the network returns no logits (B, C).
            FeedbackError: the optimiser has no derivative here, a hook may change its step, or the network does
                not do the same twice (which the first steps try out).
            NonFiniteError: the loss or the gradient is NaN or infinite, on whatever rank; weights and
                optimiser state are untouched, on all ranks.
        """
        targets = targets.detach()
        weight = None if weight is None else weight.detach().clone()  # the caller may change it
        _check_batch(images, targets, weight)
        if replay:
            check_rule(self.optimizer)
            if not is_sharded(self.module):  # whose own machinery hangs on hooks
                check_hooks(self.module, self.optimizer)
        before = None if probe is None else self.labelled_loss.value(*probe)
        loss, log_p, replays = self._forward_and_backward(images, targets, weight, replay)
        if replay and self._checks_left:
            compiled = self.module is not self.model and hasattr(self.model, "_orig_mod")
            check_repeatable(replays[0], log_p[: len(replays[0].images)], compiled=compiled)
            self._checks_left -= 1
        norm = clip_gradients(self.module, self.clip_norm, f"the student's gradient at its step {self.steps_taken + 1}")
        update = Update.coming(self.module, self.optimizer, self.clip_norm, norm) if replay else None
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.steps_taken += 1
        self._average_statistics()
        after = None if probe is None else self.labelled_loss.value(*probe)
        losses = None if before is None or after is None else (before, after)
        return StudentStep(self, loss, norm, lr, log_p, weight, losses, replays, update)

    def _versions(self) -> list[int]:
        """Grow when the weights change, by whomever; of shards nothing is told."""
        return [] if is_sharded(self.module) else [p._version for p in self.module.parameters()]

    def _forward_and_backward(
        self, images: Tensor, targets: Tensor, weight: Tensor | None, replay: bool
    ) -> tuple[Tensor, Tensor, list[Replay]]:
        """(loss, log p (B, C), what was recorded of each micro-batch); g is in `.grad`, averaged over ranks."""
        parts = micro_batches(len(images), self.micro_batches)
        log_ps: list[Tensor] = []
        replays: list[Replay] = []
        loss = torch.zeros((), device=images.device)
        for number, (rows, share) in enumerate(parts):
            last = number == len(parts) - 1
            if replay:
                replays.append(record(self.module, images[rows], self.autocast, replays[0] if replays else None))
            with nullcontext() if last else unsynchronised(self.model):
                log_p = log_probabilities(self.model, images[rows], self.autocast)  # (b, C)
                row_loss = -(targets[rows].to(log_p.dtype) * log_p).sum(dim=1)  # (b,) nats
                part = (row_loss if weight is None else weight[rows] * row_loss).mean() * share
                loss = loss + part.detach()
                if last:
                    loss = self._agreed(loss)
                if number == 0:
                    self.optimizer.zero_grad(set_to_none=True)
                part.backward()
            log_ps.append(log_p.detach())
        average_gradients(self.model, self.ranks)
        return loss, torch.cat(log_ps) if len(log_ps) > 1 else log_ps[0], replays

    def _agreed(self, loss: Tensor) -> Tensor:
        """The loss over all ranks, before any of them goes on to the backward pass."""
        losses = self.ranks.finite(float(loss), f"the student's loss at its step {self.steps_taken + 1}")
        return loss if self.ranks.world == 1 else loss.new_tensor(sum(losses) / len(losses))

    def _average_statistics(self) -> None:
        """Running statistics are the mean of the ranks': the same everywhere, and as many images in them."""
        if self.ranks.world > 1:
            self.ranks.mean_(running_statistics(self.module))


def _check_batch(images: Tensor, targets: Tensor, weight: Tensor | None) -> None:
    if not len(images):
        raise UsageError("a step needs at least one image")
    if targets.ndim != 2 or len(targets) != len(images):
        raise UsageError(f"targets must be (B, C) = ({len(images)}, C), and are {tuple(targets.shape)}")
    if weight is not None and weight.shape != (len(images),):
        raise UsageError(f"weight must be (B,) = ({len(images)},), one for each row, and is {tuple(weight.shape)}")


class Feedback(NamedTuple):
    """What labelled images say of a step.

    Attributes:
        gradient: dR/dq, (B, C), nats per unit of probability; detached.
        labelled_loss: R after the step, nats, ().
    """

    gradient: Tensor
    labelled_loss: Tensor


@dataclass
class StudentStep:
    """One step that a student has taken.

    Attributes:
        loss: the training loss, nats, ().
        gradient_norm: before clipping, ().
        learning_rate: η of the step (of the optimiser's first group).
        log_probabilities: log p of the batch before the step, (B, C).
        weight: of each row, (B,), or None.
        labelled_losses: R before and after the step, nats, ((), ()), where `learn` was given a probe.
    """

    student: Student
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    log_probabilities: Tensor
    weight: Tensor | None = None
    labelled_losses: tuple[Tensor, Tensor] | None = None
    _replays: list[Replay] = field(default_factory=list, repr=False)
    _update: Update | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._taken, self._versions = self.student.steps_taken, self.student._versions()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """For the log."""
        return {"loss": self.loss, "gradient_norm": self.gradient_norm}

    def target_gradient(self, images: Tensor, labels: Tensor, *, engine: Engine = "exact") -> Tensor:
        """Gradient of the labelled loss after this step with respect to this step's targets.

        As `feedback`, which also returns that loss: dR/dq, (B, C), nats per unit of probability; detached.
        """
        return self.feedback(images, labels, engine=engine).gradient

    def feedback(self, images: Tensor, labels: Tensor, *, engine: Engine = "exact") -> Feedback:
        """The labelled loss after this step, and its gradient with respect to this step's targets.

        R is the mean cross-entropy of the labelled images at the weights after the step, with the batch
        statistics of those images and without dropout or drop path. Running statistics, gradients and
        random state are left as they are.

        Args:
            images: labelled images, (V, 3, H, W), on the student's device.
            labels: class indices, (V,), int64.
            engine: "exact" (forward mode), or finite differences: "central", "one_sided".

        Returns:
            dR/dq, (B, C), and R, (). With several ranks: dR/dq of this rank's rows, with R the mean over all
            ranks' labelled images and B the global batch, so that a teacher's objective on it, *summed* over
            the ranks, is that of a single process.

        Raises:
            UsageError: there is no labelled image, or the labels are no class indices.
            NonFiniteError: R is NaN or infinite.
            FeedbackError: the step kept no replay, the student has moved on since, an operation has no
                derivative, or the replayed forward differs from the recorded one.

        Source: arXiv:2003.10580v1, equations 2 and 8; one forward-mode derivative, docs/meta-gradient.md.
        """
        update, student = self._replayable(engine), self.student
        loss, gradient = student.labelled_loss.gradient(images, labels)  # ∇R at θ'
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the labelled loss is {float(loss)}: a labelled image or the network is not finite")
        direction = update.pull_back(gradient)  # v = (∂θ'/∂g)ᵀ ∇R
        recorded = self.log_probabilities.split([len(replay.images) for replay in self._replays])
        tangents = [
            directional_derivative(replay, direction, engine, log_p)  # d log p(x; θ) along v
            for replay, log_p in zip(self._replays, recorded, strict=True)
        ]
        tangent = tangents[0] if len(tangents) == 1 else torch.cat(tangents)  # (B, C)
        result = -tangent / (len(tangent) * student.ranks.world)
        return Feedback(result if self.weight is None else result * self.weight[:, None], loss)

    def _replayable(self, engine: Engine) -> Update:
        """The update, of a step whose feedback can be had."""
        if self._update is None:
            raise FeedbackError("this step was taken with replay=False; feedback needs learn(..., replay=True)")
        module = self.student.module
        check_engine(type(module).__name__, engine, sharded=is_sharded(module), autocast=self.student.autocast)
        if self.student.steps_taken != self._taken:
            raise FeedbackError(
                f"the student has taken {self.student.steps_taken - self._taken} more step(s) since this one; "
                "ask for the gradient before the next learn()"
            )
        if self.student._versions() != self._versions:
            raise FeedbackError(
                "the student's weights were changed since this step, not by learn(); ask for the gradient before that"
            )
        return self._update
