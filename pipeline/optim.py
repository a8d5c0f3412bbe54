"""Optimisers, learning-rate schedules, and for each optimiser the derivative of its update.

The derivative D = ∂θ'/∂g (diagonal for every rule here) is what carries the labelled loss back through
the student's step; see docs/meta-gradient.md. It is evaluated from the state *before* the step, which
keeps the formulas free of the cancellations that the textbook forms have in the first steps.

Source: arXiv:2003.10580v1, appendix B, extended to the rules of torch and TensorFlow as implemented.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import RMSpropTF
from torch import Tensor, nn

from pipeline.config import OptimizerSettings, ScheduleSettings
from pipeline.distributed.sharded import local
from pipeline.errors import FeedbackError

Group = dict[str, Any]  # one entry of optimizer.param_groups
Tensors = tuple[Tensor, ...] | list[Tensor]
State = dict[str, Any]  # optimizer.state[parameter]; empty before the first step


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


# --- the derivative of one update in the gradient that the rule sees -----------------------------------


def check_rule(optimizer: torch.optim.Optimizer) -> None:
    """Refuse by name what has no derivative here.

    Raises:
        FeedbackError: the optimiser, or an option of it, changes the update in a way not derived.
    """
    if type(optimizer) not in DERIVATIVES:
        known = ", ".join(rule.__name__ for rule in DERIVATIVES)
        raise FeedbackError(
            f"no derivative is known for {type(optimizer).__name__}; feedback works with {known}. "
            "Use one of those, or train with teacher 'fixed', which needs no feedback"
        )
    for group in optimizer.param_groups:
        for option in ("dampening", "centered", "amsgrad", "maximize", "caution"):
            if group.get(option):
                raise FeedbackError(
                    f"{type(optimizer).__name__}({option}={group[option]!r}) changes the update in a way "
                    f"whose derivative is not implemented; construct it without {option}"
                )


def update_derivative(
    optimizer: torch.optim.Optimizer, group: Group, parameter: Tensor, gradient: Tensor
) -> Tensor | float:
    """D = ∂θ'/∂g at the step about to be taken, elementwise, of `parameter`'s shape (or one number).

    Args:
        optimizer: the optimiser *before* its step.
        group: the group of `optimizer.param_groups` that holds `parameter`.
        parameter: θ.
        gradient: the gradient as the optimiser receives it (after clipping, before weight decay).

    Of a sharded parameter all this is this process's part, elementwise as it is.
    """
    gradient = local(gradient)
    if group.get("weight_decay") and not decay_is_decoupled(optimizer, group):
        gradient = gradient + group["weight_decay"] * local(parameter.detach())
    state = {name: local(value) for name, value in optimizer.state.get(parameter, {}).items()}
    return DERIVATIVES[type(optimizer)](group, state, gradient)


def decay_is_decoupled(optimizer: torch.optim.Optimizer, group: Group) -> bool:
    """Whether weight decay acts beside the rule (it then leaves D alone) instead of through g."""
    named = group.get("decoupled_weight_decay", group.get("decoupled_decay"))
    return isinstance(optimizer, torch.optim.AdamW) if named is None else bool(named)


def sgd_derivative(group: Group, state: State, gradient: Tensor) -> float:
    """−η; Nesterov −η(1 + μ). The momentum of earlier steps does not depend on this gradient."""
    lr = float(group["lr"])
    return -lr * (1 + group["momentum"]) if group["nesterov"] else -lr


def rmsprop_derivative(group: Group, state: State, gradient: Tensor) -> Tensor:
    """torch's RMSprop, ε outside the root: with s² = α·r + (1 − α)g², D = −η (α·r/s + ε) / (s + ε)²."""
    alpha, eps = group["alpha"], group["eps"]
    carried = alpha * state["square_avg"] if state else torch.zeros_like(gradient)
    s = torch.addcmul(carried, gradient, gradient, value=1 - alpha).sqrt_()
    ratio = safe_ratio(carried, s).add_(eps)
    return ratio.div_(s.add_(eps).square_()).mul_(-float(group["lr"]))


def rmsprop_tf_derivative(group: Group, state: State, gradient: Tensor) -> Tensor:
    """TensorFlow's RMSprop, ε inside, average started at one: D = −η (α·r + ε)(r' + ε)^(−3/2)."""
    alpha, eps = group["alpha"], group["eps"]
    carried = alpha * state["square_avg"] if state else torch.full_like(gradient, alpha)
    carried += eps
    root = torch.addcmul(carried, gradient, gradient, value=1 - alpha).rsqrt_()
    return carried.mul_(root).mul_(root).mul_(root).mul_(-float(group["lr"]))


def adam_derivative(group: Group, state: State, gradient: Tensor) -> Tensor:
    """Adam and AdamW.

    With b_i = 1 − β_iᵗ and s = √(v'/b₂): D = −η {[(1−β₁)β₂v − β₁(1−β₂)m·g]/(b₁b₂s) + (1−β₁)ε/b₁} / (s+ε)².
    """
    (beta1, beta2), eps = group["betas"], group["eps"]
    t = float(state["step"]) + 1 if state else 1.0
    m = state["exp_avg"] if state else torch.zeros_like(gradient)
    v = state["exp_avg_sq"] if state else torch.zeros_like(gradient)
    b1, b2 = 1 - float(beta1) ** t, 1 - float(beta2) ** t
    s = ((beta2 * v + (1 - beta2) * gradient.square()) / b2).sqrt()
    curve = ((1 - beta1) * beta2 * v - beta1 * (1 - beta2) * m * gradient) / (b1 * b2)
    return -float(group["lr"]) * (safe_ratio(curve, s) + (1 - beta1) * eps / b1) / (s + eps).square()


def safe_ratio(numerator: Tensor, s: Tensor) -> Tensor:
    """numerator / s, and 0 where s = 0: there the numerator vanishes faster than s."""
    return torch.where(s > 0, numerator / torch.where(s > 0, s, 1.0), 0.0)


DERIVATIVES: dict[type[torch.optim.Optimizer], Callable[[Group, State, Tensor], Tensor | float]] = {
    torch.optim.SGD: sgd_derivative,
    torch.optim.RMSprop: rmsprop_derivative,
    RMSpropTF: rmsprop_tf_derivative,
    torch.optim.Adam: adam_derivative,
    torch.optim.AdamW: adam_derivative,
}
