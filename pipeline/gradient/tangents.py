"""Forward-mode rules of a few layers, in fewer and fused operations than torch's own.

torch differentiates normalisation layers forward by a dozen elementwise operations, and in-place activations
by copies of their input. The Jacobian of a normalisation in its input is symmetric, so its fused *backward*
kernel is the forward-mode rule as well: for x̂ = (x − mean)·r, ∂x̂ = r·(∂x − mean(∂x) − x̂·mean(x̂·∂x)).
Whatever has no rule here, torch does. The results are the same to rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class FusedTangents(TorchFunctionMode):
    """Within this context the layers of `RULES` differentiate dual tensors by the rules here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            result = RULES[func](*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch statistics only; the running ones are not updated."""
    x, dx = unpack_dual(input)
    if not training or dx is None:
        return None
    gamma, dgamma = _parts(weight)
    beta, dbeta = _parts(bias)
    y, mean, r = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
    only_input = [True, False, False]
    dy = aten.native_batch_norm_backward(dx, x, gamma, None, None, mean, r, True, eps, only_input)[0]
    if dgamma is not None or dbeta is not None:  # + x̂·∂γ + ∂β, again the fused kernel
        scale = torch.zeros_like(mean) if dgamma is None else dgamma
        dy += torch.native_batch_norm(x, scale, dbeta, mean, r.pow(-2), False, 0.0, 0.0)[0]
    return make_dual(y, dy)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Over the last dimensions; without autocast, which would choose another precision."""
    x, dx = unpack_dual(input)
    if dx is None or torch.is_autocast_enabled(x.device.type):
        return None
    shape = list(normalized_shape)
    gamma, dgamma = _parts(weight)
    beta, dbeta = _parts(bias)
    y, mean, r = torch.native_layer_norm(x, shape, gamma, beta, eps)
    only_input = [True, False, False]
    dy = aten.native_layer_norm_backward(dx, x, shape, mean, r, None, None, only_input)[0]
    if gamma is not None:
        dy *= gamma
    if dgamma is not None:
        dy.addcmul_((x - mean) * r, dgamma)
    if dbeta is not None:
        dy += dbeta
    return make_dual(y, dy)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """∂y = ∂x·Wᵀ + x·∂Wᵀ + ∂b, added up inside the products; without autocast."""
    (x, dx), (w, dw), (b, db) = unpack_dual(input), unpack_dual(weight), _parts(bias)
    if dx is None or dw is None or torch.is_autocast_enabled(x.device.type):
        return None
    dy = F.linear(dx, w, db)
    dy.view(-1, dy.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), dw.t())
    return make_dual(F.linear(x, w, b), dy)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """softmax(q·kᵀ·scale)·v without mask or dropout; without autocast. The softmax is symmetric too."""
    (q, dq), (k, dk), (v, dv) = unpack_dual(query), unpack_dual(key), unpack_dual(value)
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not plain or dq is None or dk is None or dv is None or torch.is_autocast_enabled(q.device.type):
        return None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, dq = q * scale, dq * scale
    p = (q @ k.mT).softmax(-1)  # (…, N, N)
    dp = dq @ k.mT
    dp += q @ dk.mT
    dp = aten._softmax_backward_data(dp, p, -1, p.dtype)
    dy = dp @ v
    dy += p @ dv
    return make_dual(p @ v, dy)


def silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    """In place without torch's copies of the input."""
    x, dx = unpack_dual(input)
    if not inplace or dx is None:
        return None
    aten.silu_backward.grad_input(dx, x, grad_input=dx)
    F.silu(x, inplace=True)
    return input


def relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    """In place without torch's copies of the input."""
    x, dx = unpack_dual(input)
    if not inplace or dx is None:
        return None
    F.relu(x, inplace=True)
    aten.threshold_backward.grad_input(dx, x, 0, grad_input=dx)
    return input


def _parts(parameter: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Value and tangent of a parameter that may be absent."""
    return (None, None) if parameter is None else tuple(unpack_dual(parameter))


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
    F.silu: silu,
    F.relu: relu,
}
