"""Optimisers, learning-rate schedules and the moving average of a training, from a recipe's settings."""

import math
from collections.abc import Callable

import torch
from timm.optim import RMSpropTF
from torch import Tensor, nn

from pipeline.config import OptimizerSettings, ScheduleSettings

Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser of `settings` over the trainable parameters of `model`.

    Weight decay spares biases and normalisation (parameters with fewer than two dimensions) unless
    `settings.decay_norm`.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            spare = parameter.ndim < 2 and not settings.decay_norm
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, momentum = settings.lr, settings.momentum
    match settings.rule:
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=momentum)
        case "nesterov":
            return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=lr, alpha=settings.alpha, eps=settings.eps, momentum=momentum)
        case "rmsprop_tf":
            return RMSpropTF(groups, lr=lr, alpha=settings.alpha, eps=settings.eps, momentum=momentum)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps)


def learning_rate(settings: ScheduleSettings, base: float, step: int, steps: int) -> float:
    """Learning rate of step `step` (counted from 0) of `steps`: linear warm-up, then the schedule.

    Warm-up ends at `base` on step `warmup_steps`; its first step is not zero, so that no step is idle.
    """
    if step < settings.warmup_steps:
        return base * (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    match settings.kind:
        case "constant":
            return base
        case "cosine":
            final = base * settings.final_fraction
            return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, done)))
        case "exponential":
            return base * settings.decay_rate ** ((step - settings.warmup_steps) // settings.decay_every)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def average_with_warmup(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Moving average with decay min(decay, (1 + t) / (10 + t)) for torch's `AveragedModel`.

    Batch statistics are averaged with the weights; counters are copied. The form of the early decay is
    that of TensorFlow's ExponentialMovingAverage, which the paper's code uses.
    """

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        t = int(count)
        weight = 1.0 - min(decay, (1 + t) / (10 + t))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)

    return update
