"""R, the student's cross-entropy on labelled images, and ∇R: with batch statistics, without dropout or drop path."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed.ranks import Ranks
from pipeline.distributed.sharded import is_sharded, local, reshard
from pipeline.errors import FeedbackError, UsageError
from pipeline.gradient.micro_batches import micro_batches
from pipeline.gradient.replay import Tensors, call_with, log_probabilities, training_modes


@dataclass(frozen=True)
class LabelledLoss:
    """R of a network at its present weights: the mean over all ranks' labelled images, (V, 3, H, W) on each.

    Attributes:
        module: the bare network.
        autocast: dtype of mixed precision, or None.
        ranks: each has equally many images.
        micro_batches: parts in which the images are taken; batch statistics are each part's own.
    """

    module: nn.Module
    autocast: torch.dtype | None
    ranks: Ranks
    micro_batches: int

    def value(self, images: Tensor, labels: Tensor) -> Tensor:
        """R, nats, ()."""
        check_labels(images, labels)
        total = torch.zeros((), device=images.device)
        for rows, share in micro_batches(len(images), self.micro_batches):
            total = total + labelled_loss(self.module, images[rows], labels[rows], self.autocast) * share
        return self.ranks.mean(total)

    def gradient(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensors]:
        """R, and ∇R by name; of a sharded network this process's part.

        Raises:
            UsageError: there is no image, or labels are no class indices.
        """
        check_labels(images, labels)
        loss, total = torch.zeros((), device=images.device), Tensors()
        for rows, share in micro_batches(len(images), self.micro_batches):
            part, gradient = labelled_loss_gradient(self.module, images[rows], labels[rows], self.autocast)
            loss = loss + part * share
            for name, g in gradient.items():
                total[name] = total[name].add_(g, alpha=share) if name in total else g.mul_(share)
            del gradient  # before the next one is there
        self.ranks.mean_([loss] if is_sharded(self.module) else [loss, *total.values()])
        return loss, total


def check_labels(images: Tensor, labels: Tensor) -> None:
    """Refuse what is no labelled image with its class.

    Raises:
        UsageError: says what is expected.
    """
    if not len(images):
        raise UsageError("feedback needs at least one labelled image")
    if labels.shape != images.shape[:1] or labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise UsageError(
            f"labels must be class indices, int64 ({len(images)},), and are {labels.dtype} {tuple(labels.shape)}; "
            "feedback on soft labels is not implemented"
        )


def labelled_loss_modes(module: nn.Module) -> dict[str, bool]:
    """Modes in which R is taken: batch statistics as in training, no dropout and no drop path."""
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    return {name: isinstance(m, batch_norm) and m.training for name, m in module.named_modules()}


@torch.no_grad()
def labelled_loss(module: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None) -> Tensor:
    """R = CE(labels, p(images; θ)) at the network's present weights, nats, ().

    Neither the running statistics nor the random state is touched.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with training_modes(module, labelled_loss_modes(module)):
        log_p = log_probabilities(lambda x: call_with(module, buffers, x), images, autocast)
    reshard(module)
    return F.nll_loss(log_p, labels)


def labelled_loss_gradient(
    module: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None
) -> tuple[Tensor, Tensors]:
    """R = CE(labels, p(images; θ')) at the network's present weights, and ∇R by name.

    Neither `.grad`, nor the running statistics, nor the random state is touched. Of a sharded network, ∇R is
    this process's part, already averaged over the ranks.
    """
    if is_sharded(module):
        return _sharded_labelled_loss_gradient(module, images, labels, autocast)
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    fixed = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    modes = labelled_loss_modes(module)
    with torch.enable_grad(), training_modes(module, modes):  # also while checkpointed blocks are run again
        loss = F.nll_loss(
            log_probabilities(lambda x: call_with(module, parameters | fixed | buffers, x), images, autocast),
            labels,
        )
        try:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise FeedbackError(
                f"{type(module).__name__} checkpoints activations with use_reentrant=True, which has no gradient of R "
                "beside the step's own; set use_reentrant=False"
            ) from error
    named = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return loss.detach(), in_memory_of_their_own(named)


def _sharded_labelled_loss_gradient(
    module: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None
) -> tuple[Tensor, Tensors]:
    """By an ordinary backward pass, in which FSDP2 reduces the gradients; `.grad` is put back afterwards."""
    reshard(module)
    parameters = dict(module.named_parameters())
    kept = {name: p.grad for name, p in parameters.items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for p in parameters.values():
        p.grad = None
    try:
        with torch.enable_grad(), training_modes(module, labelled_loss_modes(module)):
            log_p = log_probabilities(lambda x: call_with(module, buffers, x), images, autocast)
            loss = F.nll_loss(log_p, labels)
            loss.backward()
        gradient = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    finally:
        for name, p in parameters.items():
            p.grad = kept[name]
    return loss.detach(), gradient


def in_memory_of_their_own(tensors: Tensors) -> Tensors:
    """The same tensors, safe to change in place.

    Autograd may give one tensor to two parameters (a class token and its position, with one image), or one whose
    elements share memory.
    """
    seen: set[int] = set()
    result = {}
    for name, t in tensors.items():
        storage = t.untyped_storage()
        own = storage._cdata not in seen and storage.nbytes() >= t.numel() * t.element_size()
        seen.add(storage._cdata)  # not its address, which a tensor without data has not
        result[name] = t if own else t.clone(memory_format=torch.contiguous_format)
    return result
