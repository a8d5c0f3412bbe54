"""Directional derivatives of a network's log-probabilities in its weights.

`exact` is one forward-mode derivative (JVP); `central` and `one_sided` are finite differences for networks
with an operation that has none. All replay the training forward that was recorded: same weights, modes,
buffers, dropout and drop-path masks, precision, without touching the running statistics.

Source: docs/meta-gradient.md.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.distributed.sharded import is_sharded, local, norm_over_shards, reshard
from pipeline.errors import FeedbackError
from pipeline.gradient.tangents import FusedTangents

Engine = Literal["exact", "central", "one_sided"]
Tensors = dict[str, Tensor]

# Largest difference, in nats, allowed between the recorded log-probabilities and the replayed ones. A wrong
# mask, mode or weight moves them by far more; another attention kernel by 1e-15 (float64) or 5e-7 (float32).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.03}
FINITE_STEP = 3e-5  # ‖εv‖ / ‖θ‖ of finite differences in float32 (1e-6 in float64)


@dataclass(frozen=True)
class Replay:
    """What is needed to run a training forward again, exactly as it was.

    Attributes:
        module: the bare eager network.
        parameters: θ by name, as they were before the step; of a sharded network this process's part.
        buffers: every buffer by name, as it was before the step.
        modes: training flag of every submodule.
        images: the batch, (B, 3, H, W).
        rng: state of the CPU generator and, on an accelerator, of the images' device.
        autocast: dtype of mixed precision, or None.
    """

    module: nn.Module
    parameters: Tensors
    buffers: Tensors
    modes: dict[str, bool]
    images: Tensor
    rng: tuple[Tensor, Tensor | None]
    autocast: torch.dtype | None

    def log_probabilities(self, parameters: Tensors) -> Tensor:
        """log p of the batch at `parameters`, (B, C), under the recorded masks and modes."""
        given = {name: buffer.clone() for name, buffer in self.buffers.items()}
        with ExitStack() as stack:
            stack.enter_context(replayed_random_numbers(self.rng, self.images.device))
            stack.enter_context(training_modes(self.module, self.modes))
            if is_sharded(self.module):
                stack.enter_context(shards_set(self.module, parameters))
            else:
                given |= parameters
            return log_probabilities(
                lambda images: functional_call(self.module, given, (images,)), self.images, self.autocast
            )


def log_probabilities(network: Callable[[Tensor], Tensor], images: Tensor, autocast: torch.dtype | None) -> Tensor:
    """log softmax of the network's logits, (B, C), at least in float32."""
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        logits = network(images)
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


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
            raise FeedbackError(
                f"an operation of {type(replay.module).__name__} has no forward-mode derivative ({error}); "
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


def check_replay(primal: Tensor, recorded: Tensor, replay: Replay) -> None:
    """Refuse a replay that is not the recorded forward.

    Raises:
        FeedbackError: with the size of the difference.
    """
    allowed = TOLERANCE[replay.autocast or recorded.dtype]
    difference = float((primal - recorded).abs().max())
    if not difference <= allowed * max(1.0, float(recorded.abs().max())):
        raise FeedbackError(
            f"the replayed forward differs from the recorded one by {difference:.3g} nats (allowed "
            f"{allowed:.3g}): masks, modes or weights were not restored, so the gradient would be wrong. "
            "Random numbers inside the network must come from torch's default generators"
        )


def record(module: nn.Module, images: Tensor, autocast: torch.dtype | None, earlier: Replay | None = None) -> Replay:
    """Record what the coming forward depends on; call it before that forward.

    `earlier` is the record of another micro-batch of the same step: the weights are still the same.
    """
    if earlier:
        weights = earlier.parameters
    else:
        reshard(module)
        weights = {name: local(p.detach()).clone() for name, p in module.named_parameters()}
    return Replay(
        module=module,
        parameters=weights,
        buffers={name: b.detach().clone() for name, b in module.named_buffers()},
        modes={name: m.training for name, m in module.named_modules()},
        images=images,
        rng=random_state(images.device),
        autocast=autocast,
    )


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the CPU generator and, on an accelerator, of the device's."""
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


@contextmanager
def replayed_random_numbers(rng: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw the same random numbers as when `rng` was recorded; leave the generators as they were found."""
    cpu, accelerator = rng
    with ExitStack() as stack:
        if accelerator is None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            torch.get_device_module(device).set_rng_state(accelerator, device)
        torch.set_rng_state(cpu)
        yield


@contextmanager
def shards_set(module: nn.Module, values: Tensors) -> Iterator[None]:
    """Give a sharded network other parameters for a while: this process's part of each, by name."""
    reshard(module)
    shards = {name: local(p.detach()) for name, p in module.named_parameters()}
    before = {name: shards[name].clone() for name in values}
    try:
        torch._foreach_copy_([shards[name] for name in values], list(values.values()))
        yield
    finally:
        reshard(module)
        torch._foreach_copy_([shards[name] for name in values], list(before.values()))


@contextmanager
def training_modes(module: nn.Module, modes: dict[str, bool]) -> Iterator[None]:
    """Set every submodule's training flag for a while."""
    before = {name: m.training for name, m in module.named_modules()}
    try:
        for name, m in module.named_modules():
            m.training = modes.get(name, m.training)
        yield
    finally:
        for name, m in module.named_modules():
            m.training = before[name]


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
        log_p = log_probabilities(lambda x: functional_call(module, buffers, (x,)), images, autocast)
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
            log_probabilities(lambda x: functional_call(module, parameters | fixed | buffers, (x,)), images, autocast),
            labels,
        )
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return loss.detach(), in_memory_of_their_own(named)


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
            log_p = log_probabilities(lambda x: functional_call(module, buffers, (x,)), images, autocast)
            loss = F.nll_loss(log_p, labels)
            loss.backward()
        gradient = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    finally:
        for name, p in parameters.items():
            p.grad = kept[name]
    return loss.detach(), gradient


def row_parts(rows: int, parts: int) -> list[slice]:
    """`rows` cut into `parts` runs that differ by one row at most; fewer runs where there are fewer rows."""
    ends = [rows * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if b > a]


def global_norm(tensors: Tensors, module: nn.Module) -> Tensor:
    """Euclidean norm over all tensors together; over all parts, where `module` is sharded."""
    if is_sharded(module):
        return norm_over_shards(module, tensors.values())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()]))
