"""What a computation allocates and calculates, event by event, on tensors that may have no data.

Run on fake tensors (shapes and types alone), a pass over a network costs no memory and hardly any time, and tells
exactly which tensors a real one would hold at every moment. Two runs, with different numbers of images, give every
moment as bytes that stand plus bytes per image; so the peak is known for any number of images.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from pipeline.errors import UserError

Inputs = TypeVar("Inputs")
aten = torch.ops.aten
FEW, MORE = 2, 3  # images of the two runs; batch statistics need two


class PlanError(UserError):
    """A network, a recipe or a cluster cannot be planned for; says why."""


class LiveBytes(TorchDispatchMode):
    """Within this context: bytes of living tensors that began here, and floating-point operations.

    What exists before counts for nothing. A multiplication and an addition are two operations; elementwise
    operations count as none, as is usual. Memory that a kernel uses inside itself is not seen.

    Attributes:
        now, peak: bytes.
        flops: so far.
        trace: living bytes after each allocation.
        turned: (events, living bytes) at the turning point.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0
        self.trace: list[int] = []
        self.turned: tuple[int, int] = (0, 0)
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), -1)  # not ours
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._begin(storage)
        self.flops += operations(func, args, kwargs, out)
        return out

    def turn(self) -> None:
        """Now the forward pass ends and the backward pass begins."""
        self.turned = len(self.trace), self.now

    def born(self, tensor: Tensor) -> int:
        """Number of the event at which the tensor's memory was allocated; −1 where it was there before."""
        return self._known.get(tensor.untyped_storage(), -1)

    def _begin(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = len(self.trace)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.trace.append(self.now)
        weakref.finalize(storage, self._end, size).atexit = False

    def _end(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # torch counts the others alone


def operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one call of an operator."""
    packet = getattr(func, "_overloadpacket", func)
    packet = IN_PLACE.get(packet, packet)
    if packet == aten.convolution_backward:  # torch's own formula forgets groups: 14 times too many for a B0
        gradient, images, weight = args[0], args[1], args[2]
        transposed, wanted = bool(args[7]), args[10]
        return sum(wanted[:2]) * conv_flop_count(images.shape, weight.shape, gradient.shape, transposed)
    if packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


@dataclass(frozen=True)
class Part:
    """Living bytes at each event of a part of a pass, (E,): `standing` whatever the images, and per image, both
    without the gradients of the weights, which are `gradient`."""

    standing: np.ndarray
    per_image: np.ndarray
    gradient: np.ndarray

    def moment(self, images: int, shards: int = 1) -> tuple[int, int]:
        """(activations, gradients) in bytes at the moment when both together are largest.

        Args:
            images: of one micro-batch.
            shards: devices that the gradients are divided over.
        """
        if not len(self.standing):
            return 0, 0
        activations, gradients = self.standing + self.per_image * images, self.gradient / shards
        at = int(np.argmax(activations + gradients))
        return int(activations[at]), int(gradients[at])

    def activations(self, images: int) -> int:
        """Largest bytes of activations, gradients aside."""
        return int((self.standing + self.per_image * images).max(initial=0.0))


@dataclass(frozen=True)
class Pass:
    """One pass over a network, for any number of images.

    Attributes:
        forward, backward: before and after the turning point; a pass without one is all forward.
        held_standing, held_per_image: bytes that live at the turning point, waiting for the backward pass.
        flops_standing, flops_per_image: floating-point operations.
    """

    forward: Part
    backward: Part
    held_standing: float
    held_per_image: float
    flops_standing: float
    flops_per_image: float

    def peak(self, images: int) -> int:
        """Most bytes that live at a time, gradients included."""
        return max(sum(self.forward.moment(images)), sum(self.backward.moment(images)))

    def held(self, images: int) -> int:
        """Bytes that wait for the backward pass."""
        return int(self.held_standing + self.held_per_image * images)

    def flops(self, images: float) -> float:
        """Floating-point operations."""
        return self.flops_standing + self.flops_per_image * images


@dataclass(frozen=True)
class _Record:
    trace: np.ndarray  # living bytes at each allocation
    gradient: np.ndarray  # of them gradients
    turned: tuple[int, int]
    flops: int


def follow(prepare: Callable[[int], Inputs], run: Callable[[Inputs, LiveBytes], Iterable[Tensor]], what: str) -> Pass:
    """Measure a pass.

    Args:
        prepare: the inputs of a pass over so many images; they count for nothing.
        run: makes the pass, says where it turns, and returns the gradients of the weights that it made, if any.
            What it holds while it runs is what a real pass would hold.
        what: for messages.

    Raises:
        PlanError: the passes with different numbers of images differ in more than size.
    """
    few, more = _record(prepare(FEW), run), _record(prepare(MORE), run)
    if len(few.trace) != len(more.trace) or few.turned[0] != more.turned[0]:
        raise PlanError(
            f"{what} allocates {len(few.trace)} tensors for {FEW} images and {len(more.trace)} for {MORE}: "
            "what it needs for others cannot be told"
        )
    per_image = (more.trace - few.trace) / (MORE - FEW)
    standing = few.trace - FEW * per_image - few.gradient
    held = (more.turned[1] - few.turned[1]) / (MORE - FEW)
    flops = (more.flops - few.flops) / (MORE - FEW)
    turn = few.turned[0] or len(few.trace)
    forward, backward = (Part(standing[s], per_image[s], few.gradient[s]) for s in (slice(turn), slice(turn, None)))
    return Pass(forward, backward, few.turned[1] - FEW * held, held, few.flops - FEW * flops, flops)


def _record(inputs: Inputs, run: Callable[[Inputs, LiveBytes], Iterable[Tensor]]) -> _Record:
    with LiveBytes() as live:
        gradients = list(run(inputs, live))
    step = np.zeros(len(live.trace))
    for at, size in {live.born(g): g.untyped_storage().nbytes() for g in gradients}.items():
        if at >= 0:
            step[at] = size
    return _Record(np.array(live.trace, dtype=np.float64), np.cumsum(step), live.turned, live.flops)
