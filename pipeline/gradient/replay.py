"""The recorded forward of a training step, and running it again exactly as it was.

Same weights, modes, buffers, dropout and drop-path masks, precision, without touching the running statistics.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.distributed.sharded import is_sharded, local, reshard
from pipeline.errors import FeedbackError, UsageError

Tensors = dict[str, Tensor]
ONE_VALUE = "Expected more than 1 value per channel"  # torch's words

# Largest difference, in nats, allowed between the recorded log-probabilities and the replayed ones. A wrong
# mask, mode or weight moves them by far more; another attention kernel by 1e-15 (float64) or 5e-7 (float32).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.03}


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
            return log_probabilities(lambda images: call_with(self.module, given, images), self.images, self.autocast)


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


def call_with(module: nn.Module, tensors: Tensors, images: Tensor) -> Tensor:
    """The module's output with other parameters and buffers, by the names of `named_parameters`.

    A tensor is exchanged at every place where it hangs, once: a module that is reachable by two names is visited once,
    and a tensor that two modules share has one name. (`functional_call` by itself puts its own copies into the former
    for good.)
    """
    names = {id(tensor): name for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    places = {}
    for prefix, part in module.named_modules():
        for own, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None and (name := names.get(id(tensor))) in tensors:
                places[f"{prefix}.{own}" if prefix else own] = tensors[name]
    return functional_call(module, places, (images,), tie_weights=False)


def log_probabilities(network: Callable[[Tensor], Tensor], images: Tensor, autocast: torch.dtype | None) -> Tensor:
    """log softmax of the network's logits, (B, C), at least in float32."""
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        try:
            logits = network(images)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise UsageError(
                f"a batch normalisation is left with one value per channel, whose variance is none: {len(images)} "
                f"image(s) of {images.shape[-2]} × {images.shape[-1]} pixels at a time. Take larger batches (or fewer "
                "micro-batches or processes), larger images, or a network that keeps more than 1 × 1 of them"
            ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the network must return logits (B, C), and returned {found}; wrap it in a module that does")
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


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
