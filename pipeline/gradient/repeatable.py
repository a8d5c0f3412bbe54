"""Whether a network's forward can be run again as it was: asked at a student's first steps.

The replay of every step is compared with what was recorded (`pipeline.gradient.replay.check_replay`), by its
log-probabilities. Those of a head that starts at zero are the same under any mask, and in bf16 a mask moves them by no
more than rounding does. So the forwards of the first steps are run twice, and compared wherever a module takes or gives
a tensor.
"""

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from pipeline.errors import FeedbackError
from pipeline.gradient.replay import Replay, check_replay

Sums = list[tuple[str, float, float]]  # of a tensor: whose, the sum, the sum of absolute values
CHECKS = 3  # steps that are tried: a coin that is tossed once a forward falls the same way twice half of the time
ROUNDING = 1e-6  # relative difference of a sum that kernels without a fixed order may leave


@torch.no_grad()
def check_repeatable(replay: Replay, recorded: Tensor, *, compiled: bool) -> None:
    """Refuse a network that does not do the same twice, or that was recorded compiled with other masks.

    Args:
        replay: of the forward that was just recorded.
        recorded: its log-probabilities, (B, C).
        compiled: whether torch.compile ran it.

    Raises:
        FeedbackError: names the first module that differs.
    """
    if is_fake(recorded):
        return  # numbers that are none cannot be compared
    others = _other_generators()
    (first, again), (once, twice) = _watched(replay), _watched(replay)
    if others != _other_generators():
        raise FeedbackError(
            "the network draws random numbers from Python or NumPy, which cannot be drawn again; take torch.rand and "
            "the like without a generator"
        )
    for (name, *before), (_, *after) in zip(first, once, strict=False):
        if any(abs(a - b) > ROUNDING * max(before[1], after[1]) for a, b in zip(before, after, strict=True)):
            raise FeedbackError(
                f"the network does not do the same twice: {name} differs, at the same weights, images and state of "
                "torch's generators. Random numbers inside it must come from torch's default generators (no "
                "torch.Generator, NumPy or Python's random), and nothing may be counted or kept between calls"
            )
    check_replay(twice, again, replay)
    if compiled:
        try:
            check_replay(again, recorded, replay)
        except FeedbackError as error:
            raise FeedbackError(
                "the compiled network draws other masks than the eager one, which feedback runs again: set "
                "torch._inductor.config.fallback_random = True before torch.compile, or leave dropout and drop path out"
            ) from error


def _other_generators() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state()))


def _watched(replay: Replay) -> tuple[Sums, Tensor]:
    """The replayed forward: sums of what every module was given and gave, and its log-probabilities."""
    sums: Sums = []
    with _told(replay.module, lambda name, tensor: sums.append((name, *_sums(tensor)))):
        log_p = replay.log_probabilities(replay.parameters)
    return sums, log_p


def _sums(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().double() if tensor.device.type != "mps" else tensor.detach().float()
    return float(values.sum()), float(values.abs().sum())


@contextmanager
def _told(module: nn.Module, tell: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context every submodule tells the floating-point tensors that it is given and gives."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], gave: Any) -> None:
            for tensor in (*given, *(gave if isinstance(gave, tuple | list) else (gave,))):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tell(name, tensor)

        return hook

    handles = [
        part.register_forward_hook(hook_of(name or type(module).__name__)) for name, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
