"""Directional derivatives of a network's log-probabilities in its weights.

`exact` is one forward-mode derivative (JVP); `central` and `one_sided` are finite differences for networks
with an operation that has none. All run the recorded forward again (`pipeline.gradient.replay`).

Source: docs/meta-gradient.md.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.distributed.sharded import is_sharded, norm_over_shards
from pipeline.errors import FeedbackError
from pipeline.gradient.replay import Replay, Tensors, check_replay
from pipeline.gradient.tangents import FusedTangents

Engine = Literal["exact", "central", "one_sided"]

FINITE_STEP = 3e-5  # ‖εv‖ / ‖θ‖ of finite differences in float32 (1e-6 in float64)


def directional_derivative(replay: Replay, direction: Tensors, engine: Engine, recorded: Tensor) -> Tensor:
    """d/dε log p(x; θ + ε·direction) at ε = 0, (B, C).

    Args:
        replay: the recorded forward; θ are its parameters.
        direction: v by name; a name that is absent counts as zero.
        engine: how to differentiate.
        recorded: log p of the recorded forward, (B, C): what the replay must reproduce.

    Raises:
        FeedbackError: the replay differs from the record, or the engine cannot differentiate the network.
    """
    module = replay.module
    check_engine(type(module).__name__, engine, sharded=is_sharded(module), autocast=replay.autocast)
    if engine == "exact":
        primal, tangent = forward_mode(replay, direction)
        check_replay(primal, recorded, replay)
        return tangent
    return finite_difference(replay, direction, engine, recorded)


def check_engine(network: str, engine: Engine, *, sharded: bool, autocast: torch.dtype | None) -> None:
    """Refuse an engine that cannot differentiate a network, whatever is in it.

    Raises:
        FeedbackError: says which can.
    """
    if engine == "exact" and sharded:
        raise FeedbackError(
            f"the parameters of {network} lie in shards (FSDP2), which have no forward-mode derivative; "
            "set the feedback engine to 'central' (finite differences), or take feedback 'hard', which needs none"
        ).on_all()
    if engine != "exact" and autocast is not None:
        raise FeedbackError(
            "finite differences lose 1 to 75% of the gradient under mixed precision; "
            "set precision to float32, or the feedback engine to 'exact'"
        ).on_all()


@torch.no_grad()
def forward_mode(replay: Replay, direction: Tensors) -> tuple[Tensor, Tensor]:
    """(log p, its derivative along `direction`), by one pass over dual numbers."""
    # the fused attention kernels have no JVP
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), FusedTangents():
        duals = {
            name: forward_ad.make_dual(value, direction[name]) if name in direction else value
            for name, value in replay.parameters.items()
        }
        try:
            primal, tangent = forward_ad.unpack_dual(replay.log_probabilities(duals))
        except RuntimeError as error:  # NotImplementedError is one, and custom functions raise it bare
            if "forward" not in str(error).lower():
                raise
            custom = "custom autograd.Function" in str(error)  # checkpoints are such, without reentry up to torch 2.8
            hint = "where it checkpoints activations: set use_reentrant=False, on torch 2.9 or newer; else " * custom
            raise FeedbackError(
                f"an operation of {type(replay.module).__name__} has no forward-mode derivative ({error}); {hint}"
                "set the feedback engine to 'central' (finite differences)"
            ) from error
    if tangent is None:
        raise FeedbackError(
            f"{type(replay.module).__name__} lost its forward-mode derivative on the way: a compiled or "
            "custom function inside it ignores dual numbers. Hand Student the eager module, or set the "
            "feedback engine to 'central'"
        )
    return primal, tangent


@torch.no_grad()
def finite_difference(replay: Replay, direction: Tensors, engine: Engine, recorded: Tensor) -> Tensor:
    """Central (error O(ε²), two passes) or one-sided (O(ε), one pass) difference."""
    theta = {name: value for name, value in replay.parameters.items() if name in direction}
    norm = global_norm(direction, replay.module)
    if norm == 0:
        return torch.zeros_like(recorded)
    step = FINITE_STEP if recorded.dtype == torch.float32 else 1e-6
    epsilon = step * float(global_norm(theta, replay.module)) / float(norm)

    def moved(by: float) -> Tensor:
        return replay.log_probabilities(
            replay.parameters | {name: value + by * direction[name] for name, value in theta.items()}
        )

    if engine == "one_sided":
        return (moved(epsilon) - recorded) / epsilon
    return (moved(epsilon) - moved(-epsilon)) / (2 * epsilon)


def global_norm(tensors: Tensors, module: nn.Module) -> Tensor:
    """Euclidean norm over all tensors together; over all parts, where `module` is sharded."""
    if is_sharded(module):
        return norm_over_shards(module, tensors.values())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()]))
