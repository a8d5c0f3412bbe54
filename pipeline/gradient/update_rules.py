"""D, the derivative of each optimiser's update in the gradient that it sees, and through clipping.

D = ∂θ'/∂g (diagonal for every rule here) is what carries the labelled loss back through the student's step; see
docs/meta-gradient.md. It is evaluated from the state *before* the step, which keeps the formulas free of the
cancellations that the textbook forms have in the first steps.

Source: arXiv:2003.10580v1, appendix B, extended to the rules of torch and TensorFlow as implemented.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import RMSpropTF
from torch import Tensor, nn

from pipeline.distributed.sharded import local, sum_over_shards
from pipeline.errors import FeedbackError
from pipeline.gradient.replay import Tensors

Group = dict[str, Any]  # one entry of optimizer.param_groups
State = dict[str, Any]  # optimizer.state[parameter]; empty before the first step


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


def check_hooks(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse hooks that may change a gradient or a step on its way: their derivative is not known.

    A hook that only looks says so: `hook.observes = True`.

    Raises:
        FeedbackError: says where there is one.
    """
    hooks = [
        (f"parameter {n}", (p._backward_hooks, p._post_accumulate_grad_hooks)) for n, p in module.named_parameters()
    ]
    hooks += [(f"module {n}", (m._backward_hooks, m._backward_pre_hooks)) for n, m in module.named_modules()]
    steps = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    for where, kinds in [*hooks, (type(optimizer).__name__, steps)]:
        if any(not getattr(hook, "observes", False) for kind in kinds for hook in (kind or {}).values()):
            raise FeedbackError(
                f"{where} has a hook, which may change the gradient or the step in a way whose derivative is not "
                "known. Remove it; or, if it only looks, say so by hook.observes = True; or learn(..., replay=False)"
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


@dataclass(frozen=True)
class Update:
    """The derivative of one optimiser step in the gradient before clipping, g₀.

    Attributes:
        module: the bare network.
        derivative: D by parameter name.
        clipped: g, the gradient after clipping, by name; empty where nothing clips.
        clip_norm: or None.
        norm: ‖g₀‖ over all parameters, ().
    """

    module: nn.Module
    derivative: dict[str, Tensor | float]
    clipped: Tensors
    clip_norm: float | None
    norm: Tensor

    @classmethod
    def coming(
        cls, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None, norm: Tensor
    ) -> "Update":
        """Of the step that `optimizer` is about to take; gradients are in `.grad`, clipped.

        They are kept by reference and outlive a zero_grad() of the caller.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        gradients = {name: (p, p.grad) for name, p in module.named_parameters() if p.grad is not None}
        derivative = {
            name: update_derivative(optimizer, groups[id(p)], p, g)
            for name, (p, g) in gradients.items()
            if id(p) in groups  # those that are not trained are clipped with the others
        }
        clipped = {} if clip_norm is None else {name: local(g) for name, (_, g) in gradients.items()}
        return cls(module, derivative, clipped, clip_norm, norm)

    def pull_back(self, gradient: Tensors) -> Tensors:
        """v = (∂θ'/∂g₀)ᵀ ∇R by name, from ∇R; overwrites `gradient`."""
        v = {name: gradient[name].mul_(d) for name, d in self.derivative.items() if name in gradient}
        clip, n = self.clip_norm, self.norm
        if clip is None or clip / (n + 1e-6) >= 1:
            return v
        scale = clip / (n + 1e-6)
        raw = {name: g / scale for name, g in self.clipped.items()}
        along = sum(((v[name] * raw[name]).sum() for name in v), torch.zeros_like(n))
        along = sum_over_shards(self.module, along)
        clipped_away = along / (n * (n + 1e-6))
        return {name: scale * (v.get(name, 0.0) - g * clipped_away) for name, g in raw.items()}
