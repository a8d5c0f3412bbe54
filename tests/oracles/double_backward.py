"""dR/dq by autograd through the whole optimiser step: equation 2 of arXiv:2003.10580v1, literally.

Every update rule is written again from its definition as a differentiable function; nothing of
`pipeline.optim` or `pipeline.feedback` is used.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import RMSpropTF
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def root(x: Tensor) -> Tensor:
    """√x whose derivative at 0 is 0 instead of NaN."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)


def updated(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor, theta: Tensor, g: Tensor) -> Tensor:
    """θ' = θ + f(g) of one parameter, differentiable in g; `p` finds the state, `theta` is the value."""
    state, lr, mu = optimizer.state.get(p, {}), group["lr"], group.get("momentum", 0.0)
    decay = group["weight_decay"]
    if isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay") or group.get("decoupled_decay"):
        theta = theta * (1 - lr * decay)
    else:
        g = g + decay * theta
    if isinstance(optimizer, torch.optim.SGD):
        if not mu:
            return theta - lr * g
        buffer = state.get("momentum_buffer")
        moved = g if buffer is None else mu * buffer + g
        return theta - lr * (g + mu * moved if group["nesterov"] else moved)
    if isinstance(optimizer, torch.optim.RMSprop):
        square = group["alpha"] * state.get("square_avg", torch.zeros_like(g)) + (1 - group["alpha"]) * g**2
        moved = mu * state.get("momentum_buffer", torch.zeros_like(g)) + g / (root(square) + group["eps"])
        return theta - lr * moved
    if isinstance(optimizer, RMSpropTF):
        before = state.get("square_avg", torch.ones_like(g))
        square = before + (1 - group["alpha"]) * (g**2 - before)
        moved = mu * state.get("momentum_buffer", torch.zeros_like(g)) + lr * g / (square + group["eps"]) ** 0.5
        return theta - moved
    assert isinstance(optimizer, torch.optim.Adam)
    beta1, beta2 = group["betas"]
    t = float(state.get("step", 0)) + 1
    m = beta1 * state.get("exp_avg", torch.zeros_like(g)) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", torch.zeros_like(g)) + (1 - beta2) * g**2
    return theta - lr * (m / (1 - beta1**t)) / (root(v) / (1 - beta2**t) ** 0.5 + group["eps"])


def step_and_loss(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    labelled: Tensor,
    labels: Tensor,
    *,
    clip_norm: float | None = None,
    weight: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """R(θ') as a differentiable function of `targets`, and θ'. The model and the optimiser are not touched."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def forward(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        return F.log_softmax(functional_call(model, parameters | copies, (x,)), dim=1)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no double backward
        if seed is not None:
            torch.manual_seed(seed)
        rows = -(targets * forward(theta, images)).sum(1)
        loss = (rows if weight is None else weight * rows).mean()
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        if clip_norm is not None:
            norm = sum((g**2).sum() for g in gradients) ** 0.5
            gradients = tuple(g * torch.clamp(clip_norm / (norm + 1e-6), max=1.0) for g in gradients)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        after = {
            name: updated(optimizer, groups[id(p)], p, theta[name], g)
            if id(p) in groups and p.requires_grad
            else theta[name]
            for (name, p), g in zip(model.named_parameters(), gradients, strict=True)
        }
        modes = {m: m.training for m in model.modules()}
        for m in modes:  # batch statistics as in training, no dropout, no drop path
            m.training = isinstance(m, nn.modules.batchnorm._BatchNorm)
        try:
            feedback = F.nll_loss(forward(after, labelled), labels)
        finally:
            for m, mode in modes.items():
                m.training = mode
    return feedback, after


def target_gradient(*args: Any, **kwargs: Any) -> Tensor:
    """dR/dq, (B, C); fails on anything that is not finite."""
    model, optimizer, images, targets, *rest = args
    targets = targets.detach().clone().requires_grad_()
    feedback, _ = step_and_loss(model, optimizer, images, targets, *rest, **kwargs)
    (gradient,) = torch.autograd.grad(feedback, targets)
    assert torch.isfinite(gradient).all()
    return gradient


def teacher_gradient(
    teacher: Callable[[], Tensor], parameters: list[Tensor], *args: Any, **kwargs: Any
) -> list[Tensor]:
    """∇_Ψ R with targets = teacher(), backpropagated through the student's update: equation 2 end to end."""
    model, optimizer, images, *rest = args
    feedback, _ = step_and_loss(model, optimizer, images, teacher(), *rest, **kwargs)
    return list(torch.autograd.grad(feedback, parameters))
