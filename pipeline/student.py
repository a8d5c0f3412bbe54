"""The student: one optimiser step on given targets, and the gradient of the labelled loss in those targets.

Nothing here knows where targets come from. A calibrator (Reduced MPL), a teacher network (MPL) or a person's
own object gets its gradient by ordinary backward through its own targets:

    step = student.learn(images, targets.detach())
    (targets * step.target_gradient(labelled_images, labels)).sum().backward()

Source: arXiv:2003.10580v1, equations 1, 2 and 8; the derivation is docs/meta-gradient.md.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.distributed.layouts import average_gradients, bare, running_statistics, unsynchronised
from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.distributed.sharded import clip_gradients, is_sharded, local, sum_over_shards
from pipeline.errors import FeedbackError
from pipeline.feedback import (
    Engine,
    Replay,
    Tensors,
    check_engine,
    directional_derivative,
    labelled_loss,
    labelled_loss_gradient,
    log_probabilities,
    record,
    row_parts,
)
from pipeline.optim import check_rule, update_derivative


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

    @property
    def module(self) -> nn.Module:
        """The bare eager network: without the wrappers of torch.compile and DistributedDataParallel."""
        return bare(self.model)

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
            NonFiniteError: the loss or the gradient is NaN or infinite, on whatever rank; weights and
                optimiser state are untouched, on all ranks.
        """
        targets = targets.detach()
        if replay:
            check_rule(self.optimizer)
        before = None if probe is None else self._labelled_loss(*probe)
        loss, log_p, replays = self._forward_and_backward(images, targets, weight, replay)
        norm = clip_gradients(self.module, self.clip_norm, f"the student's gradient at its step {self.steps_taken + 1}")
        derivative = self._update_derivative() if replay else {}
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.steps_taken += 1
        self._average_statistics()
        step = StudentStep(self, loss, norm, lr, log_p, weight, replays, derivative)
        if probe is not None and before is not None:
            step.labelled_losses = before, self._labelled_loss(*probe)
        return step

    def _forward_and_backward(
        self, images: Tensor, targets: Tensor, weight: Tensor | None, replay: bool
    ) -> tuple[Tensor, Tensor, list[Replay]]:
        """(loss, log p (B, C), what was recorded of each micro-batch); g is in `.grad`, averaged over ranks."""
        parts = row_parts(len(images), self.micro_batches)
        log_ps: list[Tensor] = []
        replays: list[Replay] = []
        loss = torch.zeros((), device=images.device)
        for number, rows in enumerate(parts):
            last = number == len(parts) - 1
            if replay:
                first = replays[0] if replays else None
                replays.append(record(self.module, images[rows], self.autocast, first))
            with nullcontext() if last else unsynchronised(self.model):
                log_p = log_probabilities(self.model, images[rows], self.autocast)  # (b, C)
                row_loss = -(targets[rows].to(log_p.dtype) * log_p).sum(dim=1)  # (b,) nats
                part = (row_loss if weight is None else weight[rows] * row_loss).mean()
                part = part * ((rows.stop - rows.start) / len(images))
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

    def _labelled_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """R at the present weights, the mean over all ranks' labelled images, ()."""
        return self.ranks.mean(
            sum(
                (
                    labelled_loss(self.module, images[rows], labels[rows], self.autocast)
                    * ((rows.stop - rows.start) / len(images))
                    for rows in row_parts(len(images), self.micro_batches)
                ),
                torch.zeros((), device=images.device),
            )
        )

    def _update_derivative(self) -> dict[str, Tensor | float]:
        """D = ∂θ'/∂g of the coming step, by parameter name."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        return {
            name: update_derivative(self.optimizer, groups[id(p)], p, p.grad)
            for name, p in self.module.named_parameters()
            if p.grad is not None and id(p) in groups
        }

    def _average_statistics(self) -> None:
        """Running statistics are the mean of the ranks': the same everywhere, and as many images in them."""
        if self.ranks.world > 1:
            self.ranks.mean_(running_statistics(self.module))


@dataclass
class StudentStep:
    """One step that a student has taken.

    Attributes:
        loss: the training loss, nats, ().
        gradient_norm: before clipping, ().
        learning_rate: η of the step (of the optimiser's first group).
        log_probabilities: log p of the batch before the step, (B, C).
        labelled_loss: R after the step, nats, (); set by `target_gradient`.
        labelled_losses: R before and after the step, nats, ((), ()), where `learn` was given a probe.
    """

    student: Student
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    log_probabilities: Tensor
    weight: Tensor | None = None
    _replays: list[Replay] = field(default_factory=list, repr=False)
    _derivative: dict[str, Tensor | float] = field(default_factory=dict, repr=False)
    labelled_loss: Tensor | None = None
    labelled_losses: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self._taken = self.student.steps_taken
        clipped = self._derivative if self.student.clip_norm is not None else ()
        parameters = dict(self.student.module.named_parameters())
        gradients = {name: parameters[name].grad for name in clipped}  # outlive a zero_grad() of the caller
        self._clipped = {name: local(g) for name, g in gradients.items() if g is not None}

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
            dR/dq, (B, C), nats per unit of probability; detached. With several ranks: of this rank's rows,
            with R the mean over all ranks' labelled images and B the global batch, so that a teacher's
            objective on it, *summed* over the ranks, is that of a single process.

        Raises:
            FeedbackError: the step kept no replay, the student has moved on since, an operation has no
                derivative, or the replayed forward differs from the recorded one.

        Source: arXiv:2003.10580v1, equations 2 and 8; one forward-mode derivative, docs/meta-gradient.md.
        """
        if not self._replays:
            raise FeedbackError("this step was taken with replay=False; feedback needs learn(..., replay=True)")
        module = self.student.module
        check_engine(type(module).__name__, engine, sharded=is_sharded(module), autocast=self.student.autocast)
        if self.student.steps_taken != self._taken:
            raise FeedbackError(
                f"the student has taken {self.student.steps_taken - self._taken} more step(s) since this one; "
                "ask for the gradient before the next learn()"
            )
        gradient = self._labelled_loss_gradient(images, labels)
        direction = self._through_the_update(gradient)
        tangents = [
            directional_derivative(replay, direction, engine, recorded)
            for replay, recorded in zip(self._replays, self._recorded(), strict=True)
        ]
        tangent = tangents[0] if len(tangents) == 1 else torch.cat(tangents)  # (B, C)
        result = -tangent / (len(tangent) * self.student.ranks.world)
        return result if self.weight is None else result * self.weight[:, None]

    def _recorded(self) -> tuple[Tensor, ...]:
        """log p of each micro-batch."""
        return self.log_probabilities.split([len(replay.images) for replay in self._replays])

    def _labelled_loss_gradient(self, images: Tensor, labels: Tensor) -> Tensors:
        """∇R at the present weights, by name: the mean over all ranks' labelled images."""
        student, parts = self.student, row_parts(len(images), self.student.micro_batches)
        total: Tensors = {}
        loss = torch.zeros((), device=images.device)
        for rows in parts:
            part, gradient = labelled_loss_gradient(student.module, images[rows], labels[rows], student.autocast)
            share = (rows.stop - rows.start) / len(images)
            loss = loss + part * share
            for name, g in gradient.items():
                total[name] = total[name].add_(g, alpha=share) if name in total else g.mul_(share)
            del gradient  # before the next one is there
        student.ranks.mean_([loss] if is_sharded(student.module) else [loss, *total.values()])
        self.labelled_loss = loss
        return total

    def _through_the_update(self, gradient: Tensors) -> Tensors:
        """v = (∂θ'/∂g₀)ᵀ ∇R, with g₀ the gradient before clipping. Overwrites `gradient`."""
        v = {name: gradient[name].mul_(d) for name, d in self._derivative.items() if name in gradient}
        clip, n = self.student.clip_norm, self.gradient_norm
        if clip is None or clip / (n + 1e-6) >= 1:
            return v
        scale = clip / (n + 1e-6)
        raw = {name: g / scale for name, g in self._clipped.items()}
        along = sum(((v[name] * raw[name]).sum() for name in v), torch.zeros_like(n))
        along = sum_over_shards(self.student.module, along)
        clipped_away = along / (n * (n + 1e-6))
        return {name: scale * (v.get(name, 0.0) - g * clipped_away) for name, g in raw.items()}
